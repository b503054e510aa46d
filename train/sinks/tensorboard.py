"""TensorBoard, over torch's writer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from train.guard.alarms import AlarmEvent
from train.sinks.media import (
    EXPERT_LOAD,
    EXPERT_LOAD_HISTOGRAM,
    EXPERTS_PER_TOKEN,
    Histogram,
    Media,
)

log = logging.getLogger("loadstone")


class TensorBoard:
    """Writes RUN/tensorboard; the x-axis is the step."""

    def __init__(self, writer: Any):
        self._writer = writer

    @classmethod
    def start(cls, run_dir: Path) -> TensorBoard | None:
        """None where it cannot be had, which is said."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            return cls(SummaryWriter(str(run_dir / "tensorboard")))
        except Exception as error:
            log.warning("TensorBoard could not start (%s); metrics.jsonl goes on", error)
            return None

    def log(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def log_media(self, step: int, tokens: int, media: Media) -> None:
        self._writer.add_image(EXPERT_LOAD, media.expert_load, step, dataformats="HWC")
        self._add(EXPERT_LOAD_HISTOGRAM, media.expert_load_histogram, step)
        self._add(EXPERTS_PER_TOKEN, media.experts_per_token, step)

    def _add(self, name: str, histogram: Histogram, step: int) -> None:
        """With the middle of each bin for the values in it."""
        heights, edges = histogram
        middles = (edges[1:] + edges[:-1]) / 2
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(heights.sum()),
            sum=float((heights * middles).sum()),
            sum_squares=float((heights * middles**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )

    def alarm(self, event: AlarmEvent) -> None:
        """Its scalar alarm/<name> says it."""

    def close(self, summary: dict[str, Any]) -> None:
        self._writer.close()
