"""train.micro_batch_size=auto: the largest that fits by the plan, saved with the run as a number
once it was tried (launch/layouts/trial.py).

Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, open_dict

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import AUTO, parse, world_size
from launch.job.fit import LEFT_OUT, device_of
from launch.job.memory import planned_memory, ranks_of_this_node, this_machine
from train.files.sizes import GIB


@dataclass(frozen=True)
class Room:
    """What a rank may use."""

    usable: int
    """Bytes, without the share that is left to what the plan leaves out."""
    where: str


@dataclass(frozen=True)
class Planned:
    """What the plan says of the sizes of a micro-batch."""

    sizes: tuple[int, ...]
    """Those that fit, the largest first; each divides the batch."""
    said: str
    """Why the first of them is the largest, in a line."""


def is_asked(config: DictConfig) -> bool:
    train = config.get("train")
    return isinstance(train, DictConfig) and train.get("micro_batch_size") == AUTO


def with_micro_batch(config: DictConfig, device: str | None = None) -> tuple[DictConfig, Planned]:
    """The config with the largest micro-batch that fits, in place, and all that do.

    Args:
        device: what it is planned for; None: the devices of this machine, or its memory.

    Raises:
        ConfigError: not even one row fits, the settings contradict each other whatever the
            micro-batch, or the machine that trains is not this one.
    """
    settings, ranks = plain(config), world_size(config)
    # What contradicts the rest of the config says so of one row.
    one = parse(_with(settings, 1), ranks)
    room = _room(one, device)
    batch, rows = one.train.global_batch_size, one.parallel.rows_size(ranks)

    fitting: list[int] = []
    memory, beyond = 0, ""
    for size in (n for n in range(1, batch // rows + 1) if batch // rows % n == 0):
        try:
            run = parse(_with(settings, size), ranks)
        except ConfigError:  # such as a batch ramp-up that it does not divide
            continue
        total = planned_memory(run, ranks).total
        if total > room.usable:
            beyond = f"; {size} would need {total / GIB:.1f}"
            break
        fitting.append(size)
        memory = total
    if not fitting:
        raise ConfigError(
            [
                f"train.micro_batch_size=auto: by the plan not even one row fits: "
                f"{planned_memory(one, ranks).total / GIB:.1f} of {room.usable / GIB:.1f} GiB of "
                f"{room.where}; use more ranks, deepspeed=zero3 or model.recompute=block"
            ]
        )
    chosen = fitting[-1]
    with open_dict(config):
        config.train.micro_batch_size = chosen
    return config, Planned(
        tuple(reversed(fitting)),
        f"train.micro_batch_size=auto is {chosen}: by the plan {memory / GIB:.1f} of "
        f"{room.usable / GIB:.1f} GiB of {room.where}{beyond}",
    )


def _with(settings: dict[str, Any], size: int) -> dict[str, Any]:
    return {**settings, "train": {**settings["train"], "micro_batch_size": size}}


def _room(run: Any, device: str | None) -> Room:
    named = device_of(device) if device is not None else None
    elsewhere = not run.launch.starts_here or run.launch.by_node
    if named is None and elsewhere:
        raise ConfigError(
            [
                "train.micro_batch_size=auto looks at the devices of this machine, and the ranks "
                "run on others; give the number that python -m launch.plan device=H100 "
                "train.micro_batch_size=auto says"
            ]
        )
    found = named or device_of(None)
    if found is not None:
        name = "the device" if device is None else device
        return Room(found.usable, f"{name}, {LEFT_OUT:.0%} of it left out")

    # Without devices the ranks of a node share its memory.
    host = this_machine().host
    here = 1 if run.launch.kind == "inline" else run.launch.num_devices
    here = ranks_of_this_node(os.environ, here)
    of = f"this machine's {host / GIB:.1f} GiB (control groups counted)"
    shared = f" for each of {here} ranks" if here > 1 else ""
    return Room(int((1 - LEFT_OUT) * host / here), f"{of}{shared}, {LEFT_OUT:.0%} left out")
