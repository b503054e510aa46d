"""The router as one op: checks, then the backend the device has. See README.md.

Shape letters: T tokens, C columns (E experts, then null experts), K slots (max_experts), N
segments, B histogram bins.
"""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.compile.cuda import BuildError, build_cuda, build_ops, device_architecture
from ops.compiling import constant_when_compiled
from ops.router.reference import RouterOutput, expert_choice_cuts, reference_route
from ops.router.spec import NUM_REASONS, Integers, RouteSpec

log = logging.getLogger("loadstone")
SOURCES = Path(__file__).resolve().parent / "csrc"


def route(
    logits: Tensor,
    spec: RouteSpec,
    *,
    bias: Tensor | None = None,
    router_inputs: Tensor | None = None,
    token_mask: Tensor | None = None,
    given_ids: Tensor | None = None,
    histogram_range: Tensor | None = None,
    num_bins: int = 0,
    token_ids: Tensor | None = None,
    num_segments: int = 1,
    bias_table: Tensor | None = None,
    row_of: Tensor | None = None,
    backend: str | None = None,
) -> RouterOutput:
    """Select experts for every token, with gates, statistics and the permutation, in one pass over
    the logits.

    Args:
        logits: [T, C] fp32, bf16, or fp64 (CPU, for checks, at most 64 columns). All arithmetic is
            fp32 (fp64).
        bias: [C] fp32, added to the scores for selection only. Not with expert_choice.
        router_inputs: [4] fp32 on the device of the logits: the mode's value (top_p: P; threshold
            and relu: the cut), the share of the mode against plain top-k (1: the mode alone;
            between, the number of experts is interpolated), that top-k, and the most experts a
            token may have now. None: [0, 1, 0, K]; top_p needs it.
        token_mask: [T] bool; False visits no expert and counts nowhere.
        given_ids: [T, K] integers, -1 unused, distinct within a token; with mode "given" only.
        histogram_range: [E, 2] fp32, lowest value and bins per unit of each expert's histogram of
            `num_bins` bins.
        token_ids: [T] int64, what the checksum calls a token; None: checksum 0.
        num_segments: T is cut into so many runs of equal length, for sums per sequence.
        bias_table: [P, C] fp32, biases of P budgets, of which row_of names a token's; instead of
            `bias`.
        row_of: [T] int32 from 0 to P - 1: tokens of several budgets in one batch. router_inputs
            are then [P, 4]. For inference: not with expert_choice, nor with a histogram. On CUDA
            what lies outside is clamped, as reading it would make the host wait.
        backend: "fused" (C++ on CPU, CUDA kernels on CUDA) or "reference"; None: fused where it can
            be built.

    Returns:
        RouterOutput. Gradients flow to the logits from weights, score_sums, z_sum and entropy_sum.
        Nothing in it has visited the host; equal inputs give equal bits.

    Raises:
        ValueError: shapes, dtypes or settings do not fit.

    Source: moe rules of arXiv 2401.04088, 2403.07652, 2412.14711, 2412.19437, 2603.11535; formulas
    in README.md.
    """
    _check(
        logits,
        spec,
        bias,
        router_inputs,
        token_mask,
        given_ids,
        histogram_range,
        num_bins,
        token_ids,
        num_segments,
        bias_table,
        row_of,
    )
    bias = bias if bias_table is None else bias_table

    backend = backend or select_backend(logits.device, logits.dtype)
    if backend not in ("fused", "reference"):
        raise ValueError(f"unknown router backend {backend!r}; choose fused or reference")
    if spec.mode != "given":
        given_ids = None
    if backend == "reference" or (logits.device.type == "cuda" and len(logits) == 0):
        return reference_route(
            logits,
            spec,
            bias,
            router_inputs,
            token_mask,
            given_ids,
            histogram_range,
            num_bins,
            token_ids,
            num_segments,
            row_of,
        )

    _require_fused(logits.device.type)
    logits = logits.contiguous()
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32

    # Expert choice needs a sort over the tokens, which is torch's; the op takes its cuts. The
    # scores are the op's own, so that equal ones compare as equal.
    cuts: tuple[Tensor | None, Tensor | None] = (None, None)
    settings = spec.integers(num_segments, num_bins)
    if spec.mode == "expert_choice":
        with torch.no_grad():
            live = logits.isfinite().all(1)
            live = live if token_mask is None else live & token_mask
            cuts = expert_choice_cuts(
                torch.ops.loadstone.router_scores(logits, settings, 1.0), live, spec.top_k
            )

    (
        weights,
        expert_ids,
        counts,
        score_sums,
        float_sums,
        log_z,
        margin,
        entropy,
        reasons,
        slots,
        inverse,
        offsets,
        histogram,
        integers,
    ) = torch.ops.loadstone.router_forward(
        logits,
        None if bias is None else bias.detach().to(real).contiguous(),
        router_inputs,
        token_mask,
        None if given_ids is None else given_ids.to(torch.int32).contiguous(),
        *cuts,
        histogram_range,
        token_ids,
        row_of,
        settings,
        spec.scaling_factor,
    )

    # Integers come in one tensor, as each tensor more is one more to allocate.
    num_slots = spec.max_experts
    k_histogram, reason_counts, rest = integers.split((num_slots + 1, NUM_REASONS, 3))
    null_count, _, checksum = rest.unbind()
    z_sum, entropy_sum = float_sums.unbind()
    return RouterOutput(
        weights=weights,
        expert_ids=expert_ids,
        counts=counts,
        score_sums=score_sums,
        z_sum=z_sum,
        entropy_sum=entropy_sum,
        log_z=log_z.detach(),
        margin=margin.detach(),
        entropy=entropy.detach(),
        reasons=reasons,
        slots=slots,
        inverse=inverse,
        offsets=offsets,
        histogram=histogram,
        k_histogram=k_histogram,
        reason_counts=reason_counts,
        null_count=null_count,
        checksum=checksum,
        overflow=counts.new_zeros(2),
    )


def select_backend(device: torch.device, dtype: torch.dtype) -> str:
    """ "fused" where the library can be built, else "reference", announced once with the reason."""
    return "fused" if _is_available(device.type) else "reference"


@constant_when_compiled
def _is_available(device_type: str) -> bool:
    return _unavailable(device_type) is None


@constant_when_compiled
def _require_fused(device_type: str) -> bool:
    """Raises BuildError where there is no fused router."""
    reason = _unavailable(device_type)
    if reason is not None:
        raise BuildError(reason)
    return True


@functools.cache
def _unavailable(device_type: str) -> str | None:
    """Why there is no fused router for a device type; None where there is one."""
    try:
        if device_type == "cuda":
            with ThreadPoolExecutor(1) as pool:  # two compilers side by side
                library = pool.submit(
                    build_cuda, "router_cuda", [SOURCES / "router.cu"], (device_architecture(),)
                )
                load_library()
            torch.ops.loadstone.router_use_launchers(str(library.result()), False)
        elif device_type == "cpu":
            load_library()
        else:
            raise BuildError(f"there is no kernel for {device_type}")
    except (BuildError, OSError) as error:
        log.warning("the router runs in plain torch on %s, which is slower: %s", device_type, error)
        return str(error)
    return None


@functools.cache
def load_library() -> None:
    """Build and load the dispatcher ops, and register their fake kernels and gradient.

    Raises:
        BuildError: no compiler, or it failed.
    """
    torch.ops.load_library(str(build_ops("router", [SOURCES / "router_ops.cpp"])))
    torch.library.register_fake("loadstone::router_forward", _forward_fake)
    torch.library.register_fake("loadstone::router_backward", _backward_fake)
    torch.library.register_fake("loadstone::router_scores", _scores_fake)
    torch.library.register_autograd(
        "loadstone::router_forward", _backward, setup_context=_setup_context
    )


def _forward_fake(
    logits: Tensor,
    bias: Tensor | None,
    router_inputs: Tensor | None,
    token_mask: Tensor | None,
    given_ids: Tensor | None,
    cut_scores: Tensor | None,
    cut_tokens: Tensor | None,
    histogram_range: Tensor | None,
    token_ids: Tensor | None,
    row_of: Tensor | None,
    settings: list[int],
    scale: float,
) -> tuple[Tensor, ...]:
    num_tokens, sizes = logits.shape[0], Integers(*settings)
    num_experts, num_slots, num_segments = sizes.num_experts, sizes.num_slots, sizes.num_segments
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def make(*size: int, dtype: torch.dtype = real) -> Tensor:
        return logits.new_empty(size, dtype=dtype)

    return (
        make(num_tokens, num_slots),
        make(num_tokens, num_slots, dtype=torch.int32),
        make(num_segments, num_experts, dtype=torch.int64),
        make(num_segments, num_experts),
        make(2),
        make(num_tokens),
        make(num_tokens),
        make(num_tokens),
        make(num_tokens, dtype=torch.uint8),
        make(num_tokens * num_slots, dtype=torch.int32),
        make(num_tokens, num_slots, dtype=torch.int32),
        make(num_experts + 1, dtype=torch.int32),
        make(num_experts, sizes.num_bins, dtype=torch.int32),
        make(num_slots + NUM_REASONS + 4, dtype=torch.int64),
    )


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _scores_fake(logits: Tensor, settings: list[int], scale: float) -> Tensor:
    return logits.new_empty(
        logits.shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, token_mask, *_, settings, scale = inputs
    _, expert_ids, _, score_sums, _, log_z, _, entropy, reasons, *_ = output
    ctx.save_for_backward(logits, expert_ids, token_mask, reasons, log_z, entropy)
    ctx.settings, ctx.scale, ctx.sums_shape = settings, scale, score_sums.shape
    # most outputs never get a gradient, and each zero costs a launch
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_weights: Tensor | None,
    _ids: Any,
    _counts: Any,
    grad_score_sums: Tensor | None,
    grad_float_sums: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    logits, expert_ids, token_mask, reasons, log_z, entropy = ctx.saved_tensors

    def given(grad: Tensor | None, *shape: int) -> Tensor:
        return log_z.new_zeros(shape) if grad is None else grad.contiguous()

    grad = torch.ops.loadstone.router_backward(
        logits,
        expert_ids,
        token_mask,
        reasons,
        log_z,
        entropy,
        given(grad_weights, *expert_ids.shape),
        given(grad_score_sums, *ctx.sums_shape),
        given(grad_float_sums, 2),
        ctx.settings,
        ctx.scale,
    )
    return (grad, *[None] * 11)


def _check(
    logits: Tensor,
    spec: RouteSpec,
    bias: Tensor | None,
    router_inputs: Tensor | None,
    token_mask: Tensor | None,
    given_ids: Tensor | None,
    histogram_range: Tensor | None,
    num_bins: int,
    token_ids: Tensor | None,
    num_segments: int,
    bias_table: Tensor | None,
    row_of: Tensor | None,
) -> None:
    problems = spec.problems()
    if problems:
        raise ValueError("; ".join(problems))

    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [tokens, columns]")
    num_tokens, num_columns = logits.shape
    if num_columns != spec.num_columns:
        raise ValueError(
            f"logits have {num_columns} columns; the router has {spec.num_experts} experts and "
            f"{spec.num_null_experts} null experts"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(
            f"logits are {logits.dtype}; the router takes float32, bfloat16 or float64"
        )
    if logits.dtype == torch.float64 and num_columns > 64:
        raise ValueError(f"fp64 logits are for checks, with at most 64 columns, not {num_columns}")

    # Slots are numbered in int32.
    if num_tokens * spec.max_experts >= 2**31:
        raise ValueError(
            f"{num_tokens} tokens x {spec.max_experts} slots exceed 2^31 assignments; split the "
            "batch"
        )
    if num_segments < 1 or num_tokens % num_segments:
        raise ValueError(
            f"{num_tokens} tokens cannot be cut into {num_segments} segments of equal length"
        )

    if (spec.mode == "given") != (given_ids is not None):
        raise ValueError("given_ids belong to mode='given': give both or neither")
    if spec.mode == "top_p" and router_inputs is None:
        raise ValueError("mode='top_p' needs router_inputs, whose first value is P")
    if spec.mode == "expert_choice" and bias is not None:
        raise ValueError("mode='expert_choice' balances by itself and takes no bias")

    num_rows = _check_rows(spec, bias, router_inputs, num_bins, bias_table, row_of)
    by_row = () if row_of is None else (num_rows,)
    shapes = (
        ("bias", bias, (num_columns,), None),
        ("bias_table", bias_table, (num_rows, num_columns), None),
        ("router_inputs", router_inputs, (*by_row, 4), torch.float32),
        ("row_of", row_of, (num_tokens,), torch.int32),
        ("token_mask", token_mask, (num_tokens,), torch.bool),
        ("given_ids", given_ids, (num_tokens, spec.max_experts), None),
        ("histogram_range", histogram_range, (spec.num_experts, 2), torch.float32),
        ("token_ids", token_ids, (num_tokens,), torch.int64),
    )
    for name, tensor, shape, dtype in shapes:
        if tensor is None:
            continue
        if (
            tuple(tensor.shape) != shape
            or (dtype is not None and tensor.dtype != dtype)
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}; expected a contiguous {shape} "
                f"{dtype or ''}"
            )
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, the logits on {logits.device}")

    if num_bins < 0 or num_bins == 1 or (num_bins > 0 and histogram_range is None):
        raise ValueError(f"num_bins is {num_bins}; give 0, or at least 2 with histogram_range")

    # Reading them would make a GPU wait, and has no place in a graph, so only a CPU's are checked.
    if (
        given_ids is not None
        and given_ids.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and given_ids.numel()
        and (int(given_ids.min()) < -1 or int(given_ids.max()) >= spec.num_experts)
    ):
        raise ValueError(
            f"given_ids span {int(given_ids.min())}..{int(given_ids.max())}; expected -1.."
            f"{spec.num_experts - 1}"
        )
    if (
        row_of is not None
        and row_of.device.type == "cpu"
        and row_of.numel()
        and (int(row_of.min()) < 0 or int(row_of.max()) >= num_rows)
    ):
        raise ValueError(
            f"row_of spans {int(row_of.min())}..{int(row_of.max())}; expected 0..{num_rows - 1}"
        )


def _check_rows(
    spec: RouteSpec,
    bias: Tensor | None,
    router_inputs: Tensor | None,
    num_bins: int,
    bias_table: Tensor | None,
    row_of: Tensor | None,
) -> int:
    """Rows of the tables; 0: there are none."""
    if row_of is None:
        if bias_table is not None:
            raise ValueError("bias_table needs row_of, which names a token's row; else give bias")
        return 0
    table = router_inputs if bias_table is None else bias_table
    if table is None:
        raise ValueError("row_of names rows of bias_table and router_inputs: give one of them")
    if bias is not None:
        raise ValueError("with row_of the biases are rows of bias_table; give no bias")
    if spec.mode == "expert_choice":
        raise ValueError("mode='expert_choice' looks at all tokens together and takes no row_of")
    if num_bins:
        raise ValueError(
            f"num_bins is {num_bins}: histograms move the controllers of one budget, so with "
            "row_of give 0"
        )
    if table.dim() != 2 or not len(table):
        raise ValueError(f"the rows of row_of are in tables [P, ...], not {tuple(table.shape)}")
    return len(table)
