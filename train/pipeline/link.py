"""What goes from one stage of a pipeline to another, point to point."""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.parallel.groups import ParallelGroups
from ops.all_to_all import Meter


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

    def exchange(
        self, with_next: bool, send: torch.Tensor | None, receive: torch.Tensor | None
    ) -> None:
        """Send one tensor to a neighbour and fill another with what it sends, both at once."""
        self._transfer(self._place + (1 if with_next else -1), send, receive)

    def send_to(self, place: int, tensor: torch.Tensor) -> None:
        """To any stage, which calls receive_from."""
        self._transfer(place, tensor, None)

    def receive_from(self, place: int, tensor: torch.Tensor) -> None:
        """Fill the tensor with what the stage sends."""
        self._transfer(place, None, tensor)

    def _transfer(
        self, place: int, send: torch.Tensor | None, receive: torch.Tensor | None
    ) -> None:
        peer = self._ranks[place]
        operations = []
        if send is not None:
            send = send.detach().contiguous()
            operations.append(dist.P2POp(dist.isend, send, peer, self._group))
            self.meter.add_bytes(send.nbytes)
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, receive, peer, self._group))
        # Tensors and handles are held until all is done: gloo takes a send back whose handle is
        # dropped, and the peer would wait for ever.
        works = dist.batch_isend_irecv(operations)
        device = next(t for t in (send, receive) if t is not None).device
        with self.meter.waiting(device):
            for work in works:
                work.wait()
