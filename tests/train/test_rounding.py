"""Masters of bf16: rounding is right on average, known by element, and around torch's AdamW."""

from __future__ import annotations

import pytest
import torch

from train.config.training import OptimConfig
from train.engine.rounding import RoundedAdamW, Stretch, noise, stochastic_round

ALL_BITS = torch.arange(2**16)


@pytest.mark.parametrize("value", [1.0 + 3 * 2**-12, -0.37, 5e-39, 3.1e38, -(2.0**-133)])
def test_the_mean_over_all_bits_is_the_value(value):
    exact = torch.full((2**16,), value)
    rounded = stochastic_round(exact, ALL_BITS)
    assert rounded.dtype == torch.bfloat16
    assert rounded.double().mean().item() == exact[0].double().item()
    assert len(rounded.unique()) <= 2


def test_what_bf16_holds_stays():
    held = torch.randn(1000).to(torch.bfloat16)
    bits = torch.full((1000,), 2**16 - 1)
    assert torch.equal(stochastic_round(held.float(), bits), held)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    found = stochastic_round(odd, bits[:4])
    assert found[0] == float("inf") and found[1] == -float("inf")
    assert found[2].isnan() and found[3] == 0


def test_noise_is_even_and_a_matter_of_element_update_name_and_seed():
    elements = torch.arange(2**16)
    found = noise(1, 2, "a", elements)
    assert found.min() >= 0 and found.max() < 2**16
    # 256 bins of 256: chi-squared has mean 255 and standard deviation 22.6.
    for bits in (found >> 8, found & 255):
        counts = torch.bincount(bits, minlength=256).double()
        assert ((counts - 256).square() / 256).sum() < 255 + 5 * 22.6
    parts = [noise(1, 2, "a", part) for part in elements.split(1000)]
    assert torch.equal(torch.cat(parts), found)
    others = ((2, 2, "a"), (1, 3, "a"), (1, 2, "b"))
    for other in others:
        equal = (noise(*other, elements) == found).double().mean()
        assert equal < 1e-3, other
    assert not torch.equal(noise(1, 2, "a", elements + 2**32), found)


def drawn(
    weights: torch.Tensor, lr: float, decay: float = 0.1
) -> tuple[RoundedAdamW, torch.Tensor]:
    """An optimizer of one master that holds one parameter."""
    master = weights.clone().requires_grad_()
    groups = [{"params": [master], "weight_decay": decay, "muon": False}]
    optimizer = RoundedAdamW(groups, OptimConfig(lr=lr), seed=7)
    size = master.numel()
    optimizer.stretches = {master: [Stretch("w", 0, 0, size, size, torch.zeros(1).long())]}
    return optimizer, master


def test_an_update_is_a_neighbour_of_torchs():
    torch.manual_seed(0)
    weights = torch.randn(4096).to(torch.bfloat16)
    optimizer, master = drawn(weights, lr=3e-3)
    for _ in range(3):
        before = master.detach().float()
        gradient = torch.randn(4096).to(torch.bfloat16)
        oracle = torch.nn.Parameter(before.clone())
        exact = torch.optim.AdamW([oracle], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        if state := optimizer.state.get(master):
            exact.state[oracle] = {name: value.clone() for name, value in state.items()}
        oracle.grad, master.grad = gradient.float(), gradient
        exact.step()
        optimizer.step()
        down = stochastic_round(oracle.detach(), torch.zeros(4096).long())
        up = stochastic_round(oracle.detach(), torch.full((4096,), 2**16 - 1))
        assert ((master == down) | (master == up)).all()
        for name, value in exact.state[oracle].items():
            assert torch.equal(value, optimizer.state[master][name]), name


def test_updates_that_the_nearest_number_loses_add_up():
    # At 1.0 bf16 steps by 2^-7 upwards and 2^-8 downwards; an update is 2^-13.
    optimizer, master = drawn(torch.ones(20_000, dtype=torch.bfloat16), lr=2**-13, decay=0.0)
    for _ in range(64):
        master.grad = torch.ones_like(master)
        optimizer.step()
    assert master.float().mean().item() == pytest.approx(1 - 64 * 2**-13, abs=1e-4)
    assert (master == 1).float().mean() < 0.5
    nearest = torch.ones(20_000, dtype=torch.bfloat16)
    for _ in range(64):
        nearest = (nearest.float() - 2**-13).to(torch.bfloat16)
    assert (nearest == 1).all()


def test_elements_of_experts_are_numbered_by_their_global_id():
    # Experts 5 and 2 of six elements each; the stretch begins within the first.
    stretch = Stretch("e", offset=10, first=4, size=6, expert_size=6, ids=torch.tensor([5, 2]))
    assert stretch.elements(0, 6).tolist() == [34, 35, 12, 13, 14, 15]
    assert stretch.elements(3, 5).tolist() == [13, 14]
