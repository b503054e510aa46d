"""Learning rate and batch size as functions of progress, by megatron-core's calculators."""

from __future__ import annotations

from typing import Any

from train.config.training import OptimConfig, TrainConfig


class Schedule:
    """Learning rate by optimisation step, number of micro-batches by consumed samples.

    The learning rate warms up linearly from 0 over warmup_steps and then decays from lr to min_lr
    until num_steps.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        optim: OptimConfig,
        train: TrainConfig,
        data_parallel_size: int,
    ):
        from megatron.core.num_microbatches_calculator import (
            ConstantNumMicroBatchesCalculator,
            RampupBatchsizeNumMicroBatchesCalculator,
        )
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        class _Optimizer:  # the scheduler only reads param_groups
            pass

        optimizer = _Optimizer()
        optimizer.param_groups = param_groups  # type: ignore[attr-defined]
        self._param_groups = param_groups
        self._completed_steps = 0
        self._learning_rate = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=optim.warmup_steps,
            lr_decay_steps=train.num_steps,
            lr_decay_style=optim.decay_style,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=train.num_steps,
            wd_incr_style="constant",
            wsd_decay_steps=optim.wsd_decay_steps,
            lr_wsd_decay_style=optim.wsd_decay_style if optim.decay_style == "WSD" else None,
        )
        self._samples_a_micro_batch = train.micro_batch_size * data_parallel_size
        sizes = (train.global_batch_size, train.micro_batch_size, data_parallel_size)
        # rank 0 would print its settings
        quiet = {"decrease_batch_size_if_needed": False, "rank": 1}
        self._batch: Any = (
            RampupBatchsizeNumMicroBatchesCalculator(
                *sizes,
                **quiet,
                start_global_batch_size=train.batch_size_rampup[0],
                batch_size_increment=train.batch_size_rampup[1],
                ramup_samples=train.batch_size_rampup[2],
            )
            if train.batch_size_rampup
            else ConstantNumMicroBatchesCalculator(*sizes, **quiet)
        )

    def set_step(self, completed_steps: int) -> None:
        """Set the learning rate of the step that follows `completed_steps`. Warm-up starts at lr /
        warmup_steps.
        """
        self._learning_rate.num_steps = 0
        self._learning_rate.step(completed_steps + 1)
        # The calculator knows one weight decay and factors of it.
        for group in self._param_groups:
            if group.get("own_weight_decay") is not None:
                group["weight_decay"] = group["own_weight_decay"]
        # A rise of their own comes on top of everybody's.
        self._completed_steps = completed_steps
        for group in self._param_groups:
            group["lr"] *= self._risen(group)

    def _risen(self, group: dict[str, Any]) -> float:
        """Share of its learning rate that a group has in this step (optim.router_warmup_steps)."""
        over = group.get("warmup_steps", 0)
        return min(1.0, (self._completed_steps + 1) / over) if over else 1.0

    @property
    def learning_rate(self) -> float:
        first = self._param_groups[0]
        return float(first["lr"]) / (float(first.get("lr_factor", 1.0)) * self._risen(first))

    def num_samples(self, steps: int) -> int:
        """Sequences that so many steps from the beginning consume, on all ranks."""
        consumed = 0
        for _ in range(steps):
            consumed += self.num_micro_batches(consumed) * self._samples_a_micro_batch
        return consumed

    def num_micro_batches(self, consumed_samples: int) -> int:
        """Micro-batches per rank of the step that starts after `consumed_samples` sequences."""
        self._batch.update(consumed_samples, consistency_check=False)
        return int(self._batch.get())
