"""The Triton backend: gathered rows, SwiGLU in the products' epilogues, sums over a token's experts
without atomics.

Nothing here waits for the device. Shape letters: interface.py, and R = T * K, the most rows there
can be; row buffers have R rows, of which those behind the last assignment are neither written nor
read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.compile.launch import architecture, launch, without_tma
from ops.grouped_mlp.fp8 import FP8, TILE, round_rows
from ops.grouped_mlp.kernels import configs
from ops.grouped_mlp.kernels.backward import (
    act_grad_kernel,
    down_grad_kernel,
    gate_up_grad_kernel,
    row_grad_kernel,
    weights_grad_kernel,
)
from ops.grouped_mlp.kernels.common import tile_map_kernel
from ops.grouped_mlp.kernels.configs import Config
from ops.grouped_mlp.kernels.forward import combine_kernel, down_kernel, up_kernel
from ops.grouped_mlp.kernels.rounded import round_tiles_kernel, tiles_product_kernel
from ops.grouped_mlp.spec import Precision

__all__ = ["backward", "forward", "problem", "problem_of_fp8"]

Scaled = tuple[Tensor, Tensor | None]
"""What a product takes, and its scales where it is e4m3."""


def problem(dtype: torch.dtype, hidden_size: int, width: int) -> str | None:
    """Why these kernels cannot serve; None where they can. Any sizes will do: multiples of 64 need
    no masks, and rows of 16 bytes are loaded at once.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 or float16, not {dtype}"
    return None


def problem_of_fp8(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why they cannot multiply 8-bit floats; None where they can."""
    if dtype != torch.bfloat16:
        return f"its 8-bit products go with bfloat16, not {dtype}"
    if device.type == "cuda" and architecture(device) < 89:
        return "products of 8-bit floats need compute capability 8.9"
    return None


def forward(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    keep: bool,
    scales: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "native",
) -> tuple[Tensor, Tensor | None]:
    """Output [T, D], and the pre-activations [R, 2F] in row order where `keep`. Arguments:
    interface.grouped_mlp. scales: of weights of 8 bits, [L, 2F] and [L, D] fp32.
    """
    low = precision != "native"
    num_experts, hidden_size, width = down.shape
    top_k = weights.shape[1]
    rows = configs.tile_rows(len(slots), num_experts, hidden.dtype)
    tiles = _tile_map(slots, offsets, rows)

    # Backward needs the pre-activations alone, and makes the activations from them.
    pre = hidden.new_empty(len(slots), 2 * width) if keep else None
    act = hidden.new_empty(len(slots), width)
    up_scales, down_scales = scales or (None, None)
    if scales is not None:
        gate_up, down = _readable(gate_up), _readable(down)
    tokens = _scaled(hidden, low)
    matrices: Scaled = round_rows(gate_up) if low else (gate_up, up_scales)
    _up(tokens, matrices, slots, offsets, tiles, act, pre, top_k, rows)

    act_scales = None
    if low:
        (act, act_scales), (down, down_scales) = round_rows(act), round_rows(down)
    config = _fitting(
        configs.row_config(rows, width, act.dtype, architecture(hidden.device)),
        act,
        down,
        stored=scales is not None,
    )

    # With one slot a token the rows are the tokens: the product writes them in place, weighted, and
    # zeros stand where no expert was.
    scatter = top_k == 1
    out = torch.zeros_like(hidden) if scatter else hidden.new_empty(len(slots), hidden_size)
    launch(
        down_kernel,
        _row_grid(tiles, hidden_size, config),
        act,
        _rows(act, config),
        _matrices(down, (config.columns, config.step), config),
        act_scales,
        down_scales,
        weights,
        slots,
        offsets,
        *tiles,
        out,
        HIDDEN=hidden_size,
        WIDTH=width,
        SCATTER=scatter,
        FP8=low,
        **config.sizes,
    )
    return out if scatter else _combine(out, inverse, weights), pre


def backward(
    grad_out: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    pre: Tensor | None,
    precision: Precision = "native",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weights (fp32), gate_up and down. pre: of forward; None computes it
    again.
    """
    low = precision != "native"
    num_tokens, top_k = weights.shape
    num_experts, hidden_size, width = down.shape
    num_rows = len(slots)
    sizes = {"HIDDEN": hidden_size, "WIDTH": width}
    target = architecture(hidden.device)

    grad_out = grad_out.contiguous()
    rows = configs.tile_rows(num_rows, num_experts, hidden.dtype)
    tiles = _tile_map(slots, offsets, rows)
    if pre is None:
        pre = hidden.new_empty(num_rows, 2 * width)
        _up(
            _scaled(hidden, low),
            _scaled(gate_up, low),
            slots,
            offsets,
            tiles,
            None,
            pre,
            top_k,
            rows,
        )

    # Through the down-projection and SwiGLU, with the weights' gradient on the way: each tile of
    # columns has a part of <grad_act, act>, and a second kernel adds them in order.
    grad_rows = _scaled(grad_out, low)
    down_columns: Scaled = _rounded_columns(down) if low else (down, None)
    config = _fitting(configs.act_grad_config(rows, grad_rows[0].dtype, target), down_columns[0])
    num_parts = -(-width // config.columns)
    grad_pre, act = torch.empty_like(pre), hidden.new_empty(num_rows, width)
    partial = torch.empty(num_parts, num_rows, dtype=torch.float32, device=hidden.device)
    grad_weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=hidden.device)

    launch(
        act_grad_kernel,
        _row_grid(tiles, width, config),
        grad_rows[0],
        _columns(down_columns[0], config, low),
        grad_rows[1],
        down_columns[1],
        pre,
        weights,
        slots,
        offsets,
        *tiles,
        grad_pre,
        act,
        partial,
        num_rows,
        **sizes,
        EXPERTS=num_experts,
        TOP_K=top_k,
        SPLITS=config.splits,
        FP8=low,
        **config.sizes,
    )

    launch(
        weights_grad_kernel,
        (-(-num_rows // 1024),),
        partial,
        inverse,
        grad_weights,
        num_rows,
        PARTS=num_parts,
        BLOCK=1024,
        num_warps=4,
    )

    # The experts' gradients, sums over their rows; an expert without rows writes zeros.
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    if precision == "fp8_all":
        whole = tiles if rows == TILE else _tile_map(slots, offsets, TILE)
        places = slots, offsets, whole, top_k
        _tiles_product(
            _round_tiles(grad_out, True, *places),
            _round_tiles(act, False, *places),
            offsets,
            grad_down,
        )
        _tiles_product(
            _round_tiles(grad_pre, False, *places),
            _round_tiles(hidden, True, *places),
            offsets,
            grad_gate_up,
        )
    else:
        config = _fitting(configs.expert_config(True, hidden.dtype, target), act)
        launch(
            down_grad_kernel,
            _expert_grid(grad_down, config),
            grad_out,
            act,
            _descriptor(act, (config.step, config.columns), config),
            slots,
            offsets,
            grad_down,
            **sizes,
            TOP_K=top_k,
            **config.sizes,
        )

        config = _fitting(configs.expert_config(False, hidden.dtype, target), grad_pre)
        launch(
            gate_up_grad_kernel,
            _expert_grid(grad_gate_up, config),
            grad_pre,
            _descriptor(grad_pre, (config.step, config.rows), config),
            hidden,
            slots,
            offsets,
            grad_gate_up,
            **sizes,
            TOP_K=top_k,
            **config.sizes,
        )

    # Back to the tokens. With one slot a token the product writes to the tokens themselves.
    grad_scales: Tensor | None = None
    up_columns: Scaled = (gate_up, None)
    if low:
        (grad_pre, grad_scales), up_columns = round_rows(grad_pre), _rounded_columns(gate_up)
    config = _fitting(
        configs.row_config(rows, 2 * width, grad_pre.dtype, target), grad_pre, up_columns[0]
    )
    scatter = top_k == 1
    row_grads = torch.zeros_like(hidden) if scatter else hidden.new_empty(num_rows, hidden_size)
    launch(
        row_grad_kernel,
        _row_grid(tiles, hidden_size, config),
        grad_pre,
        _rows(grad_pre, config),
        _columns(up_columns[0], config, low),
        grad_scales,
        up_columns[1],
        slots,
        offsets,
        *tiles,
        row_grads,
        **sizes,
        SCATTER=scatter,
        FP8=low,
        **config.sizes,
    )
    grad_hidden = row_grads if scatter else _combine(row_grads, inverse, None)
    return grad_hidden, grad_weights, grad_gate_up, grad_down


def _tile_map(slots: Tensor, offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Expert (-1: superfluous) and first row of each row tile, int32. An expert has at most one
    tile that is not full.
    """
    num_rows, num_experts = len(slots), len(offsets) - 1
    num_tiles = num_rows // rows + min(num_experts, num_rows)
    expert, start = (
        torch.empty(num_tiles, dtype=torch.int32, device=slots.device) for _ in range(2)
    )
    launch(
        tile_map_kernel,
        (num_experts + 1,),
        offsets,
        expert,
        start,
        num_tiles,
        EXPERTS=num_experts,
        SIZE=1 << (num_experts - 1).bit_length(),
        ROWS=rows,
        CHUNK=128,
        num_warps=1,
    )
    return expert, start


def _readable(weight: Tensor) -> Tensor:
    """Weights of 8 bits as a kernel reads them: e4m3 by its bits where the device has no
    conversion of it (kernels/common.py).
    """
    if weight.dtype == FP8 and architecture(weight.device) < 89:
        return weight.view(torch.uint8)
    return weight


def _fitting(config: Config, *tensors: Tensor, stored: bool = False) -> Config:
    """Without TMA where a tensor is not for it. stored: the matrices are weights of 8 bits, which
    are read by pointers.
    """
    if stored:
        return configs.eight_bit_config(config)
    target = architecture(tensors[0].device)
    return config if without_tma(target, *tensors) is None else config._replace(tma=False)


def _descriptor(tensor: Tensor, block: tuple[int, ...], config: Config) -> TensorDescriptor | None:
    """What TMA loads blocks by."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if config.tma else None


def _rows(rows: Tensor, config: Config) -> TensorDescriptor | None:
    return _descriptor(rows, (config.rows, config.step), config)


def _matrices(
    matrices: Tensor, block: tuple[int, ...], config: Config
) -> Tensor | TensorDescriptor:
    """Of an expert at a time."""
    return _descriptor(matrices, (1, *block), config) or matrices


def _columns(matrices: Tensor, config: Config, low: bool) -> Tensor | TensorDescriptor:
    """Of an expert at a time, summed over its rows; of 8-bit floats it has those as columns."""
    block = (config.columns, config.step) if low else (config.step, config.columns)
    return _matrices(matrices, block, config)


def _scaled(values: Tensor, low: bool) -> Scaled:
    """The rows of one side of a product."""
    return round_rows(values) if low else (values, None)


def _rounded_columns(matrices: Tensor) -> Scaled:
    """[L, m, n] -> e4m3 [L, n, m], whose rows are summed over and lie as tensor cores want 8-bit
    values, and scales [L, n].
    """
    return round_rows(matrices.transpose(1, 2).contiguous())


def _round_tiles(
    values: Tensor,
    gather: bool,
    slots: Tensor,
    offsets: Tensor,
    tiles: tuple[Tensor, Tensor],
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """What of [R, W], with `gather` of [T, W], is summed over rows: e4m3 [tiles, W, TILE], rows
    last, and fp32 scales [tiles, W] (kernels/rounded.py). tiles: the map of tiles of TILE rows.
    """
    num_tiles, width = len(slots) // TILE + len(offsets) - 1, values.shape[1]
    low = torch.empty((num_tiles, width, TILE), dtype=FP8, device=values.device)
    scales = torch.empty((num_tiles, width), dtype=torch.float32, device=values.device)
    columns = configs.ROUNDED_COLUMNS
    launch(
        round_tiles_kernel,
        (len(tiles[0]) * -(-width // columns),),
        values,
        slots,
        offsets,
        *tiles,
        low,
        scales,
        WIDTH=width,
        GATHER=gather,
        TOP_K=top_k,
        COLUMNS=columns,
        STEP=TILE,
        num_warps=4,
    )
    return low, scales


def _tiles_product(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], offsets: Tensor, grad: Tensor
) -> None:
    """Write the gradient [L, left, right] of a weight from tiles of its rows."""
    config = _fitting(configs.tiles_config(architecture(grad.device)), left[0], right[0])
    (x, x_scales), (y, y_scales) = left, right
    launch(
        tiles_product_kernel,
        _expert_grid(grad, config),
        x,
        _descriptor(x, (1, config.rows, TILE), config),
        x_scales,
        y,
        _descriptor(y, (1, config.columns, TILE), config),
        y_scales,
        offsets,
        grad,
        LEFT=grad.shape[1],
        RIGHT=grad.shape[2],
        **config.sizes,
    )


def _row_grid(tiles: tuple[Tensor, Tensor], columns: int, config: Config) -> tuple[int]:
    return (len(tiles[0]) * -(-columns // config.columns),)


def _expert_grid(grad: Tensor, config: Config) -> tuple[int]:
    num_experts, left, right = grad.shape
    return (num_experts * -(-left // config.rows) * -(-right // config.columns),)


def _up(
    tokens: Scaled,
    matrices: Scaled,
    slots: Tensor,
    offsets: Tensor,
    tiles: tuple[Tensor, Tensor],
    act: Tensor | None,
    pre: Tensor | None,
    top_k: int,
    rows: int,
) -> None:
    (hidden, hidden_scales), (gate_up, gate_up_scales) = tokens, matrices
    num_experts, double_width, hidden_size = gate_up.shape
    width = double_width // 2
    config = _fitting(
        configs.up_config(rows, hidden.dtype, architecture(hidden.device)),
        gate_up,
        stored=gate_up.dtype != hidden.dtype,
    )
    pairs = gate_up.view(num_experts, 2, width, hidden_size)
    launch(
        up_kernel,
        _row_grid(tiles, width, config),
        hidden,
        _matrices(pairs, (2, config.columns, config.step), config),
        hidden_scales,
        gate_up_scales,
        slots,
        offsets,
        *tiles,
        act,
        pre,
        HIDDEN=hidden_size,
        WIDTH=width,
        TOP_K=top_k,
        FP8=hidden.dtype == FP8,
        **config.sizes,
    )


def _combine(rows: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """[R, D] -> [T, D]."""
    (num_tokens, top_k), hidden_size = inverse.shape, rows.shape[1]
    columns, num_warps = configs.combine_config(hidden_size)
    out = rows.new_empty(num_tokens, hidden_size)
    launch(
        combine_kernel,
        (num_tokens, -(-hidden_size // columns)),
        rows,
        inverse,
        weights,
        out,
        HIDDEN=hidden_size,
        TOP_K=top_k,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return out
