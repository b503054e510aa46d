"""SwiGLU over stacked experts, from token order to token order."""

from typing import TYPE_CHECKING

from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.grouped_mlp.int8 import dequantized, grouped_mlp_int8, quantize_rows
    from ops.grouped_mlp.interface import BACKENDS, grouped_mlp, product_tile_rows, select_backend
    from ops.grouped_mlp.reference import reference_grouped_mlp
    from ops.grouped_mlp.swiglu import activate

__all__ = [
    "BACKENDS",
    "activate",
    "dequantized",
    "grouped_mlp",
    "grouped_mlp_int8",
    "product_tile_rows",
    "quantize_rows",
    "reference_grouped_mlp",
    "select_backend",
]

__getattr__ = lazily(
    __name__,
    {
        "BACKENDS": "interface",
        "activate": "swiglu",
        "dequantized": "int8",
        "grouped_mlp": "interface",
        "grouped_mlp_int8": "int8",
        "product_tile_rows": "interface",
        "quantize_rows": "int8",
        "reference_grouped_mlp": "reference",
        "select_backend": "interface",
    },
)
