"""The kernels of an index, of attention to the rows that it chooses and of the gated pool on a CUDA
device, by the ops that start them, against the plain torch of these ops in fp32, which CPU tests
hold to the definition.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ops.compressed_attention import (
    CompressedSpec,
    attend_held,
    choose_held,
    closed_windows,
    compressed_attention,
    gated_pool,
)
from ops.index_attention import (
    Index,
    IndexSpec,
    Teacher,
    attend_cached,
    group_means,
    group_starts,
    indexed_attention,
    select_blocks,
    teach_index,
)
from ops.sparse_attention import SparseAttentionSpec, pool_entries, sparse_attention
from ops.sparse_attention.entries import CoarseEntries
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
TAUGHT = [
    (*shape, dtype)
    for shape in ((8, 2, 64), (32, 4, 128), (16, 2, 256), (2, 2, 128))
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


def of_index(length: int, number: int) -> list[torch.Tensor]:
    """Queries [length, INDEX_HEADS, WIDTH], keys [number, WIDTH] and weights of an index, of small
    whole numbers: no order of their sums is another, so that kernels and plain torch have the same
    scores, with many equal ones, and must choose alike id for id. The last dimension tells the keys
    of a block apart, lest its best one is a matter of taste.
    """
    queries, keys, weights = normals(
        (length, INDEX_HEADS, WIDTH), (number, WIDTH), (length, INDEX_HEADS)
    )
    queries, keys = (2 * queries).round() * 128, (2 * keys).round()
    queries[..., -1] = 1.0
    keys[:, -1] = torch.arange(number, device="cuda") % 128
    return [queries / 4096, keys, weights.round()]


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


@pytest.mark.parametrize(
    ("spec", "heads", "kv_heads", "dim", "dtype", "dense"),
    [
        (*case, dense)
        for case in INDEXED
        for dense in (False, True)
        if not dense or case[1] <= 16 * case[2]  # of sparse attention's kernels
    ],
    ids=str,
)
def test_an_index_attends_as_plain_torch_does(spec, heads, kv_heads, dim, dtype, dense):
    length = BOUNDS[-1]
    shapes = (length, heads, dim), *[(length, kv_heads, dim)] * 2
    queries, keys, weights = of_index(length, length)
    if spec.by_head:
        queries = queries[:, :kv_heads].contiguous()
    if spec.pools_keys:
        starts = group_starts(BOUNDS, spec.block_size).cuda()
        keys = group_means(keys, starts, spec.block_size)

    def attend(backend, x):
        index = Index(x[3], x[4], x[5] if len(x) == 6 else None)
        return indexed_attention(
            *x[:3], index, BOUNDS, spec, dense=dense, teach=True, backend=backend
        )

    of_rule = [weights] if spec.rule == "dsa" else []
    compare(attend, [*normals(*shapes), queries, keys, *of_rule], dtype)


@pytest.mark.parametrize(("spec", "heads", "dim", "dtype"), COMPRESSED, ids=str)
def test_entries_are_attended_to_as_by_plain_torch(spec, heads, dim, dtype):
    length = BOUNDS[-1]
    number = sum((e - b) // spec.ratio for b, e in itertools.pairwise(BOUNDS))
    inputs = normals((length, heads, dim), (length, dim), (number, dim), (heads,))
    inputs += of_index(length, number)

    def attend(backend, x):
        q, kv, entries, sinks, *index = x
        return compressed_attention(
            q, kv, entries, Index(*index), sinks, BOUNDS, spec, teach=True, backend=backend
        )

    compare(attend, inputs, dtype)


@pytest.mark.parametrize("ratio", [128, 0])
@pytest.mark.parametrize(("spec", "heads", "dim", "dtype"), COMPRESSED, ids=str)
def test_all_entries_are_attended_to_as_by_plain_torch(spec, heads, dim, dtype, ratio):
    spec = CompressedSpec(spec.window, ratio)
    inputs = normals((BOUNDS[-1], heads, dim), (BOUNDS[-1], dim), (heads,))
    if ratio:
        number = sum((e - b) // ratio for b, e in itertools.pairwise(BOUNDS))
        inputs += normals((number, dim))

    def attend(backend, x):
        q, kv, sinks, *entries = x
        given = entries[0] if entries else None
        return compressed_attention(q, kv, given, None, sinks, BOUNDS, spec, backend=backend)

    compare(attend, inputs, dtype)


def same_decoding(attend, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """attend(backend, inputs), as `compare` without gradients."""
    rounded = [x.to(dtype) for x in inputs]
    with poisoned_memory():
        ours, again = attend("triton", rounded), attend("triton", rounded)
    assert torch.equal(ours, again), "a second run has other bits"
    assert_close("out", ours, attend("torch", [x.float() for x in rounded]), dtype)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize(("spec", "heads", "kv_heads", "dim", "dtype"), INDEXED, ids=str)
def test_new_tokens_attend_as_by_plain_torch(spec, heads, kv_heads, dim, dtype, new):
    batch, room = 3, 1280
    position = torch.tensor([[1200], [37], [700]], device="cuda") + torch.arange(new).cuda()
    rows = torch.randperm(batch * room, device="cuda").view(batch, room)
    pools = normals((batch, new, heads, dim), *[(batch * room, kv_heads, dim)] * 2)
    queries, keys, weights = of_index(batch * new, batch * room)
    queries = queries.unflatten(0, (batch, new))
    if spec.by_head:
        queries = queries[:, :, :kv_heads].contiguous()
    if spec.pools_keys:
        keys = keys[: batch * room // spec.block_size].unflatten(0, (batch, -1))
    of_rule = [weights.unflatten(0, (batch, new))] if spec.rule == "dsa" else []

    def attend(backend, x):
        of_heads = x[5] if of_rule else None
        return attend_cached(*x[:5], of_heads, position, spec, rows, backend)

    same_decoding(attend, [*pools, queries, keys, *of_rule], dtype)


@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize(("spec", "heads", "dim", "dtype"), COMPRESSED, ids=str)
def test_new_tokens_see_entries_as_by_plain_torch(spec, heads, dim, dtype, chooses):
    batch, new, number = 3, 2, 300
    position = torch.tensor([[1190], [37], [700]], device="cuda") + torch.arange(new).cuda()
    of_kv = position[:, :1] + torch.arange(1 - spec.window, new).cuda()
    rows = torch.randperm(batch * number, device="cuda").view(batch, number)
    inputs = normals((batch, new, heads, dim), (*of_kv.shape, dim), (batch * number, dim), (heads,))
    queries, keys, weights = of_index(batch * new, batch * number)
    queries, weights = (x.unflatten(0, (batch, new)) for x in (queries, weights))

    def attend(backend, x):
        q, kv, entries, sinks, *index = x
        chosen = choose_held(*index, position, spec, rows, backend) if chooses else None
        return attend_held(q, kv, of_kv, entries, chosen, sinks, position, spec, rows, backend)

    same_decoding(attend, [*inputs, queries, keys, weights], dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_the_choice_inside_sparse_attention_is_that_of_plain_torch(dtype):
    spec = SparseAttentionSpec(block_size=64, coarse_block_size=32, top_k=4, window_size=128)
    queries, keys, _ = (x.to(dtype) for x in of_index(BOUNDS[-1], BOUNDS[-1]))
    heads = queries[:, :4].contiguous()
    ours = select_blocks(heads, keys, BOUNDS, spec, "triton")
    assert torch.equal(ours, select_blocks(heads, keys, BOUNDS, spec, "torch"))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), TAUGHT, ids=str)
def test_what_teaches_inside_sparse_attention_is_that_of_plain_torch(heads, kv_heads, dim, dtype):
    spec = SparseAttentionSpec(block_size=64, coarse_block_size=32, top_k=4, window_size=128)
    length, cu = BOUNDS[-1], torch.tensor(BOUNDS, device="cuda")
    q, k, v, bias = normals((length, heads, dim), *[(length, kv_heads, dim)] * 2, (length, heads))
    q, k = (x.to(dtype).float() for x in (q, k))
    queries, keys, _ = (x.to(dtype) for x in of_index(length, length))
    index = queries[:, :kv_heads].contiguous(), keys
    selected = select_blocks(*index, BOUNDS, spec, "torch")
    found = sparse_attention(q, k, v, cu, spec, selected=selected, bias=bias, backend="chunked")
    entries = CoarseEntries(*(x.to(dtype).float() for x in pool_entries(q, k, v, cu, spec)))
    teacher = Teacher(q, k, entries, found.selected, found.lse, bias)
    counts = torch.arange(length, device="cuda") % 7 != 3

    def run(backend: str, real: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(real).requires_grad_() for x in index]
        total = teach_index(*leaves, teacher, BOUNDS, spec, counts, backend)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    with poisoned_memory():
        ours, again = run("triton", dtype), run("triton", dtype)
    for number, (a, b, c) in enumerate(zip(ours, again, run("torch", torch.float32), strict=True)):
        assert torch.equal(a, b), f"result {number} differs from one run to the next"
        assert_close(f"result {number}", a, c, dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("size", "width", "overlap"), [(4, 512, True), (2, 128, False), (128, 96, False)]
)
def test_windows_are_pooled_as_by_plain_torch(size, width, overlap, dtype):
    row = 2 * width if overlap else width
    rows, bias = normals((BOUNDS[-1], 2 * row), (size, row))
    windows = closed_windows(BOUNDS, size, torch.device("cuda"))
    into = torch.randn(len(windows.starts), width, device="cuda").to(dtype)

    def run(backend: str, real: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).to(real) for x in rows.split(row, 1)]
        leaves = [x.requires_grad_() for x in (*leaves, bias.clone())]
        entries = gated_pool(*leaves, windows, overlap, backend)
        return [entries.detach(), *torch.autograd.grad(entries, leaves, into.to(real))]

    with poisoned_memory():
        ours, again = run("triton", dtype), run("triton", dtype)
    for number, (a, b, c) in enumerate(zip(ours, again, run("torch", torch.float32), strict=True)):
        assert torch.equal(a, b), f"result {number} differs from one run to the next"
        assert_close(f"result {number}", a, c, dtype)
