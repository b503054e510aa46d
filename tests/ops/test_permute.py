"""permute and unpermute against their definition, and the promises of ops/permute/README.md."""

from __future__ import annotations

import pytest
import torch

from ops.permute import group_by_expert, permute, unpermute
from ops.permute.reference import reference_permute, reference_unpermute
from ops.testing import EDGE_CASES, assert_close, draw_expert_ids, poisoned_memory

HIDDEN = 8


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return torch.autograd.grad(out, inputs, grad)


def test_poisoned_memory_fills_fresh_tensors_and_is_undone():
    with poisoned_memory():
        assert torch.empty(64).isnan().all() and (torch.empty(64, dtype=torch.int64) == 2**63 - 1).all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("case", EDGE_CASES)
def test_slots_are_sorted_by_expert_then_token_then_slot(case, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load)
    slots, counts = group_by_expert(ids, num_experts)
    flat = ids.flatten().tolist()
    assert slots.tolist() == sorted((i for i, e in enumerate(flat) if e >= 0), key=lambda i: (flat[i], i))
    assert counts.tolist() == [flat.count(expert) for expert in range(num_experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_permute_and_its_gradient_match_the_reference(case, dtype, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load)
    tokens = normal(num_tokens, HIDDEN, dtype=dtype, seed=1)
    exact = tokens.detach().double().requires_grad_()
    rows = permute(tokens, group_by_expert(ids, num_experts)[0], top_k)
    expected = reference_permute(exact, ids, num_experts)
    assert rows.dtype == dtype and torch.equal(rows.double(), expected)  # a copy: no rounding
    if expected.requires_grad:  # the reference of no rows does not depend on the tokens
        assert_close("grad tokens", *gradients(rows, tokens), *gradients(expected, exact), dtype)
    else:
        assert torch.equal(*gradients(rows, tokens), torch.zeros_like(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_unpermute_and_its_gradients_match_the_reference(case, dtype, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load)
    slots, _ = group_by_expert(ids, num_experts)
    # Unused slots get a gate on purpose: it must reach nothing.
    inputs = normal(len(slots), HIDDEN, dtype=dtype, seed=2), normal(num_tokens, top_k, dtype=torch.float32, seed=3)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    out, expected = unpermute(inputs[0], slots, inputs[1]), reference_unpermute(exact[0], ids, exact[1])
    assert out.dtype == dtype
    compute = torch.float32 if dtype == torch.float64 else dtype  # the gates are fp32
    assert_close("out", out, expected, compute)
    ours = gradients(out, *inputs)
    if expected.requires_grad:
        for name, grad, grad_expected in zip(("rows", "weights"), ours, gradients(expected, *exact), strict=True):
            assert_close(f"grad {name}", grad, grad_expected, compute)
    else:
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in ours)


def test_unpermute_with_equal_gates_undoes_permute():
    ids = draw_expert_ids(13, 5, 2, "even")
    tokens = normal(13, HIDDEN, dtype=torch.float32, seed=1)
    slots, _ = group_by_expert(ids, 5)
    assert torch.equal(unpermute(permute(tokens, slots, 2), slots, torch.full((13, 2), 0.5)), tokens)


def test_repeats_are_bit_identical():
    ids = draw_expert_ids(257, 7, 3, "unused")

    def run() -> list[torch.Tensor]:
        tokens, weights = normal(257, 33, dtype=torch.float32, seed=1), normal(257, 3, dtype=torch.float32, seed=2)
        slots, counts = group_by_expert(ids, 7)
        out = unpermute(permute(tokens, slots, 3), slots, weights)
        return [slots, counts, out, *gradients(out, tokens, weights)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_gets_the_same_bits_whatever_else_is_in_the_batch():
    ids, weights = draw_expert_ids(31, 6, 3, "even"), normal(31, 3, dtype=torch.float32, seed=2)
    tokens = normal(31, HIDDEN, dtype=torch.float32, seed=1)

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        slots, _ = group_by_expert(ids[part], 6)
        out = unpermute(permute(tokens[part], slots, 3), slots, weights[part])
        return out, torch.autograd.grad(out.square().sum(), tokens)[0][part]

    for whole, alone in zip(run(slice(0, 31)), run(slice(17, 18)), strict=True):
        assert torch.equal(whole[17:18], alone)


@pytest.mark.parametrize("bad", [-2, 4])
def test_expert_ids_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        group_by_expert(torch.tensor([[0, bad], [1, 2]]), 4)
