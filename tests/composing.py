"""Configs as the commands compose them, of which the groups are composed once.

Hydra needs a sixth of a second of a core to put the files of a choice of groups together, and a few
milliseconds to lay values over them. It does the one after the other, so the first can be kept.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

CONF = Path(__file__).resolve().parent.parent / "conf"


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """What Hydra's compose gives for a command and these overrides, a copy of its own.

    Raises:
        ConfigCompositionException: as Hydra has it.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = (text for text, one in zip(overrides, parsed, strict=True) if _chooses(one))
    config = copy.deepcopy(_of_groups(command, *choices))
    # in the order they were given, as Hydra does
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if not _chooses(o)], config)
    return config


def _chooses(override: Override) -> bool:
    """Whether it takes part in which files are read, or in Hydra's own settings."""
    key = override.key_or_group
    return override.package is not None or key.startswith("hydra") or (CONF / key).is_dir()


@functools.cache
def _of_groups(command: str, *choices: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, overrides=list(choices))
