"""Variable-size all-to-all of token rows."""

from typing import TYPE_CHECKING

from ops.all_to_all.spec import PAYLOADS, return_payload
from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.all_to_all.interface import Flight, begin_rows, end_rows
    from ops.all_to_all.meter import Communication, Meter, total_communication
    from ops.all_to_all.path import (
        Hop,
        NodeGroups,
        Path,
        exchange_counts,
        exchange_node_counts,
        node_path,
    )
    from ops.all_to_all.turns import by_turns

__all__ = [
    "PAYLOADS",
    "Communication",
    "Flight",
    "Hop",
    "Meter",
    "NodeGroups",
    "Path",
    "begin_rows",
    "by_turns",
    "end_rows",
    "exchange_counts",
    "exchange_node_counts",
    "node_path",
    "return_payload",
    "total_communication",
]

__getattr__ = lazily(
    __name__,
    {
        "Communication": "meter",
        "Flight": "interface",
        "Hop": "path",
        "Meter": "meter",
        "NodeGroups": "path",
        "Path": "path",
        "begin_rows": "interface",
        "by_turns": "turns",
        "end_rows": "interface",
        "exchange_counts": "path",
        "exchange_node_counts": "path",
        "node_path": "path",
        "total_communication": "meter",
    },
)
