"""First weights: the numbers of a model that is built as a whole in fp32, without ever holding
one.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import init
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.init import stream_of
from model.moe.experts import Experts
from model.moe.layer import ModelParts
from model.parallel.groups import ParallelGroups
from model.routers.config import TopKConfig
from model.transformer import Transformer

SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=40,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=32,
    num_dense_layers=1,
    num_shared_experts=1,
    num_mtp_layers=1,
    attention_bias="qkvo",
    expert_bias=True,
    activation="clamped_swiglu",
)
SPARSE = SparseAttentionConfig(
    block_size=2, coarse_block_size=2, top_k=2, window_size=1, offset=True, trust=True, sink=True
)


def built(config: ModelConfig = SHAPE, dtype: torch.dtype = torch.float32) -> Transformer:
    attention = SPARSE if config is SHAPE else DenseAttentionConfig()
    parts = ModelParts(TopKConfig(top_k=2), attention, LocalDispatcherConfig(), BalanceConfig())
    return Transformer(config, parts, ParallelGroups.single(), 5, dtype=dtype)


@pytest.mark.parametrize("size", [1, 7, 15, 16, 17, 63, 64, 65, 79, 80, 81, 128, 143, 144, 1000])
def test_numbers_drawn_in_pieces_are_those_drawn_at_once(size, monkeypatch):
    monkeypatch.setattr(init, "PIECE", 64)
    values = torch.empty(size)
    init._fill(values, 0.3, stream_of("a", size))
    assert torch.equal(values, torch.empty(size).normal_(0.0, 0.3, generator=stream_of("a", size)))


def test_every_matrix_is_drawn_by_its_name_and_vectors_are_constants():
    model = built()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            small = "o_proj" in full or full.endswith((".down", ".down.weight"))
            scale = 0.02 / (2 * 3) ** 0.5 if small else 0.02
            assert not parameter.is_meta and parameter.requires_grad
            if isinstance(module, Experts):
                assert parameter.allreduce is False
            if parameter.dim() < 2 or full.endswith("_bias"):
                assert parameter.unique().numel() == 1, full
            elif isinstance(module, Experts):
                for expert in range(4):
                    drawn = torch.empty(parameter.shape[1:])
                    drawn.normal_(0.0, scale, generator=stream_of(5, full, expert))
                    assert torch.equal(parameter[expert], drawn), full
            else:
                drawn = torch.empty(parameter.shape)
                drawn.normal_(0.0, scale, generator=stream_of(5, full))
                assert torch.equal(parameter, drawn), full
    # What a bias of torch's own linear layers would be is drawn at random.
    assert not model.blocks[0].attention.q_proj.bias.any()


def drawn(**changes) -> dict[str, torch.Tensor]:
    config = dataclasses.replace(SHAPE, hidden_size=64, expert_intermediate_size=64, **changes)
    parts = ModelParts(
        TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BalanceConfig()
    )
    return dict(Transformer(config, parts, ParallelGroups.single(), 5).named_parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"init": "normal"}, {"head": 0.02, "q_proj": 0.02, "down": 0.02, "router": 0.02}),
        (
            {"init": "small"},
            {"head": 0.0790569, "q_proj": 0.0790569, "down": 1 / 12, "router": 0.0790569},
        ),
        (
            {"init": "mup", "mup_base_hidden_size": 16},
            {"embedding": 0.02, "head": 0.005, "q_proj": 0.01, "down": 0.00408, "router": 0.005},
        ),
        (
            {"init": "mup", "mup_base_hidden_size": 16, "mup_base_num_layers": 1},
            {"embedding": 0.02, "head": 0.005, "q_proj": 0.01, "down": 0.01, "router": 0.005},
        ),
    ],
)
def test_every_rule_has_its_standard_deviations(settings, expected):
    found = drawn(**settings)
    for part, std in expected.items():
        values = [p for name, p in found.items() if f".{part}." in f".{name}." and p.dim() > 1]
        assert values, part
        for value in values:
            assert float(value.std()) == pytest.approx(std, rel=0.2), part


def test_truncated_numbers_are_those_of_a_normal_within_three_deviations(monkeypatch):
    """Against the distribution's own moments, and in pieces as at once: the
    share within one deviation is erf(1 / sqrt 2) / erf(3 / sqrt 2).
    """
    values = drawn(init="truncated_normal")["head.weight"].detach()
    assert float(values.abs().max()) <= 0.06
    once = torch.empty(100_000)
    init._fill(once, 0.02, stream_of("t"), 3.0)
    assert 0.0599 < float(once.abs().max()) <= 0.06
    assert float((once.abs() < 0.02).float().mean()) == pytest.approx(0.684538, abs=0.005)
    assert float(once.std()) == pytest.approx(0.02 * 0.986578, rel=0.01)
    theirs = torch.empty(100_000)
    torch.nn.init.trunc_normal_(theirs, 0.0, 0.02, -0.06, 0.06, generator=stream_of("u"))
    steps = torch.linspace(0.01, 0.99, 99)
    assert torch.allclose(once.quantile(steps), theirs.quantile(steps), atol=6e-4)
    monkeypatch.setattr(init, "PIECE", 64)
    pieces = torch.empty(1000)
    init._fill(pieces, 0.02, stream_of("t"), 3.0)
    assert torch.equal(pieces, once[:1000])


def test_a_model_drawn_in_half_precision_is_the_rounded_one():
    whole, half = built(), built(dtype=torch.bfloat16)
    for (name, one), other in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert other.dtype == torch.bfloat16 and torch.equal(one.bfloat16(), other), name
    # The routers' state keeps its precision.
    for one, other in zip(whole.buffers(), half.buffers(), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak_of(action: Callable[[], object]) -> int:
    """Most anonymous memory while the action runs, above what there was before."""
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        action()
    finally:
        done.set()
        thread.join()
    return max(most, resident()) - before


@pytest.mark.slow
@pytest.mark.nightly
def test_building_takes_little_more_memory_than_the_weights():
    config = dataclasses.replace(
        SHAPE,
        vocab_size=8192,
        hidden_size=768,
        num_layers=8,
        num_heads=12,
        num_kv_heads=4,
        intermediate_size=2048,
        num_experts=16,
        expert_intermediate_size=512,
        num_mtp_layers=0,
    )
    built(dataclasses.replace(config, num_layers=2), torch.bfloat16)  # what torch needs once
    kept: list[Transformer] = []
    peak = peak_of(lambda: kept.append(built(config, torch.bfloat16)))
    weights = sum(p.numel() * p.element_size() for p in kept[0].parameters())
    assert weights > 2e8 and peak < 1.3 * weights, peak / weights
    print(f"{weights / 2**20:.0f} MiB of weights, peak {peak / weights:.2f} of them")
