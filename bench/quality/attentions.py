"""Every attention on real text, at equal columns: held-out loss of the quickstart in rows of 2,048
tokens, over seeds.

`python -m bench.quality.attentions FOLDER [--steps 300] [--seeds 1234 1 2] [--variants scc dsa]`
trains what FOLDER/<variant>-<seed> does not hold yet, a seed after the other, and prints a table as
Markdown. The same command goes on where it was stopped, a run that was cut short included;
`--processor-seconds N` begins no run once so many were spent, `--report` trains nothing, `--known
FILE` takes over what `--json FILE` wrote elsewhere. Runs that are missing are named.

A query attends to 416 tokens exactly, or to as many tokens and entries, in whatever way its rule
chooses them; `scc` and its kin, `drop` and `nsa` to 384, twelve blocks, and most of them see the
rest pooled. Where an index chooses, a fifth of the steps
teaches it first. What differs is said against dense attention with the same seeds, with Student's
95% interval over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.common import find_commit
from bench.quality.sweep import Todo, go_on, interval, is_done, parser_of, print_missing, read
from train.files.strict_json import dumps

COLUMNS = 416
"""Thirteen blocks of 32; conf/attention/scc_short.yaml has twelve."""
COMMON = [
    "experiment=quickstart_sparse",
    "parallel=single",
    "tracker.wandb.mode=disabled",
    "train.eval_interval=0",
    "train.eval_max_sequences=32",
    "train.sample_prompt=null",
    "checkpoint.keep_last=1",
]
SHORT = [
    *("attention.block_size=32", "attention.coarse_block_size=16"),
    *("attention.top_k=4", "attention.window_size=193"),
]
INDEX = ["attention.index_heads=4", "attention.index_head_dim=64"]
# One head of keys that are values, as wide as both of the quickstart's.
SHARED = [
    *("model.num_kv_heads=1", "model.head_dim=128", "model.qk_norm=none"),
    *("attention.q_lora_rank=256", "attention.output_groups=2", "attention.o_lora_rank=128"),
    *("attention.rope_head_dim=32", "attention.index_heads=4", "attention.index_head_dim=32"),
    "attention.sliding_window=128",
]
VARIANTS = {
    "dense": ["attention=dense"],
    "window": ["attention=sliding_window", "attention.block_size=32", "attention.window_size=385"],
    "drop": [
        *("attention=drop", "attention.block_size=32"),
        *("attention.top_k=4", "attention.window_size=193"),
    ],
    "nsa": ["attention=nsa", *SHORT],
    "scc": ["attention=scc_short"],
    "scc_wide": ["attention=scc_short", "attention.coarse_block_size=32"],
    "scc_gated": ["attention=scc_short", "attention.entries=gated"],
    "scc_index": [
        *("attention=scc_short", "attention.select=index"),
        *("attention.index_head_dim=64", "attention.index_steps={learning}"),
    ],
    "scc_e": [
        *("attention=scc_short", "attention.entries=gated"),
        *("attention.resident_blocks=8", "attention.resident_interval=128"),
    ],
    "dsa": [
        *("attention=dsa", f"attention.top_k={COLUMNS}", *INDEX),
        "attention.dense_steps={learning}",
    ],
    "msa": [
        *("attention=msa", "attention.block_size=32", "attention.top_k=13"),
        *("attention.index_head_dim=64", "attention.dense_steps={learning}"),
    ],
    "qsa": ["attention=qsa", "attention.top_k=104", *INDEX, "attention.dense_steps={learning}"],
    "csa": ["attention=csa", "attention.top_k=288", *SHARED, "attention.dense_steps={learning}"],
    "v4": [
        *("attention=v4", "attention.top_k=288", "attention.hca_ratio=32", *SHARED),
        "attention.dense_steps={learning}",
    ],
}
"""Name -> settings; {learning}: steps before an index chooses. scc_wide: one entry for a block, as
conf/attention/scc.yaml would have with entries of 64 tokens; scc has two.
"""
BASE = "dense"
Results = dict[str, dict[int, dict[str, float]]]
"""Variant -> seed -> numbers of the run."""


def cell(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def words_of(variant: str, seed: int, steps: int) -> list[str]:
    """What a run is asked for."""
    learning = steps // 5
    settings = [word.format(learning=learning) for word in VARIANTS[variant]]
    return [*settings, *COMMON, f"train.num_steps={steps}", f"seed={seed}"]


def known(path: Path | None, steps: int) -> Results:
    """The numbers of a file of an earlier sweep.

    Raises:
        SystemExit: its runs had another number of steps.
    """
    if path is None:
        return {}
    told = json.loads(path.read_text())
    if told["steps"] != steps:
        raise SystemExit(f"{path} is of runs of {told['steps']} steps, these have {steps}")
    return {
        variant: {int(seed): numbers for seed, numbers in by_seed.items()}
        for variant, by_seed in told["results"].items()
    }


def gather(
    folder: Path, variants: Sequence[str], seeds: Sequence[int], earlier: Results
) -> Results:
    """The numbers of every run that is done, here or in an earlier sweep."""
    return {
        variant: {
            seed: numbers for seed, numbers in earlier.get(variant, {}).items() if seed in seeds
        }
        | {seed: read(run) for seed in seeds if is_done(run := cell(folder, variant, seed))}
        for variant in variants
    }


def missing(
    results: Results, variants: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, int]]:
    """What is still to be run: all of a seed before the next one."""
    return [(v, s) for s in seeds for v in variants if s not in results[v]]


def table(results: Results, seeds: Sequence[int]) -> str:
    """Markdown of what there is."""
    lines = [
        "| attention | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean | less dense, 95% | processor seconds |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    base = results.get(BASE, {})
    for variant, by_seed in results.items():
        if not by_seed:
            continue
        losses = [f"{by_seed[s]['val_loss']:.4f}" if s in by_seed else "" for s in seeds]
        middle = statistics.mean(numbers["val_loss"] for numbers in by_seed.values())
        cost = statistics.mean(numbers["processor_seconds"] for numbers in by_seed.values())
        pairs = [by_seed[s]["val_loss"] - base[s]["val_loss"] for s in by_seed if s in base]
        told = ""
        if pairs and variant != BASE:
            mean, half = interval(pairs)
            told = f"{mean:+.4f} ± {half:.4f}" if len(pairs) > 1 else f"{mean:+.4f} (one seed)"
        lines.append(f"| {variant} | {' | '.join(losses)} | {middle:.4f} | {told} | {cost:,.0f} |")
    return "\n".join(lines)


def arguments_of(parser: argparse.ArgumentParser, variants: Sequence[str]) -> argparse.Namespace:
    """What is asked of a comparison of these variants."""
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--known", type=Path, help="what --json wrote of runs that are elsewhere")
    return parser.parse_args()


def compare(
    arguments: argparse.Namespace,
    bench: str,
    words_of: Callable[[str, int, int], list[str]],
    measure: Callable[[Path], None] | None = None,
    by_row: Callable[[Path], dict[str, list[float]]] | None = None,
) -> None:
    """Train what is missing of the variants, print the table and write the numbers. words_of:
    variant, seed and steps -> what a run is asked for; measure: see sweep.train; by_row: of a run
    -> what --json has of its held-out rows.
    """
    folder, variants, seeds = arguments.folder, arguments.variants, arguments.seeds
    earlier = known(arguments.known, arguments.steps)

    def todo() -> Todo:
        return [
            (cell(folder, *one), words_of(*one, arguments.steps))
            for one in missing(gather(folder, variants, seeds, earlier), variants, seeds)
        ]

    go_on(arguments, todo, measure)
    results = gather(folder, variants, seeds, earlier)
    print(table(results, seeds))
    print_missing(todo())
    if arguments.json:
        found: Any = {
            "bench": bench,
            "commit": find_commit(),
            "steps": arguments.steps,
            "results": results,
        }
        if by_row is not None:
            runs = {(v, s): cell(folder, v, s) for v in variants for s in seeds}
            found["rows"] = {
                f"{v}, seed {s}": by_row(run) for (v, s), run in runs.items() if is_done(run)
            }
        arguments.json.write_text(dumps(found) + "\n")


def main() -> None:
    arguments = arguments_of(parser_of("bench.quality.attentions"), list(VARIANTS))
    compare(arguments, "quality.attentions", words_of)


if __name__ == "__main__":
    main()
