"""Time and bytes of an update by Muon, against AdamW on the same gradients in the same run, and
against torch's Muon, which takes one matrix at a time.

The update alone, in one process, all matrices whole. What Muon sends under ZeRO is arithmetic
(train/engine/muon/planned.py), given for the stages on eight ranks with expert parallelism of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from bench.common import Row, main, make_row, measure
from bench.train_step import BALANCE, OLMOE, QUICKSTART
from model.attention.config.dense import DenseAttentionConfig
from model.config import ModelConfig
from model.cost.matrices import hidden_matrices
from model.dispatch.config import LocalDispatcherConfig
from model.moe.layer import ModelParts
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.config.kinds import is_hidden_matrix
from train.config.lora import LoraConfig
from train.config.training import OptimConfig, ParallelConfig
from train.engine.muon.masters import matrices_of, place_matrices
from train.engine.muon.optimizer import Muon
from train.engine.muon.planned import planned_muon
from train.engine.optimizer import build_optimizer

RANKS, EXPERT_RANKS = 8, 2


def drawn(config: ModelConfig, top_k: int, device: torch.device) -> Transformer:
    """A model in fp32, as masters are, with a gradient for every parameter."""
    parts = ModelParts(
        TopKConfig(top_k=top_k), DenseAttentionConfig(), LocalDispatcherConfig(), BALANCE
    )
    model = Transformer(config, parts).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
    return model


def step_of(model: Transformer, optim: OptimConfig, device: torch.device) -> Callable[[], object]:
    optimizer = build_optimizer(model, optim, "experts")
    if isinstance(optimizer, Muon):
        place_matrices(optimizer, model, None, 0, device)
    return optimizer.step


def one_by_one(model: Transformer, optim: OptimConfig, device: torch.device) -> Callable[[], None]:
    """torch's Muon on every matrix as a parameter of its own, and AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not is_hidden_matrix(name):
            rest.append(parameter)
            continue
        assert parameter.grad is not None
        for block in matrices_of(name, parameter.shape):
            shape, after = (block.rows, block.columns), block.first + block.rows * block.columns
            one = nn.Parameter(parameter.detach().view(-1)[block.first : after].view(shape))
            one.grad = parameter.grad.view(-1)[block.first : after].view(shape)
            matrices.append(one)
    optimizers = (
        torch.optim.Muon(matrices, lr=optim.lr, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=optim.lr, fused=device.type == "cuda"),
    )

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def sent_mib(config: ModelConfig, optim: OptimConfig, stage: int) -> float:
    """What the busiest of RANKS sends for one update."""
    run = SimpleNamespace(
        model=config,
        optim=optim,
        lora=LoraConfig(),
        zero_stage=stage,
        attention=SimpleNamespace(arguments=None),
        parallel=ParallelConfig(expert_parallel_size=EXPERT_RANKS),
    )
    layers = range(config.num_layers)
    return planned_muon(run, RANKS, layers).sent_bytes / 2**20  # type: ignore[arg-type]


def run(device: torch.device) -> list[Row]:
    cuda = device.type == "cuda"
    config, top_k, repeats = (OLMOE, 8, 10) if cuda else (QUICKSTART, 2, 9)
    rows = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        optim = OptimConfig(lr=1e-9, optimizer="muon", orthogonalize_dtype=name)
        adamw = dataclasses.replace(optim, optimizer="adamw", orthogonalize_dtype="bf16")
        functions = {"ours": step_of(drawn(config, top_k, device), optim, device)}
        functions["adamw"] = step_of(drawn(config, top_k, device), adamw, device)
        if name == "bf16":
            model = drawn(config, top_k, device)
            functions["torch_muon_one_by_one"] = one_by_one(model, optim, device)
        times = measure(functions, device, repeats)
        entries = hidden_matrices(config)
        shape: dict[str, int | str] = {
            "D": config.hidden_size,
            "layers": config.num_layers,
            "F": config.expert_intermediate_size,
            "E": config.num_experts,
            "vocab": config.vocab_size,
            "matrices": sum(entry.number for entry in entries),
        }
        moved = sum(entry.size for entry in entries)
        extra: dict[str, float | str | None] = {
            "times_of_adamw": round(times["ours"] / times["adamw"], 2),
            "moved_parameters": moved,
            "state_bytes": 4 * moved,
            "adamw_state_bytes": 8 * moved,
        }
        for stage in (0, 1, 2, 3):
            sent = sent_mib(config, optim, stage)
            extra[f"sent_mib_zero{stage}_{RANKS}_ranks"] = round(sent, 2)
        rows.append(make_row("optimizer_step", shape, dtype, device, times, None, **extra))
    return rows


if __name__ == "__main__":
    main("optimizer_step", run)
