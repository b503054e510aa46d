"""What a call of the op is asked for; checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from ops.index_attention.spec import IndexSpec


@dataclass(frozen=True)
class CompressedSpec:
    """What a query sees. Formulas in README.md."""

    window: int
    """Tokens up to and with the query that are exact."""
    ratio: int = 0
    """Tokens of an entry; 0: there are no entries, the window is all."""
    top_k: int | None = None
    """Entries that an index chooses for a query. None: every entry is seen, without an index."""
    top_k_blocks: int | None = None
    """Blocks of neighbouring entries out of which these are chosen. None: out of all."""
    index_block_size: int = 8
    """Entries of such a block."""

    def __post_init__(self) -> None:
        found = []
        if self.window < 1:
            found.append(f"window is {self.window}; it must be at least 1")
        if self.ratio < 0:
            found.append(f"ratio is {self.ratio}; it must not be negative")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k is {self.top_k}; it must be at least 1, or None")
        if self.top_k is not None and self.ratio == 0:
            found.append(f"top_k is {self.top_k}, but with ratio=0 there are no entries to choose")
        if self.top_k_blocks is not None and self.top_k_blocks < 1:
            found.append(f"top_k_blocks is {self.top_k_blocks}; it must be at least 1, or None")
        if self.top_k_blocks is not None and self.top_k is None:
            found.append(f"top_k_blocks is {self.top_k_blocks}, but top_k=None chooses none")
        if self.index_block_size < 1:
            found.append(f"index_block_size is {self.index_block_size}; it must be at least 1")
        if found:
            raise ValueError("\n".join(found))

    @property
    def ranking(self) -> IndexSpec:
        """How an index ranks entries: as blocks with a key each (ops/index_attention)."""
        assert self.top_k is not None
        return IndexSpec("qsa", self.ratio, self.top_k)
