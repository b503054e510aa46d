"""grouped_mlp against its definition: every backend a CPU has, every gradient, experts without rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ops.grouped_mlp import grouped_mlp, reference_grouped_mlp, select_backend
from ops.testing import EDGE_CASES, assert_close, count_rows, draw_expert_ids, poisoned_memory

HIDDEN, WIDTH = 16, 24
BACKENDS = [(None, torch.float32), (None, torch.float64), ("grouped_mm", torch.float32), ("grouped_mm", torch.bfloat16)]
NAMES = ("rows", "gate_up", "down")


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def counts_of(case: str) -> torch.Tensor:
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    return count_rows(draw_expert_ids(num_tokens, num_experts, top_k, load), num_experts)


def make_inputs(counts: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((int(counts.sum()), HIDDEN), (len(counts), 2 * WIDTH, HIDDEN), (len(counts), HIDDEN, WIDTH))
    return tuple(torch.randn(shape, generator=generator).div(2).to(dtype).requires_grad_() for shape in shapes)


def run(function, inputs: tuple[torch.Tensor, ...], counts: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of rows, gate_up, down under a fixed random gradient."""
    out = function(*inputs, counts, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_output_and_gradients_match_the_reference(case, backend, dtype, poisoned):
    counts = counts_of(case)
    inputs = make_inputs(counts, dtype)
    expected = run(reference_grouped_mlp, tuple(t.detach().double().requires_grad_() for t in inputs), counts)
    ours = run(grouped_mlp, inputs, counts, backend=backend)
    for name, value, reference in zip(("out", *(f"grad {n}" for n in NAMES)), ours, expected, strict=True):
        assert value.dtype == dtype
        assert_close(name, value, reference)


def test_reference_is_the_formula_row_by_row():
    counts = torch.tensor([2, 0, 3])
    rows, gate_up, down = (t.detach() for t in make_inputs(counts, torch.float64))
    for row, expert, y in zip(rows, [0, 0, 2, 2, 2], reference_grouped_mlp(rows, gate_up, down, counts), strict=True):
        gate, up = gate_up[expert, :WIDTH] @ row, gate_up[expert, WIDTH:] @ row
        assert_close("row", y, down[expert] @ (gate * torch.sigmoid(gate) * up))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("case", ["no_tokens", "all_to_one", "idle_experts", "no_assignments"])
def test_experts_without_rows_get_zero_gradients(case, backend, dtype, poisoned):
    counts = counts_of(case)
    assert (counts == 0).any()
    _, _, *weight_gradients = run(grouped_mlp, make_inputs(counts, dtype), counts, backend=backend)
    for grad in weight_gradients:
        assert torch.equal(grad[counts == 0], torch.zeros_like(grad[counts == 0]))
        assert (grad[counts > 0].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_repeats_are_bit_identical(backend, dtype):
    counts = counts_of("primes")
    first, second = (run(grouped_mlp, make_inputs(counts, dtype), counts, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_a_broadcast_gradient_is_as_good_as_a_dense_one(backend, dtype):
    """`out.sum()` sends back a gradient with zero strides, which torch's grouped_mm refuses."""
    counts = counts_of("primes")
    inputs = make_inputs(counts, dtype)
    out = grouped_mlp(*inputs, counts, backend=backend)
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), inputs), dense, strict=True))


def test_a_row_depends_on_its_own_expert_only():
    counts = torch.tensor([2, 3])
    rows, gate_up, down = make_inputs(counts, torch.float32)
    out = grouped_mlp(rows, gate_up, down, counts)
    gate, up = F.linear(rows[2:], gate_up[1]).chunk(2, dim=-1)
    assert_close("second expert", out[2:], F.linear(F.silu(gate) * up, down[1]))
    assert torch.autograd.grad(out[:2].sum(), gate_up)[0][1].count_nonzero() == 0


def test_cpu_tensors_take_the_reference():
    assert {select_backend(torch.device("cpu"), d) for d in (torch.float32, torch.bfloat16)} == {"reference"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"rows": torch.zeros(5, HIDDEN + 8)}, rf"rows \(5, {HIDDEN + 8}\)"),
    ({"down": torch.zeros(2, HIDDEN, 2 * WIDTH)}, "down"),
    ({"counts": torch.tensor([2, 2, 1])}, r"counts has shape \(3,\), expected \(2,\)"),
    ({"counts": torch.tensor([2, 2])}, "sum to 4, but there are 5 rows"),
    ({"backend": "fastest"}, "fastest.*reference or grouped_mm"),
    ({"rows": torch.zeros(0, HIDDEN), "counts": torch.tensor([0, 0]), "backend": "fastest"}, "fastest"),
], ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_inputs_that_do_not_fit_are_refused(changes, message):
    counts = torch.tensor([2, 3])
    rows, gate_up, down = make_inputs(counts, torch.float32)
    with pytest.raises(ValueError, match=message):
        grouped_mlp(**{"rows": rows, "gate_up": gate_up, "down": down, "counts": counts, **changes})
