"""Shapes, costs and cuts of stages: sums over them are the whole model's, whatever the cut."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from model.attention.config.base import AttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.latent import MlaConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.config.windowed import WindowedAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.cost.exchange import exchanged_bytes
from model.cost.matrices import hidden_matrices
from model.cost.memory import device_memory
from model.cost.parameters import count_parameters, flops_per_token
from model.cost.stages import balanced_split, even_split, ranges_of
from model.dispatch.config import LocalDispatcherConfig
from model.loss import joined
from model.moe.layer import ModelParts
from model.parallel.groups import ParallelGroups
from model.parallel.part import LayerRows
from model.request import ForwardRequest, TokenBatch
from model.routers.config import TopKConfig
from model.transformer import Transformer

SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=40,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=32,
    num_dense_layers=1,
    num_shared_experts=1,
    num_mtp_layers=1,
)
ATTENTIONS: dict[str, AttentionConfig] = {
    "dense": DenseAttentionConfig(),
    "windowed": WindowedAttentionConfig(window=4, sinks=True),
    "sparse": SparseAttentionConfig(
        block_size=2, coarse_block_size=2, top_k=2, window_size=1, offset=True, dense_layers=(-1, 1)
    ),
    "latent": MlaConfig(
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8
    ),
}
CUTS = [(5,), (1, 4), (2, 1, 2), (1, 1, 1, 1, 1)]


def model_of(layers: range | tuple[range, ...] | None, attention: str, **changes) -> Transformer:
    config = dataclasses.replace(SHAPE, **changes)
    parts = ModelParts(
        TopKConfig(top_k=2), ATTENTIONS[attention], LocalDispatcherConfig(), BalanceConfig()
    )
    runs = (layers,) if isinstance(layers, range) else layers
    return Transformer(config, parts, ParallelGroups.single(), 3, runs)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_stages_have_the_parameters_of_the_whole_and_the_plan_counts_them(cut, attention):
    whole = dict(model_of(None, attention).named_parameters())
    arguments = ATTENTIONS[attention].arguments
    found: dict[str, torch.Tensor] = {}
    for layers in ranges_of(cut):
        stage = model_of(layers, attention)
        own = dict(stage.named_parameters())
        count = count_parameters(SHAPE, 2.0, arguments, layers)
        assert count.total == sum(p.numel() for p in own.values())
        assert not set(own) & set(found)
        found |= own
        shapes = {name: p.shape for name, p in stage.whole().named_parameters()}
        assert shapes == {name: p.shape for name, p in whole.items()}
    # The same names and the same numbers, drawn by name.
    assert set(found) == set(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    flops = [flops_per_token(SHAPE, 2.0, 32, arguments, layers) for layers in ranges_of(cut)]
    assert sum(flops) == pytest.approx(flops_per_token(SHAPE, 2.0, 32, arguments))
    matrices = [hidden_matrices(SHAPE, arguments, layers) for layers in ranges_of(cut)]
    together = [one for stage in matrices for one in stage]
    assert together == hidden_matrices(SHAPE, arguments)


def batch() -> TokenBatch:
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    return TokenBatch(
        input_ids=ids,
        targets=ids.roll(-1, 1),
        positions=torch.arange(16).expand(2, 16).contiguous(),
        cu_seqlens=torch.tensor([0, 16, 32], dtype=torch.int32),
        max_seqlen=16,
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_stages_one_after_the_other_are_the_whole_model_to_the_last_bit(attention, training):
    whole = model_of(None, attention).train(training)
    expected = whole(batch())
    hidden, rows = None, []
    for layers in ranges_of((1, 2, 2)):
        stage = model_of(layers, attention).train(training)
        if stage.borrows_embedding:
            stage.lent_embedding = whole.embedding.weight
        output = stage(batch(), before=hidden)
        hidden = output.handed_on
        part = stage.part.moe if training else stage.part.decoder_moe
        rows.append((part.placed(output.stats), stage.part.sparse.placed(output.attention_stats)))
    assert hidden is None
    assert torch.equal(output.loss_sum, expected.loss_sum)
    assert torch.equal(output.mtp_sums, expected.mtp_sums)
    assert torch.equal(sum(stats for stats, _ in rows), expected.stats)
    assert torch.equal(sum(sums for _, sums in rows), expected.attention_stats)


# Of two stages with two runs of layers each: a module of multi-token prediction behind the last.
RUNS = ((range(1), range(2, 3)), (range(1, 2), range(3, 5)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_laps_of_stages_are_the_whole_model_to_the_last_bit(attention, training):
    whole = model_of(None, attention).train(training)
    expected = whole(batch())
    stages = [model_of(runs, attention).train(training) for runs in RUNS]
    assert [stage.borrows_embedding for stage in stages] == [False, True]
    stages[1].lent_embedding = whole.embedding.weight
    hidden, outputs = None, ([], [])
    for lap, place in itertools.product(range(2), range(2)):
        outputs[place].append(stages[place](batch(), before=hidden, lap=lap))
        hidden = outputs[place][-1].handed_on
    assert hidden is None
    found = [joined(laps) for laps in outputs]
    for name in ("loss_sum", "mtp_sums", "processed", "agreed"):
        assert torch.equal(sum(getattr(one, name) for one in found), getattr(expected, name)), name
    for name in ("aux_sum", "z_sum", "penalty_sum"):
        total = sum(getattr(one, name) for one in found)
        assert torch.allclose(total, getattr(expected, name), rtol=1e-6), name
    for stage, one in zip(stages, found, strict=True):
        moe = stage.part.moe if training else stage.part.decoder_moe
        assert torch.equal(one.stats, moe.taken(expected.stats))
        assert torch.equal(one.counts, moe.taken(expected.counts))
        measured = stage.part.sparse.taken(expected.attention_stats)
        assert torch.equal(one.attention_stats, measured)
        assert len(one.routings) == 0 and one.handed_on is None


def test_a_replay_names_the_experts_of_every_lap():
    whole = model_of(None, "dense")
    routings = whole(batch(), ForwardRequest(keep_routing=True)).routings
    ids = tuple(routing.expert_ids.roll(1, 0).contiguous() for routing in routings)
    request = ForwardRequest(keep_routing=True, given_ids=ids)
    expected = whole(batch(), request)
    stages = [model_of(runs, "dense") for runs in RUNS]
    stages[1].lent_embedding = whole.embedding.weight
    hidden, found = None, {}
    for lap, place in itertools.product(range(2), range(2)):
        output = stages[place](batch(), request, hidden, lap)
        hidden = output.handed_on
        found |= dict(zip(stages[place].laps[lap].moe.own, output.routings, strict=True))
    assert torch.equal(output.loss_sum, expected.loss_sum)
    for row, routing in enumerate(expected.routings):
        assert torch.equal(found[row].expert_ids, routing.expert_ids), row


def test_laps_cost_what_the_runs_of_layers_cost():
    layers = [[i for run in runs for i in run] for runs in RUNS]
    arguments = ATTENTIONS["sparse"].arguments
    settings = dict(
        precision="bf16",
        zero_stage=1,
        world_size=2,
        expert_parallel_size=1,
        context_parallel_size=1,
        micro_batch_size=1,
        seq_len=32,
        attention=arguments,
    )
    for place, runs in enumerate(RUNS):
        count = count_parameters(SHAPE, 2.0, arguments, layers[place])
        own = model_of(runs, "sparse").named_parameters()
        assert count.total == sum(p.numel() for _, p in own)
        parts = [device_memory(SHAPE, 2.0, **settings, layers=run) for run in runs]
        both = device_memory(SHAPE, 2.0, **settings, layers=layers[place])
        assert both.optimizer == sum(part.optimizer for part in parts)
        assert both.activations == pytest.approx(sum(part.activations for part in parts), abs=99)
        held = device_memory(SHAPE, 2.0, **settings, layers=layers[place], in_flight=5 / 2)
        assert held.activations == pytest.approx(2.5 * both.activations, abs=3)
        flops = [flops_per_token(SHAPE, 2.0, 32, arguments, run) for run in runs]
        assert flops_per_token(SHAPE, 2.0, 32, arguments, layers[place]) == pytest.approx(
            sum(flops)
        )
        sent = [
            exchanged_bytes(SHAPE, 2.0, **settings, num_micro_batches=3, layers=part).stages
            for part in (*runs, layers[place])
        ]
        # Who has one end of the model in a run of its own has it in all: the loan goes once.
        assert sent[2] == sum(sent[:2])


def test_rows_of_a_stage_stand_at_their_layers():
    rows = LayerRows.of((1, 3, 5), [3, 5])
    assert rows.own == (1, 2) and rows.placed(torch.ones(2, 2)).tolist() == [
        [0.0, 0.0],
        [1.0, 1.0],
        [1.0, 1.0],
    ]
    assert LayerRows.of((1, 3, 5), []).placed(torch.ones(0, 2)).tolist() == [[0.0, 0.0]] * 3
    apart = LayerRows.of((1, 3, 5, 7), [1, 5, 7])
    table = torch.arange(1, 9).view(4, 2)
    assert apart.taken(table).tolist() == [[1, 2], [5, 6], [7, 8]]
    assert apart.placed(apart.taken(table)).tolist() == [[1, 2], [0, 0], [5, 6], [7, 8]]
    assert LayerRows.of((1, 3, 5), []).taken(table[:3]).shape == (0, 2)


def cuts_of(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *borders, num_layers)))
        for borders in itertools.combinations(range(1, num_layers), num_stages - 1)
    ]


@pytest.mark.parametrize("num_stages", range(1, 8))
@pytest.mark.parametrize("vocab_size", [16, 4096])
def test_the_balanced_cut_is_the_best_of_all(num_stages, vocab_size):
    config = dataclasses.replace(SHAPE, num_layers=7, num_mtp_layers=0, vocab_size=vocab_size)
    arguments = ATTENTIONS["sparse"].arguments

    def slowest(cut: tuple[int, ...]) -> float:
        return max(flops_per_token(config, 2.0, 32, arguments, part) for part in ranges_of(cut))

    found = balanced_split(config, 2.0, 32, arguments, num_stages)
    best = min(map(slowest, cuts_of(7, num_stages)))
    assert slowest(found) == pytest.approx(best)
    # The first of them in lexical order, which leaves most to the last stages.
    even = [c for c in cuts_of(7, num_stages) if slowest(c) == pytest.approx(best)]
    assert found == min(even)
    with pytest.raises(ValueError, match="not enough for 8 stages"):
        balanced_split(config, 2.0, 32, arguments, 8)


@pytest.mark.parametrize("num_runs", range(1, 8))
@pytest.mark.parametrize("vocab_size", [16, 4096])
def test_the_even_cut_has_the_least_squares_of_all(num_runs, vocab_size):
    config = dataclasses.replace(SHAPE, num_layers=7, num_mtp_layers=0, vocab_size=vocab_size)
    arguments = ATTENTIONS["sparse"].arguments

    def squares(cut: tuple[int, ...]) -> float:
        return sum(flops_per_token(config, 2.0, 32, arguments, p) ** 2 for p in ranges_of(cut))

    found = even_split(config, 2.0, 32, arguments, num_runs)
    assert sum(found) == 7 and min(found) >= 1
    assert squares(found) == pytest.approx(min(map(squares, cuts_of(7, num_runs))))
    with pytest.raises(ValueError, match="not enough for 8 runs"):
        even_split(config, 2.0, 32, arguments, 8)


def test_memory_of_stages_adds_up_and_grows_with_micro_batches_in_flight():
    settings = dict(
        precision="bf16",
        zero_stage=1,
        world_size=2,
        expert_parallel_size=1,
        micro_batch_size=1,
        seq_len=32,
    )
    whole = device_memory(SHAPE, 2.0, **settings)
    parts = [device_memory(SHAPE, 2.0, **settings, layers=p) for p in ranges_of((2, 3))]
    lent = 96 * 16
    assert sum(p.expert_weights for p in parts) == whole.expert_weights
    assert sum(p.dense_weights for p in parts) == whole.dense_weights + 2 * lent
    assert sum(p.gradients for p in parts) == whole.gradients + 4 * lent
    assert sum(p.optimizer for p in parts) == whole.optimizer
    # What goes on to the next stage is kept, too.
    assert sum(p.activations for p in parts) == pytest.approx(
        whole.activations + 2 * 32 * 16, abs=2
    )
    assert parts[0].logits == 0 and parts[1].logits == whole.logits
    again = device_memory(SHAPE, 2.0, **settings, layers=range(2), in_flight=3)
    assert again.activations == pytest.approx(3 * parts[0].activations, abs=3)


def test_a_stage_sends_hidden_states_on_and_gradients_back():
    config = dataclasses.replace(SHAPE, num_mtp_layers=0, tie_embeddings=True)

    def sent(layers: range) -> int:
        return exchanged_bytes(
            config,
            2.0,
            precision="bf16",
            zero_stage=1,
            world_size=2,
            expert_parallel_size=1,
            context_parallel_size=1,
            micro_batch_size=3,
            seq_len=32,
            num_micro_batches=5,
            layers=layers,
        ).stages

    one_way = 5 * 3 * 32 * 16 * 2
    first, middle, last = map(sent, ranges_of((1, 3, 1)))
    assert first == one_way + 2 * 96 * 16 and last == one_way + 4 * 96 * 16
    assert middle == 2 * one_way and sent(range(5)) == 0
