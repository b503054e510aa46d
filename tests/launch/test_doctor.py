"""The doctor names what is wrong, says how to mend it, and always ends."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.doctor import machine, network
from launch.doctor.command import examine
from launch.doctor.finding import Finding, ok
from launch.process.ask import Answer, ask, in_parallel
from train.config.launching import LaunchConfig
from train.config.watching import TrackerConfig, WandbConfig

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = {"torch": "2.13", "cuda": None, "nccl": None, "devices": []}
GPU = CPU | {
    "cuda": "13.0",
    "devices": [{"name": "H100", "error": None, "free": 79 * 2**30, "memory": 80 * 2**30}],
}
DEEPSPEED = LaunchConfig("deepspeed", 1, 2, hostfile="hosts")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """tools(ssh="echo hello", ...): shell scripts of these names, the first on PATH; None hides one
    that is installed.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(**scripts: str | None) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(
                "#!/bin/sh\nexit 127\n" if script is None else f"#!/bin/sh\n{script}\n"
            )
            (folder / name).chmod(0o755)

    return make


def by_level(findings: list[Finding], level: str) -> list[Finding]:
    return [f for f in findings if f.level == level]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- the shell around the checks ------------------------------------------------------------------


def test_checks_that_hang_or_break_do_not_stop_the_others():
    began = time.monotonic()
    hang, broken, good = examine(
        {
            "hang": lambda: time.sleep(60) or [],
            "broken": lambda: [1 // 0],
            "good": lambda: [ok("good", "fine")],
        },
        0.5,
    )
    assert time.monotonic() - began < 5
    assert (hang.level, broken.level, good.level) == ("FAIL", "FAIL", "ok")
    assert "no answer within 0.5 s" in hang.found and "ZeroDivisionError" in broken.found


def test_a_finding_is_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("SITE_PASSWORD", "open sesame")
    line = str(Finding("FAIL", "x", "two\nlines of open sesame at https://a:b@c", "mend it"))
    assert (
        line == "FAIL  x               two lines of <redacted> at https://<redacted>@c  -> mend it"
    )


def test_a_program_that_hangs_is_ended_with_its_children(tools, tmp_path):
    tools(hang=f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()
    answer = ask(["hang"], 0.5)
    assert (
        time.monotonic() - began < 5
        and answer.code is None
        and answer.reason == "no answer within 0.5 s"
    )
    time.sleep(0.1)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    assert ask(["no-such-program"], 1).reason == "no-such-program: No such file or directory"


def test_work_in_parallel_returns_what_is_there_in_time():
    began = time.monotonic()
    assert in_parallel(lambda n: time.sleep(n) or n, [0, 30, 0.1], 1.0) == {0: 0, 0.1: 0.1}
    assert time.monotonic() - began < 5


# --- this machine ---------------------------------------------------------------------------------


def test_packages_are_compared_with_requirements():
    text = (
        "numpy<1\npytest>=9  # comment\nno-such-package==1\nwinonly; sys_platform == "
        "'win32'\n# "
        "Tests\nruff<0.1\n"
    )
    found = machine.python_and_packages(text)
    assert [f"{f.level} {f.found.split()[0]}" for f in found[1:]] == [
        "FAIL numpy",
        "FAIL no-such-package",
        "warn ruff",
    ]
    assert found[1].fix == "pip install 'numpy<1'"
    assert [
        f.level for f in machine.python_and_packages((ROOT / "requirements.txt").read_text())
    ] == ["ok", "ok"]


def test_a_gpu_that_torch_does_not_see_is_a_failure(tools):
    tools(**{"nvidia-smi": "echo 'NVIDIA H100, 570.1'"})
    launch = LaunchConfig("deepspeed", 2)
    assert only(machine.devices(CPU, launch)).fix == "install the CUDA build of torch"
    assert "driver for CUDA 13.0" in only(machine.devices(CPU | {"cuda": "13.0"}, launch)).fix
    found = only(machine.devices(GPU, launch))
    assert found.level == "FAIL" and "set it to 1 or less" in found.fix
    assert "1 x H100, driver 570.1, 80 GiB each" in found.found
    busy = GPU | {"devices": [GPU["devices"][0] | {"free": 2**30}]}
    assert only(machine.devices(busy, LaunchConfig("inline"))).level == "warn"
    broken = GPU | {"devices": [{"name": "H100", "error": "no kernel image"}]}
    assert (
        "device 0 (H100): no kernel image"
        in only(machine.devices(broken, LaunchConfig("inline"))).found
    )


def test_compilers_matter_where_there_is_a_gpu(tools, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    tools(nvcc="echo 'Cuda compilation tools, release 12.4, V12.4.1'")
    compiler, nvcc = machine.compilers(GPU)
    assert compiler.level == nvcc.level == "FAIL"
    assert "release 12.4, but torch is built for CUDA 13.0" in nvcc.found
    compiler, nvcc = machine.compilers(CPU)
    assert (compiler.level, nvcc.level) == ("warn", "ok")
    tools(nvcc=None)
    assert [f.level for f in machine.compilers(CPU)] == ["warn", "warn"]


def test_a_full_disk_fails(monkeypatch, tmp_path):
    real = os.statvfs(tmp_path)

    def room(blocks: int, inodes: int = 10):
        facts = list(real[:10])
        facts[1], facts[4], facts[6], facts[7] = 4096, blocks, 100, inodes
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(facts))

    for blocks, inodes, level in (
        (0, 10, "FAIL"),
        (2**20, 10, "warn"),
        (2**24, 10, "ok"),
        (2**24, 0, "FAIL"),
    ):
        room(blocks, inodes)
        found = machine.disk_space(tmp_path / "not" / "there")
        assert found.level == level and str(tmp_path) in found.found, found
    room(10)
    assert machine.shared_memory().level == "warn"


@pytest.mark.parametrize(("running", "level"), [(4.0, "ok"), (4.1, "warn")])
def test_a_busy_machine_is_told_from_a_broken_one(monkeypatch, running, level):
    monkeypatch.setattr(os, "getloadavg", lambda: (running, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = machine.load()
    assert found.level == level and f"{running} processes want 2 cores" in found.found


def test_write_speed_is_measured_and_leaves_nothing_behind(tmp_path, monkeypatch):
    found = machine.write_speed(tmp_path / "run")
    assert (
        found.level in ("ok", "warn")
        and "MiB/s synced" in found.found
        and not list(tmp_path.iterdir())
    )

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = machine.write_speed(tmp_path)
    assert (
        found.level == "FAIL"
        and "No space left on device" in found.found
        and not list(tmp_path.iterdir())
    )


def test_a_taken_port_fails():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert machine.free_port(taken.getsockname()[1]).level == "FAIL"
    assert machine.free_port(None).level == "ok"


def test_wandb_is_described_without_its_key(monkeypatch, tmp_path):
    def finding(mode: str) -> Finding:
        return machine.wandb(TrackerConfig(WandbConfig(mode)))

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert finding("disabled").level == finding("offline").level == finding("auto").level == "ok"
    assert "no key for 127.0.0.1" in finding("online").found
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert (
        finding("auto").level == finding("online").level == "warn"
        and "cannot be reached" in finding("online").found
    )
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert finding("online").found == "online at 127.0.0.1, key from WANDB_API_KEY"


def test_slurm_needs_its_tools(tools, monkeypatch, tmp_path):
    launch = LaunchConfig("slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "sbatch, srun, scontrol not on PATH" in only(machine.slurm(launch)).found
    tools(sbatch="", srun="echo slurm 24.05", scontrol="")
    assert only(machine.slurm(launch)).found == "slurm 24.05"
    assert machine.slurm(LaunchConfig("inline")) == []


# --- other machines -------------------------------------------------------------------------------

HOSTS = (
    network.Host("good", 2),
    network.Host("wrong", 2),
    network.Host("late", 2),
    network.Host("bare", 2),
)
SSH = """
host=
for word; do
  last=$word
  [ -n "$host" ] || case $word in good|wrong|late|bare) host=$word;; esac
done
case $host in
  good) echo "Welcome! host=banner"; eval "$last";;
  wrong) echo "ssh: Could not resolve hostname wrong" >&2; exit 255;;
  late) eval "$last" | sed "s/time=.*/time=$(($(date +%s) - 100000))/";;
  bare) for what in repository python run_dir secrets; do echo loadstone-doctor:$what=no; done
        echo loadstone-doctor:time=$(date +%s.%N);;
esac
"""


def test_every_host_is_visited(tools, tmp_path, monkeypatch):
    tools(ssh=f'echo "$@" >> {tmp_path}/calls; {SSH}')
    # such as ssh's own settings may name another machine for it
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [])
    secrets = tmp_path / "secrets"
    secrets.write_text("A=1")
    launch = LaunchConfig("deepspeed", 2, 4, hostfile="x", ssh_port=2222, secrets_file=str(secrets))
    run_dir = tmp_path / "a run's"
    run_dir.mkdir()
    found = network.visits(launch, HOSTS, run_dir)
    assert "1 of 4 hosts answer" in only(by_level(found, "ok")).found
    failures = [f.found for f in by_level(found, "FAIL")]
    assert "host wrong: ssh: Could not resolve hostname wrong" in failures
    assert [f for f in failures if "bare" in f] == [
        f"host bare has no {ROOT}",
        f"host bare has no {sys.executable}",
        f"host bare does not see files written to {run_dir} here",
        "host bare cannot read launch.secrets_file",
    ]
    clock = only(by_level(found, "warn"))
    # However long the visit took: the digits after 100 are its seconds.
    assert clock.name == "clock"
    assert re.fullmatch(r"host late is 100\d{3}\.\d s behind this machine", clock.found)
    assert any(f.fix.endswith("ssh -p 2222 wrong hostname") for f in found)
    call = (tmp_path / "calls").read_text()
    assert "BatchMode=yes" in call and "-p 2222" in call and not list(run_dir.iterdir())


def test_a_name_that_nobody_knows_is_told_once(tools, tmp_path, monkeypatch):
    def look_up(name, port):
        if name == "wrong":
            raise socket.gaierror(-2, "Name or service not known")

    tools(ssh=SSH)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    hosts = (network.Host("good", 2), network.Host("wrong", 2))
    told = [*network.names(hosts), *network.visits(DEEPSPEED, hosts, tmp_path)]
    assert [f.name for f in told if "wrong" in f.found] == ["names"]


def test_a_host_that_never_answers_is_named(tools, tmp_path, monkeypatch):
    tools(ssh="sleep 60")
    monkeypatch.setattr(network, "SSH_SECONDS", 0.5)
    found = only(network.visits(DEEPSPEED, HOSTS[:1], tmp_path))
    assert found.level == "FAIL" and found.found == "host good: no answer within 0.5 s"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", "did not say its time"),
        ("time=", "did not say its time"),
        ("time=1000.%N", "behind"),
        ("time=9e12", "ahead"),
    ],
)
def test_clocks_are_compared_whatever_date_prints(said, words, tmp_path):
    lines = [network.MARK + line for line in ("repository=yes", "python=yes", said) if line]
    found = network.visit("h", Answer(0, "\n".join(lines), "", 1e9), None, tmp_path)
    assert words in only(found).found


def test_a_bad_hostfile_is_named_by_line(tmp_path):
    path = tmp_path / "hosts"
    launch = LaunchConfig("deepspeed", 2, 2, hostfile=str(path))
    path.write_text("a slots=2\n# b\nc slots=two\n")
    hosts, found = network.hostfile(launch)
    assert hosts == () and "line 3" in only(found).found and only(found).level == "FAIL"
    path.write_text("a slots=2\nb slots=1\n")
    assert "host b has 1 slots" in only(network.hostfile(launch)[1]).found
    path.write_text("a slots=2\nb slots=2\nc slots=2\n")
    assert only(network.hostfile(launch)[1]).found == "3 hosts, 1 of them spare"
    assert network.hostfile(LaunchConfig("inline")) == ((), [])


def test_host_names_are_looked_up(monkeypatch):
    def look_up(name, port):
        if name == "wrong":
            raise socket.gaierror(-2, "Name or service not known")
        time.sleep(60 if name == "late" else 0)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(network, "NAME_SECONDS", 0.5)
    found = network.names(HOSTS)
    assert [f.found for f in found] == [
        "host wrong has no address: Name or service not known",
        "host late has no address: no answer within 0.5 s",
    ]
    assert only(network.names(HOSTS[:1])).level == "ok"


def test_pdsh_must_speak_ssh(tools, monkeypatch):
    monkeypatch.delenv("PDSH_RCMD_TYPE", raising=False)
    tools(pdsh="echo 'pdsh-2.34 (+debug)'; echo 'rcmd modules: ssh,rsh,exec (default: rsh)'")
    assert only(network.pdsh(DEEPSPEED)).found == "pdsh-2.34, over ssh"
    monkeypatch.setenv("PDSH_RCMD_TYPE", "rsh")
    assert only(network.pdsh(DEEPSPEED)).level == "warn"
    tools(pdsh="echo 'pdsh-2.34'; echo 'rcmd modules: rsh,exec (default: rsh)'")
    assert "by rsh,exec, not by ssh" in only(network.pdsh(DEEPSPEED)).found
    tools(pdsh=None)
    assert only(network.pdsh(DEEPSPEED)).level == "FAIL"
    assert network.pdsh(LaunchConfig("inline")) == []


def test_secrets_in_deepspeed_env_are_named_and_not_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    for folder in (home, cwd):
        folder.mkdir()
    (home / ".deepspeed_env").write_text(
        f"NCCL_DEBUG=INFO\nWANDB_API_KEY=hunter2\nPLAIN=hf_{'aB3' * 12}\n"
    )
    (cwd / ".deepspeed_env").write_text("A=1\n\n# x\n")
    leak, malformed = network.deepspeed_env(DEEPSPEED, (home, cwd))
    assert leak.level == "warn" and "holds WANDB_API_KEY, PLAIN" in leak.found
    assert "hunter2" not in str(leak) and "aB3" not in leak.found
    assert malformed.level == "FAIL" and "line 2" in malformed.found
    assert only(network.deepspeed_env(LaunchConfig("inline"), (home,))).level == "warn"
    assert network.deepspeed_env(DEEPSPEED, (tmp_path,)) == []


def test_variables_of_ranks_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    secrets = tmp_path / "secrets"
    secrets.write_text("HF_TOKEN=hunter2\n")
    launch = LaunchConfig(
        "inline",
        env={"MY_PASSWORD": "hunter2"},
        forward_env=("HF_TOKEN",),
        secrets_file=str(secrets),
    )
    secrets.chmod(0o644)
    found = network.variables(launch)
    assert [f.level for f in found] == ["FAIL"] * 3 and "chmod 600" in found[2].found
    secrets.chmod(0o600)
    found = network.variables(LaunchConfig("inline", secrets_file=str(secrets)))
    assert found[-1].found == f"{secrets} sets HF_TOKEN"
    assert not any("hunter2" in str(f) for f in found)


def test_an_interface_that_is_not_there_fails(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    found = only(network.gloo(LaunchConfig("inline"), ()))
    assert found.level == "FAIL" and "names eth77; this machine has" in found.found
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    found = only(network.gloo(LaunchConfig("deepspeed", listen_addr="203.0.113.9"), ()))
    assert found.level == "FAIL" and "203.0.113.9 is no address of this machine" in found.found


# --- the command ----------------------------------------------------------------------------------


def doctor(*overrides: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.doctor", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environ},
    )


@pytest.mark.slow
def test_the_command_finds_the_host_that_is_wrong(tools, tmp_path):
    tools(ssh=SSH, pdsh="echo 'pdsh-2.34'; echo 'rcmd modules: ssh'")
    (tmp_path / "hosts").write_text("good slots=1\nwrong slots=1\n")
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("HF_TOKEN=hunter2-hunter2\n")
    began = time.monotonic()
    done = doctor(
        "launch=deepspeed",
        "launch.num_nodes=2",
        f"launch.hostfile={tmp_path / 'hosts'}",
        f"run_dir={tmp_path}",
        HOME=str(home),
        WANDB_API_KEY="hunter2-hunter2",
        WANDB_MODE="offline",
    )
    assert time.monotonic() - began < 30 and done.returncode == 1, done.stderr
    *lines, last = done.stdout.splitlines()
    assert json.loads(last)["FAIL"] >= 2
    assert {line[:4] for line in lines} == {"ok  ", "warn", "FAIL"} and all(
        "  -> " in x for x in lines if x[:2] != "ok"
    )
    assert [x.split()[1] for x in lines if "host wrong" in x] == ["names"]
    assert any(x.startswith("ok    gloo") and "two ranks met" in x for x in lines)
    assert any(x.startswith("ok    packages") for x in lines) and any(
        x.startswith("warn  deepspeed env") for x in lines
    )
    assert "hunter2" not in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_findings_as_json(tmp_path):
    done = doctor("json=true", f"run_dir={tmp_path / 'run'}")
    findings = [Finding(**record) for record in json.loads(done.stdout)]
    assert {"python", "packages", "device", "disk", "gloo", "deepspeed", "wandb"} <= {
        f.name for f in findings
    }
    assert done.returncode == int(any(f.level == "FAIL" for f in findings))
    bad = doctor("launch=deepspeed", "launch.num_nodes=2")
    assert (
        bad.returncode == 2
        and "launch.num_nodes is 2" in bad.stderr
        and "Traceback" not in bad.stderr
    )
