"""A published dense model read through sparse attention, as it is: held-out loss by rule, with
intervals.

`python -m bench.quality.converted MODEL [--rows 8] [--length 2048] [--variants scc drop] [--json
FILE]` reads the folder MODEL (of the Hub, for example what `python -m bench.small_model --to DIR`
writes as DIR/model) once for each rule that needs no weights of its own, and prints a table as
Markdown. Nothing is trained. A query attends to 384 tokens exactly, to 416 where none are selected,
as in bench/quality/attentions.py.

Rows are consecutive pieces of the bundled text, the same for all. Intervals are 95% over rows: of
the loss, and of its difference to dense attention over the same rows, which is far surer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bench.common import find_commit
from launch.saved.run import load_folder
from model.attention.config.base import AttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.sparse import SparseAttentionConfig
from train.components import build_model
from train.data.sources import sample_files
from train.data.tokenizer import load_tokenizer
from train.files.strict_json import dumps
from train.pretrained.folder import PretrainedFolder
from train.trained.budgets import losses_by_row, ratio_interval
from train.trained.text import text_batches

# conf/attention/scc_short.yaml
SCC = SparseAttentionConfig(
    block_size=32, coarse_block_size=16, top_k=4, window_size=193, audit_rows=0.0
)
DENSE = "dense"
VARIANTS: dict[str, AttentionConfig] = {
    DENSE: DenseAttentionConfig(),
    "window": replace(SCC, tail="drop", order=0, top_k=0, num_sink_blocks=0, window_size=385),
    "window and sink": replace(SCC, tail="drop", order=0, top_k=0, window_size=353),
    "drop": replace(SCC, tail="drop", order=0, coarse_block_size=32),
    "scc, order 0": replace(SCC, order=0),
    "scc": SCC,
    "scc, entries of 32": replace(SCC, coarse_block_size=32),
    "scc, entries of 8": replace(SCC, coarse_block_size=8),
    "scc, bounded cache": replace(SCC, resident_blocks=8, resident_interval=128),
}


def measure(
    folder: Path, attention: AttentionConfig, length: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed losses and numbers of targets of the rows, [rows] fp64 each."""
    run = load_folder(str(folder), attention, seq_len=length)
    model = build_model(run)
    PretrainedFolder(folder).fill_model(model)
    tokenizer = load_tokenizer(run.data.tokenizer)
    end = tokenizer.token_to_id(run.data.tokenizer.end_of_document) or 0
    text = "".join(Path(f).read_text(encoding="utf-8", errors="replace") for f in sample_files())
    batches = text_batches(text[: 8 * length * rows], tokenizer, end, length, 1, rows)
    sums, counts, _ = losses_by_row(model.eval(), batches, torch.device("cpu"))
    return sums, counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.converted")
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| attention | held-out loss (95%) | less dense (95%) |\n|---|---|---|")
    found: dict[str, list[float]] = {}
    base, counts = measure(arguments.model, VARIANTS[DENSE], arguments.length, arguments.rows)
    for name in arguments.variants:
        sums = base
        if name != DENSE:
            sums, counts = measure(
                arguments.model, VARIANTS[name], arguments.length, arguments.rows
            )
        loss, low, high = ratio_interval(sums, counts)
        told = ""
        if name != DENSE:
            difference, below, above = ratio_interval(sums - base, counts)
            told = f"{difference:+.4f} [{below:+.4f}, {above:+.4f}]"
        print(f"| {name} | {loss:.4f} [{low:.4f}, {high:.4f}] | {told} |", flush=True)
        found[name] = (sums / counts).tolist()
    if arguments.json:
        result = {
            "bench": "quality.converted",
            "commit": find_commit(),
            "length": arguments.length,
            "loss_by_row": found,
        }
        arguments.json.write_text(dumps(result) + "\n")


if __name__ == "__main__":
    main()
