"""Plan which rank serves which expert: python -m launch.place run=DIR [expert_parallel_size=N]
[replicas_per_rank=N] ...

Reads what the run has measured (routing.jsonl, audit/), prints what a placement would change, and
writes its file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from launch.command.messages import print_result
from launch.config.build import record, require_given
from launch.config.overrides import typed
from launch.place.measure import Measured, measure
from launch.place.settings import Layout, PlaceConfig
from launch.saved.configs import load_checkpoint_config, load_run_config
from launch.saved.run import load_run


def main(config: DictConfig) -> None:
    """Print the tables, write the placement and say how to use it."""
    from model.placement.planner import plan_layer
    from model.placement.record import Placement
    from train.checkpoint.folder import newest_complete

    require_given(config, PlaceConfig, config.run is not None, "give run=DIR")
    settings: PlaceConfig = record(config, PlaceConfig)

    checkpoint = newest_complete(Path(settings.run))
    run = load_run(settings.run, checkpoint=checkpoint)
    if not run.model.moe_layers:
        raise ValueError(f"{settings.run} is a dense model: there are no experts to place")
    saved = (
        load_run_config(Path(settings.run) / "config.yaml")
        if checkpoint is None
        else load_checkpoint_config(checkpoint)
    ).parallel

    layout = choose_layout(settings, saved, run.model)
    measured = measure(settings, run.model, layout)

    def planned(loads: np.ndarray, together: np.ndarray | None) -> Any:
        return plan_layer(
            loads,
            layout.ranks,
            ranks_per_node=layout.ranks_per_node,
            together=together,
            replicas_per_rank=layout.replicas_per_rank,
        )

    now = current_placement(saved, layout, run.model)
    layers, facts = [], []
    for index, layer in enumerate(run.model.moe_layers):
        loads, half = measured.loads[:, index], measured.half

        # Planned on all lines for use, and on the first half alone for the test on the second.
        earlier, later = (None, None) if measured.together is None else measured.together[:, index]
        together = None if measured.together is None else measured.together[:, index].sum(0)
        plan, test = planned(loads.sum(0), together), planned(loads[:half].sum(0), earlier)

        layers.append(plan)
        lent = [expert for experts in plan.replicas for expert in experts]
        facts.append(
            {
                "layer": layer,
                "replicas": len(lent),
                "replicated_experts": len(set(lent)),
                **compared(loads, together, now.layers[index], plan, layout),
                "held_out": compared(loads[half:], later, now.layers[index], test, layout),
            }
        )

    mean = report(settings.run, measured, facts, layout)
    output = write(
        Placement(layout.ranks, tuple(layers)),
        Path(settings.output or Path(settings.run) / "placement.json"),
    )

    print(f"next: {next_command(settings, saved, layout, output)}")
    if layout.ranks != saved.get("expert_parallel_size", 1):
        print(f"      with a multiple of {layout.ranks} ranks (launch, launch.num_devices)")

    print_result(
        {
            "run_dir": settings.run,
            "output": str(output),
            "expert_parallel_size": layout.ranks,
            "ranks_per_node": layout.ranks_per_node,
            "replicas_per_rank": layout.replicas_per_rank,
            "steps": [int(measured.step[0]), int(measured.step[-1])],
            "lines": len(measured.step),
            **mean,
            "layers": facts,
        }
    )


def choose_layout(settings: PlaceConfig, saved: DictConfig, model: Any) -> Layout:
    """The sizes asked for, or else those of the run.

    Raises:
        ConfigError: they do not fit one another or the model, with every problem.
    """
    from launch.config.build import ConfigError

    ranks = settings.expert_parallel_size or int(saved.get("expert_parallel_size", 1))
    node = settings.ranks_per_node or saved.get("ranks_per_node")

    problems = []
    if ranks == 1:
        problems.append(
            "expert_parallel_size is 1: one rank holds all experts, "
            "and there is nothing to place; give expert_parallel_size=N"
        )
    elif model.num_experts % ranks:
        problems.append(
            f"model.num_experts {model.num_experts} is not "
            f"divisible by expert_parallel_size {ranks}"
        )
    else:
        others = model.num_experts - model.num_experts // ranks
        if settings.replicas_per_rank > others:
            problems.append(
                f"replicas_per_rank is {settings.replicas_per_rank}; "
                f"the experts that a rank does not own are {others}"
            )

    if node is not None and node < ranks and ranks % node:
        problems.append(
            f"ranks_per_node {node} does not divide "
            f"expert_parallel_size {ranks}; give ranks_per_node=N"
        )

    if problems:
        raise ConfigError(problems)
    return Layout(
        ranks, node if node is not None and node < ranks else None, settings.replicas_per_rank
    )


def current_placement(saved: DictConfig, layout: Layout, model: Any) -> Any:
    """What the plan is compared with: the run's own placement where it is for these ranks, else
    experts in order.
    """
    from model.placement.record import LayerPlacement, Placement

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
    return Placement(
        layout.ranks,
        (LayerPlacement.identity(model.num_experts, layout.ranks),) * len(model.moe_layers),
    )


def compared(
    loads: np.ndarray, together: np.ndarray | None, now: Any, plan: Any, layout: Layout
) -> dict[str, Any]:
    """Busiest rank over mean and share of co-activated pairs on different nodes, of a layer now and
    as planned.
    """
    from model.placement.planner import imbalance, node_crossings

    found: dict[str, Any] = {
        "imbalance": {"now": imbalance(loads, now), "planned": imbalance(loads, plan)}
    }
    if together is not None and layout.ranks_per_node is not None:
        found["crossings"] = {
            name: node_crossings(together, placement, layout.ranks_per_node)
            for name, placement in (("now", now), ("planned", plan))
        }
    return found


def report(
    run_dir: str, measured: Measured, facts: list[dict[str, Any]], layout: Layout
) -> dict[str, Any]:
    """Print the table and what it means; returns the means over layers."""
    step, half = measured.step, measured.half
    print(
        f"{run_dir}: {len(step)} lines of routing.jsonl to step {step[-1]}; held out: planned on "
        f"those to step {step[half - 1]}, tested on the later ones"
    )

    nodes = (
        ""
        if layout.ranks_per_node is None
        else f" on {layout.ranks // layout.ranks_per_node} nodes"
    )
    print(f"busiest of {layout.ranks} ranks{nodes} over the mean rank, in every line of the log")

    crossings = "crossings" in facts[0]
    print(
        "layer       now  planned | held out: now  planned"
        + (" | pairs across nodes: now  planned  held out" if crossings else "")
        + (" | replicas of experts" if layout.replicas_per_rank else "")
    )

    def line(name: str, fact: dict[str, Any]) -> None:
        whole, test = fact["imbalance"], fact["held_out"]["imbalance"]
        text = (
            f"{name:5s} {whole['now']:8.3f}x {whole['planned']:7.3f}x | {test['now']:12.3f}x "
            f"{test['planned']:7.3f}x"
        )
        if crossings:
            text += (
                f" | {fact['crossings']['now']:23.1%} {fact['crossings']['planned']:8.1%} "
                f"{fact['held_out']['crossings']['planned']:9.1%}"
            )
        if layout.replicas_per_rank and "replicas" in fact:
            text += f" | {fact['replicas']:8d} {fact['replicated_experts']:10d}"
        print(text)

    for fact in facts:
        line(str(fact["layer"]), fact)

    mean: dict[str, Any] = {
        name: _mean([fact[name] for fact in facts])
        for name in ("imbalance", "crossings")
        if name in facts[0]
    }
    mean["held_out"] = {name: _mean([fact["held_out"][name] for fact in facts]) for name in mean}
    line("mean", mean)

    # The busiest rank sets the time of a layer: all others wait for it in the exchange.
    before, after = mean["imbalance"]["now"], mean["imbalance"]["planned"]
    test = mean["held_out"]["imbalance"]
    print(
        f"the busiest rank does {before:.2f}x the mean now, {after:.2f}x after: experts and their "
        f"exchange wait for it, so they take {_change(after / before)}"
    )
    print(
        f"on steps it was not planned on: {test['now']:.2f}x now, {test['planned']:.2f}x after"
        + (
            "; loads move too much for a placement to hold"
            if test["now"] <= test["planned"]
            else ""
        )
    )

    if crossings:
        share, test = mean["crossings"], mean["held_out"]["crossings"]
        print(
            f"pairs of experts of one token on different nodes: {share['now']:.1%} now, "
            f"{share['planned']:.1%} after; "
            f"on steps it was not planned on {test['now']:.1%} and {test['planned']:.1%}"
        )
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
        raise ValueError(
            f"output={path} cannot be written ({error.strerror}); choose another file"
        ) from error
    return path


def next_command(settings: PlaceConfig, saved: DictConfig, layout: Layout, output: Path) -> str:
    """How to train on with the placement, with the sizes that are not the run's own."""
    overrides = {"resume": settings.run, "parallel.placement": str(output)}
    if layout.ranks != saved.get("expert_parallel_size", 1):
        overrides["parallel.expert_parallel_size"] = str(layout.ranks)
    if layout.ranks_per_node is not None and layout.ranks_per_node != saved.get("ranks_per_node"):
        overrides["parallel.ranks_per_node"] = str(layout.ranks_per_node)
    return " ".join(
        ["python -m launch.train", *(typed(key, value) for key, value in overrides.items())]
    )
