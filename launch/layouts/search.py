"""The layouts that a run can have on so many devices, and the best of them. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from launch.config.contradictions import layout_problems
from launch.layouts.devices import Cluster
from launch.layouts.estimate import Estimate, estimated
from train.config.commands.plan import NODE_SIZE
from train.config.run import RunConfig

RECOMPUTE: tuple[Literal["none", "block"], ...] = ("none", "block")
VIRTUAL_STAGES = (2, 4, 8)
"""That are tried, as far as there are layers for them."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    best: list[Estimate]
    """Those that fit, the fastest first, no two of the same groups, stage and recomputation."""
    nearest: Estimate | None
    """Where none fits, that which needs least memory; None where some do, or none is possible."""
    num_layouts: int
    """How many were possible."""
    num_fitting: int
    """How many of them fit."""
    problems: list[str]
    """Where none is possible, what one on all devices with one rank a row contradicts."""


def search(run: RunConfig, world_size: int, cluster: Cluster, most: int = 5) -> Found:
    """Every layout of `world_size` devices that contradicts nothing, by its estimate."""
    every = [estimated(candidate, world_size, cluster) for candidate in layouts(run, world_size)]
    fitting = sorted((e for e in every if e.fits), key=_order)
    kept = _fastest(fitting)
    more = _interleaved(fitting, kept[:most][-1].step_seconds, cluster) if kept else []
    if more:
        kept = _fastest(sorted((*fitting, *more), key=_order))
    nearest = min(every, key=lambda e: (e.num_bytes, _order(e)), default=None)
    return Found(
        kept[:most],
        None if fitting else nearest,
        len(every),
        len(fitting),
        [] if every else layout_problems(under(run, 1, 1, 1, 1, 1, 1, "none", 1), world_size),
    )


def _fastest(fitting: list[Estimate]) -> list[Estimate]:
    """The first of every kind."""
    kept: dict[tuple[object, ...], Estimate] = {}
    for estimate in fitting:
        kept.setdefault(_kind(estimate.run), estimate)
    return list(kept.values())


def _interleaved(fitting: list[Estimate], bound: float, cluster: Cluster) -> list[Estimate]:
    """Pipelines with virtual stages that fit, of those whose waiting for each other is what keeps
    them above the bound, in seconds a step.
    """
    found = []
    for estimate in fitting:
        run, waits = estimate.run, estimate.seconds.get("bubble", 0.0)
        for number in VIRTUAL_STAGES:
            least = estimate.step_seconds - waits + waits / number
            parallel = replace(run.parallel, virtual_stages=number)
            enough = parallel.num_parts <= run.model.num_layers
            if waits > 0 and least < bound and enough and parallel.pipeline_split is None:
                more = estimated(replace(run, parallel=parallel), estimate.world_size, cluster)
                found += [more] if more.fits else []
    return found


def layouts(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """The run under every size of its groups, ZeRO stage, recomputation and micro-batch; without
    virtual stages.
    """
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    stages = (0, 1, 2, 3) if run.train.precision == "fp32" else (1, 2, 3)
    batch = run.train.global_batch_size
    micro = [2**i for i in range(batch.bit_length()) if batch % 2**i == 0]
    # Cut matrices exchange tokens around every product: that stays within a node.
    cuts = [n for n in sizes if n <= NODE_SIZE]
    # Of ranks that share rows as few gather as the heads leave no other way: least memory.
    shared = [(n, n // math.gcd(n, run.model.num_kv_heads)) for n in sizes]
    for pipeline, (context, gather), tensor, expert in itertools.product(
        sizes, shared, cuts, sizes
    ):
        groups = (pipeline, context, gather, tensor, expert)
        # What contradicts alone is left before it is combined.
        if world_size % (pipeline * context * tensor) or layout_problems(
            under(run, *groups, 1, "none", 1), world_size
        ):
            continue
        for stage, recompute, rows in itertools.product(stages, RECOMPUTE, micro):
            found = under(run, *groups, stage, recompute, rows)
            if rows * found.parallel.rows_size(world_size) <= batch and not (
                layout_problems(found, world_size)
            ):
                yield found


def under(
    run: RunConfig,
    pipeline: int,
    context: int,
    gather: int,
    tensor: int,
    expert: int,
    stage: int,
    recompute: Literal["none", "block"],
    micro_batch_size: int,
) -> RunConfig:
    """The run under one layout."""
    return replace(
        run.under_zero(stage),
        parallel=replace(
            run.parallel,
            pipeline_parallel_size=pipeline,
            context_parallel_size=context,
            context_gather_size=gather,
            tensor_parallel_size=tensor,
            expert_parallel_size=expert,
            virtual_stages=1,
        ),
        model=replace(run.model, recompute=recompute),
        train=replace(run.train, micro_batch_size=micro_batch_size),
    )


def _kind(run: RunConfig) -> tuple[object, ...]:
    parallel = run.parallel
    sizes = (
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
        parallel.context_gather_size,
        parallel.tensor_parallel_size,
        parallel.expert_parallel_size,
    )
    return (*sizes, run.zero_stage, run.model.recompute)


def _order(estimate: Estimate) -> tuple[object, ...]:
    """The fastest first; of equal ones that with more memory left, then the simpler one."""
    virtual = estimate.run.parallel.virtual_stages
    return estimate.step_seconds, estimate.num_bytes, *_kind(estimate.run), virtual
