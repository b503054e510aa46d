"""AdamW on masters of bf16, rounded stochastically: computed in fp32, kept in half of the bytes.

An update is often smaller than half of what separates two numbers of bf16, and rounding to the
nearest one would lose it, every step. Here a value between two of them becomes the upper one with
the probability that makes the mean right:

    round(x) = the bits of x plus u, without their lower half;  u uniform in 0 .. 2^16 - 1

u is a hash of (seed, update, parameter, element), elements of experts numbered as in the stack of
all of them. So it is the same whatever ranks share out the parameter, and in a resumed run; no
generator has a state to save. Moments stay fp32.

Sources: S. Gupta et al., Deep learning with limited numerical precision (arXiv 1502.02551); for
masters of bf16, P. Zamirai et al., Revisiting BFloat16 training (arXiv 2010.06192).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model.moe.experts import expert_ids_of
from ops.sparse_attention.noise import mix
from train.config.training import OptimConfig
from train.engine.average import AveragedAdamW
from train.engine.muon.pieces import Block, Slices, pieces

CHUNK = 2**22
"""Elements whose weights are in fp32 at a time."""
_MASK = 0xFFFFFFFF
_LOWER = 0xFFFF


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16, up or down by chance: the mean over all bits is the value. What bf16 holds
    stays, and so does what is not finite.

    Args:
        values: [N] fp32.
        bits: [N] int64 in 0 .. 2^16 - 1.

    Returns:
        [N] bf16.
    """
    # The magnitude is in the lower 31 bits, so that adding to them moves away from zero.
    raw = values.view(torch.int32) + bits.to(torch.int32)
    moved = (raw & ~_LOWER).view(torch.float32)
    return torch.where(torch.isfinite(values), moved, values).to(torch.bfloat16)


def noise(seed: int, update: int, name: str, elements: Tensor) -> Tensor:
    """[N] int64 in 0 .. 2^16 - 1, of the elements with these numbers ([N] int64) in a parameter."""
    words = f"{seed}/{update}/{name}".encode()
    key = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
    low, high = key & _MASK, key >> 32
    hashed = mix(mix(elements & _MASK ^ low) ^ (elements >> 32) ^ high)
    return hashed >> 16


@dataclass(frozen=True)
class Stretch:
    """Consecutive elements of a parameter in one flat master."""

    name: str
    offset: int
    """Of the first one in the master."""
    first: int
    """Number of the same element in what this rank has of the parameter, before ZeRO."""
    size: int
    expert_size: int
    """Elements of one expert; of other parameters, all."""
    ids: Tensor
    """[L] int64, the number of each local expert among all; of other parameters, 0."""

    def elements(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64: numbers of these of its elements in the whole parameter."""
        local = torch.arange(self.first + start, self.first + stop, device=self.ids.device)
        return self.ids[local // self.expert_size] * self.expert_size + local % self.expert_size


class RoundedAdamW(AveragedAdamW):
    """AdamW whose parameters are ZeRO's flat masters of bf16. What they are made of is told by
    `place_masters`, before the first step.

    Args:
        groups: of train.engine.optimizer.parameter_groups.
        seed: of the rounding.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, seed: int):
        super().__init__(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=False
        )
        self.seed = seed
        self.stretches: dict[Tensor, list[Stretch]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._update(master, group)
        return None

    def _update(self, master: Tensor, group: dict[str, Any]) -> None:
        state = self.state[master]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(master, dtype=torch.float32)
        assert master.grad is not None
        weights, gradient = master.detach().view(-1), master.grad.view(-1)
        moments = [state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")]
        update = int(state["step"]) + 1

        for stretch in self.stretches[master]:
            for start in range(0, stretch.size, CHUNK):
                stop = min(stretch.size, start + CHUNK)
                part = slice(stretch.offset + start, stretch.offset + stop)
                exact = weights[part].float()
                # It counts the step itself, once for each part.
                counter = state["step"].clone()
                adamw(
                    [exact],
                    [gradient[part].float()],
                    [moments[0][part]],
                    [moments[1][part]],
                    [],
                    [counter],
                    foreach=False,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                bits = noise(self.seed, update, stretch.name, stretch.elements(start, stop))
                weights[part] = stochastic_round(exact, bits)
        state["step"] += 1


def place_masters(optimizer: RoundedAdamW, model: nn.Module, zero: Any) -> None:
    """Tell it which parameters lie where in its masters, under ZeRO 1 and 2 (DeepSpeed's private
    parts are those of the pinned version).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    experts = expert_ids_of(model)
    found: dict[Tensor, list[Stretch]] = {}
    for master, parameters, process_group in _sliced_groups(zero):
        size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        found[master] = []
        for parameter, number, first, slices in parameters:
            name = names[parameter]
            ids = torch.tensor(experts.get(name, (0,)), device=master.device)
            found[master] += [
                Stretch(name, piece.offset, piece.first, piece.size, number // len(ids), ids)
                for piece in pieces(Block(first, 1, number), slices, size)
                if piece.rank == rank
            ]
    optimizer.stretches = found


_Held = Iterator[tuple[Tensor, list[tuple[nn.Parameter, int, int, Slices]], Any]]
"""A master; its parameters with their sizes, the number of their first element in what ranks share
out, and how they share it out; and these ranks.
"""


def _sliced_groups(zero: Any) -> _Held:
    """The parameters of a group stand one behind the other, and every rank has a slice of that."""
    for i, master in enumerate(zero.single_partition_of_fp32_groups):
        slices = Slices(int(zero.partition_size[i]))
        parameters, firsts = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
        placed = zip(parameters, firsts, strict=True)
        held = [(parameter, parameter.numel(), first, slices) for parameter, first in placed]
        yield master, held, zero.real_dp_process_group[i]
