"""What a call of the op is asked for; checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SMALLEST = 2.0**-126
"""Masses are raised to this, the smallest normal fp32, before their logarithm, so that blocks of no
mass keep the order of their ids.
"""
LARGEST = 64.0
"""Natural logarithm of the largest share of a softmax whose denominator is an estimate
(rank_lse=super), so that no sum of shares overflows.
"""
TRUST = 1e-3
"""Floor of the share of a coarse entry's mass that score=error_gain ranks by (README, Select)."""


@dataclass(frozen=True)
class SparseAttentionSpec:
    """Settings of one attention layer. Formulas in README.md."""

    block_size: int = 64
    """Tokens of a selectable block."""
    top_k: int = 16
    """Blocks selected per query and key/value head, beside the forced ones."""
    window_size: int = 512
    """Tokens up to and with the query that are always exact, rounded up to blocks."""
    num_sink_blocks: int = 1
    """First blocks of a document that are always exact."""
    coarse_block_size: int = 32
    """Tokens pooled into one coarse entry."""
    order: Literal[0, 2] = 2
    """Terms of a coarse entry's logit: 0 has the means alone, 2 adds the variance term."""
    max_variance: float = 4.0
    """Upper bound of the variance term."""
    score: Literal["prob", "max", "error_gain"] = "prob"
    """What ranks a block: "prob" (estimated mass, summed over the heads of the group), "max"
    (largest logit), or "error_gain" (estimated mass times the share of it that the variance term
    made).
    """
    rank_lse: Literal["exact", "super"] = "exact"
    """Which denominator the shares that rank blocks have: that of the softmax over all past entries
    ("exact"), which takes a pass over them before the shares can be had, or an estimate from
    super-blocks of `fanout` blocks as one entry each ("super").
    """
    tail: Literal["coarse", "drop", "ht", "ht_cv"] = "coarse"
    """What becomes of the blocks that are not selected: they are "coarse" (pooled), "drop"ped, or
    estimated from sampled blocks, by "ht" (Horvitz-Thompson) or by "ht_cv" (with the coarse
    entries, without variance term, as control variate).
    """
    num_samples: int = 4
    """Blocks that tail "ht" and "ht_cv" sample per query."""
    top_p: float | None = None
    """Share of the candidates' and forced blocks' estimated mass that the selection must cover;
    fewer than top_k blocks are taken where that is enough. None: always top_k.
    """
    min_sparse_length: int = 0
    """Queries at positions below this in their document attend densely (blocks that begin below
    it), and so do shorter documents altogether. A rule on positions keeps the op causal and
    decoding equal to training.
    """
    num_levels: Literal[1, 2] = 1
    """2 selects among super-blocks first, and then among the blocks of those that it opened."""
    fanout: int = 8
    """Blocks of a super-block, for num_levels=2 and for rank_lse="super"."""
    num_expanded: int = 4
    """Super-blocks that are opened per query and key/value head."""

    resident_blocks: int | None = None
    """Blocks whose tokens a cache keeps beside the first ones, the window and what began since the
    last boundary; others are no candidates. None: all.
    """
    resident_interval: int = 1024
    """Tokens between boundaries, at which the resident blocks are chosen anew, by the estimated
    mass that earlier queries of the document gave them.
    """
    resident_decay: float = 0.9
    """What a mass still counts after one more interval."""
    entries_dtype: Literal["native", "fp8"] = "native"
    """Of entries in a bounded cache; "fp8" is e4m3 with a power of two for each."""

    def __post_init__(self) -> None:
        found = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (
                ("block_size", 1),
                ("top_k", 0),
                ("window_size", 0),
                ("num_sink_blocks", 0),
                ("coarse_block_size", 1),
                ("min_sparse_length", 0),
                ("num_samples", 1),
                ("fanout", 2),
                ("num_expanded", 1),
            )
            if getattr(self, name) < least
        ]

        if self.coarse_block_size >= 1 and self.block_size % self.coarse_block_size:
            found.append(
                f"block_size {self.block_size} is not divisible by coarse_block_size "
                f"{self.coarse_block_size}"
            )

        for name, allowed in (
            ("order", (0, 2)),
            ("score", ("prob", "max", "error_gain")),
            ("rank_lse", ("exact", "super")),
            ("tail", ("coarse", "drop", "ht", "ht_cv")),
            ("num_levels", (1, 2)),
            ("entries_dtype", ("native", "fp8")),
        ):
            if getattr(self, name) not in allowed:
                found.append(
                    f"{name} is {getattr(self, name)!r}; choose one of "
                    f"{', '.join(map(str, allowed))}"
                )

        if not (self.max_variance >= 0 and math.isfinite(self.max_variance)):
            found.append(
                f"max_variance is {self.max_variance}; it must be a finite number, 0 or more"
            )

        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be in (0, 1], or null")
        if self.top_p is not None and self.score != "prob":
            found.append(
                f"top_p is a share of estimated mass, which score={self.score} does not rank by; "
                "use score=prob"
            )

        if self.score == "error_gain" and self.order == 0:
            found.append("score=error_gain ranks by the variance term; it needs order=2")
        if self.num_levels == 2 and self.tail != "coarse":
            found.append(
                "num_levels=2 keeps closed super-blocks as coarse entries; it needs tail=coarse, "
                f"not {self.tail}"
            )
        if self.num_levels == 2 and self.top_p is not None:
            found.append("top_p is defined over one level of blocks; use num_levels=1")

        if self.entries_dtype != "native" and self.resident_blocks is None:
            found.append(
                f"entries_dtype={self.entries_dtype} is of a bounded cache, whose entries are what "
                "grows; set resident_blocks, or entries_dtype=native"
            )
        found += self._resident_problems() if self.resident_blocks is not None else []
        found += self._estimate_problems() if self.rank_lse == "super" else []
        if found:
            raise ValueError("\n".join(found))

    def _resident_problems(self) -> list[str]:
        assert self.resident_blocks is not None
        found = []
        if self.resident_blocks < 0:
            found.append(
                f"resident_blocks is {self.resident_blocks}; it must not be negative, or null"
            )
        if self.resident_interval < 1 or (
            self.block_size >= 1 and self.resident_interval % self.block_size
        ):
            found.append(
                f"resident_interval {self.resident_interval} must be a multiple of block_size "
                f"{self.block_size}"
            )
        if not 0 <= self.resident_decay <= 1:
            found.append(f"resident_decay is {self.resident_decay}; it must be between 0 and 1")
        if self.tail != "coarse":
            found.append(
                "resident_blocks leaves what is not kept to the tail; it needs tail=coarse, not "
                f"{self.tail}"
            )
        if self.num_levels == 2:
            found.append("resident_blocks is defined over one level of blocks; use num_levels=1")
        if self.top_p is not None:
            found.append(
                "resident_blocks ranks a part of the past, of which top_p would be no share; set "
                "top_p=null"
            )
        if self.min_sparse_length:
            found.append(
                f"resident_blocks keeps a part of the past, and min_sparse_length "
                f"{self.min_sparse_length} asks for all of it; set min_sparse_length=0"
            )
        return found

    def _estimate_problems(self) -> list[str]:
        """Where an estimated denominator would be wrong, or not be read."""
        without = {
            "score": (self.score == "max", "ranks by logits, which have none"),
            "top_p": (self.top_p is not None, "covers true shares of the mass"),
            "resident_blocks": (self.resident_blocks is not None, "adds up true shares"),
            "num_levels": (self.num_levels == 2, "has closed super-blocks in it already"),
        }
        return [
            f"rank_lse=super estimates a denominator, but {name}={getattr(self, name)} {why}; use "
            "rank_lse=exact"
            for name, (asked, why) in without.items()
            if asked
        ]

    @property
    def super_block_size(self) -> int:
        """Tokens of a super-block."""
        return self.fanout * self.block_size

    @property
    def interval_blocks(self) -> int:
        """Blocks between boundaries of the resident ones."""
        return self.resident_interval // self.block_size

    @property
    def resident_slots(self) -> int:
        """The most blocks of which a bounded cache has tokens at a time."""
        assert self.resident_blocks is not None
        recent = self.interval_blocks + self.num_local_blocks - 1
        return self.num_sink_blocks + self.resident_blocks + recent

    @property
    def num_local_blocks(self) -> int:
        """Blocks that are always exact up to and with the query's own, so that window_size tokens
        are covered.
        """
        return max(1, -(-(self.window_size + self.block_size - 1) // self.block_size))

    @property
    def entries_per_block(self) -> int:
        return self.block_size // self.coarse_block_size

    def has_tail(self, exact: bool, coarse: bool) -> bool:
        """Whether coarse entries take part in a call with these branches."""
        return coarse and (self.tail != "drop" or not exact)

    @property
    def dense_length(self) -> int:
        """Longest document for which nothing is left out: the op equals dense attention there."""
        return (self.num_local_blocks + self.num_sink_blocks + self.top_k) * self.block_size


@dataclass(frozen=True)
class SelectionNoise:
    """Randomness of the selection in training; the same seed and token ids give the same draw
    anywhere, at any time.
    """

    seed: int = 0
    temperature: float = 0.0
    """Of the Gumbel noise on log scores (on the logits for score=max)."""
    min_top_k: int | None = None
    """The number of blocks is drawn per query and head uniformly from [min_top_k, top_k]; None:
    always top_k.
    """
    first_kv_head: int = 0
    """Place of the call's first key/value head in the layer."""
    num_kv_heads: int | None = None
    """Key/value heads of the layer, on which the draws hang; None: those of the call."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it must be a finite number, 0 or more"
            )
        if self.min_top_k is not None and self.min_top_k < 0:
            raise ValueError(f"min_top_k is {self.min_top_k}; it must not be negative, or null")
