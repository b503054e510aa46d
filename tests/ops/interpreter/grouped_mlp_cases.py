"""Worker of tests/ops/test_grouped_mlp_triton.py, run by path with TRITON_INTERPRET=1: the kernels
of the grouped MLP in Triton's interpreter against the definition. Arguments: names of groups of
cases; prints one line per case and failure.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import traceback
from dataclasses import dataclass, replace

import shim  # noqa: F401
import torch
from torch import Tensor

from ops.grouped_mlp import dequantized, quantize_rows, triton_backend
from ops.grouped_mlp.fp8 import TILE, round_rows, rounded_tiles
from ops.grouped_mlp.kernels import configs
from ops.grouped_mlp.reference import reference_grouped_mlp
from ops.grouped_mlp.spec import Precision, Stored
from ops.permute import group_by_expert
from ops.testing import EDGE_CASES, assert_close, draw_expert_ids, poisoned_memory

torch.set_num_threads(1)
NAMES = ("grad_hidden", "grad_weights", "grad_gate_up", "grad_down")


@dataclass(frozen=True)
class Case:
    """routing: arguments of draw_expert_ids. few_rows: of configs; 0: row tiles of 128.
    architecture: of tile sizes. stored: of what 8 bits the weights are.
    """

    routing: tuple[int, int, int, str] = (67, 5, 3, "even")
    hidden_size: int = 48
    width: int = 40
    dtype: torch.dtype = torch.float32
    few_rows: int = configs.FEW_ROWS
    architecture: int = 90
    stored: Stored = "int8"


FLOAT32 = {name: Case(routing) for name, routing in EDGE_CASES.items()} | {
    "several tiles": Case((150, 4, 2, "skewed")),
    "widths of whole tiles": Case(hidden_size=64, width=32),
    "odd widths": Case((23, 3, 2, "skewed"), 37, 19),
    "one slot": Case((61, 4, 1, "skewed")),
    "one slot, half unused": Case((61, 4, 1, "unused")),
    "many column tiles": Case((20, 3, 2, "even"), 300, 270),
    "many experts": Case((9, 150, 2, "even"), 16, 16),
}
HALF = {
    f"{name} {dtype}": replace(case, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for name, case in {
        "edges": Case((131, 5, 3, "unused"), 80, 72),
        "whole tiles": Case((290, 3, 2, "skewed"), 256, 128, few_rows=0),
        "several column tiles": Case((70, 3, 2, "half"), 320, 144, few_rows=0),
        "sizes of sm_80": Case((140, 2, 2, "unused"), 144, 136, few_rows=0, architecture=80),
        "short and long sums": Case((70, 1, 1, "even"), 264, 520),
        "one slot": Case((150, 2, 1, "even"), 64, 64),
        "no tokens": Case(EDGE_CASES["no_tokens"]),
    }.items()
}


def check(case: Case) -> str:
    """Outputs and gradients against the definition in fp64; the largest errors over the largest
    values.
    """
    (num_tokens, num_experts, top_k, _), dim, width = case.routing, case.hidden_size, case.width
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    slots, inverse, offsets = group_by_expert(draw_expert_ids(*case.routing), num_experts)
    # of unused slots too: they must reach nothing
    weights = torch.rand(num_tokens, top_k, generator=generator)
    hidden, gate_up, down, grad_out = (
        x.to(case.dtype)
        for x in (
            normal(num_tokens, dim),
            normal(num_experts, 2 * width, dim) * 1.5 * dim**-0.5,
            normal(num_experts, dim, width) * width**-0.5,
            normal(num_tokens, dim),
        )
    )
    given = (hidden, weights, gate_up, down, slots, inverse, offsets)
    with poisoned_memory():
        out, pre = triton_backend.forward(*given, keep=True)
        again, nothing = triton_backend.forward(*given, keep=False)
        grads = triton_backend.backward(grad_out, *given, pre)
        recomputed = triton_backend.backward(grad_out, *given, None)
    assert nothing is None and pre is not None and pre[int(offsets[-1]) :].isnan().all(), (
        "rows behind the last were written"
    )
    assert torch.equal(out, again), "two runs differ"
    for name, grad, second in zip(NAMES, grads, recomputed, strict=True):
        assert torch.equal(grad, second), f"{name} differs when pre-activations are recomputed"

    exact = [x.double().requires_grad_() for x in given[:4]]
    expected = reference_grouped_mlp(*exact, slots, inverse, offsets)
    theirs = torch.autograd.grad(expected, exact, grad_out.double())
    assert not grads[1][inverse < 0].any(), "unused slots have gradients"
    idle = offsets.diff() == 0
    assert not grads[2][idle].any() and not grads[3][idle].any(), (
        "experts without rows have gradients"
    )
    found = []
    for name, ours, reference in zip(
        ("out", *NAMES), (out, *grads), (expected, *theirs), strict=True
    ):
        assert ours.dtype == (torch.float32 if name == "grad_weights" else case.dtype), name
        assert_close(name, ours, reference, case.dtype)
        if reference.count_nonzero():
            exact = reference.detach()
            found.append(f"{name} {float((ours - exact).abs().max() / exact.abs().max()):.1e}")
    return ", ".join(found)


STORED = {
    f"{stored} {name} {dtype} sm_{case.architecture}": replace(case, dtype=dtype, stored=stored)
    for stored, name, case, dtype in (
        ("int8", "edges", Case((67, 5, 3, "unused"), 48, 40), torch.float32),
        ("int8", "odd widths", Case((23, 3, 2, "skewed"), 37, 19), torch.float32),
        ("int8", "one slot", Case((61, 4, 1, "unused")), torch.float32),
        ("int8", "edges", Case((131, 5, 3, "unused"), 80, 72), torch.bfloat16),
        ("int8", "whole tiles", Case((140, 3, 2, "skewed"), 128, 128, few_rows=0), torch.bfloat16),
        ("int8", "one slot", Case((70, 2, 1, "even"), 64, 64), torch.float16),
        ("fp8", "edges", Case((67, 5, 3, "unused"), 48, 40), torch.float32),
        ("fp8", "whole tiles", Case((70, 3, 2, "skewed"), 128, 128), torch.bfloat16),
        ("fp8", "odd widths", Case((23, 3, 2, "skewed"), 37, 19), torch.float16),
        # by the bits
        ("fp8", "one slot", Case((61, 4, 1, "unused"), architecture=80), torch.float32),
        ("fp8", "edges", Case((67, 5, 3, "unused"), 80, 72, architecture=80), torch.bfloat16),
        ("fp8", "odd widths", Case((23, 3, 2, "skewed"), 37, 19, architecture=80), torch.float16),
    )
}


def check_stored(case: Case) -> str:
    """The product of 8-bit weights against the definition on what they stand for, in fp64."""
    (num_tokens, num_experts, top_k, _), dim, width = case.routing, case.hidden_size, case.width
    generator = torch.Generator().manual_seed(num_tokens)
    slots, inverse, offsets = group_by_expert(draw_expert_ids(*case.routing), num_experts)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    hidden = torch.randn(num_tokens, dim, generator=generator).to(case.dtype)
    gate_up = torch.randn(num_experts, 2 * width, dim, generator=generator) * 1.5 * dim**-0.5
    down = torch.randn(num_experts, dim, width, generator=generator) * width**-0.5
    # rows of very different sizes, so that a scale of another row would show
    gate_up *= torch.logspace(-1, 1, 2 * width)[:, None]
    down *= torch.logspace(1, -1, dim)[:, None]
    # values below the smallest exponent of e4m3 among them
    gate_up[0, 0, :16] = gate_up[0, 0].abs().max() * 2.0 ** -torch.arange(16)
    (q_up, s_up), (q_down, s_down) = (quantize_rows(w, case.stored) for w in (gate_up, down))
    with poisoned_memory():
        out, nothing = triton_backend.forward(
            hidden, weights, q_up, q_down, slots, inverse, offsets, False, (s_up, s_down)
        )
    assert nothing is None
    whole = (dequantized(q_up, s_up).double(), dequantized(q_down, s_down).double())
    expected = reference_grouped_mlp(
        hidden.double(), weights.double(), *whole, slots, inverse, offsets
    )
    assert_close("out", out, expected, case.dtype)
    return f"out {float((out - expected).abs().max() / expected.abs().max()):.1e}"


FP8 = {
    "edges": Case((67, 5, 3, "unused"), 80, 72),
    "odd widths": Case((23, 3, 2, "skewed"), 37, 19),
    "whole tiles": Case((140, 3, 2, "skewed"), 256, 128),
    "one slot": Case((70, 2, 1, "half"), 64, 64),
    "no tokens": Case(EDGE_CASES["no_tokens"]),
    "bf16": Case((131, 5, 3, "unused"), 144, 136, torch.bfloat16, few_rows=0),
}


def check_fp8(case: Case, precision: Precision = "fp8") -> str:
    """The products of 8-bit floats against their definition in the same dtype: what differs is the
    order of sums and, where that moves a value over the middle of two neighbours, its rounding. In
    bf16, whose own rounding does that to one value in twenty, the bound is half of what rounding to
    8 bits costs.
    """
    (num_tokens, num_experts, top_k, _), dim, width = case.routing, case.hidden_size, case.width
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    places = group_by_expert(draw_expert_ids(*case.routing), num_experts)
    gate_up = normal(num_experts, 2 * width, dim) * 1.5 * dim**-0.5
    down = normal(num_experts, dim, width) * width**-0.5
    # rows and columns of very different sizes, so that a scale of another one would show
    gate_up *= torch.logspace(-1, 1, 2 * width)[:, None]
    down *= torch.logspace(1, -1, dim)[:, None] * torch.logspace(-1, 1, width)
    hidden, gate_up, down, grad_out = (
        x.to(case.dtype) for x in (normal(num_tokens, dim), gate_up, down, normal(num_tokens, dim))
    )
    weights = torch.rand(num_tokens, top_k, generator=generator)
    given = (hidden, weights, gate_up, down, *places)
    with poisoned_memory():
        out, pre = triton_backend.forward(*given, keep=True, precision=precision)
        again, _ = triton_backend.forward(*given, keep=False, precision=precision)
        grads = triton_backend.backward(grad_out, *given, pre, precision)
        recomputed = triton_backend.backward(grad_out, *given, None, precision)
    assert torch.equal(out, again)
    for one, other in zip(grads, recomputed, strict=True):
        assert torch.equal(one, other)

    leaves = [x.detach().requires_grad_() for x in given[:4]]
    expected = reference_grouped_mlp(*leaves, *places, precision=precision)
    theirs = torch.autograd.grad(expected, leaves, grad_out)
    plain = [x.detach().requires_grad_() for x in given[:4]]
    unrounded = reference_grouped_mlp(*plain, *places)
    unrounded_grads = torch.autograd.grad(unrounded, plain, grad_out)
    found = []
    for name, ours, reference, other in zip(
        ("out", *NAMES),
        (out, *grads),
        (expected, *theirs),
        (unrounded, *unrounded_grads),
        strict=True,
    ):
        if not reference.count_nonzero():
            assert not ours.count_nonzero(), name
            continue
        error, rounding = (
            float((x.detach() - reference.detach()).float().norm() / reference.detach().norm())
            for x in (ours, other)
        )
        bound = 2e-3 if case.dtype == torch.float32 else rounding / 2
        assert error < bound and rounding > 0.01, f"{name} is off by {error:.1e} of {rounding:.1e}"
        found.append(f"{name} {error:.1e}")
    return ", ".join(found)


FP8_ALL = FP8 | {
    "several tiles": Case((300, 2, 2, "skewed"), 80, 72),
    "whole tiles": Case((280, 3, 2, "skewed"), 256, 128),
    "without TMA": Case((150, 3, 2, "unused"), 64, 72, architecture=89),
}


def check_fp8_all(case: Case) -> str:
    """With gradients of weights in 8 bits too; and the tiles that these are made of, to the bit."""
    return f"{check_fp8(case, 'fp8_all')}; {check_tiles(case)}"


def check_tiles(case: Case) -> str:
    """Rounded tiles against fp8.round_rows, expert by expert and to the bit, and their product
    where every sum is exact, whatever its order.
    """
    (num_tokens, num_experts, top_k, _), dim, width = case.routing, case.hidden_size, case.width
    generator = torch.Generator().manual_seed(num_tokens)
    slots, inverse, offsets = group_by_expert(draw_expert_ids(*case.routing), num_experts)
    tokens = torch.randn(num_tokens, dim, generator=generator)
    rows = torch.randn(len(slots), width, generator=generator)
    # Every exponent, both sides of what a scale holds, and what has no scale.
    tokens *= torch.logspace(-37, 37, dim)
    rows *= 2.0 ** torch.randint(-8, 8, rows.shape, generator=generator)
    for values, place in ((448.0, 0), (448.0 * (1 + 2**-23), 1), (1e-44, 2), (0.0, 3)):
        rows[:, place] = values
    rows[: len(rows) // 2, 4], rows[: len(rows) // 3, 5] = math.inf, math.nan
    tokens, rows = tokens.to(case.dtype), rows.to(case.dtype)
    with poisoned_memory():
        tiles = triton_backend._tile_map(slots, offsets, TILE)
        places = slots, offsets, tiles, top_k
        found = [
            triton_backend._round_tiles(values, gather, *places)
            for values, gather in ((tokens, True), (rows, False))
        ]
    gathered = tokens[slots.clamp(min=0).long() // top_k] if num_tokens else tokens
    num_tiles = 0
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for tile, start in enumerate(range(begin, end, TILE)):
            stop, place = min(start + TILE, end), begin // TILE + expert + tile
            for values, (low, scales) in zip((gathered, rows), found, strict=True):
                expected, factors = round_rows(values[start:stop].t())
                torch.testing.assert_close(scales[place], factors, rtol=0, atol=0, equal_nan=True)
                bits, theirs = low[place].view(torch.uint8), expected.view(torch.uint8)
                told = ~factors.isnan()
                assert torch.equal(bits[told, : stop - start], theirs[told]), (expert, tile)
                assert not bits[told, stop - start :].any(), "rows behind the last are not zeros"
            num_tiles += 1

    # Of 1, 2 and 3 times powers of two all sums are exact, and so are bf16's of few terms.
    left = 2.0 ** (torch.arange(dim) % 20 - 10) * torch.randint(
        -3, 4, (num_tokens, dim), generator=generator
    )
    right = 2.0 ** (torch.arange(width) % 15) * torch.randint(
        -3, 4, (len(slots), width), generator=generator
    )
    gradient = torch.full((num_experts, dim, width), math.nan)
    sides = [
        triton_backend._round_tiles(values, gather, *places)
        for values, gather in ((left, True), (right, False))
    ]
    triton_backend._tiles_product(sides[0], sides[1], offsets, gradient)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        of_rows = left[slots[begin:end].long() // top_k]
        expected = rounded_tiles(of_rows).t() @ rounded_tiles(right[begin:end])
        assert torch.equal(gradient[expert], expected), expert
    return f"{num_tiles} tiles to the bit"


GROUPS = {
    "float32": FLOAT32,
    "half": HALF,
    "stored": STORED,
    "fp8": FP8,
    "fp8_all": FP8_ALL,
}
CHECKS = {"stored": check_stored, "fp8": check_fp8, "fp8_all": check_fp8_all}


def main(groups: list[str]) -> int:
    failed = False
    for asked in groups:
        group, _, one_in = asked.partition("/")  # half/2: every second case
        check_of = CHECKS.get(group, check)
        for name, case in list(GROUPS[group].items())[:: int(one_in or 1)]:
            start, configs.FEW_ROWS = time.process_time(), case.few_rows
            triton_backend.architecture = lambda device, case=case: case.architecture
            try:
                print(
                    f"{group} / {name}: {check_of(case)}; {time.process_time() - start:.1f} s",
                    flush=True,
                )
            except Exception as error:
                failed = True
                print(f"FAILED {group} / {name}: {error}\n{traceback.format_exc()}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
