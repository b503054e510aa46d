"""Settings of the training side as frozen records. Imports no torch, so composing and validating
stay fast.

Every record can list its own contradictions (`problems`); launch/config/contradictions.py adds
those that span several records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from model.attention.config.base import AttentionConfig
from model.config import (
    BalanceConfig,
    BudgetConfig,
    ExpertsConfig,
    FailSafeConfig,
    ModelConfig,
)
from model.cost.parameters import Trained, count_parameters
from model.cost.stages import balanced_split, even_split, ranges_of
from model.dispatch.config import DispatcherConfig
from model.routers.config import RouterConfig
from train.config.data import DataConfig
from train.config.launching import LaunchConfig, WatchdogConfig
from train.config.lora import LoraConfig, trained_of
from train.config.objective import NextTokenConfig, ObjectiveConfig
from train.config.training import (
    CheckpointConfig,
    InitConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from train.config.watching import AlarmRule, AuditConfig, ProfileConfig, TrackerConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; conf/train.yaml composes it."""

    model: ModelConfig
    router: RouterConfig
    attention: AttentionConfig
    dispatcher: DispatcherConfig
    balance: BalanceConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    tracker: TrackerConfig
    launch: LaunchConfig
    deepspeed: dict[str, Any]
    """DeepSpeed's own settings, handed on as they are (launch/config/contradictions.py lists the
    accepted keys).
    """
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    fail_safe: FailSafeConfig = field(default_factory=FailSafeConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    alarms: dict[str, AlarmRule] = field(default_factory=dict)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=NextTokenConfig)
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
        return self.router.experts_per_token(self.model)

    @property
    def trained(self) -> Trained:
        """How many parameters are trained: all, but for lora.rank and optim.freeze."""
        attention = self.attention.arguments
        count = count_parameters(self.model, self.experts_per_token, attention)
        return trained_of(self.lora, self.optim.freeze, self.model, attention, count)

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def under_zero(self, stage: int) -> RunConfig:
        """The run under another stage."""
        zero = {**self.deepspeed.get("zero_optimization", {}), "stage": stage}
        return replace(self, deepspeed={**self.deepspeed, "zero_optimization": zero})

    @property
    def stage_runs(self) -> tuple[tuple[range, ...], ...]:
        """The layers of each stage of the pipeline, a run for each of its virtual stages; of the
        whole model without one.
        """
        size, parts = self.parallel.pipeline_parallel_size, self.parallel.num_parts
        split = self.parallel.pipeline_split
        if split is None:
            split = _balanced(
                self.model,
                self.experts_per_token,
                self.train.seq_len,
                self.attention,
                parts,
                self.parallel.virtual_stages > 1,
            )
        runs = ranges_of(split)
        return tuple(runs[place::size] for place in range(size))

    @property
    def stage_layers(self) -> tuple[Sequence[int], ...]:
        """Numbers of the layers of each stage, ascending."""
        return tuple(
            runs[0] if len(runs) == 1 else [layer for run in runs for layer in run]
            for runs in self.stage_runs
        )

    def gradient_accumulation_steps(self, rows_size: int) -> int:
        """rows_size: ranks with rows of their own (ParallelConfig.rows_size)."""
        return self.train.global_batch_size // (self.train.micro_batch_size * rows_size)


@lru_cache(maxsize=256)
def _balanced(
    model: ModelConfig,
    experts_per_token: float,
    seq_len: int,
    attention: AttentionConfig,
    num_parts: int,
    is_virtual: bool,
) -> tuple[int, ...]:
    """Remembered: a search for a layout asks thousands of times."""
    cut = even_split if is_virtual else balanced_split
    return cut(model, experts_per_token, seq_len, attention.arguments, num_parts)
