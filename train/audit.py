"""The routing audit log: which tokens went to which experts, and why. Written in the background, read by launch.audit.

RUN/audit holds
    format.json             what stands in the other files, for readers without this one
    records-<rank>.bin      a record per token and MoE layer: HEADER (16 bytes), then EXPERT (3 bytes) per expert
    steps.jsonl             by rank 0: a step, its first token id, the checksum of its whole routing per layer
    dropped-<rank>.jsonl    by the other ranks: steps in which they left something out

Which tokens: those whose hashed id falls on one in sample_one_in, the same in every layer and under every layout, and
besides them those with a reason (ops/router/spec.py), unless the reason concerns the whole layer. So statistics must be
taken over the sample (AuditRecords.sampled) and not over all records.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ops.router import Reason, RouterOutput
from train.config import AuditConfig
from train.strict_json import dumps

log = logging.getLogger("loadstone")

FORMAT = 1
FOLDER = "audit"
"""Where the audit lives in a run directory."""
HEADER = np.dtype([("step", "<u4"), ("token", "<u4"), ("layer", "<u2"), ("k", "u1"), ("reasons", "u1"),
                   ("margin", "<f2"), ("entropy", "<f2")])
EXPERT = np.dtype([("expert", "<u2"), ("gate", "u1")])
FLAGGED = 255 & ~int(Reason.OVERRIDDEN | Reason.FROZEN)
"""Reasons that single out a token; the other two concern every token of a layer."""
MAX_WAITING = 256
"""Micro-batches that may wait for the disk; later ones are lost (and counted), since training does not wait."""
PIECE = 1 << 22
"""Bytes of a file read at once."""
DESCRIPTION = {
    "step": "optimisation step, from 1", "token": "low 32 bits of the token id, sample * seq_len + position",
    "layer": "index of the transformer layer", "k": "experts that follow", "reasons": "bits, see reasons",
    "margin": "score of the last selected minus that of the first not selected", "entropy": "nats, of the softmax",
    "expert": "index of the expert, best first", "gate": "code of the weight: 0 is 0, any other 2 ** ((code - 192) / 32)",
}


def reason_names(bits: int) -> list[str]:
    """Names in lower case of the reasons in a byte of RouterOutput.reasons."""
    return [str(reason.name).lower() for reason in Reason if bits & reason]


# --- what a record is ------------------------------------------------------------------------------------------------

def is_sampled(token_ids: np.ndarray, one_in: int | np.ndarray) -> np.ndarray:
    """[T] int64 -> [T] bool: splitmix64 of the id is a multiple of one_in (an int, or [T])."""
    x = np.atleast_1d(token_ids).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) % np.asarray(one_in, dtype=np.uint64) == 0


def gate_code(gates: np.ndarray) -> np.ndarray:
    """Gates -> uint8, 32 steps per factor of two, exact to 1.1% between 0.016 and 3.9 and clipped outside; 0 stays 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        code = np.clip(np.rint(192 + 32 * np.log2(gates)), 1, 255)
    return np.where(gates > 0, code, 0).astype(np.uint8)


def gate_value(code: np.ndarray) -> np.ndarray:
    """uint8 -> float32, the inverse of gate_code."""
    return np.where(code > 0, np.exp2((code.astype(np.float32) - 192) / 32), 0).astype(np.float32)


def _ragged(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices starts[i] .. starts[i] + counts[i] - 1 of all rows behind one another, and the rows' offsets [N + 1]."""
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
    return np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1]), offsets


def encode(header: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray) -> bytes:
    """Records one after another.

    header: [N] of dtype HEADER, k is filled in here; expert_ids: [N, K] int, -1 where unused; gates: [N, K] float32.
    """
    used = expert_ids >= 0
    header["k"] = counts = used.sum(1)
    experts = np.empty(int(counts.sum()), EXPERT)
    experts["expert"], experts["gate"] = expert_ids[used], gate_code(gates[used])
    sizes = HEADER.itemsize + EXPERT.itemsize * counts
    starts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), np.uint8)
    out[starts[:, None] + np.arange(HEADER.itemsize)] = header.view(np.uint8).reshape(len(header), HEADER.itemsize)
    out[_ragged(starts + HEADER.itemsize, EXPERT.itemsize * counts)[0]] = experts.view(np.uint8)
    return out.tobytes()


def _pieces(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Whole records of a file, piece by piece: bytes uint8, start of each record [n], end of the last. Stops before a
    torn last record."""
    rest = b""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            data, starts, at = rest + piece, [], 0
            last = len(data) - HEADER.itemsize
            while at <= last:
                end = at + 16 + 3 * data[at + 10]  # the k of the record
                if end > len(data):
                    break
                starts.append(at)
                at = end
            rest = data[at:]
            yield np.frombuffer(data, np.uint8), np.array(starts, np.int64), at


def _headers(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data[starts[:, None] + np.arange(HEADER.itemsize)]).view(HEADER)[:, 0]


# --- writing ---------------------------------------------------------------------------------------------------------

class _MicroBatch(NamedTuple):
    """What the background thread needs of a micro-batch, on the host once `ready` has happened.

    token_ids: [T] int64. rows: [L, n, 4 + 2K] int32: token index, reasons, margin, entropy, K experts, K gates (fp32 bits).
    num_sampled: the first rows are the sample, the others the flagged tokens and filling; num_flagged: [L] int64.
    """

    step: int
    token_ids: np.ndarray
    rows: torch.Tensor
    num_sampled: int
    num_flagged: torch.Tensor
    ready: torch.cuda.Event | None


class _StepEnd(NamedTuple):
    step: int
    first_token: int
    checksums: torch.Tensor | None
    lost: int
    ready: torch.cuda.Event | None


class AuditLog:
    """Writes the audit of one rank. Nothing here waits for the device or the disk, and no error of the background thread
    ends the run: it is logged once and the audit is off from then on.

    Args:
        folder: RUN/audit, on a file system that all ranks share.
        moe_layers: transformer layer index of each routing that add() gets.
        resume_step: what later steps left in the files is dropped, since it is about to be written again, and so is a
            record torn by a crash. None: the audit begins anew.
        num_ranks: ranks that write; None: those of torch.distributed. Files of ranks that are no more are shared out.
    """

    def __init__(self, folder: Path, settings: AuditConfig, moe_layers: tuple[int, ...], rank: int,
                 resume_step: int | None = None, num_ranks: int | None = None):
        assert settings.sample_one_in > 0, "the audit is off"
        if num_ranks is None:
            num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.folder, self.settings, self.moe_layers, self.rank = folder, settings, moe_layers, rank
        self._queue: queue.SimpleQueue[_MicroBatch | _StepEnd | threading.Event | None] = queue.SimpleQueue()
        self._off = threading.Event()
        self._lost = 0  # micro-batches since the last step
        self._dropped = 0  # flagged tokens beyond the cap since the last step; the thread's
        self._thread = threading.Thread(target=self._work, name="routing-audit", daemon=True)
        try:
            self._prepare(-1 if resume_step is None else resume_step, num_ranks)
            self._thread.start()
        except Exception as error:
            self._give_up(error)

    def add(self, step: int, token_ids: torch.Tensor, token_mask: torch.Tensor | None,
            routings: tuple[RouterOutput, ...]) -> None:
        """One micro-batch of this rank.

        step: the step it belongs to, from 1. token_ids: [B, S] int64 on the host. token_mask: [B, S] bool on the host,
        False for padding. routings: one per MoE layer, of B * S tokens.
        """
        if self._off.is_set():
            return
        if self._queue.qsize() >= MAX_WAITING:
            self._lost += 1
            return
        assert len(routings) == len(self.moe_layers), (len(routings), self.moe_layers)
        ids = token_ids.reshape(-1).numpy()
        live = np.ones(len(ids), dtype=bool) if token_mask is None else token_mask.reshape(-1).numpy()
        sampled = live & is_sampled(ids, self.settings.sample_one_in)
        rows, num_flagged = _selected(routings, torch.from_numpy(np.flatnonzero(sampled)), torch.from_numpy(live & ~sampled),
                                      self.settings.max_flagged)
        device = rows.device
        self._queue.put(_MicroBatch(step, ids, _to_host(rows), int(sampled.sum()), _to_host(num_flagged), _event(device)))

    def end_step(self, step: int, first_token: int, checksums: torch.Tensor | list[int] | None) -> None:
        """Close a step, on every rank. first_token: the lowest token id of the step over all ranks.

        checksums: [L] int64, RouterOutput.checksum per MoE layer summed over the whole step; on rank 0. A tensor may still
        be on its way on the device.
        """
        if self._off.is_set():
            return
        sums = None if checksums is None else torch.as_tensor(checksums, dtype=torch.int64)
        ready = None if sums is None else _event(sums.device)
        self._queue.put(_StepEnd(step, first_token, None if sums is None else _to_host(sums), self._lost, ready))
        self._lost = 0

    def flush(self, timeout: float = 10.0) -> None:
        """Wait until everything so far is with the operating system, so that a killed process loses none of it."""
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
                log.warning("routing audit: the disk under %s does not answer; the last records are lost", self.folder)

    def _prepare(self, resume_step: int, num_ranks: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob("records-*.bin"), *self.folder.glob("dropped-*.jsonl")]:
            if int(path.stem.split("-")[1]) % num_ranks == self.rank:
                _drop_after(path, resume_step)
        if self.rank == 0:
            if (self.folder / "steps.jsonl").is_file():
                _drop_after(self.folder / "steps.jsonl", resume_step)
            _replace(self.folder / "format.json", dumps(_format(self.moe_layers), indent=1) + "\n")
        self._records = (self.folder / f"records-{self.rank:05d}.bin").open("ab")

    def _work(self) -> None:
        try:
            with self._records:
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
                        self._records.flush()  # before the line that says the step is complete
                        self._write_line(item)
        except Exception as error:
            self._give_up(error)

    def _encode(self, batch: _MicroBatch) -> bytes:
        rows, flagged = batch.rows.numpy(), batch.num_flagged.numpy()
        num_layers, num_rows, width = rows.shape
        self._dropped += int(np.maximum(flagged - self.settings.max_flagged, 0).sum())
        kept = np.arange(num_rows) < batch.num_sampled + flagged[:, None]  # behind them is filling
        layer, index = kept.nonzero()[0], rows[..., 0][kept]
        order = np.lexsort((index, layer))
        layer, index, rows = layer[order], index[order], rows[kept][order]
        header = np.zeros(len(rows), HEADER)
        header["step"], header["layer"] = batch.step, np.array(self.moe_layers)[layer]
        header["token"] = (batch.token_ids[index] & 0xFFFFFFFF).astype(np.uint32)
        header["reasons"] = rows[:, 1]
        limit = float(np.finfo(np.float16).max)
        header["margin"], header["entropy"] = rows[:, 2:4].copy().view(np.float32).clip(-limit, limit).T
        slots = (width - 4) // 2
        return encode(header, rows[:, 4:4 + slots], rows[:, 4 + slots:].copy().view(np.float32))

    def _write_line(self, end: _StepEnd) -> None:
        left_out = {"flagged_dropped": self._dropped, "lost_micro_batches": end.lost}
        self._dropped = 0
        line: dict[str, Any] = {"step": end.step, **left_out}
        name = f"dropped-{self.rank:05d}.jsonl"
        if self.rank == 0:
            sums = None if end.checksums is None else [f"{c & (2**64 - 1):016x}" for c in end.checksums.tolist()]
            line = {"step": end.step, "first_token": end.first_token, "checksums": sums,
                    "sample_one_in": self.settings.sample_one_in, **left_out}
            name = "steps.jsonl"
        elif not any(left_out.values()):
            return
        with (self.folder / name).open("a") as file:
            file.write(dumps(line) + "\n")

    def _give_up(self, error: Exception) -> None:
        self._off.set()
        log.warning("routing audit: switched off (%s: %s); the run goes on", type(error).__name__, error)


@torch.no_grad()
def _selected(routings: tuple[RouterOutput, ...], sampled: torch.Tensor, eligible: torch.Tensor,
              max_flagged: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the sampled tokens and of the first flagged ones, on the device and of a size known without asking it.

    sampled: [n] int64 token indices; eligible: [T] bool, tokens that may be flagged. Returns _MicroBatch.rows with
    max_flagged rows after the sampled ones, and the number of flagged tokens [L] int64.
    """
    device = routings[0].reasons.device
    sampled, eligible = _to_device(sampled, device), _to_device(eligible, device)
    reasons = torch.stack([r.reasons for r in routings])
    flags = (reasons & FLAGGED).ne(0) & eligible
    # The j-th flagged token is the first with j flags up to it. Where there are fewer, anything.
    nth = torch.arange(1, max_flagged + 1, dtype=torch.int32, device=device).repeat(len(routings), 1)
    so_far = flags.cumsum(1, dtype=torch.int32)
    first = torch.searchsorted(so_far, nth).clamp(max=flags.shape[1] - 1)
    rows = torch.cat((sampled.expand(len(routings), -1), first), dim=1)

    def bits(values: torch.Tensor) -> torch.Tensor:
        return values.float().view(torch.int32)

    per_token = (reasons.int(), bits(torch.stack([r.margin for r in routings])),
                 bits(torch.stack([r.entropy for r in routings])))
    columns = [rows.int().unsqueeze(-1), *(values.gather(1, rows).unsqueeze(-1) for values in per_token)]
    # One layer at a time: stacking [T, K] of all layers would cost as much memory again as the routing itself.
    experts = torch.stack([r.expert_ids.index_select(0, row) for r, row in zip(routings, rows, strict=True)])
    gates = torch.stack([r.weights.index_select(0, row) for r, row in zip(routings, rows, strict=True)])
    return torch.cat((*columns, experts.int(), bits(gates)), dim=-1), so_far[:, -1].long()


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, into pinned memory where it comes from a GPU: complete once an event recorded now has happened."""
    return tensor.detach().to("cpu", non_blocking=True, copy=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _format(moe_layers: tuple[int, ...]) -> dict[str, Any]:
    def described(dtype: np.dtype) -> list[dict[str, str]]:
        kinds = {name: dtype[name].newbyteorder("=").name for name in dtype.names or ()}
        return [{"name": name, "type": kind, "meaning": DESCRIPTION[name]} for name, kind in kinds.items()]

    return {"version": FORMAT, "byte_order": "little", "record": described(HEADER), "then_k_times": described(EXPERT),
            "reasons": {name: int(reason) for reason in Reason for name in reason_names(reason)},
            "sample": "splitmix64(token id) % sample_one_in == 0, sample_one_in as in steps.jsonl",
            "moe_layers": list(moe_layers)}


def _drop_after(path: Path, step: int) -> None:
    """Cut a file after its last whole record or line of that step or an earlier one."""
    if path.suffix == ".jsonl":
        with path.open() as file:
            kept = [line for line in file if (facts := _parsed(line)) and facts["step"] <= step]
        _replace(path, "".join(kept))
        return
    length = 0
    for data, starts, end in _pieces(path):
        later = np.flatnonzero(_headers(data, starts)["step"] > step)
        length += int(starts[later[0]]) if len(later) else end
        if len(later):
            break
    with path.open("r+b") as binary:
        binary.truncate(length)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    scratch.replace(path)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the step files; None when it was cut off by a crash."""
    try:
        facts = json.loads(line)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and line.endswith("\n") else None


# --- reading ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AuditLogConfig:
    """Settings of launch.audit."""

    run: str
    layer: int | None = None
    expert: int | None = None
    reason: str | None = None
    """Name of a Reason in lower case."""
    step: int | None = None
    token: int | None = None
    """Token id: sample * seq_len + position."""
    limit: int = 20
    """Records to list."""
    compare: str | None = None
    """Another run, whose routing checksums are held against those of this one."""

    def problems(self) -> list[str]:
        found = [f"{name} is {value}; it must not be negative" for name in ("layer", "expert", "step", "token", "limit")
                 if (value := getattr(self, name)) is not None and value < 0]
        if self.reason is not None and self.reason not in (names := reason_names(255)):
            found.append(f"reason is {self.reason!r}; choose one of {', '.join(names)}")
        return found


@dataclass(frozen=True)
class AuditSteps:
    """The steps of an audit in order.

    step, first_token, sample_one_in: [N] int64. checksums: per step one text per MoE layer, or None.
    flagged_dropped, lost_micro_batches: what was left out, over all steps and ranks.
    """

    moe_layers: tuple[int, ...]
    step: np.ndarray
    first_token: np.ndarray
    sample_one_in: np.ndarray
    checksums: list[list[str] | None]
    flagged_dropped: int
    lost_micro_batches: int


@dataclass(frozen=True)
class AuditRecords:
    """One record per token and MoE layer, sorted by (step, layer, token).

    step, token, layer: [N] int64, token with all its bits. reasons: [N] uint8. margin, entropy: [N] float32.
    sampled: [N] bool, chosen by hash; the others only because of a reason.
    offsets: [N + 1] int64, record i has the assignments offsets[i] .. offsets[i + 1], best first.
    experts: [A] int64; gates: [A] float32.
    """

    step: np.ndarray
    token: np.ndarray
    layer: np.ndarray
    reasons: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    sampled: np.ndarray
    offsets: np.ndarray
    experts: np.ndarray
    gates: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @property
    def k(self) -> np.ndarray:
        """[N] int64: experts per record."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """[A] int64: the record of each assignment."""
        return np.repeat(np.arange(len(self)), self.k)

    def take(self, rows: np.ndarray) -> AuditRecords:
        """Some records, by index [n] int64 or mask [N] bool."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        places, offsets = _ragged(self.offsets[:-1][rows], self.k[rows])
        fixed = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("offsets", "experts", "gates")}
        return AuditRecords(**fixed, offsets=offsets, experts=self.experts[places], gates=self.gates[places])


def read_steps(folder: Path) -> AuditSteps:
    """What rank 0 wrote about the steps, and what all ranks left out.

    Raises:
        ValueError: the folder holds no audit, or one of another version.
    """
    try:
        facts = json.loads((folder / "format.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no routing audit; train with audit.sample_one_in=256 to get one") from None
    if facts["version"] != FORMAT:
        raise ValueError(f"{folder} has format {facts['version']}; this version reads format {FORMAT}")
    paths = [p for p in (folder / "steps.jsonl", *sorted(folder.glob("dropped-*.jsonl"))) if p.is_file()]
    lines = [line for path in paths for text in path.read_text().splitlines(keepends=True) if (line := _parsed(text))]
    steps = [line for line in lines if "first_token" in line]

    def column(name: str) -> np.ndarray:
        return np.array([line[name] for line in steps], dtype=np.int64)

    return AuditSteps(tuple(facts["moe_layers"]), column("step"), column("first_token"), column("sample_one_in"),
                      [line["checksums"] for line in steps], sum(line["flagged_dropped"] for line in lines),
                      sum(line["lost_micro_batches"] for line in lines))


def read_records(folder: Path, step: int | None = None) -> AuditRecords:
    """The records of all ranks; of one step if given, which also bounds the memory.

    Raises:
        ValueError: see read_steps.
    """
    steps = read_steps(folder)
    headers, experts = [np.empty(0, HEADER)], [np.empty(0, EXPERT)]
    for path in sorted(folder.glob("records-*.bin")):
        for data, starts, _ in _pieces(path):
            header = _headers(data, starts)
            wanted = np.full(len(header), True) if step is None else header["step"] == step
            header, starts = header[wanted], starts[wanted]
            places, _ = _ragged(starts + HEADER.itemsize, EXPERT.itemsize * header["k"].astype(np.int64))
            headers.append(header)
            experts.append(data[places].view(EXPERT))
    header, assigned = np.concatenate(headers), np.concatenate(experts)
    number = header["step"].astype(np.int64)
    # A step that was cut short has no line: its ids go on from the step before.
    line = np.searchsorted(steps.step, number, side="right")
    first_token = np.concatenate((np.zeros(1, np.int64), steps.first_token))[line]
    sample_one_in = np.concatenate((steps.sample_one_in[:1], steps.sample_one_in))[line] if len(steps.step) else 1
    token = first_token + ((header["token"].astype(np.int64) - first_token) & 0xFFFFFFFF)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(header["k"], dtype=np.int64)))
    records = AuditRecords(number, token, header["layer"].astype(np.int64), header["reasons"],
                           header["margin"].astype(np.float32), header["entropy"].astype(np.float32),
                           is_sampled(token, sample_one_in), offsets, assigned["expert"].astype(np.int64),
                           gate_value(assigned["gate"]))
    return records.take(np.lexsort((records.token, records.layer, records.step)))
