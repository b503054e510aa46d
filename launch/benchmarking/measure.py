"""Running variants: engines over the same prompts, round by round in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from infer.budget import RouterState, use
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine, page_size_of
from infer.request import Completion, Request
from launch.benchmarking.energy import EnergyMeter
from launch.benchmarking.kpi import Ratio, RequestTimes, Speed, ratio_of, speed_of
from model.transformer import Transformer
from train.config.commands.benchmark import SloConfig


@dataclass(frozen=True)
class Variant:
    """What is compared."""

    attention: str
    budget: float | None
    """None: as trained."""
    model: Transformer
    state: list[RouterState]

    @property
    def name(self) -> str:
        return f"{self.attention}, {'as trained' if self.budget is None else f'{self.budget:g}'}"


@dataclass(frozen=True)
class Cell:
    """Requests at once, and tokens of their prompts."""

    rows: int
    context: int


@dataclass(frozen=True)
class Routing:
    """What the tokens of a variant visited, in one pass that is not timed."""

    prefill_experts: float
    """Mean of a token of a prompt, per layer."""
    decode_experts: float
    """Of a generated one."""
    distinct_experts: float
    """Visited together by the tokens of a decode step, per layer."""


@dataclass(frozen=True)
class Measured:
    """A variant in a cell."""

    rounds: tuple[Speed, ...]
    routing: Routing
    cache_bytes: int
    """Of the pages of these requests."""
    peak_bytes: int | None
    """Of the device's memory; None where the device does not tell."""
    joules_per_token: float | None = None
    """Of a generated token with its share of the prompts, over all rounds: counters move in steps
    that a round may be shorter than. None where the machine does not tell.
    """

    def middle(self, name: str) -> float:
        """The median over rounds of a field of Speed."""
        return float(median(getattr(speed, name) for speed in self.rounds))

    def ratio(self, base: Measured, name: str) -> Ratio:
        """To another variant, round by round."""
        pairs = [[getattr(speed, name) for speed in measured.rounds] for measured in (self, base)]
        return ratio_of(*pairs)


class Bench:
    """Measures variants in a cell.

    Args:
        prompts: as many as rows, each of the cell's length. energy: None: nobody asks.
        cuda_graphs: as engine.cuda_graphs.

    Attributes:
        without_graphs: why the last engine had no CUDA graphs; None: it had, or there was none.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        cell: Cell,
        prompts: Sequence[list[int]],
        new_tokens: int,
        slo: SloConfig,
        energy: EnergyMeter | None = None,
        cuda_graphs: Literal["auto", True, False] = "auto",
    ):
        self.cuda_graphs: Literal["auto", True, False] = cuda_graphs
        self.without_graphs: str | None = None
        self.energy = energy or EnergyMeter((), "not asked for")
        self.variants, self.cell, self.slo = variants, cell, slo
        self.prompts, self.new_tokens = prompts, new_tokens

    def run(
        self,
        min_rounds: int,
        max_rounds: int,
        precision: float,
        told: Callable[[int], None] = lambda rounds: None,
    ) -> list[Measured]:
        """All variants, until the intervals of the ratios are narrow enough."""
        # Once to warm up, and to see where the tokens go.
        routings = [self._routing(variant) for variant in self.variants]
        rounds: list[list[Speed]] = [[] for _ in self.variants]
        caches, peaks = [0] * len(self.variants), [0] * len(self.variants)
        joules: list[list[float | None]] = [[] for _ in self.variants]
        number = 0
        while number < max_rounds and not (number >= min_rounds and self._sure(rounds, precision)):
            # In rotating order, so that no variant always follows another.
            for i in range(len(self.variants)):
                place = (i + number) % len(self.variants)
                speed, cache, peak, used = self._timed(self.variants[place])
                rounds[place].append(speed)
                joules[place].append(used)
                caches[place], peaks[place] = cache, max(peaks[place], peak)
            number += 1
            told(number)
        return [
            Measured(tuple(speeds), routing, cache, peak or None, self._per_token(used))
            for speeds, routing, cache, peak, used in zip(
                rounds, routings, caches, peaks, joules, strict=True
            )
        ]

    def _per_token(self, joules: list[float | None]) -> float | None:
        told = [used for used in joules if used is not None]
        tokens = self.cell.rows * self.new_tokens * len(told)
        return sum(told) / tokens if told and sum(told) > 0 else None

    def problem(self, variant: Variant) -> str | None:
        """Why the engine does not run a variant; None: it does."""
        try:
            self._engine(variant, self.cell.rows)
        except ValueError as error:
            return str(error)
        return None

    def _sure(self, rounds: list[list[Speed]], precision: float) -> bool:
        base, *others = [[s.tokens_per_second for s in speeds] for speeds in rounds]
        return all(ratio_of(other, base).half_width <= precision for other in others)

    def _engine(self, variant: Variant, rows: int) -> Engine:
        use(variant.model.routers(), variant.state)
        size = page_size_of(variant.model)
        pages = -(-(self.cell.context + self.new_tokens) // size)
        # one more, which the engine wants to see free before it admits the last request
        room = (rows * pages + 1) * size
        settings = EngineConfig(
            max_slots=rows, cache_tokens=room, prefix_reuse=False, cuda_graphs=self.cuda_graphs
        )
        return Engine(variant.model, settings)

    def _sampling(self, i: int) -> SamplingConfig:
        """Drawn as the model would write: what is most likely repeats itself in weak models, and a
        repeated token visits the same experts.
        """
        return SamplingConfig(
            max_new_tokens=self.new_tokens, temperature=1.0, top_p=1.0, seed=i, ignore_end=True
        )

    def _requests(self, keep_routing: bool) -> list[Request]:
        return [
            Request(str(i), prompt, self._sampling(i), keep_routing=keep_routing)
            for i, prompt in enumerate(self.prompts)
        ]

    def _timed(self, variant: Variant) -> tuple[Speed, int, int, float | None]:
        """Speed, bytes of the cache, the most that a GPU held, and joules."""
        engine = self._engine(variant, self.cell.rows)
        on_gpu = engine.device.type == "cuda"
        if engine.graphs is not None:
            # Once before the clock runs: steps are captured when they first come.
            _finished(engine, self._requests(False))
        if on_gpu:
            torch.cuda.synchronize(engine.device)
            torch.cuda.reset_peak_memory_stats(engine.device)
        before = self.energy.begin()
        found = _finished(engine, self._requests(False))
        if on_gpu and self.energy.counters:
            torch.cuda.synchronize(engine.device)
        joules = self.energy.since(before)
        self.without_graphs = engine.without_graphs
        times = [RequestTimes(c.arrived, tuple(c.token_times)) for c in found]
        speed = speed_of(
            times,
            self.cell.rows * self.cell.context,
            self.slo.ttft_ms / 1e3,
            self.slo.tpot_ms / 1e3,
        )
        peak = torch.cuda.max_memory_allocated(engine.device) if on_gpu else 0
        return speed, engine.cache_bytes, peak, joules

    def _routing(self, variant: Variant) -> Routing:
        found = _finished(self._engine(variant, self.cell.rows), self._requests(True))
        routed = [c.routed_experts for c in found if c.routed_experts is not None]
        if not routed:  # a dense model
            return Routing(0.0, 0.0, 0.0)
        ids = torch.stack(routed)  # [rows, context + new - 1, layers, K]
        visited = (ids >= 0).sum(-1).double()
        prefill, decode = visited.split((self.cell.context, self.new_tokens - 1), dim=1)
        distinct = [
            len(set(step[step >= 0].tolist()))
            for layer in ids[:, self.cell.context :].unbind(2)
            for step in layer.unbind(1)
        ]
        return Routing(
            float(prefill.mean()), float(decode.mean()), sum(distinct) / max(1, len(distinct))
        )


def _finished(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """All of them, in their order; they arrive together."""
    found = {c.name: c for c in engine.run(requests)}
    return [found[request.name] for request in requests]


def cells_of(rows: Sequence[int], contexts: Sequence[int]) -> list[Cell]:
    return [Cell(r, c) for c, r in itertools.product(contexts, rows)]
