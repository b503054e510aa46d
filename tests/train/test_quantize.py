"""Experts of 8 bits for a trained run: what is made, what is measured of it, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from model.config import BalanceConfig
from ops.grouped_mlp import dequantized
from ops.grouped_mlp.eight_bit import DTYPES
from ops.grouped_mlp.fp8 import rounded_rows
from train.files.manifest import CheckpointError
from train.pretrained.eight_bit import load_eight_bit, save_eight_bit
from train.trained.quantize import (
    HeldOut,
    compare,
    expert_errors,
    left_out,
    quantized,
    sizes,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import VOCAB_SIZE, build, tiny_config


@pytest.fixture
def model():
    return build(tiny_config(), BalanceConfig()).eval()


def logits_of(model) -> torch.Tensor:
    ids = torch.randint(0, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.logits(ids)


@pytest.mark.parametrize(("stored", "bias"), [("int8", False), ("int8", True), ("fp8", False)])
def test_a_model_with_8_bit_experts_is_the_model_with_what_they_stand_for(stored, bias):
    """Biases stay, and the sizes say what became smaller."""
    special = {"expert_bias": True, "activation": "clamped_swiglu"} if bias else {}
    shape = {"num_shared_experts": 0} if bias else {}
    model, other = (build(tiny_config(**special, **shape), BalanceConfig()).eval() for _ in "ab")
    before = sizes(model)
    for layer, rounded in zip(model.moe_layers(), other.moe_layers(), strict=True):
        stacks = quantized(layer, stored)
        layer.experts.hold_eight_bit(**stacks)
        for name in ("gate_up", "down"):
            whole = dequantized(stacks[name], stacks[f"{name}_scales"])
            getattr(rounded.experts, name).data = whole
    torch.testing.assert_close(logits_of(model), logits_of(other), rtol=1e-4, atol=1e-4)
    after = sizes(model)
    assert after["others"] == before["others"]
    assert 0.25 < after["experts"] / before["experts"] < 0.35
    state = model.state_dict()
    assert state["blocks.1.mlp.experts.gate_up"].dtype == DTYPES[stored]


def test_errors_are_those_of_each_expert(model):
    layer = model.moe_layers()[0]
    with torch.no_grad():
        layer.experts.gate_up[3] = torch.linspace(-127, 127, 255)[:16].round()  # on the grid
        layer.experts.down[3] = 127.0
        layer.experts.gate_up[5, :, 0] = 1000.0  # one large value makes a coarse grid
    errors = expert_errors(layer, quantized(layer, "int8"))
    assert errors[3] == pytest.approx(0, abs=1e-6) and len(errors) == 8
    stacks = quantized(layer, "int8")
    for e in (0, 5):
        pairs = [
            (
                getattr(layer.experts, n)[e].detach(),
                dequantized(stacks[n], stacks[f"{n}_scales"])[e],
            )
            for n in ("gate_up", "down")
        ]
        off = sum(float((a - b).square().sum()) for a, b in pairs)
        assert errors[e] == pytest.approx(
            (off / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5
        )


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_quantize_reports_left_out_parameters(stored):
    """Every parameter is of 8 bits, a scale, or told with its group; a stack of experts that was
    forgotten is refused.
    """
    special = {"expert_bias": True, "activation": "clamped_swiglu", "num_shared_experts": 0}
    model = build(tiny_config(**special), BalanceConfig()).eval()
    whole = {name: p.numel() for name, p in model.named_parameters()}
    first, *others = model.moe_layers()
    for layer in others:
        layer.experts.hold_eight_bit(**quantized(layer, stored))
    with pytest.raises(ValueError, match=r"9,216 of the 18,432 numbers .* stay as they are"):
        left_out(model)
    first.experts.hold_eight_bit(**quantized(first, stored))
    found = left_out(model)
    assert set(found) == {
        *("embedding", "head", "norm", "attention", "attention_norm", "mlp_norm"),
        *("mlp.gate_up", "mlp.down", "mlp.router", "mlp.experts"),
    }
    stacks = sum(n for name, n in whole.items() if name.endswith((".gate_up", "experts.down")))
    assert sum(group["parameters"] for group in found.values()) == sum(whole.values()) - stacks
    assert found["mlp.experts"] == {"parameters": 2 * 8 * (48 + 16), "bytes": 4 * 2 * 8 * 64}
    assert sum(group["bytes"] for group in found.values()) == sizes(model)["others"] + 4096


def test_agreement_counts_experts_that_stay():
    """Two layers, three tokens: places among the slots mean nothing, -1 is no expert."""
    before = torch.tensor([[[0, 1], [2, -1], [3, 0]], [[0, 1], [1, 2], [2, 3]]]).short()
    after = torch.tensor([[[1, 0], [3, -1], [3, 0]], [[0, 1], [1, 2], [2, 0]]]).short()
    counts = torch.tensor([2.0, 1.0]).double()
    one = HeldOut(torch.tensor([4.0, 2.0]).double(), counts, [before[:, :2], before[:, 2:]])
    two = HeldOut(torch.tensor([4.2, 2.1]).double(), counts, [after[:, :2], after[:, 2:]])
    found = compare(one, two, 4)
    assert found.agreement == pytest.approx([4 / 5, 5 / 6])
    assert found.same_set == pytest.approx([2 / 3, 2 / 3])
    assert found.tokens_of_experts == [[2, 1, 1, 1], [1, 2, 2, 1]]
    assert found.loss == pytest.approx(2.0) and found.quantized_loss == pytest.approx(2.1)
    assert found.difference == pytest.approx(0.1)
    # every target costs the same 0.1 more, so there is nothing to be unsure about
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize(("stored", "other"), [("int8", "fp8"), ("fp8", "int8")])
def test_a_file_comes_back_and_only_for_its_own_weights(model, tmp_path, stored, other):
    layers = [quantized(layer, stored) for layer in model.moe_layers()]
    path = tmp_path / "a.safetensors"
    save_eight_bit(path, layers, "one")
    again = load_eight_bit(path, len(layers), "one", stored)
    for before, after in zip(layers, again, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="made of other weights than the checkpoint has"):
        load_eight_bit(path, len(layers), "two", stored)
    for number, kind in ((1, stored), (len(layers), other)):
        with pytest.raises(ValueError, match=f"has other experts than the model.* weights={kind}"):
            load_eight_bit(path, number, "one", kind)
    smaller = build(tiny_config(expert_intermediate_size=16), BalanceConfig())
    with pytest.raises(ValueError, match=r"gate_up of 8-bit experts is \[8, 48, 16\], the model's"):
        smaller.moe_layers()[0].experts.hold_eight_bit(**again[0])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        load_eight_bit(path, len(layers), "one", stored)
    path.chmod(0o666)
    with pytest.raises(CheckpointError):
        load_eight_bit(path, len(layers), "one", stored)


def test_experts_trained_by_products_of_fp8_lose_nothing_of_them():
    """Their weights were rounded to the same numbers in every step."""
    model = build(tiny_config(), BalanceConfig()).eval()
    for layer in model.moe_layers():
        for name in ("gate_up", "down"):
            weight = getattr(layer.experts, name)
            weight.data = rounded_rows(weight.data)
        assert max(expert_errors(layer, quantized(layer, "fp8"))) == 0
        assert min(expert_errors(layer, quantized(layer, "int8"))) > 0
