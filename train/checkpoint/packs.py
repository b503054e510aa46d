"""How a checkpoint keeps small tensors: many in one flat entry, a pack.

    "packed/<rank>/<state>.<dtype>/<number>"    [numel], what one rank writes of one state or of the
                                                buffers, one tensor after another

A header, a line in the index and planning cost torch some 0.7 ms to write and as much to read for
every entry, whatever its size, and norms, biases and buffers of a deep model are thousands of
them. Where a tensor lies stands in the index: torch's planners keep notes there
(`Metadata.planner_data`), which the ranks' plans carry and rank 0 merges. Readers ask for the
tensors by their own names (reader.py). The files stay what torch's own tools read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

PACKED_BYTES = 2**20
"""Tensors up to this are packed: above it, what an entry costs is small beside the bytes."""
PACK_BYTES = 2**26
"""No pack is larger: who reads one of its tensors holds all of it for a while."""
BYTES_PER_MEMBER = 512
"""What a tensor's line in the index takes at most."""


@dataclass(frozen=True)
class Member:
    """A tensor of `shape` that lies in the flat entry `pack`, from element `first` on."""

    pack: str
    first: int
    shape: tuple[int, ...]

    @property
    def after(self) -> int:
        """The first element behind it."""
        return self.first + math.prod(self.shape)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor itself, a view of the pack [numel]."""
        return flat[self.first : self.after].view(self.shape)


# --- writing --------------------------------------------------------------------------------------


def pack(
    tensors: dict[str, torch.Tensor], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, Member]]:
    """The entries to write in place of the tensors, and where those that were packed lie. Empties
    `tensors`, so that no more than one pack is held twice.

    Args:
        tensors: on the host, "<parameter>/<state>" or "buffer/<name>".
        rank: names the packs, as each rank has its own.
    """
    groups: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.nbytes <= PACKED_BYTES:
            kind = "buffer" if key.startswith("buffer/") else key.rpartition("/")[2]
            dtype = str(tensor.dtype).removeprefix("torch.")
            groups.setdefault(f"packed/{rank}/{kind}.{dtype}", []).append(key)
    entries: dict[str, torch.Tensor] = {}
    members: dict[str, Member] = {}
    for group, keys in groups.items():
        for number, part in enumerate(_parts(keys, tensors)):
            name, first = f"{group}/{number}", 0
            for key in part:
                members[key] = Member(name, first, tuple(tensors[key].shape))
                first = members[key].after
            entries[name] = torch.cat([tensors.pop(key).reshape(-1) for key in part])
    entries.update(tensors)
    tensors.clear()
    return entries, members


def _parts(keys: list[str], tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """The keys in their order, cut where the bytes of a pack would exceed PACK_BYTES."""
    part: list[str] = []
    size = 0
    for key in keys:
        if part and size + tensors[key].nbytes > PACK_BYTES:
            yield part
            part, size = [], 0
        part.append(key)
        size += tensors[key].nbytes
    if part:
        yield part


def notes(members: dict[str, Member]) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """What the index says of them: plain values, which any unpickler knows."""
    return {key: (member.pack, member.first, member.shape) for key, member in members.items()}


# --- reading --------------------------------------------------------------------------------------


def members_of(metadata: Any) -> dict[str, Member]:
    """Where the packed tensors of an index lie; none in checkpoints of before the packs.

    Raises:
        ValueError: the notes are none of ours, or a pack is not covered by its tensors, each
            element once.
    """
    planner_data, known = metadata.planner_data, metadata.state_dict_metadata
    if planner_data is None:
        return {}
    if not isinstance(planner_data, dict):
        raise ValueError("the index's notes on packed tensors are no table")
    # torch itself notes the path of every entry under the entry's name
    members = {
        key: _member(key, note, known) for key, note in planner_data.items() if key not in known
    }
    after: dict[str, int] = {key: 0 for key in known if key.startswith("packed/")}
    in_order = sorted(
        members.items(), key=lambda item: (item[1].pack, item[1].first, item[1].after)
    )
    for key, member in in_order:
        if member.first != after[member.pack]:
            raise ValueError(f"{key[:80]!r} does not follow the tensor before it in its pack")
        after[member.pack] = member.after
    for name, end in after.items():
        if end != known[name].size.numel():
            raise ValueError(f"the tensors in {name} do not cover it")
    return members


def _member(key: Any, note: Any, known: dict[str, Any]) -> Member:
    if isinstance(key, str) and isinstance(note, tuple) and len(note) == 3:
        name, first, shape = note
        numbers = (first, *shape) if isinstance(shape, tuple) else (None,)
        if (
            all(type(number) is int and number >= 0 for number in numbers)
            and isinstance(name, str)
            and name.startswith("packed/")
            and len(getattr(known.get(name), "size", ())) == 1
        ):
            return Member(name, first, tuple(shape))
    raise ValueError(f"the index's note on {str(key)[:80]!r} is none of ours")
