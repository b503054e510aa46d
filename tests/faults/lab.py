"""A laboratory of fake nodes on one machine: real sshd, pdsh, sockets and signals, no second
computer.

    site                     a network namespace with a bridge, and a mount namespace whose mounts
                             all nodes see
      login  10.77.0.254     where commands are typed
      node0  10.77.0.1 ...   net, pid, uts, ipc and mount namespaces of their own; pid 1 is an
                             sshd

The file system is shared, as a cluster's would be; /etc/hosts, /dev/shm and /var/tmp are each
node's own. All namespaces are anonymous and live as long as their processes, and those die with the
process that made the lab (PR_SET_PDEATHSIG, kill of a pid namespace's init), so nothing survives a
test that is killed.

Needs root, iproute2, openssh, pdsh and util-linux; `available()` tells what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NETWORK = "10.77.0"
MARK = "LOADSTONE_LAB"
"""Variable in the environment of every process of a lab; its value is the pid of the process that
made the lab.
"""
TOOLS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "setpriv", "mount")
OURS = (
    "launch.train",
    "launch.job.agent",
    "launch.job.supervisor",
    "deepspeed",
    "torch.distributed.run",
)
"""What the command line of a process that belongs to a job contains."""


def sh(*command: str, check: bool = True, timeout: float = 30) -> str:
    """Run a command; its output."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}"
        )
    return done.stdout


@functools.cache
def available() -> tuple[bool, str]:
    """Whether a lab can be made here, and if not, why (a reason to skip tests)."""
    if os.geteuid() != 0:
        return False, "needs root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=path)]
    if missing:
        return False, f"needs {', '.join(missing)}"
    try:
        sh(
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--mount-proc",
            "ip",
            "link",
            "add",
            "br0",
            "type",
            "bridge",
        )
    except (RuntimeError, OSError) as error:
        return False, f"needs namespaces: {error}"
    return True, ""


@dataclass(frozen=True)
class Process:
    """A process of a node, as the host sees it."""

    pid: int
    parent: int
    state: str
    command: str
    environment: dict[str, str]

    @property
    def rank(self) -> int | None:
        """Global rank of a training process or of its agent."""
        return int(self.environment["RANK"]) if "RANK" in self.environment else None

    @property
    def is_rank(self) -> bool:
        """A training rank, not its agent or a launcher."""
        return (
            self.rank is not None
            and "-m launch.train" in self.command
            and "deepspeed.launcher" not in self.command
        )

    @property
    def is_agent(self) -> bool:
        return (
            self.rank is not None
            and "-m launch.job.agent" in self.command
            and "deepspeed.launcher" not in self.command
        )

    def __str__(self) -> str:
        return f"{self.pid} {self.state} {self.command[:160]}"


def read_process(pid: int) -> Process | None:
    """None: it is gone, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        command = (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .strip()
        )
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if stat[0] in "ZX" or not command:
        return None
    return Process(
        pid, int(stat[1]), stat[0], command, dict(v.split("=", 1) for v in variables if "=" in v)
    )


def pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


@dataclass
class Node:
    name: str
    address: str
    clock_offset: float = 0.0
    """Seconds by which this node's wall clock is ahead, for everything started through its sshd."""
    send_delay: float = 0.0
    """Seconds that every send to another machine takes more, likewise."""
    holder: subprocess.Popen | None = None
    """The process whose death takes the node down."""
    init: int = 0
    """Host pid of the node's pid 1."""
    hosts: Path = field(default=Path())
    """The node's /etc/hosts; rewrite it in place to change what names mean there."""

    @property
    def ipv6(self) -> str:
        return f"fd00:77::{self.address.rsplit('.', 1)[1]}"

    @property
    def up(self) -> bool:
        return self.holder is not None and self.holder.poll() is None

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command inside the node."""
        return ["nsenter", "-t", str(self.init), "-n", "-p", "-m", "-u", "-i", "--", *command]

    def run(self, *command: str, check: bool = True, timeout: float = 30) -> str:
        return sh(*self.enter(*command), check=check, timeout=timeout)

    def processes(self) -> list[Process]:
        """All processes of the node."""
        try:
            mine = os.readlink(f"/proc/{self.init}/ns/pid")
        except OSError:
            return []
        found = []
        for pid in pids():
            with contextlib.suppress(OSError):
                if (
                    os.readlink(f"/proc/{pid}/ns/pid") == mine
                    and (process := read_process(pid)) is not None
                ):
                    found.append(process)
        return found

    def job(self) -> list[Process]:
        """The processes of the node that belong to a job: ranks, agents, launchers, the
        supervisor.
        """
        return [p for p in self.processes() if any(word in p.command for word in OURS)]

    def mount(self, *arguments: str) -> None:
        """mount(8) in this node only."""
        sh("nsenter", "-t", str(self.init), "-m", "--", "mount", *arguments)

    def read_only(self, path: Path) -> None:
        """Make a folder read-only on this node."""
        self.mount("--bind", str(path), str(path))
        self.mount("-o", "remount,ro,bind", str(path))


class Cluster:
    """`with Cluster(2, folder) as cluster:` n nodes and a login node.

    Args:
        folder: keys, settings and logs of the lab, and its `home`.
        clocks: {node index: seconds its wall clock is ahead}. delays: {node index: seconds a send
            takes more}.
    """

    def __init__(
        self,
        num_nodes: int,
        folder: Path,
        clocks: dict[int, float] | None = None,
        delays: dict[int, float] | None = None,
    ):
        self.folder = folder
        clocks, delays = clocks or {}, delays or {}
        self.nodes = [
            Node(f"node{i}", f"{NETWORK}.{i + 1}", clocks.get(i, 0.0), delays.get(i, 0.0))
            for i in range(num_nodes)
        ]
        self.login = Node("login", f"{NETWORK}.254")
        self.site: subprocess.Popen | None = None

    @property
    def everyone(self) -> list[Node]:
        return [*self.nodes, self.login]

    def __enter__(self) -> Cluster:
        remove_leftovers()
        try:
            self._prepare()
            self._start_site()
            for node in self.everyone:
                self.boot(node)
            for node in self.nodes:
                self.wait_for_ssh(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in [*(node.holder for node in self.everyone), self.site]:
            if holder is not None and holder.poll() is None:
                holder.kill()
                holder.wait(10)

    # --- bringing it up ---------------------------------------------------------------------------

    def _prepare(self) -> None:
        for name in ("ssh", "bin", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's privilege separation directory
        ssh = self.folder / "ssh"
        for key in ("host", "user"):
            if not (ssh / key).exists():
                sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key))
        shutil.copy(ssh / "user.pub", ssh / "authorized_keys")
        (ssh / "client").write_text(
            textwrap.dedent(f"""\
            Host *
              User root
              IdentityFile {ssh}/user
              IdentitiesOnly yes
              StrictHostKeyChecking no
              UserKnownHostsFile /dev/null
              LogLevel ERROR
              BatchMode yes
              ConnectTimeout 5
            """)
        )
        # OpenSSH ignores $HOME, and DeepSpeed calls a bare `ssh HOST hostname`: a shim hands it our
        # settings; so does pdsh.
        shim = self.folder / "bin" / "ssh"
        shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh}/client "$@"\n')
        shim.chmod(0o755)
        (self.folder / "resolv.conf").write_text("")  # no look-up leaves the lab
        table = "127.0.0.1 localhost\n" + "".join(
            f"{node.address} {node.name}\n" for node in self.everyone
        )
        for node in self.everyone:
            node.hosts = self.folder / f"hosts-{node.name}"
            node.hosts.write_text(table)

    def _start_site(self) -> None:
        self.site = self._hold(
            "site",
            [
                "unshare",
                "--net",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                "mount --make-rshared / && touch $0 && exec sleep infinity",
                str(self.folder / "site-ready"),
            ],
        )
        wait_for(lambda: (self.folder / "site-ready").exists(), 10, "the lab's site did not start")
        self.in_site("ip", "link", "add", "br0", "type", "bridge")
        self.in_site("ip", "link", "set", "br0", "up")

    def boot(self, node: Node) -> None:
        """Start a node, also again after a power cut."""
        settings = self.folder / "ssh" / f"sshd-{node.name}"
        lines = [
            "Port 22",
            "AddressFamily any",
            f"HostKey {self.folder}/ssh/host",
            f"AuthorizedKeysFile {self.folder}/ssh/authorized_keys",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            "StrictModes no",
            "PidFile none",
            "UseDNS no",
            "PrintMotd no",
            "MaxStartups 100",
        ]
        libraries = []
        if node.clock_offset:
            libraries.append(
                preload(
                    self.folder,
                    f"clock{node.clock_offset:+.0f}",
                    CLOCK % {"offset": node.clock_offset},
                )
            )
        if node.send_delay:
            libraries.append(
                preload(self.folder, "slow", SLOW % {"microseconds": 1e6 * node.send_delay})
            )
        if libraries:
            lines.append(f"SetEnv LD_PRELOAD={':'.join(libraries)}")
        settings.write_text("\n".join(lines) + "\n")
        sshd = f"exec {shutil.which('sshd', path='/usr/sbin:/sbin')} -D -e -f {settings}"
        script = " && ".join(
            [
                f"hostname {node.name}",
                f"mount --bind {node.hosts} /etc/hosts",
                f"mount --bind {self.folder}/resolv.conf /etc/resolv.conf",
                "mount -t tmpfs -o size=256m tmpfs /dev/shm",
                "mount -t tmpfs tmpfs /var/tmp",
                "exec sleep infinity" if node is self.login else sshd,
            ]
        )
        assert self.site is not None
        node.holder = self._hold(
            node.name,
            [
                "nsenter",
                "-t",
                str(self.site.pid),
                "-m",
                "--",
                "unshare",
                "--net",
                "--mount",
                "--propagation",
                "slave",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                script,
            ],
        )
        children = Path(f"/proc/{node.holder.pid}/task/{node.holder.pid}/children")
        wait_for(lambda: node.up and children.read_text().split(), 10, f"{node.name} did not boot")
        node.init = int(children.read_text().split()[0])
        cable = self._cable(node)
        self.in_site("ip", "link", "del", cable, check=False)
        # the same after a reboot: neighbours remember it
        mac = f"02:00:0a:4d:00:{int(node.address.rsplit('.', 1)[1]):02x}"
        self.in_site(
            "ip",
            "link",
            "add",
            cable,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "address",
            mac,
            "netns",
            str(node.init),
        )
        self.in_site("ip", "link", "set", cable, "master", "br0", "up")
        for command in (
            ("addr", "add", f"{node.address}/24", "dev", "eth0"),
            ("addr", "add", f"{node.ipv6}/64", "dev", "eth0", "nodad"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            sh("nsenter", "-t", str(node.init), "-n", "--", "ip", *command)

    def _hold(self, name: str, command: list[str]) -> subprocess.Popen:
        """Start a process of the lab that dies with this one."""
        with open(self.folder / f"{name}.log", "w") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, MARK: str(os.getpid())},
            )

    def _cable(self, node: Node) -> str:
        return f"to-{node.name}"

    def in_site(self, *command: str, check: bool = True) -> str:
        """Run a command in the site's network and mounts; a mount made there appears on every
        node.
        """
        assert self.site is not None
        return sh("nsenter", "-t", str(self.site.pid), "-n", "-m", "--", *command, check=check)

    def wait_for_ssh(self, node: Node) -> None:
        ssh = str(self.folder / "bin" / "ssh")
        wait_for(
            lambda: self.login.run(ssh, node.name, "hostname", check=False).strip() == node.name,
            15,
            f"no ssh to {node.name}",
        )

    # --- faults -----------------------------------------------------------------------------------

    def link(self, node: Node, state: str) -> None:
        """Pull a node's cable ("down") or put it back ("up")."""
        self.in_site("ip", "link", "set", self._cable(node), state)

    def netem(self, node: Node, *arguments: str) -> None:
        """Spoil a node's cable: netem(node, "delay", "50ms"), netem(node, "loss", "5%")."""
        self.in_site(
            "tc", "qdisc", "replace", "dev", self._cable(node), "root", "netem", *arguments
        )

    def power_cut(self, node: Node) -> None:
        """The node vanishes: first the cable, so that no FIN or RST gets out, then every
        process.
        """
        self.link(node, "down")
        assert node.holder is not None
        node.holder.kill()
        node.holder.wait(10)

    def small_disk(self, path: Path, kilobytes: int) -> None:
        """A file system of its own on `path`, on every node; read it from the host through
        `seen`.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.in_site("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path))

    def seen(self, path: Path) -> Path:
        """A path as the nodes see it, file systems of the lab included."""
        assert self.site is not None
        return Path(f"/proc/{self.site.pid}/root{path}")

    def forget_host(self, name: str, on: Sequence[Node]) -> None:
        """Name resolution of one host fails on some nodes."""
        for node in on:
            lines = node.hosts.read_text().splitlines(keepends=True)
            node.hosts.write_text("".join(line for line in lines if name not in line.split()))

    # --- jobs -------------------------------------------------------------------------------------

    def hostfile(
        self, nodes: Sequence[Node] | None = None, slots: int = 1, extra: Sequence[str] = ()
    ) -> Path:
        """A hostfile of some nodes (all), and of `extra` names."""
        path = self.folder / "hostfile"
        names = [node.name for node in (self.nodes if nodes is None else nodes)]
        path.write_text("".join(f"{name} slots={slots}\n" for name in [*names, *extra]))
        return path

    def environment(self, **extra: str) -> dict[str, str]:
        """What a user's shell on the login node holds."""
        path = [
            str(self.folder / "bin"),
            str(Path(sys.executable).parent),
            "/usr/local/bin",
            "/usr/sbin",
            "/usr/bin",
        ]
        return {
            "PATH": ":".join(path),
            "HOME": str(self.folder / "home"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PDSH_RCMD_TYPE": "ssh",
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            MARK: str(os.getpid()),
            **extra,
        }

    def start(
        self, node: Node, arguments: Sequence[str], log: Path, **extra: str
    ) -> subprocess.Popen:
        """`python ARGUMENTS` in the repository on a node, output into `log`."""
        with log.open("a") as out:
            return subprocess.Popen(
                node.enter("env", "-C", str(ROOT), sys.executable, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment(**extra),
                start_new_session=True,
            )

    def job(self) -> dict[str, list[Process]]:
        """Processes of jobs by node, nodes without one left out."""
        return {node.name: found for node in self.everyone if (found := node.job())}

    def rank(self, number: int) -> tuple[Node, Process]:
        """The training process of a rank and where it runs.

        Raises:
            LookupError: it does not run.
        """
        for node in self.nodes:
            for process in node.processes():
                if process.is_rank and process.rank == number:
                    return node, process
        raise LookupError(f"rank {number} does not run")

    def agent(self, number: int) -> tuple[Node, Process]:
        """The agent of a rank and where it runs."""
        for node in self.nodes:
            for process in node.processes():
                if process.is_agent and process.rank == number:
                    return node, process
        raise LookupError(f"the agent of rank {number} does not run")


def wait_for(condition, seconds: float, message: str, step: float = 0.05) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: with the message.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} within {seconds:g} s")
        time.sleep(step)


def remove_leftovers() -> list[int]:
    """Kill processes of labs whose maker is gone (they die with it; this is for what slipped
    through).
    """
    found = []
    for pid in pids():
        process = read_process(pid)
        if process is None or MARK not in process.environment:
            continue
        maker = process.environment[MARK]
        if not Path(f"/proc/{maker}").exists():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                found.append(pid)
    return found


def preload(folder: Path, name: str, source: str) -> str:
    """A library for LD_PRELOAD, compiled from C."""
    library = folder / f"{name}.so"
    if not library.exists():
        library.with_suffix(".c").write_text(source)
        sh(
            "gcc",
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            str(library),
            str(library.with_suffix(".c")),
            "-ldl",
        )
    return str(library)


# Every send to another machine waits first, for kernels without netem. Sockets of the machine
# itself are left alone.
SLOW = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
static void wait_for(int fd) {
  struct sockaddr_storage a;
  socklen_t n = sizeof a;
  if (getpeername(fd, (struct sockaddr *)&a, &n) || a.ss_family != AF_INET) return;
  if ((ntohl(((struct sockaddr_in *)&a)->sin_addr.s_addr) >> 24) != 127) usleep(%(microseconds)d);
}
#define LATE(name, ...) \
  wait_for(fd); \
  return ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(fd, __VA_ARGS__);
ssize_t send(int fd, const void *b, size_t n, int f) { LATE(send, b, n, f) }
ssize_t sendmsg(int fd, const struct msghdr *m, int f) { LATE(sendmsg, m, f) }
ssize_t write(int fd, const void *b, size_t n) { LATE(write, b, n) }
ssize_t writev(int fd, const struct iovec *v, int n) { LATE(writev, v, n) }
"""

# The wall clock is OFFSET seconds ahead; the monotonic clock is untouched.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sys/time.h>
#include <time.h>
#define OFFSET %(offset)d
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int r = real(id, t);
  if (!r && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += OFFSET;
  return r;
}
time_t time(time_t *out) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (out) *out = t.tv_sec;
  return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *zone) {
  struct timespec t;
  int r = clock_gettime(CLOCK_REALTIME, &t);
  if (!r) { v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000; }
  return r;
}
/* A deadline made from the shifted clock is waited for on the kernel's. */
int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *deadline) {
  static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  struct timespec t = *deadline;
  t.tv_sec -= OFFSET;
  return real(c, m, &t);
}
"""
