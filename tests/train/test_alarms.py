"""Alarms over hand-made records."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from pathlib import Path

import pytest
import yaml

from launch.validate import ConfigError, build_record
from train.alarms import Alarms
from train.config import AlarmRule

ROOT = Path(__file__).resolve().parents[2]


def run(rule: AlarmRule, values: list[float | None], every: int = 1, **options) -> list[tuple[int, str]]:
    alarms, found = Alarms({"a": rule}), []
    for i, value in enumerate(values):
        step = (i + 1) * every
        scalars = {} if value is None else {rule.metric: value}
        found += [(e.step, e.event) for e in alarms.check(step, 100 * step, scalars, **options)]
    return found


def test_it_rings_once_and_is_over_once():
    assert run(AlarmRule("m", above=1.0), [1.0, 1.1, 5.0, 1.0, 2.0]) == [
        (2, "raised"), (4, "cleared"), (5, "raised")]


def test_it_must_hold_for_so_many_steps_without_a_break():
    rule = AlarmRule("m", above=1.0, for_steps=10)
    assert run(rule, [2, 2, 2, 0, 2, 2, 2, 2], every=5) == [(15, "raised"), (20, "cleared"), (35, "raised")]
    assert run(rule, [2.0], every=1000) == []  # one record says nothing about the steps before it


def test_records_without_the_metric_neither_raise_nor_end_it():
    assert run(AlarmRule("m", above=1.0), [2.0, None, 2.0, None, 0.0]) == [(1, "raised"), (5, "cleared")]


@pytest.mark.parametrize(("rule", "value", "rings"), [
    (AlarmRule("m", below=0.5), 0.4, True), (AlarmRule("m", below=0.5), 0.5, False),
    (AlarmRule("m", above=0.1, absolute=True), -0.2, True), (AlarmRule("m", above=0.1), -0.2, False),
    (AlarmRule("m", above=1.0), math.nan, True), (AlarmRule("m", below=1.0), math.nan, True),
    (AlarmRule("m", above=1.0), math.inf, True), (AlarmRule("m", above=1.0, after_step=1), 2.0, False)], ids=str)
def test_limits(rule, value, rings):
    assert bool(run(rule, [value])) is rings


def test_the_worst_layer_counts_and_its_expert_is_named():
    rule = AlarmRule("moe/x/layer_*", above=1.0, absolute=True, points_at="busiest", meaning="uneven")
    alarms = Alarms({"uneven": rule})
    scalars = {"moe/x/layer_1": 1.5, "moe/x/layer_3": -4.0, "moe/x": 9.0}
    event, = alarms.check(7, 70, scalars, [[90, 5, 5], [1, 1, 98]], [1, 3])
    assert (event.layer, event.expert, event.value) == (3, 2, -4.0)
    assert event.message == "uneven: moe/x/layer_3 is -4, above 1; layer 3, expert 2"
    assert alarms.scalars(scalars) == {"alarm/uneven": 1} and alarms.scalars({"loss": 1.0}) == {}


def test_without_a_layer_in_the_name_the_expert_that_stands_out_is_named():
    idle = Alarms({"a": AlarmRule("moe/dead", above=0.0, points_at="idlest")})
    event, = idle.check(1, 1, {"moe/dead": 1}, [[5, 5, 5], [0, 9, 6]], [2, 4])
    assert (event.layer, event.expert) == (4, 0)


def test_state_survives_a_checkpoint():
    rule = AlarmRule("m", above=1.0, for_steps=4, action="stop")
    first = Alarms({"a": rule, "b": AlarmRule("m", above=1.0)})
    first.check(10, 0, {"m": 2.0})
    second = Alarms({"a": rule})  # "b" is gone from the config
    second.restore(json.loads(json.dumps(first.state())))
    assert [e.step for e in second.check(14, 0, {"m": 2.0})] == [14] and second.actions() == {"stop"}


def test_the_defaults_are_rules_over_metrics_that_exist():
    rules = yaml.safe_load((ROOT / "conf/alarms/default.yaml").read_text())
    documented = (ROOT / "docs/metrics.md").read_text()
    for name, values in rules.items():
        problems: list[str] = []
        rule = build_record(values, AlarmRule, f"alarms.{name}.", problems)
        assert not problems and not rule.problems(name), (name, problems)
        base = rule.metric.split("/")[1]
        assert base in documented, f"{rule.metric} of alarms.{name} is not in docs/metrics.md"
        assert fnmatch.fnmatchcase(rule.metric.replace("*", "3"), rule.metric)


@pytest.mark.parametrize(("change", "message"), [
    ({"above": None}, "give one of above and below"), ({"below": 0.0}, "give one of above and below"),
    ({"for_steps": -1}, "for_steps is -1"), ({"metric": ""}, "metric is empty")])
def test_contradictions_are_named(change, message):
    rule = dataclasses.replace(AlarmRule("m", above=1.0), **change)
    assert any(message in problem for problem in rule.problems("alarms.mine"))


def test_an_unknown_key_gets_a_suggestion():
    problems: list[str] = []
    build_record({"metric": "m", "abov": 1.0}, AlarmRule, "alarms.mine.", problems)
    assert any("did you mean alarms.mine.above?" in problem for problem in problems)
    assert issubclass(ConfigError, ValueError)
