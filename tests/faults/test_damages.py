"""300 damaged run directories: no other model is ever loaded without a word
(tests/end_to_end/damages.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from damages import Run, attack

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(3600)]
NUMBER = 300


def test_no_damage_is_loaded_silently(tmp_path):
    run, seed = Run(tmp_path), int(os.environ.get("LOADSTONE_SEED", "0"))
    found = [fact for number in range(NUMBER) for fact in attack(run, seed + number)]
    problems = [fact for fact in found if fact["problem"]]
    assert len(found) == 2 * NUMBER and not problems, problems
