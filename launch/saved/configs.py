"""The config of a run and that of its checkpoints, complete and verified.

RUN/config.yaml                     what the last start asked for, interpolations kept
RUN/checkpoints/step-N/config.yaml  what the weights were made under, resolved; the manifest of
                                    the checkpoint vouches for it
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from launch.saved.defaults import complete
from launch.saved.files import load_config
from train.files.manifest import CheckpointError, content_damage, read_manifest


def load_run_config(path: Path) -> DictConfig:
    """A config that a run has saved, with the defaults that held then in place of what it lacks.

    Raises:
        ValueError: it is damaged.
    """
    return complete(load_config(str(path)), held=True)


def load_checkpoint_config(checkpoint: Path) -> DictConfig:
    """The same of a checkpoint.

    Raises:
        CheckpointError: it is not the one that was written.
        ValueError: it is damaged.
    """
    files = {
        name: facts for name, facts in read_manifest(checkpoint).items() if name == "config.yaml"
    }
    damage = (
        content_damage(checkpoint, files) if files else "the manifest does not list config.yaml"
    )
    if damage is not None:
        raise CheckpointError(f"{checkpoint}: {damage}; use another checkpoint")
    return load_run_config(checkpoint / "config.yaml")
