"""Latent attention of the published dimensions on a CUDA device in bf16, against the same weights
in fp32 on the CPU, where other tests hold it to its definition.
"""

from __future__ import annotations

import pytest
import torch
from common import tiny_config

from model.attention.base import SequenceLayout
from model.attention.config.latent import MlaConfig
from model.attention.latent import LatentAttention
from model.layers import rotary_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [300, 1, 64, 147]
SHAPES = {
    "published": MlaConfig(),
    "queries without a latent": MlaConfig(q_lora_rank=None),
    "wide values": MlaConfig(v_head_dim=256, qk_nope_head_dim=192),
}


def layers(name: str) -> tuple[LatentAttention, LatentAttention]:
    """The layer in fp32 on the CPU, and a copy in bf16 on the device."""
    config = tiny_config(hidden_size=256, num_heads=4, num_kv_heads=4, qk_norm="none")
    torch.manual_seed(0)
    layer, copy = (LatentAttention(config, SHAPES[name]) for _ in range(2))
    copy = copy.to("cuda", torch.bfloat16)
    with torch.no_grad():
        for parameter, other in zip(layer.parameters(), copy.parameters(), strict=True):
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            other.copy_(parameter)
            parameter.copy_(other)  # of the same rounded weights
    return layer, copy


def layout(positions: torch.Tensor, masked: bool) -> SequenceLayout:
    starts = (positions.flatten() == 0).nonzero().flatten()
    total = torch.tensor([positions.numel()], device=positions.device)
    cu_seqlens = torch.cat((starts, total)).to(torch.int32)
    return SequenceLayout(
        *rotary_tables(positions, 64, 10000.0),
        cu_seqlens,
        int(cu_seqlens.diff().max()),
        positions if masked else None,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_in_bf16_are_those_in_fp32(name):
    layer, copy = layers(name)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, -1)
    positions[1, 0] = 0  # a row begins a document
    positions = torch.stack([_from_starts(row) for row in positions])
    hidden = torch.randn(*positions.shape, 256).bfloat16().float().requires_grad_()
    grad = torch.randn(*positions.shape, 256).bfloat16()
    on_device = hidden.detach().to("cuda", torch.bfloat16).requires_grad_()

    expected, _ = layer(hidden, layout(positions, masked=True))
    found, _ = copy(on_device, layout(positions.cuda(), masked=False))
    expected.backward(grad.float())
    found.backward(grad.cuda())

    assert_near(found, expected)
    assert_near(on_device.grad, hidden.grad)
    for (key, parameter), other in zip(layer.named_parameters(), copy.parameters(), strict=True):
        assert_near(other.grad, parameter.grad, key)


@pytest.mark.parametrize("chunks", [(400, 1, 1, 1), (100, 300, 3), (403,)])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_cache_in_bf16_gives_the_whole_rows_outputs(name, chunks):
    layer, copy = layers(name)
    hidden = torch.randn(2, sum(chunks), 256).bfloat16().float()
    positions = torch.arange(sum(chunks)).expand(2, -1)
    expected, _ = layer(hidden, layout(positions, masked=True))

    cache = copy.new_cache(2, sum(chunks), torch.bfloat16, torch.device("cuda"))
    outs, start = [], 0
    for size in chunks:
        part = positions[:, start : start + size].cuda()
        flat = torch.arange(0, 2 * size + 1, size, dtype=torch.int32, device="cuda")
        at = SequenceLayout(*rotary_tables(part, 64, 10000.0), flat, size, None)
        outs.append(copy(hidden[:, start : start + size].to("cuda", torch.bfloat16), at, cache)[0])
        start += size
    assert_near(torch.cat(outs, 1), expected)


def _from_starts(row: torch.Tensor) -> torch.Tensor:
    """Positions that count on from every 0 of a row."""
    place = torch.arange(len(row))
    return place - torch.where(row == 0, place, 0).cummax(0).values


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """bf16 keeps eight binary digits, and a layer rounds several times."""
    difference = (found.float().cpu() - expected).norm() / expected.norm()
    assert torch.isfinite(found).all() and difference < 1.5e-2, (name, float(difference))
