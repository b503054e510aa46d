"""How a checkpoint keeps experts: all those of a layer in one entry per parameter and state, a row
for each.

    "<parameter>/<fp32|exp_avg|exp_avg_sq>"    [num_experts, ...]
    "<parameter>/expert_ids"                   [num_experts] int64, the global expert in each row

An entry per expert would cost torch a header, a line in the index and planning for each, some 1.3
kB and 0.4 ms to write and as much to read, whatever its size: minutes for 64 layers of 1,024
experts. Rows stand in the order in which the ranks hold the experts (a placement may put any of
them anywhere), so that what a rank writes is consecutive. Readers ask for experts by global id
(checkpoint_reader.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from train.checkpoint import packs

EXPERT_IDS = "expert_ids"
PIECE_BYTES = 2**28
"""Rows are written in pieces of at most this, or of one row: what a reader of other ranks' experts
holds at a time.
"""
PIECES_PER_REPLICA = 4
"""Pieces are made small enough for each of the ranks that hold the same experts to get so many,
where rows allow it.
"""


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a stack."""

    first: int
    """Number of the first one in the stack."""
    num_rows: int
    """How many the whole stack has."""
    values: torch.Tensor
    """[n, ...]: rows first .. first + n - 1."""


def rows_per_piece(num_local: int, row_bytes: int, num_stacks: int, replicas: int) -> int:
    """How many of a rank's `num_local` rows of one stack are written together.

    Args:
        num_stacks: entries that the rank and its replicas share out, parameters times states.
        replicas: how many ranks hold the same experts.
    """
    balanced = (
        num_local * num_stacks // (PIECES_PER_REPLICA * replicas) if replicas > 1 else num_local
    )
    return max(1, min(num_local, PIECE_BYTES // max(1, row_bytes), balanced))


class StackSavePlanner(DefaultSavePlanner):
    """Also saves the given rows of stacks; every row of a stack is given on exactly one rank.

    What stands in the state dict is saved as ever. members: what is packed in its entries, noted in
    the index.
    """

    def __init__(
        self, stacks: dict[str, list[Rows]], members: dict[str, packs.Member] | None = None
    ):
        super().__init__()
        self._notes = packs.notes(members or {})
        self._rows = {(key, rows.first): rows for key, parts in stacks.items() for rows in parts}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [_write_item(key, rows) for (key, _), rows in self._rows.items()]
        self.plan = dataclasses.replace(
            plan,
            items=[*plan.items, *items],
            planner_data={**(plan.planner_data or {}), **self._notes},
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        offset = write_item.index.offset
        rows = self._rows.get((write_item.index.fqn, offset[0])) if offset else None
        return super().resolve_data(write_item) if rows is None else rows.values


def _write_item(key: str, rows: Rows) -> WriteItem:
    shape = rows.values.shape
    offsets = torch.Size([rows.first, *[0] * (len(shape) - 1)])
    return WriteItem(
        MetadataIndex(key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, shape),
            TensorProperties.create_from_tensor(rows.values),
            torch.Size([rows.num_rows, *shape[1:]]),
        ),
    )


# --- reading --------------------------------------------------------------------------------------

Wanted = list[tuple[torch.Tensor, torch.Tensor]]
"""Of one stack: row numbers [n] int64 in any order, and where they go [n, ...]."""


class StackLoadPlanner(DefaultLoadPlanner):
    """Reads rows of stacks, each piece that holds some of them once.

    Raises (from create_local_plan):
        ValueError: the pieces of a stack do not cover it, each row once.
    """

    def __init__(self, wanted: dict[str, Wanted]):
        super().__init__()
        self._wanted = wanted

    def _stored(self, key: str) -> TensorStorageMetadata:
        assert self.metadata is not None  # torch hands it over before it asks for a plan
        return cast(TensorStorageMetadata, self.metadata.state_dict_metadata[key])

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, wanted in self._wanted.items():
            entry = self._stored(key)
            _require_tiled(key, entry)
            asked = torch.zeros(entry.size[0], dtype=torch.bool)
            for rows, _ in wanted:
                asked[rows] = True
            for number, chunk in enumerate(entry.chunks):
                if asked[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]].any():
                    place = MetadataIndex(key, chunk.offsets, number)
                    start = torch.Size([0] * len(chunk.sizes))
                    items.append(
                        ReadItem(LoadItemType.TENSOR, place, start, place, start, chunk.sizes)
                    )
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where a piece goes: straight to its place where all of it is wanted in order, else to
        scratch memory.
        """
        key = read_item.dest_index.fqn
        first = _first_row(read_item)
        size = read_item.lengths[0]
        target = _in_order(self._wanted[key], first, size)
        if target is not None:
            return target
        return torch.empty(read_item.lengths, dtype=self._stored(key).properties.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        key = read_item.dest_index.fqn
        first = _first_row(read_item)
        size = read_item.lengths[0]
        if _in_order(self._wanted[key], first, size) is not None:
            return
        for rows, target in self._wanted[key]:
            here = ((rows >= first) & (rows < first + size)).nonzero().flatten()
            if len(here):
                target[here] = tensor[rows[here] - first].to(target.dtype)


def _in_order(wanted: Wanted, first: int, size: int) -> torch.Tensor | None:
    """The part of the only target that takes rows first .. first + size - 1 one after another. None
    where there is no such target.
    """
    if len(wanted) != 1:
        return None
    rows, target = wanted[0]
    start = (rows == first).nonzero().flatten()
    if len(start) != 1:
        return None
    begin = int(start)
    found = rows[begin : begin + size]
    return (
        target[begin : begin + size]
        if torch.equal(found, torch.arange(first, first + size))
        else None
    )


def _first_row(read_item: ReadItem) -> int:
    """Of a piece, in its stack."""
    assert read_item.dest_index.offset is not None  # create_local_plan gives one
    return read_item.dest_index.offset[0]


def _require_tiled(key: str, entry: TensorStorageMetadata) -> None:
    """Memory that no piece fills would be taken for weights."""
    after = 0
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets[0]):
        if (
            chunk.offsets[0] != after
            or tuple(chunk.sizes[1:]) != tuple(entry.size[1:])
            or any(chunk.offsets[1:])
        ):
            break
        after += chunk.sizes[0]
    if after != entry.size[0]:
        raise ValueError(f"the pieces of {key} do not cover its {entry.size[0]} rows")


def row_of_expert(expert_ids: torch.Tensor) -> torch.Tensor:
    """[num_experts] int64, the expert in each row -> the row of each expert.

    Raises:
        ValueError: they are not every expert once.
    """
    rows = torch.argsort(expert_ids)
    if not torch.equal(expert_ids[rows], torch.arange(len(expert_ids))):
        raise ValueError("expert_ids does not name every expert once")
    return rows
