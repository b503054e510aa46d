"""An index inside sparse attention, in the model: what it learns by, who follows it, what it costs
and what it is refused with.
"""

from __future__ import annotations

import pytest
import torch
from common import VOCAB_SIZE, batch, build, take, tiny_config

from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig
from model.cost.memory import cache_bytes_per_token
from model.cost.parameters import count_parameters, flops_per_token, keys_per_query
from model.loss import training_loss
from model.request import ForwardRequest, TokenBatch
from train.observe.attention import attention_metrics

SMALL = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4, "audit_rows": 0.5}
INDEX = {**SMALL, "select": "index", "index_head_dim": 6}
FOLLOWED = {**INDEX, "index_layers": 2}


def model_of(attention: dict | None, **changes):
    return build(tiny_config(**changes), BalanceConfig(), seed=7, attention=attention)


def inputs(length: int = 48) -> TokenBatch:
    return take(batch(0, 0, 3, length), 0, 3)


def grads_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("attention", [INDEX, FOLLOWED], ids=["own", "followed"])
def test_the_index_learns_by_its_own_loss_alone(attention):
    """No gradient of the language model reaches it, and none of its own reaches anything else."""
    model, given = model_of(attention), inputs()
    output = model(given)
    by_loss, by_penalty = (grads_of(model, x) for x in (output.loss_sum, output.penalty_sum))
    owners = (0, 2) if attention is FOLLOWED else (0, 1, 2)
    assert sum(".attention.indexer." in name for name in by_loss) == 4 * len(owners)
    for name, grad in by_penalty.items():
        is_index = ".attention.indexer." in name
        assert bool(grad.any()) == is_index, name
        assert not (is_index and by_loss[name].any()), name
    twice = model_of({**attention, "index_coeff": 2.0})(given)
    torch.testing.assert_close(twice.penalty_sum, 2 * output.penalty_sum)


def test_layers_that_choose_as_one_teach_as_a_mean():
    """One layer's index is the other's choice, and both divergences reach it by halves."""
    model = model_of(FOLLOWED).eval()
    with torch.no_grad():
        stats = model(inputs(), ForwardRequest(measure_attention=True))
    loss = dict(zip(("a", "b", "c"), stats.attention_stats[:, 15].tolist(), strict=True))
    expected = (loss["a"] + loss["b"]) / 2 + loss["c"]
    assert float(stats.penalty_sum) == pytest.approx(expected, rel=1e-5)
    chosen = [layer.index_owner for layer in model.sparse_attentions()]
    assert chosen == [0, 0, 2]


@pytest.mark.parametrize("attention", [INDEX, FOLLOWED], ids=["own", "followed"])
def test_recomputing_blocks_changes_no_gradient(attention):
    found = []
    for recompute in ("none", "block"):
        model = model_of(attention, recompute=recompute)
        loss = training_loss(model(inputs()), 10, 10, BalanceConfig())
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_trained_model_converts_and_selects_by_mass_until_the_index_has_learned():
    given = inputs()
    plain, model = model_of(SMALL), model_of({**INDEX, "index_steps": 3})
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".attention.indexer." in name for name in missing.missing_keys)
    model.set_step(2)
    theirs, own = plain(given), model(given)
    assert torch.equal(own.loss_sum, theirs.loss_sum)
    assert own.penalty_sum > theirs.penalty_sum
    by_penalty = grads_of(model, own.penalty_sum)
    assert all(g.any() for name, g in by_penalty.items() if ".indexer." in name)
    model.set_step(3)
    assert not torch.equal(model(given).loss_sum, theirs.loss_sum)

    # In dense steps it waits, and is in the reductions all the same.
    waiting = model_of({**INDEX, "dense_steps": 4})
    waiting.set_step(3)
    output = waiting(given)
    assert float(output.penalty_sum.detach()) == 0 and output.penalty_sum.requires_grad
    reached = torch.autograd.grad(output.penalty_sum, list(waiting.parameters()), allow_unused=True)
    for (name, _), grad in zip(waiting.named_parameters(), reached, strict=True):
        assert (grad is not None) or ".indexer." not in name


def test_teaching_an_index_makes_it_recall_more():
    """Of a frozen model, by the masses of its own tail alone."""
    model, given = model_of({**INDEX, "audit_rows": 1.0}, init_std=0.3), inputs()
    index = [p for name, p in model.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(index, 0.02)
    layers, recalls, losses = [0, 1, 2], [], []
    for step in range(25):
        output = model(given, ForwardRequest(measure_attention=step in (0, 24)))
        if step in (0, 24):
            found = attention_metrics(output.attention_stats.detach().double(), layers)
            recalls.append(found["attention/index_recall"])
            losses.append(found["attention/index_loss"])
            assert found["attention/bound_violations"] == 0
            assert 0 < found["attention/index_recall/min"] <= found["attention/index_recall"] < 1
            assert {f"attention/index_recall/layer_{i}" for i in layers} <= set(found)
        optimizer.zero_grad()
        for parameter, grad in zip(
            index, torch.autograd.grad(output.penalty_sum, index), strict=True
        ):
            parameter.grad = grad
        optimizer.step()
    assert losses[1] < 0.7 * losses[0] and recalls[1] > recalls[0] + 0.05, (losses, recalls)


def test_padding_counts_nowhere():
    model, short = model_of(FOLLOWED), inputs(length=40)
    mask = torch.ones_like(short.input_ids, dtype=torch.bool)
    mask[:, 33:] = False
    short = short._replace(token_mask=mask)
    found = model(short, ForwardRequest(measure_attention=True))
    noise = torch.where(mask, short.input_ids, (short.input_ids + 3) % VOCAB_SIZE)
    other = model(short._replace(input_ids=noise), ForwardRequest(measure_attention=True))
    torch.testing.assert_close(found.penalty_sum, other.penalty_sum)
    torch.testing.assert_close(found.attention_stats[:, 14:], other.attention_stats[:, 14:])


@pytest.mark.parametrize("attention", [INDEX, FOLLOWED], ids=["own", "followed"])
def test_what_the_plan_counts_is_what_the_model_has(attention):
    model, config = model_of(attention), tiny_config()
    arguments = SparseAttentionConfig(**attention).arguments
    count = count_parameters(config, 2, arguments)
    assert count.total == sum(p.numel() for p in model.parameters())
    held = sum(
        t[:, 0].numel() * t.element_size()
        for cache in model.new_caches(1, 10)
        for t in (cache.keys, cache.values, cache.index_keys)
    )
    assert cache_bytes_per_token(config, 4, arguments) == held
    # Scores of all index keys, and what teaches them, beside what sparse attention costs anyway.
    plain = SparseAttentionConfig(**SMALL).arguments
    assert keys_per_query(64, arguments) == keys_per_query(64, plain)
    more = flops_per_token(config, 2, 64, arguments) - flops_per_token(config, 2, 64, plain)
    assert more > 2 * config.num_kv_heads * 6 * 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"select": "mass", "index_steps": 3}, "attention.select=mass has no index"),
        ({"select": "mass", "index_layers": 2}, "attention.select=mass has no index"),
        ({"index_coeff": 0.0}, "nothing would teach the index"),
        ({"index_layers": 0}, "must be at least 1"),
        ({"index_steps": -1}, "must not be negative"),
        ({"index_head_dim": 2}, "positions turn 4 dimensions"),
        ({"top_k": 0}, "nothing to choose"),
        ({"tail": "drop"}, "set attention.tail=coarse, whose mass teaches"),
        ({"merge": "gated"}, "set attention.merge=lse"),
        ({"num_levels": 2}, "set attention.num_levels=1"),
        ({"score": "max"}, "set attention.score=prob"),
        ({"top_p": 0.5}, "set attention.top_p=null"),
        ({"noise_steps": 4}, "set attention.noise_steps=0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, words):
    asked = {**SMALL, "select": "index"} | settings
    found = SparseAttentionConfig(**asked).problems(tiny_config())
    assert len(found) == 1 and words in found[0], found


def test_ranks_that_share_out_heads_are_refused():
    settings = SparseAttentionConfig(**INDEX)
    (context,) = settings.context_problems(tiny_config(), 2)
    (tensor,) = settings.tensor_problems(tiny_config(), 2, 1)
    for name, text in (("context", context), ("tensor", tensor)):
        assert f"set parallel.{name}_parallel_size=1" in text and "attention.select=mass" in text
