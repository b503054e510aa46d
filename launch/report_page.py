"""The report's page: numbers and alarms as plain HTML, everything drawn as one JSON payload for the template's script."""

from __future__ import annotations

import base64
import math
import re
import statistics
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from launch.report_data import Alarm, Curve, Frames, RunData, evenly
from launch.secrets import redact_text
from train.strict_json import dumps

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 1000
"""Points of a curve; of longer ones evenly spread records are drawn."""
MAX_ACTIVE = 8
"""Active alarms that are listed at once; the others can be unfolded."""
MAX_PAST = 20
"""Alarms that are over, the latest ones, that the page lists."""


# --- what is shown ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chart:
    """A line chart. series: (metric, label); unit: see fmt() here and in the template; x: tokens, flops, or any (the
    reader's choice). reference: (name in the run's references, label) of a horizontal line."""

    section: str
    title: str
    series: tuple[tuple[str, str], ...]
    unit: str
    note: str
    x: str = "any"
    reference: tuple[str, str] | None = None


_LOSS = (("train/loss", "training"), ("eval/val_loss", "held-out"))
CHARTS = (
    Chart("loss", "Loss by tokens", _LOSS, "number", "Nats per token.", "tokens"),
    Chart("loss", "Loss by spent FLOPs", _LOSS, "number", "The same by training FLOPs: what the compute bought.", "flops"),
    Chart("loss", "Gradient norm", (("train/grad_norm", "norm"),), "number", "Over all parameters, before clipping."),
    Chart("loss", "Learning rate", (("train/lr", "lr"),), "number", "As scheduled."),
    Chart("budget", "Experts per token", (("moe/experts_per_token", "mean"), ("moe/experts_per_token/max", "largest layer")),
          "number", "What routing spends, against its budget.", reference=("target", "budget")),
    Chart("budget", "Budget error", (("moe/budget_error", "mean"), ("moe/budget_error/max", "largest layer")), "percent",
          "Experts per token over the budget, minus one.", reference=("zero", "on budget")),
    Chart("budget", "Controller", (("moe/theta", "theta"), ("moe/top_p", "top_p")),
          "number", "The state that moves experts per token to the budget."),
    Chart("budget", "Share of the adaptive mode", (("moe/mode_share", "mean"),), "percent",
          "The rest is plain top-k: warm start, guard or collapse.",),
    Chart("balance", "MaxVio", (("moe/max_vio", "mean of layers"), ("moe/max_vio/max", "largest layer")), "number",
          "Busiest expert's load over the mean, minus one; 0 is even."),
    Chart("balance", "Load entropy", (("moe/load_entropy", "mean of layers"),), "number",
          "Nats; an even load has the logarithm of the number of experts.", reference=("even_entropy", "even")),
    Chart("balance", "Dead experts", (("moe/dead_experts", "without any token"),), "count", "Over all layers."),
    Chart("balance", "Rank load", (("moe/rank_load", "mean of layers"), ("moe/rank_load/max", "largest layer")), "number",
          "Busiest rank over the mean rank: the others wait for it.", reference=("one", "even")),
    Chart("balance", "Busiest and idlest expert", (("moe/max_load", "busiest"), ("moe/min_load", "idlest")), "number",
          "Load over the mean, of all layers.", reference=("one", "even")),
    Chart("balance", "Share of the busiest",
          (("moe/hot_fraction", "busiest expert"), ("moe/concentration/max", "busiest k, worst layer")), "percent",
          "Of a layer's assignments; near 100% it has collapsed."),
    Chart("balance", "Router stability", (("eval/router_stability", "held-out tokens"),), "percent",
          "Share of a token's experts that it had at the evaluation before."),
    Chart("balance", "Router entropy", (("moe/router_entropy", "mean of layers"),), "percent",
          "Of the softmax, over its largest value: 100% is undecided."),
    Chart("fallbacks", "Tokens by reason", tuple((f"moe/fallback/{name}", name) for name in (
        "nonfinite", "empty", "raised", "capped", "overridden", "overflow", "frozen", "overloaded")), "percent",
          "Share of tokens and layers that were routed otherwise than the router's mode alone would have."),
    Chart("fallbacks", "Dropped and spilled", (("moe/dropped", "dropped"), ("moe/spilled", "spilled")), "percent",
          "Share of assignments that no expert computed, or another one."),
    Chart("fallbacks", "Layers in fallback",
          (("moe/layers_in_fallback", "plain top-k"), ("moe/layers_collapsed", "collapsed")), "count",
          "Layers, not tokens."),
    Chart("attention", "Attention error", (("attention/error", "mean"), ("attention/error/max", "largest layer"),
                                           ("attention/error_bound", "bound on the mean")), "percent",
          "Audited rows: distance from dense attention over its norm."),
    Chart("attention", "Softmax mass",
          (("attention/tail_mass", "pooled tail"), ("attention/selected_mass", "selected blocks")), "percent",
          "Where attention looks: exactly (selected) or by pooled entries (tail)."),
    Chart("attention", "Certificate",
          (("attention/certificate", "bound"), ("attention/certificate_coverage", "covered rows")), "percent",
          "Bound on the error per row, and the share of audited rows it covers."),
    Chart("speed", "Throughput", (("perf/tokens_per_second", "all ranks"),), "number", "Tokens a second."),
    Chart("speed", "Step time", (("perf/step_seconds", "step"), ("comm/exposed_seconds", "waiting for tokens")), "seconds",
          "Seconds a step, and those of them a rank waits for others' tokens."),
    Chart("speed", "Exposed communication", (("comm/exposed_fraction", "of the step"),), "percent",
          "What is not hidden behind compute, and others' lateness."),
    Chart("speed", "Memory", (("perf/memory_gib", "fullest rank"),), "gib", "GiB, peak so far."),
    Chart("speed", "Rank skew", (("perf/rank_skew", "slowest rank"),), "number", "Over the median rank."),
    Chart("speed", "Model FLOPs utilisation", (("perf/mfu", "mfu"),), "percent", "Of the devices' peak."),
)
EMPTY = {
    "loss": "metrics.jsonl has no record of the loss yet.",
    "budget": "No budget to follow: a dense model, or no record yet.",
    "balance": "No balance to follow: a dense model, or no record yet.",
    "fallbacks": "No fallbacks to count: a dense model, or no record yet.",
    "attention": "Attention is dense (or has no record yet): nothing is approximated, so there is no error or tail to show.",
    "speed": "metrics.jsonl has no record of speed yet.",
}


@dataclass(frozen=True)
class Kpi:
    """A number of the first screen. better: low, high, or none when more is neither."""

    key: str
    label: str
    unit: str
    value: Callable[[RunData], float | None]
    better: str = ""


def _metric(key: str, label: str, unit: str, better: str = "") -> Kpi:
    return Kpi(key, label, unit, lambda run: run.last(key), better)


def _median(key: str, label: str, unit: str, better: str) -> Kpi:
    def median(run: RunData) -> float | None:
        values = run.curves[key].values if key in run.curves else np.zeros(0)
        return statistics.median(finite) if (finite := values[np.isfinite(values)].tolist()) else None

    return Kpi(f"{key}/median", label, unit, median, better)


def _flops_per_token(run: RunData) -> float | None:
    if not len(run.flops.step):
        return None
    tokens, flops = (np.diff(a, prepend=0) for a in (run.flops.tokens, run.flops.values))
    return float(flops[-1] / tokens[-1]) if tokens[-1] else None


KPIS = (
    _metric("train/loss", "training loss", "number", "low"),
    _metric("eval/val_loss", "held-out loss", "number", "low"),
    _metric("eval/bits_per_byte", "bits per byte", "number", "low"),
    Kpi("train/skipped_steps", "skipped steps", "count", lambda run: run.last("train/skipped_steps") or None, "low"),
    Kpi("tokens", "tokens", "count", lambda run: float(run.flops.tokens[-1]) if len(run.flops.tokens) else None),
    Kpi("flops/spent", "training FLOPs", "flops", lambda run: run.flops.last if len(run.flops.values) else None),
    Kpi("flops/per_token", "FLOPs per token", "flops", _flops_per_token, "low"),
    _metric("moe/experts_per_token", "experts per token", "number"),
    Kpi("target", "budget", "number", lambda run: run.config.experts_per_token or None),
    _median("perf/tokens_per_second", "tokens/s (median)", "number", "high"),
    _median("perf/step_seconds", "step (median)", "seconds", "low"),
    _metric("comm/exposed_fraction", "waiting for tokens", "percent", "low"),
    _metric("perf/memory_gib", "memory, fullest rank", "gib", "low"),
    _metric("moe/max_vio", "MaxVio, mean", "number", "low"),
    _metric("moe/max_load", "busiest expert / mean", "number", "low"),
    _metric("moe/dead_experts", "dead experts", "count", "low"),
    _metric("moe/rank_load", "rank load", "number", "low"),
    _metric("attention/error", "attention error", "percent", "low"),
    Kpi("alarms/active", "active alarms", "count", lambda run: float(sum(a.active for a in run.alarms)), "low"),
    Kpi("alarms/past", "past alarms", "count", lambda run: float(sum(not a.active for a in run.alarms))),
)
_SCALES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fmt(value: float | None, unit: str) -> str:
    """A number for people; the template's fmt() writes the same."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "not finite"
    if unit == "percent":
        return "<0.0001%" if 0 < abs(value) < 1e-6 else f"{100 * value:.3g}%"
    if unit == "seconds":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "gib":
        return f"{value:.2f} GiB"
    for scale, letter in _SCALES:
        if abs(value) >= scale and (scale > 1e3 or abs(value) >= 1e4):
            return f"{value / scale:.3g}{letter}"
    return f"{value:.0f}" if unit == "count" or abs(value) >= 1000 else f"{value:.4g}"


# --- the page --------------------------------------------------------------------------------------------------------

def render(runs: list[RunData], refresh_seconds: float | None = None) -> str:
    """The whole page; refresh_seconds: how often it reloads itself, None: never."""
    names = run_names(runs)
    payload = {"refresh": refresh_seconds, "charts": [asdict(c) for c in CHARTS if any(_drawn(c, run) for run in runs)],
               "empty": EMPTY, "runs": [payload_of(run, name) for run, name in zip(runs, names, strict=True)]}
    # "<" as an escape, so that no text of a run can end the script element.
    data = dumps(payload, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": escape("Routing of " + ", ".join(names)), "alarms": alarms_html(runs, names),
             "kpis": kpis_html(runs, names), "notes": notes_html(runs, names), "payload": data,
             "subtitle": escape("; ".join(map(subtitle, runs)) if len(runs) == 1 else f"{len(runs)} runs side by side")}
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], TEMPLATE.read_text())


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
    shape = f"{len(run.moe_layers)} of {model.num_layers} layers with {model.num_experts} experts" if run.moe_layers else \
        f"dense model of {model.num_layers} layers"
    router = run.config.router.target.rpartition(".")[2]
    return f"step {max(steps)} of {run.config.train.num_steps}; {shape}" + (f"; {router}" if run.moe_layers else "")


def alarms_html(runs: list[RunData], names: list[str]) -> str:
    """What is wrong: active alarms by severity, then those that are over."""
    def item(alarm: Alarm, name: str) -> str:
        who = f'<span class="who">{escape(name)}</span> ' if len(runs) > 1 else ""
        when = f"since step {alarm.since}" if alarm.active else f"from step {alarm.since} to {alarm.until}"
        detail = f"<small>{escape(redact_text(alarm.detail))}</small>" if alarm.detail else ""
        state = alarm.severity if alarm.active else "over"
        return (f'<li class="alarm {state}" data-run="{escape(name)}"><b class="badge">{state}</b><span>{who}'
                f"{escape(redact_text(alarm.text))} <em>{when}</em>{detail}</span></li>")

    pairs = [(alarm, name) for run, name in zip(runs, names, strict=True) for alarm in run.alarms]
    active = sorted((p for p in pairs if p[0].active), key=lambda p: p[0].severity != "critical")
    past = sorted((p for p in pairs if not p[0].active), key=lambda p: -p[0].since)
    sources = ", ".join(sorted({run.alarm_source for run in runs}))
    if active:
        worst = "critical" if any(a.severity == "critical" for a, _ in active) else "warning"
        head = f'<p class="verdict {worst}">{len(active)} active alarm{"s" if len(active) > 1 else ""}</p>'
    else:
        head = '<p class="verdict fine">No alarm' + (" now" if past else "") + "</p>"
    html = head + (f'<ul class="alarms">{"".join(item(*p) for p in active[:MAX_ACTIVE])}</ul>' if active else "")
    if len(active) > MAX_ACTIVE:
        html += (f"<details><summary>{len(active) - MAX_ACTIVE} more active alarms</summary>"
                 f'<ul class="alarms">{"".join(item(*p) for p in active[MAX_ACTIVE:])}</ul></details>')
    if past:
        cut = f" (the latest {MAX_PAST})" if len(past) > MAX_PAST else ""
        shown = " open" if not active and len(past) <= 3 else ""
        html += (f"<details{shown}><summary>{len(past)} past alarm{'s' if len(past) > 1 else ''}{cut}</summary>"
                 f'<ul class="alarms">{"".join(item(*p) for p in past[:MAX_PAST])}</ul></details>')
    return html + f'<p class="source">By {escape(sources)}.</p>'


def kpis_html(runs: list[RunData], names: list[str]) -> str:
    """Tiles of one run; a table of several, the best marked. Numbers no run has are left out."""
    rows = [(kpi, [kpi.value(run) for run in runs]) for kpi in KPIS]
    rows = [(kpi, values) for kpi, values in rows if any(v is not None for v in values)]

    def number(kpi: Kpi, value: float | None, name: str, tag: str, extra: str = "") -> str:
        exact = "" if value is None else f' data-value="{value!r}"'
        return f'<{tag} data-key="{kpi.key}" data-run="{escape(name)}"{exact}>{fmt(value, kpi.unit)}{extra}</{tag}>'

    if len(runs) == 1:
        tiles = "".join(f"<div><dt>{escape(kpi.label)}</dt>{number(kpi, values[0], names[0], 'dd')}</div>"
                        for kpi, values in rows)
        return f'<dl class="tiles">{tiles}</dl>'
    head = "".join(f'<th scope="col"><i class="swatch" style="--c:var(--s{i % 8})"></i>{escape(name)}</th>'
                   for i, name in enumerate(names))
    body = ""
    for kpi, values in rows:
        finite = [v for v in values if v is not None and math.isfinite(v)]
        best = (min if kpi.better == "low" else max)(finite) if kpi.better and len(set(finite)) > 1 else math.nan
        cells = "".join(number(kpi, v, name, "td", ' <span class="best">best</span>' if v == best else "")
                        for v, name in zip(values, names, strict=True))
        body += f'<tr><th scope="row">{escape(kpi.label)}</th>{cells}</tr>'
    return ('<div class="scroll" tabindex="0" role="region" aria-label="Runs side by side"><table class="compare"><thead>'
            f'<tr><th scope="col">last record</th>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def notes_html(runs: list[RunData], names: list[str]) -> str:
    """What is left out, thinned or absent, run by run."""
    notes = []
    for run, name in zip(runs, names, strict=True):
        lines = list(run.missing)
        if run.frames is not None and run.frames.num_lines > len(run.frames.step):
            lines.append(f"heatmap: {len(run.frames.step):,} of {run.frames.num_lines:,} lines of routing.jsonl, evenly "
                         "spread")
        longest = max((len(c.step) for c in run.curves.values()), default=0)
        if longest > MAX_POINTS:
            lines.append(f"curves: {MAX_POINTS:,} of {longest:,} records, evenly spread")
        notes += [(f"<b>{escape(name)}</b> " if len(runs) > 1 else "") + escape(redact_text(line)) for line in lines]
    return "".join(f"<li>{note}</li>" for note in notes)


# --- the payload -----------------------------------------------------------------------------------------------------

def payload_of(run: RunData, name: str) -> dict[str, Any]:
    """A run as the template's script reads it. series: metric -> [index into grids, values]; metrics of the same records
    share a grid of x-axes."""
    grids: list[dict[str, list[float | None]]] = []
    seen: dict[bytes, int] = {}
    series = {}
    for key in dict.fromkeys(key for chart in CHARTS if _drawn(chart, run) for key, _ in chart.series):
        if key not in run.curves:
            continue
        curve = run.curves[key]
        kept = evenly(len(curve.step), MAX_POINTS)
        at = seen.setdefault(curve.step.tobytes() + curve.tokens.tobytes(), len(grids))
        if at == len(grids):
            grids.append({"step": curve.step[kept].tolist(), "tokens": curve.tokens[kept].tolist(),
                          "flops": _numbers(flops_at(run.flops, curve.tokens[kept]))})
        series[key] = [at, _numbers(curve.values[kept])]
    references = {"zero": 0.0, "one": 1.0}
    if run.moe_layers:
        references |= {"target": run.config.experts_per_token, "even_entropy": math.log(run.config.model.num_experts)}
    origins = None if run.origins is None else {
        "sources": [redact_text(s) for s in run.origins.sources], "layers": run.origins.layers, "note": run.origins.note}
    return {"name": name, "grids": grids, "series": series, "references": references, "layers": list(run.moe_layers),
            "experts": run.config.model.num_experts, "frames": None if run.frames is None else pack(run.frames),
            "origins": origins}


def _drawn(chart: Chart, run: RunData) -> bool:
    """Whether the run has something for the chart."""
    return any(key in run.curves for key, _ in chart.series)


def flops_at(spent: Curve, tokens: np.ndarray) -> np.ndarray:
    """FLOPs spent when `tokens` had been consumed."""
    if not len(spent.tokens):
        return np.zeros(len(tokens))
    return np.interp(tokens, np.concatenate(([0], spent.tokens)), np.concatenate(([0.0], spent.values)))


def _numbers(values: np.ndarray) -> list[float | None]:
    """Six digits; None for what JSON cannot say."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


def load_levels(load: np.ndarray) -> np.ndarray:
    """Loads over the mean -> uint8: 0 for none, 1 to 40 in steps of 0.05 below 2, then 24 levels per factor of two."""
    with np.errstate(divide="ignore"):
        above = 41 + np.floor(24 * np.log2(np.maximum(load, 2) / 2))
    return np.where(load <= 0, 0, np.where(load < 2, 1 + np.floor(load / 0.05), np.minimum(above, 255))).astype(np.uint8)


def pack(frames: Frames) -> dict[str, Any]:
    """Frames for the browser: loads [L, E, F] as levels, each the difference to the frame before (modulo 256), which
    deflates best; token shares by number of experts [F, L, K + 1] as uint16."""
    levels = np.ascontiguousarray(load_levels(frames.load).transpose(1, 2, 0))
    packed: dict[str, Any] = {"step": frames.step.tolist(), "tokens": frames.tokens.tolist(),
                              "load": _deflate(np.diff(levels, axis=2, prepend=np.uint8(0))), "k": None, "width": 0}
    if frames.k_histogram is not None:
        share = frames.k_histogram / np.maximum(frames.k_histogram.sum(2, keepdims=True), 1)
        packed |= {"k": _deflate(np.rint(share * 65535).astype("<u2")), "width": share.shape[2]}
    packed["deciles"] = {name: [_numbers(row) for row in table] for name, table in frames.deciles.items()}
    return packed


def _deflate(table: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(table.tobytes(), 6)).decode()
