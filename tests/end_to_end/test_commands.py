"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import ROOT, TINY, last_json, launch, losses, ranks, write_text

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished inline run: (folder, data overrides, run directory, its completed process)."""
    folder = tmp_path_factory.mktemp("commands")
    data = write_text(folder)
    result = launch("train", *TINY, *data, f"run_dir={folder / 'run'}", "train.eval_interval=5",
                    "checkpoint.save_interval=4", "train.sample_prompt='the quick'", "tracker.tensorboard=true")
    return folder, data, folder / "run", result


def test_training_prints_balance_line_sample_and_json(trained):
    _, _, run, result = trained
    summary = last_json(result)
    assert summary["run_dir"] == str(run)
    assert summary["val_loss"] > 0 and summary["unigram_entropy"] > 0 and summary["step"] == 20
    assert result.stderr.count("balance ") >= 20
    assert "--- sample" in result.stdout and "the quick" in result.stdout


def test_metrics_and_routing_agree_with_the_batch(trained):
    _, _, run, _ = trained
    records = [json.loads(line) for line in (run / "routing.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 21))
    for record in records:
        for layer in record["counts"]:
            assert sum(layer) == 4 * 32 * 2  # sequences x length x top_k
    assert list((run / "tensorboard").glob("events*"))


def test_last_and_best_checkpoints_are_kept(trained):
    _, _, run, _ = trained
    names = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] in names and 2 <= len(names) <= 3
    assert (run / "checkpoints" / "latest").read_text() == names[-1]
    assert not list((run / "checkpoints").glob(".*partial"))


def test_evaluate_repeats_the_loss_of_training(trained):
    _, _, run, result = trained
    evaluated = last_json(launch("evaluate", f"run={run}", "checkpoint=latest", "max_sequences=16"))
    assert evaluated["val_loss"] == pytest.approx(last_json(result)["val_loss"], rel=1e-5)
    assert evaluated["perplexity"] > 1 and evaluated["bits_per_byte"] > 0
    assert len(evaluated["checkpoint"]) and "load/mean" in launch("evaluate", f"run={run}").stdout


def test_generate_is_reproducible_by_seed(trained):
    _, _, run, _ = trained
    texts = [last_json(launch("generate", f"run={run}", "prompt='the quick'", "max_new_tokens=12", f"seed={seed}"))["text"]
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_prepare_prints_counts(trained):
    _, data, _, _ = trained
    result = last_json(launch("prepare", *data, "model.vocab_size=300"))
    assert result["sources"][0]["documents"] + result["validation"]["documents"] == 400


def test_plan_names_every_problem_and_fails():
    result = launch("plan", "model.num_experts=6", "launch=deepspeed", "launch.num_devices=4",
                    "parallel.expert_parallel_size=4", "train.global_batch_size=30", check=False)
    assert result.returncode == 1
    problems = last_json(result)["problems"]
    assert any("num_experts 6 is not divisible" in p for p in problems)
    assert any("global_batch_size 30 is not a multiple" in p for p in problems)


def test_misspelt_keys_get_a_suggestion():
    for override in ("+model.num_expert=4", "+train.num_step=4"):
        result = launch("train", override, check=False)
        assert result.returncode == 2 and "did you mean" in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_composing_does_not_import_torch():
    code = ("import sys; sys.argv = ['launch.train', '--cfg', 'job']\n"
            "import runpy\n"
            "runpy.run_module('launch.train', run_name='__main__')\n"
            "assert 'torch' not in sys.modules, 'torch was imported'")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0 and "num_experts" in result.stdout, result.stderr


@pytest.mark.parametrize("override", ["experiment=quickstrat", "debug=overfitt", "model=huge"])
def test_unknown_group_options_are_refused(override):
    result = launch("train", override, check=False)
    assert result.returncode != 0 and "Could not find" in result.stderr


@pytest.mark.parametrize(("command", "override", "words"), [
    ("evaluate", "checkpoint=worst", "choose one of best, latest"), ("evaluate", "batch_size=0", "at least 1"),
    ("evaluate", "+sequences=3", "did you mean"), ("generate", "temperature=-1", "temperature is -1"),
    ("generate", "top_p=0", "top_p is 0"), ("generate", "prompt=''", "prompt is empty")])
def test_evaluate_and_generate_check_their_settings(trained, command, override, words):
    _, _, run, _ = trained
    prompt = ["prompt=5"] if command == "generate" and "prompt" not in override else []
    result = launch(command, f"run={run}", *prompt, override, check=False)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_a_job_whose_parent_is_killed_saves_and_ends(trained):
    folder, data, _, _ = trained
    run = folder / "or phan, ü"  # the path reaches the ranks whatever it holds
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "launch.train", *TINY, *data, *ranks(2, 2), f"run_dir='{run}'",
         "train.num_steps=100000"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not ((run / "metrics.jsonl").is_file() and len(losses(run)) >= 3):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no third step, exit code {process.returncode}\n{process.communicate()[1]}")
        time.sleep(0.5)
    process.kill()
    process.wait()
    while not (run / "result.json").is_file():
        assert time.monotonic() < deadline, "the job runs on without an owner"
        time.sleep(0.5)
    step = json.loads((run / "result.json").read_text())["step"]
    assert (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()


def test_dry_run_prints_the_command():
    result = launch("train", "launch=deepspeed", "launch.num_devices=2", "launch.dry_run=true")
    assert "--num_gpus=2" in result.stdout and "--module launch.agent" in result.stdout


def start(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})})


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_foreign_launchers_can_start_the_ranks(trained, launcher):
    folder, data, _, _ = trained
    python, port = sys.executable, str(29000 + os.getpid() % 900)
    overrides = [*TINY, *data, "parallel.expert_parallel_size=2", f"experiment_name=foreign-{folder.name}-{launcher}",
                 "train.num_steps=3", "optim.warmup_steps=1"]
    if launcher == "deepspeed":
        result = start([python, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module",
                        "launch.train", *overrides])
    elif launcher == "torchrun":
        result = start([python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m",
                        "launch.train", *overrides])
    else:  # what srun sets for its tasks
        ranks_ = [subprocess.Popen([python, "-m", "launch.train", *overrides], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NTASKS": "2",
                                        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": port,
                                        "OMP_NUM_THREADS": "1"})
                  for r in range(2)]
        outputs = [r.communicate(timeout=300) for r in ranks_]
        result = subprocess.CompletedProcess([], max(r.returncode for r in ranks_), outputs[0][0], outputs[0][1])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    run = ROOT / json.loads(lines[0])["run_dir"]
    assert len(list(run.parent.iterdir())) == 1, "more than one rank made a run directory"
    assert len(losses(run)) == 3
    import shutil

    shutil.rmtree(run.parent)


def test_a_failing_rank_gives_the_launcher_a_nonzero_code(trained):
    folder, data, _, _ = trained
    result = launch("train", *TINY, *data, *ranks(2, 2), f"run_dir={folder / 'diverged'}", "optim.lr=1e30",
                    "train.clip_grad_norm=0", check=False)
    assert result.returncode == 65 and "non-finite" in result.stderr and "optim.lr" in result.stderr, result.stderr[-2000:]
    (batch,) = (folder / "diverged" / "failures").glob("step-*/rank-00000.json")
    assert json.loads(batch.read_text())["micro_batches"]
    assert not list((folder / "diverged" / "checkpoints").glob("step-*"))


def test_sweeps_run_each_job_and_return_losses(trained):
    folder, data, _, _ = trained
    result = launch("train", "-m", *TINY, *data, "train.num_steps=3", "optim.warmup_steps=1", "optim.lr=0.01,0.001",
                    f"hydra.sweep.dir={folder / 'sweep'}", f"experiment_name=sweep-{folder.name}", "router.top_k=9,2",
                    check=False)
    assert result.returncode == 1 and result.stderr.count("router.top_k is 9") == 2  # failing jobs do not end the sweep
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2 and found[0]["run_dir"] != found[1]["run_dir"]
    assert found[0]["val_loss"] != found[1]["val_loss"]
    import shutil

    shutil.rmtree(ROOT / "runs" / f"sweep-{folder.name}")


@pytest.mark.parametrize("kind", ["inline", "deepspeed"])
def test_sigterm_saves_and_ends_with_zero(trained, kind):
    folder, data, _, _ = trained
    run = folder / f"sigterm-{kind}"
    number = 1 if kind == "inline" else 2
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "launch.train", *TINY, *data, *ranks(number, number), f"run_dir={run}",
         "train.num_steps=100000", "train.log_interval=1"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 200
        while not ((run / "metrics.jsonl").is_file() and len(losses(run)) >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    summary = json.loads(out.strip().splitlines()[-1])
    assert summary["stopped"] and summary["step"] >= 3
    assert (run / "checkpoints" / f"step-{summary['step']:08d}" / "manifest.json").is_file()
    resumed = launch("train", f"resume={run}", f"train.stop_after_step={summary['step'] + 2}")
    assert last_json(resumed)["step"] == summary["step"] + 2
    assert sorted(losses(run)) == list(range(1, summary["step"] + 3))
