"""Attention: document boundaries, causality, head groups, norms, positions and the cache."""

from __future__ import annotations

import math

import pytest
import torch
from common import VOCAB_SIZE, build, tiny_config

from model.attention import base
from model.attention.base import SequenceLayout
from model.attention.cache import KVCache
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.dense import DenseAttention
from model.config import BalanceConfig
from model.layers import apply_rotary, rotary_tables
from model.request import TokenBatch

QK_NORMS = ("none", "head", "hidden")
DOCUMENTS = ((3, 1, 4), (5, 3))  # lengths, per row


def packed_positions(documents=DOCUMENTS) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])


def document_ids(documents=DOCUMENTS) -> torch.Tensor:
    """[B, S]: a number per document, all different."""
    lengths = [n for row in documents for n in row]
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(
        len(documents), -1
    )


def cu_seqlens_of(positions: torch.Tensor) -> torch.Tensor:
    starts = (positions.flatten() == 0).nonzero().flatten()
    return torch.cat((starts, torch.tensor([positions.numel()]))).to(torch.int32)


def packed_logits(
    model, input_ids: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] of packed rows, and the embedded tokens [B, S, D] they came from."""
    seen = {}
    hooks = [
        model.head.register_forward_hook(lambda m, i, o: seen.update(logits=o)),
        model.embedding.register_forward_hook(lambda m, i, o: seen.update(embedded=o)),
    ]
    cu_seqlens = cu_seqlens_of(positions)
    longest = int(cu_seqlens.diff().max())
    model(TokenBatch(input_ids, torch.zeros_like(input_ids), positions, cu_seqlens, longest))
    for hook in hooks:
        hook.remove()
    return seen["logits"], seen["embedded"]


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def model_of(**changes):
    return build(tiny_config(**changes), BalanceConfig())


def attention_of(config, seed: int = 0) -> DenseAttention:
    module = DenseAttention(config)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():  # norm gains too, so that they matter
            parameter.normal_(0.0, 0.5, generator=gen)
    return module


def layout_of(positions: torch.Tensor, config) -> SequenceLayout:
    cos, sin = rotary_tables(positions, config.attention_head_dim, config.rope_theta)
    cu_seqlens = cu_seqlens_of(positions)
    return SequenceLayout(cos, sin, cu_seqlens, int(cu_seqlens.diff().max()), positions)


def plain_attention(module: DenseAttention, config, hidden: torch.Tensor) -> torch.Tensor:
    """The definition for one document [S, D], head by head in fp64, with rotation as complex
    multiplication.
    """
    hidden, head_dim = hidden.double(), config.attention_head_dim
    q, k, v = (hidden @ p.weight.double().T for p in (module.q_proj, module.k_proj, module.v_proj))

    def norm(x, layer):
        return (
            x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * layer.weight.double()
        )

    def rotate(x):
        frequency = config.rope_theta ** -(
            torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        )
        angle = torch.arange(len(x), dtype=torch.float64).unsqueeze(1) * frequency
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    if config.qk_norm == "hidden":
        q, k = norm(q, module.q_norm), norm(k, module.k_norm)
    heads = []
    for h in range(config.num_heads):
        g = h // (config.num_heads // config.num_kv_heads)
        query, key = (
            q[:, h * head_dim : (h + 1) * head_dim],
            k[:, g * head_dim : (g + 1) * head_dim],
        )
        if config.qk_norm == "head":
            query, key = norm(query, module.q_norm), norm(key, module.k_norm)
        scores = rotate(query) @ rotate(key).T / math.sqrt(head_dim)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, g * head_dim : (g + 1) * head_dim])
    return torch.cat(heads, -1) @ module.o_proj.weight.double().T


@pytest.mark.parametrize("num_experts", [0, 8])
def test_a_token_depends_on_exactly_the_earlier_tokens_of_its_document(num_experts):
    model = model_of(num_experts=num_experts)
    positions, documents = packed_positions(), document_ids()
    logits, embedded = packed_logits(model, random_ids(*positions.shape), positions)
    rows, length = positions.shape
    probe = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
    for row in range(rows):
        for i in range(length):
            (gradient,) = torch.autograd.grad(logits[row, i] @ probe, embedded, retain_graph=True)
            allowed = torch.zeros(rows, length, dtype=torch.bool)
            allowed[row, : i + 1] = documents[row, : i + 1] == documents[row, i]
            assert torch.equal(gradient.norm(dim=-1) > 0, allowed), f"row {row} token {i}"


def test_tokens_never_attend_across_documents():
    model, positions, documents = model_of(), packed_positions(), document_ids()
    ids = random_ids(*positions.shape)
    before, _ = packed_logits(model, ids, positions)
    for document in range(int(documents.max()) + 1):
        inside = documents == document
        after, _ = packed_logits(model, torch.where(inside, (ids + 1) % VOCAB_SIZE, ids), positions)
        torch.testing.assert_close(after[~inside], before[~inside], rtol=0, atol=1e-6)
        assert (after[inside] - before[inside]).abs().max() > 1e-3


def test_a_packed_row_equals_its_documents_run_alone():
    model, positions, documents = model_of(), packed_positions(), document_ids()
    ids = random_ids(*positions.shape)
    packed, _ = packed_logits(model, ids, positions)
    for document in range(int(documents.max()) + 1):
        inside = documents == document
        torch.testing.assert_close(
            packed[inside], model.logits(ids[inside].unsqueeze(0))[0], rtol=0, atol=1e-6
        )


def test_rows_of_one_document_need_no_mask():
    """Rows without packing take the plain causal path; it must agree with the masked one."""
    model = model_of()
    ids, positions = random_ids(2, 8), torch.arange(8).expand(2, 8)
    together = packed_logits(model, ids.view(1, 16), positions.reshape(1, 16))[0].view(2, 8, -1)
    torch.testing.assert_close(packed_logits(model, ids, positions)[0], together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_matches_the_definition(qk_norm, num_kv_heads):
    config = tiny_config(qk_norm=qk_norm, num_kv_heads=num_kv_heads, head_dim=6)
    module, positions, documents = attention_of(config), packed_positions(), document_ids()
    hidden = torch.randn(
        *positions.shape, config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    out, _ = module(hidden, layout_of(positions, config))
    for document in range(int(documents.max()) + 1):
        inside = documents == document
        expected = plain_attention(module, config, hidden[inside])
        torch.testing.assert_close(out[inside].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_grouped_heads_equal_repeated_key_value_heads(qk_norm):
    grouped_config, full_config = (tiny_config(qk_norm=qk_norm, num_kv_heads=n) for n in (2, 4))
    grouped, full = attention_of(grouped_config), attention_of(full_config, seed=1)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        per_head = weights[name].view(2, grouped_config.attention_head_dim, -1)
        weights[name] = per_head.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    positions = packed_positions()
    hidden = torch.randn(*positions.shape, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        full(hidden, layout_of(positions, full_config)),
        grouped(hidden, layout_of(positions, grouped_config)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_qk_norm_removes_the_scale_of_queries_and_keys(qk_norm, projection):
    """Of all heads together for "hidden"; of every head alone for "head"."""
    config = tiny_config(qk_norm=qk_norm, norm_eps=1e-12)
    module, positions = attention_of(config), packed_positions()
    hidden = torch.randn(
        *positions.shape, config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    before, _ = module(hidden, layout_of(positions, config))

    def change_after_scaling(rows: slice) -> float:
        weight = getattr(module, projection).weight.data
        weight[rows] *= 3.0
        after, _ = module(hidden, layout_of(positions, config))
        weight[rows] /= 3.0
        return float((after - before).detach().abs().max())

    whole, first_head = (
        change_after_scaling(slice(None)),
        change_after_scaling(slice(config.attention_head_dim)),
    )
    assert (whole < 1e-5) == (qk_norm != "none"), whole
    assert (first_head < 1e-5) == (qk_norm == "head"), first_head


def test_rotary_scores_depend_on_relative_position_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rotary(x, *rotary_tables(torch.tensor([[p]]), 8, 10000.0))
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    for shift in (1, 17, 300):
        assert score(5 + shift, 2 + shift) == pytest.approx(score(5, 2), abs=1e-4)
    assert abs(score(6, 2) - score(5, 2)) > 1e-2
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)


def test_rotary_keeps_lengths():
    x = torch.randn(1, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, *rotary_tables(torch.arange(9).unsqueeze(0), 8, 10000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[:, 1:], x[:, 1:])


@pytest.mark.parametrize("chunks", [(10,), (4, 5, 1), (7, 1, 1, 1), (1,) * 10])
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_cached_logits_equal_uncached_logits(chunks, qk_norm):
    model, ids = model_of(qk_norm=qk_norm).eval(), random_ids(2, 10)
    caches = model.new_caches(2, 10)
    with torch.no_grad():
        cached = torch.cat([model.logits(part, caches) for part in ids.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(cached, model.logits(ids), rtol=0, atol=1e-6)


def test_a_full_cache_refuses_more_and_keeps_what_it_holds():
    cache = KVCache(1, 4, 2, 8, torch.float32, torch.device("cpu"))
    keys, values = torch.randn(2, 1, 3, 2, 8)
    cache.append(keys, values)
    with pytest.raises(ValueError, match="5 tokens do not fit the cache of 4"):
        cache.append(keys[:, :2], values[:, :2])
    assert cache.length == 3
    held_keys, held_values = cache.append(keys[:, :1], values[:, :1])
    assert torch.equal(held_keys, torch.cat((keys, keys[:, :1]), 1))
    assert torch.equal(held_values, torch.cat((values, values[:, :1]), 1))


def test_documents_of_long_rows_attend_one_by_one_as_under_a_mask(monkeypatch):
    """Two rows, one of a single document; outputs and gradients. A mask is made for none of it."""
    config = tiny_config()
    positions = torch.stack([torch.arange(24), torch.arange(24) % 9])
    hidden = torch.randn(2, 24, config.hidden_size, generator=torch.Generator().manual_seed(3))
    found = []
    for longest in (24, 23):
        monkeypatch.setattr(base, "LONGEST_MASKED", longest)
        module, layout = attention_of(config), layout_of(positions, config)
        given = hidden.clone().requires_grad_()
        out = module(given, layout)[0]
        out.square().sum().backward()
        assert ("mask" in layout._shared) == (longest == 24)
        found.append((out.detach(), given.grad, module.k_proj.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_model_of_sparse_layers_makes_no_mask_of_all_pairs(monkeypatch):
    """Of packed rows on a CPU: it would take S^2 bytes for nothing."""
    monkeypatch.setattr(base, "document_mask", lambda positions: pytest.fail("a mask was made"))
    sparse = SparseAttentionConfig(block_size=4, coarse_block_size=4, top_k=1, window_size=4)
    model = build(tiny_config(), BalanceConfig(), attention=sparse)
    positions = packed_positions(((5, 11),))
    packed_logits(model, random_ids(1, 16), positions)
