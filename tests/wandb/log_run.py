"""Log a run with our Tracker in a process of its own: the client keeps settings for as long as its
process lives.

python log_run.py RUN_DIR MODE FIRST_STEP LAST_STEP [WANDB_ID | -] [hang]. Prints the W&B id, and a
line before it hangs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from train.config.watching import TrackerConfig, WandbConfig
from train.guard.alarms import AlarmEvent
from train.sinks.tracker import Tracker

LAYERS, EXPERTS = (1, 2), 4


def scalars(step: int) -> dict[str, float]:
    return {
        "train/loss": 5 / step,
        "train/grad_norm": 1.0,
        "moe/max_vio": 0.25,
        "perf/tokens_per_second": 1e3 + step,
        **{f"moe/max_vio/layer_{layer}": step / 10 + layer for layer in LAYERS},
    }


def main(
    run_dir: str, mode: str, first: str, last: str, wandb_id: str = "-", hang: str = ""
) -> None:
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resume_step = None if wandb_id == "-" else int(first) - 1
    tracker = Tracker(
        folder,
        TrackerConfig(WandbConfig(mode)),
        {"model": {"num_experts": EXPERTS}},
        "tiny",  # type: ignore
        resume_step,
        None if wandb_id == "-" else wandb_id,
    )
    started = time.monotonic()
    for step in range(int(first), int(last) + 1):
        tracker.log(step, 100 * step, scalars(step))
        tracker.log_routing(
            step,
            100 * step,
            {
                "counts": [[step, 2, 3, 4]] * 2,
                "k_histogram": [[0, 1, 2]] * 2,
                "reasons": [[0] * 8] * 2,
            },
        )
    tracker.alarm(
        AlarmEvent(
            int(last),
            100 * int(last),
            "imbalance",
            "raised",
            1.5,
            1.0,
            2,
            3,
            "layer 2 is uneven",
            None,
            "moe/max_vio",
        )
    )
    print(
        json.dumps({"wandb_id": tracker.wandb_id, "seconds": time.monotonic() - started}),
        flush=True,
    )
    if hang:
        time.sleep(300)
    tracker.close({"val_loss": 2.0})


if __name__ == "__main__":
    main(*sys.argv[1:])
