"""Run our MoE layer and those of other libraries on the same weights and tokens, and print the
largest errors.

Every oracle, case and expert parallel size prints one JSON line {"oracle", "case", "ep", "errors",
"idle"}: the errors of the output and every gradient over the oracle's largest value, and how many
experts of the ranks got no token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bench.peers.megatron_on_cpu

import torch
import torch.distributed as dist
from torch import Tensor

from bench.peers import MoE, Weights, deepspeed, hugging_face, megatron, ours
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel

# E, K, D, F, skew of bench.peers.Weights.draw.
CASES = {
    "few": (8, 2, 32, 24, 0.0),
    "many": (16, 4, 24, 12, 0.0),
    "idle": (8, 2, 32, 24, 6.0),
    "all": (4, 4, 16, 8, 0.0),
}
LENGTHS = (13, 9)
"""Tokens of a sequence by rank; every rank has two."""
# Our router's settings, and the layer of (weights, top_k, groups).
ORACLES: dict[str, tuple[dict, Callable[[Weights, int, ParallelGroups], MoE]]] = {
    "mixtral": ({}, lambda w, k, _: hugging_face(w, k, "mixtral")),
    "qwen3_moe": ({}, lambda w, k, _: hugging_face(w, k, "qwen3_moe")),
    "olmoe": (
        {"normalize_weights": False},
        lambda w, k, _: hugging_face(w, k, "olmoe", normalize_weights=False),
    ),
    "megatron": ({}, megatron),
    "megatron_raw": (
        {"normalize_weights": False},
        lambda w, k, g: megatron(w, k, g, normalize_weights=False),
    ),
    "megatron_sigmoid": (
        {"score_function": "sigmoid", "scaling_factor": 2.5},
        lambda w, k, g: megatron(w, k, g, "sigmoid", scaling_factor=2.5),
    ),
    "deepspeed": ({}, lambda w, k, g: deepspeed(w, k, g.expert_size)),
    "deepspeed_capacity": ({}, lambda w, k, g: deepspeed(w, k, g.expert_size, 2 * max(LENGTHS))),
}


def draw_tokens(rank: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Hidden [2, S, D] of a rank, and the gradient of its output."""
    generator = torch.Generator().manual_seed(1 + rank)
    hidden, grad = torch.randn(2, 2, LENGTHS[rank], hidden_size, generator=generator)
    hidden[..., 0] = 1.0
    return hidden, grad


def whole_group(oracle: MoE, groups: ParallelGroups, num_experts: int) -> dict[str, Tensor]:
    """A layer that holds all experts, on the tokens of the whole expert group; the part of this
    rank. The router's gradient stays a sum over the ranks.
    """
    ranks = dist.get_process_group_ranks(groups.expert)
    parts = [draw_tokens(rank, oracle.router.shape[1]) for rank in ranks]
    hidden, grad = (
        torch.cat([part[i].flatten(0, 1) for part in parts]).unsqueeze(0) for i in range(2)
    )
    found = oracle.named(oracle.forward_backward(hidden, grad))
    mine = slice(
        start := sum(part[0][..., 0].numel() for part in parts[: groups.expert_rank]),
        start + parts[groups.expert_rank][0][..., 0].numel(),
    )
    local = groups.local_experts(num_experts)
    held = slice(local.start, local.stop)
    return {
        "out": found["out"][0, mine],
        "hidden": found["hidden"][0, mine],
        "router": found["router"],
        "gate_up": found["gate_up"][held],
        "down": found["down"][held],
    }


def compare(oracle: str, case: str, groups: ParallelGroups) -> tuple[dict[str, float], int]:
    """Errors, and how many experts of the ranks got no token."""
    num_experts, top_k, hidden_size, width, skew = CASES[case]
    weights = Weights.draw(num_experts, hidden_size, width, skew=skew)
    settings, build = ORACLES[oracle]
    hidden, grad = draw_tokens(dist.get_rank(), hidden_size)
    layer = ours(weights, top_k, groups, **settings)
    found = layer.named(layer.forward_backward(hidden, grad))
    peer = build(weights, top_k, groups)
    if len(peer.down) == 1 and len(peer.down[0]) == num_experts:
        expected = whole_group(peer, groups, num_experts)
        dist.all_reduce(found["router"], group=groups.expert)
    else:
        expected = peer.named(peer.forward_backward(hidden, grad))
    errors = {}
    for name, theirs in expected.items():
        # Over the largest value of all ranks: one without work has only zeros.
        worst = torch.stack(
            ((found[name].reshape(theirs.shape) - theirs).abs().max(), theirs.abs().max())
        )
        dist.all_reduce(worst.nan_to_num_(torch.inf), op=dist.ReduceOp.MAX)
        errors[name] = float(worst[0] / worst[1])
    idle = (found["down"].flatten(1).abs().amax(1) == 0).sum()
    dist.all_reduce(idle)
    return errors, int(idle)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for expert_parallel_size in (1, 2):
        groups = initialize_parallel(expert_parallel_size)
        for oracle in ORACLES:
            for case in CASES:
                errors, idle = compare(oracle, case, groups)
                if dist.get_rank() == 0:
                    print(
                        json.dumps(
                            {
                                "oracle": oracle,
                                "case": case,
                                "ep": expert_parallel_size,
                                "errors": errors,
                                "idle": idle,
                            }
                        ),
                        flush=True,
                    )
        destroy_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
