"""The weights of a dense model as those of a mixture of experts that computes the same
(train/config/upcycling.py says how). Each rank reads the dense MLPs and makes its own experts.
"""

from __future__ import annotations

import re
from typing import Protocol

import torch

from model.init import stream_of
from model.lora import is_adapter
from model.moe.experts import expert_ids_of
from model.parallel.family import cut_of, own_part, whole_shape
from model.scaling import first_std
from model.transformer import Transformer
from train.config.run import RunConfig
from train.engine.deepspeed import Engine
from train.pretrained.shards import PretrainedError

OF_EXPERTS = re.compile(r"(.*\.mlp)\.(router|experts|shared)\.(.*)")


class DenseWeights(Protocol):
    """A dense model's weights by the names of our parameters."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None: it has no such parameter."""

    def read(self, name: str) -> torch.Tensor:
        """The whole parameter, in the precision that it is stored in."""


class UpcycledWeights:
    """Weights that a run begins with, made of those of a dense model."""

    def __init__(self, dense: DenseWeights, config: RunConfig):
        self.dense, self.config = dense, config
        self.upcycle = config.init.upcycle
        self._mlp: tuple[str, torch.Tensor, torch.Tensor] | None = None
        self._expert: tuple[str, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def __str__(self) -> str:
        upcycle = self.upcycle
        ratio = f", {upcycle.reinit_ratio:g} of it drawn anew" if upcycle.reinit_ratio else ""
        return (
            f"{self.dense}, each MLP as {upcycle.num_experts} experts of 1/{upcycle.granularity} "
            f"of its width{ratio}"
        )

    def fill_model(self, model: Transformer) -> None:
        """Set the parameters of a plain model with this rank's experts.

        Raises:
            PretrainedError: the dense model is another one.
        """
        expert_ids = expert_ids_of(model)
        parameters = [(name, p) for name, p in model.named_parameters() if not is_adapter(name)]
        for name, parameter in parameters:  # all are compared before one is touched
            self._require(name, tuple(whole_shape(parameter)))
        with torch.no_grad():
            for name, parameter in parameters:
                if cut_of(parameter) is None:
                    self._fill(name, parameter, expert_ids.get(name, ()))
                    continue
                # What is new there stays as it was drawn.
                if not _is_new(name, self.dense):
                    parameter.copy_(own_part(parameter, self.dense.read(name)))

    def fill_masters(self, engine: Engine) -> None:
        """Set the master weights, which the factor of `down` may give more digits than bf16 has.
        Collective.
        """
        expert_ids = expert_ids_of(engine.module)
        engine.prepare_scatter(0)
        for name, parameter in engine.named_parameters():
            if is_adapter(name):
                continue
            value = torch.empty(engine.parameter_shape(parameter))
            if self._fill(name, value, expert_ids.get(name, ())):
                engine.scatter_state(parameter, "fp32", value)
        engine.finish_scatter()

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        found = OF_EXPERTS.fullmatch(name)
        width, hidden = self.config.model.intermediate_size, self.config.model.hidden_size
        wanted = {name: shape}
        if found is not None:
            wanted = {
                f"{found[1]}.gate_up.weight": (2 * width, hidden),
                f"{found[1]}.down.weight": (hidden, width),
            }
        for key, ours in wanted.items():
            if _is_new(key, self.dense) or self.dense.shape(key) == ours:
                continue
            raise PretrainedError(
                f"{self.dense} is another model: it has {key} of shape {self.dense.shape(key)}, "
                f"this run needs {list(ours)}"
            )

    def _fill(self, name: str, value: torch.Tensor, expert_ids: tuple[int, ...]) -> bool:
        """Whether the parameter has a value here; otherwise it starts as in a new run."""
        found = OF_EXPERTS.fullmatch(name)
        if found is None:
            if _is_new(name, self.dense):
                return False
            value.copy_(self.dense.read(name))
            return True
        layer, part, rest = found.groups()
        if part == "router":
            if rest != "weight":
                return False
            self._fill_router(layer, value)
        elif part == "shared":
            gate_up, down = self._shards(layer, 0, self.upcycle.num_shared_experts)
            value.copy_(gate_up if rest == "gate_up.weight" else down)
        else:
            for row, expert in enumerate(expert_ids):
                gate_up, down = self._made(layer, expert)
                value[row].copy_(gate_up if rest == "gate_up" else down)
        return True

    def _fill_router(self, layer: str, value: torch.Tensor) -> None:
        """Rows [E, D]: those of a virtual group are the same."""
        model = self.config.model
        std = first_std(model, f"{layer}.router.weight")
        for expert in range(model.num_experts):
            group = expert // self.upcycle.num_routed_shards
            stream = stream_of(self.config.seed, f"{layer}.router.weight", "group", group)
            value[expert].copy_(torch.empty(value.shape[1]).normal_(0.0, std, generator=stream))

    def _dense(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2F, D] and down [D, F] of a layer, fp32. The last one stays, as it is asked for
        again and again.
        """
        if self._mlp is None or self._mlp[0] != layer:
            read = self.dense.read
            gate_up, down = read(f"{layer}.gate_up.weight"), read(f"{layer}.down.weight")
            self._mlp = layer, gate_up.float(), down.float()
        return self._mlp[1:]

    def _shards(self, layer: str, first: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2nF/G, D] and down [D, nF/G] of n shards that follow each other."""
        gate_up, down = self._dense(layer)
        width = self.config.model.expert_intermediate_size
        rows = slice(first * width, (first + number) * width)
        gate, up = gate_up.chunk(2)
        return torch.cat((gate[rows], up[rows])), down[:, rows]

    def _made(self, layer: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2F/G, D] and down [D, F/G] of a routed expert."""
        if self._expert is not None and self._expert[:2] == (layer, expert):
            return self._expert[2]
        shards = self.upcycle.num_routed_shards
        gate_up, down = self._shards(layer, self.upcycle.num_shared_experts + expert % shards, 1)
        scaling = float(self.config.router.arguments.get("scaling_factor", 1.0))
        made = gate_up, down * (shards / scaling)
        if self.upcycle.reinit_ratio:
            made = self._drawn_anew(layer, expert, *made)
        self._expert = layer, expert, made
        return made

    def _drawn_anew(
        self, layer: str, expert: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same part of the width in gate, up and down, from the normal distribution of what
        stood there (arXiv 2502.19261, section 3.2).
        """
        width = down.shape[1]
        stream = stream_of(self.config.seed, f"{layer}.experts", "anew", expert)
        chosen = torch.randperm(width, generator=stream)[: round(self.upcycle.reinit_ratio * width)]
        gate_up, down = gate_up.clone(), down.clone()

        def draw(block: torch.Tensor) -> torch.Tensor:
            noise = torch.empty(block.shape).normal_(generator=stream)
            return noise * block.std() + block.mean()

        for rows in (chosen, width + chosen):
            gate_up[rows] = draw(gate_up[rows])
        down[:, chosen] = draw(down[:, chosen])
        return gate_up, down


def _is_new(name: str, dense: DenseWeights) -> bool:
    """What only another attention learns, as in a new run (train/pretrained/folder.py), and modules
    of multi-token prediction.
    """
    return name.startswith("mtp.") or (".attention." in name and dense.shape(name) is None)
