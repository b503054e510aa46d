"""Loading one row of 65,536 tokens against a training step on it, in one run on the same cores.

`python -m bench.load_row [--millions 20] [--rows 20] [--layers 4] [--length 65536]
[--step-length N] [--json FILE]`.
Loading is what a rank does for a micro-batch of one row: its place in the shuffled epoch, reading
and verifying the tokens of its documents, packing. `first` reads every piece of the files for the
first time, as a run on a corpus far larger than a row does; `again` reads pieces that were verified
before. The step is forward, backward and AdamW in one process, of the quickstart's model with
sparse attention (attention=scc), on such a row. Where that takes too long, fewer layers and
--step-length give a bound: a layer less costs less, and what a token costs in forward and backward
does not fall with the length of its row, so those of N tokens are counted length / N times (and
with them a pass's fixed cost, which is nothing at thousands of tokens), the update once. Everything
is milliseconds of this process's processors, which a busy machine does not stretch; the clock
stands beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from bench.common import find_commit
from bench.train_step import BALANCE
from model.attention.config.sparse import SparseAttentionConfig
from model.config import ModelConfig
from model.cost.parameters import flops_per_token
from model.dispatch.config import LocalDispatcherConfig
from model.loss import training_loss
from model.moe.layer import ModelParts
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.loader import Batch, TrainingLoader, pack
from train.data.prepare import prepare
from train.data.store import TokenStore, TrainingSamples
from train.files.strict_json import dumps

VOCABULARY = 2048
Times = tuple[float, float]
"""Milliseconds of processors, and by the clock."""


def spent(action: Callable[[], object]) -> Times:
    worked, begun = time.process_time(), time.perf_counter()
    action()
    return 1e3 * (time.process_time() - worked), 1e3 * (time.perf_counter() - begun)


def median(times: list[Times]) -> Times:
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def store_of(folder: Path, millions: int) -> TokenStore:
    """A corpus of tokens that are there already, in documents of 20 to 1,500 of them."""
    rng = np.random.default_rng(7)
    ids = rng.integers(0, VOCABULARY - 1, millions * 10**6, dtype=np.uint16)
    ids[np.cumsum(rng.integers(20, 1500, len(ids) // 760)) % len(ids)] = VOCABULARY - 1
    np.save(folder / "ids.npy", ids, allow_pickle=False)
    settings = TokenizerConfig(None, vocab_size=VOCABULARY, end_of_document_id=VOCABULARY - 1)
    source = SourceConfig("npy", data_files=str(folder / "ids.npy"))
    config = DataConfig((source,), settings, 0.01, str(folder / "cache"))
    return TokenStore(prepare(config, lambda line: None, 1))


def loading(store: TokenStore, length: int, rows: int) -> tuple[Times, Times, Batch]:
    """Medians of loading a row for the first time and again, after the first of all, which opens
    the epoch; and the last row.
    """
    samples = TrainingSamples(store, (1.0,), length, 7)
    loader = TrainingLoader(samples, length, 1, store.end_of_document, 0, 1)
    placed = samples.sources[0]._placed
    assert placed is not None  # tokens stay where they are
    (tokens,) = placed._files
    batches = loader.next_step(1)
    found = []
    for anew in (True, False):
        times = []
        for _ in range(rows):
            tokens._verified[:] = not anew
            times.append(spent(lambda: batches.append(loader.next_step(1)[0])))
        found.append(median(times))
    return found[0], found[1], batches[-1]


def training(config: ModelConfig, batch: Batch, length: int, end: int) -> tuple[Times, Times]:
    """Forward with backward, and AdamW's update, on the first `length` tokens of a batch of one
    row, after a step on a few tokens, which compiles what there is to compile. end: the token that
    ends documents.
    """
    parts = ModelParts(
        TopKConfig(top_k=config.top_k), SparseAttentionConfig(), LocalDispatcherConfig(), BALANCE
    )
    model = Transformer(config, parts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def passes(rows: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        sums = model(rows.inputs(torch.device("cpu")))
        training_loss(sums, rows.num_targets, rows.num_tokens, BALANCE).backward()

    def first(number: int) -> Batch:
        return pack([batch.input_ids[0, : number + 1].numpy()], number, end)

    passes(first(128))
    optimizer.step()
    rows = batch if length == batch.input_ids.shape[1] else first(length)
    return spent(lambda: passes(rows)), spent(optimizer.step)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load_row")
    parser.add_argument("--millions", type=int, default=20, help="of tokens in the corpus")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4, help="of the model that takes the step")
    parser.add_argument("--length", type=int, default=65_536, help="tokens of a row")
    parser.add_argument("--step-length", type=int, help="tokens of the step; default: the row's")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()

    # conf/model/quickstart.yaml, with rows of this length: logits in chunks, blocks computed again.
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_layers=arguments.layers,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=768,
        num_experts=8,
        top_k=2,
        expert_intermediate_size=256,
        num_shared_experts=1,
        num_dense_layers=min(1, arguments.layers - 1),
        max_seq_len=arguments.length,
        qk_norm="head",
        tie_embeddings=True,
        recompute="block",
        loss_chunk_size=4096,
    )
    with tempfile.TemporaryDirectory() as name:
        store = store_of(Path(name), arguments.millions)
        first, again, batch = loading(store, arguments.length, arguments.rows)
    tokens = arguments.step_length or arguments.length
    passes, update = training(config, batch, tokens, store.end_of_document)
    step = tuple(a * arguments.length / tokens + b for a, b in zip(passes, update, strict=True))

    flops = flops_per_token(
        config, config.top_k, arguments.length, SparseAttentionConfig().arguments
    )
    result = {
        "bench": "load_row",
        "commit": find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "row_tokens": arguments.length,
        "documents_in_the_row": len(batch.cu_seqlens) - 1,
        "model": f"quickstart, attention=scc, {config.num_layers} layers",
        "flops_of_the_step": flops * arguments.length,
        "step_was_taken_on_tokens": tokens,
        "processor_ms": {
            "load_first": round(first[0], 2),
            "load_again": round(again[0], 2),
            "passes": round(passes[0], 1),
            "update": round(update[0], 1),
            "step_of_the_row": round(step[0], 1),
        },
        "clock_ms": {
            "load_first": round(first[1], 2),
            "load_again": round(again[1], 2),
            "passes": round(passes[1], 1),
            "update": round(update[1], 1),
        },
        "share_of_the_step": round(first[0] / step[0], 6),
    }
    if arguments.json:
        arguments.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps(result), flush=True)


if __name__ == "__main__":
    main()
