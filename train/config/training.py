"""Settings of the optimisation itself: steps, batches, precision, learning rate, parallel axes,
checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from train.config.upcycling import UpcycleConfig


@dataclass(frozen=True)
class InitConfig:
    """What a new run begins with."""

    path: str | None = None
    """A folder as the Hub has it: config.json, *.safetensors, the tokenizer's files. Shape, router
    and tokenizer come from it. None: weights are drawn (model.init).
    """
    run: str | None = None
    """A run whose weights a new one begins with: data, schedule, router and attention may be
    others.
    """
    checkpoint: str = "best"
    """Which checkpoint of init.run: best, latest, or a name, step-00000250."""
    moments: bool = False
    """Begin with the moments of init.run's optimizer as well, and with its count of updates, where
    the optimizer and all that is trained are the same. false: they begin at zero.
    """
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    """Make the MLPs of a dense model of init.path or init.run into experts."""

    def problems(self) -> list[str]:
        found = problems_of_checkpoint("init.checkpoint", self.checkpoint)
        found += self.upcycle.problems()
        if self.upcycle.num_experts and self.path is None and self.run is None:
            found.append(
                f"init.upcycle.num_experts is {self.upcycle.num_experts}, but there is no dense "
                "model whose MLPs would become experts; give it as init.path or init.run"
            )
        if self.moments and self.run is None:
            found.append(
                "init.moments is true, but moments are those of another run's optimizer; give it "
                "as init.run, or drop init.moments"
            )
        if self.moments and self.upcycle.num_experts:
            found.append(
                f"init.moments is true with init.upcycle.num_experts {self.upcycle.num_experts}, "
                "whose experts and routers have no moments yet; drop init.moments"
            )
        return found


def problems_of_checkpoint(key: str, name: str) -> list[str]:
    """Of a setting that chooses a checkpoint."""
    if name in ("best", "latest") or re.fullmatch(r"step-\d{8,18}", name):
        return []
    return [f"{key} is {name!r}; choose one of best, latest, or a name such as step-00000250"]


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    """Optimisation steps of the whole run; the learning-rate schedule ends here. num_tokens or
    num_epochs say it otherwise.
    """
    seq_len: int
    micro_batch_size: int
    """Sequences per device and forward pass; auto: the largest that fits by the plan and, when the
    run begins, by trial; a number from then on.
    """
    global_batch_size: int
    """Sequences per optimisation step, over all ranks and accumulation steps."""
    batch_size_rampup: tuple[int, ...] | None = None
    """[start, increment, samples]: global batch grows from start to global_batch_size over that
    many samples.
    """
    batch_size_rampup_tokens: int | None = None
    """Tokens over which the batch grows, also as 10B or 300M, in place of the number of samples:
    batch_size_rampup is then [start, increment]. None: it says samples.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"
    """In what gradients are added up, over micro-batches and over ranks. bf16, with precision=bf16
    only, halves them, and their sum is off by 1.5% after 32 equal micro-batches, by 6% after 128.
    """
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """What AdamW's master weights are kept in. bf16, with precision=bf16 only, saves 2 bytes a
    parameter at ZeRO 1 and 2: updates are computed in fp32 and rounded stochastically, moments
    stay fp32 (docs/concepts/bf16_masters.md).
    """
    mtp_coeff: float = 0.0
    """Weight of the loss of multi-token prediction, with model.num_mtp_layers (DeepSeek-V3: 0.3, at
    the end 0.1).
    """
    z_loss_coeff: float = 0.0
    """Weight of the z-loss of the output logits: the mean over targets of squared logsumexp (PaLM:
    1e-4). Those of multi-token prediction have none, and routers have balance.z_loss_coeff.
    """
    clip_grad_norm: float = 1.0
    """Maximum global gradient norm; 0 switches clipping off."""
    log_interval: int = 10
    eval_interval: int = 0
    """Steps between held-out evaluations; 0: only at the end."""
    eval_max_sequences: int | None = None
    """Held-out sequences per evaluation; None: all of them."""
    num_tokens: int | None = None
    """Training tokens of the whole run, also as 10B or 300M: num_steps is what they take. None:
    num_steps.
    """
    num_epochs: float | None = None
    """Passes over all training text: num_steps is what they take. None: num_steps."""
    stop_after_step: int | None = None
    """Save and end after this step while the schedule still spans num_steps (to continue with
    resume=DIR).
    """
    sample_prompt: str | None = None
    """Text to continue at the end of training, as a glimpse of the model; None: no sample."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile makes each block one graph for its passes in training; the first step
    takes as long as compiling does (docs/concepts/compiled_blocks.md).
    """
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run, or skip the step. The batch is
    saved either way.
    """

    def problems(self) -> list[str]:
        found = [
            f"train.{name} is {getattr(self, name)}; it must be at least 1"
            for name in (
                "num_steps",
                "seq_len",
                "micro_batch_size",
                "global_batch_size",
                "log_interval",
            )
            if getattr(self, name) < 1
        ]
        found += [
            f"train.{name} is {value}; it must be positive, or null"
            for name in ("num_tokens", "num_epochs", "batch_size_rampup_tokens")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        for name in ("eval_interval", "clip_grad_norm", "mtp_coeff", "z_loss_coeff"):
            if getattr(self, name) < 0:
                found.append(
                    f"train.{name} is {getattr(self, name)}; it must not be negative (0 switches "
                    "it off)"
                )
        if self.batch_size_rampup_tokens is not None and self.batch_size_rampup is None:
            found.append(
                f"train.batch_size_rampup_tokens is {self.batch_size_rampup_tokens}, but no batch "
                "grows; give train.batch_size_rampup=[start,increment] as well, or drop it"
            )
        if self.grad_accum_dtype == "bf16" and self.precision != "bf16":
            found.append(
                f"train.grad_accum_dtype is bf16, but train.precision={self.precision} has no bf16 "
                "gradients; use "
                "fp32, or set train.precision=bf16"
            )
        if self.master_dtype == "bf16" and self.precision != "bf16":
            found.append(
                f"train.master_dtype is bf16, but train.precision={self.precision} trains the "
                "masters themselves; use fp32, or set train.precision=bf16"
            )
        if self.eval_max_sequences is not None and self.eval_max_sequences < 1:
            found.append(
                f"train.eval_max_sequences is {self.eval_max_sequences}; use null for all sequences"
            )
        if self.stop_after_step is not None and self.stop_after_step < 1:
            found.append(f"train.stop_after_step is {self.stop_after_step}; it must be at least 1")
        return found


MUON_SETTINGS = (
    "momentum",
    "nesterov",
    "update_rms",
    "orthogonalize_steps",
    "orthogonalize_dtype",
)
"""Fields of OptimConfig that mean nothing to AdamW."""


@dataclass(frozen=True)
class GroupConfig:
    """Parameters with a learning rate and a weight decay of their own."""

    match: str
    """A kind of train/config/kinds.py (attention, experts, ...), or a pattern of parameters' names.
    """
    lr_factor: float = 1.0
    """Their learning rate, relative to that of the schedule."""
    weight_decay: float | None = None
    """None: optim.weight_decay, and 0 for vectors."""
    optimizer: Literal["adamw", "muon"] | None = None
    """None: as optim.optimizer says. muon: every matrix among them moves by Muon, and vectors by
    AdamW.
    """
    layers: tuple[int, ...] | None = None
    """[first, last]: of those parameters the ones of these layers alone, from 0 on. None: of all
    layers, and of none, as the embedding.
    """

    def problems(self, about: str) -> list[str]:
        found = []
        if not self.match:
            found.append(f"{about}.match is empty; name a kind or a pattern of parameters")
        if self.layers is not None and (
            len(self.layers) != 2 or not 0 <= self.layers[0] <= self.layers[1]
        ):
            found.append(
                f"{about}.layers is {list(self.layers)}; give [first, last], counted from 0, as in "
                "[0, 3]"
            )
        if not self.lr_factor > 0:
            found.append(
                f"{about}.lr_factor is {self.lr_factor}; it must be positive. To leave parameters "
                "as they are, name them in optim.freeze"
            )
        if self.weight_decay is not None and self.weight_decay < 0:
            found.append(f"{about}.weight_decay is {self.weight_decay}; it must not be negative")
        return found


@dataclass(frozen=True)
class OptimConfig:
    lr: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What moves the weights. muon: an orthogonalised momentum moves the matrices of attention,
    MLPs and experts; embedding, head, norms, routers and vectors stay with AdamW.
    """
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_fraction: float | None = None
    """Share of train.num_steps instead of warmup_steps."""
    decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    wsd_decay_steps: int | None = None
    """Steps of the final decay of decay_style=WSD."""
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Its form. minus_sqrt: 1 - sqrt of the share that is done (arXiv 2405.18392)."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay, 0.999 for example, in fp32
    beside the moments; weights=ema of other commands reads it. None: none.
    """
    momentum: float = 0.95
    """Of Muon: how much of the last step's momentum stays."""
    nesterov: bool = True
    """Of Muon: the gradient counts once more after it went into the momentum."""
    update_rms: float = 0.2
    """Of Muon: root mean square of an update at learning rate 1. 0.2 is about that of AdamW, so
    that learning rates carry over.
    """
    orthogonalize_steps: int = 5
    """Of Muon: iterations of Newton-Schulz."""
    orthogonalize_dtype: Literal["fp32", "bf16"] = "bf16"
    """Of Muon: what Newton-Schulz computes in, and what pieces of matrices travel in."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: kinds (embedding, head, norms, attention, indexer, router,
    experts, shared_experts, mlp) or patterns of names. They have no gradients and no moments.
    """
    groups: tuple[GroupConfig, ...] = ()
    """Parameters with their own learning rate, weight decay or optimizer; the first that matches
    holds.
    """
    qk_clip: float | None = None
    """Hold the attention logits of each head to this (K2: 100): after an update, queries and keys
    of a head with larger ones are scaled down. Of dense and latent attention, without QK-norm; the
    largest logit takes the products of queries and keys once more. None: none is clipped.
    """
    qk_clip_interval: int = 1
    """Steps between measurements: the others cost nothing, and nothing is clipped in them."""
    router_warmup_steps: int = 0
    """Steps over which the routers' learning rate rises from 0 to that of the others, on top of
    warmup_steps: first experts learn, then who gets them. 0: it is that of the others from the
    start.
    """
    layer_lr_decay: float | None = None
    """Factor on the learning rate from each layer to the one below: the head and what stands
    behind the last layer have optim.lr, the embedding the least. None: all have the same.
    """

    @property
    def uses_muon(self) -> bool:
        """Whether Muon may move anything."""
        return "muon" in (self.optimizer, *(group.optimizer for group in self.groups))

    def problems(self) -> list[str]:
        found = [
            problem
            for i, group in enumerate(self.groups)
            for problem in group.problems(f"optim.groups[{i}]")
        ]
        if self.lr <= 0:
            found.append(f"optim.lr is {self.lr}; it must be positive")
        elif not 0 <= self.min_lr <= self.lr:
            found.append(f"optim.min_lr {self.min_lr} must be between 0 and optim.lr {self.lr}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.eps <= 0:
            found.append(
                "optim.warmup_steps and optim.weight_decay must not be negative, optim.eps must be "
                "positive"
            )
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            found.append(
                f"optim.warmup_fraction is {self.warmup_fraction}; it must be at least 0 and below "
                "1, or null"
            )
        if self.qk_clip is not None and not self.qk_clip > 0:
            found.append(f"optim.qk_clip is {self.qk_clip}; it must be positive, or null")
        if self.qk_clip_interval < 1 or (self.qk_clip is None and self.qk_clip_interval != 1):
            found.append(
                f"optim.qk_clip_interval is {self.qk_clip_interval}; it must be at least 1, and "
                "belongs to optim.qk_clip"
            )
        if self.router_warmup_steps < 0:
            found.append(
                f"optim.router_warmup_steps is {self.router_warmup_steps}; it must not be negative "
                "(0 switches it off)"
            )
        if self.layer_lr_decay is not None and not 0 < self.layer_lr_decay <= 1:
            found.append(
                f"optim.layer_lr_decay is {self.layer_lr_decay}; it must be above 0 and at most 1, "
                "or null"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(
                f"optim.ema_decay is {self.ema_decay}; it must be above 0 and below 1, or null for "
                "no average"
            )
        if not 0 <= self.momentum < 1:
            found.append(f"optim.momentum is {self.momentum}; it must be in [0, 1)")
        if not self.update_rms > 0:
            found.append(f"optim.update_rms is {self.update_rms}; it must be positive")
        if not 1 <= self.orthogonalize_steps <= 20:
            found.append(
                f"optim.orthogonalize_steps is {self.orthogonalize_steps}; it must be between 1 "
                "and 20"
            )
        if not self.uses_muon:
            found += [
                f"optim.{name} is {getattr(self, name)}, but nothing is moved by Muon, whose "
                "setting it is; add optim=muon, or drop it"
                for name in MUON_SETTINGS
                if getattr(self, name) != OptimConfig.__dataclass_fields__[name].default
            ]
        if (self.decay_style == "WSD") != (self.wsd_decay_steps is not None):
            found.append(
                "optim.wsd_decay_steps belongs to optim.decay_style=WSD: set both or neither"
            )
        if self.decay_style != "WSD" and self.wsd_decay_style != "linear":
            found.append(
                f"optim.wsd_decay_style={self.wsd_decay_style} belongs to optim.decay_style=WSD, "
                f"which is {self.decay_style}; drop it"
            )
        return found


@dataclass(frozen=True)
class ParallelConfig:
    expert_parallel_size: int = 1
    tensor_parallel_size: int = 1
    """Ranks that share the matrices of attention, dense MLPs, embedding and head, and the tokens of
    every row between them; divides the key/value heads. Experts stay whole.
    """
    pipeline_parallel_size: int = 1
    """Stages, each with some of the layers and ranks of its own, that micro-batches go through one
    after the other; with ZeRO 0, 1 or 2.
    """
    pipeline_split: tuple[int, ...] | None = None
    """Layers of each stage, such as [9, 9, 8, 6], and of each virtual stage where there are such,
    in the order of the model. None: so that the slowest one is as fast as it can be (python -m
    launch.plan prints them).
    """
    virtual_stages: int = 1
    """Runs of layers that each stage of a pipeline has (interleaved 1F1B): a micro-batch goes round
    all stages so many times. Stages wait for each other as many times less, send each other as many
    times more, and hold more activations.
    """
    context_parallel_size: int = 1
    """Ranks that share the tokens of every row, and exchange heads in attention; divides the
    key/value heads, but for those that gather.
    """
    context_gather_size: int = 1
    """Of the ranks that share a row, so many gather keys and values, each for queries of its own,
    and the others exchange heads; divides context_parallel_size. 1: all exchange heads.
    """
    overlap_experts: bool = False
    """While the rows of one micro-batch travel to their experts and back, compute another: the
    forward pass of one and the backward pass of an earlier one are made by turns. Same numbers; a
    rank holds the activations of one more micro-batch, in a pipeline of up to twice as many.
    """
    ranks_per_node: int | None = None
    """Expert groups of more ranks exchange rows within nodes first, then between them; None: in one
    exchange.
    """
    placement: str | None = None
    """File of python -m launch.place: which rank serves which expert. None: consecutive blocks."""
    timeout_seconds: int = 1800
    """A collective that waits longer ends the job."""

    def rows_size(self, world_size: int) -> int:
        """Of so many ranks, those that have rows of their own: what batches are divided by."""
        return world_size // (self.parts_size * self.pipeline_parallel_size)

    @property
    def context_heads_size(self) -> int:
        """Of the ranks that share a row, those that exchange heads."""
        return self.context_parallel_size // self.context_gather_size

    @property
    def parts_size(self) -> int:
        """Ranks that share the tokens of a row."""
        return self.context_parallel_size * self.tensor_parallel_size

    @property
    def num_parts(self) -> int:
        """Runs of layers that the model is cut into, over all stages."""
        return self.pipeline_parallel_size * self.virtual_stages

    def stage_size(self, world_size: int) -> int:
        """Of so many ranks, those that hold the same layers: what ZeRO and experts share."""
        return world_size // self.pipeline_parallel_size

    def problems(self) -> list[str]:
        found = []
        for axis in ("expert", "tensor", "context", "pipeline"):
            name = f"{axis}_parallel_size"
            if getattr(self, name) < 1:
                found.append(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        context, gather = self.context_parallel_size, self.context_gather_size
        if gather < 1 or (context >= 1 and context % gather):
            found.append(
                f"parallel.context_gather_size is {gather}; it must be at least 1 and divide "
                f"parallel.context_parallel_size {context}"
            )
        split, size = self.pipeline_split, self.pipeline_parallel_size
        if self.virtual_stages < 1 or (self.virtual_stages > 1 and size == 1):
            found.append(
                f"parallel.virtual_stages is {self.virtual_stages}; it must be at least 1, and "
                "more than 1 takes parallel.pipeline_parallel_size of more than 1"
            )
        if split is not None and (len(split) != self.num_parts or min(split, default=0) < 1):
            virtual = f"{self.virtual_stages} virtual stages of each of " * (
                self.virtual_stages > 1
            )
            found.append(
                f"parallel.pipeline_split is {list(split)}; it must have a number of layers, at "
                f"least 1, for each of {virtual}the parallel.pipeline_parallel_size {size} stages, "
                "or be null"
            )
        if self.ranks_per_node is not None and (
            self.ranks_per_node < 1
            or (
                self.expert_parallel_size > self.ranks_per_node
                and self.expert_parallel_size % self.ranks_per_node
            )
        ):
            found.append(
                f"parallel.ranks_per_node is {self.ranks_per_node}; it must be positive and divide "
                f"parallel.expert_parallel_size {self.expert_parallel_size}, or be null"
            )
        if self.timeout_seconds < 1:
            found.append(
                f"parallel.timeout_seconds is {self.timeout_seconds}; it must be at least 1"
            )
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
    """What a checkpoint that cannot be written (disk full) does to the run. The last complete one
    stays either way.
    """
    grace_seconds: float = 120.0
    """How long ranks may take to save after SIGTERM or SIGUSR1 before they are killed."""

    def problems(self) -> list[str]:
        found = []
        if self.save_interval < 0:
            found.append(
                f"checkpoint.save_interval is {self.save_interval}; it must not be negative"
            )
        if self.keep_last < 1:
            found.append(
                f"checkpoint.keep_last is {self.keep_last}; at least the last one must be kept"
            )
        if self.grace_seconds < 0:
            found.append(
                f"checkpoint.grace_seconds is {self.grace_seconds}; it must not be negative"
            )
        return found
