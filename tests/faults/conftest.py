"""Fixtures of the fault tests: laboratories, a shared corpus, reference losses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lab import Cluster, available
from scenario import reference as reference_losses

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from commandline import write_text


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[str, ...]:
    """Overrides that name a small corpus; its token store is made once."""
    return tuple(write_text(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="session")
def reference(tmp_path_factory, data):
    """reference(*overrides) -> losses of the uninterrupted job with these settings."""
    folder = tmp_path_factory.mktemp("reference")

    def losses(*overrides: str) -> dict[int, float]:
        return reference_losses(folder, data, *overrides)

    return losses


@pytest.fixture
def lab(tmp_path):
    """lab(num_nodes) -> a running Cluster, taken down after the test."""
    usable, reason = available()
    if not usable:
        pytest.skip(reason)
    clusters: list[Cluster] = []

    def build(num_nodes: int = 2, **options) -> Cluster:
        cluster = Cluster(num_nodes, tmp_path / f"lab{len(clusters)}", **options)
        clusters.append(cluster)
        return cluster.__enter__()

    yield build
    for cluster in clusters:
        cluster.__exit__()
