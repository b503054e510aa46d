"""Sparse attention as one op: checks, selection, then the backend the device has. See README.md.

Shape letters: T tokens, n queries, H heads, Hk key/value heads, d head dimension, M blocks, K
selected blocks.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ops.sparse_attention import chunked, cpp_backend
from ops.sparse_attention.blocks import BlockTable, block_table, of_queries
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.hierarchy import attend_in_two_levels, decode_in_two_levels
from ops.sparse_attention.noise import (
    NO_NOISE,
    draw_top_k,
    drawing_heads,
    gumbel,
    selection_counter,
    token_hash,
)
from ops.sparse_attention.problem import (
    GRADIENTS,
    DecodeProblem,
    Problem,
    nothing_selected,
)
from ops.sparse_attention.ranking import block_of_key, until_covered, value_of_key
from ops.sparse_attention.spec import SelectionNoise, SparseAttentionSpec

log = logging.getLogger("loadstone")
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (32, 64, 128)
MAX_GROUP = 16
"""What the Triton kernels are built for; a CPU takes any."""


class AttentionOutput(NamedTuple):
    """Attended values, and where the softmax went."""

    out: Tensor
    """[n, H, d] in the dtype of q; n = T where all tokens are queries."""
    lse: Tensor
    """[n, H] fp32 (fp64), natural logarithm of the softmax's denominator."""
    tail_mass: Tensor
    """[n, H], share of the softmax that went to coarse entries; no gradient."""
    selected_mass: Tensor
    """[n, H], share of the softmax that went to selected blocks; no gradient."""
    selected: Tensor
    """[Hk, n, K] int32 block ids in rising order, then -1."""


class Backend(Protocol):
    """What a device implements. Tensors as in sparse_attention; table: blocks.block_table."""

    def pool(
        self, k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec
    ) -> CoarseEntries: ...

    def weigh(
        self,
        k: Tensor,
        v: Tensor,
        pool_logits: Tensor,
        table: BlockTable,
        spec: SparseAttentionSpec,
    ) -> CoarseEntries:
        """Entries under learned weights, in the dtype of the keys; of incomplete blocks as pool
        makes them, whatever their logits. Zeros give what pool gives, to the last bit.
        pool_logits: [T, Hk, 2, d].
        """

    def weigh_backward(
        self,
        k: Tensor,
        v: Tensor,
        pool_logits: Tensor,
        table: BlockTable,
        spec: SparseAttentionSpec,
        grads: CoarseEntries,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of k, v and pool_logits in their dtypes from those of `weigh`, of which what
        incomplete blocks have is not read.
        """

    def rank(
        self,
        q: Tensor,
        entries: CoarseEntries,
        table: BlockTable,
        spec: SparseAttentionSpec,
        hashed: Tensor | None,
        noise: SelectionNoise,
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys [Hk, n, top_k] int64 of the best candidates, falling, -1 where there are no more
        (README, Select), and the candidates' estimated mass [Hk, n] fp32 summed over the group.
        hashed: [n] token_hash, None at temperature 0.
        """

    def attend(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse, tail_mass, selected_mass) of AttentionOutput."""

    def attend_backward(
        self,
        problem: Problem,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        pooled: bool = True,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, bias, sink in their dtypes, from what attend gave and the gradients
        of it.

        pooled: entries are `pool` of the keys and values, which get what reaches these. Otherwise
            entries are inputs of their own, and where coarse ones take part, the gradients of the
            three follow, in the dtype computed in.
        """

    def decode(self, problem: DecodeProblem) -> tuple[Tensor, Tensor]:
        """(out [N, H, d], lse [N, H]): see decode."""


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    spec: SparseAttentionSpec,
    *,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    pool_logits: Tensor | None = None,
    noise: SelectionNoise | None = None,
    token_ids: Tensor | None = None,
    queries: Tensor | None = None,
    selected: Tensor | None = None,
    exact: bool = True,
    coarse: bool = True,
    backend: str | None = None,
) -> AttentionOutput:
    """Causal grouped-query attention over packed documents: window, selected blocks and pooled rest
    in one softmax.

    Args:
        q: [T, H, d]; k, v: [T, Hk, d], rotary positions applied; fp32, bf16, fp16 (fp64 on a CPU).
        cu_seqlens: [documents + 1] integers on the device, from 0 to T, not falling.
        bias: [T, H], added to the logits of coarse entries (learned offset and trust). sink: [H], a
            logit of value zero.
        pool_logits: [T, Hk, 2, d], logits of a token's weight within its coarse entry, per channel,
            for the entry's key and for its value. Zeros: None, to the last bit. Not with two
            levels.
        noise: randomness of the selection, in training; token_ids: [T] int64 names of the tokens it
            hangs on (None: positions in the batch).
        queries: [n] int64 on the device, rising: the tokens that attend, to all of their documents'
            pasts. q, bias, token_ids and selected, and what is returned, then have n rows in the
            place of T, which are those of the whole call to the last bit of the selection; k, v,
            cu_seqlens and pool_logits stay whole, and their gradients are shares of the whole
            call's, which add up over disjoint sets of queries. None: all tokens attend.
        selected: [Hk, T, K] int32 block ids to use instead of selecting, -1 for none; candidates
            only, without repeats. exact, coarse: branches that take part; without the exact one,
            coarse entries stand for every complete past block.
        backend: "triton" (CUDA), "cpp" (CPU) or "chunked" (any device); None: the device's.

    Returns:
        AttentionOutput; gradients flow from out and lse to q, k, v, bias, sink and pool_logits.
        Deterministic. Equal to dense attention for documents up to spec.dense_length tokens.

    Raises:
        ValueError: shapes, dtypes or settings do not fit.
    """
    _check(
        q,
        k,
        v,
        cu_seqlens,
        spec,
        bias,
        sink,
        pool_logits,
        token_ids,
        selected,
        exact,
        coarse,
        queries,
    )
    chosen = _backend(backend or select_backend(q, k, spec))
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    wants_tail = spec.has_tail(exact, coarse)
    problem = Problem(
        q=q,
        k=k,
        v=v,
        bias=None if bias is None else bias.contiguous(),
        sink=sink,
        selected=nothing_selected(q, k.shape[1]) if selected is None else selected,
        entries=None,
        table=block_table(cu_seqlens, len(k), spec),
        spec=spec,
        exact=exact,
        coarse=wants_tail,
        queries=queries,
    )
    if spec.num_levels == 2:
        if pool_logits is not None:
            raise ValueError("num_levels=2 pools with equal weights: leave pool_logits out")
        if selected is not None or not exact or not coarse:
            raise ValueError("num_levels=2 selects by itself and has no branches to leave out")
        return AttentionOutput._make(attend_in_two_levels(problem, noise, token_ids))
    if selected is not None and selected.device.type == "cpu":
        _check_candidates(selected, problem.table_of_queries)

    # Entries are pooled for the tail, for the selection, or for both.
    ranks = exact and selected is None and spec.top_k > 0
    learned: CoarseEntries | None = None
    if wants_tail or ranks:
        if pool_logits is None:
            with torch.no_grad():
                entries = chosen.pool(k, v, problem.table, spec)
        else:
            entries = CoarseEntries(
                *_Weigh.apply(  # type: ignore[no-untyped-call]
                    k, v, pool_logits, problem.table, spec, chosen
                )
            )
        with torch.no_grad():
            if ranks:
                given = CoarseEntries(*(x.detach() for x in entries))
                found = select(q, given, problem.table, spec, noise, token_ids, chosen, queries)
                problem = problem._replace(selected=found)
        if wants_tail and pool_logits is None:
            problem = problem._replace(entries=entries)
        elif wants_tail:
            learned = entries
    out, lse, tail_mass, selected_mass = _Attend.apply(  # type: ignore[no-untyped-call]
        *(learned or (None,) * 3), *problem, chosen
    )
    return AttentionOutput(out, lse, tail_mass, selected_mass, problem.selected)


@torch.no_grad()
def pool_entries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    spec: SparseAttentionSpec,
    pool_logits: Tensor | None = None,
    backend: str | None = None,
) -> CoarseEntries:
    """The entries [Hk, M * r, d] that sparse_attention has of these tokens, given as there; no
    gradient.
    """
    chosen = _backend(backend or select_backend(q, k, spec))
    table = block_table(cu_seqlens, len(k), spec)
    k, v = k.contiguous(), v.contiguous()
    if pool_logits is None:
        return chosen.pool(k, v, table, spec)
    return chosen.weigh(k, v, pool_logits, table, spec)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    entries: CoarseEntries,
    length: int,
    spec: SparseAttentionSpec,
    *,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    selected: Tensor | None = None,
    exact: bool = True,
    coarse: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token a row to a key/value cache; what sparse_attention gives for that
    token, without noise.

    Args:
        q: [N, H, d], tokens number `length` (from 1) of N documents. keys, values: [N, at least
            length, Hk, d], theirs included. entries: [N, Hk, max_blocks * r, d], valid for complete
            blocks: EntryCache.entries. bias: [N, H]; sink: [H]. selected: [N, Hk, K] blocks to use
            instead of selecting, by their places in the document, -1 for none; candidates only,
            without repeats; not with two levels. exact, coarse: branches that take part.

    Returns:
        (out [N, H, d], lse [N, H]). No gradient.
    """
    if not 1 <= length <= keys.shape[1]:
        raise ValueError(
            f"length {length} must be between 1 and the {keys.shape[1]} tokens the cache holds"
        )
    problem = DecodeProblem(
        q=q.contiguous(),
        keys=keys,
        values=values,
        entries=entries,
        length=length,
        spec=spec,
        bias=bias,
        sink=sink,
        exact=exact,
        coarse=coarse,
        selected=selected,
    )
    if selected is not None and spec.num_levels == 2:
        raise ValueError("num_levels=2 selects by itself: leave selected out")
    with torch.no_grad():
        if spec.num_levels == 2:
            return decode_in_two_levels(problem)
        chosen = _backend(backend or select_backend(q, keys.flatten(0, 1), spec))
        return chosen.decode(problem)


def select(
    q: Tensor,
    entries: CoarseEntries,
    table: BlockTable,
    spec: SparseAttentionSpec,
    noise: SelectionNoise | None,
    token_ids: Tensor | None,
    backend: Backend,
    queries: Tensor | None = None,
) -> Tensor:
    """[Hk, n, K] int32: selected blocks in rising order, then -1."""
    kv_heads = entries.key_mean.shape[0]
    hashed, noise = None, noise or NO_NOISE
    if noise.temperature > 0 or noise.min_top_k is not None:
        ids = token_ids
        if ids is None:
            ids = torch.arange(len(q), device=q.device) if queries is None else queries
        hashed = token_hash(noise.seed, ids)

    keys, candidate_mass = backend.rank(q, entries, table, spec, hashed, noise, queries)
    block = block_of_key(keys)

    # Fewer than top_k of them where the noise drew fewer.
    if hashed is not None:
        counts = draw_top_k(hashed, kv_heads, spec.top_k, noise)
        if counts is not None:
            block = block.masked_fill(
                torch.arange(spec.top_k, device=q.device) >= counts.unsqueeze(-1), -1
            )

    # Fewer where the mass is covered. Keys hold the score with its noise, which comes off again:
    # top_p is a share of the estimated mass.
    if spec.top_p is not None:
        values = value_of_key(keys)
        if noise.temperature > 0:
            assert hashed is not None
            first, total = drawing_heads(noise, kv_heads)
            head = first + torch.arange(kv_heads, device=q.device).view(-1, 1, 1)
            own = of_queries(table, queries).block_of.long()
            in_document = block - table.first[own].long().unsqueeze(-1)
            values = values - noise.temperature * gumbel(
                hashed.view(1, -1, 1), selection_counter(in_document, head, total)
            )
        mass = torch.where(block >= 0, values.exp(), 0.0)
        block = until_covered(
            block, mass, candidate_mass.unsqueeze(-1), q.shape[1] // kv_heads, spec.top_p
        )

    # Rising order with the unused ones last, which a number above all ids does in one sort.
    far = torch.iinfo(torch.int32).max
    rising = torch.where(block < 0, far, block).int().sort(-1).values
    return torch.where(rising == far, -1, rising)


class _Weigh(torch.autograd.Function):
    """apply(k, v, pool_logits, table, spec, backend) -> the three of CoarseEntries. What is kept
    are the inputs alone: weights are computed again.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        k, v, pool_logits, table, spec, backend = given
        ctx.save_for_backward(k, v, pool_logits, *table)
        ctx.spec, ctx.backend = spec, backend
        return tuple(backend.weigh(k, v, pool_logits, table, spec))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, pool_logits, *rest = ctx.saved_tensors
        found = ctx.backend.weigh_backward(
            k, v, pool_logits, BlockTable(*rest), ctx.spec, CoarseEntries(*grads)
        )
        return (*found, None, None, None)


class _Attend(torch.autograd.Function):
    """apply(*entries, *problem, backend) -> (out, lse, tail_mass, selected_mass). entries: the
    three tensors of entries that get a gradient of their own; None where they are pooled, or there
    are none.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        problem, backend = Problem(*given[3:-1]), given[-1]
        ctx.pooled = given[0] is None
        if not ctx.pooled:
            problem = problem._replace(entries=CoarseEntries(*(x.contiguous() for x in given[:3])))
        out, lse, tail_mass, selected_mass = backend.attend(problem)
        ctx.save_for_backward(*problem.tensors(), out, lse)
        ctx.settings = problem.spec, problem.exact, problem.coarse
        ctx.backend = backend
        ctx.mark_non_differentiable(tail_mass, selected_mass)
        ctx.set_materialize_grads(False)
        return out, lse, tail_mass, selected_mass

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        problem = Problem.of_tensors(tensors, *ctx.settings)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        grads = ctx.backend.attend_backward(problem, out, lse, dout, dlse, ctx.pooled)
        entries: tuple[Tensor | None, ...] = (None,) * 3
        if problem.entries is not None and not ctx.pooled:
            entries = tuple(
                x.to(like.dtype) for x, like in zip(grads[GRADIENTS:], problem.entries, strict=True)
            )
        without = len(Problem._fields) + 1 - GRADIENTS
        return (*entries, *grads[:GRADIENTS], *(None,) * without)


def select_backend(q: Tensor, k: Tensor, spec: SparseAttentionSpec) -> str:
    """The back-end that takes a call with these tensors; said once. See backend_for."""
    return backend_for(
        q.device.type, q.shape[-1], q.shape[1] // k.shape[1], spec.block_size, str(q.dtype)
    )


def backend_for(device: str, head_dim: int, group: int, block_size: int, dtype: str) -> str:
    """ "triton" on CUDA for the shapes the kernels are built for, "cpp" on a CPU where it can be
    compiled, else "chunked"; said once.

    Args:
        group: heads that share a key/value head.
        dtype: as str(torch.float32).
    """
    if device == "cpu":
        reason = cpp_backend.unavailable()
        _announce("C++ on the CPU" if reason is None else f"chunked torch: {reason}")
        return "cpp" if reason is None else "chunked"
    reason = _not_triton(device, head_dim, group, block_size, dtype)
    _announce(reason or "Triton kernels")
    return "triton" if reason is None else "chunked"


def _not_triton(device: str, head_dim: int, group: int, block_size: int, dtype: str) -> str | None:
    """Why the kernels cannot take this call; None: they can."""
    if device != "cuda":
        return f"chunked torch ({device})"
    if (
        head_dim not in HEAD_DIMS
        or block_size not in BLOCK_SIZES
        or group > MAX_GROUP
        or dtype == "torch.float64"
    ):
        return (
            f"chunked torch: head_dim {head_dim}, block_size {block_size}, {group} heads a group "
            f"and {dtype} are not what the Triton kernels take (head_dim {HEAD_DIMS}, block_size "
            f"{BLOCK_SIZES}, at most {MAX_GROUP} heads)"
        )
    return None


@functools.cache
def _announce(text: str) -> None:
    log.info("sparse attention: %s", text)


def _backend(name: str) -> Backend:
    if name == "chunked":
        return chunked
    if name == "cpp":
        cpp_backend.load_library()
        return cpp_backend
    if name == "triton":
        from ops.sparse_attention import triton_backend

        return triton_backend
    raise ValueError(f"unknown sparse attention backend {name!r}; choose triton, cpp or chunked")


def _check_candidates(selected: Tensor, table: BlockTable) -> None:
    """Forced blocks would count twice, and later ones are the future."""
    own = table.block_of.long().unsqueeze(1)
    low, high = table.sink_end[own], table.local_start[own]
    wrong = (selected >= 0) & ((selected < low) | (selected >= high))
    ordered = selected.sort(-1).values
    wrong[..., 1:] |= (ordered[..., 1:] >= 0) & (ordered[..., 1:] == ordered[..., :-1])
    if wrong.any():
        head, token, _ = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"selected {selected[head, token].tolist()} of token {token} must be distinct blocks "
            f"among its candidates, {int(low[token])} to {int(high[token]) - 1}, or -1"
        )


def _check_queries(queries: Tensor, q: Tensor, k: Tensor) -> None:
    if queries.dtype != torch.int64 or queries.shape != q.shape[:1]:
        raise ValueError(
            f"queries is {queries.dtype} {tuple(queries.shape)}; it must name the token of each of "
            f"the {len(q)} rows of q, as int64"
        )
    # Reading them would make a GPU wait.
    if queries.device.type != "cpu" or not len(queries):
        return
    low, high, rises = int(queries[0]), int(queries[-1]), bool((queries.diff() > 0).all())
    if not rises or low < 0 or high >= len(k):
        raise ValueError(
            f"queries must rise within the {len(k)} tokens of k; they go from {low} to {high}"
            + ("" if rises else " and do not rise in between")
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    spec: SparseAttentionSpec,
    bias: Tensor | None,
    sink: Tensor | None,
    pool_logits: Tensor | None,
    token_ids: Tensor | None,
    selected: Tensor | None,
    exact: bool,
    coarse: bool,
    queries: Tensor | None,
) -> None:
    if queries is not None:
        _check_queries(queries, q, k)
    uneven = queries is None and q.shape[:1] != k.shape[:1]
    if q.dim() != 3 or k.dim() != 3 or uneven or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [T, heads, head_dim] and [T, "
            "kv_heads, head_dim]"
        )

    if v.shape != k.shape:
        raise ValueError(
            f"v {tuple(v.shape)} must have the shape of k {tuple(k.shape)}; latent (MLA) layouts, "
            "whose values are narrower than their keys, are not supported: use attention=dense"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} heads cannot be shared evenly by {k.shape[1]} key/value heads"
        )

    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one of fp32, bf16, fp16 "
            "(fp64)"
        )

    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} must be [documents + 1] "
            "integers"
        )

    # Reading them would make a GPU wait, so only a CPU's are checked.
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(k) or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {len(k)} tokens of k; it goes from "
                f"{int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
                + (" and falls in between" if (lengths < 0).any() else "")
            )

    for name, tensor, shape in (
        ("bias", bias, (len(q), q.shape[1])),
        ("sink", sink, (q.shape[1],)),
        ("pool_logits", pool_logits, (*k.shape[:2], 2, k.shape[2])),
        ("token_ids", token_ids, (len(q),)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if selected is not None and (selected.dim() != 3 or selected.shape[:2] != (k.shape[1], len(q))):
        raise ValueError(
            f"selected has shape {tuple(selected.shape)}, expected ({k.shape[1]}, {len(q)}, K)"
        )

    if spec.tail in ("ht", "ht_cv"):
        raise ValueError(
            f"tail={spec.tail} is sampled: call ops.sparse_attention.estimator.estimate"
        )
    if not exact and not coarse:
        raise ValueError("without the exact and the coarse branch nothing is left to attend to")
