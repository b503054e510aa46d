"""Between steps: held-out evaluation, the best checkpoint, and checkpoints in general."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any

from train.agenda import Step
from train.checkpoint.reader import LORA_ALPHA
from train.components import dealer_of
from train.config.data import labels
from train.data.loader import validation_batches
from train.data.open import held_out_rows
from train.data.store import ValidationRows
from train.parts import Parts
from train.progress import routing_facts
from train.rank.runtime import from_rank_zero
from train.trained.evaluate import StageOf, evaluate

log = logging.getLogger("loadstone")
OF_A_RECORD = ("val_loss", "perplexity", "bits_per_byte", "experts_per_token")
"""What of a result stands in metrics.jsonl, with eval/ before it."""


def evaluate_and_keep_best(run: Parts, step: Step) -> None:
    """Held-out evaluation; saves when it is the best so far. Collective.

    When some rank is asked to stop meanwhile, it is left without a result: nothing is remembered or
    saved as the best, and progress.evaluation_left says so.
    """
    rows = held_out_rows(run.config, run.store)
    if len(rows) == 0:
        log.info("no held-out documents: evaluation skipped")
        return
    result = _evaluated(run, step, rows)
    if result is None:
        log.info("asked to stop: the evaluation of step %d is left", step.number)
        return
    _tell(run, step, result)
    most = run.config.train.eval_max_sequences or len(rows)
    _keep_best(run, step, result["val_loss"], min(most, len(rows)))


def save(run: Parts, step: Step) -> bool:
    """False: it could not be written, and checkpoint.on_error says to go on. Collective."""
    with run.watch.phase(step, "save"):
        facts = routing_facts(run.engine, run.config)
        state = {**asdict(run.progress), "routing": None if facts is None else asdict(facts)}
        if run.config.lora.rank:
            state[LORA_ALPHA] = run.config.lora.alpha
        run.saved_step = step.number
        return run.writer.save(run.engine, state) is not None


def _evaluated(run: Parts, step: Step, rows: ValidationRows) -> dict[str, Any] | None:
    """None: some rank was asked to stop."""
    settings, model = run.config.train, run.engine.module
    batches = validation_batches(
        rows,
        settings.micro_batch_size,
        run.store.end_of_document,
        run.groups.rows_rank,
        run.groups.rows_size,
        settings.eval_max_sequences,
        run.groups.parts_rank,
        run.groups.parts_size,
        dealer_of(run.config),
    )

    def stopped() -> bool:
        # Asked before each batch, and a sign of life: a whole evaluation may take long.
        with run.watch.phase(step, "evaluate"):
            run.progress.evaluation_left = run.stop.agreed()
        return run.progress.evaluation_left

    model.eval()
    run.pipeline.lend_embedding()
    # the stage that launch.evaluate finds in the checkpoint
    model.set_step(run.progress.step)
    result = evaluate(
        run.pipeline.forward,
        batches,
        run.engine.device,
        model.routers(),
        moe_layers=run.config.model.moe_layers,
        probe=run.probe,
        stopped=stopped,
        # The probe is with rank 0, to whose stages' layers its tokens go.
        stage=StageOf.of(model, bool(run.config.model.num_experts) and run.groups.stage_rank == 0),
        at_once=run.pipeline.at_once,
    )
    model.train()
    return result


def _tell(run: Parts, step: Step, result: dict[str, Any]) -> None:
    run.progress.val_loss, run.bits_per_byte = result["val_loss"], result.get("bits_per_byte")
    log.info(
        "eval step %d  val_loss %.4f  perplexity %.2f  bits_per_byte %s  unigram_entropy %.4f  "
        "balance %.2fx",
        step.number,
        result["val_loss"],
        result["perplexity"],
        "unknown" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}",
        run.store.unigram_entropy,
        result.get("moe/max_load", 1.0),
    )
    data = run.config.data
    names = labels((*data.sources, *data.validation.sources))
    of_sources = {
        f"val_loss/{names[source]}": found["val_loss"]
        for source, found in result.get("by_source", {}).items()
    }
    if of_sources:
        log.info("  ".join(f"{name} {loss:.4f}" for name, loss in of_sources.items()))
    if run.sinks is not None:
        scalars = {f"eval/{name}": result[name] for name in OF_A_RECORD if name in result}
        scalars |= {f"eval/{name}": loss for name, loss in of_sources.items()}
        if run.probe is not None:
            scalars |= run.probe.measure(step.number)
        run.sinks.write_evaluation(step.number, run.progress.consumed_tokens, scalars)


def _keep_best(run: Parts, step: Step, loss: float, sequences: int) -> None:
    """Mark the checkpoint of this step as the best where no earlier one has a lower loss on as many
    held-out sequences. Collective.
    """
    best = (
        from_rank_zero(lambda: run.writer.best_loss(sequences))
        if run.config.checkpoint.keep_best
        else -math.inf
    )
    # One that is not a number is never the best.
    if not loss < best:
        return
    if run.saved_step != step.number and not save(run, step):
        return
    if run.writer.wait():
        run.writer.mark_best(step.number, loss, sequences)
