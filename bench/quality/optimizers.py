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

import statistics
from pathlib import Path
from typing import Any

from bench.quality.sweep import Todo, go_on, interval, is_done, parser_of, print_missing, read
from train.files.strict_json import dumps

OPTIMIZERS = ("adamw", "muon")
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


def best_rate(by_rate: dict[float, dict[int, dict[str, float]]]) -> float:
    """Of those with the most seeds: one lucky seed at a rate is no mean."""
    most = max(map(len, by_rate.values()))
    full = [rate for rate, by_seed in by_rate.items() if len(by_seed) == most]
    return min(full, key=lambda rate: mean(by_rate[rate], "val_loss"))


def mean(by_seed: dict[int, dict[str, float]], name: str) -> float:
    return statistics.mean(numbers[name] for numbers in by_seed.values())


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


def main() -> None:
    parser = parser_of("bench.quality.optimizers")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--every-cell", action="store_true", help="all seeds at all rates")
    arguments = parser.parse_args()
    rates, seeds, folder = arguments.rates, arguments.seeds, arguments.folder
    common = [*SIZES[arguments.size], f"train.num_steps={arguments.steps}"]

    def todo() -> Todo:
        found = []
        for one in missing(gather(folder, rates, seeds), rates, seeds, arguments.every_cell):
            settings = common + (FOR_MUON.get(arguments.size, []) if one[0] == "muon" else [])
            found.append((cell(folder, *one), words_of(*one, settings)))
        return found

    go_on(arguments, todo)
    results = gather(folder, rates, seeds)
    print(tables(results))
    print_missing(todo())
    if arguments.json:
        found: Any = {"size": arguments.size, "steps": arguments.steps, "results": results}
        arguments.json.write_text(dumps(found) + "\n")


if __name__ == "__main__":
    main()
