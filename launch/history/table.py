"""Tables on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    right = [
        i > 0 and all(re.fullmatch(r"[-+\d.,e]*", row[i]) for row in rows) for i in range(len(head))
    ]
    for row in (head, *rows):
        cells = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())
