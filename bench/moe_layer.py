"""The whole MoE layer on a CPU (router, dispatch, experts, combine), forward and with every
gradient, against the layers of Hugging Face, DeepSpeed and Megatron-core with the same weights and
tokens: time, and peak memory in processes of their own.

Legend: T tokens, D hidden, F expert width, E experts, K top-k. DeepSpeed pads every expert to the
busiest one (nothing is dropped); Megatron-core runs SequentialMLP behind its alltoall dispatcher,
alone in its group. Hugging Face's batched_mm is left out: it gathers the weights for every
assignment, 48 GiB at the shape of Qwen3-MoE here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench.common import ROOT, Row, main, make_row, measure
from bench.peers import MoE, Weights, deepspeed, hugging_face, megatron, ours
from model.config import ExpertsConfig
from model.parallel.groups import initialize_parallel
from ops.testing import MoEShape, assert_close

BF16_ERROR = 0.15
"""Largest relative error (norms) in bf16: libraries that round the logits to bf16 choose other
experts for some tokens.
"""


@dataclass(frozen=True)
class Case:
    """model: whose block of Hugging Face; skew: of bench.peers.Weights.draw."""

    model: str
    shape: MoEShape
    load: str = "even"
    skew: float = 0.0


FINE = MoEShape(
    num_tokens=4096, hidden_size=512, expert_intermediate_size=256, num_experts=64, top_k=8
)
COARSE = MoEShape(
    num_tokens=4096, hidden_size=512, expert_intermediate_size=1024, num_experts=8, top_k=2
)
CASES = (Case("qwen3_moe", FINE), Case("qwen3_moe", FINE, "skewed", 1.5), Case("mixtral", COARSE))

LAYERS: dict[str, Callable[[Weights, Case], MoE]] = {
    "ours": lambda weights, case: ours(weights, case.shape.top_k),
    "hf_eager": lambda weights, case: hugging_face(weights, case.shape.top_k, case.model, "eager"),
    "hf_grouped_mm": lambda weights, case: hugging_face(
        weights, case.shape.top_k, case.model, "grouped_mm"
    ),
    "deepspeed": lambda weights, case: deepspeed(weights, case.shape.top_k),
    "megatron": lambda weights, case: megatron(weights, case.shape.top_k, initialize_parallel()),
    "ours_recompute": lambda weights, case: ours(
        weights, case.shape.top_k, experts=ExpertsConfig(recompute=True)
    ),
}


def build(name: str, case: Case, dtype: torch.dtype) -> MoE:
    if name == "megatron":
        from megatron.core import parallel_state

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.destroy_model_parallel()
    shape = case.shape
    return LAYERS[name](
        Weights.draw(
            shape.num_experts,
            shape.hidden_size,
            shape.expert_intermediate_size,
            dtype=dtype,
            skew=case.skew,
        ),
        case,
    )


def draw_tokens(shape: MoEShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden [1, T, D] and the gradient of its output."""
    generator = torch.Generator().manual_seed(1)
    hidden, grad = torch.randn(2, 1, shape.num_tokens, shape.hidden_size, generator=generator).to(
        dtype
    )
    hidden[..., 0] = 1.0
    return hidden, grad


def read_status(field: str) -> float:
    """MiB of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def print_peak(name: str, case: Case, dtype: torch.dtype) -> None:
    """MiB that one forward and backward adds at its peak to weights and tokens."""
    torch.set_num_threads(2)
    moe = build(name, case, dtype)
    hidden, grad = draw_tokens(case.shape, dtype)
    # loads and compiles: oneDNN keeps 200 MiB of bf16 kernels for the sizes it met
    moe.forward_backward(hidden, grad)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    moe.forward_backward(hidden, grad)
    print(f"PEAK {read_status('VmHWM') - before:.1f}", flush=True)


def peak_mib(name: str, case: Case, dtype: torch.dtype) -> float:
    """print_peak in a fresh process, whose freed blocks go back to the system."""
    code = (
        "import torch; from bench.moe_layer import CASES, print_peak; "
        f"print_peak({name!r}, CASES[{CASES.index(case)}], {dtype})"
    )
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"{code} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split("PEAK ")[1].split()[0])


def check(
    name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    for part, value in expected.items():
        if dtype == torch.float32:
            assert_close(f"{name}: {part}", found[part], value)
        else:
            error = float((found[part].float() - value.float()).norm() / value.float().norm())
            assert error < BF16_ERROR, f"{name}: {part} is off by {error:.3g}"


def products(case: Case, dtype: torch.dtype, counts: torch.Tensor) -> Callable[[], None]:
    """The matrix products of forward and backward alone, on rows and weights that are there
    already.
    """
    width, hidden_size = case.shape.expert_intermediate_size, case.shape.hidden_size
    weights = Weights.draw(case.shape.num_experts, hidden_size, width, dtype=dtype)
    rows, act, pre = (
        torch.randn(int(counts.max()), n).to(dtype) for n in (hidden_size, width, 2 * width)
    )

    def call() -> None:
        for expert, count in enumerate(counts.tolist()):
            gate_up, down = weights.gate_up[expert], weights.down[expert]
            rows[:count] @ gate_up.t(), act[:count] @ down.t()  # forward
            (
                rows[:count] @ down,
                pre[:count] @ gate_up,
                rows[:count].t() @ act[:count],
                pre[:count].t() @ rows[:count],
            )

    return call


def bench_case(case: Case, dtype: torch.dtype, device: torch.device, repeats: int) -> list[Row]:
    shape = case.shape
    layers = {name: build(name, case, dtype) for name in LAYERS}
    hidden, grad = draw_tokens(shape, dtype)
    expected = layers["ours"].named(layers["ours"].forward_backward(hidden, grad))
    for name, moe in layers.items():
        check(name, moe.named(moe.forward_backward(hidden, grad)), expected, dtype)
    logits = hidden[0].float() @ layers["ours"].router.detach().float().T
    counts = logits.topk(shape.top_k).indices.flatten().bincount(minlength=shape.num_experts)
    label = {
        "model": case.model,
        "load": case.load,
        "T": shape.num_tokens,
        "D": shape.hidden_size,
        "F": shape.expert_intermediate_size,
        "E": shape.num_experts,
        "K": shape.top_k,
    }
    flops = (
        6.0 * shape.num_tokens * shape.top_k * shape.hidden_size * shape.expert_intermediate_size
    )
    rows = []
    for op, factor in (("forward", 1), ("forward_backward", 3)):
        calls = {
            name: (lambda moe=moe: moe.forward(hidden))
            if op == "forward"
            else (lambda moe=moe: moe.forward_backward(hidden, grad))
            for name, moe in layers.items()
        }
        if op == "forward":
            del calls["ours_recompute"]  # nothing to recompute
        else:
            calls["products"] = products(case, dtype, counts)
        times = measure(calls, device, repeats)
        extra: dict[str, float | str | None] = {
            "busiest": round(float(counts.max() / counts.float().mean()), 2),
            "gflops": round(factor * flops / times["ours"] / 1e6, 1),
        }
        if op == "forward_backward":
            extra["recompute_ms"] = round(times.pop("ours_recompute"), 1)  # no rival
            # nobody can be faster without a faster product
            extra["products_ms"] = round(times.pop("products"), 1)
            extra |= {f"peak_mib.{name}": peak_mib(name, case, dtype) for name in LAYERS}
        rows.append(make_row(f"moe_layer.{op}", label, dtype, device, times, None, **extra))
    return rows


def run(device: torch.device) -> list[Row]:
    if device.type != "cpu":
        raise SystemExit(
            "bench.moe_layer is for the CPU: Megatron-core stands on stand-ins for CUDA here; use "
            "--device cpu"
        )
    torch.set_num_threads(2)
    return [
        row
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16)
        for row in bench_case(case, dtype, device, 5)
    ]


if __name__ == "__main__":
    main("moe_layer", run)
