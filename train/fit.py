"""A run from its config to its last checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.attention.config.base import AttentionConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.config import ModelConfig
from model.cost.parameters import count_parameters
from model.parallel.groups import ParallelGroups, initialize_parallel
from ops.router import select_backend as router_backend
from ops.sparse_attention import backend_for as attention_backend
from train import loop
from train.agenda import last_step_of
from train.checkpoint.folder import begins_anew
from train.checkpoint.writer import CheckpointWriter
from train.components import build_model, dealer_of, experts_backend, training_dtype
from train.config.data import labels
from train.config.run import RunConfig
from train.data.chat.samples import ChatSamples
from train.data.chat.show import shown_example
from train.data.loader import TrainingLoader
from train.data.open import held_out_rows, open_store, stream_of, training_samples
from train.data.store import TokenStore, TrainingSamples
from train.engine.compiled import compile_blocks
from train.engine.deepspeed import Engine
from train.engine.partition import partition_of
from train.engine.qk_clip import QkClip
from train.engine.schedule import Schedule
from train.guard.alarm_actions import AlarmActions
from train.guard.alarms import settled
from train.guard.routing import RoutingControl
from train.guard.step import StepGuard
from train.objectives.teachers import objective_of
from train.observe.attention import short_rows_note
from train.observe.base import Observer, Watch
from train.observe.probe import RoutingProbe
from train.observers import standard_observers
from train.parts import Parts
from train.pipeline.flow import Pipeline
from train.pretrained.start import fill_optimizer, starting_weights
from train.progress import Progress, resume
from train.rank.runtime import from_rank_zero, seed_everything
from train.rank.stop import StopSignal
from train.sinks.sinks import Sinks
from train.sinks.tracker import Tracker
from train.timing.compiling import FirstSteps
from train.timing.pauses import Speed

log = logging.getLogger("loadstone")


def fit(
    config: RunConfig,
    run_dir: Path,
    stop: StopSignal,
    resolved_config: str,
    plain_config: dict[str, Any],
    restarted: bool = False,
    observers: Sequence[Observer] = (),
    teacher: RunConfig | None = None,
    trial: bool = False,
) -> dict[str, Any] | None:
    """Train, evaluate and save, inside train.rank.runtime.process_group. Rank 0 returns the
    summary, others None.

    Args:
        run_dir: on a file system that all ranks share; stop: set when the process was asked to save
            and end.
        resolved_config: YAML text saved with checkpoints; plain_config: the same as data, for W&B.
        restarted: an attempt before may have ended without any checkpoint: then begin anew instead
            of refusing.
        observers: more of them than a run has by itself (train/observe/base.py), the same on all
            ranks.
        teacher: the config of a model that teaches while this one learns (config.objective).
        trial: steps alone, to see whether they fit: nothing is evaluated or saved.

    Raises:
        Stopped: on all ranks, when rank 0 was asked to stop while it prepared the data.
    """
    # Data and groups of ranks come first: the model is built under both.
    seed_everything(config.seed, dist.get_rank(), config.train.deterministic)
    store = open_store(config, run_dir, stop)
    # Its process is to be a fork of a small one.
    stream = stream_of(config, store, run_dir / "data")
    parallel = config.parallel
    groups = initialize_parallel(
        parallel.expert_parallel_size,
        parallel.timeout_seconds,
        parallel.ranks_per_node,
        parallel.context_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.tensor_parallel_size,
        parallel.context_gather_size,
    )
    model = build_model(config, groups, training_dtype(config), partition_of(config, groups))

    # Before there is an optimizer: beside the model one tensor at a time is in memory.
    weights = None
    if config.resume is None or (restarted and from_rank_zero(lambda: begins_anew(run_dir))):
        weights = starting_weights(config, run_dir)
    if weights is not None:
        weights.fill_model(model)
    engine = Engine(model, groups, config.train, config.optim, config.deepspeed, seed=config.seed)
    if config.train.compile == "blocks":
        compile_blocks(engine.module, engine.device)
    with contextlib.closing(engine):  # also where a checkpoint cannot be resumed
        schedule = Schedule(engine.param_groups, config.optim, config.train, groups.rows_size)
        loader = training_loader(config, store, groups, run_dir, stream)
        if any(source.max_epochs is not None for source in config.data.sources):
            loader.samples.require(schedule.num_samples(config.train.num_steps))

        updates_before = fill_optimizer(weights, engine, config)
        objective = objective_of(config, teacher, store, groups, engine.device)

        # Where the run stands, before anything asks: weights, random streams, samples are restored.
        progress = Progress()
        if config.resume is not None:
            progress = resume(engine, config, run_dir, loader, restarted)
        if weights is not None:
            progress.updates_before = updates_before
        writer = CheckpointWriter(
            run_dir, config.checkpoint, groups, resolved_config, parallel.timeout_seconds
        )

        # What writes the records, on one rank, which also says what begins.
        sinks = probe = None
        if dist.get_rank() == 0:
            tracker = open_tracker(config, run_dir, plain_config, progress)
            progress.wandb_id = tracker.wandb_id
            sinks = Sinks(tracker, config.train.num_steps, last_step_of(config.train))
            tell_beginning(config, groups, store, run_dir, progress, engine, loader)
            if weights is not None:
                log.info("weights  %s", weights)
            if config.model.num_experts:
                held_out = held_out_rows(config, store)
                probe = RoutingProbe(run_dir, held_out, config.model.vocab_size)

        # What looks, and what acts: kept apart, so that looking changes nothing.
        speed = Speed()
        own = standard_observers(
            config, run_dir, groups, engine, schedule, progress, speed, teacher
        )
        if config.train.compile == "blocks":
            own.append(FirstSteps(len(engine.module.compiled), sinks is not None))
        alarms = AlarmActions(
            settled(config.alarms, config.budget), progress.alarms, config.model.moe_layers
        )
        guard = StepGuard(
            progress.spike,
            config.fail_safe,
            config.train.on_nonfinite,
            progress.skipped_steps,
            run_dir,
            before_ending=writer.wait,
        )
        routing = RoutingControl(
            engine.module.routers(),
            engine.module.router_kind,
            engine.module.part.moe,
            groups,
            config.budget,
            config.fail_safe,
            engine.module.rank_shares,
            alarms.actions,
        )

        run = Parts(
            config=config,
            run_dir=run_dir,
            groups=groups,
            engine=engine,
            pipeline=Pipeline(engine, groups, config.parallel.overlap_experts),
            schedule=schedule,
            loader=loader,
            store=store,
            objective=objective,
            writer=writer,
            stop=stop,
            watch=Watch([*own, *observers]),
            speed=speed,
            probe=probe,
            guard=guard,
            routing=routing,
            qk_clip=None
            if config.optim.qk_clip is None
            else QkClip(config.optim.qk_clip, config.optim.qk_clip_interval),
            alarms=alarms,
            sinks=sinks,
            progress=progress,
            saved_step=progress.step,
        )
        try:
            summary = loop.train(run, keeps=not trial)
        finally:
            run.watch.close()
            loader.samples.close()

    if sinks is None:
        return None
    sinks.close(summary)
    return {"run_dir": str(run_dir), **summary}


def training_loader(
    config: RunConfig,
    store: TokenStore,
    groups: ParallelGroups,
    run_dir: Path,
    stream: TrainingSamples | None,
) -> TrainingLoader:
    """This rank's share of the training rows, in the order that the seed gives.

    Args:
        stream: the rows, where they are not those of the store.
    """
    settings = config.train
    return TrainingLoader(
        training_samples(config, store, run_dir / "data") if stream is None else stream,
        settings.seq_len,
        settings.micro_batch_size,
        store.end_of_document,
        groups.rows_rank,
        groups.rows_size,
        groups.parts_rank,
        groups.parts_size,
        dealer_of(config),
    )


def open_tracker(
    config: RunConfig, run_dir: Path, plain_config: dict[str, Any], progress: Progress
) -> Tracker:
    """The files of the run, without what a resumed run will write again, and its services."""
    return Tracker(
        run_dir,
        config.tracker,
        plain_config,
        f"{config.experiment_name}/{run_dir.name}",
        progress.step if config.resume is not None else None,
        progress.wandb_id,
        loop.evaluates_first(progress, config.train),
    )


def tell_beginning(
    config: RunConfig,
    groups: ParallelGroups,
    store: TokenStore,
    run_dir: Path,
    progress: Progress,
    engine: Engine,
    loader: TrainingLoader,
) -> None:
    """What is about to run, and which settings will do nothing or little in it."""
    for line in banner(config, groups, store, run_dir, progress, engine.device):
        log.info(line)
    if repeated := epochs_line(config, loader):
        log.info("epochs   %s", repeated)
    if engine.muon is not None:
        log.info("optimizer %s", engine.muon_line())
    if config.optim.freeze or config.lora.rank:
        log.info("trained  %s", trained_line(engine.trained_by_kind()))
    if config.fail_safe.rank_overload and groups.expert_size == 1:
        log.info(
            "fail_safe.rank_overload compares ranks of an expert group: with one there is "
            "nothing to limit"
        )
    note = short_rows_note(engine.module.sparse_attentions(), config.train.seq_len)
    if note is not None:
        log.warning(note)
    problem = held_out_rows(config, store).bytes_problem
    if problem is not None:
        log.info("%s", problem)
    if isinstance(loader.samples, ChatSamples):
        for line in loader.samples.description():
            log.info("%s", line)
        log.info("%s", shown_example(loader.samples, loader.consumed_samples))


def epochs_line(config: RunConfig, loader: TrainingLoader) -> str | None:
    """How often the run passes over each source; None: none of them is seen twice."""
    settings = config.train
    if settings.batch_size_rampup is not None:
        return None
    rows = settings.num_steps * settings.global_batch_size
    epochs = loader.samples.epochs(rows)
    if not epochs or max(epochs) <= 1:
        return None
    passes = zip(labels(config.data.sources), epochs, strict=True)
    return f"{', '.join(f'{label} {number:.3g}' for label, number in passes)} passes in all steps"


def trained_line(kinds: dict[str, tuple[int, int]]) -> str:
    """How many parameters of each kind are trained."""
    trained = sum(some for some, _ in kinds.values())
    whole = sum(number for _, number in kinds.values())
    parts = [
        f"{kind} frozen ({number:,})"
        if not some
        else f"{kind} {some:,}" + ("" if some == number else f" of {number:,}")
        for kind, (some, number) in sorted(kinds.items())
    ]
    return f"{trained:,} of {whole:,} parameters ({trained / whole:.2%}): {', '.join(parts)}"


def attention_line(
    attention: AttentionConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str:
    """Which back-end sparse attention has; nothing where there is none, or where it selects on two
    levels, which is plain torch everywhere.
    """
    if not isinstance(attention, SparseAttentionConfig) or attention.num_levels == 2:
        return ""
    group = model.num_heads // model.num_kv_heads
    name = attention_backend(
        device.type, model.attention_head_dim, group, attention.block_size, str(dtype)
    )
    return f", sparse attention {name}"


def banner(
    config: RunConfig,
    groups: ParallelGroups,
    store: TokenStore,
    run_dir: Path,
    progress: Progress,
    device: torch.device,
) -> list[str]:
    """What is about to run, in a few lines."""
    model, settings = config.model, config.train
    count = count_parameters(model, config.experts_per_token, config.attention.arguments)
    tokens = f"{sum(s['tokens'] for s in store.manifest['sources']):,} training tokens"
    if config.data.streaming:
        tokens = f"streamed, shuffled in windows of {config.data.stream.window_mib} MiB of text"
    micro_steps = config.gradient_accumulation_steps(groups.rows_size)
    backend = experts_backend(config, device)
    shape = (
        f"{model.num_experts} experts, {config.experts_per_token:g} per token, in "
        f"{len(model.decoder_moe_layers)} of "
        if model.num_experts
        else "dense, "
    )
    axes = []
    if groups.pipeline_size > 1:
        layers = stage_sizes(config)
        axes.append(f"{groups.pipeline_size} stages of {layers} layers")
    if groups.parts_size > 1 or axes:
        axes.append(f"rows {groups.rows_size}")
    if groups.gather_size > 1:
        of = f"{groups.heads_size} by heads x {groups.gather_size} that gather"
        axes.append(f"context {groups.context_size} ({of})")
    elif groups.context_size > 1:
        axes.append(f"context {groups.context_size}")
    if groups.tensor_size > 1:
        axes.append(f"tensor {groups.tensor_size}")
    where = "rows" if groups.parts_size > 1 else "ranks"
    if groups.pipeline_size > 1:
        where += " of a stage"
    shared = " x ".join(axes) + "; " if axes else ""
    return [
        f"model    {count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active; {shape}"
        f"{model.num_layers} layers",
        f"parallel {groups.stage_size * groups.pipeline_size} ranks: {shared}expert "
        f"{groups.expert_size} x expert data {groups.expert_data_size}, "
        f"ZeRO {config.zero_stage}, {settings.precision}",
        *nodes_line(groups, config.launch.num_devices, config.launch.num_nodes),
        f"batch    {settings.global_batch_size} sequences of {settings.seq_len} = "
        f"{settings.micro_batch_size} x "
        f"{groups.rows_size} {where} x {micro_steps} accumulation steps",
        f"data     {store.path} ({tokens}, vocabulary {store.vocab_size})",
        f"kernels  {device.type}; experts by {backend}{_rounding(config, backend)}, router "
        f"{router_backend(device, torch.float32)}"
        + attention_line(config.attention, model, device, training_dtype(config)),
        f"run      {run_dir} (step {progress.step} of {settings.num_steps})",
    ]


def stage_sizes(config: RunConfig) -> str:
    """Layers of each stage, those of its virtual stages apart: 8+7, 8+7."""
    return ", ".join("+".join(str(len(layers)) for layers in runs) for runs in config.stage_runs)


def _rounding(config: RunConfig, backend: str) -> str:
    """How the experts round, where they do."""
    if not config.model.num_experts or config.experts.precision == "native":
        return ""
    rounded = f" in {config.experts.precision}"
    if backend == "triton":
        return rounded
    return f"{rounded}, computed in {config.train.precision}"


def nodes_line(groups: ParallelGroups, num_devices: int, num_nodes: int) -> list[str]:
    """Which groups of ranks stay inside a node, where there are several; the hostfile's order says
    which rank is where.
    """
    if num_nodes == 1:
        return []
    world = groups.stage_size * groups.pipeline_size

    def within(size: int, stride: int) -> bool:
        """Whether groups of `size` ranks, `stride` apart, each lie on one node."""
        span = size * stride
        return all(
            len({(first + i * stride) // num_devices for i in range(size)}) == 1
            for start in range(0, world, span)
            for first in range(start, start + stride)
        )

    axes = {
        "tensor": (groups.tensor_size, 1),
        "context": (groups.context_size, groups.tensor_size),
        "heads": (groups.heads_size, groups.tensor_size),
        "gather": (groups.gather_size, groups.tensor_size * groups.heads_size),
        "expert": (groups.expert_size, 1),
        "stage": (groups.stage_size, 1),
        "pipeline": (groups.pipeline_size, groups.stage_size),
    }
    if groups.pipeline_size == 1:
        del axes["stage"], axes["pipeline"]
    if groups.gather_size == 1:
        del axes["heads"], axes["gather"]
    inside = [name for name, (size, stride) in axes.items() if size > 1 and within(size, stride)]
    across = [name for name, (size, _) in axes.items() if size > 1 and name not in inside]
    parts = [
        f"{', '.join(names)} {where}"
        for names, where in ((inside, "within nodes"), (across, "across nodes"))
        if names
    ]
    return [f"nodes    {num_nodes} of {num_devices} ranks: {'; '.join(parts)}"] if parts else []
