"""Where metrics go: own files first, then W&B and TensorBoard. A sink that fails never ends a run.

Scalars have the same names everywhere; the x-axis is train/tokens. The files are strict JSON: a scalar that is not a finite
number is null there; W&B and TensorBoard get it as it is. With every tracker.media_interval-th routing record sinks
also get routing/expert_load (heatmap: MoE layers x experts, load over the layer's mean, 0 to 2),
routing/expert_load_histogram (of the same numbers) and routing/experts_per_token (tokens by number of experts, all layers).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

import numpy as np

from train.alarms import AlarmEvent
from train.config import TrackerConfig
from train.strict_json import dumps

log = logging.getLogger("loadstone")


class Tracker:
    """Writes metrics.jsonl (scalars), routing.jsonl (per layer and expert counts) and alarms.jsonl of a run, and feeds the
    sinks.

    Only rank 0 has one. Lines carry `step` and `tokens`; files are flushed at every record.

    Args:
        run_dir: exists already; config: the resolved config as plain data, shown by W&B.
        resume_step: records after this step are dropped from the files, since they are about to be written again.
        wandb_id: id of the W&B run to continue, or None for a new one.
    """

    def __init__(self, run_dir: Path, settings: TrackerConfig, config: dict[str, Any], name: str,
                 resume_step: int | None = None, wandb_id: str | None = None):
        self.run_dir = run_dir
        self.wandb_id = wandb_id
        self._metrics = self._open("metrics.jsonl", resume_step)
        self._routing = self._open("routing.jsonl", resume_step)
        self._alarms = self._open("alarms.jsonl", resume_step)
        self._media_interval = settings.media_interval
        self._routing_records = 0
        self._wandb = self._start_wandb(settings, config, name)
        self._tensorboard = self._start_tensorboard(settings)

    def _open(self, name: str, resume_step: int | None) -> TextIO:
        path = self.run_dir / name
        if resume_step is not None and path.is_file():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    if record["step"] <= resume_step:
                        kept.append(dumps(record) + "\n")  # older versions wrote NaN, which no other parser reads
                except (ValueError, KeyError):
                    continue  # a line cut off by a crash
            scratch = path.with_suffix(".tmp")
            scratch.write_text("".join(kept))
            scratch.replace(path)
        return path.open("a")

    def log(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        """One record of scalars; `tokens` (consumed so far) is the common x-axis."""
        self._metrics.write(dumps({"step": step, "tokens": tokens, **scalars}) + "\n")
        self._metrics.flush()
        try:
            if self._wandb is not None:
                # No step= : W&B drops records of steps it has seen, which a run resumed from earlier writes again.
                self._wandb.log({**scalars, "train/step": step, "train/tokens": tokens})
            if self._tensorboard is not None:
                for key, value in scalars.items():
                    self._tensorboard.add_scalar(key, value, step)
        except Exception as error:
            self._give_up(error)

    def log_routing(self, step: int, tokens: int, routing: dict[str, Any]) -> None:
        """Tables per MoE layer since the last record: assignments by expert, tokens by number of experts, reasons."""
        self._routing.write(dumps({"step": step, "tokens": tokens, **routing}) + "\n")
        self._routing.flush()
        due = self._media_interval and self._routing_records % self._media_interval == 0
        self._routing_records += 1
        if due and (self._wandb is not None or self._tensorboard is not None):
            try:
                self._log_media(step, tokens, np.array(routing["counts"], np.float64),
                                np.array(routing["k_histogram"], np.int64).sum(0))
            except Exception as error:
                self._give_up(error)

    def _log_media(self, step: int, tokens: int, counts: np.ndarray, k_histogram: np.ndarray) -> None:
        """counts: [MoE layers, experts]; k_histogram: tokens by number of experts."""
        load = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)
        image, edges = load_heatmap(load), np.linspace(0, max(2.0, float(load.max())), LOAD_BINS + 1)
        bins = np.histogram(load, edges)[0]
        if self._wandb is not None:
            import wandb

            caption = f"step {step}: load over the mean, {counts.shape[0]} MoE layers (down) x {counts.shape[1]} experts"
            self._wandb.log({
                "routing/expert_load": wandb.Image(image, caption=caption),
                "routing/expert_load_histogram": wandb.Histogram(np_histogram=(bins, edges)),
                "routing/experts_per_token": wandb.Histogram(
                    np_histogram=_few_bins(k_histogram, np.arange(len(k_histogram) + 1) - 0.5)),
                "train/step": step, "train/tokens": tokens})
        if self._tensorboard is not None:
            self._tensorboard.add_image("routing/expert_load", image, step, dataformats="HWC")
            for name, (heights, limits) in {"routing/expert_load_histogram": (bins, edges),
                                            "routing/experts_per_token": (k_histogram, np.arange(len(k_histogram) + 1) - 0.5)
                                            }.items():
                middles = (limits[1:] + limits[:-1]) / 2
                self._tensorboard.add_histogram_raw(
                    name, min=limits[0], max=limits[-1], num=int(heights.sum()), sum=float((heights * middles).sum()),
                    sum_squares=float((heights * middles**2).sum()), bucket_limits=limits[1:].tolist(),
                    bucket_counts=heights.tolist(), global_step=step)

    def alarm(self, event: AlarmEvent) -> None:
        """One line of alarms.jsonl, and a W&B alert when it was raised."""
        self._alarms.write(dumps(asdict(event)) + "\n")
        self._alarms.flush()
        if self._wandb is None or event.event != "raised":
            return
        try:
            self._wandb.alert(title=f"{event.alarm} at step {event.step}", text=event.message,
                              level="ERROR" if event.action == "stop" else "WARN", wait_duration=0)
        except Exception as error:
            self._give_up(error)

    def close(self, summary: dict[str, Any]) -> None:
        for file in (self._metrics, self._routing, self._alarms):
            file.close()
        try:
            if self._wandb is not None:
                self._wandb.summary.update(summary)
                self._wandb.finish()
            if self._tensorboard is not None:
                self._tensorboard.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("tracker: a sink failed and is switched off (%s: %s); metrics.jsonl goes on",
                    type(error).__name__, error)
        self._wandb = self._tensorboard = None

    def _start_wandb(self, settings: TrackerConfig, config: dict[str, Any], name: str) -> Any:
        mode, reason = wandb_mode(settings.wandb.mode)
        if mode == "disabled":
            return None
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")  # else the end of a run waits for a dead server for ever
        if self.wandb_id is None:
            self.wandb_id = secrets.token_hex(4)
        run = None
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                import wandb

                run = wandb.init(project=settings.wandb.project, entity=settings.wandb.entity, name=name, config=config,
                                 id=self.wandb_id, resume="allow", mode=attempt, dir=str(self.run_dir),  # type: ignore[arg-type]
                                 settings=wandb.Settings(console="off", init_timeout=30, silent=True,
                                                         disable_git=True, disable_code=True))
                run.define_metric("train/tokens")
                run.define_metric("*", step_metric="train/tokens")
                break
            except Exception as error:  # W&B unreachable, a bad key, a full quota: the run matters more
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                log.warning("W&B could not start %s (%s); metrics are in %s", attempt, reason,
                            self.run_dir / "metrics.jsonl")
        if run is None:
            return None
        if attempt == "offline":
            log.info("W&B is offline (%s): look at the run with `wandb leet %s`, upload it with `wandb sync %s`", reason,
                     self.run_dir / "wandb", self.run_dir / "wandb/offline-run-*")
        else:
            log.info("W&B: %s", run.url)
        return run

    def _start_tensorboard(self, settings: TrackerConfig) -> Any:
        if not settings.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(str(self.run_dir / "tensorboard"))
        except Exception as error:
            log.warning("TensorBoard could not start (%s); metrics.jsonl goes on", error)
            return None


LOAD_BINS = 64
HEATMAP_WIDTH = 1024
"""Pixels aimed at; cells are squares of 1 to 32."""


def load_heatmap(load: np.ndarray) -> np.ndarray:
    """[layers, experts] load over the mean -> [height, width, 3] uint8: blue below 1, white at 1, red above, full from 2."""
    import matplotlib

    colours = matplotlib.colormaps["RdBu_r"](np.clip(load / 2, 0, 1))[..., :3]
    cell = int(np.clip(HEATMAP_WIDTH // load.shape[1], 1, 32))
    return np.kron((colours * 255).round().astype(np.uint8), np.ones((cell, cell, 1), np.uint8))


def _few_bins(heights: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most as many as W&B takes: neighbours are joined."""
    while len(heights) > 512:
        if len(heights) % 2:
            heights, edges = np.append(heights, 0), np.append(edges, edges[-1] + 1)
        heights, edges = heights.reshape(-1, 2).sum(1), edges[::2]
    return heights, edges


def wandb_mode(setting: str) -> tuple[str, str]:
    """The mode to use and, when it is offline, why. WANDB_MODE in the environment wins over `auto`."""
    if setting != "auto":
        return setting, "tracker.wandb.mode=offline"
    from_environment = os.environ.get("WANDB_MODE")
    if from_environment in ("online", "offline", "disabled"):
        return from_environment, f"WANDB_MODE={from_environment}"
    base_url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlparse(base_url)
    if not _has_key(host.hostname or ""):
        return "offline", "no API key: `wandb login` to go online"
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        with socket.create_connection((host.hostname or "", port), timeout=3):
            return "online", ""
    except OSError:
        return "offline", f"{host.hostname} cannot be reached"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
