"""A published dense model that trains on with another attention: held-out loss by rule, over seeds
and over rows.

`python -m bench.quality.adapted FOLDER --model MODEL [--steps 200] [--seeds 1234 1 2] [--variants
dense scc]` begins each run with the weights of the folder MODEL (of the Hub, for example what
`python -m bench.small_model --to DIR` writes as DIR/model) and trains it on the bundled text in
rows of 1,024 tokens, of which a query attends to 256 exactly, in bf16. It trains what
FOLDER/<variant>-<seed> does not hold yet; see bench/quality/sweep.py. A seed changes the order of
data, and the weights that a rule has of its own: gates begin where they change nothing, an index is
drawn.

What attention is made of and norms are trained; MLPs and embeddings stay, which takes a third off a
step of a CPU. `--whole` trains everything.

Held-out rows are also read in fp32, and by the model as it was before, where a rule has no index:
that gives intervals over rows, which say what one seed can say.

bench/quality/converted.py reads the same model through the same rules in longer rows, untrained.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from bench.quality.attentions import BASE, arguments_of, cell, compare
from bench.quality.sweep import is_done, parser_of
from launch.comparing.measure import losses, losses_of
from launch.saved.run import load_run
from train.files.durable import write_json
from train.trained.budgets import ratio_interval

COMMON = [
    *("parallel=single", "balance=none", "tracker.wandb.mode=disabled", "checkpoint.keep_last=1"),
    *("train.seq_len=1024", "train.global_batch_size=1", "train.micro_batch_size=1"),
    *("train.eval_interval=0", "train.eval_max_sequences=16", "train.sample_prompt=null"),
    *("optim.lr=1e-4", "optim.min_lr=1e-5", "optim.warmup_fraction=0.1", "train.precision=bf16"),
]
FROZEN = ["optim.freeze=[mlp,embedding]"]
# Eight blocks: one at the beginning, two that a query selects, five up to and with its own.
SHORT = ["attention.block_size=32", "attention.top_k=2", "attention.window_size=113"]
INDEX = ["attention.index_head_dim=64", "attention.dense_steps={learning}"]
VARIANTS = {
    "dense": ["attention=dense"],
    "window and sink": [
        *("attention=scc_short", "attention.block_size=32", "attention.top_k=0"),
        *("attention.tail=drop", "attention.order=0", "attention.window_size=177"),
    ],
    "drop": ["attention=drop", *SHORT],
    "scc, order 0": ["attention=scc_short", *SHORT, "attention.order=0"],
    "scc": ["attention=scc_short", *SHORT],
    "scc, gated": ["attention=scc_short", *SHORT, "attention.entries=gated"],
    "scc, index": [
        *("attention=scc_short", *SHORT, "attention.select=index"),
        *("attention.index_head_dim=64", "attention.index_steps={learning}"),
    ],
    "scc, gated, bounded": [
        *("attention=scc_short", *SHORT, "attention.entries=gated"),
        *("attention.resident_blocks=4", "attention.resident_interval=128"),
    ],
    "msa": ["attention=msa", "attention.block_size=32", "attention.top_k=8", *INDEX],
    "qsa": ["attention=qsa", "attention.top_k=64", "attention.index_heads=4", *INDEX],
    "dsa": ["attention=dsa", "attention.top_k=256", "attention.index_heads=4", *INDEX],
}
"""Name -> settings; {learning}: steps before an index chooses. Rules whose keys are values have
other projections than such a model.
"""
BEFORE, AFTER = "before.json", "after.json"


def words_of(variant: str, seed: int, steps: int, model: Path, whole: bool = False) -> list[str]:
    """What a run is asked for."""
    settings = [word.format(learning=steps // 5) for word in VARIANTS[variant]]
    asked = [*COMMON, f"init.path={model}", f"train.num_steps={steps}", f"seed={seed}"]
    return [*settings, *asked, *([] if whole else FROZEN)]


def measure(run: Path, model: Path) -> None:
    """Losses of held-out rows with the weights that the run has made, and those it began with."""
    losses(run / AFTER, run, batch_size=1)
    if not _has_index(run):
        write_json(run / BEFORE, untrained(run, model))


def untrained(run: Path, folder: Path) -> dict[str, Any]:
    """Losses of the run's held-out rows with the folder's weights."""
    from train.components import build_model
    from train.pretrained.folder import PretrainedFolder

    config = load_run(str(run))
    model = build_model(config)
    PretrainedFolder(folder).fill_model(model)
    return losses_of(model, config, run, torch.device("cpu"), 1)


def rows_of(run: Path) -> dict[str, list[float]]:
    """Mean losses of rows before and after, and how many targets each has."""
    found: dict[str, list[float]] = {}
    for name, path in (("before", run / BEFORE), ("after", run / AFTER)):
        if path.is_file():
            told = json.loads(path.read_text())
            found["targets"] = told["counts"]
            found[name] = [a / b for a, b in zip(told["sums"], told["counts"], strict=True)]
    return found


def by_rows(folder: Path, seed: int) -> str:
    """Markdown of a seed's runs, with intervals of 95% over rows."""
    lines = ["| attention | before | less dense | after | less dense |", "|---" * 5 + "|"]
    base = rows_of(cell(folder, BASE, seed))
    for variant in VARIANTS:
        run = cell(folder, variant, seed)
        rows = rows_of(run) if is_done(run) else {}
        parts: list[str] = []
        for when in ("before", "after"):
            parts += _told(rows.get(when), base.get(when), rows.get("targets"))
        if rows:
            lines.append(f"| {variant} | {' | '.join(parts)} |")
    return f"\nSeed {seed}, intervals over rows:\n\n" + "\n".join(lines)


def _told(
    means: list[float] | None, base: list[float] | None, targets: list[float] | None
) -> tuple[str, str]:
    """A loss, and what it is more than the base's, where there is one, with its interval."""
    if means is None or targets is None:
        return "", ""
    counts = torch.tensor(targets, dtype=torch.float64)
    sums = torch.tensor(means, dtype=torch.float64) * counts
    loss = f"{float(sums.sum() / counts.sum()):.4f}"
    if base is None or base == means:
        return loss, ""
    less = torch.tensor(base, dtype=torch.float64) * counts
    mean, low, high = ratio_interval(sums - less, counts)
    return loss, f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _has_index(run: Path) -> bool:
    attention = load_run(str(run)).attention.arguments
    return "index_heads" in attention or attention.get("select") == "index"


def main() -> None:
    parser = parser_of("bench.quality.adapted")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--whole", action="store_true", help="train MLPs and embeddings as well")
    arguments = arguments_of(parser, list(VARIANTS))
    model = arguments.model.absolute()
    compare(
        arguments,
        "quality.adapted",
        lambda variant, seed, steps: words_of(variant, seed, steps, model, arguments.whole),
        functools.partial(measure, model=model),
        rows_of,
    )
    for seed in arguments.seeds:
        print(by_rows(arguments.folder, seed))


if __name__ == "__main__":
    main()
