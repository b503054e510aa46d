"""What breaks the numbers and the files of a run: NaN, a full disk, damaged and foreign
checkpoints, damaged data.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import launch
from scenario import NUM_STEPS, SETTINGS, Job, Outcome, losses, run, tabulate

from train.checkpoint.folder import damage, read_best

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(400)]
KINDS = ("nan_loss", "nan_grad", "nan_expert")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def assert_finite(checkpoint: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state = _load_state_dict_from_keys(checkpoint_id=checkpoint / "weights")
    assert state and all(math.isfinite(float(t.double().sum())) for t in state.values())


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_ends_the_job_before_it_is_applied_or_saved(
    lab, tmp_path, data, reference, kind, zero
):
    stage = f"deepspeed=zero{zero}"
    outcome = run(lab(2), tmp_path, data, stage, fault=f"{kind}@1:7")
    assert outcome.code == 65 and outcome.restarts == 0 and not outcome.leftovers, outcome.report()
    assert outcome.verdict["kind"] == "non_finite" and outcome.verdict["step"] == 7, (
        outcome.report()
    )
    words = outcome.verdict["message"]
    assert "step 7" in words and "samples 24..27" in words, outcome.report()
    assert kind != "nan_loss" or "loss on rank 1 at" in words, outcome.report()
    checkpoints = outcome.run_dir / "checkpoints"
    assert names(checkpoints) == ["step-00000004"], outcome.report()
    assert damage(checkpoints / "step-00000004") is None
    assert_finite(checkpoints / "step-00000004")
    batch = json.loads(
        (outcome.run_dir / "failures" / "step-00000007" / "rank-00001.json").read_text()
    )
    assert batch["step"] == 7 and batch["micro_batches"][0]["input_ids"], outcome.report()
    expected = reference(stage)
    assert outcome.losses == {step: loss for step, loss in expected.items() if step <= 6}, (
        outcome.report()
    )
    tabulate(outcome, f"{kind}, ZeRO {zero}", 5.0, "exit 65, nothing applied or saved, batch kept")


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_can_be_skipped(lab, tmp_path, data, reference, kind, zero):
    stage = f"deepspeed=zero{zero}"
    outcome = run(lab(2), tmp_path, data, stage, "train.on_nonfinite=skip", fault=f"{kind}@1:7")
    assert outcome.code == 0 and not outcome.verdicts and not outcome.leftovers, outcome.report()
    assert "skipped" in outcome.log and max(outcome.losses) == NUM_STEPS, outcome.report()
    expected = reference(stage)
    assert all(outcome.losses[step] == expected[step] for step in range(1, 7)), outcome.report()
    assert all(math.isfinite(outcome.losses[step]) for step in range(8, NUM_STEPS + 1)), (
        outcome.report()
    )
    last = outcome.run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}"
    assert damage(last) is None
    assert_finite(last)
    tabulate(outcome, f"{kind}, ZeRO {zero}, on_nonfinite=skip", None, "step skipped, trained on")


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data) -> Path:
    """A run on two ranks of this machine that stopped after 10 steps, with checkpoints 4, 8 and
    10.
    """
    folder = tmp_path_factory.mktemp("stopped") / "run"
    launch(
        "train",
        *SETTINGS,
        *data,
        "launch=deepspeed",
        "launch.num_devices=2",
        "train.stop_after_step=10",
        f"run_dir={folder}",
    )
    return folder


def kilobytes(folder: Path) -> int:
    """Of a folder on a tmpfs: whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def full_disk(lab, tmp_path: Path, data, stopped: Path, *overrides: str) -> tuple[Outcome, Path]:
    """A job whose checkpoints have room for one and a half."""
    cluster = lab(2)
    folder = tmp_path / "run" / "checkpoints"
    cluster.small_disk(folder, int(1.5 * kilobytes(stopped / "checkpoints" / "step-00000004")))
    outcome = run(cluster, tmp_path, data, *overrides)
    kept = tmp_path / "kept"
    shutil.copytree(cluster.seen(folder), kept)
    return outcome, kept


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_ends_the_job_and_keeps_the_last_checkpoint(
    lab, tmp_path, data, stopped, asynchronous
):
    outcome, kept = full_disk(
        lab, tmp_path, data, stopped, f"checkpoint.asynchronous={asynchronous}"
    )
    assert outcome.code == 74 and outcome.restarts == 0 and not outcome.leftovers, outcome.report()
    assert (
        outcome.verdict["kind"] == "disk_full" and "step-00000008" in outcome.verdict["message"]
    ), outcome.report()
    assert names(kept) == ["step-00000004"] and damage(kept / "step-00000004") is None, (
        outcome.report()
    )
    assert "Traceback" not in outcome.log, outcome.report()
    tabulate(
        outcome,
        f"disk full, asynchronous={asynchronous}",
        None,
        "exit 74, the last checkpoint intact",
    )


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_can_be_trained_past(lab, tmp_path, data, stopped, reference, asynchronous):
    outcome, kept = full_disk(
        lab,
        tmp_path,
        data,
        stopped,
        "checkpoint.on_error=continue",
        f"checkpoint.asynchronous={asynchronous}",
    )
    # trained to its end, but that was not saved
    assert outcome.code == 74 and not outcome.leftovers, outcome.report()
    assert outcome.losses == reference(), outcome.report()
    assert names(kept) == ["step-00000004"] and damage(kept / "step-00000004") is None, (
        outcome.report()
    )
    assert not (kept / "best.json").exists() or read_best(kept) is not None, (
        "best.json names a checkpoint that is not there"
    )
    tabulate(
        outcome,
        f"disk full, on_error=continue, asynchronous={asynchronous}",
        None,
        f"trained on, exit {outcome.code}",
    )


def test_a_run_directory_that_turns_read_only_on_one_node_ends_the_job(lab, tmp_path, data):
    def act(job: Job) -> None:
        job.wait_for_step(5)
        job.record("read-only run directory on node1", rank=1)
        job.cluster.nodes[1].read_only(job.run_dir)

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert outcome.code == 74 and "rank 1" in outcome.verdict["message"], outcome.report()
    assert names(outcome.run_dir / "checkpoints") == ["step-00000004"] and not outcome.leftovers, (
        outcome.report()
    )
    assert "EROFS" in outcome.verdict["message"] or "Read-only" in outcome.verdict["message"], (
        outcome.report()
    )
    tabulate(
        outcome,
        "run directory read-only on one node (found when it saves)",
        None,
        "exit 74, the last checkpoint intact",
    )


def test_a_read_only_run_directory_is_refused_before_the_start(lab, tmp_path, data):
    cluster = lab(2)
    (tmp_path / "there").mkdir()
    for node in cluster.everyone:
        node.read_only(tmp_path / "there")
    outcome = run(cluster, tmp_path, data, run_dir=tmp_path / "there" / "run", limit=60)
    assert outcome.code in (2, 74) and not outcome.attempts, outcome.report()
    assert "cannot be written" in outcome.log and "Traceback" not in outcome.log, outcome.report()


def test_a_run_directory_that_the_nodes_do_not_share_is_named(lab, tmp_path, data):
    """node1 has a file system of its own where the run directory should be."""
    cluster = lab(2)
    (tmp_path / "runs").mkdir()
    cluster.nodes[1].mount("-t", "tmpfs", "tmpfs", str(tmp_path / "runs"))
    outcome = run(cluster, tmp_path, data, run_dir=tmp_path / "runs" / "run", max_restarts=0)
    assert outcome.code not in (0, None) and not outcome.leftovers, outcome.report()
    assert "share" in outcome.log, outcome.report()


# --- checkpoints ----------------------------------------------------------------------------------


def shard(checkpoint: Path) -> Path:
    return max((checkpoint / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path: Path, count: int = 64) -> None:
    """Invert some bytes in the middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + count] = bytes(
        byte ^ 255 for byte in content[middle : middle + count]
    )
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "bits flipped in a shard": lambda c: flip(shard(c)),
    "truncated shard": lambda c: cut(shard(c)),
    "missing shard": lambda c: shard(c).unlink(),
    "empty index": lambda c: (c / "weights" / ".metadata").write_bytes(b""),
    "damaged state.json": lambda c: (c / "state.json").write_text("{"),
    "missing manifest": lambda c: (c / "manifest.json").unlink(),
}


def resume(stopped: Path, folder: Path, spoil) -> tuple[Path, object]:
    """A copy of the stopped run, spoiled, and the finished attempt to resume it."""
    copy = folder / "run"
    shutil.copytree(stopped, copy)
    spoil(copy / "checkpoints")
    return copy, launch("train", f"resume={copy}", check=False, timeout=120)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, stopped, reference, name):
    copy, done = resume(stopped, tmp_path, lambda folder: DAMAGES[name](folder / "step-00000010"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "step-00000010 is damaged" in done.stdout + done.stderr
        and "(step 8)" in done.stdout + done.stderr
    )
    assert losses(copy) == reference()


def test_a_checkpoint_damaged_during_the_job_is_passed_over_at_the_restart(
    lab, tmp_path, data, reference
):
    def act(job: Job) -> None:
        job.wait_for_step(9)
        flip(shard(job.run_dir / "checkpoints" / "step-00000008"))
        job.signal(job.cluster.rank(1)[1], signal.SIGKILL, "corrupt shard, then a fault", rank=1)

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert outcome.code == 0 and outcome.restarts == 1 and outcome.resumed_steps == [4], (
        outcome.report()
    )
    assert outcome.losses == reference() and not outcome.leftovers, outcome.report()
    tabulate(
        outcome,
        "bits flipped in a shard, then a fault",
        5.0,
        "resumed from the checkpoint before, losses bit-equal",
    )


@pytest.mark.parametrize("content", [b"", b"step-00000099", b"\xff\xfe\x00", None])
def test_a_damaged_latest_changes_nothing(tmp_path, stopped, reference, content):
    def spoil(folder: Path) -> None:
        (folder / "latest").unlink()
        if content is not None:
            (folder / "latest").write_bytes(content)

    copy, done = resume(stopped, tmp_path, spoil)
    assert done.returncode == 0 and "(step 10)" in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
    assert losses(copy) == reference()


def refused(done, *words: str) -> None:
    """The resume was refused with code 65 and one clear message."""
    text = done.stdout + done.stderr
    assert done.returncode == 65 and "Traceback" not in text, text
    assert all(word in text for word in words), text


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path, stopped):
    def spoil(folder: Path) -> None:
        for checkpoint in folder.glob("step-*"):
            cut(shard(checkpoint))

    refused(resume(stopped, tmp_path, spoil)[1], "no usable checkpoint")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, stopped, data):
    other = tmp_path / "other"
    launch(
        "train",
        *SETTINGS,
        *data,
        "model.hidden_size=32",
        "launch=deepspeed",
        "launch.num_devices=2",
        "train.stop_after_step=10",
        f"run_dir={other}",
    )

    def spoil(folder: Path) -> None:
        for checkpoint in folder.glob("step-*"):
            shutil.rmtree(checkpoint)
        shutil.copytree(other / "checkpoints" / "step-00000010", folder / "step-00000010")

    refused(resume(stopped, tmp_path, spoil)[1], "step-00000010")


def test_a_checkpoint_of_a_later_version_is_refused_and_no_older_one_taken(tmp_path, stopped):
    def spoil(folder: Path) -> None:
        path = folder / "step-00000010" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))

    refused(resume(stopped, tmp_path, spoil)[1], "99")


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damaged", ["train_0.bin", "train_0.idx", "tokenizer.json", "manifest.json"]
)
def test_damaged_data_are_named_or_made_again(tmp_path, stopped, reference, damaged):
    """The token store's sources are still there: making it again is as good as refusing. The cache
    is a copy.
    """
    copy, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(stopped, copy)
    config = (stopped / "config.yaml").read_text()
    [origin] = re.findall(r"cache_dir: (.+)", config)
    shutil.copytree(origin, cache)
    (copy / "config.yaml").write_text(config.replace(f"cache_dir: {origin}", f"cache_dir: {cache}"))
    [store] = [path.parent for path in cache.rglob("train_0.bin")]
    cut(store / damaged)
    done = launch("train", f"resume={copy}", check=False, timeout=120)
    text = done.stdout + done.stderr
    if done.returncode == 0:
        assert losses(copy) == reference()
    else:
        assert done.returncode in (2, 65) and damaged in text and "Traceback" not in text, text
