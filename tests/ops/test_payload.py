"""How rows are rounded for the way, and what is counted about it; no process group needed."""

from __future__ import annotations

import pytest
import torch

from ops.all_to_all import Meter, total_communication
from ops.all_to_all.path import transposed_order
from ops.all_to_all.payload import decode, encode
from ops.all_to_all.spec import PAYLOADS

LARGEST_ERROR = {"native": 0.0, "bf16": 2**-8, "fp8": 2**-4}
"""Of a value in the upper part of its block's range: half a unit in the last place."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (5, 128), (7, 130), (3, 300)], ids=str)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_rows_survive_up_to_rounding(payload, shape, dtype):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = decode(encode(rows, payload), shape[1], dtype, payload)
    assert back.shape == rows.shape and back.dtype == dtype
    if rows.numel():
        scale = rows.abs().amax(1, keepdim=True)
        # bf16 rounds the scaled value once more
        limit = LARGEST_ERROR[payload] + (2**-8 if payload == "fp8" else 0)
        assert float(((back - rows).abs() / scale).max()) <= limit


def test_fp8_takes_a_byte_per_value_and_four_per_block():
    assert encode(torch.randn(5, 300), "fp8").shape == (5, 300 + 4 * 3)
    assert encode(torch.randn(5, 300), "bf16").element_size() == 2


def test_fp8_scales_every_block_on_its_own():
    """A large value spoils its own 128 neighbours only; zeros stay zeros."""
    rows = torch.full((1, 256), 0.01)
    rows[0, 0] = 1e4
    back = decode(encode(rows, "fp8"), 256, torch.float32, "fp8")
    assert back[0, 0] == 1e4 and bool((back[0, 1:128] == 0).all())
    torch.testing.assert_close(back[0, 128:], rows[0, 128:])
    assert not decode(encode(torch.zeros(2, 5), "fp8"), 5, torch.float32, "fp8").any()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_do_not_become_finite(payload, bad):
    rows = torch.ones(2, 130)
    rows[1, 3] = bad
    back = decode(encode(rows, payload), 130, torch.float32, payload)
    assert bool(back[0].isfinite().all()) and not bool(back[1].isfinite().all())


def test_a_meter_counts_only_while_it_measures():
    meter = Meter()
    meter.add_bytes(5)
    assert meter.take().num_bytes == 0
    meter.measuring = True
    meter.add_bytes(5)
    meter.add_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]))
    with meter.waiting(torch.device("cpu")):
        pass
    found = meter.take()
    assert found.num_bytes == 5 and found.payload_error == (1.0, 25.0) and found.exposed_seconds > 0
    assert total_communication([found, found]).payload_error == (2.0, 50.0)
    assert meter.take() == (0.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    "sizes", [[[2, 0, 1], [3, 1, 0]], [[0, 0]], [[4]], [[1], [2], [0]]], ids=str
)
def test_transposed_order_turns_blocks_around(sizes):
    blocks, row = {}, 0
    for a, line in enumerate(sizes):
        for b, size in enumerate(line):
            blocks[a, b] = list(range(row, row + size))
            row += size
    expected = [i for b in range(len(sizes[0])) for a in range(len(sizes)) for i in blocks[a, b]]
    assert transposed_order(sizes, torch.device("cpu")).tolist() == expected
