"""Where the time of a training step goes, by part: blocks as graphs beside eager ones, and Muon
beside AdamW.

`python -m bench.step_parts [--size quickstart] [--kinds adamw compiled muon] [--steps 10] [--rounds
3] [--settings KEY=VALUE ...] [--json FILE]` trains the quickstart with each of the kinds in turn,
--rounds times over, each in a process of its own: steps that warm up, then --steps that are traced
by phase (profile.steps), then untraced ones, whose time is that of the whole step. Everything else
is the quickstart's. Given are medians over rounds, in milliseconds of the clock, and each as a
multiple of what the first kind takes. Tracing costs time, so that parts add up to more than the
whole; a busy machine has nothing to say about either.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common import device_name, find_commit
from bench.quality.sweep import command, preload
from train.files.strict_json import dumps

KINDS = {
    "adamw": ["optim=adamw"],
    "compiled": ["optim=adamw", "train.compile=blocks"],
    "muon": ["optim=muon"],
    "muon_compiled": ["optim=muon", "train.compile=blocks"],
}
SIZES = {"quickstart": list[str](), "tiny": ["size=tiny"]}
WARM_UP = 4
COMMON = [
    "experiment=quickstart",
    "parallel=single",
    "tracker.wandb.mode=disabled",
    "train.eval_interval=0",
    "train.eval_max_sequences=1",
    "train.sample_prompt=null",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=false",
    "optim.warmup_steps=2",
]


def settings_of(kind: str, size: str, steps: int, more: list[str]) -> list[str]:
    interval = WARM_UP + steps
    return [
        *COMMON,
        *SIZES[size],
        *KINDS[kind],
        # The trace is written before the first interval ends, the second has untraced steps alone.
        f"train.num_steps={2 * interval}",
        f"train.log_interval={interval}",
        f"profile.steps=[{WARM_UP},{interval - 1}]",
        *more,
    ]


def read(run: Path) -> dict[str, float]:
    """Milliseconds of each phase of a step, and of a whole step that was not traced."""
    phases = json.loads((run / "profile" / "rank-00000-phases.json").read_text())["phases"]
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    whole = [record["perf/step_seconds"] for record in records if "perf/step_seconds" in record]
    return {name: 1e3 * seconds for name, seconds in {**phases, "whole": whole[-1]}.items()}


def one_round(words: list[str]) -> dict[str, float]:
    """A run in a fork, which has torch and DeepSpeed already.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        arguments = ([*words, f"run_dir={run}"], log)
        process = multiprocessing.get_context("fork").Process(target=command, args=arguments)
        process.start()
        process.join()
        if process.exitcode != 0:
            said = log.read_text()[-3000:]
            raise RuntimeError(f"{' '.join(words)} did not train to its end:\n{said}")
        return read(run)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_parts")
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["adamw", "compiled", "muon"])
    parser.add_argument("--steps", type=int, default=10, help="that are traced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=[], help="more of launch.train's")
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    preload()
    samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
    for number in range(arguments.rounds):
        # Whoever comes first changes from round to round.
        shift = number % len(arguments.kinds)
        for kind in arguments.kinds[shift:] + arguments.kinds[:shift]:
            words = settings_of(kind, arguments.size, arguments.steps, arguments.settings)
            samples[kind].append(one_round(words))
            print(f"round {number + 1}, {kind}: {samples[kind][-1]}", flush=True)

    times = {kind: medians(rounds) for kind, rounds in samples.items()}
    first = times[arguments.kinds[0]]
    print("| part of a step, ms | " + " | ".join(times) + " |")
    print("|---|" + "---|" * len(times))
    for name, milliseconds in first.items():
        cells = [f"{one[name]:.1f}" for one in times.values()]
        if milliseconds > 0:
            cells = [
                f"{cell} (x {one[name] / milliseconds:.2f})" if one is not first else cell
                for cell, one in zip(cells, times.values(), strict=True)
            ]
        print(f"| {name} | " + " | ".join(cells) + " |")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "bench": "step_parts",
        "device": device_name(device),
        "commit": find_commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "size": arguments.size,
        "steps": arguments.steps,
        "settings": arguments.settings,
        "unit": "milliseconds of a step",
        "medians": times,
        "rounds": samples,
    }
    text = dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(dumps(result))


if __name__ == "__main__":
    main()
