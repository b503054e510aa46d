"""Latent attention (MLA): documents, three ways to the same numbers, what a cache holds, what it
costs, and what does not combine. That it is DeepSeek's: test_published_families.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import LATENT, LATENT_SHAPE, VOCAB_SIZE, batch, build, take, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from launch.saved.resume import other_projections
from model.attention.config.latent import MlaConfig
from model.attention.latent import LatentAttention
from model.config import BalanceConfig, RopeScaling
from model.cost.memory import cache_bytes_per_token, device_memory
from model.cost.parameters import count_parameters, flops_per_token
from model.generate import generate
from model.loss import training_loss
from model.request import TokenBatch
from ops.testing import kept_for_backward

PLAIN_QUERIES = {**LATENT, "q_lora_rank": None}
BALANCE = BalanceConfig(aux_loss_coeff=0.01)


def latent_model(attention: dict = LATENT, **changes):
    return build(tiny_config(**(LATENT_SHAPE | changes)), BALANCE, attention=attention)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0))


def packed_logits(model, ids: torch.Tensor, lengths: list[list[int]]) -> torch.Tensor:
    seen = []
    hook = model.head.register_forward_hook(lambda m, i, o: seen.append(o))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    flat = torch.tensor([0] + [n for row in lengths for n in row])
    cu_seqlens = flat.cumsum(0).to(torch.int32)
    model(TokenBatch(ids, torch.zeros_like(ids), positions, cu_seqlens, int(flat.max())))
    hook.remove()
    return seen[0]


def definition(module: LatentAttention, hidden: torch.Tensor, theta: float) -> torch.Tensor:
    """Equations 37 to 47 of arXiv 2405.04434 for one document [S, D], a head and a query at a time
    in fp64, with rotation as complex multiplication.
    """
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    hidden = hidden.double()

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        angle = position * theta ** -(torch.arange(0, len(x), 2, dtype=torch.float64) / len(x))
        z = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    queries = hidden
    if "q_a_proj.weight" in weights:
        queries = norm(hidden @ weights["q_a_proj.weight"].T, weights["q_a_norm.weight"])
    up = weights.get("q_b_proj.weight", weights.get("q_proj.weight"))
    down = hidden @ weights["kv_a_proj.weight"].T
    latents = norm(down[:, : module.latent_dim], weights["kv_a_norm.weight"])
    key_value = (latents @ weights["kv_b_proj.weight"].T).view(len(hidden), module.num_heads, -1)

    outs = torch.zeros(len(hidden), module.num_heads, module.value_dim, dtype=torch.float64)
    for t in range(len(hidden)):
        q = (up @ queries[t]).view(module.num_heads, -1)
        for h in range(module.num_heads):
            content, position = q[h, : module.nope_dim], turned(q[h, module.nope_dim :], t)
            scores = torch.stack(
                [
                    content @ key_value[j, h, : module.nope_dim]
                    + position @ turned(down[j, module.latent_dim :], j)
                    for j in range(t + 1)
                ]
            )
            shares = (scores / math.sqrt(module.nope_dim + module.rope_dim)).softmax(0)
            outs[t, h] = shares @ key_value[: t + 1, h, module.nope_dim :]
    return outs.flatten(1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("attention", [LATENT, PLAIN_QUERIES], ids=["latent", "plain"])
def test_the_layer_is_its_definition(attention):
    model = latent_model(attention)
    module = model.blocks[0].attention
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.4)
    hidden = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).unsqueeze(0)
    layout = model.layout(positions, torch.tensor([0, 9], dtype=torch.int32), 9)
    expected = definition(module, hidden[0], model.config.rope_theta)
    torch.testing.assert_close(
        module(hidden, layout)[0][0].double(), expected, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_a_packed_row_equals_its_documents_run_alone():
    model, lengths = latent_model(), [[3, 1, 4], [5, 3]]
    ids = random_ids(2, 8)
    packed = packed_logits(model, ids, lengths)
    for row, parts in enumerate(lengths):
        start = 0
        for n in parts:
            alone = model.logits(ids[row : row + 1, start : start + n])[0]
            torch.testing.assert_close(packed[row, start : start + n], alone, rtol=0, atol=1e-6)
            start += n


@pytest.mark.parametrize("most", [0, 2, math.inf], ids=["expanded", "either", "absorbed"])
@pytest.mark.parametrize("chunks", [(20,), (7, 12, 1), (5, 2, 13), (1,) * 20])
@pytest.mark.parametrize("attention", [LATENT, PLAIN_QUERIES], ids=["latent", "plain"])
@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole_row(attention, chunks, most, monkeypatch):
    """However the tokens come, and whether the cache is absorbed or expanded for them."""
    monkeypatch.setattr(LatentAttention, "_most_absorbed", lambda self: most)
    monkeypatch.setattr("model.attention.latent.QUERY_CHUNK", 5)
    model, ids = latent_model(attention).eval(), random_ids(2, 20)
    caches = model.new_caches(2, 20)
    cached = torch.cat([model.logits(part, caches) for part in ids.split(chunks, 1)], 1)
    torch.testing.assert_close(cached, model.logits(ids), rtol=0, atol=2e-6)


def test_absorbing_stops_where_expanding_takes_fewer_products():
    """Of the published shape: counted product by product for a cache of T tokens and S queries."""
    module = (
        latent_model(
            dict(
                q_lora_rank=None,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            hidden_size=8,
        )
        .blocks[0]
        .attention
    )

    def products(queries: int, absorbed: bool) -> int:
        if absorbed:
            return queries * (512 + 64 + 512)
        return 512 * (128 + 128) + queries * (128 + 64 + 128)

    most = module._most_absorbed()
    assert 170 < most < 171
    assert products(170, True) < products(170, False) and products(171, True) > products(171, False)


@torch.no_grad()
def test_generated_text_is_that_without_a_cache():
    model = latent_model(max_seq_len=24).eval()
    model.head.weight *= 10
    text, expected = list(generate(model, [5, 9, 2], 12, temperature=0)), [5, 9, 2]
    for _ in range(12):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert text == expected[3:]


def test_a_cache_holds_latents_and_shared_keys_alone():
    model = latent_model()
    caches = model.new_caches(3, 11)
    held = sum(
        tensor.numel() * tensor.element_size()
        for cache in caches
        for tensor in vars(cache).values()
        if isinstance(tensor, torch.Tensor)
    )
    assert held == 3 * 11 * cache_bytes_per_token(model.config, 4, LATENT)
    assert held == 3 * 11 * model.config.num_layers * (10 + 4) * 4

    # DeepSeek-V2's table 1: 9/2 d_h a layer, that of 2.25 groups of keys and values
    published = tiny_config(hidden_size=5120, num_heads=128, num_kv_heads=128, head_dim=128)
    latent = cache_bytes_per_token(published, 2, MlaConfig().arguments)
    assert latent == published.num_layers * 4.5 * 128 * 2
    assert cache_bytes_per_token(published, 2) / latent == pytest.approx(2 * 128 / 4.5)


def test_a_full_cache_refuses_more_and_keeps_what_it_holds():
    model = latent_model()
    caches = model.new_caches(1, 4)
    with torch.no_grad():
        model.logits(random_ids(1, 3), caches)
        with pytest.raises(ValueError, match="5 tokens do not fit the cache of 4"):
            model.logits(random_ids(1, 2), caches)
    assert {cache.length for cache in caches} == {3}


class Largest(TorchDispatchMode):
    """The most values that any tensor has that an operation returns."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


@pytest.mark.parametrize("v_head_dim", [8, 16])
@torch.no_grad()
def test_a_prompt_makes_no_tensor_of_all_pairs(v_head_dim):
    length = 512
    attention = {**LATENT, "v_head_dim": v_head_dim}
    model = latent_model(attention, num_experts=0, num_layers=1, num_dense_layers=0).eval()
    ids, caches = random_ids(1, length), model.new_caches(1, length)
    with Largest() as largest:
        model.logits(ids, caches)
    assert 0 < largest.values < length * length / 2


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_recomputation_changes_no_gradient(recompute):
    found = []
    for asked in ("none", recompute):
        model = latent_model(recompute=asked)
        output = model(take(batch(0, 0, 4), 0, 4))
        training_loss(output, 20, 20, BALANCE).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert all(grad.norm() > 0 for name, grad in found[0].items() if "attention." in name)


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [LATENT, PLAIN_QUERIES], ids=["latent", "plain"])
def test_parameters_and_flops_are_those_of_the_model(attention):
    model = latent_model(attention)
    count = count_parameters(model.config, 2, attention)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.attention == sum(
        p.numel() for name, p in model.named_parameters() if "_proj." in name
    )
    assert count.norms == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)

    # scores of 6 + 4 dimensions, values of 8, four heads, 16 keys on average; backward twice that
    head = VOCAB_SIZE * 16
    matrices = count.active - count.norms - count.embedding + head
    pairs = model.config.num_layers * 4 * (6 + 4 + 8) * 16
    assert flops_per_token(model.config, 2, 32, attention) == 6 * matrices + 6 * pairs


@pytest.mark.parametrize("hidden_size", [16, 64])
@pytest.mark.parametrize("attention", [LATENT, PLAIN_QUERIES], ids=["latent", "plain"])
def test_activation_estimate_is_near_what_backward_keeps(attention, hidden_size):
    model = latent_model(attention, hidden_size=hidden_size)
    full = take(batch(0, 0, 8), 0, 8)._replace(token_mask=None)
    with kept_for_backward(*model.parameters()) as kept:
        model(full)
    memory = device_memory(
        model.config,
        2.0,
        precision="fp32",
        zero_stage=0,
        world_size=1,
        expert_parallel_size=1,
        micro_batch_size=8,
        seq_len=16,
        attention=attention,
    )
    logits = 8 * 8 * 16 * VOCAB_SIZE
    assert 0.7 < (memory.activations + logits) / sum(kept.values()) < 1.4


# --- what does not combine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({}, dict(num_kv_heads=2), "model.num_kv_heads is 2, but with attention=mla"),
        ({}, dict(qk_norm="head"), "model.qk_norm=head does not combine with attention=mla"),
        ({}, dict(attention_bias="qkv"), "model.attention_bias=qkv does not combine"),
        ({}, dict(attention_multiplier=0.1), "model.attention_multiplier=0.1 does not combine"),
        ({}, dict(rotary_dim=2), "set model.rotary_dim=null"),
        ({}, dict(head_dim=12), "model.head_dim is 12, but with attention=mla a head has"),
        (dict(qk_rope_head_dim=3), {}, "attention.qk_rope_head_dim is 3; rotary embedding needs"),
        (dict(q_lora_rank=0), {}, "attention.q_lora_rank is 0; it must be at least 1, or null"),
        (dict(v_head_dim=0), {}, "attention.v_head_dim is 0; it must be at least 1"),
    ],
)
def test_what_does_not_combine_is_named_with_the_mend(settings, changes, words):
    model = tiny_config(**(LATENT_SHAPE | changes))
    (problem,) = MlaConfig(**(LATENT | settings)).problems(model)
    assert words in problem


def test_what_combines_is_no_problem():
    for changes in ({}, dict(head_dim=10), dict(rope_scaling=RopeScaling("linear", 2.0))):
        assert MlaConfig(**LATENT).problems(tiny_config(**(LATENT_SHAPE | changes))) == []


def test_weights_of_latent_attention_serve_no_other():
    mla, dense = {"name": "mla", **LATENT}, {"name": "dense"}
    assert other_projections(mla, mla) is other_projections(dense, {"name": "sparse"}) is None
    for pair, change in (((mla, dense), "mla -> dense"), ((dense, mla), "dense -> mla")):
        assert f"cannot change attention {change}" in other_projections(*pair)
    refusal = other_projections(mla, mla | {"v_head_dim": 16})
    assert "cannot change attention.v_head_dim 8 -> 16" in refusal
