"""ZeRO-3 engines of the same first weights: shared out one by one as they are drawn, and once the
whole model was there. argv[1]: JSON list of [expert_parallel_size, precision]; prints a JSON line
for each: whether weights, losses and updated weights are the same to the last bit, and how many
elements a rank has held whole at most while it built, beside its parts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from common import batch, build, take, tiny_config

from model.config import BalanceConfig
from model.loss import training_loss
from model.parallel.family import own_part, whole_shape
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from train.config.training import OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.engine.frozen import read_frozen, write_frozen
from train.engine.partition import Partition

ZERO = {"zero_optimization": {"stage": 3}}
STEPS = 2


class Watched:
    """A Partition that counts what is whole whenever it is called."""

    def __init__(self, own: Partition):
        self.own, self.seen, self.most = own, [], 0

    def __call__(self, parameter: torch.nn.Parameter) -> None:
        self.seen.append(parameter)
        self.most = max(self.most, sum(p.numel() for p in self.seen))
        self.own(parameter)


def trained(
    groups: ParallelGroups, precision: str, at_once: bool
) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor], int]:
    """Masters by name before and after, losses, and Watched.most."""
    rows = 2 * dist.get_world_size()
    train = TrainConfig(
        num_steps=STEPS,
        seq_len=16,
        micro_batch_size=2,
        global_batch_size=rows,
        precision=precision,
    )
    balance = BalanceConfig(aux_loss_coeff=0.01)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    settle = Watched(Partition(groups, train, ZERO)) if at_once else None
    model = build(tiny_config(), balance, groups, dtype=dtype, settle=settle)
    engine = Engine(model, groups, train, OptimConfig(lr=0.01), ZERO)

    found: dict[str, list[torch.Tensor]] = {}

    def keep() -> None:
        engine.prepare_gather()
        for name, parameter in engine.named_parameters():
            found.setdefault(name, []).append(engine.gather_state(parameter, "fp32").clone())

    keep()
    losses = []
    for step in range(STEPS):
        own = take(batch(step, 0, rows), 2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        output = engine.forward(own)
        engine.backward(training_loss(output, rows * 16, rows * 16, balance), True)
        engine.step()
        losses.append(output.loss_sum.detach())
    keep()
    engine.close()
    return found, losses, 0 if settle is None else settle.most


def filled(groups: ParallelGroups) -> bool:
    """Whether weights that are read into a model whose own are shared out are there afterwards."""
    rows = 2 * dist.get_world_size()
    train = TrainConfig(num_steps=1, seq_len=16, micro_batch_size=2, global_batch_size=rows)
    model = build(tiny_config(), BalanceConfig(), groups, settle=Partition(groups, train, ZERO))
    draw = torch.Generator().manual_seed(0)
    same = True
    for parameter in model.parameters():
        value = torch.randn(whole_shape(parameter), generator=draw)
        write_frozen(parameter, own_part(parameter, value))
        same &= torch.equal(read_frozen(parameter), value)
    return same


def main() -> None:
    dist.init_process_group("gloo")
    for expert_size, precision in json.loads(sys.argv[1]):
        destroy_parallel()
        groups = initialize_parallel(expert_size)
        (ours, our_losses, most), (theirs, their_losses, _) = (
            trained(groups, precision, at_once) for at_once in (True, False)
        )
        same = ours.keys() == theirs.keys() and all(
            torch.equal(a, b) for n in ours for a, b in zip(ours[n], theirs[n], strict=True)
        )
        moved = sum(not torch.equal(*ours[name]) for name in ours)
        read_back = filled(groups)
        largest = max(first.numel() for first, _ in ours.values())
        if dist.get_rank() == 0:
            print(
                json.dumps(
                    {
                        "weights": same,
                        "filled": read_back,
                        "losses": all(map(torch.equal, our_losses, their_losses)),
                        "moved": moved / len(ours),
                        "whole_over_largest": most / largest,
                    }
                ),
                flush=True,
            )
    destroy_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
