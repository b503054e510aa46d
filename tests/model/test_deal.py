"""Rows that are dealt out to ranks which gather keys and values: every token once, equally many
for each, as much work, and the same for everyone.
"""

from __future__ import annotations

import pytest
import torch

from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.latent import MlaConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.config.windowed import WindowedAttentionConfig
from model.config import ModelConfig
from model.parallel.deal import BLOCKS, LEAST, Dealer, block_size, dealt, runs_of
from model.request import TokenBatch, part_of


def positions_of(*rows: tuple[int, ...]) -> torch.Tensor:
    """[B, S], of the lengths of each row's documents."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def whole_work(positions: torch.Tensor) -> torch.Tensor:
    return positions + 1


def imbalance(order: torch.Tensor, work: torch.Tensor, size: int) -> float:
    """Work of the busiest rank over the mean."""
    by_rank = work.gather(1, order).unflatten(1, (size, -1)).sum((0, 2))
    return float(by_rank.max() * size / by_rank.sum())


SHAPE = ModelConfig(
    vocab_size=8,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=16,
    num_experts=0,
    expert_intermediate_size=16,
    max_seq_len=64,
)
PACKED = (37, 1, 262, 212)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_token_goes_to_one_rank_in_rising_order(size):
    positions = positions_of((*PACKED[:1], 11, 48), (96,))
    deal = Dealer(size, whole_work)(positions)
    assert torch.equal(deal.order.sort(1).values, torch.arange(96).expand(2, -1))
    shares = deal.order.chunk(size, 1)
    assert all(share.shape == (2, 96 // size) for share in shares)
    assert all(bool((share.diff() > 0).all()) for share in shares)

    # Runs are the same on the host, and none crosses a document.
    for share, runs in zip(shares, deal.runs, strict=True):
        for row in range(2):
            tokens = [i for r in runs if r.row == row for i in range(r.first, r.end)]
            assert tokens == share[row].tolist()
        for run in runs:
            found = positions[run.row, run.first : run.end].tolist()
            assert found == list(range(run.first - run.document, run.end - run.document))


def test_work_is_as_even_as_no_runs_or_pairs_of_them_are():
    for documents in ((512,), PACKED, (500, 12), (256, 256)):
        positions = positions_of(documents)
        work = whole_work(positions)
        n = 512 // 8
        pairs = [range(r * n, (r + 1) * n) for r in range(4)]
        others = [range((7 - r) * n, (8 - r) * n) for r in range(4)]
        zigzag = torch.tensor([[i for p in zip(pairs, others, strict=True) for r in p for i in r]])
        ours = imbalance(dealt(work, 4), work, 4)
        assert ours < 1.04
        assert imbalance(torch.arange(512).unsqueeze(0), work, 4) > 1.2
        if documents == PACKED:
            assert imbalance(zigzag, work, 4) > 1.5


def test_of_equal_work_the_earlier_block_and_the_lower_rank_go_first():
    order = dealt(torch.ones(1, 64, dtype=torch.int64), 2)
    blocks = order[0, ::LEAST] // LEAST
    assert blocks.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_blocks_are_equally_many_and_few():
    assert block_size(2**20, 4) == 2**18 // BLOCKS
    assert block_size(64, 2) == LEAST and block_size(8, 4) == 2
    assert block_size(3 * 7 * 4, 3) == 7 and block_size(2 * 13, 2) == 1
    assert len(runs_of(dealt(torch.ones(1, 26), 2), torch.arange(26).unsqueeze(0), 2)) == 2


def test_work_is_what_the_layers_of_an_attention_read():
    places = torch.tensor([0, 9, 99, 9999])
    assert DenseAttentionConfig().work(SHAPE, places).tolist() == [4, 40, 400, 40000]
    windowed = WindowedAttentionConfig(window=10, window_layers=(0, 1, 2))
    assert windowed.work(SHAPE, places).tolist() == [4, 40, 130, 10030]
    sparse = SparseAttentionConfig(
        block_size=8, top_k=2, window_size=16, coarse_block_size=4, dense_layers=(0,)
    )
    # 16 + 3 x 8 tokens at most, and an entry for every four before
    assert sparse.work(SHAPE, places).tolist() == [4, 46, 100 + 3 * 64, 10000 + 3 * 2539]


def test_a_part_of_dealt_rows_has_the_tokens_of_its_rank():
    positions = positions_of((5, 11), (16,))
    ids = torch.arange(32).view(2, 16)
    whole = TokenBatch(ids, ids + 1, positions, torch.tensor([0, 5, 16, 32]), 16, token_ids=ids)
    deal = Dealer(2, whole_work)(positions)
    for rank in range(4):
        part = part_of(whole, rank * 4, 4, deal)
        places = deal.order[:, rank * 4 : rank * 4 + 4]
        assert torch.equal(part.input_ids, ids.gather(1, places))
        assert torch.equal(part.targets, part.input_ids + 1) and part.token_mask is None
        assert torch.equal(part.own(positions), part.positions) and part.rows is whole


def test_what_does_not_gather_is_refused_in_a_line():
    (line,) = IndexedAttentionConfig().sharing_problems(SHAPE, 4, 4)
    assert line.startswith("parallel.context_gather_size is 4, but attention=indexed")
    (line,) = CompressedAttentionConfig().sharing_problems(SHAPE, 4, 2)
    assert line.startswith("parallel.context_gather_size is 2, but attention=compressed")
    chooses = SparseAttentionConfig(select="index")
    (line,) = chooses.sharing_problems(SHAPE, 8, 8)
    assert line.startswith("parallel.context_gather_size is 8, but with attention.select=index")
    bounded = SparseAttentionConfig(resident_blocks=8)
    (line,) = bounded.sharing_problems(SHAPE, 4, 2)
    assert line.startswith(
        "parallel.context_gather_size is 2, but attention.resident_blocks 8 keeps"
    )
    assert bounded.sharing_problems(SHAPE, 2, 1) == []
    for kind in (DenseAttentionConfig, WindowedAttentionConfig, SparseAttentionConfig, MlaConfig):
        assert kind().sharing_problems(SHAPE, 1, 1) == kind().sharing_problems(SHAPE, 8, 4) == []
        (line,) = kind().sharing_problems(SHAPE, 8, 2)
        assert line.startswith(
            "parallel.context_parallel_size 8 / parallel.context_gather_size 2 = 4 does not divide "
            "model.num_kv_heads 2"
        )
        assert (
            kind().sharing_problems(SHAPE, 4, 1)[0].startswith("parallel.context_parallel_size 4 ")
        )
