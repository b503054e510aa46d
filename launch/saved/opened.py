"""A trained model, opened for use: from a run, or from a folder of published weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command.progress import working
from launch.config.overrides import typed
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
    from train.config.training import ParallelConfig
    from train.data.store import TokenStore
    from train.trained.budgets import BudgetTable
    from train.trained.ranks import Place
    from train.trained.text import FolderTokens


def checkpoint_name(run_dir: str | None, checkpoint: str) -> str:
    """What best or latest stands for now: while the run still trains that changes, and a command
    reads one checkpoint, however often and on however many ranks it looks. Of no run, as it is.
    """
    from train.checkpoint.folder import find_checkpoint

    if run_dir is None:
        return checkpoint
    return find_checkpoint(Path(run_dir), prefer=checkpoint).name


def saved_budgets(
    run_dir: str | None,
    checkpoint: str,
    attention: Any = None,
    top_k: int | None = None,
    weights: str = "native",
    average: int = 1,
) -> tuple[BudgetTable | None, str]:
    """The budgets that launch.evaluate has saved for this checkpoint, and an empty text; or None,
    and why a model so opened has none.
    """
    from train.trained.budgets import described, load_table

    if run_dir is None:
        return None, "published weights have no saved budgets"
    if top_k is not None:
        return None, f"router.top_k={top_k} is another router than that of the saved budgets"
    table = load_table(Path(run_dir), checkpoint)
    if table is None:
        return None, (
            "the checkpoint has no saved budgets: python -m launch.evaluate "
            f"{typed('run', run_dir)} router.budget=[1,2] save_budgets=true"
        )
    if table.attention != described(attention):
        return None, "the saved budgets were measured with another attention"
    if average > 1 or weights == "ema":
        return None, "the saved budgets are cuts of the checkpoint's own weights, not of a mean"
    return table, ""


def opened(
    run_dir: str | None,
    checkpoint: str = "best",
    budget: float | None = None,
    attention: Any = None,
    top_k: int | None = None,
    path: str | None = None,
    place: Place | None = None,
    parallel: ParallelConfig | None = None,
    weights: str = "native",
    average: int = 1,
    for_text: bool = False,
) -> tuple[Transformer, TokenStore | FolderTokens, torch.device]:
    """The model of a run, or of a folder of published weights, on its device and at its budget, and
    its tokens. With a place it is this rank's share of the experts of a run. weights: int8 or fp8,
    the experts that launch.quantize has made, or ema, the moving average of a run; average: of how
    many checkpoints the mean is taken; for_text: a run without a tokenizer is refused.
    """
    from train.checkpoint.folder import find_last

    if path is not None:
        return _opened_folder(path, attention, top_k)
    assert run_dir is not None
    checkpoints = find_last(Path(run_dir), checkpoint, average)
    folder = checkpoints[0]
    config = load_run(run_dir, attention, folder, top_k)
    require_average(config, weights, folder)
    if budget is not None:
        require_budget(config)
    if for_text:
        require_text(config, run_dir)

    # Only now what imports torch: a mistake in the settings is told at once.
    import torch

    from train.checkpoint.writer import load_weights
    from train.components import build_model
    from train.data.store import TokenStore
    from train.trained.averages import reader_of
    from train.trained.quantize import use_eight_bit

    store = TokenStore(Path(run_dir) / "data")
    if place is None or parallel is None:
        model = build_model(config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        from train.trained.ranks import spread

        model, device = build_model(spread(config, parallel), place.groups), place.device
    with working(f"loading {folder}"):
        load_weights(model, reader_of(checkpoints, weights))
    use_eight_bit(model, Path(run_dir), folder, weights)
    model = model.to(device)

    # A budget that launch.evaluate has saved is a copy of buffers.
    if budget is not None:
        from train.data.prepare import prepare
        from train.trained.calibrate import calibrate_budget, calibration_batches

        table, _ = saved_budgets(run_dir, folder.name, attention, None, weights, average)
        if table is None or not table.use(model, budget):
            batches = calibration_batches(config, TokenStore(prepare(config.data)), store.path)
            calibrate_budget(model, batches, budget, config.balance, config.budget, device)
    return model, store, device


def _opened_folder(
    path: str, attention: Any, top_k: int | None
) -> tuple[Transformer, FolderTokens, torch.device]:
    config = load_folder(path, attention, top_k)
    settings = require_tokenizer(config, path)

    # Only now what imports torch: a mistake in the settings is told at once.
    import torch

    from train.components import build_model
    from train.pretrained.folder import PretrainedFolder
    from train.trained.text import FolderTokens

    tokens = FolderTokens.of(settings)
    model = build_model(config)
    PretrainedFolder(Path(path).expanduser()).fill_model(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokens, device
