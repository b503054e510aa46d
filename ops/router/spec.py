"""What a router does, as one frozen record; the numbers its kernels read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Literal, NamedTuple, get_args

Mode = Literal["top_k", "top_p", "threshold", "relu", "expert_choice", "given"]
ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus", "relu"]
MAX_COLUMNS = 1024
"""Experts plus null experts."""
MAX_SLOTS = 64
"""Most experts of one token."""


class Reason(IntFlag):
    """Why a token was routed otherwise than its mode alone would have; bits of
    RouterOutput.reasons.
    """

    NONFINITE = 1
    """A logit is NaN or infinite."""
    EMPTY = 2
    """The mode chose nothing."""
    RAISED = 4
    """Fewer than min_experts were chosen."""
    CAPPED = 8
    """More than max_experts were chosen."""
    OVERRIDDEN = 16
    """Plain top-k has a share in the choice: warm start, guard or collapse."""
    OVERFLOW = 32
    """Spill: an expert was full, and what it had too many of moved on or was dropped."""
    FROZEN = 64
    """Chosen by the snapshot of an earlier router, after a spike of the gradient norm."""
    OVERLOADED = 128
    """Overload: the limit is lowered because a rank has too much to do."""

    @property
    def bit(self) -> int:
        """Place in RouterOutput.reason_counts."""
        return self.value.bit_length() - 1


NUM_REASONS = 8
# csrc/router_args.h
_MODES = {"top_k": 0, "top_p": 1, "threshold": 2, "relu": 2, "expert_choice": 3, "given": 4}
_SCORES = {name: number for number, name in enumerate(get_args(ScoreFunction))}


class Integers(NamedTuple):
    """A RouteSpec and the sizes of a call in the order of read_spec (csrc/router_ops.cpp)."""

    num_experts: int
    num_slots: int
    mode: int
    score_function: int
    top_k: int
    min_experts: int
    num_groups: int
    top_groups: int
    normalize_weights: int
    skip_nonfinite: int
    num_segments: int
    num_bins: int
    num_columns: int
    group_keys: int


@dataclass(frozen=True)
class RouteSpec:
    """One rule for all modes: rank the columns by key u = score + bias, descending, lower id first
    among equals, and take the first n; n is what the mode says, held between min_experts and
    max_experts.
    """

    num_experts: int
    mode: Mode = "top_k"
    """How n is found. top_k: n = top_k. top_p: the fewest columns whose share of the scores reaches
    the value of router_inputs (arXiv 2403.07652). threshold: those with u above that value (arXiv
    2603.11535; with quantiles in the bias this is dynamic quantile balancing). relu: the same over
    ReLU scores, whose zero is the threshold (arXiv 2412.14711). expert_choice: every expert takes
    its best top_k * T / E tokens (arXiv 2202.09368); it looks at later tokens, so it is for
    training only. given: ids are handed in, and only gates and statistics are computed.
    """
    score_function: ScoreFunction = "softmax"
    """Softmax over all columns, or per column sigmoid, sqrt(softplus) or ReLU of the logit."""
    top_k: int = 2
    num_null_experts: int = 0
    """Columns after the experts that cost nothing: choosing one uses up a rank and no expert."""
    min_experts: int = 1
    """Lower bound of n."""
    max_experts: int = 2
    """Upper bound of n, and the number of slots K."""
    num_groups: int = 1
    top_groups: int = 1
    """Only experts of the `top_groups` best of num_groups groups take part (DeepSeek-V3, arXiv
    2412.19437).
    """
    group_keys: int | None = None
    """A group counts the sum of so many of its best keys: 2 in DeepSeek-V3, 1 in DeepSeek-V2. None:
    top_k / top_groups, rounded down, at least 1.
    """
    normalize_weights: bool = True
    """Gates are scores over the sum of the selected experts' scores, else the scores."""
    scaling_factor: float = 1.0
    """Of all gates."""
    skip_nonfinite: bool = False
    """A row with a NaN or infinite logit visits no expert (a shared expert serves it); else expert
    row mod E with gate 0.
    """

    @property
    def num_columns(self) -> int:
        return self.num_experts + self.num_null_experts

    @property
    def keys_of_a_group(self) -> int:
        """Best keys that a group counts."""
        return max(1, self.top_k // self.top_groups) if self.group_keys is None else self.group_keys

    @property
    def limits_groups(self) -> bool:
        """Whether there are experts that groups leave out."""
        return 1 < self.num_groups > self.top_groups

    @property
    def teaches_nothing(self) -> bool:
        """Whether every gate is one over itself, so that no gradient reaches the logits. Evaluating
        such a rule is sound, and training it is not.
        """
        return self.normalize_weights and self.max_experts == 1

    def integers(self, num_segments: int, num_bins: int) -> list[int]:
        """The settings as the compiled op takes them: Integers by place."""
        return list(
            Integers(
                num_experts=self.num_experts,
                num_slots=self.max_experts,
                mode=_MODES[self.mode],
                score_function=_SCORES[self.score_function],
                top_k=self.top_k,
                min_experts=self.min_experts,
                num_groups=self.num_groups,
                top_groups=self.top_groups,
                normalize_weights=int(self.normalize_weights),
                skip_nonfinite=int(self.skip_nonfinite),
                num_segments=num_segments,
                num_bins=num_bins,
                num_columns=self.num_columns,
                group_keys=self.keys_of_a_group if self.limits_groups else 1,
            )
        )

    def problems(self, name: str = "router") -> list[str]:
        """Every contradiction, as sentences that name the value and the way out."""
        found = []
        columns = self.num_columns
        if self.mode not in _MODES:
            found.append(f"{name}.mode is {self.mode!r}; choose one of {', '.join(_MODES)}")
        if self.score_function not in _SCORES:
            found.append(
                f"{name}.score_function is {self.score_function!r}; choose one of "
                f"{', '.join(_SCORES)}"
            )
        if self.num_null_experts < 0:
            found.append(
                f"{name}.num_null_experts is {self.num_null_experts}; it must not be negative"
            )
        if self.num_experts < 1:
            found.append(f"{name}: num_experts is {self.num_experts}; it must be at least 1")

        if not 1 <= columns <= MAX_COLUMNS:
            found.append(
                f"{name}: {columns} experts (null experts included) must be between 1 and "
                f"{MAX_COLUMNS}"
            )
        if not 1 <= self.top_k <= columns:
            found.append(
                f"{name}.top_k is {self.top_k}; it must be between 1 and model.num_experts "
                f"{columns}" + (" (null experts included)" if self.num_null_experts else "")
            )

        if not 1 <= self.max_experts <= min(columns, MAX_SLOTS):
            found.append(
                f"{name}.max_experts is {self.max_experts}; it must be between 1 and "
                f"{min(columns, MAX_SLOTS)}, the number of experts or the {MAX_SLOTS} slots a "
                "token can have"
            )
        elif not 0 <= self.min_experts <= self.max_experts:
            found.append(
                f"{name}.min_experts is {self.min_experts}; it must be between 0 and max_experts "
                f"{self.max_experts}"
            )

        if self.mode == "top_k" and self.max_experts < self.top_k:
            found.append(f"{name}.max_experts {self.max_experts} is below top_k {self.top_k}")
        if not self.scaling_factor > 0:
            found.append(f"{name}.scaling_factor is {self.scaling_factor}; it must be positive")

        if self.mode == "relu" and self.score_function != "relu":
            found.append(f"{name}.mode relu needs score_function relu, not {self.score_function}")
        if self.mode == "top_p" and self.score_function == "relu":
            found.append(
                f"{name}.mode top_p needs scores that never are all zero; choose softmax, sigmoid "
                "or sqrt_softplus"
            )

        if self.num_groups != 1 or self.top_groups != 1:
            found += self._group_problems(name)
        elif self.group_keys is not None:
            found.append(
                f"{name}.group_keys is {self.group_keys}, but {name}.num_groups is 1: there are no "
                "groups to rank; set it to null"
            )
        if self.mode == "expert_choice" and self.num_null_experts:
            found.append(
                f"{name}.mode expert_choice cannot have null experts: a null expert has no "
                "capacity to fill"
            )
        return found

    def _group_problems(self, name: str) -> list[str]:
        if self.mode not in ("top_k", "top_p", "given"):
            return [f"{name}.num_groups belongs to mode top_k or top_p, not {self.mode}"]
        if not 1 <= self.top_groups <= self.num_groups <= 64 or self.num_experts % self.num_groups:
            return [
                f"{name}.num_groups {self.num_groups} must divide model.num_experts "
                f"{self.num_experts}, be at most 64, and be at least {name}.top_groups "
                f"{self.top_groups}"
            ]
        size = self.num_experts // self.num_groups
        if self.group_keys is not None and not 1 <= self.group_keys <= size:
            return [
                f"{name}.group_keys is {self.group_keys}; it must be between 1 and the {size} "
                "experts of a group, or null"
            ]
        if self.top_k > size * self.top_groups or self.keys_of_a_group > size:
            return [
                f"{name}.top_k {self.top_k} does not fit {self.top_groups} of {self.num_groups} "
                f"groups of {size} experts"
            ]
        return []
