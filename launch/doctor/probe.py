"""Questions to torch, in a process of their own, so that a crash or a hang is an answer, too. One
JSON object on stdout.

    python -m launch.doctor.probe facts    # torch, its devices, DeepSpeed, our kernels
    python -m launch.doctor.probe ranks    # one of two ranks that add up a number over gloo

For the second RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any

from train.files.strict_json import dumps

RENDEZVOUS_SECONDS = 12.0


def facts() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "devices": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found["devices"].append(_device(torch, index))
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["deepspeed"], found["deepspeed_ops"] = _deepspeed()
    found["kernels"] = _kernels()
    return found


def _device(torch: Any, index: int) -> dict[str, Any]:
    """Name, bytes of memory and of it free, and what went wrong when it was asked to add."""
    device: dict[str, Any] = {"name": torch.cuda.get_device_name(index), "error": None}
    try:
        torch.ones(8, device=f"cuda:{index}").sum().item()
        device["free"], device["memory"] = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        device["error"] = str(error).splitlines()[0]
    return device


def _deepspeed() -> tuple[str | None, list[str]]:
    """Why DeepSpeed cannot be imported (None: it can), and the ops it could compile here."""
    try:
        from train.engine.library import import_deepspeed

        deepspeed = import_deepspeed()
        return None, sorted(
            name for name, compatible in deepspeed.ops.__compatible_ops__.items() if compatible
        )
    except Exception as error:
        # it inspects compilers and devices on import, and raises what it likes
        return f"{type(error).__name__}: {error}", []


def _kernels() -> dict[str, Any]:
    """Folder of compiled kernels; library -> whether the newest is younger than its sources; how
    many Triton kernels have been compiled ahead of time.
    """
    from ops.compile.cuda import ROOT, cache_folder

    folder, libraries = cache_folder(), {}
    rooms = {"router": "router", "router_cuda": "router", "attention": "sparse_attention"}
    for name, room in rooms.items():
        newest = max(path.stat().st_mtime for path in (ROOT / room / "csrc").iterdir())
        built = [path.stat().st_mtime for path in folder.glob(f"{name}-*.so")]
        libraries[name] = bool(built) and max(built) > newest
    return {
        "folder": str(folder),
        "libraries": libraries,
        "triton": len(list((folder / "triton").glob("*.json"))),
    }


def ranks() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    began = time.monotonic()
    dist.init_process_group("gloo", timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
    met = time.monotonic()
    total = torch.full((2**18,), float(dist.get_rank() + 1))  # 1 MiB
    dist.all_reduce(total)
    found = {
        "sum": float(total[-1]),
        "meet_ms": 1e3 * (met - began),
        "reduce_ms": 1e3 * (time.monotonic() - met),
    }
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    answer = facts() if sys.argv[1] == "facts" else ranks()
    print(dumps(answer), flush=True)
    os._exit(0)  # a driver or library that hangs at exit has said all that was asked
