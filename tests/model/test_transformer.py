"""The whole model: its size, its start, its sums, its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import VOCAB_SIZE, batch, build, take, tiny_config

from model.config import BalanceConfig, ModelConfig
from model.cost.parameters import count_parameters, flops_per_token
from model.loss import IGNORE_INDEX, cross_entropy_and_z_sums, training_loss
from model.moe.layer import MoELayer
from model.parallel.family import is_expert_parameter
from model.parallel.groups import ParallelGroups
from model.request import ForwardRequest, TokenBatch
from model.routers.base import RoutingRequest
from ops.testing import kept_for_backward

NO_BALANCE = BalanceConfig()
SHAPES = {
    "tiny": {},
    "tied": dict(tie_embeddings=True),
    "dense": dict(num_experts=0, num_dense_layers=0),
    "every_second_layer": dict(num_layers=5, moe_layer_interval=2),
    "no_dense_layers": dict(num_dense_layers=0, num_shared_experts=0, qk_norm="none"),
    "shared_experts": dict(num_shared_experts=3),
    "qk_norm_hidden": dict(qk_norm="hidden"),
    "wide_heads": dict(head_dim=10, num_kv_heads=1),
    "qkv_biases": dict(attention_bias="qkv", rotary_dim=2),
    "all_biases": dict(attention_bias="qkvo"),
    "gated_shared_expert": dict(shared_expert_gate=True),
    "multipliers": dict(
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_divisor=1.5,
    ),
}
BIG = dict(max_seq_len=4096, intermediate_size=1)
# name: (shape, top_k, total, active), with the numbers of the model cards
PUBLISHED = {
    "OLMoE-1B-7B": (
        dict(
            hidden_size=2048,
            num_layers=16,
            num_heads=16,
            num_kv_heads=16,
            num_experts=64,
            expert_intermediate_size=1024,
            vocab_size=50304,
            qk_norm="hidden",
        ),
        8,
        6.92e9,
        1.28e9,
    ),
    "Mixtral-8x7B": (
        dict(
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            num_experts=8,
            expert_intermediate_size=14336,
            vocab_size=32000,
        ),
        2,
        46.7e9,
        12.9e9,
    ),
    "Qwen3-30B-A3B": (
        dict(
            hidden_size=2048,
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            num_experts=128,
            expert_intermediate_size=768,
            vocab_size=151936,
            qk_norm="head",
        ),
        8,
        30.5e9,
        3.3e9,
    ),
}


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_count_parameters_agrees_with_the_model(shape):
    config = tiny_config(**SHAPES[shape])
    model, count = build(config, NO_BALANCE), count_parameters(config, experts_per_token=2)

    def size(*fragments: str) -> int:
        return sum(
            p.numel() for name, p in model.named_parameters() if any(f in name for f in fragments)
        )

    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.experts == sum(p.numel() for p in model.parameters() if is_expert_parameter(p))
    assert count.embedding == size("embedding.", "head.")
    assert count.attention == size("_proj.")
    assert count.norms == size("norm")
    assert count.router == size(".router.")
    assert count.shared_experts == size(".shared.", ".shared_gate.")
    if config.num_experts:
        assert count.active == count.total - count.experts + count.experts * 2 // config.num_experts
    else:
        assert count.active == count.total


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    shape, top_k, total, active = PUBLISHED[name]
    config = ModelConfig(**BIG, **shape)
    assert config.problems() == []
    count = count_parameters(config, top_k)
    assert count.total == pytest.approx(total, rel=0.01)
    # "3.3B" has two digits
    assert count.active == pytest.approx(active, rel=0.02 if name.startswith("Qwen") else 0.01)


def test_flops_are_six_per_active_matrix_parameter_plus_causal_attention():
    config = tiny_config(qk_norm="none", tie_embeddings=True)
    count = count_parameters(config, 2)
    attention = 6 * config.num_layers * config.hidden_size * 32
    assert flops_per_token(config, 2, seq_len=32) == 6 * (count.active - count.norms) + attention
    untied = tiny_config(qk_norm="none")  # the look-up table is no multiplication
    assert flops_per_token(untied, 2, seq_len=32) == flops_per_token(config, 2, seq_len=32)


def test_a_bias_is_no_multiplication():
    plain, biased = (tiny_config(attention_bias=bias) for bias in ("none", "qkvo"))
    assert count_parameters(biased, 2).total > count_parameters(plain, 2).total
    assert flops_per_token(biased, 2, seq_len=32) == flops_per_token(plain, 2, seq_len=32)


def test_moe_layers_stand_where_the_config_says():
    config = tiny_config(num_layers=7, num_dense_layers=1, moe_layer_interval=2)
    model = build(config, NO_BALANCE)
    assert config.moe_layers == (2, 4, 6)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoELayer)] == [
        2,
        4,
        6,
    ]
    assert len(model.routers()) == 3


# --- initial weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("expert_size", [2, 8])
def test_every_expert_parallel_size_starts_from_the_same_weights(expert_size):
    config = tiny_config()
    whole = dict(build(config, NO_BALANCE).named_parameters())
    for rank in range(expert_size):
        groups = ParallelGroups(expert_size=expert_size, expert_rank=rank)
        part = dict(build(config, NO_BALANCE, groups).named_parameters())
        assert part.keys() == whole.keys()
        experts = groups.local_experts(config.num_experts)
        assert len(experts) == config.num_experts // expert_size
        for name, parameter in part.items():
            expected = (
                whole[name][experts.start : experts.stop]
                if is_expert_parameter(parameter)
                else whole[name]
            )
            assert torch.equal(parameter, expected), name


def test_initial_weights_follow_the_seed_and_differ_everywhere():
    config = tiny_config()
    first, same, other = (
        dict(build(config, NO_BALANCE, seed=s).named_parameters()) for s in (1, 1, 2)
    )
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name])
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert not torch.equal(parameter, other[name]), name
    experts = first["blocks.1.mlp.experts.gate_up"]
    assert len({float(e.flatten()[0].detach()) for e in experts}) == config.num_experts
    assert not torch.equal(experts, first["blocks.2.mlp.experts.gate_up"])


def test_biases_start_at_zero():
    model = build(tiny_config(attention_bias="qkvo"), NO_BALANCE)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 4 * model.config.num_layers
    assert not any(bias.any() for bias in biases)


def test_initial_scales_are_those_of_gpt2():
    config = tiny_config(hidden_size=64, head_dim=16, expert_intermediate_size=64, init_std=0.1)
    residual = 0.1 / (2 * config.num_layers) ** 0.5
    for name, parameter in build(config, NO_BALANCE).named_parameters():
        if parameter.dim() > 1:
            into_residual = "o_proj" in name or ".down" in name
            assert float(parameter.detach().std()) == pytest.approx(
                residual if into_residual else 0.1, rel=0.1
            ), name


def test_indivisible_experts_are_refused():
    with pytest.raises(
        ValueError, match="num_experts 8 is not divisible by expert_parallel_size 3"
    ):
        build(tiny_config(), NO_BALANCE, ParallelGroups(expert_size=3))


# --- sums -----------------------------------------------------------------------------------------


def test_loss_is_the_summed_cross_entropy_of_the_targets():
    model, gen = build(tiny_config(), NO_BALANCE), torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, VOCAB_SIZE, (2, 2, 9), generator=gen)
    targets[0, 3:5] = IGNORE_INDEX
    positions = torch.arange(9).expand(2, 9)
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    output = model(TokenBatch(ids, targets, positions, cu_seqlens, max_seqlen=9))
    log_probabilities = model.logits(ids).log_softmax(-1)
    expected = -sum(
        log_probabilities[b, s, targets[b, s]]
        for b in range(2)
        for s in range(9)
        if targets[b, s] != IGNORE_INDEX
    )
    torch.testing.assert_close(output.loss_sum, expected)


@pytest.mark.parametrize("scope", ["sequence", "batch", "global_batch"])
def test_padding_changes_no_sum_and_no_gradient(scope):
    balance = BalanceConfig(aux_loss_coeff=0.1, aux_loss_scope=scope, z_loss_coeff=0.1)
    results = []
    for filler in (0, 1, 17):
        inputs = take(batch(0, 0, 4), 0, 4)
        mask = inputs.token_mask
        assert not mask.all()
        inputs = inputs._replace(input_ids=inputs.input_ids.masked_fill(~mask, filler))
        model = build(tiny_config(), balance)
        output = model(inputs)
        training_loss(output, 10, 10, balance).backward()
        results.append((output, gradients(model)))
    assert int(results[0][0].counts.sum(1)[0]) == 2 * int(mask.sum())
    for output, grads in results[1:]:
        for name in ("loss_sum", "aux_sum", "z_sum", "counts", "scope_counts"):
            torch.testing.assert_close(getattr(output, name), getattr(results[0][0], name))
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_sums_of_parts_add_up_to_the_whole():
    balance = BalanceConfig(aux_loss_coeff=0.1, aux_loss_scope="sequence", z_loss_coeff=0.1)
    model, full = build(tiny_config(), balance), batch(0, 0, 6)
    with torch.no_grad():
        whole = model(take(full, 0, 6))
        parts = [model(take(full, *span)) for span in ((0, 1), (1, 4), (4, 6))]
    for name in ("loss_sum", "aux_sum", "z_sum", "counts"):
        torch.testing.assert_close(
            sum(getattr(p, name) for p in parts), getattr(whole, name), rtol=1e-5, atol=1e-5
        )


def test_every_assignment_is_counted_once():
    model = build(tiny_config(), NO_BALANCE, top_k=3)
    inputs = take(batch(0, 0, 4), 0, 4)
    output = model(inputs)
    assert output.counts.shape == (2, 8)
    assert (output.counts.sum(1) == 3 * inputs.token_mask.sum()).all()
    assert output.processed == output.counts.sum()


def test_a_dense_model_has_no_router_sums():
    output = build(tiny_config(num_experts=0), BalanceConfig(aux_loss_coeff=1.0))(
        take(batch(0, 0, 2), 0, 2)
    )
    assert (
        output.counts.shape == (0, 0)
        and output.aux_sum == 0
        and output.z_sum == 0
        and output.loss_sum > 0
    )


def test_all_routed_to_one_shared_weight_is_a_dense_mlp():
    """With equal experts and gates that sum to 1, a MoE layer is its expert."""
    config = tiny_config(num_shared_experts=0)
    layer = build(config, NO_BALANCE).blocks[1].mlp
    with torch.no_grad():
        for weight in (layer.experts.gate_up, layer.experts.down):
            weight.copy_(weight[0].expand_as(weight))
    hidden = torch.randn(2, 5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    out, _, _ = layer(hidden, RoutingRequest())
    gate, up = (hidden @ layer.experts.gate_up[0].T).chunk(2, -1)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up @ layer.experts.down[0].T)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny", "tied", "dense"])
def test_recomputation_changes_nothing(shape):
    balance = BalanceConfig(aux_loss_coeff=0.1, aux_loss_scope="global_batch", z_loss_coeff=0.1)
    results = []
    for recompute in ("none", "block"):
        model = build(tiny_config(**SHAPES[shape], recompute=recompute), balance)
        forwards = []
        model.blocks[0].register_forward_pre_hook(lambda m, i, seen=forwards: seen.append(1))
        previous, outputs = None, []
        for micro in range(2):
            output = model(take(batch(0, micro, 3), 0, 3), ForwardRequest(previous_counts=previous))
            previous = output.scope_counts if output.counts.numel() else None
            training_loss(output, 20, 20, balance).backward()
            outputs.append(output)
        assert len(forwards) == (4 if recompute == "block" else 2)
        results.append((outputs, gradients(model)))
    for kept, recomputed in zip(*(outputs for outputs, _ in results), strict=True):
        for name in ("loss_sum", "aux_sum", "z_sum", "counts", "scope_counts"):
            assert torch.equal(getattr(kept, name), getattr(recomputed, name)), name
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.parametrize("shape", ["tiny", "tied"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 127, 128, 1000])
def test_a_loss_in_chunks_is_the_whole_loss(shape, chunk):
    full = take(batch(0, 0, 8), 0, 8)
    full.targets[:4] = IGNORE_INDEX  # chunks without any target
    found = []
    for size in (0, chunk):
        model = build(tiny_config(**SHAPES[shape], loss_chunk_size=size), NO_BALANCE)
        output = model(full)
        output.loss_sum.backward()
        with torch.no_grad():
            evaluated = model.eval()(full, ForwardRequest(keep_routing=True))
        found.append(
            (
                output.loss_sum.detach(),
                evaluated.loss_sum,
                evaluated.token_losses,
                *gradients(model).values(),
            )
        )
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_z_loss_is_its_definition_and_its_gradient_that_of_autograd(dtype):
    """coefficient * mean(logsumexp^2) beside the cross-entropy, over targets alone; also of logits
    whose exponentials overflow.
    """
    gen = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 7, 11, generator=gen, dtype=torch.float64) * 40).to(dtype)
    logits[0, 0] += 200
    targets = torch.randint(0, 11, (5, 7), generator=gen)
    targets[1:3] = IGNORE_INDEX
    found, defined = (logits.clone().requires_grad_() for _ in "ab")
    loss, z = cross_entropy_and_z_sums(found, targets)
    (0.3 * loss + 0.02 * z).backward()

    wide = defined if dtype == torch.float64 else defined.float()
    kept = targets != IGNORE_INDEX
    expected_z = wide.logsumexp(-1)[kept].square().sum()
    expected = F.cross_entropy(wide[kept], targets[kept], reduction="sum")
    (0.3 * expected + 0.02 * expected_z).backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.double(), expected_z.double(), rtol=1e-5, atol=1e-5)
    limit = {} if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.grad, defined.grad, **limit)
    assert not found.grad[1:3].any() and found.grad[0].abs().max() > 1


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("shape", ["tiny", "tied"])
def test_the_z_loss_of_a_model_is_that_of_its_logits(shape, chunk):
    """In chunks as whole; modules of multi-token prediction have none, and without the request
    there is none.
    """
    config = tiny_config(**SHAPES[shape], num_mtp_layers=1, loss_chunk_size=chunk)
    found = []
    for by_model in (True, False):
        model = build(config, NO_BALANCE)
        rows = torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(3))
        ids, targets = rows, rows.roll(-1, 1).clone()
        targets[:, -1] = IGNORE_INDEX
        positions = torch.arange(12).expand(2, 12)
        inputs = TokenBatch(ids, targets, positions, torch.tensor([0, 12, 24]).int(), 12)
        if by_model:
            output = model(inputs, ForwardRequest(with_logit_z=True))
            z = output.logit_z_sum
            plain = build(config, NO_BALANCE)(inputs)
            assert float(plain.logit_z_sum) == 0
            torch.testing.assert_close(output.loss_sum, plain.loss_sum)
            torch.testing.assert_close(output.mtp_sums, plain.mtp_sums)
            share = training_loss(output, 22, 24, NO_BALANCE, 0.0, [1], 1e-2)
            torch.testing.assert_close(share, (output.loss_sum + 1e-2 * z) / 22)
        else:
            z = model.logits(ids)[targets != IGNORE_INDEX].logsumexp(-1).square().sum()
        z.backward()
        found.append((z.detach(), gradients(model)["embedding.weight"]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_loss_in_chunks_keeps_the_logits_of_none():
    full, kept = take(batch(0, 0, 8), 0, 8), {}
    for size in (0, 16):
        model = build(tiny_config(loss_chunk_size=size), NO_BALANCE)
        with kept_for_backward(*model.parameters()) as found:
            model(full)
        kept[size] = sum(found.values())
    # the log-softmax, fp32
    assert kept[0] - kept[16] >= 4 * full.targets.numel() * VOCAB_SIZE


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_parameter_gets_a_gradient_even_when_experts_get_no_token(recompute):
    model = build(tiny_config(recompute=recompute), NO_BALANCE)
    for router in model.routers():
        router.balance_bias[3:] = -100.0
    output = model(take(batch(0, 0, 3), 0, 3))
    assert (output.counts[:, 3:] == 0).all() and (output.counts[:, :3] > 0).all()
    output.loss_sum.backward()
    for name, grad in gradients(model).items():
        assert grad is not None, name
        if ".experts." in name:
            assert (grad[3:] == 0).all() and (grad[:3].flatten(1).norm(dim=1) > 0).all(), name
        elif ".router." not in name:
            assert grad.norm() > 0, name


def test_every_parameter_gets_a_gradient_from_a_fully_padded_batch():
    """A rank whose share is padding must still take part in the gradient reduction."""
    balance = BalanceConfig(aux_loss_coeff=0.1, z_loss_coeff=0.1)
    model, ids = build(tiny_config(), balance), torch.zeros(1, 8, dtype=torch.int64)
    output = model(
        TokenBatch(
            ids,
            torch.full((1, 8), IGNORE_INDEX),
            torch.arange(8).unsqueeze(0),
            torch.tensor([0, 8], dtype=torch.int32),
            8,
            torch.zeros(1, 8, dtype=torch.bool),
        )
    )
    assert (
        output.loss_sum == 0
        and output.aux_sum == 0
        and output.z_sum == 0
        and output.counts.sum() == 0
    )
    training_loss(output, 5, 5, balance).backward()
    for name, grad in gradients(model).items():
        assert grad is not None and (grad == 0).all(), name


@pytest.mark.parametrize(
    "part", ["embedding", "_proj", "_norm", ".router.", ".experts.", ".shared.", "head"]
)
def test_gradients_match_finite_differences(part):
    """Along the gradient of one part, through cross-entropy, auxiliary and z loss."""
    balance = BalanceConfig(aux_loss_coeff=0.5, z_loss_coeff=0.5)
    model, inputs = build(tiny_config(), balance).double(), take(batch(0, 0, 3), 0, 3)
    for router in model.routers():
        # pins the selection, where the loss would jump
        router.balance_bias[[1, 4]] = 10.0
    training_loss(model(inputs), 40, 40, balance).backward()
    chosen = [p for name, p in model.named_parameters() if part in name]
    norm = float(torch.stack([p.grad.norm() for p in chosen]).norm())
    values, step = [], 3e-3 / norm
    with torch.no_grad():
        for move in (step, -2 * step):
            for p in chosen:
                p += move * p.grad
            values.append(float(training_loss(model(inputs), 40, 40, balance)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm**2, rel=5e-3)
