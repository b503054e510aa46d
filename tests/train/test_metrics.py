"""Every number of an interval against a hand-made run: with skipped steps, evaluation and saving,
one step, and resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from launch.config.overrides import plain
from launch.config.parse import parse
from model.attention.base import STATS
from model.moe.balance import LayerStats
from model.parallel.groups import ParallelGroups
from model.parallel.part import ModelPart
from ops.all_to_all import Communication
from tests.composing import composed
from train import loop
from train.agenda import Step
from train.components import build_model
from train.guard.alarm_actions import AlarmActions
from train.observe import step_metrics as metrics
from train.observe.base import MicroBatch, StepResult, Watch
from train.observe.step_metrics import StepMetrics
from train.observers import standard_observers
from train.parts import Parts
from train.progress import Progress
from train.sinks.console import console_line
from train.timing import pauses
from train.timing.pauses import Speed

TINY = (
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.intermediate_size=32",
    "model.num_experts=4",
    "model.num_dense_layers=0",
    "model.expert_intermediate_size=8",
    "model.max_seq_len=64",
    "train.seq_len=32",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
)


class Clock:
    """time.perf_counter() that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(metrics, "time", found)
    monkeypatch.setattr(pauses, "time", found)
    return found


def run_of(*overrides: str):
    return parse(plain(composed(*TINY, *overrides)), 1)


def started(*overrides: str) -> StepMetrics:
    run = run_of(*overrides)
    model = build_model(run)
    found = StepMetrics(run.model, model.routers(), torch.device("cpu"), 1e6, run.balance, None, [])
    found.peak_flops = 1e9
    return found


def micro_batch(
    loss: float, aux: float, z: float, processed: int, logit_z: float = 0.0
) -> SimpleNamespace:
    return SimpleNamespace(
        loss_sum=torch.tensor(loss),
        aux_sum=torch.tensor(aux),
        z_sum=torch.tensor(z),
        logit_z_sum=torch.tensor(logit_z),
        processed=torch.tensor(processed),
        attention_stats=torch.zeros(0, len(STATS)),
    )


def stats_of(
    counts: list[list[int]],
    k_histogram: list[list[int]],
    spilled: int = 0,
    dropped: int = 0,
    empty: int = 0,
) -> LayerStats:
    layers = len(counts)
    reasons = torch.zeros(layers, 8, dtype=torch.int64)
    reasons[0, 1] = empty
    overflow = torch.zeros(layers, 2, dtype=torch.int64)
    overflow[1] = torch.tensor([spilled, dropped])
    tokens = torch.tensor(k_histogram).sum(1)
    return LayerStats(
        torch.tensor(counts),
        torch.tensor(k_histogram),
        reasons,
        torch.zeros(layers, dtype=torch.int64),
        torch.zeros(layers, dtype=torch.int64),
        tokens * 0.5,
        overflow,
        torch.zeros(layers, 4, 0),
    )


def three_steps(found: StepMetrics, clock: Clock) -> None:
    """Two updates and, between them, a step that is skipped: 10 tokens each, 9 of them predicted; 2
    layers.
    """
    found.add(micro_batch(18.0, 24.0, 40.0, 38), 9, 10)
    found.add_stats(
        stats_of(
            [[20, 0, 0, 0], [5, 5, 5, 3]], [[0, 0, 10], [0, 2, 8]], spilled=3, dropped=2, empty=4
        )
    )
    found.steps += 1
    clock.now += 2.0
    mark = found.mark()
    found.add(micro_batch(math.nan, math.nan, math.inf, 7), 9, 10)
    found.add_communication(Communication(600.0, 0.5, (1.0, 100.0)), 2.0)
    found.revert(mark)
    found.steps += 1
    clock.now += 2.0
    found.add(micro_batch(36.0, 16.0, 20.0, 40), 9, 10)
    found.add_stats(stats_of([[10, 10, 0, 0], [5, 5, 5, 5]], [[0, 0, 10], [0, 0, 10]]))
    found.steps += 1
    clock.now += 1.0


def test_an_interval_with_a_skipped_step_is_what_a_hand_makes_of_it(clock):
    found = started("balance.aux_loss_coeff=0.01")
    three_steps(found, clock)
    scalars, tables = found.reduce()
    counts = [[30, 10, 0, 0], [10, 10, 10, 8]]
    assert tables["counts"] == counts and tables["k_histogram"] == [[0, 0, 20], [0, 2, 18]]
    shares = [[c / sum(row) for c in row] for row in counts]
    entropies = [-sum(s * math.log(s) for s in row if s) for row in shares]
    expected = {
        "train/loss": (18 + 36) / 18,  # nats per target of the two updates
        # of all three steps
        "perf/tokens_per_second": 30 / 5,
        "perf/step_seconds": 5 / 3,
        "perf/mfu": 1e6 * 30 / 5 / 1e9,
        "comm/bytes": 600,
        "comm/exposed_seconds": 0.5,
        "comm/exposed_fraction": 0.25,
        "comm/payload_error": 0.1,
        "moe/z_loss": 60 / 20 / 2,
        "moe/aux_loss": 40 / 20 / 2,
        "moe/dropped": 1 - 78 / (78 + 2),
        "moe/spilled": 3 / (78 + 2),
        "moe/max_vio_step": ((4 - 1) + (5 / 4.5 - 1) + (2 - 1) + 0) / 2 / 2,
        "moe/max_vio": ((3 - 1) + (10 / 9.5 - 1)) / 2,
        "moe/max_vio/layer_0": 2,
        "moe/max_vio/max": 2,
        "moe/max_load": 3,
        "moe/max_load_layer": 0,
        "moe/min_load": 0,
        "moe/min_vio": (1 + 1 - 8 / 9.5) / 2,
        "moe/experts_per_token": (40 / 20 + 38 / 20) / 2,
        "moe/experts_per_token/layer_1": 1.9,
        "moe/experts_per_token_std": (0 + math.sqrt((2 * 1 + 18 * 4) / 20 - 1.9**2)) / 2,
        "moe/router_entropy": 0.5 / math.log(4),
        "moe/load_entropy": sum(entropies) / 2,
        "moe/load_entropy_ratio": sum(entropies) / 2 / math.log(4),
        "moe/load_entropy_ratio/min": entropies[0] / math.log(4),
        "moe/load_cv": (
            math.sqrt((20**2 + 0 + 10**2 + 10**2) / 4) / 10
            + math.sqrt((3 * 0.5**2 + 1.5**2) / 4) / 9.5
        )
        / 2,
        "moe/load_gini": (gini(counts[0]) + gini(counts[1])) / 2,
        "moe/dead_experts": 2,
        "moe/dead_fraction": 0.25,
        "moe/dead_fraction/max": 0.5,
        "moe/hot_fraction": 0.75,
        "moe/concentration": ((1 - 0.5) / 0.5 + (20 / 38 - 0.5) / 0.5) / 2,
        "moe/fallback/empty": 4 / 40,
        "moe/fallback_rate": 4 / 40,
        "moe/expert_flops_per_token": 6 * 16 * 8 * (2.0 + 1.9),
    }
    assert {name: scalars[name] for name in expected} == pytest.approx(expected)


def gini(row: list[int]) -> float:
    """Mean absolute difference of all pairs over twice the mean."""
    return sum(abs(a - b) for a in row for b in row) / (2 * len(row) * sum(row))


def test_the_loss_of_multi_token_prediction_is_the_mean_of_its_modules_means(clock):
    """Over the targets of each, without the weight, and without a step that is skipped."""
    found = started("model.num_mtp_layers=2", "train.mtp_coeff=0.3")
    for sums, targets, applied in (
        ([8.0, 9.0], [4, 2], True),
        ([math.nan, 5.0], [4, 2], False),
        ([4.0, 1.0], [4, 3], True),
    ):
        mark = found.mark()
        output = micro_batch(18.0, 0.0, 0.0, 5)
        output.mtp_sums = torch.tensor(sums)
        found.add(output, 9, 10, targets)
        if not applied:
            found.revert(mark)
    clock.now += 1.0
    scalars, _ = found.reduce()
    assert scalars["train/mtp_loss"] == pytest.approx((12 / 8 + 10 / 5) / 2)
    assert scalars["train/loss"] == 2.0
    shown = {**scalars, "train/lr": 1e-3, "train/grad_norm": 1.0, "train/skipped_steps": 0}
    assert "loss 2.0000  mtp 1.7500  lr" in console_line(7, 9, shown, 8.0)


def test_the_z_loss_of_the_logits_is_the_mean_over_targets_of_updates(clock):
    found = started("train.z_loss_coeff=1e-4")
    for logit_z, applied in ((18.0, True), (math.nan, False), (36.0, True)):
        mark = found.mark()
        found.add(micro_batch(18.0, 0.0, 0.0, 5, logit_z), 9, 10)
        if not applied:
            found.revert(mark)
    clock.now += 1.0
    scalars, _ = found.reduce()
    assert scalars["train/z_loss"] == pytest.approx(54 / 18) and scalars["train/loss"] == 2.0


def test_an_interval_without_an_update_has_a_speed_and_no_loss(clock):
    found = started()
    mark = found.mark()
    found.add(micro_batch(math.nan, 0.0, 0.0, 5), 9, 10)
    found.revert(mark)
    found.steps += 1
    clock.now += 4.0
    scalars, tables = found.reduce()
    assert tables == {} and not [name for name in scalars if name.startswith("moe/")]
    assert math.isnan(scalars["train/loss"])
    assert scalars["perf/tokens_per_second"] == 2.5 and scalars["perf/step_seconds"] == 4.0
    line = console_line(
        7,
        9,
        {**scalars, "train/lr": 1e-3, "train/grad_norm": math.nan, "train/skipped_steps": 3},
        8.0,
    )
    assert "step 7/9  loss nan  " in line and "gnorm nan  skipped 3  2.5 tok/s" in line


def test_an_interval_starts_where_the_one_before_ended(clock):
    found = started()
    three_steps(found, clock)
    found.reduce()
    found.add(micro_batch(9.0, 0.0, 0.0, 20), 9, 10)
    found.add_stats(stats_of([[5, 5, 5, 5]] * 2, [[0, 0, 10]] * 2))
    found.steps += 1
    clock.now += 0.5
    scalars, _ = found.reduce()
    assert (
        scalars["train/loss"] == 1.0
        and scalars["perf/tokens_per_second"] == 20
        and scalars["moe/max_vio_step"] == 0
    )
    assert "comm/bytes" not in scalars


# --- the loop: what the speed counts --------------------------------------------------------------

STEP_SECONDS, EVALUATION_SECONDS, SAVE_SECONDS, TOKENS = 2.0, 1000.0, 300.0, 64


@dataclass
class Played:
    """Steps, evaluations and saves of the real loop that only take time."""

    clock: Clock
    stop_at: int | None = None
    skip: tuple[int, ...] = ()

    def training_step(self, run: Parts, step: Step) -> StepResult | None:
        if run.progress.step == self.stop_at:
            return None
        run.watch.begin_step(step)
        output = micro_batch(float(step.number * TOKENS), 0.0, 0.0, 0)
        batch = SimpleNamespace(num_targets=TOKENS, num_tokens=TOKENS)
        run.watch.micro_batch(step, MicroBatch(batch, output, None))
        self.clock.now += 10.0 if step.number == 1 else STEP_SECONDS  # the first one compiles
        applied = step.number not in self.skip
        norm = 1.0 if applied else math.nan
        result = StepResult(TOKENS, step.number - 1, step.number, norm, applied, None, None)
        run.watch.end_step(step, result)
        return result

    def evaluate_and_keep_best(self, run: Parts, step: Step) -> None:
        self.clock.now += EVALUATION_SECONDS

    def save(self, run: Parts, step: Step) -> bool:
        with run.watch.phase(step, "save"):
            self.clock.now += SAVE_SECONDS
            run.saved_step = step.number
        return True


def run_loop(
    clock: Clock, *overrides: str, progress: Progress | None = None, **settings: Any
) -> tuple[dict, dict[int, dict]]:
    """The run's summary, and its records by step."""
    config = run_of(
        "model.num_experts=0",
        "router.top_k=0",
        "alarms=off",
        "watchdog.straggler_ratio=0",
        "optim.warmup_steps=0",
        "audit.sample_one_in=0",
        *overrides,
    )
    progress, speed = progress or Progress(), Speed()
    module = SimpleNamespace(
        routers=list,
        router_kind=None,
        rank_shares=None,
        part=ModelPart.of((range(1),), 1, (), ()),
    )
    engine = SimpleNamespace(module=module, device=torch.device("cpu"))
    schedule = SimpleNamespace(learning_rate=1e-3)
    logged: dict[int, dict] = {}
    parts: dict[str, Any] = {
        "config": config,
        "run_dir": Path("run"),
        "watch": Watch(
            standard_observers(
                config,
                Path("run"),
                ParallelGroups.single(),
                engine,  # type: ignore[arg-type]
                schedule,  # type: ignore[arg-type]
                progress,
                speed,
            )
        ),
        "speed": speed,
        "sinks": SimpleNamespace(
            write=lambda record, events: logged.update(
                {record.step: {**record.scalars, "tokens": record.tokens}}
            )
        ),
        "alarms": AlarmActions({}, {}, ()),
        "routing": SimpleNamespace(obey=lambda actions: None),
        "writer": SimpleNamespace(best_loss=lambda: math.inf, require=lambda step: None),
        "store": SimpleNamespace(unigram_entropy=5.0),
        "progress": progress,
        "saved_step": progress.step,
    }
    unused = {f.name: None for f in fields(Parts) if f.name not in parts}
    played = Played(clock, **settings)
    with (
        mock.patch.object(loop, "training_step", played.training_step),
        mock.patch.object(loop, "evaluate_and_keep_best", played.evaluate_and_keep_best),
        mock.patch.object(loop, "save", played.save),
    ):
        return loop.train(Parts(**{**unused, **parts})), logged


def test_evaluation_and_saving_count_in_no_speed(clock):
    summary, logged = run_loop(
        clock,
        "train.num_steps=9",
        "train.log_interval=3",
        "train.eval_interval=2",
        "checkpoint.save_interval=4",
    )
    assert list(logged) == [3, 6, 9]
    assert logged[3]["perf/tokens_per_second"] == pytest.approx(3 * TOKENS / 14)
    assert [logged[s]["perf/tokens_per_second"] for s in (6, 9)] == pytest.approx(
        [TOKENS / STEP_SECONDS] * 2
    )
    assert [logged[s]["perf/step_seconds"] for s in (6, 9)] == pytest.approx([STEP_SECONDS] * 2)
    assert [logged[s]["train/loss"] for s in (3, 6, 9)] == [2, 5, 8]
    assert [logged[s]["perf/save_seconds"] for s in (3, 6, 9)] == [0, SAVE_SECONDS, SAVE_SECONDS]
    assert [logged[s]["tokens"] for s in (3, 6, 9)] == [3 * TOKENS, 6 * TOKENS, 9 * TOKENS]
    # without the first interval
    assert summary["tokens_per_second"] == pytest.approx(TOKENS / STEP_SECONDS)
    assert (
        summary["train_loss"] == 8
        and summary["tokens"] == 9 * TOKENS
        and summary["skipped_steps"] == 0
    )


def test_skipped_steps_count_in_the_speed_and_in_no_loss(clock):
    summary, logged = run_loop(
        clock, "train.num_steps=9", "train.log_interval=3", skip=(5, 7, 8, 9)
    )
    assert [logged[s]["train/loss"] for s in (3, 6, 9)] == pytest.approx(
        [2, (4 + 6) / 2, math.nan], nan_ok=True
    )
    assert [logged[s]["perf/tokens_per_second"] for s in (6, 9)] == pytest.approx(
        [TOKENS / STEP_SECONDS] * 2
    )
    assert [logged[s]["train/skipped_steps"] for s in (3, 6, 9)] == [0, 1, 4]
    assert math.isnan(summary["train_loss"]) and summary["skipped_steps"] == 4
    assert summary["tokens_per_second"] == pytest.approx(TOKENS / STEP_SECONDS)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.num_steps=1",),
        ("train.num_steps=1", "train.log_interval=1"),
        ("train.num_steps=5", "train.stop_after_step=1"),
    ],
)
def test_a_run_of_one_step_has_its_speed(clock, overrides):
    summary, logged = run_loop(clock, *overrides)
    assert list(logged) == [1] and logged[1]["train/loss"] == 1
    assert logged[1]["perf/tokens_per_second"] == pytest.approx(TOKENS / 10)
    assert summary["tokens_per_second"] == pytest.approx(TOKENS / 10)


def test_a_run_that_is_stopped_has_the_speed_of_what_it_did(clock):
    for interval in (2, 10):  # stopped at a log step, and between two
        summary, logged = run_loop(
            clock, "train.num_steps=20", f"train.log_interval={interval}", stop_at=2
        )
        assert list(logged) == [2] and summary["stopped"]
        assert summary["tokens_per_second"] == pytest.approx(2 * TOKENS / 12)


def test_a_resumed_run_counts_from_where_it_resumed(clock):
    before = Progress(step=4, consumed_tokens=4 * TOKENS, skipped_steps=1)
    summary, logged = run_loop(clock, "train.num_steps=9", "train.log_interval=3", progress=before)
    assert list(logged) == [6, 9] and [logged[s]["train/loss"] for s in (6, 9)] == [5.5, 8]
    assert [logged[s]["perf/tokens_per_second"] for s in (6, 9)] == pytest.approx(
        [TOKENS / STEP_SECONDS] * 2
    )
    assert summary["tokens_per_second"] == pytest.approx(TOKENS / STEP_SECONDS)
    assert summary["tokens"] == 9 * TOKENS and summary["skipped_steps"] == 1


def test_a_run_with_nothing_to_train_has_no_speed_and_no_loss(clock):
    done = Progress(step=9, consumed_tokens=9 * TOKENS, val_loss=4.0)
    summary, logged = run_loop(clock, "train.num_steps=9", progress=done)
    assert logged == {} and summary["tokens_per_second"] is None and summary["train_loss"] is None
