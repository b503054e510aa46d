"""The random streams of a process as plain data: saved with every checkpoint, one file per rank."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.files.manifest import CheckpointError, read_json


def rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators of this process as plain data."""
    python = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    state = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.json"


def restore_rng(checkpoint: Path, rank: int, world_size: int, saved_world_size: int) -> bool:
    """Continue this rank's random streams. Returns False, and leaves them as seeded, when the
    number of ranks has changed.

    Raises:
        CheckpointError: the saved state is missing or damaged.
    """
    if world_size != saved_world_size:
        return False
    state = read_json(checkpoint / rng_file(rank))
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_decode(state["torch"]))
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state(_decode(state["cuda"]))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint / rng_file(rank)} holds no random state "
            f"({type(error).__name__}); use another checkpoint"
        ) from error
    return True


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
