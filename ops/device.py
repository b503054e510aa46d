"""Peak rates and memory of devices by name, for MFU, rooflines and plans: dense matrix throughput,
not the sparse figure.
"""

from __future__ import annotations

import re

# name fragment: (dense bf16 TFLOP/s, memory bandwidth in TB/s, memory in GiB), by vendors' data
# sheets. Longer names first.
_DEVICES = {
    "GB200": (2500.0, 8.0, 186.0),
    "B200": (2250.0, 8.0, 180.0),
    "H200": (989.4, 4.8, 141.0),
    "H100 PCIe": (756.0, 2.0, 80.0),
    "H100": (989.4, 3.35, 80.0),
    "A100-SXM4-40GB": (312.0, 1.555, 40.0),
    "A100": (312.0, 2.039, 80.0),
    "L40S": (362.0, 0.864, 48.0),
}
# (GB/s within a node, GB/s between nodes) of a device in one direction: NVLink, and a network card
# of 200 (A100) or 400 Gbit/s for each device, in nodes of eight.
_LINKS = {
    "B200": (900.0, 50.0),
    "H200": (450.0, 50.0),
    "H100": (450.0, 50.0),
    "A100-SXM4-40GB": (300.0, 25.0),
    "A100": (300.0, 25.0),
}


def _known(name: str) -> str | None:
    """What this file calls a device; H1000 is no H100."""
    return next((f for f in _DEVICES if re.search(re.escape(f) + r"(?!\d)", name, re.I)), None)


def _find(name: str) -> tuple[float, float, float] | None:
    known = _known(name)
    return None if known is None else _DEVICES[known]


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name (torch.cuda.get_device_name); None where
    unknown.
    """
    rates = _find(name)
    return None if rates is None else rates[0]


def memory_bandwidth_tbs(name: str) -> float | None:
    """Memory bandwidth in TB/s; None where unknown."""
    rates = _find(name)
    return None if rates is None else rates[1]


def memory_gib(name: str) -> float | None:
    """Memory in GiB; None where unknown."""
    rates = _find(name)
    return None if rates is None else rates[2]


def link_rates(name: str) -> tuple[float, float] | None:
    """GB/s in one direction, of a device to others of its node and to other nodes; None where
    unknown.
    """
    return _LINKS.get(_known(name) or "")


def known_devices() -> tuple[str, ...]:
    """Names that this file knows."""
    return tuple(_DEVICES)
