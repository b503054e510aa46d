"""What is kept of the tokens before, when generating."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerCache:
    """Room for `max_len` tokens of one layer, of which `length` are there."""

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0

    def _place(self, number: int) -> slice:
        """Where the next `number` tokens go; they count as held from now on.

        Raises:
            ValueError: the cache is full.
        """
        start, end = self.length, self.length + number
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit the cache of {self.max_len}")
        self.length = end
        return slice(start, end)


class KVCache(LayerCache):
    """Keys and values of one layer while generating: [B, max_len, kv_heads, head_dim], filled up to
    `length`.
    """

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(max_len)
        shape = (batch_size, max_len, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, S, kv_heads, head_dim] after what is there and return all keys and values so
        far.

        Raises:
            ValueError: the cache is full.
        """
        new = self._place(keys.shape[1])
        self.keys[:, new] = keys
        self.values[:, new] = values
        return self.keys[:, : self.length], self.values[:, : self.length]


class LatentCache(LayerCache):
    """Rows of multi-head latent attention: [B, max_len, kv_lora_rank + qk_rope_head_dim], a token's
    normalised latent and then its rotated key, which all heads share.
    """

    def __init__(
        self, batch_size: int, max_len: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(max_len)
        self.rows = torch.zeros((batch_size, max_len, width), dtype=dtype, device=device)

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Store [B, S, width] after what is there and return all rows so far.

        Raises:
            ValueError: the cache is full.
        """
        new = self._place(rows.shape[1])
        self.rows[:, new] = rows
        return self.rows[:, : self.length]


class Pages:
    """One layer's pool of pages, each of `page_size` tokens: sequences hold pages, in any order.

    Page 0 is scratch: padding and idle rows write to it, and nothing that is read is there.
    Tensors are [num_pages, page_size, ...]; a subclass names them.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything the pool holds."""
        raise NotImplementedError

    def clear(self, pages: list[int]) -> None:
        """Write zeros over pages: what is masked has weight 0, and 0 times NaN is NaN."""
        for tensor in self.tensors():
            tensor[pages] = 0


class LivePages:
    """Which pages have room for what a layer reads of recent tokens alone, such as the keys of a
    window; all others have pooled entries. One table for all layers of a model.

    Args:
        num_places: pages that can have room at a time, and place 0, which is scratch.

    Attributes:
        place: [num_pages] int64, where the room of a page is; 0: it has none.
    """

    def __init__(self, num_pages: int, num_places: int, device: torch.device):
        self.num_places = num_places
        self.place = torch.zeros(num_pages, dtype=torch.int64, device=device)

    @staticmethod
    def every(num_pages: int, device: torch.device) -> LivePages:
        """All pages have room, for good."""
        live = LivePages(num_pages, num_pages, device)
        live.place.copy_(torch.arange(num_pages))
        return live


class Regions(NamedTuple):
    """What a bounded cache has room for, beside its pages of entries."""

    number: int
    """Documents at a time."""
    max_blocks: int
    """Blocks of a document at most."""


class KVPages(Pages):
    """Keys and values [num_pages, page_size, kv_heads, head_dim] of one layer."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(num_pages, page_size)
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store [B, S, kv_heads, head_dim] at slots [B * S] int64 = page * page_size + place."""
        for pool, new in ((self.keys, keys), (self.values, values)):
            pool.flatten(0, 1)[slots] = new.flatten(0, 1)

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, P * page_size, kv_heads, head_dim] of pages [B, P] int64."""
        return self.keys[pages].flatten(1, 2), self.values[pages].flatten(1, 2)


class LatentPages(Pages):
    """Rows [num_pages, page_size, width] of multi-head latent attention; see LatentCache."""

    def __init__(
        self, num_pages: int, page_size: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(num_pages, page_size)
        self.rows = torch.zeros((num_pages, page_size, width), dtype=dtype, device=device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.rows,)

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Store [B, S, width] at slots [B * S] int64 = page * page_size + place."""
        self.rows.flatten(0, 1)[slots] = rows.flatten(0, 1)

    def read(self, pages: torch.Tensor) -> torch.Tensor:
        """Rows [B, P * page_size, width] of pages [B, P] int64."""
        return self.rows[pages].flatten(1, 2)
