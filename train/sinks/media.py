"""Pictures of the routing: how the load spreads over experts, and how many experts tokens visit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

LOAD_BINS = 64
HEATMAP_WIDTH = 1024
"""Pixels aimed at; cells are squares of 1 to 32."""
EXPERT_LOAD = "routing/expert_load"
EXPERT_LOAD_HISTOGRAM = "routing/expert_load_histogram"
EXPERTS_PER_TOKEN = "routing/experts_per_token"


class Histogram(NamedTuple):
    """How many values lie between two edges."""

    heights: np.ndarray
    """[bins] int64."""
    edges: np.ndarray
    """[bins + 1] float64, rising."""

    def of_at_most(self, bins: int) -> Histogram:
        """Neighbours are joined until there are so many bins."""
        heights, edges = self
        while len(heights) > bins:
            if len(heights) % 2:
                heights, edges = np.append(heights, 0), np.append(edges, edges[-1] + 1)
            heights, edges = heights.reshape(-1, 2).sum(1), edges[::2]
        return Histogram(heights, edges)


class Media(NamedTuple):
    """The pictures of one routing record."""

    caption: str
    expert_load: np.ndarray
    """[height, width, 3] uint8, heatmap of MoE layers x experts: load over the layer's mean, 0 to
    2.
    """
    expert_load_histogram: Histogram
    """Of the same numbers."""
    experts_per_token: Histogram
    """Tokens by number of experts, of all layers."""


def media_of(step: int, tables: dict[str, Any]) -> Media:
    """The pictures of the tables of routing.jsonl."""
    counts = np.array(tables["counts"], np.float64)
    by_number = np.array(tables["k_histogram"], np.int64).sum(0)
    load = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)
    edges = np.linspace(0, max(2.0, float(load.max())), LOAD_BINS + 1)
    layers, experts = counts.shape
    return Media(
        f"step {step}: load over the mean, {layers} MoE layers (down) x {experts} experts",
        load_heatmap(load),
        Histogram(np.histogram(load, edges)[0], edges),
        Histogram(by_number, np.arange(len(by_number) + 1) - 0.5),
    )


def load_heatmap(load: np.ndarray) -> np.ndarray:
    """[layers, experts] load over the mean -> [height, width, 3] uint8: blue below 1, white at 1,
    red above, full from 2.
    """
    import matplotlib

    colours = matplotlib.colormaps["RdBu_r"](np.clip(load / 2, 0, 1))[..., :3]
    cell = int(np.clip(HEATMAP_WIDTH // load.shape[1], 1, 32))
    return np.kron((colours * 255).round().astype(np.uint8), np.ones((cell, cell, 1), np.uint8))
