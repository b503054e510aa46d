"""Folders of compiled code that libraries load and run without a look at who wrote it.

Triton, DeepSpeed's extensions and torch's compiler load what lies under the name they look for. In
a folder that somebody else may write, that runs as the user. So they are folders of this checkout
or of the user's home unless a variable names another, and every command looks at their owner first.
Our own kernels are looked at where they are loaded (ops/compile/cuda.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping
from pathlib import Path

from launch.process.identity import ROOT

DEFAULTS = {
    "TORCH_EXTENSIONS_DIR": ROOT / ".cache" / "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": ROOT / ".cache" / "torch_inductor",
}
"""Instead of torch's own choices: that of its compiler is a known name in /tmp."""


def use_own_code_caches(environ: MutableMapping[str, str]) -> None:
    """Point the libraries to folders that are the user's; those that do not exist are made by the
    libraries.

    Raises:
        ValueError: a folder belongs to another user, or everybody can write it.
    """
    for name, default in DEFAULTS.items():
        environ.setdefault(name, str(default))
    # Triton's own choice is left to it, as the home may be another on another node.
    home = Path(environ.get("TRITON_HOME") or os.path.expanduser("~"))
    folders = {"TRITON_CACHE_DIR": home / ".triton" / "cache", **DEFAULTS}
    for name, default in folders.items():
        folder = Path(environ.get(name, default))
        if (problem := _problem(folder)) is not None:
            raise ValueError(
                f"{name}={folder} {problem}, and compiled code in it "
                f"would run as you; set {name} to a folder of your own"
            )


def _problem(folder: Path) -> str | None:
    try:
        facts = folder.stat()
    except OSError:
        return None
    if facts.st_uid != os.geteuid():
        return f"belongs to user {facts.st_uid}, this is user {os.geteuid()}"
    if facts.st_mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {stat.S_IMODE(facts.st_mode):o})"
    return None
