"""What one tile of queries computes: scores, the choice, the attention, the divergence. Batched, so
that training (a document at a time) and decoding (a row of the cache each) are one definition.

Shape letters: b rows, Q queries, N keys, H heads, Hk key/value heads, G = H / Hk, C choices (Hk
with rule=msa, else 1), I index heads, w their width, M blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.index_attention.spec import IndexSpec
from ops.sparse_attention.ranking import block_of_key, rank_keys

NEVER = float("-inf")


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def own_graph(learns: bool) -> Iterator[None]:
    """Gradients, if it learns, of a graph that is gone before its op has returned.

    What it keeps is kept as it is. Hooks that are there when blocks are to be computed again
    (torch.utils.checkpoint) would compute the whole block for every such graph: as often as a rank
    has tiles, so that under ZeRO 3 ranks would wait for each other's weights forever.
    """
    with (
        torch.set_grad_enabled(learns),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield


def block_scores(
    queries: Tensor, keys: Tensor, weights: Tensor | None, position: Tensor, spec: IndexSpec
) -> Tensor:
    """Scores of blocks, -inf of those that a query may not choose; differentiable.

    Args:
        queries: [b, Q, I, w]; keys: [b, n, w] of the tokens, or with rule=qsa of the complete
            blocks, of each row's document; weights: [b, Q, I] with rule=dsa; all of one dtype.
        position: [b, Q] int64 of the queries in their documents.

    Returns:
        [b, C, Q, M].
    """
    heads, width = queries.shape[2:]
    products = torch.einsum("bqiw,bnw->biqn", queries, keys)
    place = torch.arange(keys.shape[1], device=keys.device)
    if spec.pools_keys:
        seen = place < ((position + 1) // spec.block_size).unsqueeze(-1)
    else:
        seen = place <= position.unsqueeze(-1)
    seen = seen.unsqueeze(1)

    if spec.rule != "msa":
        products = products.relu()
        if weights is not None:
            products = products * weights.transpose(1, 2).unsqueeze(-1)
        scores: Tensor = products.sum(1, keepdim=True) * float(heads * width) ** -0.5
        return scores.masked_fill(~seen, NEVER)
    tokens = (products * width**-0.5).masked_fill(~seen, NEVER)
    missing = -tokens.shape[-1] % spec.block_size
    blocks: Tensor = F.pad(tokens, (0, missing), value=NEVER).unflatten(-1, (-1, spec.block_size))
    return blocks.max(-1).values


def choose(scores: Tensor, position: Tensor, spec: IndexSpec) -> Tensor:
    """The best blocks of every query, [b, C, Q, K] int64, falling, -1 where there are no more;
    equal scores (in fp32) go to the lower block. scores: as block_scores gives them.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    values = ranked(scores, position, spec)
    keys = rank_keys(values, block).masked_fill(values == NEVER, -1)
    return block_of_key(keys.topk(min(spec.top_k, keys.shape[-1]), -1).values)


def ranked(scores: Tensor, position: Tensor, spec: IndexSpec) -> Tensor:
    """What blocks are chosen by, fp32: their scores, and with rule=msa no end of it for a query's
    own. scores: [b, C, Q, M]; position: [b, Q].
    """
    # relu makes zeros, of either sign: plus zero there is one
    values = scores.detach().float() + 0.0
    if spec.rule == "msa":
        block = torch.arange(scores.shape[-1], device=scores.device)
        own = block == (position // spec.block_size).unsqueeze(-1)
        values = values.masked_fill(own.unsqueeze(1), torch.inf)
    return values


def blocks_mask(chosen: Tensor, num_blocks: int) -> Tensor:
    """[..., K] ids, -1 for none -> [..., num_blocks] bool."""
    mask = chosen.new_zeros((*chosen.shape[:-1], num_blocks + 1), dtype=torch.bool)
    mask.scatter_(-1, torch.where(chosen < 0, num_blocks, chosen.long()), True)
    return mask[..., :-1]


def tokens_mask(blocks: Tensor | None, position: Tensor, num_keys: int, spec: IndexSpec) -> Tensor:
    """[b, C or 1, Q, N] bool: the tokens that are attended to. blocks: [b, C, Q, M] bool, those
    that were chosen; None: all that a query may see.
    """
    token = torch.arange(num_keys, device=position.device)
    causal = (token <= position.unsqueeze(-1)).unsqueeze(1)
    if blocks is None:
        return causal
    spread = blocks.repeat_interleave(spec.block_size, -1)[..., :num_keys]
    spread = F.pad(spread, (0, num_keys - spread.shape[-1]))
    if spec.pools_keys:
        complete = (position + 1) // spec.block_size * spec.block_size
        spread = spread | (token >= complete.unsqueeze(-1)).unsqueeze(1)
    return spread & causal


class Attended(NamedTuple):
    """Of one tile."""

    out: Tensor
    """[b, Q, Hk, G, d]."""
    probs: Tensor
    """[b, Hk, G, Q, N]."""
    lse: Tensor
    """[b, Hk, G, Q], logarithm of the softmax's denominator."""


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Attended:
    """q [b, Q, Hk, G, d], k and v [b, N, Hk, d], seen [b, C or 1, Q, N] bool with something in
    every row.
    """
    logits = torch.einsum("bqhgd,bnhd->bhgqn", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(2), NEVER)
    lse = logits.logsumexp(-1)
    probs = (logits - lse.unsqueeze(-1)).exp()
    return Attended(torch.einsum("bhgqn,bnhd->bqhgd", probs, v), probs, lse)


def block_masses(probs: Tensor, num_blocks: int, spec: IndexSpec) -> Tensor:
    """[b, C, Q, M]: the softmax's mass of every block that has a score, summed over heads that
    share a choice. probs: [b, Hk, G, Q, N].
    """
    mass = probs.sum(2)
    if not spec.by_head:
        mass = mass.sum(1, keepdim=True)
    size = spec.block_size
    if mass.shape[-1] < num_blocks * size:
        mass = F.pad(mass, (0, num_blocks * size - mass.shape[-1]))
    blocks: Tensor = mass[..., : num_blocks * size].unflatten(-1, (num_blocks, size))
    return blocks.sum(-1)


def divergence(scores: Tensor, masses: Tensor, chosen: Tensor) -> Tensor:
    """KL(mass || softmax of the scores) in nats over the chosen blocks: [b, C, Q], 0 where none is
    chosen. Gradients reach the scores alone. scores, masses: [b, C, Q, M]; chosen: likewise, bool.
    """
    # Of the joint softmax: heads weigh by what they gave, and what went to tokens without a score
    # is not put back (Primus #992 and Megatron-LM #5776 had it otherwise).
    masses = torch.where(chosen, masses.detach(), 0.0)
    total = masses.sum(-1, keepdim=True)
    target = masses / total.clamp_min(torch.finfo(masses.dtype).tiny)

    # A row without a choice would have the logarithm of 0: its scores are 0, and so is its weight.
    nothing = ~chosen.any(-1, keepdim=True)
    student = scores.masked_fill(~chosen, NEVER).masked_fill(nothing, 0.0).log_softmax(-1)
    own = torch.where(target > 0, target, 1.0).log()
    return torch.where(target > 0, target * (own - student), 0.0).sum(-1)
