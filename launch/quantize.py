"""Make experts of 8-bit weights for a run, measure what they cost, and keep them beside it.

python -m launch.quantize run=RUN [weights=int8|fp8] [checkpoint=best|latest]
[max_loss_increase=0.01]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.quantize")

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import record, require_given
from launch.saved.opened import opened
from launch.saved.run import load_run

if TYPE_CHECKING:
    from train.config.commands.export import QuantizeConfig
    from train.config.run import RunConfig
    from train.data.loader import Batch
    from train.trained.quantize import Comparison


def main(config: DictConfig) -> None:
    """Quantise a checkpoint's experts; refuses before anything is written."""
    from train.checkpoint.folder import find_checkpoint
    from train.config.commands.export import QuantizeConfig

    require_given(config, QuantizeConfig, config.run is not None, "give run=RUN")
    settings: QuantizeConfig = record(config, QuantizeConfig)
    checkpoint = find_checkpoint(Path(settings.run), prefer=settings.checkpoint)
    run: RunConfig = load_run(settings.run, None, checkpoint)
    if not run.model.moe_layers:
        raise ValueError(f"{settings.run} has no experts, whose weights alone become 8 bits")
    _quantize(settings, run, checkpoint)


def _quantize(settings: QuantizeConfig, run: RunConfig, checkpoint: Path) -> None:
    from train.files.durable import write_json
    from train.pretrained.eight_bit import save_eight_bit
    from train.trained.quantize import (
        compare,
        expert_errors,
        left_out,
        made_of,
        measure,
        quantized,
        quantized_path,
        sizes,
    )

    run_dir = Path(settings.run)
    model, _, device = opened(settings.run, checkpoint.name)
    model.eval()

    def batches() -> Iterator[Batch]:
        return _held_out(settings, run)

    before, bytes_before = measure(model, batches, device), sizes(model)
    layers, errors = [], []
    for layer in model.moe_layers():
        stacks = quantized(layer, settings.weights)
        errors.append(expert_errors(layer, stacks))
        layer.experts.hold_eight_bit(**stacks)
        layers.append(stacks)
    found, bytes_after = (
        compare(before, measure(model, batches, device), run.model.num_experts),
        sizes(model),
    )
    others = left_out(model)
    _print(found, run.model.moe_layers, errors, bytes_before, bytes_after, others)
    if found.high > settings.max_loss_increase:
        raise ValueError(
            f"{settings.weights} experts may raise the held-out loss by {found.high:.4f} nats "
            f"(95%), more than max_loss_increase={settings.max_loss_increase:g}; nothing was "
            "written"
        )

    path = quantized_path(run_dir, checkpoint.name, settings.weights)
    path.parent.mkdir(exist_ok=True)
    save_eight_bit(path, layers, made_of(checkpoint))
    result: dict[str, Any] = {
        "run_dir": settings.run,
        "checkpoint": checkpoint.name,
        "weights": settings.weights,
        "max_loss_increase": settings.max_loss_increase,
        **dataclasses.asdict(found),
        "expert_errors": errors,
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "left_out": others,
    }
    write_json(path.with_suffix(".json"), result)
    print(f"-> {path}; use it with weights={settings.weights}")
    print_result({**result, "path": str(path)})


def _held_out(settings: QuantizeConfig, run: RunConfig) -> Iterator[Batch]:
    """The run's held-out rows.

    Raises:
        ValueError: its data hold other tokens than it was trained on.
    """
    from train.data.loader import validation_batches
    from train.data.open import held_out_rows, trained_on
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    store = trained_on(prepare(run.data), TokenStore(Path(settings.run) / "data"))
    return validation_batches(
        held_out_rows(run, store),
        settings.batch_size,
        store.end_of_document,
        0,
        1,
        settings.max_sequences,
    )


def _print(
    found: Comparison,
    moe_layers: tuple[int, ...],
    errors: list[list[float]],
    before: dict[str, int],
    after: dict[str, int],
    others: dict[str, dict[str, int]],
) -> None:
    print("layer  error of experts (least, mean, most)  chosen experts that stay  tokens all same")
    for i, (layer, row) in enumerate(zip(moe_layers, errors, strict=True)):
        idle = sum(not n for n in found.tokens_of_experts[i]) if i < len(found.agreement) else 0
        told = f"  {idle} experts saw no held-out token" if idle else ""
        routed = (
            f"{found.agreement[i]:24.4%}  {found.same_set[i]:15.4%}"
            if i < len(found.agreement)
            else "  (predicts further tokens, and is not asked here)"
        )
        took = f"{min(row):11.5f}, {sum(row) / len(row):.5f}, {max(row):.5f}"
        print(f"{layer:5d}  {took}    {routed}{told}")
    print(
        f"held-out loss {found.loss:.5f} -> {found.quantized_loss:.5f}: {found.difference:+.5f} "
        f"[{found.low:+.5f}, {found.high:+.5f}]"
    )
    print(
        f"experts {before['experts'] / 1e6:.1f} -> {after['experts'] / 1e6:.1f} MB; the others "
        f"stay: {after['others'] / 1e6:.1f} MB"
    )
    for name, group in sorted(others.items(), key=lambda pair: (-pair[1]["bytes"], pair[0])):
        print(f"  {name}: {group['parameters']:,} parameters, {group['bytes'] / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main("quantize", main)
