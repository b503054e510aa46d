"""Begin a run at a checkpoint of another one, with a learning rate that decays from there.

python -m launch.branch run=RUN checkpoint=step-N to=DIR decay_steps=K [decay_style=linear]
[min_lr=0]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.branch")

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import record, require_given
from launch.config.overrides import literal, plain, typed
from launch.saved.checkpoint import config_for

if TYPE_CHECKING:
    from train.config.commands.export import BranchConfig

COPIED = ("metrics.jsonl", "routing.jsonl", "alarms.jsonl", "audit/*.jsonl")
"""Patterns of the records that a branch goes on with: of steps behind the checkpoint they are cut
when it is resumed.
"""


def main(config: DictConfig) -> None:
    """Make the run directory; refuses before anything is written."""
    from train.checkpoint.folder import find_checkpoint, step_of
    from train.config.commands.export import BranchConfig

    require_given(
        config,
        BranchConfig,
        None not in (config.run, config.to, config.decay_steps),
        "give run=RUN, checkpoint=step-N, to=DIR and decay_steps=K",
    )
    settings: BranchConfig = record(config, BranchConfig)
    run, to = Path(settings.run), Path(settings.to).expanduser()
    if to.exists():
        raise ValueError(f"{to} exists; give a folder that does not, or remove it")
    checkpoint = find_checkpoint(run, prefer=settings.checkpoint)
    saved, note = config_for(run, checkpoint)
    if note is not None:
        print(f"note: {note}")
    step = step_of(checkpoint)
    require_constant(saved, step, checkpoint)
    decay(saved, step, settings, to)
    make(run, checkpoint, saved, to)

    print(f"{to} stands at step {step} of {run}, and decays over {settings.decay_steps} steps")
    print(f"next: python -m launch.train {typed('resume', to)}")
    print_result({"run_dir": str(to), "of": str(run), "checkpoint": checkpoint.name, "step": step})


def require_constant(saved: DictConfig, step: int, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: the learning rate is not at its constant height after that step, and a decay
            would begin with a jump.
    """
    optim = saved.optim
    wanted = f"choose a checkpoint at the constant rate with checkpoint=step-N of {checkpoint}"
    if optim.decay_style not in ("WSD", "constant"):
        raise ValueError(
            f"{checkpoint} was trained with optim.decay_style={optim.decay_style}, whose learning "
            "rate falls all the time; a branch decays from a constant one: train with "
            "optim.decay_style=constant or WSD"
        )
    if step < optim.warmup_steps:
        raise ValueError(
            f"{checkpoint.name} lies in the warm-up of {optim.warmup_steps} steps; {wanted}"
        )
    first = saved.train.num_steps - (optim.wsd_decay_steps or 0)
    if optim.decay_style == "WSD" and step > first:
        raise ValueError(
            f"{checkpoint.name} lies in the decay that begins after step {first}; {wanted}"
        )


def decay(saved: DictConfig, step: int, settings: BranchConfig, to: Path) -> None:
    """The settings of a run that decays from a step on, in place."""
    with open_dict(saved):
        saved.run_dir, saved.resume = literal(str(to)), None
        saved.train.num_steps = step + settings.decay_steps
        for name in ("num_tokens", "num_epochs", "stop_after_step"):
            saved.train[name] = None
        # What was a share of the steps stays the number that it was.
        saved.optim.warmup_fraction = None
        saved.optim.decay_style = "WSD"
        saved.optim.wsd_decay_steps = settings.decay_steps
        saved.optim.wsd_decay_style = settings.decay_style
        if settings.min_lr is not None:
            saved.optim.min_lr = settings.min_lr
    _require_possible(saved)


def _require_possible(saved: DictConfig) -> None:
    """Raises ConfigError where a run of these settings is not possible."""
    from launch.config.parse import parse, world_size

    parse(plain(saved), world_size(saved))


def make(run: Path, checkpoint: Path, saved: DictConfig, to: Path) -> None:
    """Write the run directory: the checkpoint, with its files linked where the file system can, and
    what a resumed run reads beside it.
    """
    from train.checkpoint.folder import point_latest, remember_saved
    from train.files.durable import new_folder, write_text
    from train.pretrained.described import PRETRAINED

    with new_folder(to) as scratch:
        for name in ("data", PRETRAINED):
            if (run / name).is_dir():
                shutil.copytree(run / name, scratch / name)
        for path in (path for pattern in COPIED for path in run.glob(pattern)):
            target = scratch / path.relative_to(run)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        folder = scratch / "checkpoints"
        shutil.copytree(checkpoint, folder / checkpoint.name, copy_function=_linked)
        _forget_tracker(folder / checkpoint.name)
        point_latest(folder, checkpoint.name)
        remember_saved(scratch, checkpoint.name)
        write_text(scratch / "config.yaml", OmegaConf.to_yaml(saved))


def _linked(source: str, target: str) -> None:
    """No file of a checkpoint is ever written again, so that two runs can share it."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _forget_tracker(checkpoint: Path) -> None:
    """A branch is a run of its own in W&B. state.json is replaced, not written into: it is the
    other run's, too.
    """
    from train.files.durable import write_json
    from train.files.manifest import MANIFEST, file_facts, read_json

    state: dict[str, Any] = read_json(checkpoint / "state.json")
    write_json(checkpoint / "state.json", {**state, "wandb_id": None})
    manifest = read_json(checkpoint / MANIFEST)
    manifest["files"]["state.json"] = file_facts(checkpoint / "state.json")
    write_json(checkpoint / MANIFEST, manifest)


if __name__ == "__main__":
    run_main("branch", main)
