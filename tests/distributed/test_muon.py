"""Runs with optim=muon: stopped under one layout, resumed under another, and held against one
process; what the start says and what a plan says before it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from commandline import TINY, last_json, launch, losses, ranks, train_on, write_text

from train.checkpoint.folder import find_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.kinds import is_hidden_matrix

pytestmark = [pytest.mark.slow]
SETTINGS = (
    "optim=muon",
    "optim.warmup_steps=2",
    "optim.lr=0.01",
    "optim.orthogonalize_dtype=fp32",
    "optim.ema_decay=0.6",
    "model.qk_norm=none",
    "optim.qk_clip=0.02",
    "train.num_steps=6",
    "balance=none",  # a loss over a micro-batch is another on two ranks
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("muon")
    return folder, [*TINY, *SETTINGS, *write_text(folder)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every parameter's states in the newest checkpoint."""
    reader = CheckpointReader(find_checkpoint(run))
    want = {
        key: torch.empty(shape)
        for key, shape in reader.stored.items()
        if not key.startswith("buffer/") and not key.endswith("/expert_ids")
    }
    reader.read(want)
    return want


@pytest.fixture(scope="module")
def alone(data) -> Path:
    """The run in one process."""
    folder, settings = data
    printed = launch("train", *settings, f"run_dir={folder / 'alone'}")
    text = printed.stdout + printed.stderr
    found = re.search(
        r"optimizer muon moves ([\d,]+) parameters in (\d+) matrices, adamw .* ([\d,]+)\n", text
    )
    assert found, text
    records = [json.loads(line) for line in (folder / "alone/metrics.jsonl").open()]
    clipped = [record["train/clipped_heads"] for record in records if "train/loss" in record]
    assert len(clipped) == 6 and max(clipped) > 0
    by_muon = {
        key: value
        for key, value in tensors(folder / "alone").items()
        if key.endswith("/momentum_buffer")
    }
    moved, number, other = (int(group.replace(",", "")) for group in found.groups())
    assert moved == sum(value.numel() for value in by_muon.values())
    stacked = [len(value) if value.dim() == 3 else 1 for value in by_muon.values()]
    halves = [1 + ("gate_up" in key) for key in by_muon]
    assert number == sum(a * b for a, b in zip(stacked, halves, strict=True)) and other > 0
    return folder / "alone"


def test_a_checkpoint_holds_one_moment_of_what_muon_moves_and_two_of_the_rest(alone):
    found = tensors(alone)
    states: dict[str, set[str]] = {}
    for key in found:
        name, _, state = key.rpartition("/")
        states.setdefault(name, set()).add(state)
    for name, keys in states.items():
        by_muon = is_hidden_matrix(re.sub(r"\.\d+$", "", name))
        moments = {"momentum_buffer"} if by_muon else {"exp_avg", "exp_avg_sq"}
        assert keys == {"fp32", "ema"} | moments


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param((2, "zero3", 2), (1, "zero1", 1), id="zero3-ep2-to-one-process"),
        pytest.param((2, "zero1", 1), (2, "zero3", 2), id="zero1-to-zero3-ep2"),
        pytest.param(
            (2, "zero0", 2), (2, "zero2", 1), id="zero0-to-zero2", marks=pytest.mark.nightly
        ),
        pytest.param((4, "zero3", 2), (2, "zero2", 2), id="four-to-two", marks=pytest.mark.nightly),
    ],
)
def test_a_run_goes_on_under_another_layout_as_in_one_process(data, alone, first, then):
    folder, settings = data
    run = folder / f"{first[1]}-{then[1]}-{first[0]}"

    def layout(number: int, stage: str, experts: int) -> list[str]:
        return [f"deepspeed={stage}", f"parallel.expert_parallel_size={experts}"]

    printed = train_on(
        first[0], *settings, *layout(*first), f"run_dir={run}", "train.stop_after_step=3"
    )
    train_on(then[0], f"resume={run}", *layout(*then))
    one, two = losses(alone), losses(run)
    assert list(two) == list(one)
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=5e-5)
    ours, theirs = tensors(run), tensors(alone)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, rtol=1e-3, atol=3e-5), key

    # What rank 0 says it sends is what the plan has said; on two ranks both send the same.
    found = re.search(r"this rank sends ([\d,]+) bytes", printed.stdout + printed.stderr)
    sent = int(found[1].replace(",", "")) if found else 0
    if first[0] == 2:
        planned = last_json(launch("plan", *settings, *layout(*first), *ranks(first[0], first[2])))
        assert sent == planned["muon"]["sent_bytes"]
        assert (sent == 0) == (first[1] == "zero0")


def test_an_uninterrupted_run_and_a_resumed_one_are_equal_to_the_last_bit(data, alone):
    folder, settings = data
    run = folder / "halved"
    launch("train", *settings, f"run_dir={run}", "train.stop_after_step=3")
    launch("train", f"resume={run}")
    assert losses(run) == losses(alone)
    ours, theirs = tensors(run), tensors(alone)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optim=adamw", "init.run=RUN init.checkpoint=latest"),
        (
            "optim.groups=[{match: experts, optimizer: adamw}]",
            "cannot change optim.groups.0.optimizer",
        ),
    ],
)
def test_another_optimizer_is_refused_with_the_way_out(alone, change, said):
    more = ("train.num_steps=9", "optim.warmup_steps=2")
    done = launch("train", f"resume={alone}", change, *more, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 2 and said in text and "the optimizer that moved each" in text
