"""Where metrics go: own files first, then W&B and TensorBoard. A sink that fails never ends a run."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

from train.config import TrackerConfig

log = logging.getLogger("loadstone")


class Tracker:
    """Writes metrics.jsonl (scalars) and routing.jsonl (per layer and expert counts) of a run, and feeds the sinks.

    Only rank 0 has one. Lines carry `step` and `tokens`; both files are flushed at every record.

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
        self._wandb = self._start_wandb(settings, config, name)
        self._tensorboard = self._start_tensorboard(settings)

    def _open(self, name: str, resume_step: int | None) -> TextIO:
        path = self.run_dir / name
        if resume_step is not None and path.is_file():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    continue  # a line cut off by a crash
            scratch = path.with_suffix(".tmp")
            scratch.write_text("".join(kept))
            scratch.replace(path)
        return path.open("a")

    def log(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        """One record of scalars; `tokens` (consumed so far) is the common x-axis."""
        self._metrics.write(json.dumps({"step": step, "tokens": tokens, **scalars}) + "\n")
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
        self._routing.write(json.dumps({"step": step, "tokens": tokens, **routing}) + "\n")
        self._routing.flush()

    def close(self, summary: dict[str, Any]) -> None:
        self._metrics.close()
        self._routing.close()
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
        try:
            import wandb

            if self.wandb_id is None:
                self.wandb_id = secrets.token_hex(4)
            run = wandb.init(project=settings.wandb.project, entity=settings.wandb.entity, name=name, config=config,
                             id=self.wandb_id, resume="allow", mode=mode, dir=str(self.run_dir),  # type: ignore[arg-type]
                             settings=wandb.Settings(console="off", init_timeout=30, silent=True,
                                                     disable_git=True, disable_code=True))
            run.define_metric("train/tokens")
            run.define_metric("*", step_metric="train/tokens")
        except Exception as error:  # W&B unreachable, a bad key, a full quota: the run matters more
            log.warning("W&B could not start (%s: %s); metrics are in %s", type(error).__name__,
                        str(error).splitlines()[0] if str(error) else "", self.run_dir / "metrics.jsonl")
            return None
        if mode == "offline":
            log.info("W&B is offline (%s): look at the run with `wandb leet %s`, upload it with `wandb sync`", reason,
                     self.run_dir / "wandb")
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
