"""Load balance: sums, auxiliary losses, the loss-free bias and the metrics, against plain
definitions.
"""

from __future__ import annotations

import pytest
import torch
from common import batch, build, take, tiny_config

from model.config import BalanceConfig, FactorSchedule
from model.loss import training_loss
from model.moe.balance import (
    auxiliary_loss_sums,
    balance_metrics,
    histogram_quantile,
    orthogonality_loss,
    pack_stats,
    quantile_cuts,
    unpack_stats,
    update_balance_bias,
)
from model.parallel.groups import ParallelGroups
from model.request import ForwardRequest
from ops.router import Reason, RouterOutput, RouteSpec, route

SCOPES = ("sequence", "batch", "global_batch")
every_scope = pytest.mark.parametrize("scope", SCOPES)
B, S, E, K = 3, 10, 6, 2


def balance_of(scope: str) -> BalanceConfig:
    return BalanceConfig(aux_loss_coeff=0.01, aux_loss_scope=scope)  # type: ignore[arg-type]


def routing_of(
    logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    score_function: str = "softmax",
    scope: str = "batch",
    given_ids: torch.Tensor | None = None,
    **options,
) -> RouterOutput:
    """logits [T, E] -> the routing of a top-K router, or of the ids given."""
    spec = RouteSpec(E, "top_k" if given_ids is None else "given", score_function, K, max_experts=K)
    return route(
        logits,
        spec,
        token_mask=mask,
        given_ids=given_ids,
        num_segments=B if scope == "sequence" else 1,
        **options,
    )


def scores_of(logits: torch.Tensor, score_function: str = "softmax") -> torch.Tensor:
    return logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(B * S, E, generator=torch.Generator().manual_seed(seed))


def aux_of(routing: RouterOutput, scope: str, previous_counts=None) -> torch.Tensor:
    """Auxiliary loss of one layer, summed over its tokens, the way Transformer computes it."""
    return auxiliary_loss_sums(
        routing.counts.unsqueeze(0),
        routing.score_sums.unsqueeze(0),
        scope,
        ParallelGroups.single(),
        previous_counts,
    )[0][0]


def plain_aux(
    routing: RouterOutput,
    all_scores: torch.Tensor,
    tokens: list[int],
    other_counts: list[int] | None = None,
) -> float:
    """Switch eq. 4 times the number of tokens: N * E * sum_e f_e * P_e over `tokens` (f may see
    `other_counts` too).
    """
    counts = list(other_counts or [0] * E)
    for t in tokens:
        for e in routing.expert_ids[t].tolist():
            counts[e] += 1
    mean_probability = [0.0] * E
    for t in tokens:
        scores = all_scores[t].tolist()
        for e in range(E):
            mean_probability[e] += scores[e] / sum(scores) / len(tokens)
    return (
        len(tokens)
        * E
        * sum(c / sum(counts) * p for c, p in zip(counts, mean_probability, strict=True))
    )


def padded_mask() -> torch.Tensor:
    """[B*S]: nothing, three tokens and everything masked in rows 0, 1, 2."""
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, -3:] = False
    mask[2] = False
    return mask.flatten()


# --- the auxiliary loss ---------------------------------------------------------------------------


@every_scope
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
def test_auxiliary_loss_follows_its_definition(scope, score_function, masked):
    mask = padded_mask() if masked else torch.ones(B * S, dtype=torch.bool)
    logits = random_logits()
    routing = routing_of(logits, mask if masked else None, score_function, scope)
    kept = [t for t in range(B * S) if mask[t]]
    spans = (
        [kept] if scope != "sequence" else [[t for t in kept if t // S == row] for row in range(B)]
    )
    expected = sum(
        plain_aux(routing, scores_of(logits, score_function), span) for span in spans if span
    )
    assert float(aux_of(routing, scope)) == pytest.approx(expected, rel=1e-5)


@every_scope
def test_uniform_scores_and_even_load_give_one_per_token_and_layer(scope):
    # no row divides evenly by itself: uniform scores suffice
    even = torch.arange(B * S * K).view(B * S, K) % E
    assert float(
        aux_of(routing_of(torch.zeros(B * S, E), scope=scope, given_ids=even), scope)
    ) == pytest.approx(B * S)
    model = build(tiny_config(), balance_of(scope))
    for router in model.routers():
        torch.nn.init.zeros_(router.weight)
    output = model(take(batch(0, 0, B), 0, B))
    num_tokens = int(batch(0, 0, B)["token_mask"].sum())
    assert output.aux_sum.item() == pytest.approx(len(model.routers()) * num_tokens, rel=1e-5)


@every_scope
def test_everything_on_one_expert_gives_the_number_of_experts(scope):
    """With one expert a token and certain scores: the worst case of eq. 4."""
    logits, only = torch.zeros(B * S, E), torch.tensor([[4, -1]]).repeat(B * S, 1)
    logits[:, 4] = 100.0
    assert float(aux_of(routing_of(logits, scope=scope, given_ids=only), scope)) == pytest.approx(
        E * B * S
    )


@every_scope
def test_masked_tokens_change_nothing(scope):
    mask = padded_mask()
    logits = random_logits()
    before = routing_of(logits, mask, scope=scope)
    wild = torch.where(mask.unsqueeze(1), logits, 5 * random_logits(1))
    after = routing_of(wild, mask, scope=scope)
    for name in ("counts", "score_sums", "z_sum", "entropy_sum", "k_histogram", "reason_counts"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    kept = routing_of(logits)
    assert before.counts.sum(0).tolist() == [
        int((kept.expert_ids[mask] == e).sum()) for e in range(E)
    ]
    torch.testing.assert_close(before.score_sums.sum(0), scores_of(logits)[mask].sum(0))
    torch.testing.assert_close(before.z_sum, logits.logsumexp(-1)[mask].square().sum())


@every_scope
def test_the_gradient_lowers_the_scores_of_overloaded_experts(scope):
    logits = (0.1 * random_logits()).requires_grad_()
    with torch.no_grad():
        logits[:, 3] += 1.0  # every token visits expert 3
    routing = routing_of(logits, scope=scope)
    aux_of(routing, scope).backward()
    assert (logits.grad[:, 3] > 0).all()  # descent lowers the logit
    if scope != "sequence":
        assert (logits.grad[:, int(routing.counts.sum(0).argmin())] < 0).all()


@every_scope
def test_load_fractions_carry_no_gradient(scope):
    """The gradient with respect to the scores is E * f_e, through the softmax: nothing comes
    through f.
    """
    logits = random_logits().requires_grad_()
    routing = routing_of(logits, scope=scope)
    aux_of(routing, scope).backward()
    counts = torch.nn.functional.one_hot(routing.expert_ids.long().view(B, -1), E).sum(1).float()
    counts = counts if scope == "sequence" else counts.sum(0, keepdim=True).expand(B, -1)
    fractions = (counts / counts.sum(-1, keepdim=True)).repeat_interleave(S, 0)
    p = logits.detach().softmax(-1)
    expected = E * p * (fractions - (fractions * p).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-5)


def test_global_batch_scope_counts_the_earlier_micro_batches():
    previous, seen = None, [0] * E
    for micro in (random_logits(seed) for seed in range(3)):
        routing = routing_of(micro)
        aux, scope_counts = auxiliary_loss_sums(
            routing.counts.unsqueeze(0),
            routing.score_sums.unsqueeze(0),
            "global_batch",
            ParallelGroups.single(),
            previous,
        )
        assert float(aux) == pytest.approx(
            plain_aux(routing, scores_of(micro), list(range(B * S)), seen), rel=1e-5
        )
        seen = [n + int((routing.expert_ids == e).sum()) for e, n in enumerate(seen)]
        assert scope_counts.tolist() == [seen]
        previous = scope_counts


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_other_scopes_ignore_the_earlier_micro_batches(scope):
    model = build(tiny_config(), balance_of(scope))
    inputs = take(batch(0, 0, B), 0, B)
    first = model(inputs)
    again = model(inputs, ForwardRequest(previous_counts=first.scope_counts * 5 + torch.arange(8)))
    assert torch.equal(again.aux_sum, first.aux_sum) and torch.equal(
        again.scope_counts, first.counts
    )


@pytest.mark.parametrize("scope", ["batch", "global_batch"])
def test_layers_are_balanced_one_by_one(scope):
    counts, score_sums = (
        torch.tensor([[[4, 0]], [[1, 3]]]),
        torch.tensor([[[1.5, 0.5]], [[0.5, 1.5]]]),
    )
    aux, _ = auxiliary_loss_sums(counts, score_sums, scope, ParallelGroups.single(), None)
    assert aux.tolist() == pytest.approx([2 * (1.0 * 1.5), 2 * (0.25 * 0.5 + 0.75 * 1.5)])


def test_sequence_scope_splits_over_micro_batches_without_a_difference():
    model, full = build(tiny_config(), balance_of("sequence")), batch(0, 0, 4)
    whole = model(take(full, 0, 4)).aux_sum
    parts = sum(model(take(full, i, i + 1)).aux_sum for i in range(4))
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


def test_a_batch_without_tokens_costs_nothing():
    mask = torch.zeros(B * S, dtype=torch.bool)
    for scope in SCOPES:
        assert float(aux_of(routing_of(random_logits(), mask, scope=scope), scope)) == 0.0


def test_training_loss_adds_coefficients_times_per_token_means():
    one = torch.tensor(1.0)
    output = build(tiny_config(), BalanceConfig())(take(batch(0, 0, B), 0, B))
    output = output._replace(loss_sum=6 * one, aux_sum=10 * one, z_sum=40 * one)
    balance = BalanceConfig(aux_loss_coeff=0.1, z_loss_coeff=0.01)
    assert float(training_loss(output, 3, 5, balance)) == pytest.approx(
        6 / 3 + 0.1 * 10 / 5 + 0.01 * 40 / 5
    )
    assert float(training_loss(output, 3, 5, BalanceConfig())) == pytest.approx(2.0)
    assert float(training_loss(output._replace(loss_sum=0 * one), 0, 0, BalanceConfig())) == 0.0


# --- the loss-free bias ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (dict(), {1: 1, 100: 1}),
        (dict(style="step", start=0.96), {1: 1, 96: 1, 97: 0, 100: 0}),
        (dict(style="step", start=96, floor=0.25), {96: 1, 97: 0.25, 100: 0.25}),
        (dict(style="linear", start=0.5, floor=0.2), {50: 1, 75: 0.6, 100: 0.2}),
        (dict(style="linear"), {1: 0.99, 40: 0.6, 100: 0}),
        (dict(style="cosine", start=20, floor=0.1), {20: 1, 60: 0.55, 40: 0.868198, 100: 0.1}),
        (dict(style="cosine", start=200), {1: 1, 100: 1}),
    ],
    ids=str,
)
def test_a_schedule_multiplies_coefficient_and_rate(schedule, factors):
    """1 up to `start`, the floor in the last step, and the one not scheduled stays."""
    made = FactorSchedule(**schedule)
    assert made.problems("x") == []
    for step, factor in factors.items():
        found = BalanceConfig(
            aux_loss_coeff=0.5,
            aux_loss_schedule=made,
            bias_update="sign",
            bias_update_rate=0.01,
        ).at(step, 100)
        assert found.aux_loss_coeff == pytest.approx(0.5 * factor, abs=1e-6)
        assert found.bias_update_rate == 0.01
        rate = BalanceConfig(bias_update="sign", bias_update_rate=0.01, bias_rate_schedule=made).at(
            step, 100
        )
        assert rate.bias_update_rate == pytest.approx(0.01 * factor, abs=1e-8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(style="linear", start=-1.0), "start is -1.0; give a share"),
        (dict(style="linear", start=1.5), "start is 1.5; give a share"),
        (dict(style="linear", floor=1.5), "floor is 1.5; it must be between 0 and 1"),
        (dict(floor=0.5), "belong to balance.aux_loss_schedule.style=step"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, words):
    balance = BalanceConfig(aux_loss_coeff=0.1, aux_loss_schedule=FactorSchedule(**settings))
    assert any(words in problem for problem in balance.problems())


def test_a_schedule_of_what_is_off_is_refused():
    (problem,) = BalanceConfig(bias_rate_schedule=FactorSchedule("step", 0.9)).problems()
    assert "balance.bias_update_rate is 0" in problem and "nothing to schedule" in problem


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
            counts = model(inputs).counts
        loads.append(float(counts.max()) / float(counts.double().mean()))
        update_balance_bias(model.routers(), counts, update_rate=0.01)
    assert loads[0] > 1.9 and loads[-1] < 1.15, loads


# --- metrics --------------------------------------------------------------------------------------


def test_balance_metrics_of_a_hand_made_table():
    metrics = balance_metrics(torch.tensor([[4, 4, 4, 4], [12, 4, 0, 0], [8, 8, 0, 0]]))
    # ln 4; H(3/4, 1/4); ln 2
    entropy = {0: 1.3862943611, 1: 0.5623351446, 2: 0.6931471806}
    deviation = {0: 0.0, 1: 1.2247448714, 2: 1.0}  # of loads 1 1 1 1; 3 1 0 0; 2 2 0 0
    assert metrics == {
        "moe/max_load": pytest.approx(3.0),
        "moe/max_load_layer": 1,
        "moe/min_load": 0.0,
        "moe/load_cv": pytest.approx(sum(deviation.values()) / 3),
        "moe/load_entropy": pytest.approx(sum(entropy.values()) / 3),
        "moe/dead_experts": 4,
        "moe/max_vio": pytest.approx((0 + 2 + 1) / 3),
        "moe/dead_fraction": pytest.approx(4 / 12),
        "moe/hot_fraction": pytest.approx(0.75),
        "moe/load_gini": pytest.approx((0 + 0.625 + 0.5) / 3),
    }


def test_an_untouched_layer_counts_as_dead_and_stays_finite():
    metrics = balance_metrics(torch.zeros(1, 4, dtype=torch.int64))
    assert (
        metrics["moe/dead_experts"] == 4
        and metrics["moe/max_load"] == 0
        and metrics["moe/load_entropy"] == 0
    )


# --- packed statistics, histograms, penalties -----------------------------------------------------


def test_statistics_survive_packing_and_add_up():
    ranges = torch.tensor([[-0.5, 16.0]]).repeat(E, 1)
    options = {"histogram_range": ranges, "num_bins": 16, "token_ids": torch.arange(B * S)}
    routings = [routing_of(random_logits(seed), padded_mask(), **options) for seed in (0, 1)]
    packed = sum(pack_stats(r, torch.tensor(False)) for r in routings)
    stats = unpack_stats(packed.unsqueeze(0), E, K)
    assert torch.equal(stats.counts[0], sum(r.counts.sum(0) for r in routings))
    assert torch.equal(stats.k_histogram[0], sum(r.k_histogram for r in routings))
    assert torch.equal(stats.reasons[0], sum(r.reason_counts for r in routings))
    assert torch.equal(stats.histogram[0], sum(r.histogram.long() for r in routings))
    assert int(stats.checksum) == sum(int(r.checksum) for r in routings) % 2**64 - (
        2**64 if sum(int(r.checksum) for r in routings) % 2**64 >= 2**63 else 0
    )
    assert float(stats.entropy) == pytest.approx(
        sum(float(r.entropy_sum) for r in routings), rel=1e-5
    )
    assert int(stats.tokens) == 2 * int(padded_mask().sum()) and float(stats.experts_per_token) == K


def test_tokens_at_a_lowered_limit_are_counted_as_overloaded():
    routing = routing_of(random_logits(), router_inputs=torch.tensor([0.0, 1.0, 2.0, 1.0]))
    capped, overloaded = (int(r).bit_length() - 1 for r in (Reason.CAPPED, Reason.OVERLOADED))
    for lowered, place in ((False, capped), (True, overloaded)):
        reasons = unpack_stats(
            pack_stats(routing, torch.tensor(lowered)).unsqueeze(0), E, K
        ).reasons[0]
        assert reasons.tolist() == [B * S if bit == place else 0 for bit in range(8)]


def test_quantiles_of_a_histogram_are_within_a_bin_of_the_exact_ones():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4000, 3, generator=generator) * torch.tensor([1.0, 0.1, 0.5])
    bins = (values.T * 100).long().clamp(0, 99)
    histogram = torch.zeros(3, 100, dtype=torch.int64).scatter_add_(1, bins, torch.ones_like(bins))
    for level in (0.05, 0.5, 0.9):
        ranges = torch.tensor([[0.0, 100.0]]).repeat(3, 1)
        found, under, over = histogram_quantile(histogram, ranges, torch.full((3,), level))
        assert (found - values.quantile(level, dim=0)).abs().max() < 0.01
        assert not over.any() and under.tolist() == [False, level < 0.1, False]


def test_cuts_meet_the_share_and_the_range_follows_the_scores():
    """From a range a hundred times too wide, three looks at the scores suffice."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5000, E, generator=generator) * 0.02 + torch.arange(E) * 0.01
    ranges, wanted = torch.tensor([[[-1.0, 128.0]]]).repeat(1, E, 1), torch.full((1, E), 1.5 / E)
    spec = RouteSpec(E, "threshold", "relu", max_experts=E, normalize_weights=False)
    for _ in range(8):
        routing = route(scores, spec, histogram_range=ranges[0].contiguous(), num_bins=256)
        stats = unpack_stats(pack_stats(routing, torch.tensor(False)).unsqueeze(0), E, E)
        cuts, ranges = quantile_cuts(stats, ranges, wanted)
    load = (scores > cuts[0]).double().mean(0)
    assert (load / (1.5 / E) - 1).abs().max() < 0.02, load
    width = 256 / ranges[0, :, 1]
    assert (
        (width < 0.1).all()
        and (ranges[0, :, 0] < cuts[0]).all()
        and (ranges[0, :, 0] + width > cuts[0]).all()
    )


@pytest.mark.parametrize("lost", ["below", "above"])
def test_a_range_that_lost_its_scores_finds_them_again(lost):
    """A collapsed range of the smallest width, far from where the scores went, is back within 12
    steps.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2000, E, generator=generator)
    start = 2.0 if lost == "below" else 0.0
    ranges, share = torch.tensor([[[start, 256 / 1e-5]]]).repeat(1, E, 1), torch.full((1, E), 0.25)
    scores = scores if lost == "below" else scores + 1.0
    spec = RouteSpec(E, "threshold", "relu", max_experts=E, normalize_weights=False)
    for _ in range(12):
        routing = route(scores, spec, histogram_range=ranges[0].contiguous(), num_bins=256)
        stats = unpack_stats(pack_stats(routing, torch.tensor(False)).unsqueeze(0), E, E)
        cuts, ranges = quantile_cuts(stats, ranges, share)
    assert ((scores > cuts[0]).double().mean(0) - 0.25).abs().max() < 0.02


def test_orthogonal_routers_cost_nothing_and_equal_ones_most():
    assert float(orthogonality_loss(torch.eye(4, 8) * 3)) == pytest.approx(0.0, abs=1e-6)
    assert float(orthogonality_loss(torch.ones(4, 8))) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_entropy_and_orthogonality_penalties_do_not_depend_on_the_split(parts):
    balance = BalanceConfig(entropy_coeff=0.3, orthogonality_coeff=0.2)
    model, full = build(tiny_config(), balance), batch(0, 0, 4)
    num_tokens = int(full["token_mask"].sum())
    size = 4 // parts
    outputs = [model(take(full, i * size, (i + 1) * size)) for i in range(parts)]
    penalty = sum(float(o.penalty_sum.detach()) for o in outputs) / num_tokens
    whole = model(take(full, 0, 4), ForwardRequest(keep_routing=True))
    expected = sum(0.3 * float(r.entropy_sum.detach()) / num_tokens for r in whole.routings)
    expected += sum(0.2 * float(orthogonality_loss(r.weight.detach())) for r in model.routers())
    assert penalty == pytest.approx(expected, rel=1e-5)
