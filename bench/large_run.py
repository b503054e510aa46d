"""What reading a large run costs: 64 MoE layers x 1,024 experts whose logs are as large as their
limits let them become.

`python -m bench.large_run [--layers 64] [--experts 1024] [--ranks 8] [--mib 256] [--audit-mib 1024]
[--json FILE]` makes a run directory of real counts and measures each reader in a process of its
own: CPU seconds, wall seconds, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import ROOT, find_commit
from launch.runs.lines import LineIndex
from train.files.log_file import MERGED
from train.files.strict_json import dumps
from train.files.thinning import KEEP, START
from train.observe.catalogue.names import metric_names

TOKENS = 1 << 20
"""Of a step."""
TOP_K = 8
LOG_INTERVAL = 10
FULL = 0.97 * START
"""Of the limit: as large as a log is just before it is thinned; the newest KEEP of it is as it was
written.
"""
RESUMED = 5
"""Log steps that the measured resume drops."""


def write_log(path: Path, limit: int, record: Any) -> int:
    """A log just before a thinning: evenly merged old records, then single ones. record: (step,
    merged) -> facts. Returns its last step.
    """
    step, merged, size = 0, 64, 0
    with path.open("w") as file:
        while size < FULL * limit:
            if merged > 1 and size > KEEP * limit:
                merged = 1
            step += LOG_INTERVAL * merged
            head = {"step": step, "tokens": step * TOKENS} | (
                {MERGED: merged} if merged > 1 else {}
            )
            size += file.write(dumps({**head, **record(step, merged)}) + "\n")
    return step


def write_metrics(path: Path, limit: int, last: int, record: Any) -> None:
    """As many records as the limit lets there be, over the steps of the routing log."""
    number = int(FULL * limit / (50 + len(dumps(record(0, 1)))))
    with path.open("w") as file:
        for step in np.linspace(last / number, last, number).round().astype(int).tolist():
            file.write(dumps({"step": step, "tokens": step * TOKENS, **record(step, 1)}) + "\n")


def write_audit(folder: Path, layers: int, experts: int, ranks: int, limit: int) -> None:
    """The last steps of a run, of one sampled token in 4,096."""
    from train.audit.files import HEADER
    from train.audit.format import encode, is_sampled
    from train.audit.log import LINES_SHARE, AuditLog
    from train.config.watching import AuditConfig

    rng, share = np.random.default_rng(0), FULL * (1 - LINES_SHARE) * limit / ranks
    AuditLog(folder, AuditConfig(4096), tuple(range(layers)), 0, num_ranks=ranks).close()
    own = TOKENS // ranks
    files = [(folder / f"records-{rank:05d}.bin").open("ab") for rank in range(ranks)]
    lines = (folder / "steps.jsonl").open("a")
    step, size = 0, 0
    while size < share:
        step += 1
        for rank, file in enumerate(files):
            first = step * TOKENS + rank * own
            tokens = np.arange(first, first + own)[is_sampled(np.arange(first, first + own), 4096)]
            header = np.zeros(len(tokens) * layers, HEADER)
            header["step"], header["layer"] = step, np.repeat(np.arange(layers), len(tokens))
            header["token"] = np.tile(tokens & 0xFFFFFFFF, layers)
            ids = rng.integers(0, experts, (len(header), TOP_K))
            written = file.write(encode(header, ids, rng.random(ids.shape).astype(np.float32)))
        size += written
        sums = [f"{c:016x}" for c in rng.integers(0, 2**62, layers).tolist()]
        lines.write(
            dumps(
                {
                    "step": step,
                    "first_token": step * TOKENS,
                    "checksums": sums,
                    "sample_one_in": 4096,
                    "flagged_dropped": 0,
                    "lost_micro_batches": 0,
                }
            )
            + "\n"
        )
    for file in (*files, lines):
        file.close()


def make_run(folder: Path, settings: argparse.Namespace) -> int:
    """A run directory without checkpoints; returns the last logged step."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    layers, experts = settings.layers, settings.experts
    folder.mkdir(parents=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "train",
            overrides=[
                f"model.num_layers={layers}",
                f"model.num_experts={experts}",
                "model.num_dense_layers=0",
                f"model.top_k={TOP_K}",
            ],
        )
    OmegaConf.save(config, folder / "config.yaml")
    rng = np.random.default_rng(1)
    skew = rng.gamma(20, 1 / 20, (layers, experts))
    names = sorted(metric_names(range(layers), (), detailed=False))

    def routing(step: int, merged: int) -> dict[str, Any]:
        tokens = TOKENS * LOG_INTERVAL * merged
        counts = rng.poisson(skew * tokens * TOP_K / experts)
        histogram = [[0] * TOP_K + [tokens]] * layers
        return {"counts": counts.tolist(), "k_histogram": histogram, "reasons": [[0] * 8] * layers}

    def metrics(step: int, merged: int) -> dict[str, Any]:
        return dict(zip(names, rng.random(len(names)).tolist(), strict=True)) | {
            "train/skipped_steps": 0
        }

    last = write_log(folder / "routing.jsonl", settings.mib * 2**20, routing)
    write_metrics(folder / "metrics.jsonl", settings.mib * 2**20, last, metrics)
    (folder / "alarms.jsonl").touch()
    write_audit(folder / "audit", layers, experts, settings.ranks, settings.audit_mib * 2**20)
    return last


MEASURE = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.stdout[-3000:] if done.returncode else json.dumps({
    "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
    "wall_seconds": round(time.perf_counter() - started, 2),
    "peak_mib": round(used.ru_maxrss / 1024)}))
sys.exit(done.returncode)
"""


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of a process. A small one starts it: the kernel counts the memory of
    whoever forks.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stdout}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


RESUME = """
import sys
from pathlib import Path
from train.config.watching import TrackerConfig, WandbConfig
from train.sinks.tracker import Tracker
{also}
config = TrackerConfig(WandbConfig("disabled"))
Tracker(Path(sys.argv[1]), config, {{}}, "name", int(sys.argv[2])).close({{}})
"""
RESUME_AUDIT = """
from train.audit.log import AuditLog
from train.config.watching import AuditConfig
folder, layers = Path(sys.argv[1]) / "audit", tuple(range({layers}))
AuditLog(folder, AuditConfig(4096), layers, 0, 10**9, num_ranks={ranks}).close()
"""


def main() -> None:
    """Make the run, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 64),
        ("experts", 1024),
        ("ranks", 8),
        ("mib", 256),
        ("audit-mib", 1024),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path, help="a run directory that this bench has made")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = settings.run or Path(scratch) / "run"
        last = (
            LineIndex(run / "routing.jsonl").step[-1].item()
            if settings.run
            else make_run(run, settings)
        )
        sizes = {
            str(p.relative_to(run)): p.stat().st_size for p in sorted(run.rglob("*")) if p.is_file()
        }
        python = [sys.executable, "-W", "ignore"]
        commands = {
            "imports": [*python, "-c", RESUME.format(also="").rpartition("Tracker(")[0]],
            "resume: logs": [
                *python,
                "-c",
                RESUME.format(also=""),
                str(run),
                str(last - RESUMED * LOG_INTERVAL),
            ],
            "resume: logs and rank 0's audit": [
                *python,
                "-c",
                RESUME.format(
                    also=RESUME_AUDIT.format(layers=settings.layers, ranks=settings.ranks)
                ),
                str(run),
                str(last - RESUMED * LOG_INTERVAL),
            ],
            **{
                name: [*python, "-m", f"launch.{name}", f"run={run}"]
                for name in ("report", "audit", "dashboard")
            },
            "place": [
                *python,
                "-m",
                "launch.place",
                f"run={run}",
                f"expert_parallel_size={min(64, settings.experts)}",
                "ranks_per_node=8",
            ],
        }
        rows = {}
        for name, command in commands.items():
            rows[name] = measured(command)
            print(name, rows[name], flush=True)
    found = {
        "bench": "large_run",
        "commit": find_commit(),
        "device": "cpu",
        "cores": os.cpu_count(),
        "layers": settings.layers,
        "experts": settings.experts,
        "ranks": settings.ranks,
        "last_step": last,
        "bytes": sizes,
        "rows": rows,
    }
    if settings.json is not None:
        settings.json.write_text(dumps(found, indent=1) + "\n")
    print(dumps(found))


if __name__ == "__main__":
    main()
