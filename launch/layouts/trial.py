"""train.micro_batch_size=auto, after the plan: whether a size fits is tried. A trial is a short job
under the launcher and the layout of the run, in processes of its own and a scratch folder: two
steps of full rows, no checkpoint, no evaluation, no tracker.

Its rows are drawn: documents that are longer than a row, so that none is padded, every position is
a target, and attention reaches as far as it ever will. A run that learns from a teacher is tried on
its own rows, which alone a teacher knows. What a trial cannot see is how experts' load moves later.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.messages import fail
from launch.config.build import ConfigError
from launch.config.overrides import literal, plain, quoted
from launch.config.parse import parse, world_size
from launch.process.children import last_lines, out_of_memory_kills, run_child
from launch.process.exits import FAILED
from launch.saved.files import save_config
from train.config.objective import DistilConfig
from train.rank.heartbeat import PIPE, STACKS

STEPS = 2
"""The second has the optimizer's state beside its activations."""
MICRO_BATCHES = 2
"""Of a step at most, and as many as a pipeline has stages: the second finds gradients there."""
DOCUMENTS, ROWS = 3, 8
"""Documents that are drawn, and how many rows each is long."""
NO_MEMORY = "out_of_memory"
"""Kind of failure (launch/process/exits.py) after which a smaller size is tried."""


@dataclass(frozen=True)
class Trial:
    """How one ended."""

    code: int
    """Of its command; below 0: the signal that ended it."""
    failure: str | None
    """Kind of failure, as its job has named it; None: it has ended well, or without a word."""
    lines: tuple[str, ...]
    """The last ones that it printed."""

    @property
    def fits(self) -> bool:
        return self.code == 0

    @property
    def lacked_memory(self) -> bool:
        return not self.fits and self.failure == NO_MEMORY


def described(run: Any, sizes: Sequence[int]) -> str:
    """What launch.train will do before it begins, in one line."""
    then = f", then {', '.join(map(str, sizes[1:]))} where it runs out of memory" * bool(sizes[1:])
    return (
        f"train.micro_batch_size=auto: launch.train tries {sizes[0]} first{then}: {STEPS} steps of "
        f"{_rows_in_words(run)}, under the same launcher and layout, in processes of their own"
    )


def largest_that_runs(
    config: DictConfig,
    sizes: Sequence[int],
    attempt: Callable[[DictConfig, int, Path], Trial] | None = None,
    say: Callable[[str], None] = print,
) -> DictConfig:
    """The config with the first of `sizes` whose trial does not run out of memory, in place. Says
    in a line each what was tried, and what was chosen.

    Args:
        sizes: of a micro-batch, the largest first; each divides the batch.
        attempt: tries a size in a folder; None: by `run_trial`.

    Raises:
        ConfigError: none of them fits.
        SystemExit: a trial has failed otherwise, with its exit code and its errors.
    """
    attempt = attempt or run_trial
    lacking = []
    for size in sizes:
        folder = Path(tempfile.mkdtemp(prefix="loadstone-trial-"))
        try:
            trial = attempt(config, size, folder)
            if trial.fits:
                say(f"train.micro_batch_size=auto: {STEPS} steps of {size} have run; {size} it is")
                with open_dict(config):
                    config.train.micro_batch_size = size
                return config
            if not trial.lacked_memory:
                code = trial.code if trial.code > 0 else FAILED
                named = f" ({trial.failure})" if trial.failure else ""
                fail(
                    [
                        f"train.micro_batch_size=auto: the trial of {size} ended with code "
                        f"{trial.code}{named}, and not for want of memory; its last lines follow. "
                        "Mend that, or give a number",
                        *trial.lines,
                    ],
                    code=code,
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        lacking.append(size)
        say(f"train.micro_batch_size=auto: {size} runs out of memory ({_short(trial)})")
    raise ConfigError(
        [
            f"train.micro_batch_size=auto: {', '.join(map(str, lacking))} ran out of memory, and "
            "nothing smaller divides the batch; use more ranks, deepspeed=zero3 or "
            "model.recompute=block"
        ]
    )


def run_trial(config: DictConfig, size: int, folder: Path) -> Trial:
    """Try one size, by the command that the run itself would be."""
    settings = settings_of_trial(config, size, folder)
    run = parse(plain(settings), world_size(settings))
    if not isinstance(run.objective, DistilConfig):
        _write_rows(folder, run)
    save_config(settings)

    command = [
        sys.executable,
        "-m",
        "launch.train",
        f"+saved_config={quoted((folder / 'config.yaml').resolve())}",
        "+trial=true",
    ]
    log, signs = folder / "trial.log", folder / "signs.jsonl"
    before = out_of_memory_kills()
    with signs.open("ab") as told:
        # Without a launcher nobody hears the rank, so what it says of its end goes to a file.
        env = {**os.environ}
        if run.launch.kind == "inline":
            env |= {PIPE: str(told.fileno()), STACKS: str(folder / "stacks")}
        code = run_child(command, log, env, (told.fileno(),))
    if code == 0:
        return Trial(0, None, ())

    failure = _last_told(signs, "failure") or _last_told(folder / "supervisor.jsonl", "kind")
    if code == -signal.SIGKILL and out_of_memory_kills() > before:
        failure = NO_MEMORY
    return Trial(code, failure, last_lines(log))


def settings_of_trial(config: DictConfig, size: int, folder: Path) -> DictConfig:
    """The run's settings but for what a trial leaves out, and its rows. Nothing that decides how
    much memory a micro-batch takes is another.
    """
    settings = plain(config)
    run = parse(_with(settings, {"micro_batch_size": size}), world_size(config))
    rows = run.parallel.rows_size(world_size(config))
    # With virtual stages a stage is ahead by more of them than there are stages.
    number = run.parallel.pipeline_parallel_size * (1 + (run.parallel.virtual_stages > 1))
    number = max(MICRO_BATCHES, number)
    number = min(number, run.gradient_accumulation_steps(rows))
    settings = _with(
        settings,
        {
            "micro_batch_size": size,
            "global_batch_size": size * rows * number,
            "batch_size_rampup": None,
            "batch_size_rampup_tokens": None,
            "num_tokens": None,
            "num_epochs": None,
            "stop_after_step": STEPS,
            "log_interval": 1,
            "eval_interval": 0,
            "eval_max_sequences": 1,
            "sample_prompt": None,
        },
    )
    if not isinstance(run.objective, DistilConfig):
        settings["data"] = {
            "sources": [{"path": "npy", "data_files": str(folder / "rows.npy")}],
            "tokenizer": {
                "path": None,
                "vocab_size": run.model.vocab_size,
                "end_of_document_id": run.model.vocab_size - 1,
            },
            "cache_dir": str(folder / "data"),
        }
    # A run that goes on needs nothing of what it once began with, unless adapters sit on that.
    if settings["resume"] is not None and not run.lora.rank:
        settings["init"] = {}
    launch = settings["launch"]
    settings |= {
        "run_dir": str(folder),
        "resume": None,
        "checkpoint": {"save_interval": 0},
        "tracker": {"wandb": {"mode": "disabled"}, "media_interval": 0},
        "audit": {"sample_one_in": 0, "max_flagged": 0},
        "profile": {},
        "alarms": {},
        "launch": {**launch, "max_restarts": 0, "elastic": False},
    }
    found = OmegaConf.create(literal(settings))
    assert isinstance(found, DictConfig)
    return found


def _with(settings: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "train": {**settings["train"], **train}}


def _rows_in_words(run: Any) -> str:
    if isinstance(run.objective, DistilConfig):
        return "the run's own rows"
    return f"rows of {run.train.seq_len} drawn tokens, none padded"


def _write_rows(folder: Path, run: Any) -> None:
    """A few long documents of drawn tokens; the last id of the vocabulary ends documents."""
    import numpy as np  # a tenth of what a refusal takes

    draw = np.random.default_rng(run.seed)
    shape = (DOCUMENTS, ROWS * run.train.seq_len + 1)
    rows = draw.integers(0, max(1, run.model.vocab_size - 1), shape, dtype=np.int32)
    np.save(folder / "rows.npy", rows, allow_pickle=False)


def _last_told(path: Path, key: str) -> str | None:
    """The last value of a key among lines of JSON that a trial has written."""
    found = None
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get(key), str):
                found = record[key]
    except (OSError, ValueError, RecursionError):
        return found
    return found


def _short(trial: Trial) -> str:
    """What the trial said of its end, in few words."""
    words = ("llocate", "emory", "bad_alloc")
    told = next((line for line in trial.lines if any(w in line for w in words)), "")
    return told[:120] or f"ended with code {trial.code}"
