"""MoE layers of other libraries on given weights, and ours: rivals of bench.moe_layer, oracles of
tests/.

Shapes: B batch, S sequence, D hidden, F expert width, E experts, L local experts. Libraries are
imported when used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ExpertsConfig, ModelConfig
from model.dispatch.config import AllToAllConfig
from model.layers import GatedMLP
from model.moe.layer import ModelParts, MoELayer
from model.parallel.groups import ParallelGroups
from model.routers.base import RoutingRequest
from model.routers.config import TopKConfig


@dataclass(frozen=True)
class Weights:
    """router [E, D], gate_up [E, 2F, D] (gate first), down [E, D, F], of all experts."""

    router: Tensor
    gate_up: Tensor
    down: Tensor

    @staticmethod
    def draw(
        num_experts: int,
        hidden_size: int,
        width: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        skew: float = 0.0,
    ) -> Weights:
        """Normal, scaled to keep variances. skew: what a token whose first value is 1 adds to the
        logit of expert e, from +skew for the first to -skew for the last.
        """
        generator = torch.Generator().manual_seed(seed)
        router = torch.randn(num_experts, hidden_size, generator=generator) * hidden_size**-0.5
        router[:, 0] = torch.linspace(skew, -skew, num_experts) if skew else router[:, 0]
        gate_up = (
            torch.randn(num_experts, 2 * width, hidden_size, generator=generator)
            * hidden_size**-0.5
        )
        down = torch.randn(num_experts, hidden_size, width, generator=generator) * width**-0.5
        return Weights(router.to(dtype), gate_up.to(dtype), down.to(dtype))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, D, F."""
        num_experts, hidden_size, width = self.down.shape
        return num_experts, hidden_size, width


@dataclass(frozen=True)
class MoE:
    """A layer: [B, S, D] -> [B, S, D], and its parameters by our names; experts stacked or one by
    one, local ones only.

    context: what forward and backward must run in.
    """

    layer: Callable[[Tensor], Tensor]
    router: nn.Parameter
    gate_up: list[nn.Parameter]
    down: list[nn.Parameter]
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.router, *self.gate_up, *self.down]

    def forward(self, hidden: Tensor) -> Tensor:
        """Without gradients."""
        with self.context(), torch.no_grad():
            return self.layer(hidden)

    def forward_backward(self, hidden: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Output, and the gradients of hidden and `parameters` for a gradient of the output."""
        hidden = hidden.detach().requires_grad_()
        with self.context():
            out = self.layer(hidden)
            return out.detach(), *torch.autograd.grad(out, [hidden, *self.parameters], grad)

    def named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Those results by name, the experts' stacked."""
        out, hidden, router, *experts = results
        parts = experts[: len(self.gate_up)], experts[len(self.gate_up) :]
        gate_up, down = (grads[0] if grads[0].dim() == 3 else torch.stack(grads) for grads in parts)
        return {"out": out, "hidden": hidden, "router": router, "gate_up": gate_up, "down": down}


def _load(parameters: list[nn.Parameter], stacked: Tensor) -> None:
    with torch.no_grad():
        for parameter, value in zip(
            parameters, [stacked] if parameters[0].dim() == 3 else stacked, strict=True
        ):
            parameter.copy_(value)


def _filled(moe: MoE, weights: Weights, local: slice = slice(None)) -> MoE:
    with torch.no_grad():
        moe.router.copy_(weights.router)
    _load(moe.gate_up, weights.gate_up[local])
    _load(moe.down, weights.down[local])
    return moe


def ours(
    weights: Weights,
    top_k: int,
    groups: ParallelGroups | None = None,
    dispatcher: dict | None = None,
    experts: ExpertsConfig | None = None,
    **router: Any,
) -> MoE:
    """dispatcher: fields of AllToAllConfig; router: those of TopKConfig."""
    num_experts, hidden_size, width = weights.sizes
    groups = groups or ParallelGroups.single()
    config = ModelConfig(
        vocab_size=8,
        hidden_size=hidden_size,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=width,
        num_experts=num_experts,
        expert_intermediate_size=width,
        max_seq_len=8,
    )
    parts = ModelParts(
        TopKConfig(top_k=top_k, **router),
        DenseAttentionConfig(),
        AllToAllConfig(**(dispatcher or {})),
        BalanceConfig(),
        experts or ExpertsConfig(),
    )
    layer = MoELayer(config, groups, parts, 0).to(weights.down.dtype)
    moe = MoE(
        lambda hidden: layer(hidden, RoutingRequest())[0],
        layer.router.weight,
        [layer.experts.gate_up],
        [layer.experts.down],
    )
    return _filled(
        moe, weights, slice(layer.experts.global_ids[0], layer.experts.global_ids[-1] + 1)
    )


HUGGING_FACE = ("mixtral", "qwen3_moe", "olmoe")


def hugging_face(
    weights: Weights,
    top_k: int,
    model: str,
    implementation: str = "eager",
    normalize_weights: bool = True,
) -> MoE:
    """The sparse block of a model; implementation: of its experts (eager, grouped_mm,
    batched_mm).
    """
    num_experts, hidden_size, width = weights.sizes
    shape: dict[str, Any] = dict(
        hidden_size=hidden_size,
        num_experts_per_tok=top_k,
        hidden_act="silu",
        experts_implementation=implementation,
    )
    if model == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        if not normalize_weights:
            raise ValueError("Mixtral always normalises its gates")
        shape |= dict(num_local_experts=num_experts, intermediate_size=width)
    elif model == "qwen3_moe":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

        shape |= dict(
            num_experts=num_experts, moe_intermediate_size=width, norm_topk_prob=normalize_weights
        )
    else:
        from transformers.models.olmoe.modeling_olmoe import OlmoeConfig as Config
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Block

        shape |= dict(
            num_experts=num_experts, intermediate_size=width, norm_topk_prob=normalize_weights
        )
    block = Block(Config(**shape)).to(weights.down.dtype)
    return _filled(
        MoE(block, block.gate.weight, [block.experts.gate_up_proj], [block.experts.down_proj]),
        weights,
    )


def deepspeed(
    weights: Weights, top_k: int, expert_parallel_size: int = 1, capacity: int | None = None
) -> MoE:
    """deepspeed.moe.layer.MoE around our SwiGLU. Gates are normalised for every top_k above 1.

    capacity: rows of every expert for the tokens of a rank; None: as many as the busiest expert
        needs (drop_tokens=False). Needs a process group where expert_parallel_size is above 1; then
        it makes its own, of neighbours as ours are.
    """
    from train.engine.library import import_deepspeed

    import_deepspeed()
    from deepspeed.moe.layer import MoE as Layer

    num_experts, hidden_size, width = weights.sizes
    room = (
        {"drop_tokens": False}
        if capacity is None
        else {"capacity_factor": 0.0, "min_capacity": capacity}
    )
    layer = Layer(
        hidden_size,
        GatedMLP(hidden_size, width),
        num_experts,
        expert_parallel_size,
        top_k,
        use_rts=False,
        top2_2nd_expert_sampling=False,
        **room,
    ).to(weights.down.dtype)
    rank = 0
    if expert_parallel_size > 1:
        import deepspeed.comm as comm

        comm.init_distributed("gloo", verbose=False)
        with contextlib.redirect_stdout(None):
            layer.set_deepspeed_parallelism()
        rank = torch.distributed.get_rank(layer.deepspeed_moe.ep_group)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    moe = MoE(
        lambda hidden: layer(hidden)[0],
        layer.deepspeed_moe.gate.wg.weight,
        [e.gate_up.weight for e in experts],
        [e.down.weight for e in experts],
    )
    return _filled(moe, weights, slice(rank * len(experts), (rank + 1) * len(experts)))


def megatron(
    weights: Weights,
    top_k: int,
    groups: ParallelGroups,
    score_function: str = "softmax",
    normalize_weights: bool = True,
    scaling_factor: float = 1.0,
) -> MoE:
    """Megatron-core's MoELayer with SequentialMLP and the alltoall dispatcher, in the groups of
    initialize_parallel.
    """
    with megatron_on_cpu():
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        num_experts, hidden_size, width = weights.sizes
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden_size,
            num_attention_heads=1,
            num_moe_experts=num_experts,
            moe_router_topk=top_k,
            ffn_hidden_size=width,
            moe_ffn_hidden_size=width,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            bias_activation_fusion=False,
            use_cpu_initialization=True,
            params_dtype=weights.down.dtype,
            expert_model_parallel_size=groups.expert_size,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_router_dtype="fp32",
            moe_router_score_function=score_function,
            moe_router_pre_softmax=score_function == "softmax" and not normalize_weights,
            moe_router_topk_scaling_factor=scaling_factor,
        )
        spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
        layer = build_module(spec, config=config)
        layer.set_layer_number(1)

    experts = layer.experts.local_experts
    local = groups.local_experts(num_experts)
    # [S, B, D] there
    moe = MoE(
        lambda hidden: layer(hidden.transpose(0, 1).contiguous())[0].transpose(0, 1),
        layer.router.weight,
        [e.linear_fc1.weight for e in experts],
        [e.linear_fc2.weight for e in experts],
        megatron_on_cpu,
    )
    return _filled(moe, weights, slice(local.start, local.stop))


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """What Megatron-core 0.16 takes for granted: a current CUDA device and streams, Transformer
    Engine (whose GEMM it looks for by a name that is not defined without), and split sizes on CUDA,
    to be made numbers. Undone at the end, so that nobody else sees the stand-ins.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor

    stream = mock.MagicMock()
    with (
        mock.patch.multiple(
            torch.cuda,
            current_device=lambda: torch.device("cpu"),
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda _: contextlib.nullcontext(),
        ),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", to_host),
    ):
        yield
