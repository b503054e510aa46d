"""Windowed attention against its definition: windows, sinks, documents, the cache, and its cost."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from common import VOCAB_SIZE, build, tiny_config

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from model.attention.base import SequenceLayout, document_mask
from model.attention.config.windowed import WindowedAttentionConfig
from model.attention.windowed import WindowedAttention
from model.config import BalanceConfig
from model.cost.parameters import count_parameters, flops_per_token
from model.layers import rotary_tables
from model.request import TokenBatch
from tests import composing

DOCUMENTS = ((3, 1, 9, 6), (14, 5))  # lengths, per row
WINDOWS = (1, 4, 7, 19, 100)


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B, S] and cu_seqlens of DOCUMENTS."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    starts = (positions.flatten() == 0).nonzero().flatten()
    return positions, torch.cat((starts, torch.tensor([positions.numel()]))).to(torch.int32)


def layout_of(config, masked: bool = True) -> SequenceLayout:
    """masked: as on a CPU; else as where a variable-length kernel needs no mask."""
    positions, cu_seqlens = packed()
    cos, sin = rotary_tables(positions, config.rotary_size, config.rope_theta)
    longest = int(cu_seqlens.diff().max())
    return SequenceLayout(cos, sin, cu_seqlens, longest, positions if masked else None)


def attention_of(config, layer_idx: int = 0, **settings) -> WindowedAttention:
    module = WindowedAttention(config, WindowedAttentionConfig(**settings), layer_idx)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def by_definition(module: WindowedAttention, hidden: torch.Tensor, layout: SequenceLayout):
    """Head by head and query by query in fp64, from what _project gives."""
    q, k, v = (x.double() for x in module._project(hidden, layout))
    documents = document_mask(packed()[0])[:, 0]
    out = torch.zeros_like(q)
    group = module.num_heads // module.num_kv_heads
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        allowed = documents[b, i].clone()
        if module.window is not None:
            allowed[: max(0, i - module.window + 1)] = False
        logits = (k[b, :, h // group] @ q[b, i, h] / math.sqrt(module.head_dim))[allowed]
        if module.sinks is not None:
            logits = torch.cat((logits, module.sinks[h].double().view(1)))
        shares = logits.softmax(0)[: int(allowed.sum())]
        out[b, i, h] = shares @ v[b, :, h // group][allowed]
    return out.flatten(2) @ module.o_proj.weight.double().T


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [*WINDOWS, None])
@torch.no_grad()
def test_every_token_sees_its_window_of_its_document(window, sinks):
    config = tiny_config()
    settings = dict(window=window) if window else dict(window_layers=(1,))  # layer 0 does not slide
    module = attention_of(config, **{"window_layers": "all", **settings}, sinks=sinks)
    assert module.window == window
    hidden = torch.randn(len(DOCUMENTS), 19, 16, generator=torch.Generator().manual_seed(1))
    expected = by_definition(module, hidden, layout_of(config))
    for masked in (True, False) if window or sinks else (True,):
        found, sums = module(hidden, layout_of(config, masked))
        assert sums is None
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_are_those_of_the_definition(window):
    config = tiny_config()
    module = attention_of(config, window=window, window_layers="all", sinks=True).double()
    hidden = torch.randn(len(DOCUMENTS), 19, 16, generator=torch.Generator().manual_seed(1))
    hidden = hidden.double().requires_grad_()
    inputs = [hidden, *module.parameters()]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    found, expected = (
        torch.autograd.grad((out * weights).sum(), inputs)
        for out in (
            module(hidden, layout_of(config))[0],
            by_definition(module, hidden, layout_of(config)),
        )
    )
    for ours, theirs in zip(found, expected, strict=True):
        # rotary is computed in fp32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_row(window, sinks):
    settings = WindowedAttentionConfig(window=window, window_layers=(0, -1), sinks=sinks)
    model = build(tiny_config(), BalanceConfig(), attention=settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_(0.0, 1.0)
    ids = torch.randint(0, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(1))
    caches = model.new_caches(2, 21)
    pieces = [ids[:, :6], ids[:, 6:9], *(ids[:, i : i + 1] for i in range(9, 21))]
    found = torch.cat([model.logits(piece, caches) for piece in pieces], dim=1)
    torch.testing.assert_close(found, model.logits(ids), rtol=0, atol=2e-6)


def test_layers_slide_as_the_config_says():
    model = tiny_config(num_layers=5)
    for layers, expected in (
        ("alternate", [0, 2, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ((0, -1), [0, 4]),
        ((), []),
    ):
        settings = WindowedAttentionConfig(window=3, window_layers=layers)
        built = [settings.build(model, i) for i in range(5)]
        assert [i for i, layer in enumerate(built) if layer.window == 3] == expected
        assert all(layer.sinks is None for layer in built)


@pytest.mark.parametrize("layers", ["alternate", "all", (1,)])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_parameters_and_flops_are_counted(layers, sinks):
    settings = WindowedAttentionConfig(window=5, window_layers=layers, sinks=sinks)
    config = tiny_config()
    model = build(config, BalanceConfig(), attention=settings)
    assert count_parameters(config, 2, settings.arguments).total == sum(
        p.numel() for p in model.parameters()
    )
    # Keys of a query, by counting; dense attention counts S / 2 of (S + 1) / 2.
    length, missing = 32, 0.0
    for layer in range(config.num_layers):
        if settings.slides(config, layer):
            missing += length / 2 - (sum(min(i + 1, 5) for i in range(length)) / length - 0.5)
    saved = 12 * config.num_heads * config.attention_head_dim * missing
    assert flops_per_token(config, 2, length, settings.arguments) == pytest.approx(
        flops_per_token(config, 2, length) - saved
    )


def test_a_window_longer_than_the_row_costs_what_dense_attention_does():
    config, settings = tiny_config(), WindowedAttentionConfig(window=100, window_layers="all")
    assert flops_per_token(config, 2, 32, settings.arguments) == flops_per_token(config, 2, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(window=0), "attention.window is 0; it must be at least 1"),
        (dict(window_layers=(3,)), "attention.window_layers names layer 3, but the model has 3"),
        (dict(window_layers=()), "which is dense attention; use attention=dense"),
    ],
)
def test_settings_that_contradict_are_named(settings, words):
    (problem,) = WindowedAttentionConfig(**settings).problems(tiny_config())
    assert words in problem


def test_layers_are_words_or_a_list_on_the_command_line():
    def composed(value: str):
        overrides = ["attention=windowed", f"attention.window_layers={value}"]
        return parse(plain(composing.composed(*overrides)), 1)

    assert composed("all").attention.window_layers == "all"
    assert composed("[0,-1]").attention.window_layers == (0, -1)
    with pytest.raises(ConfigError, match="window_layers is 'some'; choose one of alternate, all"):
        composed("some")
    with pytest.raises(
        ConfigError, match=r"window_layers\[0\] is 'first'; it must be a whole number"
    ):
        composed("[first]")


def test_triton_experts_are_refused_where_they_do_not_fit():
    config = plain(composing.composed("experts.backend=triton"))
    parse(config, 1)
    config["model"]["activation"] = "clamped_swiglu"
    with pytest.raises(ConfigError, match="computes plain SwiGLU without biases, but"):
        parse(config, 1)
    config["experts"]["backend"], config["model"]["num_experts"] = "auto", 0
    config["model"]["num_dense_layers"], config["model"]["expert_bias"] = 0, True
    with pytest.raises(ConfigError, match=r"expert_bias=true, but model\.num_experts is 0"):
        parse(config, 1)


def test_a_router_with_a_bias_has_no_snapshot_to_go_back_to():
    overrides = ["router.bias=true", "fail_safe.spike_zscore=5"]
    config = plain(composing.composed(*overrides))
    with pytest.raises(ConfigError, match=r"which router\.bias=true is no part of"):
        parse(config, 1)
    config["fail_safe"]["spike_zscore"] = 0.0
    assert dataclasses.asdict(parse(config, 1).router)["bias"] is True


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_packed_documents_train_as_they_do_alone(recompute):
    """Loss and gradients, with the windows' masks shared by all layers and by recomputation."""
    settings = WindowedAttentionConfig(window=4, sinks=True)
    config = tiny_config(recompute=recompute, num_experts=0, num_dense_layers=0)
    ids = torch.randint(0, VOCAB_SIZE, (2, 19), generator=torch.Generator().manual_seed(1))
    positions, cu_seqlens = packed()

    def gradients(*batches: TokenBatch) -> list[torch.Tensor]:
        model = build(config, BalanceConfig(), attention=settings).train()
        losses = [model(batch).loss_sum for batch in batches]
        return [sum(losses), *torch.autograd.grad(sum(losses), list(model.parameters()))]

    together = gradients(TokenBatch(ids, ids, positions, cu_seqlens, 14))
    alone = []
    for first, last in itertools.pairwise(cu_seqlens.tolist()):
        own, places = ids.flatten()[None, first:last], torch.arange(last - first)[None]
        ends = torch.tensor([0, last - first], dtype=torch.int32)
        alone.append(TokenBatch(own, own, places, ends, last - first))
    for found, expected in zip(together, gradients(*alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
