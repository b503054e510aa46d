"""Names of all scalars that a run can log at a logged step, which is what alarms can watch. Imports
no torch.

docs/metrics.md says what each of them is; tests hold this list, that page and what runs log together.
"""

from __future__ import annotations

from collections.abc import Iterable

PLAIN = (
    "train/loss", "train/lr", "train/grad_norm", "train/skipped_steps",
    "perf/tokens_per_second", "perf/step_seconds", "perf/mfu", "perf/memory_gib", "perf/tile_padding",
    "perf/host_syncs", "perf/rank_skew", "perf/save_seconds",
    "comm/bytes", "comm/exposed_seconds", "comm/exposed_fraction", "comm/payload_error",
)
REASONS = ("nonfinite", "empty", "raised", "capped", "overridden", "overflow", "frozen",
           "overloaded")
"""Why a token was routed otherwise than its router's mode alone would have: ops.router.Reason."""
ROUTING = (
    "max_load", "max_load_layer", "min_load", "load_cv", "load_gini", "load_entropy", "dead_experts",
    "hot_fraction", "max_vio_step", "expert_flops_per_token", "margin_p05", "margin_p50", "log_z_p99",
    "log_z_max", "gate_sum", "gate_top1_share", "gate_rms", "co_activation", "z_loss", "aux_loss",
    "dropped", "spilled", "empty", *(f"fallback/{reason}" for reason in REASONS), "fallback_rate",
    "layers_in_fallback", "layers_collapsed",
)
BY_LAYER = ("max_vio", "experts_per_token", "budget_error", "router_entropy")
"""Routing metrics that are written for every layer; the others as mean and largest."""
SPREAD = (
    "min_vio", "experts_per_token_std", "load_entropy_ratio", "dead_fraction", "concentration",
    "router_similarity", "rank_load", "null_fraction", "theta", "mode_share", "top_p",
    "bias_range", "bias_rms", "bias_load_correlation",
)
"""Routing metrics with a mean and a largest; of single layers with tracker.metrics=detailed."""
SMALL_IS_BAD = ("load_entropy_ratio",)
"""Those with their smallest as well."""
GRADIENTS = ("expert_grad_cv", "router_grad_ratio", "gate_grad_share")
"""With tracker.metrics=detailed: mean, largest and single layers."""
ATTENTION = ("selected_blocks", "certificate_coverage", "mass_kl", "coherence", "error_bound")
ATTENTION_BY_LAYER = ("tail_mass", "selected_mass", "union_factor", "error", "certificate")
"""Attention metrics that are written for every sparse layer; of the others the mean."""
ATTENTION_TOTALS = ("error/max", "bound_violations")


def metric_names(moe_layers: Iterable[int], sparse_layers: Iterable[int],
                 detailed: bool) -> set[str]:
    """What a run with these layers can log. detailed: with tracker.metrics=detailed."""
    moe, sparse = tuple(moe_layers), tuple(sparse_layers)
    names = {*PLAIN, *(f"moe/{name}" for name in ROUTING)}
    for name in (*BY_LAYER, *SPREAD, *GRADIENTS):
        names |= {f"moe/{name}", f"moe/{name}/max"}
        if detailed or name in BY_LAYER:
            names |= {f"moe/{name}/layer_{layer}" for layer in moe}
    names |= {f"moe/{name}/min" for name in SMALL_IS_BAD}
    for name in (*ATTENTION, *ATTENTION_BY_LAYER, *ATTENTION_TOTALS):
        names.add(f"attention/{name}")
        if name in ATTENTION_BY_LAYER or (detailed and name in ATTENTION):
            names |= {f"attention/{name}/layer_{layer}" for layer in sparse}
    return names if detailed else names - {f"moe/{n}{s}" for n in GRADIENTS for s in ("", "/max")}
