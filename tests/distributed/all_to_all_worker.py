"""Move rows over gloo ranks and compare with definitions that every rank computes alone; print the largest errors.

Every case prints one JSON line {"check", "case", "errors"}: the maximum over ranks, 0.0 where results must be equal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from common import tiny_config

from model.dispatch import AllToAllDispatcher, LocalDispatcher
from model.parallel import ParallelGroups, destroy_parallel, initialize_parallel
from ops.all_to_all import all_to_all_rows, exchange_counts
from ops.grouped_mlp import grouped_mlp
from ops.router import RouterOutput, RouteSpec, reference_route
from ops.testing import draw_expert_ids

HIDDEN, WIDTH, NUM_EXPERTS = 16, 8, 8
# Rows that rank `row` sends to rank `column`; groups of two use the upper left corner.
SPLITS = {
    "variable": [[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9, 3]],
    "zeros": [[0, 2, 0, 1], [3, 0, 0, 0], [0, 0, 4, 2], [1, 0, 0, 0]],
    "a_rank_sends_nothing": [[2, 3, 1, 2], [0, 0, 0, 0], [1, 2, 3, 4], [5, 1, 1, 1]],
    "a_rank_receives_nothing": [[2, 0, 1, 2], [1, 0, 3, 1], [1, 0, 3, 4], [5, 0, 1, 1]],
    "all_to_one": [[0, 3, 0, 0], [0, 2, 0, 0], [0, 5, 0, 0], [0, 1, 0, 0]],
    "nobody_sends": [[0] * 4] * 4,
}
# Tokens per rank, slots per token, load of ops.testing.draw_expert_ids.
ROUTINGS = {
    "even": ([5, 3, 7, 4], 2, "even"),
    "one_expert_gets_everything": ([5, 3, 7, 4], 2, "one"),
    "experts_with_none": ([5, 3, 7, 4], 3, "half"),
    "a_rank_without_tokens": ([5, 0, 0, 4], 2, "even"),
    "no_tokens_anywhere": ([0, 0, 0, 0], 2, "even"),
    "unused_slots": ([5, 3, 7, 4], 4, "unused"),
    "no_slot_used": ([5, 3, 7, 4], 2, "none"),
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} is not {tuple(expected.shape)}"
    return float((ours.detach() - expected.detach()).abs().max()) if ours.numel() else 0.0


def check_exchange(splits: list[list[int]], groups: ParallelGroups) -> dict[str, float]:
    """The definition in ops/all_to_all/README.md, and the same with rows and columns swapped for the gradient."""
    size, rank = groups.expert_size, groups.expert_rank
    table = torch.tensor(splits)[:size, :size]

    def definition(parts: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
        """parts[r]: the rows of rank r, counts[r, s] of them for rank s."""
        return torch.cat([part.split(row.tolist())[rank] for part, row in zip(parts, counts, strict=True)])

    sent = [normal(int(n), 3, seed=10 + r) for r, n in enumerate(table.sum(1))]
    grads = [normal(int(n), 3, seed=20 + r) for r, n in enumerate(table.sum(0))]
    rows = sent[rank].clone().requires_grad_()
    received = all_to_all_rows(rows, table[rank].tolist(), table[:, rank].tolist(), groups.expert)
    received.backward(grads[rank])
    counts = torch.stack((table[rank], -table[rank]), dim=1)
    return {"rows": difference(received, definition(sent, table)),
            "gradient": difference(rows.grad, definition(grads, table.T)),
            "counts": difference(exchange_counts(counts, groups.expert).double(),
                                 torch.stack((table[:, rank], -table[:, rank]), dim=1).double())}


def routing_of(gates: torch.Tensor, expert_ids: torch.Tensor) -> RouterOutput:
    """The routing that sends every token to its given experts, with these gates."""
    spec = RouteSpec(NUM_EXPERTS, "given", max_experts=expert_ids.shape[1], normalize_weights=False)
    return reference_route(torch.zeros(len(gates), NUM_EXPERTS), spec, given_ids=expert_ids)._replace(weights=gates)


def check_dispatcher(tokens_per_rank: list[int], top_k: int, load: str, groups: ParallelGroups) -> dict[str, float]:
    """dispatch, experts, combine on this rank's tokens against LocalDispatcher on the tokens of the whole group."""
    config = tiny_config(hidden_size=HIDDEN, num_experts=NUM_EXPERTS, expert_intermediate_size=WIDTH)
    sizes = [tokens_per_rank[r] for r in dist.get_process_group_ranks(groups.expert)]
    start = sum(sizes[:groups.expert_rank])
    mine = slice(start, start + sizes[groups.expert_rank])
    held = groups.local_experts(NUM_EXPERTS)
    held = slice(held.start, held.stop)
    total = sum(sizes)
    expert_ids = draw_expert_ids(total, NUM_EXPERTS, top_k, load, seed=groups.data_rank // groups.expert_size)
    gates = normal(total, top_k, seed=1).masked_fill(expert_ids < 0, 0.0)
    hidden, out_grad = normal(total, HIDDEN, seed=2), normal(total, HIDDEN, seed=3)
    gate_up, down = normal(NUM_EXPERTS, 2 * WIDTH, HIDDEN, seed=4), normal(NUM_EXPERTS, HIDDEN, WIDTH, seed=5)

    def layer(dispatcher, tokens: slice, experts: slice) -> tuple:
        """Dispatched rows, output, gradients of all four leaves, rows per expert."""
        leaves = [t.clone().requires_grad_() for t in (hidden[tokens], gates[tokens], gate_up[experts], down[experts])]
        routing = routing_of(leaves[1], expert_ids[tokens])
        rows, plan = dispatcher.dispatch(leaves[0], routing)
        out = dispatcher.combine(grouped_mlp(rows, leaves[2], leaves[3], plan.counts), plan)
        return rows, out, torch.autograd.grad(out, leaves, out_grad[tokens]), plan.counts

    every = slice(None)
    rows, out, grads, counts = layer(AllToAllDispatcher(config, groups), mine, held)
    all_rows, all_out, all_grads, all_counts = layer(LocalDispatcher(config, ParallelGroups.single()), every, every)
    ends = [0, *all_counts.cumsum(0).tolist()]
    errors = {"rows": difference(rows, all_rows[ends[held.start]:ends[held.stop]]),
              "counts": difference(counts.double(), all_counts[held].double()),
              "out": difference(out, all_out[mine])}
    for name, ours, expected, part in zip(("hidden", "gates", "gate_up", "down"), grads, all_grads,
                                          (mine, mine, held, held), strict=True):
        errors[f"grad {name}"] = difference(ours, expected[part])

    # Identity experts with gates of 1 in every used slot: each token comes home as often as it was sent.
    used = (expert_ids[mine] >= 0).double()
    dispatcher = AllToAllDispatcher(config, groups)
    home = dispatcher.combine(*dispatcher.dispatch(hidden[mine], routing_of(used, expert_ids[mine])))
    errors["token order"] = difference(home, hidden[mine] * used.sum(1, keepdim=True))
    return errors


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # with the next line: fresh memory holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo")
    for expert_parallel_size in (2, 4):
        groups = initialize_parallel(expert_parallel_size)
        results = [("exchange", case, check_exchange(splits, groups)) for case, splits in SPLITS.items()]
        results += [("dispatcher", case, check_dispatcher(*routing, groups)) for case, routing in ROUTINGS.items()]
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, results)
        for same_case in zip(*everyone, strict=True):
            check, case, errors = same_case[0]
            # NaN must not win a comparison, hence the `not <=`.
            worst = {name: max((r[2][name] for r in same_case), key=lambda e: e if e <= 1e300 else 1e300)
                     for name in errors}
            if dist.get_rank() == 0:
                print(json.dumps({"check": check, "case": f"{case}-ep{expert_parallel_size}", "errors": worst}),
                      flush=True)
        destroy_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
