"""What every entry point shares: composing under launchers, run directories, worker detection, messages."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent
QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Hydra keeps no directory or log of its own: the run directory is ours."""


def adopt_slurm() -> None:
    """Under srun, give torch the names it looks for."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=env["SLURM_NTASKS"])


def first_host(node_list: str) -> str:
    """First host of a Slurm list: "gpu[003-007,9],other" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", node_list)
    return match[1] + (match[2] or "") if match else node_list


def is_worker() -> bool:
    """Started by a launcher as one rank of a job. LOCAL_RANK, since some schedulers set RANK per machine."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def run_main(name: str, function: Callable[[DictConfig], Any]) -> None:
    """Compose conf/<name>.yaml with the command line and call `function`; user errors end with one message, code 2."""
    if Path.cwd() != ROOT:
        raise SystemExit(f"run from the repository root: cd {ROOT} && python -m launch.{name}")
    adopt_slurm()
    # Libraries' remarks about optional packages and their own deprecations, once per rank and import.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # DeepSpeed's launcher passes --local_rank=N, which Hydra does not know.
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    multirun = {"-m", "--multirun"} & set(arguments)
    sweep_dir = f"hydra.sweep.dir=runs/sweeps/{time.strftime('%Y%m%d-%H%M%S')}"
    sys.argv = [sys.argv[0], *arguments, *QUIET, *([sweep_dir] if multirun and not any(
        a.startswith("hydra.sweep.dir") for a in arguments) else [])]

    failed_jobs = []

    def guarded(config: DictConfig) -> Any:
        try:
            return _explained(function, config)
        except SystemExit as error:
            if not multirun:
                raise
            failed_jobs.append(error.code)  # the sweep goes on
            return math.nan

    hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)(guarded)()
    if failed_jobs:
        raise SystemExit(f"{len(failed_jobs)} job(s) of the sweep failed; their errors stand above")


def _explained(function: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Call the function; a user's mistake ends with its message and code 2."""
    from launch.validate import ConfigError

    try:
        return function(config)
    except ConfigError as error:
        fail(error.problems)
    except OmegaConfBaseException as error:
        fail([f"the config cannot be read: {str(error).splitlines()[0]}"])
    except (ValueError, FileNotFoundError) as error:
        if not _is_ours(error):
            raise
        fail([str(error)], every_rank=True)


def _is_ours(error: BaseException) -> bool:
    """Raised by a check of ours, whose message says what to do; errors from inside libraries keep their traceback."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(where.is_relative_to(ROOT / package) for package in ("launch", "train", "model", "ops"))


def fail(problems: list[str], every_rank: bool = False) -> NoReturn:
    """Print the problems and end with exit code 2. Those that all ranks see are printed by rank 0 only."""
    if rank() == 0 or every_rank:
        for problem in problems:
            print(f"error: {problem}" if rank() == 0 else f"error (rank {rank()}): {problem}", file=sys.stderr,
                  flush=True)
    raise SystemExit(2)


def plain(config: DictConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    return data


def quoted(value: object) -> str:
    """A value as Hydra's override grammar reads it back, whatever characters it holds."""
    text = str(value).replace("'", "\\'")
    return f"'{text}'"


def new_run_dir(experiment_name: str) -> Path:
    """runs/<experiment>/<time>-<id>, created. The id keeps runs of the same second apart."""
    path = Path("runs") / experiment_name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path.mkdir(parents=True)
    return path


def world_size(config: DictConfig) -> int:
    """Ranks the launch settings start."""
    launch = config.launch
    return 1 if launch.kind == "inline" else int(launch.num_devices) * int(launch.num_nodes)


def record(config: DictConfig, cls: type, path: str = "") -> Any:
    """Settings of one command or section as a checked record; `path` leads the names in messages.

    Raises:
        ConfigError: with every problem.
    """
    from launch.validate import ConfigError, build_record

    problems: list[str] = []
    settings = build_record(plain(config), cls, path, problems)
    problems = problems or settings.problems()
    if problems:
        raise ConfigError(problems)
    return settings


def load_run(run: str, attention: Any = None) -> Any:
    """The RunConfig a run directory was trained with, for use in one process; attention: a ComponentConfig to use instead
    of its own.

    Raises:
        FileNotFoundError: the directory holds no config.
    """
    from launch.validate import parse

    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a run directory of launch.train, e.g. run=runs/.../...")
    saved = OmegaConf.load(path)
    assert isinstance(saved, DictConfig)
    # One process, any device: what spreads the experts, and what was chosen for the device of the training, is left out.
    saved.launch, saved.parallel, saved.experts = {"kind": "inline"}, {}, {}
    saved.dispatcher = {"_target_": "model.dispatch.LocalDispatcher"}
    if "fail_safe" in saved:
        saved.fail_safe.rank_overload = 0.0
    saved.train.micro_batch_size = saved.train.global_batch_size = 1
    saved.train.batch_size_rampup = None
    config = plain(saved)
    if attention is not None:
        config["attention"] = {"_target_": attention.target, **attention.arguments}
    return parse(config, world_size=1)


def print_result(result: dict[str, Any]) -> None:
    """The last line on stdout: one JSON object."""
    sys.stderr.flush()
    print(json.dumps(result), flush=True)
