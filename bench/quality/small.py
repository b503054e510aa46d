"""A model of a few hundred thousand parameters, trained in this process on the bundled text by its
bytes: what a comparison costs that needs many runs and no command.

Model, optimizer, schedule and loss are those of launch.train; there is no engine, no checkpoint and
no tokenizer. The last twentieth of the text is held out.
"""

from __future__ import annotations

import math
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ExpertsConfig, ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.loss import training_loss
from model.moe.layer import ModelParts
from model.parallel.groups import ParallelGroups
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.transformer import Transformer
from ops.grouped_mlp.spec import Precision
from train.config.training import OptimConfig, TrainConfig
from train.data.sources import sample_files
from train.engine.optimizer import build_optimizer
from train.engine.schedule import Schedule

LENGTH, ROWS = 64, 4
HELD_OUT_ROWS = 128
CLIP = 1.0
BALANCE = BalanceConfig(aux_loss_coeff=0.01)


def byte_model(width: int, **changes: Any) -> ModelConfig:
    """Two layers of four experts, two to a token; all widths in proportion, heads grow in
    number.
    """
    settings: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=width,
        num_layers=2,
        num_heads=width // 16,
        num_kv_heads=width // 32,
        intermediate_size=2 * width,
        num_experts=4,
        expert_intermediate_size=width // 2,
        max_seq_len=LENGTH,
    )
    return ModelConfig(**(settings | changes))


@cache
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and held-out ones."""
    whole = b"".join(Path(name).read_bytes() for name in sample_files())
    tokens = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()
    cut = len(tokens) * 19 // 20
    return tokens[:cut], tokens[cut:]


def rows_of(tokens: torch.Tensor, starts: torch.Tensor) -> TokenBatch:
    """Rows of LENGTH tokens, each a document of its own."""
    rows = torch.stack([tokens[s : s + LENGTH + 1] for s in starts.tolist()])
    return TokenBatch(
        input_ids=rows[:, :-1],
        targets=rows[:, 1:],
        positions=torch.arange(LENGTH).expand(len(rows), LENGTH),
        cu_seqlens=torch.arange(len(rows) + 1, dtype=torch.int32) * LENGTH,
        max_seqlen=LENGTH,
    )


def train_bytes(
    config: ModelConfig, rate: float, seed: int, steps: int, precision: Precision = "native"
) -> dict[str, Any]:
    """Held-out loss in nats a byte, the last ten training losses, and processor seconds. A run
    whose loss is no number any more ends there, with None.

    seed: of first weights, and of the order of the text, which is the same for any model. The rate
    warms up over a tenth of the steps and falls to a tenth by a cosine.
    """
    begin = time.process_time()
    torch.manual_seed(seed)
    parts = ModelParts(
        TopKConfig(top_k=2),
        DenseAttentionConfig(),
        LocalDispatcherConfig(),
        BALANCE,
        experts=ExpertsConfig(precision=precision),
    )
    model = Transformer(config, parts, ParallelGroups.single(), seed)
    optim = OptimConfig(lr=rate, min_lr=rate / 10, warmup_steps=max(1, steps // 10))
    optimizer = build_optimizer(model, optim, "experts")
    schedule = Schedule(optimizer.param_groups, optim, TrainConfig(steps, LENGTH, ROWS, ROWS), 1)
    tokens, held_out = text()
    order = torch.Generator().manual_seed(seed)
    num_tokens = ROWS * LENGTH

    losses: list[float] = []
    for step in range(steps):
        schedule.set_step(step)
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=order)
        optimizer.zero_grad(set_to_none=True)
        output = model(rows_of(tokens, starts))
        loss = training_loss(output, num_tokens, num_tokens, BALANCE)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    model.eval()
    starts = torch.linspace(0, len(held_out) - LENGTH - 1, HELD_OUT_ROWS).long()
    with torch.no_grad():
        held_out_loss = float(model(rows_of(held_out, starts)).loss_sum) / (HELD_OUT_ROWS * LENGTH)
    return {
        "val_loss": held_out_loss if math.isfinite(held_out_loss) else None,
        "last_losses": losses[-10:] if math.isfinite(losses[-1]) else [],
        "processor_seconds": round(time.process_time() - begin, 1),
    }
