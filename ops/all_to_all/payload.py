"""What rows look like while they travel: as they are, rounded to bf16, or in 8 bits with a scale
per 128 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_BLOCK = 128
"""Values that share a scale (DeepSeek-V3's activations, arXiv 2412.19437, section 3.3)."""
_FP8 = torch.float8_e4m3fn


def encode(rows: Tensor, payload: str) -> Tensor:
    """[R, D] -> what is sent: [R, D] in the dtype of the payload, or [R, D + 4 * blocks] bytes for
    fp8.
    """
    if payload == "fp8":
        blocks = _blocks(rows.float())
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / torch.finfo(_FP8).max
        values = (blocks / scale).to(_FP8).flatten(1)[:, : rows.shape[1]]
        return torch.cat(
            (
                values.contiguous().view(torch.uint8),
                scale.flatten(1).contiguous().view(torch.uint8),
            ),
            dim=1,
        )
    return rows.to(torch.bfloat16) if payload == "bf16" else rows


def decode(sent: Tensor, width: int, dtype: torch.dtype, payload: str) -> Tensor:
    """The inverse of `encode`, rounding aside: [R, width] in `dtype`."""
    if payload != "fp8":
        return sent.to(dtype)
    values = _blocks(sent[:, :width].contiguous().view(_FP8).float())
    scale = (
        sent[:, width:]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float32)
        .unsqueeze(-1)
    )
    return (values * scale).flatten(1)[:, :width].to(dtype)


def _blocks(rows: Tensor) -> Tensor:
    """[R, D] -> [R, blocks, FP8_BLOCK], zeros behind the end."""
    short = -rows.shape[1] % FP8_BLOCK
    blocks: Tensor = torch.nn.functional.pad(rows, (0, short)).unflatten(1, (-1, FP8_BLOCK))
    return blocks
