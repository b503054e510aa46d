"""Multi-token prediction: the loss of its modules by its definition, documents, balance, and that
everything but training is without it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import VOCAB_SIZE, batch, build, take, tiny_config

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from model.attention.base import SequenceLayout
from model.attention.config.windowed import WindowedAttentionConfig
from model.blocks.mtp import tokens_ahead
from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.cost.memory import device_memory
from model.cost.parameters import count_parameters, flops_per_token
from model.dispatch.config import LocalDispatcherConfig
from model.generate import generate
from model.layers import rotary_tables
from model.loss import IGNORE_INDEX, targets_ahead, training_loss
from model.moe.budget import start_routers
from model.moe.layer import ModelParts
from model.parallel.family import is_expert_parameter
from model.request import ForwardRequest, TokenBatch
from model.routers.base import RoutingRequest
from model.routers.config import ThresholdConfig, TopKConfig
from model.transformer import Transformer
from ops.testing import kept_for_backward
from tests.composing import composed
from train.data.loader import pack
from train.trained.calibrate import calibrate_budget

NO_BALANCE = BalanceConfig()
LENGTHS = [[3, 1, 4], [6, 2], [8], [1, 1, 6]]


def documents() -> TokenBatch:
    """Four packed rows, whose targets are the next tokens of their own documents, but for one that
    is masked.
    """
    ids = torch.randint(0, VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    follows = torch.zeros_like(ids, dtype=torch.bool)
    follows[:, :-1] = positions[:, 1:] == positions[:, :-1] + 1
    targets = torch.where(follows, ids.roll(-1, 1), IGNORE_INDEX)
    targets[2, 4] = IGNORE_INDEX  # as of a prompt
    flat = torch.tensor([0] + [n for row in LENGTHS for n in row]).cumsum(0)
    return TokenBatch(ids, targets, positions, flat.to(torch.int32), 8)


def model_of(modules: int = 1, **changes):
    return build(tiny_config(num_mtp_layers=modules, **changes), NO_BALANCE)


def layout_of(length: int, config) -> SequenceLayout:
    positions = torch.arange(length).unsqueeze(0)
    tables = rotary_tables(positions, config.attention_head_dim, config.rope_theta)
    ends = torch.tensor([0, length], dtype=torch.int32)
    return SequenceLayout(*tables, ends, length, positions)


def definition(model, inputs: TokenBatch) -> list[torch.Tensor]:
    """Equations 21 to 24 of arXiv 2412.19437, a document at a time, each cut to the tokens that
    have another so far ahead; sums over targets that are not masked.
    """
    config = model.config
    sums = [torch.zeros(()) for _ in model.mtp]
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for n in lengths:
            ids = inputs.input_ids[row : row + 1, start : start + n]
            targets = inputs.targets[row, start : start + n]
            start += n
            hidden = model.embedding(ids)
            for block in model.blocks:
                hidden = block(hidden, layout_of(n, config), RoutingRequest())[0]
            hidden = model.norm(hidden)
            for k, module in enumerate(model.mtp, 1):
                left = n - k
                if left < 1:
                    break
                sides = (
                    module.embedding_norm(model.embedding(ids[:, k:])),
                    module.hidden_norm(hidden[:, :left]),
                )
                combined = torch.cat(sides, -1) @ module.projection.weight.T
                out = module.block(combined, layout_of(left, config), RoutingRequest())[0]
                hidden = module.norm(out)
                logits = (
                    hidden[0] @ (model.embedding if model.head is None else model.head).weight.T
                )
                sums[k - 1] = sums[k - 1] + F.cross_entropy(
                    logits, targets[k:], ignore_index=IGNORE_INDEX, reduction="sum"
                )
    return sums


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "loss_chunk_size": 5},
        {"recompute": "block"},
        {"num_experts": 0},
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_definition(changes):
    if "embedding_multiplier" in changes:  # the definition has none: that they act is enough
        plain, scaled = model_of(2)(documents()), model_of(2, **changes)(documents())
        assert (plain.mtp_sums - scaled.mtp_sums).abs().min() > 1e-2
        return
    model, inputs = model_of(2, **changes), documents()
    found = model(inputs).mtp_sums
    found.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in gradients if name.startswith("mtp.")} == {
        f"mtp.{name}" for name, _ in model.mtp.named_parameters()
    }

    model.zero_grad()
    expected = torch.stack(definition(model, inputs))
    expected.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_no_target_lies_in_another_document_or_row():
    inputs = documents()
    documents_of = (inputs.positions == 0).flatten().cumsum(0).view_as(inputs.positions)
    for number in (1, 2, 7, 8, 20):
        ahead = targets_ahead(inputs.targets, inputs.positions, number)
        ids, there = tokens_ahead(inputs, number)
        for row in range(4):
            for i in range(8):
                j = i + number
                same = j < 8 and documents_of[row, i] == documents_of[row, j]
                assert ahead[row, i] == (inputs.targets[row, j] if same else IGNORE_INDEX)
                assert there[row, i] == same
                assert not same or ids[row, i] == inputs.input_ids[row, j]


def test_a_packed_batch_counts_its_targets_ahead():
    """Of rows [a b END c d e] the tokens with a second one to predict are a and c; e has none in
    the row.
    """
    end = 0
    found = pack([torch.tensor([4, 5, end, 6, 7, 8, 9]).numpy()], 8, end)
    # targets: 5 END - 7 8 9, then padding
    assert found.num_targets == 5
    assert [found.num_targets_ahead(k) for k in (1, 2, 3)] == [3, 1, 0]
    ahead = targets_ahead(found.targets, found.positions, 1)
    assert ahead[0].tolist() == [end, -100, -100, 8, 9, -100, -100, -100]


@torch.no_grad()
def test_a_document_changes_nothing_of_another():
    model, inputs = model_of(2), documents()
    before = model(inputs).mtp_sums
    changed_ids, targets = inputs.input_ids.clone(), inputs.targets.clone()
    changed_ids[0, 4:] = (changed_ids[0, 4:] + 1) % VOCAB_SIZE
    targets[0, 4:] = IGNORE_INDEX
    masked = model(inputs._replace(targets=targets)).mtp_sums
    after = model(inputs._replace(input_ids=changed_ids, targets=targets)).mtp_sums
    torch.testing.assert_close(after, masked, rtol=0, atol=1e-5)
    assert (before - masked).abs().min() > 1e-2


def test_routers_see_the_tokens_that_have_one_ahead_and_no_others():
    model, inputs = model_of(2), documents()
    output = model(inputs)
    assert model.config.moe_layers == (1, 2, 3, 4) and len(model.routers()) == 4
    assert model.config.decoder_moe_layers == (1, 2)
    tokens = [32, 32, *(int(tokens_ahead(inputs, k)[1].sum()) for k in (1, 2))]
    assert tokens[2:] == [23, 17]
    assert output.counts.sum(1).tolist() == [2 * n for n in tokens]
    assert output.processed == output.counts.sum()


def test_the_balance_loss_is_the_sum_over_all_layers_that_route():
    balance = BalanceConfig(aux_loss_coeff=0.1, z_loss_coeff=0.1)
    model = build(tiny_config(num_mtp_layers=1), balance)
    training_loss(model(documents()), 10, 10, balance, 0.0, [1]).backward()
    router = model.mtp[0].block.mlp.router
    assert router.weight.grad.norm() > 0
    # with a weight of 0 nothing but balance reaches the module
    assert model.mtp[0].norm.weight.grad.abs().max() == 0


def test_the_step_adds_the_mean_over_modules_of_their_mean_losses():
    output = model_of(2)(documents())
    parts = output.mtp_sums / torch.tensor([19.0, 13.0])
    found = training_loss(output, 24, 32, NO_BALANCE, 0.3, [19, 13])
    torch.testing.assert_close(found, output.loss_sum / 24 + 0.3 * parts.mean())
    with pytest.raises(ValueError, match="zip"):
        training_loss(output, 24, 32, NO_BALANCE)


def test_sums_of_parts_add_up_to_the_whole():
    model, full = model_of(2), batch(0, 0, 6)
    with torch.no_grad():
        whole = model(take(full, 0, 6))
        parts = [model(take(full, *span)) for span in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(p.mtp_sums for p in parts), whole.mtp_sums)
    assert torch.equal(sum(p.counts for p in parts), whole.counts)


def test_every_parameter_gets_a_gradient_where_no_document_has_a_token_ahead():
    model = model_of()
    ids = torch.randint(0, VOCAB_SIZE, (2, 4))
    flat = torch.arange(9, dtype=torch.int32)
    output = model(TokenBatch(ids, torch.full_like(ids, -100), torch.zeros_like(ids), flat, 1))
    training_loss(output, 1, 8, NO_BALANCE, 0.3, [0]).backward()
    assert output.mtp_sums.tolist() == [0.0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


# --- everything but training ----------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_and_generation_are_those_of_the_model_without():
    model, plain, inputs = model_of(2).eval(), model_of(0).eval(), documents()
    weights = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():  # drawn by name, so they are the same
        assert torch.equal(parameter, weights[name]), name
    found, expected = (m(inputs, ForwardRequest(keep_routing=True)) for m in (model, plain))
    for name in ("loss_sum", "counts", "stats", "token_losses", "processed"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.mtp_sums.numel() == 0 and len(found.routings) == 2
    texts = [list(generate(m, [5, 9, 2], 8, temperature=0)) for m in (model, plain)]
    assert texts[0] == texts[1]


def test_another_budget_is_found_for_the_layers_that_generate():
    model = build(tiny_config(num_mtp_layers=1), NO_BALANCE, router=ThresholdConfig, budget=2.0)
    start_routers(model.routers(), BudgetConfig(warm_start_steps=0), FailSafeConfig())
    rows = torch.randint(1, VOCAB_SIZE, (16, 17), generator=torch.Generator().manual_seed(0))
    batches = [pack([row.numpy() for row in part], 16, 0) for part in rows.split(4)] * 12
    before = {k: v.clone() for k, v in model.mtp[0].state_dict().items()}
    mean = calibrate_budget(model, batches, 3.0, NO_BALANCE, BudgetConfig(), torch.device("cpu"))
    assert mean == pytest.approx(3.0, rel=0.05)
    assert [router.budget for router in model.routers()] == [3.0, 3.0, 2.0]
    assert all(torch.equal(v, before[k]) for k, v in model.mtp[0].state_dict().items())


def test_a_loss_without_modules_is_what_it_was():
    """To the last bit: the modules are behind everything else."""
    outputs = [model_of(n)(documents()) for n in (0, 2)]
    assert torch.equal(outputs[0].loss_sum, outputs[1].loss_sum)


# --- cost and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}, {"qk_norm": "hidden"}], ids=str)
def test_parameters_and_flops_are_those_of_the_modules(changes):
    model, plain = model_of(2, **changes), tiny_config(**changes)
    count, without = count_parameters(model.config, 2), count_parameters(plain, 2)
    parameters = list(model.mtp.parameters())
    assert count.mtp_experts == sum(p.numel() for p in parameters if is_expert_parameter(p))
    assert count.mtp == sum(p.numel() for p in parameters) - count.mtp_experts
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.all_experts == sum(p.numel() for p in model.parameters() if is_expert_parameter(p))
    assert count.active == without.active  # generation does without

    # a projection of two hidden sizes, attention, two of eight experts, a router, and the head
    hidden, expert = 16, 3 * 16 * 24
    mlp = 3 * expert + 8 * hidden if plain.num_experts else 3 * hidden * 32
    attention = hidden * (2 * 16 + 2 * 8)
    more = 2 * hidden * hidden + attention + mlp + VOCAB_SIZE * hidden
    pairs = 12 * 16 * 32 / 2
    extra = flops_per_token(model.config, 2, 32) - flops_per_token(plain, 2, 32)
    assert extra == 2 * (6 * more + pairs)


def test_sinks_and_expert_biases_of_the_modules_are_counted():
    settings = {"window": 4, "window_layers": "alternate", "sinks": True}
    config = tiny_config(num_mtp_layers=2, expert_bias=True, qk_norm="none")
    parts = ModelParts(
        TopKConfig(top_k=2),
        WindowedAttentionConfig(**settings),
        LocalDispatcherConfig(),
        NO_BALANCE,
    )
    model = Transformer(config, parts)
    count = count_parameters(config, 2, settings)
    experts = sum(p.numel() for p in model.mtp.parameters() if is_expert_parameter(p))
    assert count.mtp_experts == experts
    assert count.mtp == sum(p.numel() for p in model.mtp.parameters()) - experts
    assert bool(model(documents()).mtp_sums.isfinite().all())


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_activation_estimate_counts_the_modules(recompute):
    model = model_of(2, recompute=recompute)
    full = take(batch(0, 0, 8), 0, 8)._replace(token_mask=None)
    settings = dict(
        precision="fp32",
        zero_stage=0,
        world_size=1,
        expert_parallel_size=1,
        micro_batch_size=8,
        seq_len=16,
    )
    memory = device_memory(model.config, 2.0, **settings)
    plain = device_memory(tiny_config(recompute=recompute), 2.0, **settings)
    assert memory.logits - plain.logits == 2 * 4 * 8 * 16 * VOCAB_SIZE
    with kept_for_backward(*model.parameters()) as kept:
        model(full)
    if recompute == "none":
        logits = 3 * 4 * 8 * 16 * VOCAB_SIZE
        assert 0.7 < (memory.activations + logits) / sum(kept.values()) < 1.4
    else:
        assert memory.activations > plain.activations


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_mtp_layers=1"], "train.mtp_coeff is 0, so that they would learn nothing"),
        (["train.mtp_coeff=0.3"], "model.num_mtp_layers is 0; set both or neither"),
        (["model.num_mtp_layers=-1"], "model.num_mtp_layers is -1; use 0 for no multi-token"),
        (["train.mtp_coeff=-1"], "train.mtp_coeff is -1.0; it must not be negative"),
        (
            ["model.num_mtp_layers=300", "train.mtp_coeff=0.3"],
            "model.num_mtp_layers 300 predicts so many tokens further ahead",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(overrides, words):
    config = plain(composed(*overrides))
    with pytest.raises(ConfigError) as error:
        parse(config, 1)
    assert any(words in problem for problem in error.value.problems)
