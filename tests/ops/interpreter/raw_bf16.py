"""Worker of test_the_shim_is_needed: error of a bf16 product in Triton's interpreter, with the shim
if asked for.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

if "shim" in sys.argv:
    import shim  # noqa: F401


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
out = torch.empty(16, 16)
product_kernel[(1,)](a, b, out, SIZE=16)
print(float((out - a.float() @ b.float()).abs().max()))
