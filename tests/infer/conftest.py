"""Lets the tests of this folder import tests/distributed/common.py: one tiny model for single and
many ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
