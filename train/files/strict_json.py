"""JSON that every parser reads: RFC 8259 knows no NaN and no infinity, so they become null.

Every JSON the project writes comes from here (tests/train/test_strict_json.py looks). In a record
of metrics null says that there is no finite number to give, as for the loss of an interval whose
steps were all skipped.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """json.dumps(value, **options) with null for every float that is not finite, however deep it
    stands.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # only then is the value worth a copy
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
