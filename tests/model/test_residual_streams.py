"""Several residual streams: the definition against transformers' DeepSeek-V4, the start as one
stream, and everything that a wider state passes through.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from common import VOCAB_SIZE, build, tiny_config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from model.blocks.streams import StreamMixer, StreamSum, closed, doubly_stochastic
from model.config import BalanceConfig, ModelConfig
from model.cost.memory import device_memory
from model.cost.parameters import count_parameters, flops_per_token
from model.generate import generate
from model.request import TokenBatch

STREAMS = 3


def config_of(**changes) -> ModelConfig:
    return tiny_config(num_residual_streams=STREAMS, sinkhorn_steps=5, **changes)


def redrawn(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Weights at which streams differ and every one of them matters."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "streams" in name or isinstance(module, StreamMixer | StreamSum):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=gen))
    return module


def model_of(**changes):
    return redrawn(build(config_of(**changes), BalanceConfig()))


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    gen = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=gen)


def batch(rows: int = 2, length: int = 12) -> TokenBatch:
    tokens = ids(rows, length)
    positions = torch.arange(length).expand(rows, length)
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    return TokenBatch(tokens, tokens.roll(-1, 1), positions, bounds, length)


# --- the definition -------------------------------------------------------------------------------


def their_config(config: ModelConfig) -> DeepseekV4Config:
    return DeepseekV4Config(
        hidden_size=config.hidden_size,
        hc_mult=STREAMS,
        hc_sinkhorn_iters=config.sinkhorn_steps,
        hc_eps=config.sinkhorn_eps,
        rms_norm_eps=config.norm_eps,
    )


def test_reads_writes_mixes_and_gradients_are_those_of_deepseek_v4():
    config = config_of()
    ours, reference = StreamMixer(config), theirs.DeepseekV4HyperConnection(their_config(config))
    redrawn(ours)
    with torch.no_grad():
        for mine, name in ((ours.weight, "fn"), (ours.bias, "base"), (ours.scale, "scale")):
            getattr(reference, name).copy_(mine)
    gen = torch.Generator().manual_seed(2)
    state = torch.randn(2, 7, config.residual_size, generator=gen)
    out = torch.randn(2, 7, config.hidden_size, generator=gen)
    weights = torch.randn(2, 7, config.residual_size, generator=gen)

    mine, other = state.clone().requires_grad_(), state.clone().requires_grad_()
    opened = ours(mine)
    after = closed(mine, opened, out + opened.read)
    streams = other.unflatten(-1, (STREAMS, -1))
    post, comb, read = reference(streams)
    added = post.unsqueeze(-1) * (out + read).unsqueeze(-2)
    expected = (added + comb.transpose(-1, -2) @ streams).flatten(-2)
    torch.testing.assert_close(opened.read, read, rtol=0, atol=1e-6)
    torch.testing.assert_close(opened.mixes, comb, rtol=0, atol=1e-6)
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)

    found = torch.autograd.grad((after * weights).sum(), [mine, *ours.parameters()])
    parameters = [reference.fn, reference.base, reference.scale]
    wanted = torch.autograd.grad((expected * weights).sum(), [other, *parameters])
    for gradient, right in zip(found, wanted, strict=True):
        assert right.any()
        scale = max(1.0, float(right.abs().max()))
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-5 * scale)


def test_the_sum_behind_the_last_layer_is_that_of_deepseek_v4():
    config = config_of()
    ours, reference = StreamSum(config), theirs.DeepseekV4HyperHead(their_config(config))
    redrawn(ours)
    with torch.no_grad():
        for mine, name in ((ours.weight, "fn"), (ours.bias, "base"), (ours.scale, "scale")):
            getattr(reference, f"hc_{name}").copy_(mine)
    state = torch.randn(2, 7, config.residual_size, generator=torch.Generator().manual_seed(2))
    expected = reference(state.unflatten(-1, (STREAMS, -1)))
    torch.testing.assert_close(ours(state), expected, rtol=0, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    config = tiny_config(hidden_size=4, num_heads=2, num_residual_streams=2, sinkhorn_steps=3)
    mixer, last = redrawn(StreamMixer(config)).double(), redrawn(StreamSum(config)).double()
    gen = torch.Generator().manual_seed(2)
    state = torch.randn(1, 2, 8, generator=gen, dtype=torch.float64, requires_grad=True)
    out = torch.randn(1, 2, 4, generator=gen, dtype=torch.float64, requires_grad=True)

    def layer(state, out, *_):
        opened = mixer(state)
        after = closed(state, opened, out * opened.read)
        return after, last(after)

    parameters = [*mixer.parameters(), *last.parameters()]
    assert torch.autograd.gradcheck(layer, (state, out, *parameters))


def test_what_mixes_has_rows_and_columns_that_sum_to_one():
    gen = torch.Generator().manual_seed(2)
    matrices = torch.randn(50, 4, 4, generator=gen).softmax(-1)
    mixes = doubly_stochastic(matrices, 20, 1e-6)
    torch.testing.assert_close(mixes.sum(-2), torch.ones(50, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixes.sum(-1), torch.ones(50, 4), rtol=0, atol=1e-3)


# --- in a model -----------------------------------------------------------------------------------


@torch.no_grad()
def test_it_starts_as_a_model_of_one_stream():
    """Exactly so without the little that the state says, whose scale begins at 0.01."""
    one = build(tiny_config(), BalanceConfig()).logits(ids())
    several = build(config_of(), BalanceConfig())
    assert 1e-5 < (several.logits(ids()) - one).abs().max() < 0.02 * one.abs().max()
    for name, parameter in several.named_parameters():
        if "streams" in name and name.endswith("scale"):
            parameter.zero_()
    torch.testing.assert_close(several.logits(ids()), one, rtol=0, atol=2e-5)


def test_every_parameter_learns_and_recomputed_blocks_say_the_same():
    kept, again = model_of(), model_of(recompute="block")
    gradients = []
    for model in (kept, again):
        model.train()
        model(batch()).loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        if "streams" in name:
            assert gradient.any(), name


def test_two_stages_hand_on_all_streams():
    whole = model_of()
    first, second = (
        build(config_of(), BalanceConfig(), layers=[run]) for run in (range(1), range(1, 3))
    )
    for part in (first, second):
        names = {name for name, _ in part.named_parameters()}
        found = {n: v for n, v in whole.state_dict().items() if n in names}
        part.load_state_dict(found, strict=False)
    assert first.streams is None and second.streams is not None
    handed_on = first(batch()).handed_on
    assert handed_on.shape == (2, 12, STREAMS * 16)
    torch.testing.assert_close(
        second(batch(), before=handed_on).loss_sum, whole(batch()).loss_sum, rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_decoding_is_the_whole_row():
    model = model_of().eval()
    caches = model.new_caches(2, 12)
    pieces = [ids()[:, :5], *(ids()[:, i : i + 1] for i in range(5, 12))]
    found = torch.cat([model.logits(piece, caches) for piece in pieces], 1)
    torch.testing.assert_close(found, model.logits(ids()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_engine_over_pages_generates_what_the_model_does():
    model = model_of().eval()
    prompts = {"long": ids()[0, :7].tolist(), "short": ids()[1, :4].tolist()}
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0, ignore_end=True)
    engine = Engine(model, EngineConfig())
    done = engine.run(Request(name, prompt, sampling) for name, prompt in prompts.items())
    for completion in done:
        expected = generate(model, prompts.pop(completion.name), 6, temperature=0)
        assert completion.tokens == list(expected)
    assert not prompts


# --- what it costs --------------------------------------------------------------------------------


def test_parameters_flops_and_memory_count_the_streams():
    config = config_of()
    model, one = build(config, BalanceConfig()), tiny_config()
    count = count_parameters(config, 2)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "streams" in name and parameter.dim() == 2
    )
    assert flops_per_token(config, 2, 12) - flops_per_token(one, 2, 12) == 6 * matrices

    settings = dict(
        precision="bf16", zero_stage=0, world_size=1, expert_parallel_size=1, micro_batch_size=1
    )
    several, single = (
        device_memory(c, 2, seq_len=64, **settings).activations for c in (config, one)
    )
    # two states a layer at least, each in bf16 and in fp32
    assert several - single > 64 * 3 * 2 * 6 * config.residual_size


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_residual_streams=0), "model.num_residual_streams is 0; use 1 for one"),
        (dict(num_residual_streams=1), "model.sinkhorn_steps is 5, but model.num_residual_streams"),
        (dict(sinkhorn_steps=0), "model.sinkhorn_steps is 0; it must be at least 1"),
        (dict(sinkhorn_eps=-1.0), "model.sinkhorn_eps is -1.0; it must not be negative"),
        (dict(num_mtp_layers=1), "model.num_mtp_layers is 1, but what modules of multi-token"),
        (dict(init="mup", mup_base_hidden_size=8), "model.init is mup, which has no rule for"),
    ],
)
def test_contradictions_are_named(changes, words):
    (problem,) = dataclasses.replace(config_of(), **changes).problems()
    assert words in problem
