"""How the same held-out tokens are routed from one evaluation to the next: rank 0's first batch of
the held-out split.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from model.loss import IGNORE_INDEX
from train.data.loader import Batch
from train.data.store import ValidationRows

log = logging.getLogger("loadstone")
FOLDER = "probe"
MAX_TOKENS = 4096
MAX_KEPT = 128
"""Files that are kept; of more, every second of the older half goes. Each is compared with the one
before it when it is made, and its metrics stay.
"""
FREQUENCY_ROWS = 4096
"""Held-out rows that token frequencies are counted in."""
DECILES = 10


class RoutingProbe:
    """RUN/probe/step-<step>.npz: expert_ids [layers, tokens, slots] int16 (-1 unused), token
    [tokens] int32 (what is there), loss [tokens] fp32 nats (NaN where nothing is predicted).
    """

    def __init__(self, run_dir: Path, rows: ValidationRows, vocab_size: int):
        self.folder = run_dir / FOLDER
        self.rows, self.vocab_size = rows, vocab_size
        self._frequency: np.ndarray | None = None
        self._found: dict[str, np.ndarray] | None = None

    def add(self, batch: Batch, expert_ids: torch.Tensor, token_losses: torch.Tensor) -> None:
        """Keep the first batch since the last `measure`. expert_ids: [L, B * S, K] of all MoE
        layers, -1 for a slot without an expert; token_losses: [B, S].
        """
        if self._found is not None or not len(expert_ids):
            return
        live = (
            np.ones(batch.targets.numel(), bool)
            if batch.token_mask is None
            else batch.token_mask.numpy().reshape(-1)
        )
        live = np.flatnonzero(live)[:MAX_TOKENS]
        ids = expert_ids[:, torch.from_numpy(live).to(expert_ids.device)]
        loss = token_losses.float().cpu().numpy().reshape(-1)[live]
        targets = batch.targets.numpy().reshape(-1)[live]
        self._found = {
            "expert_ids": ids.cpu().numpy().astype(np.int16),
            "token": batch.input_ids.numpy().reshape(-1)[live].astype(np.int32),
            "loss": np.where(targets == IGNORE_INDEX, np.nan, loss).astype(np.float32),
        }

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of the kept batch, which is written down; {} without one.

        eval/router_stability: share of a token's experts that it had at the evaluation before, mean
        over tokens and layers. eval/experts_per_token/frequency_<d>, loss_<d>: mean experts of the
        tokens in decile d of frequency in held-out text (0: the rarest) and of loss (0: the
        easiest); where tokens differ in their number of experts.
        """
        if self._found is None:
            return {}
        found, self._found = self._found, None
        scalars: dict[str, float] = {}
        before = self._before(step, found["token"])
        if before is not None and before.shape[:2] == found["expert_ids"].shape[:2]:
            scalars["eval/router_stability"] = overlap(found["expert_ids"], before)
        chosen = (found["expert_ids"] >= 0).sum(2)
        if chosen.size and chosen.min() != chosen.max():
            per_token = chosen.mean(0)
            orders = {
                "frequency": self.frequency()[found["token"]].astype(np.float64),
                "loss": found["loss"],
            }
            for name, values in orders.items():
                known = np.flatnonzero(~np.isnan(values))
                ranked = known[np.argsort(values[known], kind="stable")]
                for d, part in enumerate(np.array_split(ranked, DECILES)):
                    if len(part):
                        scalars[f"eval/experts_per_token/{name}_{d}"] = float(
                            per_token[part].mean()
                        )
        self.folder.mkdir(exist_ok=True)
        scratch = self.folder / ".writing.npz"
        np.savez_compressed(scratch, **found)  # type: ignore[arg-type]
        scratch.replace(self.folder / f"step-{step:08d}.npz")
        kept = sorted(self.folder.glob("step-*.npz"), key=lambda path: int(path.stem[5:]))
        if len(kept) > MAX_KEPT:
            for path in kept[1 : len(kept) // 2 : 2]:
                path.unlink(missing_ok=True)
        return scalars

    def frequency(self) -> np.ndarray:
        """[vocabulary] int64: how often a token stands in the held-out rows (training samples are
        opened collectively).
        """
        if self._frequency is None:
            counts = np.zeros(self.vocab_size, np.int64)
            for row in range(min(len(self.rows), FREQUENCY_ROWS)):
                counts += np.bincount(self.rows.tokens(row), minlength=self.vocab_size)[
                    : self.vocab_size
                ]
            self._frequency = counts
        return self._frequency

    def _before(self, step: int, tokens: np.ndarray) -> np.ndarray | None:
        """Of the newest earlier evaluation; None: there is none, it was of other tokens (another
        layout of ranks shares out rows differently), or its file is damaged, which costs a
        comparison.
        """
        earlier = [
            p
            for p in sorted(self.folder.glob("step-*.npz"))
            if p.stem[5:].isdigit() and int(p.stem[5:]) < step
        ]
        if not earlier:
            return None
        try:
            saved = np.load(earlier[-1], allow_pickle=False)
            ids: np.ndarray = saved["expert_ids"]
            if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
                raise TypeError(f"{ids.dtype} of shape {ids.shape}")
            return ids if np.array_equal(saved["token"], tokens) else None
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            zlib.error,
            zipfile.BadZipFile,
            NotImplementedError,
        ) as error:
            log.warning(
                "%s cannot be read (%s): this evaluation is not compared with it",
                earlier[-1],
                type(error).__name__,
            )
            return None


def overlap(now: np.ndarray, before: np.ndarray) -> float:
    """Mean of |now & before| / |now| over layers and tokens that visit an expert now; [layers,
    tokens, slots] each.
    """
    same = ((now[..., :, None] == before[..., None, :]) & (now[..., :, None] >= 0)).any(-1).sum(-1)
    visits = (now >= 0).sum(-1)
    return float((same[visits > 0] / visits[visits > 0]).mean()) if (visits > 0).any() else 1.0
