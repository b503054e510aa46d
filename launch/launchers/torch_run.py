"""torchrun, but its rendezvous does not listen on every interface: python -m
launch.launchers.torch_run ARGUMENTS OF TORCHRUN.

torch's `static` backend binds its store to all addresses of the machine. `one_address` is the same
rendezvous with a server on the address of its endpoint alone. With a file for a store (one machine)
nothing listens at all.
"""

from __future__ import annotations

import ipaddress
import os
import sys

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import (
    StaticTCPRendezvous,
    create_rdzv_handler,
)
from torch.distributed.run import main

from launch.process.exits import BAD_CONFIG
from launch.process.streams import forgive
from train.rank.ports import RendezvousError, listen

BACKEND = "one_address"


class OneAddressRendezvous(StaticTCPRendezvous):
    """A static rendezvous whose first node listens on `master_addr` and nowhere else."""

    _store: Store | None

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None and self.rank == 0 and _is_address(self.master_addr):
            server = listen(self.master_addr, self.master_port)
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                self.world_size,
                True,
                self.timeout,
                multi_tenant=True,
                master_listen_fd=server.detach(),
            )
        return super().next_rendezvous()


def _is_address(host: str) -> bool:
    """A name may mean loopback on its own host, where the other nodes could not reach it."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def create(params: RendezvousParameters) -> RendezvousHandler:
    static = create_rdzv_handler(params)
    assert isinstance(static, StaticTCPRendezvous)
    return OneAddressRendezvous(
        static.master_addr,
        static.master_port,
        int(static.rank),
        static.world_size,
        static.run_id,
        int(static.timeout.total_seconds()),
    )


if __name__ == "__main__":
    forgive()
    # With a file there is no server to share with the ranks, and torch would make one that listens
    # everywhere.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    rendezvous_handler_registry.register(BACKEND, create)
    try:
        main()
    except RendezvousError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_CONFIG) from error
