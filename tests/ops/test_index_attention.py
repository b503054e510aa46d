"""Attention by a learned index: the tiled op against its definition, and what must hold of both."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ops.index_attention import (
    Index,
    IndexedOutput,
    IndexSpec,
    attend_cached,
    audit_index,
    cached,
    group_means,
    group_starts,
    indexed_attention,
    interface,
)
from ops.index_attention.reference import reference_attention

HEADS, KV_HEADS, DIM, INDEX_HEADS, WIDTH = 4, 2, 6, 3, 5
BOUNDS = [0, 13, 13, 14, 25]
"""A long document, an empty one, a single token, and one that ends within a block."""
SPECS = {
    "dsa": IndexSpec("dsa", 1, 4),
    "msa": IndexSpec("msa", 4, 2),
    "qsa": IndexSpec("qsa", 3, 2),
}
by_rule = pytest.mark.parametrize("rule", SPECS)


def drawn(
    spec: IndexSpec, bounds: list[int] = BOUNDS, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Index]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    length, heads = bounds[-1], KV_HEADS if spec.by_head else INDEX_HEADS
    keys = normal(length, WIDTH)
    if spec.pools_keys:
        keys = group_means(keys, group_starts(bounds, spec.block_size), spec.block_size)
    weights = normal(length, heads) if spec.rule == "dsa" else None
    index = Index(normal(length, heads, WIDTH), keys, weights)
    kv = (normal(length, KV_HEADS, DIM), normal(length, KV_HEADS, DIM))
    return normal(length, HEADS, DIM), *kv, index


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


@by_rule
@pytest.mark.parametrize("dense", [False, True])
def test_tiles_give_the_definition_and_its_gradients(rule, dense, monkeypatch):
    """Also where a tile ends within a block, and a document within a tile."""
    monkeypatch.setattr(interface, "TILE_VALUES", 150)
    spec = SPECS[rule]
    q, k, v, index = drawn(spec)
    counts = torch.arange(len(q)) % 5 != 2
    ours, theirs = leaves(q, k, v, *index), leaves(q, k, v, *index)
    found = indexed_attention(
        *ours[:3], Index(*ours[3:]), BOUNDS, spec, dense=dense, teach=True, token_mask=counts
    )
    want = reference_attention(*theirs, BOUNDS, spec, dense)
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.divergence, (want.divergence * counts).sum())
    assert want.divergence.max() > 0.1

    # Both outputs at once: what each of them reaches must not reach the other's inputs.
    into = torch.randn_like(q)
    for out, value in (
        (found.out, found.divergence),
        (want.out, (want.divergence * counts).sum()),
    ):
        ((out * into).sum() + 0.7 * value).backward()
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad)


@by_rule
def test_gradients_are_those_of_differences(rule):
    """The attention's reach queries, keys and values; the divergence's reach the index alone."""
    spec, bounds = SPECS[rule], [0, 7]
    q, k, v, index = drawn(spec, bounds)
    qkv = leaves(q, k, v)
    assert torch.autograd.gradcheck(
        lambda *x: indexed_attention(*x, index, bounds, spec, teach=True).out, qkv, fast_mode=True
    )
    parts = [x for x in leaves(*index) if x is not None]

    def taught(*x: Tensor) -> Tensor:
        found = Index(*x) if len(x) == 3 else Index(*x, None)
        return indexed_attention(q, k, v, found, bounds, spec, teach=True).divergence

    assert torch.autograd.gradcheck(taught, parts, fast_mode=True)
    both = indexed_attention(*qkv, Index(*leaves(*index)), bounds, spec, teach=True)
    for grad in torch.autograd.grad(both.divergence, qkv, materialize_grads=True):
        assert not grad.any()


@by_rule
def test_documents_within_dense_length_are_attended_to_densely(rule):
    spec = SPECS[rule]
    bounds = [0, spec.dense_length, 2 * spec.dense_length - 1]
    q, k, v, index = drawn(spec, bounds)
    found = indexed_attention(q, k, v, index, bounds, spec)
    for begin, end in itertools.pairwise(bounds):
        part = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(
            *part, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(found.out[begin:end], want.transpose(0, 1))
    longer = [0, spec.dense_length + 1]
    q, k, v, index = drawn(spec, longer)
    sparse, dense = (
        indexed_attention(q, k, v, index, longer, spec, dense=dense).out for dense in (False, True)
    )
    assert (sparse[-1] - dense[-1]).abs().max() > 1e-6


@by_rule
@pytest.mark.parametrize("dense", [False, True])
def test_later_tokens_and_other_documents_change_no_bit(rule, dense):
    spec = SPECS[rule]
    bounds, at = [0, 17, 30], 9
    first = drawn(spec, bounds, torch.float32)
    other = drawn(spec, bounds, torch.float32, seed=1)

    def changed(x: Tensor | None, y: Tensor | None, kept: int) -> Tensor | None:
        return None if x is None or y is None else torch.cat((x[:kept], y[kept:]))

    kept = [at] * 6
    if spec.pools_keys:
        kept[4] = at // spec.block_size
    flat = [(*x[:3], *x[3]) for x in (first, other)]
    mixed = [changed(*pair, n) for *pair, n in zip(*flat, kept, strict=True)]
    outs = [
        indexed_attention(*x[:3], Index(*x[3:]), bounds, spec, dense=dense).out
        for x in (flat[0], mixed)
    ]
    assert torch.equal(outs[0][:at], outs[1][:at])
    assert not torch.equal(outs[0][at:], outs[1][at:])


@by_rule
def test_a_document_alone_is_what_it_is_in_a_row(rule):
    spec = SPECS[rule]
    q, k, v, index = drawn(spec)
    whole = indexed_attention(q, k, v, index, BOUNDS, spec, teach=True)
    parts: list[IndexedOutput] = []
    first_key = 0
    for begin, end in itertools.pairwise(BOUNDS):
        keys = slice(begin, end)
        if spec.pools_keys:
            keys = slice(first_key, first_key := first_key + (end - begin) // spec.block_size)
        rows = slice(begin, end)
        weights = None if index.weights is None else index.weights[rows]
        own = Index(index.queries[rows], index.keys[keys], weights)
        bounds = [0, end - begin]
        parts.append(indexed_attention(q[rows], k[rows], v[rows], own, bounds, spec, teach=True))
    torch.testing.assert_close(torch.cat([p.out for p in parts]), whole.out)
    torch.testing.assert_close(sum(p.divergence for p in parts), whole.divergence)
    assert sum(int(p.num_chosen) for p in parts) == int(whole.num_chosen)


@by_rule
def test_equal_scores_go_to_lower_blocks_and_repeat_bit_for_bit(rule):
    """relu makes zeros: an index of zeros has nothing but ties."""
    spec = SPECS[rule]
    q, k, v, index = drawn(spec, [0, 25], torch.float32)
    zeros = Index(*(None if x is None else -0.0 * x for x in index))
    ours = indexed_attention(q, k, v, zeros, [0, 25], spec, teach=True)
    want = reference_attention(q, k, v, *zeros, [0, 25], spec)
    torch.testing.assert_close(ours.out, want.out)
    first = {"dsa": [0, 1, 2, 3], "msa": [*range(4), 24], "qsa": [*range(6), 24]}[rule]
    assert want.chosen[0, 24].nonzero()[:, 0].tolist() == first
    again = indexed_attention(q, k, v, zeros, [0, 25], spec, teach=True)
    assert torch.equal(ours.out, again.out) and torch.equal(ours.divergence, again.divergence)


@by_rule
@pytest.mark.parametrize("pooled", [False, True])
def test_a_cache_gives_what_the_whole_row_gives(rule, pooled, monkeypatch):
    """Tokens one by one and several at a time, over two rows of different lengths; of lists, and by
    a mask where lists would have more rows than there are; all at once and in runs.
    """
    spec, lengths, room = SPECS[rule], (17, 11), 20
    rows = [drawn(spec, [0, n], seed=n) for n in lengths]
    want = [
        indexed_attention(q, k, v, index, [0, n], spec).out
        for (q, k, v, index), n in zip(rows, lengths, strict=True)
    ]

    def padded(x: Tensor, size: int) -> Tensor:
        fill = torch.full((size - len(x), *x.shape[1:]), 1e3, dtype=x.dtype)
        return torch.cat((x, fill))

    # rows of a longer cache, as decoding sees them
    held = [torch.stack([padded(row[i], room + 3) for row in rows])[:, :room] for i in (1, 2)]
    size = room // spec.block_size if spec.pools_keys else room
    held.append(torch.stack([padded(row[3].keys, size) for row in rows]))
    places = None
    if pooled:
        places = torch.randperm(70)[: 2 * room].view(2, room)
        for number, x in enumerate(held[: 2 if spec.pools_keys else 3]):
            pool = torch.full((70, *x.shape[2:]), 1e3, dtype=x.dtype)
            pool[places.flatten()] = x.flatten(0, 1)
            held[number] = pool
    for new, most in ((1, 2**20), (4, 2**20), (4, 200), (9, 2**20), (9, 200)):
        monkeypatch.setattr(cached, "HELD_VALUES", most)
        take = [slice(n - new, n) for n in lengths]
        weights = None
        if spec.rule == "dsa":
            weights = torch.stack([r[3].weights[t] for r, t in zip(rows, take, strict=True)])
        found = attend_cached(
            torch.stack([r[0][t] for r, t in zip(rows, take, strict=True)]),
            *held[:2],
            torch.stack([r[3].queries[t] for r, t in zip(rows, take, strict=True)]),
            held[2],
            weights,
            torch.tensor([[*range(n - new, n)] for n in lengths]),
            spec,
            places,
        )
        for out, whole, t in zip(found, want, take, strict=True):
            torch.testing.assert_close(out, whole[t])


@by_rule
def test_a_new_token_reads_what_it_chose_alone(rule):
    """What it did not choose may be no number: a mask would make of it none."""
    spec, length = SPECS[rule], 40
    q, k, v, index = drawn(spec, [0, length])
    want = reference_attention(q, k, v, *index, [0, length], spec)
    for head in range(KV_HEADS):
        unseen = ~want.chosen[head % len(want.chosen), -1]
        k[unseen, head], v[unseen, head] = torch.nan, torch.nan
    last = slice(length - 1, length)
    found = attend_cached(
        q[None, last],
        k[None],
        v[None],
        index.queries[None, last],
        index.keys[None],
        None if index.weights is None else index.weights[None, last],
        torch.tensor([[length - 1]]),
        spec,
    )
    torch.testing.assert_close(found[0], want.out[last])


@by_rule
def test_audited_rows_have_the_recall_of_the_definition(rule):
    spec = SPECS[rule]
    q, k, v, index = drawn(spec)
    rows = [0, 5, 12, 13, 20, 24]
    want = reference_attention(q, k, v, *index, BOUNDS, spec).recall[rows]
    found = audit_index(q, k, index, BOUNDS, spec, rows).recall
    torch.testing.assert_close(found, want.float())
    assert want.min() < 0.9


@by_rule
def test_half_precision_is_computed_in_single(rule):
    spec = SPECS[rule]
    q, k, v, index = drawn(spec, dtype=torch.bfloat16)
    found = indexed_attention(q, k, v, index, BOUNDS, spec)
    wide = Index(*(None if x is None else x.float() for x in index))
    want = indexed_attention(q.float(), k.float(), v.float(), wide, BOUNDS, spec).out
    assert torch.equal(found.out, want.bfloat16())


@by_rule
def test_an_index_that_learns_finds_what_attention_looks_at(rule):
    """Gradient descent on the divergence alone: recall rises, and beats that of a drawn index."""
    spec, bounds = SPECS[rule], [0, 64]
    q, k, v, index = drawn(spec, bounds, torch.float32)
    q = 3 * q
    rows = [*range(20, 64)]
    before = audit_index(q, k, index, bounds, spec, rows).recall.mean()
    parts = [x for x in leaves(*index) if x is not None]
    optimizer = torch.optim.Adam(parts, lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        found = Index(*parts) if len(parts) == 3 else Index(*parts, None)
        loss = indexed_attention(q, k, v, found, bounds, spec, dense=True, teach=True).divergence
        loss.backward()
        optimizer.step()
    after = audit_index(q, k, Index(*parts, *[None] * (3 - len(parts))), bounds, spec, rows)
    assert after.recall.mean() > before + 0.15


def test_what_does_not_fit_is_refused():
    for arguments, words in (
        (("dsa", 4, 8), "rule=dsa chooses single tokens"),
        (("msa", 4, 0), "top_k is 0"),
        (("nsa", 4, 1), "choose one of dsa, msa, qsa"),
    ):
        with pytest.raises(ValueError, match=words):
            IndexSpec(*arguments)
    q, k, v, index = drawn(SPECS["msa"])
    with pytest.raises(ValueError, match="an index head for each of the 2"):
        three = index._replace(queries=index.queries.repeat(1, 2, 1)[:, :3])
        indexed_attention(q, k, v, three, BOUNDS, SPECS["msa"])
    with pytest.raises(ValueError, match=r"weights of the index have shape None"):
        indexed_attention(q, k, v, index._replace(weights=None), BOUNDS, SPECS["dsa"])
    with pytest.raises(ValueError, match="bounds must rise"):
        indexed_attention(q, k, v, index, [0, 9, 8, 25], SPECS["msa"])
