"""The probe of held-out tokens: what it keeps and what it makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train.data.loader import pack
from train.probe import DECILES, RoutingProbe, overlap


class Rows:
    """Token i stands 100 * (i + 1) times in the first row, nothing in the second."""

    def __len__(self) -> int:
        return 2

    def tokens(self, index: int) -> np.ndarray:
        return np.repeat(np.arange(10), 100 * np.arange(1, 11)) if index == 0 else np.empty(0, np.int64)


def output(ids: torch.Tensor, losses: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(routings=(SimpleNamespace(expert_ids=ids),) * 2, token_losses=losses, loss_sum=losses.sum())


def test_experts_by_decile_of_frequency_and_loss(tmp_path):
    batch = pack([np.arange(11) % 10], 10, end_of_document=99)
    ids = torch.full((10, 4), -1)
    for token in range(10):  # token t visits 1 + t // 3 experts
        ids[token, :1 + token // 3] = torch.arange(1 + token // 3)
    losses = -torch.arange(10.0).view(1, 10)
    probe = RoutingProbe(tmp_path, Rows(), 16)
    probe.add(batch, output(ids, losses))
    probe.add(batch, output(ids + 1, losses))  # only the first batch counts
    found = probe.measure(7)
    for d in range(DECILES):
        assert found[f"eval/experts_per_token/frequency_{d}"] == 1 + d // 3
        assert found[f"eval/experts_per_token/loss_{d}"] == 1 + (9 - d) // 3
    assert "eval/router_stability" not in found and probe.measure(8) == {}
    kept = np.load(tmp_path / "probe" / "step-00000007.npz", allow_pickle=False)
    assert kept["expert_ids"].shape == (2, 10, 4) and kept["token"].tolist() == list(range(10))


def test_stability_is_measured_against_the_evaluation_before_also_after_a_resume(tmp_path):
    batch, losses = pack([np.arange(11) % 10], 10, end_of_document=99), torch.zeros(1, 10)
    first = torch.tensor([[0, 1]] * 10)
    RoutingProbe(tmp_path, Rows(), 16).add(batch, output(first, losses))
    probe = RoutingProbe(tmp_path, Rows(), 16)
    probe.add(batch, output(first, losses))
    assert probe.measure(10) == {}  # the number of experts is the same everywhere, and nothing came before
    second = first.clone()
    second[:5] = torch.tensor([1, 2])
    again = RoutingProbe(tmp_path, Rows(), 16)
    again.add(batch, output(second, losses))
    assert again.measure(20)["eval/router_stability"] == pytest.approx(0.75)
    again.add(batch, output(second, losses))
    assert again.measure(15)["eval/router_stability"] == pytest.approx(0.75)  # step 20 is of a future that was undone


def test_overlap_counts_experts_whatever_their_order():
    now, before = np.array([[[0, 1], [2, -1], [-1, -1]]]), np.array([[[1, 0], [-1, 3], [0, 1]]])
    assert overlap(now, before) == pytest.approx(0.5)
