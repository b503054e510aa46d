"""What compressed attention keeps of the tokens before: a window of keys, the entries of closed
windows, and what the open one is to be pooled from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.attention.base import Paging
from model.attention.cache import LayerCache, LivePages, Pages
from ops.compressed_attention.spec import CompressedSpec

Pool = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]
]
"""Rows [B, n, m, R] of windows, those of the windows before them, the windows' numbers [B, n] ->
entries [B, n, c] and index keys [B, n, w].
"""


class Widths(NamedTuple):
    """Values of a layer's parts."""

    key: int
    """Of a token's key, and of an entry."""
    row: int
    """Of what entries and index keys are pooled from, of a token."""
    index_key: int
    """Of an index key; 0: there is no index."""


class Held(NamedTuple):
    """What new tokens see, as attend_held takes it."""

    kv: torch.Tensor
    kv_position: torch.Tensor
    entries: torch.Tensor | None
    index_keys: torch.Tensor | None
    position: torch.Tensor
    rows: torch.Tensor | None = None
    """[B, E] int64, where entries and index keys are in pools [n, ...]; None: there are no
    pools.
    """


class CompressedCache(LayerCache):
    """Of rows that are equally long: the keys [B, n, c] of the last window - 1 tokens, entries [B,
    max_len // m, c], index keys likewise, and rows [B, n, R] of fewer than two windows of tokens.
    """

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        spec: CompressedSpec,
        widths: Widths,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(max_len)
        self.spec = spec
        self.kv = torch.zeros((batch_size, 0, widths.key), dtype=dtype, device=device)
        self.rows = torch.zeros((batch_size, 0, widths.row), dtype=dtype, device=device)
        number = max_len // spec.ratio if spec.ratio else 0
        self.entries = torch.zeros((batch_size, number, widths.key), dtype=dtype, device=device)
        self.index_keys = torch.zeros(
            (batch_size, number, widths.index_key), dtype=dtype, device=device
        )

    def begin(self, entries: torch.Tensor, index_keys: torch.Tensor | None) -> None:
        """Entries [B * n, c] of the first tokens, which were appended before."""
        number = len(entries) // len(self.entries)
        self._store(
            0,
            entries.unflatten(0, (-1, number)) if number else entries[None, :0],
            index_keys.unflatten(0, (-1, number)) if number and index_keys is not None else None,
        )

    def _store(self, first: int, entries: torch.Tensor, index_keys: torch.Tensor | None) -> None:
        at = slice(first, first + entries.shape[1])
        if entries.shape[1]:
            self.entries[:, at] = entries
        if index_keys is not None:
            self.index_keys[:, at] = index_keys

    def append(self, kv: torch.Tensor, rows: torch.Tensor, pool: Pool) -> Held | None:
        """Keys [B, S, c] and rows [B, S, R] after what is there; what their tokens see. None: they
        are the first.

        Raises:
            ValueError: the cache is full.
        """
        new = self._place(kv.shape[1])
        keys = torch.cat((self.kv, kv.to(self.kv.dtype)), 1)
        self.kv = keys[:, max(0, keys.shape[1] - self.spec.window + 1) :]
        self._append_rows(rows, new.start, pool)
        if new.start == 0:
            return None
        place = torch.arange(self.length, device=kv.device).expand(len(kv), -1)
        closed = self.length // self.spec.ratio if self.spec.ratio else 0
        return Held(
            keys,
            place[:, self.length - keys.shape[1] :],
            self.entries[:, :closed] if self.spec.ratio else None,
            self.index_keys[:, :closed] if self.index_keys.shape[-1] else None,
            place[:, new],
        )

    def _append_rows(self, rows: torch.Tensor, start: int, pool: Pool) -> None:
        """Pool the windows that are closed now, and drop what no later one needs."""
        size = self.spec.ratio
        if not size:
            return
        first = start - self.rows.shape[1]  # a window's first token
        rows = torch.cat((self.rows, rows.to(self.rows.dtype)), 1)
        done, closed = start // size, self.length // size
        if closed > done and start > 0:
            # What the first of them follows, or anything where it is the first of all.
            if done * size == first:
                rows, first = F.pad(rows, (0, 0, size, 0)), first - size
            since = rows[:, (done - 1) * size - first : closed * size - first]
            windows = since.unflatten(1, (-1, size))
            number = torch.arange(done, closed, device=rows.device).expand(len(rows), -1)
            entries, keys = pool(windows[:, 1:], windows[:, :-1], number)
            self._store(done, entries, keys)
        self.rows = rows[:, max(0, closed - 1) * size - first :].clone()


class CompressedPages(Pages):
    """Of a pool's pages, [num_pages, places, ...]: the entries and index keys of windows that close
    in them. Keys and rows of tokens, [num_places, page_size, ...], are there for live pages.

    Args:
        live: the pages whose tokens' own numbers are kept; None: those of all pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        spec: CompressedSpec,
        widths: Widths,
        dtype: torch.dtype,
        device: torch.device,
        live: LivePages | None = None,
    ):
        super().__init__(num_pages, page_size)
        self.spec = spec
        self.live = LivePages.every(num_pages, device) if live is None else live
        self.places = -(-page_size // spec.ratio) if spec.ratio else 0

        def empty(number: int, places: int, width: int) -> torch.Tensor:
            return torch.zeros((number, places, width), dtype=dtype, device=device)

        self.kv = empty(self.live.num_places, page_size, widths.key)
        self.rows = empty(self.live.num_places, page_size, widths.row)
        self.entries = empty(num_pages, self.places, widths.key)
        self.index_keys = empty(num_pages, self.places, widths.index_key)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.kv, self.rows, self.entries, self.index_keys

    def clear(self, pages: list[int]) -> None:
        places = self.live.place[pages]
        for of_tokens in (self.kv, self.rows):
            of_tokens[places] = 0
        for pooled in (self.entries, self.index_keys):
            pooled[pages] = 0

    def write(self, kv: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Store [B, S, ...] at slots [B * S] int64 = page * page_size + place; those of pages that
        are not live go into the scratch page.
        """
        at = self.live.place[slots // self.page_size], slots % self.page_size
        for pool, new in ((self.kv, kv), (self.rows, rows)):
            pool[at] = new.flatten(0, 1).to(pool.dtype)

    def write_entries(
        self, entries: torch.Tensor, index_keys: torch.Tensor | None, last: torch.Tensor
    ) -> None:
        """Store [n, ...] of windows whose last tokens have the slots `last` [n]."""
        at = last // self.page_size, last % self.page_size // self.spec.ratio
        self.entries[at] = entries.to(self.entries.dtype)
        if index_keys is not None:
            self.index_keys[at] = index_keys.to(self.index_keys.dtype)

    def held(self, paging: Paging, new: int, pool: Pool) -> Held:
        """What the last `new` tokens of every row see, which have been written; pools what they
        close.
        """
        # Padding before a shorter row sees its first token, and stays finite.
        device, total = paging.lengths.device, paging.pages.shape[1] * self.page_size
        begun = paging.lengths.unsqueeze(1) - new
        if self.spec.ratio:
            self._close(paging, begun, new, total, pool)

        seen = torch.arange(1 - self.spec.window, new, device=device)
        kv_position = begun + seen
        kv = self.kv[self._of_tokens(paging, kv_position.clamp(0, total - 1))]
        position = (begun + torch.arange(new, device=device)).clamp_min(0)
        if not self.spec.ratio:
            return Held(kv, kv_position, None, None, position)
        number = torch.arange(total // self.spec.ratio, device=device)
        last = ((number + 1) * self.spec.ratio - 1).expand(len(begun), -1)
        page, place = self._at(paging, last)
        return Held(
            kv,
            kv_position,
            self.entries.flatten(0, 1),
            self.index_keys.flatten(0, 1) if self.index_keys.shape[-1] else None,
            position,
            page * self.places + place // self.spec.ratio,
        )

    def _at(self, paging: Paging, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, n] positions -> their pages, and their places in these."""
        return paging.pages.gather(1, position // self.page_size), position % self.page_size

    def _of_tokens(
        self, paging: Paging, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where keys and rows of [B, n] positions are."""
        page, place = self._at(paging, position)
        return self.live.place[page], place

    def _close(self, paging: Paging, begun: torch.Tensor, new: int, total: int, pool: Pool) -> None:
        """Pool every window that may have closed among the last `new` tokens. What has not, or not
        now, goes into the scratch page.
        """
        size = self.spec.ratio
        number = begun.clamp_min(0) // size + torch.arange(new // size + 1, device=begun.device)
        slots = torch.arange(-size, size, device=begun.device)
        tokens = (number * size).unsqueeze(-1) + slots
        is_closed = (number + 1) * size <= paging.lengths.unsqueeze(1)
        room, place = self._of_tokens(paging, tokens.clamp(0, total - 1).flatten(1))
        # Padding before a shorter row meets windows that were pooled before: where their tokens
        # have no room any more, their entries stay as they are.
        is_closed &= (room != 0).unflatten(1, (-1, 2 * size)).all(-1)
        rows = self.rows[room, place].unflatten(1, (-1, 2, size))
        entries, keys = pool(rows[:, :, 1], rows[:, :, 0], number)
        page, place = self._at(paging, tokens[..., -1].clamp(0, total - 1))
        last = torch.where(is_closed, page * self.page_size + place, 0).flatten()
        self.write_entries(
            entries.flatten(0, 1), None if keys is None else keys.flatten(0, 1), last
        )
