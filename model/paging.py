"""Forward passes over pages of a cache: what serving many documents at a time asks of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from model.attention.base import Paging, SequenceLayout
from model.attention.cache import LivePages, Pages, Regions
from model.attention.compressed import CompressedAttention
from model.attention.sparse import SparseAttention
from model.request import TokenBatch
from model.routers.base import RoutingRequest
from model.routers.state import RouterState
from model.transformer import Transformer
from ops.router import Reason


class TokenBudgets(NamedTuple):
    """Budgets of the tokens of a forward pass over pages."""

    tables: tuple[RouterState, ...]
    """By MoE layer: balance_bias [P, C] and control [P, 4] of P budgets."""
    row_of: torch.Tensor
    """[B * S] int32, that each token has."""


class Decoded(NamedTuple):
    """What a forward pass over pages gives."""

    logits: torch.Tensor
    """[R, vocab_size] of the tokens that were asked for."""
    experts: torch.Tensor
    """[B * S] fp32, experts that each token visited, as a mean over the MoE layers."""
    expert_ids: torch.Tensor | None
    """[B * S, MoE layers, K] int16 where they are kept, -1 for a slot without an expert."""
    rerouted: torch.Tensor | None = None
    """[B * S] int64, MoE layers in which a token has other experts than its own choice; None where
    max_active does not limit them.
    """


def live_window(model: Transformer) -> int | None:
    """Tokens before a new one whose own keys some layer reads, where pooled entries stand for
    all before; None: some layer reads those of every token.
    """
    windows = [
        block.attention.live_window
        for block in model.blocks
        if isinstance(block.attention, CompressedAttention)
    ]
    return max(windows) if len(windows) == len(model.blocks) else None


def longest_entry(model: Transformer) -> int:
    """Tokens of the longest pooled entry of compressed layers; 0: there are none."""
    attentions = (block.attention for block in model.blocks)
    return max((a.spec.ratio for a in attentions if isinstance(a, CompressedAttention)), default=0)


def is_bounded(model: Transformer) -> bool:
    """Whether layers keep the tokens of resident blocks alone, in regions of their own."""
    return any(a.spec.resident_blocks is not None for a in model.sparse_attentions())


def new_pages(
    model: Transformer,
    num_pages: int,
    page_size: int,
    live: LivePages | None = None,
    regions: Regions | None = None,
) -> list[Pages]:
    """Empty pools of pages, one per layer; see model/attention/cache.py. live: pages that have
    room for tokens' own keys, of a model with a live_window; None: all. regions: of a model that
    is bounded.
    """
    weight = model.any_weight
    shape = (num_pages, page_size, weight.dtype, weight.device)
    found: list[Pages] = []
    for block in model.blocks:
        attention = block.attention
        if isinstance(attention, CompressedAttention):
            found.append(attention.new_pages(*shape, live))
        elif isinstance(attention, SparseAttention):
            found.append(attention.new_pages(*shape, regions))
        else:
            found.append(attention.new_pages(*shape))
    return found


@torch.no_grad()
def prefill_pages(
    model: Transformer,
    batch: TokenBatch,
    paging: Paging,
    pages: list[Pages],
    last: torch.Tensor,
    keep_routing: bool = False,
    budgets: TokenBudgets | None = None,
) -> Decoded:
    """The first tokens of documents, by the training forward, into pages.

    batch: packed rows, or one document a row with padding behind it (token_mask); its targets
    are not read. last: [R] int64, places among the B * S tokens whose logits are wanted.
    """
    layout = model.layout(
        batch.positions,
        batch.cu_seqlens,
        batch.max_seqlen,
        token_mask=batch.token_mask,
        paging=paging,
    )
    return _decoded(model, batch.input_ids, layout, pages, last, keep_routing, budgets)


@torch.no_grad()
def step_pages(
    model: Transformer,
    input_ids: torch.Tensor,
    paging: Paging,
    pages: list[Pages],
    token_mask: torch.Tensor | None = None,
    keep_routing: bool = False,
    budgets: TokenBudgets | None = None,
    places: torch.Tensor | None = None,
    max_active: int | None = None,
) -> Decoded:
    """The next S tokens [B, S] of B documents whose earlier ones are in the pages; logits of
    the last of each, or of `places` [R] int64 among the B * S tokens. token_mask: [B, S] bool,
    False for idle rows and for padding before a row that has fewer new tokens, which visit no
    expert. max_active: as in RoutingRequest, of this pass.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    positions = paging.lengths.unsqueeze(1) - length + torch.arange(length, device=device)
    positions = positions.clamp_min(0)
    cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    layout = model.layout(positions, cu_seqlens, length, token_mask=token_mask, paging=paging)
    last = places
    if last is None:
        last = torch.arange(1, batch + 1, device=device) * length - 1
    return _decoded(model, input_ids, layout, pages, last, keep_routing, budgets, max_active)


def _decoded(
    model: Transformer,
    input_ids: torch.Tensor,
    layout: SequenceLayout,
    pages: list[Pages],
    last: torch.Tensor,
    keep_routing: bool,
    budgets: TokenBudgets | None,
    max_active: int | None = None,
) -> Decoded:
    request = RoutingRequest(
        token_mask=layout.token_mask, words=input_ids.reshape(-1), max_active=max_active
    )
    tables: tuple[RouterState, ...] = ()
    if budgets is not None:
        request, tables = request._replace(row_of=budgets.row_of), budgets.tables
    hidden = model.backbone(input_ids, layout, request, caches=pages, tables=tables)
    used = hidden.last.new_zeros(input_ids.numel(), dtype=torch.float32)
    for routing in hidden.routings:
        used += (routing.expert_ids >= 0).sum(-1)
    expert_ids = None
    if keep_routing and hidden.routings:
        expert_ids = torch.stack([r.expert_ids for r in hidden.routings], 1).to(torch.int16)
    rerouted = None
    if max_active is not None:
        rerouted = torch.zeros_like(used, dtype=torch.int64)
        for routing in hidden.routings:
            rerouted += (routing.reasons & int(Reason.OVERFLOW)) != 0
    logits = model.project(hidden.last.flatten(0, 1)[last])
    return Decoded(logits, used / max(1, len(hidden.routings)), expert_ids, rerouted)
