"""Frozen parts and groups with a learning rate of their own, under every ZeRO stage and expert
parallelism: what is frozen stays to the last bit, and the rest is trained as in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from commandline import TINY, launch, losses, train_on, write_text

from train.checkpoint.folder import find_checkpoint
from train.checkpoint.reader import CheckpointReader

pytestmark = [pytest.mark.slow]
FREEZE = "optim.freeze=[router,embedding,'blocks.0.*']"
SETTINGS = ("balance=none", "train.num_steps=6", "router=sigmoid_top_k", "optim.weight_decay=0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("frozen")
    return folder, [*TINY, *SETTINGS, *write_text(folder)]


def weights(run: Path, state: str = "fp32") -> dict[str, torch.Tensor]:
    """Every parameter of the newest checkpoint."""
    reader = CheckpointReader(find_checkpoint(run))
    want = {
        key: torch.empty(shape)
        for key, shape in reader.stored.items()
        if key.endswith(f"/{state}") or (key.startswith("buffer/") and state == "buffers")
    }
    reader.read(want)
    return want


@pytest.fixture(scope="module")
def alone(data) -> Path:
    """The run in one process, and the same model before its first step: one step of no size."""
    folder, settings = data
    printed = launch("train", *settings, FREEZE, f"run_dir={folder / 'alone'}")
    text = printed.stdout + printed.stderr
    assert "router frozen (64)" in text and "embedding frozen (4,800)" in text
    launch(
        "train",
        *settings,
        "train.stop_after_step=1",
        "optim.lr=1e-30",
        "optim.min_lr=0",
        "optim.weight_decay=0",
        f"run_dir={folder / 'before'}",
    )
    return folder / "alone"


def test_what_is_frozen_stays_and_has_no_moments_and_the_rest_moves(alone):
    before, after = weights(alone.parent / "before"), weights(alone)
    assert before.keys() == after.keys()
    for key, value in after.items():
        frozen = any(part in key for part in (".router.", "embedding.", "blocks.0."))
        assert torch.equal(value, before[key]) == frozen, key
    moments = {key.removesuffix("/exp_avg") for key in weights(alone, "exp_avg")}
    trained = {
        key.removesuffix("/fp32")
        for key in after
        if not any(part in key for part in (".router.", "embedding.", "blocks.0."))
    }
    assert moments == trained
    buffers = weights(alone, "buffers")
    biases = [value for key, value in buffers.items() if key.endswith("balance_bias")]
    assert biases and not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("stage", "expert_parallel_size"),
    [
        pytest.param(0, 2, id="zero0-ep2", marks=pytest.mark.nightly),
        pytest.param(1, 2, id="zero1-ep2"),
        pytest.param(2, 1, id="zero2-ep1", marks=pytest.mark.nightly),
        pytest.param(3, 2, id="zero3-ep2"),
        pytest.param(3, 1, id="zero3-ep1", marks=pytest.mark.nightly),
        pytest.param(2, 2, id="zero2-ep2", marks=pytest.mark.nightly),
        pytest.param(0, 1, id="zero0-ep1", marks=pytest.mark.nightly),
        pytest.param(1, 1, id="zero1-ep1", marks=pytest.mark.nightly),
    ],
)
def test_two_ranks_freeze_and_resume_as_one_process(data, alone, stage, expert_parallel_size):
    folder, settings = data
    run = folder / f"zero{stage}-{expert_parallel_size}"
    where = [f"deepspeed=zero{stage}", f"parallel.expert_parallel_size={expert_parallel_size}"]
    train_on(2, *settings, FREEZE, *where, f"run_dir={run}", "train.stop_after_step=3")
    train_on(2, f"resume={run}")
    one, two = losses(alone), losses(run)
    assert list(two) == list(one)
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=2e-5)
    ours, theirs = weights(run), weights(alone)
    for key, value in theirs.items():
        frozen = any(part in key for part in (".router.", "embedding.", "blocks.0."))
        if frozen:
            assert torch.equal(ours[key], value), key
        else:
            assert torch.allclose(ours[key], value, rtol=1e-3, atol=1e-5), key


def test_a_part_that_means_nothing_is_refused(data):
    """Complaint: a pattern that matches no expert, and a run that trains something else."""
    folder, settings = data
    for i, (part, said) in enumerate(
        (
            ("atention", "did you mean attention?"),
            ("blocks.7.*", "means no parameter of this model"),
            ("*", "leaves nothing to train"),
        )
    ):
        run = f"run_dir={folder / f'refused-{i}'}"
        done = launch("train", *settings, f"optim.freeze=['{part}']", run, check=False)
        assert done.returncode == 2 and said in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optim.freeze=[router]", "optim.freeze leaves the router as it is, but balance.aux"),
        ("optim.freeze=['blocks.1.mlp.*']", "add balance=none"),
        ("model.num_shared_experts=0 optim.freeze=[shared_experts]", "shared_experts means no"),
        ("optim.groups=[{match: head, lr_factor: 0}]", "optim.groups[0].lr_factor is 0"),
        ("optim.groups=[{match: ''}]", "optim.groups[0].match is empty"),
    ],
)
def test_what_contradicts_is_refused_before_anything_starts(tmp_path, change, said):
    first, _, rest = change.partition(" optim")
    overrides = [first, f"optim{rest}"] if rest else [change]
    balance = ["balance=aux_loss"]
    done = launch("train", *TINY, *balance, *overrides, f"run_dir={tmp_path / 'x'}", check=False)
    assert done.returncode == 2 and said in done.stdout + done.stderr
    assert not (tmp_path / "x").exists()
