"""What a check of launch.doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.process.secrets import redact_text


@dataclass(frozen=True)
class Finding:
    """What one check of the machine has found."""

    level: Literal["ok", "warn", "FAIL"]
    """FAIL stops a job, warn may hurt it."""
    name: str
    """What was checked, in one word."""
    found: str
    """What was seen, with its values."""
    fix: str = ""
    """What to do about it; "" when all is well."""

    def __str__(self) -> str:
        line = f"{self.level:4}  {self.name:14}  {self.found}" + (
            f"  -> {self.fix}" if self.fix else ""
        )
        return redact_text(" ".join(line.splitlines()))


def ok(name: str, found: str) -> Finding:
    return Finding("ok", name, found)


def warn(name: str, found: str, fix: str) -> Finding:
    return Finding("warn", name, found, fix)


def failed(name: str, found: str, fix: str) -> Finding:
    return Finding("FAIL", name, found, fix)
