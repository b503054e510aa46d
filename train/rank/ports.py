"""Where the processes of a job meet: ports, or a private file. Imports no torch."""

from __future__ import annotations

import errno
import os
import random
import socket
from pathlib import Path

STORE = "LOADSTONE_STORE"
"""Variable that names the file of the ranks' rendezvous, where all of them are on one machine."""
RANKS_KEY = "LOADSTONE_RANKS_KEY"
"""Variable with the secret by which such ranks know each other's records (channel.py)."""


class RendezvousError(OSError):
    """Rank 0 cannot listen where the others are to find it; the message says what to change."""


def listen(address: str, port: int) -> socket.socket:
    """A server for the ranks' rendezvous.

    Raises:
        RendezvousError: the address is not this machine's, or the port is taken or not for us.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise RendezvousError(cannot_listen(address, port, error.errno or 0)) from error


def cannot_listen(address: str, port: int, number: int) -> str:
    """Why rank 0 cannot listen, and what to do."""
    what = {
        errno.EADDRINUSE: f"port {port} is taken: free it, or choose another launch.master_port "
        "(null: a free one)",
        errno.EADDRNOTAVAIL: "the address is none of this machine's: give one that is as "
        "launch.master_addr",
        errno.EACCES: "the port is kept for root: choose a launch.master_port above 1023",
    }
    return (
        f"rank 0 cannot listen on {address}:{port} on {socket.gethostname()}; "
        f"{what.get(number, os.strerror(number))}. Where another launcher "
        "starts the ranks it is MASTER_PORT or MASTER_ADDR"
    )


def free_port() -> int:
    """A TCP port nobody listens on, for a server that starts seconds from now.

    Not one the kernel would hand out: those are for outgoing connections, and the next of somebody
    else could get it.
    """
    try:
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        first_outgoing = 32768
    ports = range(10000, first_outgoing) if first_outgoing > 11000 else range(10000, 65536)
    # the seeded generator gives the same port to every job
    choice = random.SystemRandom()
    for _ in range(1000):
        port = choice.choice(ports)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(
        f"no free TCP port from {ports.start} to {ports.stop - 1}; set launch.master_port"
    )
