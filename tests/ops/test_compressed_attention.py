"""Attention to a window and to pooled entries: pools and tiles against their definitions, and what
must hold of both.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ops.compressed_attention import (
    CompressedSpec,
    attend_held,
    audit_entries,
    choose_held,
    closed_windows,
    compressed_attention,
    gated_pool,
    interface,
)
from ops.compressed_attention.reference import reference_attention, reference_pool
from ops.index_attention import Index

HEADS, DIM, INDEX_HEADS, WIDTH = 3, 6, 4, 5
BOUNDS = [0, 17, 17, 18, 33]
"""A long document, an empty one, a single token, and one that ends within a window."""
SPECS = {
    "csa": CompressedSpec(4, 3, 2),
    "hca": CompressedSpec(3, 4),
    "window": CompressedSpec(5),
    "tokens": CompressedSpec(3, 1, 4),
    "two steps": CompressedSpec(3, 2, 3, 2, 2),
}
by_kind = pytest.mark.parametrize("kind", SPECS)


def closed(bounds: list[int], ratio: int) -> int:
    return sum((e - b) // ratio for b, e in itertools.pairwise(bounds)) if ratio else 0


def drawn(
    spec: CompressedSpec, bounds: list[int] = BOUNDS, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """q, kv, entries, index queries, keys and weights, sinks."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    length, number = bounds[-1], closed(bounds, spec.ratio)
    index: list[Tensor | None] = [None, None, None]
    if spec.top_k is not None:
        index = [
            normal(length, INDEX_HEADS, WIDTH),
            normal(number, WIDTH),
            normal(length, INDEX_HEADS),
        ]
    entries = normal(number, DIM) if spec.ratio else None
    return [normal(length, HEADS, DIM), normal(length, DIM), entries, *index, normal(HEADS)]


def leaves(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def attended(x: list, bounds: list[int], spec: CompressedSpec, **options):
    q, kv, entries, *index, sinks = x
    given = None if index[0] is None else Index(*index)
    return compressed_attention(q, kv, entries, given, sinks, bounds, spec, **options)


@pytest.mark.parametrize("overlap", [False, True])
def test_pools_are_gated_means_of_closed_windows(overlap):
    """Also next to documents that have none; the closed form of the gradients is autograd's."""
    torch.manual_seed(0)
    wide = 2 * DIM if overlap else DIM
    given = [torch.randn(*s, dtype=torch.float64) for s in ((33, wide), (33, wide), (4, wide))]
    ours, theirs = leaves(given), leaves(given)
    windows = closed_windows(BOUNDS, 4, torch.device("cpu"))
    found = gated_pool(*ours, windows, overlap)
    want = reference_pool(*theirs, BOUNDS, 4, overlap)
    assert found.shape == (7, DIM)
    torch.testing.assert_close(found, want)
    into = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, ours, into), torch.autograd.grad(want, theirs, into), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(
        lambda *x: gated_pool(*x, windows, overlap), ours, fast_mode=True
    )
    # Rows too short for any window have no entry, and no gradient.
    short = closed_windows([0, 3], 4, torch.device("cpu"))
    none = gated_pool(*(x[:3] for x in ours[:2]), ours[2], short, overlap)
    assert none.shape == (0, DIM)
    assert not any(g.any() for g in torch.autograd.grad(none.sum(), ours))


@by_kind
@pytest.mark.parametrize("dense", [False, True])
def test_tiles_give_the_definition_and_its_gradients(kind, dense, monkeypatch):
    """Also where a tile ends within a window of an entry, and a document within a tile."""
    monkeypatch.setattr(interface, "TILE_VALUES", 200)
    spec = SPECS[kind]
    teach = spec.top_k is not None
    counts = torch.arange(BOUNDS[-1]) % 5 != 2
    ours, theirs = leaves(drawn(spec)), leaves(drawn(spec))
    found = attended(ours, BOUNDS, spec, dense=dense, teach=teach, token_mask=counts)
    *most, sinks = theirs
    want = reference_attention(*most, sinks, BOUNDS, spec, dense)
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.divergence, (want.divergence * counts).sum())
    assert not teach or want.divergence.max() > 0.1

    into = torch.randn_like(found.out)
    for out, value in (
        (found.out, found.divergence),
        (want.out, (want.divergence * counts).sum()),
    ):
        ((out * into).sum() + 0.7 * value).backward()
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad)


@by_kind
def test_gradients_are_those_of_differences(kind):
    """Attention's reach everything but the index, the divergence's the index alone."""
    spec, bounds = SPECS[kind], [0, 10]
    x = leaves(drawn(spec, bounds))
    own = [i for i in (0, 1, 2, 6) if x[i] is not None]

    def out(*given: Tensor) -> Tensor:
        full = list(x)
        for i, tensor in zip(own, given, strict=True):
            full[i] = tensor
        return attended(full, bounds, spec, teach=spec.top_k is not None).out

    assert torch.autograd.gradcheck(out, [x[i] for i in own], fast_mode=True)
    if spec.top_k is None:
        return

    def taught(*given: Tensor) -> Tensor:
        return attended([*x[:3], *given, x[6]], bounds, spec, teach=True).divergence

    assert torch.autograd.gradcheck(taught, x[3:6], fast_mode=True)
    both = attended(x, bounds, spec, teach=True)
    for grad in torch.autograd.grad(both.divergence, [x[i] for i in own], materialize_grads=True):
        assert not grad.any()
    both = attended(x, bounds, spec, teach=True)
    for grad in torch.autograd.grad(both.out.sum(), x[3:6], materialize_grads=True):
        assert not grad.any()


@by_kind
@pytest.mark.parametrize("dense", [False, True])
def test_later_tokens_and_other_documents_change_no_bit(kind, dense):
    """Neither what is attended to nor, in the pool before it, an entry."""
    spec, x = SPECS[kind], drawn(SPECS[kind])
    at = 9
    before = attended(x, BOUNDS, spec, dense=dense).out
    changed = [None if t is None else t.clone() for t in x]
    for i in (0, 1, 3, 5):
        if changed[i] is not None:
            changed[i][at:] += 1.0
    for i in (2, 4):
        if changed[i] is not None:
            changed[i][at // spec.ratio :] -= 2.0
    after = attended(changed, BOUNDS, spec, dense=dense).out
    assert torch.equal(after[:at], before[:at]) and not torch.equal(after[at:], before[at:])

    content = torch.randn(BOUNDS[-1], 2 * DIM)
    other = content.clone()
    other[:17] += 1.0
    windows, bias = closed_windows(BOUNDS, 4, torch.device("cpu")), torch.randn(4, 2 * DIM)
    one, two = (gated_pool(c, c, bias, windows, True) for c in (content, other))
    assert torch.equal(one[4:], two[4:]) and not torch.equal(one[:4], two[:4])


@by_kind
@pytest.mark.parametrize("held", [1, 3, 8])
@pytest.mark.parametrize("pooled", [False, True])
def test_new_tokens_see_of_a_cache_what_they_see_in_the_row(kind, held, pooled):
    """Rows of different lengths, with rubbish after what is held; by lists of the chosen entries,
    and by a mask where there are as few entries as lists have.
    """
    spec = SPECS[kind]
    x = drawn(spec, [0, 14])
    whole = attended(x, [0, 14], spec).out
    rows = []
    for length in (14, 11):
        q, kv, entries, iq, ik, iw, sinks = x
        new = slice(length - held, length)
        first = length - held - spec.window + 1
        of_kv = torch.arange(first, length)
        keys = torch.where((of_kv < 0)[:, None], 9.0, kv[of_kv.clamp_min(0)])
        number = length // spec.ratio if spec.ratio else 0
        pads = None
        if entries is not None:
            pads = [t.clone() for t in (entries, ik if ik is not None else entries)]
            for t in pads:
                t[number:] = 5.0
            pads = [t[None] for t in pads]
        places = None
        if pooled and pads is not None:
            places = torch.randperm(20)[None, : pads[0].shape[1]]
            pools = [torch.full((20, t.shape[2]), 5.0, dtype=t.dtype) for t in pads]
            for pool, t in zip(pools, pads, strict=True):
                pool[places[0]] = t[0]
            pads = pools
        position, chosen = torch.arange(length)[None, new], None
        if iq is not None:
            chosen = choose_held(iq[None, new], pads[1], iw[None, new], position, spec, places)
        out = attend_held(
            q[None, new],
            keys[None],
            of_kv[None],
            None if pads is None else pads[0],
            chosen,
            sinks,
            position,
            spec,
            places,
        )
        rows.append((out[0], whole[new]))
    for found, want in rows:
        torch.testing.assert_close(found, want)


def test_a_new_token_reads_the_entries_that_it_chose_alone():
    """What it did not choose may be no number: a mask would make of it none."""
    spec, length = SPECS["csa"], 24
    q, kv, entries, iq, ik, iw, sinks = drawn(spec, [0, length])
    want = attended((q, kv, entries, iq, ik, iw, sinks), [0, length], spec)
    new = slice(length - 1, length)
    position = torch.tensor([[length - 1]])
    chosen = choose_held(iq[None, new], ik[None], iw[None, new], position, spec)
    unseen = torch.ones(len(entries), dtype=torch.bool)
    unseen[chosen.flatten()] = False
    assert unseen.any()
    entries[unseen] = torch.nan
    tokens = torch.arange(length - spec.window, length)
    found = attend_held(
        q[None, new], kv[None, tokens], tokens[None], entries[None], chosen, sinks, position, spec
    )
    torch.testing.assert_close(found[0], want.out[new])


def test_a_choice_is_followed_and_taught_by_what_it_gave_another_layer():
    """Values and gradients of the definition with what was chosen elsewhere."""
    spec = SPECS["two steps"]
    chosen = attended(drawn(spec), BOUNDS, spec).chosen
    assert chosen.shape == (BOUNDS[-1], 3) and chosen[:2].max() == 0
    ours, theirs = leaves(drawn(spec)), leaves(drawn(spec))
    for x in (ours, theirs):
        for i in (0, 3):
            x[i] = x[i].detach().flip(0).requires_grad_()  # it would have chosen otherwise
    own = attended(ours, BOUNDS, spec).chosen
    assert not torch.equal(own, chosen)
    found = attended(ours, BOUNDS, spec, teach=True, chosen=chosen)
    assert found.chosen is chosen
    want = reference_attention(*theirs, BOUNDS, spec, given=chosen)
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.divergence, want.divergence.sum())
    into = torch.randn_like(found.out)
    ((found.out * into).sum() + found.divergence).backward()
    ((want.out * into).sum() + want.divergence.sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)

    # Without teaching there is no need of an index, and before it chooses all entries are seen.
    alone = attended([*ours[:3], None, None, None, ours[6]], BOUNDS, spec, chosen=chosen)
    assert torch.equal(alone.out, found.out)
    everything = attended(ours, BOUNDS, spec, dense=True, chosen=chosen)
    assert torch.equal(everything.out, attended(ours, BOUNDS, spec, dense=True).out)
    rows = [3, 9, 16, 32]
    recall = audit_entries(*ours[:3], Index(*ours[3:6]), ours[6], BOUNDS, spec, rows, chosen)
    torch.testing.assert_close(recall.double(), want.recall[rows], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="chosen"):
        attended(ours, BOUNDS, spec, chosen=chosen[1:])


def test_two_steps_that_open_every_block_are_one():
    one, x = CompressedSpec(3, 2, 3), drawn(SPECS["two steps"])
    found = attended(x, BOUNDS, CompressedSpec(3, 2, 3, 4, 2))
    assert torch.equal(found.chosen, attended(x, BOUNDS, one).chosen)
    assert not torch.equal(found.chosen, attended(x, BOUNDS, SPECS["two steps"]).chosen)

    # Blocks whose best entries are equal: the lower ones are opened.
    x[3] = torch.zeros_like(x[3])
    chosen = attended(x, BOUNDS, CompressedSpec(3, 2, 8, 2, 2)).chosen
    assert sorted(chosen[16].tolist())[-4:] == [0, 1, 2, 3] and (chosen[16] < 0).sum() == 4


def test_equal_scores_go_to_the_lower_entry_and_the_audit_counts_what_is_lost():
    spec = SPECS["csa"]
    x = drawn(spec, [0, 25])
    x[3] = torch.zeros_like(x[3])  # every score is 0
    zero = attended(x, [0, 25], spec).out
    want = reference_attention(*x, [0, 25], spec)
    torch.testing.assert_close(zero, want.out)
    assert want.chosen[-1].nonzero().flatten().tolist() == [0, 1]

    x = drawn(spec)
    want = reference_attention(*x, BOUNDS, spec)
    rows = [1, 2, 8, 16, 17, 30, 32]
    found = audit_entries(*x[:3], Index(*x[3:6]), x[6], BOUNDS, spec, rows)
    there = want.recall[rows]
    torch.testing.assert_close(found.double(), there[~there.isnan()], rtol=1e-6, atol=1e-6)
    assert len(found) == 5 and found.min() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_kind
def test_half_precision_rounds_at_the_end_alone(kind, dtype):
    spec, x = SPECS[kind], drawn(SPECS[kind], dtype=dtype)
    found = attended(x, BOUNDS, spec)
    assert found.out.dtype == dtype
    wide = [None if t is None else t.float() for t in x]
    want = attended(wide, BOUNDS, spec).out
    torch.testing.assert_close(found.out, want.to(dtype), rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_refused():
    for options in (
        {"window": 0},
        {"window": 2, "ratio": -1},
        {"window": 2, "top_k": 3},
        {"window": 2, "top_k_blocks": 3},
        {"window": 2, "ratio": 1, "top_k": 2, "top_k_blocks": 0},
        {"window": 2, "index_block_size": 0},
    ):
        with pytest.raises(ValueError, match="is"):
            CompressedSpec(**options)
    q, kv, entries, iq, ik, iw, sinks = drawn(SPECS["csa"])
    spec, index = SPECS["csa"], Index(iq, ik, iw)
    with pytest.raises(ValueError, match="closed window"):
        compressed_attention(q, kv, entries[1:], index, sinks, BOUNDS, spec)
    with pytest.raises(ValueError, match="must be given"):
        compressed_attention(q, kv, entries, None, sinks, BOUNDS, spec)
    with pytest.raises(ValueError, match="rise from 0"):
        compressed_attention(q, kv, entries, index, sinks, [0, 9, 8, 33], spec)
    with pytest.raises(ValueError, match="goes with entries"):
        compressed_attention(q, kv, None, None, sinks, BOUNDS, SPECS["hca"])
    with pytest.raises(ValueError, match="weights of the index"):
        compressed_attention(q, kv, entries, index._replace(weights=None), sinks, BOUNDS, spec)
