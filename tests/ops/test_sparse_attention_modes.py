"""Sparse attention beyond one level of blocks: super-blocks, and tails estimated from samples."""

from __future__ import annotations

import pytest
import torch

from ops.sparse_attention import SelectionNoise, SparseAttentionSpec, decode, sparse_attention
from ops.sparse_attention.estimator import estimate
from ops.sparse_attention.reference import reference_attention
from tests.pairwise import some_daily

TWO_LEVELS = {
    "block_size": 8,
    "coarse_block_size": 8,
    "top_k": 2,
    "window_size": 9,
    "num_levels": 2,
    "fanout": 2,
    "num_expanded": 2,
}
TWO_LEVEL_CHANGES = [
    {"max_variance": 0.3},
    {"order": 0},
    {"score": "max"},
    {"score": "error_gain"},
    {"top_k": 100},
    {"top_k": 0},
    {"min_sparse_length": 60},
    {"coarse_block_size": 4},
    {"fanout": 3},
    {"num_sink_blocks": 5},
]


def draw(lengths, heads, kv_heads, dim=8):
    gen = torch.Generator().manual_seed(5)
    total = sum(lengths)
    shapes = (
        (total, heads, dim),
        (total, kv_heads, dim),
        (total, kv_heads, dim),
        (total, heads),
        (heads,),
    )
    inputs = [torch.randn(shape, dtype=torch.float64, generator=gen) for shape in shapes]
    return inputs, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("noise", [None, SelectionNoise(7, 1.0, 1)], ids=["plain", "noise"])
@pytest.mark.parametrize("changes", TWO_LEVEL_CHANGES, ids=str)
def test_two_levels_follow_the_definition_with_all_gradients(changes, noise):
    spec = SparseAttentionSpec(**{**TWO_LEVELS, **changes})
    for lengths, heads, kv_heads in (([61, 140], 4, 2), ([0, 1, 6, 0, 33, 57], 3, 3)):
        inputs, cu_seqlens = draw(lengths, heads, kv_heads)
        found = []
        for function in (sparse_attention, reference_attention):
            q, k, v, bias, sink = (x.clone().requires_grad_() for x in inputs)
            result = function(q, k, v, cu_seqlens, spec, bias=bias, sink=sink, noise=noise)
            (result.out.sin().sum() + result.lse.cos().sum()).backward()
            found.append(
                [
                    result.out,
                    result.lse,
                    result.tail_mass,
                    result.selected_mass,
                    *(x.grad for x in (q, k, v, bias, sink)),
                ]
            )
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_two_levels_with_everything_open_are_one_level():
    inputs, cu_seqlens = draw([201], 4, 2)
    one = SparseAttentionSpec(**{**TWO_LEVELS, "num_levels": 1})
    two = SparseAttentionSpec(**{**TWO_LEVELS, "num_expanded": 1000})
    ours, expected = (sparse_attention(*inputs[:3], cu_seqlens, spec) for spec in (two, one))
    torch.testing.assert_close(ours.out, expected.out, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.selected, expected.selected)


def test_two_levels_decode_what_they_prefill_and_see_no_future():
    (q, k, v, bias, sink), cu_seqlens = draw([150], 4, 2)
    spec = SparseAttentionSpec(**TWO_LEVELS)
    whole = sparse_attention(q, k, v, cu_seqlens, spec, bias=bias, sink=sink)
    for length in (1, 8, 40, 97, 150):
        last = slice(length - 1, length)
        out, lse = decode(q[last], k[None], v[None], None, length, spec, bias=bias[last], sink=sink)
        torch.testing.assert_close(out[0], whole.out[length - 1], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse[0], whole.lse[length - 1], rtol=1e-11, atol=1e-12)
    later = [torch.cat([x[:100], torch.randn_like(x[100:])]) for x in (q, k, v)]
    again = sparse_attention(*later, cu_seqlens, spec, bias=bias, sink=sink)
    torch.testing.assert_close(again.out[:100], whole.out[:100], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", some_daily([2.0, 1.0]))
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("tail", ["ht", "ht_cv"])
def test_sampled_tails_are_unbiased_and_know_their_variance(tail, order, scale):
    """At scale 2 the variance term gives many blocks more than their mass."""
    (q, k, v, _, _), cu_seqlens = draw([23, 89], 4, 2)
    q = scale * q
    blocks = {"block_size": 8, "coarse_block_size": 4}
    dense = reference_attention(q, k, v, cu_seqlens, SparseAttentionSpec(**blocks, top_k=1000))
    spec = SparseAttentionSpec(
        **blocks, top_k=2, window_size=9, tail=tail, order=order, num_samples=3
    )
    mass, numerator, error, variance = [], [], [], []
    for seed in range(300):
        found = estimate(q, k, v, cu_seqlens, spec, seed)
        assert found.lse.isfinite().all()  # the sum is positive whatever was drawn
        mass.append((found.lse - dense.lse).exp())
        numerator.append(found.out * mass[-1].unsqueeze(-1))
        error.append((found.out - dense.out).square().sum(-1))
        variance.append(found.variance)
    for draws, truth in (
        (torch.stack(mass), torch.ones_like(dense.lse)),
        (torch.stack(numerator), dense.out),
    ):
        z = (draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5 + 1e-9)
        # 112 x 4 rows, many of them without any sampling
        assert z.abs().max() < 5 and z.square().mean() < 1.1
    # of rows with a tail, which draw independently
    by_draw = torch.stack(mass)[:, 50:].mean((1, 2)) - 1
    assert float(by_draw.mean().abs()) < 4 * float(by_draw.std()) / len(by_draw) ** 0.5 < 0.01
    assert float(torch.stack(variance).mean()) == pytest.approx(
        float(torch.stack(error).mean()), rel=0.6
    )


def test_a_sampled_tail_without_enough_blocks_is_exact():
    (q, k, v, _, _), cu_seqlens = draw([60], 4, 2)
    blocks = {"block_size": 8, "coarse_block_size": 8}
    dense = reference_attention(q, k, v, cu_seqlens, SparseAttentionSpec(**blocks, top_k=1000))
    for tail in ("ht", "ht_cv"):
        spec = SparseAttentionSpec(**blocks, top_k=1, window_size=1, tail=tail, num_samples=9)
        found = estimate(q, k, v, cu_seqlens, spec)
        torch.testing.assert_close(found.out, dense.out, rtol=1e-10, atol=1e-10)
        assert not found.variance.any()
