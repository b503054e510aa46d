"""Variable-size all-to-all of token rows."""

from ops.all_to_all.interface import all_to_all_rows, exchange_counts

__all__ = ["all_to_all_rows", "exchange_counts"]
