"""Whether weights have the index that an attention chooses by. Imports no torch."""

from __future__ import annotations

from typing import Any

from model.cost.parameters import has_index, is_compressed, is_indexed

SHAPING = ("rule", "index_heads", "index_head_dim", "interval", "dense_layers")
"""Settings that say which tensors an index has, and where."""
SHAPING_ENTRIES = (
    *("layer_kinds", "csa_ratio", "index_heads", "index_head_dim", "late_csa_ratio"),
    *("csa_overlap", "slot_bias", "entry_layers", "index_layers", "index_keys"),
)
"""Likewise, of compressed attention."""
INSIDE = ("select", "index_head_dim", "index_layers", "interval", "dense_layers")
"""Those of an index inside sparse attention."""


def without_index(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why weights of one attention cannot be read with the index of another: they have none, or one
    of another shape, and one that is drawn chooses at random. None: they can.

    old, new: settings of attention, with its name.
    """
    if not has_index(new):
        return None
    if not is_indexed(new) and not is_compressed(new):
        if has_index(old) and all(old.get(key) == new[key] for key in INSIDE):
            return None
        shape = ", ".join(f"{key} {new[key]}" for key in INSIDE[1:3])
        return (
            f"attention.select=index with {shape} chooses by an index that these weights do not "
            "have, and one that has learned nothing chooses at random; train it with launch.train "
            "and attention.index_steps above 0, or use attention.select=mass"
        )
    shaping = SHAPING_ENTRIES if is_compressed(new) else SHAPING
    is_alike = has_index(old) and all(key in old for key in shaping)
    if is_alike and all(_listed(old[key]) == _listed(new[key]) for key in shaping):
        return None
    name = "compressed" if is_compressed(new) else "indexed"
    shape = ", ".join(f"{key} {new[key]}" for key in shaping[:3])
    return (
        f"attention={name} with {shape} chooses by an index that these weights do not have, and "
        "one that has learned nothing chooses at random; train it with launch.train and "
        "attention.dense_steps above 0, or leave attention out"
    )


def _listed(value: Any) -> Any:
    """Layers as a saved config has them."""
    return list(value) if isinstance(value, tuple) else value
