"""From logits of coarse entries to selected blocks (README, Select); shared by every path but the
definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.sparse_attention.spec import LARGEST, SMALLEST, TRUST, SparseAttentionSpec


def rank_values(
    logits: Tensor, kappa: Tensor | None, probs: Tensor, spec: SparseAttentionSpec
) -> tuple[Tensor, Tensor]:
    """Rank value and estimated mass of every block, fp32 [..., M] each, without noise.

    logits, their variance terms (None with order 0) and probabilities: [..., G, M * r], -inf and 0
    where an entry is not in the softmax; the group stands second last.
    """

    def by_block(x: Tensor) -> Tensor:
        blocks: Tensor = x.unflatten(-1, (-1, spec.entries_per_block))
        return blocks

    mass = by_block(probs.sum(-2)).sum(-1).float()
    if spec.score == "max":
        return by_block(logits).logsumexp(-1).amax(-2).float(), mass
    score = mass
    if spec.score == "error_gain":
        assert kappa is not None
        score = by_block((probs * (1 - torch.exp(-kappa) + TRUST)).sum(-2)).sum(-1).float()
    return score.clamp_min(SMALLEST).log(), mass


def until_covered(
    blocks: Tensor, mass: Tensor, candidate_mass: Tensor, group: int, top_p: float
) -> Tensor:
    """Blocks [..., K], best first, with -1 from where the mass before a block reaches top_p of the
    whole.

    Args:
        mass: [..., K] of the blocks.
        candidate_mass: [..., 1] of all candidates. The softmax of every head of the group sums to
            one over all past blocks.
    """
    before = group - candidate_mass + mass.cumsum(-1) - mass
    return blocks.masked_fill(before >= top_p * group, -1)


def rank_keys(values: Tensor, blocks: Tensor) -> Tensor:
    """Order by rank value, then lower block, in one int64: README, Select. values: fp32; blocks:
    their ids, broadcast.
    """
    bits = values.contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31
    return (bits << 31) | (2**31 - 1 - blocks)


def block_of_key(keys: Tensor) -> Tensor:
    """[...] int64 keys -> block ids, -1 where there is none (key -1)."""
    return torch.where(keys >= 0, 2**31 - 1 - (keys & (2**31 - 1)), -1)


def value_of_key(keys: Tensor) -> Tensor:
    """The fp32 rank value that a key packs; meaningless where the key is -1."""
    bits = (keys.clamp_min(0) >> 31) - 2**31
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def shares(logits: Tensor, denominator: Tensor | None) -> Tensor:
    """Of the softmax over the last dimension of logits: under an estimate [..., 1] of its
    denominator's logarithm, where one is given, and then no larger than e^LARGEST.
    """
    if denominator is None:
        return logits.softmax(-1)
    return (logits - denominator).clamp_max(LARGEST).exp()


def choose_blocks(
    c: Tensor,
    kappa: Tensor | None,
    block: Tensor,
    sink_end: int,
    local: int,
    spec: SparseAttentionSpec,
    denominator: Tensor | None = None,
) -> Tensor:
    """Selected blocks [N, Hk, K] of one query a row, from the logits [N, Hk, G, E] of all its
    complete past blocks. denominator: as `shares` takes it.
    """
    value, mass = rank_values(c, kappa, shares(c, denominator), spec)
    packed = torch.where((block >= sink_end) & (block < local), rank_keys(value, block), -1)
    keys = packed.topk(min(spec.top_k, local - sink_end), -1).values
    chosen = block_of_key(keys)
    if spec.top_p is not None:
        candidates = mass[..., sink_end:local].sum(-1, keepdim=True)
        chosen = until_covered(
            chosen, mass.gather(-1, chosen.clamp_min(0)), candidates, c.shape[2], spec.top_p
        )
    return chosen


def union_counts(selected: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Of selected blocks [Hk, T, K], -1 for none: different ones among each `tile` queries in a
    row, and selected ones of one query of a tile, both summed over tiles and heads. Their ratio is
    the union factor: 1 is all alike, `tile` all different.
    """
    chosen = (
        F.pad(selected.long(), (0, 0, 0, -selected.shape[1] % tile), value=-1)
        .unflatten(1, (-1, tile))
        .flatten(2)
    )
    ordered = chosen.sort(-1).values
    fresh = (ordered >= 0) & (F.pad(ordered, (1, 0), value=-1)[..., :-1] != ordered)
    return fresh.sum(), (selected >= 0).sum() / tile
