"""Attention by a learned index in the model: against transformers' modules, its stages, its caches,
what it learns and what it costs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import VOCAB_SIZE, batch, build, take, tiny_config
from torch import nn

from model.attention.base import SequenceLayout
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.indexed import IndexedAttention
from model.config import BalanceConfig, ModelConfig
from model.cost.memory import cache_bytes_per_token
from model.cost.parameters import count_parameters, flops_per_token, indexed_keys
from model.layers import rotary_tables
from model.loss import training_loss
from model.request import ForwardRequest, TokenBatch
from train.observe.attention import attention_metrics

FORMS: dict[str, dict[str, Any]] = {
    "dsa": {"rule": "dsa", "top_k": 5, "index_heads": 3, "dense_steps": 4, "audit_rows": 0.5},
    "msa": {"rule": "msa", "block_size": 4, "top_k": 2, "dense_steps": 4, "audit_rows": 0.5},
    "qsa": {
        "rule": "qsa",
        "block_size": 3,
        "top_k": 2,
        "index_heads": 3,
        "index_head_dim": 6,
        "dense_layers": (0,),
        "dense_steps": 4,
        "audit_rows": 0.5,
    },
}
by_form = pytest.mark.parametrize("form", FORMS)


def model_of(form: str | None, seed: int = 7, **changes: Any):
    attention = None if form is None else FORMS[form] | changes
    return build(tiny_config(), BalanceConfig(), seed=seed, attention=attention)


def inputs(rows: int = 3, length: int = 48) -> TokenBatch:
    return take(batch(0, 0, rows, length), 0, rows)


def learned(model, given: TokenBatch, **options: Any):
    model.zero_grad()
    output = model(given, ForwardRequest(**options))
    training_loss(output, 10, 10, BalanceConfig()).backward()
    return output


# --- transformers' modules ------------------------------------------------------------------------

HIDDEN, HEADS, KV_HEADS, DIM, LENGTH = 24, 4, 2, 8, 29
THETA = 10_000.0


def ours(rotary_dim: int | None = None, **settings: Any) -> IndexedAttention:
    config = ModelConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        intermediate_size=8,
        num_experts=0,
        expert_intermediate_size=8,
        max_seq_len=64,
        qk_norm="head",
        rotary_dim=rotary_dim,
        rope_theta=THETA,
        norm_eps=1e-6,
    )
    settings = IndexedAttentionConfig(**settings)
    assert settings.problems(config) == []
    return settings.build(config)


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise)
    return module.eval()


def layout_of(length: int, rotary_dim: int) -> SequenceLayout:
    positions = torch.arange(length).unsqueeze(0)
    cos, sin = rotary_tables(positions, rotary_dim, THETA)
    ends = torch.tensor([0, length], dtype=torch.int32)
    return SequenceLayout(cos, sin, ends, length, None)


def taken(mine: nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    """Weights by name; theirs may have what ours do not."""
    state = {name: theirs[name] for name in mine.state_dict()}
    mine.load_state_dict(state)


@torch.no_grad()
def test_msa_is_that_of_transformers():
    """MiniMax-M3's attention with its indexer: blocks by key/value head, the own block among them;
    norms scale by 1 + weight there.
    """
    module = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    configs = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")
    config = configs.MiniMaxM3VLTextConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        num_hidden_layers=1,
        layer_types=["minimax_m3_sparse"],
        index_n_heads=KV_HEADS,
        index_head_dim=DIM,
        index_block_size=4,
        index_topk_blocks=3,
        index_local_blocks=1,
        rms_norm_eps=1e-6,
    )
    config._attn_implementation = "eager"
    theirs = drawn(module.MiniMaxM3VLAttention(config, 0))
    mine = ours(rule="msa", block_size=4, top_k=3)
    names = {n: p for n, p in theirs.state_dict().items()}
    taken(mine, {n: p + 1 if "norm" in n else p for n, p in names.items()})

    hidden = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    layout = layout_of(LENGTH, DIM)
    tables = tuple(torch.cat((x, x), -1) for x in (layout.cos, layout.sin))
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~causal, torch.finfo().min)[None, None]
    want = theirs(hidden, tables, mask, position_ids=torch.arange(LENGTH)[None])[0]
    torch.testing.assert_close(mine(hidden, layout)[0], want, rtol=1e-4, atol=1e-5)
    dense = mine._attend_densely(*mine._project(hidden, layout), layout, None)
    assert (mine.o_proj(dense.flatten(2)) - want).abs().max() > 1e-2


@torch.no_grad()
def test_qsa_is_that_of_transformers():
    """Qwen4's attention with its indexer; its output gate, which ours has not, is a half."""
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    configs = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
    config = configs.Qwen4ExpTextConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        indexer_n_heads=11,
        indexer_kv_heads=1,
        indexer_head_dim=DIM,
        indexer_budget=12,
        indexer_compress_ratio=4,
        rms_norm_eps=1e-6,
        attention_bias=False,
    )
    config._attn_implementation = "eager"
    theirs = drawn(module.Qwen4ExpTextAttention(config, 0))
    mine = ours(rule="qsa", block_size=4, top_k=3, index_heads=11)
    with torch.no_grad():
        gates = theirs.q_proj.weight.view(HEADS, 2, DIM, HIDDEN)
        gates[:, 1] = 0
    state = {n: p + 1 if "norm" in n else p for n, p in theirs.state_dict().items()}
    state["q_proj.weight"] = gates[:, 0].flatten(0, 1)
    both = state["indexer.index_qk_proj.weight"]
    state["indexer.q_proj.weight"], state["indexer.k_proj.weight"] = both.split((11 * DIM, DIM))
    state["indexer.q_norm.weight"] = state["indexer.q_layernorm.weight"]
    state["indexer.k_norm.weight"] = state["indexer.k_layernorm.weight"]
    state["o_proj.weight"] = state["o_proj.weight"] / 2
    taken(mine, state)

    hidden = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    layout = layout_of(LENGTH, DIM)
    tables = tuple(torch.cat((x, x), -1) for x in (layout.cos, layout.sin))
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~causal, torch.finfo().min)[None, None]
    want = theirs(hidden, tables, mask)[0]
    torch.testing.assert_close(mine(hidden, layout)[0], want, rtol=1e-4, atol=1e-5)
    dense = mine._attend_densely(*mine._project(hidden, layout), layout, None)
    assert (mine.o_proj(dense.flatten(2)) - want).abs().max() > 1e-2


@torch.no_grad()
def test_dsa_chooses_what_transformers_choose():
    """DeepSeek-V3.2's indexer over grouped-query attention: what it chooses is a mask of ours."""
    module = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    configs = pytest.importorskip("transformers.models.deepseek_v32.configuration_deepseek_v32")
    config = configs.DeepseekV32Config(
        hidden_size=HIDDEN,
        q_lora_rank=HIDDEN,
        qk_rope_head_dim=DIM,
        index_n_heads=9,
        index_head_dim=DIM + 2,
        index_topk=6,
    )
    theirs = drawn(module.DeepseekV32Indexer(config, 0))
    mine = drawn(ours(rule="dsa", top_k=6, index_heads=9, index_head_dim=DIM + 2))
    state = theirs.state_dict()
    state["q_proj.weight"], state["k_proj.weight"] = state["wq_b.weight"], state["wk.weight"]
    taken(mine.indexer, state)

    hidden = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    layout = layout_of(LENGTH, DIM)
    tables = tuple(torch.cat((x, x), -1) for x in (layout.cos, layout.sin))
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~causal, -torch.inf)[None]
    positions = torch.arange(LENGTH)[None]
    chosen = theirs(hidden, hidden, tables, mask, positions)[0].long()
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool).scatter_(1, chosen, True) & causal

    q, k, v = (x.transpose(1, 2) for x in mine._project(hidden, layout))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[None, None], enable_gqa=True
    )
    want = mine.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mine(hidden, layout)[0], want, rtol=1e-4, atol=1e-5)
    assert seen[-1].sum() == 6


# --- in the model ---------------------------------------------------------------------------------


@by_form
def test_a_dense_model_converts_and_attends_as_before_in_the_dense_steps(form):
    """Loss and gradients of the other weights are those of the dense model; the index learns."""
    dense, indexed, given = model_of(None), model_of(form), inputs()
    missing = indexed.load_state_dict(dense.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".attention.indexer." in name for name in missing.missing_keys)
    indexed.set_step(3)
    theirs, own = learned(dense, given), learned(indexed, given)
    torch.testing.assert_close(own.loss_sum, theirs.loss_sum)
    assert own.penalty_sum > 0
    expected = {name: p.grad for name, p in dense.named_parameters()}
    for name, parameter in indexed.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad.abs().max() > 0, name

    # Evaluated in these steps it is the dense model; from then on something is left out.
    for step, is_dense in ((3, True), (4, False)):
        indexed.set_step(step)
        with torch.no_grad():
            losses = [m.eval()(given).loss_sum for m in (dense, indexed)]
        assert torch.isclose(*losses, rtol=1e-5, atol=0) == is_dense


@by_form
def test_the_index_learns_by_its_own_loss_alone(form):
    """No gradient of the language model reaches it, and none of its own reaches anything else."""
    given = inputs()
    model = model_of(form)
    output = model(given)
    names, parameters = zip(*model.named_parameters(), strict=True)
    by_loss, by_penalty = (
        dict(zip(names, found, strict=True))
        for found in (
            torch.autograd.grad(x, parameters, retain_graph=True, materialize_grads=True)
            for x in (output.loss_sum, output.penalty_sum)
        )
    )
    for name in names:
        is_index = ".attention.indexer." in name
        assert bool(by_penalty[name].any()) == is_index, name
        assert not (is_index and by_loss[name].any()), name

    # Twice the coefficient is twice the penalty.
    twice = model_of(form, index_coeff=2.0)(given)
    torch.testing.assert_close(twice.penalty_sum, 2 * output.penalty_sum)


@by_form
def test_recomputing_blocks_changes_no_gradient(form):
    given = inputs()
    kept = model_of(form)
    again = build(tiny_config(recompute="block"), BalanceConfig(), attention=FORMS[form])
    calls: list[str] = []
    for name, module in again.named_modules():
        if name.endswith(".attention.q_proj"):
            module.register_forward_hook(lambda *_, of=name: calls.append(of))
    for model in (kept, again):
        learned(model, given)
    # Once more each, whatever the number of tiles that taught an index.
    assert len(calls) == 2 * len({*calls}) == 2 * len(again.blocks)
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@by_form
def test_padding_counts_nowhere(form):
    """Rows with a longer padded tail have the same sums."""
    model, short = model_of(form), inputs(length=32)
    assert short.token_mask is not None and not short.token_mask.all()
    found = model(short, ForwardRequest(measure_attention=True))
    noise = torch.where(short.token_mask, short.input_ids, (short.input_ids + 3) % VOCAB_SIZE)
    other = model(short._replace(input_ids=noise), ForwardRequest(measure_attention=True))
    torch.testing.assert_close(found.penalty_sum, other.penalty_sum)
    torch.testing.assert_close(found.attention_stats, other.attention_stats)


@by_form
@pytest.mark.parametrize("step", [0, 4])
def test_a_cache_continues_as_the_whole_row(form, step):
    model = model_of(form).eval()
    model.set_step(step)
    ids = torch.randint(0, VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.logits(ids)
        caches = model.new_caches(2, 30)
        parts = [model.logits(part, caches) for part in ids.split((11, 1, 1, 5, 1, 11), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)


@by_form
def test_recall_and_loss_are_logged_in_both_stages(form):
    model, given = model_of(form).eval(), inputs()
    layers = [attention.layer_idx for attention in model.measured_attentions()]
    assert layers == ([1, 2] if form == "qsa" else [0, 1, 2])
    for step in (0, 4):
        model.set_step(step)
        with torch.no_grad():
            stats = model(given, ForwardRequest(measure_attention=True)).attention_stats
        found = attention_metrics(stats.double(), layers)
        assert set(found) == {
            *(f"attention/index_{name}" for name in ("loss", "recall", "recall/min")),
            *(f"attention/index_{n}/layer_{i}" for n in ("loss", "recall") for i in layers),
        }
        assert 0 < found["attention/index_recall/min"] < found["attention/index_recall"] < 1
        assert found["attention/index_loss"] > 0

    # An index that may choose everything recalls everything.
    everything = model_of(form, top_k=100).eval()
    with torch.no_grad():
        stats = everything(given, ForwardRequest(measure_attention=True)).attention_stats
    found = attention_metrics(stats.double(), layers)
    assert found["attention/index_recall"] == pytest.approx(1, abs=1e-6)


@by_form
def test_what_the_plan_counts_is_what_the_model_has(form):
    config = tiny_config()
    model = model_of(form)
    arguments = IndexedAttentionConfig(**FORMS[form]).arguments
    count = count_parameters(config, 2, arguments)
    assert count.total == sum(p.numel() for p in model.parameters())
    held = sum(
        t[:, 0].numel() * t.element_size()
        for cache in model.new_caches(1, 10)
        for t in (cache.keys, cache.values, getattr(cache, "index_keys", cache.keys[:, :, :0]))
    )
    assert cache_bytes_per_token(config, 4, arguments) == held

    # Long rows cost less than dense ones, the scores of an index growing with their length alone.
    wide = {
        **arguments,
        "dense_layers": (),
        "top_k": 64 // arguments["block_size"],
        "index_heads": 1,
        "rule": "qsa",
    }
    sparse, dense = (flops_per_token(config, 2, 4096, a) for a in (wide, None))
    assert sparse < 0.6 * dense
    twice = flops_per_token(config, 2, 8192, wide) - sparse
    assert 0 < twice < 0.3 * (flops_per_token(config, 2, 8192) - dense)


@by_form
def test_tokens_that_a_query_attends_to_are_counted(form):
    """Against the op itself, block by block of the query's own taken as half there."""
    from ops.index_attention import Index, group_means, group_starts
    from ops.index_attention.reference import reference_attention

    spec = IndexedAttentionConfig(**FORMS[form]).spec()
    length, bounds = 36, [0, 36]
    q, k = torch.randn(length, 2, 4), torch.randn(length, 2, 4)
    keys = torch.randn(length, 4)
    if spec.pools_keys:
        keys = group_means(keys, group_starts(bounds, spec.block_size), spec.block_size)
    weights = torch.randn(length, 2) if spec.rule == "dsa" else None
    index = Index(torch.randn(length, 2, 4), keys, weights)
    chosen = reference_attention(q, k, k, *index, bounds, spec).chosen
    mean = float(chosen[0].sum(1).float().mean()) - 0.5
    arguments = IndexedAttentionConfig(**FORMS[form]).arguments
    assert indexed_keys(length, arguments) == pytest.approx(mean, rel=0.06)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "dsa", "block_size": 4}, "attention.block_size is 4, but rule=dsa"),
        ({"index_coeff": 0.0}, "nothing would teach the index"),
        ({"rule": "msa", "block_size": 4, "index_heads": 3}, "set attention.index_heads=null"),
        ({"index_head_dim": 2}, "positions turn 4 dimensions"),
        ({"interval": 9}, "leave no sparse layer of 3"),
        ({"dense_layers": (7,)}, "names layer 7"),
        ({"top_k": 0}, "attention.top_k is 0"),
        ({"audit_rows": 2.0}, "between 0 and 1"),
        ({"dense_steps": -1}, "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, words):
    found = IndexedAttentionConfig(**{"index_heads": 2} | settings).problems(tiny_config())
    assert len(found) == 1 and words in found[0], found
