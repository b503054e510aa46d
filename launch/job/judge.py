"""The judge finds out who broke the job: it makes one verdict of the reports of all ranks. It has
no clocks, sockets or processes of its own.

One fault makes many symptoms: the peers of a killed rank fail as well, with errors that name
sockets. So evidence is ranked, causes before consequences, and after the first sign the judge waits
a little for a better one:

    1  ended by a signal, by an exception of its own, or too early; stopped by the kernel
    2  its agent or its host went silent; its launcher ended
    3  alive, but without progress
    4  lost contact with the other ranks (always a consequence: waits until a silent host would have
    been noticed)
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace
from typing import Any

from launch.process.exits import FAILURES
from train.config.launching import WatchdogConfig

SETTLE_SECONDS = 1.5
RECONNECT_SECONDS = 2.0
SLACK = 4.0
"""Work may take this many times as long as the longest before it counts as hung."""
AGREED = ("non_finite", "alarm", "disk_full", "gone", "checkpoint", "in_use", "config")
"""Failures that all ranks raise together; their message names the rank where it began."""


@dataclass(frozen=True)
class Rank:
    """What is known of one rank. Times are in seconds on the supervisor's clock, spans in seconds
    on the agent's.
    """

    rank: int
    """Its number in the job."""
    host: str
    """Name of its machine."""
    heard: float
    """When its agent was last heard."""
    disconnected: float | None = None
    """When its agent's connection ended; None: it stands."""
    step: int = 0
    """The step that it works on."""
    phase: str = "start"
    """What it does in that step: a phase of the heartbeat."""
    beats: int = 0
    """How often its main thread has made progress."""
    silent: float = 0.0
    """Since the process last showed a sign of life."""
    idle: float = 0.0
    """Since its main thread last made progress."""
    usual: float | None = None
    """The longest it has stayed in this phase before (the longest but one after three times, since
    the first time may compile); None: it never was in it.
    """
    state: str = "R"
    """Of the process, as /proc has it: T is stopped."""
    waiting: bool | None = None
    """Whether its main thread stands in a collective, once it was asked."""
    orphaned: bool = False
    """Its launcher is gone."""
    exit_code: int | None = None
    """Of the process, negative for a signal; None: it runs."""
    exited: float = 0.0
    """When its exit was reported."""
    asked: bool = False
    """Its agent was asked to end, by the launcher unless a scheduler asks everybody."""
    told: bool = False
    """So the rank was, by its agent."""
    failure: str | None = None
    """Kind of failure that the rank itself has named, a key of launch.process.exits.FAILURES."""
    message: str = ""
    """What the rank itself has said of its failure."""
    out_of_memory: bool = False
    """Whether the kernel killed a process for memory while it ran."""

    @property
    def done(self) -> bool:
        return self.exit_code == 0 and self.phase == "done"


_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "beats": (int,),
    "exit_code": (int,),
    "silent": (int, float),
    "idle": (int, float),
    "usual": (int, float),
    "phase": (str,),
    "state": (str,),
    "failure": (str,),
    "message": (str,),
    "waiting": (bool,),
    "orphaned": (bool,),
    "asked": (bool,),
    "told": (bool,),
    "out_of_memory": (bool,),
}
"""What an agent reports of its rank: the judge computes with these, and takes nothing else for
them.
"""
_MAY_BE_UNKNOWN = ("usual", "waiting", "exit_code", "failure")


@dataclass(frozen=True)
class Verdict:
    """Why an attempt has failed, and whose fault it was."""

    kind: str
    """A key of launch.process.exits.FAILURES."""
    ranks: tuple[int, ...]
    """Numbers of the ranks that failed; empty when no single rank is to blame."""
    hosts: tuple[str, ...]
    """Names of their machines."""
    step: int
    """The step they were in."""
    phase: str
    """The phase they were in."""
    message: str
    """One line that names ranks, hosts, step and phase."""


Suspect = tuple[str, Rank | None, str]
"""Kind, rank or None for the job, what happened."""


@dataclass
class Judge:
    """A judge collects the reports of one attempt. It gives the verdict, None while all is well."""

    world_size: int
    """How many ranks the attempt has."""
    limits: WatchdogConfig
    """How long silence is forgiven."""
    started: float
    """When the attempt began, seconds on the supervisor's clock."""
    ranks: dict[int, Rank] = field(default_factory=dict)
    """The ranks that have reported, by number."""
    _suspected: float | None = None
    """Since when somebody is suspected; None: nobody is."""
    stopping: bool = False
    """Whether somebody asked the whole job to stop: then agents are asked to end without a
    fault.
    """
    launcher_ended: tuple[float, int] | None = None
    """When the launcher ended, and its exit code; None: it runs."""

    def report(self, rank: int, host: str, now: float, facts: dict[str, Any]) -> None:
        """Facts are fields of Rank, as an agent sends them; unknown ones are ignored.

        Raises:
            ValueError: a fact is of another kind than its field. The rank is then known as before.
        """
        known = {k: v for k, v in facts.items() if k in _KINDS}
        for name, value in known.items():
            if not (type(value) in _KINDS[name] or (value is None and name in _MAY_BE_UNKNOWN)):
                raise ValueError(f"{name} of rank {rank} is {value!r:.80}")
        before = self.ranks.get(rank, Rank(rank, host, now))
        if "exit_code" in known and before.exit_code is None:
            known["exited"] = now
        self.ranks[rank] = replace(before, heard=now, disconnected=None, **known)

    def disconnected(self, rank: int, now: float) -> None:
        if rank in self.ranks:
            self.ranks[rank] = replace(self.ranks[rank], disconnected=now)

    def launcher_exit(self, code: int, now: float) -> None:
        self.launcher_ended = self.launcher_ended or (now, code)

    def complete(self) -> bool:
        return len(self.ranks) == self.world_size and all(r.done for r in self.ranks.values())

    @property
    def step(self) -> int:
        """The last step that all ranks have finished."""
        return min((r.step if r.done else r.step - 1 for r in self.ranks.values()), default=0)

    def verdict(self, now: float) -> Verdict | None:
        suspects = self._suspects(now)
        if not suspects:
            self._suspected = None
            return None
        if self._suspected is None:
            self._suspected = now
        strength = min(suspects)
        wait = SETTLE_SECONDS if strength < 4 else self.limits.timeout_seconds + SETTLE_SECONDS
        if now - self._suspected < wait:
            return None
        return self._of(suspects[strength])

    def _suspects(self, now: float) -> dict[int, list[Suspect]]:
        """Suspects by the strength of what speaks against them; 1 is the strongest (see the head of
        this file).
        """
        found: dict[int, list[Suspect]] = {}

        def add(strength: int, kind: str, rank: Rank | None, what: str) -> None:
            found.setdefault(strength, []).append((kind, rank, what))

        # The first sign that fits names the rank's fault: the surest signs stand first.
        for rank in self.ranks.values():
            if rank.done:
                continue
            if rank.exit_code is not None:
                add(*_of_exit(rank))
            elif now - rank.heard > self.limits.timeout_seconds:
                add(2, "lost", rank, f"not heard of for {now - rank.heard:.0f} s")
            elif rank.disconnected is not None and now - rank.disconnected > RECONNECT_SECONDS:
                add(2, "lost", rank, "its agent is gone (killed, or its connection broke)")
            elif rank.orphaned:
                add(2, "launcher", rank, "the launcher that started it is gone")
            elif rank.state in "Tt" and rank.silent > self.limits.timeout_seconds:
                add(1, "frozen", rank, f"stopped (process state {rank.state})")
            elif rank.beats and rank.phase != "done" and rank.silent > self.limits.timeout_seconds:
                add(2, "frozen", rank, f"no sign of life (process state {rank.state})")
            elif rank.idle > self._patience(rank):
                add(3, "hung", rank, f"no progress for {rank.idle:.0f} s")

        # Ranks that never came cannot be silent: theirs is a fault of the start.
        missing = ", ".join(str(r) for r in range(self.world_size) if r not in self.ranks)
        if missing and now - self.started > self.limits.startup_seconds:
            add(
                2,
                "startup",
                None,
                f"ranks {missing} did not report within {self.limits.startup_seconds:g} s",
            )

        # A launcher that ends early takes its ranks with it; where some never reported, it may be
        # why.
        if self.launcher_ended is not None and any(
            r.exit_code is None for r in self.ranks.values()
        ):
            add(2, "launcher", None, f"the launcher ended with code {self.launcher_ended[1]}")
        if self.launcher_ended is not None and missing and not found:
            add(
                2,
                "launcher",
                None,
                f"the launcher ended with code {self.launcher_ended[1]} before all ranks reported",
            )

        return self._of_missing(missing, found)

    def _of_missing(
        self, missing: str, found: dict[int, list[Suspect]]
    ) -> dict[int, list[Suspect]]:
        """A launcher ends the other agents when one has died. While some have never reported, it
        was one of those, whatever becomes of the others; a rank that ended by itself is another
        matter.
        """
        asked = [r for r in self.ranks.values() if r.asked]
        ended = self.launcher_ended is not None
        if not missing or self.stopping or not (asked or ended) or 1 in found:
            return found
        how = "the launcher has ended" if ended else "the launcher told the others to end"
        what = f"ranks {missing} did not report, and {how}: their agents died while they started"
        return {**found, 2: [("startup", None, what)]}

    def _patience(self, rank: Rank) -> float:
        """Seconds a rank may stay in its phase."""
        if rank.usual is None:
            return self.limits.startup_seconds
        return max(self.limits.timeout_seconds, SLACK * rank.usual)

    def _of(self, suspects: list[Suspect]) -> Verdict:
        """The verdict about the earliest cause. Ranks that share it are named together."""
        order = list(FAILURES)
        kind, first, what = min(
            suspects, key=lambda s: (s[1].exited if s[1] else 0.0, order.index(s[0]))
        )

        # Ranks that hang in a collective are victims: only those outside it are named.
        same = [r for k, r, _ in suspects if k == kind and r is not None]
        if kind == "hung":
            same = _culprits(same)
            what = f"no progress for {same[0].idle:.0f} s"
        elif kind not in ("lost", "frozen", "launcher", "communication"):
            same = [first] if first is not None else []

        if first is None:
            return Verdict(kind, (), (), self.step, "", f"{what} (after step {max(0, self.step)})")

        first = min(same, key=lambda r: r.rank)
        ranks, hosts = tuple(sorted(r.rank for r in same)), tuple(sorted({r.host for r in same}))
        where = f"(step {first.step}, {first.phase})"
        if kind in AGREED or kind == "rendezvous":  # which says itself where
            return Verdict(kind, ranks, hosts, first.step, first.phase, f"{what} {where}")

        who = (
            f"rank{'s' if len(ranks) > 1 else ''} "
            f"{', '.join(map(str, ranks))} on {', '.join(hosts)}"
        )
        return Verdict(kind, ranks, hosts, first.step, first.phase, f"{who}: {what} {where}")


def _culprits(hung: list[Rank]) -> list[Rank]:
    """Of the ranks without progress, the ones the others wait for: outside any collective, with the
    fewest beats.
    """
    outside = [r for r in hung if r.waiting is False] or hung
    fewest = min(r.beats for r in outside)
    return [r for r in outside if r.beats == fewest]


def _of_exit(rank: Rank) -> tuple[int, str, Rank, str]:
    code = rank.exit_code
    assert code is not None
    if rank.failure == "communication" or (rank.told and rank.failure is None):
        return (
            4,
            "communication",
            rank,
            f"contact with the other ranks lost: {rank.message or 'told to end'}",
        )
    if rank.failure is not None:
        return 1, rank.failure, rank, rank.message
    if code < 0:
        if rank.out_of_memory:
            how = f"ended by {_signal_name(-code)}; the kernel ran out of memory"
            return 1, "out_of_memory", rank, how
        return 1, "killed", rank, f"ended by {_signal_name(-code)}"
    if code == 0:
        return 1, "exited", rank, "left with exit code 0 before the end of training"
    return 1, "failed", rank, f"left with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
