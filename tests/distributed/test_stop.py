"""All ranks leave a phase together when one of them is asked to stop in it."""

from __future__ import annotations

import signal

from tests.end_to_end.commandline import write_text


def test_one_rank_told_to_stop_in_an_evaluation_takes_all_with_it(run_ranks, tmp_path):
    run = tmp_path / "run"
    *_, result = run_ranks(
        "distributed/stop_worker.py", 2, str(run), str(int(signal.SIGTERM)), *write_text(tmp_path)
    )
    assert (result["stopped"], result["step"], result["val_loss"]) == (True, 2, None)
    assert result["evaluated"] == 2  # of six batches
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
