"""Under ZeRO-3 weights are shared out one by one as they are drawn, and are those of a model that
was whole first.
"""

from __future__ import annotations

import json

import pytest

WORKER = "distributed/partition_worker.py"


def check(found: list[dict]) -> None:
    for row in found:
        assert row["weights"] and row["losses"] and row["filled"], row
        assert row["moved"] > 0.9, "nothing was trained, so that nothing was compared"
        assert row["whole_over_largest"] == 1.0, "more than one parameter was whole at a time"


@pytest.mark.slow
def test_weights_shared_out_at_once_are_the_same(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps([(2, "bf16")])))


@pytest.mark.nightly
def test_weights_shared_out_at_once_are_the_same_in_every_layout(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps([(1, "fp32"), (1, "bf16"), (2, "fp32")])))
    check(run_ranks(WORKER, 4, json.dumps([(2, "fp32"), (4, "bf16")])))
