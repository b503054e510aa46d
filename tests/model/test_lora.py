"""Low-rank adapters, in one process: a model with them computes what a model with their products
added to its weights does, and learns what the chain rule says.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.adapters import add_adapters
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.latent import MlaConfig
from model.config import BalanceConfig, ExpertsConfig, ModelConfig
from model.cost.memory import device_memory
from model.cost.parameters import Trained, count_parameters
from model.cost.projections import projections
from model.dispatch.config import LocalDispatcherConfig
from model.lora import adapter_names, is_adapter
from model.loss import IGNORE_INDEX
from model.moe.experts import Experts
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.transformer import ModelParts, Transformer
from train.config.kinds import kind_of
from train.config.lora import LoraConfig, ranks_of, target_problems, trained_of

SHAPE = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=24,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=32,
    num_dense_layers=1,
    num_shared_experts=1,
    qk_norm="head",
)
MLA = MlaConfig(q_lora_rank=6, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
ALPHA = 6.0
EVERYTHING = LoraConfig(
    rank=2,
    alpha=ALPHA,
    targets=("attention", "experts", "shared_experts", "mlp"),
    expert_rank=3,
)


def built(attention=None, shape: ModelConfig = SHAPE, **experts) -> Transformer:
    parts = ModelParts(
        TopKConfig(top_k=2),
        attention or DenseAttentionConfig(),
        LocalDispatcherConfig(),
        BalanceConfig(),
        ExpertsConfig(**experts),
    )
    return Transformer(shape, parts, seed=3)


def adapted(attention=None, shape: ModelConfig = SHAPE, lora=EVERYTHING, **experts) -> Transformer:
    """The same model with adapters that are not zero."""
    model = built(attention, shape, **experts)
    arguments = (attention or DenseAttentionConfig()).arguments
    ranks = {name: rank for name, (_, rank) in ranks_of(lora, shape, arguments).items()}
    add_adapters(model, ranks, lora.alpha, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.requires_grad_(True)
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def merged(model: Transformer, attention=None, shape: ModelConfig = SHAPE) -> Transformer:
    """A plain model with weights W + alpha / r * B A, one matrix at a time."""
    plain, found = built(attention, shape), dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        value = found[name].clone()
        first, second = adapter_names(name)
        if first in found:
            a, b = found[first], found[second]
            if a.dim() == 3:
                for e in range(len(a)):
                    value[e] += ALPHA / a.shape[1] * b[e] @ a[e]
            else:
                value += ALPHA / len(a) * b @ a
        parameter.copy_(value)
    return plain


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 48, (2, 16), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    positions = torch.arange(16).repeat(2, 1)
    return TokenBatch(ids, positions, targets, torch.tensor([0, 16, 32], dtype=torch.int32), 16)


@pytest.mark.parametrize("attention", [None, MLA])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_adapters_compute_and_learn_as_their_products_in_the_weights(attention, recompute):
    """Gradients of A and B against those of the merged weights: dA = s B^T dW, dB = s dW A^T."""
    shape = dataclasses.replace(SHAPE, recompute=recompute)
    model, plain = adapted(attention, shape), merged(adapted(attention), attention)
    ours, theirs = model(batch()), plain(batch())
    assert ours.loss_sum.item() == pytest.approx(theirs.loss_sum.item(), rel=1e-6)
    ours.loss_sum.backward()
    theirs.loss_sum.backward()
    names, seen = dict(model.named_parameters()), 0
    for name, parameter in plain.named_parameters():
        first, second = adapter_names(name)
        assert names[name].grad is None
        if first not in names:
            continue
        a, b, seen = names[first], names[second], seen + 1
        scale = ALPHA / a.shape[-2]
        for found, expected in (
            (a.grad, scale * b.mT @ parameter.grad),
            (b.grad, scale * parameter.grad @ a.mT),
        ):
            # fp32 through the norms of small latents; a wrong factor or transpose is off by 1
            assert float((found - expected).norm() / expected.norm()) < 5e-4, name
    assert seen == len(projections(SHAPE, {} if attention is None else attention.arguments))


def test_every_way_to_use_the_projections_has_the_adapters():
    """With a cache latent attention multiplies with kv_b_proj's weight itself."""
    for attention in (None, MLA):
        model, plain = adapted(attention).eval(), merged(adapted(attention), attention).eval()
        ids, caches = batch().input_ids[:1], (model.new_caches(1, 16), plain.new_caches(1, 16))
        with torch.no_grad():
            for piece in (ids[:, :9], ids[:, 9:10], ids[:, 10:11]):
                found, expected = model.logits(piece, caches[0]), plain.logits(piece, caches[1])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_changes_before_the_first_step():
    model, plain = built(), built()
    ranks = {name: 2 for name in projections(SHAPE, {})}
    add_adapters(model, ranks, ALPHA, seed=3)
    assert torch.equal(model(batch()).loss_sum, plain(batch()).loss_sum)
    assert not any(p.requires_grad for n, p in model.named_parameters() if not is_adapter(n))
    # A begins as torch's own linear layers do, each expert's from a stream of its own.
    a = model.get_parameter("blocks.1.mlp.experts.lora_gate_up_a")
    assert 0.2 < float(a.abs().max()) <= 0.25 and not torch.equal(a[0], a[1])
    assert not model.get_parameter("blocks.1.mlp.experts.lora_gate_up_b").any()


def test_backward_keeps_no_sum_of_experts_weights_and_adapters():
    """Their memory would be that of all experts again."""
    model = adapted()
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    made = []
    for module in experts:
        plain = module._adapted

        def watched(name, plain=plain):
            found = plain(name)
            made.append(found)
            return found

        module._adapted = watched
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch())
    places = {tensor.untyped_storage().data_ptr() for tensor in made}
    assert len(made) == 4 and not places & set(kept)
    output.loss_sum.backward()
    assert len(made) == 8  # each once more


def test_projections_are_those_of_the_model_and_the_count_is_exact():
    for attention in (DenseAttentionConfig(), MLA):
        model = adapted(attention)
        found = {
            name: parameter
            for name, parameter in built(attention).named_parameters()
            if adapter_names(name)[0] in dict(model.named_parameters())
        }
        expected = projections(SHAPE, attention.arguments)
        assert {name.removesuffix(".weight") for name in found} == set(expected)
        for name, projection in expected.items():
            value = found.get(f"{name}.weight", found.get(name))
            shape = (projection.outputs, projection.inputs)
            stack = (projection.num_experts,) if projection.num_experts else ()
            assert tuple(value.shape) == (*stack, *shape)

        count = count_parameters(SHAPE, 2, attention.arguments)
        trained = trained_of(EVERYTHING, (), SHAPE, attention.arguments, count)
        adapters = [(n, p.numel()) for n, p in model.named_parameters() if is_adapter(n)]
        assert all(kind_of(name) == "lora" for name, _ in adapters)
        assert trained.adapters == trained.total == sum(number for _, number in adapters)
        assert trained.experts == sum(n for name, n in adapters if ".experts." in name)


def test_what_is_trained_in_full_counts_by_kind():
    model, count = built(), count_parameters(SHAPE, 2)
    lora = LoraConfig(rank=2, also_train=("router", "norms", "embedding"))
    of_kinds = sum(
        p.numel()
        for name, p in model.named_parameters()
        if kind_of(name) in ("router", "norms", "embedding")
    )
    found = trained_of(lora, (), SHAPE, {}, count)
    assert found.total == found.adapters + of_kinds
    frozen = ("head", "experts", "mlp", "shared_experts", "attention")
    assert trained_of(LoraConfig(), frozen, SHAPE, {}, count).total == of_kinds


def test_optimizer_memory_is_of_what_is_trained():
    settings = dict(
        precision="bf16",
        zero_stage=2,
        world_size=2,
        expert_parallel_size=2,
        micro_batch_size=1,
        seq_len=32,
    )
    count = count_parameters(SHAPE, 2)
    whole = device_memory(SHAPE, 2, **settings)
    trained = Trained(100, 40, 100, 40)
    few = device_memory(SHAPE, 2, **settings, trained=trained)
    assert few.optimizer == 12 * (100 // 2 + 40 // 2)
    assert few.gradients == 4 * (100 // 2 + 40 // 2)
    assert few.dense_weights == 2 * (count.dense + 100)
    assert few.expert_weights == 2 * (count.all_experts + 40) // 2
    assert few.optimizer < whole.optimizer / 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ("atention",)}, "did you mean attention?"),
        ({"targets": ("blocks.7.*",)}, "blocks.7.* means no projection of this model"),
        ({"targets": ("router",)}, "router means no projection"),
        ({"targets": ("attention",), "expert_rank": 2}, "means no experts"),
    ],
)
def test_a_target_that_means_nothing_is_refused(changes, said):
    """Complaint (axolotl 3515, TuFT 154): patterns that match no expert train something else."""
    lora = LoraConfig(**{"rank": 2, **changes})
    assert any(said in problem for problem in target_problems(lora, SHAPE, {}))


def test_a_kind_that_this_model_lacks_is_not_offered_again():
    dense = dataclasses.replace(SHAPE, num_experts=0, num_shared_experts=0)
    lora = LoraConfig(rank=2, targets=("attention", "experts"))
    (told,) = target_problems(lora, dense, {})
    start = "lora.targets: experts means no projection of this model; leave it out: its kinds are"
    assert told.startswith(f"{start} attention, mlp, anything else")


def test_a_pattern_means_projections_by_name():
    lora = LoraConfig(rank=2, targets=("*.q_proj", "blocks.1.mlp.experts.down"), expert_rank=1)
    found = {name: rank for name, (_, rank) in ranks_of(lora, SHAPE, {}).items()}
    assert found == {
        **{f"blocks.{i}.attention.q_proj": 2 for i in range(3)},
        "blocks.1.mlp.experts.down": 1,
    }
