"""What op tests and benches share: tolerances by dtype, comparison by name, poisoned memory,
routings and shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error by the dtype computed in, over the largest value of the reference (bf16: 1.4e-2
seen on a CPU).
"""


def assert_close(
    name: str, ours: torch.Tensor | None, reference: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Compare by the largest error, so that one wrong row shows in any size; zeros must be met
    exactly.

    dtype: whose tolerance applies; None takes that of `ours`.
    """
    assert ours is not None, f"{name} is missing"
    assert ours.shape == reference.shape, (
        f"{name} has shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    )
    if ours.numel() == 0:
        return
    assert ours.isfinite().all(), (
        f"{name} has {int((~ours.isfinite()).sum())} values that are not finite"
    )
    tolerance = TOLERANCE[dtype or ours.dtype]
    ours, reference = ours.detach().double(), reference.detach().double()
    error, scale = float((ours - reference).abs().max()), float(reference.abs().max())
    assert error <= tolerance * scale, (
        f"{name} is off by {error:.3g}, largest value {scale:.3g}, {tolerance=}"
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN (floats) or the largest value (integers), so that reading
    unwritten memory shows.
    """
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # a property of the module, which has no type
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


@contextlib.contextmanager
def kept_for_backward(*owned: torch.Tensor) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd saves inside the block, those of `owned` left out."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def draw_expert_ids(
    num_tokens: int, num_experts: int, top_k: int, load: str, seed: int = 0
) -> torch.Tensor:
    """[T, K] int64 on the CPU, distinct within a token, -1 unused.

    load: "even", "skewed" (expert popularity falls as 1/rank), "one" (every token to the last
        expert only), "half" (odd experts only), "unused" (half of the slots empty), "none" (all
        slots empty).
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(num_tokens, num_experts, generator=generator)
    if load == "skewed":
        # weighted sampling without replacement (Efraimidis, Spirakis)
        keys = keys ** torch.arange(1, num_experts + 1)
    elif load == "half":
        keys[:, ::2] = -1.0
    expert_ids = keys.topk(top_k, dim=-1).indices
    if load == "one":
        expert_ids = torch.full_like(expert_ids, -1)
        expert_ids[:, 0] = num_experts - 1
    elif load in ("unused", "none"):
        dropped = torch.rand(num_tokens, top_k, generator=generator) < (
            0.5 if load == "unused" else 2.0
        )
        expert_ids = expert_ids.masked_fill(dropped, -1)
    return expert_ids


def count_rows(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E] int64: assignments per expert."""
    return torch.bincount(expert_ids[expert_ids >= 0], minlength=num_experts)


EDGE_CASES = {
    "no_tokens": (0, 4, 2, "even"),
    "one_token": (1, 4, 2, "even"),
    "one_expert": (7, 1, 1, "even"),
    "primes": (13, 5, 3, "even"),
    "all_to_one": (17, 4, 2, "one"),
    "idle_experts": (11, 8, 2, "half"),
    "unused_slots": (19, 6, 3, "unused"),
    "no_assignments": (5, 3, 2, "none"),
}
"""Arguments of draw_expert_ids that every op over experts must survive."""


@dataclass(frozen=True)
class MoEShape:
    num_tokens: int
    hidden_size: int
    expert_intermediate_size: int
    num_experts: int
    top_k: int


MODEL_SHAPES = {
    "olmoe-1b-7b": MoEShape(32768, 2048, 1024, 64, 8),
    "mixtral-8x7b": MoEShape(16384, 4096, 14336, 8, 2),
    "qwen3-30b-a3b": MoEShape(32768, 2048, 768, 128, 8),
}
CORRECTNESS_SHAPES = (
    (768, 256, 128, 8),
    (768, 512, 64, 4),
    (768, 1024, 32, 2),
    (1536, 256, 128, 8),
    (1536, 512, 64, 4),
    (1536, 1024, 32, 2),
    (4096, 256, 256, 16),
    (4096, 512, 128, 8),
    (4096, 1024, 64, 4),
    (4096, 512, 256, 16),
    (4096, 1024, 128, 8),
    (4096, 2048, 64, 4),
)
"""D, F, E, K of the correctness tests of arXiv 2512.14080 (SonicMoE)."""
SMALL_SHAPES = {
    "few-experts": MoEShape(512, 256, 256, 8, 2),
    "many-experts": MoEShape(512, 256, 64, 32, 4),
}
"""What a CPU can time in seconds."""
