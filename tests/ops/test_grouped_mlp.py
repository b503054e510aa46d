"""grouped_mlp against its definition: every backend a CPU has, every gradient, experts without
rows, what is kept.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ops.grouped_mlp import activate, grouped_mlp, reference_grouped_mlp, select_backend
from ops.grouped_mlp.interface import _unsuited
from ops.permute import group_by_expert
from ops.testing import (
    CORRECTNESS_SHAPES,
    EDGE_CASES,
    MoEShape,
    assert_close,
    draw_expert_ids,
    kept_for_backward,
    poisoned_memory,
)

HIDDEN, WIDTH = 16, 24
BACKENDS = [
    ("torch", torch.float32),
    ("torch", torch.float64),
    ("torch", torch.bfloat16),
    ("grouped_mm", torch.float32),
    ("grouped_mm", torch.bfloat16),
]
NAMES = ("hidden", "weights", "gate_up", "down")
both_ways = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
backends = pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def make_case(
    ids: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    hidden_size: int = HIDDEN,
    width: int = WIDTH,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs with gradient, and slots, inverse and offsets. Unused slots get a gate on purpose: it
    must reach nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul_(scale).to(dtype).requires_grad_()

    real = torch.float64 if dtype == torch.float64 else torch.float32
    gates = torch.rand(ids.shape, generator=generator).to(real).requires_grad_()
    inputs = (
        normal(len(ids), hidden_size, scale=1.0),
        gates,
        normal(num_experts, 2 * width, hidden_size, scale=hidden_size**-0.5),
        normal(num_experts, hidden_size, width, scale=width**-0.5),
    )
    return inputs, group_by_expert(ids, num_experts)


def edge_case(
    name: str, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    num_tokens, num_experts, top_k, load = EDGE_CASES[name]
    return make_case(draw_expert_ids(num_tokens, num_experts, top_k, load), num_experts, dtype)


def run(
    function, inputs: tuple[torch.Tensor, ...], places: tuple[torch.Tensor, ...], **options
) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of hidden, weights, gate_up, down under a fixed random gradient."""
    out = function(*inputs, *places, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def check(inputs: tuple[torch.Tensor, ...], places: tuple[torch.Tensor, ...], **options) -> None:
    expected = run(
        reference_grouped_mlp, tuple(t.detach().double().requires_grad_() for t in inputs), places
    )
    ours = run(grouped_mlp, inputs, places, **options)
    for name, value, reference, like in zip(
        ("out", *(f"grad {n}" for n in NAMES)), ours, expected, (inputs[0], *inputs), strict=True
    ):
        assert value.dtype == like.dtype
        assert_close(name, value, reference, inputs[0].dtype)


@both_ways
@backends
@pytest.mark.parametrize("case", EDGE_CASES)
def test_output_and_gradients_match_the_reference(case, backend, dtype, recompute, poisoned):
    check(*edge_case(case, dtype), backend=backend, recompute=recompute)


@pytest.mark.parametrize("load", ["even", "skewed", "one", "half", "unused"])
@pytest.mark.parametrize("shape", CORRECTNESS_SHAPES, ids=lambda s: f"D{s[0]}F{s[1]}E{s[2]}K{s[3]}")
def test_published_shapes_scaled_down_match_the_reference(shape, load, poisoned):
    """Shapes of arXiv 2512.14080's own tests, with an eighth of the experts and widths and 97
    tokens.
    """
    hidden_size, width, num_experts, top_k = shape
    scaled = MoEShape(97, hidden_size // 8, width // 8, max(top_k, num_experts // 8), top_k)
    ids = draw_expert_ids(scaled.num_tokens, scaled.num_experts, top_k, load)
    inputs, places = make_case(
        ids, scaled.num_experts, torch.float32, scaled.hidden_size, scaled.expert_intermediate_size
    )
    check(inputs, places)


def test_reference_is_the_formula_token_by_token():
    ids = torch.tensor([[1, 0], [2, -1], [1, 2]])
    inputs, places = make_case(ids, 4, torch.float64)
    hidden, weights, gate_up, down = (t.detach() for t in inputs)
    for token, out in enumerate(reference_grouped_mlp(hidden, weights, gate_up, down, *places)):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for k, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                gate, up = (
                    gate_up[expert, :WIDTH] @ hidden[token],
                    gate_up[expert, WIDTH:] @ hidden[token],
                )
                expected += weights[token, k] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        assert_close("token", out, expected)


def test_gradients_hold_by_finite_differences():
    inputs, places = make_case(
        draw_expert_ids(7, 3, 2, "unused"), 3, torch.float64, hidden_size=4, width=3
    )
    assert torch.autograd.gradcheck(lambda *t: grouped_mlp(*t, *places), inputs)


SPECIAL = {
    "clamped": ("clamped_swiglu", False),
    "limited": ("limited_swiglu", False),
    "biased": ("swiglu", True),
    "clamped_and_biased": ("clamped_swiglu", True),
}


def special_case(name: str, case: str, dtype: torch.dtype):
    """Inputs of an edge case with biases, and the options. Clamps act, but for bf16: its rounding
    would take a value over the limit, where the gradient jumps.
    """
    activation, biased = SPECIAL[name]
    inputs, places = edge_case(case, dtype)
    if dtype != torch.bfloat16:
        with torch.no_grad():
            inputs[2].mul_(6)  # pre-activations from -20 to 20
    if not biased:
        return inputs, places, {"activation": activation}
    generator = torch.Generator().manual_seed(3)
    biases = [
        torch.randn(weight.shape[:2], generator=generator).to(dtype).requires_grad_()
        for weight in inputs[2:]
    ]
    return (*inputs, *biases), places, {"activation": activation}


def special_mlp(function):
    """Biases as the fifth and sixth argument, so that `run` differentiates them too."""

    def call(hidden, weights, gate_up, down, *rest, **options):
        *biases, slots, inverse, offsets = rest
        if biases:
            options |= {"gate_up_bias": biases[0], "down_bias": biases[1]}
        return function(hidden, weights, gate_up, down, slots, inverse, offsets, **options)

    return call


@both_ways
@backends
@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("name", SPECIAL)
def test_biases_and_the_clamped_activation_match_the_reference(
    name, case, backend, dtype, recompute, poisoned
):
    inputs, places, options = special_case(name, case, dtype)
    expected = run(
        special_mlp(reference_grouped_mlp),
        tuple(t.detach().double().requires_grad_() for t in inputs),
        places,
        **options,
    )
    ours = run(
        special_mlp(grouped_mlp), inputs, places, **options, backend=backend, recompute=recompute
    )
    names = ("out", *(f"grad {n}" for n in (*NAMES, "gate_up_bias", "down_bias")))
    for what, value, reference in zip(names[: len(ours)], ours, expected, strict=True):
        assert_close(what, value, reference, dtype)


@pytest.mark.parametrize("limit", [-7.0, 7.0])
def test_the_clamped_activation_is_gpt_oss(limit):
    """Its formula in fp64, value by value, at and around the limits."""
    values = torch.tensor([limit - 0.1, limit, limit + 0.1, -3.0, 0.0, 2.0], dtype=torch.float64)
    gate, up = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    for g, u, found in zip(gate, up, activate(gate, up, "clamped_swiglu"), strict=True):
        g, u = min(float(g), 7.0), min(max(float(u), -7.0), 7.0)
        assert float(found) == pytest.approx((u + 1) * g / (1 + math.exp(-1.702 * g)), rel=1e-12)


@pytest.mark.parametrize("limit", [-10.0, 10.0])
def test_the_limited_activation_is_deepseek_v4(limit):
    """Its formula in fp64, value by value, at and around the limits."""
    values = torch.tensor([limit - 0.1, limit, limit + 0.1, -3.0, 0.0, 2.0], dtype=torch.float64)
    gate, up = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    for g, u, found in zip(gate, up, activate(gate, up, "limited_swiglu"), strict=True):
        g, u = min(float(g), 10.0), min(max(float(u), -10.0), 10.0)
        assert float(found) == pytest.approx(u * g / (1 + math.exp(-g)), rel=1e-12)


def test_triton_leaves_special_experts_to_others_and_says_so(caplog):
    device = torch.device("cuda")
    assert _unsuited("triton", device, torch.bfloat16, 64, 64, False) == (
        "its kernels compute plain SwiGLU without biases"
    )
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        inputs, places = edge_case("unused_slots", torch.float32)
        grouped_mlp(*inputs, *places, activation="gelu")
    with pytest.raises(ValueError, match=r"gate_up_bias None and down_bias \(2, 3\)"):
        grouped_mlp(*inputs, *places, down_bias=torch.zeros(2, 3))


@backends
@pytest.mark.parametrize("case", ["no_tokens", "all_to_one", "idle_experts", "no_assignments"])
def test_experts_without_rows_get_zero_gradients(case, backend, dtype, poisoned):
    inputs, places = edge_case(case, dtype)
    idle = places[2].diff() == 0
    assert idle.any()
    for grad in run(grouped_mlp, inputs, places, backend=backend)[3:]:
        assert torch.equal(grad[idle], torch.zeros_like(grad[idle]))
        assert (grad[~idle].flatten(1).abs().amax(1) > 0).all()


@backends
def test_repeats_are_bit_identical_and_recomputing_changes_no_bit(backend, dtype):
    inputs, places = edge_case("primes", dtype)
    first, second, third = (
        run(grouped_mlp, inputs, places, backend=backend, recompute=r) for r in (False, False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@backends
def test_a_broadcast_gradient_is_as_good_as_a_dense_one(backend, dtype):
    """`out.sum()` sends back a gradient with zero strides, which torch's grouped_mm refuses."""
    inputs, places = edge_case("primes", dtype)
    out = grouped_mlp(*inputs, *places, backend=backend)
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(out.sum(), inputs), dense, strict=True)
    )


def test_a_token_depends_on_its_own_experts_only():
    inputs, places = make_case(torch.tensor([[0], [0], [1], [1], [1]]), 2, torch.float32)
    out = grouped_mlp(*inputs, *places)
    gate, up = F.linear(inputs[0][2:], inputs[2][1]).chunk(2, dim=-1)
    assert_close(
        "second expert", out[2:], inputs[1][2:] * F.linear(F.silu(gate) * up, inputs[3][1])
    )
    assert torch.autograd.grad(out[:2].sum(), inputs[2])[0][1].count_nonzero() == 0


@pytest.mark.parametrize(("backend", "dtype"), [b for b in BACKENDS if b[0] == "torch"], ids=str)
@both_ways
def test_backward_keeps_inputs_and_pre_activations_only(backend, dtype, recompute):
    """Beyond the weights: T*D values of hidden (2TD bytes in bf16), T*K*2F pre-activations (4TKF)
    unless they are recomputed, gates and indices. Neither activations nor the down-projection's
    output.
    """
    num_tokens, top_k, num_experts = 64, 4, 8
    inputs, places = make_case(
        draw_expert_ids(num_tokens, num_experts, top_k, "even"), num_experts, dtype
    )
    with kept_for_backward(*inputs[2:]) as kept:
        grouped_mlp(*inputs, *places, backend=backend, recompute=recompute)
    slots = num_tokens * top_k
    indices = 4 * (2 * slots + num_experts + 1)
    stated = dtype.itemsize * (num_tokens * HIDDEN + (0 if recompute else slots * 2 * WIDTH))
    assert sum(kept.values()) == stated + inputs[1].nbytes + indices


def test_no_gradient_means_nothing_is_kept():
    inputs, places = edge_case("primes", torch.float32)
    with torch.no_grad():
        assert grouped_mlp(*inputs, *places).grad_fn is None


def test_the_op_holds_torchs_contract_for_custom_ops():
    inputs, places = edge_case("unused_slots", torch.float32)
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.loadstone.grouped_mlp_forward.default,
            (*inputs, *places, "torch", keep),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
    biases = [torch.zeros(weight.shape[:2]).requires_grad_() for weight in inputs[2:]]
    torch.library.opcheck(
        torch.ops.loadstone.grouped_mlp_forward.default,
        (*inputs, *places, "torch", True, "clamped_swiglu", *biases),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_it_compiles_as_one_graph():
    inputs, places = edge_case("unused_slots", torch.float32)
    expected = run(grouped_mlp, inputs, places)
    compiled = torch.compile(grouped_mlp, fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(a, b) for a, b in zip(run(compiled, inputs, places), expected, strict=True)
    )


def test_cpu_tensors_take_the_torch_backend():
    assert {
        select_backend("auto", torch.device("cpu"), d, 16, 24)
        for d in (torch.float32, torch.bfloat16)
    } == {"torch"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(5, HIDDEN + 8)}, rf"hidden \(5, {HIDDEN + 8}\)"),
        ({"hidden": torch.zeros(5, HIDDEN).bfloat16()}, "hidden is torch.bfloat16"),
        ({"down": torch.zeros(2, HIDDEN, 2 * WIDTH)}, "down"),
        ({"weights": torch.zeros(5, 1).bfloat16()}, "torch.bfloat16"),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, r"slots \(4,\)"),
        ({"slots": torch.zeros(5, dtype=torch.int64)}, "torch.int64.*expected int32"),
        (
            {"offsets": torch.tensor([0, 2, 4], dtype=torch.int32)},
            "from 0 to 4; expected 0 to the 5",
        ),
        ({"offsets": torch.tensor([0, 7, 5], dtype=torch.int32)}, "never falling"),
        ({"backend": "fastest"}, "fastest.*auto, triton, grouped_mm, torch, reference"),
        ({"backend": "triton"}, "experts.backend=triton cannot be used: .*GPU"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    inputs, places = make_case(torch.tensor([[0], [0], [1], [1], [1]]), 2, torch.float32)
    names = (*NAMES, "slots", "inverse", "offsets")
    with pytest.raises(ValueError, match=message):
        grouped_mlp(**{**dict(zip(names, (*inputs, *places), strict=True)), **changes})
