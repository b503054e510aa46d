"""The kernels that gather chosen rows on a CUDA device, by the ops that start them, against the
plain torch of these ops in fp32, which CPU tests hold to the definition.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ops.compressed_attention import CompressedSpec, compressed_attention
from ops.index_attention import Index, IndexSpec, group_means, group_starts, indexed_attention
from ops.testing import assert_close, poisoned_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUNDS = (0, 1500, 1501, 1501, 1700, 2900)
INDEX_HEADS, WIDTH = 24, 64
HALF = (torch.bfloat16, torch.float16)
INDEXED = [
    (spec, *shape, dtype)
    for spec in (IndexSpec("dsa", 1, 256), IndexSpec("msa", 128, 3), IndexSpec("qsa", 4, 64))
    for shape in ((16, 4, 64), (32, 4, 128), (24, 2, 256), (64, 1, 128))
    for dtype in (*HALF, torch.float32)
    if dtype in HALF or shape[2] <= 128
]
COMPRESSED = [
    (CompressedSpec(128, 4, 64), heads, dim, dtype)
    for heads, dim in ((64, 512), (8, 128))
    for dtype in (*HALF, torch.float32)
    if dtype in HALF or dim <= 128
]


def normals(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]


def compare(attend, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """attend(backend, inputs): twice by the kernels, which must give equal bits, and by torch in
    fp32 of the same values.
    """
    into = torch.randn_like(inputs[0]).to(dtype)
    rounded = [x.to(dtype) for x in inputs]

    def run(backend: str, real: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(real).requires_grad_() for x in rounded]
        found = attend(backend, leaves)
        loss = (found.out * into.to(real)).sum() + found.divergence
        grads = torch.autograd.grad(loss, leaves)
        return [found.out.detach(), found.divergence.detach(), *grads]

    with poisoned_memory():
        ours, again = run("triton", dtype), run("triton", dtype)
    for number, (a, b, c) in enumerate(zip(ours, again, run("torch", torch.float32), strict=True)):
        assert torch.equal(a, b), f"result {number} differs from one run to the next"
        assert_close(f"result {number}", a, c, dtype)


@pytest.mark.parametrize(("spec", "heads", "kv_heads", "dim", "dtype"), INDEXED, ids=str)
def test_an_index_attends_as_plain_torch_does(spec, heads, kv_heads, dim, dtype):
    length, index_heads = BOUNDS[-1], kv_heads if spec.by_head else INDEX_HEADS
    keys, *rest = normals(
        (length, WIDTH),
        (length, heads, dim),
        *[(length, kv_heads, dim)] * 2,
        (length, index_heads, WIDTH),
        (length, index_heads),
    )
    if spec.pools_keys:
        starts = group_starts(BOUNDS, spec.block_size).cuda()
        keys = group_means(keys, starts, spec.block_size)
    weights = [rest[4]] if spec.rule == "dsa" else []

    def attend(backend, x):
        index = Index(x[3], x[4], x[5] if len(x) == 6 else None)
        return indexed_attention(*x[:3], index, BOUNDS, spec, teach=True, backend=backend)

    compare(attend, [*rest[:4], keys, *weights], dtype)


@pytest.mark.parametrize(("spec", "heads", "dim", "dtype"), COMPRESSED, ids=str)
def test_entries_are_attended_to_as_by_plain_torch(spec, heads, dim, dtype):
    length = BOUNDS[-1]
    number = sum((e - b) // spec.ratio for b, e in itertools.pairwise(BOUNDS))
    inputs = normals(
        (length, heads, dim),
        (length, dim),
        (number, dim),
        (heads,),
        (length, INDEX_HEADS, WIDTH),
        (number, WIDTH),
        (length, INDEX_HEADS),
    )

    def attend(backend, x):
        q, kv, entries, sinks, *index = x
        return compressed_attention(
            q, kv, entries, Index(*index), sinks, BOUNDS, spec, teach=True, backend=backend
        )

    compare(attend, inputs, dtype)
