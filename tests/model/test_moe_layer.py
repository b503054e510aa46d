"""The MoE layer as a whole: one graph, no bit changed by what is kept, assignments that are not
computed.
"""

from __future__ import annotations

import pytest
import torch
from common import tiny_config

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ExpertsConfig
from model.dispatch.config import AllToAllConfig, DispatcherConfig, LocalDispatcherConfig
from model.dispatch.rows import by_expert
from model.moe.layer import ModelParts, MoELayer
from model.parallel.groups import ParallelGroups
from model.routers.base import RoutingRequest
from model.routers.config import ReLUConfig, RouterConfig, TopKConfig, TopPConfig

ROUTERS = {
    "top_k": (TopKConfig, {"top_k": 2}),
    "top_p": (TopPConfig, {"budget": 2.0}),
    "relu": (ReLUConfig, {"budget": 2.0}),
    "capacity": (TopKConfig, {"top_k": 2, "capacity_factor": 1.0}),
}


def make_layer(
    router: type[RouterConfig],
    options: dict,
    experts: ExpertsConfig | None = None,
    dispatcher: DispatcherConfig | None = None,
) -> MoELayer:
    parts = ModelParts(
        router(**options),
        DenseAttentionConfig(),
        dispatcher or AllToAllConfig(),
        BalanceConfig(),
        experts or ExpertsConfig(),
    )
    layer = MoELayer(tiny_config(), ParallelGroups.single(), parts, 1)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return layer


def run(layer: MoELayer, compiled: bool = False) -> list[torch.Tensor]:
    """Output and gradients of the input and all weights."""
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def call(hidden: torch.Tensor) -> torch.Tensor:
        return layer(hidden, RoutingRequest())[0]

    out = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(hidden)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()])]


@pytest.mark.parametrize("router", ["top_k", "top_p", "relu"])
def test_the_layer_compiles_as_one_graph(router):
    """Sizes stay on the device: nothing in it depends on how many experts a token has."""
    layer = make_layer(*ROUTERS[router])
    for ours, expected in zip(run(layer, compiled=True), run(layer), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_recomputing_and_the_local_dispatcher_change_no_bit(router):
    expected = run(make_layer(*ROUTERS[router]))
    for other in (
        make_layer(*ROUTERS[router], ExpertsConfig(recompute=True)),
        make_layer(*ROUTERS[router], dispatcher=LocalDispatcherConfig()),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(other), expected, strict=True))


@pytest.mark.parametrize("backend", ["grouped_mm", "reference"])
def test_backends_agree(backend):
    expected = run(make_layer(*ROUTERS["top_p"]))
    for ours, other in zip(
        run(make_layer(*ROUTERS["top_p"], ExpertsConfig(backend=backend))), expected, strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_processed_counts_what_was_computed():
    layer = make_layer(*ROUTERS["capacity"])
    _, sums, routing = layer(torch.randn(2, 9, 16), RoutingRequest())
    assert int(sums.processed) == int(routing.counts.sum()) == 36 - int(routing.overflow[1])


def test_rows_by_source_and_expert_come_into_expert_order_and_padding_out_of_the_way():
    received = torch.tensor([[1, 2], [0, 1]])  # rows of two sources for two experts
    hidden = torch.arange(8.0).unsqueeze(1)
    rows = by_expert(hidden, torch.ones(8, 1), received, per_source=4)
    assert rows.offsets.tolist() == [0, 1, 4]
    assert rows.slots.tolist() == [0, 1, 2, 4, -1, -1, -1, -1]
    assert rows.inverse.flatten().tolist() == [0, 1, 2, -1, 3, -1, -1, -1]
    exact = by_expert(hidden[:4], torch.ones(4, 1), received, per_source=None)
    assert exact.slots.tolist() == [0, 1, 2, 3] and exact.offsets.tolist() == [0, 1, 4]
