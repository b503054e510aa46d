"""What each router can be asked for, and which requests contradict themselves or the model. Imports
no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from model.component import Component
from model.config import ModelConfig, experts_of_budget
from ops.router.spec import MAX_SLOTS, Mode, RouteSpec, ScoreFunction

if TYPE_CHECKING:
    from model.routers.base import Router

ControlLaw = Literal["none", "quantile", "top_p", "relu", "null"]
"""What a router's budget controller moves (model/moe/budget.py)."""
Scores = Literal["softmax", "sigmoid", "sqrt_softplus"]
"""Score functions of every router but ReLU routing, whose scores are its own."""
LEAST_BUDGET = 0.1
"""Experts per token: less is no budget anybody means, and plain top-k, the fallback, visits one."""
NO_BUDGET = (
    "router.budget: this run was trained with a fixed number of experts per token; a budget needs "
    "router=top_p, threshold, relu or null_experts"
)
FORMER_COEFF = 1e-8
"""Default of router.initial_coeff in versions that had it."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Component):
    """The settings of a router. What a knob does in the op stands in ops.router.RouteSpec."""

    law: ClassVar[ControlLaw] = "none"
    mode: ClassVar[Mode]

    scaling_factor: float = 1.0
    """Multiplies the gates (`routed_scaling_factor` of published models)."""

    def experts_per_token(self, model: ModelConfig) -> float:
        """Mean routed experts that a token visits."""
        raise NotImplementedError

    def spec(self, model: ModelConfig) -> RouteSpec:
        """The rule that the routing op follows."""
        raise NotImplementedError

    def problems(self, model: ModelConfig) -> list[str]:
        """Contradictions between the knobs and the model, for launch/config/contradictions.py."""
        raise NotImplementedError

    def training_problems(self, model: ModelConfig) -> list[str]:
        """What speaks against learning with the knobs, and not against computing with them."""
        if not self.spec(model).teaches_nothing:
            return []
        return [
            "router.normalize_weights with at most one expert of a token makes every gate 1, so "
            "the router would get no gradient; set router.normalize_weights=false, or more experts"
        ]

    def fixed(self, model: ModelConfig, top_k: int) -> TopKConfig:
        """Plain top-k by the scores of this router: the same router configured with `top_k` experts
        of every token. Scores, gates, a bias of the logits and groups are as they are here; a group
        goes on being ranked by as many of its keys. Capacity is a matter of training and left out.

        Raises:
            ValueError: its scores cannot rank the experts alone.
        """
        spec = self.spec(model)
        if spec.score_function == "relu":
            raise ValueError(
                "router.top_k: ReLU routing has no scores to rank by, its gates are the logits "
                "above its cuts"
            )
        if spec.num_null_experts:
            raise ValueError(
                f"router.top_k: the scores of router={self.name} count "
                f"{spec.num_null_experts} null experts, which plain top-k does not have"
            )
        hash_layers = self.arguments.get("hash_layers", 0)
        if hash_layers and top_k != spec.top_k:
            raise ValueError(
                f"router.top_k: the tables of router.hash_layers {hash_layers} name "
                f"{spec.top_k} experts of every token"
            )
        return TopKConfig(
            top_k=top_k,
            hash_layers=hash_layers,
            score_function=spec.score_function,
            normalize_weights=spec.normalize_weights,
            scaling_factor=spec.scaling_factor,
            num_groups=spec.num_groups,
            top_groups=spec.top_groups,
            group_keys=spec.keys_of_a_group if spec.num_groups > 1 else None,
            bias=bool(self.arguments.get("bias")),
        )

    def build(self, model: ModelConfig) -> Router:
        """The router of one layer, with its weight still to be drawn."""
        raise NotImplementedError

    def build_layer(self, model: ModelConfig, number: int) -> Router:
        """Likewise, of MoE layer `number`, from 0, where layers differ."""
        return self.build(model)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """Each token visits the `top_k` experts with the highest score + bias. Ties go to the lower
    expert id.
    """

    name = "top_k"
    mode = "top_k"

    top_k: int
    """Experts of every token."""
    score_function: Scores = "softmax"
    """softmax over the experts (Switch, arXiv 2101.03961), sigmoid per expert (DeepSeek-V3, arXiv
    2412.19437) or sqrt_softplus. Logits and scores are fp32 whatever the precision of the model.
    """
    normalize_weights: bool = True
    """The gates of a token sum to 1. With top_k = 1 every gate is 1, which starves the router of
    gradient, so that no run trains so.
    """
    num_groups: int = 1
    """Equal parts of the experts, one after the other."""
    top_groups: int = 1
    """Only the experts of so many best groups take part (DeepSeek-V3's node-limited routing)."""
    bias: bool = False
    """The logits have a learned bias (gpt-oss), not to be confused with the selection bias of
    balance.bias_update, which no gate sees.
    """
    group_keys: int | None = None
    """How many best keys of a group it is ranked by: 2 in DeepSeek-V3, 1 in DeepSeek-V2. None:
    top_k / top_groups.
    """
    capacity_factor: float | None = None
    """In training an expert takes at most ceil(capacity_factor * top_k * T / E) of T tokens. The
    rest goes to the next expert with room, then nowhere. None: no limit (dropless).
    """
    hash_layers: int = 0
    """So many first MoE layers route by a table of the token's id instead, which is drawn once and
    saved with the weights; scores give the gates of what it names (DeepSeek-V4: 3).
    """

    def experts_per_token(self, model: ModelConfig) -> float:
        return float(self.top_k)

    def spec(self, model: ModelConfig) -> RouteSpec:
        return RouteSpec(
            num_experts=model.num_experts,
            mode=self.mode,
            score_function=self.score_function,
            top_k=self.top_k,
            max_experts=self.top_k,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            group_keys=self.group_keys,
            normalize_weights=self.normalize_weights,
            scaling_factor=self.scaling_factor,
            skip_nonfinite=model.num_shared_experts > 0,
        )

    def problems(self, model: ModelConfig) -> list[str]:
        if found := relu_problems(self.score_function):
            return found
        if not 1 <= self.top_k <= model.num_experts:
            # What else is wrong is found with the least number of experts that any model has.
            rest = RouteSpec(
                num_experts=model.num_experts,
                mode=self.mode,
                score_function=self.score_function,
                top_k=1,
                max_experts=1,
                normalize_weights=False,
                scaling_factor=self.scaling_factor,
            )
            return [
                f"router.top_k is {self.top_k}; it must be between 1 and model.num_experts "
                f"{model.num_experts}",
                *rest.problems(),
            ]
        found = self.spec(model).problems() + capacity_problems(self.capacity_factor)
        return found + self._hash_problems(model)

    def _hash_problems(self, model: ModelConfig) -> list[str]:
        number = len(model.decoder_moe_layers)
        if not 0 <= self.hash_layers <= number:
            return [
                f"router.hash_layers is {self.hash_layers}; it must be between 0 and the {number} "
                "layers with experts"
            ]
        if self.hash_layers and self.capacity_factor is not None:
            return [
                f"router.capacity_factor is {self.capacity_factor}, but router.hash_layers "
                f"{self.hash_layers} name the experts of a token, of which none is the next one "
                "with room; set one of them to null or 0"
            ]
        return []

    def build(self, model: ModelConfig) -> Router:
        from model.routers.top_k import TopKRouter

        return TopKRouter(model, self)

    def build_layer(self, model: ModelConfig, number: int) -> Router:
        if number >= self.hash_layers:
            return self.build(model)
        from model.routers.hashed import HashedRouter

        return HashedRouter(model, self, number)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    """Every expert takes its best top_k * T / E tokens of the micro-batch (arXiv 2202.09368)."""

    name = "expert_choice"
    law = "quantile"
    mode = "expert_choice"

    top_k: int
    """Mean experts of a token."""
    max_experts: int | None = None
    """Most experts of one token; what lies above is cut off and counted. None: four times top_k."""
    min_experts: int = 0
    """Fewest experts of one token."""
    score_function: Scores = "softmax"
    """How logits become scores."""
    normalize_weights: bool = False
    """The gates of a token sum to 1."""

    def experts_per_token(self, model: ModelConfig) -> float:
        return float(self.top_k)

    def spec(self, model: ModelConfig) -> RouteSpec:
        return RouteSpec(
            num_experts=model.num_experts,
            mode=self.mode,
            score_function=self.score_function,
            top_k=self.top_k,
            min_experts=self.min_experts,
            max_experts=default_max_experts(model.num_experts, self.top_k, self.max_experts),
            normalize_weights=self.normalize_weights,
            scaling_factor=self.scaling_factor,
            skip_nonfinite=model.num_shared_experts > 0,
        )

    def problems(self, model: ModelConfig) -> list[str]:
        if found := relu_problems(self.score_function):
            return found
        spec = self.spec(model)
        if spec.max_experts < self.top_k <= model.num_experts:
            return [
                f"router.max_experts {spec.max_experts} is below router.top_k {self.top_k}, the "
                "mean of all tokens"
            ]
        if self.top_k < self.min_experts <= spec.max_experts:
            return [
                f"router.min_experts {self.min_experts} is above router.top_k {self.top_k}, the "
                "mean of all tokens"
            ]
        return spec.problems()

    def build(self, model: ModelConfig) -> Router:
        from model.routers.expert_choice import ExpertChoiceRouter

        return ExpertChoiceRouter(model, self)


@dataclass(frozen=True, kw_only=True)
class BudgetedConfig(RouterConfig):
    """The settings of a router whose mean number of experts per token is held to a budget."""

    budget: float
    """Mean experts per token, or what they cost: see budget_unit."""
    budget_unit: Literal["experts", "flops"] = "experts"
    """Whether the budget is in experts, or in forward FLOPs of the routed experts per token, over
    all layers.
    """
    capacity_factor: float | None = None
    """In training an expert takes at most ceil(capacity_factor * k * T / E) of T tokens, k the
    budget in experts. The rest goes to the next expert with room, then nowhere. None: no limit
    (dropless).
    """

    def experts_per_token(self, model: ModelConfig) -> float:
        return experts_of_budget(model, self.budget, self.budget_unit)

    def fallback_k(self, model: ModelConfig) -> int:
        """Experts per token of plain top-k, which serves until the scores have settled."""
        return max(1, round(self.experts_per_token(model)))

    def budget_problems(
        self, model: ModelConfig, max_experts: int, most: int, min_experts: int = 0
    ) -> list[str]:
        """Contradictions of the budget and of the capacity.

        Args:
            max_experts, min_experts: bounds of one token.
            most: experts that there are to choose from.
        """
        found = capacity_problems(self.capacity_factor)
        if self.budget_unit not in ("experts", "flops"):
            return [
                *found,
                f"router.budget_unit is {self.budget_unit!r}; choose experts or flops",
            ]
        experts = self.experts_per_token(model)
        given = (
            f"router.budget {self.budget:g} ({self.budget_unit}) is {experts:.3g} experts per token"
        )
        # An impossible least number is named by the checks of the rule itself.
        least = max(LEAST_BUDGET, min_experts if min_experts <= max_experts else 0)
        if not least <= experts <= most:
            reason = f" (router.min_experts is {min_experts})" if min_experts > LEAST_BUDGET else ""
            price = (
                f"; one expert per token is {self.budget / experts:.4g} FLOPs"
                if self.budget_unit == "flops" and experts > 0
                else ""
            )
            found.append(f"{given}; it must be between {least:g}{reason} and {most}{price}")
        elif experts > max_experts:
            found.append(f"{given}, above router.max_experts {max_experts}")
        return found


@dataclass(frozen=True, kw_only=True)
class BoundedConfig(BudgetedConfig):
    """The settings of a router whose experts take tokens above cuts of their own, within bounds of
    one token.
    """

    min_experts: int | None = None
    """1 gives a token that clears no cut its best expert (by score minus cut), 0 leaves it to the
    shared expert. None: 0 where there is a shared expert, else 1.
    """
    max_experts: int | None = None
    """Most experts of one token. None: four times the budget."""

    def least_experts(self, model: ModelConfig) -> int:
        """Fewest experts of a token: as configured, or none where a shared expert serves it."""
        return (
            self.min_experts if self.min_experts is not None else int(model.num_shared_experts == 0)
        )

    def spec_with(
        self, model: ModelConfig, score_function: ScoreFunction, normalize_weights: bool
    ) -> RouteSpec:
        """The rule with these scores and gates."""
        experts = self.experts_per_token(model)
        return RouteSpec(
            num_experts=model.num_experts,
            mode=self.mode,
            score_function=score_function,
            top_k=self.fallback_k(model),
            min_experts=self.least_experts(model),
            max_experts=default_max_experts(model.num_experts, experts, self.max_experts),
            normalize_weights=normalize_weights,
            scaling_factor=self.scaling_factor,
            skip_nonfinite=model.num_shared_experts > 0,
        )

    def problems_with(self, model: ModelConfig, own: list[str]) -> list[str]:
        """Contradictions of the shared knobs, around those of the router's own."""
        spec = self.spec(model)
        found = self.budget_problems(model, spec.max_experts, model.num_experts, spec.min_experts)
        found += own
        if spec.min_experts == 0 and not model.num_shared_experts:
            found.append(
                "router.min_experts=0 leaves tokens without any expert; it needs "
                "model.num_shared_experts"
            )
        return found or spec.problems()


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(BoundedConfig):
    """A token visits the experts whose score exceeds their cut (Expert Threshold, arXiv
    2603.11535).
    """

    name = "threshold"
    law = "quantile"
    mode = "threshold"

    score_function: Scores = "sigmoid"
    """How logits become scores."""
    normalize_weights: bool = False
    """The gates of a token sum to 1."""

    def spec(self, model: ModelConfig) -> RouteSpec:
        return self.spec_with(model, self.score_function, self.normalize_weights)

    def problems(self, model: ModelConfig) -> list[str]:
        return self.problems_with(model, relu_problems(self.score_function))

    def build(self, model: ModelConfig) -> Router:
        from model.routers.threshold import ThresholdRouter

        return ThresholdRouter(model, self)


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(BoundedConfig):
    """A token visits the experts whose logit exceeds their cut, with what exceeds it as gate
    (ReMoE, arXiv 2412.14711).
    """

    name = "relu"
    law = "relu"
    mode = "relu"

    initial_coeff: float | None = None
    """Of the penalty that held the budget in earlier versions. Their default is still read, so that
    their configs load, and any other value is refused.
    """

    def spec(self, model: ModelConfig) -> RouteSpec:
        return self.spec_with(model, "relu", normalize_weights=False)

    def problems(self, model: ModelConfig) -> list[str]:
        own = []
        if self.initial_coeff not in (None, FORMER_COEFF):
            own.append(
                f"router.initial_coeff is {self.initial_coeff}, which no longer acts: cuts hold "
                "the budget now, not a penalty on gates; drop it"
            )
        return self.problems_with(model, own)

    def build(self, model: ModelConfig) -> Router:
        from model.routers.relu import ReLURouter

        return ReLURouter(model, self)


@dataclass(frozen=True, kw_only=True)
class TopPConfig(BudgetedConfig):
    """Each token visits the fewest experts whose share of the scores reaches P (arXiv 2403.07652),
    and P is moved until their mean is the budget (arXiv 2512.13996).
    """

    name = "top_p"
    law = "top_p"
    mode = "top_p"

    initial_top_p: float = 0.4
    """P at the start of a run."""
    min_experts: int = 1
    """Fewest experts of one token."""
    max_experts: int | None = None
    """Most experts of one token. None: four times the budget."""
    score_function: Scores = "softmax"
    """How logits become scores."""
    normalize_weights: bool = True
    """The gates of a token sum to 1."""
    num_groups: int = 1
    """Equal parts of the experts, one after the other."""
    top_groups: int = 1
    """Only the experts of so many best groups take part."""
    group_keys: int | None = None
    """How many best keys of a group it is ranked by. None: top_k / top_groups, with the budget
    rounded for top_k.
    """
    num_null_experts: int = 0
    """Columns that take part in the ranking and cost nothing."""

    def spec(self, model: ModelConfig) -> RouteSpec:
        columns = model.num_experts + self.num_null_experts
        return RouteSpec(
            num_experts=model.num_experts,
            mode=self.mode,
            score_function=self.score_function,
            top_k=self.fallback_k(model),
            num_null_experts=self.num_null_experts,
            min_experts=self.min_experts,
            max_experts=default_max_experts(
                columns, self.experts_per_token(model), self.max_experts
            ),
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            group_keys=self.group_keys,
            normalize_weights=self.normalize_weights,
            scaling_factor=self.scaling_factor,
            skip_nonfinite=model.num_shared_experts > 0,
        )

    def problems(self, model: ModelConfig) -> list[str]:
        spec = self.spec(model)
        found = self.budget_problems(model, spec.max_experts, spec.num_columns, self.min_experts)
        if not 0 < self.initial_top_p < 1:
            found.append(
                f"router.initial_top_p is {self.initial_top_p}; it must be between 0 and 1"
            )
        return found or spec.problems()

    def build(self, model: ModelConfig) -> Router:
        from model.routers.top_p import TopPRouter

        return TopPRouter(model, self)


@dataclass(frozen=True, kw_only=True)
class NullExpertsConfig(BudgetedConfig):
    """Top-k over the experts and columns that cost nothing: a token that chooses those visits fewer
    experts (arXiv 2406.13233, 2509.01322).
    """

    name = "null_experts"
    law = "null"
    mode = "top_k"

    num_null_experts: int
    """Columns that cost nothing."""
    top_k: int | None = None
    """Experts and null experts of a token together. None: twice the budget."""
    score_function: Scores = "softmax"
    """How logits become scores."""
    normalize_weights: bool = True
    """The gates of a token's real experts sum to 1."""

    def ranks(self, model: ModelConfig) -> int:
        """Columns that a token chooses."""
        if self.top_k is not None:
            return self.top_k
        return min(model.num_experts, 2 * max(1, math.ceil(self.experts_per_token(model))))

    def spec(self, model: ModelConfig) -> RouteSpec:
        ranks = self.ranks(model)
        return RouteSpec(
            num_experts=model.num_experts,
            mode=self.mode,
            score_function=self.score_function,
            top_k=ranks,
            num_null_experts=self.num_null_experts,
            max_experts=ranks,
            normalize_weights=self.normalize_weights,
            scaling_factor=self.scaling_factor,
            skip_nonfinite=model.num_shared_experts > 0,
        )

    def problems(self, model: ModelConfig) -> list[str]:
        ranks, experts = self.ranks(model), self.experts_per_token(model)
        found = self.budget_problems(model, ranks, min(ranks, model.num_experts))
        if self.num_null_experts >= 1 and experts <= ranks - self.num_null_experts:
            found.append(
                f"router.num_null_experts is {self.num_null_experts}, so that "
                f"{ranks - self.num_null_experts} of router.top_k {ranks} are experts at least; a "
                f"mean of {experts:.3g} needs more null experts or a lower top_k"
            )
        if self.num_null_experts < 1:
            found.append(
                f"router.num_null_experts is {self.num_null_experts}; router=null_experts needs at "
                "least 1"
            )
        return found + relu_problems(self.score_function) + self.spec(model).problems()

    def build(self, model: ModelConfig) -> Router:
        from model.routers.top_k import NullExpertsRouter

        return NullExpertsRouter(model, self)


ROUTERS: dict[str, type[RouterConfig]] = {
    record.name: record
    for record in (
        TopKConfig,
        TopPConfig,
        ThresholdConfig,
        ReLUConfig,
        ExpertChoiceConfig,
        NullExpertsConfig,
    )
}
"""Name in a config -> record."""


def default_max_experts(num_columns: int, budget: float, max_experts: int | None) -> int:
    """Slots per token: as configured, or four times the budget, which bounds memory while a router
    is still dense.
    """
    return (
        max_experts
        if max_experts is not None
        else min(num_columns, MAX_SLOTS, 4 * max(1, math.ceil(budget)))
    )


def capacity_problems(capacity_factor: float | None) -> list[str]:
    if capacity_factor is not None and capacity_factor <= 0:
        return [
            f"router.capacity_factor is {capacity_factor}; it must be positive, or null for "
            "dropless routing"
        ]
    return []


def relu_problems(score_function: ScoreFunction) -> list[str]:
    """ReLU scores need the bias before the ReLU, which is the business of their own router."""
    if score_function == "relu":
        return ["router.score_function relu belongs to router=relu"]
    return []
