"""fit(): a run from its config to its last checkpoint. The step is on this page."""

from __future__ import annotations

import logging
import math
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.balance import LayerStats, unpack_stats
from model.budget import hold_plain_top_k, update_routers
from model.flops import count_parameters, flops_per_token
from model.loss import training_loss
from model.parallel import ParallelGroups, initialize_parallel
from model.restart import RoutingFacts, State, adopt_state, state_of
from ops.all_to_all import total_communication
from ops.grouped_mlp import product_tile_rows, select_backend
from ops.router import RouterOutput
from ops.router import select_backend as router_backend
from train import heartbeat
from train.alarms import Alarms, AlarmStop, settled
from train.attention_metrics import short_rows_note
from train.audit import FOLDER, AuditLog
from train.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    load_engine,
    read_state,
    restore_rng,
    set_newer_aside,
)
from train.checkpoint_folder import begins_anew
from train.components import build_model
from train.config import RunConfig
from train.data.loader import Batch, TrainingLoader, validation_batches
from train.data.prepare import prepare
from train.data.store import TokenStore, TrainingSamples, ValidationRows
from train.data.tokenizer import tokenizer_problems
from train.engine import Engine
from train.evaluate import evaluate
from train.gradients import GradientWatch
from train.host_syncs import HostSyncs
from train.manifest import replacing
from train.metrics import StepMetrics, console_line
from train.nonfinite import NonFiniteError, describe
from train.probe import RoutingProbe
from train.routing_metrics import routing_details, tile_padding
from train.runtime import from_rank_zero, seed_everything
from train.schedule import Schedule
from train.spike import SpikeGuard
from train.stop import StopSignal
from train.straggler import StragglerWatch
from train.tracker import Tracker

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
    """train.alarms.Alarms.state."""
    evaluation_left: bool = False
    """Whether the evaluation of this step was left because some rank was asked to stop."""


def open_store(config: RunConfig, run_dir: Path, stop: StopSignal) -> TokenStore:
    """The run's token store; rank 0 makes it if the launcher has not. Collective.

    RUN/data gets the tokenizer and the manifest, so that the run can be sampled from without the store.

    Raises:
        ValueError: the sources cannot be read, the model's vocabulary does not cover the tokenizer's ids, or a resumed
            run would go on with other data than it began with.
        Stopped: rank 0 was asked to stop meanwhile.
    """
    def prepare_and_record() -> Path:
        if problems := tokenizer_problems(config.data.tokenizer, config.model.vocab_size):
            raise ValueError("; ".join(problems))
        with stop.obeyed_at_once():
            path = prepare(config.data, log.info)
        _record_data(path, run_dir / "data")
        return path

    store = TokenStore(from_rank_zero(prepare_and_record))
    if store.vocab_size > config.model.vocab_size:
        raise ValueError(f"the tokenizer's largest token id is {store.vocab_size - 1} but model.vocab_size is "
                         f"{config.model.vocab_size}; raise it or use a smaller tokenizer")
    return store


def _record_data(store: Path, folder: Path) -> None:
    known = (folder / "manifest.json").is_file()
    if known and TokenStore(folder).manifest["content"] != TokenStore(store).manifest["content"]:
        raise ValueError(f"the run began with other tokens than {store} now holds: its data files have changed; put "
                         "them back, or start a new run")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "token_bytes.npy", "manifest.json"):
        with replacing(folder / name) as scratch:
            shutil.copyfile(store / name, scratch)


def fit(config: RunConfig, run_dir: Path, stop: StopSignal, resolved_config: str, plain_config: dict[str, Any],
        restarted: bool = False) -> dict[str, Any] | None:
    """Train, evaluate and save, inside train.runtime.process_group. Rank 0 returns the summary, others None.

    Args:
        run_dir: on a file system that all ranks share; stop: set when the process was asked to save and end.
        resolved_config: YAML text saved with checkpoints; plain_config: the same as data, for W&B.
        restarted: an attempt before may have ended without any checkpoint: then begin anew instead of refusing.

    Raises:
        Stopped: on all ranks, when rank 0 was asked to stop while it prepared the data.
    """
    rank, settings = dist.get_rank(), config.train
    seed_everything(config.seed, rank, settings.deterministic)
    store = open_store(config, run_dir, stop)
    groups = initialize_parallel(config.parallel.expert_parallel_size, config.parallel.timeout_seconds,
                                 config.parallel.ranks_per_node)
    engine = Engine(build_model(config, groups), groups, settings, config.optim, config.deepspeed)
    schedule = Schedule(engine.param_groups, config.optim, settings, groups.data_size)
    samples = TrainingSamples(store, tuple(s.weight for s in config.data.sources), settings.seq_len, config.seed)
    loader = TrainingLoader(samples, settings.seq_len, settings.micro_batch_size, store.end_of_document,
                            groups.data_rank, groups.data_size)
    progress = Progress()
    if config.resume is not None:
        progress = _resume(engine, config, run_dir, loader, restarted)
    writer = CheckpointWriter(run_dir, config.checkpoint, groups, resolved_config,
                              config.parallel.timeout_seconds)
    tracker = None
    if rank == 0:
        tracker = Tracker(run_dir, config.tracker, plain_config, f"{config.experiment_name}/{run_dir.name}",
                          progress.step if config.resume is not None else None, progress.wandb_id)
        progress.wandb_id = tracker.wandb_id
        for line in banner(config, groups, store, run_dir, progress, engine.device):
            log.info(line)
        if config.fail_safe.rank_overload and groups.expert_size == 1:
            log.info("fail_safe.rank_overload compares ranks of an expert group: with one there is nothing to limit")
        if (note := short_rows_note(engine.module.sparse_attentions(), settings.seq_len)) is not None:
            log.warning(note)
    audit = None
    if config.audit.sample_one_in and config.model.num_experts:
        audit = AuditLog(run_dir / FOLDER, config.audit, config.model.moe_layers, rank,
                         progress.step if config.resume is not None else None)
    run = _Run(config, groups, engine, schedule, loader, store, writer, tracker, audit, progress, stop, run_dir)
    try:
        summary = run.train()
    finally:
        if audit is not None:
            audit.close()
        engine.close()
    if tracker is not None:
        tracker.close(summary)
        return {"run_dir": str(run_dir), **summary}
    return None


def _resume(engine: Engine, config: RunConfig, run_dir: Path, loader: TrainingLoader, restarted: bool) -> Progress:
    if restarted and from_rank_zero(lambda: begins_anew(run_dir)):
        return Progress()
    checkpoint = from_rank_zero(lambda: find_checkpoint(run_dir))
    state = read_state(checkpoint)
    fresh = state_of(engine.module.routers())
    updates = state["step"] - state.get("skipped_steps", 0)
    load_engine(engine, checkpoint, updates)
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})
    progress.spike = SpikeGuard(**state["spike"])
    _adopt(engine, config, progress, fresh, RoutingFacts.read(state.get("routing")), updates)
    loader.consumed_samples = progress.consumed_samples
    if not restore_rng(checkpoint, dist.get_rank(), dist.get_world_size(), state["world_size"]):
        log.info("the number of ranks changed from %d to %d: random streams start anew", state["world_size"],
                 dist.get_world_size())
    if dist.get_rank() == 0:
        set_newer_aside(checkpoint)
    log.info("resumed from %s (step %d)", checkpoint, progress.step)
    return progress


def _adopt(engine: Engine, config: RunConfig, progress: Progress, fresh: State, before: RoutingFacts | None,
           updates: int) -> None:
    """Settings that the restored state holds give way to the present ones."""
    after = routing_facts(engine, config)
    if after is None:
        return
    if adopt_state(engine.module.routers(), fresh, before, after, updates):
        log.info("another kind of router or score: bias, cuts and budget controllers start as in a new run")
    progress.spike = progress.spike.continued(before.spike if before is not None else progress.spike.steps > 0,
                                              config.fail_safe)


def routing_facts(engine: Engine, config: RunConfig) -> RoutingFacts | None:
    """What the buffers of the routers are made under; saved with every checkpoint."""
    return RoutingFacts.of(engine.module.routers(), config.balance, config.budget, config.fail_safe,
                           engine.module.rank_shares)


@dataclass
class _Run:
    config: RunConfig
    groups: ParallelGroups
    engine: Engine
    schedule: Schedule
    loader: TrainingLoader
    store: TokenStore
    writer: CheckpointWriter
    tracker: Tracker | None
    audit: AuditLog | None
    progress: Progress
    stop: StopSignal
    run_dir: Path
    bits_per_byte: float | None = None
    save_seconds: float = 0.0
    """How long training has stood still for checkpoints since the last logged step."""
    routings: tuple[RouterOutput, ...] = ()
    """Of the last micro-batch of the last logged step, on the rank that logs."""
    told_silent: bool = False
    """Whether the log says which alarms have no metric."""
    alarm_actions: frozenset[str] = frozenset()
    """What ringing alarms ask for, on all ranks."""

    def train(self) -> dict[str, Any]:
        """All steps; returns the summary."""
        config, settings, progress = self.config, self.config.train, self.progress
        model = config.model
        self.last_step = last_step = min(settings.num_steps, settings.stop_after_step or settings.num_steps)
        self.routers = self.engine.module.routers()
        self.metrics = StepMetrics(model, self.routers, self.engine.device,
                                   flops_per_token(model, config.experts_per_token, settings.seq_len,
                                                   config.attention.arguments), config.balance,
                                   self.engine.module.rank_shares,
                                   [a.layer_idx for a in self.engine.module.sparse_attentions()],
                                   config.tracker.metrics == "detailed")
        self.alarms = Alarms(settled(config.alarms, config.budget))
        self.alarms.restore(progress.alarms)
        self.alarm_actions = frozenset(self.alarms.actions())
        self.host_syncs = HostSyncs(self.engine.device, config.tracker.metrics == "detailed")
        self.gradients = None
        if self.routers and config.tracker.metrics == "detailed":
            self.gradients = GradientWatch(self.engine.module, self.engine.device)
        self.probe = None
        if self.tracker is not None and model.num_experts:
            self.probe = RoutingProbe(self.run_dir, ValidationRows(self.store, settings.seq_len), model.vocab_size)
        self.stragglers = StragglerWatch(config.watchdog.straggler_ratio, self.engine.device)
        if (problem := ValidationRows(self.store, settings.seq_len).bytes_problem) is not None:
            log.info("%s", problem)
        scalars: dict[str, Any] = {}
        first_step = saved_step = progress.step
        stopped = False
        tokens_before, seconds = progress.consumed_tokens, 0.0
        first_tokens = tokens_before  # the first log interval warms up and does not count towards the speed
        if progress.step >= last_step:
            log.info("nothing to train: the run is at step %d and train.num_steps is %d", progress.step, last_step)
        elif progress.evaluation_left:
            saved_step = self.evaluate_and_keep_best(saved_step)
        self.metrics.started = time.perf_counter()  # what was built since does not count as training time
        while progress.step < last_step and not stopped:
            started = time.perf_counter()
            with self.host_syncs.counting(self.logs(progress.step + 1)):
                stopped = self.optimisation_step()
            seconds += time.perf_counter() - started
            step, at_end = progress.step, progress.step == last_step
            if self.metrics.steps and (self.logs(step) or stopped):
                scalars = self.log_step(last_step)
                self.stop_on_alarm(saved_step)
                if first_tokens == tokens_before and not at_end and not stopped:
                    first_tokens, seconds = progress.consumed_tokens, 0.0
            paused = time.perf_counter()
            if settings.eval_interval and step % settings.eval_interval == 0 and not at_end and not stopped:
                saved_step = self.evaluate_and_keep_best(saved_step)
            save_now = config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0
            if save_now and not at_end and not stopped and saved_step != step:
                self.save()
                saved_step = step
            self.metrics.started += time.perf_counter() - paused  # evaluating and saving do not count as training time
        if saved_step != progress.step:
            self.save()  # before the evaluation, which must not cost the run its weights
            saved_step = progress.step
        if not stopped and progress.step > 0:
            self.evaluate_and_keep_best(saved_step)
            stopped = progress.evaluation_left
        heartbeat.beat(progress.step, "save")
        if progress.step != first_step:
            self.writer.require(progress.step)
        if stopped:
            log.info("stopped by a signal after step %d%s; continue with resume=%s", progress.step,
                     ", in its evaluation" if progress.evaluation_left else "", self.run_dir)
        return {
            "val_loss": progress.val_loss, "unigram_entropy": self.store.unigram_entropy,
            "best_val_loss": None if math.isinf(best := self.writer.best_loss()) else best,
            "train_loss": scalars.get("train/loss"),
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_second": (progress.consumed_tokens - first_tokens) / seconds if seconds else None,
            "max_load": scalars.get("moe/max_load"), "experts_per_token": scalars.get("moe/experts_per_token"),
            "step": progress.step, "tokens": progress.consumed_tokens, "skipped_steps": progress.skipped_steps,
            "stopped": stopped,
        }

    def logs(self, step: int) -> bool:
        """Whether the metrics are written after this step, which is then measured more closely than others."""
        return step % self.config.train.log_interval == 0 or step == self.last_step

    def optimisation_step(self) -> bool:
        """One optimiser step over all micro-batches of the global batch. True: some rank was asked
        to stop, and nothing of the step was done."""
        config, progress = self.config, self.progress
        step, first_sample = progress.step + 1, self.loader.consumed_samples
        heartbeat.beat(step, "data")
        self.schedule.set_step(progress.step)
        at_log_step = self.logs(step)
        with self.stragglers.own_work(at_log_step):
            batches = self.loader.next_step(self.schedule.num_micro_batches(first_sample))
        num_targets, num_tokens, stop = self._agree(batches)
        if stop:
            self.loader.consumed_samples = first_sample  # they come first when the run goes on
            return True
        stats = scope_counts = None
        losses, mark = [], self.metrics.mark()
        snapshot = progress.spike.takes_snapshot(progress.step, config.fail_safe)
        detailed = self.tracker is not None and at_log_step
        self.engine.module.set_step(progress.step)
        measures_communication = at_log_step and self.groups.expert_size > 1
        communication = []
        if self.gradients is not None:
            self.gradients.measuring = at_log_step
        if measures_communication:
            self.engine.module.measure_communication(True)
            started = time.perf_counter()
        for i, batch in enumerate(batches):
            heartbeat.beat(step, "forward")
            with self.stragglers.own_work(at_log_step):
                output = self.engine.forward(**batch.inputs(self.engine.device), previous_counts=scope_counts,
                                             keep_routing=self.audit is not None or detailed, snapshot=snapshot,
                                             frozen=progress.spike.frozen_steps > 0, measure_attention=at_log_step)
            if measures_communication:
                communication.append(self.engine.module.measure_communication(True))
                self.stragglers.waited(communication[-1].exposed_seconds)
            loss = training_loss(output, num_targets, num_tokens, config.balance)
            heartbeat.beat(step, "backward")
            self.engine.backward(loss, is_last=i == len(batches) - 1)
            losses.append(output.loss_sum.detach())
            stats = output.stats if stats is None else stats + output.stats
            scope_counts = output.scope_counts
            self.metrics.add(output, batch.num_targets, batch.num_tokens)
            if detailed:
                self.routings = tuple(RouterOutput(*(part.detach() for part in r)) for r in output.routings)
            if self.audit is not None and batch.token_ids is not None:
                self.audit.add(progress.step + 1, batch.token_ids, batch.token_mask, output.routings)
        heartbeat.beat(step, "step")
        self.grad_norm = self.engine.step()
        finite = math.isfinite(self.grad_norm)
        if measures_communication:
            communication.append(self.engine.module.measure_communication(False))
            self.metrics.add_communication(total_communication(communication), time.perf_counter() - started)
        if self.routers and stats is not None:
            self.update_routers(stats, first_sample, finite)
        if finite and progress.spike.update(self.grad_norm, snapshot, config.fail_safe):
            log.info("gradient norm %.3g at step %d is a spike: experts are chosen by the snapshot for %d steps",
                     self.grad_norm, step, config.fail_safe.freeze_steps)
        if not finite:
            self.not_finite(step, [float(loss) for loss in losses], batches, first_sample)
            self.metrics.revert(mark)
        progress.step = step
        progress.consumed_samples = self.loader.consumed_samples
        progress.consumed_tokens += num_tokens
        self.metrics.steps += 1
        return False

    def not_finite(self, step: int, losses: list[float], batches: list[Batch], first_sample: int) -> None:
        """Keep the batch, and end the run or go on without the step. Collective."""
        samples = (first_sample, self.loader.consumed_samples - 1)
        found = describe(step, self.grad_norm, losses, batches, samples, self.run_dir)
        if self.config.train.on_nonfinite == "stop":
            self.writer.wait()  # a checkpoint of before may still be on its way
            raise NonFiniteError(f"{found}; lower optim.lr and resume, or set train.on_nonfinite=skip")
        self.progress.skipped_steps += 1
        log.warning("%s: skipped (train.on_nonfinite=skip; %d so far)", found, self.progress.skipped_steps)

    def update_routers(self, stats: torch.Tensor, first_sample: int, finite: bool) -> None:
        """The one integer all-reduce of a step, and what follows from it: bias, budget, fallbacks, metrics, audit.

        A step that is not finite moves nothing and counts in no metric.
        """
        config = self.config
        if self.groups.data_size > 1:
            dist.all_reduce(stats, group=self.groups.data)
        layers: LayerStats = unpack_stats(stats, config.model.num_experts, self.routers[0].max_top_k)
        if finite:
            update_routers(self.routers, layers, config.balance, config.budget, config.fail_safe,
                           self.engine.module.rank_shares, "freeze_bias" in self.alarm_actions)
            if "top_k" in self.alarm_actions:
                hold_plain_top_k(self.routers, config.budget)
            self.metrics.add_stats(layers)
        if self.audit is not None:
            self.audit.end_step(self.progress.step + 1, first_sample * config.train.seq_len, layers.checksum)

    def _agree(self, batches: list[Batch]) -> tuple[int, int, bool]:
        """Targets and tokens of the whole step over all ranks, and whether any rank was told to stop."""
        local = torch.tensor([sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches),
                              int(self.stop.received)])
        dist.all_reduce(local)
        num_targets, num_tokens, stops = local.tolist()
        return num_targets, num_tokens, stops > 0

    def log_step(self, last_step: int) -> dict[str, Any]:
        """Reduce, write and print the metrics of the interval. Collective."""
        progress = self.progress
        heartbeat.beat(progress.step, "log")
        scalars, routing = self.metrics.reduce()
        if self.gradients is not None:
            scalars |= self.gradients.reduce()
        skew, straggler = self.stragglers.compare()
        if straggler is not None:
            log.warning("step %d: rank %d is a straggler, its own work takes %.1f times the median", progress.step,
                        straggler, skew)
            if dist.get_rank() == straggler:
                heartbeat.event("straggler", step=progress.step, ratio=round(skew, 2), host=socket.gethostname())
        scalars = {"train/loss": scalars.pop("train/loss"), "train/lr": self.schedule.learning_rate,
                   "train/grad_norm": self.grad_norm, "train/skipped_steps": progress.skipped_steps,
                   "perf/rank_skew": skew, "perf/save_seconds": self.save_seconds, **scalars}
        self.save_seconds = 0.0
        if self.tracker is not None:
            scalars |= routing_details(self.routings) | self.host_syncs.take()
            if self.groups.expert_size == 1:
                scalars |= tile_padding(self.routings, self.tile_rows())
            self.check_alarms(scalars, routing)
            self.tracker.log(progress.step, progress.consumed_tokens, scalars)
            if scalars.get("moe/layers_collapsed"):
                log.warning("step %d: %d MoE layers have collapsed onto a few experts and are routed to one expert a token "
                            "(fail_safe.collapse_share)", progress.step, scalars["moe/layers_collapsed"])
            if routing:
                self.tracker.log_routing(progress.step, progress.consumed_tokens, routing)
            self.routings = ()  # a record after a signal has no step of its own to look at
            eta = (last_step - progress.step) * scalars["perf/step_seconds"]
            log.info(console_line(progress.step, self.config.train.num_steps, scalars, eta))
        if any(rule.action != "none" for rule in self.config.alarms.values()):
            self.alarm_actions = from_rank_zero(lambda: frozenset(self.alarms.actions()))
        return scalars

    def tile_rows(self) -> int:
        """Rows of a tile of the experts' products in the last micro-batch."""
        if not self.routings:
            return 1
        model, dtype = self.config.model, torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        backend = select_backend(self.config.experts.backend, self.engine.device, dtype, model.hidden_size,
                                 model.expert_intermediate_size)
        return product_tile_rows(backend, self.routings[0].slots.numel(), model.num_experts, dtype)

    def check_alarms(self, scalars: dict[str, Any], routing: dict[str, Any]) -> None:
        """On the rank that logs: add alarm/<name> to the scalars, and tell people what changed."""
        assert self.tracker is not None
        progress = self.progress
        if not self.told_silent and (silent := self.alarms.silent(scalars)):
            log.info("alarms without a metric in this run: %s", ", ".join(
                f"{name} ({self.config.alarms[name].metric})" for name in silent))
        self.told_silent = True
        for event in self.alarms.check(progress.step, progress.consumed_tokens, scalars, routing.get("counts", ()),
                                       self.config.model.moe_layers):
            log.warning("step %d: ALARM %s %s: %s%s", event.step, event.alarm, event.event, event.message,
                        f" (action: {event.action})" if event.action else "")
            self.tracker.alarm(event)
        scalars |= self.alarms.scalars(scalars)
        progress.alarms = self.alarms.state()

    def stop_on_alarm(self, saved_step: int) -> None:
        """Save and end where an alarm asks for it. Collective."""
        if "stop" not in self.alarm_actions:
            return
        if saved_step != self.progress.step:
            self.save()
        self.writer.wait()
        names = from_rank_zero(lambda: [n for n in self.alarms.ringing() if self.config.alarms[n].action == "stop"])
        raise AlarmStop(f"alarm {', '.join(names)} at step {self.progress.step}: the run was saved and ends "
                        f"(alarms.{names[0]}.action=stop; {self.run_dir / 'alarms.jsonl'} says why). To go on, resume it "
                        f"with alarms.{names[0]}.action=none")

    def evaluate_and_keep_best(self, saved_step: int) -> int:
        """Held-out evaluation; saves when it is the best so far. Returns the newest saved step.
        Collective.

        When some rank is asked to stop meanwhile, it is left without a result: nothing is
        remembered or saved as the best.
        """
        settings, progress = self.config.train, self.progress
        rows = ValidationRows(self.store, settings.seq_len)
        if len(rows) == 0:
            log.info("no held-out documents: evaluation skipped")
            return saved_step
        batches = validation_batches(rows, settings.micro_batch_size, self.store.end_of_document,
                                     self.groups.data_rank, self.groups.data_size, settings.eval_max_sequences)

        def stopped() -> bool:
            heartbeat.beat(progress.step, "evaluate")
            progress.evaluation_left = self.stop.agreed()
            return progress.evaluation_left

        self.engine.module.eval()
        self.engine.module.set_step(progress.step)  # the stage that launch.evaluate finds in the checkpoint
        result = evaluate(self.engine.forward, batches, self.engine.device, self.routers,
                          probe=self.probe, stopped=stopped)
        self.engine.module.train()
        if result is None:
            log.info("asked to stop: the evaluation of step %d is left", progress.step)
            return saved_step
        progress.val_loss, self.bits_per_byte = result["val_loss"], result.get("bits_per_byte")
        log.info("eval step %d  val_loss %.4f  perplexity %.2f  bits_per_byte %s  unigram_entropy %.4f  "
                 "balance %.2fx", progress.step, result["val_loss"], result["perplexity"],
                 "unknown" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}",
                 self.store.unigram_entropy, result.get("moe/max_load", 1.0))
        if self.tracker is not None:
            self.tracker.log(progress.step, progress.consumed_tokens,
                             {f"eval/{k}": result[k] for k in ("val_loss", "perplexity", "bits_per_byte",
                                                               "experts_per_token") if k in result}
                             | (self.probe.measure(progress.step) if self.probe is not None else {}))
        sequences = min(settings.eval_max_sequences or len(rows), len(rows))
        best = from_rank_zero(lambda: self.writer.best_loss(sequences)) if self.config.checkpoint.keep_best else -math.inf
        if result["val_loss"] < best:
            if saved_step != progress.step and not self.save():
                return progress.step
            saved_step = progress.step
            if self.writer.wait():
                self.writer.mark_best(progress.step, result["val_loss"], sequences)
        return saved_step

    def save(self) -> bool:
        """False: it could not be written, and checkpoint.on_error says to go on. Collective."""
        heartbeat.beat(self.progress.step, "save")
        started = time.perf_counter()
        if self.audit is not None:
            self.audit.flush()
        facts = routing_facts(self.engine, self.config)
        state = {**asdict(self.progress), "routing": None if facts is None else asdict(facts)}
        saved = self.writer.save(self.engine, state) is not None
        self.save_seconds += time.perf_counter() - started
        return saved


def banner(config: RunConfig, groups: ParallelGroups, store: TokenStore, run_dir: Path, progress: Progress,
           device: torch.device) -> list[str]:
    """What is about to run, in a few lines."""
    model, settings = config.model, config.train
    count = count_parameters(model, config.experts_per_token, config.attention.arguments)
    tokens = sum(s["tokens"] for s in store.manifest["sources"])
    micro_steps = config.gradient_accumulation_steps(groups.data_size)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    backend = select_backend(config.experts.backend, device, dtype, model.hidden_size, model.expert_intermediate_size)
    shape = (f"{model.num_experts} experts, {config.experts_per_token:g} per token, in {len(model.moe_layers)} of "
             if model.num_experts else "dense, ")
    return [
        f"model    {count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active; {shape}"
        f"{model.num_layers} layers",
        f"parallel {groups.data_size} ranks: expert {groups.expert_size} x expert data {groups.expert_data_size}, "
        f"ZeRO {config.zero_stage}, {settings.precision}",
        f"batch    {settings.global_batch_size} sequences of {settings.seq_len} = {settings.micro_batch_size} x "
        f"{groups.data_size} ranks x {micro_steps} accumulation steps",
        f"data     {store.path} ({tokens:,} training tokens, vocabulary {store.vocab_size})",
        f"kernels  {device.type}; experts by {backend}, router {router_backend(device, torch.float32)}",
        f"run      {run_dir} (step {progress.step} of {settings.num_steps})",
    ]
