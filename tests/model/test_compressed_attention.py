"""Compressed attention in the model: against transformers' DeepSeek-V4, its stages, its caches,
what it learns and what it costs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import VOCAB_SIZE, batch, build, take, tiny_config
from torch import nn

from model.attention.base import STATS, SequenceLayout
from model.attention.compressed import CompressedAttention
from model.attention.config.compressed import CompressedAttentionConfig
from model.config import BalanceConfig, ModelConfig, RopeScaling
from model.cost.entries import entry_layers
from model.cost.matrices import hidden_matrices
from model.cost.memory import cache_bytes, cache_bytes_per_token
from model.cost.parameters import (
    closed_entries,
    compressed_keys,
    count_parameters,
    entry_cache_values,
    flops_per_token,
    live_cache_tokens,
    live_cache_values,
)
from model.layers import GatedMLP, rotary_tables
from model.loss import training_loss
from model.paging import live_window, new_pages
from model.request import ForwardRequest, TokenBatch
from train.observe.attention import attention_metrics

SMALL = dict(
    sliding_window=5,
    csa_ratio=3,
    hca_ratio=6,
    top_k=2,
    q_lora_rank=10,
    output_groups=2,
    o_lora_rank=6,
    rope_head_dim=4,
    index_heads=3,
    index_head_dim=6,
    dense_steps=4,
    audit_rows=0.5,
)
FORMS: dict[str, dict[str, Any]] = {
    "csa": SMALL,
    "mixed": SMALL | {"layer_kinds": ("window", "hca", "csa")},
    "shared": SMALL
    | dict(csa_ratio=2, late_csa_ratio=1, csa_overlap=False, slot_bias=False, top_k=3)
    | dict(entry_layers=3, index_layers=2, index_keys="projected")
    | dict(top_k_blocks=2, index_block_size=2),
}
"""shared, of five layers: the first one's entries of two tokens are read by the next two, of which
the second chooses anew; the last two have entries of single tokens and one choice.
"""
NUM_LAYERS = {"shared": 5}
SHAPE = dict(num_kv_heads=1, qk_norm="none")
by_form = pytest.mark.parametrize("form", FORMS)


def config_of(form: str, **changes: Any) -> ModelConfig:
    return tiny_config(**SHAPE, num_layers=NUM_LAYERS.get(form, 3), **changes)


def model_of(form: str, seed: int = 7, recompute: str = "none", **changes: Any):
    config = config_of(form, recompute=recompute)
    settings = CompressedAttentionConfig(**FORMS[form] | changes)
    assert settings.problems(config) == []
    model = build(config, BalanceConfig(), seed=seed, attention=settings)
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("slot_bias", "sinks")):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=gen))
    return model


def model_settings(form: str) -> CompressedAttentionConfig:
    return CompressedAttentionConfig(**FORMS[form])


def inputs(rows: int = 3, length: int = 48) -> TokenBatch:
    return take(batch(0, 0, rows, length), 0, rows)


def learned(model, given: TokenBatch, **options: Any):
    model.zero_grad()
    output = model(given, ForwardRequest(**options))
    training_loss(output, 10, 10, BalanceConfig()).backward()
    return output


# --- transformers' module -------------------------------------------------------------------------

HIDDEN, HEADS, DIM, LENGTH = 24, 4, 8, 29
KINDS = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
NAMES = {
    "q_a_proj.": "q_a_proj.",
    "q_a_norm.": "q_a_norm.",
    "q_b_proj.": "q_b_proj.",
    "kv_proj.": "kv_proj.",
    "kv_norm.": "kv_norm.",
    "output_groups.": "o_a_proj.",
    "o_proj.": "o_b_proj.",
    "sinks": "sinks",
    "compressor.norm.": "compressor.kv_norm.",
    "compressor.slot_bias": "compressor.position_bias",
    "compressor.": "compressor.",
    "indexer.q_proj.": "compressor.indexer.q_b_proj.",
    "indexer.weights_proj.": "compressor.indexer.scorer.weights_proj.",
    "indexer.compressor.norm.": "compressor.indexer.kv_norm.",
    "indexer.compressor.slot_bias": "compressor.indexer.position_bias",
    "indexer.compressor.": "compressor.indexer.",
}


def theirs_of(name: str) -> str:
    ours = max((prefix for prefix in NAMES if name.startswith(prefix)), key=len)
    return NAMES[ours] + name.removeprefix(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_transformers(kind):
    """Outputs and every gradient. Many index heads, since torch's choice among equal scores, which
    relu makes, is not ours.
    """
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    configs = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = configs.DeepseekV4Config(
        vocab_size=8,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        head_dim=DIM,
        q_lora_rank=10,
        layer_types=[KINDS[kind]],
        mlp_layer_types=["moe"],
        compress_rates={KINDS["csa"]: 4, KINDS["hca"]: 8},
        sliding_window=6,
        o_groups=2,
        o_lora_rank=6,
        index_n_heads=24,
        index_head_dim=6,
        index_topk=2,
        partial_rotary_factor=0.5,
        max_position_embeddings=64,
        rope_parameters=yarn,
    )
    config._attn_implementation = "eager"
    theirs = module.DeepseekV4Attention(config, 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * drawn + (parameter.dim() == 1))
    shape = ModelConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=1,
        head_dim=DIM,
        intermediate_size=8,
        num_experts=0,
        expert_intermediate_size=8,
        max_seq_len=64,
        norm_eps=1e-6,
        rope_scaling=RopeScaling(
            type="yarn", factor=4.0, original_max_seq_len=16, attention_factor=1.0
        ),
    )
    settings = CompressedAttentionConfig(
        layer_kinds=(kind,),
        sliding_window=6,
        csa_ratio=4,
        hca_ratio=8,
        top_k=2,
        q_lora_rank=10,
        output_groups=2,
        o_lora_rank=6,
        rope_head_dim=4,
        index_heads=24,
        index_head_dim=6,
    )
    mine = settings.build(shape)
    state = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            parameter.copy_(state.pop(theirs_of(name)).view_as(parameter))
    assert not state

    hidden = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None]
    rotary = module.DeepseekV4RotaryEmbedding(config)
    tables = {name: rotary(hidden, positions, name) for name in ("main", "compress")}
    at = torch.arange(LENGTH)
    seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - 6)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, -torch.inf)[None, None]
    ends = torch.tensor([0, LENGTH], dtype=torch.int32)
    layout = SequenceLayout(
        *rotary_tables(positions, 4, 10_000.0), ends, LENGTH, None, positions=positions
    )
    into = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = []
    for given in (hidden.clone().requires_grad_() for _ in range(2)):
        if not found:
            out = theirs(given, tables, positions, mask)[0]
        else:
            out = mine(given, layout)[0]
        out.backward(into)
        found.append((out, given.grad))
    scale = found[0][0].detach().abs().max()
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5 * max(1, scale)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5 * float(scale))
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        want = expected[theirs_of(name)].grad
        if "indexer" in name:  # theirs has no gradient through a choice, and no loss of the index
            assert want is None and not parameter.grad.any()
            continue
        want = want.view_as(parameter)
        bound = 1e-5 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=bound, msg=name)


def test_limited_mlps_are_those_of_transformers():
    """DeepSeek-V4's shared expert, with pre-activations beyond its limits; values and gradients."""
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    configs = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")
    config = configs.DeepseekV4Config(hidden_size=12, moe_intermediate_size=10)
    torch.manual_seed(0)
    theirs, mine = module.DeepseekV4MLP(config), GatedMLP(12, 10, "limited_swiglu")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=3.0)
        mine.gate_up.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
        mine.down.weight.copy_(theirs.down_proj.weight)
    hidden = torch.randn(20, 12)
    assert theirs.gate_proj(hidden).max() > 10 and theirs.up_proj(hidden).min() < -10
    into = torch.randn(20, 12)
    found = []
    for mlp in (theirs, mine):
        given = hidden.clone().requires_grad_()
        out = mlp(given)
        out.backward(into)
        found.append((out.detach(), given.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


# --- shared entries -------------------------------------------------------------------------------


def turned(x: torch.Tensor, position: int, back: bool = False) -> torch.Tensor:
    """The last four channels as two complex numbers, by their angles at a position."""
    pairs = torch.view_as_complex(x[..., -4:].unflatten(-1, (2, 2)).contiguous())
    angles = position * 160_000.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
    pairs = pairs * torch.polar(torch.ones_like(angles), -angles if back else angles)
    return torch.cat((x[..., :-4], torch.view_as_real(pairs).flatten(-2)), -1)


EPS = ModelConfig.__dataclass_fields__["norm_eps"].default


def normed(x: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def defined(layers: list[dict], hiddens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs [T, D] of the layers of `shared` for hidden states [T, D] each, token by token, by
    the published description alone; weights by name.
    """
    found, heads, size = [], 4, 4
    for number, (own, hidden) in enumerate(zip(layers, hiddens, strict=True)):
        source, ratio = (0, 2) if number < 3 else (3, 1)
        chooser = {0: 0, 1: 0, 2: 2, 3: 3, 4: 3}[number]

        # Entries of the source's windows, and their index keys.
        made, seen = layers[source], hiddens[source]
        latents, entries, keys = [], [], []
        for j in range(len(seen) // ratio):
            window = seen[j * ratio : (j + 1) * ratio]
            content = window @ made["compressor.kv_proj"].T
            shares = torch.ones_like(content)
            if ratio > 1:
                shares = (window @ made["compressor.gate_proj"].T).softmax(0)
            latents.append(normed((shares * content).sum(0), made["compressor.norm"]))
            entries.append(turned(latents[j], j * ratio))
            key = latents[j].detach() @ made["indexer.key_proj"].T
            keys.append(turned(normed(key, made["indexer.key_norm"]), j * ratio))

        index, theirs, outs = layers[chooser], hiddens[chooser], []
        for t in range(len(hidden)):
            latent = normed(theirs[t] @ index["q_a_proj"].T, index["q_a_norm"])
            queries = turned((latent @ index["indexer.q_proj"].T).view(3, 6), t)
            weights = theirs[t] @ index["indexer.weights_proj"].T
            closed = (t + 1) // ratio
            scores = [(weights @ (queries @ keys[j]).relu()).item() for j in range(closed)]
            blocks = [range(j, min(j + 2, closed)) for j in range(0, closed, 2)]
            blocks.sort(key=lambda b, s=scores: (-max(s[j] for j in b), b[0]))
            opened = [j for block in blocks[:2] for j in block]
            best = sorted(opened, key=lambda j, s=scores: (-s[j], j))[:3]

            latent = normed(hidden[t] @ own["q_a_proj"].T, own["q_a_norm"])
            q = turned(normed((latent @ own["q_b_proj"].T).view(heads, size), 1.0), t)
            columns = [entries[j] for j in best]
            for s in range(max(0, t - 4), t + 1):
                columns.append(turned(normed(hidden[s] @ own["kv_proj"].T, own["kv_norm"]), s))
            of = torch.stack(columns)
            logits = torch.cat((q @ of.T / size**0.5, own["sinks"][:, None]), 1)
            out = turned(logits.softmax(1)[:, :-1] @ of, t, back=True)
            groups = out.view(2, -1)
            between = own["output_groups"].view(2, -1, groups.shape[1])
            outs.append(torch.einsum("gi,goi->go", groups, between).flatten() @ own["o_proj"].T)
        found.append(torch.stack(outs))
    return found


def test_layers_read_the_entries_and_the_choice_of_earlier_ones():
    """Against the definition, written down anew: values, and gradients of what readers read."""
    model = model_of("shared").double().eval()
    layers = [block.attention for block in model.blocks]
    generator = torch.Generator().manual_seed(11)
    hiddens = [
        torch.randn(13, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in layers
    ]
    ends = torch.tensor([0, 13], dtype=torch.int32)
    layout = model.layout(torch.arange(13)[None], ends, 13)
    found = [layer(x.unsqueeze(0), layout)[0][0] for layer, x in zip(layers, hiddens, strict=True)]
    weights = [
        {name.removesuffix(".weight"): p for name, p in layer.named_parameters()}
        for layer in layers
    ]
    want = defined(weights, hiddens)
    into = [torch.randn_like(x) for x in want]
    wrt = [*hiddens, *(p for layer in layers for p in layer.parameters())]
    grads = []
    for outs in (found, want):
        total = sum((a * b).sum() for a, b in zip(outs, into, strict=True))
        grads.append(torch.autograd.grad(total, wrt, materialize_grads=True, allow_unused=True))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    # Who reads has no weights of entries, and who follows none of an index.
    names = [{name.partition(".")[0] for name in own} for own in weights]
    assert ["compressor" in own for own in names] == [True, False, False, True, False]
    assert ["indexer" in own for own in names] == [True, False, True, True, False]


def test_layers_that_choose_as_one_teach_as_a_mean():
    """Of the divergences that are logged, by layers that follow as well."""
    model = model_of("shared", index_coeff=3.0)
    hidden, ends = torch.randn(1, 20, 16), torch.tensor([0, 20], dtype=torch.int32)
    layout = model.layout(torch.arange(20)[None], ends, 20, measure=True)
    for block, number in zip(model.blocks, (2, 2, 1, 2, 2), strict=True):
        sums = block.attention(hidden, layout)[1]
        loss = sums.stats[STATS.index("index_loss")]
        assert loss > 0
        torch.testing.assert_close(sums.penalty_sum, 3 * loss / number)


def test_what_shares_nothing_is_csa_without_overlap_and_biases():
    """To the last bit: biases of zero, one ratio named twice, and layers that all begin anew."""
    ids = torch.randint(0, VOCAB_SIZE, (2, 29), generator=torch.Generator().manual_seed(1))
    plain, named = (
        model_of("csa", csa_overlap=False),
        model_of(
            "csa",
            csa_overlap=False,
            slot_bias=False,
            late_csa_ratio=3,
            entry_layers=(0, 1, 2),
            index_layers=(0, 1, 2),
        ),
    )
    state = {
        n: torch.zeros_like(p) if "slot_bias" in n else p for n, p in plain.state_dict().items()
    }
    plain.load_state_dict(state)
    named.load_state_dict({n: p for n, p in state.items() if "slot_bias" not in n})
    with torch.no_grad():
        assert torch.equal(plain.eval().logits(ids), named.eval().logits(ids))


def test_the_cache_of_the_published_shape_is_what_is_published_of_it():
    """DeepSeek-V4.1-Flash by third parties: 40 layers, of which 2, 8, 14 and 20 make entries, of
    two tokens below layer 20; 890 bytes a token in 4 bits, with a scale for 16 values of entries
    and 32 of index keys.
    """
    chosen = (2, 8, 14, 20, 24, 28, 32, 36)
    settings = CompressedAttentionConfig(
        layer_kinds=("window",) * 2 + ("csa",) * 38,
        csa_ratio=2,
        late_csa_ratio=1,
        csa_overlap=False,
        slot_bias=False,
        entry_layers=(2, 8, 14, 20),
        index_layers=chosen,
        index_keys="projected",
        index_heads=32,
        top_k_blocks=2048,
    )
    config = tiny_config(**SHAPE, num_layers=40, num_heads=64, head_dim=512, hidden_size=5120)
    assert settings.problems(config) == []
    layers = settings.layers(config)
    assert tuple(layer.number for layer in layers if layer.chooses) == chosen
    assert [layer.maker for layer in layers[:9]] == [None, None, 2, 2, 2, 2, 2, 2, 8]
    assert [layer.ratio for layer in layers[18:22]] == [2, 2, 1, 1]
    assert entry_cache_values(config, settings.arguments) == 2.5 * (512 + 128)
    assert 2.5 * (512 * (4 + 8 / 16) + 128 * (4 + 8 / 32)) / 8 == 890


# --- in the model ---------------------------------------------------------------------------------


@by_form
def test_the_index_learns_by_its_own_loss_alone_and_everything_else_by_the_other(form):
    given = inputs()
    for step in (0, 4):
        model = model_of(form)
        model.set_step(step)
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
            assert bool(by_loss[name].any()) != is_index or ".mlp." in name, name
    twice = model_of(form, index_coeff=2.0)(given)
    torch.testing.assert_close(twice.penalty_sum, 2 * output.penalty_sum)


@pytest.mark.parametrize("form", ["mixed", "shared"])
@pytest.mark.parametrize("step", [0, 4])
def test_recomputing_blocks_changes_no_gradient(form, step):
    """Also where a layer's entries and choice have gone to later ones."""
    given = inputs()
    kept, again = model_of(form), model_of(form, recompute="block")
    for model, times in ((kept, 1), (again, 2)):
        model.set_step(step)
        calls: list[str] = []
        for name, module in model.named_modules():
            if name.endswith(".q_a_proj"):
                module.register_forward_hook(lambda *_, to=calls, of=name: to.append(of))
        learned(model, given)
        # Once more each, whatever the number of tiles that taught an index.
        assert len(calls) == times * len({*calls}) == times * len(model.blocks)
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        bound = 5e-6 * max(float(a.grad.abs().max()), 0.02)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=bound, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("form", ["mixed", "shared"])
def test_documents_and_later_tokens_reach_nothing(form):
    """Bit for bit, in a packed row: entries are of closed windows of one document."""
    model = model_of(form).eval()
    hidden = torch.randn(1, 40, model.config.hidden_size)
    positions = torch.cat((torch.arange(19), torch.arange(21)))[None]
    ends = torch.tensor([0, 19, 40], dtype=torch.int32)

    def outs(of: torch.Tensor) -> list[torch.Tensor]:
        layout = model.layout(positions, ends, 21)
        return [block.attention(of, layout)[0][0] for block in model.blocks]

    base = outs(hidden)
    for at, same in ((5, slice(19, 40)), (30, slice(0, 30)), (19, slice(0, 19))):
        other = hidden.clone()
        other[0, at] += 1
        for before, found in zip(base, outs(other), strict=True):
            assert torch.equal(found[same], before[same]) and not torch.equal(found, before)


@by_form
@pytest.mark.parametrize("step", [0, 4])
def test_a_cache_continues_as_the_whole_row(form, step):
    model = model_of(form).eval()
    model.set_step(step)
    ids = torch.randint(0, VOCAB_SIZE, (2, 37), generator=torch.Generator().manual_seed(1))
    for parts in ((11, 1, 1, 5, 1, 18), (1, 1, 3, 2, 13, 1, 16)):
        with torch.no_grad():
            want = model.logits(ids)
            caches = model.new_caches(2, 37)
            found = [model.logits(part, caches) for part in ids.split(parts, 1)]
        torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-4, atol=1e-5)
    assert caches[2].kv.shape[1] == 4 and caches[2].rows.shape[1] < 6
    if form == "shared":
        # Bytes of entries and keys are there once, by who made them.
        assert [cache.entries.shape[1] for cache in caches] == [18, 0, 0, 37, 0]
        held = sum(c.entries.numel() + c.index_keys.numel() for c in caches) / 2
        values = entry_cache_values(model.config, model_settings(form).arguments)
        assert held == pytest.approx(37 * values, rel=0.02)


@by_form
def test_recall_and_loss_are_logged_in_both_stages(form):
    model, given = model_of(form).eval(), inputs()
    layers = [attention.layer_idx for attention in model.measured_attentions()]
    assert layers == {"mixed": [2], "csa": [0, 1, 2], "shared": [0, 1, 2, 3, 4]}[form]
    for step in (0, 4):
        model.set_step(step)
        with torch.no_grad():
            stats = model(given, ForwardRequest(measure_attention=True)).attention_stats
        found = attention_metrics(stats.double(), layers)
        assert 0 < found["attention/index_recall/min"] < 1
        assert found["attention/index_loss"] > 0
    everything = model_of(form, top_k=100, top_k_blocks=None).eval()
    with torch.no_grad():
        stats = everything(given, ForwardRequest(measure_attention=True)).attention_stats
    found = attention_metrics(stats.double(), layers)
    assert found["attention/index_recall"] == pytest.approx(1, abs=1e-6)


def test_padding_counts_nowhere():
    model, short = model_of("csa"), inputs(length=32)
    assert short.token_mask is not None and not short.token_mask.all()
    found = model(short, ForwardRequest(measure_attention=True))
    noise = torch.where(short.token_mask, short.input_ids, (short.input_ids + 3) % VOCAB_SIZE)
    other = model(short._replace(input_ids=noise), ForwardRequest(measure_attention=True))
    torch.testing.assert_close(found.penalty_sum, other.penalty_sum)
    torch.testing.assert_close(found.attention_stats, other.attention_stats)


@by_form
def test_what_the_plan_counts_is_what_the_model_has(form):
    config, model = config_of(form), model_of(form)
    arguments = CompressedAttentionConfig(**FORMS[form]).arguments
    count = count_parameters(config, 2, arguments)
    assert count.total == sum(p.numel() for p in model.parameters())
    there = {tuple(p.shape) for name, p in model.named_parameters() if ".attention." in name}
    planned = hidden_matrices(config, arguments)
    counted = {m for m in planned if m.kind in ("attention", "indexer")}
    assert {(m.rows, m.columns) for m in counted} <= there
    pools = new_pages(model, 7, 12)
    pooled, own = (
        sum(t[0].numel() for p in pools for t in tensors(p))
        for tensors in (lambda p: p.tensors()[2:], lambda p: p.tensors()[:2])
    )
    assert cache_bytes_per_token(config, 4, arguments) * 12 == 4 * pooled
    assert live_cache_values(config, arguments) * 12 == own
    assert live_cache_tokens(config, arguments) == live_window(model)
    # The last tokens of a row have room for their own, all others their share of entries.
    for length, live in ((5, 5), (60, live_window(model) + 1)):
        whole = length * cache_bytes_per_token(config, 4, arguments)
        whole += 4 * live * live_cache_values(config, arguments)
        assert cache_bytes(config, 4, length, arguments) == whole

    # Against what the masks of the op let through.
    kinds = {"layer_kinds": ("csa", "hca", "window"), "csa_ratio": 3, "top_k": 2}
    every = entry_layers(3, arguments | kinds | {"late_csa_ratio": None})
    arguments |= {"top_k": 2}
    for layer, (ratio, most) in zip(every, ((3, 2), (6, 99), (99, 0)), strict=True):
        seen = [min(t, 5) + min(t // ratio, most) for t in range(1, 38)]
        found = compressed_keys(37, arguments, layer)
        assert found == pytest.approx(sum(seen) / 37 - 0.5)
    assert closed_entries(37, 3) == pytest.approx(sum(t // 3 for t in range(1, 38)) / 37)

    # Long rows cost far less than dense ones, the scores of an index growing with them alone.
    wide = {**arguments, "index_heads": 1, "sliding_window": 64}
    sparse, dense = (flops_per_token(config, 2, 4096, a) for a in (wide, None))
    assert sparse < 0.5 * dense


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        ({}, {"num_kv_heads": 2}, "set model.num_kv_heads=1"),
        ({}, {"qk_norm": "head"}, "set model.qk_norm=none"),
        ({}, {"num_mtp_layers": 1}, "set model.num_mtp_layers=0"),
        ({}, {"rotary_dim": 4}, "set model.rotary_dim=null"),
        ({"output_groups": 3}, {}, "does not divide model.num_heads"),
        ({"rope_head_dim": 5}, {}, "must be even"),
        ({"index_head_dim": 2}, {}, "positions turn attention.rope_head_dim 4"),
        ({"index_coeff": 0.0}, {}, "nothing would teach the index"),
        ({"layer_kinds": ("csa",)}, {}, "names 1 layers, but the model has 3"),
        ({"layer_kinds": ("csa", "csa", "mla")}, {}, "has mla; choose csa, hca or window"),
        ({"top_k": 0}, {}, "attention.top_k is 0"),
        ({"audit_rows": 2.0}, {}, "between 0 and 1"),
        ({"dense_steps": -1}, {}, "must not be negative"),
        ({"late_csa_ratio": 0}, {}, "attention.late_csa_ratio is 0"),
        ({"entry_layers": 0}, {}, "attention.entry_layers is 0"),
        ({"index_layers": (0, 3)}, {}, "attention.index_layers names layer 3"),
        ({"entry_layers": (1,)}, {}, "does not name layer 0, before which no layer makes"),
        (
            {"entry_layers": (0,), "late_csa_ratio": 1},
            {},
            "does not name layer 2, before which no layer makes entries of 1 tokens",
        ),
        (
            {"entry_layers": (0, 2), "index_layers": (0, 1)},
            {},
            "index_layers [0, 1] does not name layer 2, whose entries",
        ),
        ({"top_k_blocks": 1, "index_block_size": 1}, {}, "are fewer entries than attention.top_k"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, shape, words):
    config = tiny_config(**SHAPE | shape)
    found = CompressedAttentionConfig(**SMALL | settings).problems(config)
    assert len(found) == 1 and words in found[0], found


def test_ranks_do_not_share_its_heads():
    settings, config = CompressedAttentionConfig(**SMALL), tiny_config(**SHAPE)
    for found in (settings.context_problems(config, 2), settings.tensor_problems(config, 2, 1)):
        assert len(found) == 1 and "one head of keys for all" in found[0]


def test_new_tokens_take_no_gradient_and_a_foreign_cache_is_refused():
    model = model_of("csa").eval()
    attention = model.blocks[0].attention
    assert isinstance(attention, CompressedAttention) and isinstance(attention, nn.Module)
    dense = build(tiny_config(), BalanceConfig())
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="no entries"):
        model.logits(ids, dense.new_caches(1, 5))
