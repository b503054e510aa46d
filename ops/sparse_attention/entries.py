"""Coarse entries: what is kept of the tokens that a query does not see one by one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CoarseEntries(NamedTuple):
    """Per group of coarse_block_size tokens of a complete block, in the dtype of the keys; entry e
    belongs to block e // entries_per_block. Entries of incomplete blocks are finite and unused.

    key_mean, value_mean: [Hk, M * r, d]. key_var: [Hk, M * r, d] elementwise mean squared distance
        of the keys from their mean.
    """

    key_mean: Tensor
    value_mean: Tensor
    key_var: Tensor


def pool_groups(keys: Tensor, values: Tensor) -> CoarseEntries:
    """Means and variance over the third dimension of keys and values, in their dtype."""
    mean = keys.mean(2)
    return CoarseEntries(mean, values.mean(2), (keys - mean.unsqueeze(2)).square().mean(2))
