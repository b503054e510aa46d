"""A bounded cache: what is resident, in training and in decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ops.sparse_attention.resident_cache as resident_cache
from ops.grouped_mlp.fp8 import rounded_rows
from ops.sparse_attention import SparseAttentionSpec, audit_rows, pool_entries, sparse_attention
from ops.sparse_attention.cache import pooled
from ops.sparse_attention.entries import CoarseEntries, StoredEntries
from ops.sparse_attention.resident import Kept, select_resident
from ops.sparse_attention.resident_cache import NewTokens, ResidentCache, ResidentPages

HEADS, KV_HEADS, DIM = 4, 2, 8
SPEC = SparseAttentionSpec(
    block_size=4,
    coarse_block_size=2,
    top_k=2,
    window_size=4,
    resident_blocks=2,
    resident_interval=8,
    resident_decay=0.5,
)
ALL = SparseAttentionSpec(
    block_size=4,
    coarse_block_size=2,
    top_k=2,
    window_size=4,
    resident_blocks=1000,
    resident_interval=8,
)
BOUNDS = [0, 45, 45, 46, 75]


def drawn(length: int = BOUNDS[-1], rows: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    shapes = [(rows * length, h, DIM) for h in heads]
    return [2 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def kept(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], spec=SPEC) -> Kept:
    entries = pool_entries(q, k, v, torch.tensor(bounds), spec)
    return select_resident(q, entries, bounds, spec, lists=True)


def by_hand(q: Tensor, k: Tensor, spec: SparseAttentionSpec) -> list[list[set[int]]]:
    """Candidates of every query of one document, by key/value head, from the rule in words."""
    size, each = spec.block_size, spec.interval_blocks
    number = -(-len(q) // size)
    found: list[list[set[int]]] = []
    for head in range(KV_HEADS):
        pool: set[int] = set()
        mass = [0.0] * number
        of_head = []
        for t in range(len(q)):
            own = t // size
            if t % size == 0 and own and own % each == 0:
                held = pool | set(range(own - each, own))
                held -= set(range(spec.num_sink_blocks))
                best = sorted(held, key=lambda m: (-mass[m], m))
                pool = set(best[: spec.resident_blocks])
                mass = [m * spec.resident_decay for m in mass]
            local = max(0, own - spec.num_local_blocks + 1)
            recent = set(range(own // each * each, number))
            of_head.append(
                {m for m in pool | recent if min(spec.num_sink_blocks, local) <= m < local}
            )
            for g in range(HEADS // KV_HEADS) if own else ():
                query = q[t, head * (HEADS // KV_HEADS) + g] * DIM**-0.5
                logits = []
                for begin in range(0, own * size, spec.coarse_block_size):
                    keys = k[begin : begin + spec.coarse_block_size, head]
                    mean = keys.mean(0)
                    var = (keys - mean).square().mean(0)
                    extra = (0.5 * query.square() @ var).clamp_max(spec.max_variance)
                    logits.append(query @ mean + extra)
                probs = torch.stack(logits).softmax(0).unflatten(0, (own, -1)).sum(1)
                for m, p in enumerate(probs.tolist()):
                    mass[m] += p
        found.append(of_head)
    return found


def test_what_is_resident_is_the_rule_in_words():
    q, k, v = drawn()
    found = kept(q, k, v, BOUNDS)
    assert found.candidates is not None
    evicted = 0
    for begin, end, first in ((0, 45, 0), (45, 46, 12), (46, 75, 13)):
        wanted = by_hand(q[begin:end], k[begin:end], SPEC)
        for head in range(KV_HEADS):
            for t in range(end - begin):
                ids = found.candidates[head, begin + t].tolist()
                assert {m - first for m in ids if m >= 0} == wanted[head][t], (head, t)
                selected = {int(m) - first for m in found.selected[head, begin + t] if m >= 0}
                assert selected <= wanted[head][t]
                assert len(selected) == min(SPEC.top_k, len(wanted[head][t]))
                evicted += t // 4 - 1 - 1 > len(wanted[head][t])
    assert evicted > 20


def test_a_pool_for_all_blocks_is_sparse_attention():
    q, k, v = drawn()
    want = sparse_attention(q, k, v, torch.tensor(BOUNDS), ALL)
    assert torch.equal(kept(q, k, v, BOUNDS, ALL).selected, want.selected)


def test_later_tokens_and_other_documents_change_nothing():
    q, k, v = drawn()
    whole = kept(q, k, v, BOUNDS).selected
    later = [torch.where((torch.arange(len(x)) >= 30).view(-1, 1, 1), x + 3, x) for x in (q, k, v)]
    assert torch.equal(kept(*later, BOUNDS).selected[:, :30], whole[:, :30])
    alone = kept(*(x[46:] for x in (q, k, v)), [0, 29]).selected
    assert torch.equal(torch.where(alone < 0, -1, alone + 13), whole[:, 46:])


@pytest.mark.parametrize(
    ("prompt", "piece"), [(0, 1), (1, 1), (24, 1), (29, 1), (0, 61), (3, 13), (29, 5)]
)
def test_decoding_from_the_bounded_cache_is_the_packed_op(prompt, piece):
    """Two rows, in pieces of any length, whatever the prompt was; a cache of less than all
    tokens.
    """
    rows, length = 2, 61
    q, k, v = drawn(length, rows)
    bounds = [0, length, 2 * length]
    bias = torch.randn(rows * length, HEADS, dtype=torch.float64)
    sink = torch.randn(HEADS, dtype=torch.float64)
    selected = kept(q, k, v, bounds).selected
    want = sparse_attention(
        q, k, v, torch.tensor(bounds), SPEC, selected=selected, bias=bias, sink=sink
    ).out.view(rows, length, HEADS, DIM)
    by_row = [x.view(rows, length, *x.shape[1:]) for x in (q, k, v, bias)]
    cache = ResidentCache(SPEC, rows, length, KV_HEADS, DIM, q.dtype, q.device)
    assert cache.pool.num_slots == 1 + 2 + 2 + SPEC.num_local_blocks - 1 < cache.pages.shape[1]
    if prompt:
        first = [x[:, :prompt].flatten(0, 1) for x in by_row[:3]]
        left = kept(*first, [0, prompt, 2 * prompt]).left
        cache.fill(*(x[:, :prompt] for x in by_row[1:3]), left)
    for begin in range(prompt, length, piece):
        at = slice(begin, min(begin + piece, length))
        out = cache.extend(*(x[:, at] for x in by_row), sink)
        torch.testing.assert_close(out, want[:, at])
    with pytest.raises(ValueError, match="62 tokens do not fit"):
        cache.extend(*(x[:, :1] for x in by_row), sink)


@pytest.mark.parametrize("sinks", [0, 1])
def test_documents_in_regions_decode_to_the_packed_op_and_leave_its_masses(sinks):
    """Of different lengths, in pieces of different lengths, some idle, one after another in a
    region, where all that is nobody's is no number.
    """
    spec = replace(SPEC, num_sink_blocks=sinks, resident_blocks=2 * sinks)
    pool = ResidentPages(spec, 40, 4, 16, KV_HEADS, DIM, torch.float64, torch.device("cpu"))
    for held in (pool.keys, pool.values, pool.state.mass):
        held.fill_(torch.nan)
    pool.places.fill_(3)
    order = torch.randperm(39, generator=torch.Generator().manual_seed(1)) + 1
    pages, regions = order.view(3, -1), [2, 0, 1]
    for lengths, prompts in (([45, 52, 33], [13, 1, 20]), ([30, 17, 47], [4, 9, 2])):
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        q, k, v = drawn(bounds[-1])
        found = kept(q, k, v, bounds, spec)
        cu_seqlens = torch.tensor(bounds)
        want = sparse_attention(q, k, v, cu_seqlens, spec, selected=found.selected).out
        done = list(prompts)
        for row, number in enumerate(prompts):
            first = [x[bounds[row] : bounds[row] + number] for x in (q, k, v)]
            (left,) = kept(*first, [0, number], spec).left
            pool.fill(regions[row], pages[row, : number // 4], *first[1:], left)

        piece = 0
        while any(done[row] < lengths[row] for row in range(3)):
            numbers = [min((piece * (row + 2)) % 11, lengths[row] - done[row]) for row in range(3)]
            piece, width = piece + 1, max(1, *numbers)
            given = [x.new_full((3, width, *x.shape[1:]), torch.nan) for x in (q, k, v)]
            for row, number in enumerate(numbers):
                begin = bounds[row] + done[row]
                for padded, x in zip(given, (q, k, v), strict=True):
                    padded[row, width - number :] = x[begin : begin + number]
                done[row] += number
            out = pool.extend(*given, NewTokens(regions, pages, done, numbers))
            for row, number in enumerate(numbers):
                end = bounds[row] + done[row]
                torch.testing.assert_close(out[row, width - number :], want[end - number : end])
                assert not out[row, : width - number].any()
        for row, left in enumerate(found.left):
            blocks = left.mass.shape[1]
            torch.testing.assert_close(pool.state.mass[regions[row], :, :blocks], left.mass)
            assert torch.equal(pool.state.resident[regions[row], :, :blocks], left.resident)


def test_entries_in_eight_bits_are_near_and_say_what_is_no_number():
    """Within half a unit of the last of four bits, or of the smallest that their power leaves."""
    gen = torch.Generator().manual_seed(0)
    spec = replace(SPEC, entries_dtype="fp8")
    stored = StoredEntries(spec, 9, KV_HEADS, DIM, torch.float32, torch.device("cpu"))
    given = [torch.randn(3, KV_HEADS, 2, DIM, generator=gen) for _ in range(3)]
    given = [x * 10.0 ** torch.randint(-4, 4, x.shape, generator=gen) for x in given]
    given[1][2, 1, 0] = 0.0
    given[2][0, 1, 1, 3] = torch.inf
    stored.write(torch.tensor([4, 1, 7]), CoarseEntries(*given))
    found = stored.read(torch.tensor([[4, 1, 7]]), torch.float32)
    whole = given[2][0, 1, 1].clone()
    given[2][0, 1, 1] = 0.0
    assert found.key_var[0, 0, 1, 1].isnan().all() and not whole.isfinite().all()
    found.key_var[0, 0, 1, 1] = 0.0
    for ours, x in zip(found, given, strict=True):
        largest = x.abs().amax(-1, keepdim=True)
        room = torch.maximum(x.abs() * 2.0**-4, largest * 2.0**-17)
        assert ((ours[0] - x).abs() <= room).all()
    assert not found.value_mean[0, 2, 1, 0].any()
    assert sum(t.numel() * t.element_size() for t in stored.tensors()) == 9 * 2 * 2 * 3 * (DIM + 1)


def test_eight_bits_decode_to_what_rounded_entries_do(monkeypatch):
    """Oracle: numbers of 64 bits that are rounded before they are held."""
    q, k, v = (x.view(2, 61, *x.shape[1:]) for x in drawn(61, 2))
    low = ResidentCache(replace(SPEC, entries_dtype="fp8"), 2, 61, KV_HEADS, DIM, q.dtype, q.device)
    ours = low.extend(q, k, v)
    exact = ResidentCache(SPEC, 2, 61, KV_HEADS, DIM, q.dtype, q.device).extend(q, k, v)

    def rounded(*given):
        return CoarseEntries(*(rounded_rows(x) for x in pooled(*given)))

    monkeypatch.setattr(resident_cache, "pooled", rounded)
    want = ResidentCache(SPEC, 2, 61, KV_HEADS, DIM, q.dtype, q.device).extend(q, k, v)
    torch.testing.assert_close(ours, want)
    assert (ours - exact).abs().max() > 1e-4


def test_the_audit_measures_what_eviction_costs():
    """The bound holds, and the share of the candidates' mass that is still resident is below 1."""
    q, k, v = drawn()
    cu, rows = torch.tensor(BOUNDS), torch.arange(BOUNDS[-1])
    errors = []
    for spec in (SPEC, ALL):
        found = kept(q, k, v, BOUNDS, spec)
        result = sparse_attention(q, k, v, cu, spec, selected=found.selected)
        audit = audit_rows(q, k, v, cu, spec, result, rows, choice=found.candidates)
        assert (audit.error <= audit.bound + audit.rounding).all()
        share = audit.chosen_mass.sum() / audit.candidate_mass.sum()
        assert share < 0.9 if spec is SPEC else torch.isclose(share, share.new_ones(()))
        errors.append(audit.error.mean())
    assert errors[0] > errors[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resident_blocks": -1}, "must not be negative"),
        ({"resident_interval": 6}, "multiple of block_size 4"),
        ({"resident_decay": 1.5}, "between 0 and 1"),
        ({"tail": "drop"}, "needs tail=coarse"),
        ({"num_levels": 2}, "use num_levels=1"),
        ({"top_p": 0.5}, "set top_p=null"),
        ({"min_sparse_length": 9}, "set min_sparse_length=0"),
        ({"entries_dtype": "fp4"}, "choose one of native, fp8"),
        ({"resident_blocks": None, "entries_dtype": "fp8"}, "set resident_blocks, or"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    asked = {"block_size": 4, "coarse_block_size": 2, "resident_blocks": 2, "resident_interval": 8}
    with pytest.raises(ValueError, match=words):
        SparseAttentionSpec(**(asked | settings))
