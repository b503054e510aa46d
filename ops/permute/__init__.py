"""Token rows into expert order and back, deterministic in both directions."""

from ops.permute.interface import group_by_expert, permute, unpermute

__all__ = ["group_by_expert", "permute", "unpermute"]
