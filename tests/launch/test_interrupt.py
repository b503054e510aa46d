"""Ctrl-C and SIGTERM in the commands: no traceback, nothing half-written, exit code 128 + the
signal's number."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time

import pytest

import train.data.prepare
from launch import prepare
from launch.common import ROOT, run_main
from launch.interrupt import Interrupts
from tests.end_to_end.commandline import TINY, write_text
from train.manifest import replacing
from train.stop import Stopped, StopSignal

COMMANDS = ("audit", "dashboard", "doctor", "evaluate", "generate", "place", "plan", "prepare",
            "report", "train")
CONFIG = {name: name for name in COMMANDS} | {"plan": "train"}


@pytest.fixture
def command(monkeypatch, capfd):
    """command(name, function, *arguments) -> (exit code, stderr) of run_main in this process."""
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(name, function, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(SystemExit) as ended:
            run_main(name, function)
        assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        return ended.value.code, capfd.readouterr().err
    return run


def test_every_command_ends_by_the_same_rule():
    for name in COMMANDS:
        tree = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
        assert f"run_main('{CONFIG[name]}', " in ast.unparse(tree.body[-1])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_a_command_without_a_traceback_and_with_its_clean_up(command, name, number):
    cleaned = []

    def work(config) -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)
    code, words = command(CONFIG[name], work)
    assert code == 128 + number and cleaned == [True]
    assert "Traceback" not in words and f"ended by {number.name}" in words


def test_an_interrupt_that_a_library_makes_an_error_of_is_still_an_interrupt(command):
    def work(config) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("the reader failed") from error
    code, words = command("train", work)
    assert code == 130 and "Traceback" not in words and "reader" not in words


def test_a_command_that_ends_well_after_an_interrupt_is_done():
    # As launch.report with watch=true.
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupts.number == signal.SIGINT


def test_preparing_data_leaves_nothing_behind(command, monkeypatch, tmp_path):
    encode = train.data.prepare._encode

    def encoded(texts, tokenizer):
        yield from encode(texts, tokenizer)
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train.data.prepare, "_encode", encoded)
    code, words = command("prepare", prepare.main, *write_text(tmp_path))
    assert code == 130 and "Traceback" not in words and not list((tmp_path / "cache").iterdir())


def test_a_file_is_there_whole_or_as_it_was_before(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_programs_that_doctor_waits_for_end_with_it():
    program = ("import atexit, threading, time\nfrom launch.doctor_finding import ask\n"
               "threading.Thread(target=ask, args=(['sleep', '987654'], 60), daemon=True).start()\n"
               "time.sleep(0.5)\nraise SystemExit(130)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    left = subprocess.run(["pgrep", "-f", "^sleep 987654"], capture_output=True, check=False).stdout
    assert not left


def test_a_signal_that_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop, Interrupts():
            signal.raise_signal(signal.SIGINT)
            assert not stop.received
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_sweep_that_is_asked_to_stop_begins_no_other_job(command, tmp_path):
    begun = []

    def work(config) -> None:
        begun.append(config.seed)
        raise Stopped
    code, words = command("train", work, "-m", "seed=1,2,3", f"hydra.sweep.dir={tmp_path}")
    assert code == 0 and begun == [1] and "Traceback" not in words


def test_the_second_ctrl_c_of_a_run_in_this_process_ends_it_at_once(tmp_path):
    """The first one is taken in the middle of a step that never ends, as if by a hung device."""
    program = ("import signal, time\nfrom train.stop import StopSignal\n"
               "stop = StopSignal(second_interrupt_ends=True)\nprint('on', flush=True)\n"
               "while not stop.received:\n    time.sleep(0.01)\n"
               "print(stop.received, flush=True)\nsignal.pause()\n")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and "Traceback" not in words
    assert "a second Ctrl-C ends at once" in words


@pytest.mark.slow
def test_ctrl_c_saves_a_run_in_this_process_and_ends_with_zero(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "launch.train", *TINY, *write_text(tmp_path),
         f"run_dir={run}", "train.num_steps=100000"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text()):
            assert process.poll() is None, process.communicate(timeout=5)
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err, out + err
    assert '"stopped": true' in out.splitlines()[-1] and list((run / "checkpoints").glob("step-*"))
