"""Token rows into expert order and back, deterministic in both directions."""

from ops.permute.interface import gather_rows, group_by_expert, permute, sum_rows, unpermute

__all__ = ["gather_rows", "group_by_expert", "permute", "sum_rows", "unpermute"]
