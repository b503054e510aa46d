"""The experts of one layer that live on this rank, as stacked weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ExpertsConfig, ModelConfig
from model.dispatch.base import ExpertRows
from model.dispatch.rows import lent_experts
from model.parallel.groups import ParallelGroups
from model.placement.record import LayerPlacement
from ops.all_to_all import Flight, Hop, begin_rows, end_rows
from ops.grouped_mlp import grouped_mlp, grouped_mlp_eight_bit, select_backend

Stack = tuple[Tensor, ...]
"""gate_up [n, 2F, D] and down [n, D, F] of n experts; of weights of 8 bits their scales, [n, 2F]
and [n, D]; and where they have biases those of both, of the same shapes.
"""


class _Made(NamedTuple):
    """In place of a sum of a weight and its adapter: how to make it, and which view of it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Experts(nn.Module):
    """SwiGLU experts: gate_up [L, 2F, D], down [L, D, F] for the L local experts, and with
    model.expert_bias gate_up_bias [L, 2F] and down_bias [L, D].

    `global_ids` names them globally: initialisation and checkpoints go by global expert, never by
    rank. Parameters carry `allreduce = False`, the mark megatron-core and DeepSpeed share for
    expert parameters.

    A placement may lend experts to other ranks, which then share the work. There is still one
    parameter per expert: its owner sends the weights along in every forward, and their gradient
    comes back the same way, so that ZeRO, gradient norm, optimiser state and checkpoints know
    nothing of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ParallelGroups,
        settings: ExpertsConfig,
        placement: LayerPlacement | None = None,
    ):
        super().__init__()
        if config.num_experts % groups.expert_size:
            raise ValueError(
                f"num_experts {config.num_experts} is not divisible by expert_parallel_size "
                f"{groups.expert_size}"
            )
        self.settings, self.activation = settings, config.activation
        local = groups.local_experts(config.num_experts)
        self.global_ids = tuple(
            local if placement is None else placement.experts[local.start : local.stop]
        )

        width, hidden_size = config.expert_intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(torch.empty(len(self.global_ids), 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(len(self.global_ids), hidden_size, width))
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if config.expert_bias:
            self.gate_up_bias = nn.Parameter(torch.zeros(len(self.global_ids), 2 * width))
            self.down_bias = nn.Parameter(torch.zeros(len(self.global_ids), hidden_size))
        self.gate_up_scales: nn.Parameter | None = None
        self.down_scales: nn.Parameter | None = None
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]

        # Of low-rank adapters, where there are some: by what each counts, and where the last sums
        # of a weight and its adapter lie.
        self._scales: dict[str, float] = {}
        self._made: dict[str, int] = {}
        self._recomputes_block = config.recompute == "block"

        # Who sends what to whom in every forward pass, as each rank can tell it from the placement
        # alone.
        self.loan: tuple[list[int], Hop] | None = None
        if placement is not None and placement.replicas[0]:
            lent = [lent_experts(placement, rank) for rank in range(groups.expert_size)]
            to_ranks = [
                [e for e in experts if placement.owner(e) == groups.expert_rank] for experts in lent
            ]
            owners = [placement.owner(e) for e in lent[groups.expert_rank]]
            hop = Hop(
                groups.expert,
                [len(e) for e in to_ranks],
                [owners.count(r) for r in range(groups.expert_size)],
            )
            self.loan = ([self.global_ids.index(e) for experts in to_ranks for e in experts], hop)

    def hold_eight_bit(
        self, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor, down_scales: Tensor
    ) -> None:
        """Weights of 8 bits in place of what it has, for inference (ops.grouped_mlp.eight_bit).

        Raises:
            ValueError: they are of other experts.
        """
        given = {
            "gate_up": gate_up,
            "down": down,
            "gate_up_scales": gate_up_scales,
            "down_scales": down_scales,
        }
        whole = [self.gate_up.shape, self.down.shape]
        shapes = [*whole, *(shape[:2] for shape in whole)]
        device = self.gate_up.device
        for (name, value), shape in zip(given.items(), shapes, strict=True):
            if value.shape != shape:
                raise ValueError(
                    f"{name} of 8-bit experts is {list(value.shape)}, the model's {list(shape)}"
                )
            parameter = nn.Parameter(value.to(device), requires_grad=False)
            parameter.allreduce = False  # type: ignore[attr-defined]
            setattr(self, name, parameter)

    def add_adapter(self, name: str, rank: int, scale: float) -> nn.Parameter:
        """Give gate_up or down [L, out, in] a low-rank adapter for each expert: A [L, r, in] as
        lora_<name>_a, which is returned to be filled, and B [L, out, r], which is 0.
        """
        weight = self.get_parameter(name)
        num_local, outputs, inputs = weight.shape
        a = nn.Parameter(weight.new_empty(num_local, rank, inputs))
        b = nn.Parameter(weight.new_zeros(num_local, outputs, rank))
        for letter, parameter in (("a", a), ("b", b)):
            parameter.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter(f"lora_{name}_{letter}", parameter)
        self._scales[name] = scale
        return a

    def _adapted(self, name: str) -> Tensor:
        """gate_up or down [L, out, in] with its adapter, where it has one."""
        weight: Tensor = getattr(self, name)
        if name not in self._scales:
            return weight
        a, b = getattr(self, f"lora_{name}_a"), getattr(self, f"lora_{name}_b")
        return torch.baddbmm(weight, b, a, alpha=self._scales[name])

    @property
    def _whole(self) -> Stack:
        """All local experts."""
        gate_up, down = self._adapted("gate_up"), self._adapted("down")
        for name, weight in (("gate_up", gate_up), ("down", down)):
            if name in self._scales:
                self._made[name] = weight.untyped_storage().data_ptr()
        found = (gate_up, down, self.gate_up_scales, self.down_scales)
        return tuple(t for t in (*found, self.gate_up_bias, self.down_bias) if t is not None)

    def _remade(self) -> AbstractContextManager[object]:
        """Autograd keeps no sum of a weight and its adapter for backward, but makes it anew there:
        kept, those of all layers would take as much memory as the weights.
        """
        # Where blocks are recomputed nothing is kept anyway, and hooks of ours would get in the
        # way of those.
        if not self._scales or self._recomputes_block or not torch.is_grad_enabled():
            return nullcontext()

        def pack(tensor: Tensor) -> Tensor | _Made:
            place = tensor.untyped_storage().data_ptr()
            name = next((name for name, there in self._made.items() if there == place), None)
            if name is None:
                return tensor
            return _Made(name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

        def unpack(kept: Tensor | _Made) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                whole = self._adapted(kept.name)
            return whole.as_strided(kept.shape, kept.stride, kept.offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def backend_on(self, device: torch.device, dtype: torch.dtype) -> str:
        """The back-end of their products for tokens of a dtype (ops.grouped_mlp)."""
        width, hidden_size = self.down.shape[2], self.down.shape[1]
        plain = self.activation == "swiglu" and self.gate_up_bias is None
        precision = "native" if self.gate_up_scales is not None else self.settings.precision
        return select_backend(
            self.settings.backend, device, dtype, hidden_size, width, plain, precision
        )

    def lend(self) -> tuple[Flight, ...] | None:
        """Send the weights that other ranks borrow, and expect those borrowed here. Collective over
        the expert group.
        """
        if self.loan is None:
            return None
        experts, hop = self.loan
        return tuple(begin_rows(p[experts].flatten(1), (hop,)) for p in self._whole)

    def stacks(self, chunk_sizes: list[int], loan: tuple[Flight, ...] | None) -> list[Stack]:
        """The weights by chunk, those borrowed as the last one."""
        whole = self._whole
        borrowed: list[Stack] = []
        if loan is not None:
            borrowed = [
                tuple(
                    end_rows(flight).unflatten(1, p.shape[1:])
                    for flight, p in zip(loan, whole, strict=True)
                )
            ]
            chunk_sizes = chunk_sizes[:-1]
        if len(chunk_sizes) == 1:
            return [whole, *borrowed]
        return [*zip(*(p.split(chunk_sizes) for p in whole), strict=True), *borrowed]

    def forward(self, stack: Stack, rows: ExpertRows) -> Tensor:
        """The rows of a stack's experts -> [R, D]."""
        hidden, *places = rows
        weights, *indices = places
        gate_up, down, *others = stack
        if self.gate_up_scales is not None:
            gate_up_scales, down_scales, *others = others
            gate_up_bias, down_bias = others or (None, None)
            return grouped_mlp_eight_bit(
                hidden,
                weights,
                gate_up,
                gate_up_scales,
                down,
                down_scales,
                *indices,
                backend=self.settings.backend,
                activation=self.activation,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
            )
        gate_up_bias, down_bias = others or (None, None)
        with self._remade():
            return grouped_mlp(
                hidden,
                weights,
                gate_up,
                down,
                *indices,
                backend=self.settings.backend,
                recompute=self.settings.recompute,
                activation=self.activation,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
                precision=self.settings.precision,
            )


def expert_ids_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> global ids of the local experts stacked in it."""
    return {
        f"{name}.{key}": module.global_ids
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for key, _ in module.named_parameters(recurse=False)
    }
