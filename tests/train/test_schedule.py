"""Learning rate and batch size as functions of progress."""

from __future__ import annotations

import itertools
import math

import pytest

from train.config.training import OptimConfig, TrainConfig
from train.engine.schedule import Schedule

LR, MIN_LR, WARMUP, STEPS = 1.0, 0.1, 10, 100


def schedule_of(
    style: str = "cosine", warmup_steps: int = WARMUP, data_parallel_size: int = 2, **train
) -> Schedule:
    optim = OptimConfig(
        lr=LR,
        min_lr=MIN_LR,
        warmup_steps=warmup_steps,
        decay_style=style,  # type: ignore[arg-type]
        wsd_decay_steps=20 if style == "WSD" else None,
        weight_decay=0.3,
    )
    groups = [{"lr": LR, "wd_mult": 1.0}, {"lr": LR, "wd_mult": 0.0}]
    return Schedule(
        groups,
        optim,
        TrainConfig(
            **{
                "num_steps": STEPS,
                "seq_len": 8,
                "micro_batch_size": 2,
                "global_batch_size": 16,
                **train,
            }
        ),
        data_parallel_size,
    )


def rates(schedule: Schedule, steps=range(STEPS)) -> list[float]:
    """Learning rate of the step after each number of completed steps."""
    found = []
    for completed in steps:
        schedule.set_step(completed)
        found.append(schedule.learning_rate)
    return found


def progress(completed: int) -> float:
    return (completed + 1 - WARMUP) / (STEPS - WARMUP)


DECAYS = {
    "constant": lambda c: LR,
    "linear": lambda c: LR - (LR - MIN_LR) * progress(c),
    "cosine": lambda c: MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * progress(c))) / 2,
    "inverse-square-root": lambda c: max(MIN_LR, LR * math.sqrt(WARMUP / (c + 1))),
    "WSD": lambda c: LR - (LR - MIN_LR) * max(0, c + 1 - 80) / 20,
}
every_style = pytest.mark.parametrize("style", DECAYS)


@every_style
def test_learning_rate_warms_up_linearly_and_then_decays_by_its_style(style):
    found = rates(schedule_of(style))
    assert found[:WARMUP] == pytest.approx([LR * (i + 1) / WARMUP for i in range(WARMUP)])
    assert found[WARMUP:] == pytest.approx([DECAYS[style](c) for c in range(WARMUP, STEPS)])


@every_style
def test_the_last_step_ends_at_min_lr_and_later_steps_stay_there(style):
    last, later = rates(schedule_of(style), [STEPS - 1, STEPS + 50])
    if style == "constant":
        assert last == later == LR
    elif style == "inverse-square-root":  # reaches what num_steps gives, then drops
        assert last == pytest.approx(LR * math.sqrt(WARMUP / STEPS)) and later == MIN_LR
    else:
        assert last == later == pytest.approx(MIN_LR)


def test_wsd_holds_the_full_rate_until_its_last_steps():
    found = rates(schedule_of("WSD"))
    assert found[WARMUP - 1 : 80] == [LR] * (81 - WARMUP)
    assert all(a > b for a, b in itertools.pairwise(found[79:]))


def test_without_warm_up_the_first_step_has_nearly_the_full_rate():
    found = rates(schedule_of("linear", warmup_steps=0))
    assert found[0] == pytest.approx(LR - (LR - MIN_LR) / STEPS)
    assert rates(schedule_of("constant", warmup_steps=0))[0] == LR


@every_style
def test_set_step_depends_on_nothing_but_the_step(style):
    """So a resumed run continues with the rates of an uninterrupted one."""
    schedule = schedule_of(style)
    whole = rates(schedule)
    assert rates(schedule_of(style), range(37, STEPS)) == whole[37:]
    shuffled = [(i * 37) % STEPS for i in range(STEPS)]
    assert rates(schedule, shuffled) == [whole[i] for i in shuffled]


def test_every_group_gets_the_rate_and_keeps_its_own_weight_decay():
    schedule = schedule_of()
    for completed in (0, 5, 50, 200):
        schedule.set_step(completed)
        decayed, undecayed = schedule._param_groups
        assert decayed["lr"] == undecayed["lr"] == schedule.learning_rate
        assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(("data_parallel_size", "expected"), [(1, 8), (2, 4), (8, 1)])
def test_without_a_ramp_the_number_of_micro_batches_is_constant(data_parallel_size, expected):
    schedule = schedule_of(data_parallel_size=data_parallel_size)
    assert [schedule.num_micro_batches(n) for n in (0, 16, 10**9)] == [expected] * 3


def test_the_batch_grows_by_equal_increments_over_the_ramp():
    """From 4 to 16 by 4 over 48 samples: three increments of 16 samples each; 4 sequences per
    micro-step.
    """
    schedule = schedule_of(batch_size_rampup=(4, 4, 48))
    expected = {0: 1, 15: 1, 16: 2, 31: 2, 32: 3, 47: 3, 48: 4, 49: 4, 10**6: 4}
    assert {n: schedule.num_micro_batches(n) for n in expected} == expected
    # no memory of what came before
    assert {n: schedule.num_micro_batches(n) for n in reversed(expected)} == expected
    consumed, sizes = 0, []
    while len(sizes) < 12:
        sizes.append(4 * schedule.num_micro_batches(consumed))
        consumed += sizes[-1]
    assert sizes == [4, 4, 4, 4, 8, 8, 12, 12, 16, 16, 16, 16]


@pytest.mark.parametrize(
    ("data_parallel_size", "micro_batches"), [(1, [2, 4, 6, 8]), (2, [1, 2, 3, 4])]
)
def test_the_ramp_is_the_same_number_of_samples_on_any_number_of_ranks(
    data_parallel_size, micro_batches
):
    schedule = schedule_of(batch_size_rampup=(4, 4, 48), data_parallel_size=data_parallel_size)
    assert [schedule.num_micro_batches(n) for n in (0, 16, 32, 48)] == micro_batches
