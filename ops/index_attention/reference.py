"""The definition in README.md, query by query. Differentiable by autograd; tiny sizes."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.index_attention.spec import IndexSpec
from ops.sparse_attention.reference import Reference as SparseReference
from ops.sparse_attention.reference import reference_attention as sparse_reference
from ops.sparse_attention.reference import reference_blocks
from ops.sparse_attention.spec import SparseAttentionSpec


class Reference(NamedTuple):
    """out [T, H, d]; divergence [T], the mean over the choices of a token; recall [T], likewise;
    chosen [choices, T, T] bool, what a query attends to.
    """

    out: Tensor
    divergence: Tensor
    recall: Tensor
    chosen: Tensor


def token_scores(query: Tensor, keys: Tensor, weights: Tensor | None, spec: IndexSpec) -> Tensor:
    """Of one query for index keys: query [I, w], keys [n, w], weights [I] -> [choices, n]."""
    products: Tensor = query @ keys.T
    heads, width = query.shape
    if spec.rule == "msa":
        return products / math.sqrt(width)
    products = products.relu()
    if weights is not None:
        products = products * weights[:, None]
    return products.sum(0, keepdim=True) / math.sqrt(heads * width)


def best(scores: Tensor, count: int) -> list[int]:
    """Places of the largest of [n] scores, equal ones (in fp32) from the first on."""
    found: list[int] = scores.detach().float().argsort(descending=True, stable=True).tolist()
    return found[:count]


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    index_weights: Tensor | None,
    bounds: list[int],
    spec: IndexSpec,
    dense: bool = False,
) -> Reference:
    """q [T, H, d]; k, v [T, Hk, d]; index_queries [T, I, w], index_keys [T, w] (rule=qsa: [M, w] of
    complete blocks), index_weights [T, I] with rule=dsa. dense: everything is chosen.
    """
    heads, kv_heads, size = q.shape[1], k.shape[1], spec.block_size
    choices = kv_heads if spec.by_head else 1
    outs, divergences, recalls = [], [], []
    chosen = torch.zeros(choices, len(q), len(q), dtype=torch.bool)
    first_key = 0
    for begin, end in itertools.pairwise(bounds):
        for t in range(begin, end):
            # Blocks that have a score, as lists of tokens, and what is seen whatever the scores.
            seen = list(range(begin, t + 1))
            blocks = [seen[i : i + size] for i in range(0, len(seen), size)]
            always: list[int] = []
            if spec.pools_keys and len(blocks[-1]) < size:
                always = blocks.pop()
            weights = None if index_weights is None else index_weights[t]
            if spec.pools_keys:
                keys = index_keys[first_key : first_key + len(blocks)]
                scores = token_scores(index_queries[t], keys, weights, spec)
            else:
                by_token = token_scores(index_queries[t], index_keys[seen], weights, spec)
                scores = torch.stack(
                    [by_token[:, [j - begin for j in b]].amax(1) for b in blocks], 1
                )

            out, whole = [], []
            for head in range(heads):
                logits = (k[seen, head * kv_heads // heads] @ q[t, head]) * q.shape[2] ** -0.5
                whole.append(logits.softmax(0))
            divergence, recall = [], []
            for choice in range(choices):
                ranked = scores[choice].clone()
                if spec.rule == "msa":
                    ranked[-1] = torch.inf
                taken = sorted(best(ranked, len(blocks) if dense else spec.top_k))
                tokens = sorted([j for b in taken for j in blocks[b]] + always)
                chosen[choice, t, tokens] = True
                places = [j - begin for j in tokens]
                own = [
                    h for h in range(heads) if not spec.by_head or h * kv_heads // heads == choice
                ]
                mass = q.new_zeros(len(blocks))
                for head in own:
                    share = whole[head][places] / whole[head][places].sum()
                    out.append(share @ v[tokens, head * kv_heads // heads])
                    for b in taken:
                        inside = [tokens.index(j) for j in blocks[b]]
                        mass[b] = mass[b] + share[inside].sum().detach()
                recall.append(torch.stack([whole[h][places].sum().detach() for h in own]).mean())
                if not taken:
                    divergence.append(q.new_zeros(()))
                    continue
                target = mass[taken] / mass[taken].sum()
                student = scores[choice][taken].log_softmax(0)
                divergence.append((target * (target.log() - student)).sum())
            outs.append(torch.stack(out))
            divergences.append(torch.stack(divergence).mean())
            recalls.append(torch.stack(recall).mean())
        first_key += (end - begin) // size
    return Reference(torch.stack(outs), torch.stack(divergences), torch.stack(recalls), chosen)


class Within(NamedTuple):
    """attention: of the op; divergence [T], the mean over key/value heads; chosen [Hk, T, M] bool,
    what the index chooses.
    """

    attention: SparseReference
    divergence: Tensor
    chosen: Tensor


def reference_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    bounds: list[int],
    spec: SparseAttentionSpec,
    by_index: bool = True,
    **options: Any,
) -> Within:
    """Sparse attention that an index chooses for (by_index), or that still selects by mass, and
    what either teaches the index.

    Args:
        q: [T, H, d]; k, v: [T, Hk, d]; index_queries: [T, Hk, w]; index_keys: [T, w].
        options: bias, sink and pool_logits of reference_attention.
    """
    cu_seqlens, kv_heads = torch.tensor(bounds), k.shape[1]
    blocks = reference_blocks(cu_seqlens, spec.block_size)
    chosen = torch.zeros(kv_heads, len(q), len(blocks.start), dtype=torch.bool)
    scores: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
    for t, own in enumerate(blocks.of_token.tolist()):
        first = int(blocks.first[own])
        local = max(first, own - spec.num_local_blocks + 1)
        if (own - first) * spec.block_size < spec.min_sparse_length:
            local = first
        among = list(range(min(first + spec.num_sink_blocks, local), local))
        for head in range(kv_heads):
            by_block = [
                (index_keys[blocks.start[m] : blocks.end[m]] @ index_queries[t, head]).amax()
                / math.sqrt(index_keys.shape[1])
                for m in among
            ]
            if not by_block:
                continue
            scores[t, head] = among, torch.stack(by_block)
            taken = best(scores[t, head][1], spec.top_k)
            chosen[head, t, [among[i] for i in taken]] = True

    given = chosen if by_index else None
    attention = sparse_reference(q, k, v, cu_seqlens, spec, selected=given, **options)
    r = spec.entries_per_block
    by_entry = attention.entry_probs.detach().sum(2).unflatten(-1, (-1, r)).sum(-1)
    by_token = attention.token_probs.detach().sum(2)
    divergence = []
    for t in range(len(q)):
        parts = [q.new_zeros(())]
        for head in range(kv_heads):
            if (t, head) not in scores:
                continue
            among, found = scores[t, head]
            mass = torch.stack(
                [
                    by_entry[head, t, m] + by_token[head, t, blocks.start[m] : blocks.end[m]].sum()
                    for m in among
                ]
            )
            target, student = mass / mass.sum(), found.log_softmax(0)
            parts.append((target * (target.log() - student)).sum())
        divergence.append(torch.stack(parts).sum() / kv_heads)
    return Within(attention, torch.stack(divergence), chosen)
