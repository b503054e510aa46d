"""Do adaptive routers hold their budget on every layer, and after the text changes? Small models,
one thread.

    python -m bench.quality.budget_held OUT.json [--routers threshold ...] [--budgets 1.3 2.0 3.7]
        [--seeds 1 2 3] [--sizes small medium] [--tokens N]

trains byte-level models in this process, each STEPS_BEFORE steps on Shakespeare and then
STEPS_AFTER on the source code of Python's standard library. For every layer: the mean experts per
token over the last half of the first text, and from step SETTLE of the second one on, against the
budget; and the training loss of both. Runs that OUT.json holds already are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, BudgetConfig, FailSafeConfig, ModelConfig
from model.dispatch.config import AllToAllConfig
from model.loss import training_loss
from model.moe.balance import balance_metrics, unpack_stats
from model.moe.budget import start_routers, update_routers
from model.moe.layer import ModelParts
from model.request import TokenBatch
from model.routers.config import (
    ExpertChoiceConfig,
    NullExpertsConfig,
    ReLUConfig,
    ThresholdConfig,
    TopKConfig,
    TopPConfig,
)
from model.transformer import Transformer
from train.data.sources import sample_files
from train.files.strict_json import dumps

STEPS_BEFORE, STEPS_AFTER, SETTLE = 300, 160, 100
SEQ_LEN = 32
LEARNING_RATE, WARM_UP = 2e-3, 20
SETTINGS = BudgetConfig(warm_start_steps=20, blend_steps=20)

SIZES = {
    "small": (
        {"hidden_size": 48, "num_layers": 1, "num_experts": 8, "expert_intermediate_size": 32},
        768,
    ),
    "medium": (
        {"hidden_size": 96, "num_layers": 1, "num_experts": 16, "expert_intermediate_size": 64},
        768,
    ),
}
"""Shape, and tokens of a step."""
AUX = BalanceConfig(aux_loss_coeff=0.01, z_loss_coeff=0.001)
QUANTILE = BalanceConfig(z_loss_coeff=0.001, bias_update="quantile")
ROUTERS: dict[str, tuple[Any, BalanceConfig]] = {
    "top_k": (TopKConfig, AUX),
    "threshold": (ThresholdConfig, AUX),
    "top_p": (TopPConfig, QUANTILE),
    "relu": (ReLUConfig, BalanceConfig()),
    "relu_l1": (ReLUConfig, AUX),
    "null_experts": (NullExpertsConfig, QUANTILE),
    "null_experts_aux": (NullExpertsConfig, AUX),
    "expert_choice": (ExpertChoiceConfig, BalanceConfig()),
}
"""Class and balance, as the README pairs them; the others for comparison."""


@functools.cache
def corpus(name: str) -> torch.Tensor:
    """[N] int64 bytes of a text, at most 2 MB of it."""
    if name == "plays":
        files = [Path(p) for p in sample_files()]
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b""
    for path in files:
        text += path.read_bytes()
        if len(text) > 2_000_000:
            break
    return torch.frombuffer(bytearray(text[:2_000_000]), dtype=torch.uint8).long()


def batch(text: torch.Tensor, rows: int, generator: torch.Generator) -> TokenBatch:
    """Random rows of the text, one document each."""
    starts = torch.randint(len(text) - SEQ_LEN - 1, (rows, 1), generator=generator)
    tokens = text[starts + torch.arange(SEQ_LEN + 1)]
    return TokenBatch(
        input_ids=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=torch.arange(SEQ_LEN).expand(rows, SEQ_LEN),
        cu_seqlens=torch.arange(0, rows * SEQ_LEN + 1, SEQ_LEN, dtype=torch.int32),
        max_seqlen=SEQ_LEN,
    )


def build(
    router: str, budget: float, size: str, seed: int, settings: BudgetConfig, shared: int
) -> Transformer:
    kind, balance = ROUTERS[router]
    shape, _ = SIZES[size]
    config = ModelConfig(
        vocab_size=256,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        max_seq_len=SEQ_LEN,
        num_shared_experts=shared,
        qk_norm="head",
        tie_embeddings=True,
        **shape,
    )
    options: dict[str, Any] = {"budget": budget}
    if kind in (ExpertChoiceConfig, TopKConfig):
        options = {"top_k": round(budget)}
    if kind is NullExpertsConfig:
        options["num_null_experts"] = config.num_experts
    parts = ModelParts(
        kind(**options),
        DenseAttentionConfig(),
        AllToAllConfig(),
        balance,
    )
    model = Transformer(config, parts, seed=seed)
    start_routers(model.routers(), settings, FailSafeConfig())
    return model


def train(
    router: str,
    budget: float,
    size: str,
    seed: int,
    settings: BudgetConfig = SETTINGS,
    tokens: int | None = None,
    shared: int = 1,
) -> dict[str, Any]:
    """One run, as described above."""
    model = build(router, budget, size, seed, settings, shared)
    balance, routers, config = model.moe.balance, model.routers(), model.config
    rows = (tokens or SIZES[size][1]) // SEQ_LEN
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    means, losses, counts, guarded, started = [], [], [], 0, time.process_time()
    steps = STEPS_BEFORE + STEPS_AFTER
    for step in range(steps):
        inputs = batch(corpus("plays" if step < STEPS_BEFORE else "code"), rows, generator)
        rate = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate * min(1.0, (step + 1) / WARM_UP)
        output = model(inputs)
        training_loss(output, rows * SEQ_LEN, rows * SEQ_LEN, balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stats = unpack_stats(output.stats, config.num_experts, routers[0].max_top_k)
        update_routers(routers, stats, balance, settings, FailSafeConfig())
        means.append(stats.experts_per_token)
        counts.append(stats.counts)
        losses.append(float(output.loss_sum.detach()) / (rows * SEQ_LEN))
        if step >= settings.warm_start_steps + settings.blend_steps:
            guarded += int(any(float(r.router_inputs.share) < 1 for r in routers))
    k = torch.stack(means) / routers[0].target - 1
    tens = (k[: len(k) // 10 * 10] + 1).view(-1, 10, k.shape[1])
    late = {
        "before": slice(STEPS_BEFORE // 2, STEPS_BEFORE),
        "after": slice(STEPS_BEFORE + SETTLE, steps),
    }
    found: dict[str, Any] = {
        "router": router,
        "budget": routers[0].target,
        "size": size,
        "seed": seed,
        "tokens": rows * SEQ_LEN,
        "noise": k[late["before"]].std(0).tolist(),
        "steps_in_fallback": guarded,
        "theta": [float(r.controller_state.theta) for r in routers],
        "step_ms": 1e3 * (time.process_time() - started) / steps,
        "series": [[round(v, 3) for v in layer] for layer in tens.mean(1).T.tolist()],
    }
    for name, part in late.items():
        found[f"error_{name}"] = k[part].mean(0).tolist()
        found[f"loss_{name}"] = sum(losses[part]) / len(losses[part])
        found[f"max_vio_{name}"] = balance_metrics(torch.stack(counts[part]).sum(0))["moe/max_vio"]
    return found


def worst(run: dict[str, Any], name: str) -> float:
    return max(abs(e) for e in run[f"error_{name}"])


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a line for each router, size and budget, its seeds together."""
    lines = [
        "| router | size | budget | largest error of a layer, last half of the first text, by seed "
        "| from "
        f"{SETTLE} steps after the change | noise of a step | MaxVio | loss before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["router"], run["size"], run["budget"]), []).append(run)
    for (router, size, budget), group in groups.items():
        mean = {
            name: sum(run[name] for run in group) / len(group)
            for name in ("loss_before", "loss_after", "max_vio_before")
        }
        noise = max(max(run["noise"]) for run in group)
        before, after = (
            " ".join(f"{worst(run, name):.2%}" for run in group) for name in ("before", "after")
        )
        lines.append(
            f"| {router} | {size} | {budget:g} | {before} | {after} | {noise:.1%} | "
            f"{mean['max_vio_before']:.3f} | "
            f"{mean['loss_before']:.4f} | {mean['loss_after']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.budget_held")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--routers",
        nargs="+",
        choices=ROUTERS,
        default=["threshold", "top_p", "relu", "null_experts"],
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.3, 2.0, 3.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", type=int, help="of a step, instead of the size's own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    done = {(r["router"], r["size"], r["budget"], r["seed"]) for r in runs}
    for size in arguments.sizes:
        for router in arguments.routers:
            for budget in arguments.budgets:
                for seed in arguments.seeds:
                    if (router, size, budget, seed) in done:
                        continue
                    runs.append(train(router, budget, size, seed, tokens=arguments.tokens))
                    arguments.out.write_text(dumps(runs) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
