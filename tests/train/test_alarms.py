"""Alarms over hand-made records."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from launch.config.build import ConfigError, build_record
from launch.config.overrides import plain
from launch.config.parse import parse
from model.config import BudgetConfig, ModelConfig
from model.moe.balance import LayerStats
from model.routers.config import ThresholdConfig
from ops.router import NUM_REASONS, Reason
from tests.composing import composed
from train.config.watching import AlarmRule
from train.guard.alarms import Alarms, settled
from train.observe.catalogue.names import metric_names
from train.observe.routing import RouterTables, routing_metrics
from train.sinks.console import console_line

ROOT = Path(__file__).resolve().parents[2]


def run(
    rule: AlarmRule, values: list[float | None], every: int = 1, **options
) -> list[tuple[int, str]]:
    alarms, found = Alarms({"a": rule}), []
    for i, value in enumerate(values):
        step = (i + 1) * every
        scalars = {} if value is None else {rule.metric: value}
        found += [(e.step, e.event) for e in alarms.check(step, 100 * step, scalars, **options)]
    return found


def test_it_rings_once_and_is_over_once():
    assert run(AlarmRule("m", above=1.0), [1.0, 1.1, 5.0, 1.0, 2.0]) == [
        (2, "raised"),
        (4, "cleared"),
        (5, "raised"),
    ]


def test_it_must_hold_for_so_many_steps_without_a_break():
    rule = AlarmRule("m", above=1.0, for_steps=10)
    assert run(rule, [2, 2, 2, 0, 2, 2, 2, 2], every=5) == [
        (15, "raised"),
        (20, "cleared"),
        (35, "raised"),
    ]
    # one record says nothing about the steps before it
    assert run(rule, [2.0], every=1000) == []


def test_records_without_the_metric_neither_raise_nor_end_it():
    assert run(AlarmRule("m", above=1.0), [2.0, None, 2.0, None, 0.0]) == [
        (1, "raised"),
        (5, "cleared"),
    ]


@pytest.mark.parametrize(
    ("rule", "value", "rings"),
    [
        (AlarmRule("m", below=0.5), 0.4, True),
        (AlarmRule("m", below=0.5), 0.5, False),
        (AlarmRule("m", above=0.1, absolute=True), -0.2, True),
        (AlarmRule("m", above=0.1), -0.2, False),
        (AlarmRule("m", above=1.0), math.nan, True),
        (AlarmRule("m", below=1.0), math.nan, True),
        (AlarmRule("m", above=1.0), math.inf, True),
        (AlarmRule("m", above=1.0, after_step=1), 2.0, False),
    ],
    ids=str,
)
def test_limits(rule, value, rings):
    assert bool(run(rule, [value])) is rings


def test_the_worst_layer_counts_and_its_expert_is_named():
    rule = AlarmRule(
        "moe/x/layer_*", above=1.0, absolute=True, points_at="busiest", meaning="uneven"
    )
    alarms = Alarms({"uneven": rule})
    scalars = {"moe/x/layer_1": 1.5, "moe/x/layer_3": -4.0, "moe/x": 9.0}
    (event,) = alarms.check(7, 70, scalars, [[90, 5, 5], [1, 1, 98]], [1, 3])
    assert (event.layer, event.expert, event.value) == (3, 2, -4.0)
    assert event.message == "uneven: moe/x/layer_3 is -4, above 1; layer 3, expert 2"
    assert alarms.scalars(scalars) == {"alarm/uneven": 1} and alarms.scalars({"loss": 1.0}) == {}


def test_without_a_layer_in_the_name_the_expert_that_stands_out_is_named():
    idle = Alarms({"a": AlarmRule("moe/dead", above=0.0, points_at="idlest")})
    (event,) = idle.check(1, 1, {"moe/dead": 1}, [[5, 5, 5], [0, 9, 6]], [2, 4])
    assert (event.layer, event.expert) == (4, 0)


def test_state_survives_a_checkpoint():
    rule = AlarmRule("m", above=1.0, for_steps=4, action="stop")
    first = Alarms({"a": rule, "b": AlarmRule("m", above=1.0)})
    first.check(10, 0, {"m": 2.0})
    second = Alarms({"a": rule})  # "b" is gone from the config
    second.restore(json.loads(json.dumps(first.state())))
    assert [e.step for e in second.check(14, 0, {"m": 2.0})] == [14] and second.actions() == {
        "stop"
    }


def test_the_defaults_are_rules_over_metrics_that_exist():
    rules = yaml.safe_load((ROOT / "conf/alarms/default.yaml").read_text())
    known = metric_names((1,), (1,), False)
    for name, values in rules.items():
        problems: list[str] = []
        rule = build_record(values, AlarmRule, f"alarms.{name}.", problems)
        assert not problems and not rule.problems(name), (name, problems)
        assert fnmatch.filter(known, rule.metric), f"alarms.{name} watches {rule.metric}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"above": None}, "give one of above and below"),
        ({"below": 0.0}, "give one of above and below"),
        ({"for_steps": -1}, "for_steps is -1"),
        ({"metric": ""}, "metric is empty"),
    ],
)
def test_contradictions_are_named(change, message):
    rule = dataclasses.replace(AlarmRule("m", above=1.0), **change)
    assert any(message in problem for problem in rule.problems("alarms.mine"))


def test_an_unknown_key_gets_a_suggestion():
    problems: list[str] = []
    build_record({"metric": "m", "abov": 1.0}, AlarmRule, "alarms.mine.", problems)
    assert any("did you mean alarms.mine.above?" in problem for problem in problems)
    assert issubclass(ConfigError, ValueError)


# --- metrics that are watched ---------------------------------------------------------------------


def problems_of(rule: str, *overrides: str) -> list[str]:
    config = composed(f"+alarms.mine={{metric: '{rule}', above: 1}}", *overrides)
    try:
        parse(plain(config), 1)
    except ConfigError as error:
        return [problem for problem in error.problems if problem.startswith("alarms.mine")]
    return []


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("train/losss", "did you mean train/loss?"),
        ("moe/droped", "did you mean moe/dropped?"),
        ("loss", "which no run logs"),
        ("moe/max_vio/layer_0", "no such layer has experts"),
        ("moe/max_vio/layer_99", "no such layer has experts"),
        ("moe/dead_fraction/layer_*", "add that"),
        ("moe/expert_grad_cv", "tracker.metrics=detailed only"),
        ("eval/val_loss", "not evaluations"),
        ("alarm/budget", "which no run logs"),
        ("moe/fallback/spilled", "did you mean"),
        ("mo/*", "which no run logs"),
    ],
)
def test_an_alarm_on_what_nobody_logs_is_refused(metric, words):
    (problem,) = problems_of(metric)
    assert words in problem and metric in problem


@pytest.mark.parametrize(
    ("metric", "overrides"),
    [
        ("train/loss", ()),
        ("moe/max_vio/layer_1", ()),
        ("moe/max_vio/layer_*", ()),
        ("moe/dead_fraction/layer_*", ("tracker.metrics=detailed",)),
        ("perf/rank_skew", ()),
        ("moe/budget_error", ()),
        ("attention/error/layer_0", ()),
        ("moe/max_vio", ("model.num_experts=0",)),
    ],
)
def test_an_alarm_on_what_some_run_of_the_model_logs_is_accepted(metric, overrides):
    assert problems_of(metric, *overrides) == []


def test_a_dense_model_keeps_the_default_alarms():
    config = composed("model.num_experts=0", "balance=none")
    found = []
    try:
        parse(plain(config), 1)
    except ConfigError as error:
        found = error.problems
    assert not [problem for problem in found if "alarms" in problem]


# --- alarms that ring when they should ------------------------------------------------------------


def statistics(min_experts: int, reasons: dict[Reason, int]) -> dict[str, float]:
    """Metrics of one layer of four experts and 100 tokens that visited them evenly."""
    counts = torch.zeros(1, NUM_REASONS, dtype=torch.int64)
    for reason, tokens in reasons.items():
        counts[0, reason.bit] = tokens
    model = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=8,
        num_experts=4,
        expert_intermediate_size=8,
        num_dense_layers=1,
        num_shared_experts=1,
        max_seq_len=8,
    )
    router = ThresholdConfig(budget=1.0, min_experts=min_experts).build(model)
    none = torch.zeros(1, dtype=torch.int64)
    stats = LayerStats(
        torch.full((1, 4), 25),
        torch.tensor([[45, 10, 45, 0, 0]]),
        counts,
        none,
        none,
        none.double(),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(1, 4, 0),
    )
    return routing_metrics(stats, RouterTables.of([router], router), router, model, None)


def test_a_permitted_empty_choice_is_no_fallback():
    found = statistics(0, {Reason.EMPTY: 45})
    assert found["moe/empty"] == 0.45
    assert found["moe/fallback/empty"] == 0.0 and found["moe/fallback_rate"] == 0.0
    found = statistics(1, {Reason.EMPTY: 45})
    assert found["moe/fallback/empty"] == 0.45 and found["moe/fallback_rate"] == 0.45


def test_overflow_that_was_asked_for_is_no_fallback_and_what_was_dropped_rings():
    found = statistics(1, {Reason.OVERFLOW: 100})
    assert found["moe/fallback/overflow"] == 1.0 and found["moe/fallback_rate"] == 0.0
    values = yaml.safe_load((ROOT / "conf/alarms/default.yaml").read_text())["dropped"]
    rule = build_record(values, AlarmRule, "alarms.dropped.", [])
    assert run(rule, [0.0, 0.875, 0.875, 0.875], every=10) == [(30, "raised")]
    assert run(rule, [0.005] * 9, every=10) == []


def test_the_console_means_by_spilled_what_the_metric_does():
    scalars = {
        "train/loss": 1.0,
        "train/lr": 1.0,
        "train/grad_norm": 1.0,
        "train/skipped_steps": 0,
        "moe/max_load": 1.0,
        "moe/max_load_layer": 0,
        "moe/dropped": 0.875,
        "moe/spilled": 0.0,
        "moe/layers_in_fallback": 0,
        "perf/tokens_per_second": 1.0,
        "perf/memory_gib": 1.0,
        **statistics(1, {Reason.OVERFLOW: 100}),
    }
    line = console_line(1, 2, scalars, 0.0)
    assert "dropped 87.5%" in line and "spilled" not in line and "overflow" not in line
    assert "spilled 12.5%" in console_line(1, 2, {**scalars, "moe/spilled": 0.125}, 0.0)


@pytest.mark.parametrize(("warm_start", "first"), [(50, 201), (1000, 1151)])
def test_a_long_warm_start_does_not_ring(warm_start, first):
    values = yaml.safe_load((ROOT / "conf/alarms/default.yaml").read_text())
    for name in ("fallbacks", "budget"):
        rule = build_record(values[name], AlarmRule, f"alarms.{name}.", [])
        found = settled({"a": rule}, BudgetConfig(warm_start_steps=warm_start))["a"]
        metric = rule.metric.replace("*", "1")
        alarms, raised = Alarms({"a": found}), []
        for step in range(1, first + 30):
            raised += [e.step for e in alarms.check(step, step, {metric: 1.0})]
        assert raised == [first + 10]
