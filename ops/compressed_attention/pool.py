"""Entries: gated means, channel by channel, of the tokens of closed windows.

Shape letters: T tokens, m tokens of a window, M closed windows, w channels of an entry, p = 2 where
windows overlap, else 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.gather_attention import pick_backend
from ops.index_attention.groups import group_starts
from ops.index_attention.tile import real_dtype

NEVER = float("-inf")


class Windows(NamedTuple):
    """The closed windows of packed documents, document after document."""

    starts: Tensor
    """[M] int64, the first token of each."""
    follows: Tensor
    """[M] bool, whether the window before it is of the same document."""
    size: int


def closed_windows(bounds: Sequence[int], size: int, device: torch.device) -> Windows:
    """bounds: where documents begin, and the end of the last one."""
    counts = [(end - begin) // size for begin, end in itertools.pairwise(bounds)]
    parts = [torch.arange(count) > 0 for count in counts]
    follows = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
    return Windows(group_starts(bounds, size).to(device), follows.to(device), size)


def pooled(
    content: Tensor,
    gates: Tensor,
    slot_bias: Tensor,
    before: tuple[Tensor, Tensor] | None,
    follows: Tensor,
) -> Tensor:
    """Entries of windows that are at hand: the definition, in fp32 (fp64).

    Args:
        content, gates: [..., m, p w] of the windows' own tokens; slot_bias: [m, p w].
        before: the same of the windows before them; None: windows do not overlap. With overlap a
            window gives its later w channels to its own entry, and its first w to the next one's.
        follows: [...] bool, whether there is a window before.

    Returns:
        [..., w].
    """
    c, z = _candidates(content, gates, slot_bias, before, follows)
    entries: Tensor = (z.softmax(-2) * c).sum(-2)
    return entries


def _candidates(
    content: Tensor,
    gates: Tensor,
    slot_bias: Tensor,
    before: tuple[Tensor, Tensor] | None,
    follows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Values and logits [..., p m, w] of what an entry is a mean of."""
    real = real_dtype(content.dtype)
    c, z = content.to(real), gates.to(real) + slot_bias.to(real)
    if before is None:
        return c, z
    width = c.shape[-1] // 2
    there = follows[..., None, None]
    early_c, early_z = before[0].to(real)[..., :width], before[1].to(real) + slot_bias.to(real)
    early_c = torch.where(there, early_c, 0.0)
    early_z = torch.where(there, early_z[..., :width], NEVER)
    return torch.cat((early_c, c[..., width:]), -2), torch.cat((early_z, z[..., width:]), -2)


def gated_pool(
    content: Tensor,
    gates: Tensor,
    slot_bias: Tensor,
    windows: Windows,
    overlap: bool,
    backend: str | None = None,
) -> Tensor:
    """Entries of packed documents; what is kept for backward are the inputs alone.

    Args:
        content, gates: [T, p w], projections of the tokens; slot_bias: [m, p w], added to the gates
            by a token's place in its window.
        backend: "triton" or "torch"; None takes "triton" on CUDA for fp32, bf16 and fp16.

    Returns:
        [M, w] in the dtype of content. Differentiable in the first three, deterministic.

    Raises:
        ValueError: another back-end, or a dtype that the kernels cannot take.
    """
    taken = pick_backend(backend, content.device, content.dtype, None, 1)
    entries: Tensor = _GatedPool.apply(  # type: ignore[no-untyped-call]
        content, gates, slot_bias, *windows, overlap, taken == "triton"
    )
    return entries


def _at_hand(
    content: Tensor, gates: Tensor, starts: Tensor, size: int, overlap: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Numbers of the tokens [M, m], and what `pooled` takes of them."""
    tokens = starts.unsqueeze(1) + torch.arange(size, device=starts.device)
    c, z = content[tokens], gates[tokens]
    if not overlap or not len(starts):
        return tokens, c, z, (c, z) if overlap else None
    # Windows follow each other, so that the one before is the row before.
    return tokens, c, z, (torch.cat((c[:1], c[:-1])), torch.cat((z[:1], z[:-1])))


class _GatedPool(torch.autograd.Function):
    """With weights a = softmax(z) and entry e = sum a c: dc = a de, dz = a (c - e) de."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        content, gates, slot_bias, starts, follows, size, overlap, kernels = given
        ctx.save_for_backward(content, gates, slot_bias, starts, follows)
        ctx.size, ctx.overlap, ctx.kernels = size, overlap, kernels
        if kernels:
            from ops.compressed_attention import triton_backend

            return triton_backend.pool(content, gates, slot_bias, starts, follows, overlap)
        _, c, z, before = _at_hand(content, gates, starts, size, overlap)
        return pooled(c, z, slot_bias, before, follows).to(content.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        content, gates, slot_bias, starts, follows = ctx.saved_tensors
        none = (None,) * 5
        if ctx.kernels:
            from ops.compressed_attention import triton_backend

            given = content, gates, slot_bias, starts, follows, ctx.overlap
            made = triton_backend.pool_backward(*given, grads[0])
            return (made.content, made.gates, made.slot_bias.to(slot_bias.dtype), *none)

        tokens, own_c, own_z, before = _at_hand(content, gates, starts, ctx.size, ctx.overlap)
        c, z = _candidates(own_c, own_z, slot_bias, before, follows)
        weights = z.softmax(-2)
        entries = (weights * c).sum(-2, keepdim=True)
        into = grads[0].to(c.dtype).unsqueeze(-2)
        found = []
        for by_candidate in (weights * into, weights * (c - entries) * into):
            if ctx.overlap:
                # Early halves belong to the window before; nothing came from where there is none.
                early, late = by_candidate.split(ctx.size, -2)
                early = torch.cat((early[1:], torch.zeros_like(early[:1])))
                by_candidate = torch.cat((early, late), -1)
            found.append(by_candidate)
        # Every token is in one window: what is written is written once.
        dc, dz = (torch.zeros_like(x, dtype=c.dtype) for x in (content, gates))
        dc[tokens], dz[tokens] = found
        dbias = found[1].sum(0).to(slot_bias.dtype)
        return dc.to(content.dtype), dz.to(gates.dtype), dbias, *none
