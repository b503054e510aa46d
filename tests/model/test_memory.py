"""The plan's memory agrees with what tensors really take."""

from __future__ import annotations

import pytest
from common import batch, build, take, tiny_config

from model.config import BalanceConfig
from model.flops import count_parameters
from model.memory import device_memory
from ops.testing import kept_for_backward

SETTINGS = dict(precision="fp32", zero_stage=0, world_size=1, expert_parallel_size=1, micro_batch_size=8, seq_len=16)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("hidden_size", [16, 64])
def test_activation_estimate_is_near_what_backward_keeps(recompute, hidden_size):
    config = tiny_config(hidden_size=hidden_size, recompute=recompute, num_layers=4)
    model = build(config, BalanceConfig(aux_loss_coeff=0.01, z_loss_coeff=0.01))
    full = take(batch(0, 0, 8), 0, 8)
    full["token_mask"] = None
    with kept_for_backward(*model.parameters()) as kept:
        output = model(**full)
    measured = sum(kept.values())
    memory = device_memory(config, 2.0, **SETTINGS)
    if recompute == "block":  # block inputs are held by the checkpoint, the one block at work is not measured here
        assert memory.activations < device_memory(tiny_config(hidden_size=hidden_size, num_layers=4), 2.0,
                                                  **SETTINGS).activations / 1.5
    else:
        logits = 8 * 8 * 16 * config.vocab_size  # kept: the logits and their log-softmax, fp32
        assert 0.7 < (memory.activations + logits) / measured < 1.4
    assert output.loss_sum.requires_grad


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_bf16_weights_take_the_dtype_they_are_added_up_in(stage, dtype, width):
    config, settings = tiny_config(), {**SETTINGS, "precision": "bf16", "zero_stage": stage}
    count = count_parameters(config, 2)
    memory = device_memory(config, 2, **settings, grad_accum_dtype=dtype)
    assert memory.gradients == width * (count.dense + count.experts)
    assert memory.dense_weights + memory.expert_weights == 2 * (count.dense + count.experts)


@pytest.mark.parametrize(("stage", "dense_over", "expert_over"), [(0, (1, 1, 1), (1, 1, 1)), (1, (1, 1, 8), (1, 1, 2)),
                                                                  (2, (1, 8, 8), (1, 2, 2)), (3, (8, 8, 8), (2, 2, 2))])
def test_zero_stages_share_weights_gradients_and_optimizer(stage, dense_over, expert_over):
    config = tiny_config()
    count = count_parameters(config, 2)
    memory = device_memory(config, 2, **{**SETTINGS, "zero_stage": stage, "world_size": 8, "expert_parallel_size": 4})
    experts = count.experts / 4
    state = 8 if stage == 0 else 12
    assert memory.dense_weights == pytest.approx(4 * count.dense / dense_over[0], abs=8)
    assert memory.expert_weights == pytest.approx(4 * experts / expert_over[0], abs=8)
    assert memory.gradients == pytest.approx(4 * (count.dense / dense_over[1] + experts / expert_over[1]), abs=16)
    assert memory.optimizer == pytest.approx(state * (count.dense / dense_over[2] + experts / expert_over[2]), abs=32)
