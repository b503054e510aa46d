"""What watches training: how an observer is added, when it is asked what, and that looking changes
nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.end_to_end.commandline import write_text
from tests.launch.test_stop import train_here
from tests.lone import PLACE
from train import fit as fitting
from train.agenda import Step
from train.config.watching import AlarmRule
from train.guard.alarm_actions import AlarmActions
from train.observe.base import Ask, MicroBatch, Observer, Phase, Record, StepResult, Watch
from train.observe.sample import RoutingSample
from train.rank.runtime import _leave
from train.timing.pauses import SaveSeconds

MICRO_BATCHES = 4
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter_tensor",
)


class Planted(Observer):
    """An observer as somebody adds one: notes what it is asked, and logs the share of padding."""

    def __init__(self, fails_in: int | None = None) -> None:
        self.asked: list[str] = []
        self.fails_in = fails_in
        self.tokens = self.places = 0

    def begin_step(self, step: Step) -> Ask:
        self.asked.append(f"begin {step.number}")
        return Ask.ROUTING

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        self.asked.append(name)
        yield
        if name in ("whole", "pause"):
            self.asked.append(f"end of {name}")

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        self.asked.append("micro-batch")
        assert len(done.output.routings) == 1 and done.communication is None
        self.tokens += done.batch.num_tokens
        self.places += done.batch.targets.numel()
        if step.number == self.fails_in:
            raise ArithmeticError("planted")

    def end_step(self, step: Step, result: StepResult) -> None:
        assert result.applied and result.layers is not None
        self.asked.append(f"end {step.number}")

    def log(self, step: Step) -> dict[str, Any]:
        self.asked.append("numbers")
        share, self.tokens, self.places = 1 - self.tokens / self.places, 0, 0
        return {"data/padding": share}

    def close(self) -> None:
        self.asked.append("close")


@contextlib.contextmanager
def collectives() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Names and sizes of what the ranks do together, in order."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def noting(name: str) -> Any:
        real = getattr(dist, name)

        def call(*given: Any, **options: Any) -> Any:
            sizes = [g.numel() for g in (*given, *options.values()) if isinstance(g, torch.Tensor)]
            found.append((name, tuple(sizes)))
            return real(*given, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, noting(name)))
        yield found


def trained(folder: Path, *observers: Observer) -> tuple[list, list[dict]]:
    """Collectives and records of a run of four steps that these observers watch, too."""
    folder.mkdir()
    watched = functools.partial(fitting.fit, observers=observers)
    overrides = ("train.log_interval=2", "train.sample_prompt=null")
    with mock.patch.object(fitting, "fit", watched), collectives() as found:
        try:
            train_here(folder / "run", write_text(folder), *overrides)
        except ArithmeticError:
            # A rank ends with its error, and all its groups with it; this process goes on.
            if dist.is_initialized():
                _leave({name: None for name in PLACE})
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return found, [json.loads(line) for line in lines]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def test_a_planted_observer_is_asked_and_logged_and_the_run_stays_the_same(tmp_path):
    planted = Planted()
    before, records = trained(tmp_path / "plain")
    after, watched = trained(tmp_path / "watched", planted)
    assert after == before and len(before) > 10
    assert [r["step"] for r in watched if "data/padding" in r] == [2, 4]
    for record in watched:
        assert record.pop("data/padding", 0.0) == 0.0
    assert without_times(watched) == without_times(records)

    # the second of four steps, which is logged and evaluated
    asked = planted.asked[planted.asked.index("begin 2") - 2 : planted.asked.index("begin 3") - 2]
    assert asked.count("micro-batch") == MICRO_BATCHES and "evaluate" in asked
    assert [note for note in asked if note not in ("evaluate", "save")] == [
        *("whole", "data", "begin 2"),
        *(("forward", "backward", "micro-batch") * MICRO_BATCHES),
        *("step", "end 2", "end of whole", "log", "numbers", "pause", "end of pause"),
    ]
    assert planted.asked[-1] == "close"


def test_an_observer_that_fails_ends_the_run_before_the_next_collective(tmp_path):
    before, _ = trained(tmp_path / "plain")
    planted = Planted(fails_in=3)
    after, records = trained(tmp_path / "broken", planted)
    assert after == before[: len(after)] and len(after) < len(before)
    assert [r["step"] for r in records if "train/loss" in r] == [2]
    assert planted.asked[-1] == "close"


class Noting(Observer):
    def __init__(self, name: str, notes: list[str], ask: Ask) -> None:
        self.name, self.notes, self.ask = name, notes, ask

    def begin_step(self, step: Step) -> Ask:
        return self.ask

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        self.notes.append(f"{self.name} enters")
        yield
        self.notes.append(f"{self.name} leaves")

    def log(self, step: Step) -> dict[str, Any]:
        self.notes.append(f"{self.name} logs")
        return {self.name: 1.0}


def test_a_list_of_observers_is_an_observer():
    notes: list[str] = []
    watch = Watch([Noting("a", notes, Ask.ROUTING), Observer(), Noting("b", notes, Ask.ATTENTION)])
    step = Step(1)
    assert watch.begin_step(step) == Ask.ROUTING | Ask.ATTENTION
    assert Watch([]).begin_step(step) == Ask.NOTHING
    with watch.phase(step, "data"):
        notes.append("work")
    assert notes == ["a enters", "b enters", "work", "b leaves", "a leaves"]
    assert watch.log(step) == {"a": 1.0, "b": 1.0} and notes[-2:] == ["a logs", "b logs"]
    assert watch.tables() == {}


def test_an_error_inside_a_phase_is_passed_on_and_counts_no_time():
    saves = SaveSeconds()
    with pytest.raises(OSError, match="full"), saves.phase(Step(1), "save"):
        raise OSError("the disk is full")
    assert saves.log(Step(1)) == {"perf/save_seconds": 0.0}


def test_a_record_of_a_step_that_was_not_measured_has_no_sample():
    sample = RoutingSample(True, lambda slots: 8)
    output = SimpleNamespace(routings=())
    assert sample.begin_step(Step(1)) == Ask.NOTHING
    assert sample.begin_step(Step(2, logs=True)) == Ask.ROUTING
    assert RoutingSample(False, None).begin_step(Step(2, logs=True)) == Ask.NOTHING
    sample.micro_batch(Step(2, logs=True), MicroBatch(None, output, None))  # type: ignore[arg-type]
    assert sample.log(Step(2, logs=True)) == {}


def test_what_alarms_ask_for_is_read_from_records_and_held_until_they_are_over(monkeypatch, caplog):
    monkeypatch.setattr("train.guard.alarm_actions.from_rank_zero", lambda function: function())
    rules = {
        "loud": AlarmRule("moe/x", above=1.0, action="freeze_bias"),
        "end": AlarmRule("moe/y", above=1.0, action="stop"),
        "never": AlarmRule("moe/z", above=1.0),
    }
    alarms = AlarmActions(rules, {}, (0,))

    def read(step: int, **scalars: float) -> tuple[list[str], dict[str, Any]]:
        record = Record(step, 10 * step, {f"moe/{k}": v for k, v in scalars.items()}, {})
        return [event.event for event in alarms.read(record)], record.scalars

    with caplog.at_level("INFO", "loadstone"):
        assert read(1, x=0.0, y=0.0) == (
            [],
            {"moe/x": 0.0, "moe/y": 0.0, "alarm/loud": 0, "alarm/end": 0},
        )
        assert alarms.agree() == frozenset()
        assert read(2, x=2.0, y=0.0)[0] == ["raised"] and alarms.agree() == {"freeze_bias"}
        assert read(3, x=2.0, y=2.0)[0] == ["raised"]
    assert alarms.agree() == {"freeze_bias", "stop"} and alarms.stopping() == ["end"]
    assert caplog.text.count("alarms without a metric in this run: never (moe/z)") == 1

    resumed = AlarmActions(rules, alarms.state(), (0,))
    assert resumed.actions == {"freeze_bias", "stop"}
    assert read(4, x=0.0, y=0.0)[0] == ["cleared", "cleared"] and alarms.agree() == frozenset()
