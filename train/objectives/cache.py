"""What a teacher said of the rows of a run, written once and read as the run goes on.

    CACHE/manifest.json       facts (Facts), and size and sha256 of every file
    CACHE/ids-00000.npy       [rows, S, K] uint16 or uint32, the likeliest tokens
    CACHE/log_probs-00000.npy [rows, S, K + 1] fp16, their log-probabilities and that of all others
    CACHE/rows-00000.npy      [rows] uint32, a checksum of the row's tokens

Rows are those of the run, by their number: the order that seed, length and data give. The words of
a teacher depend on what stands before a token in its row, so that those of another order would be
of other contexts. A row whose tokens are not those that were taught ends the run.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.distillation import likeliest
from model.request import Taught, TokenBatch
from train.config.objective import DistilConfig
from train.config.run import RunConfig
from train.data.loader import Batch, TrainingLoader
from train.data.store import TokenStore
from train.files.durable import sync_folder, write_json
from train.files.manifest import CheckpointError, file_facts, read_json, require_owned
from train.objectives.online import OnlineTeacher

FORMAT = 1
ROWS_OF_A_FILE = 1024
BEGUN = "begun.json"
"""Of a cache in the making: what it is of."""


@dataclass(frozen=True)
class Facts:
    """What must be the same in the run that learns."""

    vocab_size: int
    num_ids: int
    """K: tokens of which the teacher's words are known one by one."""
    seq_len: int
    seed: int
    temperature: float
    content: str
    """Of the token store."""
    num_rows: int


def facts_of(config: RunConfig, store: TokenStore, num_ids: int, temperature: float) -> Facts:
    """num_ids: K."""
    return Facts(
        vocab_size=config.model.vocab_size,
        num_ids=num_ids,
        seq_len=config.train.seq_len,
        seed=config.seed,
        temperature=temperature,
        content=str(store.manifest["content"]),
        num_rows=config.train.num_steps * config.train.global_batch_size,
    )


def bytes_per_token(num_ids: int, vocab_size: int) -> int:
    """Of a cache, on disk."""
    return num_ids * (_id_type(vocab_size).itemsize + 2) + 2 * (num_ids < vocab_size)


def _id_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def checksum(input_ids: torch.Tensor, positions: torch.Tensor) -> int:
    """Of a row, [S] int64 each: its tokens and where their documents begin."""
    return zlib.crc32(positions.numpy().tobytes(), zlib.crc32(input_ids.numpy().tobytes()))


# --- written --------------------------------------------------------------------------------------


def write_cache(
    to: Path,
    teacher: OnlineTeacher,
    loader: TrainingLoader,
    facts: Facts,
    told: dict[str, Any],
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Iterator[int]:
    """Write the words of a teacher for the first facts.num_rows rows; yields the number of rows
    done so far. The cache appears when it is whole.

    Until then its files lie in a folder beside it, `.NAME.partial`, each with a record that is
    written after it. Whoever writes the same of the same teacher goes on there: files that are what
    their record says are kept, so that a kill costs the rows of one file at most.

    Args:
        loader: of one process.
        told: about the teacher, for people, and what tells it from others.

    Raises:
        CheckpointError: the folder beside it is another user's.
    """
    scratch = partial_of(to)
    begun = {"format": FORMAT, "teacher": told, **dataclasses.asdict(facts)}
    _begin(scratch, begun, say)

    files: dict[str, Any] = {}
    for number, first in enumerate(range(0, facts.num_rows, ROWS_OF_A_FILE)):
        rows = min(ROWS_OF_A_FILE, facts.num_rows - first)
        record = scratch / f"done-{number:05d}.json"
        if (kept := _kept(record, number)) is not None:
            files |= kept
            yield first + rows
            continue

        arrays = _arrays(rows, facts)
        done = 0
        while done < rows:
            # The last batch of a file may have rows of the next one, which begins with them again.
            loader.consumed_samples = first + done
            batch = loader.next_step(1)[0]
            taken = min(rows - done, len(batch.input_ids))
            _fill(arrays, done, taken, batch, teacher, facts, device)
            done += taken
            yield first + done
        own = {}
        for name, array in arrays.items():
            path = scratch / _name(name, number)
            np.save(path, array, allow_pickle=False)
            own[path.name] = file_facts(path)
        write_json(record, own)
        files |= own

    write_json(scratch / "manifest.json", {**begun, "files": files})
    for leftover in (scratch / BEGUN, *scratch.glob("done-*.json")):
        leftover.unlink()
    sync_folder(scratch)
    scratch.rename(to)
    sync_folder(to.parent)


def partial_of(to: Path) -> Path:
    """Where a cache lies until it is whole."""
    return to.with_name(f".{to.name}.partial")


def _begin(scratch: Path, begun: dict[str, Any], say: Callable[[str], None]) -> None:
    """The folder of a cache in the making: that of an earlier attempt at the same, or a new one."""
    if scratch.exists():
        require_owned(scratch)
        try:
            before = read_json(scratch / BEGUN)
        except CheckpointError:
            before = {}
        if before == begun:
            number = sum(1 for _ in scratch.glob("done-*.json"))
            say(f"goes on in {scratch}, {number} files of {ROWS_OF_A_FILE} rows are there")
            return
        say(f"{scratch} was begun for other rows or by another teacher: it is begun anew")
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    write_json(scratch / BEGUN, begun)


def _kept(record: Path, number: int) -> dict[str, Any] | None:
    """The files of an earlier attempt with their facts, where they are what was written; None:
    they are to be written.
    """
    try:
        found = read_json(record)
    except CheckpointError:
        return None
    names = {_name(kind, number) for kind in ("ids", "log_probs", "rows")}
    paths = {name: record.with_name(name) for name in names}
    if found.keys() != names or not all(path.is_file() for path in paths.values()):
        return None
    return found if all(file_facts(paths[name]) == found[name] for name in names) else None


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.npy"


def _arrays(rows: int, facts: Facts) -> dict[str, np.ndarray]:
    width = facts.num_ids + (facts.num_ids < facts.vocab_size)
    return {
        "ids": np.empty((rows, facts.seq_len, facts.num_ids), _id_type(facts.vocab_size)),
        "log_probs": np.empty((rows, facts.seq_len, width), "<f2"),
        "rows": np.empty(rows, "<u4"),
    }


def _fill(
    arrays: dict[str, np.ndarray],
    start: int,
    number: int,
    batch: Batch,
    teacher: OnlineTeacher,
    facts: Facts,
    device: torch.device,
) -> None:
    hidden = teacher.model.last_hidden(batch.inputs(device))[:number]
    for i, row in enumerate(hidden, start):
        # A row at a time, so that the logits of one are in memory.
        ids, log_probs = likeliest(teacher.logits(row), facts.num_ids, facts.temperature)
        arrays["ids"][i] = ids.cpu().numpy()
        arrays["log_probs"][i] = log_probs.cpu().numpy().clip(-65504)
        arrays["rows"][i] = checksum(batch.input_ids[i - start], batch.positions[i - start])


# --- read -----------------------------------------------------------------------------------------


class CachedTeacher:
    """The words of a cache, row by row.

    Raises:
        CheckpointError: it is damaged, or another user's.
        ValueError: it was written for another run.
    """

    def __init__(self, settings: DistilConfig, config: RunConfig, store: TokenStore):
        assert settings.cache is not None
        self.folder, self.temperature = Path(settings.cache).expanduser(), settings.temperature
        require_owned(self.folder)
        self._manifest = read_manifest(self.folder)
        names = [field.name for field in dataclasses.fields(Facts)]
        self.facts = Facts(**{name: self._manifest[name] for name in names})
        wanted = facts_of(config, store, self.facts.num_ids, settings.temperature)
        if problems := differences(self.facts, wanted, str(self.folder)):
            raise ValueError("; ".join(problems))
        self._open: dict[int, dict[str, np.ndarray]] = {}

    def taught(self, batch: Batch, inputs: TokenBatch) -> Taught:
        whole = batch.rows
        assert whole.token_ids is not None
        ids, log_probs = [], []
        numbers = (whole.token_ids[:, 0] // self.facts.seq_len).tolist()
        places = batch.own(torch.arange(self.facts.seq_len).expand_as(whole.input_ids)).numpy()
        for number, tokens, positions, part in zip(
            numbers, whole.input_ids, whole.positions, places, strict=True
        ):
            arrays, row = self._file(number // ROWS_OF_A_FILE), number % ROWS_OF_A_FILE
            if int(arrays["rows"][row]) != checksum(tokens, positions):
                raise ValueError(
                    f"{self.folder} was written for other tokens than row {number} of this run "
                    "has: data, seed or their order are others; write it anew with launch.teach"
                )
            ids.append(torch.from_numpy(arrays["ids"][row, part].astype(np.int64)))
            log_probs.append(torch.from_numpy(arrays["log_probs"][row, part].astype(np.float32)))

        # What half precision has rounded sums up to 1 again.
        shares = torch.stack(log_probs).log_softmax(-1)
        device = inputs.input_ids.device
        return Taught(
            self.temperature, ids=torch.stack(ids).to(device), log_probs=shares.to(device)
        )

    def _file(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a file, whose bytes are compared with the manifest's when it is first
        read.
        """
        if number not in self._open:
            found = {}
            for kind in ("ids", "log_probs", "rows"):
                path = self.folder / _name(kind, number)
                if file_facts(path) != self._manifest["files"][path.name]:
                    raise CheckpointError(f"{path} is not what was written; write the cache anew")
                found[kind] = np.load(path, mmap_mode="r", allow_pickle=False)
            self._open[number] = found
        return self._open[number]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        CheckpointError: there is none, it is damaged, or a later version wrote it.
    """
    try:
        found = read_json(folder / "manifest.json")
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is no cache of launch.teach: {error}") from None
    missing = {f.name for f in dataclasses.fields(Facts)} - found.keys()
    if found.get("format") != FORMAT or missing:
        raise CheckpointError(f"{folder} is a cache of another version, or damaged")
    return found


def differences(found: Facts, wanted: Facts, folder: str) -> list[str]:
    """Why a cache is not one for a run, a line each."""
    settings = {
        "vocab_size": "model.vocab_size",
        "seq_len": "train.seq_len",
        "seed": "seed",
        "temperature": "objective.temperature",
    }
    problems = [
        f"objective.cache={folder} was written with {setting}={getattr(found, name)}, and this run "
        f"has {getattr(wanted, name)}"
        for name, setting in settings.items()
        if getattr(found, name) != getattr(wanted, name)
    ]
    if found.content != wanted.content:
        problems.append(f"objective.cache={folder} was written for other tokens than the data's")
    if found.num_rows < wanted.num_rows:
        problems.append(
            f"objective.cache={folder} has the first {found.num_rows} rows, and this run reads "
            f"{wanted.num_rows} (train.num_steps x train.global_batch_size); write it anew with "
            "launch.teach"
        )
    return problems
