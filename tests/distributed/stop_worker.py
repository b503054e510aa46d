"""One of two ranks of a run of which rank 1 alone is asked to stop, in an evaluation."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from launch.process.identity import ROOT, rank
from launch.train import train
from tests.end_to_end.commandline import TINY
from train.rank import heartbeat


def main(run_dir: Path, number: signal.Signals, *data: str) -> None:
    told: list[str] = []

    def beat(step: int, phase: str) -> None:
        told.append(phase)
        if rank() == 1 and (step, phase) == (2, "evaluate") and told.count("evaluate") == 2:
            signal.raise_signal(number)

    heartbeat.beat = beat
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "train",
            [
                *TINY,
                *data,
                f"run_dir={run_dir}",
                "train.num_steps=4",
                "train.eval_interval=2",
                "train.eval_max_sequences=12",
                "parallel.expert_parallel_size=2",
            ],
        )
    train(config)
    if rank() == 0:
        result = json.loads((run_dir / "result.json").read_text())
        print(json.dumps({"evaluated": told.count("evaluate"), **result}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), signal.Signals(int(sys.argv[2])), *sys.argv[3:])
