"""Kinds of parameters, by their names: what settings call a part of the model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

KINDS = {
    "lora": r"\.lora_[a-z_]+$",
    "indexer": r"\.attention\.indexer\.",
    "norms": r"(^|[._])norm\.(weight|bias)$",
    "embedding": r"^embedding\.",
    "head": r"^head\.",
    "attention": r"\.attention\.",
    "router": r"\.mlp\.router\.",
    "experts": r"\.mlp\.experts\.",
    "shared_experts": r"\.mlp\.shared",
    "mlp": r"\.mlp\.",
}
"""Kind -> names of its parameters; the first that fits is a parameter's kind. `mlp`: of layers
without experts.
"""
MATRICES = r"((_proj|\.gate_up|\.down)(\.weight)?|^mtp\.\d+\.projection\.weight)$"
"""Names of the matrices between a model's layers: what Muon moves. Embedding, head, routers, gates
and LoRA's factors are matrices, too, and stay with AdamW.
"""
HALVES = r"\.gate_up(\.weight)?$"
"""Names of parameters that hold two matrices, one above the other."""
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


def kind_of(name: str) -> str:
    """The kind of a parameter; "other" for what has none."""
    return next((kind for kind, found in _PATTERNS.items() if found.search(name)), "other")


def matches(name: str, part: str) -> bool:
    """Whether a parameter is meant by `part`: a kind, or a pattern of names such as blocks.0.*."""
    return kind_of(name) == part if part in KINDS else fnmatch.fnmatchcase(name, part)


def layer_of(name: str) -> int | None:
    """The layer that a parameter of this name belongs to, from 0 on; None where it is in none."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return None if found is None else int(found[1])


def unmatched(parts: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `parts` that mean no parameter of a model."""
    known = list(names)
    return [part for part in parts if not any(matches(name, part) for name in known)]


def is_hidden_matrix(name: str) -> bool:
    """Whether the parameter of this name is a matrix, or a stack of matrices, between layers."""
    return re.search(MATRICES, name) is not None


def num_parts(name: str) -> int:
    """How many matrices, one above the other, a two-dimensional parameter of this name holds."""
    return 2 if re.search(HALVES, name) else 1
