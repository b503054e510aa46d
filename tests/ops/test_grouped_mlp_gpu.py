"""The Triton kernels of the grouped MLP on a CUDA device against the definition in fp64."""

from __future__ import annotations

import pytest
import torch

from ops.grouped_mlp import grouped_mlp, reference_grouped_mlp
from ops.grouped_mlp.kernels import configs
from ops.permute import group_by_expert
from ops.testing import EDGE_CASES, assert_close, draw_expert_ids, poisoned_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("out", "grad_hidden", "grad_weights", "grad_gate_up", "grad_down")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = {
    "few rows": ((401, 32, 4, "skewed"), 512, 256),
    "many rows": ((2003, 6, 2, "skewed"), 1536, 1024),
    "one slot": ((1301, 4, 1, "even"), 512, 768),
    "half unused": ((1301, 4, 3, "unused"), 512, 768),
    "widths with masks": ((997, 3, 2, "half"), 360, 136),
    "odd widths": ((101, 3, 2, "even"), 37, 19),
}
"""Arguments of draw_expert_ids, D, F."""
CASES = [(*shape, dtype) for shape in SHAPES.values() for dtype in DTYPES]
CASES += [(routing, 64, 48, torch.bfloat16) for routing in EDGE_CASES.values()]


def inputs(routing: tuple[int, int, int, str], hidden_size: int, width: int, dtype: torch.dtype):
    """Inputs of grouped_mlp without gradients, its indices, and the gradient of the output."""
    num_tokens, num_experts, top_k, _ = routing
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * scale).to(dtype)

    places = group_by_expert(draw_expert_ids(*routing).cuda(), num_experts)
    weights = torch.rand(num_tokens, top_k, device="cuda", generator=generator)
    tensors = (
        normal(num_tokens, hidden_size),
        weights,
        normal(num_experts, 2 * width, hidden_size, scale=hidden_size**-0.5),
        normal(num_experts, hidden_size, width, scale=width**-0.5),
    )
    return tensors, places, normal(num_tokens, hidden_size)


def results(function, tensors, places, grad_out, **options) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, *places, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


@pytest.fixture(params=["pointers", "tma"])
def loads(request, monkeypatch):
    """Both ways to load, whichever the configs choose for this device."""
    if request.param == "tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor memory accelerator")
    for name in ("up_config", "row_config", "act_grad_config", "expert_config"):
        choose = getattr(configs, name)
        monkeypatch.setattr(
            configs,
            name,
            lambda *a, choose=choose: choose(*a)._replace(
                tma=request.param == "tma" and choose(*a) != configs._EXACT
            ),
        )


@pytest.mark.parametrize(("routing", "hidden_size", "width", "dtype"), CASES, ids=str)
def test_kernels_give_output_and_gradients_of_the_definition(
    routing, hidden_size, width, dtype, loads
):
    tensors, places, grad_out = inputs(routing, hidden_size, width, dtype)
    with poisoned_memory():
        kept, again, recomputed = (
            results(grouped_mlp, tensors, places, grad_out, backend="triton", recompute=recompute)
            for recompute in (False, False, True)
        )
    expected = results(
        reference_grouped_mlp, [x.double() for x in tensors], places, grad_out.double()
    )
    for name, ours, second, third, reference in zip(
        NAMES, kept, again, recomputed, expected, strict=True
    ):
        assert torch.equal(ours, second), f"{name} differs from one run to the next"
        assert torch.equal(ours, third), f"{name} differs when pre-activations are recomputed"
        assert_close(name, ours, reference, dtype)


def test_nothing_waits_for_the_device():
    tensors, places, grad_out = inputs((401, 32, 4, "skewed"), 512, 256, torch.bfloat16)
    # compilation may wait
    results(grouped_mlp, tensors, places, grad_out, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(grouped_mlp, tensors, places, grad_out, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
