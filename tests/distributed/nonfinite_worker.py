"""A step whose loss or gradient is not finite on one rank, on two expert-parallel ranks or in two
stages of a pipeline; print what became of the rest.

Each case of argv[1] (JSON list) trains three steps, the second poisoned on one rank, and the same
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
from model.loss import ModelOutput, training_loss
from model.parallel.family import is_expert_parameter
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from model.request import TokenBatch
from train.config.training import OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.engine.library import import_deepspeed
from train.pipeline.flow import Pipeline
from train.pipeline.schedule import Pass

ROWS = 4


@functools.cache
def groups_of_two(stages: int) -> ParallelGroups:
    destroy_parallel()
    return initialize_parallel(2 // stages, pipeline_parallel_size=stages)


@functools.cache
def clean_state(zero: int, precision: str, stages: int, virtual: int) -> dict[str, torch.Tensor]:
    """What becomes of a run that never takes the step which the cases poison, wherever they do."""
    case = {"zero": zero, "precision": precision, "stages": stages, "virtual": virtual}
    return train(case, [(0, False), (2, False)])[1]


class Passes:
    """Of one micro-batch."""

    def __init__(self, engine: Engine, rows: TokenBatch, balance: BalanceConfig, factor: float):
        self.engine, self.rows, self.balance, self.factor = engine, rows, balance, factor
        self.outputs: dict[int, ModelOutput] = {}

    def forward(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor | None:
        self.outputs[one.lap] = self.engine.forward(self.rows, hidden=hidden, lap=one.lap)
        return self.outputs[one.lap].handed_on

    def backward(self, one: Pass, carried: torch.Tensor | None, is_last: bool) -> None:
        loss = training_loss(self.outputs.pop(one.lap), ROWS * 16, ROWS * 16, self.balance)
        # The first that comes back: what is not finite has all the way to go.
        if one.lap == len(self.engine.module.laps) - 1:
            loss = loss * self.factor
        self.engine.backward(loss, is_last, carried)


def runs_of(case: dict, groups: ParallelGroups) -> tuple[range, ...]:
    """The layers of this rank."""
    if case.get("virtual", 1) == 1:
        return ((range(1), range(1, 3))[groups.pipeline_rank],)
    return ((range(1), range(2, 3)), (range(1, 2), range(3, 4)))[groups.pipeline_rank]


def train(case: dict, steps: list[tuple[int, bool]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Steps are (number of the batch, poisoned); returns the norms and the full state of every
    parameter.
    """
    stages = case.get("stages", 1)
    groups, balance = groups_of_two(stages), BalanceConfig(aux_loss_coeff=0.01)
    own = ROWS * stages // 2
    settings = TrainConfig(
        num_steps=10,
        seq_len=16,
        micro_batch_size=own,
        global_batch_size=ROWS,
        precision=case["precision"],
        clip_grad_norm=0.5,
    )
    engine = Engine(
        # The first stage has a dense layer alone, and so a group of parameters less.
        build(
            tiny_config(num_layers=3 + case.get("virtual", 1) - 1),
            balance,
            groups,
            layers=None if stages == 1 else runs_of(case, groups),
        ),
        groups,
        settings,
        OptimConfig(lr=0.01),
        {"zero_optimization": {"stage": case["zero"]}},
    )
    rank, norms = dist.get_rank(), []
    pipeline = Pipeline(engine, groups)
    for number, poisoned in steps:
        poisoned = poisoned and rank == case.get("rank", 1)
        hook = None
        if poisoned and case["where"] != "loss":
            expert = case["where"] == "expert"
            parameter = next(
                p for p in engine.module.parameters() if is_expert_parameter(p) == expert
            )
            hook = parameter.register_hook(lambda gradient: gradient * math.nan)
        first = groups.rows_rank * own
        rows = take(batch(number, 0, ROWS), first, first + own)
        factor = math.inf if poisoned and case["where"] == "loss" else 1.0
        pipeline.run(1, rows.input_ids.shape, Passes(engine, rows, balance, factor))
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
        stages, virtual = case.get("stages", 1), case.get("virtual", 1)
        clean = clean_state(case["zero"], case["precision"], stages, virtual)
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
