"""Generation of many prompts of mixed lengths: together by the engine, one by one by the plain
loop, and by transformers' generate on the same weights.

python -m bench.generation RUN FOLDER [--json FILE]: RUN is a run whose shape a published family
has, FOLDER what `python -m launch.export run=RUN to=FOLDER dtype=fp32` wrote. Everything in fp32 on
one thread; milliseconds are processor time, since the machine is shared. Texts are greedy and of
equal length, so that all ways compute the same tokens, which is checked.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.common import Row, find_commit
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from model.generate import generate
from model.transformer import Transformer
from train.files.strict_json import dumps

NUM_PROMPTS, NEW_TOKENS, SHORTEST, LONGEST = 64, 48, 4, 200
ROUNDS = 5
Texts = list[list[int]]


def prompts_of(run: Path) -> Texts:
    """Pieces of held-out text, of lengths drawn evenly."""
    from launch.saved.run import load_run
    from train.data.prepare import prepare
    from train.data.store import TokenStore, ValidationRows

    rows = ValidationRows(TokenStore(prepare(load_run(str(run)).data)), LONGEST)
    draw = random.Random(0)
    found: Texts = []
    for i in range(len(rows)):
        tokens = [int(t) for t in rows.tokens(i)]
        if len(tokens) > LONGEST and len(found) < NUM_PROMPTS:
            found.append(tokens[: draw.randint(SHORTEST, LONGEST)])
    assert len(found) == NUM_PROMPTS, len(found)
    return found


def together(model: Transformer, prompts: Texts, slots: int) -> tuple[Texts, dict[str, int]]:
    engine = Engine(model, EngineConfig(max_slots=slots, prefix_reuse=False))
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_end=True)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    found = {c.name: c.tokens for c in engine.run(requests)}
    return [found[str(i)] for i in range(len(prompts))], engine.num_forwards


def one_by_one(model: Transformer, prompts: Texts) -> Texts:
    return [list(generate(model, prompt, NEW_TOKENS, temperature=0.0)) for prompt in prompts]


class Peer:
    """transformers, whose generate takes prompts in one batch, padded on the left."""

    def __init__(self, folder: str):
        transformers = importlib.import_module("transformers")
        self.version: str = transformers.__version__
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def together(self, prompts: Texts, rows: int) -> Texts:
        """Prompts sorted by length, `rows` at a time."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: Texts = [[] for _ in prompts]
        for begin in range(0, len(order), rows):
            part = order[begin : begin + rows]
            longest = max(len(prompts[i]) for i in part)
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            for row, i in enumerate(part):
                found[i] = out[row, longest:].tolist()
        return found


def main() -> None:
    from launch.saved.opened import opened

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("folder")
    parser.add_argument("--json")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model, _, _ = opened(arguments.run)
    prompts, peer = prompts_of(Path(arguments.run)), Peer(arguments.folder)
    forwards: dict[str, int] = {}

    def ours() -> Texts:
        found, counts = together(model, prompts, NUM_PROMPTS)
        forwards.update(counts)
        return found

    ways: dict[str, Callable[[], Texts]] = {
        "engine, 64 slots": ours,
        "engine, 16 slots": lambda: together(model, prompts, 16)[0],
        "one by one": lambda: one_by_one(model, prompts),
        "transformers, 64 rows": lambda: peer.together(prompts, NUM_PROMPTS),
        "transformers, 16 rows": lambda: peer.together(prompts, 16),
    }
    texts = {name: way() for name, way in ways.items()}  # warm as well
    same = {
        name: sum(a == b for a, b in zip(found, texts["one by one"], strict=True))
        for name, found in texts.items()
    }

    # Round by round in rotating order, so that what disturbs the machine hits all alike.
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(ROUNDS):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            begin = time.process_time()
            ways[name]()
            times[name].append(time.process_time() - begin)

    mine = names[0]
    ratios = {
        name: [other / own for other, own in zip(times[name], times[mine], strict=True)]
        for name in names[1:]
    }
    generated = NUM_PROMPTS * NEW_TOKENS
    row = Row(
        op="generation",
        shape={
            "prompts": NUM_PROMPTS,
            "prompt_tokens": sum(map(len, prompts)),
            "new_tokens": NEW_TOKENS,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        dtype="float32",
        device="cpu",
        commit=find_commit(),
        ours_ms=1e3 * statistics.median(times[mine]),
        rivals={n: 1e3 * statistics.median(times[n]) for n in names[1:]},
        ratio=min(statistics.median(r) for r in ratios.values()),
        roofline_fraction=None,
        extra={
            "forwards": dumps(forwards),
            "tokens_per_processor_second": generated / statistics.median(times[mine]),
            "transformers": peer.version,
            **{f"ratio, {n}": statistics.median(r) for n, r in ratios.items()},
            **{f"least ratio, {n}": min(r) for n, r in ratios.items()},
            **{f"greatest ratio, {n}": max(r) for n, r in ratios.items()},
            **{f"texts as one by one, {n}": float(count) for n, count in same.items()},
        },
    )
    text = dumps([asdict(row)], indent=1)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
