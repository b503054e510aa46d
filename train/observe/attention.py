"""What sparse attention leaves out and how wrong that is, from the sums of the layers.

attention/<metric> is the mean over sparse layers, attention/<metric>/layer_<l> that of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.attention.base import STATS
from model.attention.sparse import SparseAttention
from ops.sparse_attention.audit import mean_error_bound
from train.observe.catalogue.names import ATTENTION_BY_LAYER


def attention_metrics(
    sums: torch.Tensor, layers: Sequence[int], detailed: bool = False
) -> dict[str, float]:
    """sums: [sparse layers, len(STATS)] fp64 on the host, over ranks and steps; layers: their
    numbers; detailed: write every metric for every layer.
    """
    stats = dict(zip(STATS, sums.unbind(1), strict=True))
    of_indexes: dict[str, float] = {}
    if len(layers) and float(stats["index_tokens"].sum()):
        of_indexes = _of_indexes(stats, layers)
    if not len(layers) or not float(stats["queries"].sum()):
        return of_indexes
    queries = stats["queries"].clamp_min(1)
    by_layer = {
        "tail_mass": stats["tail_mass"] / queries,
        "selected_mass": stats["selected_mass"] / queries,
        "selected_blocks": stats["selected_blocks"] / queries,
    }
    if float(stats["tile_blocks"].sum()):
        by_layer["union_factor"] = stats["union_blocks"] / stats["tile_blocks"].clamp_min(1e-9)
    if float(stats["audited"].min()):
        audited = stats["audited"]
        by_layer |= {
            name: stats[name] / audited for name in ("error", "certificate", "mass_kl", "coherence")
        }
        if float(stats["candidate_mass"].min()):
            by_layer["resident_recall"] = stats["resident_mass"] / stats["candidate_mass"]
        by_layer["certificate_coverage"] = stats["covered"] / audited
        by_layer["error_bound"] = torch.tensor(
            [
                mean_error_bound(float(e), float(s) / float(n), int(n))
                for e, s, n in zip(by_layer["error"], stats["error_squared"], audited, strict=True)
            ],
            dtype=torch.float64,
        )
    found = {f"attention/{name}": float(values.mean()) for name, values in by_layer.items()}
    if "error" in by_layer:
        found["attention/error/max"] = float(by_layer["error"].max())
        found["attention/bound_violations"] = float(stats["bound_violations"].sum())
    for name in by_layer if detailed else ATTENTION_BY_LAYER:
        found |= {
            f"attention/{name}/layer_{layer}": float(value)
            for layer, value in zip(layers, by_layer.get(name, ()), strict=False)
        }
    return found | of_indexes


def _of_indexes(stats: dict[str, torch.Tensor], layers: Sequence[int]) -> dict[str, float]:
    by_layer = {"index_loss": stats["index_loss"] / stats["index_tokens"].clamp_min(1)}
    if float(stats["index_audited"].min()):
        by_layer["index_recall"] = stats["index_recall"] / stats["index_audited"]
    found = {f"attention/{name}": float(values.mean()) for name, values in by_layer.items()}
    if "index_recall" in by_layer:
        found["attention/index_recall/min"] = float(by_layer["index_recall"].min())
    for name, values in by_layer.items():
        found |= {
            f"attention/{name}/layer_{layer}": float(value)
            for layer, value in zip(layers, values, strict=True)
        }
    return found


def short_rows_note(layers: list[SparseAttention], seq_len: int) -> str | None:
    """What to tell who asked for sparse attention over rows so short that nothing is left out;
    None: they are longer.
    """
    if not layers:
        return None
    spec = layers[0].spec
    covered = max(spec.dense_length, spec.min_sparse_length)
    if seq_len > covered:
        return None
    return (
        f"rows of {seq_len} tokens are within the {covered} that attention.top_k {spec.top_k}, "
        "window_size "
        f"{spec.window_size}, num_sink_blocks {spec.num_sink_blocks} (in blocks of "
        f"{spec.block_size}) and "
        f"min_sparse_length {spec.min_sparse_length} cover: sparse layers attend densely, at a "
        "higher cost; use "
        "attention=dense, attention=scc_short or longer rows"
    )
