"""Compare variants at equal training FLOPs on your own data, and say which to take.

python -m launch.compare [what launch.train takes] [variants=[top_k,dense,adaptive]]
[sizes=[tiny,small]] [seeds=3] [target='experiment=... launch.num_devices=...' device=H100]

Prints the runs with what they cost, trains them one after another, and writes DIR/compare.html with
a decision. resume=DIR goes on where it was ended; launch.dry_run=true only prints the plan.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.compare")

import contextlib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from launch import plan
from launch.command.arguments import setting
from launch.command.main import run_main
from launch.command.messages import print_result
from launch.command.refusals import explained
from launch.comparing.settings import OWN, CompareConfig
from launch.config.build import ConfigError, record
from launch.config.length import with_length
from launch.config.overrides import plain, typed, typed_overrides
from launch.config.parse import check_sources, check_tokenizer, parse, world_size
from launch.history.table import print_table
from launch.job.worker import give_way, require_memory
from launch.saved.defaults import complete
from launch.saved.files import new_run_dir
from train.config.commands.plan import PlanCommandConfig
from train.files.durable import write_json, write_text
from train.files.manifest import require_owned

if TYPE_CHECKING:
    from launch.comparing.cost import Rate
    from launch.comparing.grid import Cell
    from launch.comparing.work import Outcome

NAME = "compare.json"
"""In the comparison's directory: what is compared."""


def main(config: DictConfig) -> None:
    """Plan, run, measure, decide."""
    from launch.comparing.cost import assumed_rate, is_open
    from launch.comparing.grid import cells_of, of_the_runs
    from launch.comparing.work import outcome_of

    told = typed_overrides()
    common = of_the_runs(told)
    folder = Path(config.resume) if config.resume is not None else None
    own = plain(OmegaConf.masked_copy(config, list(OWN)))
    if folder is not None:
        own, common = _kept(folder, own, told, common)
    elif config.run_dir is not None and (Path(config.run_dir) / NAME).exists():
        raise ValueError(
            f"run_dir={config.run_dir} already holds a comparison; go on with it by "
            f"{typed('resume', config.run_dir)}, or choose another directory"
        )
    settings: CompareConfig = record(OmegaConf.create(own), CompareConfig)
    _check_target(settings)
    cells = cells_of(settings, common)
    _check(settings, cells)

    outcomes = {}
    if folder is not None:
        _refuse_changes(folder, cells)
        outcomes = {c.name: found for c in cells if (found := outcome_of(folder, c)) is not None}
    rate = assumed_rate(cells, settings.mfu)
    left = _tell_plan(settings, cells, outcomes, rate)
    if config.launch.dry_run:
        print_result({"dry_run": True, "runs": len(cells), "seconds_left": left})
        return

    if folder is None:
        folder = Path(config.run_dir or new_run_dir("compare"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"directory {folder}; ended early, it goes on by {typed('resume', folder)}", flush=True)

    from train.rank.lock import RunLock

    with RunLock(folder, give_way):
        write_json(folder / NAME, {"settings": own, "overrides": common})
        todo = [c for c in cells if is_open(outcomes.get(c.name), settings.retry_failed)]
        _run(settings, folder, cells, todo, outcomes, rate)
        _finish(settings, folder, cells, outcomes)


# --- before anything runs -------------------------------------------------------------------------


def _kept(
    folder: Path, own: dict[str, Any], told: Sequence[str], common: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Settings and overrides of a comparison that goes on: its saved ones, with what was typed of
    the comparison's own on top.

    Raises:
        ValueError: there is none; settings of its runs were typed.
    """
    from launch.comparing.grid import key_of

    path = folder / NAME
    if path.exists():  # it says what the runs load and where they write
        require_owned(folder)
        require_owned(path)
    try:
        saved = json.loads(path.read_bytes())
        before, overrides = dict(saved["settings"]), list(saved["overrides"])
    except FileNotFoundError:
        raise ValueError(
            f"resume={folder} holds no comparison ({NAME} is missing); give the directory that "
            "launch.compare has printed"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start a new comparison") from error
    new = [o for o in common if o not in overrides]
    if new:
        raise ValueError(
            f"resume={folder} keeps the settings of its runs; drop {', '.join(new)}, or start a "
            "new comparison"
        )
    chosen = {key_of(o).partition(".")[0] for o in told}
    return {key: own[key] if key in chosen else before.get(key, own[key]) for key in own}, overrides


def _check(settings: CompareConfig, cells: Sequence[Cell]) -> None:
    """What would make every run fail is said before the first."""
    run = cells[0].run
    check_tokenizer(run)
    check_sources(run)
    speed = settings.speed
    asked = speed.context + speed.new_tokens
    problems = []
    if speed.new_tokens and asked > run.model.max_seq_len:
        problems.append(
            f"speed.context and speed.new_tokens are {asked} tokens together; model.max_seq_len is "
            f"{run.model.max_seq_len}"
        )
    if problems:
        raise ConfigError(problems)
    for cell in {(c.size, c.variant): c for c in cells}.values():
        if cell.run.launch.starts_here:
            require_memory(cell.run, cell.num_ranks, cell.run.launch.num_devices)


def _refuse_changes(folder: Path, cells: Sequence[Cell]) -> None:
    from launch.comparing.work import changed

    found = changed(folder, cells)
    if found:
        raise ConfigError(
            [f"resume={folder}: {line}; put it back, or start a new comparison" for line in found]
        )


def _tell_plan(
    settings: CompareConfig,
    cells: Sequence[Cell],
    outcomes: dict[str, Outcome],
    rate: Rate,
) -> float:
    """Print what is run and what it takes; returns the seconds."""
    from launch.comparing.cost import HEAD, plan_lines, seconds_left

    if settings.question is not None:
        print(f"question: {settings.question}")
    source = (
        f"{settings.flops:.3g} training FLOPs"
        if settings.flops is not None
        else f"the training FLOPs of {settings.variants[0]} at its train.num_steps"
    )
    print(
        f"equal FLOPs: every run of a size spends {source}, forward and backward, at the experts "
        "per token that its budget asks for"
    )
    print_table(HEAD, plan_lines(cells, outcomes, rate, settings.retry_failed))
    left = seconds_left(cells, outcomes, rate, settings.retry_failed)
    timed = any(outcome.state == "done" for outcome in outcomes.values())
    print(
        f"{len(cells)} runs, one after another; about {left / 60:.1f} minutes left "
        f"({'as measured' if timed else rate.source})",
        flush=True,
    )
    return left


# --- running and deciding -------------------------------------------------------------------------


def _run(
    settings: CompareConfig,
    folder: Path,
    cells: Sequence[Cell],
    todo: Sequence[Cell],
    outcomes: dict[str, Outcome],
    rate: Rate,
) -> None:
    from launch.comparing.cost import seconds_left
    from launch.comparing.grid import directory_of
    from launch.comparing.work import run_cell
    from launch.saved.files import read_result

    for number, cell in enumerate(todo, start=len(cells) - len(todo) + 1):
        outcome = outcomes[cell.name] = run_cell(folder, cell)
        left = seconds_left(todo[todo.index(cell) + 1 :], outcomes, rate, False)
        if any(o.state == "done" for o in outcomes.values()):
            left = seconds_left(cells, outcomes, rate, False)
        result = read_result(directory_of(folder, cell)) or {}
        loss = result.get("val_loss")
        said = f"held-out loss {loss:.4f}" if outcome.state == "done" and loss else outcome.state
        if outcome.state == "failed":
            said += f", exit code {outcome.code}: {_cause(outcome.lines)}"
        print(
            f"[{number}/{len(cells)}] {cell.name}: {said}, {outcome.seconds:.0f} s; about "
            f"{left / 60:.1f} minutes left",
            flush=True,
        )


def _cause(lines: Sequence[str]) -> str:
    """The first error of those that a command has told, or the end of its traceback."""
    if not lines:
        return "it said nothing"
    return lines[0] if lines[0].startswith("error") else lines[-1]


def _finish(
    settings: CompareConfig, folder: Path, cells: Sequence[Cell], outcomes: dict[str, Outcome]
) -> None:
    """Measure, decide, and write the page."""
    from launch.comparing.page import render
    from launch.comparing.result import gather

    result = gather(
        settings, cells, outcomes, folder, lambda line: print(line, file=sys.stderr, flush=True)
    )
    result["target"] = _target(settings)
    write_json(folder / "result.json", result)
    page = folder / "compare.html"
    write_text(page, render(result))

    decision = result["decision"]
    print(f"\n{decision['sentence']}")
    for reason in decision["reasons"]:
        print(f"  {reason}")
    print(f"  what would change it: {decision['flips']}")
    print(f"{page}: open it in a browser")
    print_result(
        {
            "directory": str(folder),
            "page": str(page),
            "decision": decision,
            "effort": result["effort"],
        }
    )


# --- at the target's scale ------------------------------------------------------------------------


def _check_target(settings: CompareConfig) -> None:
    """Raises ConfigError where no variant can run there, with what is wrong with the first."""
    if settings.target is None:
        return
    asked = PlanCommandConfig(settings.device, settings.mfu, settings.price)
    problems = asked.problems()
    try:
        plans = [_target_run(settings, variant) for variant in settings.variants]
    except ValueError as error:
        raise ConfigError([*problems, f"target={settings.target}: {error}"]) from error
    if all(isinstance(found, list) for found in plans):
        problems += [f"target={settings.target}: {line}" for line in plans[0]]
    if problems:
        raise ConfigError(problems)


def _target_run(settings: CompareConfig, variant: str) -> Any:
    """The RunConfig of a variant there, or what is wrong with it.

    Raises:
        ValueError: the target is no list of settings.
    """
    overrides = [*shlex.split(settings.target or ""), f"variant={variant}"]
    try:
        arranged = [setting(override) for override in overrides]
        config = with_length(complete(compose("train", overrides=arranged)), arranged)
        return parse(plain(config), world_size(config))
    except HydraException as error:
        return explained(error)
    except ConfigError as error:
        return error.problems


def _target(settings: CompareConfig) -> dict[str, Any] | None:
    """launch.plan's numbers of every variant; what a variant contradicts is said in its place."""
    if settings.target is None:
        return None
    asked = PlanCommandConfig(settings.device, settings.mfu, settings.price)
    runs = {variant: _target_run(settings, variant) for variant in settings.variants}
    return {
        "overrides": settings.target,
        "device": settings.device,
        "mfu": settings.mfu,
        "plans": {
            variant: {"problems": run} if isinstance(run, list) else _plan(run, asked)
            for variant, run in runs.items()
        },
    }


def _plan(run: Any, asked: PlanCommandConfig) -> dict[str, Any]:
    launch = run.launch
    number = 1 if launch.kind == "inline" else launch.num_devices * launch.num_nodes
    with contextlib.redirect_stdout(io.StringIO()):
        found = plan.describe(run, number) | plan.told_of_device(run, number, asked)
    kept = {key: found[key] for key in ("parameters", "active_parameters", "flops_per_token")}
    kept |= {key: found[key] for key in ("fits", "cost") if key in found}
    kept["memory_bytes"] = found["memory_bytes"]["total"]
    kept["tokens"] = found["tokens_per_step"] * run.train.num_steps
    if "hours" in found:
        seconds = 3600 * found["hours"]
        kept |= {"seconds": seconds, "pessimistic_seconds": 2 * seconds}
        kept["device_hours"] = found["hours"] * number
    return kept


if __name__ == "__main__":
    run_main("compare", main)
