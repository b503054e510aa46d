"""The grouped MLP over experts of 8-bit weights, for inference: int8 or e4m3, with one fp32 scale
for each output of a projection. A product is scaled where it ends, so no dequantised copy is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.grouped_mlp.fp8 import FP8, round_rows, widened
from ops.grouped_mlp.interface import (
    _backend,
    _check,
    _check_activation,
    _check_biases,
    select_backend,
)
from ops.grouped_mlp.reference import reference_grouped_mlp
from ops.grouped_mlp.spec import Activation, Stored

LARGEST = 127
"""Of int8. -128 is left out, so that the grid is symmetric."""
DTYPES: dict[Stored, torch.dtype] = {"int8": torch.int8, "fp8": FP8}


def quantize_rows(weight: Tensor, stored: Stored = "int8") -> tuple[Tensor, Tensor]:
    """[..., out, in] of any float dtype -> 8 bits of the same shape and scales [..., out] fp32, so
    that weight is near 8 bits * scale; ties go to the even neighbour.

    int8: the largest value of a row becomes 127; a row of zeros has scale 0. fp8: e4m3 with a power
    of two (fp8.round_rows), which is what the products of experts.precision=fp8 round weights to,
    so that experts trained by those lose nothing here.

    Raises:
        ValueError: a value is not finite.
    """
    values = weight.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("a weight is not finite; quantise a checkpoint that is sound")
    if stored == "fp8":
        return round_rows(values)
    scales = values.abs().amax(-1) / LARGEST
    # a row of zeros, or of values too small to divide by
    steps = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    return (values / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def dequantized(weight: Tensor, scales: Tensor) -> Tensor:
    """8 bits [..., out, in] and scales [..., out] -> fp32."""
    return widened(weight, torch.float32) * scales.unsqueeze(-1)


@torch.no_grad()
def grouped_mlp_eight_bit(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    *,
    backend: str = "auto",
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """grouped_mlp with the weights `dequantized`, up to rounding; no gradients.

    Args:
        gate_up: [L, 2F, D] int8 or e4m3; down: [L, D, F] of the same dtype.
        gate_up_scales: [L, 2F] fp32; down_scales: [L, D] fp32.
        backend: auto, triton, torch or reference; see interface.select_backend. The others as in
            grouped_mlp.

    Returns:
        [T, D] in the dtype of `hidden`.

    Raises:
        ValueError: shapes, dtypes or backend do not fit.
    """
    if hidden.dtype == torch.float64:
        weights = weights.double()
    like_up, like_down = (
        torch.empty(w.shape, dtype=hidden.dtype, device="meta") for w in (gate_up, down)
    )
    _check(hidden, weights, like_up, like_down, slots, inverse, offsets)
    _check_biases(hidden, gate_up, down, gate_up_bias, down_bias)
    _check_activation(activation)
    kind = gate_up.dtype if gate_up.dtype in DTYPES.values() else torch.int8
    for name, weight, scales in (
        ("gate_up", gate_up, gate_up_scales),
        ("down", down, down_scales),
    ):
        if (
            weight.dtype != kind
            or scales.dtype != torch.float32
            or scales.shape != weight.shape[:2]
        ):
            raise ValueError(
                f"{name} is {weight.dtype} with scales {tuple(scales.shape)} {scales.dtype}; "
                f"expected {kind} with {tuple(weight.shape[:2])} float32"
            )

    plain = activation == "swiglu" and gate_up_bias is None
    if backend == "grouped_mm":
        raise ValueError(
            "experts.backend=grouped_mm cannot multiply weights of 8 bits; choose auto or torch"
        )
    chosen = select_backend(
        backend, hidden.device, hidden.dtype, hidden.shape[1], down.shape[2], plain
    )
    if chosen == "triton":
        out: Tensor
        out, _ = _backend("triton").forward(
            hidden.contiguous(),
            weights.contiguous(),
            gate_up.contiguous(),
            down.contiguous(),
            slots,
            inverse,
            offsets,
            False,
            (gate_up_scales.contiguous(), down_scales.contiguous()),
        )
        return out
    if chosen == "reference":
        return reference_grouped_mlp(
            hidden,
            weights,
            dequantized(gate_up, gate_up_scales).to(hidden.dtype),
            dequantized(down, down_scales).to(hidden.dtype),
            slots,
            inverse,
            offsets,
            activation,
            gate_up_bias,
            down_bias,
        )
    out, _ = _backend("torch").forward(
        hidden,
        weights,
        gate_up,
        down,
        slots,
        inverse,
        offsets,
        False,
        activation,
        gate_up_bias,
        down_bias,
        (gate_up_scales, down_scales),
    )
    return out
