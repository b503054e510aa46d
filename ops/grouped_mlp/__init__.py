"""SwiGLU over stacked experts."""

from ops.grouped_mlp.interface import grouped_mlp, select_backend
from ops.grouped_mlp.reference import reference_grouped_mlp

__all__ = ["grouped_mlp", "reference_grouped_mlp", "select_backend"]
