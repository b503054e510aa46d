"""Offline W&B runs of our Tracker, read back with the client's own reader."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import client_environment

pytest.importorskip("wandb")
pytestmark = [pytest.mark.slow]
HERE = Path(__file__).parent
WANDB = Path(sys.executable).with_name("wandb")
TIMEOUT = 120


def log_run(folder: Path, home: Path, mode: str, first: int, last: int, wandb_id: str = "-") -> str:
    """Log steps first to last in a process of its own; returns the W&B id."""
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "log_run.py"),
            str(folder),
            mode,
            str(first),
            str(last),
            wandb_id,
        ],
        env=client_environment(home),
        text=True,
        capture_output=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["wandb_id"]


def inspect(path: Path, home: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of a W&B folder by type, in order."""
    if not WANDB.is_file():
        pytest.skip(f"{WANDB} does not exist: wandb is installed without its command")
    done = subprocess.run(
        [str(WANDB), "leet", "inspect", "--json", str(path)],
        env=client_environment(home),
        text=True,
        capture_output=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def scalars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """W&B rows as metrics.jsonl has them; rows of media and the client's own columns left out."""
    rows = [row for row in rows if not any(key.startswith("routing/") for key in row)]
    return [
        {
            "step": row["train/step"],
            "tokens": row["train/tokens"],
            **{
                k: v
                for k, v in row.items()
                if k not in ("train/step", "train/tokens") and not k.startswith("_")
            },
        }
        for row in rows
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, home):
    folder = tmp_path_factory.mktemp("offline") / "run"
    wandb_id = log_run(folder, home, "auto", 1, 6)
    return folder, wandb_id, inspect(folder / "wandb", home)


def test_without_a_key_all_values_are_kept_offline_as_in_our_file(finished):
    folder, wandb_id, records = finished
    assert [path.name.endswith(wandb_id) for path in (folder / "wandb").glob("offline-run-*")] == [
        True
    ]
    logged = metrics(folder)
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5, 6]
    assert scalars([record["item"] for record in records["history"]]) == logged


def test_the_x_axis_is_tokens_for_every_metric(finished):
    _, _, records = finished
    globs = {
        metric["glob_name"]: metric.get("step_metric")
        for metric in records["metric"]
        if "glob_name" in metric
    }
    explicit = [
        metric
        for metric in records["metric"]
        if "name" in metric and metric["name"] != "train/tokens"
    ]
    assert globs["*"] == "train/tokens"
    assert all(metric.get("step_metric") == "train/tokens" for metric in explicit), (
        "explicit defines lose the glob's x-axis"
    )


def test_media_config_alert_and_summary_are_in_the_run(finished):
    folder, wandb_id, records = finished
    (run,) = records["run"]
    assert run["run_id"] == wandb_id and run["config"]["update"]["model"] == {"num_experts": 4}
    media = [
        record["item"]
        for record in records["history"]
        if "routing/expert_load.path" in record["item"]
    ]
    assert media and all(row["train/tokens"] == 100 * row["train/step"] for row in media)
    (image, *_) = folder.glob(f"wandb/offline-run-*/files/{media[0]['routing/expert_load.path']}")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert (
        media[0]["routing/experts_per_token._type"]
        == media[0]["routing/expert_load_histogram._type"]
        == "histogram"
    )
    # two layers of [0, 1, 2] tokens
    assert media[0]["routing/experts_per_token.values"] == [0, 2, 4]
    assert [alert["title"] for alert in records["alert"]] == ["imbalance at step 6"]
    assert any(record["update"].get("val_loss") == 2 for record in records["summary"])
    assert records["exit"][0]["exit_code"] == 0


def test_a_killed_run_stays_readable(tmp_path, home):
    """SIGKILL: nothing is closed or flushed. Our file has every step; W&B's has a prefix of them,
    unspoilt.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "log_run.py"),
            str(tmp_path / "run"),
            "offline",
            "1",
            "60",
            "-",
            "hang",
        ],
        env=client_environment(home),
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
    logged = metrics(tmp_path / "run")
    assert len(logged) == 60
    records = inspect(tmp_path / "run" / "wandb", home)
    rows = scalars([record["item"] for record in records.get("history", [])])
    assert rows and rows == logged[: len(rows)] and "exit" not in records
