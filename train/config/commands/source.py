"""Where a command takes its model from, and what it may ask of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from infer.config import EngineConfig
from model.attention.config.base import AttentionConfig


@dataclass(frozen=True)
class InferenceRouterConfig:
    """What a trained router can be asked to do differently."""

    budget: float | None = None
    """Mean experts per token; None: as trained. The routers are calibrated to it on training text
    first.
    """
    top_k: int | None = None
    """Every token visits so many experts, those of its highest scores, by fixed top-k; None: as
    trained.
    """

    def problems(self) -> list[str]:
        if self.budget is not None and self.budget <= 0:
            return [
                f"router.budget is {self.budget}; it must be positive, or null for the budget of "
                "the training"
            ]
        if self.top_k is not None and self.budget is not None:
            return ["router.budget and router.top_k are two ways to choose; drop one"]
        if self.top_k is not None and self.top_k < 1:
            return [f"router.top_k is {self.top_k}; it must be at least 1"]
        return []


Weights = Literal["native", "int8", "fp8", "ema"]
"""native: as they were saved. int8, fp8: experts of 8 bits, made by launch.quantize. ema: their
moving average (optim.ema_decay).
"""


def problems_of_weights(weights: Weights, path: str | None, num_devices: int = 1) -> list[str]:
    """Of the experts that launch.quantize has made, and of the average that training kept."""
    if weights == "native":
        return []
    if weights == "ema":
        return [] if path is None else ["weights=ema is kept by a run; give run=RUN"]
    found = []
    if path is not None:
        found.append(f"weights={weights} is made for a run by launch.quantize; give run=RUN")
    if num_devices > 1:
        found.append(f"weights={weights} is for one process; set launch.num_devices=1")
    return found


def problems_of_drafts(
    engine: EngineConfig,
    path: str | None,
    router: InferenceRouterConfig,
    attention: AttentionConfig | None,
) -> list[str]:
    """Where drafts cannot be made: their budget is one of those saved for a run, and what they
    evict from a bounded cache is gone.
    """
    if engine.draft_budget is None:
        return []
    if attention is not None and attention.arguments.get("resident_blocks") is not None:
        return [
            f"engine.draft_budget is {engine.draft_budget:g}, but with attention.resident_blocks "
            "drafts would evict tokens for good; drop one of them"
        ]
    if path is None and router.top_k is None:
        return []
    other = "path" if path is not None else "router.top_k"
    return [f"engine.draft_budget is a saved budget of a run; drop it, or drop {other}"]


def problems_of_limit(engine: EngineConfig, num_devices: int) -> list[str]:
    """Where the experts of a step cannot be limited: ranks would have to choose them together."""
    if engine.max_active_experts is None or num_devices == 1:
        return []
    return [
        f"engine.max_active_experts with launch.num_devices={num_devices}: it is of one process; "
        "drop one of them"
    ]


DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""Where drivers of GPUs are: NVIDIA's, also in a container, Windows' for Linux, and AMD's."""


def problems_of_graphs(
    asked: Literal["auto", True, False], setting: str, expert_parallel_size: int = 1
) -> list[str]:
    """Where decoding steps that are asked for as CUDA graphs cannot be. setting: what it is called;
    what the model itself may stand in the way with is seen when it is loaded.
    """
    if asked is not True:
        return []
    if not any(os.path.exists(device) for device in DEVICES):
        return [
            f"{setting}=true, but this machine has no GPU ({DEVICES[0]} is missing); set "
            f"{setting}=auto or false"
        ]
    if expert_parallel_size > 1:
        return [
            f"{setting}=true with parallel.expert_parallel_size={expert_parallel_size}: ranks "
            "agree on every step, which no graph can hold; drop one of them"
        ]
    return []


def problems_of_average(average: int, path: str | None, weights: Weights = "native") -> list[str]:
    """Of the mean of a run's last checkpoints."""
    if average == 1:
        return []
    if average < 1:
        return [f"average is {average}; it is a number of checkpoints, at least 1"]
    if path is not None:
        return [f"average={average} is of a run's checkpoints, and path=DIR has none; give run=RUN"]
    if weights != "native":
        return [
            f"average={average} and weights={weights} are two kinds of weights; drop one of them"
        ]
    return []


def problems_of_source(
    run: str | None, path: str | None, router: InferenceRouterConfig
) -> list[str]:
    """Of the two places that a model may come from."""
    if (run is None) == (path is None):
        both = "run and path are both set; drop one" if run else "give"
        return [f"{both}: run=RUN of launch.train, or path=DIR with published weights"]
    if path is not None and router.budget is not None:
        return [
            "router.budget is calibrated on the training text of a run, which path=DIR does not "
            "have; give router.top_k"
        ]
    return []
