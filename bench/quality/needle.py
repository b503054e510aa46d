"""Where and under how much noise does sparse attention still find its token? The recall models,
tested off their training.

`python -m bench.quality.needle [--variants dense drop order2] [--seeds 0] [--steps 600] [--models
FOLDER] [--output FILE]` trains the models as bench.quality.recall does (or takes those that FOLDER
holds) and prints two tables as Markdown:

- needles: accuracy by where the asked pair lies in its context, at the trained length and at
  multiples of it, where the pairs are as many and the filler between them grows. The spec stays: a
  query sees fewer and fewer of the blocks exactly.
- noise: accuracy when a share of the context's tokens is replaced at random, mean over sequences
  and mean of the worst tenth of them. Only questions that keep exactly one answer count: their pair
  was not replaced, and no other token got its key.

Dense attention shows what of a loss is the model's and what is the sparsity's.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor

from bench.common import find_commit
from bench.quality.recall import (
    FILLER,
    NUM_KEYS,
    NUM_QUESTIONS,
    NUM_VALUES,
    VARIANTS,
    RecallModel,
    Sample,
    add_arguments,
    draw,
    is_right,
    print_differences,
    steps_of,
    trained,
)
from bench.quality.rules import cached_numbers
from train.files.strict_json import dumps

DEPTHS = 8
MULTIPLES = (1, 2, 4)
RATES = (0.0, 0.05, 0.1, 0.2, 0.3)
WORST = 0.1
"""Share of the sequences whose mean the tables call worst."""


def by_depth(model: RecallModel, length: int, num_sequences: int) -> dict[str, Any]:
    """Accuracy, all and by eighths of the context from its begin."""
    generator = torch.Generator().manual_seed(11)
    asked, right = torch.zeros(DEPTHS), torch.zeros(DEPTHS)
    for _ in range(0, num_sequences, 16):
        sample = draw(16, length, generator)
        depth = (sample.asked_at * DEPTHS // (length - NUM_QUESTIONS)).flatten()
        asked += torch.bincount(depth, minlength=DEPTHS)
        right += torch.bincount(
            depth, weights=is_right(model, sample).flatten().float(), minlength=DEPTHS
        )
    return {
        "length": length,
        "questions": int(asked.sum()),
        "accuracy": float(right.sum() / asked.sum()),
        "by_depth": (right / asked).tolist(),
    }


def disturb(sample: Sample, rate: float, generator: torch.Generator) -> tuple[Sample, Tensor]:
    """The sample with a share of its context replaced, and which questions [B, questions] keep
    exactly one answer.
    """
    tokens, shape = sample.tokens.clone(), sample.tokens[:, :-NUM_QUESTIONS, 0].shape
    hit = torch.rand(shape, generator=generator) < rate
    fresh = torch.stack(
        (
            torch.randint(0, NUM_KEYS + 1, shape, generator=generator),
            torch.randint(0, NUM_VALUES, shape, generator=generator),
        ),
        -1,
    )
    context = tokens[:, :-NUM_QUESTIONS]
    context[hit] = fresh[hit]
    asked = tokens[:, -NUM_QUESTIONS:, 0] - FILLER - 1
    once = (context[..., 0].unsqueeze(1) == asked.unsqueeze(2)).sum(-1) == 1
    return sample._replace(tokens=tokens), once & ~hit.gather(1, sample.asked_at)


def under_noise(model: RecallModel, length: int, rate: float, num_sequences: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(12)
    accuracies: list[float] = []
    questions = 0
    for _ in range(0, num_sequences, 32):
        sample, counts = disturb(draw(32, length, generator), rate, generator)
        right = is_right(model, sample) & counts
        some = counts.any(1)
        accuracies += (right.sum(1) / counts.sum(1))[some].tolist()
        questions += int(counts.sum())
    worst = sorted(accuracies)[: max(1, round(WORST * len(accuracies)))]
    return {
        "rate": rate,
        "questions": questions,
        "accuracy": statistics.mean(accuracies),
        "worst": statistics.mean(worst),
    }


def average(rows: list[dict[str, Any]], name: str, **where: Any) -> float:
    return statistics.mean(
        row[name] for row in rows if all(row[key] == value for key, value in where.items())
    )


def tables(variants: list[str], needles: list[dict[str, Any]], noise: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | length | accuracy | by eighths of the context, from its begin |",
        "|---|---|---|---|",
    ]
    for variant in variants:
        for length in sorted({row["length"] for row in needles}):
            rows = [row for row in needles if row["variant"] == variant and row["length"] == length]
            depths = [
                statistics.mean(column)
                for column in zip(*(row["by_depth"] for row in rows), strict=True)
            ]
            lines.append(
                f"| {variant} | {length} | {average(rows, 'accuracy'):.3f} | "
                f"{' '.join(f'{x:.2f}' for x in depths)} |"
            )
    lines += [
        "",
        f"| variant | {' | '.join(f'{rate:.0%} replaced: mean, worst tenth' for rate in RATES)} |",
        "|---" * (1 + len(RATES)) + "|",
    ]
    for variant in variants:
        cells = [
            f"{average(noise, 'accuracy', variant=variant, rate=rate):.3f} "
            f"{average(noise, 'worst', variant=variant, rate=rate):.3f}"
            for rate in RATES
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.needle")
    add_arguments(parser, ["dense", "drop", "order2"], [0])
    parser.set_defaults(steps=600)
    parser.add_argument("--sequences", type=int, default=128, help="of every test")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    needles, noise = [], []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            model, _ = trained(
                variant,
                seed,
                steps_of(variant, arguments),
                arguments.models,
                arguments.layers,
                arguments.length,
            )
            label = {"variant": variant, "seed": seed, "steps": steps_of(variant, arguments)}
            needles += [
                label | by_depth(model, multiple * arguments.length, arguments.sequences)
                for multiple in MULTIPLES
            ]
            noise += [
                label | under_noise(model, arguments.length, rate, arguments.sequences)
                for rate in RATES
            ]
    print(tables(arguments.variants, needles, noise))
    accuracies = {
        (row["variant"], row["seed"]): row["accuracy"]
        for row in needles
        if row["length"] == arguments.length
    }
    print()
    print_differences(accuracies, arguments.baseline)
    for variant in arguments.variants:
        if (rule := VARIANTS[variant].rule) is not None:
            numbers = cached_numbers(rule.attention, MULTIPLES[-1] * arguments.length)
            print(f"{variant} sees {rule.columns}; a token takes {numbers:g} numbers in a cache")
    if arguments.output:
        found = {"needles": needles, "noise": noise}
        arguments.output.write_text(
            dumps(
                {
                    "bench": "quality.needle",
                    "commit": find_commit(),
                    "torch": torch.__version__,
                    **found,
                }
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
