"""JSON lines over TCP between the supervisor and its agents, sealed by a token that never travels.

Each end says a nonce in the clear, and nothing else that is read before it has proved who it is:

    supervisor -> agent   {"nonce": Ns}
    agent -> supervisor   {"nonce": Na}
    from then on          MAC(key, counter | text) text          one key for each direction

with key = HMAC-SHA256(token, direction | Ns | Na). A line that was made without the token, sent
twice, left out or moved does not fit its counter and ends the connection. The text itself is not
encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import stat
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.files.strict_json import dumps

MAX_LINE = 2**20
MAX_GREETING = 4096
"""Bytes that are taken from an end which has not proved that it knows the token."""
_MAC_LENGTH = hashlib.sha256().digest_size * 2


@dataclass(frozen=True)
class JobFile:
    """RUN/supervisor.json: where the supervisor listens, and all that an agent starts. Its owner
    alone reads it.

    An agent takes the rank's arguments and variables from here and from nowhere else: what comes
    over the network can end a rank or ask it to save, but start nothing.
    """

    host: str
    """Address that the supervisor listens on."""
    port: int
    """Its port."""
    token: str
    """Secret of the job, which every connection must prove to know."""
    arguments: tuple[str, ...] = ()
    """Of `python -m launch.train` in every rank."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every rank."""
    secrets_file: str | None = None
    """File of variables that every agent reads by itself; None: there is none."""
    store_folder: str | None = None
    """Private folder for the ranks' rendezvous where all of them are on this machine
    (train/rank/runtime.py).
    """

    def save(self, path: Path) -> None:
        scratch = path.with_suffix(".tmp")
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(dumps(asdict(self)))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> JobFile:
        """Read the file.

        Raises:
            PermissionError: it is not yours, or others can read or change it.
            OSError, ValueError, TypeError: there is none, or it is damaged.
        """
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if (
                not stat.S_ISREG(facts.st_mode)
                or facts.st_uid != os.geteuid()
                or facts.st_mode & 0o077
            ):
                raise PermissionError(
                    f"{path} must be a file of your own that nobody else reads (mode 600); it "
                    f"belongs to user {facts.st_uid} and has mode {stat.S_IMODE(facts.st_mode):o}"
                )
            record = json.load(file)
        return cls(**{**record, "arguments": tuple(record.get("arguments", ()))})


def new_token() -> str:
    return secrets.token_hex(32)


def new_nonce() -> str:
    return secrets.token_hex(16)


class Closed(ConnectionError):
    """The other end is gone, or is not who it should be."""


class Stranger(Closed):
    """The other end does not know the token."""


class Line:
    """A non-blocking connection that carries one JSON object a line. Nothing it receives raises
    anything but Closed.
    """

    def __init__(self, connection: socket.socket, unacknowledged_seconds: float | None = None):
        self.socket = connection
        self.proved = False
        """Whether the other end has shown that it knows the token."""
        self._received = b""
        self._unsent = b""
        self._keys: tuple[bytes, bytes] | None = None
        """Of what is sent and of what is received, once the nonces are known."""
        self._num_sent = self._num_received = 0
        connection.setblocking(False)
        if unacknowledged_seconds is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A dead link is noticed after this long instead of the quarter of an hour that TCP
            # retransmits for.
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unacknowledged_seconds * 1000)
            )

    def fileno(self) -> int:
        return self.socket.fileno()

    def seal(
        self, token: str, supervisor_nonce: str, agent_nonce: str, *, is_supervisor: bool
    ) -> None:
        """From here on every line carries a MAC, and every line that arrives must."""
        keys = [
            hmac.digest(
                token.encode(), f"{direction}|{supervisor_nonce}|{agent_nonce}".encode(), "sha256"
            )
            for direction in ("to agent", "to supervisor")
        ]
        self._keys = (keys[0], keys[1]) if is_supervisor else (keys[1], keys[0])

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message and write what the connection takes.

        Raises:
            Closed: the other end is gone, or has not read for very long.
        """
        text = dumps(message).encode()
        if self._keys is not None:
            text = _mac(self._keys[0], self._num_sent, text) + b" " + text
            self._num_sent += 1
        self._unsent += text + b"\n"
        if len(self._unsent) > MAX_LINE:
            raise Closed("the other end does not read")
        self.flush()

    def flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self, at_most: int | None = None) -> list[dict[str, Any]]:
        """The messages that have arrived, `at_most` so many; the others stay for the next call.

        Raises:
            Closed: the other end is gone, or sends what is no message of ours.
            Stranger: it does not know the token.
        """
        gone = self._read()
        messages: list[dict[str, Any]] = []
        while b"\n" in self._received and (at_most is None or len(messages) < at_most):
            text, self._received = self._received.split(b"\n", 1)
            if text:
                messages.append(self._open(text))
        if len(self._received) > (MAX_LINE if self.proved else MAX_GREETING):
            raise Closed("a message is too long")
        if gone and not messages:
            raise Closed("closed")
        return messages

    def _read(self) -> bool:
        """Take in what is there, within the limit; True when the other end has closed."""
        limit = MAX_LINE if self.proved else MAX_GREETING
        try:
            while len(self._received) <= limit:
                received = self.socket.recv(min(65536, limit + 1))
                if not received:
                    return True
                self._received += received
        except BlockingIOError:
            pass
        except OSError as error:
            raise Closed(str(error)) from error
        return False

    def _open(self, text: bytes) -> dict[str, Any]:
        """The message in a line. Its MAC is checked before anything looks into it."""
        if self._keys is not None:
            mac, text = text[:_MAC_LENGTH], text[_MAC_LENGTH + 1 :]
            if not hmac.compare_digest(mac, _mac(self._keys[1], self._num_received, text)):
                raise Stranger(
                    "a message was made without the token of this job, or is out of its place"
                )
            self._num_received += 1
            self.proved = True
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Closed("a message is not JSON") from error
        if not isinstance(message, dict):
            raise Closed("a message is not an object")
        return message

    def close(self) -> None:
        self.socket.close()


def _mac(key: bytes, number: int, text: bytes) -> bytes:
    return hmac.new(key, number.to_bytes(8, "big") + text, hashlib.sha256).hexdigest().encode()


def read_nonce(message: dict[str, Any]) -> str:
    """The nonce of a greeting.

    Raises:
        Closed: there is none.
    """
    nonce = message.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != len(new_nonce()):
        raise Closed("a greeting without a nonce")
    return nonce


def join(job: JobFile, seconds: float, **hello: Any) -> tuple[Line, dict[str, Any]]:
    """Connect to the supervisor, each end proving to the other that it knows the token; `hello`
    says who this one is.

    Returns the connection and the supervisor's welcome. Every step may take `seconds`.

    Raises:
        ConnectionRefusedError: nobody listens.
        Stranger: somebody else listens.
        OSError: no connection, or no welcome.
    """
    line = Line(socket.create_connection((job.host, job.port), timeout=2), seconds)
    try:
        supervisor_nonce, agent_nonce = read_nonce(_next(line, seconds)), new_nonce()
        line.send({"nonce": agent_nonce})
        line.seal(job.token, supervisor_nonce, agent_nonce, is_supervisor=False)
        line.send(hello)
        welcome = _next(line, seconds).get("welcome")
        if not isinstance(welcome, dict):
            raise Closed("no welcome from the supervisor")
        return line, welcome
    except Closed:
        line.close()
        raise


def _next(line: Line, seconds: float) -> dict[str, Any]:
    """The next message. What comes behind it stays in the line."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for message in line.receive(at_most=1):
            return message
        select.select([line], [], [], 0.2)
    raise Closed("no word from the supervisor")
