"""The fused router against its definition (ops/router/reference.py), and the rules of
ops/router/README.md one by one.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch

from ops.router import NUM_REASONS, Reason, RouterOutput, RouteSpec, interface, route
from ops.router.reference import expert_choice_cuts, score
from ops.router.spec import Mode, ScoreFunction
from ops.testing import assert_close, poisoned_memory
from tests.pairwise import cover

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)

MODES, SCORES = get_args(Mode), get_args(ScoreFunction)
OWN_SCORES = dict(
    zip(MODES, ("softmax", "softmax", "sigmoid", "relu", "sigmoid", "softmax"), strict=True)
)
DIFFERENTIABLE = ("weights", "score_sums", "z_sum", "entropy_sum")
PERMUTATION = ("expert_ids", "slots", "inverse", "offsets", "counts")


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(
        dtype
    )


def draw_given_ids(num_tokens: int, num_experts: int, num_slots: int, seed: int) -> torch.Tensor:
    """[T, K] distinct ids, about a third of the slots unused."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :num_slots]
    # null experts may make K exceed E
    ids = torch.nn.functional.pad(ids, (0, num_slots - ids.shape[1]), value=-1)
    return ids.masked_fill(torch.rand(num_tokens, num_slots, generator=generator) < 0.3, -1)


def usual_value(spec: RouteSpec, logits: torch.Tensor) -> float:
    """A value for router_inputs with which tokens get about three columns, some more and some
    fewer; between two scores.
    """
    scores = score(logits.double(), spec.score_function)
    columns = min(3, spec.num_columns)
    if spec.mode == "top_p":
        ranked = scores.sort(dim=1, descending=True).values
        return float(
            ((ranked[:, :columns].sum(1) - ranked[:, columns - 1] / 2) / ranked.sum(1)).mean()
        )
    ranked = torch.nn.functional.pad(scores.flatten().sort(descending=True).values, (0, 1))
    return float(ranked[columns * len(logits) - 1 :][:2].mean())


def draw(
    spec: RouteSpec,
    num_tokens: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_bins: int = 0,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and the other arguments of route: bias, router_inputs, given ids, ids of tokens, and
    with `num_bins` a histogram.
    """
    logits = normal(num_tokens, spec.num_columns, seed=seed, dtype=dtype)
    bias = None if spec.mode == "expert_choice" else 0.05 * normal(spec.num_columns, seed=seed + 1)
    # Keys that differ by a rounding error may rank either way: all logits of such a row become
    # equal, a tie to the bit.
    keys = score(logits.double(), spec.score_function) + (0 if bias is None else bias)
    gaps = -keys.sort(dim=1, descending=True).values[:, : spec.max_experts + 2].diff(dim=1)
    logits[((gaps > 0) & (gaps < 1e-6 * keys.abs().amax(1, keepdim=True))).any(1)] = 0.0
    arguments: dict[str, Any] = {"bias": bias, "token_ids": 1000 + 7 * torch.arange(num_tokens)}
    if spec.mode in ("top_p", "threshold", "relu") and num_tokens:
        arguments["router_inputs"] = torch.tensor(
            [usual_value(spec, logits), 1.0, spec.top_k, spec.max_experts]
        )
    elif spec.mode == "top_p":
        arguments["router_inputs"] = torch.tensor([0.5, 1.0, spec.top_k, spec.max_experts])
    if spec.mode == "given":
        arguments["given_ids"] = draw_given_ids(
            num_tokens, spec.num_experts, spec.max_experts, seed + 2
        )
    if num_bins:
        arguments |= {
            "num_bins": num_bins,
            "histogram_range": torch.tensor([-0.4, 25.0]).repeat(spec.num_experts, 1),
        }
    return logits, arguments


def spec_of(mode: Mode, num_experts: int = 16, **changes: Any) -> RouteSpec:
    return RouteSpec(
        num_experts,
        **{
            "mode": mode,
            "score_function": OWN_SCORES[mode],
            "top_k": 3,
            "max_experts": 6,
            **changes,
        },
    )


def fused(logits: torch.Tensor, spec: RouteSpec, **arguments: Any) -> RouterOutput:
    return route(logits, spec, backend="fused", **arguments)


def reference(logits: torch.Tensor, spec: RouteSpec, **arguments: Any) -> RouterOutput:
    return route(logits, spec, backend="reference", **arguments)


BACKENDS = (fused, reference)
BASE = spec_of("top_k")


def with_gradient(
    call: Callable[..., RouterOutput],
    logits: torch.Tensor,
    spec: RouteSpec,
    rows: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[RouterOutput, torch.Tensor]:
    """The output, and the gradient of a weighted sum of all that has one; `rows`: whose tokens'
    weights are used for the gates, so that a token keeps its own when others leave.
    """
    logits = logits.detach().requires_grad_()
    out = call(logits, spec, **arguments)
    rows = torch.arange(len(logits)) if rows is None else rows
    gates = normal(1000, out.weights.shape[1], seed=5, dtype=out.weights.dtype)[rows]
    sums = [
        normal(*t.shape, seed=6, dtype=t.dtype)
        for t in (out.score_sums, out.z_sum, out.entropy_sum)
    ]
    total = [getattr(out, name) for name in DIFFERENTIABLE]
    return out, torch.autograd.grad(total, logits, [gates, *sums])[0]


def assert_equal(ours: RouterOutput, other: RouterOutput, *names: str) -> None:
    for name in names or RouterOutput._fields:
        assert torch.equal(getattr(ours, name), getattr(other, name)), name


def assert_matches(ours: RouterOutput, expected: RouterOutput, score_function: str) -> None:
    """Integers exactly, floats by assert_close. A score on the edge of a bin may round into the
    next one; ReLU scores, which are not rounded, may not.
    """
    for name, a, b in zip(RouterOutput._fields, ours, expected, strict=True):
        assert a.dtype == b.dtype, name
        if name == "margin":
            # a difference of keys, so as exact as these are: one row's may be near 0
            atol = 4 * torch.finfo(b.dtype).eps * float(b.abs().max().clamp(1))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
        elif a.dtype.is_floating_point:
            assert_close(name, a, b)
        elif name == "histogram" and score_function != "relu":
            assert a.shape == b.shape and int((a - b).cumsum(1).abs().sum()) <= 2, name
        else:
            assert torch.equal(a, b), name


# Fused against the definition


def settings() -> Iterator[tuple[Any, ...]]:
    """Settings so that every two values of two columns meet, unless the router forbids it."""
    columns = (MODES, SCORES, (0, 3), (True, False), (False, True), (1, 8, 33, 64, 128, 256, 1024))
    return cover(case for case in product(*columns) if not build_spec(*case).problems())


def build_spec(
    mode: Mode,
    score_function: ScoreFunction,
    num_null: int,
    normalize: bool,
    groups: bool,
    num_experts: int,
    **changes: Any,
) -> RouteSpec:
    columns = num_experts + num_null
    num_groups = (
        (3 if num_experts == 33 else min(num_experts, 8) // (1 + (num_experts == 8)))
        if groups
        else 1
    )
    return RouteSpec(
        num_experts,
        mode,
        score_function,
        **{
            "top_k": min(4, columns),
            "num_null_experts": num_null,
            "max_experts": min(6, columns),
            "num_groups": num_groups,
            "top_groups": 2 if groups else 1,
            "normalize_weights": normalize,
            "scaling_factor": 1.5,
            **changes,
        },
    )


CASES = list(settings())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n])))
def test_fused_equals_reference(number, dtype, poisoned):
    changes = ({}, {"skip_nonfinite": True}, {"min_experts": 0}, {"min_experts": 2})[number % 4]
    spec = build_spec(*CASES[number])
    spec = replace(spec, **changes) if spec.max_experts > 1 else spec
    for num_tokens in (1, 13, 132) if spec.num_columns <= 140 else (13,):
        logits, arguments = draw(spec, num_tokens, seed=number, dtype=dtype, num_bins=16)
        if num_tokens > 1:
            logits[3] = 0.0  # a tie of all columns
            logits[5, 0], logits[num_tokens - 2, -1] = torch.nan, -torch.inf
            arguments["token_mask"] = normal(num_tokens, seed=number + 3) > -1
        # half the mode, half top-2, no more than four
        if number % 3 == 0 and "router_inputs" in arguments:
            arguments["router_inputs"][1:] = torch.tensor([0.5, 2.0, 4.0])
        if number % 5 == 0 and spec.mode != "expert_choice":
            arguments["bias"] = None
        if number % 7 == 0:
            arguments["token_ids"] = None
        arguments["num_segments"] = {132: 4, 13: 13 if number % 2 else 1, 1: 1}[num_tokens]
        (ours, grad), (expected, grad_expected) = (
            with_gradient(call, logits, spec, **arguments) for call in BACKENDS
        )
        assert_matches(ours, expected, spec.score_function)
        assert_close("grad logits", grad, grad_expected)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("mode", MODES)
def test_fp64_gradient_is_that_of_the_outputs_and_equals_the_reference(
    mode, score_function, normalize
):
    for num_null, num_groups in ((0, 1), (2, 1), (0, 4)):
        spec = spec_of(
            mode,
            8,
            score_function=score_function,
            num_null_experts=num_null,
            num_groups=num_groups,
            top_groups=min(2, num_groups),
            normalize_weights=normalize,
            scaling_factor=1.5,
            max_experts=4,
        )
        if spec.problems():
            continue
        logits, arguments = draw(spec, 6, seed=11, dtype=torch.float64)
        arguments |= {
            "num_segments": 2,
            "token_mask": torch.tensor([True, True, False, True, True, True]),
        }

        def outputs(logits, spec=spec, arguments=arguments):
            out = fused(logits, spec, **arguments)
            return [getattr(out, name) for name in DIFFERENTIABLE]

        assert torch.autograd.gradcheck(
            outputs, logits.clone().requires_grad_(), eps=1e-6, atol=1e-6
        )
        ours, expected = (with_gradient(call, logits, spec, **arguments)[1] for call in BACKENDS)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("call", BACKENDS)
def test_gates_and_sums_have_a_gradient_and_nothing_else_seems_to(call):
    out = call(normal(5, 16, seed=0).requires_grad_(), BASE)
    assert {name for name, t in zip(out._fields, out, strict=True) if t.requires_grad} == set(
        DIFFERENTIABLE
    )


# Selection


@pytest.mark.parametrize("call", BACKENDS)
@pytest.mark.parametrize(
    "mode, score_function",
    [
        *(("top_k", function) for function in SCORES),
        ("top_p", "softmax"),
        ("threshold", "sigmoid"),
        ("relu", "relu"),
    ],
)
def test_equal_logits_select_the_lowest_ids(mode, score_function, call):
    for num_experts in (7, 33, 300):
        spec = spec_of(mode, num_experts, score_function=score_function, top_k=4)
        # 3.5 / E of the mass needs four experts; cuts below the score pass all, of which the first
        # four are kept.
        value = {"top_p": 3.5 / num_experts, "threshold": 1e-3}.get(mode, 0.0)
        for logit in torch.linspace(0.1 if mode == "relu" else -3, 3, 100).tolist():
            out = call(
                torch.full((3, num_experts), logit),
                spec,
                router_inputs=torch.tensor([value, 1.0, 0.0, 4.0]),
            )
            assert out.expert_ids.tolist() == [[0, 1, 2, 3, -1, -1]] * 3, (num_experts, logit)


def test_equal_scores_give_an_expert_its_earliest_tokens():
    spec = spec_of("expert_choice", 4, top_k=2, max_experts=4)
    out = fused(torch.zeros(8, 4), spec)
    # the rest fall back to their best
    assert out.expert_ids.tolist() == [[0, 1, 2, 3]] * 4 + [[0, -1, -1, -1]] * 4


@pytest.mark.parametrize("call", BACKENDS)
@pytest.mark.parametrize("score_function", SCORES)
def test_one_gate_over_itself_is_the_scaling_factor_and_has_no_gradient(score_function, call):
    spec = RouteSpec(16, score_function=score_function, top_k=1, max_experts=1, scaling_factor=2.5)
    assert spec.teaches_nothing and not spec.problems()
    logits = normal(40, 16, seed=3).abs_().requires_grad_()
    routing = call(logits, spec)
    torch.testing.assert_close(routing.weights, torch.full((40, 1), 2.5))
    (routing.weights * normal(40, 1, seed=4)).sum().backward()
    assert logits.grad.abs().max() < 1e-6


def test_experts_are_ordered_by_key_then_id():
    spec = spec_of("top_k", 8, top_k=6)
    logits = torch.tensor(
        [[1.0, 3.0, 2.0, 3.0, 1.0, 2.0, 0.0, 3.0], [0.0, -0.0, 0.0, -0.0, 1.0, 1.0, -1.0, 0.0]]
    )
    assert fused(logits, spec).expert_ids.tolist() == [[1, 3, 7, 2, 5, 0], [4, 5, 0, 1, 2, 3]]
    zeros = fused(
        logits,
        spec_of("top_k", 8, score_function="relu", top_k=6),
        bias=torch.tensor([0.0, -0.0] * 4),
    )
    assert zeros.expert_ids.tolist()[1] == [4, 5, 0, 1, 2, 3]  # -0 is 0


def test_a_bias_changes_the_selection_but_not_the_gates():
    spec = spec_of("top_k", normalize_weights=False)
    logits, _ = draw(spec, 9)
    plain, biased = fused(logits, spec), fused(logits, spec, bias=2.0 * torch.eye(16)[11])
    assert (biased.expert_ids[:, 0] == 11).all() and not torch.equal(
        plain.expert_ids, biased.expert_ids
    )
    scores = logits.softmax(1).gather(1, biased.expert_ids.clamp_min(0).long())
    assert_close("gates", biased.weights, scores * (biased.expert_ids >= 0))
    assert_equal(plain, biased, "score_sums", "z_sum", "entropy_sum", "log_z", "entropy")


@pytest.mark.parametrize("call", BACKENDS)
def test_gates_of_vanishing_scores_are_those_of_their_logits(call):
    """The bias selects experts 2 and 3, whose scores sum to e^-40, e^-60 and nothing: above and
    below 1e-20, and underflown.
    """
    spec = spec_of("top_k", 4, top_k=2, max_experts=2)
    logits = torch.tensor(
        [[0.0, -100.0, -40.0, -44.0], [0.0, -100.0, -60.0, -61.0], [0.0, -100.0, -300.0, -302.0]]
    )
    out, grad = with_gradient(call, logits, spec, bias=torch.tensor([0.0, 0.0, 5.0, 4.0]))
    assert out.expert_ids.tolist() == [[2, 3]] * 3
    gates = torch.tensor([4.0, 1.0, 2.0]).sigmoid()
    assert_close("gates", out.weights, torch.stack((gates, 1 - gates), 1))
    assert (grad[:, 2:].abs() > 1e-3).all() and grad.isfinite().all()


@pytest.mark.parametrize("call", BACKENDS)
@pytest.mark.parametrize(
    ("score_function", "num_null", "level", "slope"),
    [
        ("softmax", 2, -30.0, 1.0),
        ("softmax", 2, -60.0, 1.0),
        ("softmax", 2, -400.0, 1.0),
        ("sigmoid", 0, -60.0, 1.0),
        ("sigmoid", 3, -400.0, 1.0),
        ("sqrt_softplus", 0, -150.0, 0.5),
        ("sqrt_softplus", 2, -800.0, 0.5),
    ],
)
def test_tokens_whose_expert_scores_underflow_stay_in_the_balance_loss(
    call, score_function, num_null, level, slope
):
    """The experts lie far below the null experts, or below the range of the score: their shares and
    gates are still those of their logits, sum to 1 over the experts, and carry their gradient.
    """
    spec = spec_of(
        "top_k", 6, score_function=score_function, top_k=3, max_experts=3, num_null_experts=num_null
    )
    x = normal(40, spec.num_columns, seed=3)
    x[:, :6] += level
    bias = torch.cat((torch.zeros(6), torch.full((num_null,), -9.0)))
    logits = x.clone().requires_grad_()
    out = call(logits, spec, bias=bias, num_segments=40)
    assert_close("sums", out.score_sums.sum(1), torch.ones(40))
    plain = x.double().requires_grad_()
    shares = (slope * plain[:, :6]).softmax(1)
    ids = out.expert_ids.long()
    gates = (slope * plain.gather(1, ids)).softmax(1) * spec.scaling_factor
    assert (ids >= 0).all()
    assert_close("shares", out.score_sums, shares)
    assert_close("gates", out.weights, gates)
    ups = normal(40, 6, seed=4), normal(40, 3, seed=5)
    (grad,) = torch.autograd.grad([out.score_sums, out.weights], logits, list(ups))
    (expected,) = torch.autograd.grad([shares, gates], plain, [u.double() for u in ups])
    assert_close("gradient", grad, expected)


@pytest.mark.parametrize("call", BACKENDS)
def test_the_histogram_over_null_experts_says_who_is_chosen_at_which_bias(call):
    """An expert is chosen where its score lies above its bar by more than minus its bias."""
    spec = spec_of("top_k", 6, top_k=4, max_experts=4, num_null_experts=5)
    logits, bias = normal(400, 11, seed=1), torch.cat((0.05 * normal(6, seed=2), torch.zeros(5)))
    # four bins, the second edge at minus the bias
    ranges = torch.stack((-bias[:6] - 1, torch.full((6,), 2.0)), 1)
    out = call(logits, spec, bias=bias, num_bins=4, histogram_range=ranges)
    assert out.histogram[:, 2:].sum(1).tolist() == out.counts[0].tolist()
    assert (out.histogram.sum(1) == 400).all()
    # no expert at all, or no null expert: the bars are finite keys all the same
    for shift in (-5.0, 5.0):
        moved = bias + torch.cat((torch.full((6,), shift), torch.zeros(5)))
        ranges[:, 0] = -moved[:6] - 1
        out = call(logits, spec, bias=moved, num_bins=4, histogram_range=ranges)
        assert out.histogram[:, 2:].sum(1).tolist() == out.counts[0].tolist()
        assert int(out.counts.sum()) == (0 if shift < 0 else 1600)


def test_top_p_takes_the_fewest_experts_that_reach_the_mass():
    for score_function in ("softmax", "sigmoid", "sqrt_softplus"):
        spec = spec_of("top_p", score_function=score_function, max_experts=16)
        logits, _ = draw(spec, 50)
        for mass in (0.2, 0.5, 0.9):
            out = fused(logits, spec, router_inputs=torch.tensor([mass, 1.0, 0.0, 16.0]))
            scores = score(logits.double(), score_function)
            chosen = (scores / scores.sum(1, keepdim=True)).gather(
                1, out.expert_ids.clamp_min(0).long()
            )
            chosen = chosen * (out.expert_ids >= 0)
            last = chosen.gather(1, (out.expert_ids >= 0).sum(1, keepdim=True) - 1)[:, 0]
            assert (chosen.sum(1) >= mass - 1e-6).all() and (chosen.sum(1) - last < mass).all()


def test_threshold_takes_exactly_the_experts_above_the_cut():
    spec = spec_of("threshold", min_experts=0, max_experts=16)
    logits = (
        torch.logit(torch.tensor([0.5, 0.25, 0.75])).repeat(1, 6)[:, :16]
        + 0.1 * normal(30, 16, seed=0).round()
    )
    bias = 0.5 * normal(16, seed=1)
    # its gates are all the scores
    every = fused(logits, replace(spec, mode="top_k", top_k=16, normalize_weights=False))
    keys = torch.zeros(30, 16).scatter_(1, every.expert_ids.long(), every.weights) + bias
    cut = float(keys[4, 2])  # a key on the cut is not above it
    out = fused(logits, spec, bias=bias, router_inputs=torch.tensor([cut, 1.0, 0.0, 16.0]))
    assert chosen_sets(out) == [set(row.nonzero()[:, 0].tolist()) for row in keys > cut]
    assert 2 not in chosen_sets(out)[4]


@pytest.mark.parametrize("call", BACKENDS)
def test_relu_takes_exactly_the_experts_with_a_positive_logit(call):
    spec = spec_of("relu", min_experts=0, max_experts=16)
    logits, _ = draw(spec, 30)
    logits[2, 3:7] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert chosen_sets(call(logits, spec)) == [
        set(row.nonzero()[:, 0].tolist()) for row in logits > 0
    ]


@pytest.mark.parametrize("num_tokens, top_k", [(48, 2), (13, 3), (1, 1), (5, 16)])
def test_expert_choice_fills_every_expert_to_its_capacity(num_tokens, top_k):
    spec = spec_of("expert_choice", top_k=top_k, min_experts=0, max_experts=16)
    logits, _ = draw(spec, num_tokens)
    logits[:, 3] = (4 * logits[:, 3]).round() / 4  # ties, which go to the earlier token
    out = fused(logits, spec)
    capacity = max(1, round(top_k * num_tokens / 16))
    assert out.counts[0].tolist() == [capacity] * 16
    for expert in range(16):
        best = sorted(range(num_tokens), key=lambda t, e=expert: (-float(logits[t, e]), t))[
            :capacity
        ]
        assert {t for t, chosen in enumerate(chosen_sets(out)) if expert in chosen} == set(best)


@pytest.mark.parametrize("group_keys", [None, 1, 3])
@pytest.mark.parametrize("mode", ["top_k", "top_p"])
def test_a_group_limit_takes_experts_of_the_best_groups_only(mode, group_keys):
    spec = spec_of(mode, 32, top_k=4, num_groups=8, top_groups=2, group_keys=group_keys)
    logits, arguments = draw(spec, 40)
    out = fused(logits, spec, **arguments)
    keys = logits.softmax(1) + arguments["bias"]
    for token, chosen in enumerate(chosen_sets(out)):
        # the best top_k / top_groups = 2
        counted = group_keys or 2
        value = [sum(sorted(group.tolist())[-counted:]) for group in keys[token].view(8, 4)]
        best = sorted(range(8), key=lambda g, value=value: -value[g])[:2]
        assert {expert // 4 for expert in chosen} <= set(best)
    assert not torch.equal(
        out.expert_ids,
        fused(
            logits, replace(spec, num_groups=1, top_groups=1, group_keys=None), **arguments
        ).expert_ids,
    )


def test_more_slots_than_experts_in_the_groups_stay_empty():
    spec = spec_of("top_p", 16, top_k=2, num_groups=8, top_groups=2, max_experts=6)
    out = fused(draw(spec, 20)[0], spec, router_inputs=torch.tensor([1.0, 1.0, 0.0, 6.0]))
    assert (out.expert_ids[:, :4] >= 0).all() and (out.expert_ids[:, 4:] == -1).all()
    assert (out.margin == 0).all()  # nothing is left to compare with


def test_null_experts_use_up_ranks_leave_no_slot_and_are_counted():
    spec = spec_of("top_k", 6, top_k=4, num_null_experts=3, max_experts=4)
    logits, _ = draw(spec, 40)
    out = fused(logits, spec)
    ranked = logits.softmax(1).sort(dim=1, descending=True, stable=True).indices[:, :4].tolist()
    real = [[i for i in row if i < 6] for row in ranked]
    assert out.expert_ids.tolist() == [row + [-1] * (4 - len(row)) for row in real]
    assert int(out.null_count) == sum(4 - len(row) for row in real) > 0
    assert out.k_histogram.tolist() == [sum(len(row) == n for row in real) for n in range(5)]
    assert_close(
        "sums of gates", out.weights.sum(1), torch.tensor([float(bool(row)) for row in real])
    )


@pytest.mark.parametrize("mode", ["top_p", "threshold", "relu"])
def test_control_share_goes_from_plain_top_k_to_the_mode(mode):
    spec = spec_of(mode, min_experts=0)
    logits, arguments = draw(spec, 60)
    value = float(arguments.pop("router_inputs")[0])

    def choose(share: float, top_k: int) -> RouterOutput:
        return fused(
            logits, spec, router_inputs=torch.tensor([value, share, top_k, 6.0]), **arguments
        )

    alone = fused(logits, spec, router_inputs=torch.tensor([value, 1.0, 0.0, 6.0]), **arguments)
    by_mode = (alone.expert_ids >= 0).sum(1)
    assert by_mode.unique().numel() > 2
    assert_equal(choose(1.0, 5), alone)
    for top_k in (1, 4, 6):
        plain = fused(logits, replace(spec, mode="top_k", top_k=top_k), **arguments)
        warm = choose(0.0, top_k)
        assert_equal(warm, plain, "weights", *PERMUTATION, "margin", "k_histogram", "checksum")
        assert ((warm.reasons & Reason.OVERRIDDEN) > 0).all() and int(warm.reason_counts[4]) == 60
        for share in (0.25, 0.5, 0.75):
            between = choose(share, top_k)
            expected = ((1 - share) * top_k + share * by_mode + 0.5).floor().long()
            assert torch.equal((between.expert_ids >= 0).sum(1), expected)
            assert torch.equal((between.reasons & Reason.EMPTY) > 0, expected == 0)


class Row(NamedTuple):
    """What the README makes of one row of keys: chosen columns in rank order, reasons, margin, and
    the alpha of the histogram (None: the row is not in it).
    """

    columns: list[int]
    reasons: int
    margin: float
    alpha: float | None


def by_hand(
    spec: RouteSpec, scores: list[float], bias: list[float], router_inputs: list[float]
) -> Row:
    """README.md, Selection, in plain Python over fp32 numbers."""
    f = np.float32
    value, share, plain_k, limit = (f(v) for v in router_inputs)
    keys = [f(s) + f(b) for s, b in zip(scores, bias, strict=True)]
    keys = [u if math.isfinite(u) else f(-3e38) for u in keys]
    left = list(range(len(keys)))
    if spec.top_groups < spec.num_groups:
        size = spec.num_experts // spec.num_groups
        best = spec.group_keys or max(1, spec.top_k // spec.top_groups)
        sums = []
        for g in range(spec.num_groups):
            total = f(0)
            for u in sorted(keys[g * size : (g + 1) * size], reverse=True)[:best]:
                total = total + u
            sums.append(total)
        kept = sorted(range(spec.num_groups), key=lambda g: (-sums[g], g))[: spec.top_groups]
        left = [c for c in left if c >= spec.num_experts or c // size in kept]
    ranked = sorted(left, key=lambda c: (-keys[c], c))

    def whole(x: np.float32) -> int:
        return min(int(x), spec.max_experts) if x >= 0 else 0

    most = min(spec.max_experts, len(left))
    limit_now = min(whole(limit), most)
    if spec.mode == "top_k":
        asked = spec.top_k
    elif spec.mode == "top_p":
        asked, mass = 0, f(0)
        total = f(1) if spec.score_function == "softmax" else sum((f(s) for s in scores), f(0))
        while asked < len(left) and mass < value * total:
            mass, asked = mass + f(scores[ranked[asked]]), asked + 1
    else:
        asked = sum(u > value for u in keys)
    reasons, n = 0, min(asked, most)
    if share < 1:
        asked = n = math.floor((f(1) - share) * f(whole(plain_k)) + share * f(n) + f(0.5))
        reasons |= Reason.OVERRIDDEN
    reasons |= Reason.EMPTY if n == 0 else 0
    reasons |= Reason.RAISED if 0 < n < spec.min_experts else 0
    reasons |= Reason.CAPPED if asked > limit_now else 0
    n = min(max(n, spec.min_experts), limit_now)
    rest = [keys[c] for c in ranked[n:]]
    margin = keys[ranked[n - 1]] - rest[0] if n and rest else f(0)
    alpha: float | None = 0.0
    if spec.mode in ("top_k", "top_p"):
        alpha = float(rest[0]) if rest else None
    return Row(ranked[:n], reasons, float(margin), alpha)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_selection_reasons_margin_and_alpha_are_what_the_readme_says_by_hand(backend):
    nan, inf, rng = math.nan, math.inf, np.random.default_rng(0)
    for number in range(1500):
        mode = ("top_k", "top_p", "threshold")[number % 3]
        groups = 4 if mode != "threshold" and rng.random() < 0.5 else 1
        nulls = 2 if rng.random() < 0.2 else 0
        top_k = int(rng.integers(1, 5))
        slots = int(rng.integers(top_k if mode == "top_k" else 1, 9))
        spec = RouteSpec(
            8,
            mode,
            ("softmax", "sigmoid")[number % 2],
            top_k,
            nulls,
            int(rng.integers(0, min(3, slots + 1))),
            slots,
            groups,
            2 if groups > 1 else 1,
            (None, 1, 2)[number // 6 % 3] if groups > 1 else None,
            normalize_weights=False,
        )
        logits = torch.from_numpy(rng.normal(size=(3, spec.num_columns)).astype(np.float32))
        bias = rng.choice([0.0, 0.0, 0.1, nan, inf, -inf, -3e38], spec.num_columns).astype(
            np.float32
        )
        router_inputs = [
            float(rng.choice([0.3, 0.6, 0.0, 1.5, nan])),
            float(rng.choice([1.0, 1.0, 0.0, 0.1, 0.5, nan, 2.0])),
            float(rng.choice([0.0, 1.0, 2.9, 3.0, 100.0, -1.0, nan])),
            float(rng.choice([8.0, 8.0, 100.0, 2.9, 1.0, 0.0, -1.0, nan])),
        ]
        # the histogram of one bin per half a unit around each row's alpha
        found = route(
            logits,
            spec,
            bias=torch.from_numpy(bias),
            router_inputs=torch.tensor(router_inputs),
            backend=backend,
            num_bins=2,
            histogram_range=torch.tensor([-1.0, 1.0]).repeat(8, 1),
        )
        scores = score(logits, spec.score_function)
        in_histogram = 0
        for i, row in enumerate(scores.tolist()):
            expected = by_hand(spec, row, bias.tolist(), router_inputs)
            experts = [c for c in expected.columns if c < 8]
            assert [e for e in found.expert_ids[i].tolist() if e >= 0] == experts, (
                number,
                spec,
                router_inputs,
                bias,
            )
            assert int(found.reasons[i]) == expected.reasons, (number, spec, router_inputs, bias)
            assert float(found.margin[i]) == pytest.approx(expected.margin, abs=1e-6), (
                number,
                spec,
                router_inputs,
                bias,
            )
            over_nulls = mode == "top_k" and nulls > 0 and router_inputs[1] >= 1
            in_histogram += expected.alpha is not None and (
                len(expected.columns) > 0 or not over_nulls
            )
        assert int(found.histogram.sum()) == 8 * in_histogram, (number, spec, router_inputs, bias)


@pytest.mark.parametrize(
    ("share", "plain_k", "chosen"), [(0.1, 3.0, 8), (0.3, 2.0, 7), (0.7, 8.0, 3), (0.05, 1.0, 8)]
)
def test_a_blend_is_rounded_in_fp32_by_every_backend(share, plain_k, chosen):
    """0.9 * 3 + 0.1 * 8 + 0.5 is 4 on paper and below 4 in fp32."""
    spec = RouteSpec(8, "threshold", "sigmoid", 2, 0, 0, 8, normalize_weights=False)
    logits = torch.where(torch.arange(8) < chosen, 4.0, -4.0).unsqueeze(0)
    router_inputs = torch.tensor([0.5, share, plain_k, 8.0])
    f = np.float32
    expected = math.floor((f(1) - f(share)) * f(plain_k) + f(share) * f(chosen) + f(0.5))
    for backend in ("fused", "reference"):
        assert (
            int(
                (
                    route(logits, spec, router_inputs=router_inputs, backend=backend).expert_ids
                    >= 0
                ).sum()
            )
            == expected
        )


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "taken"),
    [(10, 1, 4, 2), (14, 1, 4, 4), (6, 1, 4, 2), (2, 1, 4, 1), (1, 1, 8, 1), (3, 2, 4, 2)],
)
def test_an_expert_takes_the_nearest_number_of_tokens_half_to_even_and_at_least_one(
    tokens, top_k, num_experts, taken
):
    logits = normal(tokens, num_experts, seed=3)
    spec = RouteSpec(
        num_experts, "expert_choice", "softmax", top_k, 0, 0, num_experts, normalize_weights=False
    )
    for backend in ("fused", "reference"):
        assert route(logits, spec, backend=backend).counts.sum(0).tolist() == [taken] * num_experts


def test_a_capacity_beyond_the_whole_numbers_of_fp32_is_exact():
    """2^24 + 1 live tokens: not the neighbour that fp32 can hold."""
    live = torch.ones(2**24 + 1, dtype=torch.bool)
    scores = torch.arange(2**24 + 1, dtype=torch.float32).view(-1, 1).flip(0)
    cuts, _ = expert_choice_cuts(scores, live, 1)
    assert float(cuts[0]) == float(scores[-1])


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_shares_are_over_the_sum_of_scores_or_those_of_their_tail(backend):
    """Experts whose scores sum to less than 1e-20 count as much as any in the balance: by their
    logits.
    """
    spec = RouteSpec(2, "top_k", "sigmoid", 2, 0, 1, 2)
    for logit in (-20.0, -44.0, -46.0, -60.0, -300.0):
        logits = torch.tensor([[logit, logit - 1]])
        scores = logits.double().sigmoid()
        expected = scores / scores.sum() if scores.sum() > 1e-20 else logits.double().softmax(-1)
        torch.testing.assert_close(
            route(logits, spec, backend=backend).score_sums.double(), expected, rtol=1e-5, atol=0
        )


def test_a_control_limit_lowers_the_cap():
    for mode in MODES[:5]:
        spec = spec_of(mode)
        logits, arguments = draw(spec, 40)
        router_inputs = arguments.pop("router_inputs", torch.tensor([0.0, 1.0, 0.0, 6.0]))
        free = fused(logits, spec, router_inputs=router_inputs, **arguments)
        router_inputs[3] = 2
        capped = fused(logits, spec, router_inputs=router_inputs, **arguments)
        assert (
            torch.equal(capped.expert_ids[:, :2], free.expert_ids[:, :2])
            and (capped.expert_ids[:, 2:] == -1).all()
        )
        assert torch.equal(
            (capped.reasons & Reason.CAPPED) > 0, (free.expert_ids >= 0).sum(1) > 2
        ), mode
        assert int(capped.reason_counts[3]) > 0


@pytest.mark.parametrize("call", BACKENDS)
def test_a_limit_above_the_slots_is_the_slots(call):
    spec = spec_of("threshold", max_experts=3)
    logits, arguments = draw(spec, 40)
    expected = call(logits, spec, **arguments)
    assert int(expected.reason_counts[3]) > 0
    arguments["router_inputs"] = (
        arguments["router_inputs"].clone().index_fill(0, torch.tensor(3), 100.0)
    )
    assert_equal(call(logits, spec, **arguments), expected)


CONTROL_OF_NONSENSE = """
import torch
from ops.router import RouteSpec, route
logits = torch.randn(40, 16)
for mode in ("top_k", "top_p", "threshold"):
    spec = RouteSpec(16, mode, max_experts=6)
    for place in range(4):
        for value in (float("nan"), float("inf"), -float("inf"), -1.0, -1e9, 1e9):
            inputs = torch.tensor([0.5, 0.5, 2.0, 4.0]).index_fill(0, torch.tensor(place), value)
            ids = route(logits, spec, router_inputs=inputs, backend="fused").expert_ids
            assert int(ids.min()) >= -1 and int(ids.max()) < 16, (mode, place, value)
"""


def test_a_control_of_nonsense_reads_no_foreign_memory():
    """router_inputs comes from a controller on the device, which nothing can check on the way; in a
    process of its own.
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CONTROL_OF_NONSENSE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"


@pytest.mark.parametrize("call", BACKENDS)
def test_experts_far_below_the_best_keep_their_order(call):
    """exp(-90) and exp(-95) are fp32 numbers, if subnormal ones."""
    spec = spec_of("top_k", 4, max_experts=4)
    assert call(torch.tensor([[-5.0, 0.0, 90.0, -2.0]]), spec).expert_ids.tolist() == [
        [2, 1, 3, -1]
    ]


# Tokens of several budgets


def several_budgets(spec: RouteSpec, num_tokens: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and tables of three budgets: as drawn, plain top-k with other biases, a limit of 2."""
    logits, drawn = draw(spec, num_tokens)
    value = usual_value(spec, logits)
    inputs = [[value, 1.0, 2.0, 6.0], [value, 0.0, 1.0, 6.0], [value * 0.7, 1.0, 2.0, 2.0]]
    table = torch.stack([drawn["bias"], -2 * drawn["bias"], drawn["bias"] + 0.02])
    rows = torch.arange(num_tokens, dtype=torch.int32) * 7 % 3
    return logits, {
        "bias_table": table,
        "router_inputs": torch.tensor(inputs),
        "row_of": rows,
        "token_mask": torch.arange(num_tokens) % 11 != 4,
    }


@pytest.mark.parametrize("changes", [{}, {"num_null_experts": 3}], ids=["plain", "nulls"])
@pytest.mark.parametrize("mode", ["top_k", "top_p", "threshold", "relu"])
def test_tokens_of_several_budgets_are_routed_as_each_budget_alone(mode, changes, poisoned):
    """To the bit, and the same by the definition: no token sees what its neighbours spend."""
    spec = spec_of(mode, **changes)
    logits, tables = several_budgets(spec, 50)
    per_token = ("weights", "expert_ids", "log_z", "margin", "entropy", "reasons")
    for call in BACKENDS:
        mixed = call(logits, spec, **tables)
        for row in range(3):
            alone = call(
                logits,
                spec,
                bias=tables["bias_table"][row],
                router_inputs=tables["router_inputs"][row],
                token_mask=tables["token_mask"],
            )
            of_row = tables["row_of"] == row
            for name in per_token:
                ours, expected = getattr(mixed, name)[of_row], getattr(alone, name)[of_row]
                assert torch.equal(ours, expected), (call.__name__, row, name)
    ours, expected = fused(logits, spec, **tables), reference(logits, spec, **tables)
    for name in PERMUTATION:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    spent = [(ours.expert_ids >= 0).sum(1)[tables["row_of"] == r].float().mean() for r in range(3)]
    assert len(set(spent)) == 3, spent


@pytest.mark.parametrize("call", BACKENDS)
def test_one_table_of_budgets_is_enough(call):
    logits, tables = several_budgets(BASE, 20)
    of_biases = call(logits, BASE, bias_table=tables["bias_table"], row_of=tables["row_of"])
    same = call(logits, BASE, bias=tables["bias_table"][1]).expert_ids
    of_row = tables["row_of"] == 1
    assert torch.equal(of_biases.expert_ids[of_row], same[of_row])
    limited = call(logits, BASE, router_inputs=tables["router_inputs"], row_of=tables["row_of"])
    most = [(limited.expert_ids >= 0).sum(1)[tables["row_of"] == r].max().item() for r in range(3)]
    assert most == [3, 1, 2]


def test_tables_of_budgets_that_do_not_fit_are_refused():
    logits, tables = several_budgets(BASE, 20)
    rows, table, inputs = tables["row_of"], tables["bias_table"], tables["router_inputs"]
    for told, given in {
        "bias_table needs row_of": {"bias_table": table},
        "give one of them": {"row_of": rows},
        "give no bias": {"row_of": rows, "bias_table": table, "bias": table[0]},
        r"router_inputs is \(4,\)": {
            "row_of": rows,
            "bias_table": table,
            "router_inputs": inputs[0],
        },
        r"row_of is \(20,\) torch.int64": {"row_of": rows.long(), "bias_table": table},
        "row_of spans 0..3; expected 0..2": {
            "row_of": rows.masked_fill(rows == 2, 3),
            "bias_table": table,
        },
        "histograms move the controllers": {
            "row_of": rows,
            "bias_table": table,
            "num_bins": 4,
            "histogram_range": torch.ones(16, 2),
        },
    }.items():
        with pytest.raises(ValueError, match=told):
            route(logits, BASE, **given)
    with pytest.raises(ValueError, match="takes no row_of"):
        route(logits, spec_of("expert_choice"), row_of=rows, router_inputs=inputs)


# Reasons


def chosen_sets(out: RouterOutput) -> list[set[int]]:
    return [set(row) - {-1} for row in out.expert_ids.tolist()]


def without_row(arguments: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    return {
        name: value[keep] if name in ("token_ids", "given_ids", "token_mask") else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite_gets_one_expert_without_weight_and_disturbs_no_other(mode, bad):
    num_tokens, row, keep = 25, 20, torch.arange(25) != 20
    for skip in (False, True):
        spec = spec_of(mode, skip_nonfinite=skip)
        logits, arguments = draw(spec, num_tokens)
        logits[row, 7] = bad
        out, grad = with_gradient(fused, logits, spec, **arguments)
        assert out.expert_ids[row].tolist() == ([-1] * 6 if skip else [row % 16] + [-1] * 5)
        assert not out.weights[row].any() and not grad[row].any()
        assert int(out.reasons[row]) == Reason.NONFINITE
        assert int(out.reason_counts[0]) == 1 and int(out.k_histogram[0 if skip else 1]) >= 1
        assert float(out.log_z[row]) == float(out.margin[row]) == float(out.entropy[row]) == 0
        rest, rest_grad = with_gradient(
            fused, logits[keep], spec, keep.nonzero()[:, 0], **without_row(arguments, keep)
        )
        for name in ("weights", "expert_ids", "log_z", "margin", "entropy", "reasons"):
            assert torch.equal(getattr(out, name)[keep], getattr(rest, name)), name
        assert torch.equal(grad[keep], rest_grad)
        extra = torch.zeros(16, dtype=torch.int64).index_fill(
            0, torch.tensor(row % 16), int(not skip)
        )
        assert torch.equal(out.counts, rest.counts + extra)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite_changes_no_sum(mode):
    spec = spec_of(mode, skip_nonfinite=True)
    logits, arguments = draw(spec, 25, num_bins=8)
    logits[4] = torch.nan
    bad = fused(logits, spec, **arguments)
    masked = fused(logits, spec, **arguments, token_mask=torch.arange(25) != 4)
    assert_equal(bad, masked, *DIFFERENTIABLE, *PERMUTATION, "histogram", "null_count", "checksum")
    # the row counts as one without experts
    assert int(bad.k_histogram[0] - masked.k_histogram[0]) == 1


@pytest.mark.parametrize("mode", MODES)
def test_masked_rows_visit_nothing_and_count_nowhere(mode):
    spec = spec_of(mode)
    logits, arguments = draw(spec, 40, num_bins=8)
    mask = normal(40, seed=7) > 0
    dirty = logits.clone()
    dirty[~mask] = torch.tensor([torch.nan, 1e30, -torch.inf, 3.0]).repeat(4)
    out, grad = with_gradient(fused, logits, spec, **arguments, token_mask=mask)
    assert (
        (out.expert_ids[~mask] == -1).all()
        and not out.weights[~mask].any()
        and not grad[~mask].any()
    )
    for name in ("log_z", "margin", "entropy", "reasons"):
        assert not getattr(out, name)[~mask].any(), name
    assert int(out.k_histogram.sum()) == int(mask.sum())
    again, grad_again = with_gradient(fused, dirty, spec, **arguments, token_mask=mask)
    assert_equal(out, again)
    assert torch.equal(grad, grad_again)
    rest, rest_grad = with_gradient(
        fused, logits[mask], spec, mask.nonzero()[:, 0], **without_row(arguments, mask)
    )
    assert torch.equal(grad[mask], rest_grad)
    assert_equal(
        out,
        rest,
        "counts",
        "offsets",
        "histogram",
        "k_histogram",
        "reason_counts",
        "null_count",
        "checksum",
    )
    for name in ("score_sums", "z_sum", "entropy_sum"):
        assert_close(name, getattr(out, name), getattr(rest, name))


NOTHING = {"top_p": 0.0, "threshold": 2.0, "relu": 50.0}


@pytest.mark.parametrize("mode", NOTHING)
def test_a_mode_that_chooses_nothing_falls_back_to_the_best_expert_or_to_none(mode):
    for min_experts in (1, 0):
        spec = spec_of(mode, min_experts=min_experts)
        logits, arguments = draw(spec, 12)
        out = fused(
            logits,
            spec,
            **{**arguments, "router_inputs": torch.tensor([NOTHING[mode], 1.0, 0.0, 6.0])},
        )
        keys = score(logits, spec.score_function) + arguments["bias"]
        assert out.expert_ids[:, 0].tolist() == (
            keys.argmax(1).tolist() if min_experts else [-1] * 12
        )
        assert (out.expert_ids[:, 1:] == -1).all() and int(out.k_histogram[min_experts]) == 12
        assert out.reasons.tolist() == [Reason.EMPTY] * 12 and out.reason_counts.tolist() == [
            0,
            12,
            0,
            0,
            0,
            0,
            0,
            0,
        ]
        assert out.counts.sum() == 12 * min_experts
        weights = (
            1.0 * (keys.amax(1) > 0)
            if mode != "relu"
            else 1.0 * (score(logits, "relu").gather(1, keys.argmax(1, keepdim=True))[:, 0] > 0)
        )
        assert_close("gates", out.weights[:, 0], weights * min_experts)


def test_a_token_no_expert_chose_falls_back_to_its_best_expert_or_to_none():
    logits = torch.zeros(8, 4)
    logits[:4] += 1.0
    for min_experts in (1, 0):
        out = fused(
            logits, spec_of("expert_choice", 4, top_k=1, min_experts=min_experts, max_experts=4)
        )
        assert out.reasons.tolist() == [0] * 2 + [Reason.EMPTY] * 6
        assert out.k_histogram.tolist() == ([0, 6, 0, 0, 2] if min_experts else [6, 0, 0, 0, 2])


def test_too_few_are_raised_and_too_many_are_capped():
    spec = spec_of("relu", min_experts=3, max_experts=5)
    # token t has t positive logits, of experts 0..t-1
    logits = torch.arange(17.0).unsqueeze(1) - torch.arange(16.0) - 0.5
    out = fused(logits, spec)
    assert (out.expert_ids >= 0).sum(1).tolist() == [min(max(n, 3), 5) for n in range(17)]
    assert (
        out.reasons.tolist()
        == [Reason.EMPTY] + [Reason.RAISED] * 2 + [0] * 3 + [Reason.CAPPED] * 11
    )
    assert (
        out.reason_counts.tolist() == [0, 1, 2, 11, 0, 0, 0, 0]
        and len(out.reason_counts) == NUM_REASONS
    )
    assert out.k_histogram.tolist() == [0, 0, 0, 4, 1, 12]


# Statistics and the permutation


@pytest.mark.parametrize("source", MODES[:5])
def test_given_ids_reproduce_the_routing_they_came_from(source):
    for normalize, num_null in ((True, 0), (False, 0), (True, 2)):
        spec = spec_of(
            source, num_null_experts=num_null, normalize_weights=normalize, scaling_factor=2.5
        )
        if spec.problems():
            continue
        logits, arguments = draw(spec, 50)
        logits[9, 2] = torch.nan
        arguments |= {"token_mask": normal(50, seed=7) > -1, "num_segments": 5}
        first, grad = with_gradient(fused, logits, spec, **arguments)
        given = {name: arguments[name] for name in ("token_mask", "num_segments", "token_ids")}
        again, grad_again = with_gradient(
            fused, logits, replace(spec, mode="given"), **given, given_ids=first.expert_ids
        )
        assert_equal(
            again,
            first,
            *DIFFERENTIABLE,
            *PERMUTATION,
            "log_z",
            "entropy",
            "k_histogram",
            "checksum",
        )
        assert torch.equal(grad, grad_again)
        assert torch.equal(again.reasons, first.reasons & Reason.NONFINITE)


@pytest.mark.parametrize("num_tokens, num_experts", [(0, 8), (1, 1), (13, 5), (257, 33), (700, 64)])
def test_slots_are_sorted_by_expert_then_token_then_slot_and_inverse_undoes_them(
    num_tokens, num_experts, poisoned
):
    num_slots = min(6, num_experts)
    spec = spec_of("given", num_experts, top_k=1, max_experts=num_slots, normalize_weights=False)
    ids = draw_given_ids(num_tokens, num_experts, num_slots, seed=3)
    out = fused(normal(num_tokens, num_experts, seed=4), spec, given_ids=ids)
    assert torch.equal(out.expert_ids, ids.int())
    flat = ids.flatten().tolist()
    expected = sorted((i for i, e in enumerate(flat) if e >= 0), key=lambda i: (flat[i], i))
    assert out.slots.tolist() == expected + [-1] * (len(flat) - len(expected))
    counts = [flat.count(expert) for expert in range(num_experts)]
    assert out.offsets.tolist() == [sum(counts[:expert]) for expert in range(num_experts + 1)]
    assert out.counts.tolist() == [counts]
    inverse = out.inverse.flatten().tolist()
    assert all(
        out.slots[row] == i if e >= 0 else row == -1
        for i, (e, row) in enumerate(zip(flat, inverse, strict=True))
    )


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_segments_add_up_to_the_whole(mode):
    spec = spec_of(mode)
    logits, arguments = draw(spec, 120)
    whole = fused(logits, spec, **arguments)
    for num_segments in (2, 8, 120):
        parts = fused(logits, spec, **arguments, num_segments=num_segments)
        assert parts.counts.shape == parts.score_sums.shape == (num_segments, 16)
        assert torch.equal(parts.counts.sum(0, keepdim=True), whole.counts)
        assert_close("score sums", parts.score_sums.sum(0, keepdim=True), whole.score_sums)
        assert_equal(
            parts,
            whole,
            "weights",
            "expert_ids",
            "slots",
            "inverse",
            "offsets",
            "k_histogram",
            "checksum",
        )
        segment = replace(spec, mode="given")
        length = 120 // num_segments
        alone = fused(logits[:length], segment, given_ids=whole.expert_ids[:length])
        assert torch.equal(alone.counts[0], parts.counts[0]) and torch.equal(
            alone.score_sums[0], parts.score_sums[0]
        )


@pytest.mark.parametrize("score_function", SCORES)
def test_balance_sums_are_of_shares_of_the_experts(score_function):
    spec = spec_of("top_k", 8, score_function=score_function, num_null_experts=2)
    logits, arguments = draw(spec, 30)
    scores = score(logits.double(), score_function)[:, :8]
    shares = scores if score_function == "relu" else scores / scores.sum(1, keepdim=True)
    out = fused(logits, spec, **arguments)
    assert_close("score sums", out.score_sums[0], shares.sum(0))
    q = logits.double().softmax(1)
    assert_close("log z", out.log_z, logits.double().logsumexp(1))
    assert_close("entropy", out.entropy, -(q * q.log()).sum(1))
    assert_close("z sum", out.z_sum, logits.double().logsumexp(1).square().sum())
    assert_close("entropy sum", out.entropy_sum, -(q * q.log()).sum())


def test_checksum_ignores_the_order_of_tokens_and_sees_one_changed_expert():
    spec = spec_of("given", max_experts=3)
    logits, arguments = draw(spec, 64)
    ids, token_ids = arguments["given_ids"], arguments["token_ids"]

    def checksum(logits, given_ids, token_ids) -> int:
        return int(fused(logits, spec, given_ids=given_ids, token_ids=token_ids).checksum)

    expected = checksum(logits, ids, token_ids)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert checksum(logits[order], ids[order], token_ids[order]) == expected
    # nor does the order of slots matter
    assert checksum(logits, ids.flip(1), token_ids) == expected
    changed = ids.clone()
    changed[17] = (
        torch.tensor([-1, 9, 4])
        if set(ids[17].tolist()) != {-1, 9, 4}
        else torch.tensor([-1, 9, 5])
    )
    assert checksum(logits, changed, token_ids) != expected
    assert checksum(logits, ids, token_ids + 1) != expected
    swapped = token_ids.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksum(logits, ids, swapped) != expected
    # no names, no checksum
    assert int(fused(logits, spec, given_ids=ids).checksum) == 0


def test_histogram_holds_score_minus_alpha_in_half_open_bins():
    """ReLU scores in quarters, so that every edge is exact; of them, logits are counted, also those
    below zero.
    """
    spec = spec_of("top_k", 4, score_function="relu", top_k=2, max_experts=2)
    logits = torch.tensor(
        [[3.0, 2.0, 1.0, 0.25], [0.5, 2.5, 1.75, 4.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 7.0, 2.0, 0.0]]
    )
    histogram_range = torch.tensor([[-1.0, 2.0], [0.0, 1.0], [-0.5, 4.0], [1.0, 0.5]])
    out = fused(logits, spec, num_bins=4, histogram_range=histogram_range)
    # the key of the first not selected
    alpha = logits.relu().sort(1, descending=True).values[:, 2]
    expected = torch.zeros(4, 4, dtype=torch.int32)
    for token, expert in product(range(4), range(4)):
        lowest, per_unit = histogram_range[expert].tolist()
        edges = [lowest + b / per_unit for b in range(1, 4)]
        expected[
            expert, sum(float(logits[token, expert] - alpha[token]) >= edge for edge in edges)
        ] += 1
    assert torch.equal(out.histogram, expected) and (out.histogram.sum(1) == 4).all()


def test_histogram_quantile_is_within_one_bin_of_the_exact_one():
    spec = spec_of("threshold", 8, top_k=2)
    logits, arguments = draw(spec, 2000)
    out = fused(
        logits,
        spec,
        **arguments,
        num_bins=100,
        histogram_range=torch.tensor([0.0, 100.0]).repeat(8, 1),
    )
    for quantile in (0.25, 0.5, 0.75, 0.9):
        exact = torch.quantile(logits.sigmoid(), quantile, dim=0)
        # the first bin up to which this share lies
        bins = (out.histogram.cumsum(1) < quantile * 2000).sum(1)
        assert ((bins + 0.5) / 100 - exact).abs().max() <= 0.01


def test_margin_is_the_distance_of_the_last_chosen_to_the_first_not_chosen():
    spec = spec_of("top_k")
    logits, arguments = draw(spec, 20)
    ranked = (logits.softmax(1) + arguments["bias"]).sort(1, descending=True).values
    assert_close("margin", fused(logits, spec, **arguments).margin, ranked[:, 2] - ranked[:, 3])
    everything = fused(logits, replace(spec, top_k=16, max_experts=16), **arguments)
    assert not everything.margin.any()


# Reproducibility


@pytest.mark.parametrize("mode", MODES)
def test_repeats_are_bit_identical_on_any_number_of_threads(mode):
    spec = spec_of(mode, 64)
    logits, arguments = draw(spec, 4096, num_bins=32)
    arguments["num_segments"] = 2
    threads = torch.get_num_threads()
    try:
        runs = []
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            logits = logits.detach().requires_grad_()
            out = fused(logits, spec, **arguments)
            runs.append(
                (out, torch.autograd.grad(out.weights.square().sum() + out.z_sum, logits)[0])
            )
    finally:
        torch.set_num_threads(threads)
    for out, grad in runs[1:]:
        assert_equal(out, runs[0][0])
        assert torch.equal(grad, runs[0][1])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "expert_choice"])
def test_a_token_gets_the_same_bits_whatever_else_is_in_the_batch(mode):
    for num_experts in (16, 300):
        spec = spec_of(mode, num_experts)
        logits, arguments = draw(spec, 70)
        part = torch.tensor([69, 3, 31, 40])
        whole, grad = with_gradient(fused, logits, spec, **arguments)
        alone, grad_alone = with_gradient(
            fused, logits[part], spec, part, **without_row(arguments, part)
        )
        for name in ("weights", "expert_ids", "log_z", "margin", "entropy", "reasons"):
            assert torch.equal(getattr(whole, name)[part], getattr(alone, name)), name
        assert torch.equal(grad[part], grad_alone)


def test_all_experts_fit_as_in_the_dense_stage_of_relu_routing():
    for num_experts in (1, 33, 64):
        spec = spec_of(
            "relu",
            num_experts,
            top_k=1,
            max_experts=num_experts,
            min_experts=num_experts,
            normalize_weights=False,
        )
        logits, arguments = draw(spec, 40)
        out, grad = with_gradient(fused, logits, spec, **arguments)
        expected, grad_expected = with_gradient(reference, logits, spec, **arguments)
        assert_matches(out, expected, "relu")
        assert_close("grad logits", grad, grad_expected)
        assert out.counts.tolist() == [[40] * num_experts] and (out.slots >= 0).all()


@pytest.mark.parametrize("call", BACKENDS)
@pytest.mark.parametrize(
    "mode, groups", [*((mode, 1) for mode in MODES), ("top_k", 4), ("given", 4)]
)
def test_no_tokens_give_zeros_of_the_right_shapes(mode, groups, call, poisoned):
    spec = spec_of(mode, num_groups=groups, top_groups=min(groups, 2))
    logits, arguments = draw(spec, 0, num_bins=8)
    out, grad = with_gradient(call, logits, spec, **arguments, num_segments=4)
    shapes = [
        (0, 6),
        (0, 6),
        (4, 16),
        (4, 16),
        (),
        (),
        (0,),
        (0,),
        (0,),
        (0,),
        (0,),
        (0, 6),
        (17,),
        (16, 8),
        (7,),
        (8,),
        (),
        (),
        (2,),
    ]
    assert [tuple(t.shape) for t in out] == shapes and grad.shape == (0, 16)
    assert not any(t.any() for t in out)


# Extremes


@pytest.mark.parametrize("call", BACKENDS)
def test_an_expert_masked_by_the_lowest_float_adds_no_entropy_and_gets_no_gradient(call):
    """-3.4e38, which is finite, is what people write for minus infinity."""
    logits = torch.tensor([[1.0, 2.0, torch.finfo(torch.float32).min]], requires_grad=True)
    out = call(logits, spec_of("top_k", 3, top_k=2, max_experts=2))
    q = logits[:, :2].double().softmax(1)
    assert_close("entropy", out.entropy, -(q * q.log()).sum(1))
    grad = torch.autograd.grad(out.entropy_sum + out.z_sum + out.weights[0, 0], logits)[0]
    assert grad.isfinite().all() and float(grad[0, 2].abs()) < 1e-20


@pytest.mark.parametrize("call", BACKENDS)
@pytest.mark.parametrize("score_function", SCORES)
def test_far_logits_have_finite_gates_sums_and_gradients(score_function, call):
    logits = torch.tensor(
        [[0.0, -200.0, 90.0, -1e4], [-150.0, -160.0, -170.0, -180.0], [1e4, 0.0, 1e4, 300.0]]
    )
    for normalize in (True, False):
        spec = spec_of(
            "top_k",
            4,
            score_function=score_function,
            top_k=2,
            max_experts=2,
            normalize_weights=normalize,
        )
        out, grad = with_gradient(call, logits, spec)
        assert grad.isfinite().all() and all(t.isfinite().all() for t in out)


# Arguments

BAD_SPECS = {
    "an unknown mode": (replace(BASE, mode="best"), "'best'"),  # type: ignore[arg-type]
    "an unknown score function": (replace(BASE, score_function="tanh"), "'tanh'"),  # type: ignore[arg-type]
    "negative null experts": (replace(BASE, num_null_experts=-2), "num_null_experts is -2"),
    "no experts": (replace(BASE, num_experts=0), "0 experts"),
    "only null experts": (replace(BASE, num_experts=0, num_null_experts=8), "num_experts is 0"),
    "a negative number of experts": (
        replace(BASE, num_experts=-2, num_null_experts=8),
        "num_experts is -2",
    ),
    "too many experts": (replace(BASE, num_experts=1022, num_null_experts=3), "1025 experts"),
    "top_k of zero": (replace(BASE, top_k=0), "top_k is 0"),
    "top_k above the experts": (replace(BASE, top_k=17, max_experts=17), "top_k is 17"),
    "top_k above experts and nulls": (
        replace(BASE, num_null_experts=2, top_k=19),
        r"top_k is 19.*18 \(null experts incl",
    ),
    "no slots": (replace(BASE, max_experts=0), "max_experts is 0"),
    "more slots than experts": (replace(BASE, max_experts=17), "max_experts is 17"),
    "too many slots": (replace(BASE, num_experts=128, max_experts=65), "max_experts is 65"),
    "negative min_experts": (replace(BASE, min_experts=-1), "min_experts is -1"),
    "min above max": (replace(BASE, min_experts=7), "min_experts is 7"),
    "top_k above the slots": (replace(BASE, top_k=7), "max_experts 6 is below top_k 7"),
    "scaling by zero": (replace(BASE, scaling_factor=0.0), "scaling_factor is 0.0"),
    "scaling by NaN": (replace(BASE, scaling_factor=float("nan")), "scaling_factor is nan"),
    "ReLU routing of other scores": (replace(BASE, mode="relu"), "not softmax"),
    "top_p of ReLU scores": (
        replace(BASE, mode="top_p", score_function="relu"),
        "top_p needs scores",
    ),
    "groups of expert choice": (
        replace(BASE, mode="expert_choice", num_groups=2),
        "not expert_choice",
    ),
    "groups that do not divide": (
        replace(BASE, num_groups=3),
        "num_groups 3 must divide model.num_experts 16",
    ),
    "no groups": (replace(BASE, num_groups=0), "num_groups 0"),
    "too many groups": (replace(BASE, num_experts=128, num_groups=128), "num_groups 128"),
    "more top groups than groups": (replace(BASE, num_groups=2, top_groups=3), "top_groups 3"),
    "no top groups": (replace(BASE, num_groups=2, top_groups=0), "top_groups 0"),
    "groups too small": (replace(BASE, num_groups=8), "top_k 3 does not fit 1 of 8 groups of 2"),
    "no keys of a group": (
        replace(BASE, num_groups=4, top_groups=2, group_keys=0),
        "group_keys is 0; it must be between 1 and the 4 experts of a group",
    ),
    "more keys than a group has": (
        replace(BASE, num_groups=4, top_groups=2, group_keys=5),
        "group_keys is 5; it must be between 1 and the 4 experts of a group",
    ),
    "keys of no groups": (replace(BASE, group_keys=2), "there are no groups to rank"),
    "null experts of expert choice": (
        replace(BASE, mode="expert_choice", num_null_experts=1),
        "cannot have null experts",
    ),
}
LOGITS = normal(6, 16, seed=0)
GIVEN = spec_of("given")
IDS = draw_given_ids(6, 16, 6, seed=0)
BAD_ARGUMENTS: dict[str, tuple[torch.Tensor, RouteSpec, dict[str, Any], str]] = {
    "columns that do not fit": (LOGITS[:, :15], BASE, {}, "15 columns"),
    "logits of one dimension": (LOGITS[0], BASE, {}, r"logits.*\(16,\)"),
    "logits of three dimensions": (LOGITS.view(2, 3, 16), BASE, {}, r"logits.*\(2, 3, 16\)"),
    "fp16 logits": (LOGITS.half(), BASE, {}, "torch.float16"),
    "many fp64 columns": (
        normal(2, 65, seed=0).double(),
        replace(BASE, num_experts=65),
        {},
        "at most 64 columns, not 65",
    ),
    "too many assignments": (
        torch.empty(1, 16).expand(2**29, 16),
        BASE,
        {},
        f"{2**29} tokens x 6 slots",
    ),
    "no segments": (LOGITS, BASE, {"num_segments": 0}, "into 0 segments"),
    "uneven segments": (
        LOGITS,
        BASE,
        {"num_segments": 4},
        "6 tokens cannot be cut into 4 segments",
    ),
    "ids without their mode": (LOGITS, BASE, {"given_ids": IDS}, "given_ids"),
    "the mode without ids": (LOGITS, GIVEN, {}, "given_ids"),
    "top_p without P": (LOGITS, spec_of("top_p"), {}, "needs router_inputs"),
    "a bias of expert choice": (
        LOGITS,
        spec_of("expert_choice"),
        {"bias": torch.zeros(16)},
        "takes no bias",
    ),
    "a bias that does not fit": (LOGITS, BASE, {"bias": torch.zeros(15)}, r"bias is \(15,\)"),
    "a strided bias": (LOGITS, BASE, {"bias": torch.zeros(32)[::2]}, "bias.*contiguous"),
    "a short router_inputs": (
        LOGITS,
        BASE,
        {"router_inputs": torch.zeros(3)},
        r"router_inputs is \(3,\)",
    ),
    "an fp64 router_inputs": (
        LOGITS,
        BASE,
        {"router_inputs": torch.zeros(4).double()},
        "router_inputs.*float64",
    ),
    "a short mask": (
        LOGITS,
        BASE,
        {"token_mask": torch.ones(5, dtype=torch.bool)},
        r"token_mask is \(5,\)",
    ),
    "a mask of numbers": (LOGITS, BASE, {"token_mask": torch.ones(6)}, "token_mask.*float32"),
    "ids of other slots": (
        LOGITS,
        GIVEN,
        {"given_ids": IDS[:, :5].contiguous()},
        r"given_ids is \(6, 5\)",
    ),
    "an id above the experts": (
        LOGITS,
        GIVEN,
        {"given_ids": IDS.masked_fill(IDS == -1, 16)},
        r"given_ids span 0\.\.16",
    ),
    "an id below -1": (
        LOGITS,
        GIVEN,
        {"given_ids": IDS.masked_fill(IDS == -1, -2)},
        r"given_ids span -2\.\.",
    ),
    "a range that does not fit": (
        LOGITS,
        BASE,
        {"num_bins": 4, "histogram_range": torch.ones(15, 2)},
        r"\(15, 2\)",
    ),
    "token ids of 32 bits": (
        LOGITS,
        BASE,
        {"token_ids": torch.arange(6, dtype=torch.int32)},
        "token_ids.*int32",
    ),
    "short token ids": (LOGITS, BASE, {"token_ids": torch.arange(5)}, r"token_ids is \(5,\)"),
    "one bin": (
        LOGITS,
        BASE,
        {"num_bins": 1, "histogram_range": torch.ones(16, 2)},
        "num_bins is 1",
    ),
    "negative bins": (LOGITS, BASE, {"num_bins": -4}, "num_bins is -4"),
    "bins without a range": (LOGITS, BASE, {"num_bins": 4}, "num_bins is 4"),
    "a bias elsewhere": (LOGITS, BASE, {"bias": torch.zeros(16, device="meta")}, "bias is on meta"),
    "an unknown backend": (LOGITS, BASE, {"backend": "triton"}, "'triton'"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_a_contradiction_in_the_settings_is_refused_with_its_value(name):
    spec, sentence = BAD_SPECS[name]
    with pytest.raises(ValueError, match=sentence):
        route(torch.zeros(2, max(spec.num_columns, 1)), spec)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_with_its_value(name):
    logits, spec, arguments, sentence = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=sentence):
        route(logits, spec, **arguments)


def test_several_contradictions_are_reported_together():
    assert (
        len(replace(BASE, top_k=0, scaling_factor=-1.0, mode="best").problems("model.router")) == 3
    )  # type: ignore[arg-type]


# The dispatcher


def test_opcheck_passes():
    interface.load_library()
    ops = torch.ops.loadstone
    for mode, dtype in (
        ("top_k", torch.float32),
        ("given", torch.bfloat16),
        ("threshold", torch.float64),
    ):
        spec = spec_of(mode)
        logits, arguments = draw(spec, 8, dtype=dtype, num_bins=4)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        settings, ids = spec.integers(2, 4), arguments.get("given_ids")
        forward = (
            logits.requires_grad_(),
            arguments["bias"].to(real),
            arguments.get("router_inputs"),
            torch.arange(8) > 1,
            None if ids is None else ids.int(),
            None,
            None,
            arguments["histogram_range"],
            arguments["token_ids"],
            None,
            settings,
            1.5,
        )
        torch.library.opcheck(ops.router_forward, forward)
        out = [t.detach() for t in ops.router_forward(*forward)]
        logits = logits.detach()
        torch.library.opcheck(
            ops.router_backward,
            (
                logits,
                out[1],
                forward[3],
                out[8],
                out[5],
                out[7],
                torch.ones_like(out[0]),
                torch.ones_like(out[3]),
                torch.ones_like(out[4]),
                settings,
                1.5,
            ),
        )
        torch.library.opcheck(ops.router_scores, (logits, settings, 1.5))


def compare_compiled(logits: torch.Tensor) -> None:
    def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = fused(logits, BASE)
        return (
            out.weights * torch.arange(6)
        ).sum() + out.z_sum + out.score_sums.square().sum(), out.expert_ids

    torch.compiler.reset()
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = logits.clone().requires_grad_()
        total, ids = call(inputs)
        results.append((total, ids, torch.autograd.grad(total, inputs)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_router_gives_the_same_result(monkeypatch):
    """Loading comes before tracing and is taken out of route: what compiles and opens a library
    cannot be traced.
    """
    interface.load_library()
    monkeypatch.setattr(interface, "load_library", lambda: None)
    compare_compiled(draw(BASE, 16)[0])


def test_route_compiles_as_it_stands_once_the_library_is_loaded():
    interface.load_library()
    compare_compiled(draw(BASE, 16)[0])


def test_a_million_tokens_are_routed_as_the_reference_does():
    logits = torch.randn(2**20, 8, generator=torch.Generator().manual_seed(0))
    spec = RouteSpec(8, top_k=2, max_experts=2)
    ours, expected = (route(logits, spec, backend=backend) for backend in ("fused", "reference"))
    for name in ("expert_ids", "counts", "slots", "inverse", "offsets", "k_histogram"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    assert_close("score_sums", ours.score_sums, expected.score_sums)
