"""What finished runs say: losses of every held-out row, and the speed of generation. Each is
written down once it is known, and read from there afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.benchmarking.kpi import median_interval
from launch.comparing.settings import SpeedSettings
from launch.saved.opened import opened
from launch.saved.run import load_run
from train.checkpoint.folder import find_checkpoint
from train.config.commands.benchmark import SloConfig
from train.files.durable import write_json

if TYPE_CHECKING:
    import torch

    from model.transformer import Transformer
    from train.config.run import RunConfig

BATCH_SIZE = 16
PRECISION = 0.02
"""Of the ratios of speed, where rounds end."""


def losses(path: Path, run_dir: Path, batch_size: int = BATCH_SIZE) -> dict[str, Any]:
    """Summed loss and targets of every held-out row, and the experts that a token visits, of a
    run's last checkpoint; `path` keeps them. batch_size: rows at a time.
    """
    checkpoint = find_checkpoint(run_dir)
    known = _kept(path)
    if known is not None and known.get("checkpoint") == checkpoint.name:
        return known

    run = load_run(str(run_dir), checkpoint=checkpoint)
    model, _, device = opened(str(run_dir), checkpoint.name)
    found = {"checkpoint": checkpoint.name, **losses_of(model, run, run_dir, device, batch_size)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def losses_of(
    model: Transformer, run: RunConfig, run_dir: Path, device: torch.device, batch_size: int
) -> dict[str, Any]:
    """Summed loss and targets of every held-out row of a run, and the experts that a token visits,
    by any model that reads its tokens. batch_size: rows at a time.
    """
    from train.data.loader import validation_batches
    from train.data.open import held_out_rows, trained_on
    from train.data.prepare import prepare
    from train.data.store import TokenStore
    from train.trained.budgets import losses_by_row

    store = trained_on(prepare(run.data), TokenStore(run_dir / "data"))
    rows = held_out_rows(run, store)
    most = run.train.eval_max_sequences
    batches = validation_batches(rows, batch_size, store.end_of_document, 0, 1, most)
    sums, counts, experts = losses_by_row(model.eval(), batches, device)
    return {"sums": sums.tolist(), "counts": counts.tolist(), "experts_per_token": experts}


def speed(
    path: Path, run_dirs: Mapping[str, Path], settings: SpeedSettings, told: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Latency of every variant, in rounds that take turns, as launch.benchmark measures it.

    Args:
        run_dirs: variant -> a run of it, the first one first.

    Returns:
        variant -> {itl_p50, itl_low, itl_high, ttft_p50 (seconds), tokens_per_second, ratio,
        ratio_low, ratio_high (of ITL to the first), decode_experts, distinct_experts, rounds}, or
        {problem} where the engine does not run it.
    """
    asked = {
        "runs": {name: find_checkpoint(run).name for name, run in run_dirs.items()},
        "settings": vars(settings),
    }
    known = _kept(path)
    if known is not None and known.get("asked") == asked:
        return dict(known["found"])

    from infer.budget import capture
    from launch.benchmarking.measure import Bench, Cell, Variant

    found: dict[str, dict[str, Any]] = {}
    variants = []
    prompts: list[list[int]] = []
    cell = Cell(settings.rows, settings.context)
    slo = SloConfig()
    for name, run_dir in run_dirs.items():
        model, _, _ = opened(str(run_dir), find_checkpoint(run_dir).name)
        model.eval()
        prompts = prompts or _prompts(run_dir, settings)
        variant = Variant(name, None, model, capture(model.routers()))
        problem = Bench([variant], cell, prompts, settings.new_tokens, slo).problem(variant)
        if problem is None:
            variants.append(variant)
        else:
            found[name] = {"problem": problem}
    if variants:
        bench = Bench(variants, cell, prompts, settings.new_tokens, slo)
        measured = bench.run(
            settings.min_rounds,
            settings.max_rounds,
            PRECISION,
            lambda rounds: told(f"speed: round {rounds}"),
        )
        for variant, one in zip(variants, measured, strict=True):
            itl = [round_.itl_p50 for round_ in one.rounds]
            low, high = median_interval(itl)
            ratio = one.ratio(measured[0], "itl_p50")
            found[variant.attention] = {
                "itl_p50": float(np.median(itl)),
                "itl_low": low,
                "itl_high": high,
                "ttft_p50": one.middle("ttft_p50"),
                "tokens_per_second": one.middle("tokens_per_second"),
                # where the first does not run there is nothing to hold the others against
                **_ratio(ratio, variants[0].attention == next(iter(run_dirs))),
                "decode_experts": one.routing.decode_experts,
                "distinct_experts": one.routing.distinct_experts,
                "rounds": len(one.rounds),
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"asked": asked, "found": found})
    return found


def _ratio(ratio: Any, is_to_the_first: bool) -> dict[str, float]:
    if not is_to_the_first:
        return {}
    return {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}


def _prompts(run_dir: Path, settings: SpeedSettings) -> list[list[int]]:
    """Of held-out text, one after another; from its beginning again where it is short."""
    from train.data.open import held_out_rows
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    run = load_run(str(run_dir))
    rows = held_out_rows(run, TokenStore(prepare(run.data)))
    text: list[int] = []
    wanted = settings.rows * settings.context
    for row in range(len(rows)):
        text += [int(token) for token in rows.tokens(row)]
        if len(text) >= wanted:
            break
    text *= 1 + wanted // max(1, len(text))
    return [text[i * settings.context : (i + 1) * settings.context] for i in range(settings.rows)]


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
