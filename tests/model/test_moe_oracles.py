"""The MoE layer against outsiders in one process: on the same weights, the sparse blocks of Hugging
Face's models and DeepSpeed's MoE agree with it in output and every gradient. Megatron-core and
expert parallelism: the tests of this name in tests/distributed.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from bench.peers import HUGGING_FACE, MoE, Weights, deepspeed, hugging_face, ours
from ops.testing import assert_close


class Shape(NamedTuple):
    num_experts: int
    top_k: int
    hidden_size: int
    width: int
    batch: int
    length: int
    skew: float


def draw_shape(seed: int, top_k: int | None = None) -> Shape:
    """Widths are multiples of 16 bytes, as torch's grouped_mm needs; skew 4 leaves experts without
    tokens.
    """
    draw = random.Random(seed)
    num_experts = draw.randint(4, 20)
    return Shape(
        num_experts,
        top_k or draw.randint(2, min(8, num_experts)),
        8 * draw.randint(1, 6),
        4 * draw.randint(1, 10),
        draw.randint(1, 3),
        draw.randint(5, 30),
        draw.choice((0.0, 4.0)),
    )


SHAPES = {f"{seed}-{'-'.join(map(str, draw_shape(seed)))}": draw_shape(seed) for seed in range(6)}
NAMES = ("out", "hidden", "router", "gate_up", "down")


def weights_of(shape: Shape) -> Weights:
    return Weights.draw(shape.num_experts, shape.hidden_size, shape.width, skew=shape.skew)


def assert_agree(layer: MoE, oracle: MoE, shape: Shape) -> None:
    """Both in fp32: the largest error within 1e-5 of the largest value, for the output and each
    gradient.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(shape.batch, shape.length, shape.hidden_size, generator=generator)
    hidden[..., 0] = 1.0
    grad = torch.randn(hidden.shape, generator=generator)
    found, expected = (moe.named(moe.forward_backward(hidden, grad)) for moe in (layer, oracle))
    assert tuple(found) == tuple(expected) == NAMES
    for name in NAMES:
        assert expected[name].abs().max() > 0
        assert_close(name, found[name], expected[name])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model", HUGGING_FACE)
def test_normalized_gates_are_those_of_hugging_face(model, implementation, shape):
    weights = weights_of(shape)
    assert_agree(
        ours(weights, shape.top_k), hugging_face(weights, shape.top_k, model, implementation), shape
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("model", ["qwen3_moe", "olmoe"])  # Mixtral has no such gates
def test_raw_gates_are_those_of_hugging_face(model, shape):
    weights = weights_of(shape)
    assert_agree(
        ours(weights, shape.top_k, normalize_weights=False),
        hugging_face(weights, shape.top_k, model, normalize_weights=False),
        shape,
    )


# Gates: top1gating leaves them raw; top2gating and topkgating (all other top_k) divide by their
# sum.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dropless", [False, True], ids=["capacity", "dropless"])
def test_layer_is_deepspeeds(dropless, top_k, seed):
    shape = draw_shape(seed, top_k)
    weights = weights_of(shape)
    capacity = None if dropless else shape.batch * shape.length
    assert_agree(
        ours(weights, top_k, normalize_weights=top_k > 1),
        deepspeed(weights, top_k, capacity=capacity),
        shape,
    )


def test_the_comparison_catches_a_wrong_gate():
    shape = draw_shape(0)
    weights = weights_of(shape)
    with pytest.raises(AssertionError, match="out is off by"):
        assert_agree(
            ours(weights, shape.top_k, scaling_factor=1.001),
            hugging_face(weights, shape.top_k, "mixtral"),
            shape,
        )
