"""Accumulate a step's gradient over equal micro-batches in bf16; compare it with an fp32 sum of
what autograd gives.

Each case of argv[1] (JSON list) prints one JSON line: the largest relative error of the gradients
of dense and of expert parameters, and of AdamW's first moment after the step; and which state an
engine with the other dtype of sums does not take over as it is. Counts of micro-batches are powers
of two, which scale a bf16 gradient without rounding, so that the sum over micro-batches is that of
one, to the digits of fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from common import batch, build, take, tiny_config

from model.config import BalanceConfig
from model.loss import training_loss
from model.parallel.family import is_expert_parameter
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from train.config.training import OptimConfig, TrainConfig
from train.engine.deepspeed import STATE_KEYS, Engine
from train.engine.library import import_deepspeed

ROWS = 2  # of a micro-batch, per rank


def start(case: dict, groups: ParallelGroups, grad_accum_dtype: str) -> Engine:
    settings = TrainConfig(
        num_steps=10,
        seq_len=16,
        micro_batch_size=ROWS,
        clip_grad_norm=0.0,
        precision="bf16",
        global_batch_size=ROWS * dist.get_world_size() * max(case["micro_batches"]),
        grad_accum_dtype=grad_accum_dtype,
    )
    return Engine(
        build(tiny_config(), BalanceConfig(), groups),
        groups,
        settings,
        OptimConfig(lr=1e-3, beta1=0.5),
        {
            "zero_optimization": {"stage": case["zero"], **case["zero_options"]},
            **case.get("deepspeed", {}),
        },
    )


def gather(engine: Engine) -> dict[str, torch.Tensor]:
    engine.prepare_gather()
    return {
        f"{name}/{key}": engine.gather_state(parameter, key).detach().clone()
        for name, parameter in engine.named_parameters()
        for key in STATE_KEYS
    }


def not_taken_over(engine: Engine, case: dict, groups: ParallelGroups) -> list[str]:
    """What a checkpoint holds of `engine` and an engine with the other dtype of sums does not hold
    after loading it.
    """
    state = gather(engine)
    other = start(case, groups, "fp32" if case["grad_accum_dtype"] == "bf16" else "bf16")
    other.prepare_scatter(len(case["micro_batches"]))
    for name, parameter in other.named_parameters():
        for key in STATE_KEYS:
            other.scatter_state(parameter, key, state[f"{name}/{key}"])
    other.finish_scatter()
    found = gather(other)
    other.close()
    return sorted(
        name for name in state.keys() | found.keys() if not torch.equal(state[name], found[name])
    )


def run_case(case: dict) -> dict[str, Any]:
    destroy_parallel()
    groups, balance = initialize_parallel(case["ep"]), BalanceConfig()
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = start(case, groups, case["grad_accum_dtype"])
    rows = take(batch(0, 0, ROWS * world), rank * ROWS, (rank + 1) * ROWS)
    count = ROWS * world * 16
    plain = build(tiny_config(), balance, groups).to(torch.bfloat16)
    training_loss(plain(rows), count, count, balance).backward()
    exact = {}
    for name, parameter in plain.named_parameters():
        exact[name] = parameter.grad.double()
        dist.all_reduce(
            exact[name],
            group=groups.expert_data if is_expert_parameter(parameter) else groups.stage,
        )
    for group in engine.param_groups:
        group["lr"] = group["weight_decay"] = 0.0  # all steps see the same weights

    def step(num_micro_batches: int) -> dict[str, torch.Tensor]:
        for i in range(num_micro_batches):
            output = engine.forward(rows)
            whole = count * num_micro_batches
            engine.backward(
                training_loss(output, whole, whole, balance), is_last=i == num_micro_batches - 1
            )
        found = {
            name: engine.full_gradient(p).double().clone() for name, p in engine.named_parameters()
        }
        engine.step()
        return found

    def error(found: torch.Tensor, exact: torch.Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    errors = {"dense": 0.0, "expert": 0.0, "moment": 0.0}
    for steps, num_micro_batches in enumerate(case["micro_batches"], 1):
        found = step(num_micro_batches)
        state = gather(engine)
        for name, parameter in engine.named_parameters():
            kind = "expert" if is_expert_parameter(parameter) else "dense"
            errors[kind] = max(errors[kind], error(found[name], exact[name]))
            moment = state[f"{name}/exp_avg"].double()
            errors["moment"] = max(errors["moment"], error(moment, exact[name] * (1 - 0.5**steps)))
    lost = not_taken_over(engine, case, groups)
    engine.close()
    everyone = [None] * world
    dist.all_gather_object(everyone, (errors, lost))
    return {
        "errors": {name: max(e[name] for e, _ in everyone) for name in errors},
        "lost": [name for _, names in everyone for name in names],
    }


def main() -> None:
    torch.set_num_threads(1)
    import_deepspeed()
    dist.init_process_group("gloo")
    for case in json.loads(sys.argv[1]):
        found = run_case(case)
        if dist.get_rank() == 0:
            print(json.dumps({"case": case, **found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
