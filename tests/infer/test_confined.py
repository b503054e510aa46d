"""engine.max_active_experts: which experts may serve a decoding step, and what is said of texts
that then depend on what runs beside them.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from common import VOCAB_SIZE, build, tiny_config

import infer.engine as engines
from infer.budget import capture
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from launch.serving.answers import Answer
from launch.serving.asked import BadRequest, read_asked
from model.config import BalanceConfig
from model.paging import step_pages
from model.routers.config import ThresholdConfig
from ops.router import RouteSpec, confine, most_used, route
from train.config.commands.devices import DevicesConfig
from train.config.commands.generate import GenerateConfig
from train.config.commands.pilot import ShadowConfig
from train.config.commands.serve import EndpointConfig, ServeConfig

NUM_EXPERTS, NUM_LAYERS = 8, 2


@pytest.fixture(scope="module")
def model():
    model = build(tiny_config(), BalanceConfig()).eval()
    with torch.no_grad():
        model.head.weight *= 10
    return model


def requests(number: int = 6) -> list[Request]:
    gen = torch.Generator().manual_seed(3)
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.0)
    return [
        Request(str(i), torch.randint(0, VOCAB_SIZE, (5,), generator=gen).tolist(), sampling)
        for i in range(number)
    ]


def texts(engine: Engine, asked: list[Request]) -> dict[str, list[int]]:
    return {done.name: done.tokens for done in engine.run(asked)}


def by_hand(ids: list[list[int]], gates, keys, number: int) -> tuple[set[int], list[set[int]]]:
    """The experts that may serve, and those of each token, one assignment at a time."""
    mass = [0.0] * NUM_EXPERTS
    for row, own in zip(ids, gates, strict=True):
        for e, gate in zip(row, own, strict=True):
            mass[e] += gate if e >= 0 else 0.0
    active = set(sorted(range(NUM_EXPERTS), key=lambda e: (-mass[e], e))[:number])
    found = []
    for row, key in zip(ids, keys, strict=True):
        chosen = {e for e in row if e in active}
        for e in row:
            left = [a for a in sorted(active - chosen) if 0 <= e not in active]
            if left:
                chosen.add(max(left, key=lambda a: (key[a], -a)))
        found.append(chosen)
    return active, found


@pytest.mark.parametrize("number", [1, 2, 3, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_assignments_go_to_the_next_best_of_the_most_used_experts(number, biased):
    gen = torch.Generator().manual_seed(number)
    logits = torch.randn(20, NUM_EXPERTS, generator=gen)
    logits[3], logits[4] = logits[5], 0.0  # equal tokens, and one without a preference
    spec = RouteSpec(NUM_EXPERTS, top_k=3, max_experts=3, score_function="sigmoid")
    # by token, as budgets side by side have it; this one changes no choice of the op's own
    bias = torch.linspace(0, 1e-3, 20)[:, None].expand(20, NUM_EXPERTS) if biased else None
    routing = route(logits, spec)
    confined = confine(routing, logits, spec, bias, number)
    keys = logits.sigmoid() + (0.0 if bias is None else bias)
    active, expected = by_hand(
        routing.expert_ids.tolist(), routing.weights.tolist(), keys.tolist(), number
    )
    assert set(most_used(routing, number).nonzero().flatten().tolist()) == active
    found = [{e for e in row if e >= 0} for row in confined.expert_ids.tolist()]
    assert found == expected
    own = [set(row) for row in routing.expert_ids.tolist()]
    assert confined.moved.tolist() == [a != b for a, b in zip(found, own, strict=True)]


def test_equal_sums_of_gates_prefer_the_lower_id():
    routing = route(torch.zeros(4, NUM_EXPERTS), RouteSpec(NUM_EXPERTS))
    assert most_used(routing, 1).nonzero().tolist() == [[0]]
    # experts that nobody uses stand equal behind the others
    assert most_used(routing, 4).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_a_decoding_step_reads_no_more_experts_and_counts_what_it_changed(model, monkeypatch):
    engine = Engine(model, EngineConfig(max_active_experts=3))
    distinct, rows = [], []

    def looked(*given):
        decoded = step_pages(*given[:5], True, *given[6:])
        ids = decoded.expert_ids.long()
        distinct.append([len(set(ids[:, i].flatten().tolist()) - {-1}) for i in range(NUM_LAYERS)])
        rows.append(len(ids))
        return decoded

    monkeypatch.setattr(engines, "step_pages", looked)
    confined = texts(engine, requests())
    assert len(distinct) >= 6 and max(map(max, distinct)) == 3
    assert engine.confined.routed == sum(rows) * NUM_LAYERS
    assert 0 < engine.confined.rerouted <= engine.confined.routed
    monkeypatch.undo()

    free = Engine(model, EngineConfig())
    assert texts(free, requests()) != confined, "the limit changes nothing here"
    # all experts, or those of one row, are no limit
    assert texts(Engine(model, EngineConfig(max_active_experts=8)), requests()) == texts(
        Engine(model, EngineConfig()), requests()
    )
    alone = Engine(model, EngineConfig(max_slots=1, max_active_experts=2))
    assert texts(alone, requests()) == texts(Engine(model, EngineConfig(max_slots=1)), requests())
    assert alone.confined.rerouted == 0


def test_budgets_side_by_side_are_confined_together():
    model = build(tiny_config(), BalanceConfig(), router=ThresholdConfig, budget=2.0).eval()
    budgets = {}
    with torch.no_grad():
        for budget, cut in ((1.0, 0.6), (3.0, 0.4)):
            budgets[budget] = [
                s._replace(balance_bias=torch.full_like(s.balance_bias, -cut))
                for s in capture(model.routers())
            ]
    asked = requests()
    for i, request in enumerate(asked):
        request.budget = (1.0, 3.0)[i % 2]
        request.keep_routing = True
    engine = Engine(model, EngineConfig(max_active_experts=2), budgets=budgets)
    found = {done.name: done for done in engine.run(asked)}
    assert engine.confined.rerouted > 0
    for done in found.values():
        generated = done.routed_experts[5:]
        assert ((generated >= 0).sum(-1) <= 2).all()


def test_pages_of_generated_tokens_are_not_shared_under_a_limit(model):
    """They hang on the requests of their steps; those of the prompt do not."""
    for limit, shared in ((None, 2), (3, 1)):
        engine = Engine(model, EngineConfig(max_active_experts=limit))
        prompt = list(range(engine.page_size))
        sampling = SamplingConfig(max_new_tokens=engine.page_size + 2, temperature=0.0)
        list(engine.run([Request("a", prompt, sampling)]))
        assert len(engine.pool.keys) == shared


@pytest.mark.parametrize("field", ["seed", "logprobs"])
def test_what_cannot_be_had_again_is_not_promised(field):
    """Neither a seed nor log-probabilities are taken, and every answer names the limit."""
    body = {"prompt": "a", field: 1}
    assert read_asked(body, False, SamplingConfig(), "tiny")
    with pytest.raises(BadRequest) as found:
        read_asked(body, False, SamplingConfig(), "tiny", 4)
    assert f"{field} asks for what can be had again" in found.value.message
    assert "engine.max_active_experts=4" in found.value.message
    assert read_asked({"prompt": "a", field: None}, False, SamplingConfig(), "tiny", 4)
    answer = Answer("a", "tiny", False, [], None, str, 4)
    assert answer.usage()["max_active_experts"] == 4
    assert "max_active_experts" not in dataclasses.replace(answer, max_active=None).usage()


def test_settings_that_the_limit_contradicts_are_refused():
    limited = EngineConfig(max_active_experts=4)
    two = DevicesConfig(num_devices=2)
    for told, settings in {
        "it is of one process": ServeConfig(run="RUN", engine=limited, launch=two),
        "decoded together": GenerateConfig(run="RUN", prompt="a", engine=limited),
        "max_active_experts is 0; it must be": ServeConfig(
            run="RUN", engine=EngineConfig(max_active_experts=0)
        ),
        "drafts are verified by": ServeConfig(
            run="RUN", engine=dataclasses.replace(limited, draft_budget=1.0)
        ),
        "with serve.shadow: a request that is made again": ServeConfig(
            run="RUN", engine=limited, serve=EndpointConfig(shadow=ShadowConfig(8))
        ),
        "requests are looked at again in one process": ServeConfig(
            run="RUN", launch=two, serve=EndpointConfig(shadow=ShadowConfig(8))
        ),
    }.items():
        assert any(told in problem for problem in settings.problems()), (told, settings.problems())
    assert not ServeConfig(run="RUN", engine=limited).problems()
