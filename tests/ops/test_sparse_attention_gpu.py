"""The Triton kernels on a CUDA device against the chunked path in fp32, which CPU tests hold to the
definition.
"""

from __future__ import annotations

import pytest
import torch

from ops.sparse_attention import (
    SelectionNoise,
    SparseAttentionSpec,
    decode,
    pool_entries,
    sparse_attention,
)
from ops.sparse_attention.cache import EntryCache
from ops.sparse_attention.kernels.configs import loading_by_tma
from ops.testing import assert_close, poisoned_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [1500, 1, 0, 17, 700, 64, 613]
SHAPES = [(64, 4, 1, 64), (128, 8, 1, 64), (128, 16, 16, 32), (128, 32, 2, 128), (256, 6, 2, 64)]
"""head_dim, heads, key/value heads, block_size."""
CHANGES = {
    "plain": {},
    "drop": {"tail": "drop"},
    "order 0": {"order": 0},
    "max": {"score": "max"},
    "error gain": {"score": "error_gain"},
    "one pass": {"rank_lse": "super"},
    "covering": {"top_p": 0.6},
    "dense start": {"min_sparse_length": 700},
}
CASES = [
    ("plain", *shape, dtype)
    for shape in SHAPES
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]
CASES += [
    (change, *shape, torch.bfloat16)
    for change in CHANGES
    if change != "plain"
    for shape in SHAPES
    if shape[0] == 128
]


def inputs(head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    total = sum(LENGTHS)
    tensors = [normal(total, n, head_dim).to(dtype) for n in (heads, kv_heads, kv_heads)]
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda"
    )
    return (
        tensors,
        normal(total, heads),
        normal(heads),
        cu_seqlens,
        normal(total, heads, head_dim),
        normal(total, heads),
    )


def spec_of(block_size: int, **changes) -> SparseAttentionSpec:
    return SparseAttentionSpec(
        **{
            "block_size": block_size,
            "coarse_block_size": 32,
            "top_k": 4,
            "window_size": 100,
            **changes,
        }
    )


def results(given, spec, backend: str, dtype: torch.dtype, selected: torch.Tensor | None):
    (q, k, v), bias, sink, cu_seqlens, dout, dlse = given
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    leaves += [x.detach().clone().requires_grad_() for x in (bias, sink)]
    found = sparse_attention(
        *leaves[:3],
        cu_seqlens,
        spec,
        bias=leaves[3],
        sink=leaves[4],
        selected=selected,
        backend=backend,
    )
    grads = torch.autograd.grad((found.out, found.lse), leaves, (dout.to(dtype), dlse))
    return (
        found.out.detach(),
        found.lse.detach(),
        found.tail_mass,
        found.selected_mass,
        *grads,
    ), found.selected


@pytest.mark.parametrize(
    ("change", "head_dim", "heads", "kv_heads", "block_size", "dtype"), CASES, ids=str
)
def test_kernels_give_outputs_and_gradients_of_the_chunked_path(
    change, head_dim, heads, kv_heads, block_size, dtype
):
    given, spec = inputs(head_dim, heads, kv_heads, dtype), spec_of(block_size, **CHANGES[change])
    with poisoned_memory():
        ours, selected = results(given, spec, "triton", dtype, None)
        again, _ = results(given, spec, "triton", dtype, selected)
    expected, _ = results(given, spec, "chunked", torch.float32, selected)
    names = ("out", "lse", "tail mass", "selected mass", "dq", "dk", "dv", "dbias", "dsink")
    for name, value, repeated, reference in zip(names, ours, again, expected, strict=True):
        assert torch.equal(value, repeated), f"{name} differs from one run to the next"
        assert_close(name, value, reference, dtype)


def learned(given, spec, backend: str, dtype: torch.dtype, logits, selected: torch.Tensor | None):
    (q, k, v), _, _, cu_seqlens, dout, _ = given
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, logits)]
    found = sparse_attention(
        *leaves[:3], cu_seqlens, spec, pool_logits=leaves[3], selected=selected, backend=backend
    )
    grads = torch.autograd.grad(found.out, leaves, dout.to(dtype))
    return (found.out.detach(), found.lse.detach(), *grads), found.selected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "block_size"), SHAPES, ids=str)
def test_learned_entries_are_those_of_the_chunked_path(
    head_dim, heads, kv_heads, block_size, dtype
):
    given, spec = inputs(head_dim, heads, kv_heads, dtype), spec_of(block_size)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (sum(LENGTHS), kv_heads, 2, head_dim)
    logits = (1.5 * torch.randn(shape, device="cuda", generator=generator)).to(dtype)
    with poisoned_memory():
        ours, selected = learned(given, spec, "triton", dtype, logits, None)
        again, _ = learned(given, spec, "triton", dtype, logits, selected)
    expected, _ = learned(given, spec, "chunked", torch.float32, logits, selected)
    names = ("out", "lse", "dq", "dk", "dv", "dlogits")
    for name, value, repeated, reference in zip(names, ours, again, expected, strict=True):
        assert torch.equal(value, repeated), f"{name} differs from one run to the next"
        assert_close(name, value, reference, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "block_size"), SHAPES, ids=str)
@pytest.mark.parametrize("size", [16, 32], ids="of {}".format)
def test_equal_weights_give_the_bits_of_the_pool(
    size, head_dim, heads, kv_heads, block_size, dtype
):
    (q, k, v), *_, cu_seqlens, _, _ = inputs(head_dim, heads, kv_heads, dtype)
    spec = spec_of(block_size, coarse_block_size=size)
    zeros = k.new_zeros(*k.shape[:2], 2, head_dim)
    with poisoned_memory():
        plain = pool_entries(q, k, v, cu_seqlens, spec, None, "triton")
        weighed = pool_entries(q, k, v, cu_seqlens, spec, zeros, "triton")
    for name, one, other in zip(plain._fields, plain, weighed, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "block_size"), SHAPES, ids=str)
def test_tiles_loaded_by_tma_give_what_pointers_give(head_dim, heads, kv_heads, block_size):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor memory accelerator")
    dtype = torch.bfloat16
    given, spec = inputs(head_dim, heads, kv_heads, dtype), spec_of(block_size)
    pointers, selected = results(given, spec, "triton", dtype, None)
    with loading_by_tma(True), poisoned_memory():
        boxes, _ = results(given, spec, "triton", dtype, selected)
        again, _ = results(given, spec, "triton", dtype, selected)
    names = ("out", "lse", "tail mass", "selected mass", "dq", "dk", "dv", "dbias", "dsink")
    for name, value, repeated, reference in zip(names, boxes, again, pointers, strict=True):
        assert torch.equal(value, repeated), f"{name} differs from one run to the next"
        assert_close(name, value, reference, dtype)


@pytest.mark.parametrize("noise", [None, SelectionNoise(3, 1.0, 2)], ids=["plain", "noise"])
def test_selection_agrees_but_for_near_ties(noise):
    (q, k, v), _, _, cu_seqlens, *_ = inputs(128, 8, 2, torch.float32)
    spec = spec_of(64)
    ours, expected = (
        sparse_attention(q, k, v, cu_seqlens, spec, noise=noise, backend=b).selected
        for b in ("triton", "chunked")
    )
    same = (ours == expected).all(-1).float().mean()
    assert same > 0.999, f"{float(1 - same):.2%} of the selections differ"


@pytest.mark.parametrize("length", [1, 63, 64, 700, 1500])
def test_decoding_equals_the_last_token(length):
    (q, k, v), bias, sink, *_ = inputs(128, 8, 2, torch.bfloat16)
    spec = spec_of(64)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    exact = [x[:length].float() for x in (q, k, v)]
    whole = sparse_attention(
        *exact, cu_seqlens, spec, bias=bias[:length], sink=sink, backend="chunked"
    )
    cache = EntryCache(spec, 1, length, 2, 128, torch.bfloat16, q.device)
    cache.update(k[None, :length], v[None, :length], 0)
    out, lse = decode(
        q[length - 1 : length],
        k[None, :length],
        v[None, :length],
        cache.entries,
        length,
        spec,
        bias=bias[length - 1 : length],
        sink=sink,
        backend="triton",
    )
    assert_close("out", out[0], whole.out[-1], torch.bfloat16)
    assert_close("lse", lse[0], whole.lse[-1], torch.bfloat16)
