"""From measured loads to a placement (docs/placement.md). numpy only, no torch.

Shape letters: E experts, R ranks, L = E / R owned by each, M nodes, C = R * (L + replicas_per_rank)
copies, N rows of loads. A copy of an expert with n copies has 1 / n of its load, as the dispatcher
lets them take turns.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Sequence

import numpy as np

from model.placement.record import LayerPlacement

TOLERANCE = 0.02
"""How far the busiest rank may rise, over the best found, to bring co-activated experts onto one
node. Never above what experts in order have, unless replicas are asked for.
"""
MAX_PASSES = 50
ROUNDING = 1e-9
"""A swap must gain this share of the whole, or it is rounding."""
Numbers = np.ndarray | Sequence[float] | Sequence[Sequence[float]]


# --- what a placement costs -----------------------------------------------------------------------


def copy_shares(layer: LayerPlacement) -> np.ndarray:
    """[E, R] float64: the share of each expert's assignments that each rank gets."""
    num_experts, ranks = len(layer.experts), len(layer.replicas)
    shares = np.zeros((num_experts, ranks))
    shares[list(layer.experts), np.arange(num_experts) // (num_experts // ranks)] = 1
    for rank, lent in enumerate(layer.replicas):
        shares[list(lent), rank] = 1
    normalised: np.ndarray = shares / shares.sum(1, keepdims=True)
    return normalised


def rank_loads(loads: Numbers, layer: LayerPlacement) -> np.ndarray:
    """Assignments by expert [.., E] -> by rank [.., R] float64."""
    by_rank: np.ndarray = np.asarray(loads, dtype=np.float64) @ copy_shares(layer)
    return by_rank


def imbalance(loads: Numbers, layer: LayerPlacement) -> float:
    """Load of the busiest rank over the mean rank's, 1 being perfect.

    loads: [E], or [N, E] of N intervals: then the busiest rank of every interval counts, as each of
        them waits for its own.
    """
    by_rank = rank_loads(loads, layer)
    mean = by_rank.mean(-1).sum()
    return float(by_rank.max(-1).sum() / mean) if mean > 0 else 1.0


def node_crossings(together: Numbers, layer: LayerPlacement, ranks_per_node: int) -> float:
    """The share of co-activated pairs on different nodes: of all pairs of different experts that a
    token visits, how many lie on two nodes. A proxy for the nodes a token must reach. Copies of an
    expert count by their share of its load.

    together: [E, E], tokens that visit both experts; the diagonal is not read.
    """
    pairs = _pairs(together)
    by_node = copy_shares(layer).reshape(len(pairs), -1, ranks_per_node).sum(2)
    total = pairs.sum()
    return float(1 - (pairs * (by_node @ by_node.T)).sum() / total) if total > 0 else 0.0


def _pairs(together: Numbers) -> np.ndarray:
    """Symmetric, with a diagonal of zeros."""
    pairs = np.asarray(together, dtype=np.float64)
    pairs = (pairs + pairs.T) / 2
    np.fill_diagonal(pairs, 0)
    return pairs


# --- the plan -------------------------------------------------------------------------------------


def plan_layer(
    loads: Numbers,
    num_ranks: int,
    *,
    ranks_per_node: int | None = None,
    replicas_per_rank: int = 0,
    together: Numbers | None = None,
) -> LayerPlacement:
    """A placement of one layer's experts that levels the ranks. The same arguments give the same
    placement.

    The idea of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, MIT): copies for the experts with most
    load per copy, then pack the largest first; here followed by swaps, and by swaps between nodes
    where `together` says which experts meet.

    loads: [E] assignments by expert. together: [E, E] tokens that visit both experts, read if there
        are several nodes of ranks_per_node ranks. replicas_per_rank: experts every rank serves
        besides its own; all slots are filled, useful or not.

    Without replicas the busiest rank never has more than with experts in order.

    Raises:
        ValueError: sizes that do not divide, more replicas than there are other experts, or loads
            that are no loads.
    """
    load = np.asarray(loads, dtype=np.float64)
    in_order = LayerPlacement.identity(len(load), num_ranks)
    _check(load, num_ranks, ranks_per_node, replicas_per_rank, together)
    if num_ranks == 1:
        return in_order

    # Two starts: the experts where they are, and from nothing.
    own = len(load) // num_ranks
    copies = _num_copies(load, num_ranks, replicas_per_rank)
    owners = np.arange(len(load)) // own
    drafts = [
        _Draft(load, num_ranks, replicas_per_rank, copies, owners),
        _Draft(load, num_ranks, replicas_per_rank, copies),
    ]
    # the first of equals: stay where you are
    best = min(drafts, key=lambda draft: draft.level().load.max())

    # Between nodes, a little balance is given up for tokens that stay on their node; without
    # replicas never so much that the busiest rank has more than in order.
    in_order_load = rank_loads(load, in_order).max()
    if ranks_per_node is not None and ranks_per_node < num_ranks and together is not None:
        busiest = best.load.max()
        limit = busiest * (1 + TOLERANCE)
        if replicas_per_rank == 0:
            limit = max(busiest, min(limit, in_order_load))
        best = _gathered(best, _pairs(together), ranks_per_node, limit)
    plan = best.placement()
    # by rounding
    if replicas_per_rank == 0 and rank_loads(load, plan).max() > in_order_load:
        return in_order
    return plan


def _check(
    load: np.ndarray,
    num_ranks: int,
    ranks_per_node: int | None,
    replicas_per_rank: int,
    together: Numbers | None,
) -> None:
    if load.ndim != 1 or not np.isfinite(load).all() or (load < 0).any():
        raise ValueError("loads must be one finite number per expert, none negative")
    if ranks_per_node is not None and (
        ranks_per_node < 1 or (ranks_per_node < num_ranks and num_ranks % ranks_per_node)
    ):
        raise ValueError(
            f"ranks_per_node {ranks_per_node} does not divide expert_parallel_size {num_ranks}"
        )
    others = len(load) - len(load) // num_ranks
    if not 0 <= replicas_per_rank <= others:
        raise ValueError(
            f"replicas_per_rank is {replicas_per_rank}; it must be from 0 to {others}, the experts "
            "a rank does not own"
        )
    if together is not None and np.shape(together) != (len(load), len(load)):
        raise ValueError(
            f"together has shape {np.shape(together)}; it must be [{len(load)}, {len(load)}]"
        )


def _num_copies(load: np.ndarray, num_ranks: int, replicas_per_rank: int) -> np.ndarray:
    """[E] int64: one each, and the replicas one by one to the largest load per copy. Ties: fewest
    copies, lowest expert.
    """
    copies = np.ones(len(load), dtype=np.int64)
    heap = [(-float(value), 1, expert) for expert, value in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(num_ranks * replicas_per_rank):
        while heap[0][1] == num_ranks:
            heapq.heappop(heap)
        _, number, expert = heap[0]
        copies[expert] = number + 1
        heapq.heapreplace(heap, (-float(load[expert]) / (number + 1), number + 1, expert))
    return copies


def _gathered(draft: _Draft, pairs: np.ndarray, ranks_per_node: int, limit: float) -> _Draft:
    """Of two ways to bring co-activated experts onto one node with no rank above `limit`, the one
    that brings more: swaps that keep every rank below it; or first swaps that only keep every node
    below it, then levelling, then the former.
    """
    careful, bold = draft, copy.deepcopy(draft)
    careful.gather(pairs, ranks_per_node, limit)
    bold.gather(pairs, ranks_per_node, limit, whole_nodes=True)
    bold.level(ranks_per_node)
    if bold.load.max() > limit:
        bold.level()
    if bold.load.max() > limit:
        return careful
    bold.gather(pairs, ranks_per_node, limit)
    crossings = [
        node_crossings(pairs, found.placement(), ranks_per_node) for found in (careful, bold)
    ]
    return bold if crossings[1] < crossings[0] else careful


class _Draft:
    """A placement in the making: ranks with L slots of their own and some for lent experts. Swaps
    exchange the contents of two slots of one kind, so every expert keeps one owner.
    """

    def __init__(
        self,
        total: np.ndarray,
        num_ranks: int,
        replicas_per_rank: int,
        copies: np.ndarray,
        owners: np.ndarray | None = None,
    ):
        """Largest load per copy first, each copy to the least loaded rank with room. owners: [E],
        where they are given.
        """
        self.ranks = num_ranks
        self.own = len(total) // num_ranks
        width = self.own + replicas_per_rank
        self.slots = np.full((num_ranks, width), -1)
        self.has = np.zeros((len(total), num_ranks), dtype=bool)
        self.load = np.zeros(num_ranks)
        # [own or lent, R]
        room = np.repeat([[self.own], [replicas_per_rank]], num_ranks, axis=1)
        for expert in np.argsort(-total / copies, kind="stable").tolist():
            order = np.argsort(self.load, kind="stable")
            free, lending = order[room[0, order] > 0], room[1, order] > 0
            if lending.sum() < copies[expert] and (room[1, free] == 0).any():
                # or the owner would take up a rank that can borrow
                free = free[room[1, free] == 0]
            owner = int(owners[expert]) if owners is not None else int(free[0])
            lent = order[(room[1, order] > 0) & (order != owner)][: copies[expert] - 1]
            self.slots[owner, self.own - room[0, owner]] = expert
            self.slots[lent, width - room[1, lent]] = expert
            room[0, owner] -= 1
            room[1, lent] -= 1
            self.has[expert, [owner, *lent]] = True
            self.load[[owner, *lent]] += total[expert] / copies[expert]
        # Copies that found only ranks that have the expert already: those slots go to others.
        copies = self.has.sum(1)
        for rank, column in np.argwhere(self.slots < 0):
            share = np.where(self.has[:, rank], -1, total / copies)
            expert = int(share.argmax())
            self.slots[rank, column], self.has[expert, rank] = expert, True
            copies[expert] += 1
        self.copies, self.weight = copies, total / copies  # [E]
        self.load = self.weight[self.slots].sum(1)
        self.rank_of = np.repeat(np.arange(num_ranks), width)  # [C], by slot
        self.is_lent = np.tile(np.arange(width) >= self.own, num_ranks)

    def placement(self) -> LayerPlacement:
        experts = np.sort(self.slots[:, : self.own], axis=1)
        lent = np.sort(self.slots[:, self.own :], axis=1)
        return LayerPlacement(tuple(experts.ravel().tolist()), tuple(map(tuple, lent.tolist())))

    def _swap(self, first: int, second: int) -> None:
        """Exchange the contents of two slots, by flat index."""
        flat = self.slots.ravel()  # a view
        one, other = flat[first], flat[second]
        flat[first], flat[second] = other, one
        ranks = self.rank_of[[first, second]]
        self.has[one, ranks] = False, True
        self.has[other, ranks] = True, False
        self.load[ranks] = self.weight[self.slots[ranks]].sum(1)

    def level(self, ranks_per_node: int | None = None) -> _Draft:
        """Swap with the busiest rank what lowers it most, until nothing does. ranks_per_node:
        within nodes only.
        """
        flat, width = self.slots.ravel(), self.slots.shape[1]
        least = ROUNDING * self.load.sum() / self.ranks
        if ranks_per_node is None:
            node = np.zeros_like(self.rank_of)
        else:
            node = self.rank_of // ranks_per_node
        for _ in range(MAX_PASSES * len(flat)):
            busiest = int(self.load.argmax())
            here = np.arange(busiest * width, (busiest + 1) * width)
            # [L + replicas, C], what the rank would lose
            change = self.weight[flat[here]][:, None] - self.weight[flat]
            highest = np.maximum(self.load[busiest] - change, self.load[self.rank_of] + change)
            allowed = (
                (self.is_lent[here][:, None] == self.is_lent)
                & (node == node[here[0]])
                & ~self.has[flat[here]][:, self.rank_of]
                & ~self.has[flat, busiest]
            )
            highest[~allowed] = np.inf
            i, j = np.unravel_index(highest.argmin(), highest.shape)
            if not highest[i, j] < self.load[busiest] - least:
                break
            self._swap(int(here[i]), int(j))
        return self

    def gather(
        self, pairs: np.ndarray, ranks_per_node: int, limit: float, whole_nodes: bool = False
    ) -> None:
        """Swap between nodes what raises the co-activation within nodes most, slot by slot, with no
        rank above `limit`, or with whole_nodes no node's mean rank above it.

        With n[e] the shares of expert e by node, the pairs on one node are sum pairs[a, b] n[a] .
        n[b]; moving 1 / copies of a there and of b here changes that by twice `gain` below.
        """
        flat, share = self.slots.ravel(), 1 / self.copies
        node = self.rank_of // ranks_per_node  # [C]
        size = ranks_per_node if whole_nodes else 1
        # [C], the rank or node that is held below the limit
        bounded = self.rank_of // size
        least = ROUNDING * pairs.sum()
        for _ in range(MAX_PASSES):
            # [E, M]
            by_node = (self.has * share[:, None]).reshape(len(share), -1, ranks_per_node).sum(2)
            pull = pairs @ by_node
            swapped = False
            for i in range(len(flat)):
                a, rank, here = flat[i], self.rank_of[i], node[i]
                gain = (
                    share[a] * (pull[a, node] - pull[a, here])
                    + share[flat] * (pull[flat, here] - pull[flat, node])
                    - 2 * share[a] * share[flat] * pairs[a, flat]
                )
                load = self.load.reshape(-1, size).sum(1)
                change = self.weight[a] - self.weight[flat]
                allowed = (
                    (self.is_lent == self.is_lent[i])
                    & (node != here)
                    & ~self.has[a, self.rank_of]
                    & ~self.has[flat, rank]
                    & (load[bounded[i]] - change <= limit * size)
                    & (load[bounded] + change <= limit * size)
                )
                gain[~allowed] = -np.inf
                j = int(gain.argmax())
                if gain[j] > least:
                    b, there = flat[j], node[j]
                    moved = share[a] * pairs[:, a] - share[b] * pairs[:, b]
                    pull[:, here] -= moved
                    pull[:, there] += moved
                    self._swap(i, j)
                    swapped = True
            if not swapped:
                break
            if not whole_nodes:
                self.level(ranks_per_node)  # makes room below the limit
