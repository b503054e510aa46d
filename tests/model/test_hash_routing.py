"""Layers that route by a table of the token's id: their definition, what leaves them alone, and
what is refused.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from common import VOCAB_SIZE, build, tiny_config

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.generate import generate
from model.moe.balance import unpack_stats
from model.moe.budget import update_routers
from model.request import ForwardRequest, TokenBatch
from model.routers.base import RoutingRequest
from model.routers.config import TopKConfig
from model.routers.hashed import HashedRouter, hashed_experts, table_problems
from model.routing import make_router
from train.config.objective import SelfDistilConfig

SETTINGS = TopKConfig(top_k=2, score_function="sqrt_softplus", scaling_factor=1.5, hash_layers=1)
PRESSING = BalanceConfig(
    aux_loss_coeff=0.5,
    entropy_coeff=0.5,
    orthogonality_coeff=0.5,
    bias_update="sign",
    bias_update_rate=0.1,
)


def hashed(settings: TopKConfig = SETTINGS) -> HashedRouter:
    router = settings.build_layer(tiny_config(), 0)
    assert isinstance(router, HashedRouter)
    torch.nn.init.normal_(router.weight, 0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return router


def words(count: int = 50) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(3))


def hidden(count: int = 50) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


def rows(number: int = 2, length: int = 12) -> TokenBatch:
    ids = words(number * length).view(number, length)
    positions = torch.arange(length).expand(number, length)
    bounds = torch.arange(0, number * length + 1, length, dtype=torch.int32)
    return TokenBatch(ids, ids.roll(-1, 1), positions, bounds, length)


def model(balance: BalanceConfig | None = None, **options):
    options = dict(score_function="sqrt_softplus", hash_layers=1) | options
    return build(tiny_config(), balance or BalanceConfig(), **options)


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_are_the_tables_and_gates_their_scores(normalize):
    router = hashed(dataclasses.replace(SETTINGS, normalize_weights=normalize))
    x = hidden().requires_grad_()
    routing = router(x, RoutingRequest(words=words()))
    chosen = router.hash_table[words()].long()
    assert torch.equal(routing.expert_ids.long(), chosen)

    scores = F.softplus(x.double() @ router.weight.double().T).sqrt().gather(1, chosen)
    gates = 1.5 * (scores / scores.sum(1, keepdim=True) if normalize else scores)
    torch.testing.assert_close(routing.weights, gates.float(), rtol=0, atol=1e-6)

    probe = torch.randn(gates.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((routing.weights * probe).sum(), [x, router.weight])
    expected = torch.autograd.grad((gates * probe).sum(), [x, router.weight])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_loads_are_counted_and_padding_visits_no_expert():
    mask = torch.arange(50) % 3 != 0
    router = hashed()
    routing = router(hidden(), RoutingRequest(words=words(), token_mask=mask, num_bins=4))
    assert (routing.expert_ids[~mask] == -1).all()
    chosen = router.hash_table[words()[mask]].flatten()
    assert torch.equal(routing.counts[0], torch.bincount(chosen, minlength=8))
    assert routing.k_histogram.tolist() == [0, 0, int(mask.sum())]
    assert routing.histogram.shape == (8, 4) and not routing.histogram.any()
    assert not routing.reasons.any()


def test_a_table_is_a_draw_without_replacement_of_its_own_for_every_layer():
    first, second = (hashed_experts(20_000, 8, 2, number) for number in (0, 1))
    assert first.dtype == torch.int32 and first.shape == (20_000, 2)
    assert table_problems(first, 8) == [] and not torch.equal(first, second)
    # even over words, within five deviations of a fair draw
    shares = torch.bincount(first.flatten(), minlength=8) / first.numel()
    assert (shares - 1 / 8).abs().max() < 5 * (7 / 64 / first.numel()) ** 0.5
    assert torch.equal(first[:100], hashed_experts(100, 8, 2, 0))
    assert table_problems(torch.tensor([[0, 1], [2, 2]]), 8) == [
        "names an expert twice for token 1: [2, 2]"
    ]
    assert table_problems(torch.tensor([[0, 8]]), 8) == ["names expert 8 of 8"]
    assert table_problems(torch.tensor([[-1, 0]]), 8) == ["names expert -1 of 8"]


# --- in a model -----------------------------------------------------------------------------------


def test_the_first_layers_with_experts_have_tables_and_the_others_choose():
    routers = model().routers()
    assert [isinstance(router, HashedRouter) for router in routers] == [True, False]
    tables = [name for name, _ in model().named_buffers() if name.endswith("hash_table")]
    assert tables == ["blocks.1.mlp.router.hash_table"]  # layer 0 is dense


def test_nothing_presses_on_a_table_and_everything_on_the_other_layers():
    # Losses of a later layer reach the gates of an earlier one, so all layers have tables first.
    tables = model(PRESSING, hash_layers=2)
    tables.train()
    output = tables(rows())
    assert not output.aux_sum.any() and not output.penalty_sum.any()

    net = model(PRESSING)
    net.train()
    output = net(rows())
    first, second = (layer.router for layer in net.moe_layers())
    losses = output.aux_sum + output.penalty_sum
    assert torch.autograd.grad(losses, second.weight, retain_graph=True)[0].any()
    # It learns from the loss like any other gate.
    assert torch.autograd.grad(output.loss_sum, first.weight)[0].any()

    stats = unpack_stats(output.stats, 8, 2)
    chosen = first.hash_table[rows().input_ids.flatten()].flatten()
    assert torch.equal(stats.counts[0], torch.bincount(chosen, minlength=8))
    update_routers(net.routers(), stats, PRESSING, BudgetConfig(), FailSafeConfig())
    assert not first.balance_bias.any() and second.balance_bias.any()


def test_quantile_bias_moves_the_layers_that_choose_alone():
    balance = BalanceConfig(bias_update="quantile", histogram_bins=16)
    net = model(balance)
    net.train()
    stats = unpack_stats(net(rows()).stats, 8, 2)
    assert not stats.histogram[0].any() and stats.histogram[1].any()
    update_routers(net.routers(), stats, balance, BudgetConfig(), FailSafeConfig())
    first, second = net.routers()
    assert not first.balance_bias.any() and second.balance_bias.any()


def test_a_table_never_collapses_nor_follows_a_snapshot():
    net = model()
    net.train()
    first, second = net.routers()
    first.hash_table[:] = torch.tensor([0, 1])
    fail_safe = FailSafeConfig(collapse_share=0.9)
    stats = unpack_stats(net(rows()).stats, 8, 2)
    assert stats.counts[0].tolist()[2:] == [0] * 6
    update_routers(net.routers(), stats, BalanceConfig(), BudgetConfig(), fail_safe)
    assert not first.controller_state.collapsed
    for router in (first, second):
        router.keep_snapshots()
    assert first.snapshot_weight is None and second.snapshot_weight is not None
    routings = net(rows(), ForwardRequest(frozen=True, keep_routing=True)).routings
    assert (routings[0].expert_ids == torch.tensor([0, 1])).all()


@torch.no_grad()
def test_a_token_has_the_same_experts_wherever_it_stands():
    """Whole rows, token by token, and generated with a cache."""
    net = model().eval()
    ids = rows().input_ids
    caches = net.new_caches(2, 12)
    pieces = [net.logits(ids[:, i : i + 1], caches) for i in range(12)]
    torch.testing.assert_close(torch.cat(pieces, 1), net.logits(ids), rtol=0, atol=1e-5)
    assert len(list(generate(net, ids[0].tolist(), 4, temperature=0))) == 4


def test_a_replay_and_few_active_experts_are_heard():
    router = hashed().eval()
    given = torch.stack((words() % 8, (words() + 1) % 8), 1)
    routing = router(hidden(), RoutingRequest(given_ids=given))
    assert torch.equal(routing.expert_ids.long(), given)
    few = router(hidden(), RoutingRequest(words=words(), max_active=3))
    assert len(few.expert_ids[few.expert_ids >= 0].unique()) == 3


def test_the_table_is_state_of_the_weights():
    """Another seed of the weights draws the same table, and a loaded one stays."""
    net, other = model(), model(seed=8)
    assert torch.equal(net.routers()[0].hash_table, other.routers()[0].hash_table)
    net.routers()[0].hash_table[5] = torch.tensor([3, 4])
    other.load_state_dict(net.state_dict())
    assert other.routers()[0].hash_table[5].tolist() == [3, 4]
    assert net.to(torch.bfloat16).routers()[0].hash_table.dtype == torch.int32


# --- what is refused ------------------------------------------------------------------------------


def test_hidden_states_alone_are_refused():
    with pytest.raises(ValueError, match=r"routes by token id, and got hidden states alone"):
        hashed()(hidden())
    with pytest.raises(ValueError, match=r"a router by itself has no table"):
        make_router("top_k", 16, 8, top_k=2, hash_layers=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hash_layers=3), "router.hash_layers is 3; it must be between 0 and the 2 layers"),
        (dict(hash_layers=-1), "router.hash_layers is -1"),
        (dict(capacity_factor=1.0), "router.capacity_factor is 1.0, but router.hash_layers 1"),
    ],
)
def test_contradictions_are_named(changes, words):
    (problem,) = dataclasses.replace(SETTINGS, **changes).problems(tiny_config())
    assert words in problem


def test_another_number_of_experts_than_the_tables_is_refused():
    assert SETTINGS.fixed(tiny_config(), 2).hash_layers == 1
    with pytest.raises(ValueError, match=r"tables of router.hash_layers 1 name 2 experts"):
        SETTINGS.fixed(tiny_config(), 1)
    found = SelfDistilConfig().problems(tiny_config(), SETTINGS, None)
    assert "router.hash_layers 1 name all experts" in found[0]
