"""rank_lse=super: blocks are ranked by shares of an estimated softmax
(ops/sparse_attention/README.md, One pass).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ops.sparse_attention import (
    SelectionNoise,
    SparseAttentionSpec,
    chunked,
    interface,
    sparse_attention,
)
from ops.sparse_attention.blocks import block_table
from ops.sparse_attention.chunked import super_blocks
from ops.sparse_attention.hierarchy import _State
from ops.sparse_attention.noise import NO_NOISE
from ops.sparse_attention.paged import decode_pages
from ops.sparse_attention.problem import Problem, nothing_selected
from ops.sparse_attention.ranking import block_of_key, value_of_key
from ops.sparse_attention.reference import (
    coarse_logits,
    estimated_lse,
    pooled,
    reference_attention,
    reference_blocks,
)
from ops.testing import assert_close
from tests.ops.test_sparse_attention import BACKENDS, SMALL, Inputs, as_mask, draw, weights

SUPER = replace(SMALL, rank_lse="super", fanout=2)
LENGTHS = (0, 37, 1, 0, 121, 7, 16)
SPECS = {
    "small": SUPER,
    "three blocks": replace(SUPER, fanout=3, top_k=3),
    "longer than most": replace(SUPER, fanout=8),
    "order 0": replace(SUPER, order=0),
    "error gain": replace(SUPER, score="error_gain", fanout=3),
    "one entry a block": replace(SUPER, coarse_block_size=8, max_variance=4.0),
    "no window": replace(SUPER, window_size=0, num_sink_blocks=0),
    "dense at first": replace(SUPER, min_sparse_length=40),
}


def select_by_definition(x: Inputs, spec: SparseAttentionSpec, **given) -> torch.Tensor:
    """[Hk, T, M] bool, in fp64."""
    wide = (y.double() for y in x[:3])
    given = {k: y.double() if isinstance(y, torch.Tensor) else y for k, y in given.items()}
    return reference_attention(*wide, x.cu_seqlens, spec, **given).selected


@pytest.mark.parametrize("name", SPECS)
def test_back_ends_select_what_the_definition_selects(name):
    x = draw(LENGTHS, dim=16, scale=1.5, dtype=torch.float32)
    given = {"small": weights(x), "no window": {"noise": SelectionNoise(5, 0.7)}}.get(name, {})
    expected = select_by_definition(x, SPECS[name], **given)
    for backend in BACKENDS:
        found = sparse_attention(*x, SPECS[name], backend=backend, **given).selected
        assert torch.equal(as_mask(found, expected.shape[2]), expected)
    exact = sparse_attention(*x, replace(SPECS[name], rank_lse="exact"), **given).selected
    assert not torch.equal(exact, found), "the estimate changes nothing here"


def test_the_estimate_is_the_sum_over_whole_super_blocks_and_the_blocks_behind_them():
    """From the tokens themselves, query by query: variances within and between entries are those of
    the super-block's tokens.
    """
    spec = replace(SUPER, fanout=3, max_variance=0.9)
    x = draw((61, 90), heads=2, kv_heads=1, dim=4)
    blocks = reference_blocks(x.cu_seqlens, spec.block_size)
    grouped = x.q.unflatten(1, (1, 2)).transpose(0, 1)
    mean, var = pooled(x.k, blocks, spec, spec.coarse_block_size)
    c, _ = coarse_logits(grouped, mean, var, spec.coarse_block_size, spec)
    own, block = blocks.of_token, torch.arange(len(blocks.start))
    past = (block < own[:, None]) & (block >= blocks.first[own][:, None])
    found = estimated_lse(grouped, c, mean, var, past, blocks, spec)

    def logit(q: torch.Tensor, tokens: torch.Tensor) -> float:
        spread = (tokens - tokens.mean(0)).square().mean(0)
        kappa = min(0.9, 0.5 * float((q.square() * spread).sum()) / 4)
        return float(q @ tokens.mean(0)) / 2 + math.log(len(tokens)) + kappa

    for token in (20, 59, 60, 80, 111, 150):
        begin = 0 if token < 61 else 61
        whole = (token - begin) // 8 // 3 * 24
        cuts = [*range(0, whole, 24), *range(whole, (token - begin) // 8 * 8 + 1, 4)]
        for head in range(2):
            q = x.q[token, head]
            parts = [logit(q, x.k[begin + a : begin + b, 0]) for a, b in itertools.pairwise(cuts)]
            total = math.log(sum(map(math.exp, parts)))
            assert abs(float(found[0, token, head]) - total) < 1e-12


def test_super_blocks_are_those_of_two_levels():
    x = draw(LENGTHS)
    two = replace(SMALL, num_levels=2, fanout=3)
    table = block_table(x.cu_seqlens, len(x.q), two)
    problem = Problem(
        q=x.q,
        k=x.k,
        v=x.v,
        bias=None,
        sink=None,
        selected=nothing_selected(x.q, 2),
        entries=None,
        table=table,
        spec=two,
        exact=True,
        coarse=True,
    )
    theirs = _State(problem, None, None)
    ours = super_blocks(theirs.entries, table, replace(SUPER, fanout=3))
    assert ours is not None
    length = ours.table.end - ours.table.start
    whole = (length == 24).nonzero()[:, 0]
    assert torch.equal(ours.table.start[whole], table.start[theirs.super_start])
    for name in ("key_mean", "key_var"):
        assert_close(name, getattr(ours.entries, name)[:, whole], getattr(theirs.supers, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_without_a_whole_super_block_are_ranked_exactly(backend):
    x = draw((60, 30, 63), scale=2.0)
    spec = replace(SUPER, fanout=8)
    ours = sparse_attention(*x, spec, backend=backend)
    exact = sparse_attention(*x, replace(spec, rank_lse="exact"), backend=backend)
    assert torch.equal(ours.selected, exact.selected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_shares_beyond_every_estimate_stay_finite_and_tie_by_their_blocks(backend, dtype):
    """Three needles that a super-block's mean does not show, of logits 400, 300 and 200."""
    q = torch.ones(200, 1, 16, dtype=dtype)
    k = torch.full((200, 1, 16), -10.0, dtype=dtype)
    for place, logit in ((9, 200.0), (17, 300.0), (41, 400.0)):
        k[place] = logit / 4
    spec = replace(SUPER, top_k=2, fanout=8, coarse_block_size=1, order=0)
    cu_seqlens = torch.tensor([0, 200])
    chosen = interface._backend(backend)
    table = block_table(cu_seqlens, 200, spec)
    entries = chosen.pool(k, k, table, spec)
    keys, mass = chosen.rank(q, entries, table, spec, None, NO_NOISE)
    blocks = block_of_key(keys)
    assert value_of_key(keys)[blocks >= 0].isfinite().all() and mass.isfinite().all()
    assert blocks[0, -1].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_of_pages_decode_what_the_whole_gives(dtype):
    """Rows of different lengths, of which none visits the host."""
    lengths, spec = (1, 15, 16, 17, 47, 64, 93), replace(SUPER, fanout=3, window_size=0)
    x = draw(lengths, dim=16, dtype=dtype)
    expected = sparse_attention(*x, spec)
    table = block_table(x.cu_seqlens, len(x.q), spec)
    found = chunked.pool(x.k, x.v, table, spec)
    num_pages, ends = 12, x.cu_seqlens[1:]
    keys, values = (torch.zeros(1 + 7 * num_pages, 8, 2, 16, dtype=dtype) for _ in range(2))
    pages = 1 + torch.arange(7 * num_pages).view(7, num_pages)
    entries = [torch.full((1 + 7 * num_pages, 2, 2, 16), 9.0, dtype=dtype) for _ in found]
    for row, (begin, end) in enumerate(itertools.pairwise(x.cu_seqlens)):
        for b, at in enumerate(range(int(begin), int(end), 8)):
            stop = min(at + 8, int(end))
            page = pages[row, b]
            keys[page, : stop - at], values[page, : stop - at] = x.k[at:stop], x.v[at:stop]
            block = int(table.block_of[at])
            if stop - at == 8:
                for held, new in zip(entries, found, strict=True):
                    held[page] = new[:, 2 * block : 2 * block + 2]
    out, _ = decode_pages(
        x.q[ends - 1], keys, values, type(found)(*entries), pages, torch.tensor(lengths), spec
    )
    assert_close("out", out, expected.out[ends - 1])
