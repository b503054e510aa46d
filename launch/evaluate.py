"""Evaluate a run on its held-out text.

python -m launch.evaluate run=DIR [checkpoint=best|latest] [router.budget=K] [attention=scc]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.evaluate")

import math
from pathlib import Path

from omegaconf import DictConfig

from launch.common import load_run, print_result, record, run_main


def main(config: DictConfig) -> float:
    """Print held-out loss, perplexity, bits per byte and routing statistics; returns the loss."""
    import torch

    from train.calibrate import calibrate_budget, calibration_batches
    from train.checkpoint import find_checkpoint, load_weights, read_state
    from train.components import build_model
    from train.config import EvaluateConfig
    from train.data.loader import validation_batches
    from train.data.prepare import prepare
    from train.data.store import TokenStore, ValidationRows
    from train.evaluate import evaluate

    if config.run is None:
        raise ValueError("give run=DIR")
    settings = record(config, EvaluateConfig)
    checkpoint = find_checkpoint(Path(settings.run), prefer=settings.checkpoint)
    run = load_run(settings.run, settings.attention, checkpoint)
    store = TokenStore(prepare(run.data))
    if store.manifest["content"] != TokenStore(Path(settings.run) / "data").manifest["content"]:
        raise ValueError(f"{store.path} holds other tokens than the run was trained on, so what was held out is not "
                         "known: its data files have changed; put them back")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(run)
    load_weights(model, checkpoint)
    model = model.to(device).eval()
    if settings.router.budget is not None:
        mean = calibrate_budget(model, calibration_batches(run, store), settings.router.budget, run.balance, run.budget,
                                device)
        print(f"routers calibrated to {settings.router.budget:g} experts per token on training text: {mean:.3f}")
    rows = ValidationRows(store, run.train.seq_len)
    batches = validation_batches(rows, settings.batch_size, store.end_of_document, 0, 1, settings.max_sequences)
    sparse = [attention.layer_idx for attention in model.sparse_attentions()]
    result = evaluate(model, batches, device, model.routers(), sparse)
    assert result is not None
    counts = result.pop("counts", [])
    for layer, row in zip(run.model.moe_layers, counts, strict=False):
        mean = sum(row) / len(row)
        print(f"layer {layer:3d}  load/mean  " + " ".join(f"{c / max(mean, 1e-9):.2f}" for c in row))
    if counts:
        print(f"experts per token {result['experts_per_token']:.3f} (layers "
              + " ".join(f"{k:.3f}" for k in result["experts_per_token_by_layer"]) + ")")
    if "attention/tail_mass" in result:
        error, bound = (result.get(f"attention/{name}", math.nan) for name in ("error", "error_bound"))
        print(f"attention  tail mass {result['attention/tail_mass']:.1%}  error {error:.1%} (mean over sampled rows, below "
              f"{bound:.1%} with probability 0.999)")
    if rows.bytes_problem is not None:
        print(rows.bytes_problem)
    bits_per_byte = f"  bits_per_byte {result['bits_per_byte']:.4f}" if "bits_per_byte" in result else ""
    print(f"{checkpoint}: val_loss {result['val_loss']:.4f}  perplexity {result['perplexity']:.2f}{bits_per_byte}"
          f"  unigram_entropy {store.unigram_entropy:.4f}")
    print_result({"run_dir": settings.run, "checkpoint": checkpoint.name, "step": read_state(checkpoint)["step"],
                  "unigram_entropy": store.unigram_entropy, **result})
    return result["val_loss"]


if __name__ == "__main__":
    run_main("evaluate", main)
