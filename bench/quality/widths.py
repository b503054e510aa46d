"""Does the best learning rate of a narrow model hold for a wider one? Under muP (model.init=mup)
and under the ordinary rules, on real text.

`python -m bench.quality.widths FOLDER [--widths 64 128 256] [--rates 2e-3 4e-3 8e-3 16e-3 32e-3]
[--steps 100] [--seeds 1 2]` trains what FOLDER does not hold yet and prints the tables as Markdown.
A cell is a file, FOLDER/<rule>-<width>-<rate>-<seed>.json; the same command goes on where it was
stopped, with the first seed before the others. `--processor-seconds N` begins no cell once so many
were spent; `--report` trains nothing. Cells that are missing are named.

The model is that of bench/quality/small.py, all of whose widths grow in proportion. At the first
width both rules are the same model. A seed changes first weights and the order of the text, which
is that of all rules, rates and widths. The best rate is the vertex of a parabola through the
lowest mean loss and its neighbours over the logarithm of the rate, where it has both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import find_commit
from bench.quality.optimizers import from_the_middle
from bench.quality.small import LENGTH, ROWS, byte_model, train_bytes
from model.config import ModelConfig
from train.files.strict_json import dumps

RULES = {"ordinary": "depth_scaled", "mup": "mup"}


class Cell(NamedTuple):
    rule: str
    width: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rule}-{self.width}-{self.rate:g}-{self.seed}"


def shape(rule: str, width: int, base: int) -> ModelConfig:
    return byte_model(
        width,
        init=RULES[rule],
        mup_base_hidden_size=base if rule == "mup" else None,
    )


def train(cell: Cell, base: int, steps: int) -> dict[str, Any]:
    """What small.train_bytes says of a cell, and the settings that all cells of a folder share."""
    config = shape(cell.rule, cell.width, base)
    result = train_bytes(config, cell.rate, cell.seed, steps)
    return {"steps": steps, "base": base, **result}


def wanted(widths: list[int], rates: list[float], seeds: list[int]) -> list[Cell]:
    """All cells, the most telling first: a seed after the other, the narrowest and the widest model
    before those between them, rates from the middle outwards. The ordinary rules at the first width
    are muP's.
    """
    base, *others = widths
    in_order = [base, *sorted(others, key=lambda width: -width)]
    cells = []
    for seed in seeds:
        for width in in_order:
            for rate in from_the_middle(rates):
                rules = list(RULES) if width != base else ["mup"]
                cells += [Cell(rule, width, rate, seed) for rule in rules]
    return cells


def vertex(losses: dict[float, float]) -> tuple[float, bool]:
    """The best rate, and whether worse ones stand on both sides of it."""
    rates = sorted(losses)
    at = rates.index(min(rates, key=lambda rate: losses[rate]))
    if at in (0, len(rates) - 1):
        return rates[at], False
    x = [math.log2(rate) for rate in rates[at - 1 : at + 2]]
    y = [losses[rate] for rate in rates[at - 1 : at + 2]]
    # Through three points, by their divided differences.
    first, second = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (second - first) / (x[2] - x[0])
    return 2 ** ((x[0] + x[1]) / 2 - first / (2 * bend)), True


def means(found: dict[Cell, float], rule: str, width: int, base: int) -> dict[float, float]:
    """Rate -> mean over the seeds that every rate of this rule and width has."""
    rule = "mup" if width == base else rule
    of_rule = {c: loss for c, loss in found.items() if (c.rule, c.width) == (rule, width)}
    rates = sorted({cell.rate for cell in of_rule})
    seeds = [{c.seed for c in of_rule if c.rate == rate} for rate in rates]
    common = set.intersection(*seeds) if seeds else set()
    if not common:
        return {}
    return {
        rate: statistics.mean(of_rule[Cell(rule, width, rate, seed)] for seed in sorted(common))
        for rate in rates
    }


def summary(found: dict[Cell, float], widths: list[int]) -> list[dict[str, Any]]:
    """Of each rule and width that has cells: mean losses by rate, the best rate, by how many
    doublings it lies off that of the first width, and what keeping that one's best of the rates
    costs in nats.
    """
    base, rows = widths[0], list[dict[str, Any]]()
    at_base = means(found, "mup", base, base)
    for rule in RULES:
        for width in widths:
            losses = means(found, rule, width, base)
            if not losses or not at_base:
                continue
            best, inside = vertex(losses)
            kept = min(at_base, key=lambda rate: at_base[rate])
            cost = losses[kept] - min(losses.values()) if kept in losses else None
            rows.append(
                {
                    "rule": rule,
                    "width": width,
                    "losses": losses,
                    "best_rate": best,
                    "inside": inside,
                    "doublings": math.log2(best / vertex(at_base)[0]),
                    "cost_of_the_first_widths_rate": cost,
                }
            )
    return rows


def tables(found: dict[Cell, float], widths: list[int], rates: list[float]) -> str:
    lines = [
        "| rule | width | "
        + " | ".join(f"{rate:g}" for rate in rates)
        + " | best rate | doublings off the first width's | cost of its rate, nats |",
        "|---|---|" + "---|" * (len(rates) + 3),
    ]
    for row in summary(found, widths):
        losses = row["losses"]
        lowest = min(losses.values())
        cells = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates]
        cells = [
            f"**{cell}**" if losses.get(rate) == lowest else cell
            for cell, rate in zip(cells, rates, strict=True)
        ]
        best = f"{row['best_rate']:.2g}" + ("" if row["inside"] else " or beyond")
        cost = row["cost_of_the_first_widths_rate"]
        told = "" if cost is None else f"{cost:.4f}"
        lines.append(
            f"| {row['rule']} | {row['width']} | "
            + " | ".join(cells)
            + f" | {best} | {row['doublings']:+.2f} | {told} |"
        )
    return "\n".join(lines)


def read(folder: Path, cells: list[Cell], base: int, steps: int) -> dict[Cell, float]:
    """Held-out losses of the cells that are there; one without a loss counts as a model that knows
    nothing.

    Raises:
        ValueError: a cell is of other settings.
    """
    found = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        if (result["base"], result["steps"]) != (base, steps):
            raise ValueError(
                f"{path} has {result['steps']} steps and base width {result['base']}, not {steps} "
                f"and {base}; give another folder"
            )
        loss = result["val_loss"]
        found[cell] = math.log(256) if loss is None else loss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.widths")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 16e-3, 32e-3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processor-seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="of what there is; train nothing")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    widths, rates = sorted(arguments.widths), sorted(arguments.rates)
    folder, base = arguments.folder, widths[0]
    folder.mkdir(parents=True, exist_ok=True)
    cells = wanted(widths, rates, arguments.seeds)
    found, begin = read(folder, cells, base, arguments.steps), time.process_time()
    for cell in cells if not arguments.report else []:
        if time.process_time() - begin > arguments.processor_seconds:
            break
        if cell in found:
            continue
        result = train(cell, base, arguments.steps)
        scratch = folder / f"{cell.name}.tmp"
        scratch.write_text(dumps(result) + "\n")
        scratch.replace(folder / f"{cell.name}.json")
        print(cell.name, result["val_loss"], file=sys.stderr, flush=True)
        found = read(folder, cells, base, arguments.steps)

    print(tables(found, widths, rates))
    lacking = [cell.name for cell in cells if cell not in found]
    if lacking:
        print("\nNot run: " + ", ".join(lacking) + ".")
    if arguments.json:
        rows = [
            {**row, "losses": {f"{rate:g}": loss for rate, loss in row["losses"].items()}}
            for row in summary(found, widths)
        ]
        losses = {cell.name: loss for cell, loss in found.items()}
        result = {
            "bench": "quality.widths",
            "device": "cpu",
            "commit": find_commit(),
            "steps": arguments.steps,
            "tokens_a_step": ROWS * LENGTH,
            "summary": rows,
            "cells": losses,
        }
        arguments.json.write_text(dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
