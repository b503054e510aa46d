"""The op in training and prefill: packed documents, a tile of queries in memory at a time.

Shape letters: as in tile.py; T tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ops.gather_attention import pick_backend
from ops.index_attention.gathered import gather_of, rows_to_see, teach_all, teach_chosen
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import (
    attend,
    block_masses,
    block_scores,
    blocks_mask,
    choose,
    divergence,
    own_graph,
    real_dtype,
    tokens_mask,
)
from ops.sparse_attention import SparseAttentionSpec, select_backend, sparse_attention

if TYPE_CHECKING:
    from ops.gather_attention import Gather
    from ops.index_attention.triton_backend import IndexTile

MOST_OF_BLOCK = 128
"""Tokens of a block whose masses in dense attention kernels take."""
TILE_VALUES = 2**22
"""Numbers of a tile's largest tensors, which bounds what the op needs beside its inputs."""


class Index(NamedTuple):
    """What the index makes of the tokens; in one dtype."""

    queries: Tensor
    """[T, I, w]."""
    keys: Tensor
    """[T, w]; with rule=qsa [M, w], of the complete blocks in the order of group_starts."""
    weights: Tensor | None
    """[T, I] with rule=dsa; else None."""


class IndexedOutput(NamedTuple):
    """Attended values, and what the index has to learn."""

    out: Tensor
    """[T, H, d] in the dtype of q."""
    divergence: Tensor
    """[] fp32 (fp64): KL divergence in nats of the index's softmax from the attention's, mean over
    choices, summed over the tokens that count; 0 where it was not asked for. Its gradient reaches
    the index alone.
    """
    num_chosen: Tensor
    """[] int64, blocks chosen over all tokens that count and choices; 0 if `dense`."""


class IndexAudit(NamedTuple):
    """Of audited rows."""

    recall: Tensor
    """[R] fp32: share of the softmax over everything that a query sees which went to what its index
    chooses, mean over heads.
    """


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    bounds: Sequence[int],
    spec: IndexSpec,
    *,
    dense: bool = False,
    teach: bool = False,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> IndexedOutput:
    """Causal grouped-query attention over packed documents, to the tokens that the index chooses.

    Args:
        q: [T, H, d]; k, v: [T, Hk, d], rotary positions applied; fp32, bf16, fp16 or fp64.
        bounds: where documents begin, and T.
        dense: attend to everything; the index learns from all of it.
        teach: compute the divergence. token_mask: [T] bool, tokens that count in it; None: all.
        backend: who chooses, attends to what is chosen and teaches: "triton" gathers it, "torch"
            masks the rest; None: see ops.gather_attention.pick_backend. With `dense` the kernels of
            ops.sparse_attention attend, for the shapes that they take, else torch.

    Returns:
        IndexedOutput; gradients flow from out to q, k, v and from the divergence to the index.
        Deterministic. Equal to dense attention for documents up to spec.dense_length tokens.

    Raises:
        ValueError: shapes do not fit, or the back-end does not take them.
    """
    _check(q, k, v, index, bounds, spec)
    width = index.queries.shape[2]
    chosen = pick_backend(backend, q.device, q.dtype, q.shape[2], spec.block_size, width)
    if dense and chosen == "triton" and spec.block_size <= MOST_OF_BLOCK:
        everything = SparseAttentionSpec(
            block_size=64,
            coarse_block_size=64,
            top_k=0,
            num_sink_blocks=0,
            min_sparse_length=len(q),
        )
        if "triton" in (backend, select_backend(q, k, everything)):
            cu_seqlens = torch.tensor(bounds, device=q.device)
            found = sparse_attention(
                q, k, v, cu_seqlens, everything, coarse=False, backend="triton"
            )
            total = q.new_zeros((), dtype=torch.float32)
            if teach:
                total = _LearnFromAll.apply(  # type: ignore[no-untyped-call]
                    *index, q.detach(), k.detach(), found.lse.detach(), token_mask, bounds, spec
                )
            return IndexedOutput(found.out, total, q.new_zeros((), dtype=torch.int64))
    gathers = chosen == "triton" and not dense
    found = _Indexed.apply(  # type: ignore[no-untyped-call]
        q, k, v, *index, token_mask, tuple(bounds), spec, dense, teach, gathers
    )
    return IndexedOutput(*found)


@torch.no_grad()
def audit_index(
    q: Tensor, k: Tensor, index: Index, bounds: Sequence[int], spec: IndexSpec, rows: Sequence[int]
) -> IndexAudit:
    """What the index would lose of dense attention in some rows; whatever was attended to."""
    found = [q.new_zeros(0, dtype=torch.float32)]
    tiles = _Tiles(q, k, None, index, bounds, spec)
    documents = [d for d in tiles.documents() if d.end > d.begin]
    for row in rows:
        document = documents[bisect.bisect_right([d.begin for d in documents], row) - 1]
        queries, keys, _ = tiles.of_attention(document, row, row + 1)
        position = tiles.position(document, row, row + 1)
        scores = block_scores(*tiles.of_index(document, row, row + 1), position, spec)
        blocks = blocks_mask(choose(scores, position, spec), scores.shape[-1])
        everything = tokens_mask(None, position, keys.shape[1], spec)
        chosen = tokens_mask(blocks, position, keys.shape[1], spec)
        probs = attend(queries, keys, keys, everything).probs
        found.append((probs * chosen.unsqueeze(2)).sum(-1).mean().view(1).float())
    return IndexAudit(torch.cat(found))


class _Document(NamedTuple):
    begin: int
    end: int
    first_key: int
    """Of its index keys, where these are of blocks."""


class _Tiles:
    """Slices of the inputs in the dtype that is computed in, with a leading dimension of 1."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        index: Index,
        bounds: Sequence[int],
        spec: IndexSpec,
    ):
        self.q, self.k, self.v, self.index, self.spec = q, k, v, index, spec
        self.bounds, self.real = bounds, real_dtype(q.dtype)
        self.groups = q.shape[1] // k.shape[1]

    def documents(self) -> Iterator[_Document]:
        first_key = 0
        for begin, end in itertools.pairwise(self.bounds):
            yield _Document(begin, end, first_key)
            first_key += (end - begin) // self.spec.block_size

    def ranges(self, document: _Document) -> Iterator[tuple[int, int]]:
        """Of queries, as many as fit, which falls as they have more keys."""
        by_key = self.q.shape[1] + 2 * self.index.queries.shape[1]
        at = document.begin
        while at < document.end:
            # the size follows from the tile's place alone, so that later tokens cannot change it
            seen = at - document.begin + 1
            size = max(1, min(256, TILE_VALUES // (by_key * seen)))
            yield at, min(at + size, document.end)
            at += size

    def index_tiles(self, document: _Document, by_key: int = 1) -> Iterator[tuple[int, IndexTile]]:
        """First queries and tiles of the index for its kernels. by_key: what a query and a key have
        numbers of at least.
        """
        from ops.index_attention.triton_backend import IndexTile, tile_queries

        queries, keys, weights = self.index
        choices = queries.shape[1] if self.spec.by_head else 1
        at = document.begin
        while at < document.end:
            seen = at - document.begin + 1
            stop = min(at + tile_queries(seen, max(choices, by_key)), document.end)
            yield (
                at,
                IndexTile(
                    queries[at:stop].contiguous(),
                    keys[self.key_range(document, stop)].to(queries.dtype).contiguous(),
                    None if weights is None else weights[at:stop].contiguous(),
                    at - document.begin,
                    self.spec,
                ),
            )
            at = stop

    def position(self, document: _Document, start: int, stop: int) -> Tensor:
        """[1, Q] int64."""
        here = torch.arange(start - document.begin, stop - document.begin, device=self.q.device)
        return here.unsqueeze(0)

    def of_attention(
        self, document: _Document, start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, Q, Hk, G, d], keys and values [1, N, Hk, d]."""
        keys = self.k[document.begin : stop]
        values = keys if self.v is None else self.v[document.begin : stop]
        queries = self.q[start:stop].unflatten(1, (-1, self.groups))
        return (
            queries.to(self.real).unsqueeze(0),
            keys.to(self.real).unsqueeze(0),
            values.to(self.real).unsqueeze(0),
        )

    def key_range(self, document: _Document, stop: int) -> slice:
        """Index keys that queries before `stop` may see."""
        if not self.spec.pools_keys:
            return slice(document.begin, stop)
        seen = (stop - document.begin) // self.spec.block_size
        return slice(document.first_key, document.first_key + seen)

    def of_index(
        self, document: _Document, start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As block_scores takes them."""
        queries, keys, weights = self.index
        return (
            queries[start:stop].to(self.real).unsqueeze(0),
            keys[self.key_range(document, stop)].to(self.real).unsqueeze(0),
            None if weights is None else weights[start:stop].to(self.real).unsqueeze(0),
        )


class _Indexed(torch.autograd.Function):
    """apply(q, k, v, *index, token_mask, bounds, spec, dense, teach, gathers) -> IndexedOutput.

    The gradient of the divergence is known as soon as its value is, but for a factor: it is
    computed with it, so that the masses of a tile are made once.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        q, k, v = given[:3]
        index, token_mask, bounds = Index(*given[3:6]), given[6], given[7]
        spec, dense, teach, gathers = given[8:]
        tiles = _Tiles(q, k, v, index, bounds, spec)
        learns = teach and any(ctx.needs_input_grad[3:6])
        out, total = q.new_empty(q.shape), q.new_zeros((), dtype=tiles.real)
        by_head = (q.shape[1], len(q))
        lse = q.new_empty(by_head[::-1] if gathers else by_head, dtype=tiles.real)
        grads = [
            torch.zeros_like(x, dtype=tiles.real) if learns and x is not None else None
            for x in index
        ]
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        most = min(spec.top_k, -(-max(lengths, default=0) // spec.block_size))
        choices = k.shape[1] if spec.by_head else 1
        chosen = q.new_full((choices, len(q), 0 if dense else most), -1, dtype=torch.int32)
        num_chosen = q.new_zeros((), dtype=torch.int64)
        rows: tuple[Tensor | None, Tensor | None] = None, None
        if gathers:
            base, window_start = rows = rows_to_see(bounds, spec, q.device)
            gather = gather_of(q, k, v, chosen, base, window_start, spec)
            taught = grads if learns else None
            total, num_chosen = _attend_gathered(tiles, gather, out, lse, token_mask, teach, taught)
        for document in () if gathers else tiles.documents():
            for start, stop in tiles.ranges(document):
                position = tiles.position(document, start, stop)
                parts = tiles.of_index(document, start, stop)
                if learns:
                    parts = _leaves(parts)
                with own_graph(learns):
                    scores = None if dense and not teach else block_scores(*parts, position, spec)

                # The choice, then what it lets through.
                blocks, counts = None, _counts(token_mask, start, stop, q)
                if not dense:
                    assert scores is not None
                    best = choose(scores, position, spec)
                    chosen[:, start:stop, : best.shape[-1]] = best[0]
                    num_chosen += ((best[0] >= 0).sum((0, 2)) * counts.long()).sum()
                    blocks = blocks_mask(best, scores.shape[-1])
                queries, keys, values = tiles.of_attention(document, start, stop)
                seen = tokens_mask(blocks, position, keys.shape[1], spec)
                found = attend(queries, keys, values, seen)
                out[start:stop] = found.out[0].flatten(1, 2)
                lse[:, start:stop] = found.lse[0].flatten(0, 1)
                if not teach:
                    continue

                # What the index is taught.
                assert scores is not None
                masses = block_masses(found.probs, scores.shape[-1], spec)
                candidates = scores.detach() > -torch.inf if blocks is None else blocks
                with own_graph(learns):
                    by_query = divergence(scores, masses, candidates)[0].mean(0)
                    share = (by_query * counts.to(by_query.dtype)).sum()
                total += share.detach()
                if learns and share.requires_grad:
                    _add(grads, parts, share, tiles.key_range(document, stop), start, stop)

        ctx.save_for_backward(q, k, v, *index, out, lse, chosen, *rows, *grads)
        ctx.bounds, ctx.spec, ctx.dense, ctx.gathers = bounds, spec, dense, gathers
        ctx.mark_non_differentiable(num_chosen)
        return out, total, num_chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout, dtotal = grads[:2]
        q, k, v, iq, ik, iw, out, lse, chosen, *rows_and_grads = ctx.saved_tensors
        base, window_start, *index_grads = rows_and_grads
        index = [None if g is None else g * dtotal for g in index_grads]
        index = [
            None if g is None else g.to(x.dtype) for g, x in zip(index, (iq, ik, iw), strict=True)
        ]
        none = (None,) * 6
        if not any(ctx.needs_input_grad[:3]):
            return (None, None, None, *index, *none)
        if ctx.gathers:
            from ops.gather_attention import triton_backend

            gather = gather_of(q, k, v, chosen, base, window_start, ctx.spec)
            made = triton_backend.attend_backward(gather, out, lse, dout.contiguous())
            return (made.dq, made.dk, made.dv, *index, *none)

        tiles = _Tiles(q, k, v, Index(iq, ik, iw), ctx.bounds, ctx.spec)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=tiles.real) for x in (k, v))
        scale = q.shape[-1] ** -0.5
        for document in tiles.documents():
            for start, stop in tiles.ranges(document):
                position = tiles.position(document, start, stop)
                queries, keys, values = tiles.of_attention(document, start, stop)
                blocks = None
                if not ctx.dense:
                    num_blocks = -(-(stop - document.begin) // ctx.spec.block_size)
                    blocks = blocks_mask(chosen[:, start:stop].unsqueeze(0), num_blocks)
                seen = tokens_mask(blocks, position, keys.shape[1], ctx.spec)

                # P = e^(z - L), dz = P (do . v - do . o)
                logits = torch.einsum("bqhgd,bnhd->bhgqn", queries, keys) * scale
                logits = logits.masked_fill(~seen.unsqueeze(2), -torch.inf)
                shape = (1, k.shape[1], tiles.groups, stop - start, 1)
                probs = (logits - lse[:, start:stop].reshape(shape)).exp()
                into = dout[start:stop].unflatten(1, (-1, tiles.groups)).unsqueeze(0)
                given = out[start:stop].unflatten(1, (-1, tiles.groups)).unsqueeze(0)
                into, given = into.to(tiles.real), given.to(tiles.real)
                delta = (into * given).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
                dz = probs * (torch.einsum("bqhgd,bnhd->bhgqn", into, values) - delta) * scale
                dq[start:stop] = torch.einsum("bhgqn,bnhd->bqhgd", dz, keys)[0].flatten(1, 2)
                span = slice(document.begin, stop)
                dk[span] += torch.einsum("bhgqn,bqhgd->bnhd", dz, queries)[0]
                dv[span] += torch.einsum("bhgqn,bqhgd->bnhd", probs, into)[0]
        return (dq, dk.to(k.dtype), dv.to(v.dtype), *index, *none)


def _attend_gathered(
    tiles: _Tiles,
    gather: Gather,
    out: Tensor,
    lse: Tensor,
    token_mask: Tensor | None,
    teach: bool,
    grads: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """The forward pass by kernels, into `out`, `lse`, what is chosen and `grads` of the index
    (None: it does not learn). The divergence, and how many blocks were chosen.
    """
    from ops.gather_attention import triton_backend
    from ops.index_attention.triton_backend import Gradients, block_scores, choose

    assert gather.chosen is not None
    total = lse.new_zeros(())
    num_chosen = lse.new_zeros((), dtype=torch.int64)
    for document in tiles.documents():
        for start, tile in tiles.index_tiles(document):
            stop = start + len(tile.queries)
            scores = block_scores(tile, with_best=grads is not None)
            position = tiles.position(document, start, stop)
            chosen = choose(scores.values.unsqueeze(0), position, tiles.spec)[0]
            gather.chosen[:, start:stop, : chosen.shape[-1]] = chosen
            counts = _counts(token_mask, start, stop, out)
            num_chosen += ((chosen >= 0).sum((0, 2)) * counts.long()).sum()
            triton_backend.attend(gather, out, lse, start, stop)
            if not teach:
                continue

            # What was chosen is all there is.
            into = None
            if grads is not None:
                of_queries, of_keys, of_weights = grads
                assert of_queries is not None and of_keys is not None
                into = Gradients(
                    of_queries[start:stop],
                    of_keys[tiles.key_range(document, stop)],
                    None if of_weights is None else of_weights[start:stop],
                )
            masses = triton_backend.masses(gather, lse, start, stop)[..., : chosen.shape[-1]]
            total += teach_chosen(tile, scores, chosen, masses, counts, into)
    return total, num_chosen


class _LearnFromAll(torch.autograd.Function):
    """apply(*index, q, k, lse, token_mask, bounds, spec) -> [], by kernels: the divergence from the
    masses of attention to everything, whose log-sum-exp is given. As _Indexed it has its gradient
    at once.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        from ops.index_attention.triton_backend import Gradients, block_masses, block_scores

        index, (q, k, lse, token_mask, bounds, spec) = Index(*given[:3]), given[3:]
        q, keys = q.contiguous(), k.to(q.dtype).contiguous().transpose(0, 1)
        lse = lse.contiguous()
        tiles = _Tiles(q, k, None, index, bounds, spec)
        learns = any(ctx.needs_input_grad[:3])
        grads = [
            torch.zeros_like(x, dtype=torch.float32) if learns and x is not None else None
            for x in index
        ]
        weights = None if token_mask is None else token_mask.float()
        total: Tensor = lse.new_zeros(())
        size = spec.block_size
        for document in tiles.documents():
            for start, tile in tiles.index_tiles(document, k.shape[1]):
                stop = start + len(tile.queries)
                seen = tiles.position(document, start, stop)[0] + 1
                if spec.pools_keys:
                    seen = seen // size * size
                scores = block_scores(tile, with_best=learns)
                number = scores.values.shape[-1]
                if not number:
                    continue
                masses = block_masses(
                    q, keys, lse, seen.int(), start, document.begin, number + 1, size
                )
                if not spec.by_head:
                    masses = masses.sum(0, keepdim=True)
                into = None
                of_queries, of_keys, of_weights = grads
                if of_queries is not None and of_keys is not None:
                    into = Gradients(
                        of_queries[start:stop],
                        of_keys[tiles.key_range(document, stop)],
                        None if of_weights is None else of_weights[start:stop],
                    )
                candidates = ((seen + size - 1) // size).int()
                of_tile = None if weights is None else weights[start:stop]
                total += teach_all(tile, scores, masses, candidates, of_tile, into)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in index]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = (
            None if g is None else (g * grads[0]).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*found, *(None,) * 6)


def _leaves(
    parts: tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    queries, keys, weights = (None if x is None else x.detach().requires_grad_() for x in parts)
    assert queries is not None and keys is not None
    return queries, keys, weights


def _add(
    grads: list[Tensor | None],
    parts: tuple[Tensor, Tensor, Tensor | None],
    share: Tensor,
    keys: slice,
    start: int,
    stop: int,
) -> None:
    """The tile's part of the gradients; of the keys, which later tiles see, too, as a sum."""
    found = torch.autograd.grad(share, [x for x in parts if x is not None])
    rows = slice(start, stop)
    for total, new, at in zip(grads, found, (rows, keys, rows), strict=False):
        assert total is not None
        total[at] += new[0]


def _counts(token_mask: Tensor | None, start: int, stop: int, like: Tensor) -> Tensor:
    """[Q] bool."""
    if token_mask is None:
        return like.new_ones(stop - start, dtype=torch.bool)
    return token_mask[start:stop]


def _check(
    q: Tensor, k: Tensor, v: Tensor, index: Index, bounds: Sequence[int], spec: IndexSpec
) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [T, heads, head_dim] and [T, "
            "kv_heads, head_dim]"
        )
    if v.shape != k.shape:
        raise ValueError(f"v {tuple(v.shape)} must have the shape of k {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} heads cannot be shared evenly by {k.shape[1]} key/value heads"
        )
    if bounds[0] != 0 or bounds[-1] != len(q) or sorted(bounds) != list(bounds):
        raise ValueError(f"bounds must rise from 0 to the {len(q)} tokens of q, not {bounds}")

    heads, width = index.queries.shape[1:]
    if spec.by_head and heads != k.shape[1]:
        raise ValueError(
            f"rule={spec.rule} has an index head for each of the {k.shape[1]} key/value heads, not "
            f"{heads}"
        )
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    blocks = sum(length // spec.block_size for length in lengths)
    expected = {
        "queries": (index.queries, (len(q), heads, width)),
        "keys": (index.keys, (blocks if spec.pools_keys else len(q), width)),
        "weights": (index.weights, (len(q), heads) if spec.rule == "dsa" else None),
    }
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"{name} of the index have shape {found}, expected {shape}")
