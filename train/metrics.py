"""Metrics: accumulated on the device between log steps, reduced over ranks in one packed all-reduce."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from model.attention.base import STATS
from model.balance import LayerStats
from model.config import BalanceConfig, ModelConfig
from model.loss import ModelOutput
from model.routers.base import Router
from ops.all_to_all import Communication
from ops.device import peak_tflops
from train.attention_metrics import attention_metrics
from train.routing_metrics import routing_metrics, routing_tables

HEAD = 12
"""Scalar sums in front of the packed vector."""
OF_UPDATES = 6
"""The first so many of them count only steps that updated the weights."""


def memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: device memory on CUDA, resident set size on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepMetrics:
    """Sums over the steps since the last log line.

    Local sums until `reduce`: [loss, aux, z, targets, tokens, processed | bytes, exposed seconds, seconds, squared rounding,
    squared values, tokens of all steps | attention | memory by rank]. The routers' statistics come reduced over ranks, once
    per step. A skipped step took its time, computed its tokens and sent its rows, and counts in nothing else.
    """

    def __init__(self, model: ModelConfig, routers: list[Router], device: torch.device, flops_per_token: float,
                 balance: BalanceConfig, rank_shares: torch.Tensor | None, sparse_layers: list[int],
                 detailed: bool = False):
        self.model, self.routers, self.device = model, routers, device
        self.flops_per_token, self.balance, self.rank_shares = flops_per_token, balance, rank_shares
        self.sparse_layers, self.detailed = sparse_layers, detailed
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak_flops = None if peak is None else peak * 1e12 * self.world_size
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(HEAD, dtype=torch.float64, device=self.device)
        self.attention = torch.zeros(len(self.sparse_layers), len(STATS), dtype=torch.float64, device=self.device)
        self.stats: LayerStats | None = None
        self.max_vio_sum = torch.zeros(len(self.routers), dtype=torch.float64, device=self.device)
        self.steps = self.updates = 0
        self.started = time.perf_counter()

    def add(self, output: ModelOutput, num_targets: int, num_tokens: int) -> None:
        """Add one micro-batch of this rank; no synchronisation with the device."""
        self.sums[0] += output.loss_sum.detach()
        self.sums[1] += output.aux_sum.detach()
        self.sums[2] += output.z_sum.detach()
        self.sums[3] += num_targets
        self.sums[4] += num_tokens
        self.sums[5] += output.processed
        self.sums[11] += num_tokens
        self.attention += output.attention_stats

    def mark(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of updates so far, to go back to with `revert` when a step is skipped."""
        return self.sums[:OF_UPDATES].clone(), self.attention.clone()

    def revert(self, mark: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.sums[:OF_UPDATES], self.attention = mark

    def add_communication(self, found: Communication, seconds: float) -> None:
        """Add what one optimisation step of this rank sent and waited for, and how long the step took."""
        self.sums[OF_UPDATES:11] += torch.tensor([found.num_bytes, found.exposed_seconds, seconds, *found.payload_error],
                                               dtype=torch.float64, device=self.device)

    def add_stats(self, stats: LayerStats) -> None:
        """Add the routers' statistics of one step that updated the weights, over all ranks."""
        kept = stats._replace(histogram=stats.histogram[..., :0])
        self.stats = kept if self.stats is None else LayerStats(*(a + b for a, b in zip(self.stats, kept, strict=True)))
        load = stats.counts.double()
        self.max_vio_sum += load.max(1).values / load.mean(1).clamp_min(1e-9) - 1
        self.updates += 1

    def reduce(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scalars of the interval and the routing tables of routing.jsonl; resets. Collective.

        In an interval without any update train/loss is NaN, which the files have as null, and moe/* is absent.
        """
        memory = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        memory[self.rank] = memory_bytes(self.device)
        packed = torch.cat((self.sums, self.attention.flatten(), memory))
        if self.world_size > 1:
            dist.all_reduce(packed)
        values = packed.cpu()
        seconds = time.perf_counter() - self.started
        (loss, aux, z, targets, tokens, processed, num_bytes, exposed, measured, error, square,
         all_tokens) = values[:HEAD].tolist()
        attention = values[HEAD:HEAD + self.attention.numel()].view_as(self.attention)
        scalars: dict[str, Any] = {
            "train/loss": loss / targets if targets > 0 else math.nan,
            "perf/tokens_per_second": all_tokens / seconds,
            "perf/step_seconds": seconds / max(self.steps, 1),
            "perf/memory_gib": float(values[HEAD + self.attention.numel():].max()) / 2**30,
        }
        if self.peak_flops is not None:
            scalars["perf/mfu"] = self.flops_per_token * all_tokens / seconds / self.peak_flops
        if measured > 0:
            scalars |= {"comm/bytes": num_bytes / self.world_size, "comm/exposed_seconds": exposed / self.world_size,
                        "comm/exposed_fraction": exposed / measured}
        if square > 0:
            scalars["comm/payload_error"] = math.sqrt(error / square)
        scalars |= attention_metrics(attention, self.sparse_layers, self.detailed)
        tables: dict[str, Any] = {}
        if self.stats is not None:
            layers = len(self.routers)
            stats = LayerStats(*(part.cpu() for part in self.stats))
            scalars["moe/z_loss"] = z / max(tokens, 1) / layers
            if self.balance.aux_loss_coeff > 0:
                scalars["moe/aux_loss"] = aux / max(tokens, 1) / layers
            spilled, dropped = stats.overflow.sum(0).double().tolist()
            wanted = max(float(stats.counts.sum()) + dropped, 1.0)
            scalars["moe/dropped"] = 1.0 - processed / wanted
            scalars["moe/spilled"] = spilled / wanted
            scalars["moe/max_vio_step"] = float(self.max_vio_sum.mean()) / max(self.updates, 1)
            scalars.update(routing_metrics(stats, self.routers, self.model, self.rank_shares, self.detailed))
            tables = routing_tables(stats)
        self.reset()
        return scalars, tables


def console_line(step: int, num_steps: int, scalars: dict[str, Any], eta_seconds: float) -> str:
    """One greppable line: name value pairs, two spaces apart."""
    parts = [f"step {step}/{num_steps}", f"loss {scalars['train/loss']:.4f}", f"lr {scalars['train/lr']:.2e}",
             f"gnorm {scalars['train/grad_norm']:.3f}"]
    if scalars["train/skipped_steps"]:
        parts.append(f"skipped {scalars['train/skipped_steps']}")
    if "moe/max_load" in scalars:
        parts += [f"balance {scalars['moe/max_load']:.2f}x (layer {scalars['moe/max_load_layer']})",
                  f"dropped {scalars['moe/dropped']:.1%}"]
        if "moe/budget_error" in scalars:
            parts.append(f"k {scalars['moe/experts_per_token']:.2f}")
        if scalars["moe/spilled"] > 1e-3:
            parts.append(f"spilled {scalars['moe/spilled']:.1%}")
        parts += [f"{name.removeprefix('moe/fallback/')} {share:.1%}" for name, share in scalars.items()
                  if name.startswith("moe/fallback/") and share > 1e-3
                  and not name.endswith(("overridden", "raised", "overflow"))]
        if scalars["moe/layers_in_fallback"]:
            parts.append(f"plain top-k in {scalars['moe/layers_in_fallback']} layers")
    if "attention/tail_mass" in scalars:
        parts.append(f"tail {scalars['attention/tail_mass']:.1%}")
    if "attention/error_bound" in scalars:
        parts.append(f"attention error {scalars['attention/error']:.1%}")
    parts.append(f"{_human(scalars['perf/tokens_per_second'])} tok/s")
    if "perf/mfu" in scalars:
        parts.append(f"mfu {scalars['perf/mfu']:.1%}")
    if "comm/exposed_fraction" in scalars:
        parts.append(f"waiting {scalars['comm/exposed_fraction']:.1%}")
    parts += [f"mem {scalars['perf/memory_gib']:.2f}GiB", f"eta {_duration(eta_seconds)}"]
    return "  ".join(parts)


def _human(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}G"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
