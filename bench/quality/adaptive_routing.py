"""Do adaptive routers hold their budget, and what do they give at equal spent expert FLOPs?
Quickstart-size, real text.

`python -m bench.quality.adaptive_routing FOLDER [--steps 400] [--seeds 1234 1 2] [--routers top_k
threshold ...]` trains what FOLDER/<router>-<seed> does not hold yet, one process each, and prints
the tables as Markdown. Over the last half of training: mean experts per token of every layer
against the budget, MaxVio of the summed load (global) and of single steps; at the end the held-out
loss, with the routed experts' forward FLOPs spent per token. With matplotlib, --plot FILE.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.files.strict_json import dumps

ROUTERS = {
    "top_k": ["router=top_k"],
    "top_k_raw": ["router=top_k_raw"],
    "sigmoid_top_k": [
        "router=sigmoid_top_k",
        "balance=loss_free",
        "router.scaling_factor=1",
        "router.normalize_weights=false",
    ],
    "threshold": ["router=threshold"],
    "top_p": ["router=top_p", "balance=quantile"],
    "relu": ["router=relu", "balance=none"],
    "null_experts": ["router=null_experts", "balance=quantile"],
}
COMMON = [
    "experiment=quickstart",
    "parallel=single",
    "tracker.wandb.mode=disabled",
    "train.eval_interval=0",
    "train.sample_prompt=null",
]


def train(folder: Path, router: str, seed: int, steps: int) -> Path:
    """The run directory, trained first if it has no result yet."""
    run = folder / f"{router}-{seed}"
    if not (run / "result.json").is_file():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "launch.train",
                *ROUTERS[router],
                *COMMON,
                f"seed={seed}",
                f"train.num_steps={steps}",
                f"run_dir={run}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return run


def read(run: Path) -> dict[str, Any]:
    """Series and summary of a run, the summary over the last half of its steps."""
    tables = [json.loads(line) for line in (run / "routing.jsonl").read_text().splitlines()]
    records = [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "moe/max_vio" in r
    ]
    late = [t for t in tables if t["step"] > tables[-1]["step"] / 2]
    layers = range(len(late[0]["counts"]))
    loads = [
        [sum(column) for column in zip(*(t["counts"][layer] for t in late), strict=True)]
        for layer in layers
    ]
    tokens = [sum(sum(t["k_histogram"][layer]) for t in late) for layer in layers]
    half = [r for r in records if r["step"] > tables[-1]["step"] / 2]
    return {
        "steps": [t["step"] for t in tables],
        "k": [
            [sum(t["counts"][layer]) / sum(t["k_histogram"][layer]) for t in tables]
            for layer in layers
        ],
        "max_vio": [r["moe/max_vio"] for r in records],
        "mean_k": [sum(load) / n for load, n in zip(loads, tokens, strict=True)],
        "max_vio_global": [max(load) * len(load) / sum(load) - 1 for load in loads],
        "max_vio_step": statistics.mean(r["moe/max_vio_step"] for r in half),
        "spent": statistics.mean(r["moe/expert_flops_per_token"] for r in records),
        "val_loss": json.loads((run / "result.json").read_text())["val_loss"],
    }


def tables(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    lines = [
        "| router | seed | mean experts per token by layer, last half | MaxVio (global) by layer | "
        "MaxVio of a step | "
        "held-out loss | expert MFLOPs per token, whole run |",
        "|---|---|---|---|---|---|---|",
    ]
    for router, by_seed in results.items():
        for seed, r in by_seed.items():
            lines.append(
                f"| {router} | {seed} | {' '.join(f'{k:.3f}' for k in r['mean_k'])} | "
                f"{' '.join(f'{v:.3f}' for v in r['max_vio_global'])} | {r['max_vio_step']:.3f} | "
                f"{r['val_loss']:.4f} | {r['spent'] / 1e6:.3f} |"
            )
    lines += [
        "",
        "| router | held-out loss, mean over seeds | against top_k, by seed |",
        "|---|---|---|",
    ]
    for router, by_seed in results.items():
        base = results.get("top_k", {})
        pairs = [
            f"{r['val_loss'] - base[seed]['val_loss']:+.4f}"
            for seed, r in by_seed.items()
            if seed in base
        ]
        lines.append(
            f"| {router} | {statistics.mean(r['val_loss'] for r in by_seed.values()):.4f} | "
            f"{' '.join(pairs)} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[int, dict[str, Any]]], path: Path, budget: float) -> None:
    """Experts per token and MaxVio by step, a column for each router, all seeds and layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(results), figsize=(3.2 * len(results), 5.6), sharex=True, sharey="row", squeeze=False
    )
    for column, (router, by_seed) in enumerate(results.items()):
        above, below = axes[0][column], axes[1][column]
        above.axhspan(
            0.98 * budget, 1.02 * budget, color="tab:green", alpha=0.25, label="budget ± 2%"
        )
        for number, r in enumerate(by_seed.values()):
            for layer, series in enumerate(r["k"]):
                above.plot(
                    r["steps"],
                    series,
                    color=f"C{layer}",
                    linewidth=0.8,
                    alpha=0.8,
                    label=f"MoE layer {layer + 1}" if number == 0 else None,
                )
            below.plot(
                r["steps"],
                r["max_vio"],
                linewidth=0.8,
                label="mean over layers, one line a seed" if number == 0 else None,
            )
        below.axhline(0.3, color="tab:red", linewidth=0.8, linestyle="--")
        above.set_title(router)
        above.set_ylim(0, 2 * budget)
        below.set_ylim(0, 1.5)
        below.set_xlabel("step")
    axes[0][0].set_ylabel("experts per token")
    axes[1][0].set_ylabel("MaxVio of ten steps' load")
    axes[0][0].legend(fontsize=7)
    axes[1][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.adaptive_routing")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument(
        "--routers", nargs="+", choices=ROUTERS, default=["top_k", "threshold", "top_p"]
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="also write all series and numbers to this file")
    arguments = parser.parse_args()
    results = {
        router: {
            seed: read(train(arguments.folder, router, seed, arguments.steps))
            for seed in arguments.seeds
        }
        for router in arguments.routers
    }
    print(tables(results))
    if arguments.json:
        arguments.json.write_text(dumps(results) + "\n")
    if arguments.plot:
        plot(results, arguments.plot, budget=2.0)


if __name__ == "__main__":
    main()
