"""The routing audit as an observer of training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from train.agenda import Step
from train.audit.log import AuditLog
from train.observe.base import Ask, MicroBatch, Observer, Phase, StepResult


class RoutingAudit(Observer):
    """Hands every micro-batch and the end of every step to the log of this rank.

    Args:
        seq_len: tokens of a sample, by which a sample's number becomes that of its first token.
    """

    def __init__(self, log: AuditLog, seq_len: int):
        self._log, self._seq_len = log, seq_len

    def begin_step(self, step: Step) -> Ask:
        return Ask.ROUTING

    def phase(self, step: Step, name: Phase) -> AbstractContextManager[None]:
        if name == "save":
            # A run that goes on from this checkpoint finds the records of all steps before it.
            self._log.flush()
        return nullcontext()

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        batch = done.batch
        if batch.token_ids is not None:
            self._log.add(step.number, batch.token_ids, batch.token_mask, done.output.routings)

    def end_step(self, step: Step, result: StepResult) -> None:
        # A skipped step was routed as well.
        if result.layers is not None:
            first_token = result.first_sample * self._seq_len
            self._log.end_step(step.number, first_token, result.layers.checksum)

    def close(self) -> None:
        self._log.close()
