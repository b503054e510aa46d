"""A step whose loss or gradient is not finite on one rank, on two expert-parallel ranks; print what
became of the rest.

Each case of argv[1] (JSON list) trains three steps, the second poisoned on rank 1, and the same
without the second step.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from common import batch, build, take, tiny_config

from model.config import BalanceConfig
from model.loss import training_loss
from model.parallel.family import is_expert_parameter
from model.parallel.groups import ParallelGroups, initialize_parallel
from train.config.training import OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.engine.library import import_deepspeed

ROWS = 4


@functools.cache
def groups_of_two() -> ParallelGroups:
    return initialize_parallel(2)


@functools.cache
def clean_state(zero: int, precision: str) -> dict[str, torch.Tensor]:
    """What becomes of a run that never takes the step which the cases poison, wherever they do."""
    return train({"zero": zero, "precision": precision}, [(0, False), (2, False)])[1]


def train(case: dict, steps: list[tuple[int, bool]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Steps are (number of the batch, poisoned); returns the norms and the full state of every
    parameter.
    """
    groups, balance = groups_of_two(), BalanceConfig(aux_loss_coeff=0.01)
    settings = TrainConfig(
        num_steps=10,
        seq_len=16,
        micro_batch_size=ROWS // 2,
        global_batch_size=ROWS,
        precision=case["precision"],
        clip_grad_norm=0.5,
    )
    engine = Engine(
        build(tiny_config(), balance, groups),
        groups,
        settings,
        OptimConfig(lr=0.01),
        {"zero_optimization": {"stage": case["zero"]}},
    )
    rank, norms = dist.get_rank(), []
    for number, poisoned in steps:
        poisoned = poisoned and rank == 1
        hook = None
        if poisoned and case["where"] != "loss":
            expert = case["where"] == "expert"
            parameter = next(
                p for p in engine.module.parameters() if is_expert_parameter(p) == expert
            )
            hook = parameter.register_hook(lambda gradient: gradient * math.nan)
        output = engine.forward(
            take(batch(number, 0, ROWS), rank * ROWS // 2, (rank + 1) * ROWS // 2)
        )
        loss = training_loss(output, ROWS * 16, ROWS * 16, balance)
        engine.backward(
            loss * math.inf if poisoned and case["where"] == "loss" else loss, is_last=True
        )
        norms.append(engine.step())
        if hook is not None:
            hook.remove()
    engine.prepare_gather()
    state = {
        f"{name}/{key}": engine.gather_state(p, key).detach().clone()
        for name, p in engine.named_parameters()
        for key in ("fp32", "exp_avg", "exp_avg_sq")
    }
    engine.close()
    return norms, state


def main() -> None:
    torch.set_num_threads(1)
    import_deepspeed()
    dist.init_process_group("gloo")
    for case in json.loads(sys.argv[1]):
        norms, poisoned = train(case, [(0, False), (1, True), (2, False)])
        clean = clean_state(case["zero"], case["precision"])
        facts = (
            [math.isfinite(n) for n in norms],
            [k for k in clean if not torch.equal(clean[k], poisoned[k])],
        )
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, facts)
        if dist.get_rank() == 0:
            print(
                json.dumps(
                    {"finite": [f for f, _ in everyone], "changed": [c for _, c in everyone]}
                ),
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
