"""Damaged run directories: what is wrong with them is told, and no other model is loaded.

    python tests/end_to_end/damages.py --seed 1 --number 300 --out found.json

Each case spoils one or two files of a run (its checkpoints, configs and records) or of its token
store: flipped bits, cut, emptied, removed, exchanged between checkpoints, replaced by something
else, values of YAML and JSON edited. Then the run is evaluated, and resumed up to its first step,
in this process, through the commands' own code. Allowed are the logits of the undamaged checkpoint
that the command names, or one clear error with an exit code of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import yaml  # noqa: E402
from commandline import TINY, write_text  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import open_dict  # noqa: E402

from launch import evaluate  # noqa: E402
from launch import train as command  # noqa: E402
from launch.command import main as common  # noqa: E402
from launch.command.interrupt import Interrupts  # noqa: E402
from launch.config.overrides import quoted  # noqa: E402
from launch.job import worker  # noqa: E402
from tests.lone import PLACE  # noqa: E402
from train import loop  # noqa: E402
from train.rank.runtime import _leave  # noqa: E402
from train.rank.stop import StopSignal  # noqa: E402

CODES = (2, 65, 69, 70, 73, 74)
STEPS, SAVED = 8, (4, 6, 8)
TOKENS = torch.arange(32).reshape(1, 32) * 7 % 256
COMMON = (
    *TINY,
    f"train.num_steps={STEPS + 4}",
    f"train.stop_after_step={STEPS}",
    "checkpoint.save_interval=2",
    "checkpoint.keep_last=3",
    "train.eval_max_sequences=2",
    "router=threshold",
    "balance=none",
    "router.budget=1.5",
    "budget.warm_start_steps=2",
    "budget.blend_steps=2",
)


@dataclass(frozen=True)
class Loaded:
    """What a command had loaded when it began to compute."""

    checkpoint: str
    logits: torch.Tensor
    rows: tuple[int, ...]
    """Token ids of the first batch."""


@dataclass(frozen=True)
class Outcome:
    loaded: Loaded | None
    code: int
    output: str
    crash: str | None
    """Traceback of an exception that no command explains."""


class _Enough(Exception):
    """What was loaded is known: no need to go on."""


def composed(name: str, *overrides: str) -> Any:
    """What the command line would hand to a command."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(name, overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    config = config.copy()
    with open_dict(config):
        del config["hydra"]
    return config


# --- loading --------------------------------------------------------------------------------------


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.logits(TOKENS).clone()


class Run:
    """A small run and its store; `spoiled` copies stand at the same paths, since a config names the
    store.
    """

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, folder / "whole"
        self.run_dir, self.cache = folder / "run", folder / "cache"
        data = write_text(folder)
        config = composed("train", *COMMON, *data, f"run_dir={self.run_dir}")
        with self._quiet() as output:
            command.save_config(config)
            with StopSignal() as stop:
                worker._work(config, stop)
        assert output is not None
        self.whole.mkdir()
        shutil.copytree(self.run_dir, self.whole / "run")
        shutil.copytree(self.cache, self.whole / "cache")
        self.expected: dict[tuple[str, str], Loaded] = {}
        for kind in ("evaluate", "resume"):
            for step in SAVED:
                self.restore()
                for other in SAVED:
                    if other != step:
                        shutil.rmtree(self.run_dir / "checkpoints" / f"step-{other:08d}")
                found = self.load(kind)
                assert found.loaded is not None, f"{found.output}\n{found.crash}"
                self.expected[kind, found.loaded.checkpoint] = found.loaded
        self.restore()

    def restore(self) -> None:
        for name in ("run", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.whole / name, self.folder / name, symlinks=True)

    def load(self, kind: str) -> Outcome:
        """Evaluate or resume the run up to where it computes."""
        with self._quiet() as output:
            loaded, code, crash = None, 0, None
            try:
                loaded = (_evaluated if kind == "evaluate" else _resumed)(self.run_dir)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except Exception:
                crash = traceback.format_exc()
            finally:
                _leave_group()
        return Outcome(loaded, code, output.getvalue(), crash)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[io.StringIO]:
        """What is printed and logged meanwhile."""
        output = io.StringIO()
        handler = logging.StreamHandler(output)
        root = logging.getLogger()
        level, before = root.level, root.handlers[:]
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                yield output
        finally:
            root.handlers[:] = before
            root.setLevel(level)


def _explained(function: Callable[[Any], Any], config: Any) -> Any:
    return common._explained(function, config, Interrupts())


def _evaluated(run_dir: Path) -> Loaded:
    seen: list[Loaded] = []
    from train.checkpoint import writer as checkpoint

    def load(model: torch.nn.Module, source: Any) -> None:
        real(model, source)
        folder = getattr(source, "checkpoint", source)
        seen.append(Loaded(folder.name, logits_of(model), ()))

    def batches(model: Any, rows: Any, *rest: Any) -> None:
        first = next(iter(rows))
        seen.append(
            Loaded(seen[0].checkpoint, seen[0].logits, tuple(first.input_ids.flatten().tolist()))
        )
        raise _Enough

    real = checkpoint.load_weights
    config = composed("evaluate", f"run={quoted(run_dir)}", "batch_size=2")
    with (
        mock.patch("train.checkpoint.writer.load_weights", load),
        mock.patch("train.trained.evaluate.evaluate", batches),
        contextlib.suppress(_Enough),
    ):
        _explained(_passing_enough(evaluate.main), config)
    return seen[-1]


def _resumed(run_dir: Path) -> Loaded:
    seen: list[Loaded] = []

    def train(run: Any, keeps: bool) -> None:
        batches = run.loader.next_step(1)
        seen.append(
            Loaded(
                f"step-{run.progress.step:08d}",
                logits_of(run.engine.module),
                tuple(batches[0].input_ids.flatten().tolist()),
            )
        )
        raise _Enough

    overrides = (f"++resume={quoted(run_dir)}", f"++train.stop_after_step={STEPS + 2}")
    config = composed("train", *overrides)
    with mock.patch.object(loop, "train", train), contextlib.suppress(_Enough):
        _explained(_passing_enough(command.train), config)
    return seen[-1]


def _passing_enough(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The command's own explanations are for its errors, not for ours."""

    def call(config: Any) -> None:
        with contextlib.suppress(_Enough):
            function(config)

    return call


def _leave_group() -> None:
    """After an error a process ends without leaving; this one goes on."""
    if dist.is_initialized():
        _leave(dict.fromkeys(PLACE))


# --- spoiling -------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    2,
    10**30,
    1e308,
    float("nan"),
    "",
    "x",
    "${oc.env:HOME}",
    "../..",
    True,
    False,
    [],
    {},
    [[]],
    {"a": {"b": 1}},
    "é\u0000",
    "step-00000099",
    0.5,
    ["a"] * 3,
)


def edited(node: Any, chance: random.Random) -> str:
    """Change one value somewhere inside a container; returns what was done."""
    places: list[tuple[Any, Any]] = []
    todo = [node]
    while todo:
        here = todo.pop()
        for key, value in list(here.items() if isinstance(here, dict) else enumerate(here)):
            places.append((here, key))
            if isinstance(value, (dict, list)):
                todo.append(value)
    if not places:
        return "nothing to edit"
    here, key = chance.choice(places)
    before = here[key]
    how = chance.randrange(4)
    if how == 0:
        del here[key]
        return f"{key} removed"
    if how == 1 and isinstance(before, (int, float)) and not isinstance(before, bool):
        here[key] = before + chance.choice((1, -1, 0.25)) if before else 1
    elif how == 1 and isinstance(before, bool):
        here[key] = not before
    elif how == 2 and isinstance(here, dict):
        here[f"{key}x"] = here.pop(key)
        return f"{key} renamed"
    else:
        here[key] = chance.choice(VALUES)
    return f"{key}: {str(before)[:40]!r} -> {str(here[key])[:40]!r}"


def spoil(run: Run, chance: random.Random, only: str = "") -> str:
    """Damage one file, or one place, of the run or its store; returns what was done.

    only: a part of the path that the file must have.
    """
    files = sorted(
        p
        for folder in (run.run_dir, run.cache)
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink()
    )
    files = [path for path in files if only in str(path.relative_to(run.folder))]
    if not files:  # by the damage before
        return "nothing to spoil"
    likely = [p for p in files if p.suffix in (".json", ".yaml") or "checkpoints" in p.parts]
    path = chance.choice(likely if likely and chance.random() < 0.65 else files)
    shown = path.relative_to(run.folder)
    content = path.read_bytes()
    kinds = [
        "flip",
        "flip",
        "cut",
        "remove",
        "empty",
        "other file",
        "garbage",
        "folder",
        "dangling link",
        "append",
        "zeros",
    ]
    kinds += ["edit"] * 8 if path.suffix in (".json", ".yaml") else []
    kinds += (
        ["exchange"] * 4
        if "checkpoints" in path.parts and path.parent.name != "checkpoints"
        else []
    )
    kinds += ["remove folder", "exchange folders"]
    kind = chance.choice(kinds)
    if kind == "flip" and content:
        spoiled = bytearray(content)
        for _ in range(chance.choice((1, 1, 3, 64))):
            spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
        path.write_bytes(spoiled)
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content) + 1)])
    elif kind == "remove":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other file":
        other = chance.choice(files)
        path.write_bytes(other.read_bytes())
        kind = f"is {other.relative_to(run.folder)}"
    elif kind == "garbage":
        path.write_bytes(
            chance.choice(
                (
                    b"\xff\xfe\x00",
                    b"{",
                    b"[" * 3000,
                    b"null",
                    b"[1, 2]",
                    b"- a\n- b\n",
                    b"\x80\x04N.",
                    b'{"a": 1',
                    b'"text"',
                    b"1e999",
                    chance.randbytes(200),
                )
            )
        )
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "dangling link":
        path.unlink()
        path.symlink_to("nowhere")
    elif kind == "append":
        path.write_bytes(content + chance.choice((b"\n", b"x", content, b"\x00" * 10)))
    elif kind == "zeros" and content:
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + b"\x00" * len(content[at:]))
    elif kind == "edit":
        loads, dumps = (
            (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
        )
        data = loads(content)
        kind = f"edit {edited(data, chance)}"
        path.write_text(dumps(data))
    elif kind == "exchange":
        steps = sorted((run.run_dir / "checkpoints").glob("step-*"))
        mine = next(s for s in steps if s in path.parents)
        others = [s for s in steps if s != mine]
        other = (chance.choice(others) if others else mine) / path.relative_to(mine)
        if other.is_file():
            theirs = other.read_bytes()
            other.write_bytes(content)
            path.write_bytes(theirs)
    elif kind == "remove folder":
        folder = chance.choice(
            sorted(
                p for p in run.folder.rglob("*") if p.is_dir() and run.whole not in (p, *p.parents)
            )
        )
        shutil.rmtree(folder)
        shown = folder.relative_to(run.folder)
    elif kind == "exchange folders":
        folders = sorted((run.run_dir / "checkpoints").glob("step-*"))
        if len(folders) < 2:  # by the damage before
            return "nothing to exchange"
        one, other = chance.sample(folders, 2)
        part = chance.choice(("", "weights"))
        if not ((one / part).is_dir() and (other / part).is_dir()):
            return "nothing to exchange"
        aside = run.folder / "aside"
        (one / part).rename(aside)
        (other / part).rename(one / part)
        aside.rename(other / part)
        shown = one.relative_to(run.folder) / part
    return f"{shown}: {kind}"


# --- judging --------------------------------------------------------------------------------------


def judged(run: Run, kind: str, outcome: Outcome) -> tuple[str, str | None]:
    """A word for what happened, and what is wrong with it."""
    if outcome.crash is not None:
        return "crash", f"not explained: {outcome.crash.strip().splitlines()[-1][:300]}"
    if outcome.loaded is None:
        errors = [line for line in outcome.output.splitlines() if line.startswith("error")]
        if outcome.code not in CODES:
            return "refused", f"exit code {outcome.code}"
        if not errors or "Traceback" in outcome.output:
            return "refused", f"no clear error: {outcome.output[-300:]!r}"
        return f"refused {outcome.code}", None
    expected = run.expected.get((kind, outcome.loaded.checkpoint))
    if expected is None:
        return "wrong", f"loaded {outcome.loaded.checkpoint}, which was never saved"
    newest = outcome.loaded.checkpoint == max(name for k, name in run.expected if k == kind)
    told = "changed: " in outcome.output
    if not torch.equal(expected.logits, outcome.loaded.logits):
        return (
            ("told", None)
            if told
            else ("wrong", f"{outcome.loaded.checkpoint} gives other logits, not a word")
        )
    if expected.rows != outcome.loaded.rows:
        return (
            ("told", None)
            if told
            else ("wrong", f"{outcome.loaded.checkpoint} gets other data, not a word")
        )
    return "right" if newest else "right, an older checkpoint", None


def attack(run: Run, seed: int, only: str = "") -> list[dict[str, Any]]:
    """One damaged run: what was done to it and what the commands made of it."""
    found = []
    for kind in ("evaluate", "resume"):
        chance = random.Random(f"damage {seed}")
        run.restore()
        done = [spoil(run, chance, only) for _ in range(chance.choice((1, 1, 1, 2)))]
        outcome = run.load(kind)
        word, problem = judged(run, kind, outcome)
        found.append(
            {
                "seed": seed,
                "damage": done,
                "command": kind,
                "outcome": word,
                "problem": problem,
                "said": outcome.output[-1500:] if problem else None,
                "crash": outcome.crash,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--only", default="", help="a part of the paths that are spoiled")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="loadstone-damages-") as folder:
        run = Run(Path(folder))
        for seed in range(options.seed, options.seed + options.number):
            found += attack(run, seed, options.only)
            for fact in found[-2:]:
                if fact["problem"]:
                    print(
                        json.dumps({k: fact[k] for k in ("seed", "damage", "command", "problem")}),
                        flush=True,
                    )
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    count = collections.Counter(f"{f['command']}: {f['outcome']}" for f in found)
    print(
        json.dumps(
            {
                "cases": options.number,
                "problems": sum(f["problem"] is not None for f in found),
                **count,
            }
        )
    )
    raise SystemExit(1 if any(f["problem"] for f in found) else 0)


if __name__ == "__main__":
    main()
