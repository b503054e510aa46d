"""Settings of the commands that write weights: launch.export, launch.branch, launch.quantize."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ops.grouped_mlp.spec import Stored
from train.config.commands.source import InferenceRouterConfig, problems_of_average
from train.config.training import problems_of_checkpoint


@dataclass(frozen=True)
class ExportConfig:
    run: str
    to: str
    """The folder to write; it must not exist."""
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """fp8: the linear layers as compressed-tensors' FP8_DYNAMIC, all else as bf16. Selection biases
    of routers stay fp32.
    """
    max_shard_size: float = 5.0
    """GB of a file; a larger tensor gets a file of its own."""
    verify: bool = True
    """Load the folder with transformers and compare logits of held-out text."""
    adapter: bool = False
    """Write the adapters of a run with lora.rank alone, as peft reads them, and not the weights
    with the adapters added.
    """
    average: int = 1
    """The mean of so many checkpoints of the run, up to the one that `checkpoint` names."""
    weights: Literal["native", "ema"] = "native"
    """ema: the moving average of the weights, of a run with optim.ema_decay."""

    def problems(self) -> list[str]:
        found = self.router.problems()
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        if self.router.budget is not None:
            found.append("router.budget has no place in config.json; give router.top_k")
        found += problems_of_average(self.average, None, self.weights)
        if self.adapter and (self.average > 1 or self.weights != "native"):
            found.append(
                f"adapter=true with average={self.average} weights={self.weights}: an average of A "
                "and one of B make another product; leave adapter=true out, and the weights are "
                "written with adapters added"
            )
        if self.adapter and self.dtype == "fp8":
            found.append("dtype=fp8 is of whole weights; give adapter=true a dtype of bf16")
        if self.max_shard_size <= 0:
            found.append(f"max_shard_size is {self.max_shard_size}; give GB, more than 0")
        return found


@dataclass(frozen=True)
class BranchConfig:
    run: str
    to: str
    """The run directory to make; it must not exist."""
    decay_steps: int
    """Steps of the decay, which ends the branch."""
    checkpoint: str = "latest"
    """best, latest, or a name: step-00000250. The learning rate must be constant there."""
    decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Form of the decay (optim.wsd_decay_style)."""
    min_lr: float | None = None
    """The learning rate at the end; None: optim.min_lr of the run."""

    def problems(self) -> list[str]:
        found = problems_of_checkpoint("checkpoint", self.checkpoint)
        if self.decay_steps < 1:
            found.append(f"decay_steps is {self.decay_steps}; it must be at least 1")
        return found


@dataclass(frozen=True)
class QuantizeConfig:
    run: str
    weights: Stored = "int8"
    """What the experts' weights become; all others stay as they are."""
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    batch_size: int = 8
    max_sequences: int | None = None
    """Held-out rows that are measured; None: all."""
    max_loss_increase: float = 0.01
    """Nats per token. Nothing is written where the upper end of the 95% interval lies above."""

    def problems(self) -> list[str]:
        found = [
            f"{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("batch_size", self.batch_size, 1),
                ("max_sequences", self.max_sequences, 2),
            )
            if value is not None and value < least
        ]
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        if self.max_loss_increase <= 0:
            found.append(f"max_loss_increase is {self.max_loss_increase}; it must be positive")
        return found
