"""Variable-size all-to-all of token rows, with its transpose as gradient. See README.md."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, input_splits: list[int], output_splits: list[int],
                group: Any) -> torch.Tensor:
        ctx.group, ctx.input_splits, ctx.output_splits = group, input_splits, output_splits
        received = rows.new_empty((sum(output_splits), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), output_splits, input_splits, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = grads
        grad_rows = grad.new_empty((sum(ctx.input_splits), *grad.shape[1:]))
        dist.all_to_all_single(grad_rows, grad.contiguous(), ctx.input_splits, ctx.output_splits, group=ctx.group)
        return grad_rows, None, None, None


def all_to_all_rows(rows: torch.Tensor, input_splits: list[int], output_splits: list[int], group: Any) -> torch.Tensor:
    """Send `input_splits[r]` consecutive rows to every rank r of the group and receive `output_splits[r]` from it.

    Args:
        rows: [sum(input_splits), ...], any floating dtype; rows are ordered by destination rank.
        input_splits, output_splits: rows per rank, host integers; zero is allowed on both sides.
        group: process group, or None for a single process (rows are returned as they are).

    Returns:
        [sum(output_splits), ...] ordered by source rank. The gradient travels the opposite way.

    Raises:
        ValueError: the splits do not add up to the number of rows.
    """
    if rows.shape[0] != sum(input_splits):
        raise ValueError(f"{rows.shape[0]} rows but input_splits {input_splits} sum to {sum(input_splits)}")
    if group is None:
        return rows
    return _AllToAllRows.apply(rows, input_splits, output_splits, group)


def exchange_counts(counts: torch.Tensor, group: Any) -> torch.Tensor:
    """Transpose a [ranks, ...] integer table over the group: row r of the result is what rank r holds for this rank."""
    if group is None:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received
