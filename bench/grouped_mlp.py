"""The experts, from token order to token order, against other ways to write them: forward, and
forward with backward.

On CUDA the shapes, inputs and FLOPs of SonicMoE's own bench (arXiv 2512.14080, figure 14): 6 T K D
F forward and 12 backward; what sorts, gathers and sums is timed and not counted.

Legend: T tokens, D hidden, F expert width, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.common import Row, main, make_row, measure, profile, roofline_ms
from ops.grouped_mlp import grouped_mlp, select_backend
from ops.permute import group_by_expert
from ops.testing import SMALL_SHAPES, MoEShape, assert_close, draw_expert_ids

SWEEP = {
    "1.4b": [(40960, 768, 256, 128, 8), (40960, 768, 512, 64, 4), (40960, 768, 1024, 32, 2)],
    "7b": [(24576, 1536, 256, 128, 8), (24576, 1536, 512, 64, 4), (24576, 1536, 1024, 32, 2)],
    "30b": [(32768, 4096, 256, 256, 16), (32768, 4096, 512, 128, 8), (32768, 4096, 1024, 64, 4)],
    "120b": [(32768, 4096, 512, 256, 16), (32768, 4096, 1024, 128, 8), (32768, 4096, 2048, 64, 4)],
    "qwen3-30b rank": [(8192, 2048, 768, 128, 8)],
    "deepseek-v3": [(4096, 7168, 2048, 256, 8)],
}
SKEWED = (("30b", 2), ("1.4b", 0))
"""Rows of the sweep also run with experts of popularity 1 / rank, and with a quarter of the tokens
to one expert.
"""

Inputs = tuple[torch.Tensor, ...]


def padded_bmm(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """Every expert padded to the busiest one, then two batched matrix products."""
    counts = offsets.diff()
    longest, used = int(counts.max()), int(offsets[-1])
    experts = torch.repeat_interleave(
        torch.arange(len(counts), device=hidden.device), counts, output_size=used
    )
    places = experts * longest + torch.arange(used, device=hidden.device) - offsets[experts]
    rows = hidden[slots[:used].long() // weights.shape[1]]
    padded = rows.new_zeros((len(counts) * longest, rows.shape[1])).index_copy(0, places, rows)
    gate, up = torch.bmm(padded.view(len(counts), longest, -1), gate_up.transpose(1, 2)).chunk(
        2, dim=-1
    )
    out = torch.bmm(F.silu(gate) * up, down.transpose(1, 2)).flatten(0, 1)[places]
    flat = weights.reshape(-1)[slots[:used].long()].unsqueeze(-1).to(out.dtype)
    return torch.zeros_like(hidden).index_add(
        0, slots[:used].long() // weights.shape[1], out * flat
    )


def eager_index_add(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """The loop of Hugging Face's eager MoE blocks: an expert's tokens, its weights by index,
    index_add back.
    """
    out, ends, top_k = torch.zeros_like(hidden), offsets.tolist(), weights.shape[1]
    for expert in range(len(gate_up)):
        assigned = slots[ends[expert] : ends[expert + 1]].long()
        gate, up = F.linear(hidden[assigned // top_k], gate_up[expert]).chunk(2, dim=-1)
        x = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(
            0, assigned // top_k, x * weights.reshape(-1)[assigned].to(x.dtype).unsqueeze(-1)
        )
    return out


def bench_shape(
    name: str, shape: MoEShape, load: str, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Row]:
    """Check that all ways agree, then time them without and with backward of all inputs."""
    generator = torch.Generator(device).manual_seed(1111)

    def normal(*size: int, scale: float) -> torch.Tensor:
        return (
            torch.randn(size, generator=generator, device=device, dtype=dtype)
            .mul_(scale)
            .requires_grad_()
        )

    width, hidden_size, num_experts = (
        shape.expert_intermediate_size,
        shape.hidden_size,
        shape.num_experts,
    )
    num_rows = shape.num_tokens * shape.top_k
    ids = draw_expert_ids(
        shape.num_tokens, num_experts, shape.top_k, "even" if load == "hot" else load
    )
    if load == "hot":
        # experts stay distinct within a token
        ids[::4, 0] = torch.where((ids[::4] == 0).any(1), ids[::4, 0], 0)
    places = group_by_expert(ids.to(device), num_experts)
    gates = torch.rand(ids.shape, generator=generator, device=device).requires_grad_()
    inputs = (
        normal(shape.num_tokens, hidden_size, scale=0.2),
        gates,
        normal(num_experts, 2 * width, hidden_size, scale=0.02),
        normal(num_experts, hidden_size, width, scale=0.02),
    )
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "ours": grouped_mlp,
        "eager_index_add": eager_index_add,
    }
    backend = select_backend("auto", device, dtype, hidden_size, width)
    if backend != "grouped_mm":
        functions["grouped_mm"] = lambda *a: grouped_mlp(*a, backend="grouped_mm")
    # padding to a very busy expert would fill the memory
    if num_experts * int(places[2].diff().max()) <= 2 * num_rows:
        functions["padded_bmm"] = padded_bmm
    with torch.no_grad():
        expected = (
            functions["grouped_mm"](*inputs, *places)
            if "grouped_mm" in functions
            else grouped_mlp(*inputs, *places)
        )
        for rival, function in functions.items():
            assert_close(rival, function(*inputs, *places), expected)
    grad = torch.randn(inputs[0].shape, generator=generator, device=device, dtype=dtype).mul_(0.2)

    def forward(function: Callable[..., torch.Tensor]) -> None:
        with torch.no_grad():
            function(*inputs, *places)

    def forward_backward(function: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(function(*inputs, *places), inputs, grad)

    label = {
        "model": name,
        "load": load,
        "T": shape.num_tokens,
        "D": hidden_size,
        "F": width,
        "E": num_experts,
        "K": shape.top_k,
    }
    # this and the bytes: ops/grouped_mlp/README.md
    flops = 6.0 * num_rows * hidden_size * width
    values = (
        3 * num_experts * hidden_size * width
        + 2 * shape.num_tokens * hidden_size
        + 3 * num_rows * width
    )
    rows = []
    # Backward reads weights and rows again and writes both gradients: three times the traffic and
    # the FLOPs.
    for op, call, factor in (("forward", forward, 1), ("forward_backward", forward_backward, 3)):
        times = measure(
            {n: lambda f=f, call=call: call(f) for n, f in functions.items()}, device, repeats
        )
        tflops = factor * flops / times["ours"] / 1e9
        waits = profile(lambda call=call: call(grouped_mlp))[0] if device.type == "cuda" else None
        rows.append(
            make_row(
                f"grouped_mlp.{op}",
                label,
                dtype,
                device,
                times,
                roofline_ms(device, factor * flops, factor * values * dtype.itemsize),
                backend=backend,
                tflops=round(tflops, 3),
                host_waits=waits,
                peak_gib=peak_memory(lambda call=call: call(grouped_mlp), device),
            )
        )
    return rows


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """GiB beyond what is allocated now; None on CPU (bench/moe_layer.py measures processes)."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 3)


def run(device: torch.device) -> list[Row]:
    found = []
    if device.type != "cuda":
        for i, (name, shape) in enumerate(SMALL_SHAPES.items()):
            for load in ("even", "skewed") if i == 0 else ("even",):
                found += bench_shape(name, shape, load, device, torch.float32, 11)
        return found
    for name, sizes in SWEEP.items():
        for i, size in enumerate(sizes):
            for load in ("even", "skewed", "hot") if (name, i) in SKEWED else ("even",):
                found += bench_shape(name, MoEShape(*size), load, device, torch.bfloat16, 15)
    shape = MoEShape(*SWEEP["qwen3-30b rank"][0])
    for num_tokens in (512, 4096):  # latency
        found += bench_shape(
            "qwen3-30b rank",
            dataclasses.replace(shape, num_tokens=num_tokens),
            "even",
            device,
            torch.bfloat16,
            15,
        )
    return found


if __name__ == "__main__":
    main("grouped_mlp", run)
