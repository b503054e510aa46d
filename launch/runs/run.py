"""What a run directory says about its routing, read for the report: curves, loads by frame, alarms,
tokens of experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.history.past import read_past
from launch.runs.alarms import _urgency, judge, read_alarms, read_not_finite
from launch.runs.curves import read_curves, spent_flops
from launch.runs.loads import _deciles, read_frames
from launch.runs.origins import read_origins
from launch.runs.records import RunData
from launch.saved.run import load_run


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
        frames = read_frames(
            folder / "routing.jsonl", len(config.model.moe_layers), config.model.num_experts
        )
        if frames is not None:
            frames = replace(frames, deciles=_deciles(curves, frames.step))
        else:
            missing.append("expert loads: routing.jsonl has no usable line yet")
    else:
        missing.append("routing: this is a dense model, it has no experts")

    if not curves and frames is None:
        ended = "".join(f"; {alarm.text}" for alarm in read_not_finite(folder, curves))
        raise ValueError(
            f"{directory} has nothing to show: metrics.jsonl has no usable record; the run has not "
            f"reached its first log step (train.log_interval){ended}"
        )

    # Runs without alarms of their own are judged by fixed rules.
    latest = {name: curve.last for name, curve in curves.items()}
    alarms = read_alarms(
        folder / "alarms.jsonl", frames, config.model.moe_layers, config.alarms, latest
    )
    source = "alarms.jsonl"
    if alarms is None:
        alarms = judge(curves, frames, config.model.moe_layers)
        source = "metrics and routing (the run has no alarms.jsonl)"

    if not_finite := read_not_finite(folder, curves):
        alarms = sorted([*not_finite, *alarms], key=_urgency)
        source = f"{source} and what was not finite"

    origins = read_origins(directory, config, missing) if config.model.moe_layers else None
    return RunData(
        folder,
        config,
        curves,
        spent_flops(curves, config),
        frames,
        alarms,
        source,
        origins,
        missing,
        read_past(directory).settings,
    )
