"""What does sparse attention cost in held-out loss? Reads finished runs and prints tables as
Markdown.

`python -m bench.quality.sparse_attention --runs GLOB [GLOB ...] [--json FILE] [--plot FILE.png]
[--only scc dense ...]`

A run is a directory with result.json, metrics.jsonl and config.yaml, as launch.train leaves it; its
variant is read from its configuration, its seed too. Runs without a result are named and left out.
For example, with three seeds each:

    # also attention=drop, sliding_window
    python -m launch.train experiment=quickstart_sparse run_dir=FOLDER/scc_1 seed=1
    python -m launch.train experiment=quickstart_sparse run_dir=FOLDER/dense_1 seed=1 \\
        attention=dense ~attention.block_size ~attention.coarse_block_size ~attention.top_k \\
        ~attention.window_size
    python -m bench.quality.sparse_attention --runs 'FOLDER/*'

Tail mass (share of the softmax in coarse entries) and audited error (distance from dense attention
over its norm, on sampled rows) are means over the last quarter of the log lines. --plot needs
matplotlib, which requirements.txt does not have.
"""

from __future__ import annotations

import argparse
import glob
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench.common import find_commit
from model.attention.config.dense import DenseAttentionConfig
from train.config.component import renamed
from train.files.strict_json import dumps

BASE = "dense"


def variant_of(attention: Mapping[str, Any]) -> str:
    """The name of a configuration's attention in conf/attention, window for sliding_window."""
    if renamed(attention)["name"] == DenseAttentionConfig.name:
        return BASE
    if attention.get("merge") == "gated":
        return "nsa"
    if attention.get("tail") == "drop":
        return "drop" if attention["top_k"] else "window"
    return "scc"


def read(run: Path) -> dict[str, Any]:
    config = OmegaConf.load(run / "config.yaml")
    result = json.loads((run / "result.json").read_text())
    records = [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in r
    ]
    late = records[-max(1, len(records) // 4) :]

    def by_layer(name: str) -> dict[str, float]:
        start = f"attention/{name}/layer_"
        return {
            key.removeprefix(start): statistics.mean(r[key] for r in late if key in r)
            for key in late[-1]
            if key.startswith(start)
        }

    def mean(name: str) -> float | None:
        found = [r[name] for r in late if name in r]
        return statistics.mean(found) if found else None

    return {
        "variant": variant_of(config["attention"]),
        "seed": config["seed"],
        "val_loss": result["val_loss"],
        "tokens": result["tokens"],
        "tokens_per_second": statistics.median(r["perf/tokens_per_second"] for r in records),
        "tail_mass": by_layer("tail_mass"),
        "error": by_layer("error"),
        "selected_mass": mean("attention/selected_mass"),
        "union_factor": mean("attention/union_factor"),
        "bound_violations": sum(r.get("attention/bound_violations", 0) for r in records),
        "steps": [r["step"] for r in records],
        "train_loss": [r["train/loss"] for r in records],
    }


def find_runs(patterns: list[str], only: list[str] | None) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by variant and seed, dense first."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in sorted({Path(name) for pattern in patterns for name in glob.glob(pattern)}):
        if not (run / "config.yaml").is_file():
            continue
        if not (run / "result.json").is_file():
            print(f"{run.name} has no result yet; it is left out")
            continue
        result = read(run)
        if only and result["variant"] not in only:
            continue
        by_seed = found.setdefault(result["variant"], {})
        if result["seed"] in by_seed:
            raise ValueError(
                f"{run} is a second run of {result['variant']} with seed {result['seed']}; narrow "
                "--runs"
            )
        by_seed[result["seed"]] = result
    if len({result["tokens"] for by_seed in found.values() for result in by_seed.values()}) > 1:
        raise ValueError("the runs saw different numbers of tokens; narrow --runs")
    return {
        name: dict(sorted(found[name].items()))
        for name in sorted(found, key=lambda x: (x != BASE, x))
    }


def percent(loss: float, base: float) -> float:
    return 100 * (loss / base - 1)


def tables(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    base = results.get(BASE, {})
    lines = [
        "| attention | seeds | held-out loss, mean | by seed | against dense, by seed | mean | "
        "tokens/s, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, by_seed in results.items():
        losses = [r["val_loss"] for r in by_seed.values()]
        pairs = [
            percent(r["val_loss"], base[seed]["val_loss"])
            for seed, r in by_seed.items()
            if seed in base
        ]
        speed = statistics.median(r["tokens_per_second"] for r in by_seed.values())
        lines.append(
            f"| {variant} | {' '.join(map(str, by_seed))} | {statistics.mean(losses):.4f} | "
            f"{' '.join(f'{x:.4f}' for x in losses)} | {' '.join(f'{x:+.2f}%' for x in pairs)} | "
            f"{f'{statistics.mean(pairs):+.2f}%' if pairs else ''} | {speed:.0f} |"
        )
    lines += [
        "",
        "| attention | tail mass by layer | audited error by layer | selected mass "
        "| union factor |",
        "|---|---|---|---|---|",
    ]
    for variant, by_seed in results.items():
        runs = list(by_seed.values())
        if not runs[0]["tail_mass"]:
            continue

        def layers(name: str, runs: list[dict[str, Any]] = runs) -> str:
            return " ".join(
                f"{statistics.mean(r[name][layer] for r in runs):.3f}" for layer in runs[0][name]
            )

        means = [
            statistics.mean(x) if (x := [r[name] for r in runs if r[name] is not None]) else None
            for name in ("selected_mass", "union_factor")
        ]
        cells = ["" if x is None else f"{x:.3f}" for x in means]
        lines.append(
            f"| {variant} | {layers('tail_mass')} | {layers('error')} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Training loss by step (mean over seeds), and every run's held-out loss against dense of its
    seed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            "--plot needs matplotlib, which requirements.txt does not have: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4))
    base = results.get(BASE, {})
    for number, (variant, by_seed) in enumerate(results.items()):
        runs = list(by_seed.values())
        left.plot(
            runs[0]["steps"],
            [statistics.mean(x) for x in zip(*(r["train_loss"] for r in runs), strict=True)],
            color=f"C{number}",
            linewidth=1.2,
            label=variant,
        )
        pairs = [
            percent(r["val_loss"], base[seed]["val_loss"])
            for seed, r in by_seed.items()
            if seed in base
        ]
        if variant != BASE and pairs:
            right.bar(variant, statistics.mean(pairs), color=f"C{number}", alpha=0.4)
            right.plot([variant] * len(pairs), pairs, "o", color=f"C{number}", markersize=5)
    left.set(xlabel="step", ylabel="training loss (mean over seeds)")
    left.legend()
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("held-out loss against dense, %")
    right.set_title("bars: mean, dots: seeds", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.sparse_attention")
    parser.add_argument("--runs", nargs="+", required=True, metavar="GLOB")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="leave out the other variants")
    parser.add_argument("--json", type=Path, help="also write all series and numbers to this file")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    results = find_runs(arguments.runs, arguments.only)
    if not results:
        parser.error("no finished run matches " + " ".join(arguments.runs))
    print(tables(results))
    if arguments.json:
        arguments.json.write_text(dumps({"commit": find_commit(), "runs": results}) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
