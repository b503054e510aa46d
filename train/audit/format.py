"""What a record of the audit log is, in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ops.router import Reason
from train.audit.files import EXPERT, HEADER

FORMAT = 1
FOLDER = "audit"
"""Where the audit lives in a run directory."""
FLAGGED = 255 & ~int(Reason.OVERRIDDEN | Reason.FROZEN)
"""Reasons that single out a token; the other two concern every token of a layer."""
MAX_WAITING = 256
"""Micro-batches that may wait for the disk; later ones are lost (and counted), since training does
not wait.
"""
DESCRIPTION = {
    "step": "optimisation step, from 1",
    "token": "low 32 bits of the token id, sample * seq_len + position",
    "layer": "index of the transformer layer",
    "k": "experts that follow",
    "reasons": "bits, see reasons",
    "margin": "score of the last selected minus that of the first not selected",
    "entropy": "nats, of the softmax",
    "expert": "index of the expert, best first",
    "gate": "code of the weight: 0 is 0, any other 2 ** ((code - 192) / 32)",
}


def reason_names(bits: int) -> list[str]:
    """Names in lower case of the reasons in a byte of RouterOutput.reasons."""
    return [str(reason.name).lower() for reason in Reason if bits & reason]


def is_sampled(token_ids: np.ndarray, one_in: int | np.ndarray) -> np.ndarray:
    """[T] int64 -> [T] bool: splitmix64 of the id is a multiple of one_in (an int, or [T])."""
    x = np.atleast_1d(token_ids).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sampled: np.ndarray = (x ^ (x >> np.uint64(31))) % np.asarray(one_in, dtype=np.uint64) == 0
    return sampled


def gate_code(gates: np.ndarray) -> np.ndarray:
    """Gates -> uint8, 32 steps per factor of two, exact to 1.1% between 0.016 and 3.9 and clipped
    outside; 0 stays 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        code = np.clip(np.rint(192 + 32 * np.log2(gates)), 1, 255)
    return np.where(gates > 0, code, 0).astype(np.uint8)


def gate_value(code: np.ndarray) -> np.ndarray:
    """uint8 -> float32, the inverse of gate_code."""
    return np.where(code > 0, np.exp2((code.astype(np.float32) - 192) / 32), 0).astype(np.float32)


def _ragged(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices starts[i] .. starts[i] + counts[i] - 1 of all rows behind one another, and the rows'
    offsets [N + 1].
    """
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
    return np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1]), offsets


def encode(header: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray) -> bytes:
    """Records one after another.

    Args:
        header: [N] of dtype HEADER; k is filled in here.
        expert_ids: [N, K] int, -1 where unused.
        gates: [N, K] float32.
    """
    used = expert_ids >= 0
    header["k"] = counts = used.sum(1)
    experts = np.empty(int(counts.sum()), EXPERT)
    experts["expert"], experts["gate"] = expert_ids[used], gate_code(gates[used])
    sizes = HEADER.itemsize + EXPERT.itemsize * counts
    starts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), np.uint8)
    out[starts[:, None] + np.arange(HEADER.itemsize)] = header.view(np.uint8).reshape(
        len(header), HEADER.itemsize
    )
    out[_ragged(starts + HEADER.itemsize, EXPERT.itemsize * counts)[0]] = experts.view(np.uint8)
    return out.tobytes()


def _format(moe_layers: tuple[int, ...]) -> dict[str, Any]:
    def described(dtype: np.dtype) -> list[dict[str, str]]:
        kinds = {name: dtype[name].newbyteorder("=").name for name in dtype.names or ()}
        return [
            {"name": name, "type": kind, "meaning": DESCRIPTION[name]}
            for name, kind in kinds.items()
        ]

    return {
        "version": FORMAT,
        "byte_order": "little",
        "record": described(HEADER),
        "then_k_times": described(EXPERT),
        "reasons": {name: int(reason) for reason in Reason for name in reason_names(reason)},
        "sample": "splitmix64(token id) % sample_one_in == 0, sample_one_in as in steps.jsonl",
        "moe_layers": list(moe_layers),
    }
