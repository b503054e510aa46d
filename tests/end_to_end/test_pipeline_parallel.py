"""Runs in stages of a pipeline: what they log, audit, evaluate, probe and save is what one process
does, and either goes on where the other stopped.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, checksums, launch, lines, losses, measured, train_on, write_text

from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job.memory import planned_exchange
from launch.saved.configs import load_run_config
from train.checkpoint.reader import CheckpointReader

# The first stage has one dense layer: no router, no experts, nothing to audit.
SETTINGS = (
    *TINY,
    "model.num_layers=3",
    "model.num_dense_layers=1",
    "model.tie_embeddings=true",
    "router=top_p",
    "router.budget=2",
    "budget.scope=model",
    "budget.warm_start_steps=2",
    "budget.blend_steps=2",
    "balance.bias_update=quantile",
    "balance.aux_loss_scope=global_batch",
    "train.num_steps=10",
    "train.eval_interval=5",
    "tracker.metrics=detailed",
    "audit.sample_one_in=4",
    "optim.eps=0.1",
    "optim.lr=0.05",
)
STAGES = ("parallel=pp2", "parallel.pipeline_split=[1,2]")
HALF = ("train.stop_after_step=5",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """alone: 10 steps of one process; half: 5 steps of two stages."""
    folder = tmp_path_factory.mktemp("stages")
    data = write_text(folder)
    launch("train", *SETTINGS, *data, f"run_dir={folder / 'alone'}")
    done = train_on(2, *SETTINGS, *STAGES, *HALF, *data, f"run_dir={folder / 'half'}")
    (folder / "half.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.slow
def test_stages_log_what_one_process_does(runs):
    alone, half = measured(runs / "alone"), measured(runs / "half")
    for step in range(1, 6):
        assert set(half[step]) == set(alone[step]), step
        for name, value in half[step].items():
            expected = alone[step][name]
            assert value == pytest.approx(expected, rel=2e-5, abs=1e-6), (step, name)

    # Which token went to which expert: the checksum is of every assignment of the step.
    own, staged = checksums(runs / "alone"), checksums(runs / "half")
    assert staged == {step: own[step] for step in range(1, 6)}
    tables = [
        {r["step"]: r["counts"] for r in lines(runs / name / "routing.jsonl")}
        for name in ("alone", "half")
    ]
    assert tables[1] == {step: tables[0][step] for step in range(1, 6)}


@pytest.mark.slow
def test_probe_and_audit_of_stages_have_all_layers(runs):
    probes = [
        np.load(runs / name / "probe/step-00000005.npz", allow_pickle=False)
        for name in ("alone", "half")
    ]
    for key in ("expert_ids", "token"):
        assert np.array_equal(probes[0][key], probes[1][key]), key
    assert probes[1]["loss"] == pytest.approx(probes[0]["loss"], rel=1e-4, nan_ok=True)
    told = launch("audit", f"run={runs / 'half'}")
    assert "layer   1" in told.stdout and "layer   2" in told.stdout


@pytest.mark.slow
def test_what_stages_send_is_what_the_plan_says(runs):
    run = parse(plain(load_run_config(runs / "half/config.yaml")), 2)
    plan = planned_exchange(run, 2)
    sent = {r["comm/bytes"] for r in lines(runs / "half/metrics.jsonl") if "comm/bytes" in r}
    # The mean of the two: hidden states there and gradients back, the embedding there, its back.
    assert sent == {plan.stages} and plan.heads == plan.rows == 0
    assert "parallel 2 ranks: 2 stages of 1, 2 layers x rows 1;" in (runs / "half.txt").read_text()


@pytest.mark.slow
def test_one_process_goes_on_where_stages_stopped(runs):
    newest = [
        sorted((runs / name / "checkpoints").glob("step-*"))[-1] for name in ("alone", "half")
    ]
    assert CheckpointReader(newest[0]).shapes == CheckpointReader(newest[1]).shapes
    shutil.copytree(runs / "half", runs / "back")
    launch("train", f"resume={runs / 'back'}", "parallel=single")
    alone, back = losses(runs / "alone"), losses(runs / "back")
    assert back == {step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()}


@pytest.mark.nightly
def test_stages_resume_bit_for_bit_and_from_other_layouts(runs):
    data = write_text(runs)
    train_on(2, *SETTINGS, *STAGES, *data, f"run_dir={runs / 'full'}")
    shutil.copytree(runs / "half", runs / "same")
    train_on(2, f"resume={runs / 'same'}")
    assert losses(runs / "same") == losses(runs / "full")

    experts = ("parallel.expert_parallel_size=2", "deepspeed=zero3")
    train_on(2, *SETTINGS, *experts, *HALF, *data, f"run_dir={runs / 'experts'}")
    train_on(4, f"resume={runs / 'experts'}", "parallel=pp2_ep2", "deepspeed=zero2")
    alone = losses(runs / "alone")
    assert losses(runs / "experts") == {
        step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()
    }
