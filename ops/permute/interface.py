"""Token rows into expert order and back, without float atomics. See README.md.

Shape letters: T tokens, K slots per token (top-k), A assignments in use (A <= T*K), D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch


def group_by_expert(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order the assignments by (expert id, token, slot).

    Args:
        expert_ids: [T, K] int64; -1 marks an unused slot.

    Returns:
        slots: [A] int64, flat indices into [T*K], sorted by expert id and, within one expert, by token and slot.
        counts: [E] int64, assignments per expert; A = counts.sum().

    Raises:
        ValueError: an id lies outside -1 .. num_experts-1 (checked on CPU tensors only: no device sync).
    """
    flat = expert_ids.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= num_experts):
        raise ValueError(f"expert ids span {int(flat.min())}..{int(flat.max())}; expected -1..{num_experts - 1}")
    keys = torch.where(flat < 0, num_experts, flat)  # unused slots sort last
    slots = torch.sort(keys, stable=True).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, keys, torch.ones_like(keys))
    num_assignments = flat.numel() - int(counts[-1])
    return slots[:num_assignments], counts[:-1]


class _Permute(torch.autograd.Function):
    """rows = tokens[slots // K]. The native gradient is an atomic scatter-add; this one sums slots in order."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, slots: torch.Tensor, slots_per_token: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.num_tokens, ctx.slots_per_token = tokens.shape[0], slots_per_token
        return tokens.index_select(0, slots // slots_per_token)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        (slots,) = ctx.saved_tensors
        by_slot = grad.new_zeros((ctx.num_tokens * ctx.slots_per_token, *grad.shape[1:]))
        by_slot[slots] = grad
        return by_slot.view(ctx.num_tokens, ctx.slots_per_token, *grad.shape[1:]).sum(1), None, None


def permute(tokens: torch.Tensor, slots: torch.Tensor, slots_per_token: int) -> torch.Tensor:
    """Copy each token's row to the places of its assignments.

    Args:
        tokens: [T, D] floating; slots: [A] int64 from `group_by_expert`; slots_per_token: K.

    Returns:
        [A, D] rows in expert order.
    """
    return _Permute.apply(tokens, slots, slots_per_token)


def unpermute(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows, in slot order.

    Args:
        rows: [A, D] in expert order; slots: [A] int64; weights: [T, K] gates, 0 where unused.

    Returns:
        [T, D] in the dtype of `rows`; tokens without assignments get zeros.
    """
    num_tokens, slots_per_token = weights.shape
    by_slot = rows.new_zeros((num_tokens * slots_per_token, rows.shape[1])).index_copy(0, slots, rows)
    by_slot = by_slot.view(num_tokens, slots_per_token, rows.shape[1])
    return (by_slot * weights.to(rows.dtype).unsqueeze(-1)).sum(1)
