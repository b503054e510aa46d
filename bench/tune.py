"""Which tiles are fastest: every Triton kernel of an op with candidates for its tiles, on a CUDA
device.

`python -m bench.tune grouped_mlp|sparse_attention [--workers 12] [--shape NAME ...] [--json FILE]`

Round i takes candidate i of every kernel, so as many rounds as the longest list has; each kernel is
timed by events of its own around its launch, after a flush of the L2 cache at the beginning of the
op. Kernels are compiled beforehand by processes side by side, which meet in Triton's cache on disk.
What is fastest here and spills nowhere (ops/compile/ahead_of_time.py) belongs into
ops/*/kernels/configs.py.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from bench.common import L2_BYTES
from ops.compile.ahead_of_time import grouped_mlp_launches, sparse_attention_launches
from ops.compile.launch import Launch
from ops.grouped_mlp import grouped_mlp
from ops.grouped_mlp import triton_backend as grouped_backend
from ops.grouped_mlp.kernels import configs as grouped_configs
from ops.grouped_mlp.kernels.configs import Config
from ops.permute import group_by_expert
from ops.sparse_attention import SparseAttentionSpec, sparse_attention
from ops.sparse_attention import triton_backend as attention_backend
from ops.sparse_attention.kernels import configs as attention_configs
from ops.testing import assert_close, draw_expert_ids
from train.files.strict_json import dumps

Candidates = dict[str, list[Any]]
REPEATS = 5

GROUPED_SHAPES = {
    "30b": (32768, 4096, 1024, 64, 4),
    "7b": (24576, 1536, 512, 64, 4),
    "1.4b": (40960, 768, 256, 128, 8),
    "qwen3": (8192, 2048, 768, 128, 8),
    "fine": (32768, 4096, 256, 256, 16),
}
GROUPED_CANDIDATES: Candidates = {
    "up_config": [
        Config(128, 128, 64, 8, 4, group=16, tma=True),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 3, tma=True),
        Config(128, 64, 64, 4, 3, 168, tma=True),
        Config(128, 64, 64, 8, 3, 128, tma=True),
        Config(128, 128, 32, 8, 5, group=16, tma=True),
        Config(128, 128, 64, 8, 4, group=64, tma=True),
        Config(128, 128, 128, 8, 2, tma=True),
    ],
    "row_config": [
        Config(128, 256, 64, 8, 4, group=16, tma=True),
        Config(128, 256, 64, 8, 4),
        Config(128, 128, 64, 4, 3, tma=True),
        Config(128, 128, 64, 8, 3, 128, tma=True),
        Config(128, 128, 64, 4, 3, 168, tma=True),
        Config(128, 256, 64, 8, 3, tma=True),
        Config(128, 128, 64, 4, 2, 168, tma=True),
        Config(128, 128, 32, 4, 4, 168, tma=True),
    ],
    "act_grad_config": [
        Config(128, 256, 64, 8, 4, 255, 3, tma=True),
        Config(128, 128, 64, 8, 3, 128, 3),
        Config(128, 256, 64, 8, 4, 255, 2, tma=True),
        Config(128, 256, 64, 8, 4, 255, 4, tma=True),
        Config(128, 256, 64, 8, 4, 255, 3, group=16, tma=True),
        Config(128, 128, 64, 4, 3, 168, 2, tma=True),
        Config(128, 128, 64, 8, 3, 128, 2, tma=True),
        Config(128, 128, 64, 8, 3, 168, 2, tma=True),
    ],
    "expert_config": [
        Config(128, 128, 64, 4, 4, tma=True),
        Config(128, 256, 64, 8, 5),
        Config(128, 256, 64, 8, 5, tma=True),
        Config(128, 256, 64, 8, 6, tma=True),
        Config(128, 128, 64, 4, 5, tma=True),
        Config(128, 128, 64, 4, 6, tma=True),
        Config(128, 128, 64, 4, 4, 168, tma=True),
        Config(128, 256, 64, 8, 5, group=16),
    ],
    "combine_config": [
        (1024, 4),
        (2048, 4),
        (4096, 4),
        (4096, 8),
        (512, 2),
        (2048, 8),
        (1024, 8),
        (512, 4),
    ],
}

# tokens of one document, heads, key/value heads, head_dim
ATTENTION_SHAPES = {"model": (32768, 32, 4, 128)}


def _attention(
    rows: int, columns: int, warps: int, stages: int, most_queries: int = 32
) -> Callable[[int, int], Any]:
    return lambda group, block: attention_configs._config(
        rows, columns, warps, stages, group, block, most_queries
    )


ATTENTION_CANDIDATES: Candidates = {
    "attend_config": [
        _attention(128, 64, 8, 2),
        _attention(128, 64, 8, 3),
        _attention(128, 32, 8, 3),
        _attention(64, 64, 4, 2),
        _attention(64, 64, 4, 3),
        _attention(128, 64, 4, 2),
        _attention(256, 64, 8, 2),
    ],
    "query_grad_config": [
        _attention(64, 32, 8, 2),
        _attention(64, 32, 4, 2),
        _attention(128, 32, 8, 2),
        _attention(64, 64, 4, 2),
        _attention(64, 64, 8, 2),
        _attention(128, 64, 8, 1),
        _attention(128, 64, 8, 2),
    ],
    "entry_grad_config": [
        _attention(64, 32, 8, 1),
        _attention(64, 32, 4, 1),
        _attention(64, 64, 8, 1),
        _attention(32, 64, 8, 1),
        _attention(64, 32, 8, 2),
        _attention(64, 64, 4, 1),
        _attention(64, 128, 8, 1),
    ],
    "key_grad_config": [
        _attention(64, 64, 8, 1, 64),
        _attention(64, 64, 4, 1, 64),
        _attention(128, 64, 8, 1, 64),
        _attention(64, 32, 4, 1, 64),
        _attention(64, 64, 8, 2, 64),
        _attention(128, 64, 8, 2, 64),
        _attention(64, 64, 4, 2, 64),
    ],
    "rank_config": [
        _attention(128, 32, 8, 2),
        _attention(128, 32, 8, 3),
        _attention(128, 64, 8, 2),
        _attention(64, 64, 4, 2),
        _attention(64, 32, 4, 2),
        _attention(128, 32, 4, 2),
        _attention(128, 16, 8, 2),
    ],
}


Case = Callable[[str], tuple[torch.Tensor, ...]]
"""Backend -> output and gradients of forward and backward at a shape."""


def grouped_case(name: str) -> Case:
    tokens, hidden_size, width, num_experts, top_k = GROUPED_SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return values.mul_(scale).requires_grad_()

    places = group_by_expert(
        draw_expert_ids(tokens, num_experts, top_k, "even").cuda(), num_experts
    )
    gates = torch.rand(tokens, top_k, generator=generator, device="cuda").requires_grad_()
    inputs = (
        normal(tokens, hidden_size, scale=1.0),
        gates,
        normal(num_experts, 2 * width, hidden_size, scale=0.02),
        normal(num_experts, hidden_size, width, scale=0.02),
    )
    grad = torch.randn(
        tokens, hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16
    )

    def call(backend: str) -> tuple[torch.Tensor, ...]:
        out = grouped_mlp(*inputs, *places, backend=backend)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return call


def attention_case(name: str) -> Case:
    tokens, heads, kv_heads, head_dim = ATTENTION_SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(
            tokens, n, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    spec = SparseAttentionSpec()

    def call(backend: str) -> tuple[torch.Tensor, ...]:
        out = sparse_attention(q, k, v, cu_seqlens, spec, backend=backend).out
        return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return call


OPS: dict[str, tuple[ModuleType, ModuleType, Candidates, dict[str, Any], Callable[..., Any]]] = {
    "grouped_mlp": (
        grouped_backend,
        grouped_configs,
        GROUPED_CANDIDATES,
        GROUPED_SHAPES,
        grouped_case,
    ),
    "sparse_attention": (
        attention_backend,
        attention_configs,
        ATTENTION_CANDIDATES,
        ATTENTION_SHAPES,
        attention_case,
    ),
}


@contextlib.contextmanager
def with_candidates(op: str, chosen: dict[str, int]) -> Iterator[None]:
    """Take the candidate of each function of the op's configs by its place in the list."""
    _, configs, candidates, _, _ = OPS[op]
    with contextlib.ExitStack() as stack:
        for function, place in chosen.items():
            config = candidates[function][place]
            if op == "grouped_mlp":
                stack.enter_context(
                    mock.patch.object(configs, function, lambda *_, config=config: config)
                )
            else:  # (head_dim, group, block_size, ...)
                stack.enter_context(
                    mock.patch.object(
                        configs,
                        function,
                        lambda _, group, block, *__, config=config: config(group, block),
                    )
                )
        if op == "grouped_mlp":
            stack.enter_context(mock.patch.object(configs, "tile_rows", lambda *_: 128))
        yield


def record(op: str, shape: str, chosen: dict[str, int]) -> list[Launch]:
    """What the op would launch at a shape, on tensors without a GPU."""
    major, minor = torch.cuda.get_device_capability()
    with with_candidates(op, chosen):
        if op == "grouped_mlp":
            return grouped_mlp_launches(10 * major + minor, GROUPED_SHAPES[shape])
        _, *heads = ATTENTION_SHAPES[shape]
        return sparse_attention_launches(
            10 * major + minor, *heads, SparseAttentionSpec(), extras=False, decoding=False
        )


def compile_candidate(op: str, shape: str, function: str | None, place: int) -> str | None:
    """Compile the kernels with tiles of `function` (None: those without), as they would be
    launched; the error or None.
    """
    chosen = dict.fromkeys(OPS[op][2], 0) | ({} if function is None else {function: place})
    try:
        for launch in record(op, shape, chosen):
            if KERNELS.get(launch.kernel.__name__.removesuffix("_kernel")) == function:
                launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    except Exception as error:  # a candidate that does not fit is a result
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None


def time_round(op: str, chosen: dict[str, int], case: Case) -> dict[str, float]:
    """Median milliseconds of each kernel, all its launches in one call of the op together."""
    backend = OPS[op][0]
    scratch = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    launch = backend.launch

    def timed(kernel: Any, *args: Any, **options: Any) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch(kernel, *args, **options)
        end.record()
        events.append((kernel.__name__.removesuffix("_kernel"), start, end))

    samples: dict[str, list[float]] = {}
    with with_candidates(op, chosen), mock.patch.object(backend, "launch", timed):
        case("triton")
        for _ in range(REPEATS):
            events.clear()
            scratch.zero_()
            # launches queue up behind it, so that none waits for the host
            torch.cuda._sleep(3_000_000)
            case("triton")
            torch.cuda.synchronize()
            sums: dict[str, float] = {}
            for name, start, end in events:
                sums[name] = sums.get(name, 0.0) + start.elapsed_time(end)
            for name, ms in sums.items():
                samples.setdefault(name, []).append(ms)
    return {name: statistics.median(times) for name, times in samples.items()}


def check(op: str, chosen: dict[str, int], case: Case, expected: tuple[torch.Tensor, ...]) -> None:
    """Say where a round's tiles give something else."""
    with with_candidates(op, chosen):
        for i, (ours, reference) in enumerate(zip(case("triton"), expected, strict=True)):
            try:
                assert_close(f"result {i}", ours, reference, torch.bfloat16)
            except AssertionError as error:
                print(f"WRONG with {chosen}: {error}", flush=True)


def describe(op: str, function: str, place: int) -> str:
    config = OPS[op][2][function][place]
    if op != "grouped_mlp":
        _, heads, kv_heads, _ = next(iter(ATTENTION_SHAPES.values()))
        config = config(heads // kv_heads, SparseAttentionSpec().block_size)
    return "/".join(str(x) for x in config)


KERNELS = {
    "up": "up_config",
    "down": "row_config",
    "row_grad": "row_config",
    "act_grad": "act_grad_config",
    "gate_up_grad": "expert_config",
    "down_grad": "expert_config",
    "combine": "combine_config",
    "attend": "attend_config",
    "query_grad": "query_grad_config",
    "entry_grad": "entry_grad_config",
    "key_grad": "key_grad_config",
    "rank": "rank_config",
}
"""Kernel -> the function of its tiles."""


def tune(op: str, shapes: list[str], workers: int) -> list[dict[str, Any]]:
    _, _, candidates, all_shapes, make_case = OPS[op]
    failed: dict[tuple[str, str | None, int], str] = {}
    jobs: list[tuple[str, str, str | None, int]] = [
        (op, shape, function, place)
        for shape in shapes
        for function, listed in candidates.items()
        for place in range(len(listed))
    ]
    jobs += [(op, shape, None, 0) for shape in shapes]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for job, error in zip(
            jobs, pool.map(compile_candidate, *zip(*jobs, strict=True)), strict=True
        ):
            if error is not None:
                failed[job[1:]] = error
                print(f"{job[1:]}: {error}", flush=True)
    rows = []
    for shape in shapes:
        case = make_case(shape)
        expected = case("grouped_mm" if op == "grouped_mlp" else "triton")
        times: dict[str, dict[int, float]] = {}
        for place in range(max(map(len, candidates.values()))):
            chosen = {
                f: place if place < len(listed) and (shape, f, place) not in failed else 0
                for f, listed in candidates.items()
            }
            check(op, chosen, case, expected)
            for kernel, ms in time_round(op, chosen, case).items():
                at = chosen.get(KERNELS.get(kernel, ""), 0)
                times.setdefault(kernel, {}).setdefault(at, ms)
        del case, expected
        torch.cuda.empty_cache()
        for kernel, by_place in times.items():
            for place, ms in by_place.items():
                tiles = describe(op, KERNELS[kernel], place) if kernel in KERNELS else ""
                rows.append(
                    {
                        "op": op,
                        "shape": shape,
                        "sizes": all_shapes[shape],
                        "kernel": kernel,
                        "tiles": tiles,
                        "ms": round(ms, 4),
                    }
                )
            best = sorted(by_place.items(), key=lambda item: item[1])
            print(
                f"{shape} {kernel}: "
                + "; ".join(
                    f"{describe(op, KERNELS[kernel], p) if kernel in KERNELS else ''} {ms:.3f}"
                    for p, ms in best
                ),
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = tune(arguments.op, arguments.shape or list(OPS[arguments.op][3]), arguments.workers)
    if arguments.json:
        arguments.json.write_text(
            dumps({"bench": "tune", "torch": torch.__version__, "rows": rows}) + "\n"
        )


if __name__ == "__main__":
    main()
