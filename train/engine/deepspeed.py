"""DeepSpeed behind one class: optimiser, ZeRO, precision, accumulation, clipping. The only file
that imports deepspeed.

Everything DeepSpeed-shaped lives here, private parts included, which is why its version is pinned:
- An engine treats expert parameters as such only if the model contains an instance of one of its
  own MoE classes. A parameterless AutoEPMoELayer (`_ExpertAnchor`) added to the model satisfies it
  under ZeRO 0-3.
- Expert groups come from megatron-core and are registered under DeepSpeed's name for them before
    initialisation.
- Scaling: stages 0 and 3 average gradients over all ranks of the stage, experts included (their
  gradients already hold the tokens of all expert-parallel peers). The loss handed in is this rank's
  share of a sum, hence the factor stage_size there. Stages 1 and 2 are told to sum: stage 2 would
  divide every micro-batch's gradient in bf16.
- Stage 0 averages per-rank norms when it clips with experts; here stage 0 clips by itself, with the
    exact norm.
- Gradients of bf16 weights are added up in fp32 (train.grad_accum_dtype). For that stage 1 would be
  given another optimiser, with state of another shape; `_one_zero_optimizer` keeps the one of stage
  2, which can do the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.loss import ModelOutput
from model.moe.layer import MoELayer
from model.parallel.family import (
    Family,
    cut_of,
    family_of,
    is_expert_parameter,
    own_part,
    own_shape,
)
from model.parallel.groups import ParallelGroups
from model.parallel.topology import StageTopology
from model.request import SUMS_ALONE, ForwardRequest, TokenBatch
from train.config.training import OptimConfig, TrainConfig
from train.engine.average import AVERAGE
from train.engine.frozen import read_frozen, write_frozen
from train.engine.library import (
    _anchor,
    _join_stages,
    _one_zero_optimizer,
    deepspeed_settings,
    import_deepspeed,
    zero_stage_of,
)
from train.engine.muon.masters import matrices_of, place_matrices
from train.engine.muon.optimizer import MOMENTUM, Muon
from train.engine.optimizer import build_optimizer, freeze, trained_by_kind
from train.engine.partition import mark_family, place_buffers
from train.engine.rounding import RoundedAdamW, place_masters

STATE_KEYS = ("fp32", "exp_avg", "exp_avg_sq")
"""What a checkpoint holds per parameter: the fp32 master weight and AdamW's two moments."""
MUON_STATE_KEYS = ("fp32", MOMENTUM)
"""What it holds of a parameter that Muon moves."""


class Engine:
    """A model under DeepSpeed.

    One optimisation step is `forward` and `backward` per micro-batch, the last with `is_last=True`,
    then `step`.

    Args:
        model: on any device, or its weights shared out already (train/engine/partition.py); moved
            and wrapped. Gains one parameterless submodule when it has experts.
        deepspeed_config: the user's DeepSpeed keys (zero_optimization and others), validated
            before.
        seed: of rounding masters of bf16.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParallelGroups,
        train: TrainConfig,
        optim: OptimConfig,
        deepspeed_config: dict[str, Any],
        seed: int = 0,
    ):
        deepspeed = import_deepspeed()
        self.groups = groups
        self.stage = zero_stage_of(deepspeed_config)
        self.loss_factor = groups.stage_size if self.stage in (0, 3) else 1
        self.clip_grad_norm = train.clip_grad_norm
        self.grad_norm = 0.0
        freeze(model, optim.freeze)
        expert_group = self._mark_families(model)
        rounds = train.master_dtype == "bf16"
        optimizer = build_optimizer(model, optim, expert_group, seed if rounds else None)
        # Asked before ZeRO puts flat tensors in their place.
        self._by_muon = {
            parameter
            for group in optimizer.param_groups
            if group["muon"]
            for parameter in group["params"]
        }
        config = deepspeed_settings(groups, train, deepspeed_config)
        _one_zero_optimizer(deepspeed.DeepSpeedEngine)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [MoELayer])
            place_buffers(model)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=StageTopology(groups)
        )
        self.average = optimizer.average
        self.module = self.deepspeed.module
        self.device = torch.device(self.deepspeed.device)
        if groups.pipeline_size > 1 and self.stage > 0:
            _join_stages(self.deepspeed.optimizer, groups.pipeline)
        if isinstance(optimizer, RoundedAdamW):
            place_masters(optimizer, self.module, self.deepspeed.optimizer)
        self.muon: Muon | None = None
        if isinstance(optimizer, Muon):
            self.muon = optimizer
            place_matrices(
                optimizer, self.module, self.deepspeed.optimizer, self.stage, self.device
            )

    def _mark_families(self, model: nn.Module) -> str | None:
        """Tell DeepSpeed of the families that are not on every rank alike, which to it are all
        kinds of experts; returns its name of the routed ones, None where there are none.
        """
        apart = [p for p in model.parameters() if family_of(p) is not Family.REPLICATED]
        names = {family_of(p): mark_family(p, self.groups) for p in apart}
        # Where none of them is trained there is no group of theirs, which DeepSpeed would insist
        # on.
        if any(parameter.requires_grad for parameter in apart):
            layer = next((m for m in model.modules() if isinstance(m, MoELayer)), None)
            number = 1 if layer is None else layer.router.spec.num_experts
            model.add_module("expert_anchor", _anchor(number))
        return names.get(Family.EXPERT)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.deepspeed.optimizer.param_groups
        return groups

    def forward(
        self,
        batch: TokenBatch,
        request: ForwardRequest = SUMS_ALONE,
        hidden: torch.Tensor | None = None,
        lap: int = 0,
    ) -> ModelOutput:
        """Transformer.forward of this rank's micro-batch."""
        # By keyword: ZeRO-3 would wrap every positional tensor, and these need no gradient.
        output: ModelOutput = self.deepspeed(batch=batch, request=request, before=hidden, lap=lap)
        return output

    def backward(
        self, loss: torch.Tensor, is_last: bool, carried: torch.Tensor | None = None
    ) -> None:
        """Accumulate the gradient of this rank's share of the step's loss; `is_last` reduces over
        ranks.

        The shares of all ranks and micro-batches add up to the loss whose gradient is applied.
        carried: a zero that takes gradients which other stages have made of their shares, and
        scaled as these are here.
        """
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        loss = loss * self.loss_factor
        if carried is not None:
            loss = loss + carried
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self.deepspeed.step()  # only advances DeepSpeed's micro-step counters

    def step(self) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping.

        When the norm is not finite, on any rank and so on all, weights and moments stay as they
        are.
        """
        if self.stage == 0:
            self.grad_norm = self._clip_stage0()
            if not math.isfinite(self.grad_norm):
                for parameter in self.module.parameters():
                    parameter.grad = None
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            # On a non-finite gradient ZeRO skips the update without a word and keeps the previous
            # norm.
            overflow = getattr(self.deepspeed.optimizer, "overflow", False)
            self.grad_norm = math.nan if overflow else float(self.deepspeed.get_global_grad_norm())
        return self.grad_norm

    def _clip_stage0(self) -> float:
        """Global norm over dense parameters and all experts, and its clipping: what stages 1-3
        do.
        """
        families = list(Family)
        squares = torch.zeros(len(families), dtype=torch.float64, device=self.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                squares[families.index(family_of(parameter))] += (
                    parameter.grad.double().square().sum()
                )
        for i, family in enumerate(families):
            if (group := self.groups.shards(family)) is not None:
                dist.all_reduce(squares[i : i + 1], group=group)
        if self.groups.pipeline_size > 1:
            dist.all_reduce(squares, group=self.groups.pipeline)
        norm = float(squares.sum().sqrt())
        if self.clip_grad_norm > 0 and norm > self.clip_grad_norm:
            factor = self.clip_grad_norm / (norm + 1e-6)
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return norm

    def full_gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The reduced gradient of one parameter, between the last `backward` and `step`
        (collective; for tests).
        """
        from deepspeed.utils import safe_get_full_grad

        gradient: torch.Tensor | None = safe_get_full_grad(parameter)
        return None if gradient is None else self._uncut(parameter, gradient)

    # --- state for checkpoints, one full parameter at a time --------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.module.named_parameters()

    def parameter_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of a parameter that tensor parallelism has cut, that of the whole."""
        own = own_shape(parameter)
        how = cut_of(parameter)
        return own if how is None else how.whole_shape(own)

    def _uncut(self, parameter: nn.Parameter, own: torch.Tensor) -> torch.Tensor:
        """The whole of which every rank of the tensor group has its part. Collective over it."""
        how = cut_of(parameter)
        if how is None:
            return own
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(how.size)]
        dist.all_gather(parts, own, group=self.groups.tensor)
        return how.whole(parts)

    def state_keys(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What there is of a parameter to save: one that is frozen has no moments."""
        if not parameter.requires_grad:
            return ("fp32",)
        keys = MUON_STATE_KEYS if parameter in self._by_muon else STATE_KEYS
        return keys if self.average is None else (*keys, AVERAGE)

    def trained_by_kind(self) -> dict[str, tuple[int, int]]:
        """Kind of parameters -> elements that are trained, and elements, over all ranks."""
        experts = self.groups.expert_size
        return trained_by_kind(
            (name, p, self.parameter_shape(p).numel() * (experts if is_expert_parameter(p) else 1))
            for name, p in self.named_parameters()
        )

    def muon_line(self) -> str:
        """How much Muon moves, and what that costs this rank: for whoever starts a run, since a
        parameter that the wrong optimizer has shows nowhere else.
        """
        assert self.muon is not None
        size = self.groups.expert_size
        moved = whole = num_matrices = 0
        for name, parameter in self.named_parameters():
            ranks = size if is_expert_parameter(parameter) else 1
            shape = self.parameter_shape(parameter)
            if parameter.requires_grad:
                whole += ranks * shape.numel()
            if parameter in self._by_muon:
                moved += ranks * shape.numel()
                num_matrices += ranks * len(matrices_of(name, shape))
        sent = self.muon.sent_bytes
        where = "of this stage " if self.groups.pipeline_size > 1 else ""
        return (
            f"{where}muon moves {moved:,} parameters in {num_matrices:,} matrices, adamw the other "
            f"{whole - moved:,}"
            + (f"; this rank sends {sent:,} bytes a step for it" if sent else "")
        )

    def gather_state(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """fp32 master weight or optimiser moment of one parameter, in full (for experts: of the
        local experts).

        Collective over the parameter's own data-parallel group, and over the tensor group where it
        is cut. key: one of its `state_keys`.
        """
        return self._uncut(parameter, self._gather_own(parameter, key))

    def _gather_own(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        state: torch.Tensor
        if not parameter.requires_grad:
            assert key == "fp32", key
            return read_frozen(parameter).float()
        if self.stage == 0:
            state = (
                parameter.data if key == "fp32" else self.deepspeed.optimizer.state[parameter][key]
            )
            return state
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = (
            safe_get_full_fp32_param(parameter)
            if key == "fp32"
            else safe_get_full_optimizer_state(parameter, key)
        )
        return state.float()

    def prepare_gather(self) -> None:
        """Call once before a round of gather_state.

        DeepSpeed 0.19.8 links optimiser-state fragments once, after the first group's first step,
        which leaves the other groups (all experts) unlinked.
        """
        if self.stage in (1, 2):
            optimizer = self.deepspeed.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def prepare_scatter(self, step: int, before: int = 0) -> None:
        """Create empty state with AdamW's step counter set, to be filled by scatter_state.

        Every state gets a step tensor of its own: AdamW increments in place, a shared one would
        count several times.

        Args:
            step: updates of this run.
            before: updates of the runs that its moments came from (init.moments). AdamW's bias
                correction counts them, the moving average of the weights, which began with this
                run, does not.
        """
        optimizer = self.deepspeed.optimizer
        inner = optimizer if self.stage == 0 else optimizer.optimizer
        if self.stage == 0:
            masters = [p for p in self.module.parameters() if p.requires_grad]
        elif self.stage in (1, 2):
            masters = list(optimizer.single_partition_of_fp32_groups)
        else:
            masters = list(optimizer.fp32_partitioned_groups_flat)
        fused = bool(inner.param_groups[0].get("fused"))
        for master in masters:
            if self.average is not None:
                inner.state[master][AVERAGE] = self.average.begin(master, step)
            if self.muon is not None and master in self.muon.layouts:
                inner.state[master][MOMENTUM] = torch.zeros_like(master)
                continue
            inner.state[master].update(
                step=torch.tensor(float(step + before), device=master.device if fused else "cpu"),
                exp_avg=torch.zeros_like(master, dtype=torch.float32),
                exp_avg_sq=torch.zeros_like(master, dtype=torch.float32),
            )
        self.prepare_gather()

    def scatter_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set this rank's part of a parameter's master weight or moment from the full tensor."""
        value = own_part(parameter, value).to(self.device)
        if not parameter.requires_grad:
            assert key == "fp32", key
            write_frozen(parameter, value)
            return
        if self.stage == 0:
            target = (
                parameter.data if key == "fp32" else self.deepspeed.optimizer.state[parameter][key]
            )
            target.copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == "fp32":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def scale_rows(self, factors: dict[str, torch.Tensor]) -> None:
        """Multiply rows of master weights, and what the forward pass uses of them. Collective.

        Args:
            factors: name of a parameter -> [rows], the same on every rank.
        """
        named = dict(self.named_parameters())
        with torch.no_grad():
            for name, rows in factors.items():
                value = self.gather_state(named[name], "fp32")
                by_row = rows.to(value.device).view(-1, *[1] * (value.dim() - 1))
                self.scatter_state(named[name], "fp32", value * by_row)
        # Whole small parameters, which stage 3 keeps between steps, are gathered again only where
        # they were let go before.
        if self.stage == 3:
            self.deepspeed.optimizer._partition_all_parameters()
        self.finish_scatter()

    def finish_scatter(self) -> None:
        """Copy the fp32 masters into the weights the forward pass uses."""
        optimizer = self.deepspeed.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[group].data.copy_(master.data)
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def close(self) -> None:
        from deepspeed.utils import groups as ds_groups

        self.deepspeed.destroy()
        # whoever uses DeepSpeed next in this process would ask for groups that are gone
        ds_groups.mpu = None
