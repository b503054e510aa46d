"""Settings of launch.prepare and launch.teach."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PrepareConfig:
    """How data are prepared."""

    workers: int | None = None
    """Processes that tokenise; null: one for every core that the command may use. The tokens do not
    depend on it.
    """

    def problems(self) -> list[str]:
        if self.workers is not None and not 1 <= self.workers <= 1024:
            return [f"prepare.workers is {self.workers}; it must be between 1 and 1024, or null"]
        return []


@dataclass(frozen=True)
class PrepareCommandConfig:
    """What launch.prepare does; what the data are stands under data."""

    inspect: bool = False
    """Only say what is in the sources, and what the tokenizer does to it."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def problems(self) -> list[str]:
        return self.prepare.problems()


@dataclass(frozen=True)
class TeachCommandConfig:
    """What launch.teach writes; the rows are those of the run whose settings it is given."""

    to: str
    """The folder to write."""
    num_ids: int = 32
    """Likeliest tokens that are kept one by one; all others are kept together."""

    def problems(self) -> list[str]:
        if self.num_ids < 1:
            return [f"num_ids is {self.num_ids}; it must be at least 1"]
        return []
