"""Another budget for a trained model: the routers' cuts, P or shifts are found anew on text, the
weights stay.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import unpack_stats
from model.moe.budget import update_routers
from model.request import ForwardRequest
from model.routers.config import NO_BUDGET
from model.transformer import Transformer
from train.config.run import RunConfig
from train.data.loader import Batch, pack
from train.data.open import training_samples
from train.data.store import TokenStore

log = logging.getLogger("loadstone")
NUM_BATCHES, BATCH_SIZE = 48, 8
MOMENTUM = 0.8
"""Of the cuts, while they are calibrated."""
CUTS_ALONE = 8
"""Batches before the controllers join in."""
TOLERANCE = 0.02
"""Relative error of the mean that counts as met."""


def calibration_batches(config: RunConfig, store: TokenStore, run_data: Path) -> Iterator[Batch]:
    """The first training samples of a run, whose RUN/data is `run_data`, in one process."""
    samples = training_samples(config, store, run_data)
    samples.open(0, NUM_BATCHES * BATCH_SIZE)
    for first in range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE):
        yield pack(
            [samples.row(i) for i in range(first, first + BATCH_SIZE)],
            config.train.seq_len,
            store.end_of_document,
        )


@torch.no_grad()
def calibrate_budget(
    model: Transformer,
    batches: Iterable[Batch],
    budget: float,
    balance: BalanceConfig,
    settings: BudgetConfig,
    device: torch.device,
) -> float:
    """Run the model over the batches, one controller step each, until its routers hold `budget`
    experts per token.

    Changes the routers' state, not their weights. Returns the mean experts per token over the last
    half of the batches.

    Raises:
        ValueError: the router has no budget, or the new one does not fit it.
    """
    # Multi-token prediction takes no part in evaluation, and its routers keep their budget.
    layers = model.moe_layers()[: len(model.config.decoder_moe_layers)]
    routers = [layer.router for layer in layers]
    if not routers or routers[0].budget is None:
        raise ValueError(NO_BUDGET)
    spec = routers[0].spec
    if not max(1, spec.min_experts) <= budget <= spec.max_experts:
        raise ValueError(
            f"router.budget is {budget:g}; this router can choose {max(1, spec.min_experts)} to "
            f"{spec.max_experts} experts per token (its min_experts and max_experts)"
        )
    for layer, router in zip(layers, routers, strict=True):
        router.budget = budget
        router.controller.zero_()
        inputs = router.router_inputs
        inputs.share.fill_(1.0)
        inputs.limit.fill_(float(spec.max_experts))
        inputs.fallback_k.fill_(float(max(1, round(budget))))
        if router.has_quantile_bias:
            layer.num_bins = balance.histogram_bins
            router.prepare_histogram(layer.num_bins)
    model.eval()
    # No fallbacks: there is no training to protect.
    steady = dataclasses.replace(settings, scope="layer", guard_error=1e9, guard_capped=1e9)
    # The weights stand still, so cuts are averaged over many batches: what is used later is the
    # last of them.
    no_bias = dataclasses.replace(
        balance, bias_update="none", bias_update_rate=0.0, quantile_momentum=MOMENTUM
    )
    # The first batches are for the cuts alone: they begin far off, and theta would have to pay that
    # back.
    at_rest = dataclasses.replace(steady, kp=0.0, ki=0.0)
    means: list[torch.Tensor] = []
    for batch in batches:
        finding = routers[0].has_quantile_bias and len(means) < CUTS_ALONE
        stats = unpack_stats(
            model(batch.inputs(device), ForwardRequest(with_histogram=True)).stats,
            spec.num_experts,
            spec.max_experts,
        )
        means.append(stats.experts_per_token)
        update_routers(
            routers,
            stats,
            no_bias,
            at_rest if finding else steady,
            FailSafeConfig(collapse_share=1.0),
        )
    settled = torch.stack(means[len(means) // 2 :]).mean(0)
    mean = float(settled.mean())
    if float((settled / budget - 1).abs().max()) > TOLERANCE:
        log.warning(
            "router.budget %.3g is not met exactly: the layers' means are %s",
            budget,
            " ".join(f"{v:.3f}" for v in settled.tolist()),
        )
    return mean
