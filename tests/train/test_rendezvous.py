"""Where ranks meet: nothing listens on an interface that nobody needs, and no other user can take
part.
"""

from __future__ import annotations

import datetime

import psutil
import pytest
import torch.distributed as dist

from launch.launchers.torch_run import OneAddressRendezvous
from train.rank.ports import STORE, free_port
from train.rank.runtime import _own_store

TIMEOUT = datetime.timedelta(seconds=20)


@pytest.fixture
def job(monkeypatch):
    def set_variables(**variables: str) -> None:
        for name in (STORE, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "RANK": "0",
            "WORLD_SIZE": "2",
            **variables,
        }.items():
            monkeypatch.setenv(name, value)

    return set_variables


def listening() -> set[tuple[str, int]]:
    return {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.Process().net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }


def test_one_process_opens_no_port(job):
    job(WORLD_SIZE="1")
    before = listening()
    store = _own_store(TIMEOUT)
    assert isinstance(store, dist.HashStore) and listening() == before


def test_ranks_of_one_machine_meet_in_a_file_of_their_users_folder(job, tmp_path):
    job(**{STORE: str(tmp_path / "ranks-0")})
    before = listening()
    first, second = _own_store(TIMEOUT), _own_store(TIMEOUT)
    assert isinstance(first, dist.FileStore) and listening() == before
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_a_launchers_rendezvous_listens_on_its_address_alone():
    before, port = listening(), free_port()
    rendezvous = OneAddressRendezvous("127.0.0.1", port, 0, 1, "job", 20)
    rendezvous.next_rendezvous()
    assert listening() - before == {("127.0.0.1", port)}
