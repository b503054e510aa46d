"""The probe of held-out tokens: what it keeps and what it makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.data.loader import pack
from train.observe.probe import DECILES, RoutingProbe, overlap


class Rows:
    """Token i stands 100 * (i + 1) times in the first row, nothing in the second."""

    def __len__(self) -> int:
        return 2

    def tokens(self, index: int) -> np.ndarray:
        return (
            np.repeat(np.arange(10), 100 * np.arange(1, 11))
            if index == 0
            else np.empty(0, np.int64)
        )


def output(ids: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([ids] * 2), losses


def test_experts_by_decile_of_frequency_and_loss(tmp_path):
    batch = pack([np.arange(11) % 10], 10, end_of_document=99)
    ids = torch.full((10, 4), -1)
    for token in range(10):  # token t visits 1 + t // 3 experts
        ids[token, : 1 + token // 3] = torch.arange(1 + token // 3)
    losses = -torch.arange(10.0).view(1, 10)
    probe = RoutingProbe(tmp_path, Rows(), 16)
    probe.add(batch, *output(ids, losses))
    probe.add(batch, *output(ids + 1, losses))  # only the first batch counts
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
    RoutingProbe(tmp_path, Rows(), 16).add(batch, *output(first, losses))
    probe = RoutingProbe(tmp_path, Rows(), 16)
    probe.add(batch, *output(first, losses))
    # the number of experts is the same everywhere, and nothing came before
    assert probe.measure(10) == {}
    second = first.clone()
    second[:5] = torch.tensor([1, 2])
    again = RoutingProbe(tmp_path, Rows(), 16)
    again.add(batch, *output(second, losses))
    assert again.measure(20)["eval/router_stability"] == pytest.approx(0.75)
    again.add(batch, *output(second, losses))
    # step 20 is of a future that was undone
    assert again.measure(15)["eval/router_stability"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)),
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: path.write_bytes(path.read_bytes()[:80] + bytes(80) + path.read_bytes()[160:]),
        lambda path: np.savez(path, expert_ids=np.array([{}], dtype=object)),
        lambda path: np.savez(path, expert_ids=np.zeros((2, 10))),
        lambda path: path.write_bytes(b"\x80\x04N."),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=[
        "empty",
        "cut",
        "no archive",
        "other names",
        "zeros",
        "pickle",
        "other shape",
        "bare pickle",
        "folder",
    ],
)
def test_a_damaged_file_of_the_evaluation_before_costs_the_comparison_alone(tmp_path, spoil):
    batch, losses, ids = (
        pack([np.arange(11) % 10], 10, end_of_document=99),
        torch.zeros(1, 10),
        torch.tensor([[0, 1]] * 10),
    )
    probe = RoutingProbe(tmp_path, Rows(), 16)
    for step in (10, 20):
        probe.add(batch, *output(ids, losses))
        assert probe.measure(step) == {}
        if step == 10:
            spoil(tmp_path / "probe" / "step-00000010.npz")


def test_overlap_counts_experts_whatever_their_order():
    now, before = np.array([[[0, 1], [2, -1], [-1, -1]]]), np.array([[[1, 0], [-1, 3], [0, 1]]])
    assert overlap(now, before) == pytest.approx(0.5)


def test_files_of_a_long_run_are_bounded_and_each_was_compared_with_the_one_before(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("train.observe.probe.MAX_KEPT", 8)
    probe = RoutingProbe(tmp_path, None, 10)
    for step in range(1, 101):
        ids = np.full((2, 3, 1), step % 2, np.int16)
        probe._found = {
            "expert_ids": ids,
            "token": np.zeros(3, np.int32),
            "loss": np.zeros(3, np.float32),
        }
        assert probe.measure(step).get("eval/router_stability") == (None if step == 1 else 0.0)
        kept = [int(path.stem[5:]) for path in sorted(tmp_path.glob("probe/step-*.npz"))]
        assert len(kept) <= 8 and kept[0] == 1 and kept[-1] == step
