"""SwiGLU over stacked experts, from token order to token order."""

from ops.grouped_mlp.interface import BACKENDS, grouped_mlp, product_tile_rows, select_backend
from ops.grouped_mlp.reference import reference_grouped_mlp

__all__ = ["BACKENDS", "grouped_mlp", "product_tile_rows", "reference_grouped_mlp", "select_backend"]
