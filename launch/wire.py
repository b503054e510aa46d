"""JSON lines over a TCP connection between the supervisor and its agents. Both ends prove that they know the token."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.strict_json import dumps

MAX_LINE = 2**20


@dataclass(frozen=True)
class Address:
    """Where the supervisor of a run listens; RUN/supervisor.json, readable by its owner alone."""

    host: str
    port: int
    token: str

    def save(self, path: Path) -> None:
        scratch = path.with_suffix(".tmp")
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(dumps(asdict(self)))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Address:
        return cls(**json.loads(path.read_text()))


def new_token() -> str:
    return secrets.token_hex(32)


def proof(token: str, nonce: str) -> str:
    """What only a holder of the token can answer to a nonce; the token itself never travels."""
    return hmac.new(token.encode(), nonce.encode(), hashlib.sha256).hexdigest()


class Closed(ConnectionError):
    """The other end is gone."""


class Line:
    """A non-blocking connection that carries one JSON object a line."""

    def __init__(self, connection: socket.socket, unacknowledged_seconds: float):
        self.socket = connection
        self._received = b""
        self._unsent = b""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A dead link is noticed after this long instead of the quarter of an hour that TCP retransmits for.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unacknowledged_seconds * 1000))

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message and write what the connection takes.

        Raises:
            Closed: the other end is gone, or has not read for very long.
        """
        self._unsent += dumps(message).encode() + b"\n"
        if len(self._unsent) > MAX_LINE:
            raise Closed("the other end does not read")
        self.flush()

    def flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent):]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived.

        Raises:
            Closed: the other end is gone, or sends what is no message of ours.
        """
        gone = False
        try:
            while not gone:
                received = self.socket.recv(65536)
                gone = not received
                self._received += received
                if len(self._received) > MAX_LINE:
                    raise Closed("a message is too long")
        except BlockingIOError:
            pass
        except OSError as error:
            raise Closed(str(error)) from error
        *lines, self._received = self._received.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError as error:
            raise Closed("a message is not JSON") from error
        if not all(isinstance(message, dict) for message in messages):
            raise Closed("a message is not an object")
        if gone and not messages:
            raise Closed("closed")
        return messages

    def close(self) -> None:
        self.socket.close()


def join(address: Address, seconds: float, **hello: Any) -> tuple[Line, dict[str, Any]]:
    """Connect to the supervisor: it sends a nonce, this end proves that it knows the token and says who it is (`hello`).

    Returns the connection and the supervisor's welcome. Every step may take `seconds`.

    Raises:
        ConnectionRefusedError: nobody listens.
        OSError: no connection, or no welcome.
    """
    line = Line(socket.create_connection((address.host, address.port), timeout=2), seconds)
    try:
        line.send({"proof": proof(address.token, _wait_for(line, "nonce", seconds)), **hello})
        return line, _wait_for(line, "welcome", seconds)
    except Closed:
        line.close()
        raise


def _wait_for(line: Line, key: str, seconds: float) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for message in line.receive():
            if key in message:
                return message[key]
        select.select([line], [], [], 0.2)
    raise Closed(f"no {key} from the supervisor")
