"""A NaN or infinite loss or gradient: where it began, and the batch that made it, kept for a look
at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.data.loader import Batch
from train.files.strict_json import dumps


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or infinite. No update was applied, no checkpoint was written."""

    on_all_ranks = True


def describe(
    step: int,
    grad_norm: float,
    losses: Sequence[float],
    batches: Sequence[Batch],
    samples: tuple[int, int],
    run_dir: Path,
) -> str:
    """Write RUN/failures/step-<step>/rank-<rank>.json of every suspected rank; returns one line.
    Collective.

    Ranks with a non-finite loss are the suspects; when every loss is finite the gradient broke, and
    all are.

    Args:
        losses: of this rank's micro-batches, in nats summed over targets; samples: first and last
            of the global batch.
    """
    broken = [i for i, loss in enumerate(losses) if not torch.isfinite(torch.tensor(loss))]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, broken)
    ranks = [rank for rank, found in enumerate(everyone) if found]
    folder = run_dir / "failures" / f"step-{step:08d}"
    if not ranks or broken:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "step": step,
            "grad_norm": str(grad_norm),
            "samples": samples,
            "micro_batches": [
                {
                    "loss_sum": str(loss),
                    "input_ids": batch.input_ids.tolist(),
                    "targets": batch.targets.tolist(),
                    "token_ids": None if batch.token_ids is None else batch.token_ids.tolist(),
                }
                for i, (loss, batch) in enumerate(zip(losses, batches, strict=True))
                if not ranks or i in broken
            ],
        }
        (folder / f"rank-{dist.get_rank():05d}.json").write_text(dumps(record))
    where = (
        f"loss on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if ranks
        else "gradient on some rank"
    )
    return (
        f"non-finite {where} at step {step} (gradient norm {grad_norm}, samples "
        f"{samples[0]}..{samples[1]}); the "
        f"batch is in {folder}, no update was applied"
    )
