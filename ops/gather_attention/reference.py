"""The definition, query by query, in the dtype of its inputs; differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.gather_attention.problem import Gather, Lookup


def reference_gather(problem: Gather) -> tuple[Tensor, Tensor, Tensor]:
    """(out [T, H, d], lse [T, H], masses [C, T, K]): the attended values, the logarithm of the
    softmax's denominator, and what it gave to every chosen span, summed over the heads that share
    the choice. A row that sees nothing has zeros and -inf.
    """
    q, k, v, chosen, base, span, own_row, window_start, sink, first_spans = problem
    values = k if v is None else v
    (num_tokens, num_heads, dim), kv_heads = q.shape, k.shape[1]
    if chosen is None:
        most = 0 if first_spans is None else int(first_spans.max()) if num_tokens else 0
        number = torch.arange(most).expand(1, num_tokens, -1)
        chosen = number if first_spans is None else number.where(number < first_spans[:, None], -1)
    choices = len(chosen)
    masses = q.new_zeros(chosen.shape)
    outs, lses = [], []
    for t in range(num_tokens):
        for head in range(num_heads):
            kv_head = head * kv_heads // num_heads
            choice = kv_head if choices > 1 else 0
            own, slots, rows = own_row + t, list[int](), list[int]()
            for slot, number in enumerate(chosen[choice, t].tolist()):
                first = int(base[t]) + span * number
                new = range(first, min(first + span, own + 1)) if number >= 0 else ()
                rows += new
                slots += [slot] * len(new)
            if window_start is not None:
                rows += range(int(window_start[t]), own + 1)
            assert len(set(rows)) == len(rows), f"query {t} sees a row twice"

            logits = k[rows, kv_head] @ q[t, head] * dim**-0.5
            sunk = q.new_empty(0) if sink is None else sink[head : head + 1].to(q.dtype)
            lse = torch.cat((logits, sunk)).logsumexp(0)
            probs = (logits - lse).exp()
            outs.append(probs @ values[rows, kv_head])
            lses.append(lse)
            at = torch.tensor(slots, dtype=torch.int64)
            masses[choice, t].index_add_(0, at, probs[: len(slots)].detach())
    shape = (num_tokens, num_heads)
    if not outs:
        return q * 1, q.new_zeros(shape), masses
    return torch.stack(outs).view(*shape, dim), torch.stack(lses).view(shape), masses


def reference_lookup(problem: Lookup) -> Tensor:
    """[T, H, d]; a query that sees nothing has zeros."""
    q, sources, sink = problem
    num_tokens, num_heads, dim = q.shape
    out = torch.zeros_like(q)
    for t in range(num_tokens):
        for head in range(num_heads):
            logits, values = [q.new_empty(0)], [q.new_zeros(0, dim)]
            for k, v, rows in sources:
                kv_head = head * k.shape[1] // num_heads
                listed = rows[kv_head if len(rows) > 1 else 0, t]
                listed = listed[listed >= 0].long()
                logits.append(k[listed, kv_head] @ q[t, head] * dim**-0.5)
                values.append((k if v is None else v)[listed, kv_head])
            if sink is not None:
                logits.append(sink[head : head + 1].to(q.dtype))
                values.append(q.new_zeros(1, dim))
            if len(torch.cat(logits)):
                out[t, head] = torch.cat(logits).softmax(0) @ torch.cat(values)
    return out
