"""The config that a checkpoint is read under: its own. RUN/config.yaml says where the data lie now,
and nothing else.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.config.overrides import literal, plain
from launch.process.secrets import redact
from launch.saved.configs import load_checkpoint_config, load_run_config
from launch.saved.resume import FREE, Changes, changes, shown
from train.files.manifest import require_owned

SHAPING = ("model.*", "router.*", "attention.*", "balance.*", "budget.*", "data.*", "train.seq_len")
"""Settings that change what a checkpoint computes, or on which text, as patterns."""
PLACES = ("data.sources.*.path", "data.sources.*.data_files", "data.tokenizer.path")
"""Where the data lie: taken from RUN/config.yaml, since files move. The tokens themselves are
compared by those who read them.
"""
NUM_SHOWN = 5


def config_for(
    run: Path, checkpoint: Path, chosen: tuple[str, ...] = ()
) -> tuple[DictConfig, str | None]:
    """The config to read a checkpoint under, and what to say about a RUN/config.yaml that asks for
    something else.

    Args:
        chosen: patterns of settings that the command itself has replaced, about which nothing is
            said.

    Raises:
        ValueError: one of the two is damaged, or another user's.
    """
    held = load_checkpoint_config(checkpoint)
    if not (run / "config.yaml").is_file():
        return held, f"{run}/config.yaml is gone; the copy in {checkpoint.name} holds"

    require_owned(run / "config.yaml")  # it says what is read as data

    # Where the data lie may have changed since; what shapes the model may not.
    own = load_run_config(run / "config.yaml")
    differing = _shaping(changes(redact(plain(held)), redact(plain(own))), chosen)
    try:
        _take_places(own, held)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run}/config.yaml is damaged: what it says under data cannot be read "
            f"({type(error).__name__}: {error}); {checkpoint}/config.yaml is a copy from when it "
            "was whole"
        ) from error
    if not differing:
        return held, None

    listed = ", ".join(
        f"{key} {shown(was)} (there {shown(now)})"
        for key, (was, now) in list(differing.items())[:NUM_SHOWN]
    )
    more = f" and {len(differing) - NUM_SHOWN} more" if len(differing) > NUM_SHOWN else ""
    return (
        held,
        f"{run}/config.yaml differs from what {checkpoint.name} "
        f"was made under, which holds here: {listed}{more}",
    )


def _shaping(found: Changes, chosen: tuple[str, ...]) -> Changes:
    def matches(key: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)

    return {
        key: pair
        for key, pair in sorted(found.items())
        if matches(key, SHAPING) and key not in FREE and not matches(key, (*PLACES, *chosen))
    }


def _take_places(own: DictConfig, held: DictConfig) -> None:
    """Sources are told apart by their order; with another number of them the run's own say
    nothing.
    """
    there = literal(plain(own)["data"])
    for name in ("cache_dir", "max_bad_rows", "on_bad_row"):
        held.data[name] = there[name]
    held.data.tokenizer.path = there["tokenizer"]["path"]
    sources, moved = _listed(held.data.sources), _listed(there["sources"])
    for source, other in zip(sources, moved, strict=True) if len(sources) == len(moved) else ():
        source["path"], source["data_files"] = other["path"], other["data_files"]


def _listed(sources: Any) -> list[Any]:
    """Overrides of single sources make a group of numbers of the list."""
    return list(sources.values()) if isinstance(sources, (dict, DictConfig)) else list(sources)
