"""What stands around attention to chosen rows: an index's scores and its choice, what it learns
from, and the gated pool of compressed attention, each beside plain torch.

On a CPU there is plain torch alone, of few tokens; milliseconds are the processor's there. The
pool's roofline is its bytes over the device's memory bandwidth: contents, gates and entries once,
and in the backward pass their gradients once besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common import Row, device_name, main, make_row, measure
from bench.stored_experts import processor_ms
from ops.compressed_attention import closed_windows, gated_pool
from ops.device import memory_bandwidth_tbs
from ops.index_attention import (
    Index,
    IndexSpec,
    Teacher,
    group_means,
    group_starts,
    indexed_attention,
    select_blocks,
    teach_index,
)
from ops.sparse_attention import SparseAttentionSpec, pool_entries, sparse_attention


@dataclass(frozen=True)
class Shape:
    name: str
    spec: IndexSpec
    heads: int
    kv_heads: int
    head_dim: int
    index_heads: int


SHAPES = {
    "cpu": (Shape("dsa", IndexSpec("dsa", 1, 64), 8, 2, 64, 4),),
    "cuda": (
        Shape("dsa", IndexSpec("dsa", 1, 2048), 32, 4, 128, 32),
        Shape("msa", IndexSpec("msa", 128, 16), 64, 4, 128, 4),
        Shape("qsa", IndexSpec("qsa", 4, 512), 24, 2, 256, 4),
    ),
}
POOLS = {
    "cpu": (("csa", 4, 64, True),),
    "cuda": (("csa", 4, 512, True), ("csa keys", 4, 128, True), ("hca", 128, 512, False)),
}
"""Name, tokens of a window, channels, whether windows overlap."""
TOKENS = {"cpu": 1024, "cuda": 16384}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
WIDTH = 128


def teaching(shape: Shape, device: torch.device, backend: str, teach: bool) -> Callable[[], object]:
    """A forward pass of one document: scores, choice and attention; with `teach` what the index
    learns from, and its gradients.
    """
    generator = torch.Generator(device).manual_seed(0)
    num_tokens, dtype, spec = TOKENS[device.type], DTYPES[device.type], shape.spec

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q = normal(num_tokens, shape.heads, shape.head_dim)
    k, v = (normal(num_tokens, shape.kv_heads, shape.head_dim) for _ in "kv")
    keys, bounds = normal(num_tokens, WIDTH), [0, num_tokens]
    if spec.pools_keys:
        starts = group_starts(bounds, spec.block_size).to(device)
        keys = group_means(keys, starts, spec.block_size)
    weights = normal(num_tokens, shape.index_heads) if spec.rule == "dsa" else None
    index = Index(normal(num_tokens, shape.index_heads, WIDTH), keys, weights)
    for x in index:
        if x is not None:
            x.requires_grad_(teach)

    def call() -> object:
        return indexed_attention(q, k, v, index, bounds, spec, teach=teach, backend=backend)

    return call


def selecting(device: torch.device, backend: str) -> Callable[[], object]:
    """The choice inside sparse attention, of blocks of 64 tokens by four heads."""
    generator = torch.Generator(device).manual_seed(0)
    num_tokens, dtype = TOKENS[device.type], DTYPES[device.type]
    queries, keys = (
        torch.randn(size, generator=generator, device=device).to(dtype)
        for size in ((num_tokens, 4, WIDTH), (num_tokens, WIDTH))
    )
    spec = SparseAttentionSpec()

    def call() -> object:
        return select_blocks(queries, keys, [0, num_tokens], spec, backend)

    return call


def teaching_within(device: torch.device, backend: str) -> Callable[[], object]:
    """The divergence of an index inside sparse attention and its gradients: blocks of 64 tokens, of
    which the index chose, four key/value heads, eight heads in each group.
    """
    generator = torch.Generator(device).manual_seed(0)
    num_tokens, dtype = TOKENS[device.type], DTYPES[device.type]
    q, k, v, queries, keys = (
        torch.randn(size, generator=generator, device=device).to(dtype)
        for size in (
            *((num_tokens, 32, 128), (num_tokens, 4, 128), (num_tokens, 4, 128)),
            *((num_tokens, 4, WIDTH), (num_tokens, WIDTH)),
        )
    )
    spec, bounds = SparseAttentionSpec(), [0, num_tokens]
    cu_seqlens = torch.tensor(bounds, device=device)
    selected = select_blocks(queries, keys, bounds, spec)
    found = sparse_attention(q, k, v, cu_seqlens, spec, selected=selected)
    entries = pool_entries(q, k, v, cu_seqlens, spec)
    teacher = Teacher(q, k, entries, found.selected, found.lse, None)
    index = queries.requires_grad_(), keys.requires_grad_()

    def call() -> object:
        return teach_index(*index, teacher, bounds, spec, backend=backend)

    return call


def pooling(
    size: int, width: int, overlap: bool, device: torch.device, backend: str, backward: bool
) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    num_tokens, dtype = TOKENS[device.type], DTYPES[device.type]
    row_size = 2 * width if overlap else width
    rows = torch.randn(num_tokens, 2 * row_size, generator=generator, device=device).to(dtype)
    leaves = [*rows.split(row_size, -1), torch.zeros(size, row_size, device=device)]
    windows = closed_windows([0, num_tokens], size, device)
    into = torch.ones(len(windows.starts), width, dtype=dtype, device=device)
    if backward:
        leaves = [x.detach().requires_grad_() for x in leaves]

    def call() -> object:
        entries = gated_pool(*leaves, windows, overlap, backend)
        return torch.autograd.grad(entries, leaves, into) if backward else entries

    return call


def bytes_of_pool(
    size: int, width: int, overlap: bool, device: torch.device, backward: bool
) -> int:
    """Contents, gates and entries once; with `backward` the forward pass as well, once more what it
    read, and as much written.
    """
    rows = TOKENS[device.type] * width * (2 if overlap else 1)
    entries = TOKENS[device.type] // size * width
    values = 2 * rows + entries
    if backward:
        values += 4 * rows + entries
    return values * DTYPES[device.type].itemsize


def run(device: torch.device) -> list[Row]:
    dtype, num_tokens = DTYPES[device.type], TOKENS[device.type]
    ours = "triton" if device.type == "cuda" else "torch"

    def timed(
        op: str,
        shape: dict[str, int | str],
        made: Callable[[str], Callable[[], object]],
        num_bytes: int | None = None,
    ) -> Row:
        functions = {name: made(name) for name in dict.fromkeys((ours, "torch"))}
        on_cpu = device.type == "cpu"
        times = processor_ms(functions, 3) if on_cpu else measure(functions, device, 10)
        bandwidth = memory_bandwidth_tbs(device_name(device))
        bound = None
        if num_bytes is not None and bandwidth is not None:
            bound = num_bytes / bandwidth / 1e9
        times = {"ours": times.pop(ours), **times}
        return make_row(op, {**shape, "T": num_tokens}, dtype, device, times, bound, backend=ours)

    rows = []
    for shape in SHAPES[device.type]:
        for teach in (False, True):
            rows.append(
                timed(
                    "attention by an index, forward" + (" and what it learns" if teach else ""),
                    {"rule": shape.name, "I": shape.index_heads, "w": WIDTH},
                    lambda name, shape=shape, teach=teach: teaching(shape, device, name, teach),
                )
            )
    rows.append(
        timed("choice inside sparse attention", {"w": WIDTH}, lambda name: selecting(device, name))
    )
    rows.append(
        timed(
            "what an index inside sparse attention learns",
            {"w": WIDTH},
            lambda name: teaching_within(device, name),
        )
    )
    for name, *sizes in POOLS[device.type]:
        for backward in (False, True):
            rows.append(
                timed(
                    "gated pool, forward" + (" and backward" if backward else ""),
                    {"of": name, "m": sizes[0], "w": sizes[1]},
                    lambda backend, sizes=sizes, backward=backward: pooling(
                        *sizes, device, backend, backward
                    ),
                    bytes_of_pool(*sizes, device, backward),
                )
            )
    return rows


if __name__ == "__main__":
    main("index_attention", run)
