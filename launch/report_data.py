"""What a run directory says about its routing, read for the report: curves, loads by frame, alarms, tokens of experts."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch.common import load_run
from train.alarms import place, reading, worst
from train.config import AlarmRule

MAX_CELLS = 6_000_000
"""Most expert loads (frames * layers * experts) in a page; of longer runs evenly spread lines are shown."""
MAX_FRAMES = 2000
MAX_AUDIT_BYTES = 1 << 28
"""Of larger audits only AUDIT_STEPS steps are read, spread evenly."""
AUDIT_STEPS = 8
MAX_EXPERTS = 32
"""Experts per layer whose tokens are listed, the busiest ones."""
TOP_TOKENS = 6
MIN_TIMES = 2
"""A token seen less often at an expert is not typical of it."""


# --- records ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Curve:
    """A metric over the records that have it. step, tokens: [N] int64; values: [N] float64."""

    step: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Frames:
    """Lines of routing.jsonl, evenly spread when there are too many.

    step, tokens: [F] int64. counts: [F, L, E] float32 assignments. k_histogram: [F, L, K + 1] float32 tokens, or None.
    deciles: "frequency" and "loss" -> [F, 10] float64, mean experts of held-out tokens by decile, of the newest evaluation
        up to the step; NaN before the first.
    num_lines: usable lines of the file, shown or not.
    """

    step: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    k_histogram: np.ndarray | None
    deciles: dict[str, np.ndarray]
    num_lines: int

    @property
    def load(self) -> np.ndarray:
        """[F, L, E]: assignments over the layer's mean; 0 in a layer without any."""
        return self.counts / np.maximum(self.counts.mean(2, keepdims=True), 1e-9)

    @property
    def share(self) -> np.ndarray:
        """[F, L, E]: share of the layer's assignments."""
        return self.counts / np.maximum(self.counts.sum(2, keepdims=True), 1e-9)


@dataclass(frozen=True)
class Alarm:
    """Something wrong in plain words. until: None while it lasts. severity: critical | warning."""

    severity: str
    text: str
    since: int
    until: int | None = None
    detail: str = ""

    @property
    def active(self) -> bool:
        return self.until is None


@dataclass(frozen=True)
class Origins:
    """Where the tokens of experts come from, by the audit's sample.

    layers: per MoE layer a list of {expert, assignments, share, frequent, typical, sources}, the busiest expert first;
    frequent and typical: [text, times, lift]; sources: share of the expert's assignments by source, aligned with `sources`.
    """

    sources: list[str]
    layers: list[list[dict[str, Any]]]
    note: str


@dataclass(frozen=True)
class RunData:
    """Everything the report shows of a run. missing: what could not be shown, and why."""

    directory: Path
    config: Any
    curves: dict[str, Curve]
    flops: Curve
    """Training FLOPs spent so far, at every record of training (see spent_flops)."""
    frames: Frames | None
    alarms: list[Alarm]
    alarm_source: str
    origins: Origins | None
    missing: list[str]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.config.model.moe_layers)

    def last(self, key: str) -> float | None:
        return self.curves[key].last if key in self.curves else None


def read_run(directory: str) -> RunData:
    """Read a run directory.

    Raises:
        FileNotFoundError: it is no run directory. ValueError: it has nothing to show yet.
    """
    config = load_run(directory)
    folder = Path(directory)
    curves = read_curves(folder / "metrics.jsonl")
    missing: list[str] = []
    frames = None
    if config.model.moe_layers:
        frames = read_frames(folder / "routing.jsonl", len(config.model.moe_layers), config.model.num_experts)
        if frames is not None:
            frames = replace(frames, deciles=_deciles(curves, frames.step))
        else:
            missing.append("expert loads: routing.jsonl has no usable line yet")
    else:
        missing.append("routing: this is a dense model, it has no experts")
    if not curves and frames is None:
        ended = "".join(f"; {alarm.text}" for alarm in read_not_finite(folder, curves))
        raise ValueError(f"{directory} has nothing to show: metrics.jsonl has no usable record; the run has not reached its "
                         f"first log step (train.log_interval){ended}")
    latest = {name: curve.last for name, curve in curves.items()}
    alarms, source = read_alarms(folder / "alarms.jsonl", frames, config.model.moe_layers,
                                 config.alarms, latest), "alarms.jsonl"
    if alarms is None:
        alarms, source = judge(curves, frames, config.model.moe_layers), "metrics and routing (the run has no alarms.jsonl)"
    if not_finite := read_not_finite(folder, curves):
        alarms, source = sorted([*not_finite, *alarms], key=_urgency), f"{source} and what was not finite"
    origins = read_origins(directory, config, missing) if config.model.moe_layers else None
    return RunData(folder, config, curves, spent_flops(curves, config), frames, alarms, source, origins, missing)


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------

def records(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file as records, those skipped that a crash cut off. Nothing, where there is no file."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                facts = json.loads(line)
            except ValueError:
                continue
            if isinstance(facts, dict) and isinstance(facts.get("step"), int):
                yield facts


def read_curves(path: Path) -> dict[str, Curve]:
    """Every metric of metrics.jsonl that is a number. null (older versions wrote NaN) is NaN: measured, and not finite."""
    points: dict[str, list[tuple[int, int, float]]] = {}
    for facts in records(path):
        step, tokens = facts["step"], int(facts.get("tokens", 0))
        for key, value in facts.items():
            if key not in ("step", "tokens") and (value is None or isinstance(value, (int, float))):
                points.setdefault(key, []).append((step, tokens, math.nan if value is None else float(value)))
    return {key: Curve(np.array([p[0] for p in rows], np.int64), np.array([p[1] for p in rows], np.int64),
                       np.array([p[2] for p in rows])) for key, rows in points.items()}


def spent_flops(curves: dict[str, Curve], config: Any) -> Curve:
    """Training FLOPs so far: the sum over records of (tokens since the last one) * (D + 3 * moe/expert_flops_per_token).

    D: training FLOPs of a token without its routed experts (model.flops.flops_per_token with 0 of them). The metric counts
    the forward pass of the experts that tokens really visited in the record's interval; backward costs twice as much.
    Records without the metric count as many experts as the config means a token to visit.
    """
    from model.flops import flops_per_token

    grid = curves.get("train/lr") or curves.get("train/loss") or next(iter(curves.values()), None)
    if grid is None:
        empty = np.zeros(0, np.int64)
        return Curve(empty, empty, np.zeros(0))
    dense, planned = (flops_per_token(config.model, k, config.train.seq_len, config.attention.arguments)
                      for k in (0.0, config.experts_per_token))
    spent = dict.fromkeys(grid.step.tolist(), planned)
    experts = curves.get("moe/expert_flops_per_token")
    if experts is not None:
        spent |= {int(s): dense + 3 * v for s, v in zip(experts.step, experts.values, strict=True) if math.isfinite(v)}
    per_token = np.array([spent[int(s)] for s in grid.step])
    return Curve(grid.step, grid.tokens, np.cumsum(np.diff(grid.tokens, prepend=0) * per_token))


# --- routing.jsonl ---------------------------------------------------------------------------------------------------

def read_frames(path: Path, num_layers: int, num_experts: int) -> Frames | None:
    """Loads and histograms, line by line, so that memory holds what is shown and not the file. None: no usable line."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
    wanted = set(evenly(num_lines, max(1, min(MAX_FRAMES, MAX_CELLS // (num_layers * num_experts)))).tolist())
    step: list[int] = []
    tokens: list[int] = []
    counts, histograms = [], []
    last_skipped = None
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number not in wanted:
                last_skipped = line
                continue
            frame = _frame(line, (num_layers, num_experts))
            if frame is None and number == num_lines - 1 and last_skipped is not None:
                frame = _frame(last_skipped, (num_layers, num_experts))  # the last line was cut off: the one before it
            if frame is None:
                num_lines -= 1
                continue
            step.append(frame["step"])
            tokens.append(int(frame.get("tokens", 0)))
            counts.append(np.array(frame["counts"], np.float32))
            histograms.append(np.array(frame.get("k_histogram") or np.zeros((num_layers, 1)), np.float32))
    if not step:
        return None
    widths = [h.shape[1] for h in histograms]
    histogram = None
    if min(widths) > 1:  # a run that was resumed with more experts per token has longer rows from there on
        histogram = np.stack([np.pad(h, ((0, 0), (0, max(widths) - h.shape[1]))) for h in histograms])
    if histogram is not None:
        histogram = histogram[:, :, :int(np.flatnonzero(histogram.any((0, 1))).max(initial=0)) + 1]
    return Frames(np.array(step, np.int64), np.array(tokens, np.int64), np.stack(counts), histogram, {},
                  num_lines)


def evenly(number: int, most: int) -> np.ndarray:
    """Indices of at most `most` out of `number`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, max(0, number - 1), min(number, most)).round().astype(int))


def _frame(line: bytes, shape: tuple[int, int]) -> dict[str, Any] | None:
    try:
        facts = json.loads(line)
        return facts if np.shape(facts["counts"]) == shape and isinstance(facts["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _deciles(curves: dict[str, Curve], steps: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for name in ("frequency", "loss"):
        by_decile = [curves.get(f"eval/experts_per_token/{name}_{d}") for d in range(10)]
        if any(curve is not None for curve in by_decile):
            found[name] = np.full((len(steps), 10), math.nan)
            for d, curve in enumerate(by_decile):
                if curve is not None:
                    at = np.searchsorted(curve.step, steps, side="right") - 1
                    found[name][at >= 0, d] = curve.values[at[at >= 0]]
    return found


# --- alarms ----------------------------------------------------------------------------------------------------------

def read_alarms(path: Path, frames: Frames | None, layers: tuple[int, ...],
                rules: Mapping[str, AlarmRule], latest: Mapping[str, float]) -> list[Alarm] | None:
    """Alarms of alarms.jsonl, the active ones first; None: the run keeps no such file.

    rules: of the run's config, by alarm. latest: the newest value of every metric.
    """
    if not path.is_file():
        return None
    found: list[Alarm] = []
    ringing: dict[str, dict[str, Any]] = {}
    for event in records(path):
        name = str(event.get("alarm"))
        raised = ringing.pop(name, None)
        if raised is not None:
            found.append(_alarm(raised, event["step"], frames, layers))
        if event.get("event") == "raised":
            ringing[name] = event
    present = [_at_present(event, rules.get(name), frames, layers, latest)
               for name, event in ringing.items()]
    found += [_alarm(event, None, frames, layers) for event in present]
    return sorted(found, key=_urgency)


SEVERE = frozenset({"collapse", "attention_bound"})
"""Alarms (conf/alarms) that are critical in themselves; others are if they act on the run, point at an expert that takes
half of a layer, or have a value that is not finite."""


def read_not_finite(folder: Path, curves: dict[str, Curve]) -> list[Alarm]:
    """Skipped steps, losses that are not finite, and the step that ended the run: whatever alarms the run has."""
    found = []
    newest = max((int(curve.step[-1]) for curve in curves.values()), default=0)
    if (skipped := curves.get("train/skipped_steps")) is not None and skipped.values.any():
        gains = np.flatnonzero(np.diff(skipped.values, prepend=0.0) > 0)
        first, last = int(gains[0]), int(gains[-1])
        until = None if last == len(skipped.step) - 1 else int(skipped.step[last + 1])
        text = f"{skipped.values.max():.0f} of {newest} steps were skipped: their loss or gradient was not finite"
        found.append(Alarm("critical", text, int(skipped.step[first]), until,
                           "train.on_nonfinite=skip; their batches are in failures/"))
    for key, name in (("train/loss", "training"), ("eval/val_loss", "held-out")):
        if key in curves and not math.isfinite((loss := curves[key]).last):
            finite = np.flatnonzero(np.isfinite(loss.values))
            found.append(Alarm("critical", f"the {name} loss is not a finite number",
                               int(loss.step[finite[-1] + 1 if len(finite) else 0])))
    ended = max((int(path.parent.name[5:]) for path in folder.glob("failures/step-*/rank-*.json")
                 if path.parent.name[5:].isdigit()), default=0)
    if ended > newest:
        found.append(Alarm("critical", f"loss or gradient of step {ended} was not finite, and nothing was logged since",
                           ended, None, f"its batch is in failures/step-{ended:08d}"))
    return found


def _urgency(alarm: Alarm) -> tuple[bool, bool, int]:
    return not alarm.active, alarm.severity != "critical", -alarm.since


def _at_present(event: dict[str, Any], rule: AlarmRule | None, frames: Frames | None,
                layers: tuple[int, ...], latest: Mapping[str, float]) -> dict[str, Any]:
    """The event that raised an alarm, with the value, words and place of the newest record: how
    things stand, not how they once were. `before`: what it said. Without the rule or the metric
    only the loads can be looked at again."""
    name = str(event.get("alarm"))
    found = None if rule is None else worst(rule, latest)
    if rule is None or found is None:
        return event
    metric, value = found
    counts = () if frames is None else frames.counts[-1].tolist()
    layer, expert = place(metric, rule, counts, layers)
    words = reading(name, rule, metric, value)
    before = {} if value == event.get("value") else {"before": event.get("message")}
    return {**event, "value": value, "layer": layer, "expert": expert, "message": words, **before}


def _alarm(event: dict[str, Any], until: int | None, frames: Frames | None, layers: tuple[int, ...]) -> Alarm:
    """An event of alarms.jsonl: what it says, led by the expert it points at where there is one."""
    name, layer, expert = str(event.get("alarm")), event.get("layer"), event.get("expert")
    message = str(event.get("message") or name)
    value, text, detail, crowded = event.get("value"), message, "", False
    if frames is not None and layer in layers and isinstance(expert, int) and 0 <= expert < frames.counts.shape[2]:
        then = int(np.searchsorted(frames.step, event["step"]).clip(0, len(frames.step) - 1))
        at = then if until is not None else len(frames.step) - 1
        share, fair = frames.share[:, layers.index(layer), expert], 1 / frames.counts.shape[2]
        crowded = share[at] >= max(0.5, 2 * fair)
        text, detail = f"layer {layer}: {expert_words(expert, float(share[at]), fair)}", message
        if abs(share[at] - share[then]) > 0.1 * share[then]:
            detail = f"{message}; {share[then]:.0%} when it was raised"
    if event.get("before"):
        detail = f"{detail}; when it was raised: {event['before']}".removeprefix("; ")
    action = event.get("action")
    acts = bool(action and action != "none")
    if acts:
        detail = f"{detail}; action: {action}".removeprefix("; ")
    not_finite = "value" in event and (value is None or (isinstance(value, float) and not math.isfinite(value)))
    serious = name in SEVERE or acts or crowded or not_finite
    return Alarm("critical" if serious else "warning", text, event["step"], until, detail)


def expert_words(expert: int, share: float, fair: float) -> str:
    verb = "takes" if share >= fair else "gets only"
    return f"expert {expert} {verb} {share:.0%} of assignments (a fair share is {fair:.1%})"


RULES: tuple[tuple[str, str, float, str], ...] = (
    # metric, severity, limit of the absolute value, words; {value} is the last one within the span
    ("moe/layers_collapsed", "critical", 0, "{value:.0f} collapsed layers route every token to one expert (F2)"),
    ("attention/bound_violations", "critical", 0, "{value:.0f} audited rows of attention lie beyond a bound that is proven"),
    ("moe/dead_fraction", "warning", 0.01, "{value:.1%} of experts get less than 5% of their fair share"),
    ("moe/rank_load/max", "warning", 1.3, "the busiest rank has {value:.2f} times the mean load, and all wait for it"),
    ("moe/budget_error", "warning", 0.1, "tokens visit {value:+.0%} experts against the budget"),
    ("moe/dropped", "warning", 0.01, "{value:.1%} of assignments are dropped"),
    *((f"moe/fallback/{reason}", "warning", 0.001, f"{{value:.1%}} of tokens are routed by a fallback ({reason})")
      for reason in ("nonfinite", "empty", "frozen", "overloaded")),
)
"""What counts as wrong in a run that keeps no alarms of its own."""
MIN_RECORDS = 2
"""Shorter episodes are no alarm."""
VISITED = 0.8
"""An expert that so many of a layer's tokens visit, and twice its fair share, has swallowed the layer."""
CROWDED = 4.0
"""Load over the mean above which one expert is worth a warning."""


def judge(curves: dict[str, Curve], frames: Frames | None, layers: tuple[int, ...]) -> list[Alarm]:
    """Alarms from the metrics and loads themselves, by RULES, VISITED and CROWDED."""
    found = []
    for key, severity, limit, words in RULES:
        if key in curves:
            curve = curves[key]
            found += [Alarm(severity, words.format(value=float(curve.values[end - 1])), int(curve.step[start]),
                            None if end == len(curve.step) else int(curve.step[end]))
                      for start, end in spans(np.abs(curve.values) > limit)]
    if frames is not None:
        load, share, fair = frames.load, frames.share, 1 / frames.counts.shape[2]
        tokens = None if frames.k_histogram is None else frames.k_histogram.sum(2).clip(1)
        most = load.max(2)
        visited = np.zeros(most.shape) if tokens is None else frames.counts.max(2) / tokens
        swallowed = (visited >= VISITED) & (most >= 2)

        def crowd(row: int, line: int) -> str:
            expert = int(frames.counts[line, row].argmax())
            return f"layer {layers[row]}: {expert_words(expert, float(share[line, row, expert]), fair)}"

        def add(severity: str, mask: np.ndarray, text: Callable[[int], str]) -> None:
            found.extend(Alarm(severity, text(end - 1), int(frames.step[start]),
                               None if end == len(mask) else int(frames.step[end])) for start, end in spans(mask))

        for row in range(len(layers)):
            add("critical", swallowed[:, row], partial(crowd, row))
        crowded = (most >= CROWDED) & ~swallowed

        def worst(line: int) -> str:  # one alarm for all layers: there may be dozens
            row, others = int(np.where(crowded[line], most[line], 0).argmax()), int(crowded[line].sum()) - 1
            return crowd(row, line) + (f", and {others} more layers have an expert beyond {CROWDED:g} times the mean"
                                       if others else "")

        add("warning", crowded.any(1), worst)
    return sorted(found, key=_urgency)


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the runs of True that have MIN_RECORDS or reach from the only record to the end."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= min(MIN_RECORDS, len(mask))]


# --- audit -----------------------------------------------------------------------------------------------------------

def read_origins(directory: str, config: Any, missing: list[str]) -> Origins | None:
    """Tokens and sources of experts, from the sampled records of the audit; None, with a reason in `missing`."""
    from launch.audit import open_texts
    from train.audit import FOLDER, read_records, read_steps

    folder = Path(directory) / FOLDER
    try:
        steps = read_steps(folder)
        large = sum(path.stat().st_size for path in folder.glob("records-*.bin")) > MAX_AUDIT_BYTES
        chosen = steps.step[evenly(len(steps.step), AUDIT_STEPS)].tolist() if large else [None]
        pieces = [part.take(part.sampled) for part in (read_records(folder, step) for step in chosen)]
    except (ValueError, OSError, KeyError) as error:
        missing.append(f"tokens of experts: {str(error).splitlines()[0]}")
        return None
    if not sum(map(len, pieces)):
        missing.append("tokens of experts: the audit has sampled no token yet")
        return None
    said = io.StringIO()
    texts = None
    if _tokens_at_hand(directory, config):
        with contextlib.redirect_stdout(said):
            texts = open_texts(directory, config)
    if texts is None:
        reason = said.getvalue().strip().removeprefix("token ids without text: ")
        missing.append("text of tokens: " + (reason or f"the run's tokens are no longer in data.cache_dir; `python -m "
                                             f"launch.audit run={directory}` prepares them again"))
    layer = np.concatenate([part.layer[part.owner] for part in pieces])
    expert = np.concatenate([part.experts for part in pieces])
    token = np.concatenate([part.token[part.owner] for part in pieces])
    distinct, where = np.unique(token, return_inverse=True)
    vocabulary = np.full(len(token), -1)
    source = np.zeros(len(token), np.int64)
    if texts is not None:
        vocabulary = texts.vocabulary_ids(distinct)[where]
        source = np.array([texts.source(int(t)) for t in distinct], np.int64)[where]
    names = [] if texts is None else [str(name) for name in texts.names]
    layers = [_layer_origins(expert[layer == at], vocabulary[layer == at], source[layer == at], texts,
                             config.model.num_experts, len(names)) for at in config.model.moe_layers]
    note = f"{len(distinct):,} sampled tokens" + (f" of {len(chosen)} steps, since the audit is large" if large else "")
    if config.model.num_experts > MAX_EXPERTS:
        note += f"; the {MAX_EXPERTS} busiest experts of each layer"
    return Origins(names, layers, note)


def _tokens_at_hand(directory: str, config: Any) -> bool:
    """Whether the tokens need not be prepared (downloaded, perhaps) first."""
    try:
        manifest = json.loads((Path(directory) / "data" / "manifest.json").read_text())
        return (Path(config.data.cache_dir) / manifest["fingerprint"] / "manifest.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _layer_origins(expert: np.ndarray, vocabulary: np.ndarray, source: np.ndarray, texts: Any, num_experts: int,
                   num_sources: int) -> list[dict[str, Any]]:
    """One layer's assignments [A]: its busiest experts, each with its tokens and the shares of sources."""
    counts = np.bincount(expert, minlength=num_experts)
    order = np.argsort(expert, kind="stable")
    ends = np.cumsum(counts)
    everyone = np.bincount(vocabulary[vocabulary >= 0], minlength=1)
    found = []
    for number in np.argsort(-counts, kind="stable")[:MAX_EXPERTS].tolist():
        rows = order[ends[number] - counts[number]:ends[number]]
        seen = vocabulary[rows]
        ids, times = np.unique(seen[seen >= 0], return_counts=True)
        lift = times / max(1, times.sum()) / np.maximum(everyone[ids], 1) * max(1, everyone.sum())
        frequent = np.argsort(-times, kind="stable")[:TOP_TOKENS]
        often = np.flatnonzero(times >= MIN_TIMES)
        typical = often[np.argsort(-(times * np.log(np.maximum(lift, 1e-9)))[often], kind="stable")][:TOP_TOKENS]
        shown = {name: [] if texts is None else [[texts.decode(ids[i:i + 1]), int(times[i]), round(float(lift[i]), 2)]
                                                 for i in chosen]
                 for name, chosen in (("frequent", frequent), ("typical", typical[lift[typical] > 1]))}
        shares = np.bincount(source[rows], minlength=num_sources) / max(1, len(rows)) if num_sources else np.zeros(0)
        found.append({"expert": number, "assignments": int(counts[number]),
                      "share": float(counts[number] / max(1, len(expert))), **shown,
                      "sources": [round(float(s), 4) for s in shares]})
    return found
