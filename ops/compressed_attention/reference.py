"""The definition, query by query, in the dtype of its inputs; differentiable by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.compressed_attention.spec import CompressedSpec


class Reference(NamedTuple):
    """What the definition gives."""

    out: Tensor
    """[T, H, c]."""
    divergence: Tensor
    """[T]."""
    recall: Tensor
    """[T], NaN of queries that see no entry."""
    chosen: Tensor
    """[T, M] bool."""


def reference_pool(
    content: Tensor,
    gates: Tensor,
    slot_bias: Tensor,
    bounds: Sequence[int],
    size: int,
    overlap: bool,
) -> Tensor:
    """Entries [M, w], channel by channel a mean under a softmax. content, gates: [T, p w]."""
    width = content.shape[1] // (2 if overlap else 1)
    entries = []
    for begin, end in itertools.pairwise(bounds):
        for start in range(begin, end - size + 1, size):
            values, logits = [], []
            if overlap and start > begin:
                for slot in range(size):
                    token = start - size + slot
                    values.append(content[token, :width])
                    logits.append(gates[token, :width] + slot_bias[slot, :width])
            for slot in range(size):
                values.append(content[start + slot, -width:])
                logits.append(gates[start + slot, -width:] + slot_bias[slot, -width:])
            weights = torch.stack(logits).softmax(0)
            entries.append((weights * torch.stack(values)).sum(0))
    return torch.stack(entries) if entries else content.new_zeros(0, width)


def reference_attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    index_queries: Tensor | None,
    index_keys: Tensor | None,
    index_weights: Tensor | None,
    sinks: Tensor,
    bounds: Sequence[int],
    spec: CompressedSpec,
    dense: bool = False,
    given: Tensor | None = None,
) -> Reference:
    """q [T, H, c], kv [T, c], entries [M, c]; index_queries [T, I, w], index_keys [M, w],
    index_weights [T, I] where spec.top_k is set. dense: everything is chosen. given: [T, K], what
    is chosen by another layer, numbered within documents, -1 for none.
    """
    outs, divergences, recalls = [], [], []
    chosen = torch.zeros(len(q), 0 if entries is None else len(entries), dtype=torch.bool)
    first = 0
    for begin, end in itertools.pairwise(bounds):
        for t in range(begin, end):
            window = kv[max(begin, t - spec.window + 1) : t + 1]
            closed = (t - begin + 1) // spec.ratio if spec.ratio else 0
            places = list(range(first, first + closed))
            taken, scores = places, None
            if index_queries is not None and closed:
                assert index_keys is not None and index_weights is not None
                products = (index_queries[t] @ index_keys[places].T).relu()
                scores = (index_weights[t] @ products) * index_queries[t].numel() ** -0.5
                value = scores.tolist()
                eligible: Sequence[int] = range(closed)
                if spec.top_k_blocks is not None:
                    size = spec.index_block_size
                    blocks = [eligible[j : j + size] for j in eligible[::size]]
                    blocks.sort(key=lambda block: (-max(value[j] for j in block), block[0]))
                    eligible = [j for block in blocks[: spec.top_k_blocks] for j in block]
                order = sorted(eligible, key=lambda j: (-value[j], j))
                best = sorted(order[: spec.top_k])
                if given is not None:
                    best = sorted(j for j in given[t].tolist() if j >= 0)
                if not dense:
                    taken = [first + j for j in best]
            chosen[t, taken] = True

            def attended(to: list[int], t: int = t, window: Tensor = window) -> tuple[Tensor, ...]:
                columns = window if entries is None else torch.cat((window, entries[to]))
                logits = (q[t] @ columns.T) * q.shape[2] ** -0.5
                shares = torch.cat((logits, sinks.unsqueeze(1)), 1).softmax(1)[:, :-1]
                return shares @ columns, shares[:, len(window) :].sum(0).detach()

            out, masses = attended(taken)
            outs.append(out)
            if scores is None:
                divergences.append(q.new_zeros(()))
                recalls.append(q.new_tensor(torch.nan))
                continue
            everything = attended(places)[1]
            recalls.append(everything[best].sum() / everything.sum())
            target = masses / masses.sum()
            student = scores[[j - first for j in taken]].log_softmax(0)
            divergences.append((target * (target.log() - student)).sum())
        first += (end - begin) // spec.ratio if spec.ratio else 0
    return Reference(torch.stack(outs), torch.stack(divergences), torch.stack(recalls), chosen)
