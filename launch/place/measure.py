"""What a run measured about its experts' load: from its routing records, and from its audit log."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.place.settings import Layout, PlaceConfig
from launch.runs.lines import LineIndex

MAX_LOADS = 32_000_000
"""Most loads (lines * layers * experts) that are held."""

MAX_AUDIT_BYTES = 1 << 26
"""Of larger audits only AUDIT_STEPS steps of every half are read, spread evenly."""
AUDIT_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """What a run says about its experts."""

    step: np.ndarray
    """[N], of the lines of routing.jsonl."""
    loads: np.ndarray
    """[N, MoE layers, E] assignments since the line before."""
    together: np.ndarray | None
    """[2, MoE layers, E, E] sampled tokens that visit both experts, in the earlier and the later
    half of the lines. None: there is no audit, or nobody asks.
    """

    @property
    def half(self) -> int:
        return len(self.step) // 2


def measure(settings: PlaceConfig, model: Any, layout: Layout) -> Measured:
    """Read routing.jsonl, and the audit if there are nodes to choose between."""
    after, step, loads = read_loads(
        Path(settings.run) / "routing.jsonl",
        (len(model.moe_layers), model.num_experts),
        settings.last_steps,
    )
    together = None
    if layout.ranks_per_node is not None:
        bounds = (after, int(step[len(step) // 2 - 1]), int(step[-1]))
        together = read_together(settings.run, bounds, model)
    return Measured(step, loads, together)


def read_loads(
    path: Path, shape: tuple[int, int], last: int | None = None
) -> tuple[int, np.ndarray, np.ndarray]:
    """The step that the lines begin after, their steps [N], and assignments [N, MoE layers, E] of
    routing.jsonl: of all its lines or of the last ones. Lines that a crash cut off are skipped;
    beyond MAX_LOADS numbers neighbours are added up.

    Raises:
        ValueError: there is no such file, it is of another model, or has too few lines to plan on
            some and test on others.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): the run has not reached its first log step"
        ) from None

    # The last line may be half written by a run that goes on.
    index = LineIndex(path)
    rows = np.arange(len(index))
    if len(rows) and _parsed(next(index.lines(rows[-1:]))) is None:
        rows = rows[:-1]

    first = 0 if last is None else max(0, len(rows) - last)
    after = int(index.step[first - 1]) if first > 0 else 0
    together = -(-(len(rows) - first) * shape[0] * shape[1] // MAX_LOADS)

    steps: list[int] = []
    loads: list[np.ndarray] = []
    for number, (step, counts) in enumerate(filter(None, map(_parsed, index.lines(rows[first:])))):
        if counts.shape != shape:
            raise ValueError(
                f"{path} has a table of {list(counts.shape)} in step {step}, but the run has "
                f"{shape[0]} layers with {shape[1]} experts: it belongs to another run"
            )
        if number % max(1, together) == 0:
            steps.append(step)
            loads.append(counts)
        else:
            steps[-1] = step
            loads[-1] += counts

    if len(steps) < 2:
        raise ValueError(
            f"{path} has {len(steps)} usable lines; planning needs two, one to plan on and one to "
            "test on: train on, or with a smaller train.log_interval"
        )
    return after, np.array(steps), np.stack(loads)


def _parsed(line: bytes) -> tuple[int, np.ndarray] | None:
    try:
        facts = json.loads(line)
        return int(facts["step"]), np.array(facts["counts"], dtype=np.float64)
    except (ValueError, KeyError, TypeError):
        return None


def read_together(run_dir: str, bounds: tuple[int, int, int], model: Any) -> np.ndarray | None:
    """[2, MoE layers, E, E]: sampled tokens that visit both experts, in steps (bounds[0],
    bounds[1]] and (bounds[1], bounds[2]]. None, with one line that says why, where there is nothing
    to count.
    """
    from train.audit.files import steps_that_fit
    from train.audit.format import FOLDER
    from train.audit.records import read_records, read_steps

    folder = Path(run_dir) / FOLDER
    try:
        audited = read_steps(folder).step
    except ValueError as error:
        print(f"nodes are not told apart: {error}")
        return None

    # Each half gets its share of what fits: one must not crowd out the other.
    halves = [
        audited[(audited > start) & (audited <= end)] for start, end in itertools.pairwise(bounds)
    ]
    chosen = [
        steps_that_fit(folder, MAX_AUDIT_BYTES, AUDIT_STEPS, half) for half in halves if len(half)
    ]
    pieces = [
        read_records(
            folder, None if None in chosen else [step for part in chosen for step in part or ()]
        )
    ]

    together = np.zeros((2, len(model.moe_layers), model.num_experts, model.num_experts))
    for records in pieces:
        for half, (start, end) in enumerate(itertools.pairwise(bounds)):
            inside = records.sampled & (records.step > start) & (records.step <= end)
            for index, layer in enumerate(model.moe_layers):
                part = records.take(inside & (records.layer == layer))
                together[half, index] += co_activation(
                    part.owner, part.experts, len(part), model.num_experts
                )

    if not together.any():
        print(
            f"nodes are not told apart: {folder} has no sampled token with two experts in these "
            "steps; train with a smaller audit.sample_one_in"
        )
        return None
    return together


def co_activation(
    owner: np.ndarray, experts: np.ndarray, num_tokens: int, num_experts: int
) -> np.ndarray:
    """[E, E] float64: tokens that visit both experts. owner, experts [A]: the token of each
    assignment, in order, and its expert.
    """
    together = np.zeros((num_experts, num_experts))
    for start in range(0, num_tokens, 4096):
        part = slice(*np.searchsorted(owner, [start, start + 4096]))
        visits = np.zeros((min(4096, num_tokens - start), num_experts), dtype=np.float32)
        visits[owner[part] - start, experts[part]] = 1
        together += visits.T @ visits
    np.fill_diagonal(together, 0)
    return together
