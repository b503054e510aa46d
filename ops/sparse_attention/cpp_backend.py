"""The op on a CPU in C++ (csrc/): the loops of pooling, ranking and attending, on all threads.
Outputs and gradients are the same to the last bit whatever the number of threads.

Vectors of head_dim are padded with zeros to whole registers, which changes no sum. bf16 and fp16
are computed in fp32.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.compile.cuda import BuildError, build_ops
from ops.sparse_attention.blocks import BlockTable, of_queries
from ops.sparse_attention.chunked import (
    decode,
    real_dtype,
    super_blocks,
    weigh_backward,
    weigh_pooled,
)
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.noise import drawing_heads
from ops.sparse_attention.problem import Problem
from ops.sparse_attention.spec import TRUST, SelectionNoise, SparseAttentionSpec

__all__ = [
    "attend",
    "attend_backward",
    "decode",
    "load_library",
    "pool",
    "rank",
    "unavailable",
    "weigh",
    "weigh_backward",
]

log = logging.getLogger("loadstone")
SOURCES = Path(__file__).resolve().parent / "csrc"
REGISTER = 16
"""Multiple that head_dim is padded to: numbers of the widest register, in fp32."""
SCORES = ("prob", "max", "error_gain")


@functools.cache
def unavailable() -> str | None:
    """Why there is no such library; None where there is one."""
    try:
        load_library()
    except (BuildError, OSError) as error:
        log.warning("sparse attention runs in plain torch, which is slower: %s", error)
        return str(error)
    return None


@functools.cache
def load_library() -> None:
    """Build and load the dispatcher ops.

    Raises:
        BuildError: no compiler, or it failed.
    """
    source = SOURCES / "attention_ops.cpp"
    torch.ops.load_library(str(build_ops("attention", [source], widest=True)))


def _plain(x: Tensor) -> Tensor:
    """[..., d] in the dtype computed in, contiguous, padded to whole registers; the tensor itself
    where it is all that.
    """
    x = x.to(real_dtype(x.dtype))
    # F.pad copies even where there is nothing to add
    missing = -x.shape[-1] % REGISTER
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def _maybe(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _tables(table: BlockTable, queries: Tensor | None = None) -> list[Tensor]:
    """In the order that csrc/attention_ops.cpp read_table takes them. queries: [n], the tokens that
    are queries, whose blocks are then those that it gets; None: all.
    """
    tables = [
        table.start,
        table.end,
        table.first,
        table.sink_end,
        table.local_start,
        of_queries(table, queries).block_of,
    ]
    return tables if queries is None else [*tables, queries.int()]


def _settings(
    spec: SparseAttentionSpec, dim: int, exact: bool, coarse: bool
) -> tuple[list[int], list[float]]:
    """In the order that csrc/attention_ops.cpp read_problem takes them."""
    return (
        [spec.block_size, spec.entries_per_block, spec.order, int(exact), int(coarse)],
        [dim**-0.5, spec.max_variance, math.log(spec.coarse_block_size)],
    )


def pool(k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec) -> CoarseEntries:
    """k, v: [T, Hk, d] -> entries of every complete block; zeros elsewhere."""
    keys, values = _plain(k), _plain(v)
    shape = (k.shape[1], len(table.start) * spec.entries_per_block, keys.shape[-1])
    entries = CoarseEntries(*(keys.new_empty(shape) for _ in CoarseEntries._fields))
    torch.ops.loadstone.attention_pool(
        keys, values, _tables(table), [spec.block_size, spec.entries_per_block], *entries
    )
    dim = k.shape[-1]
    return CoarseEntries(*(x[..., :dim].to(k.dtype).contiguous() for x in entries))


def weigh(
    k: Tensor, v: Tensor, pool_logits: Tensor, table: BlockTable, spec: SparseAttentionSpec
) -> CoarseEntries:
    """See interface.Backend.weigh: pooled here, weighed in plain torch."""
    return weigh_pooled(pool(k, v, table, spec), k, v, pool_logits, table, spec)


def rank(
    q: Tensor,
    entries: CoarseEntries,
    table: BlockTable,
    spec: SparseAttentionSpec,
    hashed: Tensor | None,
    noise: SelectionNoise,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See interface.Backend.rank."""
    kv_heads = entries.key_mean.shape[0]
    keys = torch.empty(kv_heads, len(q), spec.top_k, dtype=torch.int64)
    mass = torch.empty(kv_heads, len(q))
    # A ranking is over everything in the past, as the coarse branch alone is.
    settings, numbers = _settings(spec, q.shape[-1], exact=False, coarse=True)
    above = super_blocks(entries, table, spec)
    supers: tuple[Any, ...] = ([], [], [], [])
    if above is not None:
        supers = (
            [_plain(above.entries.key_mean), _plain(above.entries.key_var)],
            _tables(above.table, queries),
            *_settings(above.spec, q.shape[-1], exact=False, coarse=True),
        )
    torch.ops.loadstone.attention_rank(
        _plain(q),
        _plain(entries.key_mean),
        _plain(entries.key_var),
        _tables(table, queries),
        hashed if noise.temperature > 0 else None,
        settings,
        [*numbers, float(noise.temperature), TRUST],
        [spec.top_k, SCORES.index(spec.score), *drawing_heads(noise, kv_heads), spec.fanout],
        *supers,
        keys,
        mass,
    )
    return keys, mass


def _inputs(problem: Problem) -> tuple[object, ...]:
    """The arguments that both directions of csrc/attention_ops.cpp begin with."""
    real = real_dtype(problem.q.dtype)
    entries = problem.entries if problem.coarse and problem.entries is not None else ()
    return (
        _plain(problem.q),
        _plain(problem.k),
        _plain(problem.v),
        _maybe(problem.bias, real),
        _maybe(problem.sink, real),
        problem.selected.int().contiguous(),
        [_plain(x) for x in entries],
        _tables(problem.table, problem.queries),
        *_settings(problem.spec, problem.q.shape[-1], problem.exact, problem.coarse),
    )


def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See interface.Backend.attend."""
    inputs = _inputs(problem)
    q, dim = inputs[0], problem.q.shape[-1]
    assert isinstance(q, Tensor)
    out = torch.empty_like(q)
    lse, tail_mass, selected_mass = (q.new_empty(q.shape[:2]) for _ in range(3))
    torch.ops.loadstone.attention_forward(*inputs, out, lse, tail_mass, selected_mass)
    return out[..., :dim].to(problem.q.dtype).contiguous(), lse, tail_mass, selected_mass


def attend_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    pooled: bool = True,
) -> tuple[Tensor | None, ...]:
    """See interface.Backend.attend_backward."""
    inputs = _inputs(problem)
    q, k, v, bias, sink, _, entries, tables, settings, numbers = inputs
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    assert isinstance(entries, list) and isinstance(numbers, list)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    dbias = torch.zeros_like(bias) if isinstance(bias, Tensor) else None
    dsink = torch.zeros_like(sink) if isinstance(sink, Tensor) else None
    dentries = [torch.zeros_like(x) for x in entries]

    torch.ops.loadstone.attention_backward(
        *inputs,
        _plain(out),
        lse.to(q.dtype).contiguous(),
        _plain(dout),
        _maybe(dlse, q.dtype),
        dq,
        dk,
        dv,
        dbias,
        dsink,
        dentries,
    )

    # From the entries back to the tokens they were pooled from; the op leaves the factor `scale` of
    # the variance's gradient to this.
    if entries and pooled:
        assert isinstance(settings, list)
        torch.ops.loadstone.attention_pool_backward(
            k, v, tables, settings[:2], numbers[0], entries[0], *dentries, dk, dv
        )

    dim = problem.q.shape[-1]
    if entries:
        dentries[2] /= numbers[0]
    return (
        dq[..., :dim].to(problem.q.dtype).contiguous(),
        dk[..., :dim].to(problem.k.dtype).contiguous(),
        dv[..., :dim].to(problem.v.dtype).contiguous(),
        dbias if dbias is None or problem.bias is None else dbias.to(problem.bias.dtype),
        dsink if dsink is None or problem.sink is None else dsink.to(problem.sink.dtype),
        *(() if pooled else (x[..., :dim].contiguous() for x in dentries)),
    )
