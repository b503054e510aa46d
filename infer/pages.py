"""Which pages belong to whom: allocation, sharing of prefixes, eviction. Knows no tensors."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque


class PagePool:
    """Pages 1 to num_pages - 1 of a pool (page 0 is scratch), with the number of their holders.

    A full page can be registered under a key; it then stays findable after its last holder has
    left, until its room is needed: the page that has been idle for longest goes first.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.free = deque(range(1, num_pages))
        self.holders = [0] * num_pages
        self.keys: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that allocate can give."""
        return len(self.free) + len(self.idle)

    def allocate(self) -> int:
        """A page of which nothing is known, held once.

        Raises:
            IndexError: none is available.
        """
        if self.free:
            page = self.free.popleft()
        else:
            if not self.idle:
                raise IndexError("no page is available")
            page, _ = self.idle.popitem(last=False)
            del self.keys[self.key_of.pop(page)]
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One holder more."""
        self.idle.pop(page, None)
        self.holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less."""
        self.holders[page] -= 1
        assert self.holders[page] >= 0, page
        if self.holders[page]:
            return
        if page in self.key_of:
            self.idle[page] = None
        else:
            self.free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Let a full page be found. The first page of a key stays."""
        if key not in self.keys and page not in self.key_of:
            self.keys[key] = page
            self.key_of[page] = key

    def forget(self, page: int) -> None:
        """Let it be found no longer."""
        if (key := self.key_of.pop(page, None)) is not None:
            del self.keys[key]

    def find(self, key: bytes) -> int | None:
        return self.keys.get(key)


class Places:
    """Rooms 1 to num_places - 1 (0 is scratch), given to the pages whose tokens' own keys running
    sequences read. A page that can be found again keeps its room after its last reader, until it is
    needed: the page that has been idle for longest loses it first.

    Attributes:
        place: of each page that has a room.
        changed: pages whose room has changed since this was last taken, and what it is now; 0:
            none.
    """

    def __init__(self, num_places: int):
        self.free = deque(range(1, num_places))
        self.place: dict[int, int] = {}
        self.readers: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.changed: dict[int, int] = {}

    def enter(self, page: int) -> None:
        """One reader more.

        Raises:
            IndexError: no room is left.
        """
        if page not in self.place:
            if not self.free:
                if not self.idle:
                    raise IndexError("no room is left")
                self.drop(next(iter(self.idle)))
            self.place[page] = self.changed[page] = self.free.popleft()
        self.idle.pop(page, None)
        self.readers[page] = self.readers.get(page, 0) + 1

    def leave(self, page: int, stays: bool) -> None:
        """One reader less. stays: the page can be found again."""
        self.readers[page] -= 1
        if self.readers[page]:
            return
        del self.readers[page]
        self.idle[page] = None
        if not stays:
            self.drop(page)

    def drop(self, page: int) -> None:
        """Take the room of a page that nobody reads, if it has one."""
        if page in self.place:
            assert page not in self.readers, page
            del self.idle[page]
            self.free.append(self.place.pop(page))
            self.changed[page] = 0

    def take_changed(self) -> dict[int, int]:
        changed, self.changed = self.changed, {}
        return changed


def root_key(context: str) -> bytes:
    """What the keys of a document's pages begin with: `context` names everything that keys and
    values depend on besides the tokens and the weights (the budget, the attention's settings).
    """
    return hashlib.blake2b(context.encode(), digest_size=16).digest()


def next_key(previous: bytes, tokens: list[int]) -> bytes:
    """The key of a full page of `tokens` behind the page of key `previous` (or a root): it stands
    for these tokens and all before them.
    """
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()
