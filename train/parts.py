"""What a run is made of once it is built; train/fit.py builds it, the loop and the step use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.parallel.groups import ParallelGroups
from train.checkpoint.writer import CheckpointWriter
from train.config.run import RunConfig
from train.data.loader import TrainingLoader
from train.data.store import TokenStore
from train.engine.deepspeed import Engine
from train.engine.qk_clip import QkClip
from train.engine.schedule import Schedule
from train.guard.alarm_actions import AlarmActions
from train.guard.routing import RoutingControl
from train.guard.step import StepGuard
from train.objectives.objective import Objective
from train.observe.base import Watch
from train.observe.probe import RoutingProbe
from train.pipeline.flow import Pipeline
from train.progress import Progress
from train.rank.stop import StopSignal
from train.sinks.sinks import Sinks
from train.timing.pauses import Speed


@dataclass
class Parts:
    """The parts of a run, and the little that changes besides `progress`."""

    config: RunConfig
    run_dir: Path
    groups: ParallelGroups
    engine: Engine
    pipeline: Pipeline
    """What takes micro-batches through the engine, and through those of other stages."""
    schedule: Schedule
    loader: TrainingLoader
    store: TokenStore
    objective: Objective
    """What a micro-batch learns from."""
    writer: CheckpointWriter
    stop: StopSignal

    watch: Watch
    """What looks."""
    speed: Speed
    """One of the observers: the result of the run has it."""
    probe: RoutingProbe | None
    """Looks at evaluations; on the rank that writes, None on others and in a dense model."""

    guard: StepGuard
    """What may skip a step or end the run."""
    routing: RoutingControl
    """What moves the routers between steps."""
    qk_clip: QkClip | None
    """What holds attention logits down; None: nothing does."""
    alarms: AlarmActions
    """What reads the records, and asks for more than a line in a file."""

    sinks: Sinks | None
    """What writes; None on the ranks that do not."""

    progress: Progress
    """Saved with every checkpoint."""
    saved_step: int
    """The step of the newest checkpoint that was written or tried; at first where the run begins.
    """
    bits_per_byte: float | None = None
    """Of the last held-out evaluation in this process."""
