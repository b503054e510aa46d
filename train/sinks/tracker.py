"""Where metrics go: own files first, then W&B and TensorBoard. A sink that fails never ends a run.

Scalars have the same names everywhere; the x-axis is train/tokens. The files are strict JSON: a
scalar that is not a finite number is null there; services get it as it is. With every
tracker.media_interval-th routing record services also get its pictures (train/sinks/media.py).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.checkpoint.folder import saved_steps
from train.config.watching import TrackerConfig
from train.files.log_file import LogFile, is_evaluation, merge_metrics, merge_routing
from train.files.sizes import MIB
from train.guard.alarms import AlarmEvent
from train.sinks.media import media_of
from train.sinks.service import Service
from train.sinks.tensorboard import TensorBoard
from train.sinks.weights_and_biases import WeightsAndBiases, new_run_id

log = logging.getLogger("loadstone")


class Tracker:
    """Writes metrics.jsonl (scalars), routing.jsonl (per layer and expert counts) and alarms.jsonl
    of a run, and hands them to the services that are on.

    Only rank 0 has one. Lines carry `step` and `tokens`; files are flushed at every record.

    Args:
        run_dir: exists already; config: the resolved config as plain data, shown by W&B.
        resume_step: records after this step are dropped from the files, since they are about to be
            written again.
        evaluates_again: so is the record of an evaluation of this step.
        wandb_id: id of the W&B run to continue, or None for a new one.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrackerConfig,
        config: dict[str, Any],
        name: str,
        resume_step: int | None = None,
        wandb_id: str | None = None,
        evaluates_again: bool = False,
    ):
        self.run_dir = run_dir
        self.wandb_id = wandb_id
        limit = settings.max_log_mib * MIB

        def made_again(record: dict[str, Any]) -> bool:
            """An evaluation that the resumed run makes again."""
            return evaluates_again and record["step"] == resume_step and is_evaluation(record)

        self._metrics, self._routing, self._alarms = self._files = (
            LogFile(
                run_dir / "metrics.jsonl",
                resume_step,
                limit,
                merge_metrics,
                is_evaluation,
                self._saved,
                made_again,
            ),
            LogFile(
                run_dir / "routing.jsonl", resume_step, limit, merge_routing, borders=self._saved
            ),
            LogFile(run_dir / "alarms.jsonl", resume_step),
        )
        for file in self._files:
            file.open()
        self._media_interval = settings.media_interval
        self._routing_records = 0
        self.services = self._started(settings, config, name)

    def _started(self, settings: TrackerConfig, config: dict[str, Any], name: str) -> list[Service]:
        run_id = self.wandb_id or new_run_id()
        wandb = WeightsAndBiases.start(self.run_dir, settings.wandb, config, name, run_id)
        if wandb is not None:
            self.wandb_id = run_id
        board = TensorBoard.start(self.run_dir) if settings.tensorboard else None
        return [service for service in (wandb, board) if service is not None]

    def _saved(self) -> list[int]:
        """Steps that the run may be resumed from."""
        return saved_steps(self.run_dir / "checkpoints")

    def log(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        """One record of scalars; `tokens` (consumed so far) is the common x-axis."""
        self._metrics.write({"step": step, "tokens": tokens, **scalars})
        self._tell(lambda service: service.log(step, tokens, scalars))

    def log_routing(self, step: int, tokens: int, routing: dict[str, Any]) -> None:
        """Tables per MoE layer since the last record: assignments by expert, tokens by number of
        experts, reasons.
        """
        self._routing.write({"step": step, "tokens": tokens, **routing})
        due = self._media_interval and self._routing_records % self._media_interval == 0
        self._routing_records += 1
        # Pictures take time to draw: once, and only for those who show them.
        if due:
            pictures = functools.cache(lambda: media_of(step, routing))
            self._tell(lambda service: service.log_media(step, tokens, pictures()))

    def alarm(self, event: AlarmEvent) -> None:
        """One line of alarms.jsonl, and an alert of the services that have some."""
        self._alarms.write(asdict(event))
        self._tell(lambda service: service.alarm(event))

    def close(self, summary: dict[str, Any]) -> None:
        for file in self._files:
            file.close()
        self._tell(lambda service: service.close(summary))

    def _tell(self, what: Callable[[Service], None]) -> None:
        """Tell all services; one that fails hears no more."""
        for service in list(self.services):
            try:
                what(service)
            except Exception as error:
                self.services.remove(service)
                log.warning(
                    "tracker: a sink failed and is switched off (%s: %s); metrics.jsonl goes on",
                    type(error).__name__,
                    error,
                )
