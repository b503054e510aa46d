"""One rank of a job: it trains, and rank 0 writes what the job ends with."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.messages import failure_of, print_result
from launch.config.overrides import literal, plain, typed
from launch.process.exits import IN_USE
from launch.process.identity import is_worker, rank
from launch.process.secrets import redact, redact_text
from launch.saved.configs import load_run_config
from launch.saved.files import new_run_dir, read_result, refuse_used_run_dir, save_config
from launch.saved.resume import examine
from launch.saved.teacher import teacher_of
from train.files.durable import write_text
from train.files.strict_json import dumps
from train.rank.stop import Stopped, StopSignal


def give_way(reason: str) -> None:
    """Another job owns the run directory now: end before anything else is written."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(IN_USE)


def require_memory(run: Any, num_ranks: int, ranks_here: int) -> None:
    """Refuse ranks on this machine that do not fit it."""
    from launch.job.memory import memory_problem, this_machine

    if (
        run.launch.check_memory
        and (problem := memory_problem(run, num_ranks, ranks_here, this_machine())) is not None
    ):
        raise ValueError(problem)


def tell_changes(config: DictConfig, run: Any) -> None:
    """Refuse what a resumed run cannot do, and print what is not as it was."""
    if config.resume is not None and not began_nothing(Path(config.resume)):
        for line in examine(config, run):
            print(line, flush=True)


def stopped_before_training(run_dir: Path) -> dict[str, Any]:
    """Write and return the result of a run that was asked to stop before its ranks could train on:
    what it was before, but stopped."""
    result = read_result(run_dir) or {"run_dir": str(run_dir), "val_loss": None, "step": 0}
    result["stopped"] = True
    write_text(run_dir / "result.json", dumps(result) + "\n")
    print(
        f"stopped by a signal before training; continue with {typed('resume', run_dir)}",
        file=sys.stderr,
        flush=True,
    )
    return result


def began_nothing(run_dir: Path) -> bool:
    """Whether a run was stopped before its first step, so that resuming it means beginning."""
    return (read_result(run_dir) or {}).get("stopped") is True and not any(
        (run_dir / "checkpoints").glob("step-*")
    )


def work(config: DictConfig, stop: StopSignal | None = None, trial: bool = False) -> float | None:
    """One rank: train, and let rank 0 write result.json.

    Args:
        stop: the signal of a process that is more than a rank.
        trial: of a run that tries whether it fits, and keeps nothing; a rank is told by `+trial`.
    """
    from train.rank import heartbeat

    heartbeat.start()
    heartbeat.beat(0, "start")
    try:
        if stop is not None:
            result = _work(config, stop, trial)
        else:
            # Early, so that a signal during the slow imports below is remembered.
            with StopSignal() as stop:
                result = _work(config, stop)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            heartbeat.failed(
                failure_of(error),
                redact_text(" ".join(str(error).split())[:500]) or type(error).__name__,
            )
        raise
    heartbeat.beat(0 if result is None else result["step"], "done")
    return None if result is None else result["val_loss"]


def _work(config: DictConfig, stop: StopSignal, trial: bool = False) -> dict[str, Any] | None:
    from launch.config.parse import parse

    # A rank under a supervisor reads the config that was saved for it; a direct one composes its
    # own.
    started_directly = is_worker() and "saved_config" not in config
    attempt = config.get("attempt", 0)
    trial = trial or bool(config.get("trial"))
    if "saved_config" in config:
        config = load_run_config(Path(config.saved_config))

    # A restart goes on where the run stands, whatever the first command resumed.
    restarted = attempt > 0 or config.launch.kind == "slurm"
    if restarted:
        config.resume = literal(config.run_dir)
    elif config.resume is not None:
        restarted = began_nothing(Path(config.resume))

    from train.rank.runtime import process_group

    num_ranks = int(os.environ["WORLD_SIZE"]) if is_worker() else 1
    run = parse(plain(config), num_ranks)
    if started_directly:  # before any rank can have written it
        refuse_used_run_dir(config)
        with nullcontext() if rank() == 0 else redirect_stdout(None):
            tell_changes(config, run)

    if started_directly or not run.launch.starts_here:
        from launch.job.memory import ranks_of_this_node

        require_memory(
            run,
            num_ranks,
            ranks_of_this_node(os.environ, 1 if started_directly else run.launch.num_devices),
        )

    teacher = teacher_of(run)

    from train.fit import fit
    from train.rank.lock import RunLock

    try:
        with process_group(run.parallel.timeout_seconds):
            run_dir = agree_on_run_dir(config, run, started_directly)
            with RunLock(run_dir, give_way) if started_directly and rank() == 0 else nullcontext():
                # Resolved, so a secret named by ${oc.env:...} would stand in it.
                shown = redact(plain(config))
                text = OmegaConf.to_yaml(OmegaConf.create(literal(shown)))
                result = fit(
                    run, run_dir, stop, text, shown, restarted, teacher=teacher, trial=trial
                )
    except Stopped:
        result = stopped_before_training(run_dir) if rank() == 0 else None

    if result is None:
        return None

    write_text(run_dir / "result.json", dumps(with_last_loss(result, run_dir)) + "\n")
    if started_directly:
        print_result(result)
    return result


def with_last_loss(result: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The result of a run that only made up for its last evaluation, with the training loss that it
    had before.
    """
    before = read_result(run_dir) or {}
    return (
        result | {"train_loss": before.get("train_loss")}
        if (result.get("train_loss") is None and before.get("step") == result["step"])
        else result
    )


def agree_on_run_dir(config: DictConfig, run: Any, started_directly: bool) -> Path:
    """Agree on the run directory. The parent has chosen it; under a foreign launcher rank 0 chooses
    and tells the others. Collective.
    """
    import torch.distributed as dist

    chosen = [config.run_dir or config.resume]
    if chosen[0] is None and rank() == 0:
        chosen = [str(new_run_dir(run.experiment_name))]
    dist.broadcast_object_list(chosen, src=0)
    if rank() == 0 and started_directly:
        with open_dict(config):
            config.run_dir = literal(chosen[0])
        save_config(config)
    return Path(chosen[0])
