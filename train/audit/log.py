"""The routing audit log: which tokens went to which experts, and why. Written in the background,
read by launch.audit.

RUN/audit holds
    format.json             what stands in the other files, for readers without this one
    records-<rank>.bin      a record per token and MoE layer: HEADER (16 bytes), then EXPERT
                            (3 bytes) per expert
    steps.jsonl             by rank 0: a step, its first token id, the checksum of its whole routing
                            per layer
    dropped-<rank>.jsonl    by the other ranks: steps in which they left something out

The tokens are those whose hashed id falls on one in sample_one_in, the same in every layer and
under every layout, and besides them those with a reason (ops/router/spec.py), unless the reason
concerns the whole layer. So statistics must be taken over the sample (AuditRecords.sampled) and not
over all records.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ops.router import RouterOutput
from train.audit.files import HEADER, RecordFile, cut_records_after
from train.audit.format import FLAGGED, MAX_WAITING, _format, encode, is_sampled
from train.config.watching import AuditConfig
from train.files.durable import write_text
from train.files.log_file import LogFile, Record
from train.files.sizes import MIB
from train.files.strict_json import dumps

log = logging.getLogger("loadstone")
LINES_SHARE = 0.125
"""Of audit.max_mib: what steps.jsonl may take, and of a rank's share its dropped-<rank>.jsonl."""


class _MicroBatch(NamedTuple):
    """What the background thread needs of a micro-batch, on the host once `ready` has happened."""

    step: int
    """Its optimiser step."""
    token_ids: np.ndarray
    """[T] int64."""
    rows: torch.Tensor
    """[L, n, 4 + 2K] int32: token index, reasons, margin, entropy, K experts, K gates (bits of
    fp32).
    """
    num_sampled: int
    """The first rows are the sample, the others the flagged tokens and filling."""
    num_flagged: torch.Tensor
    """[L] int64."""
    ready: torch.cuda.Event | None
    """Happens when the copies to the host are done; None: they were never on a device."""


class _StepEnd(NamedTuple):
    """What the background thread needs to close a step."""

    step: int
    """Its number."""
    first_token: int
    """Id of the step's first token."""
    checksums: torch.Tensor | None
    """Per MoE layer, on the host once `ready` has happened; None: none were asked for."""
    lost: int
    """How many micro-batches were left out because the thread was behind."""
    ready: torch.cuda.Event | None
    """Happens when the copy to the host is done; None: it was never on a device."""


class AuditLog:
    """Writes the audit of one rank. Nothing here waits for the device or the disk, and no error of
    the background thread ends the run: it is logged once and the audit is off from then on.

    Args:
        folder: RUN/audit, on a file system that all ranks share.
        moe_layers: transformer layer index of every layer with experts; own: which of them, by
            their places among these, add() gets routings of, on a stage of a pipeline not all.
        resume_step: what later steps left in the files is dropped, since it is about to be written
            again, and so is a record torn by a crash. None: the audit begins anew.
        num_ranks: ranks that write; None: those of torch.distributed. Files of ranks that are no
            more are shared out.
        borders: see train.files.log_file.LogFile.
    """

    def __init__(
        self,
        folder: Path,
        settings: AuditConfig,
        moe_layers: tuple[int, ...],
        rank: int,
        resume_step: int | None = None,
        num_ranks: int | None = None,
        borders: Callable[[], Iterable[int]] = lambda: (),
        own: Sequence[int] | None = None,
    ):
        assert settings.sample_one_in > 0, "the audit is off"
        if num_ranks is None:
            num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.folder = folder
        self.settings = settings
        self.moe_layers = moe_layers
        self.own_layers = moe_layers if own is None else tuple(moe_layers[row] for row in own)
        self.rank = rank
        self._queue: queue.SimpleQueue[_MicroBatch | _StepEnd | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._off = threading.Event()
        self._lost = 0  # micro-batches since the last step
        # flagged tokens beyond the cap since the last step; the thread's
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="routing-audit", daemon=True)
        self._borders = borders
        try:
            self._prepare(-1 if resume_step is None else resume_step, num_ranks)
            self._thread.start()
        except Exception as error:
            self._give_up(error)

    def add(
        self,
        step: int,
        token_ids: torch.Tensor,
        token_mask: torch.Tensor | None,
        routings: tuple[RouterOutput, ...],
    ) -> None:
        """One micro-batch of this rank.

        step: the step it belongs to, from 1. token_ids: [B, S] int64 on the host. token_mask: [B,
            S] bool on the host, False for padding. routings: one per own MoE layer, of B * S
            tokens.
        """
        if self._off.is_set() or not self.own_layers:
            return
        if self._queue.qsize() >= MAX_WAITING:
            self._lost += 1
            return

        assert len(routings) == len(self.own_layers), (len(routings), self.own_layers)
        ids = token_ids.reshape(-1).numpy()
        live = (
            np.ones(len(ids), dtype=bool) if token_mask is None else token_mask.reshape(-1).numpy()
        )

        # Padding is never sampled, and takes no room among the flagged tokens either.
        sampled = live & is_sampled(ids, self.settings.sample_one_in)
        rows, num_flagged = _selected(
            routings,
            torch.from_numpy(np.flatnonzero(sampled)),
            torch.from_numpy(live & ~sampled),
            self.settings.max_flagged,
        )
        device = rows.device
        self._queue.put(
            _MicroBatch(
                step, ids, _to_host(rows), int(sampled.sum()), _to_host(num_flagged), _event(device)
            )
        )

    def end_step(
        self, step: int, first_token: int, checksums: torch.Tensor | list[int] | None
    ) -> None:
        """Close a step, on every rank. first_token: the lowest token id of the step over all ranks.

        checksums: [L] int64, RouterOutput.checksum per MoE layer summed over the whole step; on
            rank 0. A tensor may still be on its way on the device.
        """
        if self._off.is_set():
            return
        sums = None if checksums is None else torch.as_tensor(checksums, dtype=torch.int64)
        ready = None if sums is None else _event(sums.device)
        self._queue.put(
            _StepEnd(step, first_token, None if sums is None else _to_host(sums), self._lost, ready)
        )
        self._lost = 0

    def flush(self, timeout: float = 10.0) -> None:
        """Wait until everything so far is with the operating system, so that a killed process loses
        none of it.
        """
        written = threading.Event()
        self._queue.put(written)
        deadline = time.monotonic() + timeout
        while not written.wait(0.02) and self._thread.is_alive() and time.monotonic() < deadline:
            pass

    def close(self) -> None:
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)
            if self._thread.is_alive():
                log.warning(
                    "routing audit: the disk under %s does not answer; the last records are lost",
                    self.folder,
                )

    def _prepare(self, resume_step: int, num_ranks: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        limit = self.settings.max_mib * MIB
        of_rank = -(-limit // num_ranks)

        # Ranks of an earlier start may have been more: their files are shared out among those of
        # today.
        for path in self.folder.glob("records-*.bin"):
            if int(path.stem.split("-")[1]) % num_ranks == self.rank:
                cut_records_after(path, resume_step)

        own = "steps.jsonl" if self.rank == 0 else f"dropped-{self.rank:05d}.jsonl"
        for path in self.folder.glob("dropped-*.jsonl"):
            if int(path.stem.split("-")[1]) % num_ranks == self.rank and path.name != own:
                LogFile(path, resume_step).close()

        # Rank 0's lines have a checksum per layer for every step: they get a part of all that there
        # is, not of its share.
        self._lines = LogFile(
            self.folder / own,
            resume_step,
            int(LINES_SHARE * (limit if self.rank == 0 else of_rank)),
            _merge_steps,
            borders=self._borders,
        )
        if self.rank == 0:
            write_text(
                self.folder / "format.json", dumps(_format(self.moe_layers), indent=1) + "\n"
            )
        self._records = RecordFile(
            self.folder / f"records-{self.rank:05d}.bin", int((1 - LINES_SHARE) * of_rank)
        )

    def _work(self) -> None:
        try:
            with closing(self._records), closing(self._lines):
                while (item := self._queue.get()) is not None:
                    if isinstance(item, threading.Event):
                        self._records.flush()
                        item.set()
                        continue
                    if item.ready is not None:
                        item.ready.synchronize()
                    if isinstance(item, _MicroBatch):
                        self._records.write(self._encode(item))
                    else:
                        # before the line that says the step is complete
                        self._records.end_step()
                        self._write_line(item)
        except Exception as error:
            self._give_up(error)

    def _encode(self, batch: _MicroBatch) -> bytes:
        rows, flagged = batch.rows.numpy(), batch.num_flagged.numpy()
        num_layers, num_rows, width = rows.shape
        self._dropped += int(np.maximum(flagged - self.settings.max_flagged, 0).sum())
        # behind them is filling
        kept = np.arange(num_rows) < batch.num_sampled + flagged[:, None]
        layer, index = kept.nonzero()[0], rows[..., 0][kept]
        order = np.lexsort((index, layer))
        layer = layer[order]
        index = index[order]
        rows = rows[kept][order]
        header = np.zeros(len(rows), HEADER)
        header["step"], header["layer"] = batch.step, np.array(self.own_layers)[layer]
        header["token"] = (batch.token_ids[index] & 0xFFFFFFFF).astype(np.uint32)
        header["reasons"] = rows[:, 1]
        limit = float(np.finfo(np.float16).max)
        header["margin"], header["entropy"] = (
            rows[:, 2:4].copy().view(np.float32).clip(-limit, limit).T
        )
        slots = (width - 4) // 2
        return encode(header, rows[:, 4 : 4 + slots], rows[:, 4 + slots :].copy().view(np.float32))

    def _write_line(self, end: _StepEnd) -> None:
        left_out = {"flagged_dropped": self._dropped, "lost_micro_batches": end.lost}
        self._dropped = 0
        line: dict[str, Any] = {"step": end.step, **left_out}
        if self.rank == 0:
            sums = (
                None
                if end.checksums is None
                else [f"{c & (2**64 - 1):016x}" for c in end.checksums.tolist()]
            )
            line = {
                "step": end.step,
                "first_token": end.first_token,
                "checksums": sums,
                "sample_one_in": self.settings.sample_one_in,
                **left_out,
            }
        elif not any(left_out.values()):
            return
        self._lines.write(line)

    def _give_up(self, error: Exception) -> None:
        self._off.set()
        log.warning(
            "routing audit: switched off (%s: %s); the run goes on", type(error).__name__, error
        )


def _merge_steps(_before: Record | None, earlier: Record, later: Record) -> Record:
    """The later step stays; what was left out adds up."""
    return {
        **later,
        **{name: earlier[name] + later[name] for name in ("flagged_dropped", "lost_micro_batches")},
    }


@torch.no_grad()
def _selected(
    routings: tuple[RouterOutput, ...],
    sampled: torch.Tensor,
    eligible: torch.Tensor,
    max_flagged: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the sampled tokens and of the first flagged ones, on the device and of a size known
    without asking it.

    sampled: [n] int64 token indices; eligible: [T] bool, tokens that may be flagged. Returns
        _MicroBatch.rows with max_flagged rows after the sampled ones, and the number of flagged
        tokens [L] int64.
    """
    device = routings[0].reasons.device
    sampled, eligible = _to_device(sampled, device), _to_device(eligible, device)
    reasons = torch.stack([r.reasons for r in routings])
    flags = (reasons & FLAGGED).ne(0) & eligible
    # The j-th flagged token is the first with j flags up to it. Where there are fewer, anything.
    nth = torch.arange(1, max_flagged + 1, dtype=torch.int32, device=device).repeat(
        len(routings), 1
    )
    so_far = flags.cumsum(1, dtype=torch.int32)
    first = torch.searchsorted(so_far, nth).clamp(max=flags.shape[1] - 1)
    rows = torch.cat((sampled.expand(len(routings), -1), first), dim=1)

    def bits(values: torch.Tensor) -> torch.Tensor:
        return values.float().view(torch.int32)

    per_token = (
        reasons.int(),
        bits(torch.stack([r.margin for r in routings])),
        bits(torch.stack([r.entropy for r in routings])),
    )
    columns = [
        rows.int().unsqueeze(-1),
        *(values.gather(1, rows).unsqueeze(-1) for values in per_token),
    ]

    # One layer at a time: stacking [T, K] of all layers would cost as much memory again as the
    # routing itself.
    experts = torch.stack(
        [r.expert_ids.index_select(0, row) for r, row in zip(routings, rows, strict=True)]
    )
    gates = torch.stack(
        [r.weights.index_select(0, row) for r, row in zip(routings, rows, strict=True)]
    )
    return torch.cat((*columns, experts.int(), bits(gates)), dim=-1), so_far[:, -1].long()


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, into pinned memory where it comes from a GPU: complete once an event recorded now has
    happened.
    """
    return tensor.detach().to("cpu", non_blocking=True, copy=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _known(step: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """[n] bool: the step has a line, or it came after the last one and was cut short."""
    return np.isin(step, lines) | (step > (lines[-1] if len(lines) else 0))
