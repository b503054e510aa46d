"""Who broke the job: from the reports of all ranks to one verdict. No clocks, sockets or processes of its own.

One fault makes many symptoms: the peers of a killed rank fail as well, with errors that name sockets. So evidence is
ranked, causes before consequences, and after the first sign the judge waits a little for a better one:

    1  ended by a signal, by an exception of its own, or too early; stopped by the kernel
    2  its agent or its host went silent; its launcher ended
    3  alive, but without progress
    4  lost contact with the other ranks (always a consequence: waits until a silent host would have been noticed)
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace
from typing import Any

from launch.exits import FAILURES
from train.config import WatchdogConfig

SETTLE_SECONDS = 1.5
RECONNECT_SECONDS = 2.0
SLACK = 4.0
"""Work may take this many times as long as the longest before it counts as hung."""
AGREED = ("non_finite", "alarm", "disk_full", "gone", "checkpoint", "in_use", "config")
"""Failures that all ranks raise together; their message names the rank where it began."""


@dataclass(frozen=True)
class Rank:
    """What is known of one rank; times in seconds on the supervisor's clock, spans on the agent's."""

    rank: int
    host: str
    heard: float
    """When its agent was last heard."""
    disconnected: float | None = None
    """When its agent's connection ended; None: it stands."""
    step: int = 0
    phase: str = "start"
    beats: int = 0
    silent: float = 0.0
    """Since the process last showed a sign of life."""
    idle: float = 0.0
    """Since its main thread last made progress."""
    usual: float | None = None
    """The longest it has stayed in this phase before (the longest but one after three times, since the first time may
    compile); None: it never was in it."""
    state: str = "R"
    """Of the process, as /proc has it: T is stopped."""
    waiting: bool | None = None
    """Whether its main thread stands in a collective, once it was asked."""
    orphaned: bool = False
    """Its launcher is gone."""
    exit_code: int | None = None
    exited: float = 0.0
    told: bool = False
    """Its agent was asked to end by the launcher."""
    failure: str | None = None
    message: str = ""
    out_of_memory: bool = False

    @property
    def done(self) -> bool:
        return self.exit_code == 0 and self.phase == "done"


_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,), "beats": (int,), "exit_code": (int,), "silent": (int, float), "idle": (int, float),
    "usual": (int, float), "phase": (str,), "state": (str,), "failure": (str,), "message": (str,), "waiting": (bool,),
    "orphaned": (bool,), "told": (bool,), "out_of_memory": (bool,)}
"""What an agent reports of its rank: the judge computes with these, and takes nothing else for them."""
_MAY_BE_UNKNOWN = ("usual", "waiting", "exit_code", "failure")


@dataclass(frozen=True)
class Verdict:
    kind: str
    """A key of launch.exits.FAILURES."""
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    step: int
    phase: str
    message: str
    """One line that names ranks, hosts, step and phase."""


@dataclass
class Judge:
    """Collects reports of one attempt and gives the verdict, or None while all is well."""

    world_size: int
    limits: WatchdogConfig
    started: float
    ranks: dict[int, Rank] = field(default_factory=dict)
    _suspected: float | None = None
    launcher_ended: tuple[float, int] | None = None

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

    def _suspects(self, now: float) -> dict[int, list[tuple[str, Rank | None, str]]]:
        """Strength -> (kind, rank or None for the job, what happened)."""
        found: dict[int, list[tuple[str, Rank | None, str]]] = {}

        def add(strength: int, kind: str, rank: Rank | None, what: str) -> None:
            found.setdefault(strength, []).append((kind, rank, what))

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
        if len(self.ranks) < self.world_size and now - self.started > self.limits.startup_seconds:
            missing = ", ".join(str(r) for r in range(self.world_size) if r not in self.ranks)
            add(2, "startup", None, f"ranks {missing} did not report within {self.limits.startup_seconds:g} s")
        if self.launcher_ended is not None and any(r.exit_code is None for r in self.ranks.values()):
            add(2, "launcher", None, f"the launcher ended with code {self.launcher_ended[1]}")
        if self.launcher_ended is not None and len(self.ranks) < self.world_size and not found:
            add(2, "launcher", None, f"the launcher ended with code {self.launcher_ended[1]} before all ranks reported")
        return found

    def _patience(self, rank: Rank) -> float:
        """Seconds a rank may stay in its phase."""
        if rank.usual is None:
            return self.limits.startup_seconds
        return max(self.limits.timeout_seconds, SLACK * rank.usual)

    def _of(self, suspects: list[tuple[str, Rank | None, str]]) -> Verdict:
        """The earliest cause; ranks that share it are named together."""
        order = list(FAILURES)
        kind, first, what = min(suspects, key=lambda s: (s[1].exited if s[1] else 0.0, order.index(s[0])))
        same = [r for k, r, _ in suspects if k == kind and r is not None]
        if kind == "hung":
            same = _culprits(same)
            what = f"no progress for {same[0].idle:.0f} s"
        elif kind not in ("lost", "frozen", "launcher", "communication"):
            same = [first] if first is not None else []
        if first is None:
            return Verdict(kind, (), (), self.step, "", f"{what} (after step {self.step})")
        first = min(same, key=lambda r: r.rank)
        ranks, hosts = tuple(sorted(r.rank for r in same)), tuple(sorted({r.host for r in same}))
        where = f"(step {first.step}, {first.phase})"
        if kind in AGREED:
            return Verdict(kind, ranks, hosts, first.step, first.phase, f"{what} {where}")
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} on {', '.join(hosts)}"
        return Verdict(kind, ranks, hosts, first.step, first.phase, f"{who}: {what} {where}")


def _culprits(hung: list[Rank]) -> list[Rank]:
    """Of the ranks without progress, the ones the others wait for: outside any collective, with the fewest beats."""
    outside = [r for r in hung if r.waiting is False] or hung
    fewest = min(r.beats for r in outside)
    return [r for r in outside if r.beats == fewest]


def _of_exit(rank: Rank) -> tuple[int, str, Rank, str]:
    code = rank.exit_code
    assert code is not None
    if rank.failure == "communication" or (rank.told and rank.failure is None):
        return 4, "communication", rank, f"contact with the other ranks lost: {rank.message or 'told to end'}"
    if rank.failure is not None:
        return 1, rank.failure, rank, rank.message
    if code < 0:
        memory = "; the kernel ran out of memory" if rank.out_of_memory else ""
        return 1, "killed", rank, f"ended by {_signal_name(-code)}{memory}"
    if code == 0:
        return 1, "exited", rank, "left with exit code 0 before the end of training"
    return 1, "failed", rank, f"left with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
