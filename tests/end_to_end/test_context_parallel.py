"""Runs whose rows are shared out over ranks: what they log, audit, evaluate and save is what one
process does, and either goes on where the other stopped.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, checksums, launch, lines, losses, train_on, write_text

from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job.memory import planned_exchange
from launch.saved.configs import load_run_config

SETTINGS = (
    *TINY,
    "model.num_kv_heads=2",
    "train.num_steps=10",
    "train.eval_interval=5",
    "audit.sample_one_in=4",
    "optim.eps=0.1",
    "optim.lr=0.05",
    "balance.bias_update=sign",
    "balance.bias_update_rate=0.01",
    "balance.aux_loss_scope=sequence",
)
SHARED = ("parallel.context_parallel_size=2",)
SMALL_LATENT = (
    "attention.q_lora_rank=null",
    "attention.kv_lora_rank=16",
    "attention.qk_nope_head_dim=8",
    "attention.qk_rope_head_dim=8",
    "attention.v_head_dim=8",
    "model.qk_norm=none",
)
SMALL_SPARSE = (
    "attention.block_size=8",
    "attention.coarse_block_size=4",
    "attention.window_size=8",
    "attention.top_k=1",
    "attention.offset=true",
)
HALF = ("train.stop_after_step=5",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """alone: 10 steps of one process; half: 5 steps of two ranks that share rows."""
    folder = tmp_path_factory.mktemp("shared")
    data = write_text(folder)
    launch("train", *SETTINGS, *data, f"run_dir={folder / 'alone'}")
    done = train_on(2, *SETTINGS, *SHARED, *HALF, *data, f"run_dir={folder / 'half'}")
    (folder / "half.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.slow
def test_ranks_that_share_rows_log_what_one_process_does(runs):
    alone, half = losses(runs / "alone"), losses(runs / "half")
    assert half == {step: pytest.approx(alone[step], rel=1e-5) for step in range(1, 6)}

    own, shared = (
        {r["step"]: r for r in lines(runs / name / "metrics.jsonl") if "eval/val_loss" in r}
        for name in ("alone", "half")
    )
    assert shared[5]["eval/val_loss"] == pytest.approx(own[5]["eval/val_loss"], rel=1e-5)
    assert shared[5]["eval/bits_per_byte"] == pytest.approx(own[5]["eval/bits_per_byte"], rel=1e-5)

    # Which token went to which expert: the checksum is of every assignment of the step.
    own, shared = checksums(runs / "alone"), checksums(runs / "half")
    assert shared == {step: own[step] for step in range(1, 6)}


@pytest.mark.slow
def test_what_ranks_send_is_what_the_plan_says(runs):
    run = parse(plain(load_run_config(runs / "half/config.yaml")), 2)
    plan = planned_exchange(run, 2)
    sent = {r["comm/bytes"] for r in lines(runs / "half/metrics.jsonl") if "comm/bytes" in r}
    assert sent == {plan.heads} and plan.rows == 0
    assert (
        "parallel 2 ranks: rows 1 x context 2; expert 1 x expert data 2"
        in (runs / "half.txt").read_text()
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ((2, 2), ()),
        ((4, 2), ("parallel.expert_parallel_size=2", "deepspeed=zero3")),
        ((2, 2), ("attention=mla", "model.recompute=block", *SMALL_LATENT)),
        ((2, 2), ("attention=scc", *SMALL_SPARSE)),
    ],
)
def test_ranks_that_gather_are_as_one_process_and_send_what_the_plan_says(tmp_path, sizes, more):
    context, gather = sizes
    data = write_text(tmp_path)
    shared = (
        f"parallel.context_parallel_size={context}",
        f"parallel.context_gather_size={gather}",
    )
    alone = [s for s in more if not s.startswith(("parallel.", "deepspeed="))]
    launch("train", *SETTINGS, *alone, *data, f"run_dir={tmp_path / 'alone'}")
    train_on(context, *SETTINGS, *more, *shared, *HALF, *data, f"run_dir={tmp_path / 'half'}")
    expected, half = losses(tmp_path / "alone"), losses(tmp_path / "half")
    assert half == {step: pytest.approx(expected[step], rel=1e-5) for step in range(1, 6)}
    own, found = checksums(tmp_path / "alone"), checksums(tmp_path / "half")
    assert found == {step: own[step] for step in range(1, 6)}

    run = parse(plain(load_run_config(tmp_path / "half/config.yaml")), context)
    plan = planned_exchange(run, context)
    sent = {r["comm/bytes"] for r in lines(tmp_path / "half/metrics.jsonl") if "comm/bytes" in r}
    assert plan.keys > 0
    if plan.rows == 0:
        assert sent == {plan.heads + plan.keys}

    # One process goes on, and ranks that gather where it stopped.
    back = ("parallel.context_gather_size=1", "parallel.context_parallel_size=1")
    back += ("parallel.expert_parallel_size=1",)
    launch("train", f"resume={tmp_path / 'half'}", *back, "deepspeed=zero1")
    assert losses(tmp_path / "half") == {
        step: pytest.approx(loss, rel=2e-5) for step, loss in expected.items()
    }


@pytest.mark.slow
def test_one_process_goes_on_where_ranks_that_share_rows_stopped(runs):
    shutil.copytree(runs / "half", runs / "back")
    launch("train", f"resume={runs / 'back'}", "parallel.context_parallel_size=1")
    alone, back = losses(runs / "alone"), losses(runs / "back")
    assert back == {step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()}


@pytest.mark.nightly
def test_ranks_that_share_rows_resume_bit_for_bit_and_from_other_layouts(runs):
    data = write_text(runs)
    train_on(2, *SETTINGS, *SHARED, *data, f"run_dir={runs / 'full'}")
    shutil.copytree(runs / "half", runs / "same")
    train_on(2, f"resume={runs / 'same'}")
    assert losses(runs / "same") == losses(runs / "full")

    experts = ("parallel.expert_parallel_size=2", "deepspeed=zero3")
    train_on(2, *SETTINGS, *experts, *HALF, *data, f"run_dir={runs / 'experts'}")
    train_on(4, f"resume={runs / 'experts'}", *SHARED, "deepspeed=zero2")
    alone = losses(runs / "alone")
    assert losses(runs / "experts") == {
        step: pytest.approx(loss, rel=2e-5) for step, loss in alone.items()
    }
