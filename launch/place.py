"""Plan which rank serves which expert: python -m launch.place run=DIR [expert_parallel_size=N] [replicas_per_rank=N] ...

Reads what the run has measured (routing.jsonl, audit/), prints what a placement would change, and writes its file.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.place")

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from launch.common import load_config, load_run, print_result, record, run_main, typed

MAX_AUDIT_BYTES = 1 << 30
"""Of larger audits only AUDIT_STEPS steps of every half are read, spread evenly."""
AUDIT_STEPS = 4


@dataclass(frozen=True)
class PlaceConfig:
    """Settings of launch.place."""

    run: str
    expert_parallel_size: int | None = None
    """None: that of the run."""
    ranks_per_node: int | None = None
    """None: that of the run."""
    replicas_per_rank: int = 0
    last_steps: int | None = None
    """Lines of routing.jsonl to plan on, the last ones; None: all."""
    output: str | None = None
    """None: RUN/placement.json."""

    def problems(self) -> list[str]:
        found = [f"{name} is {value}; it must be at least 1" for name in ("expert_parallel_size", "ranks_per_node")
                 if (value := getattr(self, name)) is not None and value < 1]
        if self.replicas_per_rank < 0:
            found.append(f"replicas_per_rank is {self.replicas_per_rank}; it must not be negative")
        if self.last_steps is not None and self.last_steps < 2:
            found.append(f"last_steps is {self.last_steps}; it must be at least 2, one half to plan on and one to test on")
        return found


@dataclass(frozen=True)
class Measured:
    """What a run says about its experts. step [N], loads [N, MoE layers, E]: assignments since the line before.
    together: [2, MoE layers, E, E] sampled tokens that visit both experts, in the earlier and the later half of the lines;
    None: there is no audit, or nobody asks."""

    step: np.ndarray
    loads: np.ndarray
    together: np.ndarray | None

    @property
    def half(self) -> int:
        return len(self.step) // 2


@dataclass(frozen=True)
class Layout:
    """What to plan for. ranks_per_node: None where the experts of a group share a node, or nodes are not told."""

    ranks: int
    ranks_per_node: int | None
    replicas_per_rank: int


def main(config: DictConfig) -> None:
    """Print the tables, write the placement and say how to use it."""
    from model.placement import Placement
    from model.placement_plan import plan_layer
    from train.checkpoint_folder import newest_complete

    if config.run is None:
        raise ValueError("give run=DIR")
    settings: PlaceConfig = record(config, PlaceConfig)
    checkpoint = newest_complete(Path(settings.run))
    run = load_run(settings.run, checkpoint=checkpoint)
    if not run.model.moe_layers:
        raise ValueError(f"{settings.run} is a dense model: there are no experts to place")
    saved = load_config(str((checkpoint or Path(settings.run)) / "config.yaml")).parallel
    layout = choose_layout(settings, saved, run.model)
    measured = measure(settings, run.model, layout)

    def planned(loads: np.ndarray, together: np.ndarray | None) -> Any:
        return plan_layer(loads, layout.ranks, ranks_per_node=layout.ranks_per_node, together=together,
                          replicas_per_rank=layout.replicas_per_rank)

    now = current_placement(saved, layout, run.model)
    layers, facts = [], []
    for index, layer in enumerate(run.model.moe_layers):
        loads, half = measured.loads[:, index], measured.half
        earlier, later = (None, None) if measured.together is None else measured.together[:, index]
        together = None if measured.together is None else measured.together[:, index].sum(0)
        plan, test = planned(loads.sum(0), together), planned(loads[:half].sum(0), earlier)
        layers.append(plan)
        lent = [expert for experts in plan.replicas for expert in experts]
        facts.append({"layer": layer, "replicas": len(lent), "replicated_experts": len(set(lent)),
                      **compared(loads, together, now.layers[index], plan, layout),
                      "held_out": compared(loads[half:], later, now.layers[index], test, layout)})
    mean = report(settings.run, measured, facts, layout)
    output = write(Placement(layout.ranks, tuple(layers)), Path(settings.output or Path(settings.run) / "placement.json"))
    print(f"next: {next_command(settings, saved, layout, output)}")
    if layout.ranks != saved.get("expert_parallel_size", 1):
        print(f"      with a multiple of {layout.ranks} ranks (launch, launch.num_devices)")
    print_result({"run_dir": settings.run, "output": str(output), "expert_parallel_size": layout.ranks,
                  "ranks_per_node": layout.ranks_per_node, "replicas_per_rank": layout.replicas_per_rank,
                  "steps": [int(measured.step[0]), int(measured.step[-1])], "lines": len(measured.step), **mean,
                  "layers": facts})


def choose_layout(settings: PlaceConfig, saved: DictConfig, model: Any) -> Layout:
    """The sizes asked for, or else those of the run.

    Raises:
        ConfigError: they do not fit one another or the model, with every problem.
    """
    from launch.validate import ConfigError

    ranks = settings.expert_parallel_size or int(saved.get("expert_parallel_size", 1))
    node = settings.ranks_per_node or saved.get("ranks_per_node")
    problems = []
    if ranks == 1:
        problems.append("expert_parallel_size is 1: one rank holds all experts, and there is nothing to place; give "
                        "expert_parallel_size=N")
    elif model.num_experts % ranks:
        problems.append(f"model.num_experts {model.num_experts} is not divisible by expert_parallel_size {ranks}")
    else:
        others = model.num_experts - model.num_experts // ranks
        if settings.replicas_per_rank > others:
            problems.append(f"replicas_per_rank is {settings.replicas_per_rank}; the experts that a rank does not own are "
                            f"{others}")
    if node is not None and node < ranks and ranks % node:
        problems.append(f"ranks_per_node {node} does not divide expert_parallel_size {ranks}; give ranks_per_node=N")
    if problems:
        raise ConfigError(problems)
    return Layout(ranks, node if node is not None and node < ranks else None, settings.replicas_per_rank)


def current_placement(saved: DictConfig, layout: Layout, model: Any) -> Any:
    """What the plan is compared with: the run's own placement where it is for these ranks, else experts in order."""
    from model.placement import LayerPlacement, Placement

    sizes = (model.num_experts, len(model.moe_layers), layout.ranks)
    if saved.get("placement") is not None:
        try:
            placement = Placement.load(Path(saved.placement))
            if not placement.problems(*sizes):
                print(f"now: {saved.placement}")
                return placement
        except ValueError as error:
            print(f"the run's own placement is left out: {error}")
    print("now: experts in order")
    return Placement(layout.ranks, (LayerPlacement.identity(model.num_experts, layout.ranks),) * len(model.moe_layers))


# --- what the run measured -------------------------------------------------------------------------------------------

def measure(settings: PlaceConfig, model: Any, layout: Layout) -> Measured:
    """Read routing.jsonl, and the audit if there are nodes to choose between."""
    step, loads = read_loads(Path(settings.run) / "routing.jsonl", (len(model.moe_layers), model.num_experts))
    first = 0 if settings.last_steps is None else max(0, len(step) - settings.last_steps)
    after = int(step[first - 1]) if first > 0 else 0
    step, loads = step[first:], loads[first:]
    together = None
    if layout.ranks_per_node is not None:
        bounds = (after, int(step[len(step) // 2 - 1]), int(step[-1]))
        together = read_together(settings.run, bounds, model)
    return Measured(step, loads, together)


def read_loads(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and assignments [N, MoE layers, E] of routing.jsonl. Lines that a crash cut off are skipped.

    Raises:
        ValueError: there is no such file, it is of another model, or has too few lines to plan on some and test on others.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): the run has not reached its first log step") from None
    lines = [line for line in map(_parsed, text.splitlines()) if line is not None]
    wrong = next(((step, counts.shape) for step, counts in lines if counts.shape != shape), None)
    if wrong is not None:
        raise ValueError(f"{path} has a table of {list(wrong[1])} in step {wrong[0]}, but the run has {shape[0]} layers "
                         f"with {shape[1]} experts: it belongs to another run")
    if len(lines) < 2:
        raise ValueError(f"{path} has {len(lines)} usable lines; planning needs two, one to plan on and one to test on: "
                         "train on, or with a smaller train.log_interval")
    return np.array([step for step, _ in lines]), np.stack([counts for _, counts in lines])


def _parsed(line: str) -> tuple[int, np.ndarray] | None:
    try:
        facts = json.loads(line)
        return int(facts["step"]), np.array(facts["counts"], dtype=np.float64)
    except (ValueError, KeyError, TypeError):
        return None


def read_together(run_dir: str, bounds: tuple[int, int, int], model: Any) -> np.ndarray | None:
    """[2, MoE layers, E, E]: sampled tokens that visit both experts, in steps (bounds[0], bounds[1]] and (bounds[1],
    bounds[2]]. None, with one line that says why, where there is nothing to count."""
    from train.audit import FOLDER, read_records, read_steps

    folder = Path(run_dir) / FOLDER
    try:
        audited = read_steps(folder).step
    except ValueError as error:
        print(f"nodes are not told apart: {error}")
        return None
    halves = [audited[(audited > start) & (audited <= end)] for start, end in itertools.pairwise(bounds)]
    if sum(path.stat().st_size for path in folder.glob("records-*.bin")) <= MAX_AUDIT_BYTES:
        pieces = [read_records(folder)]
    else:
        chosen = [half[np.unique(np.linspace(0, len(half) - 1, AUDIT_STEPS).astype(int))] for half in halves if len(half)]
        pieces = (read_records(folder, int(step)) for part in chosen for step in part)  # type: ignore[assignment]
    together = np.zeros((2, len(model.moe_layers), model.num_experts, model.num_experts))
    for records in pieces:
        for half, (start, end) in enumerate(itertools.pairwise(bounds)):
            inside = records.sampled & (records.step > start) & (records.step <= end)
            for index, layer in enumerate(model.moe_layers):
                part = records.take(inside & (records.layer == layer))
                together[half, index] += co_activation(part.owner, part.experts, len(part), model.num_experts)
    if not together.any():
        print(f"nodes are not told apart: {folder} has no sampled token with two experts in these steps; train with a "
              "smaller audit.sample_one_in")
        return None
    return together


def co_activation(owner: np.ndarray, experts: np.ndarray, num_tokens: int, num_experts: int) -> np.ndarray:
    """[E, E] float64: tokens that visit both experts. owner, experts [A]: the token of each assignment, in order, and its
    expert."""
    together = np.zeros((num_experts, num_experts))
    for start in range(0, num_tokens, 4096):
        part = slice(*np.searchsorted(owner, [start, start + 4096]))
        visits = np.zeros((min(4096, num_tokens - start), num_experts), dtype=np.float32)
        visits[owner[part] - start, experts[part]] = 1
        together += visits.T @ visits
    np.fill_diagonal(together, 0)
    return together


# --- what the plan is worth ------------------------------------------------------------------------------------------

def compared(loads: np.ndarray, together: np.ndarray | None, now: Any, plan: Any, layout: Layout) -> dict[str, Any]:
    """Busiest rank over mean and share of co-activated pairs on different nodes, of a layer now and as planned."""
    from model.placement_plan import imbalance, node_crossings

    found: dict[str, Any] = {"imbalance": {"now": imbalance(loads, now), "planned": imbalance(loads, plan)}}
    if together is not None and layout.ranks_per_node is not None:
        found["crossings"] = {name: node_crossings(together, placement, layout.ranks_per_node)
                              for name, placement in (("now", now), ("planned", plan))}
    return found


def report(run_dir: str, measured: Measured, facts: list[dict[str, Any]], layout: Layout) -> dict[str, Any]:
    """Print the table and what it means; returns the means over layers."""
    step, half = measured.step, measured.half
    print(f"{run_dir}: {len(step)} lines of routing.jsonl to step {step[-1]}; held out: planned on those to step "
          f"{step[half - 1]}, tested on the later ones")
    nodes = "" if layout.ranks_per_node is None else f" on {layout.ranks // layout.ranks_per_node} nodes"
    print(f"busiest of {layout.ranks} ranks{nodes} over the mean rank, in every line of the log")
    crossings = "crossings" in facts[0]
    print("layer       now  planned | held out: now  planned" + (" | pairs across nodes: now  planned  held out" if crossings
          else "") + (" | replicas of experts" if layout.replicas_per_rank else ""))

    def line(name: str, fact: dict[str, Any]) -> None:
        whole, test = fact["imbalance"], fact["held_out"]["imbalance"]
        text = f"{name:5s} {whole['now']:8.3f}x {whole['planned']:7.3f}x | {test['now']:12.3f}x {test['planned']:7.3f}x"
        if crossings:
            text += (f" | {fact['crossings']['now']:23.1%} {fact['crossings']['planned']:8.1%} "
                     f"{fact['held_out']['crossings']['planned']:9.1%}")
        if layout.replicas_per_rank and "replicas" in fact:
            text += f" | {fact['replicas']:8d} {fact['replicated_experts']:10d}"
        print(text)

    for fact in facts:
        line(str(fact["layer"]), fact)
    mean: dict[str, Any] = {name: _mean([fact[name] for fact in facts]) for name in ("imbalance", "crossings")
                            if name in facts[0]}
    mean["held_out"] = {name: _mean([fact["held_out"][name] for fact in facts]) for name in mean}
    line("mean", mean)
    before, after = mean["imbalance"]["now"], mean["imbalance"]["planned"]
    test = mean["held_out"]["imbalance"]
    print(f"the busiest rank does {before:.2f}x the mean now, {after:.2f}x after: experts and their exchange wait for it, "
          f"so they take {_change(after / before)}")
    print(f"on steps it was not planned on: {test['now']:.2f}x now, {test['planned']:.2f}x after"
          + ("; loads move too much for a placement to hold" if test["now"] <= test["planned"] else ""))
    if crossings:
        share, test = mean["crossings"], mean["held_out"]["crossings"]
        print(f"pairs of experts of one token on different nodes: {share['now']:.1%} now, {share['planned']:.1%} after; "
              f"on steps it was not planned on {test['now']:.1%} and {test['planned']:.1%}")
    return mean


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def _change(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "as long as before"
    return f"up to {1 - ratio:.0%} less time" if ratio < 1 else f"{ratio - 1:.0%} more time"


def write(placement: Any, path: Path) -> Path:
    try:
        placement.save(path)
    except OSError as error:
        raise ValueError(f"output={path} cannot be written ({error.strerror}); choose another file") from error
    return path


def next_command(settings: PlaceConfig, saved: DictConfig, layout: Layout, output: Path) -> str:
    """How to train on with the placement, with the sizes that are not the run's own."""
    overrides = {"resume": settings.run, "parallel.placement": str(output)}
    if layout.ranks != saved.get("expert_parallel_size", 1):
        overrides["parallel.expert_parallel_size"] = str(layout.ranks)
    if layout.ranks_per_node is not None and layout.ranks_per_node != saved.get("ranks_per_node"):
        overrides["parallel.ranks_per_node"] = str(layout.ranks_per_node)
    return " ".join(["python -m launch.train", *(typed(key, value) for key, value in overrides.items())])


if __name__ == "__main__":
    run_main("place", main)
