"""What a call of the op is asked for; checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RULES = ("dsa", "msa", "qsa")


@dataclass(frozen=True)
class IndexSpec:
    """How an index chooses. Formulas in README.md."""

    rule: Literal["dsa", "msa", "qsa"] = "dsa"
    """dsa: single tokens, by weighted heads. msa: blocks, by the largest score of a token in them,
    for each key/value head. qsa: small blocks, by the mean of their keys.
    """
    block_size: int = 1
    """Tokens that are chosen together; 1 with rule=dsa."""
    top_k: int = 2048
    """Blocks of a query. With rule=msa its own block is one of them; with rule=qsa the tokens of
    the block that is not complete yet come besides.
    """

    def __post_init__(self) -> None:
        found = [
            f"{name} is {value}; it must be at least 1"
            for name, value in (("block_size", self.block_size), ("top_k", self.top_k))
            if value < 1
        ]
        if self.rule not in RULES:
            found.append(f"rule is {self.rule!r}; choose one of {', '.join(RULES)}")
        if self.rule == "dsa" and self.block_size > 1:
            found.append(
                f"block_size is {self.block_size}, but rule=dsa chooses single tokens; set "
                "block_size=1, or rule=msa or qsa"
            )
        if found:
            raise ValueError("\n".join(found))

    @property
    def by_head(self) -> bool:
        """Whether each key/value head has a choice of its own; else all heads share one."""
        return self.rule == "msa"

    @property
    def pools_keys(self) -> bool:
        """Whether an index key stands for a complete block; else for a token."""
        return self.rule == "qsa"

    @property
    def dense_length(self) -> int:
        """Longest document of which nothing is left out."""
        return self.top_k * self.block_size + (self.block_size - 1) * self.pools_keys
