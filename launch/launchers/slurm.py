"""launch=slurm: the batch script of a run. Inside its allocation the same command supervises ranks
that srun starts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from launch.config.overrides import quoted
from launch.process.identity import ROOT
from train.config.run import RunConfig
from train.files.durable import replacing

SIGNAL_MARGIN_SECONDS = 30


def in_allocation() -> bool:
    return "SLURM_JOB_ID" in os.environ


def batch_script(run: RunConfig, run_dir: Path) -> str:
    """Text of RUN/slurm.sh. USR1 comes early enough before the time limit for all ranks to save."""
    launch, slurm = run.launch, run.launch.slurm
    grace = int(run.checkpoint.grace_seconds) + SIGNAL_MARGIN_SECONDS
    saved = quoted((run_dir / "config.yaml").resolve())
    gpus = launch.num_devices if slurm.gpus_per_node is None else slurm.gpus_per_node
    options = [
        f"--job-name={run.experiment_name}",
        f"--nodes={launch.num_nodes}",
        f"--ntasks-per-node={launch.num_devices}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *(
            f"--{name}={value}"
            for name in ("partition", "account", "qos", "time")
            if (value := getattr(slurm, name)) is not None
        ),
        f"--output={run_dir.resolve()}/slurm-%j.out",
        "--open-mode=append",
        f"--signal=B:USR1@{grace}",
        "--requeue" if slurm.requeue else "--no-requeue",
        *slurm.extra,
    ]

    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        f"cd {shlex.quote(str(ROOT))}",
        # exec: the signal goes to the supervisor, which has all ranks save.
        "exec " + shlex.join([sys.executable, "-m", "launch.train", f"+saved_config={saved}"]),
    ]
    return "\n".join(lines) + "\n"


def submit(run: RunConfig, run_dir: Path) -> str:
    """Write RUN/slurm.sh and hand it to sbatch; returns what sbatch says.

    Raises:
        ValueError: there is no sbatch here, or it refuses.
    """
    script = run_dir / "slurm.sh"
    with replacing(script) as scratch:
        scratch.write_text(batch_script(run, run_dir))
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm needs sbatch on this machine; the "
            f"script is {script}, submit it where Slurm is"
        )
    result = subprocess.run(["sbatch", str(script)], text=True, capture_output=True, timeout=60)
    if result.returncode:
        raise ValueError(
            f"sbatch refused {script}: {result.stderr.strip() or result.stdout.strip()}"
        )
    return result.stdout.strip()


def requeue() -> None:
    """Put this job back into the queue, after it has saved and stopped."""
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], timeout=60, check=False)
