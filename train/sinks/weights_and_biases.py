"""Weights & Biases: online with a key and a reachable server, else offline."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from train.config.watching import WandbConfig
from train.guard.alarms import AlarmEvent
from train.sinks.media import EXPERT_LOAD, EXPERT_LOAD_HISTOGRAM, EXPERTS_PER_TOKEN, Media

log = logging.getLogger("loadstone")
MOST_BINS = 512
"""Of a histogram that W&B takes."""


class WeightsAndBiases:
    """One run of W&B; the x-axis is train/tokens."""

    def __init__(self, run: Any):
        self._run = run

    @classmethod
    def start(
        cls, run_dir: Path, settings: WandbConfig, config: dict[str, Any], name: str, run_id: str
    ) -> WeightsAndBiases | None:
        """None where it is disabled, or cannot even be written offline, which is said.

        Args:
            config: the resolved config as plain data, which the run shows.
            run_id: of the run to begin or to continue.
        """
        mode, reason = wandb_mode(settings.mode)
        if mode == "disabled":
            return None
        # else the end of a run waits for a dead server for ever
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                run = _begin(run_dir, settings, config, name, run_id, attempt)
            except Exception as error:
                # W&B unreachable, a bad key, a full quota: the run matters more
                reason = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
                log.warning(
                    "W&B could not start %s (%s); metrics are in %s",
                    attempt,
                    reason,
                    run_dir / "metrics.jsonl",
                )
                continue
            if attempt == "offline":
                log.info(
                    "W&B is offline (%s): look at the run with `wandb leet %s`, upload it with "
                    "`wandb sync %s`",
                    reason,
                    run_dir / "wandb",
                    run_dir / "wandb/offline-run-*",
                )
            else:
                log.info("W&B: %s", run.url)
            return cls(run)
        return None

    def log(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        # No step= : W&B drops records of steps it has seen, which a run resumed from earlier writes
        # again.
        self._run.log({**scalars, "train/step": step, "train/tokens": tokens})

    def log_media(self, step: int, tokens: int, media: Media) -> None:
        import wandb

        few = media.experts_per_token.of_at_most(MOST_BINS)
        pictures = {
            EXPERT_LOAD: wandb.Image(media.expert_load, caption=media.caption),
            EXPERT_LOAD_HISTOGRAM: wandb.Histogram(np_histogram=media.expert_load_histogram),
            EXPERTS_PER_TOKEN: wandb.Histogram(np_histogram=few),
        }
        self._run.log({**pictures, "train/step": step, "train/tokens": tokens})

    def alarm(self, event: AlarmEvent) -> None:
        """An alert, where one was raised."""
        if event.event == "raised":
            self._run.alert(
                title=f"{event.alarm} at step {event.step}",
                text=event.message,
                level="ERROR" if event.action == "stop" else "WARN",
                wait_duration=0,
            )

    def close(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()


def new_run_id() -> str:
    """The name of a new run, which a resumed one continues under."""
    return secrets.token_hex(4)


def _begin(
    run_dir: Path,
    settings: WandbConfig,
    config: dict[str, Any],
    name: str,
    run_id: str,
    mode: str,
) -> Any:
    import wandb

    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=name,
        config=config,
        id=run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        dir=str(run_dir),
        settings=wandb.Settings(
            console="off",
            init_timeout=30,
            silent=True,
            disable_git=True,
            disable_code=True,
        ),
    )
    run.define_metric("train/tokens")
    run.define_metric("*", step_metric="train/tokens")
    return run


def wandb_mode(setting: str) -> tuple[str, str]:
    """The mode to use and, when it is offline, why. WANDB_MODE in the environment wins over
    `auto`.
    """
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
