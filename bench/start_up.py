"""What it costs to start a command: CPU time of a plan, of a refusal and of `--cfg job`, now and at
an earlier commit.

`python -m bench.start_up --before COMMIT [--repeats 7] [--json FILE]`. The earlier files are taken
from git into a folder of their own, and both trees run the same commands in turn with the same
Python, so that a busy machine hits both alike. Counted is what the kernel says that each process
has spent (user and system), its start included. Every command runs once before it counts, which
compiles the modules.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from bench.common import ROOT, find_commit
from train.files.strict_json import dumps

COMMANDS = {
    "plan": ("launch.plan",),
    "plan of a large model": (
        "launch.plan",
        "experiment=qwen3_30b_a3b",
        "attention=scc",
        "launch=deepspeed",
        "launch.num_devices=8",
        "parallel=ep8",
        "train.seq_len=4096",
        "train.micro_batch_size=1",
        "train.global_batch_size=256",
    ),
    "refusal": ("launch.train", "train.num_steps=-1"),
    "--cfg job": ("launch.train", "--cfg", "job"),
}


def taken_from_git(commit: str, folder: Path) -> str:
    """The files of a commit in the folder; returns its full name."""
    packed = subprocess.run(
        ("git", "archive", "--format=tar", commit), cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    name = subprocess.run(
        ("git", "rev-parse", commit), cwd=ROOT, capture_output=True, check=True, text=True
    )
    return name.stdout.strip()


def cpu_seconds(tree: Path, command: tuple[str, ...]) -> float:
    """CPU time of one run of a command in a tree."""
    process = subprocess.Popen(
        (sys.executable, "-W", "ignore", "-m", *command),
        cwd=tree,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, _, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime


def compared(trees: dict[str, Path], command: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Median and smallest CPU seconds in each tree, and the ratio of the medians."""
    samples: dict[str, list[float]] = {name: [] for name in trees}
    for number in range(repeats + 1):
        # Whoever comes first changes from round to round.
        for name in sorted(trees, reverse=bool(number % 2)):
            seconds = cpu_seconds(trees[name], command)
            if number:
                samples[name].append(seconds)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    return {
        "command": " ".join(command),
        **{f"{name}_cpu_seconds": round(median, 3) for name, median in medians.items()},
        **{f"{name}_least": round(min(times), 3) for name, times in samples.items()},
        "ratio": round(medians["after"] / medians["before"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="a commit to compare with")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"bench": "start_up", "commit": find_commit(), "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder).resolve()
        result["before"] = taken_from_git(options.before, before)
        trees = {"after": ROOT, "before": before}
        for name, command in COMMANDS.items():
            result[name] = compared(trees, command, options.repeats)
            print(name, result[name], flush=True)
    if options.json is not None:
        options.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps(result))


if __name__ == "__main__":
    main()
