"""One optimisation step, from its batches to its update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from model.loss import ModelOutput, training_loss
from model.request import ForwardRequest
from train.agenda import Step
from train.data.loader import Batch
from train.guard.step import Orders
from train.objectives.objective import Again
from train.observe.base import Ask, MicroBatch, StepResult
from train.parts import Parts
from train.timing.communication import CommunicationMeter


class StepSize(NamedTuple):
    """Of the whole step, over all ranks and micro-batches."""

    num_targets: int
    num_tokens: int
    asked_to_stop: int
    """Ranks that were asked to stop."""
    num_mtp_targets: tuple[int, ...]
    """Of each module of multi-token prediction."""


def training_step(run: Parts, step: Step) -> StepResult | None:
    """Agree on the size of the step, learn from every micro-batch, update once. Collective.

    Returns:
        None when some rank was asked to stop: nothing was done then, and the samples that were
        read come first when the run goes on.

    Raises:
        NonFiniteError: on all ranks, with train.on_nonfinite=stop.
    """
    # The ranks agree on the size before they learn, since every share is over the whole of it, and
    # on leaving before anything of the step is done.
    first_sample = run.loader.consumed_samples
    run.schedule.set_step(run.progress.step)
    with run.watch.phase(step, "data"):
        batches = run.loader.next_step(run.schedule.num_micro_batches(first_sample))
    size = agree_on_size(batches, run.stop.received, run.config.model.num_mtp_layers)
    if size.asked_to_stop:
        run.loader.consumed_samples = first_sample
        return None

    # The stage of the model's own schedules, how the step is routed, and what is measured in it.
    run.engine.module.set_step(run.progress.step)
    orders = run.guard.before(step)
    ask = run.watch.begin_step(step)
    exchanges = run.groups.expert_size > 1 or run.groups.context_size > 1
    meter = CommunicationMeter(run.engine.module, exchanges and Ask.COMMUNICATION in ask)

    # The loss of a micro-batch is its share of the whole step's, so that gradients add up to that
    # of the mean over all targets, however they are spread over ranks and micro-batches.
    statistics = scope_counts = None
    with_logit_z = run.config.train.z_loss_coeff > 0
    clip = run.qk_clip if run.qk_clip is not None and run.qk_clip.is_due(step.number) else None
    balance = run.config.balance.at(step.number, run.config.train.num_steps)
    losses = []
    for batch in batches:
        is_last = batch is batches[-1]
        with run.watch.phase(step, "forward"):
            inputs = run.objective.inputs(batch, batch.inputs(run.engine.device))
            request = request_for(
                orders,
                ask,
                scope_counts,
                with_logit_z,
                clip is not None,
                run.objective.keeps_hidden,
            )
            output = run.engine.forward(inputs, request)
        again = run.objective.again(inputs, output, step.number)
        communication = meter.read()
        with run.watch.phase(step, "backward"):
            share = training_loss(
                output,
                size.num_targets,
                size.num_tokens,
                balance,
                run.config.train.mtp_coeff,
                size.num_mtp_targets,
                run.config.train.z_loss_coeff,
                run.objective.teaching,
            )
            run.engine.backward(share, is_last=is_last and again is None)
        second = None if again is None else learn_again(run, step, again, size, orders, is_last)
        losses.append(output.loss_sum.detach())
        if clip is not None:
            clip.see(output)
        scope_counts = output.scope_counts
        statistics = output.stats if statistics is None else statistics + output.stats
        run.watch.micro_batch(step, MicroBatch(batch, output, communication, second))

    # Clipping and the update. A gradient that is not finite on any rank leaves the weights of all
    # as they are, and must not move the routers either.
    with run.watch.phase(step, "step"):
        grad_norm = run.engine.step()
    applied = math.isfinite(grad_norm)
    clipped = clip.apply(run.engine) if clip is not None and applied else None
    if clip is not None and not applied:
        clip.forget()
    communication = meter.finish()
    assert statistics is not None  # a step has a micro-batch
    layers = run.routing.reduce(statistics)
    if applied and layers is not None:
        run.routing.update(layers, balance)

    # The step is told to those who watch before the guard, which may end the run with it.
    result = StepResult(
        num_tokens=size.num_tokens,
        first_sample=first_sample,
        end_sample=run.loader.consumed_samples,
        grad_norm=grad_norm,
        applied=applied,
        layers=layers,
        communication=communication,
        clipped=clipped,
    )
    run.watch.end_step(step, result)
    run.guard.after(step, result, orders, losses, batches)
    return result


def learn_again(
    run: Parts, step: Step, again: Again, size: StepSize, orders: Orders, is_last: bool
) -> ModelOutput:
    """The second pass of a micro-batch. Balance and budgets are of the first one alone."""
    with run.watch.phase(step, "forward"):
        output = run.engine.forward(again.inputs, again.request._replace(frozen=orders.frozen))
    with run.watch.phase(step, "backward"):
        share = again.weight * output.kl_sum / max(size.num_targets, 1)
        run.engine.backward(share, is_last=is_last)
    return output


def agree_on_size(
    batches: Sequence[Batch], asked_to_stop: bool, num_mtp_layers: int = 0
) -> StepSize:
    """By one all-reduce of integers, which also asks whether any rank was told to stop: all of them
    leave before the same step. Collective.
    """
    local = torch.tensor(
        [
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
            int(asked_to_stop),
            *(
                sum(batch.num_targets_ahead(number) for batch in batches)
                for number in range(1, num_mtp_layers + 1)
            ),
        ]
    )
    dist.all_reduce(local)
    num_targets, num_tokens, asked, *ahead = local.tolist()
    return StepSize(num_targets, num_tokens, asked, tuple(ahead))


def request_for(
    orders: Orders,
    ask: Ask,
    scope_counts: torch.Tensor | None,
    with_logit_z: bool,
    measure_logits: bool,
    keep_hidden: bool = False,
) -> ForwardRequest:
    """What is wanted of a forward pass besides its loss.

    Args:
        scope_counts: of the micro-batches of the step before this one, for the balance loss.
        with_logit_z: the loss has a term of the logits' normalizers.
        measure_logits: attention logits are clipped after this step.
    """
    return ForwardRequest(
        previous_counts=scope_counts,
        keep_routing=Ask.ROUTING in ask,
        snapshot=orders.snapshot,
        frozen=orders.frozen,
        measure_attention=Ask.ATTENTION in ask,
        with_logit_z=with_logit_z,
        measure_logits=measure_logits,
        keep_hidden=keep_hidden,
    )
