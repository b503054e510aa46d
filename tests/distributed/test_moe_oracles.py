"""The MoE layer against outsiders over ranks: Megatron-core's MoELayer (SequentialMLP, alltoall),
DeepSpeed's MoE and the blocks of Hugging Face agree with ours in output and every gradient, whether
ranks share the experts or not.
"""

from __future__ import annotations

import pytest

ORACLES = (
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "megatron",
    "megatron_raw",
    "megatron_sigmoid",
    "deepspeed",
    "deepspeed_capacity",
)
CASES = ("few", "many", "idle", "all")
"""Names of tests/distributed/moe_oracles_worker.py. DeepSpeed's `few` is top2gating, its `many`
topkgating.
"""


@pytest.fixture(scope="module")
def lines(run_ranks) -> dict[tuple[str, str, int], dict]:
    """One run of two ranks serves all tests of this file."""
    return {
        (line["oracle"], line["case"], line["ep"]): line
        for line in run_ranks("distributed/moe_oracles_worker.py", 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("oracle", ORACLES)
def test_layer_is_that_of_other_libraries(lines, oracle, case, size):
    line = lines[oracle, case, size]
    assert set(line["errors"]) == {"out", "hidden", "router", "gate_up", "down"}
    assert max(line["errors"].values()) < 1e-5, line
    assert line["idle"] > 0 or case != "idle"
