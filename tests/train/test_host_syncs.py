"""Counting waits for the device, with torch's reports made up: no CUDA device is needed."""

from __future__ import annotations

import warnings

import pytest
import torch

from train.timing.host_syncs import HostSyncs


@pytest.fixture
def modes(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    return found


def test_only_what_torch_calls_synchronizing_counts_and_the_rest_is_passed_on(modes):
    syncs = HostSyncs(torch.device("cuda"), True)
    with warnings.catch_warnings(record=True) as passed_on:
        warnings.simplefilter("always")
        for _ in range(2):
            with syncs.counting(True):
                for _ in range(3):
                    warnings.warn("called a synchronizing CUDA operation")
                warnings.warn("something else", FutureWarning)
    assert syncs.take() == {"perf/host_syncs": 6} and syncs.take() == {}
    assert [str(w.message) for w in passed_on] == ["something else"] * 2
    assert modes == ["warn", "default"] * 2


def test_the_mode_is_set_back_after_an_error(modes):
    syncs = HostSyncs(torch.device("cuda"), True)
    with pytest.raises(RuntimeError), syncs.counting(True):
        raise RuntimeError("broken")
    assert modes == ["warn", "default"]


@pytest.mark.parametrize(
    ("device", "wanted", "measuring"),
    [("cpu", True, True), ("cuda", False, True), ("cuda", True, False)],
)
def test_nothing_is_touched_elsewhere(modes, device, wanted, measuring):
    syncs = HostSyncs(torch.device(device), wanted)
    with syncs.counting(measuring):
        pass
    assert modes == [] and syncs.take() == {}
