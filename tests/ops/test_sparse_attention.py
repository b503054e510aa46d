"""The CPU back-ends of sparse attention against its definition (ops/sparse_attention/reference.py),
and the rules of ops/sparse_attention/README.md one by one. What does not say which back-end it
means has the one that a CPU has by default, in C++.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ops.sparse_attention import (
    AttentionOutput,
    SelectionNoise,
    SparseAttentionSpec,
    chunked,
    decode,
    interface,
    sparse_attention,
)
from ops.sparse_attention.audit import audit_rows, mean_error_bound, sample_rows
from ops.sparse_attention.blocks import block_table
from ops.sparse_attention.cache import EntryCache
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.noise import draw_top_k, gumbel, selection_counter, token_hash, uniform
from ops.sparse_attention.problem import GRADIENTS, Problem, nothing_selected
from ops.sparse_attention.ranking import block_of_key, rank_keys, value_of_key
from ops.sparse_attention.reference import Reference, reference_attention
from ops.testing import TOLERANCE, assert_close, kept_for_backward, poisoned_memory

SMALL = SparseAttentionSpec(
    block_size=8, coarse_block_size=4, top_k=2, window_size=5, num_sink_blocks=1, max_variance=0.4
)
"""Two local blocks; a variance term that about half of the entries reach the bound of."""
RAGGED = (0, 37, 1, 0, 61, 7, 8, 9, 3)
DENSE = replace(SMALL, top_k=10**4)
BACKENDS = ("chunked", "cpp")
SCALES = {torch.float64: 1e-14, torch.float32: 2e-6}
"""Largest rounding difference between two orders of the same sums, over the largest value."""


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


@pytest.fixture
def short_chunks(monkeypatch):
    """Runs of 16 queries, so that small inputs have many."""
    monkeypatch.setattr(chunked, "_ELEMENTS", 1)


@pytest.fixture(params=BACKENDS)
def each_backend(request, monkeypatch):
    """The test once more with each of them as the default."""
    monkeypatch.setattr(interface, "select_backend", lambda *_: request.param)


def short(spec: Any) -> str:
    """What a spec changes of SMALL, as the id of a test."""
    values = [
        f"{name}={value}" for name, value in vars(spec).items() if value != getattr(SMALL, name)
    ]
    return "-".join(values) or "small"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor


def draw(
    lengths=RAGGED,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    smooth: float = 0.0,
) -> Inputs:
    """smooth: correlation of neighbouring keys."""
    length = sum(lengths)
    q, k, v = (
        normal(length, n, dim, seed=3 * seed + i) for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    for i in range(1, length if smooth else 0):
        k[i] = smooth * k[i - 1] + math.sqrt(1 - smooth**2) * k[i]
    return Inputs(
        *((x * scale).to(dtype) for x in (q, k)), v.to(dtype), torch.tensor([0, *lengths]).cumsum(0)
    )


def extras(x: Inputs, seed: int = 7) -> dict[str, Tensor]:
    """bias [T, H] and sink [H]."""
    length, heads, _ = x.q.shape
    return {
        "bias": 0.5 * normal(length, heads, seed=seed, dtype=x.q.dtype),
        "sink": normal(heads, seed=seed + 1, dtype=x.q.dtype),
    }


def weights(x: Inputs, seed: int = 11) -> dict[str, Tensor]:
    """pool_logits [T, Hk, 2, d], far from equal weights."""
    length, kv_heads, dim = x.k.shape
    return {"pool_logits": 1.5 * normal(length, kv_heads, 2, dim, seed=seed, dtype=x.q.dtype)}


def as_mask(selected: Tensor, num_blocks: int) -> Tensor:
    """[Hk, T, K] ids -> [Hk, T, M] bool."""
    column = torch.where(selected < 0, num_blocks, selected.long())
    return torch.zeros(*selected.shape[:2], num_blocks + 1, dtype=torch.bool).scatter_(
        2, column, True
    )[..., :-1]


def grads_of(out: Tensor, lse: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a weighted sum of all outputs and of all finite lse."""
    total = (out.double() * normal(*out.shape, seed=91)).sum()
    total = total + (lse.masked_fill(lse.isinf(), 0.0).double() * normal(*lse.shape, seed=92)).sum()
    return dict(
        zip(
            wanted,
            torch.autograd.grad(total, list(wanted.values()), allow_unused=True),
            strict=True,
        )
    )


def leaves(
    x: Inputs, given: dict[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    tensors = {"q": x.q, "k": x.k, "v": x.v, **given}
    return {
        name: t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in tensors.items()
    }


def run_ours(
    x: Inputs, spec: SparseAttentionSpec, given: dict[str, Tensor] | None = None, **options: Any
) -> tuple[AttentionOutput, dict[str, Tensor]]:
    wanted = leaves(x, given or {})
    out = sparse_attention(cu_seqlens=x.cu_seqlens, spec=spec, **wanted, **options)
    return out, grads_of(out.out, out.lse, wanted)


def run_reference(
    x: Inputs, spec: SparseAttentionSpec, given: dict[str, Tensor] | None = None, **options: Any
) -> tuple[Reference, dict[str, Tensor]]:
    wanted = leaves(x, given or {}, torch.float64)
    out = reference_attention(cu_seqlens=x.cu_seqlens, spec=spec, **wanted, **options)
    return out, grads_of(out.out, out.lse, wanted)


def assert_lse(ours: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    assert torch.equal(ours.isinf(), expected.isinf()), "rows without any entry differ"
    assert_close(
        "lse",
        ours.masked_fill(ours.isinf(), 0.0),
        expected.masked_fill(expected.isinf(), 0.0),
        dtype,
    )


def assert_equals_reference(
    x: Inputs,
    spec: SparseAttentionSpec,
    given: dict[str, Tensor] | None = None,
    same_selection: bool = True,
    selected: Tensor | None = None,
    **options: Any,
) -> tuple[AttentionOutput, Reference]:
    """Both back-ends, and what the default one gave.

    same_selection: the reference selects for itself and must come to the same; otherwise it is
        handed ours.
    """
    dtype = x.q.dtype
    real_blocks = int((block_table(x.cu_seqlens, len(x.q), spec).start < len(x.q)).sum())
    known: list[tuple[Tensor, Reference, dict[str, Tensor]]] = []
    for backend in BACKENDS:
        ours, grads = run_ours(x, spec, given, selected=selected, backend=backend, **options)
        mask = as_mask(ours.selected, real_blocks)

        # The definition is slow: once for the same question.
        if not known or not (same_selection or torch.equal(known[0][0], mask)):
            chosen = None if same_selection and selected is None else mask
            known = [(mask, *run_reference(x, spec, given, **{**options, "selected": chosen}))]
        _, expected, expected_grads = known[0]

        if same_selection and options.get("exact", True):
            assert torch.equal(mask, expected.selected), backend
        assert ours.out.dtype == dtype and ours.lse.dtype == chunked.real_dtype(dtype)
        assert_close(f"{backend}: out", ours.out, expected.out)
        assert_lse(ours.lse, expected.lse, dtype)
        for name in ("tail_mass", "selected_mass"):
            error = (getattr(ours, name) - getattr(expected, name)).abs()
            assert error.numel() == 0 or error.max() <= TOLERANCE[dtype], (backend, name)
        for name, grad in grads.items():
            assert grad is None or grad.dtype == dtype, name
            reference = expected_grads[name]
            if reference is None or reference.numel() == 0 or not reference.abs().max() > 1e-8:
                assert grad is None or grad.numel() == 0 or grad.abs().max() <= TOLERANCE[dtype], (
                    backend,
                    name,
                )
            else:
                assert_close(f"{backend}: gradient of {name}", grad, reference)
    return ours, expected


# Against the definition

COLUMNS: dict[str, tuple[Any, ...]] = {
    "order": (0, 2),
    "tail": ("coarse", "drop"),
    "score": ("prob", "max", "error_gain"),
    "top_p": (None, 0.6),
    "top_k": (0, 2, 50),
    "min_sparse_length": (0, 29),
    "sizes": ((8, 8), (8, 4), (6, 2), (4, 1)),
    "window_size": (0, 5, 20),
    "num_sink_blocks": (0, 1, 3),
    "branches": ("both", "exact", "coarse"),
    "noise": (None, (1.0, None), (0.0, 0), (0.7, 1)),
    "given": ((), ("bias",), ("sink",), ("bias", "sink"), ("bias", "sink", "pool_logits")),
    "heads": ((2, 2), (4, 2), (3, 1)),
}


def build_spec(case: dict[str, Any]) -> SparseAttentionSpec:
    own = {name: case[name] for name in COLUMNS if name in SparseAttentionSpec.__dataclass_fields__}
    return SparseAttentionSpec(
        **own, block_size=case["sizes"][0], coarse_block_size=case["sizes"][1], max_variance=0.4
    )


def settings() -> Iterator[dict[str, Any]]:
    """Settings so that every two values of two columns meet, unless the spec forbids it."""
    generator = random.Random(0)
    missing = {
        ((a, x), (b, y))
        for a, b in combinations(COLUMNS, 2)
        for x in COLUMNS[a]
        for y in COLUMNS[b]
    }
    missing -= {(("score", score), ("top_p", 0.6)) for score in ("max", "error_gain")}
    missing -= {(("order", 0), ("score", "error_gain"))}
    while missing:
        best: tuple[set[Any], dict[str, Any]] = (set(), {})
        for _ in range(60):
            case = {name: generator.choice(values) for name, values in COLUMNS.items()}
            try:
                build_spec(case)
            except ValueError:
                continue
            best = max(
                best,
                (missing.intersection(combinations(case.items(), 2)), case),
                key=lambda pair: len(pair[0]),
            )
        missing -= best[0]
        if best[0]:
            yield best[1]


CASES = list(settings())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_outputs_masses_and_gradients_equal_the_reference(number, dtype, monkeypatch):
    case = CASES[number]
    if number % 2:
        monkeypatch.setattr(chunked, "_ELEMENTS", 1)
    x = draw(heads=case["heads"][0], kv_heads=case["heads"][1], seed=number, dtype=dtype)
    given = {name: t for name, t in (extras(x) | weights(x)).items() if name in case["given"]}
    options: dict[str, Any] = {
        "exact": case["branches"] != "coarse",
        "coarse": case["branches"] != "exact",
    }
    if case["noise"]:
        options |= {
            "noise": SelectionNoise(number, *case["noise"]),
            "token_ids": 5 * torch.arange(len(x.q)) - 100,
        }
    with poisoned_memory():
        assert_equals_reference(x, build_spec(case), given, dtype == torch.float64, **options)


def test_the_variance_bound_is_active_and_not_always():
    x = draw()
    kappa = [
        reference_attention(*x, spec=replace(SMALL, max_variance=bound, top_k=0)).lse
        for bound in (0.0, 0.4, 100.0)
    ]
    assert not torch.allclose(kappa[0], kappa[1]) and not torch.allclose(kappa[1], kappa[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        replace(SMALL, order=0),
        replace(SMALL, tail="drop"),
        replace(SMALL, score="max"),
        replace(SMALL, score="error_gain", coarse_block_size=8),
    ],
    ids=short,
)
def test_half_precision_stays_near_the_fp64_reference_of_the_same_selection(spec, dtype, poisoned):
    x = draw(heads=6, dim=16, dtype=dtype)
    given = extras(x) | (weights(x) if spec == SMALL else {})
    assert_equals_reference(x, replace(spec, max_variance=4.0), given, same_selection=False)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("order", [0, 2])
def test_closed_form_backward_passes_gradcheck(order):
    x = draw((9, 0, 4), heads=2, kv_heads=1, dim=2)
    spec = SparseAttentionSpec(
        block_size=2,
        coarse_block_size=2,
        top_k=1,
        window_size=0,
        num_sink_blocks=1,
        order=order,
        max_variance=0.3,
    )
    selected = sparse_attention(*x, spec).selected
    assert (selected >= 0).any()
    wanted = leaves(x, extras(x) | weights(x))

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = sparse_attention(
            cu_seqlens=x.cu_seqlens,
            spec=spec,
            selected=selected,
            **dict(zip(wanted, tensors, strict=True)),
        )
        return out.out, out.lse

    assert torch.autograd.gradcheck(call, tuple(wanted.values()), eps=1e-6, atol=1e-7)


def test_learned_entries_are_weighed_in_runs_of_blocks(monkeypatch):
    x = draw()
    whole = run_ours(x, SMALL, weights(x))
    monkeypatch.setattr(chunked, "_WEIGHED", 3 * SMALL.block_size * x.k[0].numel())
    parts = run_ours(x, SMALL, weights(x))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], parts[0], strict=True))
    assert all(torch.equal(parts[1][name], grad) for name, grad in whole[1].items())


def test_what_learned_entries_keep_are_their_inputs():
    x, given = draw(), weights(draw())["pool_logits"]
    q, k, v, given = (y.requires_grad_() for y in (*x[:3], given))
    with kept_for_backward(q, k, v, given) as kept:
        sparse_attention(q, k, v, x.cu_seqlens, SMALL, pool_logits=given, backend="chunked")
    with kept_for_backward(q, k, v) as plain:
        sparse_attention(q, k, v, x.cu_seqlens, SMALL, backend="chunked")
    assert sum(kept.values()) == sum(plain.values())


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(8, 4), (6, 3)], ids=str)
def test_weights_of_zero_are_none_to_the_last_bit(sizes, dtype):
    x = draw(dtype=dtype)
    spec = replace(SMALL, block_size=sizes[0], coarse_block_size=sizes[1])
    zeros = {name: torch.zeros_like(t) for name, t in weights(x).items()}
    (plain, grads), (weighed, others) = (run_ours(x, spec, extras(x) | w) for w in ({}, zeros))
    assert (plain.tail_mass > 0.01).any()
    assert all(torch.equal(a, b) for a, b in zip(plain, weighed, strict=True))
    assert others["pool_logits"].abs().max() > 0
    for name, grad in grads.items():
        assert_close(name, others[name], grad)


def test_a_gradient_of_one_output_alone_reaches_the_inputs():
    x = draw()
    wanted = leaves(x, extras(x))
    expected = reference_attention(cu_seqlens=x.cu_seqlens, spec=SMALL, **wanted)
    ours = sparse_attention(cu_seqlens=x.cu_seqlens, spec=SMALL, **wanted)
    for name in ("out", "lse"):
        pairs = [
            torch.autograd.grad(
                getattr(o, name).square().sum(),
                list(wanted.values()),
                retain_graph=True,
                allow_unused=True,
            )
            for o in (ours, expected)
        ]
        for key, a, b in zip(wanted, *pairs, strict=True):
            assert_close(f"{name} to {key}", a, torch.zeros_like(a) if b is None else b)
    assert not ours.tail_mass.requires_grad and not ours.selected_mass.requires_grad


# Shapes at the edges

LENGTHS = {
    "one_token": (1,),
    "one_token_among_empty": (0, 1, 0),
    "prime": (53,),
    "primes": (2, 3, 5, 7, 11, 13, 17, 19),
    "around_a_block": (1, 7, 8, 9),
    "around_two_blocks": (15, 16, 17),
    "around_the_first_candidate": (23, 24, 25, 31, 32, 33),
    "empty_at_both_ends": (0, 0, 40, 0, 40, 0),
}


@pytest.mark.parametrize(
    "branches", [(True, True), (True, False), (False, True)], ids=["both", "exact", "coarse"]
)
@pytest.mark.parametrize("case", LENGTHS)
def test_any_document_lengths(case, branches, poisoned, short_chunks):
    x = draw(LENGTHS[case])
    for spec in (
        SMALL,
        replace(SMALL, window_size=0, num_sink_blocks=0),
        replace(SMALL, window_size=0, num_sink_blocks=4),
    ):
        assert_equals_reference(x, spec, extras(x), exact=branches[0], coarse=branches[1])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(
    "branches", [(True, True), (True, False), (False, True)], ids=["both", "exact", "coarse"]
)
@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_no_tokens_give_empty_outputs_and_gradients(lengths, branches):
    x = draw(lengths)
    for noise in (None, NOISE):
        out, grads = run_ours(
            x,
            replace(SMALL, top_p=0.5),
            extras(x),
            exact=branches[0],
            coarse=branches[1],
            noise=noise,
        )
        assert (
            out.out.shape == (0, 4, 8)
            and out.lse.shape == (0, 4)
            and out.selected.shape[:2] == (2, 0)
        )
        assert grads["q"].shape == (0, 4, 8) and (grads["sink"] == 0).all()


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_any_group_of_heads(group, kv_heads, poisoned):
    x = draw((61, 20), heads=group * kv_heads, kv_heads=kv_heads)
    assert_equals_reference(x, SMALL, extras(x))


@pytest.mark.parametrize(
    "spec",
    [
        replace(SMALL, block_size=32, coarse_block_size=16, window_size=40, top_k=3),
        replace(SMALL, block_size=32, coarse_block_size=32, top_k=2, num_sink_blocks=0),
    ],
    ids=short,
)
def test_one_giant_document_in_many_chunks(spec, poisoned):
    x = draw((1201,), heads=2, kv_heads=1, dtype=torch.float64)
    assert len(x.q) > 4 * chunked._MAX_QUERIES
    assert_equals_reference(x, spec, extras(x))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("block_size", [1, 64])
def test_thousands_of_documents_of_one_and_two_tokens(block_size, poisoned):
    lengths = (1 + (normal(3000, seed=1) > 0).long()).tolist()
    x = draw(lengths, heads=2, kv_heads=1)
    spec = SparseAttentionSpec(
        block_size=block_size,
        coarse_block_size=block_size,
        top_k=0,
        window_size=0,
        num_sink_blocks=0,
    )
    assert torch.unique(torch.tensor(lengths)).tolist() == [1, 2]
    wanted = leaves(x, {})
    out = sparse_attention(cu_seqlens=x.cu_seqlens, spec=spec, **wanted)
    q, k, v = wanted["q"], wanted["k"].expand(-1, 2, -1), wanted["v"].expand(-1, 2, -1)
    second = torch.zeros(len(q), dtype=torch.bool)
    second[x.cu_seqlens[1:][torch.tensor(lengths) == 2] - 1] = True
    z_own, z_before = (q * k).sum(-1) * 8**-0.5, (q * k.roll(1, 0)).sum(-1) * 8**-0.5
    share = torch.where(second[:, None], (z_before - z_own).sigmoid(), 0.0).unsqueeze(-1)
    expected = (1 - share) * v + share * v.roll(1, 0)
    lse = torch.where(second[:, None], torch.logaddexp(z_own, z_before), z_own)
    assert_close("out", out.out, expected)
    assert_close("lse", out.lse, lse)
    ours, theirs = grads_of(out.out, out.lse, wanted), grads_of(expected, lse, wanted)
    for name in wanted:
        assert_close(name, ours[name], theirs[name])


@pytest.mark.parametrize("sink", [False, True])
def test_rows_without_any_entry_are_zero_with_finite_gradients(sink, poisoned):
    x = draw((20, 5, 0, 8))
    given = {"sink": extras(x)["sink"]} if sink else {}
    out, grads = run_ours(x, SMALL, given, exact=False)
    nothing = torch.ones(len(x.q), dtype=torch.bool)
    nothing[8:20] = False
    assert torch.equal((out.out == 0).all(-1), nothing[:, None].expand(-1, 4))
    empty = (
        given["sink"].expand(len(x.q), -1)
        if sink
        else torch.full((len(x.q), 4), -math.inf, dtype=torch.float64)
    )
    assert torch.equal(out.lse[nothing], empty[nothing]) and out.lse[~nothing].isfinite().all()
    assert (out.tail_mass[nothing] == 0).all() and (out.selected_mass == 0).all()
    assert all(g.isfinite().all() for g in grads.values())
    assert (grads["q"][nothing] == 0).all()


def test_every_query_may_select_the_same_block(poisoned):
    x = draw((90, 50))
    table = block_table(x.cu_seqlens, len(x.q), SMALL)
    wanted = table.sink_end[table.block_of.long()]
    has = table.local_start[table.block_of.long()] > wanted
    for repeated in (1, 3):
        selected = torch.where(has, wanted, -1).int().expand(2, -1).unsqueeze(-1)
        selected = torch.nn.functional.pad(selected, (repeated - 1, 0), value=-1).contiguous()
        ours, _ = assert_equals_reference(x, SMALL, extras(x), selected=selected)
        assert torch.equal(ours.selected, selected) and (ours.selected_mass[has] > 0).all()


# Limits


def dense_attention(x: Inputs, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """torch SDPA of every document alone, and the logarithm of its denominators."""
    group = x.q.shape[1] // x.k.shape[1]
    outs, lses = [], []
    for begin, end in zip(x.cu_seqlens[:-1].tolist(), x.cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (tensors[name][begin:end].transpose(0, 1) for name in "qkv")
        k, v = (y.repeat_interleave(group, 0) for y in (k, v))
        outs.append(
            scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(
                0, 1
            )
        )
        z = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(
            torch.ones(end - begin, end - begin).triu(1).bool(), -math.inf
        )
        lses.append(z.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def assert_equals_dense(x: Inputs, spec: SparseAttentionSpec, gradients: bool = True) -> None:
    wanted = leaves(x, {})
    out, lse = dense_attention(x, wanted)
    ours, grads = run_ours(x, spec)
    assert_close("out", ours.out, out)
    assert_close("lse", ours.lse, lse)
    for name, expected in grads_of(out, lse, wanted).items() if gradients else ():
        assert_close(f"gradient of {name}", grads[name], expected)


@pytest.mark.parametrize(
    "spec",
    [
        replace(DENSE, tail=tail, order=order, score=score)
        for tail in ("coarse", "drop")
        for order, score in ((0, "max"), (2, "prob"))
    ]
    + [
        replace(SMALL, top_k=1, min_sparse_length=1000),
        replace(SMALL, window_size=60),
        replace(SMALL, num_sink_blocks=100),
        replace(SMALL, block_size=1, coarse_block_size=1),
        replace(SMALL, top_k=100, top_p=1.0),
    ],
    ids=short,
)
def test_nothing_left_out_is_dense_attention(spec):
    assert_equals_dense(draw((0, 61, 1, 40, 8)), spec)


def test_documents_up_to_dense_length_are_dense():
    for spec in (SMALL, replace(SMALL, tail="drop", window_size=20, num_sink_blocks=2)):
        assert_equals_dense(draw((spec.dense_length, 9, spec.dense_length - 1)), spec)
        longer = draw((spec.dense_length + 1,))
        assert not torch.allclose(
            sparse_attention(*longer, spec).out, dense_attention(longer, leaves(longer, {}))[0]
        )


def test_positions_below_min_sparse_length_are_dense_and_the_rest_is_not():
    x = draw((70,))
    spec = replace(SMALL, tail="drop", top_k=0, min_sparse_length=41)
    ours, dense = sparse_attention(*x, spec).out, dense_attention(x, leaves(x, {}))[0]
    assert_close("dense positions", ours[:48], dense[:48])
    assert ((ours[48:] - dense[48:]).abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("low", [-1e30, -math.inf])
def test_a_bias_to_minus_infinity_is_tail_drop(low):
    x = draw()
    bias = torch.full_like(x.q[..., 0], low)
    selected = sparse_attention(*x, SMALL).selected
    ours, grads = run_ours(x, SMALL, {"bias": bias}, selected=selected)
    dropped, dropped_grads = run_ours(x, replace(SMALL, tail="drop"), selected=selected)
    assert_close("out", ours.out, dropped.out)
    assert_close("lse", ours.lse, dropped.lse)
    assert (ours.tail_mass == 0).all() and (grads["bias"] == 0).all()
    for name, grad in dropped_grads.items():
        assert_close(name, grads[name], grad)


@pytest.mark.parametrize("top_k", [0, 1, 3])
@pytest.mark.parametrize("order", [0, 2])
def test_identical_keys_and_values_within_entries_make_any_selection_dense(order, top_k):
    x = draw((100, 44))
    in_block = torch.cat(
        [torch.arange(length) // 4 * 4 + begin for length, begin in ((100, 0), (44, 100))]
    )
    x = x._replace(k=x.k[in_block], v=x.v)
    assert_equals_dense(x, replace(SMALL, order=order, top_k=top_k), gradients=False)


def test_without_variance_both_orders_are_the_same_function():
    x = draw((100,))
    x = x._replace(k=x.k[torch.arange(100) // 4 * 4])
    assert_close(
        "out", sparse_attention(*x, SMALL).out, sparse_attention(*x, replace(SMALL, order=0)).out
    )
    x = draw((100,))
    a, b = (
        run_ours(x, spec) for spec in (replace(SMALL, max_variance=0.0), replace(SMALL, order=0))
    )
    assert torch.equal(a[0].out, b[0].out) and all(
        torch.equal(a[1][name], b[1][name]) for name in a[1]
    )


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("coarse_block_size", [8, 2, 1])
def test_order_0_never_overestimates_the_mass_of_a_block(coarse_block_size, scale):
    x = draw((8 + 60,), scale=scale)
    spec = replace(SMALL, order=0, coarse_block_size=coarse_block_size)
    z = torch.einsum("thd,jhd->thj", x.q, x.k.repeat_interleave(2, 1)) * 8**-0.5
    table = block_table(x.cu_seqlens, 68, spec)
    # documents of two blocks: the coarse branch of the second holds the first block alone
    for m in range(7):
        rows = torch.cat([torch.arange(8 * m, 8 * m + 8), torch.tensor([67])])
        pair = Inputs(x.q[rows], x.k[rows], x.v[rows], torch.tensor([0, 9]))
        estimated = sparse_attention(*pair, spec, exact=False, coarse=True).lse[8]
        true = z[67][:, 8 * m : 8 * m + 8].logsumexp(-1)
        assert (estimated <= true + 1e-12).all()
        if coarse_block_size == 1:
            assert_close("single tokens", estimated, true)
    everything = sparse_attention(*x, replace(spec, tail="coarse")).lse
    assert (everything <= dense_attention(x, leaves(x, {}))[1] + 1e-12).all()
    assert (table.end - table.start)[8] == 4


@pytest.mark.parametrize(
    "spec", [SMALL, replace(SMALL, tail="drop"), replace(SMALL, order=0, top_k=0)], ids=short
)
def test_probabilities_sum_to_one(spec):
    x = draw()
    x = x._replace(v=torch.ones_like(x.v))
    given = extras(x)
    for sink in (None, given["sink"]):
        out = sparse_attention(*x, spec, bias=given["bias"], sink=sink)
        total = torch.ones_like(out.lse) if sink is None else 1 - (sink - out.lse).exp()
        assert_close("sum", out.out, total.unsqueeze(-1).expand_as(out.out))
        reference = reference_attention(*x, spec, bias=given["bias"], sink=sink)
        probs = torch.cat([reference.token_probs, reference.entry_probs], -1).sum(-1)
        assert_close("reference", probs.transpose(0, 1).reshape(total.shape), total)
        assert (out.tail_mass >= 0).all() and (
            out.tail_mass + out.selected_mass <= total + 1e-12
        ).all()


# Nothing leaks, nothing wavers

LEAK_SPECS = [
    replace(SMALL, block_size=16, coarse_block_size=8, window_size=20, top_k=3, max_variance=4.0),
    replace(SMALL, score="max", order=0),
    replace(SMALL, num_sink_blocks=0, window_size=0),
    replace(SMALL, top_p=0.7, top_k=4),
    replace(SMALL, min_sparse_length=40, tail="drop"),
    replace(SMALL, rank_lse="super", fanout=2),
]
NOISE = SelectionNoise(3, temperature=1.0, min_top_k=0)


def disturbed(x: Inputs, rows: Tensor, seed: int = 50) -> Inputs:
    """Other values in all rows but these."""
    keep = torch.zeros(len(x.q), 1, 1, dtype=torch.bool)
    keep[rows] = True
    return x._replace(
        **{
            name: torch.where(keep, y, 5 * normal(*y.shape, seed=seed + i, dtype=y.dtype))
            for i, (name, y) in enumerate(zip("qkv", x[:3], strict=True))
        }
    )


def assert_rows(
    a: AttentionOutput,
    b: AttentionOutput,
    rows: Tensor,
    rows_b: Tensor,
    shift: int = 0,
    bitwise: bool = True,
) -> None:
    """shift: what to add to block ids of a."""
    ids = a.selected[:, rows]
    assert torch.equal(torch.where(ids < 0, ids, ids + shift), b.selected[:, rows_b]), "selection"
    for name in ("out", "lse", "tail_mass", "selected_mass"):
        x, y = getattr(a, name)[rows], getattr(b, name)[rows_b]
        if bitwise:
            assert torch.equal(x, y), name
        else:
            assert (x - y).abs().max() <= SCALES[x.dtype] * max(1.0, float(y.abs().max())), name


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("noise", [None, NOISE], ids=["plain", "noise"])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="fp64", marks=pytest.mark.nightly),
        pytest.param(torch.float32, id="fp32"),
    ],
)
@pytest.mark.parametrize("spec", LEAK_SPECS, ids=short)
def test_no_token_sees_the_future(spec, dtype, noise, short_chunks):
    """Bit by bit for one selection; the queries of a block that later queries select too share one
    product with them, whose rounding may differ with its height.
    """
    x = draw((70, 0, 90, 33), dim=16, dtype=dtype)
    out = sparse_attention(*x, spec, noise=noise)
    coarse = sparse_attention(*x, replace(spec, top_k=0))
    for length in (1, 37, 69, 71, 117, 159):
        rows = torch.arange(length)
        later = disturbed(x, rows)
        assert_rows(out, sparse_attention(*later, spec, noise=noise), rows, rows, bitwise=False)
        assert_rows(out, sparse_attention(*later, spec, selected=out.selected), rows, rows)
        assert_rows(coarse, sparse_attention(*later, replace(spec, top_k=0)), rows, rows)
        cut = torch.cat([x.cu_seqlens[x.cu_seqlens < length], torch.tensor([length])])
        shorter = Inputs(*(y[:length] for y in x[:3]), cut)
        assert_rows(out, sparse_attention(*shorter, spec, noise=noise), rows, rows, bitwise=False)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 2), (2, 2)])
def test_no_token_sees_what_later_queries_select_to_the_last_bit(heads, kv_heads, dtype):
    x = draw((150, 233), heads=heads, kv_heads=kv_heads, dim=64, dtype=dtype)
    out = sparse_attention(*x, LEAK_SPECS[0])
    for length in (40, 145, 148, 149, 376, 380, 382):
        rows = torch.arange(length)
        assert_rows(
            out, sparse_attention(*disturbed(x, rows, seed=length), LEAK_SPECS[0]), rows, rows
        )


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("spec", LEAK_SPECS, ids=short)
def test_no_document_sees_another(spec, dtype, short_chunks):
    x = draw((70, 0, 90, 33), dim=16, dtype=dtype)
    out = sparse_attention(*x, spec)
    first = block_table(x.cu_seqlens, len(x.q), spec).first
    block_of = block_table(x.cu_seqlens, len(x.q), spec).block_of
    for begin, end in ((0, 70), (70, 160), (160, 193)):
        rows = torch.arange(begin, end)
        assert_rows(out, sparse_attention(*disturbed(x, rows), spec), rows, rows)
        alone = Inputs(*(y[begin:end] for y in x[:3]), torch.tensor([0, end - begin]))
        assert_rows(
            out,
            sparse_attention(*alone, spec),
            rows,
            rows - begin,
            -int(first[block_of[begin]]),
            bitwise=False,
        )


@pytest.mark.usefixtures("each_backend")
def test_gradients_of_a_document_do_not_depend_on_the_others():
    x = draw((70, 90, 33))
    rows = torch.arange(70, 160)
    tensors = [leaves(y, {}) for y in (x, disturbed(x, rows))]
    grads = []
    for wanted in tensors:
        out = sparse_attention(cu_seqlens=x.cu_seqlens, spec=SMALL, **wanted).out[rows]
        grads.append(
            torch.autograd.grad((out * normal(*out.shape, seed=4)).sum(), list(wanted.values()))
        )
    outside = torch.ones(193, dtype=torch.bool)
    outside[rows] = False
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a[rows], b[rows]) and (a[outside] == 0).all()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_two_runs_are_bitwise_equal(dtype):
    x = draw((200, 90, 33), dim=16, dtype=dtype)
    (a, grads_a), (b, grads_b) = (
        run_ours(x, LEAK_SPECS[0], extras(x), noise=NOISE) for _ in range(2)
    )
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


# Selection


def test_selection_is_rising_distinct_and_of_candidates_only():
    x = draw()
    for spec in (SMALL, replace(SMALL, top_p=0.5), replace(SMALL, top_k=50)):
        selected = sparse_attention(*x, spec, noise=NOISE if spec.top_k == 50 else None).selected
        table = block_table(x.cu_seqlens, len(x.q), spec)
        own = table.block_of.long()
        used = selected >= 0
        assert (
            used.any()
            and selected.shape == (2, len(x.q), spec.top_k)
            and selected.dtype == torch.int32
        )
        assert (
            (selected >= table.sink_end[own][:, None])
            & (selected < table.local_start[own][:, None])
            | ~used
        ).all()
        pairs = used[..., 1:] & used[..., :-1]
        assert (selected.diff(dim=-1) > 0)[pairs].all() and (used[..., 1:] <= used[..., :-1]).all()


def test_equal_blocks_are_taken_in_the_order_of_their_ids():
    x = draw((80,))
    x = x._replace(k=torch.ones_like(x.k))
    for score in ("prob", "max", "error_gain"):
        spec = replace(SMALL, score=score)
        selected = sparse_attention(*x, spec).selected
        assert (selected[:, -1] == torch.tensor([1, 2])).all()
        assert torch.equal(as_mask(selected, 10), reference_attention(*x, spec).selected)


@pytest.mark.parametrize("number", [3, 20, 32, 45, 54, 87])
def test_blocks_of_identical_keys_are_interchangeable_and_chosen_without_later_tokens(number):
    """A matrix product may round equal columns differently, so which of them is taken is open; not
    what comes of it.
    """
    gen = torch.Generator().manual_seed(number)
    length, block = 150 + number, (4, 7, 8)[number % 3]
    spec = SparseAttentionSpec(
        block_size=block, coarse_block_size=block, top_k=2, window_size=0, num_sink_blocks=1
    )
    q, v = (torch.randn(length, n, 16, generator=gen) for n in (8, 1))
    k, v = (x[:block, :1].repeat(length // block + 1, 1, 1)[:length].contiguous() for x in (q, v))
    cu = torch.tensor([0, length])
    found = sparse_attention(q, k, v, cu, spec)
    lowest = torch.full((1, length, 2), -1, dtype=torch.int32)
    table = block_table(cu, length, spec)
    own = table.block_of.long()
    for i in range(2):
        lowest[0, :, i] = torch.where(
            table.sink_end[own] + i < table.local_start[own], table.sink_end[own] + i, -1
        )
    expected = sparse_attention(q, k, v, cu, spec, selected=lowest)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-6, atol=1e-6)
    cut = length // 2
    later = [torch.cat((x[:cut], torch.randn(x[cut:].shape, generator=gen))) for x in (q, k, v)]
    assert torch.equal(
        sparse_attention(*later, cu, spec).selected[:, :cut], found.selected[:, :cut]
    )


def test_blocks_without_mass_are_taken_in_the_order_of_their_ids():
    x = draw((80,), kv_heads=4)
    k = torch.full_like(x.k, -1.0)
    k[72:] = 1.0
    k[:8] = 50.0
    x = x._replace(q=torch.full_like(x.q, 30.0), k=k)
    assert (sparse_attention(*x, SMALL).selected[:, -1] == torch.tensor([1, 2])).all()


def test_top_p_takes_no_more_blocks_than_the_share_needs():
    x = draw((100,), scale=2.0)
    plain = sparse_attention(*x, replace(SMALL, top_k=10)).selected
    counts = []
    for top_p in (1e-6, 0.3, 0.6, 0.9, 1.0):
        selected = sparse_attention(*x, replace(SMALL, top_k=10, top_p=top_p)).selected
        assert (as_mask(selected, 13) <= as_mask(plain, 13)).all()
        counts.append(int((selected >= 0).sum()))
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == int((plain >= 0).sum())


VALUES = torch.tensor(
    [-math.inf, -3.4e38, -87.3, -1.0, -1e-30, 0.0, 1e-38, 0.5, 1.0, 1.0000001, 3.4e38]
)


def test_keys_of_rank_keep_block_and_value():
    blocks = torch.tensor([0, 1, 77, 2**31 - 2])
    keys = rank_keys(VALUES[:, None].expand(-1, 4), blocks)
    assert (keys >= 0).all()
    assert torch.equal(block_of_key(keys), blocks.expand(len(VALUES), -1))
    assert torch.equal(value_of_key(keys), VALUES[:, None].expand(-1, 4))
    assert block_of_key(torch.tensor([-1])).tolist() == [-1]


def test_keys_of_rank_order_by_value_and_then_by_lower_block():
    pairs = [(float(value), block) for value in VALUES for block in (0, 1, 500)]
    keys = rank_keys(*(torch.tensor(x) for x in zip(*pairs, strict=True)))
    order = keys.argsort(descending=True).tolist()
    assert order == sorted(range(len(pairs)), key=lambda i: (-float(VALUES[i // 3]), pairs[i][1]))


# Noise


def test_uniform_is_uniform_over_tokens_and_over_counters():
    for draws in (
        uniform(token_hash(5, torch.arange(100_000)), 1),
        uniform(token_hash(5, torch.tensor([17])), torch.arange(100_000)),
    ):
        assert draws.dtype == torch.float32 and (draws > 0).all() and (draws < 1).all()
        counts = torch.histc(draws, 50, 0.0, 1.0)
        chi_square = float(((counts - 2000).square() / 2000).sum())
        assert 49 - 4 * math.sqrt(98) < chi_square < 49 + 4 * math.sqrt(98)
        assert abs(float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1])) < 0.02


def test_gumbel_has_the_mean_and_variance_of_its_law():
    draws = gumbel(token_hash(9, torch.arange(100_000)), 3).double()
    assert (
        abs(float(draws.mean()) - 0.5772) < 0.02 and abs(float(draws.var()) - math.pi**2 / 6) < 0.05
    )
    assert draws.isfinite().all()


def test_seeds_of_64_bits_are_all_different():
    hashes = torch.cat(
        [token_hash(seed, torch.tensor([5])) for seed in (0, -1, 1, 2**32, 2**32 + 1)]
    )
    assert len(hashes.unique()) == 5


def test_hashes_depend_on_all_64_bits_of_the_token():
    ids = torch.tensor([0, 1, -1, 2**32, 2**33 + 1, -(2**40), 2**62])
    hashes = torch.stack([token_hash(seed, ids) for seed in (0, 1, 2, 3**19)])
    assert len(hashes.unique()) == hashes.numel() and (hashes >= 0).all() and (hashes < 2**32).all()


def test_counters_of_blocks_and_heads_are_distinct_and_not_zero():
    counters = selection_counter(torch.arange(50)[:, None], torch.arange(8), 8)
    assert len(counters.unique()) == 400 and counters.min() > 0


def test_draw_top_k_covers_its_range_evenly():
    hashed = token_hash(1, torch.arange(20_000))
    counts = draw_top_k(hashed, 2, 5, SelectionNoise(1, min_top_k=2))
    assert counts.shape == (2, 20_000) and counts.dtype == torch.int32
    for head in counts:
        assert torch.bincount(head)[:2].sum() == 0
        assert (torch.bincount(head)[2:] / 20_000 - 0.25).abs().max() < 0.02
    assert (counts[0] == counts[1]).float().mean() < 0.3
    assert (draw_top_k(hashed, 1, 3, SelectionNoise(1, min_top_k=9)) == 3).all()
    assert (
        draw_top_k(hashed, 1, 3, None) is None
        and draw_top_k(hashed, 1, 3, SelectionNoise(1, 1.0)) is None
    )


def test_drawn_counts_bound_the_number_of_selected_blocks():
    x = draw((90,))
    plain = sparse_attention(*x, replace(SMALL, top_k=4)).selected
    noise = SelectionNoise(11, min_top_k=1)
    selected = sparse_attention(*x, replace(SMALL, top_k=4), noise=noise).selected
    counts = draw_top_k(token_hash(11, torch.arange(90)), 2, 4, noise)
    assert torch.equal((selected >= 0).sum(-1), torch.minimum(counts, (plain >= 0).sum(-1)))
    assert (as_mask(selected, 12) <= as_mask(plain, 12)).all()


def test_temperature_zero_is_no_noise():
    x = draw()
    a, b = sparse_attention(*x, SMALL), sparse_attention(*x, SMALL, noise=SelectionNoise(5))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_noise_changes_the_selection_with_its_seed_only():
    x = draw((90,))
    runs = [
        sparse_attention(*x, SMALL, noise=SelectionNoise(seed, 1.0)).selected for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], sparse_attention(*x, SMALL).selected)


@pytest.mark.parametrize("noise", [SelectionNoise(5, 1.0), SelectionNoise(5, 0.5, min_top_k=0)])
@pytest.mark.parametrize("spec", [SMALL, replace(SMALL, num_levels=2, fanout=2, num_expanded=1)])
@pytest.mark.parametrize("alone", [False, True])
def test_a_head_draws_by_its_place_in_the_layer(spec, noise, alone):
    """alone: as if the call's heads were all there are, which is another draw."""
    x = draw((90, 40))
    whole = sparse_attention(*x, spec, noise=noise)
    groups = x.q.shape[1] // x.k.shape[1]
    for head in range(x.k.shape[1]):
        own = slice(head * groups, (head + 1) * groups)
        place = {} if alone else {"first_kv_head": head, "num_kv_heads": x.k.shape[1]}
        part = sparse_attention(
            x.q[:, own],
            x.k[:, head : head + 1],
            x.v[:, head : head + 1],
            x.cu_seqlens,
            spec,
            noise=replace(noise, **place),
        )
        assert torch.equal(part.selected[0], whole.selected[head]) == (not alone)
        if not alone:
            torch.testing.assert_close(part.out, whole.out[:, own])


def test_heads_beyond_those_of_the_layer_are_refused():
    x = draw((90,))
    with pytest.raises(ValueError, match="do not lie within the 2 of"):
        sparse_attention(*x, SMALL, noise=SelectionNoise(5, 1.0, None, 1, 2))


def test_the_same_token_ids_draw_the_same_under_any_batching():
    lengths = (70, 41, 90)
    x = draw(lengths, dtype=torch.float64)
    ids = 10**12 + torch.arange(len(x.q))
    together = sparse_attention(*x, SMALL, noise=NOISE, token_ids=ids)
    table = block_table(x.cu_seqlens, len(x.q), SMALL)
    begins = x.cu_seqlens.tolist()
    for order in ((2, 0, 1), (1,), (1, 2)):
        rows = torch.cat([torch.arange(begins[d], begins[d + 1]) for d in order])
        other = Inputs(
            *(y[rows] for y in x[:3]), torch.tensor([0, *(lengths[d] for d in order)]).cumsum(0)
        )
        out = sparse_attention(*other, SMALL, noise=NOISE, token_ids=ids[rows])
        own = block_table(other.cu_seqlens, len(rows), SMALL)
        shift = own.first[own.block_of.long()] - table.first[table.block_of[rows].long()]
        expected = together.selected[:, rows]
        assert torch.equal(
            out.selected, torch.where(expected < 0, expected, expected + shift[:, None])
        )
        assert_close("out", out.out, together.out[rows])


# Decoding

DECODE_SPECS = [
    SMALL,
    replace(SMALL, order=0, score="max"),
    replace(SMALL, tail="drop"),
    replace(SMALL, score="error_gain"),
    replace(SMALL, top_p=0.6, top_k=4),
    replace(SMALL, top_k=0),
    replace(SMALL, min_sparse_length=33),
    replace(SMALL, num_sink_blocks=0, window_size=0),
    replace(SMALL, num_sink_blocks=3, window_size=20),
    replace(SMALL, block_size=1, coarse_block_size=1),
    replace(SMALL, top_k=100, tail="drop"),
    replace(SMALL, rank_lse="super", fanout=2, window_size=0),
]


@pytest.mark.parametrize(
    "branches", [(True, True), (True, False), (False, True)], ids=["both", "exact", "coarse"]
)
@pytest.mark.parametrize("spec", DECODE_SPECS, ids=short)
def test_decoding_equals_the_last_token_of_the_whole(spec, branches):
    num_rows, exact, coarse = 3, *branches
    x = draw((64,) * num_rows, heads=6)
    given = extras(x)
    q, keys, values, bias = (y.unflatten(0, (num_rows, 64)) for y in (x.q, x.k, x.v, given["bias"]))
    cache = EntryCache(spec, num_rows, 64, 2, 8, torch.float64, q.device)
    seen = 0
    for length in (1, 7, 8, 9, 15, 16, 17, 24, 25, 32, 33, 40, 41, 48, 49, 63, 64):
        cache.update(keys[:, :length], values[:, :length], seen)
        seen = length
        whole = Inputs(
            *(y[:, :length].flatten(0, 1) for y in (q, keys, values)),
            torch.arange(num_rows + 1) * length,
        )
        for extra in (False, True):
            if extra and not exact and length <= spec.block_size:
                continue  # the test below
            options: dict[str, Any] = {"exact": exact, "coarse": coarse}
            expected = sparse_attention(
                *whole,
                spec,
                **options,
                **(
                    {"bias": bias[:, :length].flatten(0, 1), "sink": given["sink"]} if extra else {}
                ),
            )
            out, lse = decode(
                q[:, length - 1],
                keys,
                values,
                cache.entries,
                length,
                spec,
                **options,
                **({"bias": bias[:, length - 1], "sink": given["sink"]} if extra else {}),
            )
            last = torch.arange(1, num_rows + 1) * length - 1
            assert_close("out", out, expected.out[last])
            assert_lse(lse, expected.lse[last])


def test_decoding_with_a_sink_alone_equals_the_last_token_of_the_whole():
    x = draw((5,))
    sink = extras(x)["sink"]
    cache = EntryCache(SMALL, 1, 64, 2, 8, torch.float64, x.q.device)
    expected = sparse_attention(*x, SMALL, sink=sink, exact=False)
    out, lse = decode(
        x.q[-1:], x.k[None], x.v[None], cache.entries, 5, SMALL, sink=sink, exact=False
    )
    assert torch.equal(out, expected.out[-1:]) and torch.equal(lse, expected.lse[-1:])


@pytest.mark.parametrize("learned", [False, True], ids=["mean", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decoding_in_lower_precision_equals_the_whole(dtype, learned):
    x = draw((64, 64), dim=16, dtype=dtype)
    q, keys, values = (y.unflatten(0, (2, 64)) for y in x[:3])

    def weigh(values: Tensor) -> Tensor:
        return torch.stack((2 * values, values.flip(-1)), -2)

    cache = EntryCache(SMALL, 2, 64, 2, 16, dtype, q.device, weigh if learned else None)
    cache.update(keys, values, 0)
    out, lse = decode(q[:, -1], keys, values, cache.entries, 64, SMALL)
    expected = sparse_attention(*x, SMALL, pool_logits=weigh(x.v) if learned else None)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close("out", out, expected.out[[63, 127]])
    assert_close("lse", lse, expected.lse[[63, 127]])


@pytest.mark.parametrize("steps", [(64,), (1,) * 64, (3, 4, 1, 1, 20, 35), (7, 2, 8, 47)], ids=len)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_the_entry_cache_equals_pooling(steps, dtype):
    x = draw((64, 64), dtype=dtype)
    keys, values = (y.unflatten(0, (2, 64)) for y in (x.k, x.v))
    cache = EntryCache(SMALL, 2, 70, 2, 8, dtype, x.q.device)
    seen = 0
    for step in steps:
        cache.update(keys[:, : seen + step], values[:, : seen + step], seen)
        seen += step
        assert all((e[:, :, seen // 8 * 2 :] == 0).all() for e in cache.entries)
    pooled = chunked.pool(x.k, x.v, block_table(x.cu_seqlens, 128, SMALL), SMALL)
    for name, ours, expected in zip(pooled._fields, cache.entries, pooled, strict=True):
        expected = expected[:, :32].unflatten(1, (2, 16)).transpose(0, 1)
        assert ours.dtype == dtype
        assert_close(name, ours, expected)


def test_pooling_is_mean_and_variance_of_complete_blocks_only(poisoned):
    x = draw((20, 3, 16))
    entries = chunked.pool(x.k, x.v, block_table(x.cu_seqlens, 39, SMALL), SMALL)
    for at, begin in ((0, 0), (1, 4), (2, 8), (3, 12), (8, 23), (9, 27), (10, 31), (11, 35)):
        keys = x.k[begin : begin + 4]
        assert_close("mean", entries.key_mean[:, at], keys.mean(0))
        assert_close("var", entries.key_var[:, at], keys.var(0, unbiased=False))
        assert_close("value", entries.value_mean[:, at], x.v[begin : begin + 4].mean(0))
    assert all(e.isfinite().all() for e in entries)


@pytest.mark.parametrize("length", [0, 65, -1])
def test_decoding_refuses_a_length_the_cache_does_not_hold(length):
    x = draw((64,))
    cache = EntryCache(SMALL, 1, 64, 2, 8, torch.float64, x.q.device)
    with pytest.raises(ValueError, match=f"length {length} .*64 tokens"):
        decode(x.q[-1:], x.k[None], x.v[None], cache.entries, length, SMALL)


# Errors name the value


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"window_size": -2}, "window_size is -2"),
        ({"num_sink_blocks": -3}, "num_sink_blocks is -3"),
        ({"coarse_block_size": 0}, "coarse_block_size is 0"),
        ({"min_sparse_length": -4}, "min_sparse_length is -4"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"fanout": 1}, "fanout is 1"),
        ({"num_expanded": 0}, "num_expanded is 0"),
        ({"block_size": 64, "coarse_block_size": 48}, "block_size 64 .* coarse_block_size 48"),
        ({"order": 1}, "order is 1.*0, 2"),
        ({"score": "mean"}, "score is 'mean'"),
        ({"tail": "keep"}, "tail is 'keep'"),
        ({"num_levels": 3}, "num_levels is 3"),
        ({"max_variance": -0.5}, "max_variance is -0.5"),
        ({"max_variance": math.inf}, "max_variance is inf"),
        ({"max_variance": math.nan}, "max_variance is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": 0.5, "score": "max"}, "score=max"),
        ({"score": "error_gain", "order": 0}, "order=2"),
        ({"rank_lse": "half"}, "rank_lse is 'half'.*exact, super"),
        ({"rank_lse": "super", "score": "max"}, "score=max ranks by logits"),
        ({"rank_lse": "super", "top_p": 0.5}, "top_p=0.5 covers"),
        ({"rank_lse": "super", "resident_blocks": 3}, "resident_blocks=3 adds up"),
        ({"rank_lse": "super", "num_levels": 2}, "num_levels=2 has closed"),
        ({"num_levels": 2, "tail": "drop"}, "not drop"),
        ({"num_levels": 2, "top_p": 0.5}, "num_levels=1"),
        ({"top_k": -1, "fanout": 0}, "(?s)top_k is -1.*fanout is 0"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SparseAttentionSpec(**changes)


@pytest.mark.parametrize(
    "changes, words",
    [({"temperature": -0.1}, "temperature is -0.1"), ({"min_top_k": -2}, "min_top_k is -2")],
)
def test_noise_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SelectionNoise(**changes)


X = draw((12, 8), heads=4, kv_heads=2)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "q_flat": ({"q": X.q[0]}, r"q \(4, 8\)"),
    "k_flat": ({"k": X.k[0]}, r"k \(2, 8\)"),
    "lengths": ({"k": X.k[1:]}, r"k \(19, 2, 8\)"),
    "dims": ({"k": X.k[..., 1:]}, r"k \(20, 2, 7\)"),
    "latent": ({"v": X.v[..., 1:]}, r"v \(20, 2, 7\).*MLA"),
    "uneven": ({"q": X.q[:, :3]}, "3 heads .* 2 key/value heads"),
    "dtypes": ({"q": X.q.float()}, "torch.float32, torch.float64, torch.float64"),
    "integers": ({"q": X.q.long(), "k": X.k.long(), "v": X.v.long()}, "torch.int64"),
    "cu_matrix": ({"cu_seqlens": X.cu_seqlens[None]}, r"\(1, 3\)"),
    "cu_short": ({"cu_seqlens": torch.tensor([20])}, r"\(1,\)"),
    "cu_float": ({"cu_seqlens": X.cu_seqlens.float()}, "torch.float32"),
    "cu_start": ({"cu_seqlens": torch.tensor([1, 20])}, "from 1 to 20"),
    "cu_end": ({"cu_seqlens": torch.tensor([0, 19])}, "20 tokens.*from 0 to 19"),
    "cu_falls": ({"cu_seqlens": torch.tensor([0, 12, 8, 20])}, "falls in between"),
    "bias": ({"bias": X.q[..., 0].T}, r"bias has shape \(4, 20\), expected \(20, 4\)"),
    "sink": ({"sink": torch.zeros(2)}, r"sink has shape \(2,\), expected \(4,\)"),
    "pool_logits": (
        {"pool_logits": X.k},
        r"pool_logits has shape \(20, 2, 8\), expected \(20, 2, 2, 8\)",
    ),
    "pool_logits_levels": (
        {
            "pool_logits": torch.stack((X.k, X.k), 2),
            "spec": replace(SMALL, num_levels=2),
        },
        "leave pool_logits out",
    ),
    "token_ids": ({"token_ids": torch.arange(19)}, r"token_ids has shape \(19,\)"),
    "selected": (
        {"selected": torch.zeros(4, 20, 1)},
        r"selected has shape \(4, 20, 1\), expected \(2, 20, K\)",
    ),
    "selected_flat": ({"selected": torch.zeros(2, 20)}, r"selected has shape \(2, 20\)"),
    "ht": ({"spec": replace(SMALL, tail="ht")}, "tail=ht is sampled"),
    "ht_cv": ({"spec": replace(SMALL, tail="ht_cv")}, "tail=ht_cv is sampled"),
    "no_branch": ({"exact": False, "coarse": False}, "nothing is left"),
    "backend": ({"backend": "cudnn"}, "'cudnn'; choose triton, cpp or chunked"),
}


def test_no_key_value_heads_are_refused():
    with pytest.raises(ValueError, match="0 key/value heads"):
        sparse_attention(X.q, X.k[:, :0], X.v[:, :0], X.cu_seqlens, SMALL)


def test_a_temperature_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        SelectionNoise(temperature=math.nan)


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(case):
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        sparse_attention(**{**X._asdict(), "spec": SMALL, **changes})


# Audit


def dense_rows(x: Inputs, sink: Tensor | None) -> Tensor:
    """Dense attention [T, H, d]; a sink takes its share."""
    out, lse = dense_attention(x, leaves(x, {}))
    out, lse = out.detach(), lse.detach()
    return out if sink is None else out * (lse - torch.logaddexp(lse, sink)).exp().unsqueeze(-1)


AUDITED = [
    SMALL,
    replace(SMALL, order=0),
    replace(SMALL, coarse_block_size=8, max_variance=4.0),
    replace(SMALL, tail="drop"),
    replace(SMALL, coarse_block_size=2, top_k=0),
    replace(SMALL, block_size=4, coarse_block_size=1, window_size=0),
    replace(SMALL, rank_lse="super", fanout=2),
]


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "bias_and_sink_and_weights"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("spec", AUDITED, ids=short)
def test_the_audit_finds_the_true_error_and_theorem_1_bounds_it(spec, scale, extra):
    for seed, smooth in ((0, 0.0), (1, 0.95)):
        x = draw((0, 61, 1, 80), seed=seed, scale=scale, smooth=smooth)
        given = extras(x) | weights(x) if extra else {}
        result = sparse_attention(*x, spec, **given)
        rows = (
            torch.arange(len(x.q))[::3]
            if seed
            else torch.randperm(len(x.q), generator=torch.Generator().manual_seed(0))
        )
        found = audit_rows(*x, spec, result, rows, **given)
        dense = dense_rows(x, given.get("sink"))[rows]
        true = (result.out[rows] - dense).norm(dim=-1) / dense.norm(dim=-1)
        assert all(t.shape == (len(rows), 4) and t.isfinite().all() for t in found)
        assert (found.error - true).abs().max() < 1e-12 and (
            found.alignment - true.square()
        ).abs().max() < 1e-12
        assert (found.bound >= found.error * (1 - 1e-6) - 1e-12).all()
        assert (found.mass_kl >= -1e-12).all()


@pytest.mark.parametrize("low", [-80.0, -1e30])
def test_theorem_1_holds_under_a_bias_that_drops_the_tail(low):
    x = draw((80,))
    bias = torch.full_like(x.q[..., 0], low)
    found = audit_rows(
        *x, SMALL, sparse_attention(*x, SMALL, bias=bias), torch.arange(80), bias=bias
    )
    assert (found.bound >= found.error - 1e-12).all()


def adversary(
    seed: int, dtype: torch.dtype
) -> tuple[Inputs, SparseAttentionSpec, dict[str, Tensor]]:
    """Random shapes and settings, with what makes exponentials overflow, cancel or vanish among
    them.
    """
    gen = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=gen))]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    size, length, kv_heads = pick(1, 2, 4, 8), pick(20, 48, 70), pick(1, 2)
    spec = SparseAttentionSpec(
        block_size=size,
        coarse_block_size=pick(*(c for c in (1, 2, 4, 8) if c <= size)),
        top_k=pick(0, 1, 3),
        window_size=pick(0, 1, size + 1),
        num_sink_blocks=pick(0, 1),
        order=pick(0, 2),
        max_variance=pick(0.0, 0.4, 4.0, 32.0, 1e4),
        tail=pick("coarse", "coarse", "coarse", "drop"),
    )
    if spec.tail == "coarse" and pick(*(False,) * 7, True):
        spec = replace(spec, num_levels=2, fanout=2, num_expanded=1)
    q, k, v = draw(length, 2, 4), draw(length, kv_heads, 4), draw(length, kv_heads, 4)
    q, k, v = q * pick(0.1, 1, 1, 6, 30), k * pick(0.1, 1, 1, 5), v * pick(1e-6, 1, 1, 1e4)
    at = torch.arange(length).view(-1, 1, 1)
    if pick(False, False, True):  # keys that are equal, or nearly
        k = k[:1].expand_as(k) + pick(0.0, 1e-4) * draw(length, kv_heads, 4)
    if pick(False, False, False, True):
        v = v[:1].expand_as(v) + pick(0.0, 1e-6) * draw(length, kv_heads, 4)
    if pick(False, False, False, True):
        v = v * (at % 7 == 3)
    if pick(*(False,) * 5, True):  # one key in eleven has all the mass, or none
        k = 50 * k * (at % 11 == 3)
    if pick(*(False,) * 8, True):
        v = torch.zeros_like(v)
    given = {
        "bias": pick(
            None,
            None,
            torch.full((length, 2), pick(-80.0, -4.0, 2.0, 4.0, 30.0)),
            3 * draw(length, 2),
        ),
        "sink": pick(None, None, torch.tensor([-3.0, 3.0]), torch.full((2,), 50.0)),
    }
    given = {
        n: x.to(dtype)
        for n, x in given.items()
        if x is not None and (n == "sink" or spec.tail != "drop")
    }
    return (
        Inputs(
            *(x.to(dtype).contiguous() for x in (q, k, v)), torch.tensor([0, length // 3, length])
        ),
        spec,
        given,
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_bound_is_finite_not_negative_and_holds_on_a_thousand_cases(dtype, part):
    eps = torch.finfo(dtype).eps
    for seed in range(250 * part, 250 * part + 250):
        x, spec, given = adversary(seed, dtype)
        result, rows = sparse_attention(*x, spec, **given), torch.arange(len(x.q))
        found = audit_rows(*x, spec, result, rows, **given)
        for name, values in found._asdict().items():
            assert values.isfinite().all() and (name == "mass_kl" or (values >= 0).all()), (
                seed,
                name,
            )
        wide = Inputs(*(t.double() for t in x[:3]), x.cu_seqlens)
        dense = dense_rows(wide, None if "sink" not in given else given["sink"].double())
        floor = (eps * x.v.double().norm(dim=-1).amax()).clamp_min(torch.finfo(dtype).tiny)
        error = (result.out.double() - dense).norm(dim=-1) / torch.maximum(
            dense.norm(dim=-1), floor
        )
        assert (error <= found.bound + found.rounding).all(), seed
        assert (found.error <= found.bound + found.rounding).all(), seed
        if dtype == torch.float64:  # rounding hides nothing here
            assert (found.error <= found.bound + 1e-9).all(), seed


@pytest.mark.parametrize("max_variance", [4.0, 32.0, 1e4])
def test_a_tail_that_takes_all_the_mass_leaves_a_positive_bound(max_variance):
    """1 - (mass of the tail) is nothing but rounding there."""
    x = draw((80,), scale=6.0, dtype=torch.float32)
    spec = replace(SMALL, max_variance=max_variance, top_k=0)
    found = audit_rows(*x, spec, sparse_attention(*x, spec), torch.arange(80))
    assert (found.bound >= 0).all() and found.bound.isfinite().all()
    assert (found.error <= found.bound + found.rounding).all() and found.bound.max() > 0.1


@pytest.mark.parametrize("offset", [2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_distances_count_in_the_bound_however_many_rows_are_audited(dtype, offset):
    x, spec = (
        draw((80,), dtype=dtype),
        replace(SMALL, block_size=1, coarse_block_size=1, window_size=0, top_k=1),
    )
    x = x._replace(v=1 + 1e-5 * x.v)  # |a|^2 + |b|^2 - 2 ab would lose these
    bias = torch.full((80, x.q.shape[1]), offset, dtype=dtype)
    found = audit_rows(*x, spec, sparse_attention(*x, spec, bias=bias), torch.arange(80), bias=bias)
    assert (found.error <= found.bound + 8 * torch.finfo(dtype).eps).all()


def test_the_bound_shrinks_with_the_spread_of_the_logits():
    medians = []
    for scale in (0.05, 0.3, 1.0):
        x = draw((80,), scale=scale)
        found = audit_rows(*x, SMALL, sparse_attention(*x, SMALL), torch.arange(40, 80))
        medians.append(float(found.bound.median()))
    assert medians == sorted(medians) and medians[0] < 0.1


def test_the_error_is_zero_where_nothing_is_left_out():
    x = draw((30, 20))
    found = audit_rows(*x, DENSE, sparse_attention(*x, DENSE), torch.arange(50))
    assert found.error.max() < 1e-12 and (found.coherence == 0).all() and found.bound.max() < 1e-12


def test_coherence_is_the_mass_weighted_variance_term():
    x = draw((80,))
    spec = replace(SMALL, coarse_block_size=8, max_variance=100.0)
    result = sparse_attention(*x, spec)
    reference = reference_attention(*x, spec)
    # [Hk, M, d]
    var = torch.stack([x.k[m : m + 8].var(0, unbiased=False) for m in range(0, 80, 8)], 1)
    kappa = torch.einsum("thgd,hmd->htgm", x.q.square().unflatten(1, (2, 2)), var) / 16
    expected = (reference.entry_probs * kappa).sum(-1).transpose(0, 1).flatten(1)
    assert_close("coherence", audit_rows(*x, spec, result, torch.arange(80)).coherence, expected)


def test_mass_kl_is_the_divergence_of_the_estimated_from_the_true_shares():
    x = draw((50,), heads=2, kv_heads=1)
    spec = replace(SMALL, coarse_block_size=8, order=0)
    z = torch.einsum("thd,jd->htj", x.q, x.k[:, 0]) * 8**-0.5
    true = torch.stack([z[:, :, m : m + 8].logsumexp(-1) for m in range(0, 40, 8)], -1)[:, 45]
    estimated = torch.stack([z[:, :, m : m + 8].mean(-1) for m in range(0, 40, 8)], -1)[:, 45]
    p, log_q = true.softmax(-1), estimated.log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1)
    assert_close(
        "kl",
        audit_rows(*x, spec, sparse_attention(*x, spec), torch.tensor([45])).mass_kl[0],
        expected,
    )


@pytest.mark.parametrize("order", [0, 2])
def test_mass_kl_is_zero_where_blocks_are_coherent(order):
    x = draw((80,))
    x = x._replace(k=x.k[torch.arange(80) // 8 * 8])
    spec = replace(SMALL, order=order)
    found = audit_rows(*x, spec, sparse_attention(*x, spec), torch.arange(80))
    assert found.mass_kl.abs().max() < 1e-12 and found.coherence.abs().max() < 1e-12
    other = draw((80,))
    assert (
        audit_rows(*other, spec, sparse_attention(*other, spec), torch.arange(80))
        .mass_kl[24:]
        .min()
        > 1e-6
    )


@pytest.mark.parametrize("name", ["mass_kl", "coherence", "alignment"])
def test_a_step_along_its_gradient_lowers_the_loss(name):
    x = draw((80, 0, 40), smooth=0.5)
    spec = replace(SMALL, max_variance=4.0)
    selected = sparse_attention(*x, spec).selected
    rows = torch.arange(len(x.q))[::2]

    def loss(wanted: dict[str, Tensor]) -> Tensor:
        result = sparse_attention(cu_seqlens=x.cu_seqlens, spec=spec, selected=selected, **wanted)
        return getattr(
            audit_rows(wanted["q"], wanted["k"], wanted["v"], x.cu_seqlens, spec, result, rows),
            name,
        ).mean()

    wanted = leaves(x, {})
    before = loss(wanted)
    grads = torch.autograd.grad(before, list(wanted.values()), allow_unused=True)
    found = {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}
    assert {"q", "k"} <= found.keys() and all(g.isfinite().all() for g in found.values())
    norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert norm > 1e-6
    stepped = {
        n: t.detach() - (0.05 * found[n] / norm if n in found else 0) for n, t in wanted.items()
    }
    assert loss(stepped) < before


def test_sampled_rows_are_the_same_under_any_batching_and_of_the_given_rate():
    ids = torch.arange(100_000) + 10**10
    whole = ids[sample_rows(token_hash(3, ids), 0.02)]
    assert abs(len(whole) / 100_000 - 0.02) < 0.002
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))
    parts = [piece[sample_rows(token_hash(3, piece), 0.02)] for piece in ids[order].split(7919)]
    assert torch.equal(torch.cat(parts).sort().values, whole)
    assert (
        len(sample_rows(token_hash(3, ids), 0.0)) == 0
        and len(sample_rows(token_hash(3, ids), 1.0)) == 100_000
    )
    fewer = ids[sample_rows(token_hash(3, ids), 0.01)]
    assert torch.isin(fewer, whole).all()


def test_no_sampled_row_gives_an_empty_audit():
    x = draw((40,))
    found = audit_rows(*x, SMALL, sparse_attention(*x, SMALL), torch.zeros(0, dtype=torch.int64))
    assert all(t.shape == (0, 4) for t in found)


def test_the_bound_on_the_mean_holds_in_99_of_100_skewed_draws():
    torch.manual_seed(0)
    law = torch.distributions.Beta(torch.tensor(0.1), torch.tensor(2.0))
    true, bounds = 0.1 / 2.1, []
    for _ in range(300):
        values = law.sample((250,)).double()
        bounds.append(
            mean_error_bound(float(values.mean()), float(values.square().mean()), 250, failure=0.01)
        )
    assert sum(bound >= true for bound in bounds) >= 297
    assert sum(bounds) / 300 < 4 * true, "of no use"


def test_the_bound_on_the_mean_falls_with_the_count_and_the_certainty():
    bounds = [mean_error_bound(0.1, 0.05, count) for count in (0, 1, 2, 100, 10_000, 10**8)]
    assert bounds[:3] == [1.0, 1.0, 1.0] and bounds == sorted(bounds, reverse=True)
    assert 0.1 < bounds[-1] < 0.1001
    assert mean_error_bound(0.1, 0.05, 1000, 0.1) < mean_error_bound(0.1, 0.05, 1000, 1e-6)


@pytest.mark.parametrize("selected, words", [([[[5]]], "0 to"), ([[[1, 1]]], "distinct")])
def test_selected_blocks_that_are_no_candidates_are_refused(selected, words):
    q, k, cu_seqlens = torch.randn(64, 2, 8), torch.randn(64, 1, 8), torch.tensor([0, 64])
    spec = SparseAttentionSpec(
        block_size=8, coarse_block_size=8, top_k=1, window_size=1, num_sink_blocks=0
    )
    wide = torch.tensor(selected, dtype=torch.int32).expand(1, 64, -1).clone()
    wide[:, :32] = -1
    with pytest.raises(ValueError, match=words):
        sparse_attention(q, k, k, cu_seqlens, spec, selected=wide)


def test_only_what_is_trained_on_carries_gradient_out_of_an_audit():
    """Metrics of an audit are converted to numbers; a gradient there would keep the graph of the
    whole layer.
    """
    spec = SparseAttentionSpec(block_size=16, coarse_block_size=8, top_k=2, window_size=32)
    q, k, v = (torch.randn(100, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    documents = torch.tensor([0, 40, 100])
    audit = audit_rows(
        q,
        k,
        v,
        documents,
        spec,
        sparse_attention(q, k, v, documents, spec),
        rows=torch.arange(0, 100, 7),
    )
    assert {name for name in audit._fields if getattr(audit, name).requires_grad} == {
        "mass_kl",
        "coherence",
        "alignment",
    }


@pytest.mark.parametrize("pooled", [True, False])
def test_a_problem_comes_back_whole_from_what_backward_keeps(pooled):
    q, k = torch.zeros(5, 2, 4), torch.ones(5, 1, 4)
    table = block_table(torch.tensor([0, 5]), 5, SMALL)
    problem = Problem(
        q=q,
        k=k,
        v=2 * k,
        bias=None,
        sink=torch.ones(2),
        selected=nothing_selected(q, 1),
        entries=CoarseEntries(k, 2 * k, 3 * k) if pooled else None,
        table=table,
        spec=SMALL,
        exact=True,
        coarse=pooled,
    )
    again = Problem.of_tensors(problem.tensors(), SMALL, True, pooled)
    for name, before, after in zip(Problem._fields, problem, again, strict=True):
        if isinstance(before, tuple):
            assert type(before) is type(after) and all(map(operator.is_, before, after)), name
        else:
            assert before is after, name
    assert Problem._fields[:GRADIENTS] == ("q", "k", "v", "bias", "sink")
