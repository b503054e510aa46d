"""The budgets of a run as data: for each, the state of the routers and what it was measured to do.
Calibrated once (launch.evaluate save_budgets=true), then copied into the routers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infer.budget import RouterState, use
from model.attention.config.base import AttentionConfig
from model.loss import IGNORE_INDEX
from model.request import ForwardRequest
from model.transformer import Transformer
from train.data.loader import Batch
from train.files.durable import write_json
from train.files.manifest import read_json, require_owned
from train.files.strict_json import dumps

FOLDER = "budgets"
Z = 1.959964
"""Of a two-sided interval of 95%."""


@dataclass(frozen=True)
class BudgetRow:
    """A budget of a checkpoint, as it was measured on held-out text."""

    budget: float
    """Mean experts per token that was asked for."""
    calibrated: float
    """What the routers spent on the training text they were calibrated on."""
    experts_per_token: float
    """What they spent on held-out text."""
    val_loss: float
    """Nats per token."""
    low: float
    high: float
    """95% of the loss, over held-out rows."""
    difference: float
    """Of the loss to that of the largest budget."""
    difference_low: float
    difference_high: float
    """95% of the difference, over the same rows: far narrower than the losses' own."""
    flops_per_token: float
    """Of a forward pass, at the run's train.seq_len and the experts that held-out text visited."""


@dataclass(frozen=True)
class BudgetTable:
    """What stands in RUN/budgets/CHECKPOINT.json."""

    rows: tuple[BudgetRow, ...]
    states: dict[float, list[RouterState]]
    attention: dict[str, Any] | None
    """That it was calibrated and measured with, if it was not the trained one."""

    def use(self, model: Transformer, budget: float) -> bool:
        """Switch the model to a budget of the table; False: the table does not have it."""
        states = self.states.get(budget)
        if states is None:
            return False
        use(model.routers(), states)
        return True

    def on(self, device: torch.device) -> dict[float, list[RouterState]]:
        """The states on a device, as the engine switches between them."""
        return {
            budget: [RouterState(*(value.to(device) for value in state)) for state in states]
            for budget, states in self.states.items()
        }


def described(attention: AttentionConfig | None) -> dict[str, Any] | None:
    """An attention that replaces the trained one, as JSON gives it back."""
    if attention is None:
        return None
    found: dict[str, Any] = json.loads(dumps({"name": attention.name, **attention.arguments}))
    return found


def table_path(run_dir: Path, checkpoint: str) -> Path:
    return run_dir / FOLDER / f"{checkpoint}.json"


def save_table(run_dir: Path, checkpoint: str, table: BudgetTable) -> Path:
    """Raises ValueError where a router's state is not finite, which JSON cannot hold."""
    path = table_path(run_dir, checkpoint)
    states = {
        str(budget): [[value.tolist() for value in state] for state in layers]
        for budget, layers in table.states.items()
    }
    if not all(
        value.isfinite().all() for layers in table.states.values() for s in layers for value in s
    ):
        raise ValueError("a router's cuts are not finite; calibrate on more text")
    path.parent.mkdir(exist_ok=True)
    rows = [dataclasses.asdict(row) for row in table.rows]
    write_json(path, {"rows": rows, "attention": table.attention, "states": states})
    return path


def load_table(run_dir: Path, checkpoint: str) -> BudgetTable | None:
    """The table of a checkpoint; None: there is none.

    Raises:
        ValueError: it is damaged. CheckpointError: it is another user's.
    """
    path = table_path(run_dir, checkpoint)
    if not path.is_file():
        return None
    require_owned(path)
    try:
        found = read_json(path)
        rows = tuple(BudgetRow(**row) for row in found["rows"])
        states = {
            float(budget): [
                RouterState(*(torch.tensor(value, dtype=torch.float32) for value in state))
                for state in layers
            ]
            for budget, layers in found["states"].items()
        }
        return BudgetTable(rows, states, found["attention"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, or write it anew: "
            "python -m launch.evaluate save_budgets=true"
        ) from error


@torch.no_grad()
def losses_by_row(
    model: Transformer, batches: Iterable[Batch], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Summed loss and number of targets of every held-out row, [rows] fp64 each, and the mean
    number of experts per token.
    """
    sums, counts, experts, tokens = [], [], 0.0, 0
    for batch in batches:
        given = batch.inputs(device)
        output = model(given, ForwardRequest(keep_routing=True))
        sums.append(output.token_losses.double().sum(1).cpu())
        counts.append((given.targets != IGNORE_INDEX).sum(1).double().cpu())
        visited = [(routing.expert_ids >= 0).sum() for routing in output.routings]
        if visited:  # else it is a dense model
            experts += float(torch.stack(visited).double().mean())
        mask = given.token_mask
        tokens += given.input_ids.numel() if mask is None else int(mask.sum())
    return torch.cat(sums), torch.cat(counts), experts / max(1, tokens)


def ratio_interval(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float, float]:
    """sum(sums) / sum(counts) of rows, and its 95% interval by the delta method for a ratio of
    means (Cochran, Sampling Techniques, 6.4). sums, counts: [rows] fp64.
    """
    total = float(counts.sum())
    ratio = float(sums.sum()) / total
    rows = int((counts > 0).sum())
    if rows < 2:
        return ratio, -math.inf, math.inf
    residuals = (sums - ratio * counts)[counts > 0]
    error = Z * math.sqrt(float(residuals.square().sum()) * rows / (rows - 1)) / total
    return ratio, ratio - error, ratio + error


def measured_rows(
    found: dict[float, tuple[float, torch.Tensor, torch.Tensor, float]],
    flops_of: Callable[[float], float],
) -> tuple[BudgetRow, ...]:
    """Rows of a table from, by budget: (what calibration spent, *losses_by_row). flops_of: forward
    FLOPs per token at so many experts per token.
    """
    _, base, _, _ = found[max(found)]
    rows = []
    for budget, (calibrated, sums, counts, experts) in sorted(found.items()):
        loss, low, high = ratio_interval(sums, counts)
        difference, below, above = ratio_interval(sums - base, counts)
        rows.append(
            BudgetRow(
                budget=budget,
                calibrated=calibrated,
                experts_per_token=experts,
                val_loss=loss,
                low=low,
                high=high,
                difference=difference,
                difference_low=below,
                difference_high=above,
                flops_per_token=flops_of(experts),
            )
        )
    return tuple(rows)
