"""What each dispatcher can be asked for, and which requests contradict the model or the layout.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.component import Component
from model.config import ModelConfig
from ops.all_to_all.spec import PAYLOADS

if TYPE_CHECKING:
    from model.dispatch.base import Dispatcher
    from model.parallel.groups import ParallelGroups
    from model.placement.record import LayerPlacement


@dataclass(frozen=True, kw_only=True)
class DispatcherConfig(Component):
    """The settings of a dispatcher."""

    def problems(self, model: ModelConfig, expert_parallel_size: int) -> list[str]:
        """Contradictions of the knobs with the model and the number of ranks that share experts."""
        raise NotImplementedError

    def build(
        self,
        model: ModelConfig,
        groups: ParallelGroups | None = None,
        placement: LayerPlacement | None = None,
    ) -> Dispatcher:
        """The dispatcher of one layer.

        Args:
            groups: None: this process alone.
            placement: which rank serves which expert. None: consecutive blocks.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LocalDispatcherConfig(DispatcherConfig):
    """All experts live on one rank."""

    name = "local"

    def problems(self, model: ModelConfig, expert_parallel_size: int) -> list[str]:
        if expert_parallel_size > 1:
            return [
                "dispatcher=local cannot serve parallel.expert_parallel_size "
                f"{expert_parallel_size}; use dispatcher=all_to_all"
            ]
        return []

    def build(
        self,
        model: ModelConfig,
        groups: ParallelGroups | None = None,
        placement: LayerPlacement | None = None,
    ) -> Dispatcher:
        from model.dispatch.local import LocalDispatcher

        return LocalDispatcher(model, groups)


@dataclass(frozen=True, kw_only=True)
class AllToAllConfig(DispatcherConfig):
    """Experts are spread over the ranks of the expert group."""

    name = "all_to_all"

    num_chunks: int = 1
    """The exchange is cut into so many by experts. While the rows of one chunk are computed, those
    of the others travel. Every expert still sees all its rows at once, so results do not change by
    a bit.
    """
    payload: str = "native"
    """How rows travel: native, bf16 or fp8 (ops/all_to_all/payload.py). fp8 is for the way to the
    experts; the way back and the gradients are bf16 then.
    """
    buffer_factor: float | None = None
    """None: as many rows travel as there are assignments (dropless; one copy of the sizes to the
    host per layer). A number, in training: buffers of fixed size, that many times the even share
    T * K / ranks, and sizes that stay on the device, as CUDA graphs need. Every rank must bring as
    many tokens. What does not fit is dropped and counted (moe/dropped): nothing, with
    router.capacity_factor up to this number, or with a number as large as the ranks and one chunk.
    """

    def problems(self, model: ModelConfig, expert_parallel_size: int) -> list[str]:
        found = []
        if model.num_experts % expert_parallel_size:
            found.append(
                f"model.num_experts {model.num_experts} is not divisible by "
                f"parallel.expert_parallel_size {expert_parallel_size}"
            )
        if self.payload not in PAYLOADS:
            found.append(f"dispatcher.payload is {self.payload!r}; choose {', '.join(PAYLOADS)}")
        own = model.num_experts // expert_parallel_size
        if model.num_experts and not 1 <= self.num_chunks <= own:
            found.append(
                f"dispatcher.num_chunks is {self.num_chunks}; a rank has {own} experts, so it must "
                f"be from 1 to {own}"
            )
        if self.buffer_factor is not None and self.buffer_factor <= 0:
            found.append(
                f"dispatcher.buffer_factor is {self.buffer_factor}; it must be positive, or null "
                "for exact sizes"
            )
        if expert_parallel_size == 1 and self != AllToAllConfig():
            found.append(
                f"dispatcher.num_chunks {self.num_chunks}, payload {self.payload} and "
                f"buffer_factor {self.buffer_factor} are for expert parallelism, but "
                "parallel.expert_parallel_size is 1; leave them out, or, where a resumed run has "
                "them, add dispatcher=all_to_all"
            )
        return found

    def build(
        self,
        model: ModelConfig,
        groups: ParallelGroups | None = None,
        placement: LayerPlacement | None = None,
    ) -> Dispatcher:
        from model.dispatch.all_to_all import AllToAllDispatcher

        return AllToAllDispatcher(model, self, groups, placement)


DISPATCHERS: dict[str, type[DispatcherConfig]] = {
    record.name: record for record in (LocalDispatcherConfig, AllToAllConfig)
}
"""Name in a config -> record."""
