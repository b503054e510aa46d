"""The definition of the token permutation: plain loops over assignments."""

from __future__ import annotations

import torch


def reference_permute(
    tokens: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """tokens [T, D], expert_ids [T, K] (-1 unused) -> rows [A, D] sorted by (expert, token,
    slot).
    """
    order = [
        (int(e), t, k) for t, row in enumerate(expert_ids) for k, e in enumerate(row) if e >= 0
    ]
    rows = [tokens[t] for _, t, _ in sorted(order)]
    return torch.stack(rows) if rows else tokens.new_zeros((0, tokens.shape[1]))


def reference_unpermute(
    rows: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """rows [A, D] in expert order, expert_ids and weights [T, K] -> [T, D], the weighted sum per
    token.
    """
    order = sorted(
        (int(e), t, k) for t, row in enumerate(expert_ids) for k, e in enumerate(row) if e >= 0
    )
    out = [rows.new_zeros(rows.shape[1]) for _ in range(expert_ids.shape[0])]
    for row, (_, t, k) in zip(rows, order, strict=True):
        out[t] = out[t] + weights[t, k] * row
    return torch.stack(out) if out else rows.new_zeros((0, rows.shape[1]))
