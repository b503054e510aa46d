"""Move rows over gloo ranks and compare with definitions that every rank computes alone; print the
largest errors.

Every case prints one JSON line {"check", "case", "errors"}: the maximum over ranks, 0.0 where
results must be equal.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from common import tiny_config

from model.config import ExpertsConfig
from model.dispatch.config import AllToAllConfig, LocalDispatcherConfig
from model.moe.experts import Experts
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from model.placement.record import LayerPlacement
from ops.all_to_all import Hop, begin_rows, end_rows, exchange_counts
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
    "as_many_everywhere": ([6, 6, 6, 6], 3, "unused"),
    "one_expert_gets_everything": ([5, 5, 5, 5], 2, "one"),
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


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (
        difference(ours, expected) / max(float(expected.abs().max()), 1e-9) if ours.numel() else 0.0
    )


def check_exchange(splits: list[list[int]], groups: ParallelGroups) -> dict[str, float]:
    """The definition in ops/all_to_all/README.md, and the same with rows and columns swapped for
    the gradient.
    """
    size, rank = groups.expert_size, groups.expert_rank
    table = torch.tensor(splits)[:size, :size]

    def definition(parts: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
        """parts[r]: the rows of rank r, counts[r, s] of them for rank s."""
        return torch.cat(
            [part.split(row.tolist())[rank] for part, row in zip(parts, counts, strict=True)]
        )

    sent = [normal(int(n), 3, seed=10 + r) for r, n in enumerate(table.sum(1))]
    grads = [normal(int(n), 3, seed=20 + r) for r, n in enumerate(table.sum(0))]
    rows = sent[rank].clone().requires_grad_()
    path = (Hop(groups.expert, table[rank].tolist(), table[:, rank].tolist()),)
    received = end_rows(begin_rows(rows, path))
    received.backward(grads[rank])
    home = end_rows(begin_rows(received.detach(), path, homeward=True))
    counts = torch.stack((table[rank], -table[rank]), dim=1)
    return {
        "rows": difference(received, definition(sent, table)),
        "homeward": difference(home, rows),
        "gradient": difference(rows.grad, definition(grads, table.T)),
        "counts": difference(
            exchange_counts(counts, groups.expert).double(),
            torch.stack((table[:, rank], -table[:, rank]), dim=1).double(),
        ),
    }


def routing_of(gates: torch.Tensor, expert_ids: torch.Tensor) -> RouterOutput:
    """The routing that sends every token to its given experts, with these gates."""
    spec = RouteSpec(NUM_EXPERTS, "given", max_experts=expert_ids.shape[1], normalize_weights=False)
    return reference_route(
        torch.zeros(len(gates), NUM_EXPERTS), spec, given_ids=expert_ids
    )._replace(weights=gates)


def placed(num_ranks: int, lent: int) -> LayerPlacement:
    """Experts in reverse order; the ranks behind the owner's of experts 0, 1, ... borrow them."""
    own = NUM_EXPERTS // num_ranks
    experts = tuple(reversed(range(NUM_EXPERTS)))
    owner = {e: i // own for i, e in enumerate(experts)}
    foreign = [[e for e in range(NUM_EXPERTS) if owner[e] != r] for r in range(num_ranks)]
    return LayerPlacement(experts, tuple(tuple(e[:lent]) for e in foreign))


def variants(size: int) -> dict[str, dict]:
    """Fields of AllToAllConfig, "lent" experts of a placement, and whether rows travel by
    nodes.
    """
    own = NUM_EXPERTS // size
    found: dict[str, dict] = {
        "plain": {},
        "chunks": {"num_chunks": own},
        "fixed": {"buffer_factor": float(size)},
        "fixed_chunks": {"buffer_factor": float(NUM_EXPERTS), "num_chunks": own},
        "placed": {"lent": 0},
        "lent": {"lent": 2},
        "bf16": {"payload": "bf16", "num_chunks": own},
        "fp8": {"payload": "fp8"},
        "lent_fixed_chunks": {"lent": 1, "buffer_factor": float(NUM_EXPERTS), "num_chunks": own},
        "evaluation": {"buffer_factor": 0.01, "dropless": True},
    }
    if size == 4:
        found |= {
            "nodes": {"nodes": True},
            "nodes_chunks": {"nodes": True, "num_chunks": 2},
            "nodes_fixed_lent": {"nodes": True, "buffer_factor": 4.0, "lent": 1},
        }
    return found


def check_dispatcher(
    tokens_per_rank: list[int], top_k: int, load: str, groups: ParallelGroups
) -> dict[str, float]:
    """Every variant on this rank's tokens against LocalDispatcher on the tokens of the whole
    group.
    """
    config = tiny_config(
        hidden_size=HIDDEN, num_experts=NUM_EXPERTS, expert_intermediate_size=WIDTH
    )
    sizes = [tokens_per_rank[r] for r in dist.get_process_group_ranks(groups.expert)]
    start = sum(sizes[: groups.expert_rank])
    mine = slice(start, start + sizes[groups.expert_rank])
    total = sum(sizes)
    expert_ids = draw_expert_ids(
        total, NUM_EXPERTS, top_k, load, seed=groups.stage_rank // groups.expert_size
    )
    gates = normal(total, top_k, seed=1).masked_fill(expert_ids < 0, 0.0)
    hidden, out_grad = normal(total, HIDDEN, seed=2), normal(total, HIDDEN, seed=3)
    gate_up, down = (
        normal(NUM_EXPERTS, 2 * WIDTH, HIDDEN, seed=4),
        normal(NUM_EXPERTS, HIDDEN, WIDTH, seed=5),
    )

    def layer(
        dispatcher, experts: Experts, tokens: slice, identity: bool = False, dropless: bool = False
    ) -> list[torch.Tensor]:
        """Output, gradients of hidden and gates, of the weights by global expert; assignments
        computed here.
        """
        leaves = [hidden[tokens].clone().requires_grad_(), gates[tokens].clone().requires_grad_()]
        ids = list(experts.global_ids)
        with torch.no_grad():
            experts.gate_up.copy_(gate_up[ids])
            experts.down.copy_(down[ids])
        used = (expert_ids[tokens] >= 0).double() if identity else leaves[1]
        loan = experts.lend()
        dispatched = dispatcher.start(
            leaves[0], routing_of(used, expert_ids[tokens]), dropless=dropless
        )
        stacks = experts.stacks(dispatcher.chunk_sizes, loan)
        if identity:
            return [dispatched.finish(lambda chunk, rows: rows.hidden)[0]]
        out, processed = dispatched.finish(lambda chunk, rows: experts(stacks[chunk], rows))
        grads = torch.autograd.grad(out, [*leaves, experts.gate_up, experts.down], out_grad[tokens])
        order = torch.tensor(ids).argsort()
        return [
            out.detach(),
            *grads[:2],
            grads[2][order],
            grads[3][order],
            torch.tensor(ids)[order],
            processed,
        ]

    single = ParallelGroups.single()
    expected = layer(
        LocalDispatcherConfig().build(config, single),
        Experts(config, single, ExpertsConfig("reference")).double(),
        slice(None),
    )
    errors: dict[str, float] = {}
    plain: list[torch.Tensor] = []
    for name, options in variants(groups.expert_size).items():
        options = dict(options)
        dropless = options.pop("dropless", False)
        if "buffer_factor" in options and not dropless and len(set(sizes)) > 1:
            continue  # fixed buffers need as many tokens on every rank
        own_groups = (
            groups if options.pop("nodes", False) else dataclasses.replace(groups, nodes=None)
        )
        placement = placed(groups.expert_size, options.pop("lent")) if "lent" in options else None
        dispatcher = AllToAllConfig(**options).build(config, own_groups, placement)
        experts = Experts(config, own_groups, ExpertsConfig(), placement).double()
        found = layer(dispatcher, experts, mine, dropless=dropless)
        held = found[5]
        pairs = zip(
            found[:5],
            (
                expected[0][mine],
                expected[1][mine],
                expected[2][mine],
                expected[3][held],
                expected[4][held],
            ),
            strict=True,
        )
        rounds = "payload" in options
        errors[name] = max(relative(a, b) if rounds else difference(a, b) for a, b in pairs)
        processed = found[6].clone()
        dist.all_reduce(processed, group=groups.expert)
        errors[f"{name} processed"] = abs(int(processed) - int((expert_ids >= 0).sum()))
        plain = plain or found
        # every expert sees the same rows in the same order: the same bits
        if placement is None and not rounds:
            errors[f"{name} bits"] = max(
                difference(a, b) for a, b in zip(found[:5], plain[:5], strict=True)
            )
        if rounds:
            continue
        # Identity experts with gates of 1 in every used slot: each token comes home as often as it
        # was sent.
        home = layer(dispatcher, experts, mine, identity=True, dropless=dropless)[0]
        errors[f"{name} token order"] = difference(
            home, hidden[mine] * (expert_ids[mine] >= 0).sum(1, keepdim=True)
        )
    return errors


def main() -> None:
    torch.set_num_threads(1)
    # with the next line: fresh memory holds NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo")
    for expert_parallel_size in (2, 4):
        groups = initialize_parallel(expert_parallel_size, ranks_per_node=2)
        results = [
            ("exchange", case, check_exchange(splits, groups)) for case, splits in SPLITS.items()
        ]
        results += [
            ("dispatcher", case, check_dispatcher(*routing, groups))
            for case, routing in ROUTINGS.items()
        ]
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, results)
        for same_case in zip(*everyone, strict=True):
            check, case, errors = same_case[0]
            # NaN must not win a comparison, hence the `not <=`.
            worst = {
                name: max((r[2][name] for r in same_case), key=lambda e: e if e <= 1e300 else 1e300)
                for name in errors
            }
            if dist.get_rank() == 0:
                print(
                    json.dumps(
                        {
                            "check": check,
                            "case": f"{case}-ep{expert_parallel_size}",
                            "errors": worst,
                        }
                    ),
                    flush=True,
                )
        destroy_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
