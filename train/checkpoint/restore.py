"""All ranks together load the newest whole checkpoint: what it takes to trust it is done while it
is loaded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.checkpoint import verification
from train.checkpoint.background import Background
from train.checkpoint.folder import (
    candidates,
    damage_but_tensors,
    no_usable_checkpoint,
    read_state,
    updates_before,
    updates_of,
)
from train.checkpoint.reader import fill_engine
from train.checkpoint.verification import Files, Outcome
from train.engine.deepspeed import Engine
from train.files.manifest import CheckpointError, require_owned
from train.rank.runtime import from_rank_zero

log = logging.getLogger("loadstone")


@dataclass(frozen=True)
class _Share:
    """What one rank has seen of a checkpoint."""

    outcome: Outcome
    """What its look at the files has found."""
    error: str | None
    """Why it could not be loaded; None: it could."""


def restore(engine: Engine, run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Load the newest complete and undamaged checkpoint of a run into the engine. Returns its
    folder and state.json. Collective.

    The small files are verified first, on rank 0. The ranks share out the tensors' files and hash
    them in a thread while they load; nobody goes on before all files are known to be whole. A
    damaged checkpoint is named in the log and the one before is loaded over it.

    Raises:
        CheckpointError: on every rank: there is no such checkpoint, it is not ours, of another
            model or of a later version.
    """
    reasons: list[str] = []
    for checkpoint in from_rank_zero(lambda: candidates(run_dir)):

        def look(checkpoint: Path = checkpoint) -> tuple[str | None, Files, list[str]]:
            require_owned(checkpoint)
            return damage_but_tensors(checkpoint)

        # Small files first: whether a checkpoint is worth loading is known without its tensors.
        found, files, names = from_rank_zero(look)
        if found is None:
            state = read_state(checkpoint)
            found = _load(engine, checkpoint, state, files, names)
            if found is None:
                engine.finish_scatter()
                return checkpoint, state

        reasons.append(f"{checkpoint.name}: {found}")
        if dist.get_rank() == 0:
            log.warning("checkpoint %s is damaged (%s); trying the one before", checkpoint, found)
    raise no_usable_checkpoint(run_dir, reasons)


def _load(
    engine: Engine, checkpoint: Path, state: dict[str, Any], files: Files, names: list[str]
) -> str | None:
    """Load and verify at once. Returns what is damaged, or None when all is well. Collective.

    Args:
        state: its state.json.

    Raises:
        CheckpointError: on every rank: the files are whole, and still some rank could not load
            them.
    """
    mine = Outcome()

    def hash_share() -> None:
        nonlocal mine
        mine = verification.verify(
            checkpoint, files, verification.share(names, dist.get_rank(), dist.get_world_size())
        )

    # Hashing reads the same files, which the system then has in memory: together costs one reading.
    error: CheckpointError | None = None
    hashing = Background("verify")
    hashing.start(hash_share)
    try:
        fill_engine(engine, checkpoint, updates_of(state), updates_before(state))
    except CheckpointError as problem:
        error = problem
    hashing.wait()

    # Damage on one rank explains errors on all others, so it is looked for first.
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, _Share(mine, None if error is None else str(error)))
    found: str | None = next(
        (share.outcome.damage for share in shares if share.outcome.damage is not None), None
    )
    if found is not None:
        return found

    reason = next((share.error for share in shares if share.error is not None), None)
    if reason is not None:
        raise CheckpointError(reason) from error

    if dist.get_rank() == 0:
        verification.remember(checkpoint, files, [share.outcome for share in shares])
    return None
