"""Low-rank adapters: their settings, where they sit, and what is trained at all. Imports no
torch.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.config import ModelConfig
from model.cost.parameters import ParameterCount, Trained, index_parameters
from model.cost.projections import Projection, projections
from train.config.kinds import KINDS, kind_of

ADAPTED = ("attention", "experts", "shared_experts", "mlp")
"""Kinds whose projections take adapters."""


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters of projections, and leave the weights as they are."""

    rank: int = 0
    """Of the adapters; 0: none, all weights are trained."""
    alpha: float = 16.0
    """An adapter counts alpha / rank times."""
    targets: tuple[str, ...] = ("attention",)
    """What gets adapters: kinds (attention, experts, shared_experts, mlp) or patterns of
    projections' names (blocks.3.*, *.q_proj, *.experts.down).
    """
    expert_rank: int | None = None
    """Of the adapters of routed experts, each of which sees a part of the tokens; None: rank."""
    also_train: tuple[Literal["embedding", "head", "norms", "router"], ...] = ()
    """Kinds that are trained themselves besides; the router stays as it is unless it is here."""

    def problems(self) -> list[str]:
        if self.rank < 0:
            return [f"lora.rank is {self.rank}; use 0 for no adapters"]
        if self.rank == 0:
            return [
                f"lora.{name} is {_shown(getattr(self, name))}, but lora.rank is 0: there are no "
                "adapters; set lora.rank, to 8, say"
                for name in ("alpha", "targets", "expert_rank", "also_train")
                if getattr(self, name) != getattr(LoraConfig(), name)
            ]
        found = []
        if self.alpha <= 0:
            found.append(f"lora.alpha is {self.alpha}; it must be positive")
        if self.expert_rank is not None and self.expert_rank < 1:
            found.append(
                f"lora.expert_rank is {self.expert_rank}; it must be at least 1, or null for "
                "lora.rank"
            )
        if not self.targets:
            found.append("lora.targets is empty; name a kind, as attention, or a pattern")
        return found


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_meant(projection: str, target: str) -> bool:
    if target in KINDS:
        return kind_of(f"{projection}.weight") == target
    return fnmatch.fnmatchcase(projection, target)


def ranks_of(
    lora: LoraConfig, model: ModelConfig, attention: Mapping[str, Any]
) -> dict[str, tuple[Projection, int]]:
    """Name of a projection -> it, and the rank of its adapter; empty without adapters."""
    if not lora.rank:
        return {}
    return {
        name: (found, (lora.expert_rank or lora.rank) if found.num_experts else lora.rank)
        for name, found in projections(model, attention).items()
        if any(_is_meant(name, target) for target in lora.targets)
    }


def target_problems(
    lora: LoraConfig, model: ModelConfig, attention: Mapping[str, Any]
) -> list[str]:
    """Targets that mean nothing, and settings that nothing reads: a run that trains something else
    than was asked for looks healthy.
    """
    if not lora.rank:
        return []
    names, found = list(projections(model, attention)), []
    kinds = [kind for kind in ADAPTED if any(_is_meant(name, kind) for name in names)]
    for target in lora.targets:
        if any(_is_meant(name, target) for name in names):
            continue
        near = difflib.get_close_matches(target, [*kinds, *names], 1)
        mend = f"did you mean {near[0]}? " if near else ""
        if target in ADAPTED:
            mend = "leave it out: "
        found.append(
            f"lora.targets: {target} means no projection of this model; {mend}"
            f"its kinds are {', '.join(kinds)}, anything else is a pattern of names, as {names[0]}"
        )
    stacks = any(p.num_experts for p, _ in ranks_of(lora, model, attention).values())
    if lora.expert_rank is not None and not stacks and not found:
        found.append(
            f"lora.expert_rank is {lora.expert_rank}, but lora.targets {list(lora.targets)} means "
            "no experts; add experts to them, or set it to null"
        )
    if "head" in lora.also_train and model.tie_embeddings:
        found.append(
            "lora.also_train: head means no parameter, for model.tie_embeddings makes the "
            "embedding its head; name embedding"
        )
    if "router" in lora.also_train and not model.num_experts:
        found.append("lora.also_train: router means no parameter, for model.num_experts is 0")
    if model.num_mtp_layers:
        found.append(
            f"lora.rank is {lora.rank}, but model.num_mtp_layers is {model.num_mtp_layers}: "
            "modules of multi-token prediction take no adapters; set model.num_mtp_layers=0 and "
            "train.mtp_coeff=0"
        )
    return found


def trained_of(
    lora: LoraConfig,
    freeze: tuple[str, ...],
    model: ModelConfig,
    attention: Mapping[str, Any],
    count: ParameterCount,
) -> Trained:
    """How many parameters are trained, as far as kinds say: patterns of optim.freeze count as
    trained, which is an upper bound.
    """
    head = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    # Norms of an index are of its kind: see KINDS.
    indexes, index_norms = index_parameters(model, attention)
    dense = {
        "embedding": count.embedding - head,
        "head": head,
        "norms": count.norms - index_norms,
        "attention": count.attention - indexes,
        "indexer": indexes + index_norms,
        "router": count.router,
        "shared_experts": count.shared_experts,
        "mlp": count.dense_mlp,
    }
    if not lora.rank:
        frozen = sum(number for kind, number in dense.items() if kind in freeze)
        experts = count.experts if "experts" in freeze else 0
        return Trained(count.dense - frozen, count.all_experts - experts)

    ranks = ranks_of(lora, model, attention).values()
    stacks = sum(p.adapter_parameters(rank) for p, rank in ranks if p.num_experts)
    plain = sum(p.adapter_parameters(rank) for p, rank in ranks if not p.num_experts)
    also = sum(dense[kind] for kind in lora.also_train if kind not in freeze)
    return Trained(plain + also, stacks, plain, stacks)
