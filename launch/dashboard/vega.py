"""Charts of expert load as Vega-Lite presets for W&B, and the same charts as PNG without an
account.

A preset names its columns `${field:NAME}` and its texts `${string:NAME}`; W&B fills them in from a
logged table:

    wandb.plot_table("ENTITY/loadstone_expert_load", wandb.Table(...), fields={"layer": "layer",
    ...}, string_fields={...})

Rows come from routing.jsonl: `rows_of`. Imports neither torch nor wandb.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from train.files.strict_json import dumps

SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
Row = dict[str, float]

_LOAD = {
    "title": "load / mean",
    "scale": {
        "scheme": "redblue",
        "reverse": True,
        "domain": [0, 2],
        "domainMid": 1,
        "clamp": True,
    },
}
"""1 is fair and pale; without clamp, values beyond the domain are drawn black."""
_ORDINAL = {
    "type": "ordinal",
    "axis": {"labelAngle": 0, "labelOverlap": True, "labelSeparation": 6},
}
_LAYER_ROW = {"field": "${field:layer}", "title": "layer", **_ORDINAL}
_LAYER_COLOR = {
    "field": "${field:layer}",
    "title": "layer",
    "type": "quantitative",
    "scale": {"scheme": "viridis"},
    "legend": {"labelExpr": "datum.value % 1 ? '' : format(datum.value, 'd')"},
}
"""A gradient: a legend of 48 entries would be taller than the chart."""


@dataclass(frozen=True)
class Preset:
    """One chart."""

    display_name: str
    """What W&B calls it."""
    spec: dict[str, Any]
    """The chart in Vega's or Vega-Lite's language."""
    fields: tuple[str, ...]
    """Columns that it draws."""
    strings: dict[str, str]
    """Its texts, with what they say by default."""
    rows: Callable[[list[dict[str, Any]], Sequence[int]], list[Row]]
    """Makes the table from records of routing.jsonl and the numbers of the MoE layers."""


def load_rows(records: list[dict[str, Any]], layers: Sequence[int]) -> list[Row]:
    """layer, expert, load: of the last record, assignments over the layer's mean."""
    return [
        {"layer": layer, "expert": expert, "load": count * len(counts) / max(1, sum(counts))}
        for layer, counts in zip(layers, records[-1]["counts"], strict=True)
        for expert, count in enumerate(counts)
    ]


def k_rows(records: list[dict[str, Any]], layers: Sequence[int]) -> list[Row]:
    """layer, experts, share: of the last record, the share of tokens that visit so many experts."""
    return [
        {"layer": layer, "experts": k, "share": tokens / max(1, sum(histogram))}
        for layer, histogram in zip(layers, records[-1]["k_histogram"], strict=True)
        for k, tokens in enumerate(histogram)
    ]


def violation_rows(records: list[dict[str, Any]], layers: Sequence[int]) -> list[Row]:
    """step, layer, violation: the busiest expert's load over the mean, minus 1, of every record (of
    many, MAX_COLUMNS).
    """
    stride = -(-len(records) // MAX_COLUMNS)
    return [
        {
            "step": record["step"],
            "layer": layer,
            "violation": max(counts) * len(counts) / max(1, sum(counts)) - 1,
        }
        for record in records[::stride]
        for layer, counts in zip(layers, record["counts"], strict=True)
    ]


MAX_COLUMNS = 200
MAX_ROWS = 10_000
"""What W&B keeps of a table; of larger ones we leave out layers, evenly."""


def thinned(rows: list[Row]) -> list[Row]:
    layers = sorted({row["layer"] for row in rows})
    kept = set(layers[:: -(-len(rows) // MAX_ROWS)])
    return [row for row in rows if row["layer"] in kept]


PRESETS = {
    "expert_load": Preset(
        "Expert load: layer x expert",
        {
            "mark": {"type": "rect", "tooltip": True},
            "encoding": {
                "x": {"field": "${field:expert}", "title": "expert", **_ORDINAL},
                "y": _LAYER_ROW,
                "color": {"field": "${field:load}", "type": "quantitative", **_LOAD},
            },
        },
        ("layer", "expert", "load"),
        {"title": "Expert load over the layer's mean"},
        load_rows,
    ),
    "load_curve": Preset(
        "Expert load: busiest to idlest",
        {
            "transform": [
                {
                    "window": [{"op": "row_number", "as": "rank"}],
                    "groupby": ["${field:layer}"],
                    "sort": [{"field": "${field:load}", "order": "descending"}],
                }
            ],
            "layer": [
                {
                    "mark": {"type": "line", "tooltip": True},
                    "encoding": {
                        "x": {
                            "field": "rank",
                            "type": "quantitative",
                            "title": "rank in the layer, busiest expert first",
                            "axis": {"tickMinStep": 1, "format": "d"},
                            "scale": {"nice": False, "zero": False},
                        },
                        "y": {
                            "field": "${field:load}",
                            "type": "quantitative",
                            "title": "load / mean",
                        },
                        "color": _LAYER_COLOR,
                        "detail": {"field": "${field:layer}"},
                    },
                },
                {
                    "mark": {"type": "rule", "strokeDash": [4, 4], "color": "gray"},
                    "encoding": {"y": {"datum": 1}},
                },
            ],
        },
        ("layer", "load"),
        {"title": "Load by rank: a flat line at 1 is fair"},
        load_rows,
    ),
    "experts_per_token": Preset(
        "Experts per token: distribution",
        {
            "layer": [
                {
                    "mark": {"type": "bar", "color": "#9ecae1", "tooltip": True},
                    "encoding": {
                        "y": {
                            "aggregate": "mean",
                            "field": "${field:share}",
                            "type": "quantitative",
                            "axis": {"format": "%"},
                            "title": "share of tokens: mean (bar), layers (ticks)",
                        }
                    },
                },
                {
                    "mark": {"type": "tick", "thickness": 2, "tooltip": True},
                    "encoding": {
                        "y": {"field": "${field:share}", "type": "quantitative"},
                        "color": _LAYER_COLOR,
                    },
                },
            ],
            "encoding": {
                "x": {"field": "${field:experts}", "title": "experts of a token", **_ORDINAL}
            },
        },
        ("layer", "experts", "share"),
        {"title": "Tokens by number of experts"},
        k_rows,
    ),
    "max_violation": Preset(
        "Max violation: layer x step",
        {
            "mark": {"type": "rect", "tooltip": True},
            "encoding": {
                "x": {"field": "${field:step}", "title": "step", **_ORDINAL},
                "y": _LAYER_ROW,
                "color": {
                    "field": "${field:violation}",
                    "type": "quantitative",
                    "title": "max violation",
                    "scale": {"scheme": "orangered", "domain": [0, 2], "clamp": True},
                },
            },
        },
        ("step", "layer", "violation"),
        {"title": "Busiest expert over the mean, minus 1"},
        violation_rows,
    ),
}
"""W&B knows them as ENTITY/loadstone_<name>."""


def spec_of(preset: Preset) -> dict[str, Any]:
    """The Vega-Lite spec that W&B keeps, with placeholders."""
    return {"$schema": SCHEMA, "data": {"name": "wandb"}, "title": "${string:title}", **preset.spec}


def filled(
    preset: Preset, rows: list[Row], strings: dict[str, str] | None = None
) -> dict[str, Any]:
    """The spec as W&B would draw it: columns and texts filled in, rows in place, with a size.

    Raises:
        ValueError: the rows lack a column.
    """
    missing = sorted(set(preset.fields) - set(rows[0])) if rows else list(preset.fields)
    if missing:
        raise ValueError(
            f"the chart {preset.display_name!r} needs the columns {', '.join(missing)}"
        )

    values = {
        "field": {name: name for name in preset.fields},
        "string": preset.strings | (strings or {}),
    }

    # A heatmap has a row per layer, and few layers must not make a stripe.
    num_layers = len({row["layer"] for row in rows})
    height = (
        {"step": min(24, max(6, 480 // num_layers))}
        if preset.spec.get("mark", {}).get("type") == "rect"
        else 220
    )

    return {
        **_fill(spec_of(preset), values),
        "data": {"values": rows},
        "width": 420,
        "height": height,
    }


def _fill(node: Any, values: dict[str, dict[str, str]]) -> Any:
    if isinstance(node, dict):
        return {key: _fill(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(item, values) for item in node]
    if isinstance(node, str):
        return PLACEHOLDER.sub(lambda m: values[m["kind"]][m["name"]], node)
    return node


PLACEHOLDER = re.compile(r"\$\{(?P<kind>field|string):(?P<name>\w+)\}")


def placeholders(spec: dict[str, Any]) -> set[tuple[str, str]]:
    """(kind, name) of every placeholder in a spec."""
    return {(m["kind"], m["name"]) for m in PLACEHOLDER.finditer(dumps(spec))}


def render(chart: dict[str, Any]) -> bytes:
    """PNG of a filled spec, without a browser or a network.

    Raises:
        ImportError: vl-convert-python is not installed.
    """
    import vl_convert

    return vl_convert.vegalite_to_png(dumps(chart), scale=2)
