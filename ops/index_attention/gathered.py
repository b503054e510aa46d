"""The op as kernels are asked for it: of ops/gather_attention, whose spans are blocks, and of the
index, which learns from what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ops.gather_attention import Gather
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import divergence, own_graph

if TYPE_CHECKING:
    from ops.index_attention.triton_backend import Gradients, IndexTile, Scores


def document_starts(bounds: Sequence[int], device: torch.device) -> Tensor:
    """[T] int32, the first token of every token's document. bounds: where documents begin, and
    T.
    """
    ends = torch.tensor(bounds, dtype=torch.int32)
    return ends[:-1].repeat_interleave(ends.diff().long()).to(device)


def rows_to_see(
    bounds: Sequence[int], spec: IndexSpec, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(base, window start) of every token as Gather has them. The host knows the documents, so this
    copies to the device: once a call, and backward passes are handed what is made here.
    """
    base = document_starts(bounds, device)
    if not spec.pools_keys:
        return base, None
    # the tokens after the last complete block are attended to besides
    token = torch.arange(len(base), device=device, dtype=torch.int32)
    return base, token + 1 - (token - base + 1) % spec.block_size


def gather_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    base: Tensor,
    window_start: Tensor | None,
    spec: IndexSpec,
) -> Gather:
    """q: [T, H, d]; k, v: [T, Hk, d]; chosen: [C, T, K] int32 blocks of documents, those that are
    there first, then -1; it may be filled in later. base, window_start: as rows_to_see has them.
    """
    return Gather(
        q.contiguous(),
        k.to(q.dtype).contiguous(),
        v.to(q.dtype).contiguous(),
        chosen,
        base,
        spec.block_size,
        window_start=window_start,
    )


def teach_chosen(
    tile: IndexTile,
    scores: Scores,
    chosen: Tensor,
    masses: Tensor,
    counts: Tensor,
    grads: Gradients | None,
) -> Tensor:
    """[] fp32: divergence of a tile's queries, summed over those that count; its gradient is added
    to `grads`, if there are any.

    Args:
        chosen: [C, Q, K] int32 blocks, rising, then -1; masses: [C, Q, K] fp32, theirs.
        counts: [Q], 1 for queries that count, else 0.
    """
    from ops.index_attention.triton_backend import add_grads

    places = chosen.clamp_min(0).long()
    of_chosen = scores.values.gather(-1, places)
    with own_graph(grads is not None):
        if grads is not None:
            of_chosen.requires_grad_()
        by_query = divergence(of_chosen, masses, chosen >= 0).mean(0)
        total = (by_query * counts.to(by_query.dtype)).sum()
    if grads is not None:
        (by_score,) = torch.autograd.grad(total, of_chosen)
        columns = chosen
        if scores.best is not None:
            columns = scores.best.gather(-1, places).masked_fill(chosen < 0, -1)
        add_grads(tile, columns.contiguous(), by_score.contiguous(), grads)
    return total.detach()


def teach_all(
    tile: IndexTile,
    scores: Scores,
    masses: Tensor,
    candidates: Tensor,
    weights: Tensor | None,
    grads: Gradients | None,
) -> Tensor:
    """As teach_chosen, where a query's first `candidates` blocks have a teacher.

    Args:
        masses: [C, Q, more than M] fp32, which are lost if there are `grads`. candidates: [Q]
            int32; weights: [Q] fp32, what queries count; None: ones.
    """
    from ops.index_attention.triton_backend import add_grads, divergences

    found = divergences(scores.values, masses, candidates, weights, grads is not None)
    if grads is not None:
        # the key that gave a block its score, or the one that it is
        number = scores.values.shape[-1]
        place = torch.arange(number, device=masses.device, dtype=torch.int32)
        best = place if scores.best is None else scores.best
        columns = torch.full_like(masses, -1, dtype=torch.int32)
        columns[..., :number] = torch.where(place < candidates.unsqueeze(-1), best, -1)
        add_grads(tile, columns, masses, grads)
    return found.sum()
