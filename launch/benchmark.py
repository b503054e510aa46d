"""Measure generation by budget, attention, batch and context: latency, throughput, cost.

python -m launch.benchmark run=RUN [budgets=[1,2]] [attentions=[trained,scc]] [rows=[1,8,32]]
[contexts=[128,1024]] [slo.ttft_ms= slo.tpot_ms=] [price_per_hour=]
[price_per_kwh=] [output=FILE]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.benchmark")

import dataclasses
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import record, require_given
from launch.config.options import attention_named
from launch.config.overrides import typed
from launch.saved.opened import checkpoint_name, opened
from launch.saved.run import load_folder, load_run

if TYPE_CHECKING:
    from launch.benchmarking.measure import Variant
    from model.attention.config.base import AttentionConfig
    from model.transformer import Transformer
    from train.config.commands.benchmark import BenchmarkConfig
    from train.config.run import RunConfig
    from train.trained.budgets import BudgetTable

TRAINED = "trained"


def main(config: DictConfig) -> None:
    from train.config.commands.benchmark import BenchmarkConfig

    is_given = config.run is not None or config.path is not None
    give = "give run=RUN, or path=DIR with published weights"
    require_given(config, BenchmarkConfig, is_given, give)
    settings: BenchmarkConfig = record(config, BenchmarkConfig)
    settings = dataclasses.replace(
        settings, checkpoint=checkpoint_name(settings.run, settings.checkpoint)
    )
    attentions = {
        name: None if name == TRAINED else attention_named(name) for name in settings.attentions
    }
    runs = {name: _config(settings, attention) for name, attention in attentions.items()}
    for run in runs.values():
        _require_room(settings, run)
    _measure(settings, attentions, runs)


def _config(settings: BenchmarkConfig, attention: AttentionConfig | None) -> RunConfig:
    """The settings that a variant is computed under.

    Raises:
        ValueError: the weights are not those of this attention.
    """
    from train.checkpoint.folder import find_checkpoint

    found: RunConfig
    if settings.run is None:
        found = load_folder(str(settings.path), attention, settings.router.top_k)
    else:
        folder = find_checkpoint(Path(settings.run), prefer=settings.checkpoint)
        found = load_run(settings.run, attention, folder, settings.router.top_k)
    return found


def _require_room(settings: BenchmarkConfig, run: RunConfig) -> None:
    longest = max(settings.contexts) + settings.new_tokens
    if longest > run.model.max_seq_len:
        raise ValueError(
            f"contexts has {max(settings.contexts)} and new_tokens is {settings.new_tokens}, "
            f"{longest} tokens together; model.max_seq_len is {run.model.max_seq_len}"
        )


def _measure(
    settings: BenchmarkConfig,
    attentions: dict[str, AttentionConfig | None],
    runs: dict[str, RunConfig],
) -> None:
    from launch.benchmarking.energy import meter_of
    from launch.benchmarking.measure import Bench, cells_of
    from launch.benchmarking.rates import rates_of
    from launch.benchmarking.table import entry, lines
    from model.cost.memory import cache_bytes_per_token
    from train.files.durable import write_json
    from train.trained.budgets import described

    table = _table(settings)
    variants = _variants(settings, attentions, table)
    for name, attention in attentions.items():
        if table is not None and settings.budgets and described(attention) != table.attention:
            print(
                f"note: the budgets were found with another attention than {name}, so it may spend "
                "more or less; experts are as measured",
                file=sys.stderr,
            )
    weight = variants[0].model.any_weight
    rates = rates_of(weight.device, weight.dtype)
    width = weight.element_size()
    print(
        f"{rates.device}: {rates.flops / 1e12:.3g} TFLOP/s, {rates.num_bytes / 1e9:.3g} GB/s "
        f"({rates.source})"
    )
    energy = meter_of(weight.device)
    print(f"energy: {energy.source}")

    found: list[dict[str, Any]] = []
    source, prompts = _prompts(settings, runs)
    for cell in cells_of(settings.rows, settings.contexts):
        bench = Bench(
            variants,
            cell,
            [prompts(i, cell.context) for i in range(cell.rows)],
            settings.new_tokens,
            settings.slo,
            energy,
            settings.cuda_graphs,
        )

        def told(rounds: int, cell: Any = cell) -> None:
            print(f"{cell.rows} rows of {cell.context}: round {rounds}", file=sys.stderr)

        measured = bench.run(settings.min_rounds, settings.max_rounds, settings.precision, told)
        graphs = "on" if bench.without_graphs is None else f"off: {bench.without_graphs}"
        if not found:
            print(f"CUDA graphs: {graphs}")
        entries = []
        for variant, one in zip(variants, measured, strict=True):
            arguments = dict(runs[variant.attention].attention.arguments)
            numbers = entry(
                variant.model.config,
                variant,
                cell,
                one,
                measured[0],
                settings.new_tokens,
                rates,
                cache_bytes_per_token(variant.model.config, width, arguments),
                width,
                arguments,
                settings.price_per_hour,
                1 if settings.weights in ("int8", "fp8") else None,
                settings.price_per_kwh,
            )
            if table is not None and described(attentions[variant.attention]) == table.attention:
                rows = [row for row in table.rows if row.budget == variant.budget]
                for row in rows:
                    numbers["loss"] = dataclasses.asdict(row)
            numbers["cuda_graphs"] = graphs
            entries.append(numbers)
        print("\n".join(lines(cell, entries)) + "\n", flush=True)
        found += entries

    result = {
        "run": settings.run or settings.path,
        "weights": settings.weights,
        "prompts": source,
        "new_tokens": settings.new_tokens,
        "device": dataclasses.asdict(rates),
        "slo": dataclasses.asdict(settings.slo),
        "price_per_hour": settings.price_per_hour,
        "price_per_kwh": settings.price_per_kwh,
        "energy": energy.source,
        "measured": found,
    }
    if settings.output is not None:
        write_json(Path(settings.output), result)
        print(f"-> {settings.output}")
    print_result(result)


def _table(settings: BenchmarkConfig) -> BudgetTable | None:
    """The saved budgets.

    Raises:
        ValueError: one that is asked for is not among them.
    """
    from train.trained.budgets import load_table

    if settings.run is None:
        return None
    table = load_table(Path(settings.run), settings.checkpoint)
    there = [] if table is None else sorted(table.states)
    missing = [budget for budget in settings.budgets if budget not in there]
    if missing:
        wanted = ",".join(f"{b:g}" for b in sorted({*there, *missing}))
        raise ValueError(
            f"budgets has {', '.join(f'{b:g}' for b in missing)}, which the run's table lacks: "
            f"python -m launch.evaluate {typed('run', settings.run)} router.budget=[{wanted}] "
            "save_budgets=true"
        )
    return table


def _variants(
    settings: BenchmarkConfig,
    attentions: dict[str, AttentionConfig | None],
    table: BudgetTable | None,
) -> list[Variant]:
    """Every attention with every budget, over one copy of the weights."""
    from infer.budget import capture
    from launch.benchmarking.measure import Variant

    found: list[Variant] = []
    first: Transformer | None = None
    for name, attention in attentions.items():
        model, _, device = opened(
            settings.run,
            settings.checkpoint,
            None,
            attention,
            settings.router.top_k,
            settings.path,
            weights=settings.weights,
        )
        model.eval()
        if first is None:
            first = model
        else:
            shared = dict(first.named_parameters())
            for key, parameter in model.named_parameters():
                if key in shared:
                    parameter.data = shared[key].data
        states = {} if table is None else table.on(device)
        for budget in settings.budgets or (None,):
            state = capture(model.routers()) if budget is None else states[budget]
            found.append(Variant(name, budget, model, state))
    return found


def _prompts(settings: BenchmarkConfig, runs: dict[str, RunConfig]) -> tuple[str, Any]:
    """Where prompts come from, and prompt i of so many tokens."""
    run = next(iter(runs.values()))
    if settings.run is None:
        size = run.model.vocab_size

        def drawn(i: int, length: int) -> list[int]:
            draw = random.Random(i)
            return [draw.randrange(size) for _ in range(length)]

        return "random tokens", drawn

    from train.data.open import held_out_rows
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    rows = held_out_rows(run, TokenStore(prepare(run.data)))
    text: list[int] = []
    wanted = max(settings.rows) * max(settings.contexts)
    for row in range(len(rows)):
        text += [int(token) for token in rows.tokens(row)]
        if len(text) >= wanted:
            break

    def cut(i: int, length: int) -> list[int]:
        begin = i * length % max(1, len(text) - length + 1)
        piece = text[begin : begin + length]
        return (piece * (1 + length // max(1, len(piece))))[:length]

    return "held-out text", cut


if __name__ == "__main__":
    run_main("benchmark", main)
