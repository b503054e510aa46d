"""Sparse attention against outsiders: torch's SDPA and FlexAttention, MoBA and NSA written from
their papers' definitions. Nothing here uses the op's tables, entries or reference; blocks are laid
out again, in plain loops.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ops.sparse_attention import SparseAttentionSpec, sparse_attention
from ops.testing import assert_close

LENGTHS = (0, 37, 1, 0, 67, 8, 9)
SPEC = SparseAttentionSpec(
    block_size=8, coarse_block_size=4, top_k=2, window_size=8, num_sink_blocks=1, max_variance=1e4
)
SPECS = {
    "default": SPEC,
    "one_entry": replace(SPEC, coarse_block_size=8),
    "no_window": replace(SPEC, window_size=0),
    "no_sinks": replace(SPEC, num_sink_blocks=0),
    "three_sinks": replace(SPEC, num_sink_blocks=3),
    "window_9": replace(SPEC, window_size=9),
    "window_10": replace(SPEC, window_size=10),
    "nothing_selected": replace(SPEC, top_k=0),
    "max": replace(SPEC, score="max"),
    "top_p": replace(SPEC, top_p=0.5),
    "error_gain": replace(SPEC, score="error_gain"),
    "order_0": replace(SPEC, order=0),
}


class Block(NamedTuple):
    """Tokens [start, end), place within the document, document."""

    start: int
    end: int
    place: int
    document: int


def lay_out(lengths: tuple[int, ...], size: int) -> tuple[list[Block], list[int]]:
    """All blocks, and the block of every token."""
    blocks, block_of, begin = [], [], 0
    for document, length in enumerate(lengths):
        for place, at in enumerate(range(begin, begin + length, size)):
            blocks.append(Block(at, min(at + size, begin + length), place, document))
            block_of += [len(blocks) - 1] * (blocks[-1].end - at)
        begin += length
    return blocks, block_of


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def draw(
    lengths: tuple[int, ...] = LENGTHS,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], Tensor]:
    q, k, v = (
        normal(sum(lengths), n, dim, seed=3 * seed + i, dtype=dtype).requires_grad_()
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    return [q, k, v], torch.tensor([0, *lengths]).cumsum(0)


def chosen_blocks(selected: Tensor) -> list[list[set[int]]]:
    """[Hk][T] sets of blocks."""
    return [[{m for m in row if m >= 0} for row in head] for head in selected.tolist()]


def exact_blocks(
    blocks: list[Block], own: int, spec: SparseAttentionSpec, chosen: set[int]
) -> set[int]:
    """Own block, window (that of the block's first token, which reaches furthest back), first
    blocks, chosen ones.
    """
    document = [m for m in range(own + 1) if blocks[m].document == blocks[own].document]
    reach = blocks[own].start - max(0, spec.window_size - 1)
    return {
        m
        for m in document
        if m == own or blocks[m].end > reach or blocks[m].place < spec.num_sink_blocks
    } | chosen


def token_mask(lengths: tuple[int, ...], spec: SparseAttentionSpec, selected: Tensor) -> Tensor:
    """[Hk, T, T]: which tokens a query sees one by one."""
    blocks, block_of = lay_out(lengths, spec.block_size)
    mask = torch.zeros(len(selected), len(block_of), len(block_of), dtype=torch.bool)
    for head, rows in enumerate(chosen_blocks(selected)):
        for i, chosen in enumerate(rows):
            for m in exact_blocks(blocks, block_of[i], spec, chosen):
                mask[head, i, blocks[m].start : min(blocks[m].end, i + 1)] = True
    return mask


def entry_mask(
    lengths: tuple[int, ...], spec: SparseAttentionSpec, selected: Tensor
) -> tuple[Tensor, Tensor]:
    """[Hk, T, E], which entries a query sees, and their tokens [E, C]."""
    blocks, block_of = lay_out(lengths, spec.block_size)
    size = spec.coarse_block_size
    spans = [
        (m, list(range(at, at + size)))
        for m, block in enumerate(blocks)
        for at in range(block.start, block.end, size)
        if block.end - block.start == spec.block_size
    ]
    mask = torch.zeros(len(selected), len(block_of), len(spans), dtype=torch.bool)
    for head, rows in enumerate(chosen_blocks(selected)):
        for i, chosen in enumerate(rows):
            own = block_of[i]
            seen = exact_blocks(blocks, own, spec, chosen)
            for e, (m, _) in enumerate(spans):
                mask[head, i, e] = (
                    m < own and blocks[m].document == blocks[own].document and m not in seen
                )
    return mask, torch.tensor([tokens for _, tokens in spans])


def assert_same(
    ours: Tensor, expected: Tensor, inputs: list[Tensor], others: list[Tensor] | None = None
) -> None:
    """Values, and gradients of a weighted sum of them."""
    assert_close("out", ours, expected)
    probe = normal(*expected.shape, seed=99, dtype=expected.dtype)
    grads = torch.autograd.grad((ours * probe).sum(), inputs)
    for i, (grad, other) in enumerate(
        zip(grads, torch.autograd.grad((expected * probe).sum(), others or inputs), strict=True)
    ):
        assert_close(f"gradient {i}", grad, other)


def by_head(x: Tensor, repeats: int = 1) -> Tensor:
    """[T, n, d] -> [1, n * repeats, T, d]."""
    return x.transpose(0, 1).repeat_interleave(repeats, 0)[None]


# torch SDPA


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize("name", SPECS)
def test_tail_drop_is_sdpa_under_the_mask_of_the_selection(name, heads, kv_heads):
    spec, group = replace(SPECS[name], tail="drop"), heads // kv_heads
    inputs, cu_seqlens = draw(heads=heads, kv_heads=kv_heads)
    ours = sparse_attention(*inputs, cu_seqlens, spec)
    assert spec.top_k == 0 or (ours.selected >= 0).any()
    mask = token_mask(LENGTHS, spec, ours.selected).repeat_interleave(group, 0)
    q, k, v = inputs
    expected = scaled_dot_product_attention(
        by_head(q), by_head(k, group), by_head(v, group), attn_mask=mask[None]
    )
    assert_same(ours.out, expected[0].transpose(0, 1), inputs)


def as_one_attention(
    inputs: list[Tensor], spec: SparseAttentionSpec, selected: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries [H, T, 2d], keys [H, T + E, 2d], values [H, T + E, d], mask and what is added to
    logits [H, T, T + E].

    The variance term is bilinear in q∘q and D: doubling the head dimension makes the whole row one
    attention.
    """
    q, k, v = inputs
    (length, heads, _), group, scale = q.shape, q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    seen, spans = entry_mask(LENGTHS, spec, selected)
    mean, var, value = k[spans].mean(1), k[spans].var(1, unbiased=False), v[spans].mean(1)
    var = var * (0.5 * scale if spec.order == 2 else 0.0)
    queries = torch.cat([q, q.square()], -1).transpose(0, 1)
    keys = torch.cat(
        [torch.cat([k, torch.zeros_like(k)], -1), torch.cat([mean, var], -1)]
    ).transpose(0, 1)
    values = torch.cat([v, value]).transpose(0, 1)
    mask = torch.cat([token_mask(LENGTHS, spec, selected), seen], -1).repeat_interleave(group, 0)
    shift = torch.full((heads, length, len(spans)), math.log(spec.coarse_block_size), dtype=q.dtype)
    if bias is not None:
        shift = shift + bias.T.unsqueeze(-1)
    shift = torch.cat([torch.zeros(heads, length, length, dtype=q.dtype), shift], -1)
    return (
        queries,
        keys.repeat_interleave(group, 0),
        values.repeat_interleave(group, 0),
        mask,
        shift,
    )


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", SPECS)
def test_the_whole_row_is_one_sdpa_call_of_doubled_head_dimension(name, with_bias):
    spec = SPECS[name]
    inputs, cu_seqlens = draw()
    bias = normal(len(inputs[0]), 4, seed=8).requires_grad_() if with_bias else None
    ours = sparse_attention(*inputs, cu_seqlens, spec, bias=bias)
    queries, keys, values, mask, shift = as_one_attention(inputs, spec, ours.selected, bias)
    assert mask[:, :, len(inputs[0]) :].any()
    expected = scaled_dot_product_attention(
        queries, keys, values, attn_mask=shift.masked_fill(~mask, -math.inf), scale=8**-0.5
    )
    assert_same(ours.out, expected.transpose(0, 1), inputs if bias is None else [*inputs, bias])


def test_the_comparison_notices_another_selection():
    inputs, cu_seqlens = draw()
    ours = sparse_attention(*inputs, cu_seqlens, SPEC)
    other = torch.where(ours.selected == ours.selected.max(), -1, ours.selected)
    queries, keys, values, mask, shift = as_one_attention(inputs, SPEC, other, None)
    expected = scaled_dot_product_attention(
        queries, keys, values, attn_mask=shift.masked_fill(~mask, -math.inf), scale=8**-0.5
    )
    assert (ours.out - expected.transpose(0, 1)).abs().max() > 1e-4


# FlexAttention, eager; it has no backward on a CPU


@pytest.mark.parametrize("name", ["default", "one_entry", "no_sinks", "order_0", "top_p"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_whole_row_is_one_flex_attention_call(name):
    spec = SPECS[name]
    inputs, cu_seqlens = draw(heads=4, kv_heads=2, dtype=torch.float32)
    inputs = [x.detach() for x in inputs]
    bias = normal(len(inputs[0]), 4, seed=8, dtype=torch.float32)
    ours = sparse_attention(*inputs, cu_seqlens, spec, bias=bias)
    queries, keys, values, mask, _ = as_one_attention(inputs, spec, ours.selected, bias)
    length, log_size = len(inputs[0]), math.log(spec.coarse_block_size)

    def score_mod(score, batch, head, query, key):
        return torch.where(key < length, score, score + log_size + bias[query, head])

    block_mask = create_block_mask(
        lambda batch, head, query, key: mask[head, query, key],
        None,
        4,
        *mask.shape[1:],
        device="cpu",
        BLOCK_SIZE=16,
    )
    expected = flex_attention(
        queries[None],
        keys[None],
        values[None],
        score_mod=score_mod,
        block_mask=block_mask,
        scale=8**-0.5,
    )
    assert_close("out", ours.out, expected[0].transpose(0, 1))


# Softmax rows from plain lists of keys: what MoBA and NSA are written with


def attend_to(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[d], [n, d], [n, d] -> [d]; nothing is zero."""
    if not len(keys):
        return 0.0 * query
    return torch.softmax(keys @ query * len(query) ** -0.5, 0) @ values


def documents(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    return list(zip(begins, [b + n for b, n in zip(begins, lengths, strict=True)], strict=True))


def moba(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], chunk: int, top_k: int
) -> Tensor:
    """Mixture of Block Attention, arXiv 2502.13189, section 2.2: each head of each query attends to
    its own chunk causally and to the `top_k` complete past chunks whose mean key has the largest
    product with it.
    """
    rows = []
    for begin, end in documents(lengths):
        for i in range(begin, end):
            own = begin + (i - begin) // chunk * chunk
            row = []
            for h in range(q.shape[1]):
                gates = {
                    at: float((k[at : at + chunk, h].mean(0) @ q[i, h]).detach())
                    for at in range(begin, own, chunk)
                }
                best = sorted(gates, key=lambda at: (-gates[at], at))[:top_k]
                tokens = [j for at in best for j in range(at, at + chunk)] + list(range(own, i + 1))
                row.append(attend_to(q[i, h], k[tokens, h], v[tokens, h]))
            rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", [LENGTHS, (96,), (5, 3)], ids=["packed", "one", "short"])
@pytest.mark.parametrize("chunk, top_k", [(8, 1), (8, 3), (4, 2), (16, 2)])
def test_moba_is_tail_drop_of_order_0_without_window(chunk, top_k, lengths):
    inputs, cu_seqlens = draw(lengths, heads=2, kv_heads=2)
    spec = SparseAttentionSpec(
        block_size=chunk,
        coarse_block_size=chunk,
        top_k=top_k,
        window_size=0,
        num_sink_blocks=0,
        order=0,
        score="max",
        tail="drop",
    )
    assert_same(
        sparse_attention(*inputs, cu_seqlens, spec).out,
        moba(*inputs, lengths, chunk, top_k),
        inputs,
    )


def nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    lengths: tuple[int, ...],
    block: int,
    window_blocks: int,
    selected: list[list[set[int]]],
) -> Tensor:
    """Native Sparse Attention, arXiv 2502.11089, equations 5 to 12, with mean pooling of whole
    blocks as the compression: compressed, selected and sliding attention, each a softmax of its
    own, weighted by gates [T, H, 3]. The selected blocks are given by their first tokens; the
    query's own block is one of them. The window is rounded to blocks.
    """
    rows = []
    for begin, end in documents(lengths):
        for i in range(begin, end):
            own = begin + (i - begin) // block * block
            past = range(begin, own, block)
            row = []
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                means = [
                    torch.stack([x[at : at + block, g].mean(0) for at in past])
                    if past
                    else x[:0, g]
                    for x in (k, v)
                ]
                near = list(range(max(begin, own - window_blocks * block), i + 1))
                picked = [j for at in sorted(selected[g][i]) for j in range(at, at + block)] + list(
                    range(own, i + 1)
                )
                branches = [attend_to(q[i, h], *means)] + [
                    attend_to(q[i, h], k[t, g], v[t, g]) for t in (picked, near)
                ]
                row.append(
                    sum(gate * branch for gate, branch in zip(gates[i, h], branches, strict=True))
                )
            rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1)])
@pytest.mark.parametrize("window_blocks", [1, 3])
def test_nsa_is_three_calls_under_gates(window_blocks, heads, kv_heads):
    inputs, cu_seqlens = draw(heads=heads, kv_heads=kv_heads)
    block = 8
    plain = SparseAttentionSpec(
        block_size=block,
        coarse_block_size=block,
        top_k=2,
        window_size=0,
        num_sink_blocks=0,
        order=0,
    )
    blocks, _ = lay_out(LENGTHS, block)
    selected = sparse_attention(*inputs, cu_seqlens, plain).selected
    starts = [[{blocks[m].start for m in row} for row in head] for head in chosen_blocks(selected)]
    gates = normal(len(inputs[0]), heads, 3, seed=6).sigmoid().requires_grad_()
    compressed = sparse_attention(*inputs, cu_seqlens, plain, exact=False)
    picked = sparse_attention(*inputs, cu_seqlens, plain, selected=selected, coarse=False)
    near = sparse_attention(
        *inputs,
        cu_seqlens,
        replace(plain, top_k=0, window_size=window_blocks * block),
        coarse=False,
    )
    ours = sum(gates[..., n : n + 1] * x.out for n, x in enumerate((compressed, picked, near)))
    assert_same(ours, nsa(*inputs, gates, LENGTHS, block, window_blocks, starts), [*inputs, gates])


def test_the_compressed_branch_counts_blocks_by_their_tokens():
    """NSA's compressed logits have no log C: within a branch of equal blocks it is a constant, and
    shows in lse alone.
    """
    inputs, cu_seqlens = draw((24,), heads=1, kv_heads=1)
    q, k, _ = (x.detach()[:, 0] for x in inputs)
    spec = SparseAttentionSpec(block_size=8, coarse_block_size=8, order=0, top_k=0)
    lse = sparse_attention(*inputs, cu_seqlens, spec, exact=False).lse[16:, 0]
    means = torch.stack([k[:8].mean(0), k[8:16].mean(0)])
    assert_close("lse", lse, torch.logsumexp(q[16:] @ means.T * 8**-0.5, 1) + math.log(8))
