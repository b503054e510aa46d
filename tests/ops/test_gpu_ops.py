"""What only a CUDA device runs: the grouped GEMM, permutations without atomics, variable-length attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.attention.base import SequenceLayout, document_mask, has_varlen_kernel
from model.attention.dense import DenseAttention
from model.config import ModelConfig
from model.layers import rotary_tables
from ops.grouped_mlp import grouped_mlp, reference_grouped_mlp, select_backend
from ops.permute import group_by_expert, permute, unpermute
from ops.permute.reference import reference_permute, reference_unpermute
from ops.testing import (
    EDGE_CASES,
    MODEL_SHAPES,
    MoEShape,
    assert_close,
    count_rows,
    draw_expert_ids,
    poisoned_memory,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = torch.bfloat16
# Edge cases with small experts, and the experts of a real model under a prime number of tokens.
SHAPES = {name: (MoEShape(tokens, 128, 64, experts, top_k), load)
          for name, (tokens, experts, top_k, load) in EDGE_CASES.items()}
SHAPES |= {f"olmoe_{load}": (dataclasses.replace(MODEL_SHAPES["olmoe-1b-7b"], num_tokens=1021), load)
           for load in ("even", "skewed", "half")}


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def normal(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()


def run(function, inputs: tuple[torch.Tensor, ...], *arguments, **options) -> tuple[torch.Tensor, ...]:
    """Output and all gradients under a fixed random gradient."""
    out = function(*inputs, *arguments, **options)
    grad = normal(*out.shape, seed=9).detach().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def fp32(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().float().requires_grad_() for t in tensors)


def expert_inputs(shape: MoEShape, load: str) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    ids = draw_expert_ids(shape.num_tokens, shape.num_experts, shape.top_k, load)
    counts = count_rows(ids, shape.num_experts).cuda()
    width, hidden_size = shape.expert_intermediate_size, shape.hidden_size
    with torch.no_grad():
        gate_up = normal(shape.num_experts, 2 * width, hidden_size, seed=1) * hidden_size**-0.5
        down = normal(shape.num_experts, hidden_size, width, seed=2) * width**-0.5
    return (normal(int(counts.sum()), hidden_size, seed=0), gate_up.requires_grad_(), down.requires_grad_()), counts


@pytest.mark.parametrize("case", SHAPES)
def test_grouped_mm_and_its_gradients_match_the_reference(case, poisoned):
    inputs, counts = expert_inputs(*SHAPES[case])
    expected = run(reference_grouped_mlp, fp32(inputs), counts)
    ours = run(grouped_mlp, inputs, counts, backend="grouped_mm")
    for name, value, reference in zip(("out", "grad rows", "grad gate_up", "grad down"), ours, expected, strict=True):
        assert value.dtype == BF16
        assert_close(name, value, reference)
    for name, grad in zip(("gate_up", "down"), ours[2:], strict=True):
        assert grad[counts == 0].count_nonzero() == 0, f"experts without rows have a gradient in {name}"


def test_bf16_takes_the_grouped_gemm_where_the_device_has_one():
    expected = "grouped_mm" if torch.cuda.get_device_capability() >= (8, 0) else "reference"
    assert select_backend(torch.device("cuda"), BF16) == expected
    assert select_backend(torch.device("cuda"), torch.float32) == "reference"


def test_a_broadcast_gradient_is_as_good_as_a_dense_one():
    inputs, counts = expert_inputs(*SHAPES["primes"])
    out = grouped_mlp(*inputs, counts, backend="grouped_mm")
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), inputs), dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_permutations_and_their_gradients_match_the_reference(case, dtype, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load).cuda()
    slots, counts = group_by_expert(ids, num_experts)
    assert torch.equal(counts, count_rows(ids, num_experts))
    tokens, rows = normal(num_tokens, 8, seed=0, dtype=dtype), normal(len(slots), 8, seed=1, dtype=dtype)
    weights = normal(num_tokens, top_k, seed=2, dtype=torch.float32)
    if len(slots) == 0:  # the reference then depends on nothing
        assert permute(tokens, slots, top_k).shape == (0, 8)
        assert unpermute(rows, slots, weights).count_nonzero() == 0
        return
    pairs = [(run(lambda t: permute(t, slots, top_k), (tokens,)),
              run(lambda t: reference_permute(t, ids, num_experts), fp32((tokens,)))),
             (run(lambda r, w: unpermute(r, slots, w), (rows, weights)),
              run(lambda r, w: reference_unpermute(r, ids, w), fp32((rows, weights))))]
    for op, (ours, expected) in zip(("permute", "unpermute"), pairs, strict=True):
        for i, (value, reference) in enumerate(zip(ours, expected, strict=True)):
            assert_close(f"{op} {'out' if i == 0 else f'grad of input {i - 1}'}", value, reference, dtype)


def test_repeats_of_a_routed_layer_are_bit_identical():
    """Without torch's deterministic mode: the ops themselves must not use float atomics."""
    shape = dataclasses.replace(MODEL_SHAPES["olmoe-1b-7b"], num_tokens=4096)
    ids = draw_expert_ids(shape.num_tokens, shape.num_experts, shape.top_k, "skewed").cuda()
    _, gate_up, down = expert_inputs(dataclasses.replace(shape, num_tokens=1), "even")[0]
    inputs = (normal(shape.num_tokens, shape.hidden_size, seed=3),
              normal(shape.num_tokens, shape.top_k, seed=4, dtype=torch.float32), gate_up, down)

    def layer(hidden, weights, gate_up, down):
        slots, counts = group_by_expert(ids, shape.num_experts)
        rows = grouped_mlp(permute(hidden, slots, shape.top_k), gate_up, down, counts)
        return unpermute(rows, slots, weights)

    first = run(layer, inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layer, inputs), strict=True))


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(8, 64), (2, 64), (1, 128)])
@pytest.mark.parametrize("documents", [[[64, 64]], [[1, 126, 1], [128]], [[37, 53, 38], [127, 1], [2, 126]]], ids=str)
def test_varlen_attention_matches_masked_attention_in_fp32(documents, num_kv_heads, head_dim, poisoned):
    config = ModelConfig(vocab_size=8, hidden_size=256, num_layers=1, num_heads=8, num_kv_heads=num_kv_heads,
                         intermediate_size=8, num_experts=0, expert_intermediate_size=8, max_seq_len=128,
                         head_dim=head_dim, qk_norm="head")
    torch.manual_seed(0)
    ours = DenseAttention(config, layer_idx=0).cuda().to(BF16)
    exact = DenseAttention(config, layer_idx=0).cuda()
    exact.load_state_dict(ours.state_dict())
    lengths = torch.tensor([length for row in documents for length in row])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()]).view(len(documents), -1).cuda()
    cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).to("cuda", torch.int32)
    cos, sin = rotary_tables(positions, head_dim, config.rope_theta)
    masked = SequenceLayout(cos, sin, cu_seqlens, int(lengths.max()), document_mask(positions))
    hidden = normal(*positions.shape, config.hidden_size, seed=1)
    assert has_varlen_kernel(hidden.device, BF16) and not has_varlen_kernel(hidden.device, torch.float32)

    def results(attention, hidden, layout):
        inputs = (hidden, *attention.parameters())
        out = attention(hidden, layout)
        grad = normal(*out.shape, seed=2).detach().to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    names = ("out", "grad hidden", *(f"grad {name}" for name, _ in ours.named_parameters()))
    for name, value, reference in zip(names, results(ours, hidden, dataclasses.replace(masked, mask=None)),
                                      results(exact, *fp32((hidden,)), masked), strict=True):
        assert_close(name, value, reference, BF16)
