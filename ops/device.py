"""Peak rates of devices by name, for MFU and rooflines: dense matrix throughput, not the sparse figure."""

from __future__ import annotations

# name fragment: (dense bf16 TFLOP/s, memory bandwidth in TB/s); vendors' data sheets. Longer names first.
_DEVICES = {
    "GB200": (2500.0, 8.0), "B200": (2250.0, 8.0), "H200": (989.4, 4.8), "H100 PCIe": (756.0, 2.0),
    "H100": (989.4, 3.35), "A100-SXM4-40GB": (312.0, 1.555), "A100": (312.0, 2.039), "L40S": (362.0, 0.864),
}


def _find(name: str) -> tuple[float, float] | None:
    return next((rates for fragment, rates in _DEVICES.items() if fragment in name), None)


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name (torch.cuda.get_device_name); None where unknown."""
    rates = _find(name)
    return None if rates is None else rates[0]


def memory_bandwidth_tbs(name: str) -> float | None:
    """Memory bandwidth in TB/s; None where unknown."""
    rates = _find(name)
    return None if rates is None else rates[1]
