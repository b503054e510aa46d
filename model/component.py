"""What the records of all exchangeable parts have in common. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of the model that a config chooses by a short name, with its knobs as fields.

    The records live beside the classes that they configure (model/routers/config.py,
    model/attention/config/, model/dispatch/config.py). Each one says with `problems` what
    contradicts the model, without torch, and imports its class only when `build` is called.
    """

    name: ClassVar[str]
    """What stands for it in a config: `router: {name: top_k, ...}`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The knobs by name, as they stand in a config beside the component's own name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
