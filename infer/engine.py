"""Continuous batching: requests are admitted by pages, their prompts computed in pieces, and all of
them decode together; one that ends makes room at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from infer.batch import Piece, first_tokens, next_tokens
from infer.budget import BudgetRows, RouterState, capture
from infer.config import EngineConfig
from infer.graphs.capture import Capture, CaptureError, CudaCapture
from infer.graphs.steps import DecodeGraphs
from infer.graphs.waits import why_not
from infer.pages import PagePool, Places, next_key, root_key
from infer.request import Completion, Drawn, Event, FinishReason, Request
from infer.sampling import sample
from infer.sequence import Sequence
from infer.speculate import Utility, kept
from model.attention.base import has_varlen_kernel
from model.attention.cache import LivePages, Regions
from model.paging import (
    Decoded,
    TokenBudgets,
    is_bounded,
    live_window,
    longest_entry,
    new_pages,
    prefill_pages,
    step_pages,
)
from model.transformer import Transformer

log = logging.getLogger("loadstone")
SIMILAR = 0.75
"""Prompts are padded to the longest of a batch, none of which is shorter than this share of it."""
USUAL_PAGE = 16
"""Tokens of a page, where nothing asks for another size."""
GRAPH_ROWS = 16
"""On a GPU rows come in multiples of this, beyond the first powers of two: few shapes."""


@dataclass
class Drafted:
    """What speculation has done so far."""

    rounds: int = 0
    drafts: int = 0
    kept: int = 0


@dataclass
class Confined:
    """What engine.max_active_experts has changed so far, of tokens by layer."""

    routed: int = 0
    rerouted: int = 0


def page_size_of(model: Transformer) -> int:
    """Tokens of a page: a block of the sparse layers, whose pooled entries live with it; of
    compressed layers the tokens of the longest entry, where these are more than usual.
    """
    sparse = model.sparse_attentions()
    if sparse:
        return sparse[0].spec.block_size
    return max(USUAL_PAGE, longest_entry(model))


def num_live(window: int, page_size: int, settings: EngineConfig) -> int:
    """Pages that need room for their tokens' own keys at most at a time, and a scratch page: what
    every slot reads to decode, drafts included, and one step's piece of prompts.
    """
    of_slot = -(-(window + settings.draft_tokens) // page_size) + 2
    of_piece = -(-settings.prefill_tokens // page_size)
    return 1 + settings.max_slots * of_slot + of_piece


class Engine:
    """Generates for many requests with one model on this rank.

    A request's tokens are those that it would have alone: every row sees its own pages, routers
    choose by token, and its draws hang on its seed. What differs is rounding, since kernels sum in
    another order in batches of another size.

    Over an expert group of several ranks every forward pass is collective, so all ranks call `step`
    as often as each other, until `step` says on all of them that nothing is left.

    Args:
        model: in eval mode, on its device.
        end_token: ends a document. None: nothing does.
        context: names what keys and values depend on besides the tokens, the weights and the
            request's budget; pages are shared only within one.
        budgets: states of the routers that a request may ask for. Requests of different budgets
            share slots and forward passes: every token reads the state of its own. What their
            tokens leave in pages is never shared.
        capture_with: makes graphs of decoding steps, whatever the settings say; None: CUDA does,
            where engine.cuda_graphs and the model let it.

    Attributes:
        graphs: of decoding steps; None: there are none, and without_graphs says why.
    """

    def __init__(
        self,
        model: Transformer,
        settings: EngineConfig | None = None,
        end_token: int | None = None,
        context: str = "",
        clock: Callable[[], float] = time.monotonic,
        budgets: Mapping[float, list[RouterState]] | None = None,
        capture_with: Capture | None = None,
    ):
        settings = settings or EngineConfig()
        if problems := settings.problems():
            raise ValueError("; ".join(problems))
        self.model, self.settings = model.eval(), settings
        self.end_token, self.context, self.clock = end_token, context, clock
        self.device = model.any_weight.device
        self.max_len = model.config.max_seq_len
        self.group = model.groups.expert if model.groups.expert_size > 1 else None

        self.page_size = page_size_of(model)
        by_request = -(-self.max_len // self.page_size)
        room = settings.cache_tokens
        num_pages = settings.max_slots * by_request if room is None else -(-room // self.page_size)
        self.pool = PagePool(1 + num_pages, self.page_size)
        self.places: Places | None = None
        self.live: LivePages | None = None
        window = live_window(model)
        self.live_window = window or 0
        if window is not None:
            number = min(1 + num_pages, num_live(window, self.page_size, settings))
            self.places = Places(number)
            self.live = LivePages(1 + num_pages, number, self.device)
        # A bounded cache keeps tokens by document: pages hold entries, and cannot be shared, since
        # what stays of a beginning is told by the masses of its own queries.
        regions = None
        self.regions: deque[int] | None = None
        self.shares = settings.prefix_reuse
        if is_bounded(model):
            regions = Regions(settings.max_slots, min(by_request, num_pages))
            self.regions, self.shares = deque(range(regions.number)), False
        self.pages = new_pages(model, 1 + num_pages, self.page_size, self.live, regions)
        self.packed = has_varlen_kernel(self.device, model.any_weight.dtype)

        self.budgets: BudgetRows | None = None
        if budgets:
            routers = model.routers()
            self.budgets = BudgetRows(routers, dict([(None, capture(routers)), *budgets.items()]))
        self.utility = self._utility()
        self.drafted = Drafted()
        self.limit = self._limit()
        self.confined = Confined()
        self.without_graphs: str | None = None
        self.graphs = self._graphs(capture_with, by_request)

        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.num_forwards = {"prefill": 0, "continue": 0, "decode": 0}
        self.rows_decoded = 0

    def _graphs(self, capture_with: Capture | None, by_request: int) -> DecodeGraphs | None:
        """
        Raises:
            ValueError: they are asked for, and the model's steps cannot be graphs.
        """
        asked = self.settings.cuda_graphs
        if capture_with is None:
            reasons = why_not(self.model) if asked else ["engine.cuda_graphs is false"]
            if reasons and asked is True:
                raise ValueError(
                    f"engine.cuda_graphs is true, but {'; '.join(reasons)}: set auto or false"
                )
            if reasons:
                self._go_without_graphs("; ".join(reasons), told=asked == "auto")
                return None
            capture_with = CudaCapture(self.device)
        return DecodeGraphs(
            self.model,
            self.pages,
            None if self.budgets is None else self.budgets.tables,
            self.settings.max_slots,
            by_request,
            self.limit,
            capture_with,
        )

    def capture_steps(self) -> Iterator[None]:
        """Make the graphs of every shape that a decoding step can have, one at a time, so that no
        request waits for one. Nothing where steps are no graphs.

        Raises:
            RuntimeError: one cannot be captured, and graphs are asked for.
        """
        if self.graphs is None:
            return
        for shape in self.graphs.every_shape(self.context):
            try:
                self.graphs.prepare(shape)
            except CaptureError as error:
                self._cannot_capture(error)
                return
            yield

    def _cannot_capture(self, error: CaptureError) -> None:
        if self.settings.cuda_graphs is True:
            raise error
        self._go_without_graphs(str(error))

    def _go_without_graphs(self, reason: str, told: bool = True) -> None:
        """On a GPU it is slower, which is said once."""
        self.graphs, self.without_graphs = None, reason
        if told and self.device.type == "cuda":
            log.warning("decoding steps are no CUDA graphs, which is slower: %s", reason)

    def _limit(self) -> int | None:
        """Experts of a layer in a decoding step.

        Raises:
            ValueError: ranks would have to choose them together.
        """
        limit = self.settings.max_active_experts
        if limit is not None and self.group is not None:
            raise ValueError(
                f"engine.max_active_experts is {limit}, but it is of one process: give "
                "engine.max_active_experts=null, or parallel=single"
            )
        return limit

    def _utility(self) -> Utility | None:
        """
        Raises:
            ValueError: the budget of drafts is not there, or ranks would have to draft in step.
        """
        settings, budget = self.settings, self.settings.draft_budget
        if budget is None:
            return None
        if is_bounded(self.model):
            raise ValueError(
                f"engine.draft_budget is {budget:g}, but attention.resident_blocks evicts tokens "
                "for good, also by drafts that are not kept: give engine.draft_budget=null, or "
                "attention.resident_blocks=null"
            )
        names = [] if self.budgets is None else self.budgets.names
        if budget not in names:
            raise ValueError(
                f"engine.draft_budget is {budget:g}, which is none of the saved budgets "
                f"({', '.join(f'{b:g}' for b in names) or 'none'}): python -m launch.evaluate "
                f"run=RUN router.budget=[{budget:g}] save_budgets=true"
            )
        if self.group is not None:
            raise ValueError(
                f"engine.draft_budget is {budget:g}, but drafting is of one process: give "
                "engine.draft_budget=null, or launch.num_devices=1"
            )
        return Utility(settings.draft_rounds, budget, settings.draft_tokens)

    @property
    def room(self) -> int:
        """Tokens that a request may have in all."""
        return min(self.max_len, (self.pool.num_pages - 1) * self.page_size)

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pool in self.pages for t in pool.tensors())

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_slots(self) -> int:
        """Requests that can be generated at once."""
        return self.settings.max_slots

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def tokens_held(self) -> int:
        """Of all running requests, in their pages."""
        return sum(sequence.held for sequence in self.running)

    @property
    def num_pages(self) -> tuple[int, int]:
        """(pages that a request could have now, pages in all)."""
        return self.pool.available, self.pool.num_pages - 1

    def problem(self, request: Request) -> str | None:
        """Why the request can never be served; None: it can."""
        if found := request.sampling.problems():
            return "; ".join(found)
        names = [] if self.budgets is None else self.budgets.names
        if request.budget is not None and request.budget not in names:
            known = (
                f"choose one of {', '.join(f'{b:g}' for b in names)}" if names else "leave it out"
            )
            return f"no budget {request.budget:g} has been saved for this model; {known}"
        length = len(request.prompt)
        if not length:
            return "the prompt is empty; give at least one token"
        if length >= self.max_len:
            return f"the prompt has {length} tokens; model.max_seq_len is {self.max_len}"
        room = (self.pool.num_pages - 1) * self.page_size
        if length >= room:
            return f"the prompt has {length} tokens, and the cache room for {room}"
        return None

    def add(self, request: Request, arrived: float | None = None) -> None:
        """Take a request. arrived: by the engine's clock; None: now.

        Raises:
            ValueError: it can never be served.
        """
        if (problem := self.problem(request)) is not None:
            raise ValueError(problem)
        row = 0 if self.budgets is None else self.budgets.number[request.budget]
        self.waiting.append(Sequence(request, self.clock() if arrived is None else arrived, row))

    def cancel(self, name: str) -> Completion | None:
        """Give up a request, as when its client is gone: its pages are free at once. None: there is
        no such request.
        """
        for sequence in [s for s in (*self.running, *self.waiting) if s.request.name == name]:
            if sequence in self.running:
                self._leave(sequence)
            else:
                self.waiting.remove(sequence)
            return sequence.finish("", "cancelled").completion
        return None

    def use_context(self, context: str) -> None:
        """Something that keys and values depend on has been switched, such as the budget. Pages of
        before are not shared with what comes; they are found again when the context is, and so are
        graphs of decoding steps.

        Raises:
            RuntimeError: requests are running, which would have been computed under both.
        """
        if self.running:
            raise RuntimeError(f"{len(self.running)} requests are running; let them end first")
        self.context = context

    def run(self, requests: Iterable[Request], window: int = 4096) -> Iterator[Completion]:
        """Completions of requests as they end. Requests are taken as there is room in a window,
        within which those of similar length come together.
        """
        source, more = iter(requests), True
        while True:
            if more and len(self.waiting) <= window // 2:
                taken: list[Request] = []
                while len(taken) + len(self.waiting) < window:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    taken.append(request)
                for request in sorted(taken, key=lambda r: len(r.prompt)):
                    self.add(request)
            if not self._anyone(more or self.has_work):
                return
            for event in self.step():
                if event.completion is not None:
                    yield event.completion

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Admit, compute a piece of prompts, decode a token for all that are ready. Collective over
        the expert group.
        """
        events: list[Event] = []
        self._admit()
        ready = self._ready()  # first of all, since it may take pages from the others
        begun = self._similar([s for s in self.running if s.held and s.pending > 1])
        wanted = self._agree([bool(begun), bool(ready)])

        events += self._begin([s for s in self.running if not s.held])
        if wanted[0]:
            events += self._continue("continue", begun)
        if wanted[1]:
            events += self._decode(ready)
            self.rows_decoded += len(ready)
        return events

    def _decode(self, ready: list[Piece]) -> list[Event]:
        """A token for each, or, where that is faster, those of a round."""
        if self.utility is None:
            return self._continue("decode", ready)
        kind, began = self.utility.next(), self.clock()
        before = sum(len(piece.sequence.result.tokens) for piece in ready)
        if kind == "round":
            events = self._round([piece.sequence for piece in ready])
        else:
            events = self._continue("decode", ready)
        after = sum(len(piece.sequence.result.tokens) for piece in ready)
        self.utility.told(kind, after - before, self.clock() - began)
        return events

    def _token_budgets(self, row_of: torch.Tensor) -> TokenBudgets | None:
        return None if self.budgets is None else TokenBudgets(self.budgets.tables, row_of)

    def _root(self, sequence: Sequence) -> bytes:
        """What keys of its pages begin with."""
        budget = sequence.request.budget
        return root_key(self.context if budget is None else f"{self.context}|budget {budget!r}")

    # --- who may go on ----------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take waiting requests in their order, as long as there are slots, and pages for all of
        their tokens and one more.
        """
        while self.waiting and len(self.running) < self.settings.max_slots:
            sequence = self.waiting[0]
            shared, key = self._known_pages(sequence)
            for page in shared:
                self.pool.hold(page)
            needed = -(-len(sequence.tokens) // self.page_size) - len(shared)
            spare = 1 if self.running else 0
            if self.pool.available < needed + spare:
                for page in shared:
                    self.pool.release(page)
                return

            self.waiting.popleft()
            sequence.pages = list(shared)
            sequence.held = len(shared) * self.page_size
            self._read(sequence, sequence.held)  # before others need their room
            sequence.pages += [self._allocate() for _ in range(needed)]
            sequence.last_key, sequence.num_registered = key, len(shared)
            if self.regions is not None:
                sequence.region = self.regions.popleft()
            if not sequence.result.started:
                sequence.result.started = self.clock()
                sequence.result.num_reused_tokens = sequence.held
            self.running.append(sequence)

    def _known_pages(self, sequence: Sequence) -> tuple[list[int], bytes]:
        """Pages that hold the beginning of the sequence already, and the key of the last one. At
        least one token is left to compute, for its logits.
        """
        keys, found = [self._root(sequence)], list[int]()
        size = self.page_size
        if self.shares and not sequence.request.keep_routing:
            for begin in range(0, len(sequence.tokens) - size, size):
                following = next_key(keys[-1], sequence.tokens[begin : begin + size])
                page = self.pool.find(following)
                if page is None:
                    break
                found.append(page)
                keys.append(following)
        # The last of them must still have their tokens' own keys, which the next token reads.
        if self.places is not None:
            while found and any(
                page not in self.places.place
                for page in found[self._first_live(len(found) * size) :]
            ):
                found.pop()
                keys.pop()
        return found, keys[-1]

    def _ready(self) -> list[Piece]:
        """The sequences that decode, each with a page for its token. Where there is none, the
        youngest request gives up its pages, and is computed again later.
        """
        ready: list[Sequence] = []
        for sequence in list(self.running):
            if sequence not in self.running or not sequence.held or sequence.pending != 1:
                continue
            while (
                sequence in self.running and len(sequence.pages) * self.page_size == sequence.held
            ):
                if self.pool.available:
                    sequence.pages.append(self._allocate())
                else:
                    self._preempt(self.running[-1])
            if sequence in self.running:
                ready.append(sequence)
        return [Piece(sequence, 1) for sequence in ready if sequence in self.running]

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.forget()
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._read_on(sequence, len(sequence.pages))
        for page in sequence.pages:
            self.pool.release(page)
        if self.regions is not None and sequence.region is not None:
            self.regions.append(sequence.region)
            sequence.region = None

    def _allocate(self) -> int:
        """A page that holds nothing yet."""
        page = self.pool.allocate()
        if self.places is not None:
            self.places.drop(page)
        return page

    # --- pages whose tokens' own keys are read ----------------------------------------------------

    def _first_live(self, held: int) -> int:
        """The first page of a sequence of so many tokens whose own keys its next token reads."""
        return max(0, held - self.live_window) // self.page_size

    def _read(self, sequence: Sequence, end: int) -> None:
        """Room for the tokens before `end` that a sequence reads or writes. Of a first piece, in
        which all tokens see each other, that is what the next token reads.
        """
        if self.places is None:
            return
        first = self._first_live(sequence.held or end)
        live = sequence.live or range(first, first)
        pages = range(live.start, max(live.stop, -(-end // self.page_size)))
        for i in range(live.stop, pages.stop):
            self.places.enter(sequence.pages[i])
        sequence.live = pages

    def _read_on(self, sequence: Sequence, first: int) -> None:
        """Pages before the first one are read no longer."""
        if self.places is None:
            return
        passed = range(sequence.live.start, min(first, sequence.live.stop))
        for i in passed:
            page = sequence.pages[i]
            self.places.leave(page, page in self.pool.key_of)
        sequence.live = range(passed.stop, sequence.live.stop)

    def _place(self, pieces: list[Piece]) -> None:
        """Room for what a pass over the pieces reads and writes, told to the device."""
        if self.places is None or self.live is None:
            return
        for sequence, number in pieces:
            self._read(sequence, sequence.held + number)
        if changed := self.places.take_changed():
            pages, places = (
                torch.tensor(values, device=self.device)
                for values in (list(changed), list(changed.values()))
            )
            self.live.place[pages] = places

    def _similar(self, sequences: list[Sequence]) -> list[Piece]:
        """The first of the sequences, and those that fit beside it into one forward pass."""
        limit = self.settings.prefill_tokens
        pieces: list[Piece] = []
        shortest = longest = total = 0
        for sequence in sequences:
            number = min(sequence.pending, limit)
            low, high = (min(shortest, number), max(longest, number)) if pieces else (number,) * 2
            taken = total + number if self.packed else high * (len(pieces) + 1)
            fits = taken <= limit and (self.packed or low >= SIMILAR * high)
            if pieces and not fits:
                continue
            pieces.append(Piece(sequence, number))
            shortest, longest, total = low, high, total + number
        return pieces

    # --- forward passes ---------------------------------------------------------------------------

    def _begin(self, fresh: list[Sequence]) -> list[Event]:
        """First pieces of prompts, by groups of similar length, as many as the prefill of a step
        may have: those that begin in one step decode together from the next on.
        """
        events: list[Event] = []
        left = self.settings.prefill_tokens
        while True:
            group = self._similar(fresh)
            number = sum(piece.number for piece in group)
            if number > left < self.settings.prefill_tokens:
                group = []
            if not self._anyone(bool(group)):
                return events
            left -= number
            batch, paging, last, row_of = first_tokens(
                group, self.page_size, self.packed, self.device
            )
            keep = any(piece.sequence.request.keep_routing for piece in group)
            self._place(group)
            decoded = prefill_pages(
                self.model, batch, paging, self.pages, last, keep, self._token_budgets(row_of)
            )
            events += self._advance("prefill", group, decoded, last)
            taken = {id(piece.sequence) for piece in group}
            fresh = [s for s in fresh if id(s) not in taken]

    def _continue(self, kind: str, pieces: list[Piece]) -> list[Event]:
        keep = any(piece.sequence.request.keep_routing for piece in pieces)
        limit = self.limit if kind == "decode" else None
        decoded, width = self._step(pieces, keep, limit=limit)
        last = torch.arange(width, len(decoded.experts) + 1, width, device=self.device) - 1
        if decoded.rerouted is not None:
            self.confined.routed += len(pieces) * len(self.model.routers())
            self.confined.rerouted += int(decoded.rerouted.sum())
        return self._advance(kind, pieces, decoded, last)

    def _step(
        self,
        pieces: list[Piece],
        keep: bool,
        of_every_token: bool = False,
        limit: int | None = None,
    ) -> tuple[Decoded, int]:
        """A forward pass over what continues pages, and the width of its rows. keep: where every
        token went; of_every_token: logits of all tokens of the pieces, not of the last of each;
        limit: experts of a layer.
        """
        self._place(pieces)
        one_each = bool(pieces) and all(number == 1 for _, number in pieces)
        replayed = None
        if self.graphs is not None and one_each and not of_every_token and limit == self.limit:
            replayed = self._replayed(self.graphs, pieces, keep)
        if replayed is not None:
            return replayed, 1

        rows = self._num_rows(len(pieces))
        input_ids, paging, mask, row_of = next_tokens(pieces, self.page_size, rows, self.device)
        width = input_ids.shape[1]
        places = None
        if of_every_token:
            begins = zip(_begins(pieces, width), pieces, strict=True)
            every = [begin + i for begin, (_, number) in begins for i in range(number)]
            places = torch.tensor(every, device=self.device)
        budgets = self._token_budgets(row_of)
        decoded = step_pages(
            self.model, input_ids, paging, self.pages, mask, keep, budgets, places, limit
        )
        return decoded, width

    def _replayed(self, graphs: DecodeGraphs, pieces: list[Piece], keep: bool) -> Decoded | None:
        """A decoding step as a graph; None: it cannot be captured, and from now on none is.

        Raises:
            RuntimeError: likewise, where graphs are asked for.
        """
        try:
            return graphs.step(pieces, self.context, keep)
        except CaptureError as error:
            self._cannot_capture(error)
            return None

    def _num_rows(self, number: int) -> int:
        """Rows of a forward pass: on a GPU few different numbers, elsewhere none is idle."""
        if self.device.type != "cuda":
            return max(1, number)
        if number <= GRAPH_ROWS:
            return 1 << max(0, number - 1).bit_length()
        return -(-number // GRAPH_ROWS) * GRAPH_ROWS

    def _advance(
        self, kind: str, pieces: list[Piece], decoded: Decoded, last: torch.Tensor
    ) -> list[Event]:
        """Note what was computed, and draw the next token of all that have come to their end."""
        self.num_forwards[kind] += 1
        if not pieces:
            return []
        # Padding visits no expert, so differences of a running sum are the sums of sequences.
        sums = decoded.experts.cumsum(0)[last]
        experts = torch.cat((sums[:1], sums.diff()))[: len(pieces)].tolist()
        for piece, visited in zip(pieces, experts, strict=True):
            piece.sequence.computed(piece.number, visited)
            self._register(piece.sequence)
            self._read_on(piece.sequence, self._first_live(piece.sequence.held))
        if decoded.expert_ids is not None:
            for piece, end in zip(pieces, last.tolist(), strict=False):
                if piece.sequence.request.keep_routing:
                    ids = decoded.expert_ids[end + 1 - piece.number : end + 1]
                    piece.sequence.routed.append(ids.cpu())

        rows = [i for i, piece in enumerate(pieces) if not piece.sequence.pending]
        if not rows:
            return []
        ended = [pieces[i].sequence for i in rows]
        logits = decoded.logits if len(rows) == len(decoded.logits) else decoded.logits[rows]
        tokens, log_probabilities = sample(
            logits,
            [s.request.sampling for s in ended],
            [len(s.result.tokens) for s in ended],
        )
        alternatives = [self._alternatives(s, row) for s, row in zip(ended, logits, strict=True)]
        now = self.clock()
        events: list[Event] = []
        for sequence, *drawn in zip(
            ended, tokens.tolist(), log_probabilities.tolist(), alternatives, strict=True
        ):
            text, reason = sequence.take(Drawn(*drawn), now, self.end_token, self.room)
            events += self._news(sequence, text, reason)
        return events

    def _news(self, sequence: Sequence, text: str, reason: FinishReason | None) -> list[Event]:
        if reason == "error":
            self._clean(sequence)
        if reason is not None:
            self._leave(sequence)
            return [sequence.finish(text, reason)]
        return [sequence.news(text)] if text else []

    # --- speculation ------------------------------------------------------------------------------

    def _round(self, sequences: list[Sequence]) -> list[Event]:
        """Draft, verify, and take what the verifying pass has drawn, up to the first draft that it
        has not. What drafts have written to pages it writes anew.
        """
        drafts = self._draft(sequences)
        pieces = [Piece(sequence, sequence.pending) for sequence in sequences]
        keep = any(sequence.request.keep_routing for sequence in sequences)
        decoded, width = self._step(pieces, keep, of_every_token=True)
        self.num_forwards["decode"] += 1

        # Each token is drawn as decoding draws it: by the request's seed and the token's number.
        every = [s for s, number in pieces for _ in range(number)]
        numbers = [len(s.result.tokens) + i for s, number in pieces for i in range(number)]
        found = sample(decoded.logits, [s.request.sampling for s in every], numbers)
        tokens, log_probabilities = (values.tolist() for values in found)
        experts, now, first = decoded.experts.tolist(), self.clock(), 0
        events: list[Event] = []
        for (sequence, number), begin, own in zip(
            pieces, _begins(pieces, width), drafts, strict=True
        ):
            del sequence.tokens[len(sequence.tokens) - len(own) :]
            self.drafted.rounds += bool(own)
            self.drafted.drafts += len(own)
            # What a draft has made of a page may be no number, and a mask does not stop that: the
            # request begins again with its tokens, and without drafts of this round.
            if own and -1 in tokens[first : first + number]:
                self._clean(sequence)
                self._preempt(sequence)
                first += number
                continue
            number_kept = kept(own, tokens[first : first + number])
            text, reason, taken = "", None, 0
            while taken <= number_kept and reason is None:
                at = first + taken
                alternatives = self._alternatives(sequence, decoded.logits[at])
                drawn = Drawn(tokens[at], log_probabilities[at], alternatives)
                piece, reason = sequence.take(drawn, now, self.end_token, self.room)
                text, taken = text + piece, taken + 1
            sequence.computed(taken, sum(experts[begin : begin + taken]))
            self._register(sequence)
            self._read_on(sequence, self._first_live(sequence.held))
            if decoded.expert_ids is not None and sequence.request.keep_routing:
                sequence.routed.append(decoded.expert_ids[begin : begin + taken].cpu())
            self.drafted.kept += min(number_kept, taken)
            events += self._news(sequence, text, reason)
            first += number
        return events

    def _draft(self, sequences: list[Sequence]) -> list[list[int]]:
        """Drafts of each, which stand behind its tokens until they are verified."""
        assert self.budgets is not None
        row = self.budgets.number[self.settings.draft_budget]
        before = [(s.held, s.row, len(s.tokens)) for s in sequences]
        wanted = {id(s): len(s.tokens) + self._num_drafts(s) for s in sequences}
        active = [s for s in sequences if wanted[id(s)] > len(s.tokens)]
        for sequence in active:
            sequence.row = row
        while active:
            pieces = [Piece(sequence, 1) for sequence in active]
            decoded, _ = self._step(pieces, keep=False)
            # A draft has the number, and so the uniform, of the token that it stands for.
            numbers = [len(s.tokens) - len(s.request.prompt) for s in active]
            tokens, _ = sample(
                decoded.logits[: len(active)], [s.request.sampling for s in active], numbers
            )
            for sequence, token in zip(active, tokens.tolist(), strict=True):
                if token < 0:
                    wanted[id(sequence)] = 0
                    continue
                sequence.tokens.append(token)
                sequence.held += 1
            active = [s for s in active if wanted[id(s)] > len(s.tokens)]
        drafts = []
        for sequence, (held, own, length) in zip(sequences, before, strict=True):
            sequence.held, sequence.row = held, own
            drafts.append(sequence.tokens[length:])
        return drafts

    def _num_drafts(self, sequence: Sequence) -> int:
        """How many a sequence may have: fewer where its text must end before, or pages are short;
        none where its tokens are to tell where they went, since those of drafts are not asked for.
        """
        assert self.budgets is not None and self.settings.draft_budget is not None
        own = sequence.request.budget
        if sequence.request.keep_routing or (own is not None and own <= self.settings.draft_budget):
            return 0
        left = sequence.request.sampling.max_new_tokens - len(sequence.result.tokens)
        number = min(self.settings.draft_tokens, left - 1, self.room - len(sequence.tokens) - 1)
        while len(sequence.pages) * self.page_size - len(sequence.tokens) < number:
            if not self.pool.available:
                break
            sequence.pages.append(self._allocate())
        return max(0, min(number, len(sequence.pages) * self.page_size - len(sequence.tokens)))

    @staticmethod
    def _alternatives(sequence: Sequence, logits: torch.Tensor) -> tuple[tuple[int, float], ...]:
        number = sequence.request.num_alternatives
        if not number:
            return ()
        values, ids = logits.float().log_softmax(-1).sort(descending=True, stable=True)
        return tuple(zip(ids[:number].tolist(), values[:number].tolist(), strict=True))

    def _clean(self, sequence: Sequence) -> None:
        """Wipe what is not finite out of the pages that it alone holds, and out of the scratch page
        that its padding has written to: a later holder masks what it does not know, and a mask does
        not stop NaN.
        """
        own = [page for page in sequence.pages if self.pool.holders[page] == 1]
        for page in own:
            self.pool.forget(page)
        for pages in self.pages:
            pages.clear([0, *own])

    def _register(self, sequence: Sequence) -> None:
        """Let full pages be found by requests that begin alike."""
        if not self.shares:
            return
        size = self.page_size
        # With a limit on experts, what decoding leaves in pages hangs on the requests of its steps.
        held = sequence.held if self.limit is None else len(sequence.request.prompt)
        while (sequence.num_registered + 1) * size <= min(held, sequence.held):
            begin = sequence.num_registered * size
            assert sequence.last_key is not None
            sequence.last_key = next_key(sequence.last_key, sequence.tokens[begin : begin + size])
            self.pool.register(sequence.pages[sequence.num_registered], sequence.last_key)
            sequence.num_registered += 1

    # --- ranks ------------------------------------------------------------------------------------

    def _agree(self, wanted: list[bool]) -> list[bool]:
        """What any rank of the expert group wants, all of them do."""
        if self.group is None:
            return wanted
        flags = torch.tensor(wanted, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def _anyone(self, wants: bool) -> bool:
        return self._agree([wants])[0]


def _begins(pieces: list[Piece], width: int) -> list[int]:
    """Where each piece begins in a pass whose rows it stands at the end of."""
    return [(row + 1) * width - number for row, (_, number) in enumerate(pieces)]
