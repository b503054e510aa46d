"""Runs whose matrices are shared out over ranks: what they log, audit, evaluate, probe and save is
what one process does, and either goes on where the other stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, checksums, launch, lines, losses, measured, train_on, write_text

from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job.memory import planned_exchange
from launch.saved.configs import load_run_config
from train.checkpoint.reader import CheckpointReader

SETTINGS = (
    *TINY,
    "model.num_kv_heads=2",
    "model.num_layers=3",
    "model.num_dense_layers=1",
    "model.loss_chunk_size=8",
    "model.recompute=block",
    "train.num_steps=10",
    "train.eval_interval=5",
    "tracker.metrics=detailed",
    "audit.sample_one_in=4",
    "optim.eps=0.1",
    "optim.lr=0.05",
    "balance.bias_update=sign",
    "balance.bias_update_rate=0.01",
    "balance.aux_loss_scope=sequence",
)
CUT = ("parallel=tp2",)
HALF = ("train.stop_after_step=5",)
# Of the last micro-batch of one rank, which is half of the rows here.
SAMPLED = ("moe/margin", "moe/log_z_m", "moe/log_z_p", "moe/gate_", "moe/co_activation")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """alone: 10 steps of one process; half: 5 steps of two ranks that share matrices."""
    folder = tmp_path_factory.mktemp("cut")
    data = write_text(folder)
    launch("train", *SETTINGS, *data, f"run_dir={folder / 'alone'}")
    done = train_on(2, *SETTINGS, *CUT, *HALF, *data, f"run_dir={folder / 'half'}")
    (folder / "half.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.nightly
def test_ranks_that_share_matrices_log_what_one_process_does(runs):
    alone, half = (measured(runs / name, SAMPLED) for name in ("alone", "half"))
    for step in range(1, 6):
        assert set(half[step]) == set(alone[step]), step
        for name, value in half[step].items():
            expected = alone[step][name]
            assert value == pytest.approx(expected, rel=2e-5, abs=1e-6), (step, name)

    # Which token went to which expert: the checksum is of every assignment of the step.
    own, shared = checksums(runs / "alone"), checksums(runs / "half")
    assert shared == {step: own[step] for step in range(1, 6)}


@pytest.mark.nightly
def test_what_ranks_that_share_matrices_send_is_what_the_plan_says(runs):
    run = parse(plain(load_run_config(runs / "half/config.yaml")), 2)
    plan = planned_exchange(run, 2)
    sent = {r["comm/bytes"] for r in lines(runs / "half/metrics.jsonl") if "comm/bytes" in r}
    assert sent == {plan.tensor} and plan.heads == plan.rows == 0
    assert (
        "parallel 2 ranks: rows 1 x tensor 2; expert 1 x expert data 2"
        in (runs / "half.txt").read_text()
    )


@pytest.mark.nightly
def test_one_process_goes_on_where_ranks_that_share_matrices_stopped(runs):
    newest = [
        sorted((runs / name / "checkpoints").glob("step-*"))[-1] for name in ("alone", "half")
    ]
    assert CheckpointReader(newest[0]).shapes == CheckpointReader(newest[1]).shapes
    shutil.copytree(runs / "half", runs / "back")
    launch("train", f"resume={runs / 'back'}", "parallel=single")
    alone, back = losses(runs / "alone"), losses(runs / "back")
    assert back == {step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()}
    told = launch("evaluate", f"run={runs / 'half'}", "max_sequences=16")
    value = json.loads(told.stdout.splitlines()[-1])["val_loss"]
    own = {r["step"]: r for r in lines(runs / "half/metrics.jsonl") if "eval/val_loss" in r}
    assert value == pytest.approx(own[5]["eval/val_loss"], rel=1e-5)


@pytest.mark.nightly
def test_ranks_that_share_matrices_resume_bit_for_bit_and_from_other_layouts(runs):
    data = write_text(runs)
    train_on(2, *SETTINGS, *CUT, *data, f"run_dir={runs / 'full'}")
    shutil.copytree(runs / "half", runs / "same")
    train_on(2, f"resume={runs / 'same'}")
    assert losses(runs / "same") == losses(runs / "full")

    experts = ("parallel.expert_parallel_size=2", "deepspeed=zero3")
    train_on(2, *SETTINGS, *experts, *HALF, *data, f"run_dir={runs / 'experts'}")
    train_on(4, f"resume={runs / 'experts'}", "parallel=tp2_ep2", "deepspeed=zero2")
    alone = losses(runs / "alone")
    assert losses(runs / "experts") == {
        step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()
    }

    # Weights of another run, which every rank reads whole and keeps its parts of.
    train_on(2, *SETTINGS, *CUT, f"init.run={runs / 'alone'}", *data, f"run_dir={runs / 'from'}")
    launch("train", *SETTINGS, f"init.run={runs / 'alone'}", *data, f"run_dir={runs / 'from1'}")
    assert losses(runs / "from") == {
        step: pytest.approx(loss, rel=2e-5) for step, loss in losses(runs / "from1").items()
    }
