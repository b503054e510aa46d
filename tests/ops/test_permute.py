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
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .requires_grad_()
    )


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return torch.autograd.grad(out, inputs, grad)


def test_poisoned_memory_fills_fresh_tensors_and_is_undone():
    with poisoned_memory():
        assert (
            torch.empty(64).isnan().all()
            and (torch.empty(64, dtype=torch.int64) == 2**63 - 1).all()
        )
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("case", EDGE_CASES)
def test_slots_are_sorted_by_expert_then_token_then_slot(case, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load)
    slots, inverse, offsets = group_by_expert(ids, num_experts)
    flat = ids.flatten().tolist()
    expected = sorted((i for i, e in enumerate(flat) if e >= 0), key=lambda i: (flat[i], i))
    assert slots.tolist() == expected + [-1] * (len(flat) - len(expected))
    assert inverse.shape == ids.shape
    assert inverse.flatten().tolist() == [
        expected.index(i) if e >= 0 else -1 for i, e in enumerate(flat)
    ]
    assert (
        offsets.diff().tolist() == [flat.count(expert) for expert in range(num_experts)]
        and offsets[0] == 0
    )
    assert {slots.dtype, inverse.dtype, offsets.dtype} == {torch.int32}


@pytest.mark.parametrize("tail", [False, True], ids=["exact", "tail"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_permute_and_its_gradient_match_the_reference(case, dtype, tail, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load)
    tokens = normal(num_tokens, HIDDEN, dtype=dtype, seed=1)
    exact = tokens.detach().double().requires_grad_()
    slots, inverse, offsets = group_by_expert(ids, num_experts)
    used = int(offsets[-1])
    rows = permute(tokens, slots if tail else slots[:used], inverse)
    expected = reference_permute(exact, ids, num_experts)
    # a copy: no rounding
    assert rows.dtype == dtype and torch.equal(rows[:used].double(), expected)
    assert rows.isfinite().all()
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    if expected.requires_grad:  # the reference of no rows does not depend on the tokens
        wanted = torch.autograd.grad(expected, exact, grad[:used].double())
        grad[used:] = torch.nan  # nobody's rows
        assert_close("grad tokens", *torch.autograd.grad(rows, tokens, grad), *wanted, dtype)
    else:
        assert torch.equal(*torch.autograd.grad(rows, tokens, grad), torch.zeros_like(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_unpermute_and_its_gradient_match_the_reference(case, dtype, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load)
    slots, inverse, offsets = group_by_expert(ids, num_experts)
    used = int(offsets[-1])
    rows = normal(len(slots), HIDDEN, dtype=dtype, seed=2).detach()
    rows[used:] = torch.nan  # nobody's rows
    rows.requires_grad_()
    exact = rows.detach()[:used].double().requires_grad_()
    out, expected = (
        unpermute(rows, slots, inverse),
        reference_unpermute(exact, ids, torch.ones(ids.shape).double()),
    )
    assert out.dtype == dtype
    assert_close("out", out, expected)
    if expected.requires_grad:
        assert_close(
            "grad rows", gradients(out, rows)[0][:used], *gradients(expected, exact), dtype
        )


def test_unpermute_undoes_permute_as_often_as_a_token_was_sent():
    ids = draw_expert_ids(13, 5, 2, "even")
    tokens = normal(13, HIDDEN, dtype=torch.float32, seed=1)
    slots, inverse, _ = group_by_expert(ids, 5)
    assert torch.equal(unpermute(permute(tokens, slots, inverse), slots, inverse), 2 * tokens)


def test_sums_of_bf16_rows_are_rounded_once():
    ids = torch.zeros(1, 64, dtype=torch.int64)
    slots, inverse, _ = group_by_expert(ids, 1)
    # a bf16 running sum would stall
    rows = torch.full((64, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    assert (
        unpermute(rows, slots, inverse).item() == torch.tensor(64 * (1 + 2**-7)).bfloat16().item()
    )


def test_repeats_are_bit_identical():
    ids = draw_expert_ids(257, 7, 3, "unused")

    def run() -> list[torch.Tensor]:
        tokens = normal(257, 33, dtype=torch.float32, seed=1)
        places = group_by_expert(ids, 7)
        out = unpermute(permute(tokens, *places[:2]), *places[:2])
        return [*places, out, *gradients(out, tokens)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_gets_the_same_bits_whatever_else_is_in_the_batch():
    ids = draw_expert_ids(31, 6, 3, "even")
    tokens = normal(31, HIDDEN, dtype=torch.float32, seed=1)

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        slots, inverse, _ = group_by_expert(ids[part], 6)
        out = unpermute(permute(tokens[part], slots, inverse), slots, inverse)
        return out, torch.autograd.grad(out.square().sum(), tokens)[0][part]

    for whole, alone in zip(run(slice(0, 31)), run(slice(17, 18)), strict=True):
        assert torch.equal(whole[17:18], alone)


@pytest.mark.parametrize("bad", [-2, 4])
def test_expert_ids_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        group_by_expert(torch.tensor([[0, bad], [1, 2]]), 4)
