"""Commands that read a run over ranks: what they give is what one process gives, and a rank that
fails ends all.
"""

from __future__ import annotations

import functools
import http.client
import importlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).parent))
from commandline import ROOT, TINY, last_json, launch, write_text

from launch.process.ranks import run_on_ranks
from tests import forked

RANKS = ["launch.num_devices=2", "parallel=ep2"]
WITH_ALL_EXPERTS = ["launch.num_devices=2", "parallel=single"]
"""Each rank has the whole model, and a share of the rows or prompts."""
LAYOUTS = [RANKS, pytest.param(WITH_ALL_EXPERTS, marks=pytest.mark.nightly)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    data = write_text(folder)
    launch("train", *TINY, *data, "train.num_steps=6", f"run_dir={folder / 'run'}")
    return folder / "run"


def on_two(command: str, *overrides: str, ranks: list[str]) -> list[str]:
    """Outputs of the two ranks of a command, which are forks told their places."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = forked.run_ranks(f"launch.{command}", 2, [*overrides, *ranks], environment, 300)
    assert [d.returncode for d in done] == [0, 0], [d.stderr[-2000:] for d in done]
    return [d.stdout for d in done]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_evaluation_over_two_ranks_is_that_of_one_process(run, ranks):
    expected = last_json(launch("evaluate", f"run={run}", "checkpoint=latest"))
    first, second = on_two("evaluate", f"run={run}", "checkpoint=latest", ranks=ranks)
    found = json.loads(first.splitlines()[-1])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert found["num_targets"] == expected["num_targets"]
    assert found["experts_per_token"] == expected["experts_per_token"]
    assert "val_loss" not in second


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_file_of_prompts_over_two_ranks_gets_the_texts_of_one_process(run, tmp_path, ranks):
    prompts = ["the quick", "a lazy dog", "seven wise owls", "rivers", "old oak trees and sing"]
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts) + "\nnot json")
    answers = {}
    for name, call in (("one", launch), ("two", functools.partial(on_two, ranks=ranks))):
        output = tmp_path / f"{name}.jsonl"
        arguments = [f"run={run}", f"input={source}", f"output={output}", "max_new_tokens=12"]
        done = call("generate", *arguments)
        tally = last_json(done) if name == "one" else json.loads(done[0].splitlines()[-1])
        assert (tally["answered"], tally["bad_lines"]) == (5, 1)
        lines = map(json.loads, output.read_text().splitlines())
        answers[name] = {line["id"]: line["text"] for line in lines}
    assert len(answers["two"]) == 5 and answers["two"] == answers["one"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launch.num_devices=3", "parallel=ep2"], "launch.num_devices 3 is not divisible"),
        (["launch.num_devices=0"], "launch.num_devices is 0"),
        ([*RANKS, "router.budget=2"], "calibrated in one process"),
        (["parallel=ep8", "launch.num_devices=8"], "has 4 experts, which"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_any_process_starts(run, overrides, words):
    result = launch("evaluate", f"run={run}", *overrides, check=False)
    assert result.returncode == 2 and words in result.stderr, result.stderr


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_ranks_get_the_checkpoint_by_its_name(run, tmp_path, monkeypatch, command):
    """What best or latest stands for may change between two ranks' looks at a run that trains."""
    module = importlib.import_module(f"launch.{command}")
    overrides = [f"run={run}", "checkpoint=latest", *RANKS]
    if command == "generate":
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "the"}\n')
        overrides += [f"input={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out.jsonl'}"]
    told = []
    monkeypatch.setattr(module, "run_on_ranks", lambda _, __, arguments: told.append(arguments))
    monkeypatch.setattr(sys, "argv", [command, *overrides])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        module.main(compose(command, overrides))
    (arguments,) = told
    asked = [word for word in overrides if word != "checkpoint=latest"]
    assert arguments == [*asked, "checkpoint=step-00000006"]


def test_a_rank_that_fails_ends_the_others(tmp_path, monkeypatch):
    """Rank 1 fails at once; rank 0 would sleep for long."""
    (tmp_path / "failing.py").write_text(
        "import os, sys, time\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(120)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begin = time.monotonic()
    assert run_on_ranks(2, "failing", []) == 7
    assert time.monotonic() - begin < 60


@pytest.mark.nightly
def test_the_command_starts_its_ranks(run, tmp_path):
    expected = last_json(launch("evaluate", f"run={run}"))["val_loss"]
    found = last_json(launch("evaluate", f"run={run}", *RANKS))["val_loss"]
    assert found == pytest.approx(expected, rel=1e-6)


def a_server_on_two(run: Path) -> tuple[forked.Forked, int]:
    """The command, and the port that it answers on."""
    settings = ["serve.port=0", "serve.model_name=tiny", "engine.max_slots=2", *RANKS]
    started = forked.Forked("launch.serve", [f"run={run}", *settings], {**os.environ})
    deadline = time.monotonic() + 600
    while not (found := re.search(r"serving tiny on http://127.0.0.1:(\d+)", started.printed)):
        assert time.monotonic() < deadline, started.wait(0.1)
        time.sleep(0.2)
    assert "2 slots on each of 2 ranks" in started.printed
    return started, int(found[1])


def a_stream(port: int) -> http.client.HTTPResponse:
    """One that has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": "the quick", "max_tokens": 40, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}), headers)
    return connection.getresponse()


@pytest.mark.nightly
def test_a_server_over_ranks_ends_its_requests_when_it_is_asked_to_end(run):
    """A signal to each of its processes, as service managers send it, and one text for all."""
    started, port = a_server_on_two(run)
    try:
        streams = [a_stream(port) for _ in range(4)]
        started.signal(signal.SIGTERM)
        for rank in psutil.Process(started._process.pid).children():
            rank.send_signal(signal.SIGTERM)
        texts = [stream.read().decode() for stream in streams]
        done = started.wait(600)
    finally:
        started.kill()
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_json(done)["requests"] == 4 and last_json(done)["generated_tokens"] == 160
    shown = set()
    for text in texts:
        assert text.endswith("data: [DONE]\n\n")
        pieces = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
        shown.add("".join(p["choices"][0]["text"] for p in pieces))
    (only,) = shown
    single = launch("generate", f"run={run}", "prompt=the quick", "max_new_tokens=40", GREEDY)
    assert only.startswith(last_json(single)["text"])


GREEDY = "temperature=0"


@pytest.mark.nightly
def test_a_server_ends_when_one_of_its_ranks_is_killed(run):
    """With the rank's code; streams end with an error, and no process is left."""
    started, port = a_server_on_two(run)
    try:
        ranks = psutil.Process(started._process.pid).children()
        second = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
        streams = [a_stream(port) for _ in range(2)]
        second.kill()
        for stream in streams:
            # what had ended before is whole; no client waits
            text = stream.read().decode()
            assert "the engine has failed" in text or '"finish_reason": "length"' in text
        done = started.wait(600)
        assert done.returncode == 137
        assert "error: rank 1 is gone" in done.stderr
        psutil.wait_procs(ranks, 30)
        assert not any(rank.is_running() for rank in ranks)
    finally:
        started.kill()


def test_a_server_leaves_the_starting_of_its_ranks_to_nobody_else(run):
    """A foreign launcher gives no key."""
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    found = launch("serve", f"run={run}", *RANKS, check=False, env=environment)
    assert found.returncode == 2
    assert "launch.serve starts its 2 ranks itself" in found.stderr, found.stderr
