"""One optimisation step, from its batches to its update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from model.config import BalanceConfig
from model.loss import ModelOutput, joined, training_loss
from model.request import ForwardRequest
from ops.all_to_all import Communication, by_turns, total_communication
from train.agenda import Step
from train.data.loader import Batch
from train.engine.qk_clip import QkClip
from train.guard.step import Orders
from train.objectives.objective import Again
from train.observe.base import Ask, MicroBatch, StepResult
from train.parts import Parts
from train.pipeline.schedule import Pass
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
    size = agree_on_size(
        batches,
        run.stop.received,
        run.config.model.num_mtp_layers,
        run.groups.is_last_stage,
    )
    if size.asked_to_stop:
        run.loader.consumed_samples = first_sample
        return None

    # The stage of the model's own schedules, how the step is routed, and what is measured in it.
    run.engine.module.set_step(run.progress.step)
    orders = run.guard.before(step)
    ask = run.watch.begin_step(step)
    groups = run.groups
    exchanges = max(groups.expert_size, groups.parts_size, groups.pipeline_size) > 1
    meter = CommunicationMeter(
        run.engine.module, exchanges and Ask.COMMUNICATION in ask, run.pipeline.link.meter
    )

    # One micro-batch after the other; in a pipeline several are on their way.
    clip = run.qk_clip if run.qk_clip is not None and run.qk_clip.is_due(step.number) else None
    balance = run.config.balance.at(step.number, run.config.train.num_steps)
    passes = _Passes(run, step, batches, size, orders, ask, meter, balance, clip)
    run.pipeline.run(len(batches), batches[0].input_ids.shape, passes)

    # Clipping and the update. A gradient that is not finite on any rank leaves the weights of all
    # as they are, and must not move the routers either.
    with run.watch.phase(step, "step"):
        grad_norm = run.engine.step()
    applied = math.isfinite(grad_norm)
    clipped = clip.apply(run.engine) if clip is not None and applied else None
    if clip is not None and not applied:
        clip.forget()
    communication = meter.finish()
    assert passes.statistics is not None  # a step has a micro-batch
    layers = run.routing.reduce(passes.statistics)
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
    run.guard.after(step, result, orders, passes.losses, batches)
    return result


class _Passes:
    """The forward and backward passes of one step on this rank, and what they sum up to.

    The loss of a micro-batch is its share of the whole step's, so that gradients add up to that of
    the mean over all targets, however they are spread over ranks, stages and micro-batches.

    Attributes:
        statistics: ModelOutput.stats over the micro-batches so far; losses: their loss sums.
    """

    def __init__(
        self,
        run: Parts,
        step: Step,
        batches: Sequence[Batch],
        size: StepSize,
        orders: Orders,
        ask: Ask,
        meter: CommunicationMeter,
        balance: BalanceConfig,
        clip: QkClip | None,
    ):
        self._run, self._step, self._batches, self._size = run, step, batches, size
        self._orders, self._ask, self._meter = orders, ask, meter
        self._balance, self._clip = balance, clip
        # By lap; by micro-batch and lap, while it is on its way; by micro-batch, of the laps that
        # it has been there and back.
        self._scope_counts: dict[int, torch.Tensor] = {}
        self._outputs: dict[tuple[int, int], _Output] = {}
        self._returned: dict[int, list[_Output]] = {}
        self.statistics: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []

    def forward(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """As train.pipeline.flow.Passes."""
        with self._run.watch.phase(self._step, "forward"):
            return self._forward(one, hidden)

    def backward(self, one: Pass, carried: torch.Tensor | None, is_last: bool) -> None:
        """As train.pipeline.flow.Passes."""
        with self._run.watch.phase(self._step, "backward"):
            self._backward(one, carried, is_last)
        self._finish(one, is_last)

    def pair(
        self, one: Pass, hidden: torch.Tensor | None, back: Pass, carried: torch.Tensor | None
    ) -> torch.Tensor | None:
        """As train.pipeline.flow.Passes."""
        with self._run.watch.phase(self._step, "pair"):
            handed_on, _ = by_turns(
                lambda: self._forward(one, hidden),
                lambda: self._backward(back, carried, is_last=False),
            )
        self._finish(back, is_last=False)
        return handed_on

    def _forward(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor | None:
        engine, objective = self._run.engine, self._run.objective
        request = request_for(
            self._orders,
            self._ask,
            self._scope_counts.get(one.lap),
            self._run.config.train.z_loss_coeff > 0,
            self._clip is not None,
            objective.keeps_hidden,
        )
        batch = self._batches[one.number]
        inputs = objective.inputs(batch, batch.inputs(engine.device))
        output = engine.forward(inputs, request, hidden, one.lap)
        again = objective.again(inputs, output, self._step.number)
        self._scope_counts[one.lap] = output.scope_counts
        self._outputs[one.unit] = _Output(output, self._meter.read(), again)
        return output.handed_on

    def _backward(self, one: Pass, carried: torch.Tensor | None, is_last: bool) -> None:
        run, (output, _, again) = self._run, self._outputs[one.unit]
        share = training_loss(
            output,
            self._size.num_targets,
            self._size.num_tokens,
            self._balance,
            run.config.train.mtp_coeff,
            self._size.num_mtp_targets,
            run.config.train.z_loss_coeff,
            run.objective.teaching,
        )
        run.engine.backward(share, is_last and again is None, carried)

    def _finish(self, one: Pass, is_last: bool) -> None:
        """A micro-batch went forward and backward, in its first lap or in another."""
        run, done = self._run, self._outputs.pop(one.unit)
        # The last lap comes back first.
        returned = self._returned.setdefault(one.number, [])
        returned.insert(0, done._replace(output=done.output._replace(handed_on=None)))
        if one.lap > 0:
            return
        output, communication, again = _whole(self._returned.pop(one.number))
        second = None
        if again is not None:
            second = learn_again(run, self._step, again, self._size, self._orders, is_last)
        self.losses.append(output.loss_sum.detach())
        if self._clip is not None:
            self._clip.see(output)
        if self.statistics is None:
            self.statistics = output.stats
        else:
            self.statistics = self.statistics + output.stats
        told = MicroBatch(self._batches[one.number], output, communication, second)
        run.watch.micro_batch(self._step, told)


class _Output(NamedTuple):
    """What a forward pass gave."""

    output: ModelOutput
    communication: Communication | None
    again: Again | None


def _whole(laps: list[_Output]) -> _Output:
    """Of all layers here, from those of every lap."""
    counted = [one.communication for one in laps if one.communication is not None]
    communication = total_communication(counted) if counted else None
    return _Output(joined([one.output for one in laps]), communication, laps[0].again)


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
    batches: Sequence[Batch],
    asked_to_stop: bool,
    num_mtp_layers: int = 0,
    counts: bool = True,
) -> StepSize:
    """By one all-reduce of integers, which also asks whether any rank was told to stop: all of them
    leave before the same step. Collective.

    Args:
        counts: whether these batches count: those of one stage do, since all have the same.
    """
    sums = [
        sum(batch.num_targets for batch in batches),
        sum(batch.num_tokens for batch in batches),
        *(
            sum(batch.num_targets_ahead(number) for batch in batches)
            for number in range(1, num_mtp_layers + 1)
        ),
    ]
    if not counts:
        sums = [0] * len(sums)
    local = torch.tensor([*sums[:2], int(asked_to_stop), *sums[2:]])
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
