"""Whoever reads what a command prints may leave: the command ends with its own code, its work
done.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch.process.identity import ROOT

WORK = """
import sys
from launch.process.streams import forgive
forgive()
for number in range(3000):
    print("line", number, flush=number == 0)
    print("remark", number, file=sys.stderr)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2, file.fileno()
    file.write("done")
print("the end")
sys.exit(7)
"""


def work(tmp_path, redirection: str, *options: str) -> str:
    """Run it in a shell; its exit code and whether its work was done are asserted."""
    line = f'{{ "$@"; echo "code $?" > {tmp_path}/code; }} {redirection}'
    command = [
        "bash",
        "-c",
        line,
        "bash",
        sys.executable,
        *options,
        "-c",
        WORK,
        str(tmp_path / "work"),
    ]
    said = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return said.stdout + said.stderr


@pytest.mark.parametrize("options", [(), ("-u",)])
@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full 2>&1", "2> /dev/full"]
)
def test_closed_and_full_outputs_change_no_exit_code(tmp_path, redirection, options):
    said = work(tmp_path, redirection, *options)
    assert (tmp_path / "work").read_text() == "done" and (
        tmp_path / "code"
    ).read_text() == "code 7\n"
    assert "Error" not in said and "Exception" not in said


def test_a_full_disk_under_stdout_is_said_once_on_stderr(tmp_path):
    said = work(tmp_path, "> /dev/full")
    assert said.count("stdout cannot be written (No space left on device)") == 1


@pytest.mark.parametrize("options", [(), ("-u",)])
@pytest.mark.parametrize("redirection", ["| head -1", "2>&1 | head -1", "2> >(head -1 >&2)"])
def test_a_reader_that_leaves_changes_no_exit_code(tmp_path, redirection, options):
    said = work(tmp_path, redirection, *options)
    assert (tmp_path / "work").read_text() == "done" and (
        tmp_path / "code"
    ).read_text() == "code 7\n"
    assert "Error" not in said and "Exception" not in said


def test_what_is_printed_arrives_whole_and_in_order(tmp_path):
    said = work(tmp_path, "2> /dev/null").splitlines()
    assert said == [*(f"line {number}" for number in range(3000)), "the end"]


RUN_MAIN = """
import sys
from launch.command.main import run_main
def main(config):
    print("x" * 100_000)
    print("result")
    raise SystemExit(int(sys.argv[-1].partition("=")[2]))
sys.argv = ["command", "+code=7"]
run_main("report", main)
"""


def test_every_command_forgives_its_reader():
    """The reader is gone before the first word."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", RUN_MAIN.replace("sys.argv[-1]", '"+code=7"')],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (7, "")


PARENT = """
import sys
from launch.process.streams import forgive
forgive()
from launch.launchers import start as spawn
launcher = spawn.start([sys.executable, "-c", sys.argv[1]])
code = launcher.wait()
spawn.kill_tree(launcher)
print("code", code, file=sys.stderr)
"""
FOREIGN = """
import signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in most programs: they die of it
for number in range(20_000):
    print("foreign", number)
sys.exit(5)
"""


def test_a_foreign_launcher_outlives_the_reader_of_our_output():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, FOREIGN],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline() == "foreign 0\n"
    parent.stdout.close()
    assert parent.stderr.read() == "code 5\n" and parent.wait() == 0
    parent.stderr.close()


def test_what_a_launcher_prints_is_relayed_to_its_last_line():
    done = subprocess.run(
        [sys.executable, "-c", PARENT, FOREIGN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [f"foreign {number}" for number in range(20_000)]
