"""The report's page: numbers and alarms as plain HTML, everything drawn as one JSON payload for the
template's script.
"""

from __future__ import annotations

import base64
import math
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.history.comparable import incomparable, measure_of
from launch.history.differences import SET, differences, shareable
from launch.page.templates import embedded, templates
from launch.process.secrets import redact_text
from launch.runs.records import Curve, Frames, RunData, evenly
from launch.saved.resume import shown
from train.observe.catalogue.names import REASONS, find
from train.observe.catalogue.record import Better

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 1000
"""Points of a curve; of longer ones evenly spread records are drawn."""
MAX_ACTIVE = 8
"""Active alarms that are listed at once; the others can be unfolded."""
MAX_PAST = 20
"""Alarms that are over, the latest ones, that the page lists."""


# --- what is shown --------------------------------------------------------------------------------


FORMATS = {
    "share": "percent",
    "relative": "percent",
    "s": "seconds",
    "GiB": "gib",
    "experts": "count",
    "layers": "count",
    "steps": "count",
}
"""How numbers of a unit of the catalogue are written (see fmt()); all others as plain numbers."""


def format_of(metric: str) -> str:
    return FORMATS.get(find(metric).unit, "number")


@dataclass(frozen=True)
class Chart:
    """A line chart of metrics, which share a format."""

    section: str
    """Section of the page that it stands in."""
    title: str
    """What stands above it."""
    series: tuple[tuple[str, str], ...]
    """(metric, label) of every line."""
    unit: str
    """How its numbers are written: see fmt() here and in the template."""
    note: str
    """What to look for, in one sentence."""
    x: str
    """tokens, flops, or any (the reader's choice)."""
    reference: tuple[str, str] | None
    """(name in the run's references, label) of a horizontal line."""


def _chart(
    section: str,
    title: str,
    series: tuple[tuple[str, str], ...],
    note: str,
    x: str = "any",
    reference: tuple[str, str] | None = None,
) -> Chart:
    """A chart whose numbers are written as the catalogue says of its first metric."""
    return Chart(section, title, series, format_of(series[0][0]), note, x, reference)


_LOSS = (("train/loss", "training"), ("eval/val_loss", "held-out"))
CHARTS = (
    _chart("loss", "Loss by tokens", _LOSS, "Nats per token.", "tokens"),
    _chart(
        "loss",
        "Loss by spent FLOPs",
        _LOSS,
        "The same by training FLOPs: what the compute bought.",
        "flops",
    ),
    _chart(
        "loss",
        "Gradient norm",
        (("train/grad_norm", "norm"),),
        "Over all parameters, before clipping.",
    ),
    _chart("loss", "Learning rate", (("train/lr", "lr"),), "As scheduled."),
    _chart(
        "budget",
        "Experts per token",
        (("moe/experts_per_token", "mean"), ("moe/experts_per_token/max", "largest layer")),
        "What routing spends, against its budget.",
        reference=("target", "budget"),
    ),
    _chart(
        "budget",
        "Budget error",
        (("moe/budget_error", "mean"), ("moe/budget_error/max", "largest layer")),
        "Experts per token over the budget, minus one.",
        reference=("zero", "on budget"),
    ),
    _chart(
        "budget",
        "Controller",
        (("moe/theta", "theta"), ("moe/top_p", "top_p")),
        "The state that moves experts per token to the budget.",
    ),
    _chart(
        "budget",
        "Share of the adaptive mode",
        (("moe/mode_share", "mean"),),
        "The rest is plain top-k: warm start, guard or collapse.",
    ),
    _chart(
        "balance",
        "MaxVio",
        (("moe/max_vio", "mean of layers"), ("moe/max_vio/max", "largest layer")),
        "Busiest expert's load over the mean, minus one; 0 is even.",
    ),
    _chart(
        "balance",
        "Load entropy",
        (("moe/load_entropy", "mean of layers"),),
        "Nats; an even load has the logarithm of the number of experts.",
        reference=("even_entropy", "even"),
    ),
    _chart(
        "balance",
        "Dead experts",
        (("moe/dead_experts", "without any token"),),
        "Over all layers.",
    ),
    _chart(
        "balance",
        "Rank load",
        (("moe/rank_load", "mean of layers"), ("moe/rank_load/max", "largest layer")),
        "Busiest rank over the mean rank: the others wait for it.",
        reference=("one", "even"),
    ),
    _chart(
        "balance",
        "Busiest and idlest expert",
        (("moe/max_load", "busiest"), ("moe/min_load", "idlest")),
        "Load over the mean, of all layers.",
        reference=("one", "even"),
    ),
    _chart(
        "balance",
        "Share of the busiest",
        (
            ("moe/hot_fraction", "busiest expert"),
            ("moe/concentration/max", "busiest k, worst layer"),
        ),
        "Of a layer's assignments; near 100% it has collapsed.",
    ),
    _chart(
        "balance",
        "Router stability",
        (("eval/router_stability", "held-out tokens"),),
        "Share of a token's experts that it had at the evaluation before.",
    ),
    _chart(
        "balance",
        "Router entropy",
        (("moe/router_entropy", "mean of layers"),),
        "Of the softmax, over its largest value: 100% is undecided.",
    ),
    _chart(
        "fallbacks",
        "Tokens by reason",
        tuple((f"moe/fallback/{name}", name) for name in REASONS),
        "Share of tokens and layers that were routed "
        "otherwise than the router's mode alone would have.",
    ),
    _chart(
        "fallbacks",
        "Dropped and spilled",
        (("moe/dropped", "dropped"), ("moe/spilled", "spilled")),
        "Share of assignments that no expert computed, or another one.",
    ),
    _chart(
        "fallbacks",
        "Layers in fallback",
        (("moe/layers_in_fallback", "plain top-k"), ("moe/layers_collapsed", "collapsed")),
        "Layers, not tokens.",
    ),
    _chart(
        "attention",
        "Attention error",
        (
            ("attention/error", "mean"),
            ("attention/error/max", "largest layer"),
            ("attention/error_bound", "bound on the mean"),
        ),
        "Audited rows: distance from dense attention over its norm.",
    ),
    _chart(
        "attention",
        "Softmax mass",
        (("attention/tail_mass", "pooled tail"), ("attention/selected_mass", "selected blocks")),
        "Where attention looks: exactly (selected) or by pooled entries (tail).",
    ),
    _chart(
        "attention",
        "Certificate",
        (("attention/certificate", "bound"), ("attention/certificate_coverage", "covered rows")),
        "Bound on the error per row, and the share of audited rows it covers.",
    ),
    _chart(
        "attention",
        "Resident blocks",
        (("attention/resident_recall", "resident"),),
        "Share of dense attention's mass between first blocks and window that was not evicted.",
    ),
    _chart(
        "attention",
        "Recall of the index",
        (("attention/index_recall", "mean"), ("attention/index_recall/min", "lowest layer")),
        "Audited rows: share of dense attention on what the index chooses.",
    ),
    _chart(
        "attention",
        "Loss of the index",
        (("attention/index_loss", "mean over layers"),),
        "Divergence from the attention's own masses, in nats.",
    ),
    _chart(
        "speed",
        "Throughput",
        (("perf/tokens_per_second", "all ranks"),),
        "Tokens a second.",
    ),
    _chart(
        "speed",
        "Step time",
        (("perf/step_seconds", "step"), ("comm/exposed_seconds", "waiting for tokens")),
        "Seconds a step, and those of them a rank waits for others' tokens.",
    ),
    _chart(
        "speed",
        "Exposed communication",
        (("comm/exposed_fraction", "of the step"),),
        "What is not hidden behind compute, and others' lateness.",
    ),
    _chart("speed", "Memory", (("perf/memory_gib", "fullest rank"),), "GiB, peak so far."),
    _chart(
        "speed",
        "Rank skew",
        (("perf/rank_skew", "slowest rank"),),
        "Over the median rank.",
    ),
    _chart(
        "speed",
        "Model FLOPs utilisation",
        (("perf/mfu", "mfu"),),
        "Of the devices' peak.",
    ),
)
EMPTY = {
    "loss": "metrics.jsonl has no record of the loss yet.",
    "budget": "No budget to follow: a dense model, or no record yet.",
    "balance": "No balance to follow: a dense model, or no record yet.",
    "fallbacks": "No fallbacks to count: a dense model, or no record yet.",
    "attention": "Attention is dense (or has no record yet): nothing is approximated, so there is "
    "no error or tail to show.",
    "speed": "metrics.jsonl has no record of speed yet.",
}


@dataclass(frozen=True)
class Kpi:
    """A number of the first screen."""

    key: str
    """A metric's name, or one of its own for what is no metric."""
    label: str
    """What the page calls it."""
    unit: str
    """How it is written: see fmt()."""
    value: Callable[[RunData], float | None]
    """What it is in a run; None: the run has none."""
    better: str = ""
    """low, high, or empty when it is neither."""
    is_quality: bool = False
    """Whether it depends on the text and its tokens, so that runs on others have no best."""


def _better(key: str) -> str:
    return {Better.LOWER: "low", Better.HIGHER: "high", Better.NEITHER: ""}[find(key).better]


def _metric(key: str, value: Callable[[RunData], float | None] | None = None) -> Kpi:
    """The newest value of a metric, where `value` does not say otherwise."""
    newest = value or (lambda run: run.last(key))
    is_quality = key.startswith(("train/loss", "eval/"))
    return Kpi(key, find(key).label, format_of(key), newest, _better(key), is_quality)


def _median(key: str) -> Kpi:
    """The median of a metric over all records."""

    def median(run: RunData) -> float | None:
        values = run.curves[key].values if key in run.curves else np.zeros(0)
        return (
            statistics.median(finite) if (finite := values[np.isfinite(values)].tolist()) else None
        )

    label = f"{find(key).label} (median)"
    return Kpi(f"{key}/median", label, format_of(key), median, _better(key))


def _flops_per_token(run: RunData) -> float | None:
    if not len(run.flops.step):
        return None
    tokens, flops = (np.diff(a, prepend=0) for a in (run.flops.tokens, run.flops.values))
    return float(flops[-1] / tokens[-1]) if tokens[-1] else None


def _seconds_in_steps(run: RunData) -> float | None:
    """Records give the mean of the steps since the one before."""
    if (steps := run.curves.get("perf/step_seconds")) is None:
        return None
    seconds = np.diff(steps.step, prepend=0) * steps.values
    return float(seconds[np.isfinite(seconds)].sum())


KPIS = (
    _metric("eval/val_loss"),
    _metric("train/loss"),
    _metric("eval/bits_per_byte"),
    Kpi("duration", "time in steps", "duration", _seconds_in_steps),
    _metric("train/skipped_steps", lambda run: run.last("train/skipped_steps") or None),
    Kpi(
        "tokens",
        "tokens",
        "count",
        lambda run: float(run.flops.tokens[-1]) if len(run.flops.tokens) else None,
    ),
    Kpi(
        "flops/spent",
        "training FLOPs",
        "flops",
        lambda run: run.flops.last if len(run.flops.values) else None,
    ),
    Kpi("flops/per_token", "FLOPs per token", "flops", _flops_per_token, "low"),
    _metric("moe/experts_per_token"),
    Kpi("target", "budget", "number", lambda run: run.config.experts_per_token or None),
    _median("perf/tokens_per_second"),
    _median("perf/step_seconds"),
    _metric("comm/exposed_fraction"),
    _metric("perf/memory_gib"),
    _metric("moe/max_vio"),
    _metric("moe/max_load"),
    _metric("moe/dead_experts"),
    _metric("moe/rank_load"),
    _metric("attention/error"),
    _metric("attention/index_recall"),
    Kpi(
        "alarms/active",
        "active alarms",
        "count",
        lambda run: float(sum(a.active for a in run.alarms)),
        "low",
    ),
    Kpi(
        "alarms/past",
        "past alarms",
        "count",
        lambda run: float(sum(not a.active for a in run.alarms)),
    ),
)
HEADLINE = ("eval/val_loss", "train/loss")
"""The number in large: the first of these that a run has."""
FEW = (
    *HEADLINE,
    "eval/bits_per_byte",
    "train/skipped_steps",
    "tokens",
    "duration",
    "perf/tokens_per_second/median",
    "moe/experts_per_token",
    "moe/max_vio",
)
"""Numbers that stand beside it; the others unfold."""


# --- the page -------------------------------------------------------------------------------------


def render(runs: list[RunData], refresh_seconds: float | None = None) -> str:
    """The whole page; refresh_seconds: how often it reloads itself, None: never."""
    names = run_names(runs)
    rows = kpi_rows(runs, names)
    payload = {
        "refresh": refresh_seconds,
        "charts": [asdict(c) for c in charts_of(runs) if any(_drawn(c, run) for run in runs)],
        "empty": EMPTY,
        "runs": [payload_of(run, name) for run, name in zip(runs, names, strict=True)],
    }
    # The worst alarms first, and of those that are over the latest.
    pairs = [(alarm, name) for run, name in zip(runs, names, strict=True) for alarm in run.alarms]
    active = sorted((p for p in pairs if p[0].active), key=lambda p: p[0].severity != "critical")
    past = sorted((p for p in pairs if not p[0].active), key=lambda p: -p[0].since)

    return (
        templates(TEMPLATE.parent, MAX_ACTIVE=MAX_ACTIVE, MAX_PAST=MAX_PAST)
        .get_template(TEMPLATE.name)
        .render(
            title="Routing of " + ", ".join(names),
            subtitle=subtitle(runs[0]) if len(runs) == 1 else f"{len(runs)} runs side by side",
            names=names,
            active=active,
            past=past,
            sources=sorted({run.alarm_source for run in runs}),
            few=[row for row in rows if row[0].key in FEW],
            rest=[row for row in rows if row[0].key not in FEW],
            headline=next((row for row in rows if row[0].key in HEADLINE), None),
            differing=differing_settings(runs),
            incomparable=why_incomparable(runs),
            settings=all_settings(runs[0]) if len(runs) == 1 else [],
            notes=[(n, line) for run, n in zip(runs, names, strict=True) for line in left_out(run)],
            payload=embedded(payload),
        )
    )


def run_names(runs: list[RunData]) -> list[str]:
    """The last parts of the directories, as many as tell them apart."""
    paths = [run.directory.resolve().parts for run in runs]
    for number in range(1, max(map(len, paths)) + 1):
        names = [redact_text("/".join(parts[-number:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(names)]


def subtitle(run: RunData) -> str:
    """The shape of a run in a line, from its record and not from free text of its config."""
    model, steps = run.config.model, [int(c.step[-1]) for c in run.curves.values()]
    if run.frames is not None:
        steps.append(int(run.frames.step[-1]))
    shape = (
        f"{len(model.decoder_moe_layers)} of {model.num_layers} layers with {model.num_experts} "
        "experts"
        if run.moe_layers
        else f"dense model of {model.num_layers} layers"
    )
    router = run.config.router.name
    return f"step {max(steps)} of {run.config.train.num_steps}; {shape}" + (
        f"; {router}" if run.moe_layers else ""
    )


@dataclass(frozen=True)
class Cell:
    """A number of one run on the first screen."""

    name: str
    """The run's."""
    value: float | None
    """None: the run has no such number."""
    best: bool
    """Whether no other run has a better one, and some has a worse one."""


def kpi_rows(runs: list[RunData], names: list[str]) -> list[tuple[Kpi, list[Cell]]]:
    """Each number with its cell per run; numbers that no run has are left out."""
    rows = []
    is_fair = why_incomparable(runs) is None
    for kpi in KPIS:
        values = [kpi.value(run) for run in runs]
        if all(value is None for value in values):
            continue
        finite = [v for v in values if v is not None and math.isfinite(v)]
        best = math.nan
        if kpi.better and len(set(finite)) > 1 and (is_fair or not kpi.is_quality):
            best = min(finite) if kpi.better == "low" else max(finite)
        cells = [Cell(name, v, v == best) for v, name in zip(values, names, strict=True)]
        rows.append((kpi, cells))
    return rows


def why_incomparable(runs: list[RunData]) -> str | None:
    """Why the losses of these runs are not to be held against each other; None: they may be."""
    lengths = [run.config.train.seq_len for run in runs]
    return incomparable([measure_of(r.directory, n) for r, n in zip(runs, lengths, strict=True)])


def differing_settings(runs: list[RunData]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, each with its value in every run: numbers and
    choices alone, as the page may be passed on.
    """
    if len(runs) == 1:
        return []
    found = differences([run.settings for run in runs], shareable=True)
    return [(key, [written(value) for value in values]) for key, values in found.items()]


def all_settings(run: RunData) -> list[tuple[str, str]]:
    """The same of one run: every setting."""
    return [(key, written(value)) for key, value in shareable(run.settings).items()]


def written(value: Any) -> str:
    return repr(value) if value is SET else shown(value)


def left_out(run: RunData) -> list[str]:
    """What the page thins or leaves out of a run, or what the run has not got."""
    lines = list(run.missing)
    if run.frames is not None and run.frames.num_lines > len(run.frames.step):
        shown, there = len(run.frames.step), run.frames.num_lines
        lines.append(f"heatmap: {shown:,} of {there:,} lines of routing.jsonl, evenly spread")
    longest = max((len(c.step) for c in run.curves.values()), default=0)
    if longest > MAX_POINTS:
        lines.append(f"curves: {MAX_POINTS:,} of {longest:,} records, evenly spread")
    return lines


# --- the payload ----------------------------------------------------------------------------------


def payload_of(run: RunData, name: str) -> dict[str, Any]:
    """A run as the template's script reads it. series: metric -> [index into grids, values];
    metrics of the same records share a grid of x-axes.
    """
    grids: list[dict[str, list[float | None]]] = []
    seen: dict[bytes, int] = {}
    series = {}
    for key in dict.fromkeys(
        key for chart in charts_of([run]) if _drawn(chart, run) for key, _ in chart.series
    ):
        if key not in run.curves:
            continue

        # Metrics of the same records share their axes, which would else be most of the page.
        curve = run.curves[key]
        kept = evenly(len(curve.step), MAX_POINTS)
        at = seen.setdefault(curve.step.tobytes() + curve.tokens.tobytes(), len(grids))
        if at == len(grids):
            grids.append(
                {
                    "step": curve.step[kept].tolist(),
                    "tokens": curve.tokens[kept].tolist(),
                    "flops": _numbers(flops_at(run.flops, curve.tokens[kept])),
                }
            )

        series[key] = [at, _numbers(curve.values[kept])]

    references = {"zero": 0.0, "one": 1.0}
    if run.moe_layers:
        references |= {
            "target": run.config.experts_per_token,
            "even_entropy": math.log(run.config.model.num_experts),
        }

    origins = None
    if run.origins is not None:
        origins = {
            "sources": [redact_text(s) for s in run.origins.sources],
            "layers": run.origins.layers,
            "note": run.origins.note,
        }

    return {
        "name": name,
        "grids": grids,
        "series": series,
        "references": references,
        "layers": list(run.moe_layers),
        "experts": run.config.model.num_experts,
        "frames": None if run.frames is None else pack(run.frames),
        "origins": origins,
    }


def charts_of(runs: Sequence[RunData]) -> tuple[Chart, ...]:
    """All charts, one of them with a line for every source that holds out text of its own."""
    keys = sorted({key for run in runs for key in run.curves if key.startswith("eval/val_loss/")})
    if not keys:
        return CHARTS
    by_source = _chart(
        "loss",
        "Held-out loss by source",
        tuple((key, key.rpartition("/")[2]) for key in keys),
        "Nats per token: what the mixture gives to each kind of text.",
        "tokens",
    )
    return (*CHARTS[:1], by_source, *CHARTS[1:])


def _drawn(chart: Chart, run: RunData) -> bool:
    """Whether the run has something for the chart."""
    return any(key in run.curves for key, _ in chart.series)


def flops_at(spent: Curve, tokens: np.ndarray) -> np.ndarray:
    """FLOPs spent when `tokens` had been consumed."""
    if not len(spent.tokens):
        return np.zeros(len(tokens))
    flops: np.ndarray = np.interp(
        tokens, np.concatenate(([0], spent.tokens)), np.concatenate(([0.0], spent.values))
    )
    return flops


def _numbers(values: np.ndarray) -> list[float | None]:
    """Six digits; None for what JSON cannot say."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


def load_levels(load: np.ndarray) -> np.ndarray:
    """Loads over the mean -> uint8: 0 for none, 1 to 40 in steps of 0.05 below 2, then 24 levels
    per factor of two.
    """
    with np.errstate(divide="ignore"):
        above = 41 + np.floor(24 * np.log2(np.maximum(load, 2) / 2))
    return np.where(
        load <= 0, 0, np.where(load < 2, 1 + np.floor(load / 0.05), np.minimum(above, 255))
    ).astype(np.uint8)


def pack(frames: Frames) -> dict[str, Any]:
    """Frames for the browser: loads [L, E, F] as levels, each the difference to the frame before
    (modulo 256), which deflates best; token shares by number of experts [F, L, K + 1] as uint16.
    """
    levels = np.ascontiguousarray(load_levels(frames.load).transpose(1, 2, 0))
    packed: dict[str, Any] = {
        "step": frames.step.tolist(),
        "tokens": frames.tokens.tolist(),
        "load": _deflate(np.diff(levels, axis=2, prepend=np.uint8(0))),
        "k": None,
        "width": 0,
    }
    if frames.k_histogram is not None:
        share = frames.k_histogram / np.maximum(frames.k_histogram.sum(2, keepdims=True), 1)
        packed |= {"k": _deflate(np.rint(share * 65535).astype("<u2")), "width": share.shape[2]}
    packed["deciles"] = {
        name: [_numbers(row) for row in table] for name, table in frames.deciles.items()
    }
    return packed


def _deflate(table: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(table.tobytes(), 6)).decode()
