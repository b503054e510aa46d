"""launch.compare as a whole: a variant fails, the command is killed, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.commandline import ROOT, TINY, launch, write_text

pytestmark = pytest.mark.nightly
NOT_HERE = ("model.hidden_size", "train.num_steps")
ASKED = (
    *(o for o in TINY if o.partition("=")[0] not in NOT_HERE),
    *("model.hidden_size=16", "train.num_steps=30", "parallel=single"),
    *("variants=[top_k,adaptive]", "sizes=[]", "seeds=2", "checkpoint.save_interval=10"),
    *("speed.rows=2", "speed.context=8", "speed.new_tokens=4", "speed.max_rounds=6"),
)


def last(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


def test_a_killed_comparison_goes_on_and_runs_nothing_twice(data, tmp_path):
    folder = tmp_path / "comparison"
    asked = [*ASKED, *data, f"run_dir={folder}"]
    dry = launch("compare", *asked, "launch.dry_run=true")
    assert last(dry)["runs"] == 4 and not folder.exists()

    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = subprocess.Popen(
        [sys.executable, "-m", "launch.compare", *asked],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    first = folder / "outcomes" / "top_k-1234.json"
    second = folder / "runs" / "adaptive-1234" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (first.is_file() and second.is_file()):
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(signal.SIGKILL)
    command.wait()
    before = first.stat().st_mtime_ns, (folder / "runs/top_k-1234/metrics.jsonl").read_bytes()
    # The run that was at work is told by the kernel that its parent is gone, and saves.
    lock = folder / "runs" / "adaptive-1234" / "lock"
    while lock.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)

    refused = launch("compare", f"resume={folder}", "optim.lr=0.5", check=False)
    assert refused.returncode == 2 and "keeps the settings of its runs" in refused.stderr

    done = launch("compare", f"resume={folder}", timeout=600)
    found = last(done)
    assert found["effort"] == {**found["effort"], "runs": 4, "done": 4, "failed": 0}
    assert found["decision"]["kind"] in ("recommended", "undecided")
    now = first.stat().st_mtime_ns, (folder / "runs/top_k-1234/metrics.jsonl").read_bytes()
    assert now == before
    page = Path(found["page"]).read_text()
    assert "Comparison of top_k, adaptive" in page and "4 runs, 4 ended" in page

    result = json.loads((folder / "result.json").read_text())
    (size,) = result["sizes"]
    for entry in size["variants"]:
        # what training's own evaluation has said of the same rows
        for seed, loss in zip(entry["seeds"], entry["losses"], strict=True):
            said = json.loads((folder / f"runs/{entry['variant']}-{seed}/result.json").read_text())
            assert loss == pytest.approx(said["val_loss"], rel=1e-5)
        assert entry["training_flops_spent"] == pytest.approx(entry["training_flops"], rel=0.02)
        assert entry["speed"]["itl_p50"] > 0

    # everything is there: nothing is run, the page is written again
    again = last(launch("compare", f"resume={folder}"))
    assert again["effort"] == found["effort"] and again["decision"] == found["decision"]


def test_a_variant_that_fails_is_shown(data, tmp_path):
    """Its loss is not finite from the start, as its learning rate is absurd."""
    folder = tmp_path / "comparison"
    variant = ROOT / "conf" / "variant" / f"planted_{os.getpid()}.yaml"
    variant.write_text("# @package _global_\noptim: {lr: 1.0e+30, min_lr: 1.0e+29}\n")
    try:
        asked = [o for o in ASKED if not o.startswith(("variants", "seeds", "optim.lr"))]
        done = launch(
            "compare",
            *(*asked, *data, f"variants=[top_k,{variant.stem}]", "seeds=1", f"run_dir={folder}"),
            timeout=600,
        )
        found = last(done)
        assert found["effort"]["failed"] == 1 and found["decision"]["kind"] == "failed"
        page = Path(found["page"]).read_text()
        assert f'data-run="{variant.stem}-1234"' in page and "exit code 65" in page
        # it is not tried again unasked
        again = launch("compare", f"resume={folder}")
        assert last(again)["effort"]["failed"] == 1 and "[2/2]" not in again.stdout
    finally:
        variant.unlink()
