"""Muon: held against its definition by singular values, against torch's own, and every layout of
pieces against whole matrices.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.latent import MlaConfig
from model.config import BalanceConfig, ModelConfig
from model.cost.matrices import hidden_matrices
from model.dispatch.config import LocalDispatcherConfig
from model.routers.config import TopKConfig
from model.transformer import ModelParts, Transformer
from train.config.kinds import is_hidden_matrix, kind_of
from train.config.training import GroupConfig, OptimConfig
from train.engine.muon.exchange import Layout
from train.engine.muon.masters import matrices_of, place_matrices
from train.engine.muon.optimizer import Muon
from train.engine.muon.orthogonalize import COEFFICIENTS, orthogonalize
from train.engine.muon.pieces import Block, Slices, owned, pieces
from train.engine.optimizer import build_optimizer, freeze, parameter_groups

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=24,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=16,
    num_dense_layers=1,
    num_shared_experts=1,
    qk_norm="head",
    num_mtp_layers=1,
    shared_expert_gate=True,
    attention_bias="qkv",
)
PARTS = ModelParts(
    TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BalanceConfig()
)
MUON = OptimConfig(lr=0.02, weight_decay=0.1, optimizer="muon", orthogonalize_dtype="fp32")


def model() -> Transformer:
    return Transformer(SHAPE, PARTS)


def gradients(ours: torch.nn.Module, step: int) -> None:
    """Random ones, of every size: some matrices are nearly of one rank."""
    generator = torch.Generator().manual_seed(step)
    for parameter in ours.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            scale = torch.logspace(0, -3, parameter.shape[-1])
            parameter.grad = parameter.grad * scale


def by_definition(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The quintic on the singular values, in fp64."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(12, 12), (5, 30), (30, 5), (2, 2), (64, 48)])
def test_orthogonalising_is_the_quintic_on_singular_values(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for steps in (1, 5, 7):
        found = orthogonalize(matrix, steps)
        for ours, given in zip(found, matrix, strict=True):
            assert torch.allclose(ours.double(), by_definition(given, steps), atol=2e-5)
    values = torch.linalg.svdvals(orthogonalize(torch.stack([torch.eye(8)] * 2), 5))
    assert (values > 0.65).all() and (values < 1.25).all()
    assert not orthogonalize(torch.zeros(2, 4, 3), 5).any()


def test_a_matrix_does_not_depend_on_those_beside_it():
    matrices = torch.randn(6, 20, 12, generator=torch.Generator().manual_seed(1))
    matrices[2] = 0
    together = orthogonalize(matrices, 5)
    for i in range(6):
        assert torch.allclose(together[i], orthogonalize(matrices[i : i + 1], 5)[0], atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_dimensional_parameters_move_as_by_torchs_muon(nesterov):
    """torch's own has no stacks, computes in bf16 and matches AdamW's update on request."""
    ours = torch.nn.Sequential(torch.nn.Linear(20, 12, bias=False), torch.nn.Linear(12, 40, False))
    theirs = torch.nn.Sequential(
        torch.nn.Linear(20, 12, bias=False), torch.nn.Linear(12, 40, False)
    )
    theirs.load_state_dict(ours.state_dict())
    config = dataclasses.replace(
        MUON, orthogonalize_dtype="bf16", nesterov=nesterov, momentum=0.9, lr=0.03
    )
    muon = Muon(
        [{"params": list(ours.parameters()), "muon": True, "weight_decay": 0.1}], config, False
    )
    muon.place(
        {p: Layout([(Block(0, *p.shape), Slices(p.numel()))]) for p in ours.parameters()},
        CPU,
    )
    oracle = torch.optim.Muon(
        theirs.parameters(),
        lr=0.03,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(5):
        gradients(ours, step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in ours.parameters()]
        muon.step()
        oracle.step()
        for a, b, old in zip(ours.parameters(), theirs.parameters(), before, strict=True):
            # a product in bf16 may round another way in a batch than alone
            moved = (b.detach() - old).norm()
            assert (a.detach() - b.detach()).norm() < 0.01 * moved
            assert torch.equal(muon.state[a]["momentum_buffer"], oracle.state[b]["momentum_buffer"])


def test_an_update_is_as_large_as_adamws():
    """Root mean square 0.2 times the learning rate, whatever the shape and the gradient's size."""
    for rows, columns in ((64, 64), (32, 256), (256, 32)):
        for size in (1e-6, 1.0, 1e6):
            parameter = torch.nn.Parameter(torch.zeros(rows, columns))
            parameter.grad = size * torch.randn(rows, columns, generator=torch.manual_seed(0))
            group = {"params": [parameter], "muon": True, "weight_decay": 0.0}
            muon = Muon([group], MUON, False)
            layout = Layout([(Block(0, rows, columns), Slices(rows * columns))])
            muon.place({parameter: layout}, CPU)
            muon.step()
            rms = float(parameter.detach().square().mean().sqrt())
            assert rms == pytest.approx(0.2 * MUON.lr, rel=0.15)


def expected_step(
    ours: Transformer, config: OptimConfig, state: dict, adamw: torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """By hand, a matrix at a time: what every parameter becomes."""
    found = {}
    adamw.step()
    for name, parameter in ours.named_parameters():
        if name not in state:
            continue
        whole = parameter.detach().clone()
        momentum, gradient = state[name], parameter.grad
        momentum.mul_(config.momentum).add_((1 - config.momentum) * gradient)
        update = config.momentum * momentum + (1 - config.momentum) * gradient
        stack = whole if whole.dim() == 3 else whole[None]
        of_stack = update if whole.dim() == 3 else update[None]
        for one, of_one in zip(stack, of_stack, strict=True):
            halves = 2 if "gate_up" in name else 1
            for half, of_half in zip(one.chunk(halves), of_one.chunk(halves), strict=True):
                scale = config.update_rms * math.sqrt(max(half.shape))
                half.mul_(1 - config.lr * config.weight_decay)
                half.sub_(config.lr * scale * by_definition(of_half, 5).float())
        found[name] = whole
    return found


def test_a_model_moves_by_the_definition_and_the_rest_as_by_adamw():
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    muon = build_optimizer(ours, MUON, "ep_size_1")
    assert isinstance(muon, Muon)
    place_matrices(muon, ours, None, 0, CPU)
    by_muon = {p for group in muon.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in ours.named_parameters() if p in by_muon}
    assert {kind_of(name) for name in names} == {
        "attention",
        "mlp",
        "shared_experts",
        "experts",
        "other",  # the projection of a module of multi-token prediction
    }
    state = {n: torch.zeros_like(p) for n, p in theirs.named_parameters() if n in names}
    plain = dataclasses.replace(MUON, optimizer="adamw", orthogonalize_dtype="bf16")
    groups = parameter_groups(theirs, plain, "ep_size_1")
    rest = {id(p) for n, p in theirs.named_parameters() if n not in names}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) in rest]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=MUON.lr, betas=(0.9, 0.95), eps=MUON.eps
    )
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        muon.step()
        moved = expected_step(theirs, MUON, state, adamw)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name in moved:
                    parameter.copy_(moved[name])
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-6), name


def test_embedding_head_router_gates_and_vectors_stay_with_adamw():
    ours = model()
    groups = parameter_groups(ours, MUON, "ep_size_1")
    names = {p: name for name, p in ours.named_parameters()}
    adamw = {names[p] for group in groups if not group["muon"] for p in group["params"]}
    assert {n for n in adamw if ours.get_parameter(n).dim() > 1} == {
        "embedding.weight",
        "head.weight",
        "blocks.1.mlp.router.weight",
        "blocks.1.mlp.shared_gate.weight",
        "mtp.0.block.mlp.router.weight",
        "mtp.0.block.mlp.shared_gate.weight",
    }
    # Experts' matrices and dense ones are groups of their own, and decay.
    by_muon = [group for group in groups if group["muon"]]
    assert [g["name"] for g in by_muon] == ["dense", "ep_size_1"]
    assert [g["weight_decay"] for g in by_muon] == [0.1, 0.1]


def test_groups_choose_their_optimizer_and_frozen_parts_have_none():
    ours = model()
    freeze(ours, ("experts",))
    rules = (
        GroupConfig("attention", 0.5, optimizer="adamw"),
        GroupConfig("head", optimizer="muon"),
        GroupConfig("blocks.0.mlp.*", 2.0),
    )
    groups = parameter_groups(ours, dataclasses.replace(MUON, groups=rules), "ep_size_1")
    names = {p: name for name, p in ours.named_parameters()}
    found = {names[p]: group for group in groups for p in group["params"]}
    assert not any(".experts." in name for name in found)
    assert not found["blocks.0.attention.q_proj.weight"]["muon"]
    assert found["blocks.0.attention.q_proj.weight"]["lr_factor"] == 0.5
    assert found["head.weight"]["muon"] and not found["embedding.weight"]["muon"]
    assert found["blocks.0.mlp.down.weight"]["muon"]
    assert found["blocks.0.mlp.down.weight"]["lr_factor"] == 2.0
    # One group alone moves by Muon where AdamW is the rule.
    alone = dataclasses.replace(
        MUON, optimizer="adamw", groups=(GroupConfig("mlp", optimizer="muon"),)
    )
    groups = parameter_groups(ours, alone, "ep_size_1")
    found = {names[p] for group in groups if group["muon"] for p in group["params"]}
    assert found == {"blocks.0.mlp.gate_up.weight", "blocks.0.mlp.down.weight"}


def test_muon_that_would_move_nothing_is_refused():
    ours = model()
    for config, said in (
        (dataclasses.replace(MUON, groups=(GroupConfig("norms", optimizer="muon"),)), "'norms'"),
        (dataclasses.replace(MUON, groups=(GroupConfig("*", optimizer="adamw"),)), "optim=adamw"),
    ):
        with pytest.raises(ValueError, match=said):
            parameter_groups(ours, config, "ep_size_1")


@pytest.mark.parametrize("name", ["momentum", "nesterov", "update_rms", "orthogonalize_steps"])
def test_a_setting_of_muon_without_muon_is_refused(name):
    value = {"nesterov": False, "orthogonalize_steps": 3}.get(name, 0.5)
    config = dataclasses.replace(OptimConfig(lr=0.1), **{name: value})
    (problem,) = config.problems()
    assert problem.startswith(f"optim.{name} is {value}") and "optim=muon" in problem
    group = GroupConfig("attention", optimizer="muon")
    assert not dataclasses.replace(config, groups=(group,)).problems()


# --- layouts --------------------------------------------------------------------------------------


def held(blocks: list[tuple[Block, Slices]], num_ranks: int) -> list[Layout]:
    return [Layout(blocks, num_ranks, rank) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("stage", [1, 3])
def test_every_element_of_every_matrix_lies_in_one_piece(num_ranks, stage):
    shapes = [("a_proj.weight", (6, 4)), ("x.gate_up", (3, 10, 4)), ("x.down", (3, 4, 5))]
    blocks, first, offset = [], 0, 0
    total = sum(math.prod(shape) for _, shape in shapes) + 2 * len(shapes)
    for name, shape in shapes:
        numel = math.prod(shape)
        size = -(-numel // num_ranks)
        slices = Slices(-(-total // num_ranks)) if stage == 1 else Slices(size, offset)
        found = matrices_of(name, torch.Size(shape), first if stage == 1 else 0)
        blocks += [(block, slices) for block in found]
        first += numel + 2  # ZeRO leaves gaps
        offset += size
    assert [block[1:] for block, _ in blocks] == [(6, 4)] + [(5, 4)] * 6 + [(4, 5)] * 3

    cut = [(block, pieces(block, slices, num_ranks)) for block, slices in blocks]
    taken: set[tuple[int, int]] = set()
    for matrix in owned(cut, num_ranks):
        assert sum(piece.size for piece in matrix.pieces) == matrix.size
        assert [piece.first for piece in matrix.pieces] == [
            sum(before.size for before in matrix.pieces[:i]) for i in range(len(matrix.pieces))
        ]
        largest = max(piece.size for piece in matrix.pieces)
        assert 2 * next(p.size for p in matrix.pieces if p.rank == matrix.owner) >= largest
        for piece in matrix.pieces:
            places = {(piece.rank, piece.offset + i) for i in range(piece.size)}
            assert not places & taken
            taken |= places
    # What leaves a rank arrives at another.
    layouts = held(blocks, num_ranks)
    for sender in range(num_ranks):
        for receiver in range(num_ranks):
            for there, here in zip(layouts[sender]._rounds, layouts[receiver]._rounds, strict=True):
                assert there.leaving_sizes[receiver] == here.coming_sizes[sender]


def test_a_whole_matrix_never_travels_and_a_cut_one_goes_to_few():
    """Two ranks, each with two matrices, of which the middle pair is cut in the middle."""
    slices = Slices(24)
    whole = [(Block(0, 4, 4), slices), (Block(32, 4, 4), slices)]
    assert [layout.exchanged for layout in held(whole, 2)] == [0, 0]
    cut = [*whole, (Block(16, 4, 4), slices)]
    first, second = held(cut, 2)
    # half of 16 elements there, and half back
    assert (first.exchanged, second.exchanged) == (8, 8) and first.num_cut == 1


def test_the_work_of_cut_matrices_is_spread():
    blocks = [(Block(0, 8, 8), Slices(16, 16 * i)) for i in range(40)]
    cut = [(block, pieces(block, slices, 4)) for block, slices in blocks]
    owners = [matrix.owner for matrix in owned(cut, 4)]
    assert [owners.count(rank) for rank in range(4)] == [10, 10, 10, 10]


@pytest.mark.parametrize("attention", ["dense", "mla", "dsa", "compressed"])
def test_the_plan_has_the_models_matrices_in_their_order(attention):
    settings = (
        MlaConfig(
            q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8
        )
        if attention == "mla"
        else IndexedAttentionConfig(index_heads=3, dense_layers=(0,))
        if attention == "dsa"
        else CompressedAttentionConfig(
            layer_kinds=("csa", "hca"),
            rope_head_dim=4,
            q_lora_rank=8,
            output_groups=2,
            o_lora_rank=6,
            index_heads=3,
            index_head_dim=6,
        )
        if attention == "compressed"
        else DenseAttentionConfig()
    )
    shape = dataclasses.replace(
        SHAPE,
        **(
            {
                "num_kv_heads": {"mla": 2, "compressed": 1}[attention],
                "qk_norm": "none",
                "attention_bias": "none",
            }
            | ({"num_mtp_layers": 0} if attention == "compressed" else {})
            if attention in ("mla", "compressed")
            else {}
        ),
    )
    parts = dataclasses.replace(PARTS, attention=settings)
    found = [
        (kind_of(name), len(blocks), *blocks[0][1:])
        for name, p in Transformer(shape, parts).named_parameters()
        if is_hidden_matrix(name) and (blocks := matrices_of(name, p.shape))
    ]
    arguments = settings.arguments or None
    assert [tuple(entry) for entry in hidden_matrices(shape, arguments)] == found
