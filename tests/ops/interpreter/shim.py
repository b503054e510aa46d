"""Makes Triton's interpreter (3.6 to 3.9) fit to prove bf16 kernels on a CPU. Import it with
TRITON_INTERPRET=1 set.

The interpreter keeps bf16 as uint16 bit patterns and computes on the patterns: products, sums and
comparisons are silently wrong, conversions from fp32 truncate (triton issue 11584, closed unfixed).
Here operands become fp32, and results are rounded to the nearest even bf16. It can go when
tests/ops/test_sparse_attention_triton.py::test_the_shim_is_needed fails. Conversions of fp32 to
e4m3 round ties away from zero there, and lose a carry (triton issue 8322); here torch rounds.

Two more: tl is patched anew for every nested @jit call, a quarter of the run time, which is left
out; and Triton 3.6 turns loop bounds into integers in a way that numpy >= 2.4 refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def _is_bf16(*handles: Any) -> bool:
    return any(h.dtype.scalar == tl.bfloat16 for h in handles)


def _values(handle: Any) -> np.ndarray:
    """Data of a handle, bf16 patterns as fp32 values."""
    if _is_bf16(handle) and handle.data.dtype == np.uint16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 patterns of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _bf16(values: np.ndarray) -> Any:
    return Handle(to_bf16_bits(values), tl.bfloat16)


def _fix_arithmetic() -> None:
    binary, unary, fma, dot = (
        Builder.binary_op,
        Builder.unary_op,
        Builder.create_fma,
        Builder.create_dot,
    )
    cast, convert = Builder.cast_impl, Builder.create_fp_to_fp

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable) -> Any:
        if not _is_bf16(lhs, rhs):
            return binary(self, lhs, rhs, op)
        out = op(_values(lhs), _values(rhs))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else _bf16(out)

    def unary_op(self: Any, arg: Any, op: Callable) -> Any:
        return _bf16(op(_values(arg))) if _is_bf16(arg) else unary(self, arg, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return _bf16(_values(x) * _values(y) + _values(z)) if _is_bf16(z) else fma(self, x, y, z)

    def create_dot(
        self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        if _is_bf16(a, b):
            return Handle(np.matmul(_values(a), _values(b)) + acc.data, acc.dtype.scalar)
        # numpy would sum in fp16
        if a.data.dtype == np.float16 and acc.data.dtype == np.float32:
            return Handle(
                np.matmul(a.data.astype(np.float32), b.data.astype(np.float32)) + acc.data,
                acc.dtype.scalar,
            )
        return dot(self, a, b, acc, input_precision, max_num_imprecise_acc)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if target == tl.bfloat16:
            return _bf16(_values(src))
        if _is_bf16(src):
            return Handle(_values(src).astype(interpreter._get_np_dtype(target)), target)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        types = (src.dtype.scalar, dst_type.scalar)
        if types == (tl.float32, tl.float8e4nv):
            low = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
            bits = low.view(torch.uint8).numpy().reshape(src.data.shape)
            return Handle(bits.view(interpreter._get_np_dtype(dst_type)), tl.float8e4nv)
        plain = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if tl.bfloat16 in types and plain and all(t.primitive_bitwidth >= 16 for t in types):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    Builder.binary_op, Builder.unary_op, Builder.create_fma, Builder.create_dot = (
        binary_op,
        unary_op,
        create_fma,
        create_dot,
    )
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


class _Scope:
    """Stands in for a kernel's function where the interpreter looks for the modules to patch."""

    __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012


def _patch_once_per_launch() -> None:
    patch, launch, running = interpreter._patch_lang, interpreter.GridExecutor.__call__, [0]

    def patch_all(fn: Any) -> Any:
        scope = patch(_Scope)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return scope

    def run_grid(self: Any, *args: Any, **options: Any) -> Any:
        running[0] += 1
        try:
            return launch(self, *args, **options)
        finally:
            running[0] -= 1

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if not running[0]:
            patch_all(self.fn)
        try:
            return self.rewrite()(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_all
    interpreter.GridExecutor.__call__ = run_grid
    interpreter.InterpretedFunction.__call__ = call


def _skip_overflow_checks() -> None:
    """They triple the cost of every integer operation; wrong addresses show as wrong results."""
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


_fix_arithmetic()
_patch_once_per_launch()
_skip_overflow_checks()
# exp2 of -inf, 1 / 0 in unused branches
np.seterr(over="ignore", under="ignore", divide="ignore", invalid="ignore")
