"""Listening: the server from its first to its last request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE_SECONDS = 75
"""Of a connection without a request: more than load balancers keep theirs."""
ENDING = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Ends with the first signal when its requests have ended, and with the second one at once.

    Args:
        ending: the signals that ask for it.
    """

    def __init__(self, config: uvicorn.Config, ending: tuple[signal.Signals, ...] = ENDING):
        super().__init__(config)
        self.ending = ending

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signals again at its end, and the command would not end with
        0.
        """
        loop = asyncio.get_running_loop()
        taken = []
        for number in self.ending:
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
                before = signal.getsignal(number)
                loop.add_signal_handler(number, self._asked_to_end)
                taken.append((number, before))
        try:
            yield
        finally:
            for number, before in taken:
                loop.remove_signal_handler(number)
                signal.signal(number, before)

    def _asked_to_end(self) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        print("ending when all requests have; a second signal ends at once", file=sys.stderr)
        self.should_exit = True


def listen(
    app: ASGIApp,
    host: str,
    port: int,
    drain_seconds: int,
    ready: Callable[[Server, int], None] = lambda server, port: None,
    ending: tuple[signal.Signals, ...] = ENDING,
) -> Server:
    """Answer until asked to end.

    Args:
        ready: called when requests are answered, with the port.
        ending: signals that ask for it.

    Raises:
        ValueError: the address is taken, or none of this machine.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
    )
    server = Server(config, ending)
    # Bound here, for an error that says what is wrong; uvicorn would end the process.
    sock = _bound(host, port)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve([sock]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready(server, sock.getsockname()[1])
        await serving

    with sock:
        asyncio.run(serve())
    return server


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(
            f"serve.host={host} serve.port={port}: {error.strerror}; give another"
        ) from error
    return sock
