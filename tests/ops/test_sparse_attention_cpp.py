"""What is the C++ back-end's own: threads, sizes that its vectors are not made for, a machine
without a compiler. That it follows the definition: test_sparse_attention.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops.compile.cuda import BuildError
from ops.sparse_attention import SparseAttentionSpec, backend_for, cpp_backend, sparse_attention
from ops.testing import assert_close, poisoned_memory

ROOT = Path(__file__).resolve().parents[2]
SPEC = SparseAttentionSpec(
    block_size=16, coarse_block_size=8, top_k=3, window_size=20, max_variance=0.5
)


def results(
    backend: str, spec: SparseAttentionSpec, lengths: list[int], shape: tuple[int, int, int]
):
    """[outputs..., gradients...] of every tensor that has one; shape: heads, key/value heads, d."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    length = sum(lengths)
    q, k, v = (normal(length, n, dim) for n in (heads, kv_heads, kv_heads))
    bias, sink = normal(length, heads), normal(heads)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out = sparse_attention(q, k, v, cu_seqlens, spec, bias=bias, sink=sink, backend=backend)
    given = (torch.randn(t.shape, generator=generator) for t in (out.out, out.lse))
    grads = torch.autograd.grad((out.out, out.lse), (q, k, v, bias, sink), tuple(given))
    return [*(t.detach() for t in out), *grads]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(32, 2, 16), (48, 1, 32)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, threads):
    """Many tasks of each head add to the keys of their first block and of their neighbours'."""
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(results("cpp", SPEC, [300, 5, 250], shape))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (SparseAttentionSpec(window_size=70, top_k=4), (4, 2, 64)),
        (SparseAttentionSpec(window_size=64, top_k=2, order=0), (2, 2, 128)),
        (replace(SPEC, coarse_block_size=16), (3, 3, 80)),
        (SparseAttentionSpec(48, 3, 100, 1, 16), (6, 2, 24)),
    ],
    ids=str,
)
def test_sizes_of_real_models_give_what_chunked_torch_gives(spec, shape):
    lengths = [700, 1, 333]
    with poisoned_memory():
        ours, torchs = (results(name, spec, lengths, shape) for name in ("cpp", "chunked"))
    for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
        if a.is_floating_point():
            assert_close(str(i), a, b)
        else:
            # a tie to rounding may fall either way
            assert (a != b).float().mean() < 1e-3


def test_what_is_not_finite_comes_out_and_hangs_nothing():
    q, k, v = (torch.randn(200, n, 16) for n in (2, 1, 1))
    k[150] = float("nan")
    for x in (q, k, v):
        x.requires_grad_()
    out = sparse_attention(q, k, v, torch.tensor([0, 200]), SPEC, backend="cpp")
    assert out.out[:150].isfinite().all() and out.out[150].isnan().all()
    grads = torch.autograd.grad(out.out.sum(), (q, k, v))
    assert not all(grad.isfinite().all() for grad in grads)


def test_without_a_compiler_it_is_chunked_torch_and_says_so(monkeypatch, caplog):
    def no_compiler(*_: object, **__: object) -> Path:
        raise BuildError("g++ is not installed")

    def forget() -> None:
        cpp_backend.unavailable.cache_clear()
        cpp_backend.load_library.cache_clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(cpp_backend, "build_ops", no_compiler)
        assert backend_for("cpu", 64, 2, 64, "torch.float32") == "chunked"
        assert "g++ is not installed" in caplog.text
        out = sparse_attention(*(torch.ones(9, 1, 4) for _ in range(3)), torch.tensor([0, 9]), SPEC)
        assert (out.out == 1).all()
        with pytest.raises(BuildError, match="not installed"):
            results("cpp", SPEC, [9], (1, 1, 4))
    forget()
    assert backend_for("cpu", 64, 2, 64, "torch.float32") == "cpp"


@pytest.mark.nightly
@pytest.mark.parametrize("flags", ["", "-march=x86-64-v3"], ids=["baseline", "avx2"])
def test_narrower_vectors_follow_the_definition_too(flags, tmp_path):
    """The cases of test_sparse_attention.py on a build for older machines."""
    code = (
        "import sys, pytest; from ops.compile import cuda; "
        f"cuda._cpu_flags = lambda widest=False: {flags.split()!r}; "
        "sys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', "
        "'tests/ops/test_sparse_attention.py', '-k', 'reference or bitwise or last_bit']))"
    )
    environment = {**os.environ, "LOADSTONE_KERNELS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
