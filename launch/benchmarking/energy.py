"""What the machine says it has used: the counter of a GPU, or those of the processors' packages."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
PACKAGE = "intel-rapl:[0-9]*"
"""Also of AMD's processors. Parts of a package have a second number and are not counted."""
LIBRARY = "libnvidia-ml.so.1"
"""NVML, which comes with the driver."""


@dataclass(frozen=True)
class Counter:
    """One that only rises, but for what is told of `wraps`."""

    joules: Callable[[], float]
    wraps: float | None = None
    """Joules at which it begins anew; None: never."""

    def since(self, before: float) -> float:
        """Joules since an earlier reading; it has begun anew once at most."""
        used = self.joules() - before
        return used + self.wraps if used < 0 and self.wraps is not None else used


@dataclass(frozen=True)
class EnergyMeter:
    """counters: read together and added up; none: the machine does not tell. source: of what they
    are, or why there are none.
    """

    counters: tuple[Counter, ...]
    source: str

    def begin(self) -> tuple[float, ...]:
        return tuple(counter.joules() for counter in self.counters)

    def since(self, before: Sequence[float]) -> float | None:
        """Joules since `begin`; None: nobody tells."""
        if not self.counters:
            return None
        return sum(c.since(b) for c, b in zip(self.counters, before, strict=True))


def meter_of(device: torch.device) -> EnergyMeter:
    """That of the device, everything on it included, whoever uses it."""
    if device.type == "cuda":
        return _of_gpu(device)
    return _of_packages(POWERCAP)


def _of_packages(folder: Path) -> EnergyMeter:
    """RAPL: microjoules of every package, which only root may read on most machines
    (CVE-2020-8694).
    """
    counters = []
    for package in sorted(folder.glob(PACKAGE)):
        if package.name.count(":") > 1:
            continue

        def joules(path: Path = package / "energy_uj") -> float:
            return int(path.read_text()) / 1e6

        try:
            joules()
            most = int((package / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError) as error:
            return EnergyMeter((), f"not reported: {package} cannot be read ({error})")
        counters.append(Counter(joules, most))
    if not counters:
        return EnergyMeter((), "not reported: this machine has no counters of RAPL")
    return EnergyMeter(tuple(counters), f"RAPL, {len(counters)} packages, all that they do")


def _of_gpu(device: torch.device) -> EnergyMeter:
    """NVML's millijoules since the driver was loaded, of Volta and later."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return EnergyMeter((), f"not reported: {LIBRARY} cannot be loaded ({error})")
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return _of_nvml(library, uuid)


def _of_nvml(library: Any, uuid: str) -> EnergyMeter:
    """Of the GPU with this identity: torch's numbers are not NVML's where some are hidden."""
    handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = (uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode()

    def call(step: str, *arguments: Any) -> None:
        if code := int(getattr(library, step)(*arguments)):
            raise OSError(f"{step} ended with NVML's code {code}")

    def joules() -> float:
        call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(used))
        return used.value / 1e3

    try:
        call("nvmlInit_v2")
        call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(handle))
        joules()
    except OSError as error:
        return EnergyMeter((), f"not reported: {error}")
    return EnergyMeter((Counter(joules),), "NVML's counter of the GPU, all that it does")
