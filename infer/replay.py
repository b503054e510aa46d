"""A text read again in one pass, and what other settings would have said of it: dense attention in
place of sparse, more selected blocks, another budget.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from infer.budget import RouterState, capture, use
from model.attention.base import STATS
from model.transformer import Transformer

ROWS = 128
"""Tokens whose logits of two readings are in memory at a time."""


@dataclass(frozen=True)
class Reading:
    """What a text is read under."""

    state: Sequence[RouterState] | None = None
    """Of the routers; None: as they are."""
    top_k: int | None = None
    """Selected blocks of the sparse layers; None: as they are."""
    densely: bool = False
    """Sparse layers attend to everything."""


@dataclass(frozen=True)
class Agreement:
    """Of the tokens that one reading would have drawn from with those of another."""

    tokens: int
    same: int
    """Of which the likeliest next one is the same."""
    divergence: float
    """KL(reference || served) in nats, summed over them."""
    difference: float
    """The largest one between the log-probabilities of the tokens as they were told when they were
    served, and as the served reading has them now; NaN where none were told.
    """


def top_k_of(model: Transformer) -> int | None:
    """Selected blocks of a query; None without sparse attention."""
    found = model.sparse_attentions()
    return found[0].spec.top_k if found else None


def use_top_k(model: Transformer, top_k: int) -> None:
    """From now on. What pages hold stays valid: a block's entries do not hang on who selects it."""
    for attention in model.sparse_attentions():
        attention.spec = replace(attention.spec, top_k=top_k)


@contextlib.contextmanager
def reading(model: Transformer, how: Reading) -> Iterator[None]:
    """The model under other settings, which are as before afterwards."""
    routers, sparse = model.routers(), model.sparse_attentions()
    before = capture(routers) if how.state is not None else None
    kept = [(a.spec, a.step) for a in sparse]
    try:
        if how.state is not None:
            use(routers, how.state)
        if how.top_k is not None:
            use_top_k(model, how.top_k)
        for attention in sparse if how.densely else ():
            attention.step = -1  # below any number of dense steps
        yield
    finally:
        for attention, (spec, step) in zip(sparse, kept, strict=True):
            attention.spec, attention.step = spec, step
        if before is not None:
            use(routers, before)


def _ids(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=model.any_weight.device)


@torch.no_grad()
def attention_errors(
    model: Transformer, tokens: Sequence[int], how: Reading, rows: int
) -> list[float] | None:
    """Of every sparse layer the mean relative error of its output to dense attention, over heads
    and about so many tokens of the text, drawn by a hash of their places; None where none was
    drawn.
    """
    sparse = model.sparse_attentions()
    shares = [a.audit_rows for a in sparse]
    try:
        for attention in sparse:
            attention.audit_rows = min(1.0, rows / len(tokens))
        with reading(model, how):
            stats = model.read(_ids(model, tokens), measure_attention=True).attention_stats
    finally:
        for attention, share in zip(sparse, shares, strict=True):
            attention.audit_rows = share
    audited, errors = (stats[:, STATS.index(name)].double() for name in ("audited", "error"))
    if not len(stats) or not float(audited.min()):
        return None
    found: list[float] = (errors / audited).tolist()
    return found


@torch.no_grad()
def agreement(
    model: Transformer,
    tokens: Sequence[int],
    num_prompt: int,
    served: Reading,
    reference: Reading,
    told: Sequence[float] = (),
) -> Agreement:
    """Compare what two readings say of the generated tokens of a text.

    Args:
        tokens: of the prompt, of which there are num_prompt, and the generated ones, at least one.
        told: log-probabilities of the generated tokens as they were told.
    """
    ids = _ids(model, tokens)
    hidden = []
    for how in (served, reference):
        with reading(model, how):
            # The last token was drawn and never read; the first one was drawn behind the prompt.
            hidden.append(model.read(ids[:, :-1]).hidden[0, num_prompt - 1 :])
    drawn = ids[0, num_prompt:]
    same, divergence, difference = 0, 0.0, float("nan")
    for begin in range(0, len(drawn), ROWS):
        cut = slice(begin, begin + ROWS)
        one, other = (F.log_softmax(model.project(h[cut]).double(), -1) for h in hidden)
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        divergence += float((other.exp() * (other - one)).sum())
        if told:
            now = one.gather(1, drawn[cut].unsqueeze(1)).squeeze(1)
            before = torch.tensor(list(told[cut]), dtype=now.dtype, device=now.device)
            here = float((now - before).abs().max())
            difference = here if difference != difference else max(difference, here)
    return Agreement(len(drawn), same, divergence, difference)
