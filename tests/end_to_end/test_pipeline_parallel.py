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
from launch.job.memory import planned_stages
from launch.saved.configs import load_run_config
from train.checkpoint.reader import CheckpointReader

# The first stage has one dense layer: no router, no experts, nothing to audit.
SETTINGS = (
    *TINY,
    "model.num_layers=4",
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
STAGES = ("parallel=pp2", "parallel.pipeline_split=[1,3]")
# The same in two runs of layers each, so that the second stage has layers before the first one's.
LAPS = ("parallel=pp2", "parallel.virtual_stages=2")
HALF = ("train.stop_after_step=5",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """alone: 10 steps of one process; half, laps: 5 steps of two stages, and of virtual ones."""
    folder = tmp_path_factory.mktemp("stages")
    data = write_text(folder)
    launch("train", *SETTINGS, *data, f"run_dir={folder / 'alone'}")
    for name, layout in (("half", STAGES), ("laps", LAPS)):
        done = train_on(2, *SETTINGS, *layout, *HALF, *data, f"run_dir={folder / name}")
        (folder / f"{name}.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "laps"])
def test_stages_log_what_one_process_does(runs, name):
    alone, half = measured(runs / "alone"), measured(runs / name)
    for step in range(1, 6):
        assert set(half[step]) == set(alone[step]), step
        for metric, value in half[step].items():
            expected = alone[step][metric]
            assert value == pytest.approx(expected, rel=2e-5, abs=1e-6), (step, metric)

    # Which token went to which expert: the checksum is of every assignment of the step.
    own, staged = checksums(runs / "alone"), checksums(runs / name)
    assert staged == {step: own[step] for step in range(1, 6)}
    tables = [
        {r["step"]: r["counts"] for r in lines(runs / run / "routing.jsonl")}
        for run in ("alone", name)
    ]
    assert tables[1] == {step: tables[0][step] for step in range(1, 6)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "laps"])
def test_probe_and_audit_of_stages_have_all_layers(runs, name):
    probes = [
        np.load(runs / run / "probe/step-00000005.npz", allow_pickle=False)
        for run in ("alone", name)
    ]
    for key in ("expert_ids", "token"):
        assert np.array_equal(probes[0][key], probes[1][key]), key
    assert probes[1]["loss"] == pytest.approx(probes[0]["loss"], rel=1e-4, nan_ok=True)
    told = launch("audit", f"run={runs / name}")
    assert all(f"layer   {layer}" in told.stdout for layer in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("half", "1, 3"), ("laps", "1+1, 1+1")])
def test_what_stages_send_is_what_the_plan_says(runs, name, layers):
    run = parse(plain(load_run_config(runs / name / "config.yaml")), 2)
    plans = [stage.exchange for stage in planned_stages(run, 2)]
    sent = {r["comm/bytes"] for r in lines(runs / name / "metrics.jsonl") if "comm/bytes" in r}
    # The mean of the two: hidden states there and gradients back, the embedding there, its back.
    assert sent == {sum(plan.stages for plan in plans) / 2}
    assert all(plan.heads == plan.rows == 0 for plan in plans)
    told = f"parallel 2 ranks: 2 stages of {layers} layers x rows 1;"
    assert told in (runs / f"{name}.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "laps"])
def test_one_process_goes_on_where_stages_stopped(runs, name):
    newest = [sorted((runs / run / "checkpoints").glob("step-*"))[-1] for run in ("alone", name)]
    assert CheckpointReader(newest[0]).shapes == CheckpointReader(newest[1]).shapes
    shutil.copytree(runs / name, runs / f"{name}-back")
    launch("train", f"resume={runs / f'{name}-back'}", "parallel=single")
    alone, back = losses(runs / "alone"), losses(runs / f"{name}-back")
    assert back == {step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()}


@pytest.mark.nightly
def test_laps_resume_bit_for_bit_and_go_on_where_other_layouts_stopped(runs):
    data = write_text(runs)
    train_on(2, *SETTINGS, *LAPS, *data, f"run_dir={runs / 'round'}")
    shutil.copytree(runs / "laps", runs / "same-laps")
    train_on(2, f"resume={runs / 'same-laps'}")
    assert losses(runs / "same-laps") == losses(runs / "round")

    alone = losses(runs / "alone")
    for name, begun, layout in (
        ("laps-of-stages", "half", (*LAPS, "deepspeed=zero2")),
        ("stages-of-laps", "laps", STAGES),
    ):
        shutil.copytree(runs / begun, runs / name)
        train_on(2, f"resume={runs / name}", *layout)
        assert losses(runs / name) == {
            step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()
        }, name


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
