"""From a dense model to a mixture of experts that computes the same at the start (sparse
upcycling, arXiv 2212.05055, with the shards and virtual groups of arXiv 2410.07524): the settings,
the shape they make, and when the function is kept. Imports no torch.

The MLP of width F is cut into G shards of width F / G. A shared expert holds the first ones, and
routed expert e holds shard (e mod R) of the R that are left. Experts 0 .. R - 1 are a virtual
group, R .. 2R - 1 the next: the rows of a group's experts in the router are the same, so a token
chooses whole groups, and with them every shard equally often. With gates that add up to s, a shard
counts s / R, so `down` is multiplied by R / s. SwiGLU is linear in `down` alone: there one factor
is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.routers.config import RouterConfig


@dataclass(frozen=True)
class UpcycleConfig:
    """Make the MLPs of a dense model into experts."""

    num_experts: int = 0
    """Routed experts of every layer; 0: the model stays what it is."""
    top_k: int = 2
    """Routed experts of a token, as model.top_k."""
    granularity: int = 1
    """Shards that an MLP is cut into: experts are so many times narrower than it. 1: copies."""
    num_shared_experts: int = 0
    """Shards that every token visits, and no routed expert holds."""
    reinit_ratio: float = 0.0
    """Share of each routed expert's width that is drawn anew (Drop-Upcycling, arXiv 2502.19261:
    0.5). 0: the function is kept.
    """

    @property
    def num_routed_shards(self) -> int:
        """R: shards that routed experts hold, and experts of a virtual group."""
        return self.granularity - self.num_shared_experts

    def problems(self) -> list[str]:
        name = "init.upcycle"
        if self.num_experts < 0:
            return [f"{name}.num_experts is {self.num_experts}; use 0 for no upcycling"]
        if not self.num_experts:
            return [
                f"{name}.{key} is {value}, but {name}.num_experts is 0, so nothing is upcycled; "
                "set it, to 8, say"
                for key, value in vars(self).items()
                if value != getattr(UpcycleConfig(), key)
            ]
        found = [
            f"{name}.{key} is {getattr(self, key)}; it must be at least 1"
            for key in ("top_k", "granularity")
            if getattr(self, key) < 1
        ]
        if not 0 <= self.num_shared_experts < max(1, self.granularity):
            found.append(
                f"{name}.num_shared_experts is {self.num_shared_experts}; it must be between 0 and "
                f"{name}.granularity {self.granularity} - 1, as routed experts hold the other "
                "shards"
            )
        if not 0 <= self.reinit_ratio <= 1:
            found.append(f"{name}.reinit_ratio is {self.reinit_ratio}; it must be from 0 to 1")
        if found:
            return found
        found += [
            f"{name}.{key} {getattr(self, key)} is no multiple of the {self.num_routed_shards} "
            "shards that routed experts hold (granularity less num_shared_experts): tokens could "
            "not visit every shard equally often"
            for key in ("num_experts", "top_k")
            if getattr(self, key) % self.num_routed_shards
        ]
        if self.top_k > self.num_experts:
            found.append(f"{name}.top_k {self.top_k} is above {name}.num_experts")
        return found

    def shape(self, dense: dict[str, Any]) -> dict[str, Any]:
        """Fields of ModelConfig of the mixture, of those of the dense model.

        Raises:
            ValueError: the model has experts already, or its width cannot be cut so.
        """
        if dense["num_experts"]:
            raise ValueError(
                f"init.upcycle makes a dense model's MLPs into experts, but the weights have "
                f"{dense['num_experts']} experts; drop it"
            )
        width = dense["intermediate_size"]
        if self.granularity < 1 or width % self.granularity:
            raise ValueError(
                f"init.upcycle.granularity {self.granularity} does not divide the width {width} "
                "of the dense MLPs"
            )
        return dense | {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "expert_intermediate_size": width // self.granularity,
            "num_shared_experts": self.num_shared_experts,
        }


def upcycling_problems(
    upcycle: UpcycleConfig, model: ModelConfig, router: RouterConfig, warm_start_steps: int
) -> list[str]:
    """Routers under which the mixture would not compute what the dense model does."""
    if not upcycle.num_experts or upcycle.problems():
        return []
    found, settings = [], router.arguments
    shards, group = upcycle.num_routed_shards, "the experts of a virtual group"
    if router.name not in ("top_k", "top_p", "threshold"):
        found.append(
            f"init.upcycle with router={router.name} would not keep the function: a token's gates "
            "have no fixed sum; use router=top_k, sigmoid_top_k, top_p or threshold, and another "
            "router later with init.run"
        )
    elif not settings.get("normalize_weights"):
        found.append(
            "init.upcycle with router.normalize_weights=false would not keep the function: the "
            "gates of a token add up to another number for each; add router.normalize_weights=true"
        )
    if shards > 1 and settings.get("num_groups", 1) > 1:
        found.append(
            f"router.num_groups {settings['num_groups']} may leave out some of {group}; set it to 1"
        )
    if router.name in ("top_p", "threshold"):
        begins = max(1, round(router.experts_per_token(model)))
        if shards > 1 and (warm_start_steps == 0 or begins % shards):
            found.append(
                f"init.upcycle.granularity {upcycle.granularity} with router={router.name} starts "
                f"with the {begins} best experts of a token (budget.warm_start_steps "
                f"{warm_start_steps}), which must be whole virtual groups of {shards}: set "
                f"router.budget near a multiple of {shards}, and a warm start"
            )
        elif shards == 1 and warm_start_steps == 0 and not settings.get("min_experts", 1):
            found.append(
                "init.upcycle without budget.warm_start_steps needs router.min_experts=1: a token "
                "without experts has no MLP"
            )
    elif router.name == "top_k" and settings["top_k"] % shards:
        found.append(
            f"router.top_k {settings['top_k']} is no multiple of the {shards} experts of a virtual "
            "group; set init.upcycle.top_k instead"
        )
    if model.shared_expert_gate:
        found.append("model.shared_expert_gate=true would scale the shared shards; switch it off")
    return found
