"""Configs and run directories on disk: what a run has saved, read and written."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from launch.config.overrides import typed
from train.config.component import SETTINGS, renamed
from train.files.durable import write_text

MAX_DEPTH = 50
"""Of a saved config."""


def new_run_dir(experiment_name: str) -> Path:
    """runs/<experiment>/<time>-<id>, created. The id keeps runs of the same second apart."""
    path = (
        Path("runs") / experiment_name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    )
    path.mkdir(parents=True)
    return path


def load_config(path: str) -> DictConfig:
    """A config that a run has saved, interpolations kept.

    Raises:
        ValueError: it is damaged.
    """
    try:
        text = Path(path).read_text()
        _refuse_endless(text, path)
        saved = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"{path} cannot be read: {error.problem}{where}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {(str(error).splitlines() or ['nested too deeply'])[0]}"
        ) from error
    if not isinstance(saved, DictConfig):
        raise ValueError(f"{path} is no config: it holds no group of settings")
    _rename_components(saved)
    return saved


def _rename_components(saved: DictConfig) -> None:
    """Write the names of components where an earlier version wrote dotted paths, so that whatever
    reads or compares saved configs sees names alone.
    """
    for key, settings in OmegaConf.to_container(saved, resolve=False).items():
        if key in SETTINGS and isinstance(settings, dict) and "_target_" in settings:
            OmegaConf.update(saved, key, renamed(settings), merge=False)


def _refuse_endless(text: str, path: str) -> None:
    """A few aliases of aliases stand for more nodes than any machine holds, and nesting for more
    stack; what we save has neither.

    Raises:
        ValueError: the text has.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"{path} holds a YAML alias (*name), which "
                "no saved config does; write the value out"
            )
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is nested more than {MAX_DEPTH} deep, as no saved config is")


def refuse_used_run_dir(config: DictConfig) -> None:
    if (
        config.run_dir is not None
        and config.resume is None
        and (Path(config.run_dir) / "config.yaml").exists()
    ):
        raise ValueError(
            f"run_dir={config.run_dir} already holds a run; continue it with "
            f"{typed('resume', config.run_dir)}, or choose another directory"
        )


def save_config(config: DictConfig) -> None:
    """RUN/config.yaml, interpolations kept, so that a resumed run can override what others refer
    to.
    """
    path = Path(config.run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", OmegaConf.to_yaml(config))
    except OSError as error:
        raise ValueError(
            f"run_dir={path} cannot be written ({error.strerror}); choose another directory"
        ) from error


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """RUN/result.json: what the last start of a run wrote at its end; None: there is nothing, or
    nothing that can be read.

    It is a hint about how the run ended: what a run goes on from is its checkpoints, so a damaged
    record is none.
    """
    try:
        result = json.loads((run_dir / "result.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None
