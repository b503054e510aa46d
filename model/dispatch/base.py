"""What a dispatcher is asked for and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ops.all_to_all import Meter
from ops.router import RouterOutput


class ExpertRows(NamedTuple):
    """Work for one chunk of experts: the arguments of ops.grouped_mlp after the weights' own."""

    hidden: Tensor
    weights: Tensor
    slots: Tensor
    inverse: Tensor
    offsets: Tensor


Compute = Callable[[int, ExpertRows], Tensor]
"""(chunk, its rows) -> [rows, D], weighted by the gates and summed over each row's slots."""


class Dispatched(Protocol):
    """Tokens on their way to their experts."""

    def finish(self, compute: Compute) -> tuple[Tensor, Tensor]:
        """Let the experts compute, and bring the results home: [T, D], and how many assignments
        were computed here, [].
        """
        ...


class Dispatcher(Protocol):
    """Moves the tokens of a layer to their experts and back."""

    meter: Meter
    """Counts what travels, while it is asked to."""

    @property
    def chunk_sizes(self) -> list[int]:
        """Experts of every chunk that `Compute` is called for."""
        ...

    def start(self, hidden: Tensor, routing: RouterOutput, dropless: bool = False) -> Dispatched:
        """Send the rows of hidden [T, D] on their way. dropless: whatever the settings say, nothing
        is left behind.
        """
        ...
