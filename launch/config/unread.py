"""Settings that somebody typed and that nothing in this run reads.

A file of settings has those of routers whether a model routes or not, so that a config alone cannot
tell; a typed one was meant to do something.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.routers.config import BudgetedConfig
from train.config.run import RunConfig

OF_ROUTING = ("router", "balance", "budget", "experts", "dispatcher")
"""Groups that only layers with experts read."""
OF_EXPERTS = (
    *("top_k", "expert_intermediate_size", "num_shared_experts", "num_dense_layers"),
    *("expert_bias", "shared_expert_gate"),
)
"""Settings of `model` that only such layers read."""
OFF = ("0", "0.0", "false", "null", "none")
"""Values that ask for nothing."""


def unread(typed: Sequence[str], run: RunConfig) -> list[str]:
    """A problem for each override that was typed for `run` and that nothing reads."""
    found = []
    for override in typed:
        key, _, value = override.lstrip("+").partition("=")
        if key.startswith("~") or value.lower() in OFF:
            continue
        group, _, name = key.replace("/", ".").partition(".")
        if not run.model.num_experts and (
            group in OF_ROUTING or (group == "model" and name in OF_EXPERTS)
        ):
            found.append(
                f"nothing reads {key}: model.num_experts is 0, so that no token is routed; leave "
                "it out, or set model.num_experts"
            )
        elif group == "budget" and not isinstance(run.router, BudgetedConfig):
            found.append(
                f"nothing reads {key}: router={run.router.name} holds no budget; leave it out, or "
                "choose a router with one, as router=threshold"
            )
    return found
