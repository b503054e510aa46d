"""Attention of decoding to listed rows, in plain torch, against its definition."""

from __future__ import annotations

import pytest
import torch

from ops.gather_attention import Lookup, Source, attend_rows, lookup, reference_lookup


def drawn(
    choices: int, kv_heads: int, dtype: torch.dtype, sources: int, sink: bool, nothing: bool
) -> Lookup:
    """Nine queries of six heads; lists with gaps, the later half of them empty with `nothing`."""
    generator = torch.Generator().manual_seed(kv_heads + sources)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    made = []
    for number in range(sources):
        size = 30 + 7 * number
        rows = torch.randint(-4, size, (choices, 9, 5 + 2 * number), generator=generator)
        rows = rows.clamp_min(-1).to(torch.int32)
        if nothing:
            rows[:, 5:] = -1
        keys = normal(size, kv_heads, 4)
        made.append(Source(keys, None if number else normal(size, kv_heads, 4), rows))
    return Lookup(normal(9, 6, 4), tuple(made), normal(6) if sink else None)


@pytest.mark.parametrize("nothing", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("choices", "kv_heads", "sources"), [(1, 2, 1), (3, 3, 1), (1, 1, 2), (2, 2, 2)]
)
def test_listed_rows_are_attended_to(choices, kv_heads, sources, sink, nothing, monkeypatch):
    """In one tile and in several."""
    problem = drawn(choices, kv_heads, torch.float64, sources, sink, nothing)
    found = attend_rows(problem, "torch")
    torch.testing.assert_close(found, reference_lookup(problem))
    monkeypatch.setattr(lookup, "TILE_VALUES", 300)
    torch.testing.assert_close(attend_rows(problem, "torch"), found)


def test_half_precision_is_computed_in_single():
    problem = drawn(1, 2, torch.bfloat16, 2, True, False)
    found = attend_rows(problem, "torch")
    exact = [
        Source(k.double(), None if v is None else v.double(), r) for k, v, r in problem.sources
    ]
    want = reference_lookup(Lookup(problem.q.double(), tuple(exact), problem.sink.double()))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, want.bfloat16(), atol=1e-2, rtol=1e-2)
