"""What shows a run besides its own files."""

from __future__ import annotations

from typing import Any, Protocol

from train.guard.alarms import AlarmEvent
from train.sinks.media import Media


class Service(Protocol):
    """A program or server that gets what the files get. May raise: it is switched off then, and the
    run goes on.
    """

    def log(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        """One record of scalars; those that are not finite as they are."""

    def log_media(self, step: int, tokens: int, media: Media) -> None:
        """The pictures of a routing record."""

    def alarm(self, event: AlarmEvent) -> None:
        """An alarm rings, or is over."""

    def close(self, summary: dict[str, Any]) -> None:
        """The run is done; `summary` is its result."""
