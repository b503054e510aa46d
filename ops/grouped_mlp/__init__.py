"""SwiGLU over stacked experts, from token order to token order."""

from typing import TYPE_CHECKING

from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.grouped_mlp.eight_bit import dequantized, grouped_mlp_eight_bit, quantize_rows
    from ops.grouped_mlp.interface import BACKENDS, grouped_mlp, product_tile_rows, select_backend
    from ops.grouped_mlp.reference import reference_grouped_mlp
    from ops.grouped_mlp.swiglu import activate

__all__ = [
    "BACKENDS",
    "activate",
    "dequantized",
    "grouped_mlp",
    "grouped_mlp_eight_bit",
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
        "dequantized": "eight_bit",
        "grouped_mlp": "interface",
        "grouped_mlp_eight_bit": "eight_bit",
        "product_tile_rows": "interface",
        "quantize_rows": "eight_bit",
        "reference_grouped_mlp": "reference",
        "select_backend": "interface",
    },
)
