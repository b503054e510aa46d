"""Runs of the real command line on a tiny model, shared by the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from launch.command.arguments import key_of
from tests import forked

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = (
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.intermediate_size=32",
    "model.num_experts=4",
    "model.expert_intermediate_size=16",
    "model.max_seq_len=64",
    "train.seq_len=32",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.log_interval=1",
    "train.num_steps=20",
    "optim.warmup_steps=2",
    "optim.lr=0.01",
    "train.eval_max_sequences=16",
    "tracker.wandb.mode=disabled",
)


def write_text(folder: Path) -> list[str]:
    """A small corpus and the overrides that train on it."""
    text = (
        "the quick brown fox jumps over a lazy dog while seven wise owls watch from old oak "
        "trees and sing of rivers"
    )
    words = text.split()
    lines = [
        " ".join(words[(i * j + j) % len(words)] for j in range(1, 12 + i % 9)) for i in range(400)
    ]
    (folder / "text.txt").write_text("\n".join(lines))
    return [
        "data=files",
        "data.sources.0.path=text",
        f"data.sources.0.data_files={folder / 'text.txt'}",
        "data.sources.0.sample_by=line",
        "data.validation_fraction=0.1",
        f"data.cache_dir={folder / 'cache'}",
    ]


def last_of_each(overrides: Iterable[str]) -> list[str]:
    """The overrides with the last value of each setting: a command refuses two, and tests change
    settings of TINY.
    """
    kept: dict[str, str] = {}
    for override in overrides:
        key = key_of(override) or override
        kept.pop(key, None)
        kept[key] = override
    return list(kept.values())


def launch(
    command: str, *overrides: str, check: bool = True, env: dict | None = None, timeout: int = 300
) -> subprocess.CompletedProcess:
    """python -m launch.<command> <overrides> from the repository root, in a fork of a process that
    has imported torch.
    """
    result = forked.run(
        f"launch.{command}", last_of_each(overrides), {**_environment(), **(env or {})}, timeout
    )
    assert not check or result.returncode == 0, (
        f"{overrides}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    )
    return result


def train_on(number: int, *overrides: str, timeout: int = 300) -> subprocess.CompletedProcess:
    """python -m launch.train <overrides> on so many ranks, forks that are started as torchrun
    starts ranks. What rank 0 printed. launch("train", *ranks(...)) gives them a supervisor as well,
    and Python's imports for each rank to do.
    """
    if number == 1:
        return launch("train", *overrides, timeout=timeout)
    done = forked.run_ranks(
        "launch.train", number, last_of_each(overrides), _environment(), timeout
    )
    assert not any(rank.returncode for rank in done), f"{overrides}\n" + "\n".join(
        f"--- rank {i}\n{rank.stdout[-1500:]}\n{rank.stderr[-1500:]}" for i, rank in enumerate(done)
    )
    return done[0]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def last_json(result: subprocess.CompletedProcess) -> dict:
    return json.loads(result.stdout.strip().splitlines()[-1])


def lines(path: Path) -> list[dict]:
    """Records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run_dir: Path | str) -> dict[int, float]:
    """Training loss by step from metrics.jsonl."""
    records = lines(Path(run_dir) / "metrics.jsonl")
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


# What a rank does alone, what time it takes, what memory, and what one process does not send.
OWN = ("perf/", "comm/", "moe/expert_grad_cv", "moe/router_grad_ratio", "moe/gate_grad_share")


def measured(run_dir: Path, leave_out: tuple[str, ...] = ()) -> dict[int, dict[str, float]]:
    """Every metric by step, but for those that say how the work was done and begin so."""
    found: dict[int, dict[str, float]] = {}
    for record in lines(run_dir / "metrics.jsonl"):
        kept = {n: v for n, v in record.items() if "/" in n and not n.startswith(OWN + leave_out)}
        found.setdefault(record["step"], {}).update(kept)
    return found


def checksums(run_dir: Path) -> dict[int, list]:
    """Of every assignment of a token to an expert, by step, from the audit."""
    return {r["step"]: r["checksums"] for r in lines(run_dir / "audit/steps.jsonl")}


def ranks(number: int, expert_parallel_size: int, kind: str = "deepspeed") -> list[str]:
    kind = "inline" if number == 1 else kind
    return [
        f"launch={kind}",
        f"launch.num_devices={number}",
        f"parallel.expert_parallel_size={expert_parallel_size}",
    ]


def full_and_half(folder: Path, *settings: str) -> None:
    """FOLDER/full, an uninterrupted run, and FOLDER/half, one that stopped after 10 steps, on two
    expert-parallel ranks.
    """
    common = [*TINY, *settings, *write_text(folder), "parallel.expert_parallel_size=2"]
    train_on(2, *common, f"run_dir={folder / 'full'}")
    train_on(2, *common, f"run_dir={folder / 'half'}", "train.stop_after_step=10")
