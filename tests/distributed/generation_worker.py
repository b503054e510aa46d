"""Generate on two ranks that share the experts, each with requests of its own, and print what each
got as JSON lines {"rank", "case", "tokens", "forwards"}.

Rank 1 has fewer and shorter requests, so it goes on with nothing of its own for a while; in the
case "idle" it has none at all.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from common import LATENT, LATENT_SHAPE, VOCAB_SIZE, build, tiny_config

from infer.budget import RouterState, capture
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from model.config import BalanceConfig
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from model.routers.config import ThresholdConfig
from model.transformer import Transformer

SPARSE = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4}
CASES: dict[str, tuple[dict | None, tuple[int, int]]] = {
    "dense": (None, (7, 3)),
    "scc": (SPARSE, (7, 3)),
    "mla": (LATENT, (7, 3)),
    "idle": (None, (4, 0)),
    "budgets": (None, (6, 3)),
}
BUDGETS = (None, 1.0, 3.0)
"""Of the case "budgets": rank 1 has requests of one of them alone."""


def model_of(case: str, groups: ParallelGroups | None) -> Transformer:
    attention, _ = CASES[case]
    shape = LATENT_SHAPE if attention is LATENT else {}
    router = {"router": ThresholdConfig, "budget": 2.0} if case == "budgets" else {}
    model = build(tiny_config(**shape), BalanceConfig(), groups, attention=attention, **router)
    with torch.no_grad():
        model.head.weight *= 10
        for layer in model.routers() if router else ():
            layer.balance_bias.fill_(-0.5)
    return model.eval()


def budgets_of(case: str, model: Transformer) -> dict[float, list[RouterState]] | None:
    if case != "budgets":
        return None
    states = capture(model.routers())

    def cut_at(cut: float) -> list[RouterState]:
        return [s._replace(balance_bias=torch.full_like(s.balance_bias, -cut)) for s in states]

    return {1.0: cut_at(0.6), 3.0: cut_at(0.4)}


def requests_of(case: str, rank: int) -> list[Request]:
    """Greedy ones and drawn ones, which end at different times."""
    gen = torch.Generator().manual_seed(rank)
    found = []
    for i in range(CASES[case][1][rank]):
        length = int(torch.randint(1, 30, (1,), generator=gen))
        prompt = torch.randint(0, VOCAB_SIZE, (length,), generator=gen).tolist()
        sampling = SamplingConfig(
            max_new_tokens=4 + 3 * i, temperature=0.8 * (i % 2), top_p=0.9, seed=10 * rank + i
        )
        budget = BUDGETS[2 if rank else i % 3] if case == "budgets" else None
        found.append(Request(str(i), prompt, sampling, budget=budget))
    return found


def tokens_of(
    case: str, model: Transformer, requests: list[Request]
) -> tuple[list[list[int]], dict]:
    settings = EngineConfig(max_slots=3, prefill_tokens=24)
    engine = Engine(model, settings, budgets=budgets_of(case, model))
    found = {c.name: c.tokens for c in engine.run(requests)}
    return [found[str(i)] for i in range(len(found))], engine.num_forwards


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = initialize_parallel(2)
    rank = dist.get_rank()
    for case in CASES:
        tokens, forwards = tokens_of(case, model_of(case, groups), requests_of(case, rank))
        gathered: list = [None, None]
        dist.all_gather_object(gathered, (tokens, forwards))
        if rank == 0:
            for r, (texts, counts) in enumerate(gathered):
                line = {"rank": r, "case": case, "tokens": texts, "forwards": counts}
                print(json.dumps(line), flush=True)
    destroy_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
