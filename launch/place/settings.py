"""What launch.place is asked for, and the layout that it plans."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlaceConfig:
    """Settings of launch.place."""

    run: str
    """Run directory whose loads are read."""
    expert_parallel_size: int | None = None
    """None: that of the run."""
    ranks_per_node: int | None = None
    """None: that of the run."""
    replicas_per_rank: int = 0
    """How many copies of hot experts every rank has room for."""
    last_steps: int | None = None
    """Lines of routing.jsonl to plan on, the last ones; None: all."""
    output: str | None = None
    """None: RUN/placement.json."""

    def problems(self) -> list[str]:
        found = [
            f"{name} is {value}; it must be at least 1"
            for name in ("expert_parallel_size", "ranks_per_node")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.replicas_per_rank < 0:
            found.append(f"replicas_per_rank is {self.replicas_per_rank}; it must not be negative")
        if self.last_steps is not None and self.last_steps < 2:
            found.append(
                f"last_steps is {self.last_steps}; it must be at "
                "least 2, one half to plan on and one to test on"
            )
        return found


@dataclass(frozen=True)
class Layout:
    """What to plan for."""

    ranks: int
    """Ranks that share the experts."""
    ranks_per_node: int | None
    """None where the experts of a group share a node, or nodes are not told."""
    replicas_per_rank: int
    """How many copies of hot experts every rank has room for."""
