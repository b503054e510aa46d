"""Tokens per second of a whole optimisation step in one process, against a dense model of the same
active FLOPs.

The rival replaces each MoE layer by a SwiGLU of top_k * expert_intermediate_size: equal matrix work
per token, so the ratio is what routing, permutation, small GEMMs and the update of idle experts
cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from bench.common import Row, device_name, main, make_row, measure, profile
from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.cost.parameters import flops_per_token
from model.dispatch.config import LocalDispatcherConfig
from model.loss import training_loss
from model.moe.layer import ModelParts
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.transformer import Transformer
from ops.device import peak_tflops

BALANCE = BalanceConfig(aux_loss_coeff=0.01)
QUICKSTART = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=512,
    num_experts=8,
    expert_intermediate_size=256,
    max_seq_len=256,
)
# OLMoE-1B-7B with 4 of its 16 layers, so that weights are drawn on the CPU in seconds.
OLMOE = ModelConfig(
    vocab_size=50304,
    hidden_size=2048,
    num_layers=4,
    num_heads=16,
    num_kv_heads=16,
    intermediate_size=8192,
    num_experts=64,
    expert_intermediate_size=1024,
    max_seq_len=4096,
    qk_norm="hidden",
)


def build_step(
    config: ModelConfig, top_k: int, batch: TokenBatch, device: torch.device, dtype: torch.dtype
) -> Callable:
    """A function that does forward, backward and an AdamW update on the same batch."""
    parts = ModelParts(
        TopKConfig(top_k=top_k), DenseAttentionConfig(), LocalDispatcherConfig(), BALANCE
    )
    model = Transformer(config, parts).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    num_tokens = batch.input_ids.numel()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        training_loss(model(batch), num_tokens, num_tokens, BALANCE).backward()
        optimizer.step()

    return step


def shape_of(config: ModelConfig, rows: int, length: int, top_k: int) -> dict[str, int | str]:
    """What a row of a result says of its step."""
    return {
        "B": rows,
        "S": length,
        "D": config.hidden_size,
        "layers": config.num_layers,
        "F": config.expert_intermediate_size,
        "E": config.num_experts,
        "K": top_k,
        "vocab": config.vocab_size,
    }


def random_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> TokenBatch:
    """Rows of one document each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=generator).to(device)
    return TokenBatch(
        input_ids=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        positions=torch.arange(length, device=device).expand(rows, length),
        cu_seqlens=torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device),
        max_seqlen=length,
    )


def run(device: torch.device) -> list[Row]:
    cuda = device.type == "cuda"
    config, top_k, rows, length = (OLMOE, 8, 4, 4096) if cuda else (QUICKSTART, 2, 4, 256)
    dtype, repeats = (torch.bfloat16, 10) if cuda else (torch.float32, 5)
    batch = random_batch(rows, length, config.vocab_size, device)
    dense = dataclasses.replace(
        config, num_experts=0, intermediate_size=top_k * config.expert_intermediate_size
    )
    step = build_step(config, top_k, batch, device, dtype)
    times = measure(
        {"ours": step, "dense_same_flops": build_step(dense, top_k, batch, device, dtype)},
        device,
        repeats,
    )
    waits = None
    if cuda:
        waits, launches = profile(step)
        kernels: dict[str, float] = {}
        for name, ms in launches:
            kernels[name] = kernels.get(name, 0.0) + ms
        for name, ms in sorted(kernels.items(), key=lambda item: -item[1])[:24]:
            print(f"{ms:8.3f} ms {ms / sum(kernels.values()):6.1%} {name[:90]}", flush=True)
    flops, peak = (
        rows * length * flops_per_token(config, top_k, length),
        peak_tflops(device_name(device)),
    )
    shape = shape_of(config, rows, length, top_k)
    # The bound counts model FLOPs only, so the roofline fraction is the MFU.
    return [
        make_row(
            "train_step",
            shape,
            dtype,
            device,
            times,
            None if peak is None else flops / peak / 1e9,
            host_waits=waits,
            tokens_per_second=round(1e3 * rows * length / times["ours"], 1),
            tflops=round(flops / times["ours"] / 1e9, 3),
        )
    ]


if __name__ == "__main__":
    main("train_step", run)
