"""Attention to what an index chose: forward and backward of whole ops, index and choice included,
beside plain torch that masks the rest and beside dense attention by torch's own kernel; and a new
token of each of some rows against a cache, beside dense attention to all of it.

On a CPU there is plain torch alone, of few tokens; milliseconds are the processor's there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import Row, main, make_row, measure
from bench.stored_experts import processor_ms
from ops.compressed_attention import CompressedSpec, compressed_attention
from ops.gather_attention import pick_backend
from ops.index_attention import (
    Index,
    IndexSpec,
    attend_cached,
    group_means,
    group_starts,
    indexed_attention,
)


@dataclass(frozen=True)
class Shape:
    name: str
    spec: IndexSpec | CompressedSpec
    heads: int
    kv_heads: int
    head_dim: int
    index_heads: int


SHAPES = {
    "cpu": (
        Shape("dsa", IndexSpec("dsa", 1, 64), 8, 2, 64, 4),
        Shape("csa", CompressedSpec(64, 4, 32), 8, 1, 64, 4),
    ),
    "cuda": (
        Shape("dsa", IndexSpec("dsa", 1, 2048), 32, 4, 128, 32),
        Shape("msa", IndexSpec("msa", 128, 16), 64, 4, 128, 4),
        Shape("qsa", IndexSpec("qsa", 4, 512), 24, 2, 256, 4),
        Shape("csa", CompressedSpec(128, 4, 512), 64, 1, 512, 32),
    ),
}
TOKENS = {"cpu": (512,), "cuda": (8192, 32768)}
DECODED = {
    "cpu": (Shape("dsa", IndexSpec("dsa", 1, 512), 32, 4, 128, 8),),
    "cuda": SHAPES["cuda"][:-1],
}
HELD = {"cpu": (8192, 32768), "cuda": (32768, 131072)}
ROWS = {"cpu": (1,), "cuda": (1, 16)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
WIDTH = 128


def call_of(
    shape: Shape, num_tokens: int, device: torch.device, backend: str
) -> Callable[[], None]:
    """Forward and backward of one document; dense attention for backend=dense."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, spec = DTYPES[device.type], shape.spec

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q = normal(num_tokens, shape.heads, shape.head_dim).requires_grad_()
    k, v = (normal(num_tokens, shape.kv_heads, shape.head_dim).requires_grad_() for _ in "kv")
    into, bounds = normal(*q.shape), [0, num_tokens]
    queries = normal(num_tokens, shape.index_heads, WIDTH)
    weights, keys = normal(num_tokens, shape.index_heads), normal(num_tokens, WIDTH)
    inputs = [q, k] if isinstance(spec, CompressedSpec) else [q, k, v]

    def attend() -> Tensor:
        if backend == "dense":
            parts = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1)
        if isinstance(spec, CompressedSpec):
            number = num_tokens // spec.ratio
            index = Index(queries, keys[:number], weights)
            entries, sinks = k[:number, 0], q.new_zeros(shape.heads)
            return compressed_attention(
                q, k[:, 0], entries, index, sinks, bounds, spec, backend=backend
            ).out
        own = keys
        if spec.pools_keys:
            starts = group_starts(bounds, spec.block_size).to(device)
            own = group_means(keys, starts, spec.block_size)
        index = Index(queries, own, weights if spec.rule == "dsa" else None)
        return indexed_attention(q, k, v, index, bounds, spec, backend=backend).out

    def call() -> None:
        out = attend()
        torch.autograd.grad(out, inputs if backend != "dense" else [q, k, v], into)

    return call


def decoding_of(
    shape: Shape, num_rows: int, num_tokens: int, device: torch.device, dense: bool
) -> Callable[[], Tensor]:
    """A new token of each row, the last one that a cache holds."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, spec = DTYPES[device.type], shape.spec
    assert isinstance(spec, IndexSpec)

    def normal(*size: int) -> Tensor:
        return torch.randn(num_rows, *size, generator=generator, device=device).to(dtype)

    q = normal(1, shape.heads, shape.head_dim)
    k, v = (normal(num_tokens, shape.kv_heads, shape.head_dim) for _ in "kv")
    if dense:
        parts = [x.transpose(1, 2) for x in (q, k, v)]
        return lambda: F.scaled_dot_product_attention(*parts, enable_gqa=True)

    number = num_tokens // spec.block_size if spec.pools_keys else num_tokens
    weights = normal(1, shape.index_heads) if spec.rule == "dsa" else None
    index = normal(1, shape.index_heads, WIDTH), normal(number, WIDTH), weights
    last = torch.full((num_rows, 1), num_tokens - 1, device=device)
    return lambda: attend_cached(q, k, v, *index, last, spec)


def decode(device: torch.device) -> list[Row]:
    found = []
    for shape, num_tokens, num_rows in itertools.product(
        DECODED[device.type], HELD[device.type], ROWS[device.type]
    ):
        dtype, spec = DTYPES[device.type], shape.spec
        assert isinstance(spec, IndexSpec)
        functions: dict[str, Callable[[], object]] = {
            name: decoding_of(shape, num_rows, num_tokens, device, name == "dense")
            for name in ("ours", "dense")
        }
        found.append(
            make_row(
                "a new token of each row to what an index chose",
                {
                    **{"rule": shape.name, "rows": num_rows, "N": num_tokens},
                    **{"H": shape.heads, "Hk": shape.kv_heads, "d": shape.head_dim},
                },
                dtype,
                device,
                processor_ms(functions, 9)
                if device.type == "cpu"
                else measure(functions, device, 10),
                None,
                backend=pick_backend(None, device, dtype, shape.head_dim, spec.block_size, WIDTH),
            )
        )
    return found


def run(device: torch.device) -> list[Row]:
    rows = decode(device)
    for shape, num_tokens in itertools.product(SHAPES[device.type], TOKENS[device.type]):
        dtype, spec = DTYPES[device.type], shape.spec
        span = spec.block_size if isinstance(spec, IndexSpec) else 1
        ours = pick_backend(None, device, dtype, shape.head_dim, span)
        functions = {
            name: call_of(shape, num_tokens, device, name)
            for name in dict.fromkeys((ours, "torch", "dense"))
        }
        if device.type == "cpu":
            times = processor_ms(functions, 3)
        else:
            times = measure(functions, device, 10)
        rows.append(
            make_row(
                "attention to what an index chose, forward and backward",
                {
                    "rule": shape.name,
                    "T": num_tokens,
                    "H": shape.heads,
                    "Hk": shape.kv_heads,
                    "d": shape.head_dim,
                },
                dtype,
                device,
                {"ours": times.pop(ours), **times},
                None,
                backend=ours,
            )
        )
    return rows


if __name__ == "__main__":
    main("gather_attention", run)
