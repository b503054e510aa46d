"""The op in training and prefill: packed documents, a tile of queries in memory at a time.

Shape letters: as in tile.py; T tokens, M entries of all documents.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ops.compressed_attention.spec import CompressedSpec
from ops.compressed_attention.tile import (
    attend,
    choose_entries,
    entries_mask,
    masked_logits,
    window_mask,
)
from ops.gather_attention import Gather, pick_backend
from ops.index_attention.gathered import document_starts, teach_chosen
from ops.index_attention.interface import Index
from ops.index_attention.tile import (
    block_scores,
    blocks_mask,
    divergence,
    own_graph,
    real_dtype,
)

if TYPE_CHECKING:
    from ops.index_attention.triton_backend import IndexTile

TILE_VALUES = 2**22
"""Numbers of a tile's largest tensors, which bounds what the op needs beside its inputs."""


class CompressedOutput(NamedTuple):
    """Attended values, and what the index has to learn."""

    out: Tensor
    """[T, H, c] in the dtype of q."""
    divergence: Tensor
    """[] fp32 (fp64): KL divergence in nats of the index's softmax from the masses that attention
    gave to entries, summed over the tokens that count; 0 where it was not asked for. Its gradient
    reaches the index alone.
    """
    chosen: Tensor
    """[T, K] int32: the entries that were chosen for each query, numbered within its document, -1
    for none; K is 0 where every entry is seen.
    """


def compressed_attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    index: Index | None,
    sinks: Tensor,
    bounds: Sequence[int],
    spec: CompressedSpec,
    *,
    dense: bool = False,
    teach: bool = False,
    token_mask: Tensor | None = None,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> CompressedOutput:
    """Causal attention of packed documents to a window of tokens and to entries of closed windows.

    Args:
        q: [T, H, c]; kv: [T, c], keys that are values; rotary positions applied; fp32, bf16, fp16
            or fp64. entries: [M, c] in the order of closed_windows; None with spec.ratio=0.
        index: queries [T, I, w], keys [M, w], weights [T, I]; None where it neither chooses nor
            learns.
        sinks: [H], logits without a value.
        bounds: where documents begin, and T.
        dense: see every closed entry; the index learns from all of them. Implied without
            spec.top_k.
        teach: compute the divergence. token_mask: [T] bool, tokens that count in it; None: all.
        chosen: [T, K] int32 as the output has them, of another layer whose choice is followed;
            None: the index chooses.
        backend: who chooses entries, attends to them and teaches: "triton" gathers them, "torch"
            masks the rest; None: see ops.gather_attention.pick_backend. To teach an index all of
            them is for torch.

    Returns:
        CompressedOutput; gradients flow from out to q, kv, entries and sinks, and from the
        divergence to the index. Deterministic.

    Raises:
        ValueError: shapes do not fit, or the back-end does not take them.
    """
    dense = dense or spec.top_k is None
    if chosen is not None and (chosen.dim() != 2 or len(chosen) != len(q)):
        raise ValueError(f"chosen {tuple(chosen.shape)} must be [{len(q)}, entries of a query]")
    _check(q, kv, entries, index, sinks, bounds, spec, dense or chosen is not None, teach)
    width = 0 if index is None else index.queries.shape[2]
    picked = pick_backend(backend, q.device, q.dtype, q.shape[2], 1, width)
    gathers = picked == "triton" and not (dense and teach)
    parts: tuple[Tensor | None, ...] = (None, None, None) if index is None else tuple(index)
    followed = None if dense else chosen
    how = tuple(bounds), spec, dense, teach, followed, gathers
    out, divergence, own = _Compressed.apply(  # type: ignore[no-untyped-call]
        q, kv, entries, sinks, *parts, token_mask, *how
    )
    return CompressedOutput(out, divergence, own if followed is None else followed)


@torch.no_grad()
def audit_entries(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    index: Index,
    sinks: Tensor,
    bounds: Sequence[int],
    spec: CompressedSpec,
    rows: Sequence[int],
    chosen: Tensor | None = None,
) -> Tensor:
    """[R] fp32: of the audited rows that see an entry, the share of what attention to all of them
    would give to entries which went to those that the index chooses; all heads together. chosen:
    as compressed_attention takes it.
    """
    tiles = _Tiles(q, kv, entries, index, bounds, spec)
    documents = [d for d in tiles.documents() if d.end > d.begin]
    found = [q.new_zeros(0, dtype=torch.float32)]
    for row in rows:
        document = documents[bisect.bisect_right([d.begin for d in documents], row) - 1]
        tile = tiles.tile(document, row, row + 1)
        if not tile.num_entries:
            continue
        if chosen is None:
            scores = block_scores(*tiles.of_index(tile), tile.position, spec.ranking)
            best = choose_entries(scores, tile.position, spec)
        else:
            best = chosen[tile.rows].unsqueeze(0)
        is_chosen = blocks_mask(best, tile.num_entries)[0, 0]
        everything = tiles.seen(tile, None)
        probs = attend(tiles.queries(tile), tiles.columns(tile), everything, sinks.to(tiles.real))
        masses = probs.probs[0, :, 0, -tile.num_entries :].sum(0)
        share = (masses * is_chosen).sum() / masses.sum().clamp_min(torch.finfo(masses.dtype).tiny)
        found.append(share.view(1).float())
    return torch.cat(found)


class _Document(NamedTuple):
    begin: int
    end: int
    first_entry: int


class _Tile(NamedTuple):
    """Queries of one document, and what they may see."""

    rows: slice
    tokens: slice
    """Of the windows."""
    entries: slice
    position: Tensor
    """[1, Q] int64 of the queries; kv_position: [1, N] of the tokens."""
    kv_position: Tensor

    @property
    def num_entries(self) -> int:
        return int(self.entries.stop - self.entries.start)


class _Tiles:
    """Slices of the inputs in the dtype that is computed in, with a leading dimension of 1."""

    def __init__(
        self,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        index: Index | None,
        bounds: Sequence[int],
        spec: CompressedSpec,
    ):
        self.q, self.kv, self.entries, self.index = q, kv, entries, index
        self.bounds, self.spec, self.real = bounds, spec, real_dtype(q.dtype)

    def documents(self) -> Iterator[_Document]:
        first = 0
        for begin, end in itertools.pairwise(self.bounds):
            yield _Document(begin, end, first)
            first += self._closed(end - begin)

    def _closed(self, length: int) -> int:
        return length // self.spec.ratio if self.spec.ratio else 0

    def all(self) -> Iterator[_Tile]:
        by_column = self.q.shape[1] + (2 * self.index.queries.shape[1] if self.index else 0)
        for document in self.documents():
            at = document.begin
            while at < document.end:
                # by the tile's place alone, so that later tokens cannot change its size
                place = at - document.begin + 1
                columns = min(place, self.spec.window) + self._closed(place) + 1
                size = max(1, min(256, TILE_VALUES // (by_column * columns)))
                yield self.tile(document, at, min(at + size, document.end))
                at += size

    def index_tiles(self) -> Iterator[tuple[_Tile, IndexTile | None]]:
        """Larger tiles, as the index's kernels take them; None: there is no index."""
        from ops.index_attention.triton_backend import IndexTile, tile_queries

        for document in self.documents():
            at = document.begin
            while at < document.end:
                closed = self._closed(at - document.begin + 1)
                tile = self.tile(document, at, min(at + tile_queries(closed, 1), document.end))
                of_index = None
                if self.index is not None:
                    queries, keys, weights = self.index
                    assert weights is not None
                    of_index = IndexTile(
                        queries[tile.rows].contiguous(),
                        keys[tile.entries].to(queries.dtype).contiguous(),
                        weights[tile.rows].contiguous(),
                        at - document.begin,
                        self.spec.ranking,
                    )
                yield tile, of_index
                at = tile.rows.stop

    def tile(self, document: _Document, start: int, stop: int) -> _Tile:
        begin, first = document.begin, document.first_entry
        since = max(begin, start - self.spec.window + 1)
        return _Tile(
            slice(start, stop),
            slice(since, stop),
            slice(first, first + self._closed(stop - begin)),
            torch.arange(start - begin, stop - begin, device=self.q.device).unsqueeze(0),
            torch.arange(since - begin, stop - begin, device=self.q.device).unsqueeze(0),
        )

    def queries(self, tile: _Tile) -> Tensor:
        return self.q[tile.rows].to(self.real).unsqueeze(0)

    def columns(self, tile: _Tile) -> Tensor:
        """[1, N + E, c]: the window's tokens, then the entries."""
        tokens = self.kv[tile.tokens].to(self.real)
        if self.entries is not None:
            tokens = torch.cat((tokens, self.entries[tile.entries].to(self.real)))
        return tokens.unsqueeze(0)

    def seen(self, tile: _Tile, chosen: Tensor | None) -> Tensor:
        """[1, Q, N + E] bool. chosen: [1, Q, E] bool; None: every closed entry."""
        window = window_mask(tile.position, tile.kv_position, self.spec.window)
        if self.entries is None:
            return window
        if chosen is None:
            chosen = entries_mask(tile.position, tile.num_entries, self.spec.ratio)
        return torch.cat((window, chosen), 2)

    def of_index(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
        """As block_scores takes them."""
        assert self.index is not None and self.index.weights is not None
        return (
            self.index.queries[tile.rows].to(self.real).unsqueeze(0),
            self.index.keys[tile.entries].to(self.real).unsqueeze(0),
            self.index.weights[tile.rows].to(self.real).unsqueeze(0),
        )


class _Compressed(torch.autograd.Function):
    """apply(q, kv, entries, sinks, *index, token_mask, bounds, spec, dense, teach, chosen,
    gathers).

    The gradient of the divergence is known as soon as its value is, but for a factor: it is
    computed with it, so that the masses of a tile are made once.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        q, kv, entries, sinks = given[:4]
        index = None if given[4] is None else Index(*given[4:7])
        token_mask, bounds, spec, dense, teach, followed, gathers = given[7:]
        tiles = _Tiles(q, kv, entries, index, bounds, spec)
        learns = teach and any(ctx.needs_input_grad[4:7])
        out, total = q.new_empty(q.shape), q.new_zeros((), dtype=tiles.real)
        by_head = (q.shape[1], len(q))
        lse = q.new_empty(by_head[::-1] if gathers else by_head, dtype=tiles.real)
        grads = [
            torch.zeros_like(x, dtype=tiles.real) if learns and x is not None else None
            for x in (index or (None, None, None))
        ]
        most = 0
        if not dense:
            longest = max((e - b for b, e in itertools.pairwise(bounds)), default=0)
            most = min(spec.top_k, longest // spec.ratio)
        picked = followed
        if picked is None:
            picked = q.new_full((len(q), most), -1, dtype=torch.int32)
        real_sinks = sinks.to(tiles.real)
        rows: tuple[Tensor | None, Tensor | None, Tensor | None] = None, None, None
        if gathers:
            base, window_start, first = rows = _rows_to_see(bounds, spec, dense, q.device)
            of_query = None if dense else picked
            gather = _gather_of(q, kv, entries, sinks, of_query, base, window_start, first)
            if dense:
                from ops.gather_attention import triton_backend

                triton_backend.attend(gather, out, lse, 0, len(q))
            else:
                how = token_mask, teach, followed is None
                total = _attend_gathered(tiles, gather, out, lse, *how, grads if learns else None)

        for tile in () if gathers else tiles.all():
            scores, chosen = None, None
            if index is not None and (teach or not (dense or followed is not None)):
                parts = tiles.of_index(tile)
                if learns:
                    parts = tuple(x.detach().requires_grad_() for x in parts)  # type: ignore
                with own_graph(learns):
                    scores = block_scores(*parts, tile.position, spec.ranking)
                if not dense and followed is None:
                    best = choose_entries(scores, tile.position, spec)
                    picked[tile.rows, : best.shape[-1]] = best[0].to(torch.int32)
            if not dense:
                chosen = blocks_mask(picked[tile.rows].unsqueeze(0), tile.num_entries)
            found = attend(
                tiles.queries(tile), tiles.columns(tile), tiles.seen(tile, chosen), real_sinks
            )
            out[tile.rows] = found.out[0].to(out.dtype)
            lse[:, tile.rows] = found.lse[0]
            if not teach or scores is None or not tile.num_entries:
                continue

            # What the index is taught.
            masses = found.probs[..., -tile.num_entries :].sum(1, keepdim=True)
            candidates = scores.detach() > -torch.inf if chosen is None else chosen.unsqueeze(1)
            with own_graph(learns):
                by_query = divergence(scores, masses, candidates)[0, 0]
                if token_mask is not None:
                    by_query = by_query * token_mask[tile.rows].to(by_query.dtype)
                share = by_query.sum()
            total += share.detach()
            if learns and share.requires_grad:
                places = (tile.rows, tile.entries, tile.rows)
                new = torch.autograd.grad(share, parts)
                for gradient, at, more in zip(grads, places, new, strict=True):
                    assert gradient is not None
                    gradient[at] += more[0]

        ctx.save_for_backward(q, kv, entries, sinks, *given[4:7], out, lse, picked, *rows, *grads)
        ctx.bounds, ctx.spec, ctx.dense, ctx.gathers = bounds, spec, dense, gathers
        own = picked if followed is None else picked.new_empty(0)
        ctx.mark_non_differentiable(own)
        return out, total, own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout, dtotal, _ = grads
        q, kv, entries, sinks, *rest = ctx.saved_tensors
        index, (out, lse, picked, *rows), made = rest[:3], rest[3:9], rest[9:]
        of_index = [
            None if g is None else (g * dtotal).to(x.dtype)
            for g, x in zip(made, index, strict=True)
        ]
        none = (None,) * 7
        if not any(ctx.needs_input_grad[:4]):
            return (None, None, None, None, *of_index, *none)
        if ctx.gathers:
            from ops.gather_attention import triton_backend

            gather = _gather_of(q, kv, entries, sinks, None if ctx.dense else picked, *rows)
            found = triton_backend.attend_backward(gather, out, lse, dout.contiguous())
            by_row, number = found.dk[:, 0], gather.own_row
            of_entries = None if entries is None else by_row[:number]
            return (found.dq, by_row[number:], of_entries, found.dsink, *of_index, *none)

        tiles = _Tiles(q, kv, entries, None, ctx.bounds, ctx.spec)
        if index[0] is not None:  # tiles as the forward pass had them
            tiles.index = Index(*index)
        dq, dkv = torch.empty_like(q), torch.zeros_like(kv, dtype=tiles.real)
        dentries = None if entries is None else torch.zeros_like(entries, dtype=tiles.real)
        dsinks = torch.zeros_like(sinks, dtype=tiles.real)
        scale = q.shape[-1] ** -0.5
        for tile in tiles.all():
            chosen = None
            if not ctx.dense:
                chosen = blocks_mask(picked[tile.rows].unsqueeze(0), tile.num_entries)
            queries, columns = tiles.queries(tile), tiles.columns(tile)
            logits = masked_logits(queries, columns, tiles.seen(tile, chosen))
            tile_lse = lse[:, tile.rows].unsqueeze(0)
            probs = (logits - tile_lse.unsqueeze(-1)).exp()

            # P = e^(z - L), dz = P (do . kv - do . o); a key's gradient has both of its shares.
            into = dout[tile.rows].to(tiles.real).unsqueeze(0)
            delta = (into * out[tile.rows].to(tiles.real)).sum(-1).transpose(1, 2)
            dz = torch.einsum("bqhc,bnc->bhqn", into, columns) - delta.unsqueeze(-1)
            dz = probs * dz * scale
            dq[tile.rows] = torch.einsum("bhqn,bnc->bqhc", dz, columns)[0].to(dq.dtype)
            dcolumns = torch.einsum("bhqn,bqhc->bnc", dz, queries)
            dcolumns += torch.einsum("bhqn,bqhc->bnc", probs, into)
            number = tile.tokens.stop - tile.tokens.start
            dkv[tile.tokens] += dcolumns[0, :number]
            if dentries is not None:
                dentries[tile.entries] += dcolumns[0, number:]
            sunk = (sinks.to(tiles.real).view(1, -1, 1) - tile_lse).exp()
            dsinks -= (sunk * delta).sum((0, 2))
        return (
            dq,
            dkv.to(kv.dtype),
            None if dentries is None else dentries.to(entries.dtype),
            dsinks.to(sinks.dtype),
            *of_index,
            *none,
        )


def _attend_gathered(
    tiles: _Tiles,
    gather: Gather,
    out: Tensor,
    lse: Tensor,
    token_mask: Tensor | None,
    teach: bool,
    chooses: bool,
    grads: list[Tensor | None] | None,
) -> Tensor:
    """The forward pass by kernels, into `out`, `lse`, what is chosen where the index `chooses`, and
    `grads` of the index (None: it does not learn). The divergence.
    """
    from ops.gather_attention import triton_backend
    from ops.index_attention.triton_backend import Gradients, block_scores, choose

    assert gather.chosen is not None
    total = lse.new_zeros(())
    for tile, of_index in tiles.index_tiles():
        scores = None
        if of_index is not None and (teach or chooses):
            scores = block_scores(of_index)
        own = gather.chosen[:, tile.rows]
        if chooses:
            assert scores is not None
            values = scores.values.unsqueeze(0)
            best = choose_entries(values, tile.position, tiles.spec, choose)
            own[..., : best.shape[-1]] = best
        triton_backend.attend(gather, out, lse, tile.rows.start, tile.rows.stop)
        if not teach or scores is None or not tile.num_entries:
            continue

        # What was chosen is all there is.
        into = None
        if grads is not None:
            of_queries, of_keys, of_weights = grads
            assert of_queries is not None and of_keys is not None and of_weights is not None
            into = Gradients(of_queries[tile.rows], of_keys[tile.entries], of_weights[tile.rows])
        masses = triton_backend.masses(gather, lse, tile.rows.start, tile.rows.stop)
        counts = lse.new_ones(len(masses[0])) if token_mask is None else token_mask[tile.rows]
        assert of_index is not None
        total += teach_chosen(of_index, scores, own, masses, counts, into)
    return total


def _rows_to_see(
    bounds: Sequence[int], spec: CompressedSpec, dense: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(base, window start, first) of every token as Gather has them: entries can be chosen, or are
    all seen as they close, and tokens after them are the window. The host knows the documents, so
    this copies to the device: once a call, and backward passes are handed what is made here.
    """
    begin = document_starts(bounds, device)
    token = torch.arange(len(begin), device=device, dtype=torch.int32)
    window_start = torch.maximum(begin, token - spec.window + 1)
    if not spec.ratio:
        return begin, window_start, None
    closed = [(e - b) // spec.ratio for b, e in itertools.pairwise(bounds)]
    firsts = torch.tensor([0, *itertools.accumulate(closed)], dtype=torch.int32)
    base = firsts[:-1].repeat_interleave(torch.tensor(bounds).diff()).to(device)
    first = (token - begin + 1) // spec.ratio if dense else None
    return base, window_start + sum(closed), first


def _gather_of(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    sinks: Tensor,
    picked: Tensor | None,
    base: Tensor,
    window_start: Tensor,
    first: Tensor | None,
) -> Gather:
    """The op as the kernels are asked for it. picked: [T, K] int32, which may be filled in later;
    None: nothing chooses.
    """
    columns = kv if entries is None else torch.cat((entries, kv))
    return Gather(
        q.contiguous(),
        columns.to(q.dtype).unsqueeze(1).contiguous(),
        None,
        None if picked is None else picked.unsqueeze(0),
        base,
        1,
        0 if entries is None else len(entries),
        window_start,
        sinks,
        first,
    )


def _check(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    index: Index | None,
    sinks: Tensor,
    bounds: Sequence[int],
    spec: CompressedSpec,
    dense: bool,
    teach: bool,
) -> None:
    if q.dim() != 3 or kv.shape != (q.shape[0], q.shape[2]) or sinks.shape != (q.shape[1],):
        raise ValueError(
            f"q {tuple(q.shape)}, kv {tuple(kv.shape)} and sinks {tuple(sinks.shape)} must be [T, "
            "heads, channels], [T, channels] and [heads]"
        )
    if bounds[0] != 0 or bounds[-1] != len(q) or sorted(bounds) != list(bounds):
        raise ValueError(f"bounds must rise from 0 to the {len(q)} tokens of q, not {bounds}")
    if (entries is None) != (spec.ratio == 0):
        raise ValueError(f"ratio={spec.ratio} goes with entries exactly where it is above 0")
    closed = sum((e - b) // max(spec.ratio, 1) for b, e in itertools.pairwise(bounds))
    if entries is not None and entries.shape != (closed, q.shape[2]):
        raise ValueError(
            f"entries {tuple(entries.shape)} must be [{closed}, {q.shape[2]}], one for each closed "
            f"window of {spec.ratio} tokens"
        )
    if index is None:
        if teach or not dense:
            raise ValueError("an index that chooses or learns must be given")
        return
    heads, width = index.queries.shape[1:]
    shapes = {
        "queries": (len(q), heads, width),
        "keys": (closed, width),
        "weights": (len(q), heads),
    }
    for name, shape in shapes.items():
        tensor = getattr(index, name)
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"{name} of the index have shape {found}, expected {shape}")
