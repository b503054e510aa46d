"""Variables that a run's saved config sets for its ranks, when the run is resumed.

A run directory may be a copy of somebody else's. Its numbers harm nobody, but variables say which
code a process loads and where it sends credentials. Those of the saved launch.env that could are
applied only when the command line repeats them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from launch.process.secrets import redact_text

_RISKY = re.compile(
    r"PATH|PRELOAD|PLUGIN|LIB|LOAD|IMPORT|MODULE|INIT|STARTUP|PYTHON|^LD_|^DYLD_|URL|URI|ENDPOINT|"
    r"PROXY|SERVER|HOST|ADDR|"
    r"HOME|DIR|CACHE|FOLDER|FILE|CONF|CERT|BUNDLE|^SSL|SHELL|CMD|COMMAND|EXEC|EDITOR|ENV$|NETRC|SSH|"
    r"GIT|AUDIT|KERNELS|"
    r"BASE|TOOL|^CC$|CXX|NVCC|GCC|NCCL_NET$|DEBUGGER|TRACE",
    re.IGNORECASE,
)
_HARMLESS = frozenset(
    {
        "PYTHONHASHSEED",
        "PYTHONUNBUFFERED",
        "PYTHONFAULTHANDLER",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "HYDRA_FULL_ERROR",
    }
)


def is_risky(name: str) -> bool:
    """Whether a variable of this name may make a process load code, start a program, or send
    something elsewhere.
    """
    return name not in _HARMLESS and _RISKY.search(name) is not None


def require_confirmed(saved: Any, overrides: Iterable[str], run_dir: str) -> None:
    """Refuse to apply risky variables of a saved config that the command line does not repeat.

    Args:
        saved: the config as plain data, interpolations kept; overrides: of this command line, in
            Hydra's form.

    Raises:
        ValueError: with every such variable, and what to type where they are meant.
    """
    launch = saved.get("launch") if isinstance(saved, dict) else None
    env = launch.get("env") if isinstance(launch, dict) else None
    given = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    if not isinstance(env, dict) or "launch.env" in given:
        return

    found = {
        str(name): str(value)
        for name, value in env.items()
        if is_risky(str(name)) and f"launch.env.{name}" not in given
    }

    if found:
        shown = ", ".join(f"{name}={redact_text(value)}" for name, value in found.items())
        keys = " ".join(f"+launch.env.{name}=..." for name in found)
        raise ValueError(
            f"the saved config of {run_dir} sets {shown} for the ranks, "
            "which can load code or send your credentials elsewhere; "
            f"where that is meant, repeat it on this command line: {keys}"
        )
