"""AdamW against Muon at equal tokens, each at the best of several learning rates. Real text.

`python -m bench.quality.optimizers FOLDER [--size small] [--steps 300] [--seeds 1234 1 2] [--rates
5e-4 1e-3 2e-3 4e-3 8e-3]` trains what FOLDER/<optimizer>-<rate>-<seed> does not hold yet and prints
the tables as Markdown. A seed changes initial weights and the order of data. The best rate is that
of the lowest mean over seeds of the held-out loss, on the same held-out tokens, so it flatters both
optimizers alike; the interval of the difference at their best is Student's, 95%, over seeds.

The first seed runs at every rate, from the middle one outwards; the others at each optimizer's best
rate and its neighbours (`--every-cell`: at all). The same command goes on where it was stopped, a
cell that was cut short included. `--processor-seconds N` begins no cell once so many were spent;
`--report` trains nothing. Cells that are missing are named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from train.engine.library import import_deepspeed
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
    # 30.5M parameters of which a token visits 2.3M, in fp32 all through: without instructions for
    # it, a CPU computes Newton-Schulz in bf16 at an eighth of the speed.
    "30m": [
        "model.num_experts=192",
        "model.expert_intermediate_size=64",
        "router.top_k=4",
        "train.seq_len=128",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "optim.warmup_steps=8",
    ],
}
FOR_MUON = {"30m": ["optim.orthogonalize_dtype=fp32"]}
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
Cell = tuple[str, float, int]
"""Optimizer, learning rate, seed."""


def cell(folder: Path, optimizer: str, rate: float, seed: int) -> Path:
    return folder / f"{optimizer}-{rate:g}-{seed}"


def is_done(run: Path) -> bool:
    """Whether it trained to its end; a run that was asked to stop has a result as well."""
    result = run / "result.json"
    return result.is_file() and not json.loads(result.read_text())["stopped"]


def from_the_middle(rates: list[float]) -> list[float]:
    """The middle one first, then its neighbours: what is cut short still has two to compare."""
    ordered = sorted(rates)
    middle = (len(ordered) - 1) / 2
    return sorted(ordered, key=lambda rate: (abs(ordered.index(rate) - middle), rate))


def missing(results: Results, rates: list[float], seeds: list[int], every: bool) -> list[Cell]:
    """What is still to be run, in this order: the first seed at all rates, then the others.

    Which rates the others run at is decided by the first seed alone, so that it does not change
    under way.

    Args:
        every: the other seeds run at all rates as well.
    """
    first, *others = seeds
    cells = [(name, rate, first) for rate in from_the_middle(rates) for name in OPTIMIZERS]
    lacking = [one for one in cells if first not in results[one[0]][one[1]]]
    if lacking and not every:
        return lacking

    ordered = sorted(rates)
    for seed in others:
        for name in OPTIMIZERS:
            near = ordered
            if not every:
                by_rate = {rate: {first: results[name][rate][first]} for rate in ordered}
                at = ordered.index(best_rate(by_rate))
                near = [ordered[at], *ordered[max(0, at - 1) : at], *ordered[at + 1 : at + 2]]
            lacking += [(name, rate, seed) for rate in near if seed not in results[name][rate]]
    return lacking


def words_of(optimizer: str, rate: float, seed: int, settings: list[str]) -> list[str]:
    """What a cell is asked for."""
    return [
        f"optim={optimizer}",
        *COMMON,
        *settings,
        f"optim.lr={rate}",
        f"optim.min_lr={rate / 10}",
        f"seed={seed}",
    ]


def train(run: Path, words: list[str]) -> None:
    """Train a cell to its end, or go on with one that was stopped and has a checkpoint. Its numbers
    stay, its weights do not.

    Raises:
        RuntimeError: it failed; its output is in RUN.log.
    """
    before = spent()
    run.parent.mkdir(parents=True, exist_ok=True)
    if any((run / "checkpoints").glob("step-*")):
        words = [f"resume={run}"]
    else:
        shutil.rmtree(run, ignore_errors=True)
        words = [*words, f"run_dir={run}"]
    log = run.with_name(run.name + ".log")
    # A fork has torch and DeepSpeed already, which cost as much as a short cell.
    process = multiprocessing.get_context("fork").Process(target=command, args=(words, log))
    process.start()
    process.join()
    if process.exitcode != 0 or not is_done(run):
        raise RuntimeError(f"{run.name} did not train to its end; see {log}")
    log.unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "processor_seconds").write_text(str(spent() - before))


def command(words: list[str], log: Path) -> None:
    """launch.train in this process, which is a fork."""
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["launch.train", *words]
    runpy.run_module("launch.train", run_name="__main__")


def read(run: Path) -> dict[str, float]:
    """Held-out loss at the end, training loss over the last tenth, the median speed, and what it
    cost, where it ran in one go.
    """
    result = json.loads((run / "result.json").read_text())
    records = [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in r
    ]
    late = [r["train/loss"] for r in records if r["step"] > 0.9 * result["step"]]
    speeds = [r["perf/tokens_per_second"] for r in records if r.get("perf/tokens_per_second")]
    cost = run / "processor_seconds"
    return {
        "val_loss": result["val_loss"],
        "train_loss": statistics.mean(late),
        "tokens_per_second": statistics.median(speeds),
        "tokens": result["tokens"],
        "processor_seconds": float(cost.read_text()) if cost.is_file() else 0.0,
    }


def best_rate(by_rate: dict[float, dict[int, dict[str, float]]]) -> float:
    """Of those with the most seeds: one lucky seed at a rate is no mean."""
    most = max(map(len, by_rate.values()))
    full = [rate for rate, by_seed in by_rate.items() if len(by_seed) == most]
    return min(full, key=lambda rate: mean(by_rate[rate], "val_loss"))


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
    """Markdown of what there is: every cell, and differences over the seeds that both have."""
    rates = sorted({rate for by_rate in results.values() for rate in by_rate})
    seeds = sorted(
        {seed for rows in results.values() for by_seed in rows.values() for seed in by_seed}
    )
    lines = [
        "| optimizer | learning rate | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean |",
        "|---|---|" + "---|" * (len(seeds) + 1),
    ]
    for optimizer, by_rate in results.items():
        has_any = any(by_rate.values())
        for rate in rates:
            by_seed = by_rate[rate]
            cells = [f"{by_seed[s]['val_loss']:.4f}" if s in by_seed else "" for s in seeds]
            middle = f"{mean(by_seed, 'val_loss'):.4f}" if by_seed else ""
            is_best = has_any and rate == best_rate(by_rate)
            cells.append(f"**{middle}**" if is_best else middle)
            lines.append(f"| {optimizer} | {rate:g} | " + " | ".join(cells) + " |")

    if not all(any(by_rate.values()) for by_rate in results.values()):
        return "\n".join(lines)
    best = {optimizer: best_rate(by_rate) for optimizer, by_rate in results.items()}
    lines += ["", "| optimizer | best rate | tokens per second | processor seconds of a cell |"]
    lines.append("|---|---|---|---|")
    for optimizer, rate in best.items():
        by_seed = results[optimizer][rate]
        speed = mean(by_seed, "tokens_per_second")
        spent = mean(by_seed, "processor_seconds")
        lines.append(f"| {optimizer} | {rate:g} | {speed:,.0f} | {spent:,.0f} |")
    for label, rate_of in (
        ("each at its best rate", best),
        *((f"both at {rate:g}", dict.fromkeys(OPTIMIZERS, rate)) for rate in rates),
    ):
        muon = results["muon"][rate_of["muon"]]
        adamw = results["adamw"][rate_of["adamw"]]
        pairs = [muon[seed]["val_loss"] - adamw[seed]["val_loss"] for seed in muon if seed in adamw]
        if not pairs:
            continue
        middle, half = interval(pairs)
        sure = f" ± {half:.4f}" if len(pairs) > 1 else " (one seed: no interval)"
        lines += ["", f"Muon minus AdamW, {label}: {middle:+.4f}{sure} nats, {len(pairs)} seeds."]
    return "\n".join(lines)


def gather(folder: Path, rates: list[float], seeds: list[int]) -> Results:
    """The numbers of every cell that is done."""
    found: Results = {name: {rate: {} for rate in rates} for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        for rate in rates:
            for seed in seeds:
                if is_done(run := cell(folder, name, rate, seed)):
                    found[name][rate][seed] = read(run)
    return found


def spent() -> float:
    """Processor seconds of the cells that this process has trained."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.optimizers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--every-cell", action="store_true", help="all seeds at all rates")
    parser.add_argument("--processor-seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="of what there is; train nothing")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    rates, seeds, folder = arguments.rates, arguments.seeds, arguments.folder
    while not arguments.report and spent() < arguments.processor_seconds:
        todo = missing(gather(folder, rates, seeds), rates, seeds, arguments.every_cell)
        if not todo:
            break
        preload()
        name, rate, seed = todo[0]
        run = cell(folder, name, rate, seed)
        settings = [*SIZES[arguments.size], f"train.num_steps={arguments.steps}"]
        settings += FOR_MUON.get(arguments.size, []) if name == "muon" else []
        train(run, words_of(name, rate, seed, settings))
        print(f"{run.name}: {read(run)['val_loss']:.4f}", file=sys.stderr, flush=True)

    results = gather(folder, rates, seeds)
    print(tables(results))
    if todo := missing(results, rates, seeds, arguments.every_cell):
        print("\nNot run: " + ", ".join(cell(folder, *one).name for one in todo) + ".")
    if arguments.json:
        found: Any = {"size": arguments.size, "steps": arguments.steps, "results": results}
        arguments.json.write_text(dumps(found) + "\n")


def preload() -> None:
    """What cells import, before the first fork."""
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("launch.config.contradictions", "train.loop"):
        importlib.import_module(name)
    import_deepspeed()


if __name__ == "__main__":
    main()
