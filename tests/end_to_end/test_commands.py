"""The command line as a user meets it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from tests.pairwise import some_daily

sys.path.insert(0, str(Path(__file__).parent))
from commandline import ROOT, TINY, last_json, last_of_each, launch, losses, ranks, write_text

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished inline run: (folder, data overrides, run directory, its completed process)."""
    folder = tmp_path_factory.mktemp("commands")
    data = write_text(folder)
    result = launch(
        "train",
        *TINY,
        *data,
        f"run_dir={folder / 'run'}",
        "train.eval_interval=5",
        "checkpoint.save_interval=4",
        "train.sample_prompt=the quick",
        "tracker.tensorboard=true",
        "optim.ema_decay=0.9",
    )
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


def test_the_plan_says_what_a_run_writes(trained):
    """Estimates from above, by less than a half."""
    from launch.config.overrides import plain
    from launch.config.parse import parse
    from launch.job import disk
    from launch.job.disk import disk_usage
    from launch.saved.files import load_config
    from train.audit.format import is_sampled
    from train.audit.log import LINES_SHARE
    from train.observe.probe import MAX_KEPT, MAX_TOKENS

    _, _, run, _ = trained
    config = parse(plain(load_config(str(run / "config.yaml"))), 1)
    found = disk_usage(config, 1)
    real = {
        "metrics": (run / "metrics.jsonl").stat().st_size,
        "routing": (run / "routing.jsonl").stat().st_size,
        "audit steps": (run / "audit" / "steps.jsonl").stat().st_size,
        "audit records": (run / "audit" / "records-00000.bin").stat().st_size,
        "checkpoints": sum(
            p.stat().st_size for p in (run / "checkpoints").rglob("*") if p.is_file()
        ),
    }
    for kind in ("metrics", "routing", "audit steps"):
        assert 0.67 * real[kind] <= found[kind].total <= 1.5 * real[kind], (kind, real, found)
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert len(folders) <= found["checkpoints"].number == 3
    tensors = 4 * 100  # of so small a model most of a checkpoint is headers
    assert (
        found["checkpoints"].each
        <= real["checkpoints"] / len(folders)
        <= found["checkpoints"].each + 2048 * tensors
    )
    sampled = is_sampled(np.arange(20 * 4 * 32), 256).sum() * len(config.model.moe_layers)
    assert real["audit records"] == sampled * (16 + 3 * 2)
    assert found["audit records"].total == pytest.approx(real["audit records"], rel=0.75)
    assert disk.LINES_SHARE == LINES_SHARE and (disk.PROBE_TOKENS, disk.PROBES_KEPT) == (
        MAX_TOKENS,
        MAX_KEPT,
    )


def test_evaluate_repeats_the_loss_of_training(trained):
    _, _, run, result = trained
    evaluated = last_json(launch("evaluate", f"run={run}", "checkpoint=latest", "max_sequences=16"))
    assert evaluated["val_loss"] == pytest.approx(last_json(result)["val_loss"], rel=1e-5)
    assert evaluated["perplexity"] > 1 and evaluated["bits_per_byte"] > 0
    assert evaluated["moe/max_load_layer"] == 1  # layers are called what the model calls them
    assert len(evaluated["checkpoint"]) and "load/mean" in launch("evaluate", f"run={run}").stdout


def test_a_run_without_a_checkpoint_stands_in_the_table_and_the_others_are_evaluated(
    trained, tmp_path
):
    _, _, run, _ = trained
    begun = tmp_path / "runs" / "begun"
    begun.mkdir(parents=True)
    shutil.copy(run / "config.yaml", begun)
    (tmp_path / "runs" / "whole").symlink_to(run)
    told = launch("evaluate", f"run={tmp_path}/runs/*", "max_sequences=8")
    found = last_json(told)
    assert [row["run_dir"] for row in found["rows"]] == [f"{tmp_path}/runs/whole"]
    assert [row["run_dir"] for row in found["left_out"]] == [str(begun)]
    assert "no usable checkpoint" in found["left_out"][0]["reason"]
    assert f"-  {begun}: " in told.stdout

    shutil.copytree(begun, begun.with_name("other"))
    (tmp_path / "runs" / "whole").unlink()
    told = launch("evaluate", f"run={tmp_path}/runs/*", check=False)
    assert told.returncode == 65 and "no run can be evaluated" in told.stderr


def test_checkpoints_and_runs_are_evaluated_side_by_side(trained):
    """The same numbers as one by one, and the lowest is named where losses may be compared."""
    _, _, run, _ = trained
    every = ["max_sequences=4", "checkpoint=all"]
    told = launch("evaluate", f"run={run.parent}/ru*", *every)
    table = last_json(told)
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert [row["checkpoint"] for row in table["rows"]] == names and table["comparable"]
    alone = last_json(launch("evaluate", f"run={run / 'checkpoints' / names[0]}", every[0]))
    for key in ("val_loss", "perplexity", "bits_per_byte", "step", "experts_per_token"):
        assert alone[key] == table["rows"][0][key], key
    best = min(table["rows"], key=lambda row: row["val_loss"])["checkpoint"]
    assert f"lowest loss: {run}/checkpoints/{best}" in told.stdout


def test_the_mean_of_checkpoints_is_measured_and_sampled_from(trained):
    _, _, run, _ = trained
    names = sorted((path.name for path in (run / "checkpoints").glob("step-*")), reverse=True)
    mean = ["checkpoint=latest", "average=2"]
    told = launch("evaluate", f"run={run}", *mean, "max_sequences=8")
    found = last_json(told)
    assert found["averaged"] == names[:2] and "their mean: val_loss" in told.stdout
    table = last_json(launch("evaluate", f"run={run}", "checkpoint=all", "max_sequences=8"))
    losses = [row["val_loss"] for row in table["rows"]]
    assert min(losses) - 0.1 < found["val_loss"] < max(losses)
    assert found["val_loss"] not in losses
    text = last_json(launch("generate", f"run={run}", *mean, "prompt=the", "max_new_tokens=4"))
    assert text["text"]
    told = launch("evaluate", f"run={run}", "checkpoint=latest", "weights=ema", "max_sequences=8")
    assert "the moving average: val_loss" in told.stdout
    ema = last_json(told)
    assert ema["weights"] == "ema" and ema["val_loss"] not in (*losses, found["val_loss"])
    refused = launch("export", f"run={run}", "to=nowhere", "average=9", check=False)
    assert refused.returncode == 2 and "average=9 needs 9 whole checkpoints" in refused.stderr


def test_generate_is_reproducible_by_seed(trained):
    _, _, run, _ = trained
    texts = [
        last_json(
            launch(
                "generate", f"run={run}", "prompt=the quick", "max_new_tokens=12", f"seed={seed}"
            )
        )["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_file_of_prompts_gets_the_texts_of_single_prompts(trained, tmp_path):
    _, _, run, _ = trained
    prompts = ["the quick", "a lazy dog", "seven wise owls watch from old oak trees", "rivers"]
    lines = [{"prompt": p, "id": f"p{i}", "label": i} for i, p in enumerate(prompts)]
    text = "\n".join([*map(json.dumps, lines), "not json", "", json.dumps({"id": "empty"})])
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text(text)
    settings = ["max_new_tokens=12", "temperature=0", "engine.max_slots=3"]
    command = ["generate", f"run={run}", f"input={source}", f"output={output}", *settings]
    done = launch(*command)
    assert last_json(done)["answered"] == 4 and last_json(done)["bad_lines"] == 2
    assert f"{source}:5: is not JSON" in done.stderr and f"{source}:7: has no" in done.stderr
    found = {a["id"]: a for a in map(json.loads, output.read_text().splitlines())}
    single = last_json(launch("generate", f"run={run}", f"prompt='{prompts[2]}'", *settings))
    assert found["p2"]["text"] == single["text"] and found["p2"]["label"] == 2

    # A restart answers what is missing, and what a kill has cut off.
    whole = output.read_text().splitlines(keepends=True)
    output.write_text("".join(whole[:2]) + whole[2][:20])
    again = last_json(launch(*command))
    assert (again["answered"], again["skipped"]) == (2, 2)
    answers = {a["id"]: a for a in map(json.loads, output.read_text().splitlines())}
    # in batches of another size sums are rounded otherwise, which their texts do not show
    assert [answers[name].pop("log_probability") for name in found] == pytest.approx(
        [a.pop("log_probability") for a in found.values()], rel=1e-4
    )
    assert answers == found
    other = launch(*command, "seed=9", check=False)
    assert other.returncode == 2 and "answers under other settings" in other.stderr


def test_a_server_ends_its_requests_when_it_is_asked_to_end(trained, tmp_path):
    """SIGTERM in the midst of a stream: it ends whole, and the command with 0. What was recorded is
    generated again.
    """
    _, _, run, _ = trained
    record, attention = tmp_path / "served.jsonl", "attention=scc_short"
    settings = ["serve.port=0", "serve.model_name=tiny", "engine.max_slots=2", attention]
    settings += ["serve.attention_audit.sample_one_in=1", "serve.shadow.sample_one_in=1"]
    settings += [f"serve.record={record}"]
    started = forked.Forked("launch.serve", [f"run={run}", *settings], {**os.environ})
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"serving tiny on http://127.0.0.1:(\d+)", started.printed)):
            assert time.monotonic() < deadline, started.wait(0.1)
            time.sleep(0.05)
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        body = {"prompt": "the quick", "max_tokens": 40, "temperature": 0, "stream": True}
        headers = {"Content-Type": "application/json"}
        connection.request(
            "POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}), headers
        )
        response = connection.getresponse()
        first = response.read(6)
        started.signal(signal.SIGTERM)
        text = first.decode() + response.read().decode()
        assert response.status == 200 and text.endswith("data: [DONE]\n\n")
        done = started.wait(60)
    finally:
        started.kill()
    assert done.returncode == 0, done.stderr[-2000:]
    result = last_json(done)
    # it may have ended before there was time to look
    assert result.pop("shadow")["requests"] <= 1 and result.pop("attention_audit")["audits"] <= 1
    assert result == {
        "model": "tiny",
        "requests": 1,
        "prompt_tokens": result["prompt_tokens"],
        "generated_tokens": 40,
    }
    pieces = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
    shown = "".join(p["choices"][0]["text"] for p in pieces)
    single = launch(
        "generate",
        f"run={run}",
        "prompt=the quick",
        "max_new_tokens=40",
        "temperature=0",
        attention,
    )
    assert shown.startswith(last_json(single)["text"])
    files = [f"input={record}", f"output={tmp_path / 'again.jsonl'}"]
    again = launch("generate", f"run={run}", *files, attention)
    assert (last_json(again)["replayed"], last_json(again)["same"]) == (1, 1)
    assert "of 1 recorded requests 1 came again token by token" in again.stdout


@pytest.mark.parametrize(
    ("stored", "error"),
    [pytest.param("int8", 0.02, marks=pytest.mark.nightly), ("fp8", 0.05)],  # one code for both
)
def test_experts_of_8_bits_are_measured_before_they_are_kept(trained, stored, error):
    _, _, run, _ = trained
    make = ["quantize", f"run={run}", f"weights={stored}"]
    refused = launch(*make, "max_loss_increase=1e-12", check=False)
    missing = launch("generate", f"run={run}", "prompt=the", f"weights={stored}", check=False)
    assert missing.returncode == 2 and "make it: python -m launch.quantize" in missing.stderr
    # of so small a model rounding may lower the loss
    if refused.returncode:
        assert refused.returncode == 2 and "nothing was written" in refused.stderr
        assert not list((run / "quantized").glob(f"*-{stored}*"))
    done = launch(*make, "max_loss_increase=0.05")
    result = last_json(done)
    assert result["low"] <= result["difference"] <= result["high"] <= 0.05
    assert len(result["agreement"]) == 1 and min(result["agreement"]) > 0.9
    (row,) = [line for line in done.stdout.splitlines() if line.endswith("%")]
    assert row.split()[0] == "1"  # the layer, as evaluate and audit number it
    assert len(result["expert_errors"]) == 1 and 0 < max(map(max, result["expert_errors"])) < error
    assert result["bytes_after"]["experts"] < 0.4 * result["bytes_before"]["experts"]
    assert result["bytes_after"]["others"] == result["bytes_before"]["others"]
    kept = json.loads((run / "quantized" / f"{result['checkpoint']}-{stored}.json").read_text())
    assert kept["difference"] == result["difference"]
    generated = ["generate", f"run={run}", "prompt=the quick", "max_new_tokens=8", "temperature=0"]
    assert last_json(launch(*generated, f"weights={stored}"))["text"]
    evaluated = last_json(launch("evaluate", f"run={run}", f"weights={stored}"))
    assert evaluated["val_loss"] == pytest.approx(result["quantized_loss"], abs=1e-5)
    assert evaluated["weights"] == stored
    cells = ["rows=[1]", "contexts=[8]", "new_tokens=4", "max_rounds=6"]
    bench = [
        last_json(launch("benchmark", f"run={run}", *cells, f"weights={w}"))
        for w in ("native", stored)
    ]
    native, smaller = (b["measured"][0]["decode_bytes_per_token"] for b in bench)
    assert smaller < native


def test_a_benchmark_measures_every_variant_in_every_cell(trained, tmp_path):
    _, _, run, _ = trained
    cells = ["rows=[1,3]", "contexts=[8]", "new_tokens=4", "attentions=[trained,scc_short]"]
    prices = ["price_per_hour=2", "price_per_kwh=0.3"]
    settings = ["max_rounds=6", *prices, f"output={tmp_path / 'out.json'}"]
    done = launch("benchmark", f"run={run}", *cells, *settings)
    result = last_json(done)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    found = {(m["rows"], m["attention"]): m for m in result["measured"]}
    assert set(found) == {(r, a) for r in (1, 3) for a in ("trained", "scc_short")}
    for (rows, attention), m in found.items():
        assert m["rounds"] == 6 and m["budget"] is None and m["decode_experts"] == 2.0
        assert 2.0 <= m["distinct_experts"] <= min(4, 2 * rows)
        assert m["cost_per_million_tokens"] == pytest.approx(
            2 / 3600 / m["tokens_per_second"] * 1e6
        )
        told = m["joules_per_token"], m["energy_cost_per_million_tokens"]
        assert (told == (None, None)) is result["energy"].startswith("not reported: ")
        ratio = m["ratios"]["tokens_per_second"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        assert attention != "trained" or ratio == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "3 rows of 8 tokens, 6 rounds" in done.stdout and "cost/M" in done.stdout
    assert f"energy: {result['energy']}" in done.stdout
    refused = launch("benchmark", f"run={run}", *cells, "budgets=[1,2]", check=False)
    assert refused.returncode == 2 and "router.budget=[1,2] save_budgets=true" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "env", "says"),
    [
        (["serve.host=0.0.0.0"], {}, "set the variable LOADSTONE_SERVE_TOKEN to a secret"),
        ([], {"LOADSTONE_SERVE_TOKEN": "short"}, "must have at least 16 ASCII characters"),
        (["serve.port=70000"], {}, "serve.port is 70000; it must be between 0 and 65535"),
        (["path=x"], {}, "run and path are both set; drop one"),
    ],
)
def test_a_server_that_cannot_be_is_refused_before_anything_is_read(settings, env, says, tmp_path):
    """Nothing could be read in an empty directory."""
    done = launch("serve", f"run={tmp_path}", *settings, check=False, env=env)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert "short" not in done.stderr.replace("shorter", "") and "Traceback" not in done.stderr


def test_prepare_prints_counts(trained):
    _, data, _, _ = trained
    result = last_json(launch("prepare", *data, "model.vocab_size=300"))
    assert result["sources"][0]["documents"] + result["validation"]["documents"] == 400


def test_plan_names_every_problem_and_fails():
    result = launch(
        "plan",
        "model.num_experts=6",
        "launch=deepspeed",
        "launch.num_devices=4",
        "parallel.expert_parallel_size=4",
        "train.global_batch_size=30",
        check=False,
    )
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
    code = (
        "import sys; sys.argv = ['launch.train', '--cfg', 'job']\n"
        "import runpy\n"
        "runpy.run_module('launch.train', run_name='__main__')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0 and "num_experts" in result.stdout, result.stderr


@pytest.mark.parametrize("override", ["experiment=quickstrat", "debug=overfitt", "model=huge"])
def test_unknown_group_options_are_refused(override):
    result = launch("train", override, check=False)
    assert result.returncode != 0 and "does not exist" in result.stderr


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("evaluate", "checkpoint=worst", "choose one of best, latest"),
        ("evaluate", "batch_size=0", "at least 1"),
        ("evaluate", "+sequences=3", "did you mean"),
        ("generate", "temperature=-1", "temperature is -1"),
        ("generate", "top_p=0", "top_p is 0"),
        ("generate", "prompt=", "prompt is empty"),
        ("generate", "top_k=0", "top_k is 0"),
        ("generate", "engine.max_slots=0", "engine.max_slots is 0"),
        ("generate", "output=x.jsonl", "input and output belong together"),
    ],
)
def test_evaluate_and_generate_check_their_settings(trained, command, override, words):
    _, _, run, _ = trained
    prompt = ["prompt=5"] if command == "generate" and "prompt" not in override else []
    result = launch(command, f"run={run}", *prompt, override, check=False)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_a_job_whose_parent_is_killed_saves_and_ends(trained):
    folder, data, _, _ = trained
    run = folder / "or phan, ü"  # the path reaches the ranks whatever it holds
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "launch.train",
            *last_of_each(
                (*TINY, *data, *ranks(2, 2), f"run_dir='{run}'", "train.num_steps=100000")
            ),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not ((run / "metrics.jsonl").is_file() and len(losses(run)) >= 3):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(
                f"no third step, exit code {process.returncode}\n{process.communicate()[1]}"
            )
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
    assert "--num_gpus=2" in result.stdout and "--module launch.job.agent" in result.stdout


def start(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})},
    )


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("deepspeed", marks=pytest.mark.nightly),
        pytest.param("torchrun", marks=pytest.mark.nightly),
        "srun",
    ],
)
def test_foreign_launchers_can_start_the_ranks(trained, launcher):
    folder, data, _, _ = trained
    python, port = sys.executable, str(29000 + os.getpid() % 900)
    overrides = last_of_each(
        (
            *TINY,
            *data,
            "parallel.expert_parallel_size=2",
            f"experiment_name=foreign-{folder.name}-{launcher}",
            "train.num_steps=3",
            "optim.warmup_steps=1",
        )
    )
    if launcher == "deepspeed":
        result = start(
            [
                python,
                "-m",
                "deepspeed.launcher.runner",
                "--num_gpus",
                "2",
                "--master_port",
                port,
                "--module",
                "launch.train",
                *overrides,
            ]
        )
    elif launcher == "torchrun":
        result = start(
            [
                python,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--master-port",
                port,
                "-m",
                "launch.train",
                *overrides,
            ]
        )
    else:  # what srun sets for its tasks
        tasks = [
            forked.Forked(
                "launch.train",
                overrides,
                {
                    **os.environ,
                    "SLURM_PROCID": str(r),
                    "SLURM_LOCALID": str(r),
                    "SLURM_NTASKS": "2",
                    "SLURM_STEP_NUM_TASKS": "2",
                    "SLURM_STEP_ID": "0",
                    "SLURM_JOB_ID": port,
                    "OMP_NUM_THREADS": "1",
                },
            )
            for r in range(2)
        ]
        done = [task.wait(300) for task in tasks]
        result = max(done, key=lambda d: abs(d.returncode))
        result = result if result.returncode else done[0]
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
    result = launch(
        "train",
        *TINY,
        *data,
        *ranks(2, 2),
        f"run_dir={folder / 'diverged'}",
        "optim.lr=1e30",
        "train.clip_grad_norm=0",
        check=False,
    )
    assert (
        result.returncode == 65 and "non-finite" in result.stderr and "optim.lr" in result.stderr
    ), result.stderr[-2000:]
    (batch,) = (folder / "diverged" / "failures").glob("step-*/rank-00000.json")
    assert json.loads(batch.read_text())["micro_batches"]
    assert not list((folder / "diverged" / "checkpoints").glob("step-*"))


def test_sweeps_run_each_job_and_return_losses(trained):
    folder, data, _, _ = trained
    result = launch(
        "train",
        "-m",
        *TINY,
        *data,
        "train.num_steps=3",
        "optim.warmup_steps=1",
        "optim.lr=0.01,0.001",
        f"hydra.sweep.dir={folder / 'sweep'}",
        f"experiment_name=sweep-{folder.name}",
        "router.top_k=9,2",
        check=False,
    )
    # failing jobs do not end the sweep; what ended all that failed is its code
    assert result.returncode == 2 and result.stderr.count("router.top_k is 9") == 2
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 3 and found[0]["run_dir"] != found[1]["run_dir"]
    assert found[0]["val_loss"] != found[1]["val_loss"]

    # a table at the end: what each job had of its own, what came of it, and which was the best
    losses_by_job = {1: found[0]["val_loss"], 3: found[1]["val_loss"]}
    assert [row["val_loss"] for row in found[2]["sweep"]] == [
        losses_by_job.get(job) for job in range(4)
    ]
    assert found[2]["sweep"][3]["overrides"] == ["optim.lr=0.001", "router.top_k=2"]
    assert found[2]["sweep"][3]["run_dir"] == found[1]["run_dir"]
    best = min(losses_by_job, key=losses_by_job.get)
    assert found[2]["best"] == best and f"best: job {best}, " in result.stdout
    table = result.stdout[result.stdout.index("sweep, by held-out loss") :].splitlines()
    assert table[2].split()[0] == str(best) and table[4].split()[3] == "failed"
    (command,) = [line for line in table if line.startswith("next: ")]
    words = shlex.split(command)
    compared = launch("runs", *words[words.index("launch.runs") + 1 :])
    assert set(last_json(compared)["differences"]) >= {"optim.lr"}
    import shutil

    shutil.rmtree(ROOT / "runs" / f"sweep-{folder.name}")


@pytest.mark.parametrize("kind", some_daily(["inline", "deepspeed"]))
def test_sigterm_saves_and_ends_with_zero(trained, kind):
    folder, data, _, _ = trained
    run = folder / f"sigterm-{kind}"
    number = 1 if kind == "inline" else 2
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "launch.train",
            *last_of_each(
                (*TINY, *data, *ranks(number, number), f"run_dir={run}", "train.num_steps=100000")
            ),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 200
        while not ((run / "metrics.jsonl").is_file() and len(losses(run)) >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(
                timeout=5
            )
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
