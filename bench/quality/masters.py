"""What masters of bf16 cost in held-out loss: rounded stochastically (train.master_dtype=bf16),
rounded to the nearest number, and fp32, all with weights of bf16. Real text.

`python -m bench.quality.masters FOLDER [--steps 60] [--seeds 1234 1 2] [--settings KEY=VALUE ...]`
trains what FOLDER/<masters>-<seed> does not hold yet, one process each, and prints a table and the
differences from fp32 (Student's interval, 95%, over seeds) as Markdown. `--at-once N` trains N side
by side; `--report` trains nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import torch

import train.engine.rounding
from bench.quality.sweep import command, interval, is_done, preload, read
from train.files.strict_json import dumps

MASTERS = {
    "fp32": ["train.master_dtype=fp32"],
    "stochastic": ["train.master_dtype=bf16"],
    "nearest": ["train.master_dtype=bf16"],
}
COMMON = [
    "experiment=quickstart",
    "parallel=single",
    "size=tiny",
    "tracker.wandb.mode=disabled",
    "train.precision=bf16",
    "train.seq_len=128",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.eval_interval=0",
    "train.eval_max_sequences=64",
    "train.sample_prompt=null",
]


def half(seed: int, update: int, name: str, elements: torch.Tensor) -> torch.Tensor:
    """In place of noise: adding half of what is cut off rounds to the nearest number."""
    return torch.full_like(elements, 2**15)


def train_one(run: Path, masters: str, seed: int, settings: list[str]) -> None:
    """In a fork: a run to its end."""
    if masters == "nearest":
        train.engine.rounding.noise = half
    words = [*COMMON, *MASTERS[masters], *settings, f"seed={seed}", f"run_dir={run}"]
    command(words, run.with_name(run.name + ".log"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.masters")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--settings", nargs="*", default=[])
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="of what there is; train nothing")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = {
        (masters, seed): arguments.folder / f"{masters}-{seed}"
        for seed in arguments.seeds
        for masters in MASTERS
    }
    todo = [key for key, run in runs.items() if not is_done(run)]
    if todo and not arguments.report:
        preload()
        settings = [f"train.num_steps={arguments.steps}", *arguments.settings]
        for first in range(0, len(todo), arguments.at_once):
            started = []
            for masters, seed in todo[first : first + arguments.at_once]:
                shutil.rmtree(run := runs[masters, seed], ignore_errors=True)
                process = multiprocessing.get_context("fork").Process(
                    target=train_one, args=(run, masters, seed, settings)
                )
                process.start()
                started.append(process)
            for process in started:
                process.join()

    found: dict[str, dict[int, Any]] = {masters: {} for masters in MASTERS}
    for (masters, seed), run in runs.items():
        if is_done(run):
            found[masters][seed] = read(run)
    print("| masters | " + " | ".join(f"seed {seed}" for seed in arguments.seeds) + " |")
    print("|---|" + "---|" * len(arguments.seeds))
    for masters, by_seed in found.items():
        cells = [f"{by_seed[s]['val_loss']:.4f}" if s in by_seed else "" for s in arguments.seeds]
        print(f"| {masters} | " + " | ".join(cells) + " |")
    for masters in ("stochastic", "nearest"):
        both = [seed for seed in found[masters] if seed in found["fp32"]]
        if both:
            differences = [
                found[masters][seed]["val_loss"] - found["fp32"][seed]["val_loss"] for seed in both
            ]
            middle, half_width = interval(differences)
            print(
                f"\n{masters} minus fp32: {middle:+.4f} ± {half_width:.4f} nats, {len(both)} seeds"
            )
    lacking = [run.name for run in runs.values() if not is_done(run)]
    if lacking:
        print("\nNot run: " + ", ".join(lacking) + ".")
    if arguments.json:
        arguments.json.write_text(dumps({"steps": arguments.steps, "results": found}) + "\n")


if __name__ == "__main__":
    main()
