"""Fair timing, rooflines and one JSON format for every bench.

`python -m bench.<name> [--device cpu|cuda] [--json FILE]`; the last line of stdout is one JSON
object with the rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ops.device import memory_bandwidth_tbs, peak_tflops
from train.files.strict_json import dumps

L2_BYTES = 256 * 2**20  # writing this much evicts the L2 cache of any current device
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One measured operation. ratio: time of the best rival over ours, so above 1 we are faster."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    device: str
    commit: str
    ours_ms: float
    rivals: dict[str, float]
    ratio: float | None
    roofline_fraction: float | None
    extra: dict[str, float | str | None]


def find_commit() -> str:
    """$COMMIT where set (machines without the git directory), else HEAD, marked when files differ
    from it.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]

    def git(*command: str) -> str:
        return subprocess.run(
            ("git", *command), cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def roofline_ms(device: torch.device, flops: float, num_bytes: float) -> float | None:
    """Least time for dense bf16 matrix work and memory traffic; None where the device's rates are
    unknown.
    """
    peak, bandwidth = peak_tflops(device_name(device)), memory_bandwidth_tbs(device_name(device))
    return (
        None
        if peak is None or bandwidth is None
        else max(flops / peak, num_bytes / bandwidth) / 1e9
    )


def measure(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    flush_cache: bool = True,
) -> dict[str, float]:
    """Median milliseconds of each function. One call of each per round, in rotating order, so drift
    hits all alike.
    """
    for function in functions.values():
        for _ in range(2):
            function()
    scratch = (
        torch.empty(L2_BYTES, dtype=torch.int8, device=device)
        if device.type == "cuda" and flush_cache
        else None
    )
    names, samples = list(functions), {name: [] for name in functions}
    for round_ in range(repeats):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            if device.type == "cuda":
                if scratch is not None:
                    scratch.zero_()
                start, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                start.record()
                functions[name]()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                functions[name]()
                samples[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in samples.items()}


def profile(function: Callable[[], object]) -> tuple[int, list[tuple[str, float]]]:
    """Of one call, by torch's profiler: the calls that wait for the device; kernels, fills and
    copies, each launch, with its milliseconds. CUDA only.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[*torch.profiler.supported_activities()]) as profiler:
        with torch.profiler.record_function("measured"):
            function()
        torch.cuda.synchronize()
    events = profiler.events()
    whole = next(
        e.time_range
        for e in events
        if e.name == "measured" and e.device_type == torch.autograd.DeviceType.CPU
    )
    waits = [
        e for e in events if e.name in WAITS and whole.start <= e.time_range.start <= whole.end
    ]
    return len(waits), [
        (e.name, e.time_range.elapsed_us() / 1e3)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]


def make_row(
    op: str,
    shape: dict[str, int | str],
    dtype: torch.dtype,
    device: torch.device,
    times: dict[str, float],
    bound_ms: float | None,
    **extra: float | str | None,
) -> Row:
    """times: milliseconds, under "ours" and the names of the rivals. The bound holds for bf16
    only.
    """
    rivals = {name: round(ms, 4) for name, ms in times.items() if name != "ours"}
    ours = times["ours"]
    fraction = bound_ms / ours if bound_ms is not None and dtype == torch.bfloat16 else None
    row = Row(
        op,
        shape,
        str(dtype).removeprefix("torch."),
        device_name(device),
        find_commit(),
        round(ours, 4),
        rivals,
        round(min(rivals.values()) / ours, 3) if rivals else None,
        None if fraction is None else round(fraction, 4),
        extra,
    )
    print(
        f"{op} {' '.join(f'{k}={v}' for k, v in shape.items())} {row.dtype}: {row.ours_ms} ms; "
        f"rivals {rivals}; "
        f"ratio {row.ratio}; roofline {row.roofline_fraction} {extra}",
        flush=True,
    )
    return row


def main(name: str, run: Callable[[torch.device], list[Row]]) -> None:
    """Command line of a bench."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    rows = run(torch.device(arguments.device))
    text = dumps({"bench": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]})
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text, flush=True)
