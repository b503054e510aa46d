"""Everything that watches a run, in the order in which it is asked."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from model.cost.parameters import flops_per_token
from model.parallel.groups import ParallelGroups
from model.parallel.part import ModelPart
from ops.grouped_mlp import product_tile_rows
from train.audit.format import FOLDER
from train.audit.log import AuditLog
from train.audit.observer import RoutingAudit
from train.checkpoint.folder import saved_steps
from train.components import experts_backend, training_dtype
from train.config.objective import NextTokenConfig
from train.config.run import RunConfig
from train.engine.deepspeed import Engine
from train.engine.schedule import Schedule
from train.objectives.cost import taught_flops
from train.observe.base import Observer
from train.observe.distillation import Distillation
from train.observe.gradients import GradientWatch
from train.observe.sample import RoutingSample
from train.observe.step_metrics import StepMetrics
from train.observe.updates import Updates
from train.progress import Progress
from train.timing.heartbeat import Heartbeat
from train.timing.host_syncs import HostSyncs
from train.timing.pauses import SaveSeconds, Speed
from train.timing.profile import Profiler
from train.timing.stragglers import StragglerWatch


def standard_observers(
    config: RunConfig,
    run_dir: Path,
    groups: ParallelGroups,
    engine: Engine,
    schedule: Schedule,
    progress: Progress,
    speed: Speed,
    teacher: RunConfig | None = None,
) -> list[Observer]:
    """The observers of a run, the same ones on all ranks: their `log` may be collective.

    Args:
        speed: the one that the run's result is read from.
        teacher: of an online teacher, whose work counts as the run's.
    """
    model, device = engine.module, engine.device
    detailed = config.tracker.metrics == "detailed"
    flops = flops_per_token(
        config.model, config.experts_per_token, config.train.seq_len, config.attention.arguments
    ) + taught_flops(config, teacher)

    # The sign of life comes first: whatever hangs in a phase hangs after it was named.
    found: list[Observer] = [
        Heartbeat(),
        HostSyncs(device, detailed),
        speed,
        Updates(schedule, progress.skipped_steps, config.balance, config.train.num_steps),
        StepMetrics(
            config.model,
            model.routers(),
            device,
            flops,
            config.balance,
            model.rank_shares,
            model.part.sparse.layers,
            detailed,
            model.router_kind,
            groups,
            model.part,
        ),
    ]
    if not isinstance(config.objective, NextTokenConfig):
        found.append(Distillation(device))
    if config.model.num_experts and detailed:
        found.append(GradientWatch(model, device))
    if config.profile.steps:
        rank = dist.get_rank()
        found.append(Profiler(config.profile, run_dir, device, rank, prints=rank == 0))
    found += [
        StragglerWatch(config.watchdog.straggler_ratio, device, groups.stage_size),
        SaveSeconds(),
    ]
    if config.model.num_experts:
        found.append(_routing_sample(config, groups, device))
    if config.model.num_experts and config.audit.sample_one_in:
        found.append(_routing_audit(config, run_dir, progress, model.part))
    return found


def _routing_sample(
    config: RunConfig, groups: ParallelGroups, device: torch.device
) -> RoutingSample:
    """Of the rank that writes, and with tiles where its experts compute its own tokens alone."""
    model = config.model
    backend, dtype = experts_backend(config, device), training_dtype(config)

    def tile_rows(slots: int) -> int:
        return product_tile_rows(backend, slots, model.num_experts, dtype)

    return RoutingSample(
        groups.stage_rank == 0,
        tile_rows if groups.expert_size == 1 else None,
        groups.pipeline if groups.pipeline_size > 1 else None,
    )


def _routing_audit(
    config: RunConfig, run_dir: Path, progress: Progress, part: ModelPart
) -> RoutingAudit:
    log = AuditLog(
        run_dir / FOLDER,
        config.audit,
        config.model.moe_layers,
        dist.get_rank(),
        progress.step if config.resume is not None else None,
        borders=lambda: saved_steps(run_dir / "checkpoints"),
        own=part.moe.own,
    )
    return RoutingAudit(log, config.train.seq_len)
