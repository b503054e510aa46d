"""Asked to stop in any phase of a run in this process: what was trained is saved, and an unfinished
evaluation is no result."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

import launch.generate
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job import follower
from launch.job.judge import Judge, Verdict
from launch.job.supervisor import Peer, Supervisor
from launch.process.exits import FAILURES
from launch.process.identity import ROOT
from launch.saved.files import save_config
from launch.saved.resume import with_saved_config
from launch.train import supervise
from tests.composing import composed
from tests.end_to_end.commandline import TINY, losses, write_text
from train.config.launching import WatchdogConfig
from train.config.training import CheckpointConfig
from train.data.shards.parts import Parts
from train.observe.probe import RoutingProbe
from train.rank import heartbeat

pytestmark = [pytest.mark.slow]  # seconds of a core

SETTINGS = (
    *TINY,
    "train.num_steps=4",
    "train.eval_interval=2",
    "train.eval_max_sequences=6",
    "checkpoint.save_interval=3",
    "train.sample_prompt=the",
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Path:
    """A run that nobody stops."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train_here(folder, data)
    return folder


def train_here(folder: Path, data: list[str], *overrides: str) -> dict:
    """python -m launch.train in this process, also with resume=; returns the run's result."""
    if any(o.startswith("resume=") for o in overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        config = with_saved_config(config)
        HydraConfig.instance().cfg = None
    else:
        config = composed(*SETTINGS, *data, f"run_dir={folder}", *overrides)
        save_config(config)
    supervise(config, parse(plain(config), 1))
    return json.loads((folder / "result.json").read_text())


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def evaluations(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in lines if "eval/val_loss" in record]


def at_beat(monkeypatch, number: signal.Signals, step: int, phase: str, times: int = 1) -> None:
    """Send the signal when the run begins `phase` of `step` for the times-th time."""
    seen: list[str] = []

    def beat(now: int, name: str) -> None:
        if (now, name) == (step, phase):
            seen.append(name)
            if len(seen) == times:
                signal.raise_signal(number)

    monkeypatch.setattr(heartbeat, "beat", beat)


PHASES = [
    (1, "data", 1, 0),
    (1, "forward", 2, 1),
    (2, "backward", 1, 2),
    (2, "step", 1, 2),
    (2, "log", 1, 2),
    (2, "evaluate", 1, 2),
    (2, "evaluate", 3, 2),
    (2, "save", 1, 2),
    (3, "save", 1, 3),
    (4, "data", 1, 3),
]
"""Step and phase in which a signal comes, at which of its times, and the last step that is kept."""


@pytest.mark.parametrize(
    ("number", "step", "phase", "times", "saved"),
    [
        # every phase and the signals in turn; nightly all signals in every phase
        pytest.param(
            *(number, *case),
            id=f"{case}-{number.name}",
            marks=[pytest.mark.nightly] if (i - j) % len(SIGNALS) else [],
        )
        for i, case in enumerate(PHASES)
        for j, number in enumerate(SIGNALS)
    ],
)
def test_it_saves_what_was_trained_in_every_phase(
    tmp_path, data, monkeypatch, number, step, phase, times, saved
):
    before = [signal.getsignal(n) for n in SIGNALS]
    at_beat(monkeypatch, number, step, phase, times)
    result = train_here(tmp_path / "run", data)
    assert (result["stopped"], result["step"]) == (True, saved)
    assert checkpoints(tmp_path / "run")[-1:] == ([saved] if saved else [])
    # a step is logged once
    assert sorted(losses(tmp_path / "run")) == list(range(1, saved + 1))
    assert before == [signal.getsignal(n) for n in SIGNALS]


@pytest.mark.parametrize(
    ("step", "phase", "times"),
    [(1, "data", 1), (2, "evaluate", 2), (3, "save", 1), (4, "evaluate", 4)],
    ids=str,
)
def test_a_stopped_run_goes_on_as_if_nobody_had_stopped_it(
    tmp_path, data, reference, monkeypatch, step, phase, times
):
    with monkeypatch.context() as patch:
        at_beat(patch, signal.SIGTERM, step, phase, times)
        assert train_here(tmp_path / "run", data)["stopped"]
    resumed = train_here(tmp_path / "run", data, f"resume={tmp_path / 'run'}")
    assert not resumed["stopped"] and losses(tmp_path / "run") == losses(reference)
    assert resumed["val_loss"] == json.loads((reference / "result.json").read_text())["val_loss"]
    # the one that was left, too
    assert evaluations(tmp_path / "run") == evaluations(reference)


def test_an_evaluation_that_was_left_is_no_result(tmp_path, data, monkeypatch):
    at_beat(monkeypatch, signal.SIGTERM, 2, "evaluate", 3)
    result = train_here(tmp_path / "run", data)
    assert [result[n] for n in ("val_loss", "best_val_loss", "bits_per_byte")] == [None] * 3
    assert not evaluations(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "best.json").exists()
    assert not list((tmp_path / "run").glob("probe/*"))


def test_the_last_evaluation_can_be_left_and_taken_up(tmp_path, data, reference, monkeypatch):
    with monkeypatch.context() as patch:
        at_beat(patch, signal.SIGTERM, 4, "evaluate", 3)
        result = train_here(tmp_path / "run", data)
    assert result["stopped"] and result["step"] == 4 and evaluations(tmp_path / "run") == [2]
    assert checkpoints(tmp_path / "run")[-1] == 4
    assert not train_here(tmp_path / "run", data, f"resume={tmp_path / 'run'}")["stopped"]
    assert evaluations(tmp_path / "run") == evaluations(reference)


def test_the_probe_of_a_whole_evaluation_is_kept(tmp_path, data, monkeypatch):
    measure = RoutingProbe.measure

    def measured(self, step):
        signal.raise_signal(signal.SIGTERM)
        return measure(self, step)

    monkeypatch.setattr(RoutingProbe, "measure", measured)
    result = train_here(tmp_path / "run", data)
    assert (result["stopped"], result["step"]) == (True, 2) and evaluations(tmp_path / "run") == [2]
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert best["val_loss"] == result["val_loss"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_preparation_is_left_at_once_and_the_run_can_begin_later(
    tmp_path, data, reference, monkeypatch, number
):
    data = [*data[:-1], f"data.cache_dir={tmp_path / 'cache'}"]
    write, asked = Parts.write, os.getpid()

    def written(*arguments):
        os.kill(asked, number)
        time.sleep(60)  # it is ended before
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", written)
        result = train_here(tmp_path / "run", data)
    assert (result["stopped"], result["step"]) == (True, 0)
    # the tokenizer that was trained stays for the next start, and no half of a shard
    (left,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in left.iterdir()) == ["lock", "tokenizer.json"]
    assert not train_here(tmp_path / "run", data, f"resume={tmp_path / 'run'}")["stopped"]
    assert losses(tmp_path / "run") == losses(reference)


def test_the_last_sample_is_cut_short_and_the_run_is_done(tmp_path, data, monkeypatch, capsys):
    sample = launch.generate.sample

    def pieces(*arguments, **options):
        for i, piece in enumerate(sample(*arguments, **options)):
            if i == 2:
                signal.raise_signal(signal.SIGTERM)
            yield piece

    monkeypatch.setattr(launch.generate, "sample", pieces)
    result = train_here(tmp_path / "run", data)
    words = capsys.readouterr().out
    assert not result["stopped"] and result["step"] == 4 and "the sample is left" in words
    assert json.loads(words.splitlines()[-1])["val_loss"] == result["val_loss"]


# --- with a supervisor ----------------------------------------------------------------------------


def watched(*numbers: signal.Signals) -> Verdict | None:
    """What a supervisor makes of signals, one at every look, of a rank that is slow to save."""
    supervisor = object.__new__(Supervisor)
    supervisor.limits, supervisor.peers = WatchdogConfig(), []
    supervisor.address_file, supervisor.kept = Path("supervisor.json"), []
    supervisor.config = SimpleNamespace(checkpoint=CheckpointConfig(grace_seconds=1000.0))
    supervisor.stop_asked = supervisor.interrupts = 0
    supervisor.judge = Judge(1, supervisor.limits, time.monotonic())
    coming = iter((*numbers, None, None))

    def listen(seconds: float) -> None:
        number = next(coming, "done")
        if isinstance(number, signal.Signals):
            supervisor._asked_to_stop(number, None)
        state = {"exit_code": 0, "phase": "done"} if number == "done" else {"phase": "save"}
        supervisor.judge.report(0, "here", time.monotonic(), state)

    supervisor.listen = listen
    return supervisor._watch(SimpleNamespace(poll=lambda: None))


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ((signal.SIGTERM, signal.SIGTERM), None),
        ((signal.SIGUSR1, signal.SIGTERM), None),
        ((signal.SIGINT,), None),
        ((signal.SIGTERM, signal.SIGINT), None),
        ((signal.SIGINT, signal.SIGINT), "interrupted"),
    ],
    ids=str,
)
def test_only_a_second_ctrl_c_ends_a_job_before_it_has_saved(numbers, kind):
    verdict = watched(*numbers)
    assert (verdict and verdict.kind) == kind
    assert kind is None or (FAILURES[kind].code == 130 and not FAILURES[kind].restart)


def test_a_further_node_that_is_told_to_stop_has_the_supervisor_stop_the_job(monkeypatch, tmp_path):
    sent: list[dict] = []

    def receive() -> list[dict]:
        if sent:
            return [{"order": "end", "code": 0}]
        signal.raise_signal(signal.SIGTERM)
        return []

    line = SimpleNamespace(send=sent.append, receive=receive, close=lambda: None)
    monkeypatch.setattr(follower, "_join", lambda path, node: line)
    config = SimpleNamespace(launch=SimpleNamespace(node_rank=1))
    assert follower.follow(config, tmp_path) == 0 and sent == [{"asked_to_stop": True}]
    supervisor = object.__new__(Supervisor)
    supervisor.stop_asked = 0
    arrived = SimpleNamespace(receive=lambda: sent)
    supervisor._receive(Peer(arrived, "nonce", 0.0, node=1, greeted=True))
    assert supervisor.stop_asked == 1
