"""Token rows into expert order and back, without float atomics. See README.md.

Shape letters: T tokens, K slots per token (top-k), P places in expert order, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def group_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the assignments by (expert id, token, slot). Nothing visits the host.

    Args:
        expert_ids: [T, K] integers; -1 marks an unused slot.

    Returns:
        slots [T * K], inverse [T, K] and offsets [E + 1] int32, as in ops.router.RouterOutput.

    Raises:
        ValueError: an id lies outside -1 .. num_experts-1 (checked on CPU tensors only: no device
            sync).
    """
    flat = expert_ids.reshape(-1)
    if (
        flat.device.type == "cpu"
        and flat.numel()
        and (int(flat.min()) < -1 or int(flat.max()) >= num_experts)
    ):
        raise ValueError(
            f"expert ids span {int(flat.min())}..{int(flat.max())}; expected -1..{num_experts - 1}"
        )

    # Nothing but a stable sort: tokens keep their order within an expert.
    keys = torch.where(flat < 0, num_experts, flat)  # unused slots sort last
    ordered, order = torch.sort(keys, stable=True)
    places = torch.arange(len(flat), device=flat.device)
    inverse = torch.empty_like(order).scatter_(0, order, places)

    bounds = torch.arange(num_experts + 1, device=flat.device, dtype=ordered.dtype)
    offsets = torch.searchsorted(ordered, bounds)
    return (
        torch.where(ordered < num_experts, order, -1).int(),
        torch.where(flat < 0, -1, inverse).int().view(expert_ids.shape),
        offsets.int(),
    )


def gather_rows(tokens: Tensor, slots: Tensor, slots_per_token: int) -> Tensor:
    """tokens[slots // K]: [T, D], [P] -> [P, D]. Places without an assignment (-1) get some row of
    it.
    """
    if len(tokens) == 0:
        return tokens.new_zeros((len(slots), *tokens.shape[1:]))
    return tokens.index_select(0, slots.clamp_min(0).long() // slots_per_token)


def sum_rows(rows: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """sum_k weights[t, k] * rows[inverse[t, k]] in slot order, summed in fp32 (fp64 for fp64): [P,
    D], [T, K] -> [T, D].

    weights None: 1. Rows that no slot points at are never read.
    """
    real = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = rows.new_zeros((len(inverse), rows.shape[1]), dtype=real)
    if len(rows) == 0:
        return out.to(rows.dtype)
    for k in range(inverse.shape[1]):
        place, unused = inverse[:, k].clamp_min(0).long(), inverse[:, k : k + 1] < 0
        found = rows.index_select(0, place).to(real).masked_fill_(unused, 0.0)
        out = out.add_(found) if weights is None else out.addcmul_(found, weights[:, k : k + 1])
    return out.to(rows.dtype)


class _Permute(torch.autograd.Function):
    """The native gradient of a gather is an atomic scatter-add; this one sums slots in order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return gather_rows(tokens, slots, inverse.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return sum_rows(grads[0], inverse, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.slots_per_token = inverse.shape[1]
        return sum_rows(rows, inverse, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gather_rows(grads[0], slots, ctx.slots_per_token), None, None


def permute(tokens: Tensor, slots: Tensor, inverse: Tensor) -> Tensor:
    """Copy each token's row to the places of its assignments.

    Args:
        tokens: [T, D] floating; slots: [P] integers, t * K + k of the assignment at each place, -1
            for none.
        inverse: [T, K], the place of each assignment, -1 for none.

    Returns:
        [P, D]. What stands at places without an assignment is arbitrary but finite where the tokens
        are.
    """
    rows: Tensor = _Permute.apply(tokens, slots, inverse)  # type: ignore[no-untyped-call]
    return rows


def unpermute(rows: Tensor, slots: Tensor, inverse: Tensor) -> Tensor:
    """Sum of each token's rows, in slot order and in fp32; the transpose of `permute`.

    Returns:
        [T, D] in the dtype of `rows`; tokens without assignments get zeros.
    """
    tokens: Tensor = _Unpermute.apply(rows, slots, inverse)  # type: ignore[no-untyped-call]
    return tokens
