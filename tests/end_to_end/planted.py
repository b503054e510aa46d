"""Training with a router that goes wrong on purpose: python tests/end_to_end/planted.py FAULT
[overrides of launch.train].

From step 6 on the selection bias of the first MoE layer is moved after every step: "collapse" sends
every token to expert 0, "dead" sends nobody to it, "drift" lets every layer choose more experts
from step to step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.command.main import run_main
from launch.train import train
from train.guard import routing

FIRST_STEP = 6


def plant(fault: str) -> None:
    update, steps = routing.update_routers, [0]

    def planted(routers: list[Any], *arguments: Any, **options: Any) -> None:
        update(routers, *arguments, **options)
        steps[0] += 1
        if steps[0] < FIRST_STEP:
            return
        if fault == "drift":
            for router in routers:
                router.balance_bias += 0.05 * (steps[0] - FIRST_STEP + 1)
        else:
            routers[0].balance_bias[0] = 100.0 if fault == "collapse" else -100.0

    routing.update_routers = planted


if __name__ == "__main__":
    plant(sys.argv.pop(1))
    run_main("train", train)
