"""Parts of matrices are parts of the same model; what they keep and weigh is what the plan says;
the loss over parts of the vocabulary is torch's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common import LATENT, LATENT_SHAPE, build, tiny_config

from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig
from model.cost.memory import device_memory
from model.cost.parameters import count_parameters
from model.loss import shared_cross_entropy
from model.parallel.family import Cut, Family, cut_of, family_of, whole_shape
from model.parallel.groups import ParallelGroups
from model.parallel.tensor import TensorExchange
from model.request import TokenBatch, part_of
from ops.testing import kept_for_backward

BIASED = {"attention_bias": "qkvo", "num_mtp_layers": 1}
SINKS = {"window": 5, "sinks": True}
SPARSE = {"block_size": 2, "coarse_block_size": 2, "top_k": 2, "window_size": 1}
LEARNED = {**SPARSE, "offset": True, "trust": True, "sink": True, "entries": "gated"}
GATED = {**SPARSE, "merge": "gated"}


def part(rank: int, size: int, **changes):
    groups = replace(ParallelGroups.single(), tensor_size=size, tensor_rank=rank)
    options = {"attention": changes.pop("attention")} if "attention" in changes else {}
    return build(tiny_config(**changes), BalanceConfig(), groups, **options)


@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_put_together_are_the_whole(dim, stacked):
    whole = torch.arange(96).view(8, 12)
    cuts = [Cut(dim, rank, 2, stacked) for rank in range(2)]
    parts = [how.own(whole) for how in cuts]
    assert torch.equal(cuts[0].whole(parts), whole)
    assert cuts[0].whole_shape(parts[0].shape) == whole.shape
    # A part has as many rows of every stacked matrix.
    for rank, own in enumerate(parts):
        for matrix, own_matrix in zip(
            whole.chunk(stacked, dim), own.chunk(stacked, dim), strict=True
        ):
            assert torch.equal(matrix.chunk(2, dim)[rank], own_matrix)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0},
        BIASED,
        {**BIASED, "attention": SINKS},
        {"qk_norm": "hidden", "attention": LEARNED},
        {"attention": GATED},
        {**LATENT_SHAPE, "attention": LATENT, "num_mtp_layers": 1},
        {**LATENT_SHAPE, "attention": {**LATENT, "q_lora_rank": None}},
    ],
)
def test_ranks_begin_with_parts_of_the_same_model(changes):
    alone = dict(part(0, 1, **changes).named_parameters())
    ranks = [dict(part(rank, 2, **changes).named_parameters()) for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() == alone.keys()
    for name, whole in alone.items():
        own = [rank[name] for rank in ranks]
        assert whole_shape(own[0]) == whole.shape, name
        how = cut_of(own[0])
        if how is None:
            assert all(torch.equal(p, whole) for p in own), name
        else:
            assert torch.equal(how.whole([p.detach() for p in own]), whole), name

    shape = tiny_config(**{k: v for k, v in changes.items() if k != "attention"})
    arguments = dict(changes.get("attention", {}))
    if "block_size" in arguments:
        arguments = SparseAttentionConfig(**arguments).arguments
    count = count_parameters(shape, 2.0, arguments)
    held = sum(p.numel() for p in ranks[0].values() if family_of(p) is Family.TENSOR)
    assert 2 * held == count.cut


@pytest.mark.parametrize(("num_experts", "attention"), [(8, None), (0, None), (8, LATENT)])
def test_a_rank_that_shares_matrices_keeps_what_the_plan_says(num_experts, attention, monkeypatch):
    """As much of the same number of tokens as a rank alone, and what is gathered of others'."""
    monkeypatch.setattr(TensorExchange, "gathered", lambda self, x: torch.cat([x] * self.size))
    monkeypatch.setattr(TensorExchange, "summed", lambda self, x: x.chunk(self.size)[0].clone())
    monkeypatch.setattr(TensorExchange, "reduce", lambda *_: None)
    measured, planned = [], []
    for size in (1, 2):
        shape = dict(hidden_size=64, num_layers=4, num_experts=num_experts)
        shape |= {} if attention is None else LATENT_SHAPE
        model, length = part(0, size, **shape, attention=attention), 16 * size
        ids = torch.zeros(8, length, dtype=torch.int64)
        positions = torch.arange(length).expand(8, length)
        ends = torch.arange(0, 8 * length + 1, length, dtype=torch.int32)
        inputs = TokenBatch(ids, ids, positions, ends, length)
        if size > 1:
            inputs = part_of(inputs, 0, 16)
        with kept_for_backward(*model.parameters()) as kept:
            model(inputs)
        measured.append(sum(kept.values()))
        memory = device_memory(
            tiny_config(**shape),
            2.0,
            precision="fp32",
            zero_stage=0,
            world_size=size,
            expert_parallel_size=1,
            tensor_parallel_size=size,
            micro_batch_size=8,
            seq_len=length,
            attention=attention,
        )
        planned.append(memory.activations)
        held = sum(p.nbytes for p in model.parameters())
        assert memory.dense_weights + memory.expert_weights == held
    # Rotary tables and targets are of all ranks' tokens too, once for all layers. On a CPU a norm
    # keeps what it has normalised besides: here that of the latents.
    latents = 0 if attention is None else LATENT["q_lora_rank"] + LATENT["kv_lora_rank"]
    copies = 4 * 4 * 8 * 16 * latents
    assert planned[1] - planned[0] + copies == pytest.approx(
        measured[1] - measured[0], abs=0.01 * measured[0]
    )


def test_the_loss_over_one_part_is_torchs(monkeypatch):
    monkeypatch.setattr(TensorExchange, "gathered", lambda self, x: x)
    monkeypatch.setattr(TensorExchange, "reduce", lambda *_: None)
    torch.manual_seed(0)
    logits = torch.randn(9, 20, dtype=torch.float32, requires_grad=True)
    targets = torch.tensor([0, 19, -100, 5, 5, 7, -100, 1, 2])
    weights = torch.rand(2, 9)
    for of_loss, of_z in ((1.0, 0.0), (1.0, 0.3)):
        losses, normalizers = shared_cross_entropy(logits, targets, TensorExchange(None, 0, 1))
        own = of_loss * (weights[0] * losses).sum() + of_z * (weights[1] * normalizers**2).sum()
        expected = F.cross_entropy(logits, targets, reduction="none")
        squared = torch.where(targets >= 0, logits.logsumexp(1), 0) ** 2
        theirs = of_loss * (weights[0] * expected).sum() + of_z * (weights[1] * squared).sum()
        torch.testing.assert_close(losses, expected)
        (gradient,) = torch.autograd.grad(own, logits)
        torch.testing.assert_close(gradient, *torch.autograd.grad(theirs, logits))
