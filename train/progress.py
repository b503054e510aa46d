"""Where a run stands: saved with every checkpoint, taken up when it is resumed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from model.moe.restart import RoutingFacts, State, adopt_state, state_of
from train.checkpoint.folder import begins_anew, updates_of
from train.checkpoint.restore import restore
from train.checkpoint.writer import restore_rng, set_newer_aside
from train.config.run import RunConfig
from train.data.loader import TrainingLoader
from train.engine.deepspeed import Engine
from train.guard.spike import SpikeGuard
from train.observe.base import StepResult
from train.rank.runtime import from_rank_zero

log = logging.getLogger("loadstone")


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    wandb_id: str | None = None
    val_loss: float | None = None
    spike: SpikeGuard = field(default_factory=SpikeGuard)
    skipped_steps: int = 0
    """Steps without an update, because their gradient was not finite."""
    alarms: dict[str, tuple[int | None, bool]] = field(default_factory=dict)
    """train.guard.alarms.Alarms.state."""
    evaluation_left: bool = False
    """Whether the evaluation of this step was left because some rank was asked to stop."""
    updates_before: int = 0
    """Updates behind the optimiser's moments that the run began with (init.moments)."""

    def advance(self, result: StepResult) -> None:
        """One more step is done, or was skipped."""
        self.step += 1
        self.consumed_samples = result.end_sample
        self.consumed_tokens += result.num_tokens
        self.skipped_steps += not result.applied


def resume(
    engine: Engine, config: RunConfig, run_dir: Path, loader: TrainingLoader, restarted: bool
) -> Progress:
    """Load the last checkpoint into the engine, the loader and the random streams. Collective.

    Args:
        restarted: begin anew where an attempt before ended without any checkpoint.
    """
    if restarted and from_rank_zero(lambda: begins_anew(run_dir)):
        return Progress()
    fresh = state_of(engine.module.routers())
    checkpoint, state = restore(engine, run_dir)
    progress = Progress(
        **{name: state[name] for name in Progress.__dataclass_fields__ if name in state}
    )
    progress.spike = SpikeGuard(**state["spike"])
    _adopt(
        engine, config, progress, fresh, RoutingFacts.read(state.get("routing")), updates_of(state)
    )
    loader.consumed_samples = progress.consumed_samples
    if not restore_rng(checkpoint, dist.get_rank(), dist.get_world_size(), state["world_size"]):
        log.info(
            "the number of ranks changed from %d to %d: random streams start anew",
            state["world_size"],
            dist.get_world_size(),
        )
    if dist.get_rank() == 0:
        set_newer_aside(checkpoint)
    log.info("resumed from %s (step %d)", checkpoint, progress.step)
    return progress


def _adopt(
    engine: Engine,
    config: RunConfig,
    progress: Progress,
    fresh: State,
    before: RoutingFacts | None,
    updates: int,
) -> None:
    """Settings that the restored state holds give way to the present ones."""
    after = routing_facts(engine, config)
    if after is None:
        return
    if adopt_state(engine.module.routers(), fresh, before, after, updates):
        log.info(
            "another kind of router or score: bias, cuts and budget controllers start as in a new "
            "run"
        )
    progress.spike = progress.spike.continued(
        before.spike if before is not None else progress.spike.steps > 0, config.fail_safe
    )


def routing_facts(engine: Engine, config: RunConfig) -> RoutingFacts | None:
    """What the buffers of the routers are made under; saved with every checkpoint."""
    return RoutingFacts.of(
        engine.module.router_kind,
        config.balance,
        config.budget,
        config.fail_safe,
        engine.module.rank_shares,
    )
