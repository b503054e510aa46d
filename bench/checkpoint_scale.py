"""What checkpoints of very many experts cost: real counts of layers and experts, tiny tensors, one
process.

`python -m bench.checkpoint_scale [--layers 64] [--experts 1024] [--hidden 16] [--width 8]
[--repeats 3] [--json FILE]`. Each round writes the payload (masters and both moments, fp32) into
one file and syncs it, saves a checkpoint, verifies it (everything hashed, then what the record of
the first time leaves), loads it into the engine, and reads the one file back; files leave the page
cache before they are read. Times are medians over rounds, in seconds of the clock and of this
process's CPUs (where others use the machine, only the latter compare). Peak memory is what a phase
takes above what the process held before it: of the first round, as later ones find freed memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common import find_commit
from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import AllToAllConfig
from model.moe.layer import ModelParts
from model.parallel.groups import initialize_parallel
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.checkpoint.folder import damage_since_verified
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.writer import CheckpointWriter, damage, load_engine
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.engine.deepspeed import STATE_KEYS, Engine
from train.files.strict_json import dumps
from train.rank.runtime import process_group

BLOCK = 2**24


def build(options: argparse.Namespace) -> tuple[Engine, Any]:
    config = ModelConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=options.hidden,
        num_experts=options.experts,
        expert_intermediate_size=options.width,
        max_seq_len=16,
    )
    parts = ModelParts(
        TopKConfig(top_k=2), DenseAttentionConfig(), AllToAllConfig(), BalanceConfig()
    )
    groups = initialize_parallel(1)
    engine = Engine(
        Transformer(config, parts, groups),
        groups,
        TrainConfig(num_steps=1, seq_len=8, micro_batch_size=1, global_batch_size=1),
        OptimConfig(lr=0.1),
        {"zero_optimization": {"stage": options.zero}},
    )
    engine.prepare_scatter(1)
    for _, parameter in engine.named_parameters():
        for state in STATE_KEYS[1:]:
            engine.scatter_state(parameter, state, torch.randn(engine.parameter_shape(parameter)))
    return engine, groups


def measured(found: dict[str, Any], name: str, action: Callable[[], Any]) -> Any:
    """The result; seconds, CPU seconds and bytes of peak resident memory above the start go into
    `found`.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, begin, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    result = action()
    found[f"{name}_s"], found[f"{name}_cpu_s"] = (
        time.perf_counter() - begin,
        time.process_time() - cpu,
    )
    found[f"{name}_peak_bytes"] = resident("VmHWM") - before
    return result


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def write_one(path: Path, num_bytes: int, block: memoryview) -> None:
    with path.open("wb") as file:
        for start in range(0, num_bytes, BLOCK):
            file.write(block[: min(BLOCK, num_bytes - start)])
        file.flush()
        os.fsync(file.fileno())


def read_one(path: Path) -> None:
    block = bytearray(BLOCK)
    with path.open("rb") as file:
        while file.readinto(block):
            pass


def forget(*paths: Path) -> None:
    """Drop files from the page cache."""
    for path in paths:
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_round(
    engine: Engine, writer: CheckpointWriter, folder: Path, step: int, payload: int
) -> dict[str, Any]:
    one, found = folder / "one", {}
    block = memoryview(torch.randint(0, 256, (BLOCK,), dtype=torch.uint8).numpy())
    measured(found, "write_one", lambda: write_one(one, payload, block))
    path = measured(found, "save", lambda: writer.save(engine, {"step": step}))
    forget(one, path)
    harm = measured(found, "verify", lambda: damage(path))
    assert harm is None, harm
    time.sleep(3)  # a file that has just been written is not recorded as verified
    assert damage_since_verified(path) is None
    harm = measured(found, "verify_again", lambda: damage_since_verified(path))
    assert harm is None, harm
    forget(one, path)
    measured(found, "load", lambda: load_engine(engine, path, step))
    measured(found, "read_one", lambda: read_one(one))
    found["bytes_written"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found["index_bytes"] = (path / "weights" / ".metadata").stat().st_size
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 64),
        ("experts", 1024),
        ("hidden", 16),
        ("width", 8),
        ("zero", 0),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="on the file system to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        with process_group(600):
            engine, groups = build(options)
            payload = (
                4
                * len(STATE_KEYS)
                * sum(engine.parameter_shape(p).numel() for _, p in engine.named_parameters())
            )
            writer = CheckpointWriter(folder, CheckpointConfig(keep_last=1), groups, "config: {}\n")
            rounds = [
                run_round(engine, writer, folder, step, payload)
                for step in range(1, options.repeats + 1)
            ]
            reader = CheckpointReader(folder / "checkpoints" / f"step-{options.repeats:08d}")
            keys, entries = len(reader.shapes), reader.num_entries
            engine.close()
    finally:
        shutil.rmtree(folder)
    medians = {
        key: rounds[0][key]
        if key.endswith("peak_bytes")
        else statistics.median(found[key] for found in rounds)
        for key in rounds[0]
    }
    result = {
        "bench": "checkpoint_scale",
        "commit": find_commit(),
        "device": "cpu",
        "cpus": os.cpu_count(),
        **{key: value for key, value in vars(options).items() if key not in ("json", "folder")},
        "keys": keys,
        "index_entries": entries,
        "payload_bytes": payload,
        **medians,
        **{
            f"{name}_over_write_one_cpu": medians[f"{name}_cpu_s"] / medians["write_one_cpu_s"]
            for name in ("save", "load")
        },
        "save_over_write_one": medians["save_s"] / medians["write_one_s"],
        "load_over_write_one": medians["load_s"] / medians["write_one_s"],
        "load_over_read_one": medians["load_s"] / medians["read_one_s"],
        "written_over_payload": medians["bytes_written"] / payload,
        "rounds": rounds,
    }
    if options.json is not None:
        options.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps({key: value for key, value in result.items() if key != "rounds"}))


if __name__ == "__main__":
    main()
