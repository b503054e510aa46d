"""Train: python -m launch.train [overrides]. Inline, or as parent of a launcher, or as one of its ranks."""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.train")

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from launch import hosts
from launch.common import (
    fail,
    failure_of,
    is_worker,
    literal,
    load_config,
    new_run_dir,
    plain,
    print_result,
    quoted,
    rank,
    run_main,
    typed,
    world_size,
)
from launch.exits import IN_USE
from launch.resume import examine, merged
from launch.secrets import forwarded_environment, redact, redact_text
from train.manifest import require_owned, write_text
from train.stop import Stopped, StopSignal
from train.strict_json import dumps


def train(config: DictConfig) -> float | None:
    """Validate, then train here or start ranks; returns the held-out loss, which Hydra sweepers minimise."""
    from launch.validate import check_tokenizer, parse

    config = with_saved_config(config)
    if is_worker():
        refuse_second_launcher()
        return work(config)
    if "saved_config" in config:  # the batch script of launch=slurm
        config = load_config(config.saved_config)
        return supervise(config, parse(plain(config), world_size(config)))
    run = parse(plain(config), world_size(config))
    if run.launch.hostfile:
        hosts.check(run.launch)
    if run.launch.kind != "slurm":  # its nodes may see a file that the machine which submits does not
        check_tokenizer(run)
    forwarded_environment(os.environ, run.launch.forward_env)  # refuses secrets, before anything is written
    node = run.launch.node_rank or 0
    if node == 0:  # another node's command may be started again while the run goes on
        tell_changes(config, run)
    if run.launch.by_node and not (config.run_dir or config.resume):
        raise ValueError("launch.node_rank needs run_dir=DIR (or resume=DIR), the same on every node and on a file system "
                         "they share")
    if run.launch.dry_run:
        dry_run(run, config)
        return None
    if run.launch.starts_here:
        require_memory(run, world_size(config), run.launch.num_devices)
    if node > 0:
        from launch.follower import follow

        raise SystemExit(follow(run, Path(config.resume or config.run_dir)))
    refuse_used_run_dir(config)
    with open_dict(config):
        config.run_dir = literal(str(Path(config.resume) if config.resume else
                                     Path(config.run_dir or new_run_dir(run.experiment_name))))
    save_config(config)
    return supervise(config, run)


def refuse_second_launcher() -> None:
    """A rank starts no ranks: whoever asks it to has launched the command twice."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if chosen.get("launch", "inline") != "inline":
        raise ValueError(f"launch={chosen['launch']} starts the ranks, but this process is already "
                         f"rank {rank()} of {os.environ['WORLD_SIZE']} (RANK, LOCAL_RANK and "
                         "WORLD_SIZE say so): run the command once, without a launcher before it, or "
                         "drop launch=")


def supervise(config: DictConfig, run: Any) -> float | None:
    """Own the run directory and see the job through: in this process, by a supervisor, or through Slurm's queue."""
    from launch import slurm
    from train.lock import RunLock

    run_dir = Path(config.run_dir)
    if run.launch.kind == "slurm" and not slurm.in_allocation():
        print_result({"run_dir": str(run_dir), "submitted": slurm.submit(run, run_dir)})
        return None
    with StopSignal(second_interrupt_ends=True) as stop:
        with RunLock(run_dir, give_way) as lock:
            # Of a job that was killed: its agents end when it is gone.
            (run_dir / "supervisor.json").unlink(missing_ok=True)
            if run.launch.kind == "inline":
                work(config, stop)
            else:
                start_ranks(config, run, stop, lock.still_ours)
        if run.launch.kind == "slurm" and run.launch.slurm.requeue and json.loads(
                (run_dir / "result.json").read_text())["stopped"]:
            slurm.requeue()
        loss = finish(config, run, stop)
    if stop.received and HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise Stopped  # the other jobs of the sweep as well
    return loss


def give_way(reason: str) -> None:
    """Another job owns the run directory now: end before anything else is written."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(IN_USE)


def with_saved_config(config: DictConfig) -> DictConfig:
    """With resume=DIR the run's saved config applies, with this command line's overrides on top."""
    if config.resume is None:
        return config
    path = Path(config.resume) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"resume: {path} does not exist; give a run directory, e.g. resume=runs/.../...")
    # Before its settings are looked at: they say what ranks load and where keys are sent.
    require_owned(path.parent)
    require_owned(path)
    if config.run_dir is not None and config.run_dir != config.resume:
        raise ValueError(f"resume={config.resume} continues in its own directory; drop run_dir={config.run_dir}")
    return merged(load_config(str(path)), config, list(HydraConfig.get().overrides.task), config.resume)


def require_memory(run: Any, num_ranks: int, ranks_here: int) -> None:
    """Refuse ranks on this machine that do not fit it."""
    from launch.machine_memory import memory_problem, this_machine

    if run.launch.check_memory and (problem := memory_problem(run, num_ranks, ranks_here, this_machine())) is not None:
        raise ValueError(problem)


def tell_changes(config: DictConfig, run: Any) -> None:
    """Refuse what a resumed run cannot do, and print what is not as it was."""
    if config.resume is not None and not began_nothing(Path(config.resume)):
        for line in examine(config, run):
            print(line, flush=True)


def refuse_used_run_dir(config: DictConfig) -> None:
    if config.run_dir is not None and config.resume is None and (Path(config.run_dir) / "config.yaml").exists():
        raise ValueError(f"run_dir={config.run_dir} already holds a run; continue it with resume={config.run_dir}, or "
                         "choose another directory")


def save_config(config: DictConfig) -> None:
    """RUN/config.yaml, interpolations kept, so that a resumed run can override what others refer to."""
    path = Path(config.run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", OmegaConf.to_yaml(config))
    except OSError as error:
        raise ValueError(f"run_dir={path} cannot be written ({error.strerror}); choose another directory") from error


def start_ranks(config: DictConfig, run: Any, stop: StopSignal,
                still_ours: Callable[[], bool]) -> None:
    from launch import spawn
    from launch.supervisor import Supervisor
    from launch.validate import ConfigError, check_tokenizer, parse
    from train.data.prepare import prepare

    if run.launch.kind == "slurm":  # elsewhere it was looked at before the run directory was made
        check_tokenizer(run)
    run_dir = Path(config.run_dir)
    try:
        with stop.obeyed_at_once():
            prepare(run.data)  # here, so that no rank waits for it
    except Stopped:
        stopped_before_training(run_dir)
        return

    def against(size: int) -> list[str]:
        try:
            parse(plain(config), size)
        except ConfigError as error:
            return error.problems
        return []

    env = {**forwarded_environment(spawn.environment(), run.launch.forward_env), **run.launch.env}
    arguments = [f"+saved_config={quoted((run_dir / 'config.yaml').resolve())}"]
    try:
        code = Supervisor(run, run_dir, arguments, against, env, still_ours,
                          stop_asked=int(stop.received)).run()
    except Stopped:  # before any rank was started
        stopped_before_training(run_dir)
        return
    if code:
        fail([f"the job ended with exit code {code}; the cause stands above and in {config.run_dir}/supervisor.jsonl, "
              f"stacks and batches in {config.run_dir}/failures"], code=code)


def stopped_before_training(run_dir: Path) -> dict[str, Any]:
    """Write and return the result of a run that was asked to stop before its ranks could train on:
    what it was before, but stopped."""
    path = run_dir / "result.json"
    result: dict[str, Any] = {"run_dir": str(run_dir), "val_loss": None, "step": 0}
    if path.is_file():
        result = json.loads(path.read_text())
    result["stopped"] = True
    write_text(path, dumps(result) + "\n")
    print(f"stopped by a signal before training; continue with resume={run_dir}", file=sys.stderr,
          flush=True)
    return result


def began_nothing(run_dir: Path) -> bool:
    """Whether a run was stopped before its first step, so that resuming it means beginning."""
    path = run_dir / "result.json"
    return (path.is_file() and json.loads(path.read_text()).get("stopped") is True
            and not any((run_dir / "checkpoints").glob("step-*")))


def work(config: DictConfig, stop: StopSignal | None = None) -> float | None:
    """One rank: train, and let rank 0 write result.json. stop: the signal of a process that is more
    than a rank."""
    from train import heartbeat

    heartbeat.start()
    heartbeat.beat(0, "start")
    try:
        if stop is not None:
            result = _work(config, stop)
        else:
            # Early, so that a signal during the slow imports below is remembered.
            with StopSignal() as stop:
                result = _work(config, stop)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            heartbeat.failed(failure_of(error), redact_text(" ".join(str(error).split())[:500]) or type(error).__name__)
        raise
    heartbeat.beat(0 if result is None else result["step"], "done")
    return None if result is None else result["val_loss"]


def _work(config: DictConfig, stop: StopSignal) -> dict[str, Any] | None:
    from launch.validate import parse

    started_directly = is_worker() and "saved_config" not in config
    attempt = config.get("attempt", 0)
    if "saved_config" in config:
        config = load_config(config.saved_config)
    restarted = attempt > 0 or config.launch.kind == "slurm"
    if restarted:
        config.resume = literal(config.run_dir)
    elif config.resume is not None:
        restarted = began_nothing(Path(config.resume))
    from train.runtime import process_group

    num_ranks = int(os.environ["WORLD_SIZE"]) if is_worker() else 1
    run = parse(plain(config), num_ranks)
    if started_directly:  # before any rank can have written it
        refuse_used_run_dir(config)
        with nullcontext() if rank() == 0 else redirect_stdout(None):
            tell_changes(config, run)
    if started_directly or not run.launch.starts_here:
        from launch.machine_memory import ranks_of_this_node

        require_memory(run, num_ranks,
                       ranks_of_this_node(os.environ, 1 if started_directly else run.launch.num_devices))
    from train.lock import RunLock
    from train.loop import fit

    try:
        with process_group(run.parallel.timeout_seconds):
            run_dir = agree_on_run_dir(config, run, started_directly)
            with RunLock(run_dir, give_way) if started_directly and rank() == 0 else nullcontext():
                # Resolved, so a secret named by ${oc.env:...} would stand in it.
                shown = redact(plain(config))
                text = OmegaConf.to_yaml(OmegaConf.create(literal(shown)))
                result = fit(run, run_dir, stop, text, shown, restarted)
    except Stopped:
        result = stopped_before_training(run_dir) if rank() == 0 else None
    if result is None:
        return None
    write_text(run_dir / "result.json", dumps(with_last_loss(result, run_dir)) + "\n")
    if started_directly:
        print_result(result)
    return result


def with_last_loss(result: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The result of a run that only made up for its last evaluation, with the training loss that it had before."""
    try:
        before = json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return result
    return result | {"train_loss": before.get("train_loss")} if (
        result.get("train_loss") is None and before.get("step") == result["step"]) else result


def agree_on_run_dir(config: DictConfig, run: Any, started_directly: bool) -> Path:
    """The parent has chosen it; under a foreign launcher rank 0 chooses and tells the others. Collective."""
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


def finish(config: DictConfig, run: Any, stop: StopSignal) -> float | None:
    """Sample of text, where things are, and the JSON line. Asked to stop, it leaves the sample: the
    run itself is done."""
    from launch.generate import sample

    run_dir = Path(config.run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    if run.train.sample_prompt and not result["stopped"]:
        print("\n--- sample -------------------------------------------------------------")
        try:
            with stop.obeyed_at_once():
                for piece in sample(str(run_dir), run.train.sample_prompt, max_new_tokens=120,
                                    temperature=0.8, top_p=0.95, seed=run.seed):
                    print(piece, end="", flush=True)
        except Stopped:
            print("\nasked to stop: the sample is left", end="")
        except ValueError as error:  # the run itself is done
            print(f"no sample: {error}", end="")
        print("\n------------------------------------------------------------------------")
    if result["val_loss"] is not None and not result["stopped"]:
        print(f"held-out loss {result['val_loss']:.4f} nats per token; unigram entropy {result['unigram_entropy']:.4f}")
    if result.get("skipped_steps"):
        print(f"{result['skipped_steps']} of {result['step']} steps were skipped, their loss or gradient was not finite: "
              f"{run_dir}/failures holds their batches")
    print(f"run directory {run_dir} (metrics.jsonl, routing.jsonl, checkpoints/)")
    print(f"next: python -m launch.report {typed('run', run_dir)}")
    print(f"      python -m launch.generate {typed('run', run_dir)} prompt='...'")
    print(f"      python -m launch.evaluate {typed('run', run_dir)}")
    print(f"      python -m launch.train {typed('resume', run_dir)} train.num_steps=N")
    print_result(result)
    return result["val_loss"]


def dry_run(run: Any, config: DictConfig) -> None:
    """Print what would run: the checks have passed."""
    from launch import slurm, spawn

    run_dir = Path(config.resume or config.run_dir or f"runs/{run.experiment_name}/TIME-ID")
    if run.launch.kind == "inline":
        print("would train in this process")
    elif run.launch.kind == "slurm":
        print(slurm.batch_script(run, run_dir), end="")
    else:
        rendezvous = spawn.Rendezvous(run.launch.master_addr, run.launch.master_port or 29500)
        print(shlex.join(spawn.command(run.launch, run.launch.num_nodes, rendezvous,
                                       [str(run_dir / "supervisor.json"), "0"], run.launch.hostfile)))
    print_result({"dry_run": True, "problems": []})


if __name__ == "__main__":
    run_main("train", train)
