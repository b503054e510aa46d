"""Load balance: sums, auxiliary losses, the loss-free bias and the metrics, against plain definitions."""

from __future__ import annotations

import pytest
import torch
from common import batch, build, take, tiny_config

from model.balance import auxiliary_loss_sum, balance_metrics, router_sums, update_balance_bias
from model.config import BalanceConfig
from model.loss import training_loss
from model.parallel import ParallelGroups
from model.routers.base import Routing

SCOPES = ("sequence", "batch", "global_batch")
every_scope = pytest.mark.parametrize("scope", SCOPES)
B, S, E, K = 3, 10, 6, 2


def balance_of(scope: str) -> BalanceConfig:
    return BalanceConfig(aux_loss_coeff=0.01, aux_loss_scope=scope)  # type: ignore[arg-type]


def routing_of(logits: torch.Tensor, mask: torch.Tensor | None = None, score_function: str = "softmax") -> Routing:
    """logits [T, E] -> the routing of a top-K router."""
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    weights, ids = scores.topk(K)
    if mask is not None:
        ids, weights = ids.masked_fill(~mask.unsqueeze(1), -1), weights.masked_fill(~mask.unsqueeze(1), 0.0)
    return Routing(weights, ids, scores, logits.logsumexp(-1))


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(B * S, E, generator=torch.Generator().manual_seed(seed))


def aux_of(routing: Routing, mask: torch.Tensor | None, scope: str, previous_counts=None) -> torch.Tensor:
    """Auxiliary loss of one layer, summed over its tokens, the way Transformer computes it."""
    balance = balance_of(scope)
    sums = router_sums(routing, mask, B, balance)
    if scope == "sequence":
        return sums.sequence_aux_sum
    return auxiliary_loss_sum(sums.counts.unsqueeze(0), sums.score_sums.unsqueeze(0), balance,
                              ParallelGroups.single(), previous_counts)[0]


def plain_aux(routing: Routing, tokens: list[int], other_counts: list[int] | None = None) -> float:
    """Switch eq. 4 times the number of tokens: N * E * sum_e f_e * P_e over `tokens` (f may see `other_counts` too)."""
    counts = list(other_counts or [0] * E)
    for t in tokens:
        for e in routing.expert_ids[t].tolist():
            counts[e] += 1
    mean_probability = [0.0] * E
    for t in tokens:
        scores = routing.scores[t].tolist()
        for e in range(E):
            mean_probability[e] += scores[e] / sum(scores) / len(tokens)
    return len(tokens) * E * sum(c / sum(counts) * p for c, p in zip(counts, mean_probability, strict=True))


def padded_mask() -> torch.Tensor:
    """[B*S]: nothing, three tokens and everything masked in rows 0, 1, 2."""
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, -3:] = False
    mask[2] = False
    return mask.flatten()


# --- the auxiliary loss ----------------------------------------------------------------------------------------------

@every_scope
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
def test_auxiliary_loss_follows_its_definition(scope, score_function, masked):
    mask = padded_mask() if masked else torch.ones(B * S, dtype=torch.bool)
    routing = routing_of(random_logits(), mask if masked else None, score_function)
    kept = [t for t in range(B * S) if mask[t]]
    spans = [kept] if scope != "sequence" else [[t for t in kept if t // S == row] for row in range(B)]
    expected = sum(plain_aux(routing, span) for span in spans if span)
    assert float(aux_of(routing, mask if masked else None, scope)) == pytest.approx(expected, rel=1e-5)


@every_scope
def test_uniform_scores_and_even_load_give_one_per_token_and_layer(scope):
    even = torch.arange(B * S * K).view(B * S, K) % E  # no row divides evenly by itself: uniform scores suffice
    routing = Routing(torch.full((B * S, K), 0.5), even, torch.full((B * S, E), 1 / E), torch.zeros(B * S))
    assert float(aux_of(routing, None, scope)) == pytest.approx(B * S)
    model = build(tiny_config(), balance_of(scope))
    for router in model.routers():
        torch.nn.init.zeros_(router.weight)
    output = model(**take(batch(0, 0, B), 0, B))
    num_tokens = int(batch(0, 0, B)["token_mask"].sum())
    assert output.aux_sum.item() == pytest.approx(len(model.routers()) * num_tokens, rel=1e-5)


@every_scope
def test_everything_on_one_expert_gives_the_number_of_experts(scope):
    """With top-1 and certain scores: the worst case of eq. 4."""
    scores = torch.zeros(B * S, E)
    scores[:, 4] = 1.0
    routing = Routing(torch.ones(B * S, 1), torch.full((B * S, 1), 4), scores, torch.zeros(B * S))
    assert float(aux_of(routing, None, scope)) == pytest.approx(E * B * S)


@every_scope
def test_masked_tokens_change_nothing(scope):
    mask = padded_mask()
    logits = random_logits()
    before = router_sums(routing_of(logits, mask), mask, B, balance_of(scope))
    wild = torch.where(mask.unsqueeze(1), logits, 5 * random_logits(1))
    after = router_sums(routing_of(wild, mask), mask, B, balance_of(scope))
    for name in ("counts", "score_sums", "z_sum", "sequence_aux_sum"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    kept = routing_of(logits)
    assert before.counts.tolist() == [int((kept.expert_ids[mask] == e).sum()) for e in range(E)]
    torch.testing.assert_close(before.score_sums, kept.scores[mask].sum(0))
    torch.testing.assert_close(before.z_sum, kept.log_z[mask].square().sum())


@every_scope
def test_the_gradient_lowers_the_scores_of_overloaded_experts(scope):
    logits = (0.1 * random_logits()).requires_grad_()
    with torch.no_grad():
        logits[:, 3] += 1.0  # every token visits expert 3
    aux_of(routing_of(logits), None, scope).backward()
    assert (logits.grad[:, 3] > 0).all()  # descent lowers the logit
    load = routing_of(logits).expert_ids.flatten().bincount(minlength=E)
    if scope != "sequence":
        assert (logits.grad[:, int(load.argmin())] < 0).all()


@every_scope
def test_load_fractions_carry_no_gradient(scope):
    """The gradient with respect to the scores is E * f_e / sum of scores: nothing comes through f."""
    routing = routing_of(random_logits())
    scores = routing.scores.clone().requires_grad_()
    aux_of(routing._replace(scores=scores), None, scope).backward()
    counts = torch.nn.functional.one_hot(routing.expert_ids.view(B, -1), E).sum(1).float()
    counts = counts if scope == "sequence" else counts.sum(0, keepdim=True).expand(B, -1)
    fractions = (counts / counts.sum(-1, keepdim=True)).repeat_interleave(S, 0)
    expected = E * (fractions - (fractions * scores.detach()).sum(-1, keepdim=True))
    torch.testing.assert_close(scores.grad, expected, rtol=1e-4, atol=1e-5)


def test_global_batch_scope_counts_the_earlier_micro_batches():
    logits = [random_logits(seed) for seed in range(3)]
    previous, seen = None, [0] * E
    for micro in logits:
        routing = routing_of(micro)
        sums = router_sums(routing, None, B, balance_of("global_batch"))
        aux, scope_counts = auxiliary_loss_sum(sums.counts.unsqueeze(0), sums.score_sums.unsqueeze(0),
                                               balance_of("global_batch"), ParallelGroups.single(), previous)
        assert float(aux) == pytest.approx(plain_aux(routing, list(range(B * S)), seen), rel=1e-5)
        seen = [n + int((routing.expert_ids == e).sum()) for e, n in enumerate(seen)]
        assert scope_counts.tolist() == [seen]
        previous = scope_counts


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_other_scopes_ignore_the_earlier_micro_batches(scope):
    model = build(tiny_config(), balance_of(scope))
    inputs = take(batch(0, 0, B), 0, B)
    first = model(**inputs)
    again = model(**inputs, previous_counts=first.scope_counts * 5 + torch.arange(8))
    assert torch.equal(again.aux_sum, first.aux_sum) and torch.equal(again.scope_counts, first.counts)


@pytest.mark.parametrize("scope", ["batch", "global_batch"])
def test_layers_are_balanced_one_by_one(scope):
    counts, score_sums = torch.tensor([[4, 0], [1, 3]]), torch.tensor([[1.5, 0.5], [0.5, 1.5]])
    aux, _ = auxiliary_loss_sum(counts, score_sums, balance_of(scope), ParallelGroups.single(), None)
    assert float(aux) == pytest.approx(2 * (1.0 * 1.5) + 2 * (0.25 * 0.5 + 0.75 * 1.5))


def test_sequence_scope_splits_over_micro_batches_without_a_difference():
    model, full = build(tiny_config(), balance_of("sequence")), batch(0, 0, 4)
    whole = model(**take(full, 0, 4)).aux_sum
    parts = sum(model(**take(full, i, i + 1)).aux_sum for i in range(4))
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


def test_a_batch_without_tokens_costs_nothing():
    mask = torch.zeros(B * S, dtype=torch.bool)
    for scope in SCOPES:
        assert float(aux_of(routing_of(random_logits(), mask), mask, scope)) == 0.0


def test_training_loss_adds_coefficients_times_per_token_means():
    one = torch.tensor(1.0)
    output = build(tiny_config(), BalanceConfig())(**take(batch(0, 0, B), 0, B))
    output = output._replace(loss_sum=6 * one, aux_sum=10 * one, z_sum=40 * one)
    balance = BalanceConfig(aux_loss_coeff=0.1, z_loss_coeff=0.01)
    assert float(training_loss(output, 3, 5, balance)) == pytest.approx(6 / 3 + 0.1 * 10 / 5 + 0.01 * 40 / 5)
    assert float(training_loss(output, 3, 5, BalanceConfig())) == pytest.approx(2.0)
    assert float(training_loss(output._replace(loss_sum=0 * one), 0, 0, BalanceConfig())) == 0.0


# --- the loss-free bias ----------------------------------------------------------------------------------------------

def test_the_bias_rises_for_underloaded_experts_and_keeps_its_mean():
    routers = build(tiny_config(num_experts=4), BalanceConfig()).routers()
    counts = torch.tensor([[10, 0, 5, 5], [8, 1, 1, 10]])
    for step in range(1, 4):
        update_balance_bias(routers, counts, update_rate=0.01)
        first, second = (router.balance_bias for router in routers)
        torch.testing.assert_close(first, step * torch.tensor([-0.01, 0.01, 0.0, 0.0]))
        torch.testing.assert_close(second, step * torch.tensor([-0.01, 0.01, 0.01, -0.01]))
    update_balance_bias(routers, torch.tensor([[9, 1, 1, 1], [5, 5, 5, 5]]), update_rate=0.01)
    torch.testing.assert_close(routers[0].balance_bias, torch.tensor([-0.045, 0.035, 0.005, 0.005]))
    assert float(routers[0].balance_bias.mean()) == pytest.approx(0.0, abs=1e-8)


def test_the_bias_evens_out_a_lopsided_router():
    model = build(tiny_config(num_layers=2, num_experts=4), BalanceConfig())
    inputs, loads = take(batch(0, 0, 8), 0, 8), []
    for router in model.routers():
        router.balance_bias[2] = 0.2
    for _ in range(60):
        with torch.no_grad():
            counts = model(**inputs).counts
        loads.append(float(counts.max()) / float(counts.double().mean()))
        update_balance_bias(model.routers(), counts, update_rate=0.01)
    assert loads[0] > 1.9 and loads[-1] < 1.15, loads


# --- metrics ---------------------------------------------------------------------------------------------------------

def test_balance_metrics_of_a_hand_made_table():
    metrics = balance_metrics(torch.tensor([[4, 4, 4, 4], [12, 4, 0, 0], [8, 8, 0, 0]]))
    entropy = {0: 1.3862943611, 1: 0.5623351446, 2: 0.6931471806}  # ln 4; H(3/4, 1/4); ln 2
    deviation = {0: 0.0, 1: 1.2247448714, 2: 1.0}  # of loads 1 1 1 1; 3 1 0 0; 2 2 0 0
    assert metrics == {
        "moe/max_load": pytest.approx(3.0), "moe/max_load_layer": 1, "moe/min_load": 0.0,
        "moe/load_cv": pytest.approx(sum(deviation.values()) / 3),
        "moe/load_entropy": pytest.approx(sum(entropy.values()) / 3), "moe/dead_experts": 4,
    }


def test_an_untouched_layer_counts_as_dead_and_stays_finite():
    metrics = balance_metrics(torch.zeros(1, 4, dtype=torch.int64))
    assert metrics["moe/dead_experts"] == 4 and metrics["moe/max_load"] == 0 and metrics["moe/load_entropy"] == 0
