"""An index inside sparse attention: what it chooses, what teaches it, and what must hold whatever
it chooses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.index_attention import Teacher, select_blocks, select_held, teach_index, within
from ops.index_attention.reference import reference_within
from ops.sparse_attention import (
    SparseAttentionSpec,
    audit_rows,
    cpp_backend,
    decode,
    decode_pages,
    pool_entries,
    sparse_attention,
)
from ops.sparse_attention.cache import EntryCache

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 6
BOUNDS = [0, 33, 33, 34, 55]
"""A long document, an empty one, a single token, and one that ends within a block."""
SPEC = SparseAttentionSpec(block_size=4, coarse_block_size=2, top_k=3, window_size=5)
SPECS = {
    "plain": SPEC,
    "means": SparseAttentionSpec(
        block_size=4, coarse_block_size=4, top_k=2, window_size=1, num_sink_blocks=0, order=0
    ),
    "long": SparseAttentionSpec(
        block_size=4, coarse_block_size=2, top_k=2, window_size=4, min_sparse_length=14
    ),
}
by_spec = pytest.mark.parametrize("name", SPECS)


def drawn(length: int = BOUNDS[-1], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, and the queries and keys of an index."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        *((length, HEADS, DIM), (length, KV_HEADS, DIM), (length, KV_HEADS, DIM)),
        *((length, KV_HEADS, WIDTH), (length, WIDTH)),
    )
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def corrections() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = BOUNDS[-1]
    return {
        "bias": torch.randn(length, HEADS, generator=generator, dtype=torch.float64),
        "sink": torch.randn(HEADS, generator=generator, dtype=torch.float64),
        "pool_logits": torch.randn(
            length, KV_HEADS, 2, DIM, generator=generator, dtype=torch.float64
        ),
    }


def taught(
    parts: list[Tensor],
    spec: SparseAttentionSpec,
    selected: Tensor | None,
    bounds: list[int] = BOUNDS,
    token_mask: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The op's output under a selection (None: its own), and the index's divergence."""
    q, k, v, queries, keys = parts
    cu = torch.tensor(bounds)
    found = sparse_attention(q, k, v, cu, spec, selected=selected, backend=backend, **options)
    entries = pool_entries(q, k, v, cu, spec, options.get("pool_logits"), backend)
    teacher = Teacher(
        q.detach(), k.detach(), entries, found.selected, found.lse.detach(), options.get("bias")
    )
    return found.out, teach_index(queries, keys, teacher, bounds, spec, token_mask)


@pytest.mark.parametrize(
    ("name", "by_index", "corrected"),
    [("plain", True, True), ("plain", False, False), ("means", True, False), ("long", True, True)],
)
def test_tiles_give_the_definition_and_its_gradients(name, by_index, corrected, monkeypatch):
    """Also where a tile ends within a block, and a document within a tile."""
    monkeypatch.setattr(within, "TILE_VALUES", 200)
    spec, options = SPECS[name], corrections() if corrected else {}
    parts = [x.requires_grad_() for x in drawn()]
    counts = torch.arange(len(parts[0])) % 5 != 2
    want = reference_within(*parts, BOUNDS, spec, by_index, **options)
    expected = (want.divergence * counts).sum()
    assert expected > 1
    wanted = torch.autograd.grad(expected, parts[3:])

    selected = select_blocks(*parts[3:], BOUNDS, spec)
    mask = torch.zeros_like(want.chosen)
    for head, token, slot in (selected >= 0).nonzero().tolist():
        mask[head, token, selected[head, token, slot]] = True
    assert torch.equal(mask, want.chosen)

    out, found = taught(parts, spec, selected if by_index else None, token_mask=counts, **options)
    torch.testing.assert_close(out, want.attention.out)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(3 * found, parts, materialize_grads=True)
    assert not any(g.any() for g in grads[:3])
    for ours, theirs in zip(grads[3:], wanted, strict=True):
        torch.testing.assert_close(ours, 3 * theirs)


def test_gradients_are_those_of_differences():
    bounds = [0, 23]
    parts = drawn(23)
    selected = select_blocks(*parts[3:], bounds, SPEC)
    index = [x.requires_grad_() for x in parts[3:]]
    assert torch.autograd.gradcheck(
        lambda *x: taught([*parts[:3], *x], SPEC, selected, bounds)[1], index, fast_mode=True
    )


def test_masses_are_those_of_the_op():
    """What teaches the index is the op's own softmax, without what is forced."""
    spec = SparseAttentionSpec(
        block_size=4, coarse_block_size=2, top_k=2, window_size=1, num_sink_blocks=0
    )
    bounds, (q, k, v, queries, keys) = [0, 32], drawn(32)
    cu = torch.tensor(bounds)
    found = sparse_attention(q, k, v, cu, spec, selected=select_blocks(queries, keys, bounds, spec))
    teacher = Teacher(q, k, pool_entries(q, k, v, cu, spec), found.selected, found.lse, None)
    (tile,) = within._tiles(bounds, spec, 1)
    masses = within._masses(teacher, tile, tile.candidates(spec, q), spec)
    share = (found.tail_mass + found.selected_mass).unflatten(1, (KV_HEADS, -1)).sum(2).T
    torch.testing.assert_close(masses.sum(-1), share)


def test_a_given_selection_has_the_same_bits_for_any_number_of_threads():
    """In C++; what the index computes itself are products of torch."""
    if reason := cpp_backend.unavailable():
        pytest.skip(reason)
    parts = drawn(dtype=torch.float32)
    selected = select_blocks(*parts[3:], BOUNDS, SPEC)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in parts[:3]]
            out = sparse_attention(
                *leaves, torch.tensor(BOUNDS), SPEC, selected=selected, backend="cpp"
            ).out
            out.square().sum().backward()
            outs.append([out, *(x.grad for x in leaves)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)


def test_equal_scores_go_to_the_lower_block():
    *_, queries, keys = drawn(40)
    selected = select_blocks(torch.zeros_like(queries), keys, [0, 40], SPEC)
    # own block 9, two local blocks, one first block: 1 to 7 are candidates
    assert selected[:, -1].tolist() == [[1, 2, 3]] * KV_HEADS
    assert (selected[:, 11] == -1).all()


def test_later_tokens_and_other_documents_change_nothing():
    *_, queries, keys = drawn()
    whole = select_blocks(queries, keys, BOUNDS, SPEC)
    rest = torch.arange(len(queries)) >= 25
    other = [torch.where(rest.view(-1, *[1] * (x.dim() - 1)), x + 3, x) for x in (queries, keys)]
    assert torch.equal(select_blocks(*other, BOUNDS, SPEC)[:, :25], whole[:, :25])
    alone = select_blocks(queries[34:], keys[34:], [0, 21], SPEC)
    # blocks of the documents before: nine of the first one and one of the single token
    assert torch.equal(torch.where(alone < 0, -1, alone + 10), whole[:, 34:])


@by_spec
@pytest.mark.parametrize("corrected", [True, False])
def test_decoding_under_a_given_selection_is_the_packed_op(name, corrected):
    """From a cache and from pages, token by token."""
    spec, length = SPECS[name], 33
    q, k, v, queries, keys = (x[:length] for x in drawn())
    options = {n: x[:length] if n == "bias" else x for n, x in corrections().items()}
    options = {n: options[n] for n in ("bias", "sink")} if corrected else {}
    cu = torch.tensor([0, length])
    selected = select_blocks(queries, keys, [0, length], spec)
    want = sparse_attention(q, k, v, cu, spec, selected=selected, **options).out
    cache = EntryCache(spec, 1, length, KV_HEADS, DIM, q.dtype, q.device)
    cache.update(k[None], v[None], 0)
    held = select_held(queries[None], keys[None], torch.arange(length)[None], spec)
    assert torch.equal(held[0].transpose(0, 1), selected.long())

    size, r = spec.block_size, spec.entries_per_block
    number = -(-length // size)
    paged = [torch.zeros(number * size, *x.shape[1:], dtype=x.dtype) for x in (k, v)]
    for pages, x in zip(paged, (k, v), strict=True):
        pages[:length] = x
    paged = [x.unflatten(0, (number, size)) for x in paged]
    entries = type(cache.entries)(
        *(
            torch.cat((x[0], x.new_zeros(KV_HEADS, number * r - x.shape[2], DIM)), 1)
            .unflatten(1, (number, r))
            .transpose(0, 1)
            for x in cache.entries
        )
    )
    for t in range(length):
        own = {n: x[t : t + 1] if n == "bias" else x for n, x in options.items()}
        # candidates are known by then; a cache that has seen more must not matter
        found, _ = decode(
            q[t : t + 1],
            k[None, : t + 1],
            v[None, : t + 1],
            cache.entries,
            t + 1,
            spec,
            selected=held[:, t],
            **own,
        )
        torch.testing.assert_close(found[0], want[t])
        found, _ = decode_pages(
            q[t : t + 1],
            *paged,
            entries,
            torch.arange(number)[None],
            torch.tensor([t + 1]),
            spec,
            selected=held[:, t],
            **own,
        )
        torch.testing.assert_close(found[0], want[t])


@by_spec
def test_certificate_and_audit_hold_for_any_choice(name):
    """The best, the worst, a random one and none: the error is never above its bound."""
    spec = SPECS[name]
    q, k, v, queries, keys = drawn()
    cu, rows = torch.tensor(BOUNDS), torch.arange(0, BOUNDS[-1])
    # an index that knows the queries, and the opposite of it
    grouped = q.unflatten(1, (KV_HEADS, -1)).mean(2)
    choices = {
        "best": select_blocks(grouped, k.mean(1), BOUNDS, spec),
        "worst": select_blocks(-grouped, k.mean(1), BOUNDS, spec),
        "random": select_blocks(queries, keys, BOUNDS, spec),
    }
    choices["none"] = torch.full_like(choices["best"], -1)
    for choice, selected in choices.items():
        found = sparse_attention(q, k, v, cu, spec, selected=selected)
        audit = audit_rows(q, k, v, cu, spec, found, rows)
        assert (audit.error <= audit.bound + audit.rounding).all(), choice
        assert (audit.error > 1e-6).any()
        lost = audit.candidate_mass - audit.chosen_mass
        assert (audit.chosen_mass >= 0).all() and (lost >= -1e-9).all()
        assert bool(audit.chosen_mass.any()) == (choice != "none")


def test_two_levels_take_no_selection():
    spec = SparseAttentionSpec(
        block_size=4, coarse_block_size=2, top_k=2, window_size=4, num_levels=2, fanout=2
    )
    q, k, v, *_ = drawn(8)
    entries = EntryCache(spec, 1, 8, KV_HEADS, DIM, q.dtype, q.device).entries
    selected = torch.full((1, KV_HEADS, 1), -1)
    with pytest.raises(ValueError, match="leave selected out"):
        decode(q[-1:], k[None], v[None], entries, 8, spec, selected=selected)
    pages = [x.unflatten(0, (2, 4)) for x in (k, v)]
    with pytest.raises(ValueError, match="leave selected out"):
        decode_pages(
            q[-1:],
            *pages,
            entries,
            torch.arange(2)[None],
            torch.tensor([8]),
            spec,
            selected=selected,
        )
