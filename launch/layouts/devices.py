"""What layouts are searched for: nodes of devices by data sheets, and how much of those numbers a
run is taken to reach. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.job.fit import Device, device_of
from ops.device import link_rates
from train.config.commands.plan import NODE_SIZE

LINKS = 0.7
"""Share of a link's rate that collectives reach."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of device."""

    device: Device
    flops: float
    """Per second, of bf16 products, as far as a step reaches the peak."""
    within: float
    """Bytes per second from a device to others of its node."""
    between: float
    """Bytes per second from a device to other nodes."""
    per_node: int = NODE_SIZE


def cluster_of(name: str, mfu: float) -> Cluster:
    """Of a device whose links are known. mfu: share of its peak that a step reaches."""
    device, links = device_of(name), link_rates(name)
    assert device is not None and device.tflops is not None and links is not None, name
    within, between = (1e9 * rate for rate in links)
    return Cluster(device, device.tflops * 1e12 * mfu, within, between)
