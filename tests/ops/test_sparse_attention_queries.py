"""Some of the tokens attend, as on a rank that gathers keys and values: outputs are those of the
whole call, and gradients of keys and values add up to it over disjoint sets of queries.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ops.sparse_attention import SelectionNoise, sparse_attention
from ops.sparse_attention.audit import audit_rows
from ops.testing import assert_close
from tests.ops.test_sparse_attention import BACKENDS, SMALL, draw, extras, normal

NOISE = SelectionNoise(3, 0.8, 1, first_kv_head=2, num_kv_heads=6)
CASES = {
    "all": {},
    "coarse alone": {"exact": False},
    "exact alone": {"coarse": False},
    "noise": {"noise": NOISE},
    "learned entries": {"pool": True},
    "one pass": {"spec": replace(SMALL, rank_lse="super", fanout=2), "noise": NOISE, "pool": True},
    "two levels": {"spec": replace(SMALL, num_levels=2, fanout=2, num_expanded=1), "noise": NOISE},
}


def sets_of(length: int) -> list[torch.Tensor]:
    """Blocks of 5 tokens, dealt out unevenly, as documents do not know of them."""
    block = torch.arange(length) // 5
    return [(block % 7 < 3).nonzero()[:, 0], (block % 7 >= 3).nonzero()[:, 0]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sets_of_queries_add_up_to_the_whole(backend, case):
    options = dict(CASES[case])
    spec = options.pop("spec", SMALL)
    x = draw(seed=5, dim=16)
    leaves = [t.clone().requires_grad_() for t in (*x[:3], *extras(x).values())]
    if options.pop("pool", False):
        leaves.append(normal(*x.k.shape[:2], 2, 16, seed=11).requires_grad_())
    ids = torch.arange(len(x.q)) * 3 + 1
    dout, dlse = normal(*x.q.shape, seed=21), normal(*x.q.shape[:2], seed=22)

    def attend(queries: torch.Tensor | None):
        q, k, v, bias, sink, *rest = leaves
        own = slice(None) if queries is None else queries
        found = sparse_attention(
            q[own],
            k,
            v,
            x.cu_seqlens,
            spec,
            bias=bias[own],
            sink=sink,
            pool_logits=rest[0] if rest else None,
            token_ids=ids[own],
            queries=queries,
            backend=backend,
            **options,
        )
        seen = found.lse.isfinite()
        loss = (found.out * dout[own]).sum() + (found.lse * dlse[own])[seen].sum()
        return found, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    whole, expected = attend(None)
    total = [torch.zeros_like(x) for x in expected]
    for queries in sets_of(len(x.q)):
        found, grads = attend(queries)
        assert torch.equal(found.selected, whole.selected[:, queries])
        for name in ("out", "lse", "tail_mass", "selected_mass"):
            theirs = getattr(whole, name)[queries].detach()
            seen = theirs.isfinite()
            assert_close(name, getattr(found, name)[seen], theirs[seen])
        total = [a + b for a, b in zip(total, grads, strict=True)]
    for i, (found, reference) in enumerate(zip(total, expected, strict=True)):
        assert_close(f"gradient {i}", found, reference)
    assert all(g.abs().max() > 1e-3 for g in expected[:3])


def test_all_tokens_as_queries_are_the_whole_call():
    x = draw(seed=2)
    every = torch.arange(len(x.q))
    for backend in BACKENDS:
        whole = sparse_attention(*x, SMALL, backend=backend)
        named = sparse_attention(*x, SMALL, queries=every, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(whole, named, strict=True))


def test_an_audit_of_queries_is_that_of_their_rows():
    x = draw(seed=6)
    more = extras(x)
    whole = sparse_attention(*x, SMALL, **more)
    queries = sets_of(len(x.q))[0]
    bias = more["bias"][queries]
    own = sparse_attention(
        x.q[queries], *x[1:], SMALL, bias=bias, sink=more["sink"], queries=queries
    )
    rows = queries[1::4]
    expected = audit_rows(*x, SMALL, whole, rows, more["bias"], more["sink"])
    found = audit_rows(x.q[queries], *x[1:], SMALL, own, rows, bias, more["sink"], queries=queries)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (torch.tensor([3, 1]), "do not rise"),
        (torch.tensor([0, 200]), "from 0 to 200"),
        (torch.tensor([0, 1, 2]), "each of the 2 rows"),
        (torch.tensor([0, 1], dtype=torch.int32), "as int64"),
    ],
)
def test_queries_that_name_no_tokens_are_refused(queries, said):
    x = draw()
    with pytest.raises(ValueError, match=said):
        sparse_attention(x.q[:2], *x[1:], SMALL, queries=queries)
