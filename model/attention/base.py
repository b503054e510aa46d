"""What every attention sees: where documents begin, positions inside them, and the cache when
generating.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from model.attention.cache import LayerCache, Pages
from model.attention.largest import LargestLogits, largest_logits
from model.parallel.deal import Run
from model.parallel.gather import Gathering
from model.parallel.heads import HeadExchange
from model.parallel.tensor import TensorExchange
from ops.sparse_attention.audit import sample_rows
from ops.sparse_attention.noise import token_hash

Made = TypeVar("Made")
LONGEST_MASKED = 4096
"""Tokens of a row up to which dense attention keeps documents apart by a mask of all pairs, which
takes S^2 bytes; documents of longer rows attend one after the other.
"""


class Paging(NamedTuple):
    """Where new tokens of B rows go in a pool of pages, and what they see there; on the device."""

    slots: torch.Tensor
    """[B * S] int64, page * page_size + place of each new token; below page_size, in the scratch
    page, for padding.
    """
    pages: torch.Tensor
    """[B, P] int64, the pages of each row in the order of its tokens, then any that hold
    finite numbers.
    """
    lengths: torch.Tensor
    """[B] int64, tokens of each row with the new ones, which are the last S of them."""
    fresh: bool
    """The new tokens are all there is: they attend to each other, as in training."""
    regions: torch.Tensor | None = None
    """[B] int64, where a bounded cache keeps tokens of each row that is not idle; None: there is
    none, or every row is idle.
    """

    def rows(self, page_size: int) -> torch.Tensor:
        """[B, P * page_size] int64: where each token of a row is in a pool whose pages follow each
        other.
        """
        place = torch.arange(page_size, device=self.pages.device)
        return (self.pages.unsqueeze(2) * page_size + place).flatten(1)

    def visible(self, num_new: int, page_size: int, window: int | None = None) -> torch.Tensor:
        """[B, 1, S, P * page_size] bool: what each of the last S = num_new tokens may see, of a
        sliding window the last `window` tokens. Padding before a row that has fewer sees its first
        token, so that it stays finite.
        """
        device = self.lengths.device
        position = self.lengths.unsqueeze(1) - num_new + torch.arange(num_new, device=device)
        place = torch.arange(self.pages.shape[1] * page_size, device=device)
        position = position.clamp_min(0).unsqueeze(2)
        seen = place <= position
        if window is not None:
            seen &= place > position - window
        return seen.unsqueeze(1)


@dataclass(frozen=True)
class SequenceLayout:
    """How a batch of packed rows splits into documents; built once per forward and shared by all
    layers. S tokens of each row are here; where these are a part of longer rows (`exchange`), what
    is not said to be of them is of whole rows.
    """

    cos: torch.Tensor
    """[B, S, rotary_dim / 2] fp32 rotary table of positions within each document, of the tokens
    here.
    """
    sin: torch.Tensor
    """[B, S, rotary_dim / 2] fp32, likewise."""
    cu_seqlens: torch.Tensor
    """[documents + 1] int32 on the device, cumulative lengths over the flattened B * S tokens."""
    max_seqlen: int
    """Longest document of the batch."""
    masked_positions: torch.Tensor | None
    """[B, S] positions of whole rows in their documents, which dense attention has to keep apart
    itself; None when every row is one document (plain causal) or when the device has a
    variable-length kernel that reads cu_seqlens.
    """
    token_ids: torch.Tensor | None = None
    """[B * S] int64 names of the tokens, which random selection hangs on; None: positions in the
    batch.
    """
    token_mask: torch.Tensor | None = None
    """[B * S] bool, False for padding; None: nothing is padded."""
    measure: bool = False
    """Sparse layers fill AttentionSums.stats."""
    paging: Paging | None = None
    """Set where the cache is a pool of pages."""
    exchange: HeadExchange | None = None
    """Set where the tokens are a part of longer rows, whose ranks exchange heads: attention then
    sees more of the rows, and some of the heads.
    """
    gathering: Gathering | None = None
    """Set where the tokens that attend here, after heads were exchanged, are a part of longer rows,
    whose keys and values are gathered: there are then fewer queries than keys.
    """
    tensor: TensorExchange | None = None
    """Set where matrices are cut: the tokens here are then those of all ranks of the tensor group,
    of which a rank has a part between the layers.
    """
    positions: torch.Tensor | None = None
    """[B, S] int64 of the tokens here in their documents, as cos and sin have them; None: nobody
    turns by other tables.
    """
    largest: LargestLogits | None = None
    """Where dense layers say their largest logits; None: nobody asks."""
    choices: dict[int, Any] = field(default_factory=dict)
    """What the index of a layer has made of these tokens (sparse.Choice, compressed.Choice), for
    later layers that follow it.
    """
    entries: dict[int, Any] = field(default_factory=dict)
    """What a layer has pooled of these tokens (compressed.Entries), for later layers that read
    it. Gradients go back through it, from blocks that are computed again as well.
    """
    _shared: dict[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> torch.Tensor | None:
        """[B, 1, S, S] bool, True where attention is allowed; None where no mask is needed. It is
        made for the first layer that asks for it: sparse layers do not.
        """
        positions = self.masked_positions
        if positions is None:
            return None
        return self.shared("mask", lambda: document_mask(positions))

    @property
    def documents(self) -> tuple[Run, ...] | None:
        """The documents of rows that are too long for a mask of all pairs; None: rows are short,
        or need no mask.
        """
        positions = self.masked_positions
        if positions is None or positions.shape[1] <= LONGEST_MASKED:
            return None
        return self.shared("documents", lambda: document_runs(positions))

    def to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, S, heads, ...] of the tokens here -> whole rows of the heads that this rank attends
        with (HeadExchange); of whole rows, the tensors themselves.
        """
        return tensors if self.exchange is None else self.exchange.to_heads(*tensors)

    def to_tokens(self, heads: torch.Tensor) -> torch.Tensor:
        """The way back, of [B, S', heads', ...] to [B, S, heads, ...]."""
        return heads if self.exchange is None else self.exchange.to_tokens(heads)

    def to_keys(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values [B, S', kv_heads, ...] of the tokens that attend here -> of whole rows;
        where these are whole already, the tensors themselves.
        """
        return tensors if self.gathering is None else self.gathering.whole(*tensors)

    def attending(self) -> torch.Tensor | None:
        """[n] int64, rising: which of the B * S flattened tokens of whole rows attend here; None:
        all of them.
        """
        gathering = self.gathering
        if gathering is None:
            return None

        def flat() -> torch.Tensor:
            batch, length = gathering.deal.order.shape
            rows = torch.arange(batch, device=self.cos.device) * length
            return (gathering.queries + rows.unsqueeze(1)).flatten()

        return self.shared("attending", flat)

    def of_attending(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Of [B * S] of whole rows, those that attend here."""
        places = self.attending()
        return tokens if tokens is None or places is None else tokens[places]

    def gather_tokens(self, own: torch.Tensor) -> torch.Tensor:
        """[B, s, ...] of a rank's own tokens -> [B, S, ...] of the tokens here, for what is cut; of
        whole matrices, the tensor itself.
        """
        return own if self.tensor is None else self.tensor.gather_rows(own)

    def sum_own_tokens(self, shares: torch.Tensor) -> torch.Tensor:
        """The way back, of what a cut matrix has made of [B, S, ...]."""
        return shares if self.tensor is None else self.tensor.sum_own_rows(shares)

    def audited_rows(self, layer_idx: int, share: float, num_tokens: int) -> torch.Tensor:
        """[R] int64, a share of the `num_tokens` rows that count, for a comparison with dense
        attention: the same tokens whatever the batch is packed like, others in every layer. Of
        whole rows, those that attend here.
        """
        ids = self.token_ids
        if ids is None:
            ids = torch.arange(num_tokens, device=self.cos.device)
        places = self.attending()
        if places is None:
            rows = sample_rows(token_hash(layer_idx, ids), share)
        else:
            rows = places[sample_rows(token_hash(layer_idx, ids[places]), share)]
        return rows if self.token_mask is None else rows[self.token_mask[rows]]

    def see_logits(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        """Note the largest logits of a layer, for whoever asked. k: whole rows of the heads that
        this rank attends with; those of other heads are -inf here. q: of the tokens that attend
        here.
        """
        if self.largest is None:
            return
        documents = self.shared("documents", lambda: _documents(self.cu_seqlens, k))
        queries = None if self.gathering is None else self.gathering.queries
        found = largest_logits(q, k, documents, self.token_mask, scale, queries)
        if self.exchange is not None:
            whole = found.new_full((len(found) * self.exchange.size,), -torch.inf)
            self.exchange.own(whole).copy_(found)
            found = whole
        self.largest.see(found)

    def place_of_heads(self, num_heads: int) -> tuple[int, int]:
        """Which of a layer's heads this rank attends with: the number of the first, and how many
        the layer has. num_heads: of the matrices here.
        """
        first, size = 0, 1
        if self.tensor is not None:
            first, size = self.tensor.rank * num_heads, self.tensor.size
        if self.exchange is not None:
            first += self.exchange.rank * num_heads // self.exchange.size
        return first, num_heads * size

    def own_heads(self, by_head: torch.Tensor) -> torch.Tensor:
        """Of [heads, ...], those that this rank attends with."""
        return by_head if self.exchange is None else self.exchange.own(by_head)

    def shared(self, name: str, make: Callable[[], Made]) -> Made:
        """What follows from the layout alone, made by the first layer that asks for it."""
        if name not in self._shared:
            self._shared[name] = make()
        made: Made = self._shared[name]
        return made


def _documents(cu_seqlens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B * S] int64, the number of each token's document."""
    places = torch.arange(k.shape[0] * k.shape[1], device=k.device)
    return torch.bucketize(places, cu_seqlens.to(torch.int64), right=True)


class AttentionSums(NamedTuple):
    """What a sparse layer reports of a micro-batch; sums over its unpadded tokens, so that any
    split adds up.
    """

    penalty_sum: torch.Tensor
    """[] fp32 with gradient, its regularisers per token, weighted by their coefficients."""
    stats: torch.Tensor
    """[len(STATS)] fp32, see STATS; zeros where nothing was measured."""


STATS = (
    "queries",
    "tail_mass",
    "selected_mass",
    "selected_blocks",
    "union_blocks",
    "tile_blocks",
    "audited",
    "error",
    "error_squared",
    "certificate",
    "covered",
    "bound_violations",
    "mass_kl",
    "coherence",
    "index_tokens",
    "index_loss",
    "index_audited",
    "index_recall",
    "candidate_mass",
    "resident_mass",
)
"""queries: tokens x heads measured; tail_mass, selected_mass: summed over them. selected_blocks:
over tokens, mean of the key/value heads, times heads. union_blocks: distinct selected blocks of
tiles of 16 queries; tile_blocks: selected blocks per query, averaged over a tile. audited: rows x
heads compared with dense attention; the rest is summed over these: relative error (at most 1) and
its square, sub-Gaussian certificate (at most 1), rows whose error it covers, rows whose error
exceeds Theorem 1's bound (never), and the two quantities behind the regularisers.
index_tokens: tokens whose index was compared with the attention's masses; index_loss: the
divergences, summed over them. index_audited: rows whose choice was compared with dense attention;
index_recall: the shares of its softmax that were chosen, summed over these. Of an index inside
sparse attention index_audited is what dense attention gave the candidates, summed over rows and
heads, and index_recall the part of it on what the index chose. candidate_mass: what dense attention
gave the blocks between the first ones and the window, summed over audited rows and heads;
resident_mass: the part of it on blocks that a bounded cache still has.
"""


class Attention(Protocol):
    """hidden [B, S, hidden_size] -> [B, S, hidden_size], and sums where the layer is sparse; with a
    cache (one of its own new_cache), S new tokens attend to all cached ones. With pages (of its own
    new_pages) the layout's paging says what each row sees.
    """

    def __call__(
        self, hidden: torch.Tensor, layout: SequenceLayout, cache: Any = None
    ) -> tuple[torch.Tensor, AttentionSums | None]: ...

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache: ...

    def new_pages(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> Pages: ...


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def document_mask(positions: torch.Tensor) -> torch.Tensor:
    """[B, S] positions that restart at 0 in each document -> [B, 1, S, S] bool: same document and
    not in the future.
    """
    documents = (positions == 0).cumsum(1)
    same_document = documents.unsqueeze(2) == documents.unsqueeze(1)
    order = torch.arange(positions.shape[1], device=positions.device)
    return (same_document & (order.unsqueeze(1) >= order.unsqueeze(0))).unsqueeze(1)


def document_runs(positions: torch.Tensor) -> tuple[Run, ...]:
    """The documents of rows with such [B, S] positions, in their order; on the host."""
    runs, length = [], positions.shape[1]
    for row, starts in enumerate(positions == 0):
        first = starts.nonzero().flatten().tolist()
        ends = [*first[1:], length]
        runs += [Run(row, begin, end, begin) for begin, end in zip(first, ends, strict=True)]
    return tuple(runs)
