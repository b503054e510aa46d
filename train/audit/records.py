"""Reading an audit log back."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from train.audit.files import EXPERT, HEADER, headers, pieces
from train.audit.format import FORMAT, _ragged, gate_value, is_sampled, reason_names
from train.audit.log import _known
from train.files.log_file import parsed


@dataclass(frozen=True)
class AuditLogConfig:
    """Settings of launch.audit."""

    run: str
    """Run directory."""
    layer: int | None = None
    """Only this layer; None: all."""
    expert: int | None = None
    """Only this expert; None: all."""
    reason: str | None = None
    """Name of a Reason in lower case."""
    step: int | None = None
    """Only this step; None: all."""
    token: int | None = None
    """Token id: sample * seq_len + position."""
    limit: int = 20
    """Records to list."""
    compare: str | None = None
    """Another run, whose routing checksums are held against those of this one."""

    def problems(self) -> list[str]:
        found = [
            f"{name} is {value}; it must not be negative"
            for name in ("layer", "expert", "step", "token", "limit")
            if (value := getattr(self, name)) is not None and value < 0
        ]
        if self.reason is not None and self.reason not in (names := reason_names(255)):
            found.append(f"reason is {self.reason!r}; choose one of {', '.join(names)}")
        return found


@dataclass(frozen=True)
class AuditSteps:
    """The steps of an audit in order."""

    moe_layers: tuple[int, ...]
    """Numbers of the layers that have experts."""
    step: np.ndarray
    """[N] int64."""
    first_token: np.ndarray
    """[N] int64: id of the step's first token."""
    sample_one_in: np.ndarray
    """[N] int64: one in so many tokens was sampled."""
    checksums: list[list[str] | None]
    """Per step one text per MoE layer, or None."""
    flagged_dropped: int
    """Flagged tokens that were left out, over all steps and ranks."""
    lost_micro_batches: int
    """Micro-batches that were left out, over all steps and ranks."""


@dataclass(frozen=True)
class AuditRecords:
    """One record per token and MoE layer, sorted by (step, layer, token)."""

    step: np.ndarray
    """[N] int64."""
    token: np.ndarray
    """[N] int64: ids with all their bits."""
    layer: np.ndarray
    """[N] int64."""
    reasons: np.ndarray
    """[N] uint8: bits of Reason."""
    margin: np.ndarray
    """[N] float32."""
    entropy: np.ndarray
    """[N] float32."""
    sampled: np.ndarray
    """[N] bool: chosen by hash; the others are here only because of a reason."""
    offsets: np.ndarray
    """[N + 1] int64: record i has the assignments offsets[i] .. offsets[i + 1], best first."""
    experts: np.ndarray
    """[A] int64."""
    gates: np.ndarray
    """[A] float32."""

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
        fixed = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if f.name not in ("offsets", "experts", "gates")
        }
        return AuditRecords(
            **fixed, offsets=offsets, experts=self.experts[places], gates=self.gates[places]
        )


def read_steps(folder: Path) -> AuditSteps:
    """What rank 0 wrote about the steps, and what all ranks left out.

    Raises:
        ValueError: the folder holds no audit, or one of another version.
    """
    try:
        facts = json.loads((folder / "format.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no routing audit; train with audit.sample_one_in=256 to get one"
        ) from None
    if facts["version"] != FORMAT:
        raise ValueError(
            f"{folder} has format {facts['version']}; this version reads format {FORMAT}"
        )
    paths = [
        p for p in (folder / "steps.jsonl", *sorted(folder.glob("dropped-*.jsonl"))) if p.is_file()
    ]
    numbers: list[tuple[int, int, int]] = []
    checksums: list[list[str] | None] = []
    flagged = lost = 0
    for path in paths:
        with path.open("rb") as file:
            for text in file:
                if (line := parsed(text)) is None:
                    continue
                flagged, lost = flagged + line["flagged_dropped"], lost + line["lost_micro_batches"]
                if "first_token" in line:
                    numbers.append((line["step"], line["first_token"], line["sample_one_in"]))
                    checksums.append(line["checksums"])
    step, first_token, sample_one_in = np.array(numbers, np.int64).reshape(-1, 3).T
    return AuditSteps(
        tuple(facts["moe_layers"]), step, first_token, sample_one_in, checksums, flagged, lost
    )


def read_records(folder: Path, step: int | Collection[int] | None = None) -> AuditRecords:
    """The records of all ranks; of one step or some if given, which also bounds the memory.

    Records of older steps whose line was left out of steps.jsonl (audit.max_mib) are left out too:
    their ids are not known.

    Raises:
        ValueError: see read_steps.
    """
    steps = read_steps(folder)
    chosen = (
        None
        if step is None
        else np.atleast_1d(np.array([*step] if isinstance(step, Collection) else step, np.int64))
    )

    # Records are filtered file by file, so that only what is wanted is in memory at once.
    found, experts = [np.empty(0, HEADER)], [np.empty(0, EXPERT)]
    for path in sorted(folder.glob("records-*.bin")):
        for data, starts, _ in pieces(path):
            header = headers(data, starts)
            wanted = _known(header["step"], steps.step)
            if chosen is not None:
                wanted &= np.isin(header["step"], chosen)
            header, starts = header[wanted], starts[wanted]
            places, _ = _ragged(
                starts + HEADER.itemsize, EXPERT.itemsize * header["k"].astype(np.int64)
            )
            found.append(header)
            experts.append(data[places].view(EXPERT))

    header, assigned = np.concatenate(found), np.concatenate(experts)
    number = header["step"].astype(np.int64)
    # A step that was cut short has no line: its ids go on from the step before.
    line = np.searchsorted(steps.step, number, side="right")
    first_token = np.concatenate((np.zeros(1, np.int64), steps.first_token))[line]
    sample_one_in = (
        np.concatenate((steps.sample_one_in[:1], steps.sample_one_in))[line]
        if len(steps.step)
        else 1
    )

    # Records hold the low 32 bits of an id; the step's first id has the others.
    token = first_token + ((header["token"].astype(np.int64) - first_token) & 0xFFFFFFFF)

    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(header["k"], dtype=np.int64)))

    records = AuditRecords(
        number,
        token,
        header["layer"].astype(np.int64),
        header["reasons"],
        header["margin"].astype(np.float32),
        header["entropy"].astype(np.float32),
        is_sampled(token, sample_one_in),
        offsets,
        assigned["expert"].astype(np.int64),
        gate_value(assigned["gate"]),
    )
    return records.take(np.lexsort((records.token, records.layer, records.step)))
