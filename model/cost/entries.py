"""Compressed attention by layer: what a layer sees, who makes its entries and whose index chooses
among them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class EntryLayer(NamedTuple):
    """One layer of compressed attention."""

    number: int
    """Its place in the model."""
    kind: str
    """csa, hca or window."""
    ratio: int
    """Tokens of an entry; 0: it sees none."""
    overlaps: bool
    """Whether an entry reaches over the window before its own."""
    maker: int | None
    """The layer whose entries it sees, itself or an earlier one; None: it sees none."""
    chooser: int | None
    """The layer whose index chooses for it, likewise; None: it sees every entry."""
    num_chosen_for: int
    """Layers that the chooser chooses for; 0: there is none."""

    @property
    def makes_entries(self) -> bool:
        return self.maker == self.number

    @property
    def chooses(self) -> bool:
        return self.chooser == self.number

    @property
    def is_gated(self) -> bool:
        """Whether an entry is a mean of several tokens, which needs weights."""
        return self.ratio > 1 or self.overlaps


def entry_layers(num_layers: int, attention: Mapping[str, Any]) -> list[EntryLayer]:
    """Of the whole model, in order. attention: arguments of compressed attention."""
    kinds = compressed_kinds(num_layers, attention)
    ratios = [_ratio(i, num_layers, attention, kind) for i, kind in enumerate(kinds)]
    makers: dict[int, int] = {i: i for i, kind in enumerate(kinds) if kind == "hca"}
    choosers: dict[int, list[int]] = {}

    # Entries of one length are shared, and among the same entries one layer chooses for several.
    csa = [i for i, kind in enumerate(kinds) if kind == "csa"]
    for ratio in dict.fromkeys(ratios[i] for i in csa):
        alike = [i for i in csa if ratios[i] == ratio]
        for readers in _runs(alike, attention["entry_layers"]):
            makers |= dict.fromkeys(readers, readers[0])
            for followers in _runs(readers, attention["index_layers"]):
                choosers |= dict.fromkeys(followers, followers)
    return [
        EntryLayer(
            i,
            kind,
            ratios[i],
            kind == "csa" and attention["csa_overlap"],
            makers.get(i),
            choosers[i][0] if i in choosers else None,
            len(choosers.get(i, ())),
        )
        for i, kind in enumerate(kinds)
    ]


def _runs(layers: Sequence[int], begins: int | Sequence[int]) -> list[list[int]]:
    """Layers in runs, of so many each or beginning at those that are named; the first one begins
    one in either case.
    """
    found: list[list[int]] = []
    for place, layer in enumerate(layers):
        new = place % begins == 0 if isinstance(begins, int) else layer in begins
        if new or not found:
            found.append([])
        found[-1].append(layer)
    return found


def compressed_kinds(num_layers: int, attention: Mapping[str, Any]) -> list[str]:
    """Of compressed attention: csa, hca or window, by layer."""
    chosen = attention["layer_kinds"]
    if chosen in ("csa", "hca"):
        return [chosen] * num_layers
    if chosen == "v4":
        # two that see everything roughly, then one after the other
        return ["csa" if i >= 2 and i % 2 else "hca" for i in range(num_layers)]
    if chosen == "v4_flash":
        return ["window" if i < 2 else ("csa", "hca")[i % 2] for i in range(num_layers)]
    return list(chosen)


def _ratio(layer: int, num_layers: int, attention: Mapping[str, Any], kind: str) -> int:
    """Tokens of an entry in a layer; 0: it sees none."""
    if kind == "csa" and attention["late_csa_ratio"] is not None and 2 * layer >= num_layers:
        return int(attention["late_csa_ratio"])
    return int({"csa": attention["csa_ratio"], "hca": attention["hca_ratio"]}.get(kind, 0))


def pool_shapes(width: int, hidden: int, layer: EntryLayer) -> list[tuple[int, int]]:
    """Shapes of the projections to what entries of `width` channels are pooled from, and to its
    gates where there is something to weigh.
    """
    return (1 + layer.is_gated) * [(width * (1 + layer.overlaps), hidden)]
