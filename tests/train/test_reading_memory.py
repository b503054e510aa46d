"""Memory of reading and writing published weights, as the system counts it: pages of mapped files
can be dropped, so what is anonymous counts.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.families.reading import read
from tests.published import OfModel, ours
from train.pretrained.export import _write_weights
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import write_shards

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "moe_intermediate_size": 768,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}
"""82M parameters, 165 MB in bf16."""
SLACK = 6e6
"""Bytes of allocators and of Python, measured below 2e6."""


def anonymous() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak_of(action: Callable[[], object]) -> int:
    """Most anonymous memory while the action runs, above what there was before."""
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        action()
    finally:
        done.set()
        thread.join()
    return most - before


def test_reading_and_writing_hold_one_tensor_beside_the_model(tmp_path):
    from model.families.names import on_disk, parts_of

    reading = read(CONFIG)
    shapes = on_disk(parts_of(reading))
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    write_shards(folder, shapes, dtypes, 20_000_000, lambda name: torch.randn(shapes[name]))

    source = PretrainedFolder(folder)
    model = ours(source)  # fills it once: the pages of the model are there then
    largest = 4 * max(math.prod(shape) for shape in shapes.values())
    assert sum(p.numel() for p in model.parameters()) * 2 > 15 * largest
    assert peak_of(lambda: source.fill_model(model)) < largest + SLACK

    (tmp_path / "out").mkdir()
    wrote = peak_of(
        lambda: _write_weights(reading, OfModel(model), tmp_path / "out", "bf16", 20_000_000)
    )
    # An expert's gate and up in fp32 beside the tensor that is written.
    assert wrote < 2 * largest + SLACK
    for file in sorted(folder.glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
