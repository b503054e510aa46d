"""Records between rank 0 and each other rank, beside the tensors of a model: JSON, never pickles,
sealed by a key that never travels.

A record goes over the process group as its length and its bytes. Before the text stands
HMAC-SHA256(key, sender | receiver | number of the record | text), so that what was made without the
key, sent twice, left out or moved to another place is not taken.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.files.strict_json import dumps
from train.rank.errors import LostRank
from train.rank.ports import RANKS_KEY

LONGEST = 2**28
"""Bytes of a record."""
_MAC = hashlib.sha256().digest_size
_RECORD, _SIGN = 7, 8
"""Tags that tell records from signs of an end."""


class Unsealed(RuntimeError):
    """A record was not made by a rank of this job, or is out of its place."""


def take_key() -> bytes | None:
    """The key that the command which started the ranks has given them, for no child to inherit.
    None: something else has started them.
    """
    found = os.environ.pop(RANKS_KEY, None)
    return None if found is None else found.encode()


class Channel:
    """This rank's end. Rank 0 speaks to all others, each of them to rank 0."""

    def __init__(self, key: bytes):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._key = key
        self._numbers: Counter[tuple[int, int]] = Counter()

    def send(self, to: int, record: dict[str, Any]) -> None:
        """Raises RuntimeError where the other rank is gone."""
        text = dumps(record).encode()
        data = self._seal(self.rank, to, text) + text
        dist.send(torch.tensor([len(data)]), to, tag=_RECORD)
        dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to, tag=_RECORD)

    def receive(self, of: int) -> dict[str, Any]:
        """The next record of a rank.

        Raises:
            Unsealed: it is not the rank's. RuntimeError: the rank is gone, or is silent for longer
                than the process group's timeout.
        """
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, of, tag=_RECORD)
        number = int(length)
        if not _MAC <= number <= LONGEST:
            raise Unsealed(f"a record of rank {of} has {number} bytes")
        buffer = torch.empty(number, dtype=torch.uint8)
        dist.recv(buffer, of, tag=_RECORD)
        data = buffer.numpy().tobytes()
        mac, text = data[:_MAC], data[_MAC:]
        if not hmac.compare_digest(mac, self._seal(of, self.rank, text)):
            raise Unsealed(f"a record of rank {of} was made without the key, or is out of place")
        found: dict[str, Any] = json.loads(text)
        return found

    def _seal(self, sender: int, receiver: int, text: bytes) -> bytes:
        number = self._numbers[sender, receiver]
        self._numbers[sender, receiver] += 1
        return hmac.digest(self._key, f"{sender}|{receiver}|{number}|".encode() + text, "sha256")


class Watch:
    """Notices on rank 0 that another rank is gone, also while rank 0 waits inside a kernel or a
    collective of the devices, which do not notice.

    A thread for each other rank waits for the sign that it ends as it should; the connection breaks
    where the rank does not get so far. All ranks make a Watch together.

    Attributes:
        lost: the first rank that went without a sign; None: all are there.
    """

    def __init__(self) -> None:
        self.lost: LostRank | None = None
        self._found = threading.Event()
        self._told: Callable[[LostRank], None] = lambda lost: None
        # A wait that ran out of time would close the connections of the whole group.
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=3650))
        self._threads = [
            threading.Thread(target=self._wait, args=(rank,), name=f"watch-{rank}", daemon=True)
            for rank in range(1, dist.get_world_size() if dist.get_rank() == 0 else 1)
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, told: Callable[[LostRank], None]) -> None:
        """Call a function, from another thread, when a rank is lost, or now if one is."""
        self._told = told
        if self.lost is not None:
            told(self.lost)

    def verdict(self, seconds: float) -> LostRank | None:
        """The rank that is lost, as soon as it is known."""
        self._found.wait(seconds)
        return self.lost

    def leave(self) -> None:
        """This rank ends as it should; rank 0 waits until the others have said so."""
        if dist.get_rank():
            dist.send(torch.zeros(1), 0, group=self._group, tag=_SIGN)
        for thread in self._threads:
            thread.join()

    def _wait(self, rank: int) -> None:
        try:
            dist.recv(torch.zeros(1), rank, group=self._group, tag=_SIGN)
        except RuntimeError as error:
            if self.lost is None:
                self.lost = LostRank(f"rank {rank} is gone ({str(error).splitlines()[0][:200]})")
            self._found.set()
            self._told(self.lost)
