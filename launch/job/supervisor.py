"""The parent of a job: starts a launcher, hears every rank through its agent, ends the whole job on
the first fault, and starts it again from the last complete checkpoint.

    supervisor --starts--> launcher (deepspeed, torchrun, srun)
         ^                      |
         |                      +--starts--> one agent per rank --starts--> training process
         |                                           |
         +---- TCP: state of the rank, orders -------+

What happened is in RUN/supervisor.jsonl, one JSON object a line: attempt, verdict, stopped,
straggler, end.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.job.judge import Judge, Verdict
from launch.job.kept_file import KeptFile
from launch.job.wire import Closed, JobFile, Line, new_nonce, new_token, read_nonce
from launch.launchers import hosts
from launch.launchers import start as spawn
from launch.process import exits
from train.config.run import RunConfig
from train.files.strict_json import dumps
from train.rank.ports import free_port
from train.rank.stop import ASKING, Stopped, may_take

LEAVE_SECONDS = 30.0
ABORT_SECONDS = 10.0
STACKS_SECONDS = 2.0
HANDSHAKE_SECONDS = 10.0
UNGAINED_LIMIT = 2
"""Attempts in a row without a new step, after which another restart is not worth it."""
MAX_DELAY_SECONDS = 300.0
MAX_STRANGERS = 64
"""Connections beyond one per rank and node that may be in their handshake; the oldest makes room
for the next.
"""
OWN_DESCRIPTORS = 64
"""Of the supervisor's open files, what is kept for other things than connections."""


class NoHosts(RuntimeError):
    """Too few hosts can be reached."""


@dataclass
class Peer:
    """A connection: first unknown, then the agent of a rank or another node's parent."""

    line: Line
    """Its connection."""
    nonce: str
    """Drawn for this connection alone, so that no greeting can be played back."""
    since: float
    """When it connected, monotonic seconds."""
    rank: int | None = None
    """Number of the agent's rank; None for others."""
    node: int | None = None
    """Number of the parent's node; None for others."""
    greeted: bool = False
    """Whether it has said its nonce."""

    @property
    def known(self) -> bool:
        return self.rank is not None or self.node is not None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: with a verdict, or well."""

    verdict: Verdict | None
    """Why it failed; None: all ranks are done."""
    step: int
    """The last step that every rank finished."""


@dataclass
class Supervisor:
    """A supervisor runs one job to its end. `run` returns the exit code of the job.

    Raises:
        Stopped: by run, when it was asked to stop before any rank was started.
    """

    config: RunConfig
    """The checked config of the run."""
    run_dir: Path
    """The run's directory, which all nodes share."""
    arguments: list[str]
    """Of `python -m launch.train` in every rank."""
    fits: Callable[[int], list[str]]
    """Says for a world size what in the config speaks against it; launch.elastic asks it."""
    env: dict[str, str]
    """Variables handed to every rank."""
    still_ours: Callable[[], bool] = lambda: True
    """Whether the run directory is still this job's; asked before every attempt, since a supervisor
    may have been stopped for long.
    """
    token: str = field(default_factory=new_token)
    """Secret of the job, which every connection must prove to know."""
    store_folder: str | None = None
    """Private folder for the ranks' rendezvous, where all of them are on this machine."""
    peers: list[Peer] = field(default_factory=list)
    """All open connections."""
    stop_asked: int = 0
    """How often a signal has asked the job to stop."""
    interrupts: int = 0
    """How often SIGINT came: after the second nobody waits for the save."""
    kept: list[KeptFile] = field(default_factory=list)
    """What agents and ranks read whenever they start."""
    told: set[str] = field(default_factory=set)
    """What is said only once."""

    def __post_init__(self) -> None:
        self.launch, self.limits = self.config.launch, self.config.watchdog
        self.address_file = self.run_dir.resolve() / "supervisor.json"
        self.hosts = hosts.parse_hostfile(self.launch.hostfile) if self.launch.hostfile else ()
        self.selector = selectors.DefaultSelector()
        self.attempt = 0
        self.num_own = self.launch.num_nodes * (self.launch.num_devices + 1)
        """Connections of the job itself: one per rank, one per node."""
        self.max_connections = self.num_own + MAX_STRANGERS

    # --- the job ----------------------------------------------------------------------------------

    def run(self) -> int:
        address = self.listen_address()
        self.max_connections = connection_limit(self.num_own)

        try:
            server = socket.create_server(
                (address, 0), family=hosts.family_of(address), backlog=128
            )
        except OSError as error:
            raise ValueError(
                f"the supervisor cannot listen on {address} ({error.strerror}); set "
                "launch.listen_addr to an address of this machine that the hosts reach"
            ) from error

        server.setblocking(False)
        self.selector.register(server, selectors.EVENT_READ)

        # From here a signal asks for a save instead of ending this process.
        previous = {n: signal.signal(n, self._asked_to_stop) for n in ASKING if may_take(n)}

        try:
            # What an agent needs must lie in the run directory before any launcher starts one.
            host, port = server.getsockname()[:2]
            if self.one_machine:
                self.store_folder = tempfile.mkdtemp(prefix="loadstone-")
            JobFile(
                host,
                port,
                self.token,
                tuple(self.arguments),
                self.env,
                self.launch.secrets_file,
                self.store_folder,
            ).save(self.address_file)
            self.kept = [
                KeptFile(path)
                for path in (self.address_file, self.run_dir / "config.yaml")
                if path.is_file()
            ]

            code = self._attempts()
            self.mend_files()
            self.event("end", code=code, restarts=self.attempt)

            # The parents on other nodes wait for the end until somebody tells them.
            for peer in self.peers:
                self.order(peer, "end", code=code)
            return code
        except Stopped:
            for peer in self.peers:
                self.order(peer, "end", code=exits.DONE)
            raise
        finally:
            self.address_file.unlink(missing_ok=True)
            if self.store_folder is not None:
                shutil.rmtree(self.store_folder, ignore_errors=True)
            for peer in list(self.peers):
                self.forget(peer)
            self.selector.unregister(server)
            server.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _attempts(self) -> int:
        best_step = -1
        ungained = 0
        delay = self.launch.restart_delay_seconds

        while True:
            try:
                chosen = self.choose_hosts()
            except NoHosts as error:
                say(str(error))
                return exits.NO_HOSTS

            # A supervisor may have been stopped for hours; two jobs must not write one directory.
            if not self.still_ours():
                say(
                    f"{self.run_dir} was taken over by another job "
                    "while this one stood still: nothing is started"
                )
                return exits.IN_USE

            self.mend_files()
            outcome = self.one_attempt(chosen)
            if outcome.verdict is None:
                return exits.DONE

            # Progress pardons what went before: only attempts in a row without a new step are
            # counted.
            failure = self._failure(outcome.verdict)
            if outcome.step > best_step:
                best_step = outcome.step
                ungained = 0
                delay = self.launch.restart_delay_seconds
            else:
                ungained += 1

            reason = self._why_not_again(failure, ungained)
            if reason is not None:
                if reason:
                    say(reason)
                return failure.code

            # The wait is cut short for whoever asks for an end.
            say(
                f"restart {self.attempt + 1} of {self.launch.max_restarts} from the last complete "
                f"checkpoint in {delay:g} s"
            )
            until = time.monotonic() + delay
            while time.monotonic() < until and not self.stop_asked:
                time.sleep(0.1)
            if self.stop_asked:
                say("asked to stop before the restart")
                return failure.code

            # Every restart in a row waits twice as long, since what broke may need time to mend.
            delay = min(2 * delay, MAX_DELAY_SECONDS)
            self.attempt += 1

    def _failure(self, verdict: Verdict) -> exits.Failure:
        """What a verdict means for the job. A port that was chosen here is another one at the next
        attempt, so that a restart may help; a port that the user names is not.
        """
        failure = exits.FAILURES[verdict.kind]
        if verdict.kind == "rendezvous" and self.launch.master_port is not None:
            return replace(failure, restart=False)
        return failure

    def _why_not_again(self, failure: exits.Failure, ungained: int) -> str | None:
        """None to restart, else what to say ("" when the verdict has said it all)."""
        if self.stop_asked or not failure.restart or self.launch.max_restarts == 0:
            return ""
        if self.attempt >= self.launch.max_restarts:
            return f"launch.max_restarts={self.launch.max_restarts} restarts are used up"
        if ungained >= UNGAINED_LIMIT:
            return (
                f"no restart: {ungained} attempts in a row gained no step, another would not either"
            )
        return None

    def choose_hosts(self) -> tuple[hosts.Host, ...]:
        """Choose the hosts of the next attempt, the first ones that can be reached. There are fewer
        than asked for only where launch.elastic allows it.

        Raises:
            NoHosts: there are too few.
        """
        if not self.hosts:
            return ()

        wanted = self.launch.num_nodes
        silent = hosts.unreachable(self.hosts, self.launch.ssh_port)
        for name, reason in silent.items():
            say(f"host {name} cannot be reached: {reason}")
        usable = [h for h in self.hosts if h.name not in silent][:wanted]

        # At the start a silent host is a mistake in the hostfile; later it is a host that broke.
        if self.attempt == 0 and (
            broken := [h.name for h in self.hosts[:wanted] if h.name in silent]
        ):
            raise NoHosts(
                "before the start every host of launch.hostfile must answer to ssh; mend or remove "
                f"{', '.join(broken)}, then see: python -m launch.doctor "
                f"launch.hostfile={self.launch.hostfile}"
            )

        if len(usable) == wanted:
            return tuple(usable)

        # The largest number of nodes that the config allows, since every node less costs speed.
        for number in range(len(usable), 0, -1) if self.launch.elastic else ():
            if not self.fits(number * self.launch.num_devices):
                say(f"going on with {number} of {wanted} nodes (launch.elastic)")
                return tuple(usable[:number])
        raise NoHosts(
            f"{len(usable)} of the {wanted} hosts needed can be reached"
            + (", and the config fits no smaller number" if self.launch.elastic and usable else "")
        )

    # --- one attempt ------------------------------------------------------------------------------

    def one_attempt(self, chosen: tuple[hosts.Host, ...]) -> Outcome:
        num_nodes = len(chosen) or self.launch.num_nodes

        # A judge and a port of its own: nothing of the last attempt may count in this one.
        self.judge = Judge(num_nodes * self.launch.num_devices, self.limits, time.monotonic())
        self.rendezvous = self._rendezvous(chosen)
        self.event(
            "attempt",
            attempt=self.attempt,
            hosts=[h.name for h in chosen] or [socket.gethostname()],
            world_size=self.judge.world_size,
        )

        # Where every node has its own command, all of them must be there before ranks start.
        if self.launch.by_node and (missing := self._missing_nodes()):
            if self.stop_asked:
                raise Stopped
            absent = Verdict(
                "startup",
                (),
                (),
                0,
                "",
                f"no word from the command with launch.node_rank={', '.join(map(str, missing))}: "
                "start it on every node, all with the same run_dir",
            )
            self._announce(absent)
            return Outcome(absent, -1)

        # Other nodes start their launchers on order, this one its own.
        for peer in self.peers:
            if peer.node is not None:
                self.order(peer, "start", attempt=self.attempt, port=self.rendezvous.port)
        launcher = spawn.start(
            spawn.command(
                self.launch,
                num_nodes,
                self.rendezvous,
                [str(self.address_file), str(self.attempt)],
                self._hostfile(chosen),
                self.store_folder,
            )
        )

        # Whatever happens, the launcher does not outlive the attempt.
        try:
            verdict = self._watch(launcher)
            step = self.judge.step
            if verdict is not None:
                self._announce(verdict)
            self._end(launcher, verdict)
        finally:
            spawn.kill_tree(launcher)
        return Outcome(verdict, step)

    def _rendezvous(self, chosen: tuple[hosts.Host, ...]) -> spawn.Rendezvous:
        address = self.launch.master_addr
        if address is None:
            if chosen:
                # None: DeepSpeed asks the host itself
                address = hosts.address_of(chosen[0].name)
            elif self.launch.kind != "slurm":
                address = "127.0.0.1"
        return spawn.Rendezvous(address, self.launch.master_port or free_port())

    def _hostfile(self, chosen: tuple[hosts.Host, ...]) -> str | None:
        path = self.run_dir / "hostfile"
        if chosen:
            return spawn.write_hostfile(path, [(h.pdsh_name, h.slots) for h in chosen])
        if self.launch.by_node and self.launch.kind == "deepspeed":
            # names only: nobody is reached by them
            names = [f"node-{i}" for i in range(self.launch.num_nodes)]
            return spawn.write_hostfile(path, [(name, self.launch.num_devices) for name in names])
        return None

    def _missing_nodes(self) -> list[int]:
        """Nodes whose command has not reported within watchdog.startup_seconds."""
        until = time.monotonic() + self.limits.startup_seconds
        while missing := sorted(
            set(range(1, self.launch.num_nodes))
            - {p.node for p in self.peers if p.node is not None}
        ):
            if time.monotonic() > until or self.stop_asked:
                break
            self.listen(0.2)
        return missing

    def _watch(self, launcher: subprocess.Popen[bytes]) -> Verdict | None:
        """Watch the ranks until all are done (None) or a fault is certain."""
        interval = min(1.0, self.limits.timeout_seconds / 8)
        next_ping = 0.0
        stop_until = None
        stacks_until = None

        while not self.judge.complete():
            self.listen(interval / 2)
            now = time.monotonic()
            if now >= next_ping:
                next_ping = now + interval
                self.everyone("stop" if self.stop_asked else "ping")
                self.mend_files(self.address_file)

            if launcher.poll() is not None:
                self.judge.launcher_exit(launcher.returncode, now)

            # The ranks save by themselves; only one that does not come to its end is a fault.
            if self.stop_asked and stop_until is None:
                stop_until = now + self.config.checkpoint.grace_seconds + 2
                say("asked to stop: the ranks save and end")
            if self.interrupts > 1:
                return Verdict(
                    "interrupted",
                    (),
                    (),
                    self.judge.step,
                    "",
                    "ended at once by a second SIGINT; what came after the last checkpoint is lost",
                )
            if stop_until is not None and now > stop_until:
                return Verdict(
                    "communication",
                    (),
                    (),
                    self.judge.step,
                    "",
                    "the ranks did not save and end within "
                    f"checkpoint.grace_seconds={self.config.checkpoint.grace_seconds:g}",
                )

            # A hung job is asked for its stacks before the verdict, which tell who waits for whom.
            self.judge.stopping = self.stop_asked > 0
            verdict = self.judge.verdict(now)
            if verdict is None:
                stacks_until = None
            elif verdict.kind == "hung" and stacks_until is None:
                self.everyone("stacks")  # who waits for whom
                stacks_until = now + STACKS_SECONDS
            elif verdict.kind != "hung" or now > (stacks_until or 0.0):
                return verdict
        return None

    def _announce(self, verdict: Verdict) -> None:
        failure = self._failure(verdict)
        self.event(
            "verdict",
            attempt=self.attempt,
            **asdict(verdict),
            restart=failure.restart
            and not self.stop_asked
            and self.attempt < self.launch.max_restarts,
        )
        say(verdict.message)

    def _end(self, launcher: subprocess.Popen[bytes], verdict: Verdict | None) -> None:
        """End all ranks, and then the launcher. Hosts that are not heard have ended their ranks by
        the time this returns.
        """
        # Who is silent now cannot be told to leave, but its agent ends it for the same silence.
        started = time.monotonic()
        silent = [
            r.heard
            for r in self.judge.ranks.values()
            if r.exit_code is None
            and (
                r.disconnected is not None
                or started - r.heard > max(2.0, self.limits.timeout_seconds / 3)
            )
        ]

        # Agents end their ranks; the launcher then ends by itself, unless somebody hangs.
        self.everyone("leave" if verdict is None else "abort")
        until = started + (LEAVE_SECONDS if verdict is None else ABORT_SECONDS)
        while time.monotonic() < until and any(p.rank is not None for p in self.peers):
            self.listen(0.1)
        while verdict is None and time.monotonic() < until and launcher.poll() is None:
            time.sleep(0.05)

        spawn.kill_tree(launcher)
        for peer in [p for p in self.peers if p.rank is not None]:
            self.forget(peer)

        # A host that is not heard ends its ranks itself, after the time limit: the next attempt
        # must not start beside them.
        if verdict is not None and silent:
            fenced = max(silent) + self.limits.timeout_seconds + 2
            while time.monotonic() < fenced and self.interrupts < 2:
                self.listen(0.2)

        if verdict is not None:
            self.event(
                "stopped", attempt=self.attempt, seconds=round(time.monotonic() - started, 1)
            )

    # --- connections ------------------------------------------------------------------------------

    @property
    def one_machine(self) -> bool:
        """Whether every rank is a child of this process: then their rendezvous is a private file,
        not a port.
        """
        return (
            self.launch.kind in ("deepspeed", "torchrun")
            and not self.hosts
            and self.launch.num_nodes == 1
        )

    def listen_address(self) -> str:
        if self.launch.listen_addr is not None:
            return self.launch.listen_addr
        if self.hosts:
            return hosts.facing_address(self.hosts[0].name)
        if self.launch.by_node:
            return str(self.launch.master_addr)
        if self.launch.kind == "slurm" and self.launch.num_nodes > 1:
            return hosts.address_of(socket.gethostname()) or "0.0.0.0"
        return "127.0.0.1"

    def listen(self, seconds: float) -> None:
        """Take in connections and messages for about this long."""
        for key, _ in self.selector.select(seconds):
            if key.data is None:
                self._accept(key.fileobj)  # type: ignore[arg-type]
            elif key.data in self.peers:
                self._receive(key.data)
        now = time.monotonic()
        for peer in [p for p in self.peers if not p.known and now - p.since > HANDSHAKE_SECONDS]:
            self.forget(peer)

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        # Whoever fills the table with silence loses his oldest connection, and no rank waits for
        # him to tire.
        strangers = [p for p in self.peers if not p.known]
        if (
            len(self.peers) >= self.max_connections
            or len(strangers) >= self.num_own + MAX_STRANGERS
        ):
            if not strangers:
                connection.close()
                return
            self.forget(strangers[0])
        try:
            line = Line(connection, self.limits.timeout_seconds)
        except OSError:  # gone already
            connection.close()
            return
        peer = Peer(line, new_nonce(), time.monotonic())
        self.peers.append(peer)
        self.selector.register(peer.line, selectors.EVENT_READ, peer)
        self._send(peer, {"nonce": peer.nonce})

    def _receive(self, peer: Peer) -> None:
        """Take in what one peer has sent. Whatever that is, it costs at most this connection."""
        try:
            if not peer.greeted:
                for message in peer.line.receive(at_most=1):
                    peer.line.seal(self.token, peer.nonce, read_nonce(message), is_supervisor=True)
                    peer.greeted = True
            if peer.greeted:
                for message in peer.line.receive():
                    self._heard(peer, message)
        except Closed:
            self.forget(peer)
        except Exception as error:  # a message of the right token and of the wrong form
            if peer.node is not None:
                who = "another node"
            else:
                who = f"rank {peer.rank}" if peer.known else "an agent"
            say(
                f"the connection of {who} is dropped, since its message cannot be read "
                f"({type(error).__name__}: {error})"
            )
            self.forget(peer)

    def _heard(self, peer: Peer, message: dict[str, Any]) -> None:
        if not peer.known:
            self._welcome(peer, message)
        elif peer.node is not None:
            self.stop_asked += message.get("asked_to_stop") is True
        elif "event" in message:
            self.event(message.pop("event"), rank=peer.rank, **message)
        elif peer.rank is not None:
            self.judge.report(
                peer.rank, self.judge.ranks[peer.rank].host, time.monotonic(), message
            )

    def _welcome(self, peer: Peer, message: dict[str, Any]) -> None:
        """Let in a peer that belongs to this attempt. That it knows the token is settled before."""
        if "node" in message:
            peer.node = int(message["node"])
            self._send(peer, {"welcome": {"timeout": self.limits.timeout_seconds}})
            return

        # A late agent of an earlier attempt must not speak for a rank of this one.
        rank = int(message["rank"])
        if message["attempt"] != self.attempt or not 0 <= rank < self.judge.world_size:
            self.forget(peer)
            return

        for other in [p for p in self.peers if p.rank == rank]:
            self.forget(other)  # the same agent, on a new connection
        peer.rank = rank

        # The report counts as a sign of life: from here on silence is measured.
        self.judge.report(rank, str(message["host"]), time.monotonic(), {})
        rendezvous = {}
        if self.rendezvous.address:
            rendezvous["MASTER_ADDR"] = self.rendezvous.address
            rendezvous["MASTER_PORT"] = str(self.rendezvous.port)
        welcome = {
            "timeout": self.limits.timeout_seconds,
            "grace": self.config.checkpoint.grace_seconds,
            "rendezvous": rendezvous,
        }
        self._send(peer, {"welcome": welcome})

    def order(self, peer: Peer, order: str, **facts: Any) -> None:
        self._send(peer, {"order": order, **facts})

    def everyone(self, order: str) -> None:
        for peer in list(self.peers):
            if peer.known:
                self.order(peer, order)

    def _send(self, peer: Peer, message: dict[str, Any]) -> None:
        try:
            peer.line.send(message)
        except Closed:
            self.forget(peer)

    def forget(self, peer: Peer) -> None:
        if peer not in self.peers:
            return
        self.peers.remove(peer)
        self.selector.unregister(peer.line)
        peer.line.close()
        if peer.rank is not None:
            self.judge.disconnected(peer.rank, time.monotonic())

    # --- words ------------------------------------------------------------------------------------

    def event(self, event: str, **facts: Any) -> None:
        """Append a line to supervisor.jsonl. A file that cannot be written ends no job."""
        path = self.run_dir / "supervisor.jsonl"
        if "events" in self.told and not path.exists():
            say(f"{path} was removed: what it told up to here is lost, it goes on in a new one")
        try:
            with path.open("a") as file:
                file.write(dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")
            self.told.add("events")
        except OSError as error:
            self.say_once(
                f"{path} cannot be written ({error.strerror}): what happens is said here alone"
            )

    def mend_files(self, only: Path | None = None) -> None:
        """Put back what agents and ranks will read, where somebody has removed or changed it, as
        long as the directory is this job's: whoever takes it over removes supervisor.json.
        """
        for file in self.kept:
            if (only is not None and file.path != only) or file.intact():
                continue
            if not self.still_ours():
                return
            try:
                found = file.mend()
            except OSError as error:
                self.say_once(
                    f"{file.path} is needed for a restart and cannot be put back ({error.strerror})"
                )
                continue
            if found is not None:
                edited = (
                    f"; what it held is in {file.path.name}.edited" if found == "changed" else ""
                )
                say(
                    f"{file.path} was {found} while the job runs; "
                    f"it is as it was at the start again{edited}"
                )

    def say_once(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            say(text)

    def _asked_to_stop(self, number: int, frame: object) -> None:
        self.stop_asked += 1
        self.interrupts += number == signal.SIGINT


def connection_limit(num_own: int) -> int:
    """How many connections may be open: those of the job and MAX_STRANGERS, below what the system
    lets a process open.

    Raises:
        ValueError: the limit on open files leaves no room for the job's own connections.
    """
    wanted = num_own + MAX_STRANGERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + OWN_DESCRIPTORS:
        soft = (
            min(hard, wanted + OWN_DESCRIPTORS)
            if hard != resource.RLIM_INFINITY
            else wanted + OWN_DESCRIPTORS
        )
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft - OWN_DESCRIPTORS < num_own + 8:
        raise ValueError(
            f"the supervisor needs {num_own + OWN_DESCRIPTORS + 8} "
            f"open files for {num_own} connections of ranks and nodes, "
            f"and this machine allows {soft}; raise it with ulimit -n"
        )
    return min(wanted, soft - OWN_DESCRIPTORS)


def say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
