"""Pages: what a row sees there is what it sees alone, whatever lies beside it, wherever its pages
are, and however its tokens came.
"""

from __future__ import annotations

import pytest
import torch
from common import (
    COMPRESSED,
    COMPRESSED_SHAPE,
    LATENT,
    LATENT_SHAPE,
    SHARED,
    VOCAB_SIZE,
    build,
    tiny_config,
)

from model.attention.base import Paging
from model.attention.cache import Regions
from model.attention.config.base import AttentionConfig
from model.attention.config.compressed import CompressedAttentionConfig
from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.budget import start_routers
from model.paging import new_pages, prefill_pages, step_pages
from model.request import TokenBatch
from model.routers.config import ROUTERS
from tests.pairwise import some_daily

SMALL = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4}
BOUNDED = {**SMALL, "resident_blocks": 1, "resident_interval": 8}
ATTENTIONS: dict[str, dict | AttentionConfig | None] = {
    "dense": None,
    "scc": SMALL,
    "drop": {**SMALL, "tail": "drop"},
    "learned": {**SMALL, "offset": True, "trust": True, "sink": True, "entries": "gated"},
    "gated": {**SMALL, "merge": "gated"},
    "one pass": {**SMALL, "rank_lse": "super", "fanout": 2},
    "two levels": {**SMALL, "num_levels": 2, "fanout": 2, "num_expanded": 1},
    "max": {**SMALL, "score": "max", "order": 0},
    "error gain": {**SMALL, "score": "error_gain"},
    "covering": {**SMALL, "top_p": 0.7},
    "window": {**SMALL, "top_k": 0, "num_sink_blocks": 0, "tail": "drop"},
    "pattern": {**SMALL, "dense_layers": (0,), "min_sparse_length": 12},
    "bounded": BOUNDED,
    "bounded, learned": {
        **BOUNDED,
        **{"offset": True, "trust": True, "sink": True, "entries": "gated"},
        **{"num_sink_blocks": 0, "dense_layers": (0,)},
    },
    "index": {**SMALL, "select": "index", "index_head_dim": 6},
    "followed index": {**SMALL, "select": "index", "index_layers": 2, "entries": "gated"},
    "dsa": {"rule": "dsa", "top_k": 5, "index_heads": 3},
    "msa": {"rule": "msa", "block_size": 3, "top_k": 2},
    "qsa": {"rule": "qsa", "block_size": 3, "top_k": 2, "index_heads": 3, "dense_layers": (0,)},
    "mla": LATENT,
    "csa": CompressedAttentionConfig(**COMPRESSED),
    "hca": CompressedAttentionConfig(**COMPRESSED, layer_kinds=("window", "hca", "csa")),
    "csa2": CompressedAttentionConfig(**SHARED),
    "csa2, one index each": CompressedAttentionConfig(
        **SHARED | {"entry_layers": 3, "late_csa_ratio": None, "index_layers": 1}
    ),
}
ROUTER_OPTIONS = {
    "top_k": {"top_k": 2},
    "expert_choice": {"top_k": 2},
    "null_experts": {"budget": 2.0, "num_null_experts": 8},
}
SIZE = 4
NUM_PAGES = 64


def model_of(name: str, **options):
    shape = {"mla": LATENT_SHAPE}.get(name, {})
    if isinstance(ATTENTIONS[name], CompressedAttentionConfig):
        shape = COMPRESSED_SHAPE
    model = build(tiny_config(**shape), BalanceConfig(), attention=ATTENTIONS[name], **options)
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.endswith("slot_bias"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=gen))
        for layer in model.sparse_attentions():
            for part, parameter in layer.named_parameters():
                if part.split(".")[0] in ("offset", "sink", "trust", "gates", "entry_weights"):
                    parameter.add_(0.5 * torch.randn(parameter.shape, generator=gen))
    return model.eval()


class Rows:
    """Documents in pages that are drawn from the pool in disorder."""

    def __init__(self, model, lengths: list[int], total: int = 40):
        gen = torch.Generator().manual_seed(1)
        self.model, self.lengths = model, list(lengths)
        self.ids = torch.randint(0, VOCAB_SIZE, (len(lengths), total), generator=gen)
        regions = Regions(len(lengths) + 1, total // SIZE)
        self.pools = new_pages(model, NUM_PAGES, SIZE, regions=regions)
        self.regions = torch.arange(len(lengths)).flip(0) + 1
        # What is not written must not be read: NaN would show in everything.
        for pool in self.pools:
            for tensor in pool.tensors():
                tensor[1:] = 7.0
        order = torch.randperm(NUM_PAGES - 1, generator=gen)[: len(lengths) * total // SIZE] + 1
        self.pages = order.view(len(lengths), -1)

    def slots(self, row: int, begin: int, end: int) -> torch.Tensor:
        at = torch.arange(begin, end)
        return self.pages[row, at // SIZE] * SIZE + at % SIZE

    def prefill(self, padded: bool) -> torch.Tensor:
        lengths, paging = self.lengths, None
        longest = max(lengths)
        if padded:
            ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
            slots = torch.zeros(len(lengths), longest, dtype=torch.int64)
            mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
            for row, length in enumerate(lengths):
                ids[row, :length] = self.ids[row, :length]
                slots[row, :length] = self.slots(row, 0, length)
                mask[row, :length] = True
            positions = torch.arange(longest).expand(len(lengths), -1)
            cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32) * longest
            last = torch.arange(len(lengths)) * longest + torch.tensor(lengths) - 1
        else:
            ids = torch.cat([self.ids[r, :n] for r, n in enumerate(lengths)])[None]
            slots = torch.cat([self.slots(r, 0, n) for r, n in enumerate(lengths)])
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            last, mask = cu_seqlens[1:].long() - 1, None
        ends = torch.tensor(lengths)
        paging = Paging(slots.flatten(), self.pages, ends, True, self.regions)
        batch = TokenBatch(ids, ids, positions, cu_seqlens, longest, mask)
        return prefill_pages(self.model, batch, paging, self.pools, last).logits

    def step(self, number: int = 1, idle: int | None = None) -> torch.Tensor:
        """number tokens more for every row but the idle one."""
        slots, ids, ends = [], [], []
        for row, length in enumerate(self.lengths):
            if row == idle:
                slots.append(torch.zeros(number, dtype=torch.int64))
                ids.append(torch.zeros(number, dtype=torch.int64))
                ends.append(number)
                continue
            slots.append(self.slots(row, length, length + number))
            ids.append(self.ids[row, length : length + number])
            self.lengths[row] += number
            ends.append(self.lengths[row])
        pages = self.pages.clone()
        mask = None
        if idle is not None:
            pages[idle] = 0
            mask = torch.ones(len(slots), number, dtype=torch.bool)
            mask[idle] = False
        paging = Paging(torch.cat(slots), pages, torch.tensor(ends), False, self.regions)
        return step_pages(self.model, torch.stack(ids), paging, self.pools, mask).logits

    def expected(self) -> torch.Tensor:
        """Logits of the last token of every row, of the whole row in one forward pass."""
        with torch.no_grad():
            return torch.cat(
                [self.model.logits(self.ids[r : r + 1, :n])[:, -1] for r, n in self.each()]
            )

    def each(self):
        return enumerate(self.lengths)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    "padded", some_daily([pytest.param(True, id="padded"), pytest.param(False, id="packed")])
)
def test_rows_of_different_lengths_decode_to_what_each_is_alone(name, padded):
    rows = Rows(model_of(name), [13, 1, 8, 21])
    assert_same(rows.prefill(padded), rows.expected())
    for number in (1, 1, 5, 1, 1, 1, 4, 1):
        assert_same(rows.step(number), rows.expected())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["dense", "scc", "mla"])
def test_every_router_and_attention_decodes_to_what_it_prefills(name, router):
    options = ROUTER_OPTIONS.get(router, {"budget": 2.0})
    model = model_of(name, router=ROUTERS[router], **options)
    start_routers(model.routers(), BudgetConfig(), FailSafeConfig())
    rows = Rows(model, [9, 2, 17])
    assert_same(rows.prefill(True), rows.expected())
    for number in (1, 3, 1):
        assert_same(rows.step(number), rows.expected())


@pytest.mark.parametrize("name", ["dense", "scc", "learned", "mla", "bounded"])
def test_idle_slots_route_nowhere_and_change_nothing(name):
    model = model_of(name)
    routed = []
    for router in model.routers():
        router.register_forward_hook(lambda module, given, out: routed.append(out.expert_ids))
    rows = Rows(model, [9, 5, 14])
    rows.prefill(True)
    routed.clear()
    ours = rows.step(idle=1)
    assert all((ids[1] == -1).all() and (ids[[0, 2]] >= 0).all() for ids in routed)
    expected = rows.expected()
    assert_same(ours[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if "bounded" not in name])
def test_a_rewound_row_forgets(name):
    """Shorter again, it goes on as if what was cut off had never been there, across the borders of
    blocks whose pooled entries are then stale.
    """
    rows = Rows(model_of(name), [6, 11])
    rows.prefill(True)
    kept = rows.ids.clone()
    gen = torch.Generator().manual_seed(4)
    rows.ids[:, 6:] = torch.randint(0, VOCAB_SIZE, rows.ids[:, 6:].shape, generator=gen)
    rows.step(9)
    rows.ids, rows.lengths = kept, [6, 11]
    for number in (1, 1, 1, 6, 1):
        assert_same(rows.step(number), rows.expected())


def test_experts_per_token_are_counted_by_token():
    model = model_of("dense")
    rows = Rows(model, [9, 5])
    rows.prefill(True)
    paging = Paging(
        torch.cat([rows.slots(r, n, n + 1) for r, n in rows.each()]),
        rows.pages,
        torch.tensor(rows.lengths) + 1,
        False,
    )
    mask = torch.tensor([[True], [False]])
    decoded = step_pages(model, torch.zeros(2, 1, dtype=torch.int64), paging, rows.pools, mask)
    assert decoded.experts.tolist() == [2.0, 0.0]


def test_logits_of_the_last_position_alone_are_the_same():
    model = model_of("dense")
    ids = torch.randint(0, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert_same(model.logits(ids, last_only=True), model.logits(ids)[:, -1:])


def test_pages_that_are_no_blocks_are_refused():
    with pytest.raises(ValueError, match=r"page_size 8 must be attention\.block_size 4"):
        new_pages(model_of("scc"), 4, 8)
