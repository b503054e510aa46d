"""Attention to the tokens that a learned index chooses (DSA, MSA, QSA), and what teaches it."""

from typing import TYPE_CHECKING

from ops.index_attention.spec import IndexSpec
from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.index_attention.cached import attend_cached
    from ops.index_attention.groups import group_means, group_starts
    from ops.index_attention.interface import (
        Index,
        IndexAudit,
        IndexedOutput,
        audit_index,
        indexed_attention,
    )
    from ops.index_attention.within import Teacher, select_blocks, select_held, teach_index

__all__ = [
    "Index",
    "IndexAudit",
    "IndexSpec",
    "IndexedOutput",
    "Teacher",
    "attend_cached",
    "audit_index",
    "group_means",
    "group_starts",
    "indexed_attention",
    "select_blocks",
    "select_held",
    "teach_index",
]

__getattr__ = lazily(
    __name__,
    {
        "Index": "interface",
        "IndexAudit": "interface",
        "IndexedOutput": "interface",
        "attend_cached": "cached",
        "audit_index": "interface",
        "group_means": "groups",
        "group_starts": "groups",
        "indexed_attention": "interface",
        "Teacher": "within",
        "select_blocks": "within",
        "select_held": "within",
        "teach_index": "within",
    },
)
