"""What launch.plan is asked beside the config of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ops.device import known_devices, link_rates, memory_gib

NODE_SIZE = 8
"""Devices of a node, where layouts are searched for."""


@dataclass(frozen=True)
class PlanCommandConfig:
    """What launch.plan is asked beside the config of a run."""

    device: str | None = None
    """What the run is planned for: H100, H200, B200, ... None: the devices of this machine."""
    mfu: float = 0.3
    """Share of the devices' peak that the time is worked out with; perf/mfu of a run says it."""
    price: float | None = None
    """Of a device and hour, in any currency; None: no cost."""
    world: int | None = None
    """With parallel=auto: the number of devices that layouts are searched for, in nodes of eight.
    """

    def search_problems(self, searches: bool) -> list[str]:
        """searches: parallel=auto leaves the sizes of groups to a search."""
        if not searches and self.world is None:
            return []
        found = []
        if not searches or self.world is None or self.device is None:
            given = {
                "parallel=auto": searches,
                "world=N": self.world is not None,
                "device=H100 (or another)": self.device is not None,
            }
            lacking = " and ".join(name for name, is_given in given.items() if not is_given)
            found.append(
                "layouts are searched for with parallel=auto, world=N and device= together: give "
                f"{lacking} as well, or leave "
                f"{'parallel=auto' if searches else f'world={self.world}'} out"
            )
        if self.world is not None and (
            self.world < 1 or (self.world > NODE_SIZE and self.world % NODE_SIZE)
        ):
            found.append(
                f"world is {self.world}; it must be at least 1, and above {NODE_SIZE} whole nodes "
                f"of {NODE_SIZE}"
            )
        if self.device is not None and link_rates(self.device) is None:
            found.append(
                f"device is {self.device}, of whose links nothing is known; layouts are searched "
                "for A100, H100, H200, B200"
            )
        return found

    def problems(self) -> list[str]:
        found = []
        if self.device is not None and memory_gib(self.device) is None:
            found.append(
                f"device is {self.device!r}; choose one of {', '.join(known_devices())}, or null "
                "for those of this machine"
            )
        if not 0 < self.mfu <= 1:
            found.append(f"mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1")
        if self.price is not None and self.price < 0:
            found.append(f"price is {self.price}; it must not be negative")
        return found
