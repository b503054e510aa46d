"""AdamW against Muon at equal tokens, each at the best of several learning rates. Real text.

`python -m bench.quality.optimizers FOLDER [--size small] [--steps 300] [--seeds 1234 1 2] [--rates
5e-4 1e-3 2e-3 4e-3 8e-3]` trains what FOLDER/<optimizer>-<rate>-<seed> does not hold yet, one
process each, and prints the tables as Markdown. A seed changes initial weights and the order of
data. The best rate is that of the lowest mean over seeds of the held-out loss, on the same held-out
tokens, so it flatters both optimizers alike; the interval of the difference at their best is
Student's, 95%, over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.files.strict_json import dumps

OPTIMIZERS = ("adamw", "muon")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Number of differences -> how many standard errors a 95% interval has on each side."""
SIZES = {
    "small": [
        "model.hidden_size=128",
        "model.num_layers=3",
        "model.intermediate_size=384",
        "model.expert_intermediate_size=128",
        "model.vocab_size=1024",
        "data.tokenizer.vocab_size=1024",
        "train.seq_len=128",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    ],
    "quickstart": [],
}
COMMON = [
    "experiment=quickstart",
    "parallel=single",
    "tracker.wandb.mode=disabled",
    "train.eval_interval=0",
    "train.eval_max_sequences=128",
    "train.sample_prompt=null",
    "checkpoint.keep_last=1",
]
Results = dict[str, dict[float, dict[int, dict[str, float]]]]
"""Optimizer -> learning rate -> seed -> numbers of the run."""


def train(folder: Path, optimizer: str, rate: float, seed: int, settings: list[str]) -> Path:
    """The run directory, trained first if it has no result yet."""
    run = folder / f"{optimizer}-{rate:g}-{seed}"
    if not (run / "result.json").is_file():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "launch.train",
                f"optim={optimizer}",
                *COMMON,
                *settings,
                f"optim.lr={rate}",
                f"optim.min_lr={rate / 10}",
                f"seed={seed}",
                f"run_dir={run}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return run


def read(run: Path) -> dict[str, float]:
    """Held-out loss at the end, training loss over the last tenth, and the median speed."""
    result = json.loads((run / "result.json").read_text())
    records = [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in r
    ]
    late = [r["train/loss"] for r in records if r["step"] > 0.9 * result["step"]]
    speeds = [r["perf/tokens_per_second"] for r in records if r.get("perf/tokens_per_second")]
    return {
        "val_loss": result["val_loss"],
        "train_loss": statistics.mean(late),
        "tokens_per_second": statistics.median(speeds),
        "tokens": result["tokens"],
    }


def best_rate(by_rate: dict[float, dict[int, dict[str, float]]]) -> float:
    return min(by_rate, key=lambda rate: mean(by_rate[rate], "val_loss"))


def mean(by_seed: dict[int, dict[str, float]], name: str) -> float:
    return statistics.mean(numbers[name] for numbers in by_seed.values())


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    number = len(differences)
    if number < 2:
        return differences[0], math.inf
    error = statistics.stdev(differences) / math.sqrt(number)
    return statistics.mean(differences), STUDENT.get(number, 2.0) * error


def tables(results: Results) -> str:
    rates = sorted({rate for by_rate in results.values() for rate in by_rate})
    lines = [
        "| held-out loss, mean over seeds (spread) | " + " | ".join(f"{r:g}" for r in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for optimizer, by_rate in results.items():
        cells = []
        for rate in rates:
            losses = [numbers["val_loss"] for numbers in by_rate[rate].values()]
            text = f"{statistics.mean(losses):.4f} ({max(losses) - min(losses):.3f})"
            cells.append(f"**{text}**" if rate == best_rate(by_rate) else text)
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")

    best = {optimizer: best_rate(by_rate) for optimizer, by_rate in results.items()}
    at_best = {optimizer: results[optimizer][rate] for optimizer, rate in best.items()}
    lines += ["", "| optimizer | best rate | held-out loss by seed | tokens per second |"]
    lines.append("|---|---|---|---|")
    for optimizer, by_seed in at_best.items():
        losses = " ".join(f"{numbers['val_loss']:.4f}" for numbers in by_seed.values())
        speed = mean(by_seed, "tokens_per_second")
        lines.append(f"| {optimizer} | {best[optimizer]:g} | {losses} | {speed:,.0f} |")
    for label, rate_of in (
        ("each at its best rate", best),
        *((f"both at {rate:g}", dict.fromkeys(OPTIMIZERS, rate)) for rate in rates),
    ):
        pairs = [
            results["muon"][rate_of["muon"]][seed]["val_loss"]
            - results["adamw"][rate_of["adamw"]][seed]["val_loss"]
            for seed in at_best["muon"]
        ]
        middle, half = interval(pairs)
        lines.append("")
        lines.append(f"Muon minus AdamW, {label}: {middle:+.4f} ± {half:.4f} nats.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.optimizers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    settings = [*SIZES[arguments.size], f"train.num_steps={arguments.steps}"]
    results: Results = {name: {rate: {} for rate in arguments.rates} for name in OPTIMIZERS}
    # Seeds outermost, so that what is there when it is cut short compares.
    for seed in arguments.seeds:
        for rate in arguments.rates:
            for optimizer in OPTIMIZERS:
                run = train(arguments.folder, optimizer, rate, seed, settings)
                results[optimizer][rate][seed] = read(run)
    print(tables(results))
    if arguments.json:
        found: Any = {"size": arguments.size, "steps": arguments.steps, "results": results}
        arguments.json.write_text(dumps(found) + "\n")


if __name__ == "__main__":
    main()
