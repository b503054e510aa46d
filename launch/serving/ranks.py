"""The engines of all ranks as one: rank 0 deals requests out, and every rank steps in lockstep.

A step is, on rank 0: an order to each other rank (requests, cancellations, whether to compute), its
own engine's step, and the news of each other rank. Engines that share experts exchange rows in
every forward pass, so all of them compute or none does; one without a request has rows that route
nowhere (Engine.step).
"""

from __future__ import annotations

import base64
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from infer.config import EngineConfig, SamplingConfig
from infer.request import Completion, Drawn, Event, Request, Text
from launch.command.messages import failure_of
from launch.process.ranks import ASKED
from train.rank.channel import Channel, Watch

if TYPE_CHECKING:
    from infer.engine import Confined, Drafted, Engine
    from infer.graphs.steps import DecodeGraphs
    from infer.speculate import Utility

PAUSE_SECONDS = 1.0
"""Between two steps without a request: the other ranks wait for an order as long as the process
group lets them, and an order is where their end is noticed.
"""
ASKED_TO_END = ASKED
VERDICT_SECONDS = 2.0
"""For the watch to say which rank is gone, once a connection has broken."""


@dataclasses.dataclass
class Order:
    """What rank 0 says to a rank in a step."""

    requests: list[tuple[Request, float]] = dataclasses.field(default_factory=list)
    """With the times at which they came."""
    cancelled: list[str] = dataclasses.field(default_factory=list)
    computes: bool = False
    ends: bool = False

    def told(self) -> dict[str, Any]:
        """In JSON."""
        return {
            "requests": [told_request(*pair) for pair in self.requests],
            "cancelled": self.cancelled,
            "computes": self.computes,
            "ends": self.ends,
        }


@dataclasses.dataclass
class Standing:
    """Where an engine stands after a step."""

    running: int = 0
    waiting: int = 0
    tokens_held: int = 0
    rows_decoded: int = 0
    pages: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, engine: Engine) -> Standing:
        return cls(
            engine.num_running,
            engine.num_waiting,
            engine.tokens_held,
            engine.rows_decoded,
            engine.num_pages,
        )


class EngineOverRanks:
    """What a Worker runs on rank 0, in place of that rank's engine.

    Which rank computes a request changes neither its tokens nor its text: an engine gives each what
    it would have alone. A request goes to the rank with the fewest, the first of several, once that
    one has a slot; until then it waits here, so that none waits behind long ones while a slot is
    free elsewhere.
    """

    def __init__(self, own: Engine, channel: Channel, watch: Watch):
        self.own, self.channel, self.watch = own, channel, watch
        self.size = channel.size
        self.standings = [Standing.of(own) for _ in range(self.size)]
        self._queue: deque[tuple[Request, float]] = deque()
        self._rank_of: dict[str, int] = {}
        """Requests that were dealt and have not ended."""
        self._cancelled: list[str] = []

    @property
    def settings(self) -> EngineConfig:
        """Of each rank."""
        return self.own.settings

    @property
    def device(self) -> Any:
        return self.own.device

    @property
    def utility(self) -> Utility | None:
        return self.own.utility

    @property
    def drafted(self) -> Drafted:
        return self.own.drafted

    @property
    def confined(self) -> Confined:
        return self.own.confined

    @property
    def graphs(self) -> DecodeGraphs | None:
        return self.own.graphs

    @property
    def without_graphs(self) -> str | None:
        return self.own.without_graphs

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._rank_of)

    @property
    def num_slots(self) -> int:
        return self.size * self.own.num_slots

    @property
    def num_running(self) -> int:
        return sum(standing.running for standing in self.standings)

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + sum(standing.waiting for standing in self.standings)

    @property
    def tokens_held(self) -> int:
        return sum(standing.tokens_held for standing in self.standings)

    @property
    def rows_decoded(self) -> int:
        return sum(standing.rows_decoded for standing in self.standings)

    @property
    def num_pages(self) -> tuple[int, int]:
        free, pages = zip(*(standing.pages for standing in self.standings), strict=True)
        return sum(free), sum(pages)

    def problem(self, request: Request) -> str | None:
        return self.own.problem(request)

    def add(self, request: Request) -> None:
        """Raises ValueError where the request can never be served."""
        if (problem := self.problem(request)) is not None:
            raise ValueError(problem)
        self._queue.append((request, self.own.clock()))

    def cancel(self, name: str) -> Completion | None:
        """Give up a request. One that a rank has is given up in the next step, which tells its end;
        None then, as for one that nobody knows.
        """
        for pair in self._queue:
            if pair[0].name == name:
                self._queue.remove(pair)
                return Completion(
                    name,
                    finish_reason="cancelled",
                    num_prompt_tokens=len(pair[0].prompt),
                    arrived=pair[1],
                )
        if name in self._rank_of:
            self._cancelled.append(name)
        return None

    def step(self) -> list[Event]:
        """One of every rank.

        Raises:
            LostRank: a rank is gone.
        """
        try:
            return self._step()
        except RuntimeError as error:
            if failure_of(error) == "communication" and (
                lost := self.watch.verdict(VERDICT_SECONDS)
            ):
                raise lost from error
            raise

    def _step(self) -> list[Event]:
        orders = self._orders()
        for rank in range(1, self.size):
            self.channel.send(rank, orders[rank].told())
        events = obey(self.own, orders[0])
        self.standings[0] = Standing.of(self.own)
        for rank in range(1, self.size):
            news = self.channel.receive(rank)
            events += [read_event(told) for told in news["events"]]
            standing = news["standing"]
            self.standings[rank] = Standing(**{**standing, "pages": tuple(standing["pages"])})
        for event in events:
            if event.completion is not None:
                del self._rank_of[event.name]
        return events

    def _orders(self) -> list[Order]:
        orders = [Order() for _ in range(self.size)]
        for name in self._cancelled:
            if name in self._rank_of:
                orders[self._rank_of[name]].cancelled.append(name)
        self._cancelled = []

        loads = [0] * self.size
        for rank in self._rank_of.values():
            loads[rank] += 1
        while self._queue and (least := min(loads)) < self.own.num_slots:
            rank = loads.index(least)
            pair = self._queue.popleft()
            orders[rank].requests.append(pair)
            self._rank_of[pair[0].name] = rank
            loads[rank] += 1
        for order in orders:
            order.computes = bool(self._rank_of)
        return orders

    def close(self) -> None:
        """Let all ranks end. Without effect where one is gone, since the others notice that."""
        if self.watch.lost is None:
            for rank in range(1, self.size):
                self.channel.send(rank, Order(ends=True).told())


def follow(engine: Engine, channel: Channel, stream: Callable[[list[int]], Text]) -> None:
    """What a rank other than the first does: it obeys until it is told to end. stream: for the text
    behind a prompt.

    Raises:
        RuntimeError: rank 0, or another rank of its expert group, is gone.
    """
    while True:
        told = channel.receive(0)
        order = Order(
            [read_request(asked, stream) for asked in told["requests"]],
            told["cancelled"],
            told["computes"],
            told["ends"],
        )
        if order.ends:
            return
        events = obey(engine, order)
        standing = dataclasses.asdict(Standing.of(engine))
        channel.send(0, {"events": [told_event(e) for e in events], "standing": standing})


def obey(engine: Engine, order: Order) -> list[Event]:
    """One rank's part of a step."""
    events: list[Event] = []
    for name in order.cancelled:
        if (completion := engine.cancel(name)) is not None:
            events.append(Event(name, "", (), completion))
    for request, arrived in order.requests:
        engine.add(request, arrived)
    if order.computes:
        events += engine.step()
    return events


# --- requests and events in JSON ------------------------------------------------------------------


def told_request(request: Request, arrived: float) -> dict[str, Any]:
    """arrived: seconds of the clock that all processes of a machine share."""
    return {
        "name": request.name,
        "prompt": request.prompt,
        "sampling": dataclasses.asdict(request.sampling),
        "has_text": request.text is not None,
        "budget": request.budget,
        "num_alternatives": request.num_alternatives,
        "keep_routing": request.keep_routing,
        "arrived": arrived,
    }


def read_request(
    told: dict[str, Any], stream: Callable[[list[int]], Text]
) -> tuple[Request, float]:
    """What told_request has told."""
    given = told["sampling"]
    tuples = {name: tuple(given[name]) for name in ("stop", "stop_token_ids")}
    request = Request(
        told["name"],
        told["prompt"],
        SamplingConfig(**{**given, **tuples}),
        stream(told["prompt"]) if told["has_text"] else None,
        told["budget"],
        told["num_alternatives"],
        told["keep_routing"],
    )
    return request, told["arrived"]


def told_event(event: Event) -> dict[str, Any]:
    """Numbers that are not finite become null."""
    done = event.completion
    found: dict[str, Any] = {"name": event.name, "piece": event.piece, "drawn": event.drawn}
    if done is None:
        return found
    fields = {
        f.name: getattr(done, f.name)
        for f in dataclasses.fields(done)
        if f.name != "routed_experts"
    }
    if (ids := done.routed_experts) is not None:
        data = base64.b64encode(ids.contiguous().numpy().tobytes()).decode()
        fields["routed_experts"] = {"shape": list(ids.shape), "data": data}
    return {**found, "completion": fields}


def read_event(told: dict[str, Any]) -> Event:
    """What told_event has told."""
    drawn = tuple(
        Drawn(token, _number(value), tuple((t, _number(v)) for t, v in alternatives))
        for token, value, alternatives in told["drawn"]
    )
    fields = told.get("completion")
    if fields is None:
        return Event(told["name"], told["piece"], drawn)
    fields["log_probabilities"] = _numbers(fields["log_probabilities"])
    if (routed := fields.get("routed_experts")) is not None:
        import torch

        buffer = bytearray(base64.b64decode(routed["data"]))
        flat = torch.frombuffer(buffer, dtype=torch.int16) if buffer else torch.empty(0).short()
        fields["routed_experts"] = flat.view(routed["shape"])
    return Event(told["name"], told["piece"], drawn, Completion(**fields))


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
