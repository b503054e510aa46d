"""Settings of the training side as frozen records. Imports no torch, so composing and validating stay fast.

Every record can list its own contradictions (`problems`); launch/validate.py adds those that span several records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from model.config import BalanceConfig, BudgetConfig, ExpertsConfig, FailSafeConfig, ModelConfig, experts_of_budget

MAX_BAD_ROWS = 0.01
"""Default of data.max_bad_rows."""


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    """Optimisation steps of the whole run; the learning-rate schedule ends here."""
    seq_len: int
    micro_batch_size: int
    """Sequences per device and forward pass."""
    global_batch_size: int
    """Sequences per optimisation step, over all ranks and accumulation steps."""
    batch_size_rampup: tuple[int, ...] | None = None
    """[start, increment, samples]: global batch grows from start to global_batch_size over that many samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"
    """In what gradients are added up, over micro-batches and over ranks. bf16, with precision=bf16 only, halves them, and
    their sum is off by 1.5% after 32 equal micro-batches, by 6% after 128."""
    clip_grad_norm: float = 1.0
    """Maximum global gradient norm; 0 switches clipping off."""
    log_interval: int = 10
    eval_interval: int = 0
    """Steps between held-out evaluations; 0: only at the end."""
    eval_max_sequences: int | None = None
    """Held-out sequences per evaluation; None: all of them."""
    stop_after_step: int | None = None
    """Save and end after this step while the schedule still spans num_steps (to continue with resume=DIR)."""
    sample_prompt: str | None = None
    """Text to continue at the end of training, as a glimpse of the model; None: no sample."""
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run, or skip the step. The batch is saved either way."""

    def problems(self) -> list[str]:
        found = [f"train.{name} is {getattr(self, name)}; it must be at least 1"
                 for name in ("num_steps", "seq_len", "micro_batch_size", "global_batch_size", "log_interval")
                 if getattr(self, name) < 1]
        for name in ("eval_interval", "clip_grad_norm"):
            if getattr(self, name) < 0:
                found.append(f"train.{name} is {getattr(self, name)}; it must not be negative (0 switches it off)")
        if self.grad_accum_dtype == "bf16" and self.precision != "bf16":
            found.append(f"train.grad_accum_dtype is bf16, but train.precision={self.precision} has no bf16 gradients; use "
                         "fp32, or set train.precision=bf16")
        if self.eval_max_sequences is not None and self.eval_max_sequences < 1:
            found.append(f"train.eval_max_sequences is {self.eval_max_sequences}; use null for all sequences")
        if self.stop_after_step is not None and self.stop_after_step < 1:
            found.append(f"train.stop_after_step is {self.stop_after_step}; it must be at least 1")
        return found


@dataclass(frozen=True)
class OptimConfig:
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    wsd_decay_steps: int | None = None
    """Steps of the final decay of decay_style=WSD."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def problems(self) -> list[str]:
        found = []
        if self.lr <= 0:
            found.append(f"optim.lr is {self.lr}; it must be positive")
        elif not 0 <= self.min_lr <= self.lr:
            found.append(f"optim.min_lr {self.min_lr} must be between 0 and optim.lr {self.lr}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.eps <= 0:
            found.append("optim.warmup_steps and optim.weight_decay must not be negative, optim.eps must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if (self.decay_style == "WSD") != (self.wsd_decay_steps is not None):
            found.append("optim.wsd_decay_steps belongs to optim.decay_style=WSD: set both or neither")
        return found


@dataclass(frozen=True)
class ParallelConfig:
    expert_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    ranks_per_node: int | None = None
    """Expert groups of more ranks exchange rows within nodes first, then between them; None: in one exchange."""
    placement: str | None = None
    """File of python -m launch.place: which rank serves which expert. None: consecutive blocks."""
    timeout_seconds: int = 1800
    """A collective that waits longer ends the job."""

    def problems(self) -> list[str]:
        found = []
        if self.expert_parallel_size < 1:
            found.append(f"parallel.expert_parallel_size is {self.expert_parallel_size}; it must be at least 1")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"):
            if getattr(self, name) != 1:
                found.append(f"parallel.{name} is {getattr(self, name)}; this version supports 1 (use ZeRO and expert "
                             "parallelism to spread the model)")
        if self.ranks_per_node is not None and (self.ranks_per_node < 1 or (
                self.expert_parallel_size > self.ranks_per_node and self.expert_parallel_size % self.ranks_per_node)):
            found.append(f"parallel.ranks_per_node is {self.ranks_per_node}; it must be positive and divide "
                         f"parallel.expert_parallel_size {self.expert_parallel_size}, or be null")
        if self.timeout_seconds < 1:
            found.append(f"parallel.timeout_seconds is {self.timeout_seconds}; it must be at least 1")
        return found


@dataclass(frozen=True)
class SlurmConfig:
    """What launch=slurm asks of sbatch."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Wall-clock limit, as sbatch reads it: 2-00:00:00."""
    gpus_per_node: int | None = None
    """None: launch.num_devices; 0: none are asked for."""
    requeue: bool = True
    """Queue the job again when it was stopped by its time limit or preempted; it then resumes."""
    extra: tuple[str, ...] = ()
    """More sbatch options, such as --exclusive."""


@dataclass(frozen=True)
class LaunchConfig:
    kind: Literal["inline", "deepspeed", "torchrun", "slurm"]
    """How processes start: in this process, by DeepSpeed's or torch's launcher, or by srun in a Slurm allocation."""
    num_devices: int = 1
    """Ranks per node."""
    num_nodes: int = 1
    hostfile: str | None = None
    """DeepSpeed hostfile: one "[USER@]HOST slots=N" a line. Hosts beyond num_nodes are spares."""
    launcher: Literal["pdsh", "openmpi", "mpich", "impi", "mvapich"] = "pdsh"
    """How launch=deepspeed reaches the hosts of the hostfile."""
    ssh_port: int | None = None
    node_rank: int | None = None
    """Which node this is, when every node starts the same command itself (Kubernetes); None: one command starts all."""
    master_addr: str | None = None
    """Address of rank 0; None: of the first host."""
    master_port: int | None = None
    """None: a free port."""
    listen_addr: str | None = None
    """Address on which the supervisor hears its ranks; None: loopback on one node, else the one that faces the hosts."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables set for every rank. Saved with the run, so no secrets."""
    forward_env: tuple[str, ...] = ()
    """More names or patterns (NCCL_*) of this process's variables to hand on to every rank."""
    secrets_file: str | None = None
    """File of NAME=VALUE lines, readable by you alone, that every node reads for its ranks; never copied or saved."""
    max_restarts: int = 0
    """How often a job that failed starts again from its last complete checkpoint."""
    restart_delay_seconds: float = 5.0
    """Wait before a restart; doubles while no step is gained."""
    elastic: bool = False
    """Restart on the hosts that are left when fewer than num_nodes can be reached."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    check_memory: bool = True
    """Refuse to start what does not fit the machine's memory by the plan (launch/machine_memory.py)."""
    dry_run: bool = False
    """Print the command and the checks, start nothing."""

    def problems(self) -> list[str]:
        found = []
        if self.num_devices < 1 or self.num_nodes < 1:
            found.append(f"launch.num_devices {self.num_devices} and launch.num_nodes {self.num_nodes} must be at least 1")
        for name in ("master_port", "ssh_port"):
            port = getattr(self, name)
            if port is not None and not 0 < port < 65536:
                found.append(f"launch.{name} is {port}; it must be between 1 and 65535")
        for name in ("max_restarts", "restart_delay_seconds"):
            if getattr(self, name) < 0:
                found.append(f"launch.{name} is {getattr(self, name)}; it must not be negative")
        if self.kind == "inline":
            if self.num_devices * self.num_nodes > 1:
                found.append(f"launch=inline runs one process, but launch.num_devices is {self.num_devices} and "
                             f"launch.num_nodes {self.num_nodes}; use launch=deepspeed or launch=torchrun")
            if self.max_restarts:
                found.append(f"launch.max_restarts is {self.max_restarts}, but launch=inline has no supervisor to restart "
                             "it; use launch=deepspeed or launch=torchrun (one device is enough)")
        return found + self._node_problems()

    @property
    def starts_here(self) -> bool:
        """Whether the ranks of this command run on this machine."""
        return self.kind != "slurm" and self.hostfile is None

    @property
    def by_node(self) -> bool:
        """Whether every node starts the same command itself."""
        return self.node_rank is not None and self.num_nodes > 1

    def _node_problems(self) -> list[str]:
        found = []
        several = self.num_nodes > 1
        if self.hostfile is not None and self.kind != "deepspeed":
            found.append(f"launch.hostfile={self.hostfile} is read by launch=deepspeed only; launch={self.kind} has its own "
                         "way to find nodes")
        if self.node_rank is not None:
            if not 0 <= self.node_rank < self.num_nodes:
                found.append(f"launch.node_rank is {self.node_rank}; with launch.num_nodes {self.num_nodes} it must be "
                             f"between 0 and {self.num_nodes - 1}")
            if self.kind not in ("deepspeed", "torchrun"):
                found.append(f"launch.node_rank is for launch=deepspeed and launch=torchrun, not launch={self.kind}")
            if several and (self.master_addr is None or self.master_port is None):
                found.append("launch.node_rank needs launch.master_addr and launch.master_port, the same on every node")
            if self.hostfile is not None:
                found.append("launch.hostfile starts all nodes from one command, launch.node_rank one node: drop one")
        elif several and self.kind == "deepspeed" and self.hostfile is None:
            found.append(f"launch.num_nodes is {self.num_nodes}; give launch=deepspeed a launch.hostfile=FILE to find them, "
                         "or start the command on every node with its launch.node_rank")
        elif several and self.kind == "torchrun":
            found.append(f"launch.num_nodes is {self.num_nodes}; with launch=torchrun start the command on every node with "
                         "its launch.node_rank, or use launch=deepspeed with launch.hostfile")
        if self.elastic and self.hostfile is None:
            found.append("launch.elastic chooses among the hosts of launch.hostfile; give one")
        if self.launcher != "pdsh" and self.hostfile is None:
            found.append(f"launch.launcher={self.launcher} reaches the hosts of launch.hostfile; give one")
        return found


@dataclass(frozen=True)
class WatchdogConfig:
    """When a job is taken for dead (launch/judge.py)."""

    timeout_seconds: float = 60.0
    """A rank that is gone, stopped, or makes no progress for longer ends the job. Work that has taken longer before may
    take four times as long as it did."""
    startup_seconds: float = 1800.0
    """Limit for starting and for every kind of work a rank does for the first time (it may compile)."""
    straggler_ratio: float = 1.5
    """A rank is reported as slow when its own work takes this many times the median; 0: not looked at."""

    def problems(self) -> list[str]:
        found = []
        if self.timeout_seconds < 2:
            found.append(f"watchdog.timeout_seconds is {self.timeout_seconds}; it must be at least 2")
        if self.startup_seconds < self.timeout_seconds:
            found.append(f"watchdog.startup_seconds {self.startup_seconds} must not be below watchdog.timeout_seconds "
                         f"{self.timeout_seconds}")
        if self.straggler_ratio != 0 and self.straggler_ratio <= 1:
            found.append(f"watchdog.straggler_ratio is {self.straggler_ratio}; it must be above 1, or 0 to switch it off")
        return found


@dataclass(frozen=True)
class SourceConfig:
    """One text source, in the words of datasets.load_dataset."""

    path: str
    """A Hub name, a builder (json, parquet, csv, text), or "sample" for the bundled text."""
    name: str | None = None
    split: str = "train"
    data_files: str | None = None
    """A file, by its literal name if there is one, else a pattern of files."""
    text_column: str = "text"
    """The one column that is read; the others may differ from file to file."""
    sample_by: Literal["line", "paragraph", "document"] = "document"
    """For path=text: what one document is."""
    weight: float = 1.0
    """Share of training samples, relative to the other sources."""
    max_documents: int | None = None


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None
    """A tokenizer.json or a folder holding one; None: train a byte-level BPE on the sources."""
    vocab_size: int = 32768
    """Size of the BPE to train."""
    end_of_document: str = "<|endoftext|>"


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig
    validation_fraction: float = 0.01
    """Share of each source's documents held out, chosen by a hash of their text; at least one document in all."""
    cache_dir: str = ".cache/data"
    """Where tokenised stores live, one folder per content of this config."""
    max_bad_rows: float = MAX_BAD_ROWS
    """Share of a source's rows that may be left out: null, missing, not text, broken."""

    def problems(self) -> list[str]:
        found = []
        if not self.sources:
            found.append("data.sources is empty; name at least one source")
        for i, source in enumerate(self.sources):
            if source.weight <= 0:
                found.append(f"data.sources[{i}].weight is {source.weight}; it must be positive")
            if source.path in ("json", "parquet", "text", "csv") and source.data_files is None:
                found.append(f"data.sources[{i}].path={source.path} needs data_files=FILE or a pattern")
            if source.max_documents is not None and source.max_documents < 2:
                found.append(f"data.sources[{i}].max_documents is {source.max_documents}; it must be at least 2, or null")
        if not self.tokenizer.end_of_document:
            found.append("data.tokenizer.end_of_document is empty; name the tokenizer's end-of-text token")
        if not 0 < self.validation_fraction < 1:
            found.append(f"data.validation_fraction is {self.validation_fraction}; it must be between 0 and 1")
        if not 0 <= self.max_bad_rows <= 1:
            found.append(f"data.max_bad_rows is {self.max_bad_rows}; it is a share of the rows, between 0 and 1")
        if self.tokenizer.path is None and self.tokenizer.vocab_size < 257:
            found.append(f"data.tokenizer.vocab_size is {self.tokenizer.vocab_size}; a byte-level BPE needs at least 257")
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    save_interval: int = 0
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    keep_last: int = 2
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss."""
    asynchronous: bool = False
    """Write while training goes on; costs host memory for one copy of what this rank writes."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (disk full) does to the run. The last complete one stays either way."""
    grace_seconds: float = 120.0
    """How long ranks may take to save after SIGTERM or SIGUSR1 before they are killed."""

    def problems(self) -> list[str]:
        found = []
        if self.save_interval < 0:
            found.append(f"checkpoint.save_interval is {self.save_interval}; it must not be negative")
        if self.keep_last < 1:
            found.append(f"checkpoint.keep_last is {self.keep_last}; at least the last one must be kept")
        if self.grace_seconds < 0:
            found.append(f"checkpoint.grace_seconds is {self.grace_seconds}; it must not be negative")
        return found


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key and a reachable server, else offline."""
    project: str = "loadstone"
    entity: str | None = None


@dataclass(frozen=True)
class TrackerConfig:
    """Sinks besides metrics.jsonl and routing.jsonl, which are always written."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    metrics: Literal["brief", "detailed"] = "brief"
    """detailed: every routing and attention metric of every layer, not only those marked L in docs/metrics.md."""
    media_interval: int = 10
    """Every so many logged steps a heatmap and histograms of the experts' load go to the sinks; 0: never."""

    def problems(self) -> list[str]:
        if self.media_interval < 0:
            return [f"tracker.media_interval is {self.media_interval}; it must not be negative (0 switches it off)"]
        return []


@dataclass(frozen=True)
class AlarmRule:
    """One alarm (train/alarms.py): a metric beyond a limit, for long enough."""

    metric: str
    """Name in metrics.jsonl; with * several, of which the worst counts: moe/budget_error/layer_*."""
    above: float | None = None
    below: float | None = None
    """The limit; exactly one of the two."""
    absolute: bool = False
    """Compare the size of the metric, whatever its sign."""
    for_steps: int = 0
    """It must have been beyond the limit for so many steps; 0: once is enough."""
    after_step: int | None = 0
    """Silent up to this step; None: until the budget has settled (train.alarms.settled)."""
    action: Literal["none", "freeze_bias", "top_k", "stop"] = "none"
    """While it rings: the selection bias stays as it is; adaptive routers choose plain top-k; the run is saved and ends."""
    points_at: Literal["none", "busiest", "idlest"] = "none"
    """Which expert the message names."""
    meaning: str = ""
    """In plain words, for people."""

    @property
    def threshold(self) -> float:
        limit = self.below if self.above is None else self.above
        assert limit is not None
        return limit

    @property
    def limit_text(self) -> str:
        return f"{'above' if self.above is not None else 'below'} {self.threshold:g}"

    def excess(self, value: float) -> float:
        """How far beyond the limit; not a number is furthest."""
        size = abs(value) if self.absolute else value
        distance = size - self.threshold if self.above is not None else self.threshold - size
        return math.inf if math.isnan(distance) else distance

    def beyond(self, value: float) -> bool:
        return self.excess(value) > 0

    def problems(self, path: str) -> list[str]:
        found = []
        if not self.metric:
            found.append(f"{path}.metric is empty; name a metric of metrics.jsonl")
        if (self.above is None) == (self.below is None):
            found.append(f"{path}: give one of above and below, the limit of {self.metric or 'the metric'}")
        for name in ("for_steps", "after_step"):
            if (getattr(self, name) or 0) < 0:
                found.append(f"{path}.{name} is {getattr(self, name)}; it must not be negative")
        return found


@dataclass(frozen=True)
class AuditConfig:
    """Which tokens went where, in RUN/audit (train/audit.py); read it with `python -m launch.audit run=RUN`."""

    sample_one_in: int = 256
    """Tokens are sampled by a hash of their id, the same ones in every layer; 0 switches the audit off."""
    max_flagged: int = 64
    """Tokens with a fallback reason are written beside the sample, up to this many per layer, micro-batch and rank."""

    def problems(self) -> list[str]:
        return [f"audit.{name} is {getattr(self, name)}; it must not be negative"
                for name in ("sample_one_in", "max_flagged") if getattr(self, name) < 0]


@dataclass(frozen=True)
class InferenceRouterConfig:
    """What a trained router can be asked to do differently."""

    budget: float | None = None
    """Mean experts per token; None: as trained. The routers are calibrated to it on training text first."""

    def problems(self) -> list[str]:
        if self.budget is not None and self.budget <= 0:
            return [f"router.budget is {self.budget}; it must be positive, or null for the budget of the training"]
        return []


@dataclass(frozen=True)
class ComponentConfig:
    """A class chosen by name with its own knobs: `_target_` and keyword arguments."""

    target: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class EvaluateConfig:
    run: str
    attention: ComponentConfig | None = None
    """Attention to use instead of the trained one; None: as trained."""
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: Literal["best", "latest"] = "best"
    batch_size: int = 8
    max_sequences: int | None = None

    def problems(self) -> list[str]:
        return self.router.problems() + [
            f"{name} is {value}; it must be at least 1"
            for name, value in (("batch_size", self.batch_size), ("max_sequences", self.max_sequences))
            if value is not None and value < 1]


@dataclass(frozen=True)
class GenerateConfig:
    run: str
    prompt: str
    attention: ComponentConfig | None = None
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: Literal["best", "latest"] = "best"
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: always the most likely token."""
    top_p: float = 0.95
    seed: int = 0

    def problems(self) -> list[str]:
        found = self.router.problems()
        if not self.prompt:
            found.append("prompt is empty; give some text")
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature != 0 and self.temperature < 1e-3:
            found.append(f"temperature is {self.temperature}; use 0 for the most likely token, or at least 0.001")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed is {self.seed}; it must be between 0 and 2**63 - 1")
        return found


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; conf/train.yaml composes it."""

    model: ModelConfig
    router: ComponentConfig
    attention: ComponentConfig
    dispatcher: ComponentConfig
    balance: BalanceConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    tracker: TrackerConfig
    launch: LaunchConfig
    deepspeed: dict[str, Any]
    """DeepSpeed's own settings, handed on as they are (launch/validate.py lists the accepted keys)."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    fail_safe: FailSafeConfig = field(default_factory=FailSafeConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    alarms: dict[str, AlarmRule] = field(default_factory=dict)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    experiment_name: str = "default"
    seed: int = 1234
    run_dir: str | None = None
    """Where the run lives; None: runs/<experiment_name>/<time>-<id>."""
    resume: str | None = None
    """A run directory to continue from its last complete checkpoint."""

    @property
    def experts_per_token(self) -> float:
        """Routed experts a token visits (their mean, for adaptive routers); 0 for a dense model."""
        if not self.model.num_experts:
            return 0.0
        arguments = self.router.arguments
        if "budget" in arguments:
            return experts_of_budget(self.model, float(arguments["budget"]), arguments.get("budget_unit", "experts"))
        return float(arguments.get("top_k", 0))

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        return self.train.global_batch_size // (self.train.micro_batch_size * data_parallel_size)
