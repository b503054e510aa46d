"""What a router does, as one frozen record; the numbers its kernels read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Literal, get_args

Mode = Literal["top_k", "top_p", "threshold", "relu", "expert_choice", "given"]
ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus", "relu"]
MAX_COLUMNS = 1024
"""Experts plus null experts."""
MAX_SLOTS = 64
"""Most experts of one token."""


class Reason(IntFlag):
    """Why a token was routed otherwise than its mode alone would have; bits of RouterOutput.reasons."""

    NONFINITE = 1  # F0: a logit is NaN or infinite
    EMPTY = 2  # F1: the mode chose nothing
    RAISED = 4  # fewer than min_experts were chosen
    CAPPED = 8  # more than max_experts were chosen
    OVERRIDDEN = 16  # the control mixes in plain top-k: warm start, guard or collapse (F2)
    OVERFLOW = 32  # F3: an expert was full, what it had too many of was spilled or dropped
    FROZEN = 64  # F4: chosen by an earlier router
    OVERLOADED = 128  # F5: the limit is lowered because a rank has too much to do

    @property
    def bit(self) -> int:
        """Place in RouterOutput.reason_counts."""
        return self.value.bit_length() - 1


NUM_REASONS = 8
_MODES = {"top_k": 0, "top_p": 1, "threshold": 2, "relu": 2, "expert_choice": 3, "given": 4}  # csrc/router_args.h
_SCORES = {name: number for number, name in enumerate(get_args(ScoreFunction))}


@dataclass(frozen=True)
class RouteSpec:
    """One rule for all modes: rank the columns by key u = score + bias, descending, lower id first among equals, and take
    the first n; n is what the mode says, held between min_experts and max_experts.

    mode: how n is found. top_k: n = top_k. top_p: the fewest columns whose share of the scores reaches the control value
        (arXiv 2403.07652). threshold: those with u above the control value (arXiv 2603.11535; with quantiles in the bias
        this is dynamic quantile balancing). relu: the same over ReLU scores, whose zero is the threshold (arXiv
        2412.14711). expert_choice: every expert takes its best top_k * T / E tokens (arXiv 2202.09368); it looks at
        later tokens, so it is for training only. given: ids are handed in and only gates and statistics are computed.
    score_function: softmax over all columns, or per column sigmoid, sqrt(softplus) or ReLU of the logit.
    num_null_experts: columns after the experts that cost nothing: choosing one uses up a rank and no expert.
    min_experts, max_experts: bounds of n; max_experts is also the number of slots K.
    num_groups, top_groups: only experts of the `top_groups` best groups take part; a group counts the sum of its best
        top_k / top_groups keys (DeepSeek-V3, arXiv 2412.19437).
    normalize_weights: gates are scores over the sum of the selected experts' scores, else the scores; times scaling_factor.
    skip_nonfinite: a row with a NaN or infinite logit visits no expert (a shared expert serves it); else expert
        row mod E with gate 0.
    """

    num_experts: int
    mode: Mode = "top_k"
    score_function: ScoreFunction = "softmax"
    top_k: int = 2
    num_null_experts: int = 0
    min_experts: int = 1
    max_experts: int = 2
    num_groups: int = 1
    top_groups: int = 1
    normalize_weights: bool = True
    scaling_factor: float = 1.0
    skip_nonfinite: bool = False

    @property
    def num_columns(self) -> int:
        return self.num_experts + self.num_null_experts

    def integers(self, num_segments: int, num_bins: int) -> list[int]:
        """The settings in the order of csrc/router_ops.cpp read_spec."""
        return [self.num_experts, self.max_experts, _MODES[self.mode], _SCORES[self.score_function], self.top_k,
                self.min_experts, self.num_groups, self.top_groups, int(self.normalize_weights),
                int(self.skip_nonfinite), num_segments, num_bins, self.num_columns]

    def problems(self, name: str = "router") -> list[str]:
        """Every contradiction, as sentences that name the value and the way out."""
        found = []
        columns = self.num_columns
        if self.mode not in _MODES:
            found.append(f"{name}.mode is {self.mode!r}; choose one of {', '.join(_MODES)}")
        if self.score_function not in _SCORES:
            found.append(f"{name}.score_function is {self.score_function!r}; choose one of {', '.join(_SCORES)}")
        if self.num_null_experts < 0:
            found.append(f"{name}.num_null_experts is {self.num_null_experts}; it must not be negative")
        if self.num_experts < 1:
            found.append(f"{name}: num_experts is {self.num_experts}; it must be at least 1")
        if not 1 <= columns <= MAX_COLUMNS:
            found.append(f"{name}: {columns} experts (null experts included) must be between 1 and {MAX_COLUMNS}")
        if not 1 <= self.top_k <= columns:
            found.append(f"{name}.top_k is {self.top_k}; it must be between 1 and model.num_experts {columns}"
                         + (" (null experts included)" if self.num_null_experts else ""))
        if not 1 <= self.max_experts <= min(columns, MAX_SLOTS):
            found.append(f"{name}.max_experts is {self.max_experts}; it must be between 1 and {min(columns, MAX_SLOTS)}, "
                         f"the number of experts or the {MAX_SLOTS} slots a token can have")
        elif not 0 <= self.min_experts <= self.max_experts:
            found.append(f"{name}.min_experts is {self.min_experts}; it must be between 0 and max_experts "
                         f"{self.max_experts}")
        if self.mode == "top_k" and self.max_experts < self.top_k:
            found.append(f"{name}.max_experts {self.max_experts} is below top_k {self.top_k}")
        if self.normalize_weights and self.max_experts == 1:
            found.append(f"{name}.normalize_weights with {name}.top_k=1 makes every gate 1, so the router would get no "
                         f"gradient; set {name}.normalize_weights=false")
        if not self.scaling_factor > 0:
            found.append(f"{name}.scaling_factor is {self.scaling_factor}; it must be positive")
        if self.mode == "relu" and self.score_function != "relu":
            found.append(f"{name}.mode relu needs score_function relu, not {self.score_function}")
        if self.mode == "top_p" and self.score_function == "relu":
            found.append(f"{name}.mode top_p needs scores that never are all zero; choose softmax, sigmoid or sqrt_softplus")
        if self.num_groups != 1 or self.top_groups != 1:
            found += self._group_problems(name)
        if self.mode == "expert_choice" and self.num_null_experts:
            found.append(f"{name}.mode expert_choice cannot have null experts: a null expert has no capacity to fill")
        return found

    def _group_problems(self, name: str) -> list[str]:
        if self.mode not in ("top_k", "top_p", "given"):
            return [f"{name}.num_groups belongs to mode top_k or top_p, not {self.mode}"]
        if not 1 <= self.top_groups <= self.num_groups <= 64 or self.num_experts % self.num_groups:
            return [f"{name}.num_groups {self.num_groups} must divide model.num_experts {self.num_experts}, be at most 64, "
                    f"and be at least {name}.top_groups {self.top_groups}"]
        size = self.num_experts // self.num_groups
        if self.top_k > size * self.top_groups or max(1, self.top_k // self.top_groups) > size:
            return [f"{name}.top_k {self.top_k} does not fit {self.top_groups} of {self.num_groups} groups of {size} "
                    "experts"]
        return []
