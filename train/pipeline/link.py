"""What goes from one stage of a pipeline to another, point to point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from model.parallel.groups import ParallelGroups
from ops.all_to_all import Meter

HIDDEN, GRADIENT, LOAN = range(3)
"""Tags: what goes on to the next stage, what comes back, and what goes between the ends."""


class Message(NamedTuple):
    """A tensor on its way between two stages."""

    tensor: torch.Tensor
    """That is sent, or that is filled."""
    place: int
    """Of the other stage."""
    tag: int
    """What it is."""


class Link:
    """This rank's connection with the ranks of its pipeline group. Every tensor's shape and dtype
    are known on both sides.

    Attributes:
        meter: counts what is sent and how long this rank waits.
    """

    def __init__(self, groups: ParallelGroups):
        self._group, self._place = groups.pipeline, groups.pipeline_rank
        self._ranks = [0] if groups.pipeline is None else dist.get_process_group_ranks(self._group)
        self.meter = Meter()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send tensors to neighbours and fill others with what they send, all at once. Who sends a
        neighbour several lists those of one tag in the order in which it receives them, and tags in
        ascending order.
        """
        self._transfer(sends, receives)

    def send_to(self, place: int, tensor: torch.Tensor) -> None:
        """To any stage, which calls receive_from."""
        self._transfer([Message(tensor, place, LOAN)], [])

    def receive_from(self, place: int, tensor: torch.Tensor) -> None:
        """Fill the tensor with what the stage sends."""
        self._transfer([], [Message(tensor, place, LOAN)])

    def neighbour(self, step: int) -> int:
        """The place so many stages further on, round the pipeline."""
        return (self._place + step) % len(self._ranks)

    def _transfer(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        # Two stages are each other's neighbours on both sides: tags tell apart what goes on and
        # what comes back.
        operations, held = [], [m.tensor.detach().contiguous() for m in sends]
        for (_, place, tag), tensor in zip(sends, held, strict=True):
            peer = self._ranks[place]
            operations.append(dist.P2POp(dist.isend, tensor, peer, self._group, tag))
            self.meter.add_bytes(tensor.nbytes)
        for tensor, place, tag in receives:
            peer = self._ranks[place]
            operations.append(dist.P2POp(dist.irecv, tensor, peer, self._group, tag))
        # Tensors and handles are held until all is done: gloo takes a send back whose handle is
        # dropped, and the peer would wait for ever.
        works = dist.batch_isend_irecv(operations)
        with self.meter.waiting((*sends, *receives)[0].tensor.device):
            for work in works:
                work.wait()
