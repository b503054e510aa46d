"""Values as Hydra's command line and OmegaConf read them back."""

from __future__ import annotations

import re
import shlex
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


def plain(config: DictConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    return data


def typed_overrides() -> list[str]:
    """What this command was started with, as it was typed; nothing outside of one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def quoted(value: object) -> str:
    """A value as Hydra's override grammar and then OmegaConf read it back, whatever it holds."""
    # Within quotes a backslash is one, but before a quote or at the end it takes two.
    text = re.sub(r"(\\*)'", r"\1\1\\'", literal(str(value)))
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"'{text}'"


def typed(key: str, value: object) -> str:
    """An override as one types it in a shell."""
    text = str(value)
    is_plain = text != "" and all(c.isalnum() or c in "/._-" for c in text)
    return shlex.quote(f"{key}={text if is_plain else quoted(text)}")


def literal(value: Any) -> Any:
    """A value, or a container of values, as OmegaConf must hold it to give it back: what looks like
    an interpolation is text. For what has been resolved before, such as a path."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
