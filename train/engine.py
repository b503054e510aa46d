"""DeepSpeed behind one class: optimiser, ZeRO, precision, accumulation, clipping. The only file that imports deepspeed.

Everything DeepSpeed-shaped lives here, private parts included, which is why its version is pinned:
- An engine treats expert parameters as such only if the model contains an instance of one of its own MoE classes. A
  parameterless AutoEPMoELayer (`_ExpertAnchor`) added to the model satisfies it under ZeRO 0-3.
- Expert groups come from megatron-core and are registered under DeepSpeed's name for them before initialisation.
- Scaling: stages 0 and 3 average gradients over all data-parallel ranks, experts included (their gradients already hold the
  tokens of all expert-parallel peers). The loss handed in is this rank's share of a sum, hence the factor data_size there.
  Stages 1 and 2 are told to sum: stage 2 would divide every micro-batch's gradient in bf16.
- Stage 0 averages per-rank norms when it clips with experts; here stage 0 clips by itself, with the exact norm.
- Gradients of bf16 weights are added up in fp32 (train.grad_accum_dtype). For that stage 1 would be given another optimiser,
  with state of another shape; `_one_zero_optimizer` keeps the one of stage 2, which can do the same.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.experts import is_expert_parameter
from model.loss import ModelOutput
from model.moe import MoELayer
from model.parallel import MegatronTopology, ParallelGroups
from train.config import OptimConfig, TrainConfig
from train.optim import build_optimizer

STATE_KEYS = ("fp32", "exp_avg", "exp_avg_sq")
"""What a checkpoint holds per parameter: the fp32 master weight and AdamW's two moments."""


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly and without its start-up compilation on CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    # init_distributed would compile a shared-memory all-reduce for CPU: minutes, and an error without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _anchor(num_experts: int) -> nn.Module:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class _ExpertAnchor(AutoEPMoELayer):
        """Has no parameters and is never called; tells the engine that the model holds experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            pass  # the groups are registered already

    return _ExpertAnchor()


def _register_expert_groups(groups: ParallelGroups) -> str:
    """Enter megatron-core's expert groups in DeepSpeed's tables; returns the name parameters refer to them by."""
    from deepspeed.utils import groups as ds_groups

    name = f"ep_size_{groups.expert_size}"
    ds_groups._EXPERT_PARALLEL_GROUP[name] = groups.expert
    ds_groups._EXPERT_DATA_PARALLEL_GROUP[name] = groups.expert_data
    ds_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(groups.expert)
    ds_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(groups.expert_data)
    return name


def _precision_of_sums(train: TrainConfig, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings for how gradients of bf16 weights are added up: over micro-batches, and over ranks."""
    if train.precision != "bf16":
        return {}
    return {"data_types": {"grad_accum_dtype": train.grad_accum_dtype},
            "communication_data_type": deepspeed_config.get("communication_data_type") or train.grad_accum_dtype}


def _one_zero_optimizer(engine_class: Any) -> None:
    """Let DeepSpeed's engine take the ZeRO optimizer of stages 1 and 2 for stage 1 whatever the dtype of the sums.

    Without it stage 1 in bf16 with fp32 sums gets BF16_Optimizer, while stage 1 with offload and stage 2 keep the ZeRO
    one. Checkpoints, norms and skipped steps are then the same code for both stages and both dtypes.
    """
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION

    choose = engine_class._do_optimizer_sanity_check
    if choose.__module__ == __name__:
        return  # done before, in this process

    def chosen(engine: Any, optimizer: Any) -> str:
        found = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if found == BFLOAT16 and engine.zero_optimization() else found

    engine_class._do_optimizer_sanity_check = chosen


class Engine:
    """A model under DeepSpeed.

    One optimisation step is `forward` and `backward` per micro-batch, the last with `is_last=True`, then `step`.

    Args:
        model: on any device; moved and wrapped. Gains one parameterless submodule when it has experts.
        deepspeed_config: the user's DeepSpeed keys (zero_optimization and others), validated before.
    """

    def __init__(self, model: nn.Module, groups: ParallelGroups, train: TrainConfig, optim: OptimConfig,
                 deepspeed_config: dict[str, Any]):
        deepspeed = import_deepspeed()
        self.groups = groups
        self.stage = int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))
        self.loss_factor = groups.data_size if self.stage in (0, 3) else 1
        self.clip_grad_norm = train.clip_grad_norm
        self.grad_norm = 0.0
        expert_group = self._mark_experts(model)
        optimizer = build_optimizer(model, optim, expert_group)
        # DeepSpeed calls this the accumulation count, but the boundaries are set by hand in `backward`.
        micro_steps = max(1, train.global_batch_size // (train.micro_batch_size * groups.data_size))
        config = {
            **deepspeed_config,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": micro_steps,
            "bf16": {"enabled": train.precision == "bf16"},
            **_precision_of_sums(train, deepspeed_config),
            "gradient_allreduce_op": "sum" if self.stage in (1, 2) else "mean",
            "gradient_clipping": 0.0 if self.stage == 0 else train.clip_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        _one_zero_optimizer(deepspeed.DeepSpeedEngine)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [MoELayer])
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config,
                                                  mpu=MegatronTopology())
        self.module = self.deepspeed.module
        self.device = torch.device(self.deepspeed.device)

    def _mark_experts(self, model: nn.Module) -> str | None:
        experts = [p for p in model.parameters() if is_expert_parameter(p)]
        if not experts:
            return None
        name = _register_expert_groups(self.groups)
        for parameter in experts:
            parameter.group_name = name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
        num_experts = next(m for m in model.modules() if isinstance(m, MoELayer)).router.spec.num_experts
        model.add_module("expert_anchor", _anchor(num_experts))
        return name

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.deepspeed.optimizer.param_groups

    def forward(self, **inputs: Any) -> ModelOutput:
        return self.deepspeed(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate the gradient of this rank's share of the step's loss; `is_last` reduces over ranks.

        The shares of all ranks and micro-batches add up to the loss whose gradient is applied.
        """
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss * self.loss_factor, scale_wrt_gas=False)
        if not is_last:
            self.deepspeed.step()  # only advances DeepSpeed's micro-step counters

    def step(self) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping.

        When the norm is not finite, on any rank and so on all, weights and moments stay as they are.
        """
        if self.stage == 0:
            self.grad_norm = self._clip_stage0()
            if not math.isfinite(self.grad_norm):
                for parameter in self.module.parameters():
                    parameter.grad = None
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            # On a non-finite gradient ZeRO skips the update without a word and keeps the previous norm.
            overflow = getattr(self.deepspeed.optimizer, "overflow", False)
            self.grad_norm = math.nan if overflow else float(self.deepspeed.get_global_grad_norm())
        return self.grad_norm

    def _clip_stage0(self) -> float:
        """Global norm over dense parameters and all experts, and its clipping: what stages 1-3 do."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                squares[int(is_expert_parameter(parameter))] += parameter.grad.double().square().sum()
        if self.groups.expert_size > 1:
            dist.all_reduce(squares[1:], group=self.groups.expert)
        norm = float(squares.sum().sqrt())
        if self.clip_grad_norm > 0 and norm > self.clip_grad_norm:
            factor = self.clip_grad_norm / (norm + 1e-6)
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return norm

    def full_gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The reduced gradient of one parameter, between the last `backward` and `step` (collective; for tests)."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    # --- state for checkpoints, one full parameter at a time -------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.module.named_parameters()

    def parameter_shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.shape

    def gather_state(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """fp32 master weight or optimiser moment of one parameter, in full (for experts: of the local experts).

        Collective over the parameter's own data-parallel group. key: one of STATE_KEYS.
        """
        if self.stage == 0:
            return parameter.data if key == "fp32" else self.deepspeed.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key == "fp32" else safe_get_full_optimizer_state(parameter, key)

    def prepare_gather(self) -> None:
        """Call once before a round of gather_state.

        DeepSpeed 0.19.8 links optimiser-state fragments once, after the first group's first step, which leaves the
        other groups (all experts) unlinked.
        """
        if self.stage in (1, 2):
            optimizer = self.deepspeed.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def prepare_scatter(self, step: int) -> None:
        """Create empty AdamW state with the step counter set, to be filled by scatter_state.

        Every state gets a step tensor of its own: AdamW increments in place, a shared one would count several times.
        """
        optimizer = self.deepspeed.optimizer
        inner = optimizer if self.stage == 0 else optimizer.optimizer
        if self.stage == 0:
            masters = list(self.module.parameters())
        elif self.stage in (1, 2):
            masters = list(optimizer.single_partition_of_fp32_groups)
        else:
            masters = list(optimizer.fp32_partitioned_groups_flat)
        fused = bool(inner.param_groups[0].get("fused"))
        for master in masters:
            inner.state[master].update(
                step=torch.tensor(float(step), device=master.device if fused else "cpu"),
                exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        self.prepare_gather()

    def scatter_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set this rank's part of a parameter's master weight or moment from the full tensor."""
        value = value.to(self.device)
        if self.stage == 0:
            target = parameter.data if key == "fp32" else self.deepspeed.optimizer.state[parameter][key]
            target.copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == "fp32":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

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
        ds_groups.mpu = None  # whoever uses DeepSpeed next in this process would ask for groups that are gone
