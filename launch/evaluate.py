"""Evaluate a run on its held-out text.

python -m launch.evaluate run=DIR [checkpoint=best|latest|step-00000250] [average=N]
[attention=scc] [router.budget=K | router.top_k=K]
python -m launch.evaluate run=[DIR,DIR2] | run='runs/*/*' | run=DIR checkpoint=all
python -m launch.evaluate run=DIR router.budget=[1,1.5,2,3] [save_budgets=true]
python -m launch.evaluate run=DIR tasks=[plays_answer,plays_text] [max_documents=100]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.evaluate")

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, ListConfig

from launch.command.arguments import replaced
from launch.command.main import run_main
from launch.command.messages import print_result
from launch.command.progress import followed, working
from launch.config.build import record
from launch.process.identity import is_worker
from launch.process.ranks import run_on_ranks
from launch.saved.run import (
    load_folder,
    load_run,
    require_average,
    require_budget,
    require_text,
    require_tokenizer,
)

if TYPE_CHECKING:
    import torch

    from model.transformer import Transformer
    from train.config.commands.evaluate import EvaluateConfig
    from train.config.run import RunConfig
    from train.data.loader import Batch
    from train.data.store import TokenStore
    from train.trained.ranks import Place


def main(config: DictConfig) -> float:
    """Print held-out loss, perplexity, bits per byte and routing statistics; returns the loss."""
    from train.config.commands.devices import require_even_experts
    from train.config.commands.evaluate import EvaluateConfig

    # A list is a table.
    if isinstance(config.router.budget, ListConfig):
        config.budgets, config.router.budget = config.router.budget, None
    if isinstance(config.run, ListConfig):
        config.runs, config.run = config.run, next(iter(config.run), None)
    if isinstance(config.checkpoint, ListConfig) or config.checkpoint == "all":
        config.checkpoints = config.checkpoint if config.checkpoint != "all" else ["all"]
        config.checkpoint = "best"
    settings: EvaluateConfig = record(config, EvaluateConfig)

    # The text and every run and checkpoint are looked at before the first is evaluated.
    if settings.text and not Path(settings.text).exists():
        raise ValueError(f"text={settings.text} does not exist; give a file of text")
    targets, lacking = _targets(settings)
    for target in targets:
        require_even_experts(target.run.model, settings.parallel)
    if settings.launch.num_devices > 1 and not is_worker():
        arguments = sys.argv[1:]
        # All ranks read one checkpoint, also of a run that goes on saving others.
        checkpoint = targets[0].checkpoint
        if checkpoint is not None and not (settings.runs or settings.checkpoints):
            arguments = replaced(arguments, "checkpoint", checkpoint.name)
        if code := run_on_ranks(settings.launch.num_devices, "launch.evaluate", arguments):
            raise SystemExit(code)
        return math.nan

    if settings.tasks:
        from launch.harness.command import require_harness

        require_harness()

    # Only now what imports torch: a mistake in the settings is told at once.
    from train.trained.ranks import joined

    with joined(settings.launch.num_devices, settings.parallel) as place:
        if settings.tasks:
            return _evaluate_tasks(targets[0], place)
        if settings.budgets:
            return _evaluate_budgets(targets[0], place)
        if settings.runs or settings.checkpoints:
            return _evaluate_all(targets, lacking, place)
        return _evaluate(targets[0], place)


class _Target(NamedTuple):
    """One model to evaluate."""

    settings: EvaluateConfig
    """With its run and checkpoint."""
    run: RunConfig
    checkpoints: tuple[Path, ...] = ()
    """The newest first: of several the mean is evaluated; none: path=DIR."""

    @property
    def checkpoint(self) -> Path | None:
        """None: path=DIR."""
        return self.checkpoints[0] if self.checkpoints else None

    @property
    def label(self) -> str:
        if len(self.checkpoints) > 1:
            return f"{self.checkpoint} and the {len(self.checkpoints) - 1} before it, their mean"
        if self.settings.weights != "native":
            kind = self.settings.weights
            what = "the moving average" if kind == "ema" else f"experts in {kind}"
            return f"{self.checkpoint}, {what}"
        return str(self.settings.path if self.checkpoint is None else self.checkpoint)

    @property
    def averaged(self) -> dict[str, Any]:
        """What a result says of it."""
        if self.settings.weights != "native":
            return {"weights": self.settings.weights}
        if len(self.checkpoints) <= 1:
            return {}
        return {"averaged": [checkpoint.name for checkpoint in self.checkpoints]}


def _targets(settings: EvaluateConfig) -> tuple[list[_Target], dict[str, str]]:
    """The models to evaluate; of several runs, those without one stand in the table too, each with
    the reason.

    Raises:
        CheckpointError: no run has a checkpoint that can be used.
    """
    from train.files.manifest import CheckpointError

    if len(settings.runs) < 2:
        return [_target(one) for one in _each(settings)], {}
    targets: list[_Target] = []
    lacking: dict[str, str] = {}
    for name in settings.runs:
        try:
            found = [_target(one) for one in _each(dataclasses.replace(settings, runs=(name,)))]
        except (CheckpointError, FileNotFoundError) as error:
            lacking[name] = str(error)
        else:
            targets += found
            if not found:  # checkpoint=all, and there is none
                lacking[name] = f"{name} has no checkpoint"
    if not targets:
        raise CheckpointError("no run can be evaluated: " + "; ".join(lacking.values()))
    return targets, lacking


def _each(settings: EvaluateConfig) -> Iterator[EvaluateConfig]:
    """The settings for every run and checkpoint that they name."""
    from train.checkpoint.folder import STEP, steps

    for name in settings.runs or (settings.run,):
        run, checkpoints = name, settings.checkpoints
        # RUN/checkpoints/step-...
        if name is not None and settings.runs and STEP.fullmatch(Path(name).name):
            run, checkpoints = str(Path(name).parent.parent), (Path(name).name,)
        elif checkpoints == ("all",):
            checkpoints = tuple(steps(Path(str(run)) / "checkpoints"))
        for checkpoint in checkpoints or (settings.checkpoint,):
            yield dataclasses.replace(settings, run=run, checkpoint=checkpoint)


def _target(settings: EvaluateConfig) -> _Target:
    from train.checkpoint.folder import find_last

    if settings.run is not None:
        checkpoints = find_last(Path(settings.run), settings.checkpoint, settings.average)
        run = load_run(settings.run, settings.attention, checkpoints[0], settings.router.top_k)
        require_average(run, settings.weights, checkpoints[0])
        if settings.router.budget is not None or settings.budgets:
            require_budget(run)
        if settings.text is not None:
            require_text(run, settings.run)
        return _Target(settings, run, checkpoints)
    assert settings.path is not None
    run = load_folder(settings.path, settings.attention, settings.router.top_k, settings.seq_len)
    require_tokenizer(run, settings.path)
    return _Target(settings, run)


class _Measured(NamedTuple):
    result: dict[str, Any]
    """Of train.trained.evaluate."""
    store: TokenStore | None
    bytes_problem: str | None
    """Why there are no bits per byte."""


def _model(target: _Target, place: Place) -> Transformer:
    """The trained model on this rank's device."""
    from train.checkpoint.writer import load_weights
    from train.components import build_model
    from train.pretrained.folder import PretrainedFolder
    from train.trained.averages import reader_of
    from train.trained.quantize import use_eight_bit
    from train.trained.ranks import spread

    model = build_model(spread(target.run, target.settings.parallel), place.groups)
    with working(f"loading {target.label}"):
        if target.checkpoints:
            load_weights(model, reader_of(target.checkpoints, target.settings.weights))
            run_dir = Path(str(target.settings.run))
            use_eight_bit(model, run_dir, target.checkpoints[0], target.settings.weights)
        else:
            PretrainedFolder(Path(str(target.settings.path)).expanduser()).fill_model(model)
    return model.to(place.device).eval()


def _measure(target: _Target, place: Place) -> _Measured:
    """Collective."""
    from train.trained.evaluate import evaluate, one_by_one

    settings, run = target.settings, target.run
    store = None if settings.run is None else _store(settings, run, place)
    held_out = _held_out(settings, run, store, place)
    model = _model(target, place)

    # Another budget needs other cuts, which only training text may set.
    if settings.router.budget is not None:
        _calibrate(settings, run, store, model, place.device)

    sparse = [attention.layer_idx for attention in model.measured_attentions()]
    batches = followed(held_out.batches, f"evaluating {target.label}", held_out.num_batches)
    result = evaluate(
        one_by_one(model),
        batches,
        place.device,
        model.routers(),
        sparse,
        run.model.moe_layers,
    )
    assert result is not None
    return _Measured(result, store, held_out.problem)


def _evaluate_tasks(target: _Target, place: Place) -> float:
    """The harness's table of tasks; returns NaN, as there is no loss."""
    from launch.harness.command import evaluate_tasks
    from train.trained.text import FolderTokens

    settings, run, _ = target
    tokens: TokenStore | FolderTokens
    if settings.run is not None:
        tokens = _store(dataclasses.replace(settings, text=""), run, place)
    else:
        tokens = FolderTokens.of(run.data.tokenizer)
    model = _model(target, place)
    if settings.router.budget is not None:
        _calibrate(settings, run, _store(settings, run, place), model, place.device)
    result = evaluate_tasks(settings, model, tokens, place, target.label)
    if place.rank == 0:
        print_result({"model": target.label, **result})
    return math.nan


def _evaluate_all(targets: list[_Target], lacking: dict[str, str], place: Place) -> float:
    """A table with a line for each, and for each run that lacks a checkpoint; returns the lowest
    loss.
    """
    from launch.history.comparable import incomparable, measure_of
    from train.checkpoint.folder import read_state

    rows: list[dict[str, Any]] = []
    if place.rank == 0:
        print(f"{'val_loss':>9}  {'perplexity':>10}  {'bits/byte':>9}  {'experts':>7}  checkpoint")
    for target in targets:
        result = _measure(target, place).result
        assert target.checkpoint is not None
        row = {
            "run_dir": target.settings.run,
            "checkpoint": target.checkpoint.name,
            "step": read_state(target.checkpoint)["step"],
            **target.averaged,
            **{name: result.get(name) for name in ("val_loss", "perplexity")},
            **{name: result.get(name) for name in ("bits_per_byte", "experts_per_token")},
        }
        rows.append(row)
        if place.rank == 0:
            bits, experts = (
                "-" if row[name] is None else f"{row[name]:.{digits}f}"
                for name, digits in (("bits_per_byte", 4), ("experts_per_token", 3))
            )
            print(
                f"{row['val_loss']:9.4f}  {row['perplexity']:10.2f}  {bits:>9}  {experts:>7}  "
                f"{target.label}",
                flush=True,
            )

    if place.rank == 0:
        for run_dir, why in lacking.items():
            print(f"{'-':>9}  {'-':>10}  {'-':>9}  {'-':>7}  {run_dir}: {why}", flush=True)
    lowest = min(row["val_loss"] for row in rows)
    measures = [measure_of(str(t.settings.run), _row_length(t)) for t in targets]
    if targets[0].settings.text is not None:  # the text is one for all
        measures = [dataclasses.replace(measure, tokens=None) for measure in measures]
    reason = incomparable(measures)
    if place.rank == 0:
        if reason is not None:
            print(f"no loss is best here: {reason}")
        elif len(rows) > 1:
            best = min(rows, key=lambda row: float(row["val_loss"]))
            print(f"lowest loss: {best['run_dir']}/checkpoints/{best['checkpoint']}")
        left_out = [{"run_dir": run, "reason": why} for run, why in lacking.items()]
        print_result({"rows": rows, "left_out": left_out, "comparable": reason is None})
    return float(lowest)


def _row_length(target: _Target) -> int:
    of_text = target.settings.seq_len if target.settings.text is not None else None
    return of_text or int(target.run.train.seq_len)


def _evaluate(target: _Target, place: Place) -> float:
    """On one rank; rank 0 prints."""
    from train.checkpoint.folder import read_state
    from train.config.data import labels

    settings, run, checkpoint = target.settings, target.run, target.checkpoint
    result, store, bytes_problem = _measure(target, place)
    if place.rank:
        return float(result["val_loss"])

    counts = result.pop("counts", [])
    for layer, row in zip(run.model.moe_layers, counts, strict=False):
        mean = sum(row) / len(row)
        print(
            f"layer {layer:3d}  load/mean  " + " ".join(f"{c / max(mean, 1e-9):.2f}" for c in row)
        )

    if counts:
        print(
            f"experts per token {result['experts_per_token']:.3f} (layers "
            + " ".join(f"{k:.3f}" for k in result["experts_per_token_by_layer"])
            + ")"
        )

    if "attention/tail_mass" in result:
        error, bound = (
            result.get(f"attention/{name}", math.nan) for name in ("error", "error_bound")
        )
        print(
            f"attention  tail mass {result['attention/tail_mass']:.1%}  error {error:.1%} (mean "
            f"over sampled rows, below {bound:.1%} with probability 0.999)"
        )

    if "attention/index_loss" in result:
        recall = result.get("attention/index_recall", math.nan)
        compressed = run.attention.name == "compressed"
        whole = "attention to all entries" if compressed else "dense attention"
        print(
            f"attention  the index chooses {recall:.1%} of {whole} (sampled rows), "
            f"{result['attention/index_loss']:.3g} nats from what it is taught"
        )

    by_source = result.pop("by_source", {})
    if by_source:
        # By the names that the run's records have.
        names = labels((*run.data.sources, *run.data.validation.sources))
        by_source = {names[source]: found for source, found in by_source.items()}
        result["by_source"] = by_source
    for name, found in by_source.items():
        bits = f"  bits_per_byte {found['bits_per_byte']:.4f}" if "bits_per_byte" in found else ""
        print(f"source {name:20s}  val_loss {found['val_loss']:.4f}{bits}")

    if bytes_problem is not None:
        print(bytes_problem)
    bits_per_byte = (
        f"  bits_per_byte {result['bits_per_byte']:.4f}" if "bits_per_byte" in result else ""
    )
    entropy = None if settings.text is not None or store is None else store.unigram_entropy
    print(
        f"{target.label}: val_loss {result['val_loss']:.4f}  perplexity "
        f"{result['perplexity']:.2f}{bits_per_byte}"
        + ("" if entropy is None else f"  unigram_entropy {entropy:.4f}")
    )

    source: dict[str, Any] = {"path": settings.path}
    if checkpoint is not None:
        source = {
            "run_dir": settings.run,
            "checkpoint": checkpoint.name,
            "step": read_state(checkpoint)["step"],
            **target.averaged,
        }
    told = {"text": settings.text} if settings.text is not None else {"unigram_entropy": entropy}
    print_result({**source, **told, **result})
    return float(result["val_loss"])


def _evaluate_budgets(target: _Target, place: Place) -> float:
    """Calibrate and measure every budget, print the table, and save it if asked to; returns the
    loss of the largest.
    """
    from infer.budget import capture, use
    from model.cost.parameters import flops_per_token
    from train.data.loader import validation_batches
    from train.data.open import held_out_rows
    from train.trained.budgets import (
        BudgetTable,
        described,
        losses_by_row,
        measured_rows,
        save_table,
    )
    from train.trained.calibrate import calibrate_budget, calibration_batches

    settings, run, checkpoint = target.settings, target.run, target.checkpoint
    assert checkpoint is not None
    store, model, device = _store(settings, run, place), _model(target, place), place.device
    rows = held_out_rows(run, store)
    run_dir = Path(str(settings.run))
    trained, states, found = capture(model.routers()), {}, {}
    for budget in settings.budgets:
        # From where the training left them, so that a budget does not depend on those before it.
        use(model.routers(), trained)
        text = calibration_batches(run, store, run_dir / "data")
        mean = calibrate_budget(model, text, budget, run.balance, run.budget, device)
        states[budget] = capture(model.routers())
        held_out = validation_batches(
            rows, settings.batch_size, store.end_of_document, 0, 1, settings.max_sequences
        )
        found[budget] = (mean, *losses_by_row(model, held_out, device))

    def flops_of(experts: float) -> float:
        return flops_per_token(run.model, experts, run.train.seq_len, run.attention.arguments) / 3

    table = BudgetTable(
        measured_rows(found, flops_of),
        states,
        described(settings.attention),
    )
    print("budget  experts  held-out loss (95%)           to the largest (95%)           MFLOPs")
    for row in table.rows:
        print(
            f"{row.budget:6g}  {row.experts_per_token:7.3f}  {row.val_loss:.4f} [{row.low:.4f}, "
            f"{row.high:.4f}]  {row.difference:+.4f} [{row.difference_low:+.4f}, "
            f"{row.difference_high:+.4f}]  {row.flops_per_token / 1e6:.1f}"
        )
    result = {"run_dir": settings.run, "checkpoint": checkpoint.name, **target.averaged}
    if settings.save_budgets:
        path = save_table(run_dir, checkpoint.name, table)
        print(f"saved: {path}; launch.generate router.budget=... needs no calibration for these")
        result["saved"] = str(path)
    print_result({**result, "budgets": [dataclasses.asdict(row) for row in table.rows]})
    return table.rows[-1].val_loss


class _HeldOut(NamedTuple):
    """The text that the loss is of."""

    batches: Iterator[Batch]
    problem: str | None
    """Why there are no bits per byte."""
    num_batches: int | None = None
    """None: nobody has counted."""


def _held_out(
    settings: EvaluateConfig, run: Any, store: TokenStore | None, place: Place
) -> _HeldOut:
    """The rows of text=FILE, or the run's own.

    Raises:
        ValueError: the text or the tokenizer cannot be read.
    """
    from train.data.loader import validation_batches
    from train.data.open import held_out_rows
    from train.data.tokenizer import load_tokenizer
    from train.trained.text import read_text, text_batches

    if settings.text is not None:
        if store is not None:
            tokenizer, end = store.tokenizer(), store.end_of_document
        else:
            tokenizer = load_tokenizer(run.data.tokenizer)
            end = tokenizer.token_to_id(run.data.tokenizer.end_of_document) or 0
        length = settings.seq_len or run.train.seq_len
        text = read_text(settings.text)
        batches = text_batches(
            text, tokenizer, end, length, settings.batch_size, settings.max_sequences
        )
        return _HeldOut(batches, None)

    assert store is not None
    rows = held_out_rows(run, store)
    taken = min(len(rows), settings.max_sequences or len(rows))
    return _HeldOut(
        validation_batches(
            rows,
            settings.batch_size,
            store.end_of_document,
            place.rank,
            place.size,
            settings.max_sequences,
        ),
        rows.bytes_problem,
        -(-taken // (settings.batch_size * place.size)),
    )


def _store(settings: EvaluateConfig, run: Any, place: Place) -> TokenStore:
    """The run's tokens.

    Raises:
        ValueError: they are others than those it was trained on.
    """
    from train.data.open import trained_on
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    own = TokenStore(Path(str(settings.run)) / "data")
    if settings.text is not None and settings.router.budget is None:
        return own  # its tokenizer is all that is asked of it
    return trained_on(place.first(lambda: prepare(run.data)), own)


def _calibrate(
    settings: EvaluateConfig, run: Any, store: Any, model: Any, device: torch.device
) -> None:
    from train.trained.calibrate import calibrate_budget, calibration_batches

    assert settings.router.budget is not None
    batches = calibration_batches(run, store, Path(str(settings.run)) / "data")
    mean = calibrate_budget(model, batches, settings.router.budget, run.balance, run.budget, device)
    print(
        f"routers calibrated to {settings.router.budget:g} "
        f"experts per token on training text: {mean:.3f}"
    )


if __name__ == "__main__":
    run_main("evaluate", main)
