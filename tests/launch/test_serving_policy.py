"""What the server decides about requests that leave it open: budgets by measured latency, canaries,
drift of routing, and the counters of all of it.
"""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import launch.serve
from infer.config import EngineConfig, SamplingConfig
from infer.request import Completion, Request
from launch.serving.meters import Meters
from launch.serving.policy import CANARY, CONTROL, Policy
from launch.steering.budgets import (
    LEAST_PREFILL,
    WINDOW,
    LatencyTable,
    LoadController,
    Point,
    read_latency,
)
from launch.steering.drift import Drift, divergence
from train.config.commands.pilot import CanaryConfig, DriftConfig
from train.config.commands.serve import EndpointConfig, ServeConfig

FEW, MANY = 4, 256
TIMES = {FEW: {1.0: 10.0, 2.0: 14.0, 4.0: 20.0}, MANY: {1.0: 29.6, 2.0: 29.8, 4.0: 30.0}}
"""Milliseconds by rows and budget: with many rows all experts are read at any budget."""
TABLE = LatencyTable(
    [Point(b, rows, 128, ms) for rows, times in TIMES.items() for b, ms in times.items()]
)


def driven(controller: LoadController, rows: int, windows: int, factor: float = 1.0) -> list[float]:
    """Steps that take what the table says times `factor`, with 3% of noise; the budgets given."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(windows * WINDOW):
        ms = factor * TIMES[rows][controller.budget] * draw.normal(1, 0.03)
        controller.saw(ms / 1e3, rows, 128)
        found.append(controller.budget)
    return found


# --- budgets by latency ---------------------------------------------------------------------------


def test_the_largest_budget_that_holds_the_latency_is_given():
    controller = LoadController(TABLE, target_ms=16.0)
    given = driven(controller, FEW, 60)
    # 14 ms hold it, 20 do not, and 10 would give up quality for nothing
    assert set(given[WINDOW:]) == {2.0}
    # the load falls: back up
    assert driven(controller, FEW, 60, factor=0.5)[-1] == 4.0


def test_quality_is_not_given_up_where_it_buys_nothing():
    controller = LoadController(TABLE, target_ms=16.0)
    assert set(driven(controller, MANY, 40)) == {4.0}
    # the next rung: shorter pieces of prompts, down to a limit
    assert controller.prefill_share == LEAST_PREFILL
    driven(controller, MANY, 20, factor=0.3)
    assert controller.prefill_share == 1.0


def test_no_less_than_the_least_budget_is_given():
    controller = LoadController(TABLE, target_ms=5.0, least=2.0)
    assert min(driven(controller, FEW, 40)) == 2.0
    assert min(driven(LoadController(TABLE, target_ms=5.0), FEW, 40)) == 1.0


def test_a_latency_near_a_border_does_not_make_the_budget_flap():
    """20 ms is what a budget of 4 takes in the middle; its p95 is above, and 14 ms are below."""
    for target in (17.0, 20.0, 21.0, 22.0):
        given = driven(LoadController(TABLE, target), FEW, 200)
        assert sum(a != b for a, b in itertools.pairwise(given)) <= 3, target


def test_the_nearest_measured_cell_counts():
    points = [Point(b, rows, c, 1.0 + b + rows + c) for b in (1.0, 2.0) for rows in (1, 64)
              for c in (128, 4096)]  # fmt: skip
    table = LatencyTable(points)
    assert table.at(2, 200)[1.0] == 1 + 1 + 1 + 128 and table.at(40, 9000)[2.0] == 1 + 2 + 64 + 4096
    with pytest.raises(ValueError, match="two budgets"):
        LatencyTable([Point(1.0, 1, 1, 1.0)])


def written(tmp_path, **changes) -> str:
    """A file as launch.benchmark writes it."""
    entries = [
        {"attention": "trained", "budget": p[0], "rows": 4, "context": 128, "itl_p50_ms": p[1]}
        for p in ((1.0, 10.0), (2.0, 14.0))
    ]
    found = {"device": {"device": "CPU, 1 threads"}, "measured": entries, **changes}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    return str(path)


def test_a_measured_table_is_read_and_one_of_elsewhere_refused(tmp_path):
    path = written(tmp_path)
    assert read_latency(path, (1.0, 2.0), "CPU, 1 threads").budgets == (1.0, 2.0)
    with pytest.raises(ValueError, match="measured on CPU, 1 threads, and this is NVIDIA"):
        read_latency(path, (1.0, 2.0), "NVIDIA H200")
    with pytest.raises(ValueError, match="lacks budget 4"):
        read_latency(path, (1.0, 4.0), "CPU, 1 threads")
    with pytest.raises(ValueError, match="cannot be read"):
        read_latency(written(tmp_path, measured=[{"budget": 1.0}]), (1.0,), "CPU, 1 threads")
    with pytest.raises(ValueError, match="cannot be read"):
        read_latency(str(tmp_path / "nothing"), (1.0,), "CPU, 1 threads")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budget": "auto"}, "give serve.latency=FILE"),
        ({"latency": "x"}, "are of serve.budget=auto"),
        ({"canary": CanaryConfig(1.0, 1.5)}, "serve.canary.share is 1.5"),
        ({"drift": DriftConfig(limit=0.8)}, "between 0 and ln 2"),
    ],
)
def test_contradictions_are_said_before_anything_is_read(settings, told):
    assert any(told in problem for problem in EndpointConfig(**settings).problems())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"canary": CanaryConfig(1.5)}, r"serve\.canary\.budget is 1\.5.*router\.budget=\[1\.5\]"),
        ({"budget": "auto", "latency": "x"}, "chooses among saved budgets, and the run has none"),
    ],
)
def test_a_budget_that_is_not_saved_is_refused_with_the_command_that_saves_it(asked, told):
    settings = ServeConfig(run="runs/x", serve=EndpointConfig(**asked))
    assert settings.problems() == []
    with pytest.raises(ValueError, match=told):
        launch.serve._policy(settings, None, None, None)


def test_budgets_of_a_folder_of_weights_are_refused():
    asked = EndpointConfig(canary=CanaryConfig(1.5))
    assert any("give run=RUN" in p for p in ServeConfig(path="x", serve=asked).problems())


# --- drift ----------------------------------------------------------------------------------------


def test_divergence_is_that_of_a_calculation_by_hand():
    assert divergence(np.array([1, 0]), np.array([0, 5])) == pytest.approx(math.log(2))
    assert divergence(np.array([2, 6]), np.array([1, 3])) == pytest.approx(0)
    # p = (1/2, 1/2), q = (1, 0), middle (3/4, 1/4)
    by_hand = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2) + math.log(4 / 3))
    assert divergence(np.array([1, 1]), np.array([3, 0])) == pytest.approx(by_hand)


def routed(draw: np.random.Generator, shares, tokens: int = 500) -> np.ndarray:
    """[tokens, layers, 2] ids, of which some are none."""
    layers = [draw.choice(len(p), size=(tokens, 2), p=p) for p in shares]
    ids = np.stack(layers, axis=1).astype(np.int16)
    ids[::7, :, 1] = -1
    return ids


def test_drift_rings_for_other_loads_and_not_for_the_same():
    draw = np.random.default_rng(2)
    even, odd = [0.25] * 4, [0.85, 0.05, 0.05, 0.05]
    drift = Drift([[100.0] * 4, [100.0] * 4], window_tokens=2000, limit=0.05)
    assert [drift.saw(routed(draw, (even, even))) for _ in range(4)] == [False] * 3 + [True]
    assert not drift.rings and max(drift.by_layer) < 0.01
    for _ in range(4):
        drift.saw(routed(draw, (even, odd)))
    assert drift.rings and drift.by_layer[0] < 0.01 < 0.05 < drift.by_layer[1]
    # a window stands for itself
    for _ in range(4):
        drift.saw(routed(draw, (even, even)))
    assert not drift.rings and drift.windows == 3


# --- requests -------------------------------------------------------------------------------------


def policy(**settings) -> Policy:
    engine = SimpleNamespace(settings=EngineConfig(prefill_tokens=1000))
    return Policy(engine, Meters(), **settings)


def asked(name: str, budget: float | None = None) -> Request:
    return Request(name, [1, 2], SamplingConfig(), budget=budget)


def test_what_a_client_fixes_is_left_alone():
    one = policy(controller=LoadController(TABLE, 16.0), canary=CanaryConfig(1.0, 0.999))
    given = asked("a", 2.0)
    one.take(given)
    assert given.budget == 2.0 and not given.keep_routing


def test_a_canary_gets_its_share_and_the_same_requests_each_time():
    names = [f"request-{i}" for i in range(4000)]

    def canaries() -> list[str]:
        one = policy(canary=CanaryConfig(1.0, 0.05))
        requests = [asked(name) for name in names]
        for request in requests:
            one.take(request)
        return [r.name for r in requests if r.budget == 1.0]

    found = canaries()
    assert found == canaries() and 0.04 < len(found) / len(names) < 0.06


def test_arms_are_counted_apart():
    one = policy(canary=CanaryConfig(1.0, 0.3))
    for i in range(50):
        request = asked(f"request-{i}")
        one.take(request)
        is_canary = request.budget == 1.0
        done = Completion(
            request.name,
            tokens=[5, 6, 7],
            finish_reason="length",
            log_probabilities=[-1.0 - is_canary] * 3,
            num_prompt_tokens=2,
            experts_per_token=1.0 if is_canary else 2.0,
            arrived=1.0,
            token_times=[1.5, 1.6, 1.7 - 0.04 * is_canary],
        )
        one.ended(request, done)
    arms = one.summary()["arms"]
    assert arms[CONTROL]["requests"] + arms[CANARY]["requests"] == 50
    assert arms[CANARY]["requests"] > 5
    for arm, experts, per_token, log_probability in (
        (CONTROL, 2.0, 0.10, -1.0),
        (CANARY, 1.0, 0.08, -2.0),
    ):
        kpis = arms[arm]
        assert kpis["experts_per_token"] == pytest.approx(experts)
        assert kpis["tpot_p50"] == pytest.approx(per_token) and kpis["failed"] == 0
        assert kpis["mean_log_probability"] == pytest.approx(log_probability)
        assert kpis["ttft_p50"] == pytest.approx(0.5)
    text = one.meters.text().decode()
    assert 'loadstone_arm_request_success_total{arm="canary",reason="length"}' in text


def test_a_lower_budget_is_given_and_counted():
    one = policy(controller=LoadController(TABLE, 16.0))
    first = asked("a")
    one.take(first)
    assert first.budget == 4.0
    for _ in range(30 * WINDOW):
        one.stepped(TIMES[FEW][one.controller.budget] / 1e3, FEW, 128.0)
    later = asked("b")
    one.take(later)
    assert later.budget == 2.0
    text = one.meters.text().decode()
    assert 'loadstone_fallback_total{reason="lower_budget"} 1.0' in text
    assert "loadstone_budget 2.0" in text


def test_a_decision_waits_for_requests_of_another_budget():
    """Else what they take would be put down to the budget that others have just been given."""
    one = policy(controller=LoadController(TABLE, 16.0))
    old = asked("old")
    one.take(old)
    for _ in range(WINDOW):
        one.stepped(0.020, FEW, 128.0)
    assert one.controller.budget == 2.0
    for _ in range(5 * WINDOW):
        one.stepped(0.020, FEW, 128.0)
    assert one.controller.budget == 2.0
    one.ended(old, Completion("old", finish_reason="length"))
    for _ in range(2 * WINDOW):
        one.stepped(0.020, FEW, 128.0)
    assert one.controller.budget == 1.0


def test_prompts_come_in_shorter_pieces_when_no_budget_helps():
    one = policy(controller=LoadController(TABLE, 16.0))
    for _ in range(2 * WINDOW):
        one.stepped(0.030, MANY, 128.0)
    assert one.engine.settings.prefill_tokens == 250
    assert 'loadstone_fallback_total{reason="shorter_prefill"} 2.0' in one.meters.text().decode()


def test_drift_is_looked_for_and_gives_the_trained_budget_back(capsys):
    drift = Drift([[100.0] * 4], window_tokens=100, limit=0.1)
    one = policy(
        controller=LoadController(TABLE, 5.0),
        canary=CanaryConfig(1.0, 0.999),
        drift=drift,
        sample_one_in=1,
        full_budget=True,
    )
    before = asked("a")
    one.take(before)
    assert before.budget == 1.0 and before.keep_routing
    collapsed = torch.zeros(100, 1, 2, dtype=torch.int16)
    done = Completion("a", finish_reason="length", routed_experts=collapsed)
    one.ended(before, done)
    # what only the server asked for is not told to the client
    assert done.routed_experts is None
    assert one.is_careful and "MoE layer 0" in capsys.readouterr().err
    after = asked("b")
    one.take(after)
    assert after.budget is None
    text = one.meters.text().decode()
    assert 'loadstone_fallback_total{reason="drift_alarm"} 1.0' in text
    assert 'loadstone_fallback_total{reason="drift_full_budget"} 1.0' in text
    # one that asked for its experts keeps them
    own = Request("c", [1], SamplingConfig(), keep_routing=True)
    one.take(own)
    told = Completion("c", finish_reason="length", routed_experts=collapsed[:10])
    one.ended(own, told)
    assert told.routed_experts is not None


def test_errors_and_preemptions_are_fallbacks():
    meters = Meters()
    meters.ended(asked("a"), Completion("a", finish_reason="error", num_preemptions=2))
    text = meters.text().decode()
    assert 'loadstone_fallback_total{reason="nonfinite"} 1.0' in text
    assert 'loadstone_fallback_total{reason="preempted"} 2.0' in text
