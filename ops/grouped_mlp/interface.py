"""SwiGLU over stacked experts: checks, then the backend the device has. See README.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ops.grouped_mlp.reference import reference_grouped_mlp


def select_backend(device: torch.device, dtype: torch.dtype, *widths: int) -> str:
    """"grouped_mm" where torch has a grouped GEMM for it, else "reference".

    It needs CUDA, bf16, compute capability 8.0 or more, and matrix widths that are multiples of 8 (16-byte rows).
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return "reference"
    return "grouped_mm" if torch.cuda.get_device_capability(device) >= (8, 0) else "reference"


def grouped_mlp(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, counts: torch.Tensor,
                backend: str | None = None) -> torch.Tensor:
    """Apply each expert's SwiGLU to its consecutive rows.

    Args:
        rows: [R, D] floating, sorted by local expert.
        gate_up: [L, 2F, D], gate projection first; down: [L, D, F]; both in the dtype of `rows`.
        counts: [L] int64, rows per expert (zero allowed), sum R.
        backend: "reference" | "grouped_mm"; None chooses by device and dtype.

    Returns:
        [R, D]. Every weight gets a gradient on every call, also from experts without rows and when R is 0: ranks
        that skip a parameter would leave their peers waiting in the gradient reduction.

    Raises:
        ValueError: shapes or backend do not fit, or counts do not sum to R (checked on CPU tensors only).
    """
    num_experts, double_width, hidden_size = gate_up.shape
    if rows.shape[1] != hidden_size or down.shape != (num_experts, hidden_size, double_width // 2):
        raise ValueError(f"rows {tuple(rows.shape)}, gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} "
                         "do not fit [R, D], [L, 2F, D], [L, D, F]")
    if counts.shape != (num_experts,):
        raise ValueError(f"counts has shape {tuple(counts.shape)}, expected ({num_experts},)")
    if counts.device.type == "cpu" and int(counts.sum()) != rows.shape[0]:
        raise ValueError(f"counts sum to {int(counts.sum())}, but there are {rows.shape[0]} rows")
    backend = backend or select_backend(rows.device, rows.dtype, hidden_size, double_width // 2)
    if backend not in ("reference", "grouped_mm"):
        raise ValueError(f"unknown grouped_mlp backend {backend!r}; choose reference or grouped_mm")
    if backend == "reference" or rows.shape[0] == 0:
        return reference_grouped_mlp(rows, gate_up, down, counts)
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=ends)
    if out.requires_grad:  # torch 2.13: the backward of grouped_mm refuses a broadcast gradient, as of out.sum()
        out.register_hook(torch.Tensor.contiguous)
    return out
