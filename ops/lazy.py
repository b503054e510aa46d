"""Names that a package exports and imports only when they are asked for.

What an op can do and which settings contradict each other is known without torch (`spec.py` of each
op), and importing `ops.router.spec` runs `ops/router/__init__.py` first. An eager `__init__` would
make every command that only checks a config wait for torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The module-level `__getattr__` (PEP 562) of a package.

    Args:
        package: its `__name__`.
        homes: exported name -> the module of the package that defines it. No name may be that of a
            module of the package: whoever imports the module would shadow the name.

    Returns:
        A function that imports a name's module and returns the name; it raises AttributeError for
        names that are not exported.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return find
