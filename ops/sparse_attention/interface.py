"""Sparse attention as one op: checks, selection, then the backend the device has. See README.md.

Shape letters: T tokens, H heads, Hk key/value heads, d head dimension, M blocks, K selected blocks.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops.sparse_attention import chunked, cpp_backend
from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.entries import CoarseEntries, weigh_groups
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
    """[T, H, d] in the dtype of q."""
    lse: Tensor
    """[T, H] fp32 (fp64), natural logarithm of the softmax's denominator."""
    tail_mass: Tensor
    """[T, H], share of the softmax that went to coarse entries; no gradient."""
    selected_mass: Tensor
    """[T, H], share of the softmax that went to selected blocks; no gradient."""
    selected: Tensor
    """[Hk, T, K] int32 block ids in rising order, then -1."""


class Backend(Protocol):
    """What a device implements. Tensors as in sparse_attention; table: blocks.block_table."""

    def pool(
        self, k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec
    ) -> CoarseEntries: ...

    def rank(
        self,
        q: Tensor,
        entries: CoarseEntries,
        table: BlockTable,
        spec: SparseAttentionSpec,
        hashed: Tensor | None,
        noise: SelectionNoise,
    ) -> tuple[Tensor, Tensor]:
        """Keys [Hk, T, top_k] int64 of the best candidates, falling, -1 where there are no more
        (README, Select), and the candidates' estimated mass [Hk, T] fp32 summed over the group.
        hashed: [T] token_hash, None at temperature 0.
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
    _check(q, k, v, cu_seqlens, spec, bias, sink, pool_logits, token_ids, selected, exact, coarse)
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
        table=block_table(cu_seqlens, len(q), spec),
        spec=spec,
        exact=exact,
        coarse=wants_tail,
    )
    if spec.num_levels == 2:
        if pool_logits is not None:
            raise ValueError("num_levels=2 pools with equal weights: leave pool_logits out")
        if selected is not None or not exact or not coarse:
            raise ValueError("num_levels=2 selects by itself and has no branches to leave out")
        return AttentionOutput._make(attend_in_two_levels(problem, noise, token_ids))
    if selected is not None and selected.device.type == "cpu":
        _check_candidates(selected, problem.table)

    # Entries are pooled for the tail, for the selection, or for both.
    ranks = exact and selected is None and spec.top_k > 0
    learned: CoarseEntries | None = None
    if wants_tail or ranks:
        if pool_logits is None:
            with torch.no_grad():
                entries = chosen.pool(k, v, problem.table, spec)
        else:
            # Made again in the backward pass: it has a dozen copies of keys and values inside.
            entries = CoarseEntries(
                *checkpoint(
                    weigh,
                    k,
                    v,
                    pool_logits,
                    problem.table,
                    spec,
                    chosen,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        with torch.no_grad():
            if ranks:
                given = CoarseEntries(*(x.detach() for x in entries))
                found = select(q, given, problem.table, spec, noise, token_ids, chosen)
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
    return weigh(k, v, pool_logits, table, spec, chosen)


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
) -> Tensor:
    """[Hk, T, K] int32: selected blocks in rising order, then -1."""
    num_tokens, kv_heads = len(q), entries.key_mean.shape[0]
    hashed, noise = None, noise or NO_NOISE
    if noise.temperature > 0 or noise.min_top_k is not None:
        ids = torch.arange(num_tokens, device=q.device) if token_ids is None else token_ids
        hashed = token_hash(noise.seed, ids)

    keys, candidate_mass = backend.rank(q, entries, table, spec, hashed, noise)
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
            in_document = block - table.first[table.block_of.long()].long().unsqueeze(-1)
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


def weigh(
    k: Tensor,
    v: Tensor,
    pool_logits: Tensor,
    table: BlockTable,
    spec: SparseAttentionSpec,
    backend: Backend,
) -> CoarseEntries:
    """Entries [Hk, M * r, d] under learned weights, in the dtype of the keys; of incomplete blocks
    as pool makes them. Differentiable. pool_logits: [T, Hk, 2, d].
    """
    base = CoarseEntries(*_Pool.apply(k, v, table, spec, backend))  # type: ignore[no-untyped-call]
    complete, r = chunked.complete_blocks(table, spec), spec.entries_per_block
    spans = chunked.token_spans(table.start[complete], spec.block_size)
    real = chunked.real_dtype(k.dtype)
    keys, values, logits = (
        x[spans].to(real).transpose(0, 1).unflatten(1, (-1, spec.coarse_block_size))
        for x in (k, v, pool_logits)
    )
    means = CoarseEntries(
        *(x.unflatten(1, (-1, r))[:, complete].flatten(1, 2).to(real) for x in base)
    )

    def place(x: Tensor, new: Tensor) -> Tensor:
        blocks = new.unflatten(1, (-1, r)).to(x.dtype)
        placed: Tensor = x.unflatten(1, (-1, r)).index_copy(1, complete, blocks)
        return placed.flatten(1, 2)

    found = weigh_groups(keys, values, logits, means)
    return CoarseEntries(*(place(x, new) for x, new in zip(base, found, strict=True)))


class _Pool(torch.autograd.Function):
    """apply(k, v, table, spec, backend) -> the three of CoarseEntries."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec, backend: Any
    ) -> tuple[Tensor, ...]:
        entries = backend.pool(k, v, table, spec)
        ctx.save_for_backward(k, entries.key_mean, *table)
        ctx.spec = spec
        return tuple(entries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, mean, *rest = ctx.saved_tensors
        table, spec = BlockTable(*rest), ctx.spec
        complete, r = chunked.complete_blocks(table, spec), spec.entries_per_block
        real = chunked.real_dtype(k.dtype)
        dk, dv = (k.new_zeros(k.transpose(0, 1).shape, dtype=real) for _ in range(2))
        mean, *dentries = (
            x.to(real).unflatten(1, (-1, r))[:, complete].flatten(1, 2) for x in (mean, *grads)
        )
        chunked.pool_spans_backward(
            k,
            chunked.token_spans(table.start[complete], spec.block_size),
            spec.coarse_block_size,
            mean,
            CoarseEntries(*dentries),
            dk,
            dv,
        )
        return dk.transpose(0, 1).to(k.dtype), dv.transpose(0, 1).to(k.dtype), None, None, None


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
) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
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
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(q) or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {len(q)} tokens of q; it goes from "
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
