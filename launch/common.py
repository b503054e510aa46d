"""What every entry point shares: composing under launchers, run directories, worker detection, messages."""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.environment import adopt_rank, is_rank
from launch.exits import BAD_CONFIG, FAILURES
from launch.interrupt import Interrupts
from launch.secrets import problems_of_settings, redact_text
from train.strict_json import dumps

ROOT = Path(__file__).resolve().parent.parent
MAX_DEPTH = 50
"""Of a saved config."""
QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Hydra keeps no directory or log of its own: the run directory is ours."""


def is_worker() -> bool:
    """Started by a launcher as one rank of a job."""
    return is_rank()


def rank() -> int:
    return int(os.environ["RANK"]) if is_rank() else 0


def run_main(name: str, function: Callable[[DictConfig], Any]) -> None:
    """Compose conf/<name>.yaml with the command line and call `function`; user errors end with one message, code 2."""
    if Path.cwd() != ROOT:
        raise SystemExit(f"run from the repository root: cd {ROOT} && python -m launch.{name}")
    # With launch.node_rank the command starts the ranks of a node; srun may start it on each.
    if not any(argument.startswith("launch.node_rank=") for argument in sys.argv[1:]):
        try:
            adopt_rank()
        except ValueError as error:
            fail([str(error)])
    # Libraries' remarks about optional packages and their own deprecations, once per rank and import.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # DeepSpeed's launcher passes --local_rank=N, which Hydra does not know.
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    if any(a.lstrip("+").startswith("resume=") for a in arguments):
        arguments = [_forced(a) for a in arguments]
    multirun = {"-m", "--multirun"} & set(arguments)
    sweep_dir = f"hydra.sweep.dir=runs/sweeps/{time.strftime('%Y%m%d-%H%M%S')}"
    sys.argv = [sys.argv[0], *arguments, *QUIET, *([sweep_dir] if multirun and not any(
        a.startswith("hydra.sweep.dir") for a in arguments) else [])]

    failed_jobs = []
    interrupts = Interrupts(rank=is_worker())

    def guarded(config: DictConfig) -> Any:
        try:
            return _explained(function, config, interrupts)
        except SystemExit as error:
            if not multirun:
                raise
            failed_jobs.append(error.code)  # the sweep goes on
            return math.nan

    with interrupts:
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)(guarded)()
    if failed_jobs:
        raise SystemExit(f"{len(failed_jobs)} job(s) of the sweep failed; their errors stand above")


def _forced(argument: str) -> str:
    """An override of a single setting as one that may also add it: a resumed run's router or attention need not be the
    default one, whose keys are all that Hydra knows. launch.validate refuses what neither has."""
    return f"++{argument}" if re.match(r"(?!hydra\.)\w+(\.\w+)+=", argument) else argument


def _explained(function: Callable[[DictConfig], Any], config: DictConfig,
               interrupts: Interrupts) -> Any:
    """Call the function; a user's mistake ends with its message and its exit code."""
    from launch.validate import ConfigError

    try:
        return function(config)
    except ConfigError as error:
        fail(error.problems)
    except OmegaConfBaseException as error:
        fail([f"the config cannot be read: {str(error).splitlines()[0]}"])
    except Exception as error:
        if interrupts.number is not None:  # a library has made an error of its own of the interrupt
            raise KeyboardInterrupt from error
        kind = failure_of(error)
        if kind in ("failed", "communication"):
            raise
        fail([str(error)], every_rank=kind == "config", code=FAILURES[kind].code)


def failure_of(error: BaseException) -> str:
    """Which kind of failure (launch/exits.py) an exception means for the job."""
    import torch.distributed as dist

    from train.alarms import AlarmStop
    from train.checkpoint import CheckpointError, CheckpointWriteError
    from train.checkpoint_folder import CheckpointsGoneError
    from train.lock import RunLocked
    from train.nonfinite import NonFiniteError

    if isinstance(error, NonFiniteError):
        return "non_finite"
    if isinstance(error, AlarmStop):
        return "alarm"
    if isinstance(error, CheckpointWriteError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "disk_full"
    if isinstance(error, CheckpointsGoneError):
        return "gone"
    if isinstance(error, CheckpointError):
        return "checkpoint"
    if isinstance(error, RunLocked):
        return "in_use"
    if isinstance(error, (ValueError, FileNotFoundError)) and _is_ours(error):
        return "config"
    lost = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in lost)):
        return "communication"
    return "failed"


def _is_ours(error: BaseException) -> bool:
    """Raised by a check of ours, whose message says what to do; errors from inside libraries keep their traceback."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(where.is_relative_to(ROOT / package) for package in ("launch", "train", "model", "ops"))


def fail(problems: list[str], every_rank: bool = False, code: int = BAD_CONFIG) -> NoReturn:
    """Print the problems and end with the exit code. Those that all ranks see are printed by rank 0 only."""
    if rank() == 0 or every_rank:
        for problem in problems:
            print("error: " if rank() == 0 else f"error (rank {rank()}): ", redact_text(problem), sep="", file=sys.stderr,
                  flush=True)
    raise SystemExit(code)


def plain(config: DictConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    return data


def quoted(value: object) -> str:
    """A value as Hydra's override grammar and then OmegaConf read it back, whatever it holds."""
    # Within quotes a backslash is one, but before a quote or at the end it takes two.
    text = re.sub(r"(\\*)'", r"\1\1\\'", literal(str(value)))
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"'{text}'"


def typed(key: str, value: object) -> str:
    """An override as one types it in a shell."""
    text = str(value)
    is_plain = text != "" and all(c.isalnum() or c in "/._-" for c in text)
    return shlex.quote(f"{key}={text if is_plain else quoted(text)}")


def literal(value: Any) -> Any:
    """A value, or a container of values, as OmegaConf must hold it to give it back: what looks like
    an interpolation is text. For what has been resolved before, such as a path."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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

    problems = problems_of_settings(plain(config), path)
    settings = build_record(plain(config), cls, path, problems)
    problems = problems or settings.problems()
    if problems:
        raise ConfigError(problems)
    return settings


def load_config(path: str) -> DictConfig:
    """A config that a run has saved, interpolations kept.

    Raises:
        ValueError: it is damaged.
    """
    try:
        text = Path(path).read_text()
        _refuse_endless(text, path)
        saved = OmegaConf.create(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {(str(error).splitlines() or ['nested too deeply'])[0]}") from error
    if not isinstance(saved, DictConfig):
        raise ValueError(f"{path} is no config: it holds no group of settings")
    return saved


def _refuse_endless(text: str, path: str) -> None:
    """A few aliases of aliases stand for more nodes than any machine holds, and nesting for more stack; what we save has
    neither.

    Raises:
        ValueError: the text has.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{path} holds a YAML alias (*name), which no saved config does; write the value out")
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is nested more than {MAX_DEPTH} deep, as no saved config is")


def load_run(run: str, attention: Any = None, checkpoint: Path | None = None) -> Any:
    """The RunConfig that a checkpoint of a run was made under, for use in one process.

    A run may have been resumed under other settings since, so its own config says nothing about its checkpoints but where
    their data lie now.

    Args:
        attention: a ComponentConfig to use instead of its own; checkpoint: None: the run as it was last started.

    Raises:
        FileNotFoundError: the directory holds no config.
    """
    from launch.validate import parse

    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a run directory of launch.train, e.g. run=runs/.../...")
    saved = load_config(str(path))
    if checkpoint is not None:
        data = saved.data
        saved = load_config(str(checkpoint / "config.yaml"))
        saved.data = data
    # One process, any device: what spreads the experts, and what was chosen for the device of the training, is left out.
    saved.launch, saved.parallel, saved.experts = {"kind": "inline"}, {}, {}
    saved.dispatcher = {"_target_": "model.dispatch.LocalDispatcher"}
    saved.train.micro_batch_size = saved.train.global_batch_size = 1
    saved.train.batch_size_rampup = None
    config = plain(saved)
    if attention is not None:
        config["attention"] = {"_target_": attention.target, **attention.arguments}
    return parse(config, world_size=1)


def print_result(result: dict[str, Any]) -> None:
    """The last line on stdout: one JSON object."""
    sys.stderr.flush()
    print(dumps(result), flush=True)
