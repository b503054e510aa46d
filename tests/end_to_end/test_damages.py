"""A sample of damaged run directories; `make test-faults` attacks 300
(tests/faults/test_damages.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

sys.path.insert(0, str(Path(__file__).parent))
from damages import Outcome, Run, attack, judged

pytestmark = [pytest.mark.slow]
SEEDS = range(6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    yield Run(tmp_path_factory.mktemp("damages"))
    HydraConfig.instance().cfg = None  # of commands called in this process


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_run_gives_the_right_logits_or_one_clear_error(run, seed):
    found = attack(run, seed)
    assert found[0]["damage"] == found[1]["damage"]  # by the seed alone
    assert not [fact for fact in found if fact["problem"]], found


CHOSEN = {
    "result.json": b"",
    "metrics.jsonl": b"\xff\xfe\n[1, 2]\n",
    "audit/steps.jsonl": b"\xff\xfe\n[1, 2]\n{}\n",
    "data/manifest.json": b"[" * 100_000,
    "config.yaml": b"data: [1]\n",
    "saved": b"\xff",
    "supervisor.jsonl": b"\xff",
}
"""What a run writes beside its checkpoints, spoiled in the ways that once ended a command with a
traceback.
"""


@pytest.mark.parametrize("name", CHOSEN)
def test_a_spoiled_record_is_passed_over_or_named(run, name):
    read_by_both = name in ("data/manifest.json", "config.yaml")
    for kind in ("evaluate", "resume") if read_by_both else ("resume",):
        run.restore()
        (run.run_dir / name).write_bytes(CHOSEN[name])
        outcome = run.load(kind)
        assert judged(run, kind, outcome)[1] is None, (kind, outcome)


def test_a_folder_where_a_file_should_be_is_named(run):
    run.restore()
    (run.run_dir / "alarms.jsonl").unlink()
    (run.run_dir / "alarms.jsonl").mkdir()
    outcome = run.load("resume")
    assert (
        judged(run, "resume", outcome) == ("refused 2", None) and "alarms.jsonl" in outcome.output
    )


def test_the_judge_sees_other_weights_and_unexplained_errors(run):
    """What the attack would miss, it could not rule out."""
    right = run.expected["evaluate", "step-00000008"]
    others = run.expected["evaluate", "step-00000004"]
    wrong = type(right)(right.checkpoint, others.logits, right.rows)
    assert judged(run, "evaluate", Outcome(right, 0, "", None)) == ("right", None)
    assert "not a word" in judged(run, "evaluate", Outcome(wrong, 0, "", None))[1]
    assert "not explained" in judged(run, "evaluate", Outcome(None, 1, "", "TypeError: x"))[1]
    assert "exit code 1" in judged(run, "evaluate", Outcome(None, 1, "error: x\n", None))[1]
    assert "no clear error" in judged(run, "evaluate", Outcome(None, 2, "", None))[1]
