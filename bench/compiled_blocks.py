"""A training step with blocks as graphs (train.compile=blocks) against the same step in eager mode,
taking turns in one process on one model.

Forward, backward and an AdamW update of the quickstart's shape on a CPU, of a part of OLMoE on a
CUDA device. Times are medians in milliseconds of the clock; on a CPU also of this process's
processors, which alone compare where others use the machine. The first compiled step is given
apart, with compiling and without a cache from before.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from bench.common import Row, main, make_row, measure
from bench.train_step import BALANCE, OLMOE, QUICKSTART, random_batch, shape_of
from model.attention.config.dense import DenseAttentionConfig
from model.dispatch.config import LocalDispatcherConfig
from model.loss import training_loss
from model.moe.layer import ModelParts
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.engine.compiled import compile_blocks


def processor_ms(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds that this process's processors work for a call, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            samples[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(times) for name, times in samples.items()}


def run(device: torch.device) -> list[Row]:
    cuda = device.type == "cuda"
    config, top_k, rows, length = (OLMOE, 8, 4, 4096) if cuda else (QUICKSTART, 2, 4, 256)
    dtype, repeats = (torch.bfloat16, 10) if cuda else (torch.float32, 7)
    parts = ModelParts(
        TopKConfig(top_k=top_k), DenseAttentionConfig(), LocalDispatcherConfig(), BALANCE
    )
    model = Transformer(config, parts).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)
    batch = random_batch(rows, length, config.vocab_size, device)
    num_tokens = batch.input_ids.numel()
    with patch.dict(os.environ), tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        compile_blocks(model, device)
        compiled = model.compiled

        def step(blocks: dict) -> float:
            model.compiled = blocks
            optimizer.zero_grad(set_to_none=True)
            loss = training_loss(model(batch), num_tokens, num_tokens, BALANCE)
            loss.backward()
            optimizer.step()
            return loss.item()

        # The first step compiles, forward and backward.
        eager_loss = step({})
        begin, worked = time.perf_counter(), time.process_time()
        compiled_loss = step(compiled)
        first = {
            "first_step_s": round(time.perf_counter() - begin, 1),
            "first_step_processor_s": round(time.process_time() - worked, 1),
        }
        functions: dict[str, Callable[[], object]] = {
            "ours": lambda: step(compiled),
            "eager": lambda: step({}),
        }
        times = measure(functions, device, repeats)
        worked_ms = {} if cuda else processor_ms(functions, repeats)
    extra: dict[str, float | str | None] = {
        **first,
        **{f"{name}_processor_ms": round(ms, 1) for name, ms in worked_ms.items()},
        "threads": torch.get_num_threads(),
        "loss_before_and_after_one_step": f"{eager_loss:.6f} {compiled_loss:.6f}",
    }
    shape = shape_of(config, rows, length, top_k)
    return [make_row("compiled_blocks", shape, dtype, device, times, None, **extra)]


if __name__ == "__main__":
    main("compiled_blocks", run)
