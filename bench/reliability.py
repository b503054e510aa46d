"""What watching and saving cost: a run of two ranks under the supervisor, its own processes' CPU
time and waits.

`python -m bench.reliability [--steps 200] [--save-interval 20] [--json FILE]`. Three runs of the
same steps: saving while training waits, saving asynchronously, not saving. The share of watching is
the CPU time of the supervisor and the agents, as the kernel counts it, over that of the ranks; the
share of saving is the time training stood still (perf/save_seconds) over the time of the steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.common import ROOT, find_commit
from train.files.strict_json import dumps

RANKS = 2


def cpu_seconds(root: psutil.Process) -> dict[str, dict[int, float]]:
    """CPU seconds so far of every process of the job, by what it is."""
    found: dict[str, dict[int, float]] = {"supervisor": {}, "agents": {}, "ranks": {}}
    for process in [root, *root.children(recursive=True)]:
        try:
            line = " ".join(process.cmdline())
            kind = (
                "supervisor"
                if process.pid == root.pid
                else "ranks"
                if "saved_config=" in line
                else "agents"
                if "launch.job.agent" in line and "deepspeed" not in line
                else None
            )
            if kind is not None:
                times = process.cpu_times()
                found[kind][process.pid] = times.user + times.system
        except psutil.Error:
            continue
    return found


def measure(folder: Path, steps: int, *overrides: str) -> dict[str, Any]:
    """One run; CPU seconds are counted between its first and its last logged step."""
    run_dir = folder / "run"
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "launch.train",
        "experiment=quickstart",
        "launch=deepspeed",
        f"launch.num_devices={RANKS}",
        f"train.num_steps={steps}",
        f"optim.warmup_steps={min(10, steps - 1)}",
        f"train.log_interval={max(1, steps // 20)}",
        "train.sample_prompt=null",
        "train.eval_max_sequences=8",
        "tracker.wandb.mode=disabled",
        f"run_dir={run_dir}",
        *overrides,
    ]
    job = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics, first, last = run_dir / "metrics.jsonl", None, None
    while job.poll() is None:
        time.sleep(0.5)
        if metrics.is_file() and metrics.stat().st_size:
            now = cpu_seconds(psutil.Process(job.pid))
            first = first or now
            last = now if len(now["ranks"]) == RANKS else last
    if job.returncode or first is None or last is None:
        raise SystemExit(f"the run failed with code {job.returncode}")
    spent = {
        kind: sum(last[kind].get(pid, before) - before for pid, before in first[kind].items())
        for kind in first
    }
    records = [json.loads(text) for text in metrics.read_text().splitlines()]
    records = [record for record in records if "perf/step_seconds" in record][1:]
    interval = records[1]["step"] - records[0]["step"]
    return {
        "step_seconds": sum(r["perf/step_seconds"] for r in records) / len(records),
        "watching": (spent["supervisor"] + spent["agents"]) / spent["ranks"],
        "saving": sum(r["perf/save_seconds"] for r in records)
        / sum(r["perf/step_seconds"] * interval for r in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-interval", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "bench": "reliability",
        "commit": find_commit(),
        "device": "cpu",
        "ranks": RANKS,
        "steps": options.steps,
        "save_interval": options.save_interval,
    }
    saving = f"checkpoint.save_interval={options.save_interval}"
    for name, overrides in (
        ("synchronous", (saving,)),
        ("asynchronous", (saving, "checkpoint.asynchronous=true")),
        ("none", ()),
    ):
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(Path(folder), options.steps, *overrides)
            print(name, result[name], flush=True)
    if options.json is not None:
        options.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps(result))


if __name__ == "__main__":
    main()
