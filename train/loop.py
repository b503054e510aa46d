"""The loop of a run: steps, and what follows them."""

from __future__ import annotations

import logging
import math
import shlex
from typing import Any

from train.agenda import Step, agenda, last_step_of
from train.config.training import TrainConfig
from train.evaluation import evaluate_and_keep_best, save
from train.guard.alarms import AlarmStop
from train.observe.base import Record
from train.parts import Parts
from train.progress import Progress
from train.step import training_step

log = logging.getLogger("loadstone")
FIRST = (
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/skipped_steps",
    "perf/rank_skew",
    "perf/save_seconds",
)
"""What people look for first stands first in a record."""


def evaluates_first(progress: Progress, settings: TrainConfig) -> bool:
    """Whether a resumed run begins with the evaluation of the step that it stands at: it was left,
    or its result may not have been written before the end.
    """
    return progress.evaluation_left or progress.step >= last_step_of(settings)


def train(run: Parts, keeps: bool = True) -> dict[str, Any]:
    """All steps, and what follows them; returns the summary. Collective.

    keeps: False for a trial, whose end is neither saved nor evaluated.
    """
    settings, progress = run.config.train, run.progress
    first_step = logged_step = progress.step
    scalars: dict[str, Any] = {}
    stopped = False

    def planned(number: int) -> Step:
        return agenda(number, settings, run.config.checkpoint)

    # A resumed run may have its evaluation to make up for, or nothing to do besides its end.
    last_step = last_step_of(settings)
    if progress.step >= last_step:
        log.info(
            "nothing to train: the run is at step %d and train.num_steps is %d",
            progress.step,
            last_step,
        )
    elif progress.evaluation_left:
        evaluate_and_keep_best(run, planned(progress.step))

    # Every rank takes the same way: what is asked here is the same number on all of them.
    while progress.step < last_step:
        step = planned(progress.step + 1)
        with run.watch.phase(step, "whole"):
            result = training_step(run, step)
        if result is None:
            stopped = True
            break
        progress.advance(result)
        if step.logs:
            scalars, logged_step = write_record(run, step), step.number
        with run.watch.phase(step, "pause"):
            if step.evaluates:
                evaluate_and_keep_best(run, step)
            # An evaluation that was the best so far has saved it already.
            if step.saves and run.saved_step != step.number:
                save(run, step)

    # A run that was asked to stop leaves a record of the steps since the last one.
    end = planned(progress.step)
    if progress.step > logged_step:
        scalars = write_record(run, end)
    if not keeps:
        return summary(run, scalars, stopped)
    # The checkpoint comes before the evaluation, which must not cost the run its weights.
    if run.saved_step != progress.step:
        save(run, end)
    if not stopped and progress.step > 0:
        evaluate_and_keep_best(run, end)
        stopped = progress.evaluation_left
    # A checkpoint that is still on its way must be whole before the run says that it is done.
    with run.watch.phase(end, "save"):
        if progress.step != first_step:
            run.writer.require(progress.step)
    if stopped:
        log.info(
            "stopped by a signal after step %d%s; continue with %s",
            progress.step,
            ", in its evaluation" if progress.evaluation_left else "",
            shlex.quote(f"resume={run.run_dir}"),
        )
    return summary(run, scalars, stopped)


def write_record(run: Parts, step: Step) -> dict[str, Any]:
    """What was seen since the last record, what it means, where it goes and what follows from it;
    returns its scalars. Collective.

    Raises:
        AlarmStop: on all ranks, when an alarm rings that asks to stop; the run was saved.
    """
    with run.watch.phase(step, "log"):
        seen = run.watch.log(step)
        scalars = {name: seen[name] for name in FIRST if name in seen} | seen
        record = Record(step.number, run.progress.consumed_tokens, scalars, run.watch.tables())
        # Written before the ranks agree on what follows: a record must not wait for a lost rank.
        if run.sinks is not None:
            run.sinks.write(record, run.alarms.read(record))
            run.progress.alarms = run.alarms.state()
        actions = run.alarms.agree()
        run.routing.obey(actions)
    if "stop" in actions:
        stop_on_alarm(run, step)
    return scalars


def stop_on_alarm(run: Parts, step: Step) -> None:
    """Save and end. Collective."""
    if run.saved_step != step.number:
        save(run, step)
    run.writer.wait()
    names = run.alarms.stopping()
    raise AlarmStop(
        f"alarm {', '.join(names)} at step {step.number}: the run was saved and ends "
        f"(alarms.{names[0]}.action=stop; {run.run_dir / 'alarms.jsonl'} says why). To go on, "
        "resume it "
        f"with alarms.{names[0]}.action=none"
    )


def summary(run: Parts, scalars: dict[str, Any], stopped: bool) -> dict[str, Any]:
    """What RUN/result.json says.

    Args:
        scalars: of the last record; {} where no step was done.
    """
    progress, best = run.progress, run.writer.best_loss()
    return {
        "val_loss": progress.val_loss,
        "unigram_entropy": run.store.unigram_entropy,
        "best_val_loss": None if math.isinf(best) else best,
        "train_loss": scalars.get("train/loss"),
        "bits_per_byte": run.bits_per_byte,
        "tokens_per_second": run.speed.tokens_per_second,
        "max_load": scalars.get("moe/max_load"),
        "experts_per_token": scalars.get("moe/experts_per_token"),
        "step": progress.step,
        "tokens": progress.consumed_tokens,
        "skipped_steps": progress.skipped_steps,
        "stopped": stopped,
    }
