"""Who sends how many rows to whom: one exchange over a group, or two, within nodes and then between
them.

Between nodes a rank then talks to one rank of every other node instead of to all of them, with
messages as many times larger as a node has ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Hop:
    """One all-to-all.

    group: None is the default group; without torch.distributed, this process alone.
    send, receive: rows to and from each rank of the group.
    order: rows are taken in this order before they leave ([R] int64; None: as they stand).
    """

    group: Any
    send: list[int]
    receive: list[int]
    order: Tensor | None = None


Path = tuple[Hop, ...]
"""Hops one after another; the last one is the slow one, which overlaps with other work."""


@dataclass(frozen=True)
class NodeGroups:
    """The two axes of an expert group whose rank r is rank r % ranks_per_node of node r //
    ranks_per_node.

    within: the ranks of this node; between: the ranks with this one's place on all nodes.
    """

    within: Any
    between: Any
    ranks_per_node: int
    num_nodes: int


def exchange_counts(counts: Tensor, group: Any) -> Tensor:
    """Transpose a [ranks, ...] integer table over the group: row r of the result is what rank r
    holds for this rank.
    """
    if group is None:
        return counts
    counts = counts.contiguous()
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received


def exchange_node_counts(send: Tensor, nodes: NodeGroups) -> Tensor:
    """send [ranks, ...], rows for every rank of the group -> [ranks_per_node, num_nodes, ...]: rows
    that each rank of this node has for the ranks with this one's place, by node.
    """
    return exchange_counts(
        send.unflatten(0, (nodes.num_nodes, nodes.ranks_per_node)).transpose(0, 1), nodes.within
    )


def node_path(
    send: list[int],
    receive: list[int],
    node_counts: list[list[int]],
    nodes: NodeGroups,
    device: torch.device,
) -> Path:
    """The path of rows sorted by destination rank, which arrive sorted by source rank: the same as
    over one hop.

    send, receive: rows to and from every rank; node_counts: of exchange_node_counts.
    """
    size, num_nodes = nodes.ranks_per_node, nodes.num_nodes
    table = [send[n * size : (n + 1) * size] for n in range(num_nodes)]
    first = Hop(
        nodes.within,
        [sum(row[j] for row in table) for j in range(size)],
        [sum(row) for row in node_counts],
        transposed_order(table, device),
    )
    second = Hop(
        nodes.between,
        [sum(row[n] for row in node_counts) for n in range(num_nodes)],
        [sum(receive[n * size : (n + 1) * size]) for n in range(num_nodes)],
        transposed_order(node_counts, device),
    )
    return first, second


def transposed_order(sizes: list[list[int]], device: torch.device) -> Tensor:
    """[R] int64: rows that stand in blocks (a, b), block by block, in the order (b, a).
    sizes[a][b]: rows of a block.
    """
    table = torch.tensor(sizes, dtype=torch.int64)
    starts = (table.flatten().cumsum(0) - table.flatten()).view_as(table)
    lengths, total = table.T.flatten(), int(table.sum())
    shift = starts.T.flatten() - (lengths.cumsum(0) - lengths)
    return torch.arange(total, device=device) + torch.repeat_interleave(
        shift, lengths, output_size=total
    ).to(device)
