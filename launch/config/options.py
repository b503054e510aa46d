"""Options of a group under conf/ by their names, for settings that list several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.config.build import ConfigError, build_record
from launch.config.overrides import plain
from launch.process.identity import ROOT
from model.attention.config.base import AttentionConfig


@dataclass(frozen=True)
class _Holder:
    attention: AttentionConfig


def attention_named(name: str) -> AttentionConfig:
    """conf/attention/NAME.yaml as a record.

    Raises:
        ValueError: there is no such option.
    """
    folder = ROOT / "conf" / "attention"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"there is no attention {name!r}; choices: {', '.join(known)}")

    def composed(name: str) -> Any:
        """As Hydra puts it together: an option may begin with others of its group, and its values
        refer to those that come out in the end.
        """
        own = OmegaConf.load(folder / f"{name}.yaml")
        assert isinstance(own, DictConfig)
        bases = [composed(base) for base in own.pop("defaults", []) if base != "_self_"]
        return OmegaConf.merge(*bases, own)

    problems: list[str] = []
    node = plain(OmegaConf.create({"attention": composed(name)}))
    found = build_record(node, _Holder, "", problems)
    if problems:
        raise ConfigError(problems)
    attention: AttentionConfig = found.attention
    return attention
