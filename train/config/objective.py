"""What a run learns from: text alone, a teacher besides, or itself at a larger budget. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.component import Component
from model.config import ModelConfig
from model.routers.config import RouterConfig
from train.config.training import TrainConfig, problems_of_checkpoint

LOWERED = ("top_k", "top_p", "threshold")
"""Routers whose tokens can be sent to their best so many experts in a causal way, by gates that are
theirs.
"""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Component):
    """What the forward passes of a step learn from."""

    @property
    def needs_teacher(self) -> bool:
        """Whether another model has to be there while this one learns."""
        return False

    def problems(self, model: ModelConfig, router: RouterConfig, train: TrainConfig) -> list[str]:
        """Contradictions of the settings with each other and the run."""
        return []


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token."""

    name = "next_token"


@dataclass(frozen=True, kw_only=True)
class DistilConfig(ObjectiveConfig):
    """Cross-entropy of the next token and divergence from a teacher (model/distillation.py)."""

    name = "distil"

    run: str | None = None
    """A run of ours that teaches while the model learns: frozen, on every rank, its experts spread
    as the model's are.
    """
    path: str | None = None
    """Instead: a folder as the Hub has it."""
    checkpoint: str = "best"
    """Of `run`: best, latest or a name. It is a name once the run has begun."""
    cache: str | None = None
    """Instead: a folder of launch.teach, with what a teacher said of the rows of this run."""
    weight: float = 0.5
    """w of (1 - w) cross-entropy + w T^2 divergence."""
    temperature: float = 1.0
    """T, of both distributions."""

    @property
    def needs_teacher(self) -> bool:
        return self.cache is None

    def problems(self, model: ModelConfig, router: RouterConfig, train: TrainConfig) -> list[str]:
        named = {"run": self.run, "path": self.path, "cache": self.cache}
        given = [f"objective.{name}" for name, value in named.items() if value is not None]
        found = []
        if len(given) != 1:
            found.append(
                (f"{' and '.join(given)} are set" if given else "objective=distil has no teacher")
                + "; give one of objective.run=RUN, objective.path=DIR or objective.cache=CACHE"
            )
        if not 0 <= self.weight <= 1:
            found.append(f"objective.weight is {self.weight}; it must be from 0 to 1")
        found += _of_temperature(self.temperature)
        return found + problems_of_checkpoint("objective.checkpoint", self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class SelfDistilConfig(ObjectiveConfig):
    """Cross-entropy of the next token at the full budget; then the same tokens once more, by fewer
    experts each, which learn what the full budget said.
    """

    name = "self_distil"

    top_k: tuple[int, ...] = (1,)
    """Lower budgets: experts per token of plain top-k. A step has one of them, in turn."""
    weight: float = 1.0
    """w of cross-entropy at the full budget + w T^2 divergence of the lower budget from it."""
    temperature: float = 1.0
    """T, of both distributions."""

    def problems(self, model: ModelConfig, router: RouterConfig, train: TrainConfig) -> list[str]:
        if not model.num_experts:
            return [
                "objective=self_distil teaches lower budgets of experts, but model.num_experts is "
                "0; use objective=next_token"
            ]
        if router.name not in LOWERED or router.arguments.get("num_null_experts"):
            return [
                f"objective=self_distil with router={router.name}: its tokens cannot be sent to "
                f"fewer experts by their scores alone; use router={', '.join(LOWERED)} without "
                "null experts"
            ]
        if number := router.arguments.get("hash_layers"):
            return [
                f"objective=self_distil sends tokens to fewer experts, but router.hash_layers "
                f"{number} name all experts of a token; set one of them to 0, or "
                "objective=next_token"
            ]
        full = router.experts_per_token(model)
        found = [
            f"objective.top_k has {number}; a lower budget must be at least 1 and below the "
            f"{full:g} experts per token of the router"
            for number in self.top_k
            if not 1 <= number < full
        ]
        if not self.top_k:
            found.append("objective.top_k is empty; name lower budgets, as objective.top_k=[1]")
        if self.weight < 0:
            found.append(f"objective.weight is {self.weight}; it must not be negative")
        if model.num_mtp_layers:
            found.append(
                f"objective=self_distil with model.num_mtp_layers {model.num_mtp_layers}: modules "
                "of multi-token prediction have no lower budget; set it to 0 and "
                "train.mtp_coeff=0"
            )
        return found + _of_temperature(self.temperature)


def _of_temperature(temperature: float) -> list[str]:
    if temperature > 0:
        return []
    return [f"objective.temperature is {temperature}; it must be positive"]


OBJECTIVES: Mapping[str, type[ObjectiveConfig]] = {
    record.name: record for record in (NextTokenConfig, DistilConfig, SelfDistilConfig)
}
"""By name in a config."""
