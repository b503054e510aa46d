"""Coarse entries: what is kept of the tokens that a query does not see one by one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.grouped_mlp.fp8 import FP8, round_rows
from ops.sparse_attention.spec import SparseAttentionSpec


class CoarseEntries(NamedTuple):
    """Per group of coarse_block_size tokens of a complete block, in the dtype of the keys; entry e
    belongs to block e // entries_per_block. Entries of incomplete blocks are finite and unused.

    key_mean, value_mean: [Hk, M * r, d]. key_var: [Hk, M * r, d] elementwise mean squared distance
        of the keys from their mean.
    """

    key_mean: Tensor
    value_mean: Tensor
    key_var: Tensor


class StoredEntries:
    """Entries of `number` blocks for each key/value head, in a dtype of their own.

    Attributes:
        values: [number, Hk, r, d] each.
        exponents: [number, Hk, r] int8 each, of the powers of two that e4m3 is multiplied with;
            empty where values are what they stand for.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        number: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        is_low = spec.entries_dtype == "fp8"
        shape = (number, num_kv_heads, spec.entries_per_block)

        def each(*size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(size, dtype=dtype, device=device) for _ in CoarseEntries._fields
            )

        self.values = CoarseEntries(*each(*shape, head_dim, dtype=FP8 if is_low else dtype))
        self.exponents = each(*shape, dtype=torch.int8) if is_low else ()

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.values, *self.exponents)

    def write(self, blocks: Tensor, new: CoarseEntries) -> None:
        """New entries [n, Hk, r, d] of blocks [n]."""
        if not self.exponents:
            for held, one in zip(self.values, new, strict=True):
                held[blocks] = one.to(held.dtype)
            return
        for held, exponent, one in zip(self.values, self.exponents, new, strict=True):
            low, scales = round_rows(one)
            held[blocks] = low
            # a row that is not finite has no scale, and is NaN in e4m3
            power = torch.frexp(scales.nan_to_num(1.0)).exponent - 1
            exponent[blocks] = power.to(torch.int8)

    def read(self, blocks: Tensor, dtype: torch.dtype) -> CoarseEntries:
        """[..., Hk, r, d] each of blocks [...], in fp32 or fp64."""
        found = [x[blocks].to(dtype) for x in self.values]
        if self.exponents:
            powers = (x[blocks].unsqueeze(-1) for x in self.exponents)
            found = [torch.ldexp(x, power) for x, power in zip(found, powers, strict=True)]
        return CoarseEntries(*found)


def pool_groups(keys: Tensor, values: Tensor) -> CoarseEntries:
    """Means and variance over the third dimension of keys and values, in their dtype."""
    mean = keys.mean(2)
    return CoarseEntries(mean, values.mean(2), (keys - mean.unsqueeze(2)).square().mean(2))


def merge_keys(mean: Tensor, var: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the keys of `number` entries in a row, which count equally: of means and
    variances [..., n * number, d], [..., n, d] each in fp32 (fp64).
    """
    real = torch.promote_types(mean.dtype, torch.float32)
    means = mean.to(real).unflatten(-2, (-1, number))
    variances = var.to(real).unflatten(-2, (-1, number))
    merged = means.mean(-2)
    # A variance is that within the parts and that between them.
    between = (means - merged.unsqueeze(-2)).square().mean(-2)
    return merged, variances.mean(-2) + between


def weigh_groups(
    keys: Tensor, values: Tensor, logits: Tensor, means: CoarseEntries
) -> CoarseEntries:
    """Entries under learned weights (README, Learned entries), from those under equal ones.

    Weights are written as what they have more than 1 / C, which is nothing at all where the logits
    are zero: there `means` come back to the last bit. Differentiable in everything.

    Args:
        keys, values: [A, B, C, ..., d], pooled over the third dimension.
        logits: [A, B, C, ..., 2, d], of a token's weight in the key of its entry and in the value.
        means: [A, B, ..., d] each, pool_groups(keys, values), rounded or not.
    """
    more = torch.softmax(logits.to(keys.dtype), 2) - 1 / keys.shape[2]
    key_more, value_more = more.unbind(-2)
    apart = keys - means.key_mean.unsqueeze(2)
    shift = (key_more * apart).sum(2)
    value_shift = (value_more * (values - means.value_mean.unsqueeze(2))).sum(2)
    # the mean of the squares moves by shift^2, and their weights by `more`
    spread = shift.square() + (key_more * (apart - shift.unsqueeze(2)).square()).sum(2)
    return CoarseEntries(
        means.key_mean + shift,
        means.value_mean + value_shift,
        (means.key_var + spread).clamp_min(0.0),
    )


def weigh_groups_backward(
    keys: Tensor, values: Tensor, logits: Tensor, grads: CoarseEntries
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, values and logits from those of weigh_groups(keys, values, logits,
    pool_groups(keys, values)), in closed form: for weights a and entry (m, D)

        dk = a (dm + 2 (k - m) dD),  dlogits = a ((k - m) dm + ((k - m)^2 - D) dD)

    and for values the same without D. The bound of a variance, 0, binds by rounding alone, where
    what it would hold back is nothing either. Shapes as there.
    """
    into_mean, into_value, into_var = (x.unsqueeze(2) for x in grads)
    weights, value_weights = torch.softmax(logits.to(keys.dtype), 2).unbind(-2)
    apart = keys - (weights * keys).sum(2, keepdim=True)
    var = (weights * apart.square()).sum(2, keepdim=True)
    dkeys = weights * (into_mean + 2 * apart * into_var)
    dlogits = weights * (apart * (into_mean + apart * into_var) - var * into_var)
    dvalues = value_weights * into_value
    of_values = dvalues * (values - (value_weights * values).sum(2, keepdim=True))
    return dkeys, dvalues, torch.stack((dlogits, of_values), -2)
