"""Masters of bf16 under a ZeRO stage: where their elements lie, how they learn, how they go on.

Each case of argv[1] (JSON list) prints one JSON line: the parameters whose masters, filled by the
numbers of their elements in the whole, do not come back in that order; the losses of a few steps,
and of fp32 masters; whether an engine that takes over the state after half of them ends with the
same bits; the bytes of an element of masters and moments.
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
from model.moe.experts import expert_ids_of
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from train.config.training import OptimConfig, TrainConfig
from train.engine.deepspeed import STATE_KEYS, Engine
from train.engine.library import import_deepspeed
from train.engine.rounding import RoundedAdamW

ROWS, STEPS, SEED = 2, 8, 3


def start(case: dict, groups: ParallelGroups, master_dtype: str) -> Engine:
    settings = TrainConfig(
        num_steps=STEPS,
        seq_len=16,
        micro_batch_size=ROWS,
        precision="bf16",
        global_batch_size=ROWS * dist.get_world_size(),
        master_dtype=master_dtype,
    )
    return Engine(
        build(tiny_config(), BalanceConfig(), groups),
        groups,
        settings,
        OptimConfig(lr=3e-3, weight_decay=0.1),
        {"zero_optimization": {"stage": case["zero"]}},
        seed=SEED,
    )


def learn(engine: Engine, steps: int) -> list[float]:
    """Steps on one batch; the losses of all ranks together."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = take(batch(0, 0, ROWS * world), rank * ROWS, (rank + 1) * ROWS)
    count = ROWS * world * 16
    losses = []
    for _ in range(steps):
        loss = training_loss(engine.forward(rows), count, count, BalanceConfig())
        engine.backward(loss, is_last=True)
        engine.step()
        whole = loss.detach().double()
        dist.all_reduce(whole)
        losses.append(float(whole))
    return losses


def gather(engine: Engine) -> dict[str, torch.Tensor]:
    engine.prepare_gather()
    return {
        f"{name}/{key}": engine.gather_state(parameter, key).detach().clone()
        for name, parameter in engine.named_parameters()
        for key in STATE_KEYS
    }


def out_of_order(engine: Engine) -> list[str]:
    """Parameters whose elements are not where the optimizer is told that they are. bf16 holds
    numbers below 256 exactly, so a number is asked for in base 256.
    """
    optimizer = engine.deepspeed.optimizer.optimizer
    assert isinstance(optimizer, RoundedAdamW)
    experts, wrong = expert_ids_of(engine.module), set()
    for power in range(3):
        for master, stretches in optimizer.stretches.items():
            for one in stretches:
                numbers = one.elements(0, one.size) // 256**power % 256
                master.data[one.offset : one.offset + one.size] = numbers.to(torch.bfloat16)
        for name, parameter in engine.named_parameters():
            shape = engine.parameter_shape(parameter)
            ids = torch.tensor(experts.get(name, (0,)))
            size = shape.numel() // len(ids)
            expected = (ids[:, None] * size + torch.arange(size)).view(shape)
            found = engine.gather_state(parameter, "fp32")
            if not torch.equal(found.float(), (expected // 256**power % 256).float()):
                wrong.add(name)
    return sorted(wrong)


def run_case(case: dict) -> dict[str, Any]:
    destroy_parallel()
    groups = initialize_parallel(case["ep"])
    exact = start(case, groups, "fp32")
    exact_losses = learn(exact, STEPS)
    exact.close()

    engine = start(case, groups, "bf16")
    losses = learn(engine, STEPS // 2)
    state = gather(engine)
    losses += learn(engine, STEPS // 2)
    after = gather(engine)
    optimizer = engine.deepspeed.optimizer.optimizer
    master = next(iter(optimizer.stretches))
    widths = [master.element_size(), optimizer.state[master]["exp_avg"].element_size()]

    other = start(case, groups, "bf16")
    other.prepare_scatter(STEPS // 2)
    for name, parameter in other.named_parameters():
        for key in STATE_KEYS:
            other.scatter_state(parameter, key, state[f"{name}/{key}"])
    other.finish_scatter()
    again = learn(other, STEPS // 2)
    found = gather(other)
    lost = sorted(name for name in after if not torch.equal(after[name], found[name]))
    wrong = out_of_order(other)
    other.close()
    engine.close()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (wrong, lost))
    return {
        "out_of_order": [name for names, _ in everyone for name in names],
        "not_taken_over": [name for _, names in everyone for name in names],
        "losses": losses,
        "again": again,
        "exact_losses": exact_losses,
        "bytes": widths,
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
