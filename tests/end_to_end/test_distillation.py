"""Learning from a teacher through commands: online, from a cache, and from the model's own larger
budget; alike under any layout, bit for bit when resumed, and refused where it cannot be.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.published import published

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, last_json, launch, losses, train_on, write_text

pytestmark = [pytest.mark.slow]
COMMON = (*TINY, "balance=none", "train.num_steps=6", "train.eval_max_sequences=4")
SELF = (
    "objective=self_distil",
    "model.top_k=3",
    "model.init_std=0.3",
    "objective.top_k=[1,2]",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    return [*COMMON, *write_text(tmp_path_factory.mktemp("text"))]


@pytest.fixture(scope="module")
def teacher(settings, tmp_path_factory) -> Path:
    """A wider run of other seeds."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    launch("train", *settings, "model.hidden_size=24", "seed=2", f"run_dir={run}")
    return run


@pytest.fixture(scope="module")
def taught(settings, teacher, tmp_path_factory) -> Path:
    """A run that learns from it online, in one process."""
    run = tmp_path_factory.mktemp("taught") / "run"
    launch("train", *settings, "objective=distil", f"objective.run={teacher}", f"run_dir={run}")
    return run


@pytest.fixture(scope="module")
def cache(settings, teacher, tmp_path_factory) -> Path:
    """All that the teacher says of the rows."""
    to = tmp_path_factory.mktemp("cache") / "words"
    of = ("objective=distil", f"objective.run={teacher}", f"to={to}", "num_ids=300")
    found = last_json(launch("teach", *settings, *of))
    files = [path for path in to.glob("*.npy") if not path.name.startswith("rows")]
    # Beside each header of an array there is what was announced.
    assert found["bytes"] == sum(path.stat().st_size - 128 for path in files)
    return to


def records(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_a_cache_of_the_whole_vocabulary_teaches_as_the_teacher_itself(
    settings, taught, cache, tmp_path
):
    run = tmp_path / "run"
    launch("train", *settings, "objective=distil", f"objective.cache={cache}", f"run_dir={run}")
    assert list(losses(run).values()) == pytest.approx(list(losses(taught).values()), rel=1e-5)
    for name, tolerance in (("distil/kl", 1e-3), ("distil/agreement", 1e-12)):
        assert records(run, name) == pytest.approx(records(taught, name), rel=tolerance), name
    # The teacher has learned something, and is followed.
    divergences = records(taught, "distil/kl")
    assert 0 < divergences[-1] < divergences[0]


def test_without_weight_a_teacher_changes_nothing(settings, teacher, tmp_path):
    launch("train", *settings, f"run_dir={tmp_path / 'plain'}")
    of = ("objective=distil", f"objective.run={teacher}", "objective.weight=0")
    launch("train", *settings, *of, f"run_dir={tmp_path / 'silent'}")
    assert losses(tmp_path / "plain") == losses(tmp_path / "silent")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("deepspeed=zero3", "parallel.expert_parallel_size=2"), id="zero3-ep2"),
        *(
            pytest.param(words, id=name, marks=pytest.mark.nightly)
            for name, words in {
                "zero0-ep2": ("deepspeed=zero0", "parallel.expert_parallel_size=2"),
                "zero1-ep1": ("deepspeed=zero1",),
                "zero2-ep2": ("deepspeed=zero2", "parallel.expert_parallel_size=2"),
                "zero3-ep1-chunks": ("deepspeed=zero3", "model.loss_chunk_size=24"),
                "cp2": ("parallel=cp2", "model.num_kv_heads=2", "deepspeed=zero1"),
            }.items()
        ),
    ],
)
def test_two_ranks_learn_from_a_teacher_as_one_process(settings, teacher, taught, tmp_path, layout):
    run = tmp_path / "run"
    one = taught
    if any("num_kv_heads" in word for word in layout):  # a model that heads can be shared of
        of = ("model.num_kv_heads=2", "model.hidden_size=24", "seed=2")
        launch("train", *settings, *of, f"run_dir={tmp_path / 'teacher'}")
        teacher, one = tmp_path / "teacher", tmp_path / "one"
        alone = ("model.num_kv_heads=2", "objective=distil", f"objective.run={teacher}")
        launch("train", *settings, *alone, f"run_dir={one}")
    of = ("objective=distil", f"objective.run={teacher}")
    train_on(2, *settings, *of, *layout, f"run_dir={run}")
    for name in ("train/loss", "distil/kl", "train/grad_norm"):
        assert records(run, name) == pytest.approx(records(one, name), rel=5e-5), name


@pytest.fixture(scope="module")
def own(settings, tmp_path_factory) -> Path:
    """A run that teaches its own lower budgets, in one process."""
    run = tmp_path_factory.mktemp("own") / "run"
    launch("train", *settings, *SELF, f"run_dir={run}")
    return run


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("deepspeed=zero2", "parallel.expert_parallel_size=2"), id="zero2-ep2"),
        *(
            pytest.param(words, id=name, marks=pytest.mark.nightly)
            for name, words in {
                "zero0-ep2": ("deepspeed=zero0", "parallel.expert_parallel_size=2"),
                "zero1-ep1": ("deepspeed=zero1",),
                "zero3-ep2": ("deepspeed=zero3", "parallel.expert_parallel_size=2"),
                "zero3-ep1-tied": ("deepspeed=zero3", "model.loss_chunk_size=24"),
            }.items()
        ),
    ],
)
def test_two_ranks_teach_lower_budgets_as_one_process(settings, own, tmp_path, layout):
    run = tmp_path / "run"
    train_on(2, *settings, *SELF, *layout, f"run_dir={run}")
    for name in ("train/loss", "distil/kl", "distil/student_loss", "train/grad_norm"):
        assert records(run, name) == pytest.approx(records(own, name), rel=5e-5), name


@pytest.mark.parametrize("which", ["online", pytest.param("own", marks=pytest.mark.nightly)])
def test_a_resumed_run_goes_on_bit_for_bit(settings, teacher, taught, own, tmp_path, which):
    run = tmp_path / "run"
    of = ("objective=distil", f"objective.run={teacher}") if which == "online" else SELF
    launch("train", *settings, *of, f"run_dir={run}", "train.stop_after_step=3")
    launch("train", f"resume={run}")
    assert losses(run) == losses(taught if which == "online" else own)
    # The checkpoint of the teacher has a name now.
    text = (run / "config.yaml").read_text()
    assert which == "own" or "checkpoint: step-00000006" in text


def test_other_commands_read_such_a_run_without_its_objective(own):
    """Also at a budget that would be no full one."""
    found = last_json(launch("evaluate", f"run={own}", "router.top_k=1", "max_sequences=4"))
    assert found["experts_per_token"] == 1


@pytest.mark.nightly
def test_a_folder_of_published_weights_teaches_in_bf16(settings, tmp_path):
    """Of a model that began with it and has not learned yet, the divergence is what rounding
    makes.
    """
    folder = published("qwen3_moe", tmp_path / "published")
    of = [s for s in settings if not s.startswith("model.")]
    of += [f"init.path={folder}", "objective=distil", f"objective.path={folder}"]
    run = tmp_path / "run"
    launch("train", *of, "train.precision=bf16", f"run_dir={run}")
    assert 0 <= records(run, "distil/kl")[0] < 1e-4


def test_the_plan_counts_the_teacher(settings, teacher, own):
    plain = last_json(launch("plan", *settings))
    found = last_json(launch("plan", *settings, "objective=distil", f"objective.run={teacher}"))
    theirs = last_json(launch("plan", *settings, "model.hidden_size=24"))
    extra = found["flops_per_token"] - plain["flops_per_token"]
    assert extra == pytest.approx(theirs["flops_per_token"] / 3)
    held = found["memory_bytes"]["teacher"] - 16 * 32 * 300
    assert held == 4 * theirs["parameters"] and plain["memory_bytes"]["teacher"] == 0
    assert found["memory_bytes"]["total"] == plain["memory_bytes"]["total"] + held + 16 * 32 * 300
    raw = (*settings, "router=top_k_raw")
    full = last_json(launch("plan", *raw, "model.top_k=3"))["flops_per_token"]
    lower = [last_json(launch("plan", *raw, f"model.top_k={k}"))["flops_per_token"] for k in (1, 2)]
    twice = last_json(launch("plan", *settings, *SELF))["flops_per_token"]
    assert twice - full == pytest.approx(sum(lower) / 2 + 2 * 16 * 300)


def test_what_cannot_teach_is_refused_before_anything_starts(settings, teacher, cache, tmp_path):
    def refusal(*overrides: str) -> str:
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        done = launch("train", *settings, *overrides, f"run_dir={run}", check=False)
        assert done.returncode == 2, done.stderr
        assert not (run / "checkpoints").exists()
        return done.stdout + done.stderr

    assert "objective=distil has no teacher" in refusal("objective=distil")
    of_run = ("objective=distil", f"objective.run={teacher}")
    assert "has a vocabulary of 300" in refusal(*of_run, "model.vocab_size=301")
    assert "a lower budget must be" in refusal("objective=self_distil", "objective.top_k=[2]")
    assert "makes every gate 1" in refusal("model.top_k=1", "router=top_k")
    assert "router=expert_choice" in refusal("objective=self_distil", "router=expert_choice")
    of_cache = ("objective=distil", f"objective.cache={cache}")
    assert "was written with objective.temperature=1.0" in refusal(
        *of_cache, "objective.temperature=2"
    )
    assert "has the first 24 rows" in refusal(*of_cache, "train.num_steps=7")


def test_a_cache_that_was_changed_or_is_of_other_rows_ends_the_run(settings, cache, tmp_path):
    words = tmp_path / "words"
    shutil.copytree(cache, words)
    of = ("objective=distil", f"objective.cache={words}", f"run_dir={tmp_path / 'run'}")
    manifest = json.loads((words / "manifest.json").read_text())
    (words / "manifest.json").write_text(json.dumps({**manifest, "seed": 5}))
    other = launch("train", *settings, *of, "seed=5", check=False)
    assert other.returncode and "written for other tokens than row" in other.stderr

    shutil.copy(cache / "manifest.json", words)
    damaged = bytearray((words / "log_probs-00000.npy").read_bytes())
    damaged[-1] ^= 1
    (words / "log_probs-00000.npy").write_bytes(damaged)
    done = launch("train", *settings, *of[:2], f"run_dir={tmp_path / 'run2'}", check=False)
    assert done.returncode and "is not what was written" in done.stderr
