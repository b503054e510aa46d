"""Held-out loss, perplexity, bits per byte and routing statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from model.attention.base import STATS
from model.loss import ModelOutput
from model.moe.balance import balance_metrics, unpack_stats
from model.parallel.groups import ParallelGroups
from model.parallel.part import LayerRows
from model.request import ForwardRequest, TokenBatch
from model.routers.base import Router
from model.transformer import Transformer
from train.data.loader import Batch
from train.observe.attention import attention_metrics
from train.observe.probe import RoutingProbe


@dataclass(frozen=True)
class StageOf:
    """What of a model is on this rank."""

    groups: ParallelGroups
    kind: Router | None
    """What all routers have in common; None in a dense model."""
    moe: LayerRows | None = None
    """Which of the MoE layers that evaluation visits are here; None: all."""
    sparse: LayerRows | None = None
    """Which of the layers with sparse attention; None: all."""
    keeps_routing: bool = False
    """Whether the first batch is for a probe, on this rank or on the first stage's."""

    @staticmethod
    def of(model: Transformer, keeps_routing: bool) -> StageOf:
        """Of a model, or of one stage of it."""
        part, kind = model.part, model.router_kind
        return StageOf(model.groups, kind, part.decoder_moe, part.sparse, keeps_routing)

    def whole_routing(
        self, output: ModelOutput, shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of all layers [L, B * S, K] and losses [B, S] of a batch whose routing was kept.
        Collective over the pipeline group.
        """
        device = output.loss_sum.device
        assert self.kind is not None
        if output.routings:
            ids = torch.stack([routing.expert_ids for routing in output.routings])
        else:
            slots = (0, shape.numel(), self.kind.max_top_k)
            ids = torch.zeros(slots, dtype=torch.int32, device=device)
        losses = output.token_losses
        if self.groups.pipeline_size == 1:
            return ids, losses
        ids = placed(self.moe, ids).int()
        if not losses.numel():
            losses = torch.zeros(shape, device=device)
        for part in (ids, losses):
            dist.all_reduce(part, group=self.groups.pipeline)
        return ids, losses


def placed(rows: LayerRows | None, values: torch.Tensor) -> torch.Tensor:
    """Rows of this rank's layers among those of all."""
    return values if rows is None else rows.placed(values)


Forward = Callable[[Sequence[TokenBatch], Sequence[ForwardRequest]], Sequence[ModelOutput]]
"""Of batches, and what is asked of each."""


def one_by_one(forward: Callable[[TokenBatch, ForwardRequest], ModelOutput]) -> Forward:
    """Of what takes a batch at a time, such as a model."""
    return lambda batches, requests: list(map(forward, batches, requests))


@torch.no_grad()
def evaluate(
    forward: Forward,
    batches: Iterable[Batch],
    device: torch.device,
    routers: list[Router],
    sparse_layers: list[int] | None = None,
    moe_layers: tuple[int, ...] | None = None,
    probe: RoutingProbe | None = None,
    stopped: Callable[[], bool] = lambda: False,
    stage: StageOf | None = None,
    at_once: int = 1,
) -> dict[str, Any] | None:
    """Sums over every rank's batches, divided once at the end. Collective: all ranks have as many
    batches.

    routers: of the MoE layers here.
    moe_layers: the numbers of all MoE layers, for moe/max_load_layer.
    probe: sees this rank's first batch.
    stopped: asked before every batch, with the same answer on all ranks; when it is True, the
        evaluation is left: a share of the batches is no result. Stages of a pipeline would wait for
        each other there, so they ask before every few batches.
    stage: what of the model is here; None: all of it.
    at_once: how many batches `forward` is given.

    Returns:
        None when it was left, else
        val_loss (nats per token), perplexity, bits_per_byte (nats of all targets over the bytes
        they stand for; absent where the batches do not know these), the number of targets, balance
        metrics, by_source (source -> {val_loss, num_targets, bits_per_byte}, where batches tell
        their source), mean experts per token, and the counts [layers][experts]; with sparse_layers
        (their numbers), also what train/observe/attention.py makes of these layers.

    Raises:
        ValueError: the model is in training mode, where what limits an expert's load makes tokens
            depend on each other; or there is no target.
    """
    if any(router.training for router in routers):
        raise ValueError(
            "the model is in training mode, where its loss depends on the batch; call eval() first"
        )
    if stage is None:
        kind = routers[0] if routers else None
        stage = StageOf(ParallelGroups.single(), kind, keeps_routing=probe is not None)
    kind, groups = stage.kind, stage.groups
    measured = torch.zeros(len(sparse_layers or ()), len(STATS), dtype=torch.float64, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    # The same sources in the same order on all ranks, for they have the same batches.
    of_sources: dict[int, torch.Tensor] = {}
    stats: torch.Tensor | None = None
    asks = 1 if groups.pipeline_size == 1 else 4 * groups.pipeline_size
    plain = ForwardRequest(measure_attention=bool(sparse_layers))
    number, left = 0, iter(batches)
    while group := list(itertools.islice(left, at_once)):
        if number % asks == 0 and stopped():
            return None
        requests = [plain] * len(group)
        if number == 0:
            requests[0] = plain._replace(keep_routing=stage.keeps_routing)
        outputs = forward([batch.inputs(device) for batch in group], requests)
        for batch, output in zip(group, outputs, strict=True):
            if stage.keeps_routing and number == 0:
                ids, losses = stage.whole_routing(output, batch.targets.shape)
                if probe is not None:
                    probe.add(batch, ids, losses)
            if sparse_layers:
                measured += placed(stage.sparse, output.attention_stats)
            places = [sums]
            if batch.source is not None:
                places.append(of_sources.setdefault(batch.source, torch.zeros_like(sums)))
            # The stage that makes the losses counts what they are of.
            for place in places if groups.is_last_stage else ():
                place[0] += output.loss_sum
                place[1] += batch.num_targets
                place[2] += batch.target_bytes or 0
            own = placed(stage.moe, output.stats)
            stats = own if stats is None else stats + own
            number += 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        for of_source in of_sources.values():
            dist.all_reduce(of_source)
        dist.all_reduce(measured)
        if stats is not None and kind is not None:
            dist.all_reduce(stats)
    loss_sum, num_targets, num_bytes = sums.tolist()
    if num_targets == 0:
        raise ValueError(
            "the held-out split has no token to predict; raise data.validation_fraction"
        )
    loss = loss_sum / num_targets
    result: dict[str, Any] = {
        "val_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        **({"bits_per_byte": loss_sum / math.log(2) / num_bytes} if num_bytes else {}),
        "num_targets": int(num_targets),
    }
    if of_sources:
        result["by_source"] = {
            source: _of_source(*values.tolist()) for source, values in of_sources.items()
        }
    if sparse_layers:
        result.update(attention_metrics(measured.cpu(), sparse_layers))
    if stats is not None and kind is not None:
        layers = unpack_stats(stats.cpu(), kind.spec.num_experts, kind.max_top_k)
        result.update(balance_metrics(layers.counts, moe_layers))
        result["experts_per_token"] = float(layers.experts_per_token.mean())
        result["experts_per_token_by_layer"] = layers.experts_per_token.tolist()
        result["counts"] = layers.counts.tolist()
    return result


def _of_source(loss_sum: float, num_targets: float, num_bytes: float) -> dict[str, float]:
    found = {"val_loss": loss_sum / max(num_targets, 1), "num_targets": int(num_targets)}
    if num_bytes:
        found["bits_per_byte"] = loss_sum / math.log(2) / num_bytes
    return found
