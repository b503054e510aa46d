"""SwiGLU over stacked experts: checks, then the backend the device has. See README.md.

Shape letters: T tokens, K slots per token, A assignments in use (A <= T*K), D hidden, F expert
width, L local experts.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ops.compiling import constant_when_compiled
from ops.grouped_mlp.reference import reference_grouped_mlp
from ops.grouped_mlp.spec import Activation, Precision

log = logging.getLogger("loadstone")
BACKENDS = ("auto", "triton", "grouped_mm", "torch", "reference")


def grouped_mlp(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    *,
    backend: str = "auto",
    recompute: bool = False,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    precision: Precision = "native",
) -> Tensor:
    """Every token through its experts: out[t] = sum_k weights[t, k] * SwiGLU_expert(t,
    k)(hidden[t]).

    Args:
        hidden: [T, D] fp32, bf16, fp16 (or fp64 on CPU).
        weights: [T, K] gates, fp32 (or fp64 with fp64), 0 where unused.
        gate_up: [L, 2F, D], gate projection first; down: [L, D, F]; both in the dtype of `hidden`.
        slots: [T * K] int32, flat indices t * K + k sorted by (expert, token, slot), -1 behind the
            last assignment.
        inverse: [T, K] int32, where in `slots` an assignment stands; -1 where unused.
        offsets: [L + 1] int32, first row of each expert in `slots`; the last is A. It stays on the
            device.
        backend: see select_backend.
        recompute: compute the up-projection again in backward. It keeps 2F values per slot
            otherwise.
        activation: see ops.grouped_mlp.spec; other than "swiglu", and biases, are for the torch,
            grouped_mm and reference back-ends.
        gate_up_bias: [L, 2F]; down_bias: [L, D]; both or none, in the dtype of `hidden`.
        precision: see ops.grouped_mlp.spec; "fp8" and "fp8_all" are for the triton, torch and
            reference back-ends, of which only triton has 8-bit products: the others compute the
            same in wider ones.

    Returns:
        [T, D] in the dtype of `hidden`; a token without experts gets zeros. Every weight gets a
        gradient on every call, also from experts without rows and when A is 0: ranks that skip a
        parameter would leave their peers waiting in the gradient reduction. Equal inputs give equal
        bits.

    Raises:
        ValueError: shapes, dtypes or backend do not fit; on CPU tensors also indices that do not
            fit each other.

    Source: SwiGLU arXiv 2002.05202; index arrays and the gates' gradient <grad_out W_down, act>
    arXiv 2512.14080.
    """
    if hidden.dtype == torch.float64:
        weights = weights.double()
    _check(hidden, weights, gate_up, down, slots, inverse, offsets)
    _check_biases(hidden, gate_up, down, gate_up_bias, down_bias)
    _check_activation(activation)
    if precision not in get_args(Precision):
        raise ValueError(
            f"unknown precision {precision!r}; choose {' or '.join(get_args(Precision))}"
        )
    chosen = select_backend(
        backend,
        hidden.device,
        hidden.dtype,
        hidden.shape[1],
        down.shape[2],
        activation == "swiglu" and gate_up_bias is None,
        precision,
    )
    if chosen == "reference":
        return reference_grouped_mlp(
            hidden,
            weights,
            gate_up,
            down,
            slots,
            inverse,
            offsets,
            activation,
            gate_up_bias,
            down_bias,
            precision,
        )

    # Asked here, as inside a custom op gradients are always off.
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (hidden, weights, gate_up, down, gate_up_bias, down_bias)
    )
    out: Tensor
    out, _ = _forward(
        hidden.contiguous(),
        weights.contiguous(),
        gate_up.contiguous(),
        down.contiguous(),
        slots.contiguous(),
        inverse.contiguous(),
        offsets,
        chosen,
        trains and not recompute,
        activation,
        None if gate_up_bias is None else gate_up_bias.contiguous(),
        None if down_bias is None else down_bias.contiguous(),
        precision,
    )
    return out


@constant_when_compiled
def select_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    width: int,
    plain: bool = True,
    precision: Precision = "native",
) -> str:
    """The backend of `requested`; a faster one that "auto" has to pass over is named once, with the
    reason.

    plain: SwiGLU without biases.

    triton: our kernels, on CUDA, for plain experts; fp32, bf16 or fp16, and bf16 for fp8 products,
        which want compute capability 8.9. grouped_mm: torch's grouped
        GEMM, on CUDA in bf16 with compute capability 8.0 or more and widths that are multiples of 8
        (slow but right on CPU). torch: one expert at a time, any device; on CUDA it waits for the
        sizes. reference: the definition. auto: the first of them that the device has.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve these tensors.
    """
    if requested not in BACKENDS:
        raise ValueError(f"unknown experts backend {requested!r}; choose {', '.join(BACKENDS)}")
    if requested == "auto":
        return _best_backend(device, dtype, hidden_size, width, plain, precision)
    reason = _unsuited(requested, device, dtype, hidden_size, width, plain, precision)
    if reason is not None:
        raise ValueError(f"experts.backend={requested} cannot be used: {reason}")
    return requested


def product_tile_rows(backend: str, num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the products, which an expert's rows are filled up to; 1 where a backend
    has no tiles of its own.

    num_rows: T * K.
    """
    if backend != "triton":
        return 1
    configs = importlib.import_module("ops.grouped_mlp.kernels.configs")
    return int(configs.tile_rows(num_rows, num_experts, dtype))


@functools.cache
def _best_backend(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    width: int,
    plain: bool,
    precision: Precision,
) -> str:
    reasons = {}
    for name in ("triton", "grouped_mm", "torch") if device.type == "cuda" else ("torch",):
        reasons[name] = _unsuited(name, device, dtype, hidden_size, width, plain, precision)
        if reasons[name] is None:
            break
    for other, reason in reasons.items():
        if reason is not None:
            log.warning(
                "experts run by %s on %s, which is slower than %s: %s",
                name,
                device.type,
                other,
                reason,
            )
    return name


@functools.cache
def _unsuited(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    width: int,
    plain: bool,
    precision: Precision = "native",
) -> str | None:
    """Why a backend cannot serve; None where it can."""
    if name == "triton":
        if device.type != "cuda":
            return f"Triton kernels need a GPU, and the tensors are on {device.type}"
        if not plain:
            return "its kernels compute plain SwiGLU without biases"
        try:
            triton_backend = importlib.import_module("ops.grouped_mlp.triton_backend")
            problem: str | None = triton_backend.problem(dtype, hidden_size, width)
            if problem is None and precision != "native":
                problem = triton_backend.problem_of_fp8(dtype, device)
            return problem
        except ImportError as error:
            return f"triton is not installed ({error})"
    if name == "grouped_mm":
        if precision != "native":
            return "it has no products of 8-bit floats"
        if hidden_size % 8 or width % 8:
            return f"its rows must be multiples of 8 values, not {hidden_size} and {width}"
        if device.type == "cuda" and dtype != torch.bfloat16:
            return f"on CUDA it takes bfloat16, not {dtype}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0"
    return None


def _backend(name: str) -> Any:
    """The module with `forward` and `backward`; imported when first used, as triton may be
    missing.
    """
    return importlib.import_module(f"ops.grouped_mlp.{name}_backend")


@torch.library.custom_op("loadstone::grouped_mlp_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    backend: str,
    keep: bool,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    precision: str = "native",
) -> tuple[Tensor, Tensor]:
    """Output [T, D] and pre-activations [T * K, 2F], or an empty tensor without `keep`."""
    special = _special(activation, gate_up_bias, down_bias, precision)
    out, pre = _backend(backend).forward(
        hidden, weights, gate_up, down, slots, inverse, offsets, keep, **special
    )
    return out, hidden.new_empty((0, gate_up.shape[1])) if pre is None else pre


@_forward.register_fake
def _(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    backend: str,
    keep: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(
        (slots.shape[0] if keep else 0, gate_up.shape[1])
    )


@torch.library.custom_op("loadstone::grouped_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    pre: Tensor,
    backend: str,
    keep: bool,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Those of hidden, weights, gate_up, down and the biases, empty where there are none."""
    special = _special(activation, gate_up_bias, down_bias, precision)
    grads = _backend(backend).backward(
        grad,
        hidden,
        weights,
        gate_up,
        down,
        slots,
        inverse,
        offsets,
        pre if keep else None,
        **special,
    )
    if gate_up_bias is None:
        grads = (*grads, hidden.new_empty(0), hidden.new_empty(0))
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], grads)


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    pre: Tensor,
    backend: str,
    keep: bool,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    precision: str,
) -> tuple[Tensor, ...]:
    return (
        *(torch.empty_like(t) for t in (hidden, weights, gate_up, down)),
        *(
            hidden.new_empty(0) if bias is None else torch.empty_like(bias)
            for bias in (gate_up_bias, down_bias)
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend, ctx.keep, ctx.activation, gate_up_bias, down_bias, precision = inputs
    ctx.precision = precision
    ctx.save_for_backward(*tensors, output[1], gate_up_bias, down_bias)
    # or the pre-activations would get a gradient of zeros
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    *saved, gate_up_bias, down_bias = ctx.saved_tensors
    settings = ctx.backend, ctx.keep, ctx.activation
    *grads, grad_gate_up_bias, grad_down_bias = _backward(
        grad.contiguous(), *saved, *settings, gate_up_bias, down_bias, ctx.precision
    )
    # slots, inverse, offsets, and the settings
    return (
        *grads,
        *[None] * 6,
        None if gate_up_bias is None else grad_gate_up_bias,
        None if down_bias is None else grad_down_bias,
        None,
    )


torch.library.register_autograd(
    "loadstone::grouped_mlp_forward", _gradients, setup_context=_setup_context
)


def _special(
    activation: str, gate_up_bias: Tensor | None, down_bias: Tensor | None, precision: str
) -> dict[str, Any]:
    """What plain experts do without, as the back-ends that know it take it."""
    found: dict[str, Any] = {} if precision == "native" else {"precision": precision}
    if activation == "swiglu" and gate_up_bias is None:
        return found
    return found | {
        "activation": activation,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }


def _check_activation(activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(
            f"unknown activation {activation!r}; choose {' or '.join(get_args(Activation))}"
        )


def _check_biases(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    if gate_up_bias is None and down_bias is None:
        return
    if (
        gate_up_bias is None
        or down_bias is None
        or gate_up_bias.shape != gate_up.shape[:2]
        or down_bias.shape != down.shape[:2]
        or not gate_up_bias.dtype == down_bias.dtype == hidden.dtype
    ):
        shown = [
            "None" if bias is None else f"{tuple(bias.shape)} {bias.dtype}"
            for bias in (gate_up_bias, down_bias)
        ]
        raise ValueError(
            f"gate_up_bias {shown[0]} and down_bias {shown[1]} do not fit {len(gate_up)} experts: "
            f"{tuple(gate_up.shape[:2])} and {tuple(down.shape[:2])} in {hidden.dtype}"
        )


def _check(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
) -> None:
    num_experts, double_width, hidden_size = gate_up.shape
    if (
        hidden.dim() != 2
        or hidden.shape[1] != hidden_size
        or double_width % 2
        or (down.shape != (num_experts, hidden_size, double_width // 2))
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, gate_up {tuple(gate_up.shape)} and down "
            f"{tuple(down.shape)} do not fit [T, D], [L, 2F, D], [L, D, F]"
        )

    if not hidden.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, gate_up {gate_up.dtype}, down {down.dtype}; they must be "
            "the same"
        )

    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if (
        weights.dim() != 2
        or len(weights) != len(hidden)
        or weights.dtype != real
        or inverse.shape != weights.shape
        or (slots.shape != (weights.numel(),))
        or offsets.shape != (num_experts + 1,)
    ):
        raise ValueError(
            f"weights {tuple(weights.shape)} {weights.dtype}, slots {tuple(slots.shape)}, inverse "
            f"{tuple(inverse.shape)} and offsets {tuple(offsets.shape)} do not fit {len(hidden)} "
            f"tokens and {num_experts} experts: [T, K] {real}, [T * K], [T, K], [L + 1]"
        )

    if any(index.dtype != torch.int32 for index in (slots, inverse, offsets)):
        raise ValueError(
            f"slots, inverse and offsets are {slots.dtype}, {inverse.dtype}, {offsets.dtype}; "
            "expected int32"
        )

    # Reading them would make a GPU wait, so only a CPU's are checked.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        used = int((inverse >= 0).sum())
        if int(offsets[-1]) != used or int(offsets[0]) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets run from {int(offsets[0])} to {int(offsets[-1])}; expected 0 to the "
                f"{used} assignments in use, never falling"
            )
