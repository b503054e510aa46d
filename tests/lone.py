"""The variables that tell a rank its place. A process that trains alone is given them while it
does, so a test that looks at them, or must not have any, names them here.
"""

from __future__ import annotations

import pytest

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be no rank. What a test sets of these, or what is adopted in it, is taken back after it."""
    for name in PLACE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
