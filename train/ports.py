"""Where the processes of a job meet: ports, or a private file. Imports no torch."""

from __future__ import annotations

import random
import socket
from pathlib import Path

STORE = "LOADSTONE_STORE"
"""Variable that names the file of the ranks' rendezvous, where all of them are on one machine."""


def free_port() -> int:
    """A TCP port nobody listens on, for a server that starts seconds from now.

    Not one the kernel would hand out: those are for outgoing connections, and the next of somebody else could get it.
    """
    try:
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        first_outgoing = 32768
    ports = range(10000, first_outgoing) if first_outgoing > 11000 else range(10000, 65536)
    choice = random.SystemRandom()  # the seeded generator gives the same port to every job
    for _ in range(1000):
        port = choice.choice(ports)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free TCP port from {ports.start} to {ports.stop - 1}; set launch.master_port")
