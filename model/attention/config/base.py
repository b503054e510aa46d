"""What is asked of every attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from model.component import Component
from model.config import ModelConfig
from model.cost.parameters import sparse_layers

if TYPE_CHECKING:
    from model.attention.base import Attention

BY_HEAD = {
    **{f"{name}_proj.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")},
    "o_proj.weight": 1,
}
"""Projections of queries, keys, values and outputs -> the dimension that their heads are along."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Component):
    """The settings of an attention."""

    by_head: ClassVar[Mapping[str, int]] = {}
    """Name of a parameter whose rows or columns belong to heads -> the dimension that these are
    along, in neighbouring runs. Tensor parallelism cuts it there, and what is not named is whole.
    Empty: this attention cannot be cut.
    """

    def problems(self, model: ModelConfig) -> list[str]:
        """Contradictions of the knobs with each other and the model, which has been checked."""
        raise NotImplementedError

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        """What keeps `size` ranks from sharing rows, each with all of them for some of the heads
        (SequenceLayout.to_heads).
        """
        return [
            f"attention={self.name} does not say how ranks share out its heads; set "
            "parallel.context_parallel_size=1"
        ]

    def parted_problems(self, model: ModelConfig, parts: Sequence[Sequence[int]]) -> list[str]:
        """What keeps layers from being cut into these parts, each a run of neighbours."""
        return []

    gathers: ClassVar[bool] = False
    """Whether some of the tokens can attend to whole rows (SequenceLayout.to_keys)."""

    def sharing_problems(self, model: ModelConfig, size: int, gather: int) -> list[str]:
        """What keeps `size` ranks from sharing rows, of which `gather` gather keys and values, and
        those between them share out heads.
        """
        by_heads = size // gather
        if size == 1:
            return []
        if gather > 1 and not self.gathers:
            return [
                f"parallel.context_gather_size is {gather}, but attention={self.name} does not "
                "compute queries of a part of a row; set parallel.context_gather_size=1"
            ]
        found = self.context_problems(model, by_heads) if by_heads > 1 else []
        over = f"parallel.context_parallel_size {size} / parallel.context_gather_size {gather}"
        name = f"parallel.context_parallel_size {by_heads}"
        return [p if gather == 1 else p.replace(name, f"{over} = {by_heads}") for p in found]

    def work(self, model: ModelConfig, places: Any) -> Any:
        """What queries at these places of their documents cost in all layers together, in the unit
        of a key that is read: by this rows are dealt out to ranks that gather. places: a tensor of
        integers, as what returns.
        """
        return (places + 1) * model.num_layers

    def tensor_problems(self, model: ModelConfig, size: int, context: int) -> list[str]:
        """What keeps `size` ranks from having a part of the heads each, which `context` ranks then
        share out further.
        """
        name = f"parallel.tensor_parallel_size {size}"
        if not self.by_head:
            return [
                f"attention={self.name} does not say which of its parameters belong to heads; set "
                "parallel.tensor_parallel_size=1"
            ]
        if model.num_kv_heads % (size * context) == 0:
            return []
        over = "" if context == 1 else f" x parallel.context_parallel_size {context}"
        return [
            f"{name}{over} does not divide model.num_kv_heads {model.num_kv_heads}, which its "
            "ranks share out; lower it"
        ]

    def rotary_size(self, model: ModelConfig) -> int:
        """Dimensions of a head that are turned by its position."""
        return model.rotary_size

    def is_sparse(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether the layer leaves something out by a choice, which is measured."""
        return False

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        """The attention of one layer, with its weights still to be drawn."""
        raise NotImplementedError


def model_uncombined(
    model: ModelConfig, attention: str, instead: Mapping[str, tuple[Any, str]]
) -> list[str]:
    """Settings of the model that an attention does not go with. instead: by setting the value that
    it goes with, and why.
    """
    return [
        f"model.{name}={asked} does not combine with attention={attention}, {why}; set "
        f"model.{name}={'null' if value is None else value}"
        for name, (value, why) in instead.items()
        if (asked := getattr(model, name)) != value
    ]


def layer_problems(
    model: ModelConfig, interval: int, dense_layers: tuple[int, ...], alone: bool
) -> list[str]:
    """Of the settings that leave layers sparse. alone: nothing else was found, so that these
    layers can be counted.
    """
    found = [
        f"attention.dense_layers names layer {i}, but the model has {model.num_layers} layers"
        for i in dense_layers
        if not -model.num_layers <= i < model.num_layers
    ]
    of_layers = {"interval": interval, "dense_layers": dense_layers}
    if alone and not found and not sparse_layers(model.num_layers, of_layers):
        found.append(
            f"attention.interval {interval} and attention.dense_layers "
            f"{list(dense_layers)} leave no sparse layer of {model.num_layers}; use "
            "attention=dense"
        )
    return found


def uneven_heads(model: ModelConfig, size: int) -> list[str]:
    """A head with its keys and values is on one rank, so each has as many of these."""
    heads = model.num_kv_heads
    if heads % size == 0:
        return []
    fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    return [
        f"parallel.context_parallel_size {size} does not divide model.num_kv_heads {heads}, which "
        f"its ranks share out; choose one of {fitting}, or let more ranks gather keys and values "
        "(parallel.context_gather_size)"
    ]
