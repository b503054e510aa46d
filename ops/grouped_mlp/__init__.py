"""SwiGLU over stacked experts, from token order to token order."""

from ops.grouped_mlp.interface import BACKENDS, grouped_mlp, select_backend
from ops.grouped_mlp.reference import reference_grouped_mlp

__all__ = ["BACKENDS", "grouped_mlp", "reference_grouped_mlp", "select_backend"]
