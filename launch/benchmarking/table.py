"""What was measured as lines and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.benchmarking.kpi import Ratio
from launch.benchmarking.measure import Cell, Measured, Variant
from launch.benchmarking.rates import Rates
from model.config import ModelConfig
from model.cost.parameters import decode_cost, prefill_flops

TIMES = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "tpot_p50")
JOULES_PER_KWH = 3.6e6
RATES = ("tokens_per_second", "total_tokens_per_second", "goodput")


def entry(
    config: ModelConfig,
    variant: Variant,
    cell: Cell,
    measured: Measured,
    base: Measured,
    new_tokens: int,
    rates: Rates,
    cache_bytes_per_token: float,
    width: int,
    attention: dict[str, Any],
    price_per_hour: float | None,
    expert_width: int | None = None,
    price_per_kwh: float | None = None,
) -> dict[str, Any]:
    """All numbers of a variant in a cell.

    Args:
        base: the first variant in it; width: bytes of a parameter; expert_width: of the experts',
            None: likewise; attention: arguments of the variant's, empty where it is dense.
    """
    routing = measured.routing
    middle = {name: measured.middle(name) for name in (*TIMES, *RATES)}
    # Halfway through the generated tokens.
    length = cell.context + new_tokens // 2
    cost = decode_cost(
        config,
        routing.decode_experts,
        routing.distinct_experts,
        cell.rows,
        length,
        cache_bytes_per_token,
        width,
        expert_width,
        attention,
    )
    prompt = prefill_flops(config, routing.prefill_experts, cell.context, attention)
    step = rates.seconds(cost.flops * cell.rows, cost.num_bytes * cell.rows)
    ratios: dict[str, Ratio] = {
        name: measured.ratio(base, name) for name in ("tokens_per_second", "ttft_p50", "itl_p50")
    }
    found = {
        "attention": variant.attention,
        "budget": variant.budget,
        "rows": cell.rows,
        "context": cell.context,
        "rounds": len(measured.rounds),
        **{f"{name}_ms": middle[name] * 1e3 for name in TIMES},
        **{name: middle[name] for name in RATES},
        **dataclasses.asdict(routing),
        "decode_flops_per_token": cost.flops,
        "decode_bytes_per_token": cost.num_bytes,
        "prefill_flops_per_token": prompt / cell.context,
        "decode_roofline_share": step / middle["itl_p50"],
        "prefill_roofline_share": rates.seconds(prompt * cell.rows, 0.0) / middle["ttft_p99"],
        "cache_bytes": measured.cache_bytes,
        "peak_bytes": measured.peak_bytes,
        "joules_per_token": measured.joules_per_token,
        "ratios": {name: dataclasses.asdict(ratio) for name, ratio in ratios.items()},
    }
    if price_per_hour is not None:
        per_token = price_per_hour / 3600 / middle["tokens_per_second"]
        found["cost_per_million_tokens"] = per_token * 1e6
    if price_per_kwh is not None:
        joules = measured.joules_per_token
        found["energy_cost_per_million_tokens"] = (
            None if joules is None else joules * 1e6 / JOULES_PER_KWH * price_per_kwh
        )
    return found


COLUMNS = (
    ("attention, budget", 22),
    ("loss", 20),
    ("experts", 11),
    ("TTFT p50/p99 ms", 16),
    ("ITL p50/p99 ms", 14),
    ("TPOT", 7),
    ("tok/s", 8),
    ("to the first", 22),
    ("goodput", 8),
    ("MFLOP pre/dec", 14),
    ("MB/tok", 7),
    ("roof pre/dec", 13),
    ("cache MB", 9),
)


def lines(cell: Cell, entries: Sequence[dict[str, Any]]) -> list[str]:
    """The table of one cell."""
    columns = list(COLUMNS)
    if any(e["peak_bytes"] for e in entries):
        columns.append(("peak GB", 8))
    if any("cost_per_million_tokens" in e for e in entries):
        columns.append(("cost/M", 8))
    if any(e.get("joules_per_token") is not None for e in entries):
        columns.append(("J/tok", 8))
    if any(e.get("energy_cost_per_million_tokens") is not None for e in entries):
        columns.append(("energy/M", 8))
    head = "  ".join(name.rjust(width) for name, width in columns)
    found = [f"{cell.rows} rows of {cell.context} tokens, {entries[0]['rounds']} rounds", head]
    for e in entries:
        budget = "trained" if e["budget"] is None else format(e["budget"], "g")
        ratio = e["ratios"]["tokens_per_second"]
        cells = [
            f"{e['attention']}, {budget}",
            _loss(e.get("loss")),
            f"{e['decode_experts']:.2f}/{e['distinct_experts']:.1f}",
            f"{e['ttft_p50_ms']:.1f}/{e['ttft_p99_ms']:.1f}",
            f"{e['itl_p50_ms']:.1f}/{e['itl_p99_ms']:.1f}",
            f"{e['tpot_p50_ms']:.1f}",
            f"{e['tokens_per_second']:.1f}",
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            f"{e['goodput']:.2f}",
            f"{e['prefill_flops_per_token'] / 1e6:.1f}/{e['decode_flops_per_token'] / 1e6:.1f}",
            f"{e['decode_bytes_per_token'] / 1e6:.2f}",
            f"{e['prefill_roofline_share']:.0%}/{e['decode_roofline_share']:.0%}",
            f"{e['cache_bytes'] / 1e6:.1f}",
        ]
        if ("peak GB", 8) in columns:
            cells.append(f"{(e['peak_bytes'] or 0) / 1e9:.2f}")
        if "cost_per_million_tokens" in e:
            cells.append(f"{e['cost_per_million_tokens']:.3g}")
        for name, key in (
            ("J/tok", "joules_per_token"),
            ("energy/M", "energy_cost_per_million_tokens"),
        ):
            if (name, 8) in columns:
                cells.append("-" if e.get(key) is None else f"{e[key]:.3g}")
        widths = [width for _, width in columns]
        found.append("  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    return found


def _loss(loss: dict[str, float] | None) -> str:
    """Held-out, to the largest budget of the table."""
    if loss is None:
        return "-"
    low, high = loss["difference_low"], loss["difference_high"]
    return f"{loss['val_loss']:.4f} {loss['difference']:+.4f}" + (
        "" if low == high else f"±{(high - low) / 2:.4f}"
    )
