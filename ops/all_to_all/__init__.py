"""Variable-size all-to-all of token rows."""

from ops.all_to_all.interface import Flight, begin_rows, end_rows
from ops.all_to_all.meter import Communication, Meter, total_communication
from ops.all_to_all.path import Hop, NodeGroups, Path, exchange_counts, exchange_node_counts, node_path
from ops.all_to_all.payload import PAYLOADS, return_payload

__all__ = ["PAYLOADS", "Communication", "Flight", "Hop", "Meter", "NodeGroups", "Path", "begin_rows", "end_rows",
           "exchange_counts", "exchange_node_counts", "node_path", "return_payload", "total_communication"]
