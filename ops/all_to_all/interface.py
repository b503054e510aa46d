"""Variable-size all-to-all of rows that overlaps with other work, in both directions of autograd.
See README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops.all_to_all.meter import Meter
from ops.all_to_all.path import Hop, Path
from ops.all_to_all.payload import decode, encode
from ops.all_to_all.spec import PAYLOADS, return_payload
from ops.all_to_all.turns import give_way, rows_have_left


class Flight:
    """Rows on their way, from `begin_rows` to `finish`."""

    def __init__(self, path: Path, homeward: bool, payload: str, meter: Meter | None):
        self.path, self.homeward, self.payload, self.meter = path, homeward, payload, meter
        self.token: Tensor | None = None

    def begin(self, rows: Tensor, payload: str, back: bool) -> None:
        """Up to the start of the slow hop, in the direction of the path or against it."""
        self.width, self.dtype = rows.shape[1], rows.dtype
        sent = encode(rows.contiguous(), payload)
        if payload != "native" and not back and self.meter is not None and self.meter.measuring:
            self.meter.add_error(rows, decode(sent, self.width, torch.float32, payload))
        if self.homeward == back:  # along the path
            for hop in self.path[:-1]:
                sent = self._wait(
                    *self._send(_ordered(sent, hop.order), hop.group, hop.send, hop.receive)
                )
            last = self.path[-1]
            self.pending = self._send(
                _ordered(sent, last.order), last.group, last.send, last.receive
            )
        else:
            last = self.path[-1]
            self.pending = self._send(sent, last.group, last.receive, last.send)
        rows_have_left()

    def end(self, payload: str, back: bool) -> Tensor:
        """Wait for the slow hop, and do what is left."""
        give_way()
        rows = self._wait(*self.pending)
        del self.pending
        if self.homeward != back:
            rows = _unordered(rows, self.path[-1])
            for hop in reversed(self.path[:-1]):
                rows = _unordered(
                    self._wait(*self._send(rows, hop.group, hop.receive, hop.send)), hop
                )
        return decode(rows, self.width, self.dtype, payload)

    def _send(
        self, rows: Tensor, group: Any, send: list[int], receive: list[int]
    ) -> tuple[Tensor, Any, Tensor]:
        # one process, without torch.distributed
        if group is None and not dist.is_initialized():
            if len(send) != 1 or send != receive:
                raise ValueError(
                    f"without a process group the rows of one process stay: splits {send} and "
                    f"{receive} must be one equal number each"
                )
            return rows.clone(), None, rows
        received = rows.new_empty((sum(receive), rows.shape[1]))
        if self.meter is not None:
            away = rows.shape[0] - send[dist.get_rank(group)]
            self.meter.add_bytes(away * rows.shape[1] * rows.element_size())
        # `rows` must live until the exchange is over
        return (
            received,
            dist.all_to_all_single(received, rows, receive, send, group=group, async_op=True),
            rows,
        )

    def _wait(self, received: Tensor, work: Any, _: Tensor) -> Tensor:
        if work is None:
            return received
        if self.meter is None:
            work.wait()
        else:
            with self.meter.waiting(received.device):
                work.wait()
        return received


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows.index_select(0, order)


def _unordered(rows: Tensor, hop: Hop) -> Tensor:
    return rows if hop.order is None else torch.empty_like(rows).index_copy_(0, hop.order, rows)


class _Begin(torch.autograd.Function):
    """Rows leave. In backward their gradient arrives, and is waited for here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.begin(rows, flight.payload, back=False)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.end(return_payload(ctx.flight.payload), back=True), None


class _End(torch.autograd.Function):
    """Rows arrive. In backward their gradient leaves, and is not waited for."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.end(flight.payload, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.begin(grads[0], return_payload(ctx.flight.payload), back=True)
        return grads[0].new_empty(0), None


def begin_rows(
    rows: Tensor,
    path: Path,
    *,
    homeward: bool = False,
    payload: str = "native",
    meter: Meter | None = None,
) -> Flight:
    """Send rows along the path (homeward: against it, from where `path` ends to where it begins).

    Work done between this call and `end_rows` overlaps with the slow hop; so does, in backward, the
    backward of that work with the gradient's: autograd runs nodes in the reverse order of their
    making, and the two ends of an exchange are nodes of their own.

    Args:
        rows: [R, D] floating, sorted by destination rank, as many as the splits of the first hop
            add up to.
        payload: "native", "bf16", or "fp8" (e4m3 with a scale per 128 values; the gradient then
            travels in bf16).
        meter: counts bytes and waiting.

    Raises:
        ValueError: the splits do not add up to the number of rows, or the payload is unknown.
    """
    splits = path[-1].receive if homeward else path[0].send
    if rows.shape[0] != sum(splits):
        raise ValueError(f"{rows.shape[0]} rows but the splits {splits} sum to {sum(splits)}")
    if payload not in PAYLOADS:
        raise ValueError(f"unknown payload {payload!r}; choose {', '.join(PAYLOADS)}")
    flight = Flight(path, homeward, payload, meter)
    flight.token = _Begin.apply(rows, flight)  # type: ignore[no-untyped-call]
    return flight


def end_rows(flight: Flight) -> Tensor:
    """The rows of a flight: [R', D] in the dtype they were sent in, sorted by source rank."""
    token, flight.token = flight.token, None
    rows: Tensor = _End.apply(token, flight)  # type: ignore[no-untyped-call]
    return rows
