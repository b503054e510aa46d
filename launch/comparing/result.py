"""All numbers of a comparison as plain data: what its page shows and what scripts read."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.comparing import measure
from launch.comparing.decision import Candidate, Decision, decide
from launch.comparing.grid import Cell, directory_of
from launch.comparing.intervals import Difference, difference, t_quantile
from launch.comparing.settings import CompareConfig
from launch.comparing.work import Outcome
from launch.config.overrides import plain
from launch.history.comparable import incomparable, measure_of
from launch.history.differences import SET, differences
from launch.job.memory import planned_memory
from launch.runs.curves import read_curves, spent_flops
from launch.runs.run import read_run
from launch.saved.resume import shown
from model.cost.memory import cache_bytes
from model.cost.parameters import count_parameters, flops_per_token

Told = Callable[[str], None]


def gather(
    settings: CompareConfig,
    cells: Sequence[Cell],
    outcomes: Mapping[str, Outcome],
    folder: Path,
    told: Told = lambda line: None,
) -> dict[str, Any]:
    """Measure what is not measured yet, and put everything together.

    Returns:
        {question, sizes: [{size, variants: [...]}], decision, differing, effort, comparable}
    """
    by_size: dict[str | None, list[Cell]] = {}
    for cell in cells:
        by_size.setdefault(cell.size, []).append(cell)
    done = [cell for cell in cells if outcomes[cell.name].state == "done"]
    measures = [measure_of(directory_of(folder, cell), cell.run.train.seq_len) for cell in done]
    reason = incomparable(measures)

    sizes = []
    for size, own in by_size.items():
        told(f"measuring {size or 'the runs'}")
        sizes.append(_of_size(settings, size, own, outcomes, folder, told))
    # The largest decides: what ranks small models does not always rank large ones.
    largest = max(sizes, key=lambda one: float(one["variants"][0]["training_flops_per_token"]))
    if reason is None:
        decision = _decision(settings, largest)
    else:
        decision = Decision("failed", None, f"Nothing is decided: {reason}.", (), "One text.")
    last = {cell.variant: cell for cell in by_size[largest["size"]]}
    return {
        "question": settings.question,
        "first": settings.variants[0],
        "variants": list(settings.variants),
        "seeds": settings.seeds,
        "margin": settings.margin,
        "cost": settings.cost,
        "saving": settings.saving,
        "largest": largest["size"],
        "sizes": [{**one, "variants": [_public(v) for v in one["variants"]]} for one in sizes],
        "decision": dataclasses.asdict(decision),
        "differing": _differing(list(last.values())),
        "effort": _effort(cells, outcomes),
        "batch": _batch(cells[0]),
        "speed": dataclasses.asdict(settings.speed),
        "incomparable": reason,
    }


def _public(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not key.startswith("_")}


def _batch(cell: Cell) -> dict[str, int]:
    train = cell.run.train
    return {"seq_len": train.seq_len, "global_batch_size": train.global_batch_size}


def _effort(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    states = [outcomes[cell.name].state for cell in cells]
    seconds = sum(outcomes[cell.name].seconds for cell in cells)
    return {
        "runs": len(cells),
        "done": states.count("done"),
        "failed": states.count("failed"),
        "seconds": seconds,
        "device_hours": sum(outcomes[cell.name].seconds * cell.num_ranks / 3600 for cell in cells),
        "flops": sum(c.flops for c in cells if outcomes[c.name].state == "done"),
    }


# --- one size -------------------------------------------------------------------------------------


def _of_size(
    settings: CompareConfig,
    size: str | None,
    cells: Sequence[Cell],
    outcomes: Mapping[str, Outcome],
    folder: Path,
    told: Told,
) -> dict[str, Any]:
    entries = []
    for variant in settings.variants:
        own = [cell for cell in cells if cell.variant == variant]
        entries.append(_of_variant(settings, variant, own, outcomes, folder, told))
    _add_speed(settings, size, entries, folder, told)
    first = entries[0]
    for entry in entries[1:]:
        found = _difference(entry, first)
        entry["_difference"] = found
        entry["difference"] = None if found is None else described(found)
    return {"size": size, "variants": entries}


def _of_variant(
    settings: CompareConfig,
    variant: str,
    cells: Sequence[Cell],
    outcomes: Mapping[str, Outcome],
    folder: Path,
    told: Told,
) -> dict[str, Any]:
    """Facts of a variant at a size; what only a finished run says is None where none has."""
    run = cells[0].run
    count = count_parameters(run.model, run.experts_per_token, run.attention.arguments)
    done = [cell for cell in cells if outcomes[cell.name].state == "done"]
    losses: dict[int, dict[str, Any]] = {}
    for cell in done:
        told(f"held-out loss of {cell.name}")
        path = folder / "measured" / f"{cell.name}.json"
        losses[cell.seed] = measure.losses(path, directory_of(folder, cell))

    values = [sum(one["sums"]) / sum(one["counts"]) for one in losses.values()]
    low, high = mean_interval(values)
    experts = [one["experts_per_token"] for one in losses.values()]
    visited = statistics.fmean(experts) if experts else None
    width = 4 if run.train.precision == "fp32" else 2
    length = settings.speed.context + settings.speed.new_tokens
    row = cache_bytes(run.model, width, length, run.attention.arguments)
    seconds = [outcomes[cell.name].seconds for cell in done]
    return {
        "variant": variant,
        "runs": len(cells),
        "done": len(done),
        "failures": [
            {
                "run": cell.name,
                "state": outcomes[cell.name].state,
                "code": outcomes[cell.name].code,
                "lines": list(outcomes[cell.name].lines),
            }
            for cell in cells
            if outcomes[cell.name].state != "done"
        ],
        "_losses": losses,
        "losses": values,
        "seeds": list(losses),
        "loss": statistics.fmean(values) if values else None,
        "loss_low": low,
        "loss_high": high,
        "difference": None,
        "parameters": count.total,
        "active_parameters": count.active,
        "router": run.router.name if run.model.num_experts else "dense",
        "attention": run.attention.name,
        "num_steps": run.train.num_steps,
        "tokens": cells[0].tokens,
        "training_flops_per_token": cells[0].flops_per_token,
        "training_flops": cells[0].flops,
        "training_flops_spent": _mean([_spent(directory_of(folder, cell)) for cell in done]),
        "experts_per_token": visited,
        "flops_per_token": None
        if visited is None
        else flops_per_token(run.model, visited, run.train.seq_len, run.attention.arguments) / 3,
        "memory_bytes": count.total * width + settings.speed.rows * row,
        "training_memory_bytes": planned_memory(run, cells[0].num_ranks).total,
        "seconds_per_run": _mean(seconds),
        "speed": None,
        "risks": _risks([directory_of(folder, cell) for cell in done]),
    }


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95% of the mean over seeds, by Student's t; None of fewer than two."""
    if len(values) < 2:
        return None, None
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def _spent(run_dir: Path) -> float:
    """Training FLOPs with the experts that tokens really visited."""
    from launch.saved.run import load_run

    curves = read_curves(run_dir / "metrics.jsonl")
    found = spent_flops(curves, load_run(str(run_dir)))
    return float(found.values[-1]) if len(found.values) else math.nan


def _risks(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """What went wrong in runs that ended: alarms, fallbacks, skipped steps, errors of attention."""
    runs = [read_run(str(run_dir)) for run_dir in run_dirs]

    def worst(key: str) -> float | None:
        values = [v for run in runs if (v := run.last(key)) is not None and math.isfinite(v)]
        return max(values) if values else None

    alarms = sorted({alarm.text for run in runs for alarm in run.alarms if alarm.active})
    return {
        "alarms": alarms,
        "fallback": worst("moe/fallback_rate"),
        "dropped": worst("moe/dropped"),
        "max_vio": worst("moe/max_vio"),
        "skipped_steps": worst("train/skipped_steps"),
        "attention_error": worst("attention/error"),
    }


def _add_speed(
    settings: CompareConfig,
    size: str | None,
    entries: Sequence[dict[str, Any]],
    folder: Path,
    told: Told,
) -> None:
    runs = {
        entry["variant"]: folder
        / "runs"
        / "-".join(filter(None, (size, entry["variant"], str(entry["seeds"][0]))))
        for entry in entries
        if entry["seeds"]
    }
    if not settings.speed.new_tokens or not runs:
        return
    path = folder / "measured" / f"speed-{size or 'own'}.json"
    found = measure.speed(path, runs, settings.speed, told)
    for entry in entries:
        entry["speed"] = found.get(entry["variant"])


# --- differences and the decision -----------------------------------------------------------------


def _difference(entry: dict[str, Any], first: dict[str, Any]) -> Difference | None:
    """Of a variant's loss to another's over the seeds that both have; None: there is none."""
    ours, theirs = entry["_losses"], first["_losses"]
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    counts = np.array(ours[seeds[0]]["counts"])
    for seed in seeds:
        assert ours[seed]["counts"] == theirs[seed]["counts"] == counts.tolist()
    return difference(
        [np.array(ours[seed]["sums"]) for seed in seeds],
        [np.array(theirs[seed]["sums"]) for seed in seeds],
        counts,
    )


def described(found: Difference) -> dict[str, Any]:
    """As data; ends of intervals that are not known are None."""
    low, high = found.interval()
    return {
        "mean": found.mean,
        "low": _finite(low),
        "high": _finite(high),
        "by_seed": list(found.by_seed),
        "spread": _finite(found.spread),
        "text_error": _finite(found.text_error),
        "better": found.below(0.0),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _decision(settings: CompareConfig, largest: dict[str, Any]) -> Decision:
    first, *others = largest["variants"]
    candidates = [
        Candidate(
            name=entry["variant"],
            difference=entry["_difference"] if entry["done"] == entry["runs"] else None,
            cost_ratio=cost_ratio(settings.cost, entry, first),
            seconds=entry["seconds_per_run"] or 0.0,
            failed=entry["runs"] - entry["done"],
        )
        for entry in others
    ]
    pairs = {
        (a["variant"], b["variant"]): found
        for a in others
        for b in others
        if a is not b and (found := _difference(a, b)) is not None
    }
    return decide(
        settings.variants[0],
        candidates,
        settings.margin,
        settings.cost,
        settings.saving,
        first["seconds_per_run"] or 0.0,
        first["runs"] - first["done"],
        pairs,
    )


def cost_ratio(cost: str, entry: dict[str, Any], first: dict[str, Any]) -> float | None:
    """Of the chosen cost of inference to the first variant's; of latency the upper end of its
    interval. None: not known.
    """
    if cost == "latency":
        speed = entry["speed"] or {}
        return speed.get("ratio_high")
    key = {"flops": "flops_per_token", "memory": "memory_bytes"}[cost]
    if entry[key] is None or not first[key]:
        return None
    return float(entry[key] / first[key])


def _differing(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Settings in which the variants differ: numbers and choices alone, as the page may be passed
    on.
    """
    found = differences([plain(cell.config) for cell in cells], shareable=True)
    return [
        {"setting": key, "values": [repr(v) if v is SET else shown(v) for v in values]}
        for key, values in found.items()
    ]
