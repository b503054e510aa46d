"""Experts of stored 8-bit weights, int8 and e4m3, beside the same ones unquantised: the bytes of
their stacks, what rounding does to the output, and the time of a forward pass by number of tokens.

Ours is fp8; the rivals are int8 and the weights as they were. On a CPU the milliseconds are
processor time, since the machine may be shared.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from bench.common import Row, main, make_row, measure
from ops.grouped_mlp import grouped_mlp, grouped_mlp_eight_bit, quantize_rows
from ops.grouped_mlp.spec import Stored
from ops.permute import group_by_expert
from ops.testing import draw_expert_ids

SHAPES = {"cpu": (1024, 512, 32, 4), "cuda": (2048, 768, 128, 8)}
"""Hidden size, expert width, experts, experts of a token."""
TOKENS = {"cpu": (1, 16, 256), "cuda": (1, 16, 256, 4096)}
REPEATS = {"cpu": 7, "cuda": 100}


def processor_ms(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of the processor, in rotating order."""
    for function in functions.values():
        function()
    names, samples = list(functions), {name: list[float]() for name in functions}
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin = time.process_time()
            functions[name]()
            samples[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(times) for name, times in samples.items()}


def bench_tokens(
    num_tokens: int, weights: tuple[torch.Tensor, torch.Tensor], top_k: int, dtype: torch.dtype
) -> Row:
    """One forward pass of so many tokens."""
    gate_up, down = (w.to(dtype) for w in weights)
    device, num_experts = gate_up.device, len(gate_up)
    generator = torch.Generator(device).manual_seed(num_tokens)
    shape = (num_tokens, down.shape[1])
    hidden = torch.randn(shape, generator=generator, device=device).to(dtype)
    gates = torch.rand((num_tokens, top_k), generator=generator, device=device)
    ids = draw_expert_ids(num_tokens, num_experts, top_k, "even")
    places = group_by_expert(ids.to(device), num_experts)

    plain = partial(grouped_mlp, hidden, gates, gate_up, down, *places)
    functions: dict[str, Callable[[], torch.Tensor]] = {"native": plain}
    sizes = {"native": gate_up.nbytes + down.nbytes}
    errors: dict[str, float] = {}
    kinds: tuple[Stored, ...] = ("int8", "fp8")
    expected = plain().float()
    for kind in kinds:
        stacks = (*quantize_rows(gate_up, kind), *quantize_rows(down, kind))
        functions[kind] = partial(grouped_mlp_eight_bit, hidden, gates, *stacks, *places)
        sizes[kind] = sum(stack.nbytes for stack in stacks)
        errors[kind] = float((functions[kind]().float() - expected).norm() / expected.norm())

    with torch.no_grad():
        if device.type == "cpu":
            times = processor_ms(functions, REPEATS["cpu"])
        else:
            times = measure(functions, device, REPEATS["cuda"])
    return make_row(
        "experts stored in 8 bits",
        {"T": num_tokens, "D": down.shape[1], "F": down.shape[2], "E": num_experts, "K": top_k},
        dtype,
        device,
        {"ours": times.pop("fp8"), **times},
        None,
        **{f"{name} MB": round(size / 1e6, 2) for name, size in sizes.items()},
        **{f"{name} error": round(error, 5) for name, error in errors.items()},
        load_average=round(os.getloadavg()[0], 2),
    )


def run(device: torch.device) -> list[Row]:
    hidden_size, width, num_experts, top_k = SHAPES[device.type]
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device) * size[-1] ** -0.5

    weights = normal(num_experts, 2 * width, hidden_size), normal(num_experts, hidden_size, width)
    return [
        bench_tokens(num_tokens, weights, top_k, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for num_tokens in TOKENS[device.type]
    ]


if __name__ == "__main__":
    main("stored_experts", run)
