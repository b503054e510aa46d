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
from hydra import compose, initialize_config_dir

from launch import prepare
from launch.command.interrupt import Interrupts
from launch.command.main import run_main
from launch.process.identity import ROOT
from tests.end_to_end.commandline import TINY, last_of_each, write_text
from tests.lone import without_place
from train.data.shards.parts import Parts
from train.files.durable import replacing
from train.rank.stop import Stopped, StopSignal

COMMANDS = (
    "audit",
    "dashboard",
    "doctor",
    "evaluate",
    "generate",
    "place",
    "plan",
    "prepare",
    "report",
    "runs",
    "train",
)


@pytest.fixture
def command(monkeypatch, capfd):
    """command(name, function, *arguments) -> (exit code, stderr) of run_main in this process."""
    monkeypatch.chdir(ROOT)
    without_place(monkeypatch)

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
        module, page = ROOT / "launch" / f"{name}.py", ROOT / "launch" / name / "__main__.py"
        tree = ast.parse((module if module.exists() else page).read_text())
        assert f"run_main('{name}', " in ast.unparse(tree.body[-1])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_a_command_without_a_traceback_and_with_its_clean_up(command, name, number):
    cleaned = []

    def work(config) -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    code, words = command(name, work)
    assert code == 128 + number and cleaned == [True]
    assert "Traceback" not in words and f"ended by {number.name}" in words


def wait_for_the_signal() -> None:
    for _ in range(3000):
        time.sleep(0.01)


SLOW_IMPORT = """
import os, signal
os.kill(os.getpid(), signal.{name})
try:
    for _ in range(100_000):
        pass
except BaseException as error:
    raise SystemExit(f"raised inside the import: {{error!r}}")
done = True
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_waits_for_the_end_of_an_import(command, number, tmp_path, monkeypatch):
    """Raised while torch's extension starts, it aborted the process with a core dump."""
    (tmp_path / "slow_import.py").write_text(SLOW_IMPORT.format(name=number.name))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []

    def work(config) -> None:
        try:
            import slow_import

            found.append(slow_import.done)
            wait_for_the_signal()
        finally:
            del sys.modules["slow_import"]

    code, words = command("train", work)
    assert code == 128 + number and found == [True] and f"ended by {number.name}" in words


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_so_does_one_that_is_obeyed_at_once(number, tmp_path, monkeypatch):
    (tmp_path / "slow_import.py").write_text(SLOW_IMPORT.format(name=number.name))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    with (
        StopSignal(second_interrupt_ends=True) as stop,
        pytest.raises(Stopped),
        stop.obeyed_at_once(),
    ):
        import slow_import

        del sys.modules["slow_import"]
        found.append(slow_import.done)
        wait_for_the_signal()
    assert found == [True]


def test_the_second_signal_ends_a_long_import_at_once():
    program = (
        "import os, signal, sys, types\nfrom importlib.machinery import ModuleSpec\n"
        "from launch.command.interrupt import Interrupts\n"
        "class Slow:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        return ModuleSpec(name, self) if name == 'slow' else None\n"
        "    def create_module(self, spec):\n        return None\n"
        "    def exec_module(self, module):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('first', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        signal.pause()\n"
        "sys.meta_path.insert(0, Slow())\n"
        "with Interrupts():\n    import slow\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM and done.stdout == "first\n", done.stderr


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


def test_preparing_data_leaves_whole_shards_alone_and_goes_on_from_them(
    command, monkeypatch, tmp_path
):
    write, asked = Parts.write, os.getpid()

    def written(*arguments):
        write(*arguments)
        os.kill(asked, signal.SIGINT)
        time.sleep(60)  # it is ended before

    data = write_text(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", written)
        code, words = command("prepare", prepare.main, *data)
    assert code == 130 and "Traceback" not in words
    (left,) = (tmp_path / "cache").iterdir()
    assert [path.suffix for path in left.glob("*/*/*")] == [".npz"]

    # Nothing is tokenised again.
    monkeypatch.setattr(Parts, "write", None)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        prepare.main(compose("prepare", data))
    (store,) = (tmp_path / "cache").iterdir()
    assert f".{store.name}.parts" == left.name


def test_a_file_is_there_whole_or_as_it_was_before(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_programs_that_doctor_waits_for_end_with_it():
    program = (
        "import atexit, threading, time\nfrom launch.doctor.finding import ask\n"
        "threading.Thread(target=ask, args=(['sleep', '987654'], 60), daemon=True).start()\n"
        "time.sleep(0.5)\nraise SystemExit(130)"
    )
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
    program = (
        "import signal, time\nfrom train.rank.stop import StopSignal\n"
        "stop = StopSignal(second_interrupt_ends=True)\nprint('on', flush=True)\n"
        "while not stop.received:\n    time.sleep(0.01)\n"
        "print(stop.received, flush=True)\nsignal.pause()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
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
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "launch.train",
            *last_of_each(
                (*TINY, *write_text(tmp_path), f"run_dir={run}", "train.num_steps=100000")
            ),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
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
