"""Who computes a call: the kernels, or the plain torch of the ops that call them."""

from __future__ import annotations

import functools
import logging

import torch

BACKENDS = ("triton", "torch")
HEAD_DIMS = {
    torch.bfloat16: (64, 128, 256, 512),
    torch.float16: (64, 128, 256, 512),
    torch.float32: (64, 128),
}
"""What the kernels are built for; fp32, whose products take no tensor cores, spills beyond."""
INDEX_WIDTHS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
"""Largest head of an index that chooses, of which its kernels have all dimensions at once."""
log = logging.getLogger("loadstone")


def pick_backend(
    asked: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    span: int,
    index_width: int = 0,
    what: str | None = None,
) -> str:
    """The back-end of a call; said once.

    Args:
        asked: "triton" or "torch"; None takes "triton" on CUDA for the shapes that the kernels are
            built for, else "torch".
        head_dim: None: rows are chosen or pooled, and others attend to them.
        span: rows that are chosen together.
        index_width: dimensions of a head of the index that chooses; 0: nothing chooses.
        what: the call in the log's words; None: the attention, choice or pooling that it is.

    Raises:
        ValueError: another name, or a span, width or dtype that the kernels cannot take.
    """
    if asked is not None and asked not in BACKENDS:
        raise ValueError(
            f"backend is {asked!r}; choose one of {', '.join(BACKENDS)}, or None for the device's"
        )
    reason = None
    if dtype not in HEAD_DIMS:
        reason = f"{str(dtype).removeprefix('torch.')} is not what the kernels compute in"
    elif span & (span - 1):
        reason = f"{span} rows are chosen together, and the kernels take powers of two"
    elif head_dim is not None and (head_dim & (head_dim - 1) or head_dim < 16):
        reason = f"head_dim is {head_dim}, and the kernels take powers of two from 16 on"
    elif index_width > INDEX_WIDTHS[dtype]:
        reason = (
            f"heads of the index have {index_width} dimensions, and its kernels take "
            f"{INDEX_WIDTHS[dtype]} at most"
        )
    elif asked is None and head_dim is not None and head_dim not in HEAD_DIMS[dtype]:
        reason = f"head_dim is {head_dim}, and the kernels are built for {HEAD_DIMS[dtype]}"
    if asked == "triton" and reason is not None:
        raise ValueError(f"backend=triton cannot take this call: {reason}; use backend=torch")
    if asked is not None:
        return asked
    if device.type != "cuda":
        return "torch"
    if what is None:
        what = "choice and pooling of rows" if head_dim is None else "attention to chosen rows"
    _announce(f"{what}: {f'plain torch, as {reason}' if reason else 'Triton kernels'}")
    return "torch" if reason else "triton"


@functools.cache
def _announce(text: str) -> None:
    log.info(text)
