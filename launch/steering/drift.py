"""Whether a served model uses its experts as it did in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon divergence of two counts, in nats: 0 of equal shares, ln 2 of disjoint ones
    (Lin, IEEE Trans. Inf. Theory 37, 1991).
    """
    p, q = (counts / max(float(counts.sum()), 1e-300) for counts in (one, other))
    middle = (p + q) / 2

    def relative(a: np.ndarray) -> float:
        at = a > 0
        return float((a[at] * np.log(a[at] / middle[at])).sum())

    return (relative(p) + relative(q)) / 2


class Drift:
    """Compares loads of experts, window by window of tokens.

    Args:
        baseline: counts of training, [layers][experts].

    Attributes:
        by_layer: divergences of the last whole window; rings: whether one of them was above the
            limit; windows: whole ones so far.
    """

    def __init__(self, baseline: Sequence[Sequence[float]], window_tokens: int, limit: float):
        self.baseline = np.asarray(baseline, np.float64)
        self.window_tokens, self.limit = window_tokens, limit
        self.by_layer: list[float] = []
        self.rings = False
        self.windows = 0
        self._counts = np.zeros_like(self.baseline)
        self._tokens = 0

    def saw(self, expert_ids: np.ndarray) -> bool:
        """The experts of a request's tokens, [tokens, layers, K], -1 for none; True: a window is
        full.
        """
        tokens, layers, _ = expert_ids.shape
        for layer in range(layers):
            ids = expert_ids[:, layer]
            self._counts[layer] += np.bincount(ids[ids >= 0], minlength=self.baseline.shape[1])
        self._tokens += tokens
        if self._tokens < self.window_tokens:
            return False
        self.by_layer = [
            divergence(one, other) for one, other in zip(self._counts, self.baseline, strict=True)
        ]
        self.rings = max(self.by_layer) > self.limit
        self.windows += 1
        self._counts[:] = 0
        self._tokens = 0
        return True
