"""Upcycling through commands: a run that begins with a dense model's MLPs as experts has the dense
model's loss before its first step, under any layout, and leaves as a published mixture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.published import published

sys.path.insert(0, str(Path(__file__).parent))
from commandline import last_json, launch, losses, train_on, write_text

pytestmark = [pytest.mark.slow]
TRAIN = (
    "balance=none",
    "train.seq_len=32",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.log_interval=1",
    "train.num_steps=3",
    "train.eval_max_sequences=4",
    "optim.warmup_steps=1",
    "optim.lr=0.01",
    "tracker.wandb.mode=disabled",
)
UPCYCLE = (
    "init.upcycle.num_experts=8",
    "init.upcycle.top_k=4",
    "init.upcycle.granularity=3",
    "init.upcycle.num_shared_experts=1",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return published("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def begun(dense, text, tmp_path_factory) -> Path:
    """A run of the dense model itself."""
    run = tmp_path_factory.mktemp("begun") / "run"
    launch("train", f"init.path={dense}", *text, *TRAIN, f"run_dir={run}")
    return run


@pytest.fixture(scope="module")
def upcycled(dense, text, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("upcycled") / "run"
    launch("train", f"init.path={dense}", *UPCYCLE, *text, *TRAIN, f"run_dir={run}")
    return run


@pytest.mark.parametrize(
    ("stage", "experts", "precision"),
    [
        (3, 2, "fp32"),
        pytest.param(0, 2, "fp32", marks=pytest.mark.nightly),
        pytest.param(1, 1, "fp32", marks=pytest.mark.nightly),
        pytest.param(2, 2, "bf16", marks=pytest.mark.nightly),
    ],
)
def test_the_first_loss_is_the_dense_models_and_all_later_ones_those_of_one_process(
    dense, text, begun, upcycled, tmp_path, stage, experts, precision
):
    layout = [f"deepspeed=zero{stage}", f"parallel.expert_parallel_size={experts}"]
    run = tmp_path / "run"
    settings = [*UPCYCLE, *text, *TRAIN, *layout, f"train.precision={precision}"]
    train_on(2, f"init.path={dense}", *settings, f"run_dir={run}")
    found, alone = losses(run), losses(upcycled)
    close = 2e-6 if precision == "fp32" else 2e-2
    assert found[1] == pytest.approx(losses(begun)[1], rel=close)
    assert list(found.values()) == pytest.approx(list(alone.values()), rel=10 * close)


@pytest.mark.nightly
def test_a_dense_run_is_upcycled_with_an_adaptive_router_and_exported(begun, text, tmp_path):
    """From the weights of a run; the router routes by top-k at first, and the folder is a
    Mixtral.
    """
    run, still = tmp_path / "run", ("optim.lr=1e-38", "optim.min_lr=0", "train.num_steps=1")
    kept = (*still, "optim.warmup_steps=0", "optim.weight_decay=0")
    copies = ("init.upcycle.num_experts=4", "init.upcycle.top_k=2", "router=top_p")
    launch("train", f"init.run={begun}", *copies, *text, *TRAIN, *kept, f"run_dir={run}")
    before = json.loads((begun / "result.json").read_text())["val_loss"]
    assert json.loads((run / "result.json").read_text())["val_loss"] == pytest.approx(
        before, rel=2e-6
    )
    out = tmp_path / "out"
    done = last_json(launch("export", f"run={run}", f"to={out}", "router.top_k=2"))
    assert done["architecture"] == "MixtralForCausalLM"
    refused = launch(
        "train",
        f"init.path={out}",
        *copies,
        *text,
        *TRAIN,
        f"run_dir={tmp_path / 'x'}",
        check=False,
    )
    assert refused.returncode == 2 and "have 4 experts" in refused.stderr


def test_a_plan_says_what_the_mixture_costs_and_what_contradicts_is_refused(dense, text, tmp_path):
    planned = last_json(launch("plan", f"init.path={dense}", *UPCYCLE, *text, *TRAIN))
    own = last_json(launch("plan", f"init.path={dense}", *text, *TRAIN))
    # Two layers: 8 experts and a shared one of a third of 48, and routers.
    width, hidden = 16, 32
    more = 2 * (9 * 3 * hidden * width + 8 * hidden - 3 * hidden * 48)
    assert planned["parameters"] - own["parameters"] == more
    five = ["init.upcycle.granularity=5", "init.upcycle.top_k=5"]
    for settings, said in (
        (
            [*five, "init.upcycle.num_experts=10"],
            "does not divide the width",
        ),
        (["init.upcycle.top_k=2", "init.upcycle.granularity=2"], "init.upcycle.num_experts is 0"),
    ):
        done = launch("plan", f"init.path={dense}", *settings, *text, *TRAIN, check=False)
        assert said in done.stdout + done.stderr and done.returncode != 0
