"""One very long row on ranks that share it, against one rank that has it alone: what memory and
processor time a step takes.

`python -m bench.long_row [--length 1048576] [--ranks 4] [--gather 4] [--layers 1] [--steps 1]
[--compare LENGTH] [--json FILE]`. A small sparse model without experts takes --steps steps of AdamW
on one drawn row of packed documents, all of it on --ranks processes of one thread each; gradients
are summed over them, as ZeRO 0 does. Then one rank takes the same steps on a row of --compare
tokens (default: the same row), whose first loss must be the ranks' where it is the same row. Memory
is the peak of resident memory during the steps above what the process held before them, of the
fullest rank.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bench.checkpoint_scale import resident
from bench.common import find_commit
from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.moe.layer import ModelParts
from model.parallel.deal import Dealer
from model.parallel.groups import ParallelGroups, initialize_parallel
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.data.loader import Batch, pack
from train.files.strict_json import dumps

VOCABULARY = 256
DOCUMENTS = (0.6, 0.05, 0.35)
"""Shares of a row."""


def config_of(length: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=128,
        num_experts=0,
        expert_intermediate_size=64,
        max_seq_len=length,
        recompute="block",
        loss_chunk_size=8192,
    )


ATTENTION = SparseAttentionConfig(
    block_size=128, coarse_block_size=128, top_k=4, window_size=256, audit_rows=0.0
)


def row_of(length: int) -> Batch:
    """The same on every rank."""
    tokens = torch.randint(1, VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(1))
    end = 0
    for share in DOCUMENTS[:-1]:
        end += round(share * length)
        tokens[end] = 0
    return pack([tokens.numpy()], length, end_of_document=0)


def steps(options: argparse.Namespace, groups: ParallelGroups, length: int) -> dict[str, Any]:
    """What a rank measured of its steps."""
    config = config_of(length, options.layers)
    parts = ModelParts(TopKConfig(top_k=1), ATTENTION, LocalDispatcherConfig(), BalanceConfig())
    model = Transformer(config, parts, groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dealer = None
    if groups.gather_size > 1:
        dealer = Dealer(groups.gather_size, lambda places: ATTENTION.work(config, places))
    begin = time.perf_counter()
    whole = row_of(length)
    batch = whole.part(groups.parts_rank, groups.parts_size, dealer)
    dealt_s = time.perf_counter() - begin
    inputs = batch.inputs(torch.device("cpu"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, cpu = resident("VmRSS"), time.process_time()
    losses = []
    model.measure_communication(True)
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss = model(inputs).loss_sum / whole.num_targets
        loss.backward()
        total = loss.detach().double()
        if groups.stage_size > 1:
            dist.all_reduce(total)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(float(total))
    return {
        "losses": losses,
        "peak_bytes": resident("VmHWM") - before,
        "cpu_s": time.process_time() - cpu,
        "data_s": dealt_s,
        "sent_bytes": model.measure_communication(False).num_bytes,
        "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def rank(number: int, options: argparse.Namespace, port: int, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=options.ranks
    )
    groups = initialize_parallel(
        context_parallel_size=options.ranks, context_gather_size=options.gather
    )
    found[number] = steps(options, groups, options.length)
    dist.destroy_process_group()


def alone(_: int, options: argparse.Namespace, found: Any) -> None:
    torch.set_num_threads(1)
    found["alone"] = steps(options, ParallelGroups.single(), options.compare)


def free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return int(store.port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gather", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--compare", type=int, default=None, help="tokens of the one rank's row")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    options.compare = options.compare or options.length

    with multiprocessing.Manager() as manager:
        found = manager.dict()
        multiprocessing.spawn(rank, (options, free_port(), found), options.ranks)
        multiprocessing.spawn(alone, (options, found), 1)
        ranks = [found[i] for i in range(options.ranks)]
        one = found["alone"]
    peak = max(r["peak_bytes"] for r in ranks)
    work = [r["cpu_s"] for r in ranks]
    print(f"{options.ranks} ranks ({options.gather} gather), a row of {options.length:,} tokens:")
    print(f"  losses {ranks[0]['losses']}")
    print(f"  peak of a rank {peak / 2**20:,.0f} MiB; processor time {work} s")
    print(f"1 rank, a row of {options.compare:,} tokens:")
    print(f"  losses {one['losses']}")
    print(f"  peak {one['peak_bytes'] / 2**20:,.0f} MiB; processor time {one['cpu_s']:.1f} s")
    if options.compare == options.length:
        ours, theirs = ranks[0]["losses"], one["losses"]
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        more = one["peak_bytes"] / peak
        print(f"  losses differ by {worst:.1e}, memory {more:.2f} times as much")
        if worst > 1e-4:
            raise SystemExit("the ranks' losses are not those of one rank")
    if options.json:
        given = {k: v for k, v in vars(options).items() if k != "json"}
        result = {"bench": "long_row", "commit": find_commit(), **given}
        options.json.write_text(dumps({**result, "ranks_found": ranks, "one_rank": one}))


if __name__ == "__main__":
    main()
