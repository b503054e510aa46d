"""What Muon will move, send and compute, from a config alone. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model.cost.matrices import Matrices, hidden_matrices
from train.config.run import RunConfig
from train.engine.muon.pieces import (
    BATCH_ELEMENTS,
    Block,
    Matrix,
    Slices,
    multiplications,
    owned,
    pieces,
)

WORK_COPIES = 5
"""Newton-Schulz holds so many matrices: the one it was given, the old and the new iterate, and the
product of one with itself and a polynomial of that.
"""


@dataclass(frozen=True)
class PlannedMuon:
    """Of one step."""

    parameters: tuple[int, int]
    """That Muon moves: dense ones, and those of all experts."""
    num_matrices: int
    num_cut: int
    """Matrices that no rank holds whole."""
    sent_bytes: int
    """What the rank that sends most sends, pieces there and updates back."""
    flops: int
    """Of orthogonalising, on the rank with most of it."""
    work_bytes: int
    """What it holds at most while it orthogonalises."""


NONE = PlannedMuon((0, 0), 0, 0, 0, 0, 0)


def planned_muon(
    run: RunConfig, num_ranks: int, layers: Sequence[int] | None = None
) -> PlannedMuon:
    """Muon's share of a run; NONE where AdamW moves everything. layers: of one stage of a pipeline;
    None: of all stages together, where a rank's share is that of the busiest.

    Kinds of parameters that optim.groups or optim.freeze name are followed; patterns of names are
    not, and neither are embedding, head and router given to Muon by optim.groups.
    """
    if not run.optim.uses_muon or run.lora.rank:  # adapters are AdamW's
        return NONE
    if layers is None:
        return _together([planned_muon(run, num_ranks, part) for part in run.stage_layers])
    num_ranks = run.parallel.stage_size(num_ranks)
    found = [
        entry
        for entry in hidden_matrices(run.model, run.attention.arguments, layers)
        if _is_moved(run, entry.kind)
    ]
    experts = [entry for entry in found if entry.kind == "experts"]
    dense = [entry for entry in found if entry.kind != "experts"]
    if not found:
        return NONE

    # Experts' ranks share out what one rank of an expert group has.
    size = run.parallel.expert_parallel_size
    local = [entry._replace(number=entry.number // size) for entry in experts]
    shared = [
        (_owned(dense, run.zero_stage, num_ranks), num_ranks),
        (_owned(local, run.zero_stage, num_ranks // size), num_ranks // size),
    ]
    width = 4 if run.optim.orthogonalize_dtype == "fp32" else 2
    largest = max(entry.rows * entry.columns for entry in found)
    most = max(sum(entry.size for entry in part) for part in (dense, local))
    return PlannedMuon(
        parameters=(sum(e.size for e in dense), sum(e.size for e in experts)),
        num_matrices=sum(entry.number for entry in found),
        num_cut=_cut(shared[0][0]) + size * _cut(shared[1][0]),
        sent_bytes=width * sum(_sent(matrices) for matrices, _ in shared),
        flops=sum(
            _flops(matrices, run.optim.orthogonalize_steps, run.zero_stage)
            for matrices, _ in shared
        ),
        work_bytes=WORK_COPIES * width * min(most, max(largest, BATCH_ELEMENTS)),
    )


def _together(stages: list[PlannedMuon]) -> PlannedMuon:
    """Sums of what all have, and the most that a rank of any has."""
    return PlannedMuon(
        parameters=(sum(s.parameters[0] for s in stages), sum(s.parameters[1] for s in stages)),
        num_matrices=sum(s.num_matrices for s in stages),
        num_cut=sum(s.num_cut for s in stages),
        sent_bytes=max(s.sent_bytes for s in stages),
        flops=max(s.flops for s in stages),
        work_bytes=max(s.work_bytes for s in stages),
    )


def _is_moved(run: RunConfig, kind: str) -> bool:
    if kind in run.optim.freeze:
        return False
    # Rules about names or some layers are too fine for a plan.
    whole = [group for group in run.optim.groups if group.layers is None]
    rule = next((group for group in whole if group.match in (kind, "*")), None)
    return ((rule and rule.optimizer) or run.optim.optimizer) == "muon"


def _owned(entries: list[Matrices], stage: int, num_ranks: int) -> list[Matrix]:
    """The matrices as a ZeRO stage cuts them over the ranks that share them."""
    blocks, offset = [], 0
    whole = sum(entry.size for entry in entries)
    for entry in entries:
        if stage == 3:
            slices, first = Slices(-(-entry.size // num_ranks)), 0
        elif stage in (1, 2):  # aligned, as DeepSpeed has them
            slices, first = Slices(2 * -(-whole // (2 * num_ranks))), offset
        else:
            slices, first = Slices(entry.size), 0
        each = entry.rows * entry.columns
        blocks += [
            (Block(first + i * each, entry.rows, entry.columns), slices)
            for i in range(entry.number)
        ]
        offset += entry.size
    return owned([(block, pieces(block, s, num_ranks)) for block, s in blocks], num_ranks)


def _cut(matrices: list[Matrix]) -> int:
    return sum(len(matrix.pieces) > 1 for matrix in matrices)


def _sent(matrices: list[Matrix]) -> int:
    """Elements that the busiest rank sends: its pieces to owners, and others' updates home."""
    sent: Counter[int] = Counter()
    for matrix in matrices:
        for piece in matrix.pieces:
            if piece.rank != matrix.owner:
                sent[piece.rank] += piece.size
                sent[matrix.owner] += piece.size
    return max(sent.values(), default=0)


def _flops(matrices: list[Matrix], steps: int, stage: int) -> int:
    """At stage 0 every rank owns, and so orthogonalises, all that it has."""
    load: Counter[int] = Counter()
    for matrix in matrices:
        load[matrix.owner if stage else 0] += multiplications(matrix.rows, matrix.columns, steps)
    return max(load.values(), default=0)
