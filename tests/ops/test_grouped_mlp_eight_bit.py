"""Experts of 8-bit weights against their definition: the op on the weights that they stand for."""

from __future__ import annotations

import pytest
import torch

from ops.grouped_mlp import dequantized, grouped_mlp, grouped_mlp_eight_bit, quantize_rows
from ops.grouped_mlp.fp8 import FP8, rounded_rows, widened
from ops.permute import group_by_expert
from ops.testing import EDGE_CASES, draw_expert_ids, poisoned_memory

HIDDEN, WIDTH = 16, 24


def case_of(routing, dtype=torch.float32, biases=False):
    """hidden, gates, the weights unrounded, indices, and biases."""
    num_tokens, num_experts, top_k, _ = routing
    g = torch.Generator().manual_seed(1)
    slots, inverse, offsets = group_by_expert(draw_expert_ids(*routing), num_experts)
    hidden = torch.randn(num_tokens, HIDDEN, generator=g).to(dtype)
    gates = torch.rand(num_tokens, top_k, generator=g)
    gate_up = torch.randn(num_experts, 2 * WIDTH, HIDDEN, generator=g) * 0.3
    down = torch.randn(num_experts, HIDDEN, WIDTH, generator=g) * 0.3
    gate_up *= torch.logspace(-1, 1, 2 * WIDTH)[:, None]
    special = {}
    if biases:
        special = {
            "activation": "clamped_swiglu",
            "gate_up_bias": torch.randn(num_experts, 2 * WIDTH, generator=g).to(dtype),
            "down_bias": torch.randn(num_experts, HIDDEN, generator=g).to(dtype),
        }
    return hidden, gates, gate_up, down, (slots, inverse, offsets), special


@pytest.mark.parametrize("routing", EDGE_CASES.values(), ids=EDGE_CASES)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_rows_of_8_bits_match_reference(routing, biases, backend, stored):
    hidden, gates, gate_up, down, places, special = case_of(routing, biases=biases)
    up, below = quantize_rows(gate_up, stored), quantize_rows(down, stored)
    whole = dequantized(*up), dequantized(*below)
    expected = grouped_mlp(hidden, gates, *whole, *places, backend="reference", **special)
    with poisoned_memory():
        found = grouped_mlp_eight_bit(
            hidden, gates, *up, *below, *places, backend=backend, **special
        )
    assert found.dtype == hidden.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scales_before_it_rounds(stored, dtype):
    hidden, gates, gate_up, down, places, _ = case_of((67, 5, 3, "even"), dtype)
    up, below = quantize_rows(gate_up, stored), quantize_rows(down, stored)
    whole = dequantized(*up).double(), dequantized(*below).double()
    exact = grouped_mlp(hidden.double(), gates, *whole, *places, backend="reference")
    found = grouped_mlp_eight_bit(hidden, gates, *up, *below, *places)
    assert found.dtype == dtype
    assert float((found - exact).norm() / exact.norm()) < 0.01


def test_a_row_is_rounded_to_its_own_grid():
    weight = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [254.0, 1.0, 3.0], [-1e-40, 0, 0]])
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    assert values[0].tolist() == [127, -64, 32] and scales[0] == pytest.approx(1 / 127)
    assert values[1].tolist() == [0, 0, 0] and scales[1] == 0
    assert values[2].tolist() == [127, 0, 2], "a half goes to the even number"
    assert dequantized(values, scales).isfinite().all()
    # the error of a value is half a step at most, and no other grid of 255 steps has less
    drawn = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_rows(drawn)
    error = (dequantized(values, scales) - drawn).abs().amax(1)
    assert (error <= scales / 2 * (1 + 1e-5)).all() and int(values.abs().max()) == 127


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_a_weight_that_is_not_finite_is_refused(stored):
    with pytest.raises(ValueError, match="a weight is not finite"):
        quantize_rows(torch.tensor([[1.0, float("nan")]]), stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_of_e4m3_is_widened_exactly(dtype):
    """Against torch's own conversion; the two patterns that are NaN are never written."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = every[every.float().isfinite()]
    assert len(finite) == 254
    assert torch.equal(widened(finite, dtype).double(), finite.double())
    assert widened(finite[:0], dtype).dtype == dtype


def test_fp8_rounds_as_the_products_of_training_do():
    """So that experts trained with experts.precision=fp8 compute what they computed there."""
    hidden, gates, gate_up, down, places, _ = case_of((67, 5, 3, "even"))
    up, below = quantize_rows(gate_up, "fp8"), quantize_rows(down, "fp8")
    assert torch.equal(dequantized(*up), rounded_rows(gate_up))
    assert torch.equal(dequantized(*below), rounded_rows(down))
    stored = grouped_mlp_eight_bit(hidden, gates, *up, *below, *places)
    whole = grouped_mlp(hidden, gates, gate_up, down, *places)
    error = float((stored - whole).norm() / whole.norm())
    assert 0.005 < error < 0.05, "a value keeps 4 bits"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gate_up": lambda t: t.float()}, "gate_up is torch.float32 with scales"),
        ({"gate_up_scales": lambda t: t[:, :-1]}, r"gate_up is torch.int8 with scales \(5, 47\)"),
        ({"down_scales": lambda t: t.half()}, r"down is torch.int8 with scales .* torch.float16"),
        ({"down": lambda t: t.float().to(FP8)}, r"down is torch.float8_e4m3fn .* expected torch"),
        ({"hidden": lambda t: t[:, :-1]}, r"do not fit \[T, D\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    hidden, gates, gate_up, down, (slots, inverse, offsets), _ = case_of((9, 5, 3, "even"))
    up, below = quantize_rows(gate_up), quantize_rows(down)
    given = {
        "hidden": hidden,
        "weights": gates,
        "gate_up": up[0],
        "gate_up_scales": up[1],
        "down": below[0],
        "down_scales": below[1],
        "slots": slots,
        "inverse": inverse,
        "offsets": offsets,
    }
    given |= {name: function(given[name]) for name, function in change.items()}
    with pytest.raises(ValueError, match=says):
        grouped_mlp_eight_bit(**given)
    with pytest.raises(ValueError, match="grouped_mm cannot multiply weights of 8"):
        grouped_mlp_eight_bit(
            hidden, gates, *up, *below, slots, inverse, offsets, backend="grouped_mm"
        )
