"""The experts alone and with their permutations, forward and with backward, against other ways to write them.

Legend: T tokens, D hidden, F expert width, E experts, K top-k, R = T*K rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.common import Row, main, make_row, measure, roofline_ms
from ops.grouped_mlp import grouped_mlp, reference_grouped_mlp, select_backend
from ops.permute import group_by_expert, permute, unpermute
from ops.testing import MODEL_SHAPES, SMALL_SHAPES, MoEShape, assert_close, count_rows, draw_expert_ids


def padded_bmm(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Every expert padded to the busiest one, then two batched matrix products."""
    longest = int(counts.max())
    experts = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts, output_size=len(rows))
    starts = counts.cumsum(0) - counts
    places = experts * longest + torch.arange(len(rows), device=rows.device) - starts[experts]
    padded = rows.new_zeros((len(counts) * longest, rows.shape[1])).index_copy(0, places, rows)
    gate, up = torch.bmm(padded.view(len(counts), longest, -1), gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down.transpose(1, 2)).flatten(0, 1).index_select(0, places)


def eager_index_add(hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
                    expert_ids: torch.Tensor) -> torch.Tensor:
    """The loop of Hugging Face's eager MoE blocks: select an expert's tokens, compute, index_add back."""
    out = torch.zeros_like(hidden)
    for expert in range(len(gate_up)):
        tokens, slots = torch.where(expert_ids == expert)
        gate, up = F.linear(hidden[tokens], gate_up[expert]).chunk(2, dim=-1)
        x = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, tokens, x * weights[tokens, slots].to(x.dtype).unsqueeze(-1))
    return out


def permuted_mlp(hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
                 expert_ids: torch.Tensor) -> torch.Tensor:
    slots, counts = group_by_expert(expert_ids, len(gate_up))
    rows = permute(hidden, slots, expert_ids.shape[1])
    return unpermute(grouped_mlp(rows, gate_up, down, counts), slots, weights)


def compare(op: str, functions: dict[str, Callable[..., torch.Tensor]], inputs: tuple[torch.Tensor, ...],
            routing: torch.Tensor, shape: dict, flops: float, num_bytes: float, repeats: int) -> list[Row]:
    """Check that all functions(*inputs, routing) agree, then time them without and with backward of all inputs."""
    device, dtype = inputs[0].device, inputs[0].dtype
    grad = torch.randn_like(inputs[0])
    with torch.no_grad():
        outputs = {name: function(*inputs, routing) for name, function in functions.items()}
    for name, out in outputs.items():
        assert_close(name, out, outputs["ours"])
    del outputs
    backend = select_backend(device, dtype)

    def forward(function: Callable[..., torch.Tensor]) -> None:
        with torch.no_grad():
            function(*inputs, routing)

    def forward_backward(function: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(function(*inputs, routing), inputs, grad)

    rows = []
    # Backward reads weights and rows again and writes both gradients: three times the traffic and the FLOPs.
    for name, call, factor in (("forward", forward, 1), ("forward_backward", forward_backward, 3)):
        times = measure({n: lambda f=f, call=call: call(f) for n, f in functions.items()}, device, repeats)
        tflops = factor * flops / times["ours"] / 1e9
        rows.append(make_row(f"{op}.{name}", shape, dtype, device, times,
                             roofline_ms(device, factor * flops, factor * num_bytes), backend=backend,
                             tflops=round(tflops, 3)))
    return rows


def bench_shape(name: str, shape: MoEShape, load: str, device: torch.device, dtype: torch.dtype,
                repeats: int) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(scale).requires_grad_()

    width, hidden_size, num_experts = shape.expert_intermediate_size, shape.hidden_size, shape.num_experts
    expert_ids = draw_expert_ids(shape.num_tokens, num_experts, shape.top_k, load).to(device)
    counts = count_rows(expert_ids, num_experts)
    num_rows = shape.num_tokens * shape.top_k
    gate_up = normal(num_experts, 2 * width, hidden_size, scale=hidden_size**-0.5)
    down = normal(num_experts, hidden_size, width, scale=width**-0.5)
    label = {"model": name, "load": load, "T": shape.num_tokens, "D": hidden_size, "F": width, "E": num_experts,
             "K": shape.top_k}
    flops = 6.0 * num_rows * hidden_size * width  # this and the bytes: ops/grouped_mlp/README.md
    num_values = 3 * num_experts * hidden_size * width + 2 * num_rows * hidden_size + 3 * num_rows * width

    functions: dict[str, Callable[..., torch.Tensor]] = {"ours": grouped_mlp}
    backend = select_backend(device, dtype)
    if backend != "reference":  # ours against itself would say nothing
        functions["loop"] = reference_grouped_mlp
    if backend != "grouped_mm" and hasattr(F, "grouped_mm"):
        functions["grouped_mm"] = lambda *a: grouped_mlp(*a, backend="grouped_mm")
    if num_experts * int(counts.max()) <= 4 * num_rows:  # padding to a very busy expert would fill the memory
        functions["padded_bmm"] = padded_bmm
    inputs = normal(num_rows, hidden_size), gate_up, down
    found = compare("grouped_mlp", functions, inputs, counts, label, flops, num_values * dtype.itemsize, repeats)
    weights = torch.rand(expert_ids.shape, device=device).requires_grad_()
    # A fused kernel would gather and scatter inside the GEMMs, so the permutations add nothing to the bound.
    return found + compare("permuted_mlp", {"ours": permuted_mlp, "eager_index_add": eager_index_add},
                           (normal(shape.num_tokens, hidden_size), weights, gate_up, down), expert_ids, label, flops,
                           num_values * dtype.itemsize, repeats)


def run(device: torch.device) -> list[Row]:
    cuda = device.type == "cuda"
    shapes, dtype, repeats = (MODEL_SHAPES, torch.bfloat16, 15) if cuda else (SMALL_SHAPES, torch.float32, 11)
    found = []
    for i, (name, shape) in enumerate(shapes.items()):
        for load in ("even", "skewed") if i == 0 else ("even",):
            found += bench_shape(name, shape, load, device, dtype, repeats)
    return found


if __name__ == "__main__":
    main("grouped_mlp", run)
