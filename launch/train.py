"""Train a model, or continue a run: python -m launch.train [overrides]. Inline, or as parent of a
launcher, or as one of its ranks.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.train")
import json
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.main import Job, run_main
from launch.command.messages import fail, print_result
from launch.config.epochs import rows_of_epochs
from launch.config.length import with_length
from launch.config.overrides import literal, plain, quoted, typed, typed_overrides
from launch.config.parse import world_size
from launch.job.worker import give_way, require_memory, stopped_before_training, tell_changes, work
from launch.launchers import hosts
from launch.layouts.micro_batch import is_asked, with_micro_batch
from launch.layouts.trial import described, largest_that_runs
from launch.process.identity import is_worker, rank
from launch.process.secrets import forwarded_environment, redact_text
from launch.saved.configs import load_run_config
from launch.saved.files import new_run_dir, refuse_used_run_dir, save_config
from launch.saved.initial import check_weights
from launch.saved.resume import examine_restart, with_saved_config
from launch.saved.teacher import check_teacher
from train.rank.stop import Stopped, StopSignal


def train(config: DictConfig) -> float | None:
    """Validate, then train here or start ranks; returns the held-out loss, which Hydra sweepers
    minimise.
    """
    from launch.config.build import ConfigError
    from launch.config.parse import check_sources, check_tokenizer, parse
    from launch.config.unread import unread

    config = with_saved_config(config)

    if is_worker():
        refuse_second_launcher()
        if "saved_config" not in config:
            require_known_epochs(config)
        return work(config)

    if "saved_config" in config and config.get("trial"):
        try_out(load_run_config(Path(config.saved_config)))
        return None

    if "saved_config" in config:  # the batch script of launch=slurm
        config = load_run_config(Path(config.saved_config))
        tell_edits(config, Path(config.run_dir))
        return supervise(config, parse(plain(config), world_size(config)))

    # A number from here on: the run saves it, and is resumed with it.
    planned = None
    if is_asked(config):
        config, planned = with_micro_batch(config)
        print(planned.said, flush=True)
    run = parse(plain(config), world_size(config))
    if problems := unread(typed_overrides(), run):
        raise ConfigError(problems)
    if run.launch.hostfile:
        hosts.check(run.launch)

    # The nodes of a Slurm job may see data and a tokenizer that the machine which submits does not.
    if run.launch.kind != "slurm":
        check_tokenizer(run)
        check_sources(run)

    if config.resume is None:
        for line in check_weights(run.init):
            print(line, flush=True)
    for line in check_teacher(run):
        print(line, flush=True)

    # Secrets in launch.forward_env are refused before anything is written.
    forwarded_environment(os.environ, run.launch.forward_env)

    node = run.launch.node_rank or 0
    if node == 0:  # another node's command may be started again while the run goes on
        tell_changes(config, run)

    if run.launch.by_node and not (config.run_dir or config.resume):
        raise ValueError(
            "launch.node_rank needs run_dir=DIR (or resume=DIR), "
            "the same on every node and on a file system they share"
        )

    if run.launch.dry_run:
        if planned is not None:
            print(described(run, planned.sizes))
        dry_run(run, config)
        return None

    if run.launch.starts_here:
        require_memory(run, world_size(config), run.launch.num_devices)
    hosts.refuse_taken_port(run.launch)
    hosts.require_way(run.launch)

    # The command on node 0 supervises; those on other nodes obey it.
    if node > 0:
        from launch.job.follower import follow

        raise SystemExit(follow(run, Path(config.resume or config.run_dir)))

    # Only now, when nothing else is in the way: it takes a start of all ranks for each size.
    if planned is not None:
        refuse_used_run_dir(config)
        config = largest_that_runs(config, planned.sizes)
        run = parse(plain(config), world_size(config))

    if run.train.num_epochs is not None:
        config, run = with_known_epochs(config, run)

    # From here on things are written: the run directory, and its config for every rank.
    refuse_used_run_dir(config)
    with open_dict(config):
        config.run_dir = literal(
            str(
                Path(config.resume)
                if config.resume
                else Path(config.run_dir or new_run_dir(run.experiment_name))
            )
        )
    save_config(config)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        _of_sweep[HydraConfig.get().job.num] = str(config.run_dir)
    return supervise(config, run)


_of_sweep: dict[int, str] = {}
"""Job of the sweep that this process runs -> its run directory."""


def tell_sweep(jobs: list[Job]) -> None:
    """A table of the jobs by their held-out loss, and which was the best where losses compare."""
    from launch.history.comparable import incomparable, measure_of
    from launch.history.past import read_past
    from launch.history.table import print_table

    if len(jobs) < 2:
        return
    same = set.intersection(*(set(job.overrides) for job in jobs))
    rows = [
        {
            "job": number,
            "overrides": [o.lstrip("+") for o in job.overrides if o not in same],
            "val_loss": job.result,
            "run_dir": _of_sweep.get(number),
        }
        for number, job in enumerate(jobs)
    ]
    done = [row for row in rows if isinstance(row["val_loss"], float)]
    order = sorted(done, key=lambda row: (not math.isfinite(row["val_loss"]), row["val_loss"]))
    print("\nsweep, by held-out loss")
    print_table(
        ["job", "settings", "val_loss", "run"],
        [
            [
                str(row["job"]),
                redact_text(" ".join(row["overrides"])),
                f"{row['val_loss']:.4f}" if row in done else "failed",
                row["run_dir"] or "-",
            ]
            for row in (*order, *(row for row in rows if row not in done))
        ],
    )

    directories = [row["run_dir"] for row in done if row["run_dir"]]
    lengths = [read_past(d).settings["train"]["seq_len"] for d in directories]
    reason = incomparable(list(map(measure_of, directories, lengths)))
    best = order[0] if order and reason is None else None
    if best is not None:
        print(f"best: job {best['job']}, {best['run_dir']}")
    elif done:
        print(f"no job is best: {reason}")
    if len(directories) > 1:
        listed = shlex.quote(f"run=[{','.join(directories)}]")
        print(f"next: python -m launch.runs {listed} compare=true")
    print_result({"sweep": rows, "best": None if best is None else best["job"]})


def with_known_epochs(config: DictConfig, run: Any) -> tuple[DictConfig, Any]:
    """The config with the steps that train.num_epochs takes, for which the data must be prepared.

    Raises:
        ConfigError: the run is not possible with so many steps.
    """
    from launch.command.progress import reading_bar
    from launch.config.parse import parse
    from train.data.prepare import prepare

    if run.launch.kind == "slurm":
        require_known_epochs(config)
        return config, run
    with reading_bar() as (report, progress):
        prepare(run.data, report, progress=progress)
    with open_dict(config):
        config = with_length(config, (), rows_of_epochs(config))
    run = parse(plain(config), world_size(config))
    steps = run.train.num_steps
    print(f"{run.train.num_epochs:g} epochs are {steps:,} steps", flush=True)
    return config, run


def require_known_epochs(config: DictConfig) -> None:
    """Where nobody prepares the data before the steps are counted."""
    if OmegaConf.select(config, "train.num_epochs") is not None and rows_of_epochs(config) is None:
        raise ValueError(
            "train.num_epochs needs the data prepared before this command: python -m "
            "launch.prepare with the same data= settings, or give train.num_steps"
        )


def refuse_second_launcher() -> None:
    """A rank starts no ranks: whoever asks it to has launched the command twice."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if chosen.get("launch", "inline") != "inline":
        raise ValueError(
            f"launch={chosen['launch']} starts the ranks, but this process is already rank "
            f"{rank()} of {os.environ['WORLD_SIZE']} (RANK, LOCAL_RANK and WORLD_SIZE say so): run "
            "the command once, without a launcher before it, or drop launch="
        )


def supervise(config: DictConfig, run: Any) -> float | None:
    """Own the run directory and see the job through: in this process, by a supervisor, or through
    Slurm's queue.
    """
    from launch.launchers import slurm
    from train.rank.lock import RunLock

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
        if (
            run.launch.kind == "slurm"
            and run.launch.slurm.requeue
            and json.loads((run_dir / "result.json").read_text())["stopped"]
        ):
            slurm.requeue()

        loss = finish(config, run, stop)

    if stop.received and HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise Stopped  # the other jobs of the sweep as well
    return loss


def try_out(config: DictConfig) -> None:
    """A few steps in a scratch folder, here or by ranks: whether they fit is all that is asked."""
    from launch.config.parse import parse

    run = parse(plain(config), world_size(config))
    with StopSignal(second_interrupt_ends=True) as stop:
        if run.launch.kind == "inline":
            work(config, stop, trial=True)
        else:
            start_ranks(config, run, stop, lambda: True, trial=True)


def tell_edits(config: DictConfig, run_dir: Path) -> None:
    """The same for a job that goes on by itself after it was queued or started again."""
    for line in examine_restart(config, run_dir):
        print(line, flush=True)


def start_ranks(
    config: DictConfig,
    run: Any,
    stop: StopSignal,
    still_ours: Callable[[], bool],
    trial: bool = False,
) -> None:
    """A job of ranks to its end. trial: it tries whether it fits, and keeps nothing."""
    from launch.config.build import ConfigError
    from launch.config.parse import check_tokenizer, parse
    from launch.job.supervisor import Supervisor
    from launch.launchers import start as spawn
    from train.data.prepare import prepare

    # Without Slurm it was looked at before the run directory was made.
    if run.launch.kind == "slurm":
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
    arguments += ["+trial=true"] if trial else []

    try:
        code = Supervisor(
            run, run_dir, arguments, against, env, still_ours, stop_asked=int(stop.received)
        ).run()
    except Stopped:  # before any rank was started
        stopped_before_training(run_dir)
        return

    if code:
        fail(
            [
                f"the job ended with exit code {code}; the cause stands above and in "
                f"{config.run_dir}/supervisor.jsonl, "
                f"stacks and batches in {config.run_dir}/failures"
            ],
            code=code,
        )


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
                for piece in sample(
                    str(run_dir),
                    run.train.sample_prompt,
                    max_new_tokens=120,
                    temperature=0.8,
                    top_p=0.95,
                    seed=run.seed,
                ):
                    print(piece, end="", flush=True)
        except Stopped:
            print("\nasked to stop: the sample is left", end="")
        except Exception as error:  # the run itself is done
            print(f"no sample: {error}", end="")
        print("\n------------------------------------------------------------------------")

    if result["val_loss"] is not None and not result["stopped"]:
        print(
            f"held-out loss {result['val_loss']:.4f} nats per token; unigram entropy "
            f"{result['unigram_entropy']:.4f}"
        )

    if result.get("skipped_steps"):
        print(
            f"{result['skipped_steps']} of {result['step']} steps were skipped, their loss or "
            f"gradient was not finite: {run_dir}/failures holds their batches"
        )

    print(f"run directory {run_dir} (metrics.jsonl, routing.jsonl, checkpoints/)")
    print(f"next: python -m launch.report {typed('run', run_dir)}")
    if run.data.has_tokenizer:
        print(f"      python -m launch.generate {typed('run', run_dir)} prompt='...'")
    print(f"      python -m launch.evaluate {typed('run', run_dir)}")
    print(f"      python -m launch.train {typed('resume', run_dir)} train.num_steps=N")

    print_result(result)
    val_loss: float | None = result["val_loss"]
    return val_loss


def dry_run(run: Any, config: DictConfig) -> None:
    """Print what would run: the checks have passed."""
    from launch.launchers import slurm
    from launch.launchers import start as spawn

    run_dir = Path(config.resume or config.run_dir or f"runs/{run.experiment_name}/TIME-ID")
    if run.launch.kind == "inline":
        print("would train in this process")
    elif run.launch.kind == "slurm":
        print(slurm.batch_script(run, run_dir), end="")
    else:
        rendezvous = spawn.Rendezvous(run.launch.master_addr, run.launch.master_port or 29500)
        print(
            shlex.join(
                spawn.command(
                    run.launch,
                    run.launch.num_nodes,
                    rendezvous,
                    [str(run_dir / "supervisor.json"), "0"],
                    run.launch.hostfile,
                )
            )
        )
    print_result({"dry_run": True, "problems": []})


if __name__ == "__main__":
    run_main("train", train, tell_sweep)
