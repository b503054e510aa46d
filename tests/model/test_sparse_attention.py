"""Sparse attention in the model: limits, packing, stages, caches, what it reports and what it
refuses.
"""

from __future__ import annotations

import pytest
import torch
from common import VOCAB_SIZE, batch, build, take, tiny_config

from model.attention.base import STATS
from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig
from model.cost.parameters import count_parameters, flops_per_token, keys_per_query
from model.generate import generate
from model.loss import training_loss
from model.request import ForwardRequest, TokenBatch
from ops.sparse_attention import SparseAttentionSpec, sparse_attention
from ops.sparse_attention.reference import reference_attention, reference_blocks
from train.observe.attention import attention_metrics, short_rows_note

SMALL = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4, "audit_rows": 0.5}
LEARNED = {**SMALL, "offset": True, "trust": True, "sink": True, "entries": "gated"}
GATED = {**SMALL, "merge": "gated"}
FORMS = {
    "scc": SMALL,
    "drop": {**SMALL, "tail": "drop"},
    "learned": LEARNED,
    "gated": GATED,
    "one pass": {**SMALL, "rank_lse": "super", "fanout": 2},
    "two levels": {**SMALL, "num_levels": 2, "fanout": 2, "num_expanded": 1},
    "max": {**SMALL, "score": "max", "order": 0},
    "covering": {**SMALL, "top_p": 0.7},
    "window": {**SMALL, "top_k": 0, "num_sink_blocks": 0, "tail": "drop"},
    "pattern": {**SMALL, "dense_layers": (0,), "min_sparse_length": 12},
    "index": {**LEARNED, "select": "index", "index_head_dim": 6},
    "resident": {**LEARNED, "resident_blocks": 1, "resident_interval": 8},
    "followed": {**SMALL, "select": "index", "index_layers": 2, "min_sparse_length": 12},
}
LENGTH = 48


def model_of(attention: dict | None, seed: int = 7, **changes):
    model = build(tiny_config(**changes), BalanceConfig(), seed=seed, attention=attention)
    gen = torch.Generator().manual_seed(3)
    # move the learned corrections away from where they do nothing
    with torch.no_grad():
        for layer in model.sparse_attentions():
            for name, parameter in layer.named_parameters():
                if name.split(".")[0] in ("offset", "sink", "trust", "gates", "entry_weights"):
                    parameter.add_(0.5 * torch.randn(parameter.shape, generator=gen))
    return model


def inputs(rows: int = 3, step: int = 0, length: int = LENGTH) -> TokenBatch:
    return take(batch(step, 0, rows, length), 0, rows)


def loss_of(model, given: TokenBatch, **options):
    output = model(given, ForwardRequest(**options))
    return training_loss(output, 10, 10, BalanceConfig()), output


def gradients(model, given: TokenBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, _ = loss_of(model, given)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_with_every_block_selected_the_model_is_the_dense_one():
    dense, sparse = model_of(None), model_of({**SMALL, "top_k": 1000})
    sparse.load_state_dict(dense.state_dict())  # a dense checkpoint loads as it is
    given = inputs()
    ours, expected = gradients(sparse, given), gradients(dense, given)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6)


def test_sparse_layers_follow_interval_and_dense_layers():
    def sparse_layers(**pattern):
        return [
            layer.layer_idx
            for layer in model_of({**SMALL, **pattern}, num_layers=6).sparse_attentions()
        ]

    assert sparse_layers() == [0, 1, 2, 3, 4, 5]
    assert sparse_layers(interval=2) == [1, 3, 5]
    assert sparse_layers(interval=3, dense_layers=(-1,)) == [2]
    assert sparse_layers(dense_layers=(0, -1)) == [1, 2, 3, 4]


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_do_not_see_each_other(form):
    model = model_of(FORMS[form]).eval()
    gen = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, VOCAB_SIZE, (1, n), generator=gen) for n in (29, 1, 18)]
    alone = torch.cat([model.logits(x)[0] for x in documents])
    hidden = {}
    hook = model.head.register_forward_hook(lambda m, i, o: hidden.update(logits=o))
    row = torch.cat(documents, 1)
    cu_seqlens = torch.tensor([0, 29, 30, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (29, 1, 18)]).unsqueeze(0)
    model(TokenBatch(row, row, positions, cu_seqlens, 29))
    hook.remove()
    torch.testing.assert_close(hidden["logits"][0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_decoding_gives_the_logits_of_the_whole_sequence(form):
    model = model_of(FORMS[form]).eval()
    ids = torch.randint(0, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model.logits(ids)
        caches = model.new_caches(2, 32)
        pieces, at = [], 0
        for step in (7, 1, 1, 5, *[1] * 18):  # a prompt, single tokens, several at once
            pieces.append(model.logits(ids[:, at : at + step], caches))
            at += step
    assert at == 32
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_generation_does_not_depend_on_the_cache():
    model = model_of(LEARNED, max_seq_len=40)
    text, expected = list(generate(model, [5, 9, 2], 30, temperature=0)), [5, 9, 2]
    for _ in range(30):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert text == expected[3:]


@pytest.mark.parametrize("form", ["scc", "learned", "gated", "two levels"])
def test_recomputation_draws_the_same_noise(form):
    attention = {**FORMS[form], "noise_steps": 10, "min_top_k": 0, "temperature": 3.0}
    kept, again = model_of(attention), model_of(attention, recompute="block")
    again.load_state_dict(kept.state_dict())
    for model in (kept, again):
        model.set_step(2)
    ours, expected = gradients(again, inputs()), gradients(kept, inputs())
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_stages_are_dense_then_noisy_then_plain():
    attention = {**SMALL, "dense_steps": 2, "noise_steps": 4, "temperature": 4.0, "min_top_k": 0}
    model, dense, plain = model_of(attention), model_of(None), model_of(SMALL)
    for other in (dense, plain):
        other.load_state_dict(model.state_dict())
    given = inputs()

    def loss(which, step=None, training=True):
        which.train(training)
        if step is not None:
            which.set_step(step)
        return loss_of(which, given)[0].item()

    assert loss(model) == loss(plain), "without a trainer a model is in its last stage"
    assert loss(model, 0) == loss(model, 1) == loss(dense)
    noisy = [loss(model, step) for step in (2, 3, 4, 5)]
    assert len(set(noisy)) > 1 and loss(plain) not in noisy
    assert loss(model, 3) == noisy[1], "the draw belongs to the tokens, not to the call"
    assert loss(model, 3, training=False) == loss(plain, training=False)
    assert loss(model, 6) == loss(plain)


def test_in_the_dense_stage_every_parameter_has_a_gradient():
    for attention in (LEARNED, GATED):
        model = model_of({**attention, "dense_steps": 5})
        model.set_step(0)
        assert all(grad is not None for grad in gradients(model, inputs()).values())


@pytest.mark.parametrize("measure", [False, True])
def test_noise_statistics_and_penalties_add_up_over_any_split(measure):
    attention = {
        **LEARNED,
        "noise_steps": 4,
        "min_top_k": 1,
        "mass_kl_coeff": 0.3,
        "coherence_coeff": 0.2,
        "alignment_coeff": 0.1,
    }
    model = model_of(attention)
    model.set_step(1)
    full = batch(0, 0, 4, LENGTH)
    whole = model(take(full, 0, 4), ForwardRequest(measure_attention=measure))
    parts = [
        model(take(full, a, b), ForwardRequest(measure_attention=measure))
        for a, b in ((0, 1), (1, 4))
    ]
    torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        sum(p.penalty_sum for p in parts), whole.penalty_sum, rtol=1e-4, atol=1e-6
    )
    assert float(whole.penalty_sum) > 0
    # tiles follow the batch
    exact = [i for i, name in enumerate(STATS) if name not in ("union_blocks", "tile_blocks")]
    torch.testing.assert_close(
        sum(p.attention_stats for p in parts)[:, exact],
        whole.attention_stats[:, exact],
        rtol=1e-4,
        atol=1e-5,
    )
    assert bool(whole.attention_stats.any()) == measure


def test_padding_is_not_measured():
    model = model_of(SMALL)
    given = inputs()
    heads = model.config.num_heads
    stats = model(given, ForwardRequest(measure_attention=True)).attention_stats
    assert stats[0, STATS.index("queries")] == int(given.token_mask.sum()) * heads
    assert 0 < stats[0, STATS.index("audited")] < int(given.token_mask.sum()) * heads


def test_regularisers_change_the_gradients_and_evaluation_leaves_them_out():
    plain, regular = model_of(SMALL), model_of({**SMALL, "mass_kl_coeff": 1.0})
    regular.load_state_dict(plain.state_dict())
    ours, expected = gradients(regular, inputs()), gradients(plain, inputs())
    moved = [
        name
        for name in expected
        if not torch.allclose(ours[name], expected[name], rtol=1e-3, atol=1e-7)
    ]
    assert any("q_proj" in name for name in moved) and any("k_proj" in name for name in moved)
    assert float(regular.eval()(inputs()).penalty_sum) == 0.0


def test_following_the_mass_penalty_brings_estimated_and_true_masses_together():
    model = model_of({**SMALL, "mass_kl_coeff": 1.0, "audit_rows": 1.0}, init_std=0.6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(15):
        output = model(inputs())
        values.append(float(output.penalty_sum.detach()))
        optimizer.zero_grad()
        output.penalty_sum.backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0], values


def test_metrics_say_what_the_sums_mean():
    model = model_of({**SMALL, "audit_rows": 1.0})
    layers = [layer.layer_idx for layer in model.sparse_attentions()]
    output = model(inputs(), ForwardRequest(measure_attention=True))
    found = attention_metrics(output.attention_stats.double(), layers)
    stats = dict(zip(STATS, output.attention_stats.double().T, strict=True))
    assert found["attention/tail_mass"] == pytest.approx(
        float((stats["tail_mass"] / stats["queries"]).mean())
    )
    assert 0 < found["attention/tail_mass"] < 1 and 0 < found["attention/selected_mass"] < 1
    assert found["attention/error"] < found["attention/error_bound"] <= 1
    assert found["attention/error"] <= found["attention/error/max"]
    assert found["attention/bound_violations"] == 0
    assert 1 <= found["attention/union_factor"] <= 16
    assert {f"attention/tail_mass/layer_{i}" for i in layers} <= set(found)
    assert (
        attention_metrics(torch.zeros(len(layers), len(STATS), dtype=torch.float64), layers) == {}
    )
    assert attention_metrics(torch.zeros(0, len(STATS), dtype=torch.float64), []) == {}


def test_rows_that_nothing_is_left_out_of_are_pointed_out():
    layers = model_of(SMALL).sparse_attentions()
    longest = layers[0].spec.dense_length
    note = short_rows_note(layers, longest)
    assert "attention=dense" in note and f"rows of {longest} tokens" in note
    assert short_rows_note(layers, longest + 1) is None and short_rows_note([], 1) is None
    q, k = torch.randn(longest + 8, 2, 8), torch.randn(longest + 8, 1, 8)
    tail = sparse_attention(q, k, k, torch.tensor([0, longest + 8]), layers[0].spec).tail_mass
    assert not tail[:longest].any() and tail[-1].all()


def test_a_dense_model_reports_no_sparse_layer():
    output = model_of(None)(inputs(), ForwardRequest(measure_attention=True))
    assert output.attention_stats.shape == (0, len(STATS))


def read_for_ranking(own: int, spec: SparseAttentionSpec) -> int:
    """Entries and super-blocks that a query in block `own` reads."""
    if spec.rank_lse == "exact":
        return own * spec.entries_per_block
    candidates = set(range(spec.num_sink_blocks, own - spec.num_local_blocks + 1))
    alone = candidates | set(range(own // spec.fanout * spec.fanout, own))
    return len(alone) * spec.entries_per_block + own // spec.fanout


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"order": 0},
        {"tail": "drop"},
        {"top_k": 0},
        {"min_sparse_length": 16},
        {"num_sink_blocks": 3, "coarse_block_size": 4},
        {"rank_lse": "super", "fanout": 3},
    ],
    ids=str,
)
def test_flops_count_the_keys_that_queries_see(changes):
    spec = SparseAttentionSpec(
        **{"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4, **changes}
    )
    length = 61
    # equal logits: probabilities count keys
    q, k = torch.zeros(length, 1, 8), torch.zeros(length, 1, 8)
    found = reference_attention(q, k, k, torch.tensor([0, length]), spec)
    exact = float((found.token_probs > 0).sum()) / length
    entries = float((found.entry_probs > 0).sum()) / length
    blocks = reference_blocks(torch.tensor([0, length]), 4)
    ranked = (
        sum(
            read_for_ranking(int(own), spec)
            for own in blocks.of_token
            if spec.top_k
            and int(own) > min(int(own), spec.num_local_blocks - 1 + spec.num_sink_blocks)
            and int(own) * 4 >= spec.min_sparse_length
        )
        / length
    )
    order = 1 if spec.order == 2 else 0
    expected = exact + entries * (1 + order / 2) + ranked * (1 + order) / 6
    assert keys_per_query(length, vars(spec)) == pytest.approx(expected)


@pytest.mark.parametrize("attention", [SMALL, LEARNED, GATED, {**LEARNED, "interval": 2}])
def test_learned_corrections_are_counted(attention):
    model = model_of(attention)
    assert count_parameters(model.config, 2, attention).total == sum(
        p.numel() for p in model.parameters()
    )


def test_flops_of_a_pattern_are_those_of_its_layers():
    config, length = tiny_config(), 48
    arguments = {
        **vars(SparseAttentionSpec(**{k: v for k, v in SMALL.items() if k != "audit_rows"})),
        "dense_layers": (1,),
    }
    dense, sparse = (
        flops_per_token(config, 2, length),
        flops_per_token(config, 2, length, arguments),
    )
    saved = 2 * (length / 2 - keys_per_query(length, arguments))
    assert dense - sparse == pytest.approx(
        12 * config.num_heads * config.attention_head_dim * saved
    )


def test_entries_that_have_learned_nothing_are_means_to_the_last_bit():
    """So a checkpoint of a run without them goes on in one with them."""
    plain = build(tiny_config(), BalanceConfig(), attention=SMALL)
    gated = build(tiny_config(), BalanceConfig(), attention={**SMALL, "entries": "gated"})
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[-1] for name in missing} == {"entry_weights"}
    (loss, _), (expected, _) = (loss_of(model, inputs()) for model in (gated, plain))
    assert torch.equal(loss, expected)
    grads = gradients(gated, inputs())
    assert all(g.any() for name, g in grads.items() if name.endswith("entry_weights"))


WRONG = [
    (
        {"block_size": 6, "coarse_block_size": 4},
        "block_size 6 is not divisible by coarse_block_size 4",
    ),
    ({"top_k": -1}, "top_k is -1"),
    ({"order": 1}, "order is 1"),
    ({"score": "best"}, "score is 'best'"),
    ({"max_variance": float("inf")}, "max_variance is inf"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_p": 0.5, "score": "max"}, "score=max"),
    ({"score": "error_gain", "order": 0}, "order=2"),
    ({"num_levels": 2, "tail": "drop"}, "tail=coarse"),
    ({"interval": 0}, "interval is 0"),
    ({"interval": 4}, "leave no sparse layer"),
    ({"dense_layers": (5,)}, "layer 5"),
    ({"dense_layers": (0, 1, 2)}, "leave no sparse layer"),
    ({"dense_steps": -1}, "dense_steps is -1"),
    ({"noise_steps": -2}, "noise_steps is -2"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"min_top_k": 99, "noise_steps": 3}, "min_top_k is 99"),
    ({"min_top_k": 1}, "noise_steps is 0"),
    ({"mass_kl_coeff": -0.1}, "mass_kl_coeff is -0.1"),
    ({"audit_rows": 2.0}, "audit_rows is 2"),
    ({"audit_rows": 0.0, "alignment_coeff": 0.1}, "audit_rows is 0"),
    ({"merge": "gated", "sink": True}, "sink"),
    ({"merge": "gated", "coherence_coeff": 0.1}, "merge=gated"),
    ({"tail": "drop", "offset": True}, "offset"),
    ({"merge": "gated", "num_levels": 2}, "num_levels"),
    ({"entries": "gated", "num_levels": 2}, "set attention.num_levels=1"),
    ({"entries": "gated", "merge": "gated"}, "set attention.merge=lse"),
    ({"entries": "gated", "tail": "drop"}, "set attention.tail=coarse"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG, ids=str)
def test_contradictions_are_named(arguments, text):
    assert any(
        text in problem for problem in SparseAttentionConfig(**arguments).problems(tiny_config())
    )


@pytest.mark.parametrize("form", FORMS)
def test_sound_settings_pass(form):
    assert SparseAttentionConfig(**FORMS[form]).problems(tiny_config()) == []


def test_values_narrower_than_keys_are_refused_with_the_way_out():
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    with pytest.raises(ValueError, match="attention=dense"):
        sparse_attention(q, k, k[..., :8], torch.tensor([0, 8]), SparseAttentionSpec())


def test_a_cache_without_entries_is_refused():
    model = model_of(SMALL).eval()
    caches = model_of(None).new_caches(1, 20)
    model.logits(torch.zeros(1, 4, dtype=torch.int64), caches)
    with pytest.raises(TypeError, match="new_caches"):
        model.logits(torch.zeros(1, 1, dtype=torch.int64), caches)
