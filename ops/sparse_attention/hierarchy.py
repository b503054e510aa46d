"""Two levels of selection, O(T log T): super-blocks first, then blocks of the few that are opened.
Plain torch, any device.

A super-block is `fanout` consecutive blocks of a document, counted from its start. Where all of
them are candidates it is one entry, unless it is among the num_expanded of largest estimated mass,
which are opened. Blocks of open super-blocks, and candidates at the edges that fill no super-block,
are ranked and kept as in the one-level op. So every past token is in the softmax once: by itself,
in a coarse entry, or in a closed super-block's.

The backward pass runs the chunk again under autograd on gathered copies and adds their gradients
back: memory stays O(T).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.sparse_attention.blocks import block_table
from ops.sparse_attention.chunked import (
    Chunk,
    Rows,
    complete_blocks,
    pool,
    pool_spans,
    pool_spans_backward,
    real_dtype,
    token_spans,
)
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.noise import (
    draw_top_k,
    drawing_heads,
    gumbel,
    selection_counter,
    token_hash,
)
from ops.sparse_attention.problem import (
    GRADIENTS,
    DecodeProblem,
    Problem,
    nothing_selected,
)
from ops.sparse_attention.ranking import block_of_key, rank_keys, rank_values
from ops.sparse_attention.spec import SMALLEST, SelectionNoise

_NEVER = float("-inf")
_MAX_QUERIES = 64
"""Of a chunk: open entries and selected tokens are gathered for every query."""


class _Plan(NamedTuple):
    """What the n queries of a chunk attend to beside window and first blocks."""

    supers: slice
    """The S super-blocks in reach of any of them."""
    closed: Tensor
    """[Hk, n, S] bool: a query has the super-block as one entry."""
    blocks: Tensor
    """[Hk, n, L] open candidates, -1 for none."""
    live: Tensor
    """[Hk, n, L] bool: the candidate is real and not selected, so that its entries take part."""
    selected: Tensor
    """[Hk, n, K], -1 for none."""


class _Part(NamedTuple):
    """Entries of one softmax."""

    keys: Tensor
    """[Hk, L, d], shared by the queries, or [Hk, n, L, d]."""
    values: Tensor
    """As the keys."""
    var: Tensor | None
    """As the keys; None for single tokens."""
    size: int
    """Tokens of an entry."""
    mask: Tensor
    """Broadcast against [Hk, n, G, L], True where a query sees the entry."""


def attend_in_two_levels(
    problem: Problem, noise: SelectionNoise | None, token_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, tail_mass, selected_mass, selected) of interface.AttentionOutput. The problem's
    selected and entries are not read: both levels select and pool by themselves.
    """
    attended: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    attended = _TwoLevels.apply(*problem, noise, token_ids)  # type: ignore[no-untyped-call]
    return attended


def decode_in_two_levels(problem: DecodeProblem) -> tuple[Tensor, Tensor]:
    """See interface.decode. Pools both levels anew for every token: O(length), where one level
    costs O(top_k).
    """
    q, bias, length, spec = problem.q, problem.bias, problem.length, problem.spec
    table = block_table(torch.tensor([0, length], device=q.device), length, spec)
    outs = torch.zeros_like(q)
    lses = torch.zeros(q.shape[:2], dtype=real_dtype(q.dtype), device=q.device)
    for i in range(len(q)):
        # A row is its document's attention, of which only the last query is looked at; the others
        # are there for their places.
        queries = q.new_zeros(length, *q.shape[1:])
        queries[-1] = q[i]
        biases = None if bias is None else bias.new_zeros(length, q.shape[1])
        if biases is not None and bias is not None:
            biases[-1] = bias[i]
        document = Problem(
            q=queries,
            k=problem.keys[i, :length],
            v=problem.values[i, :length],
            bias=biases,
            sink=problem.sink,
            selected=nothing_selected(queries, problem.keys.shape[2]),
            entries=None,
            table=table,
            spec=spec,
            exact=True,
            coarse=True,
        )
        state = _State(document, None, None)
        chunk = state.rows.last()
        plan = state.plan(chunk)
        out, lse, *_ = state.attend(chunk, plan, state.inputs(chunk, plan))
        outs[i], lses[i] = out.reshape(q.shape[1:]).to(q.dtype), lse.reshape(-1)
    return outs, lses


class _TwoLevels(torch.autograd.Function):
    """apply(*problem, noise, token_ids) -> what attend_in_two_levels returns."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        problem, (noise, token_ids) = Problem(*given[:-2]), given[-2:]
        q, k, spec = problem.q, problem.k, problem.spec
        state = _State(problem, noise, token_ids)
        heads = q.shape[1]
        lse = state.rows.q.new_zeros(len(q), heads)
        out = torch.zeros_like(q)
        tail_mass = torch.zeros_like(lse)
        selected_mass = torch.zeros_like(lse)
        shape = (k.shape[1], len(q), spec.top_k)
        selected = torch.full(shape, -1, dtype=torch.int32, device=q.device)

        for chunk in state.rows.chunks(_MAX_QUERIES):
            rows = chunk.rows
            plan = state.plan(chunk)
            selected[:, rows] = plan.selected.int()
            found = state.attend(chunk, plan, state.inputs(chunk, plan))
            for whole, part in zip((out, lse, tail_mass, selected_mass), found, strict=True):
                whole[rows] = part.transpose(0, 1).flatten(1, 2).to(whole.dtype)

        # Inputs alone are kept: the plans are made again.
        ctx.save_for_backward(*problem.tensors(), token_ids)
        ctx.settings = spec, problem.exact, problem.coarse
        ctx.noise = noise
        ctx.mark_non_differentiable(tail_mass, selected_mass, selected)
        return out, lse, tail_mass, selected_mass, selected

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor, dlse: Tensor, *masses: Tensor
    ) -> tuple[Tensor | None, ...]:
        *tensors, token_ids = ctx.saved_tensors
        problem = Problem.of_tensors(tensors, *ctx.settings)
        q, k, v, bias, sink, *_ = problem
        state = _State(problem, ctx.noise, token_ids)
        p = state.rows
        dout, dlse = p.rows(dout.to(p.q.dtype)), p.rows(dlse.to(p.q.dtype))
        grads = state.zero_grads()

        # Equal inputs and token ids give the same plan as in the forward pass; it has no gradient.
        for chunk in p.chunks(_MAX_QUERIES):
            plan = state.plan(chunk)
            leaves = {
                name: x.detach().requires_grad_() for name, x in state.inputs(chunk, plan).items()
            }

            with torch.enable_grad():
                out, lse, *_ = state.attend(chunk, plan, leaves)
            found = torch.autograd.grad(
                (out, lse),
                list(leaves.values()),
                (dout[:, chunk.rows], dlse[:, chunk.rows]),
                allow_unused=True,
            )
            state.add(grads, chunk, plan, dict(zip(leaves, found, strict=True)))

        dk, dv = state.finish(grads)
        return (
            p.by_token(grads["q"]).to(q.dtype),
            dk.to(k.dtype),
            dv.to(v.dtype),
            None if bias is None else p.by_token(grads["bias"].squeeze(-1)).to(bias.dtype),
            None if sink is None else grads["sink"].view(-1).to(sink.dtype),
            *(None,) * (len(Problem._fields) + 2 - GRADIENTS),
        )


class _State:
    """Inputs as rows, entries of both levels, and the passes over a chunk."""

    def __init__(self, problem: Problem, noise: SelectionNoise | None, token_ids: Tensor | None):
        q, k, v, sink, table, spec = (
            problem.q,
            problem.k,
            problem.v,
            problem.sink,
            problem.table,
            problem.spec,
        )
        self.table = table
        self.spec = spec
        self.noise = noise
        self.raw = (k, v)
        kv_heads = k.shape[1]
        self.entries = CoarseEntries(*(x.to(real_dtype(q.dtype)) for x in pool(k, v, table, spec)))
        self.rows = Rows(problem._replace(entries=self.entries, exact=True, coarse=False))
        self.sink = None if sink is None else sink.to(self.rows.q.dtype).view(kv_heads, 1, -1)

        # A super-block starts at a multiple of fanout in its document and is whole: its last block
        # is there, is complete and belongs to the same document.
        block = torch.arange(len(table.start), device=q.device)
        last = (block + spec.fanout - 1).clamp_max(len(block) - 1)
        whole = ((block - table.first) % spec.fanout == 0) & (block + spec.fanout <= len(block))
        whole &= (table.first[last] == table.first) & (
            table.end[last] - table.start[last] == spec.block_size
        )
        self.super_start = whole.nonzero()[:, 0]  # first block of every super-block

        self.span = spec.fanout * spec.block_size
        self.super_tokens = token_spans(table.start[self.super_start], self.span)
        self.supers = pool_spans(k, v, self.super_tokens, self.span)

        random = noise is not None and (noise.temperature > 0 or noise.min_top_k is not None)
        ids = problem.places if token_ids is None else token_ids
        self.hashed = token_hash(noise.seed, ids) if random and noise is not None else None

    def plan(self, chunk: Chunk) -> _Plan:
        """Open super-blocks and select blocks for the queries of a chunk; no gradient."""
        with torch.no_grad():
            return self._plan(chunk)

    def _plan(self, chunk: Chunk) -> _Plan:
        table, spec, p = self.table, self.spec, self.rows
        device = p.q.device
        rows = chunk.rows
        q = p.q[:, rows]
        own = p.own[rows]
        first, low, high = (
            x[own].long().unsqueeze(1) for x in (table.first, table.sink_end, table.local_start)
        )

        # Super-blocks in reach of any query, and for each query those that are candidates whole.
        last = max(chunk.low, chunk.high - spec.fanout + 1)
        bounds = torch.tensor([chunk.low, last], device=device)
        begin, end = torch.searchsorted(self.super_start, bounds).tolist()
        supers = slice(begin, max(begin, end))
        start = self.super_start[supers]
        whole = (start >= low) & (start + spec.fanout <= high)  # [n, S]

        # The best are opened by their mass alone: noise and the drawn number of blocks are the
        # second level's.
        keys, values, var = (x[:, supers] for x in self.supers)
        super_logits, _ = self._logits(q, _Part(keys, values, var, self.span, whole[None, :, None]))
        lse = torch.logsumexp(super_logits, -1, keepdim=True)
        share = torch.where(whole[:, None], (super_logits - lse).exp(), 0.0)
        mass = share.sum(2).float().clamp_min(SMALLEST).log()
        order = torch.where(whole, rank_keys(mass, torch.arange(len(start), device=device)), -1)
        # [Hk, n, X], -1: none
        best = block_of_key(order.topk(min(spec.num_expanded, len(start)), -1).values)
        opened = torch.zeros(
            p.kv_heads, len(whole), len(start) + 1, dtype=torch.bool, device=device
        )
        opened.scatter_(2, torch.where(best < 0, len(start), best), True)
        closed = whole & ~opened[..., :-1]

        # open candidates: blocks of opened super-blocks, and the edges that fill none
        step = torch.arange(spec.fanout, device=device)
        # best -1 reads the padding
        inside = F.pad(start, (0, 1))[best].unsqueeze(-1) + step
        inside = torch.where(best.unsqueeze(-1) >= 0, inside, -1).flatten(2)
        # the first boundary at or above low
        up = first - (first - low) // spec.fanout * spec.fanout
        down = torch.maximum(first + (high - first) // spec.fanout * spec.fanout, up)
        edges = torch.cat(
            [
                torch.where(low + step < torch.minimum(up, high), low + step, -1),
                torch.where(down + step < high, down + step, -1),
            ],
            -1,
        ).expand(p.kv_heads, -1, -1)

        # Forced blocks are no candidates, but their mass is in the normaliser that scores are
        # shares of.
        blocks = torch.cat([inside, edges], -1)
        sinks = first + torch.arange(spec.num_sink_blocks, device=device)
        local = high + torch.arange(spec.num_local_blocks - 1, device=device)
        forced = torch.cat(
            [torch.where(sinks < low, sinks, -1), torch.where(local < own.unsqueeze(1), local, -1)],
            -1,
        )
        forced = forced.expand(p.kv_heads, -1, -1)

        seen = torch.cat([blocks, forced], -1)
        part = self._open_part(seen, seen >= 0)
        c, kappa = self._logits(q, part)
        super_logits = super_logits.masked_fill(~closed.unsqueeze(2), _NEVER)
        normaliser = torch.logsumexp(torch.cat([c, super_logits], -1), -1, keepdim=True)
        values, _ = rank_values(c, kappa, torch.where(part.mask, (c - normaliser).exp(), 0.0), spec)
        values = values[..., : blocks.shape[2]]

        # The counters are those of one level: a block's noise does not hang on what is open.
        if self.hashed is not None and self.noise is not None and self.noise.temperature > 0:
            first_head, num_heads = drawing_heads(self.noise, p.kv_heads)
            head = first_head + torch.arange(p.kv_heads, device=device).view(-1, 1, 1)
            counter = selection_counter(blocks - first, head, num_heads)
            values = values + self.noise.temperature * gumbel(
                self.hashed[rows].unsqueeze(1), counter
            )

        keys = torch.where(blocks >= 0, rank_keys(values, blocks.clamp_min(0)), -1)
        found = block_of_key(keys.topk(min(spec.top_k, keys.shape[2]), -1).values)
        if self.hashed is not None:
            counts = draw_top_k(self.hashed[rows], p.kv_heads, spec.top_k, self.noise)
            if counts is not None:
                found = found.masked_fill(
                    torch.arange(found.shape[2], device=device) >= counts.unsqueeze(-1), -1
                )

        # Ids in rising order, none last; what is selected takes part by its tokens instead of its
        # entries.
        far = len(table.start)
        selected = torch.full((p.kv_heads, len(own), spec.top_k), far, device=device)
        selected[..., : found.shape[2]] = torch.where(found < 0, far, found)
        selected = selected.sort(-1).values
        taken = (blocks.unsqueeze(-1) == selected.unsqueeze(-2)).any(-1)
        return _Plan(
            supers,
            closed,
            blocks,
            (blocks >= 0) & ~taken,
            torch.where(selected == far, -1, selected),
        )

    def _open_part(self, blocks: Tensor, live: Tensor) -> _Part:
        r = self.spec.entries_per_block
        at = (
            blocks.clamp_min(0).unsqueeze(-1) * r + torch.arange(r, device=blocks.device)
        ).flatten(2)
        head = torch.arange(len(blocks), device=blocks.device).view(-1, 1, 1)
        keys, values, var = (x[head, at] for x in self.entries)
        return _Part(
            keys,
            values,
            var,
            self.spec.coarse_block_size,
            live.repeat_interleave(r, -1).unsqueeze(2),
        )

    def _logits(self, q: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        """[Hk, n, G, L] masked logits and variance terms, without bias."""
        keys = part.keys.unsqueeze(1) if part.keys.dim() == 3 else part.keys
        z = self.rows.scale * torch.matmul(q, keys.transpose(-1, -2))
        kappa = torch.zeros_like(z)
        if part.var is not None and self.spec.order == 2:
            var = part.var.unsqueeze(1) if part.var.dim() == 3 else part.var
            kappa = torch.matmul(q.square() * (0.5 * self.rows.scale**2), var.transpose(-1, -2))
            kappa = kappa.clamp_max(self.spec.max_variance)
        return (z + kappa + math.log(part.size)).masked_fill(~part.mask, _NEVER), kappa

    def inputs(self, chunk: Chunk, plan: _Plan) -> dict[str, Tensor]:
        """Copies of what a chunk reads, by name; gradients come back by the same names (add)."""
        p = self.rows
        window = slice(chunk.window, chunk.stop)
        sinks = slice(chunk.sink_begin, chunk.sink_end)

        found = {
            "q": p.q[:, chunk.rows],
            "window_keys": p.k[:, window],
            "window_values": p.v[:, window],
            "sink_keys": p.k[:, sinks],
            "sink_values": p.v[:, sinks],
        }
        head, at = self._selected_tokens(plan)
        found |= {"selected_keys": p.k[head, at], "selected_values": p.v[head, at]}

        part = self._open_part(plan.blocks, plan.live)
        assert part.var is not None
        found |= {"open_mean": part.keys, "open_value": part.values, "open_var": part.var}
        found |= {
            f"super_{name}": x[:, plan.supers]
            for name, x in zip(("mean", "value", "var"), self.supers, strict=True)
        }

        if p.bias is not None:
            found["bias"] = p.bias[:, chunk.rows]
        if self.sink is not None:
            found["sink"] = self.sink
        return found

    def _selected_tokens(self, plan: _Plan) -> tuple[Tensor, Tensor]:
        size = self.spec.block_size
        start = self.table.start[plan.selected.clamp_min(0)].long()
        at = (start.unsqueeze(-1) + torch.arange(size, device=start.device)).flatten(2)
        return torch.arange(len(at), device=at.device).view(-1, 1, 1), at.clamp_max(
            self.rows.k.shape[1] - 1
        )

    def attend(
        self, chunk: Chunk, plan: _Plan, x: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out [Hk, n, G, d], lse, tail mass and selected mass [Hk, n, G] of a chunk, from its
        inputs.
        """
        p, spec, rows = self.rows, self.spec, chunk.rows
        masks = [part.mask for part in p.parts(chunk)]
        exact = [_Part(x["window_keys"], x["window_values"], None, 1, masks[0])]
        if len(masks) > 1:
            exact.append(_Part(x["sink_keys"], x["sink_values"], None, 1, masks[1]))
        there = (plan.selected >= 0).repeat_interleave(spec.block_size, -1).unsqueeze(2)
        exact.append(_Part(x["selected_keys"], x["selected_values"], None, 1, there))

        live = plan.live.repeat_interleave(spec.entries_per_block, -1).unsqueeze(2)
        pooled = [
            _Part(x["open_mean"], x["open_value"], x["open_var"], spec.coarse_block_size, live),
            _Part(
                x["super_mean"],
                x["super_value"],
                x["super_var"],
                self.span,
                plan.closed.unsqueeze(2),
            ),
        ]

        # The bias is for coarse entries alone, and the sink for none: it comes last, so that it has
        # a share of the softmax and no value.
        logits = [self._logits(x["q"], part)[0] for part in exact]
        for part in pooled:
            c = self._logits(x["q"], part)[0]
            logits.append(c if "bias" not in x else c + x["bias"])
        if "sink" in x:
            logits.append(x["sink"].unsqueeze(-1).expand(-1, rows.stop - rows.start, -1, -1))

        lse = torch.logsumexp(torch.cat(logits, -1), -1)
        probs = [(z - lse.unsqueeze(-1)).exp() for z in logits]
        out = sum(
            torch.matmul(w, part.values.unsqueeze(1) if part.values.dim() == 3 else part.values)
            for w, part in zip(probs, exact + pooled, strict=False)
        )

        # The masses are statistics: no gradient.
        tail = sum(w.detach().sum(-1) for w in probs[len(exact) : len(exact) + 2])
        assert isinstance(out, Tensor) and isinstance(tail, Tensor)
        return out, lse, tail, probs[len(exact) - 1].detach().sum(-1)

    def zero_grads(self) -> dict[str, Tensor]:
        p = self.rows
        found = {"q": torch.zeros_like(p.q), "k": torch.zeros_like(p.k), "v": torch.zeros_like(p.v)}
        found |= {
            name: torch.zeros_like(x)
            for name, x in zip(("mean", "value", "var"), self.entries, strict=True)
        }
        found |= {
            f"super_{name}": torch.zeros_like(x)
            for name, x in zip(("mean", "value", "var"), self.supers, strict=True)
        }
        if p.bias is not None:
            found["bias"] = torch.zeros_like(p.bias)
        if self.sink is not None:
            found["sink"] = torch.zeros_like(self.sink)
        return found

    def add(
        self, grads: dict[str, Tensor], chunk: Chunk, plan: _Plan, found: dict[str, Tensor | None]
    ) -> None:
        """Add a chunk's gradients, as `inputs` named them, to the whole ones."""
        window, sinks = slice(chunk.window, chunk.stop), slice(chunk.sink_begin, chunk.sink_end)
        _, at = self._selected_tokens(plan)
        r = self.spec.entries_per_block
        open_entries = (
            plan.blocks.clamp_min(0).unsqueeze(-1) * r + torch.arange(r, device=at.device)
        ).flatten(2)

        # Where each input came from: a whole tensor, and what of it.
        places: dict[str, tuple[str, slice | Tensor]] = {
            "q": ("q", chunk.rows),
            "bias": ("bias", chunk.rows),
            "sink": ("sink", slice(None)),
            "window_keys": ("k", window),
            "window_values": ("v", window),
            "sink_keys": ("k", sinks),
            "sink_values": ("v", sinks),
            "selected_keys": ("k", at),
            "selected_values": ("v", at),
        }
        for name in ("mean", "value", "var"):
            places |= {
                f"open_{name}": (name, open_entries),
                f"super_{name}": (f"super_{name}", plan.supers),
            }

        for name, grad in found.items():
            if grad is None:
                continue
            target, place = places[name]
            if isinstance(place, slice):
                grads[target][:, place] += grad
            else:
                # Queries may have gathered the same token, so that an index can repeat: index_add_
                # sums.
                for head, (index, values) in enumerate(zip(place, grad, strict=True)):
                    grads[target][head].index_add_(0, index.flatten(), values.flatten(0, 1))

    def finish(self, grads: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values [T, Hk, d], those through the entries of both levels
        included.
        """
        table, spec, r = self.table, self.spec, self.spec.entries_per_block
        complete = complete_blocks(table, spec)
        mean, *entries = (
            x.unflatten(1, (-1, r))[:, complete].flatten(1, 2)
            for x in (self.entries.key_mean, grads["mean"], grads["value"], grads["var"])
        )

        pool_spans_backward(
            self.raw[0],
            token_spans(table.start[complete], spec.block_size),
            spec.coarse_block_size,
            mean,
            CoarseEntries(*entries),
            grads["k"],
            grads["v"],
        )

        # A super-block's entry is pooled from the tokens themselves, not from the blocks' entries.
        supers = CoarseEntries(grads["super_mean"], grads["super_value"], grads["super_var"])
        pool_spans_backward(
            self.raw[0],
            self.super_tokens,
            self.span,
            self.supers.key_mean,
            supers,
            grads["k"],
            grads["v"],
        )
        return grads["k"].transpose(0, 1), grads["v"].transpose(0, 1)
