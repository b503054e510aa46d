"""A published dense model that trains on with another attention: held-out loss by rule, over seeds.

`python -m bench.quality.adapted FOLDER --model MODEL [--steps 200] [--seeds 1234 1 2] [--variants
dense scc]` begins each run with the weights of the folder MODEL (of the Hub, for example what
`python -m bench.small_model --to DIR` writes as DIR/model) and trains it on the bundled text in
rows of 1,024 tokens, of which a query attends to 256 exactly. It trains what
FOLDER/<variant>-<seed> does not hold yet; see bench/quality/sweep.py. A seed changes the order of
data, and the weights that a rule has of its own: gates begin where they change nothing, an index is
drawn.

bench/quality/converted.py reads the same model through the same rules as it is.
"""

from __future__ import annotations

from pathlib import Path

from bench.quality.attentions import arguments_of, compare
from bench.quality.sweep import parser_of

COMMON = [
    *("parallel=single", "balance=none", "tracker.wandb.mode=disabled", "checkpoint.keep_last=1"),
    *("train.seq_len=1024", "train.global_batch_size=1", "train.micro_batch_size=1"),
    *("train.eval_interval=0", "train.eval_max_sequences=16", "train.sample_prompt=null"),
    *("optim.lr=1e-4", "optim.min_lr=1e-5", "optim.warmup_fraction=0.1"),
]
# Eight blocks: one at the beginning, two that a query selects, five up to and with its own.
SHORT = ["attention.block_size=32", "attention.top_k=2", "attention.window_size=113"]
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
}


def words_of(variant: str, seed: int, steps: int, model: Path) -> list[str]:
    """What a run is asked for."""
    settings = [word.format(learning=steps // 5) for word in VARIANTS[variant]]
    return [*settings, *COMMON, f"init.path={model}", f"train.num_steps={steps}", f"seed={seed}"]


def main() -> None:
    parser = parser_of("bench.quality.adapted")
    parser.add_argument("--model", type=Path, required=True)
    arguments = arguments_of(parser, list(VARIANTS))
    model = arguments.model.absolute()
    compare(arguments, "quality.adapted", lambda *one: words_of(*one, model))


if __name__ == "__main__":
    main()
