"""Metrics: accumulated on the device between log steps, reduced over ranks in one packed
all-reduce.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from model.attention.base import STATS
from model.config import BalanceConfig, ModelConfig
from model.loss import ModelOutput
from model.moe.balance import LayerStats
from model.parallel.groups import ParallelGroups
from model.parallel.part import ModelPart
from model.routers.base import Router
from ops.all_to_all import Communication
from ops.device import peak_tflops
from train.agenda import Step
from train.files.sizes import GIB
from train.observe.attention import attention_metrics
from train.observe.base import Ask, MicroBatch, Observer, Phase, StepResult
from train.observe.routing import RouterTables, routing_metrics, routing_tables

HEAD = 13
"""Scalar sums in front of the packed vector."""
OF_UPDATES = 7
"""The first so many of them count only steps that updated the weights."""


def memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: device memory on CUDA, resident set size on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepMetrics(Observer):
    """Sums over the steps since the last log line.

    Local sums until `reduce`: [loss, aux, z, targets, tokens, processed, z of the output logits |
    bytes, exposed seconds, seconds, squared rounding, squared values, tokens of all steps |
    attention | multi-token prediction | memory by rank | what routers hold, where stages share
    them out].
    The routers' statistics come reduced over ranks, once per step. A skipped step took its time,
    computed its tokens and sent its rows, and counts in nothing else.

    Args:
        routers: of the MoE layers here; stage: which those are, None where all are here, and
            `kind` what all routers have in common.
    """

    def __init__(
        self,
        model: ModelConfig,
        routers: list[Router],
        device: torch.device,
        flops_per_token: float,
        balance: BalanceConfig,
        rank_shares: torch.Tensor | None,
        sparse_layers: Sequence[int],
        detailed: bool = False,
        kind: Router | None = None,
        groups: ParallelGroups | None = None,
        part: ModelPart | None = None,
    ):
        self.model, self.routers, self.device = model, routers, device
        self.kind = kind if kind is not None or not routers else routers[0]
        self.groups, self.part = groups or ParallelGroups.single(), part
        self.flops_per_token, self.balance, self.rank_shares = flops_per_token, balance, rank_shares
        self.sparse_layers, self.detailed = sparse_layers, detailed
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak_flops = None if peak is None else peak * 1e12 * self.world_size
        self._trains = False
        self._step_began = self._step_seconds = 0.0
        self._tables: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(HEAD, dtype=torch.float64, device=self.device)
        self.attention = torch.zeros(
            len(self.sparse_layers), len(STATS), dtype=torch.float64, device=self.device
        )
        # of every module of multi-token prediction: its loss, its targets
        self.mtp = torch.zeros(
            2, self.model.num_mtp_layers, dtype=torch.float64, device=self.device
        )
        self.stats: LayerStats | None = None
        num_layers = len(self.model.moe_layers)
        self.max_vio_sum = torch.zeros(num_layers, dtype=torch.float64, device=self.device)
        self.steps = self.updates = 0
        self.started = time.perf_counter()

    def begin_step(self, step: Step) -> Ask:
        self._before_step = self.mark()
        self._step_began = time.perf_counter()
        return Ask.ATTENTION | Ask.COMMUNICATION if step.logs else Ask.NOTHING

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        """What comes before the first step, evaluations and checkpoints count as no training
        time.
        """
        if name == "whole" and not self._trains:
            self._trains, self.started = True, time.perf_counter()
        entered = time.perf_counter()
        yield
        if name == "pause":
            self.started += time.perf_counter() - entered
        if name == "step":
            self._step_seconds = time.perf_counter() - self._step_began

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        ahead = range(1, self.model.num_mtp_layers + 1)
        self.add(
            done.output,
            done.batch.num_targets,
            done.batch.num_tokens,
            [done.batch.num_targets_ahead(number) for number in ahead],
        )

    def end_step(self, step: Step, result: StepResult) -> None:
        if result.communication is not None:
            self.add_communication(result.communication, self._step_seconds)
        if not result.applied:
            self.revert(self._before_step)
        elif result.layers is not None:
            self.add_stats(result.layers)
        self.steps += 1

    def log(self, step: Step) -> dict[str, Any]:
        """Collective."""
        scalars, self._tables = self.reduce()
        return scalars

    def tables(self) -> dict[str, Any]:
        return self._tables

    def add(
        self,
        output: ModelOutput,
        num_targets: int,
        num_tokens: int,
        num_mtp_targets: Sequence[int] = (),
    ) -> None:
        """Add one micro-batch of this rank; no synchronisation with the device."""
        self.sums[1] += output.aux_sum.detach()
        self.sums[2] += output.z_sum.detach()
        self.sums[5] += output.processed
        measured = output.attention_stats
        self.attention += measured if self.part is None else self.part.sparse.placed(measured)
        # All stages have the same tokens: the one that makes the losses counts them.
        if not self.groups.is_last_stage:
            return
        self.sums[0] += output.loss_sum.detach()
        self.sums[3] += num_targets
        self.sums[4] += num_tokens
        self.sums[6] += output.logit_z_sum.detach()
        self.sums[12] += num_tokens
        if num_mtp_targets:
            self.mtp[0] += output.mtp_sums.detach()
            self.mtp[1] += torch.tensor(num_mtp_targets, device=self.device)

    def mark(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sums of updates so far, to go back to with `revert` when a step is skipped."""
        return self.sums[:OF_UPDATES].clone(), self.attention.clone(), self.mtp.clone()

    def revert(self, mark: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self.sums[:OF_UPDATES], self.attention, self.mtp = mark

    def add_communication(self, found: Communication, seconds: float) -> None:
        """Add what one optimisation step of this rank sent and waited for, and how long the step
        took.
        """
        self.sums[OF_UPDATES:12] += torch.tensor(
            [found.num_bytes, found.exposed_seconds, seconds, *found.payload_error],
            dtype=torch.float64,
            device=self.device,
        )

    def add_stats(self, stats: LayerStats) -> None:
        """Add the routers' statistics of one step that updated the weights, over all ranks."""
        kept = stats._replace(histogram=stats.histogram[..., :0])
        self.stats = (
            kept
            if self.stats is None
            else LayerStats(*(a + b for a, b in zip(self.stats, kept, strict=True)))
        )
        load = stats.counts.double()
        self.max_vio_sum += load.max(1).values / load.mean(1).clamp_min(1e-9) - 1
        self.updates += 1

    def reduce(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scalars of the interval and the routing tables of routing.jsonl; resets. Collective.

        In an interval without any update train/loss is NaN, which the files have as null, and moe/*
        is absent.
        """
        memory = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        memory[self.rank] = memory_bytes(self.device)
        tables = self._router_tables()
        flat_tables = torch.cat([table.flatten() for table in tables])
        packed = torch.cat(
            (self.sums, self.attention.flatten(), self.mtp.flatten(), memory, flat_tables)
        )
        if self.world_size > 1:
            dist.all_reduce(packed)
        values = packed.cpu()
        seconds = time.perf_counter() - self.started
        (
            loss,
            aux,
            z,
            targets,
            tokens,
            processed,
            logit_z,
            num_bytes,
            exposed,
            measured,
            error,
            square,
            all_tokens,
        ) = values[:HEAD].tolist()
        sizes = (HEAD, self.attention.numel(), self.mtp.numel(), self.world_size)
        _, flat_attention, flat_mtp, all_memory, flat_tables = values.split(
            (*sizes, flat_tables.numel())
        )
        attention = flat_attention.view_as(self.attention)
        scalars: dict[str, Any] = {
            "train/loss": loss / targets if targets > 0 else math.nan,
            "perf/tokens_per_second": all_tokens / seconds,
            "perf/step_seconds": seconds / max(self.steps, 1),
            "perf/memory_gib": float(all_memory.max()) / GIB,
        }
        if logit_z > 0:
            scalars["train/z_loss"] = logit_z / targets
        if flat_mtp.numel():
            mtp_sums, mtp_targets = flat_mtp.view_as(self.mtp)
            of_modules = mtp_sums / mtp_targets  # NaN where no module predicted anything
            scalars["train/mtp_loss"] = float(of_modules.mean())
        if self.peak_flops is not None:
            scalars["perf/mfu"] = self.flops_per_token * all_tokens / seconds / self.peak_flops
        if measured > 0:
            scalars |= {
                "comm/bytes": num_bytes / self.world_size,
                "comm/exposed_seconds": exposed / self.world_size,
                "comm/exposed_fraction": exposed / measured,
            }
        if square > 0:
            scalars["comm/payload_error"] = math.sqrt(error / square)
        scalars |= attention_metrics(attention, self.sparse_layers, self.detailed)
        written: dict[str, Any] = {}
        if self.stats is not None:
            assert self.kind is not None
            layers = len(self.model.moe_layers)
            stats = LayerStats(*(part.cpu() for part in self.stats))
            scalars["moe/z_loss"] = z / max(tokens, 1) / layers
            if self.balance.aux_loss_coeff > 0:
                scalars["moe/aux_loss"] = aux / max(tokens, 1) / layers
            spilled, dropped = stats.overflow.sum(0).double().tolist()
            wanted = max(float(stats.counts.sum()) + dropped, 1.0)
            scalars["moe/dropped"] = 1.0 - processed / wanted
            scalars["moe/spilled"] = spilled / wanted
            scalars["moe/max_vio_step"] = float(self.max_vio_sum.mean()) / max(self.updates, 1)
            scalars.update(
                routing_metrics(
                    stats,
                    self._whole_tables(flat_tables, tables),
                    self.kind,
                    self.model,
                    self.rank_shares,
                    self.detailed,
                )
            )
            written = routing_tables(stats)
        self.reset()
        return scalars, written

    def _router_tables(self) -> list[torch.Tensor]:
        """What the routers of this stage hold, for the sum over ranks to have that of all: rows of
        other stages are 0, and so is everything on all but a stage's first rank. [] without stages.
        """
        if self.kind is None or self.groups.pipeline_size == 1:
            return [self.sums[:0]]
        assert self.part is not None
        own = RouterTables.of(self.routers, self.kind)
        counts = self.groups.stage_rank == 0
        found = [self.part.moe.placed(t).to(self.device) for t in own if t is not None]
        return found if counts else [torch.zeros_like(table) for table in found]

    def _whole_tables(self, flat: torch.Tensor, like: list[torch.Tensor]) -> RouterTables:
        """Those of all layers, on the host: the sum over ranks, or this rank's where it has all."""
        assert self.kind is not None
        if self.groups.pipeline_size == 1:
            own = RouterTables.of(self.routers, self.kind)
            similarity = None if own.similarity is None else own.similarity.cpu()
            return RouterTables(own.control.cpu(), own.controller.cpu(), own.bias.cpu(), similarity)
        parts = flat.split([table.numel() for table in like])
        whole = [part.view(table.shape) for part, table in zip(parts, like, strict=True)]
        similarity = whole[3] if len(whole) > 3 else None
        return RouterTables(whole[0], whole[1], whole[2], similarity)
