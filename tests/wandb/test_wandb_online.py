"""Our Tracker, `wandb sync` and launch.dashboard with the real client, against a server on
loopback.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import ENTITY, KEY, PROJECT, TEAM, FakeServer, Run, client_environment
from log_run import EXPERTS, LAYERS

from launch.dashboard import vega

pytest.importorskip("wandb")
pytestmark = [pytest.mark.slow]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WANDB = Path(sys.executable).with_name("wandb")
TIMEOUT = 120


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def server():
    """A fresh server; whatever a test did, the client must not have asked for something it does not
    know.
    """
    fake = FakeServer()
    yield fake
    fake.close()
    assert not fake.unknown, f"the client asks for more than fake_server.py knows: {fake.unknown}"


def call(
    command: list[str], home: Path, server: FakeServer | None, **extra: str
) -> subprocess.CompletedProcess:
    environment = client_environment(home, server and server.url) | extra
    return subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=TIMEOUT, cwd=ROOT
    )


def log_run(
    folder: Path,
    home: Path,
    server: FakeServer | None,
    mode: str,
    first: int,
    last: int,
    wandb_id: str = "-",
    **extra: str,
) -> tuple[str, str]:
    """Log steps first to last in a process of its own; returns the W&B id and what it wrote to
    stderr.
    """
    done = call(
        [
            sys.executable,
            str(HERE / "log_run.py"),
            str(folder),
            mode,
            str(first),
            str(last),
            wandb_id,
        ],
        home,
        server,
        **extra,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["wandb_id"], done.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(run: Run) -> list[dict[str, Any]]:
    """What arrived, as metrics.jsonl has it; rows of media and the client's own columns left
    out.
    """
    rows = [row for row in run.history if not any(key.startswith("routing/") for key in row)]
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


def sync(folder: Path, home: Path, server: FakeServer) -> None:
    if not WANDB.is_file():
        pytest.skip(f"{WANDB} does not exist: wandb is installed without its command")
    fragments = sorted((folder / "wandb").glob("*run-*-*"))
    done = call(
        [str(WANDB), "sync", "--yes", "--no-skip-online", *map(str, fragments)], home, server
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_online_run_arrives_as_it_was_logged_and_a_resumed_one_goes_on(server, home, tmp_path):
    wandb_id, stderr = log_run(tmp_path, home, server, "auto", 1, 5)
    run = server.runs[wandb_id]
    assert scalars(run) == metrics(tmp_path) and run.exit_code == 0 and run.summary["val_loss"] == 2
    assert run.config["model"]["value"] == {"num_experts": EXPERTS}
    assert KEY not in stderr
    assert [alert["title"] for alert in server.alerts] == ["imbalance at step 5"]
    # 1 name, 2 glob
    defined = {
        metric.get("1", metric.get("2")): metric for metric in run.config["_wandb"]["value"]["m"]
    }
    # 5: the x-axis, by its place in the list
    assert defined["*"]["5"] == 1 + list(defined).index("train/tokens")
    (image,) = [row["routing/expert_load"] for row in run.history if "routing/expert_load" in row]
    assert server.files[image["path"]].startswith(b"\x89PNG")

    resumed, _ = log_run(tmp_path, home, server, "auto", 4, 8, wandb_id)
    assert resumed == wandb_id and list(server.runs) == [wandb_id]
    rows = scalars(run)
    # W&B has no way back: tokens are the x-axis
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert {row["step"]: row for row in rows} == {
        record["step"]: record for record in metrics(tmp_path)
    }


def test_sync_uploads_an_offline_run_and_what_it_resumed(server, home, tmp_path):
    wandb_id, _ = log_run(tmp_path, home, None, "auto", 1, 4)
    resumed, _ = log_run(tmp_path, home, None, "auto", 4, 6, wandb_id)
    assert (
        resumed == wandb_id
        and len(list((tmp_path / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 2
    )
    assert not server.runs
    sync(tmp_path, home, server)
    assert list(server.runs) == [wandb_id]
    rows = scalars(server.runs[wandb_id])
    assert {row["step"]: row for row in rows} == {
        record["step"]: record for record in metrics(tmp_path)
    }
    assert any(name.endswith(".png") for name in server.files)


def test_a_server_that_fails_costs_neither_steps_nor_the_end_of_the_run(server, home, tmp_path):
    """The client retries for as long as it may; when it gives up, everything is still on disk and
    can be synced.
    """

    def fail_once_started() -> None:
        while "CreateRunFiles" not in server.operations:
            time.sleep(0.02)
        server.broken = True

    threading.Thread(target=fail_once_started, daemon=True).start()
    started = time.monotonic()
    wandb_id, _ = log_run(tmp_path, home, server, "auto", 1, 4, WANDB_FINISH_TIMEOUT="2")
    assert time.monotonic() - started < 60
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4]
    server.broken = False
    sync(tmp_path, home, server)
    assert {row["step"]: row for row in scalars(server.runs[wandb_id])} == {
        r["step"]: r for r in metrics(tmp_path)
    }


COUNTS = [[1, 2, 3, 4], [4, 4, 4, 4]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with a config and routing.jsonl, whose W&B run is called abcd1234."""
    folder = tmp_path_factory.mktemp("run")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        OmegaConf.save(
            compose(
                "train",
                overrides=[
                    "model.num_layers=3",
                    f"model.num_experts={EXPERTS}",
                    "model.num_dense_layers=1",
                    "router=threshold",
                ],
            ),
            folder / "config.yaml",
        )
    record = {"step": 1, "tokens": 9, "counts": COUNTS, "k_histogram": COUNTS}
    (folder / "routing.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "wandb" / "run-20260101_000000-abcd1234").mkdir(parents=True)
    return folder


SAVE = """
import json, os, sys
from hydra import compose, initialize_config_dir
from launch.dashboard import command as dashboard
for key, overrides in json.loads(sys.argv[1]):
    os.environ["WANDB_API_KEY"] = key
    with initialize_config_dir(sys.argv[2], version_base="1.3"):
        config = compose("dashboard", overrides=overrides)
    try:
        dashboard.main(config)
    except dashboard.Refused as refused:
        print(json.dumps({"refused": str(refused)}))
"""
"""Several calls of the command in one process, which takes seconds to start; prints the results of
all.
"""
WRONG_KEY = "f" * 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory, home, run_dir):
    """What calls with save=true leave: the server, the output folder, and the results of a call
    with a wrong key, of a good one, of the same again, and of one for an unknown entity.
    """
    output, server = tmp_path_factory.mktemp("output"), FakeServer()
    common = [f"run={run_dir}", "save=true", f"output={output}"]
    refused = [*common[:2], f"output={output / 'refused'}", "report=false", "charts=false"]
    calls = [
        (WRONG_KEY, refused),
        (KEY, common),
        (KEY, [*common, f"entity={ENTITY}"]),
        (KEY, [*refused, "entity=nobody"]),
    ]
    done = call(
        [sys.executable, "-W", "ignore", "-c", SAVE, json.dumps(calls), str(ROOT / "conf")],
        home,
        server,
    )
    server.close()
    assert done.returncode == 0, done.stderr
    assert not server.unknown and not any(
        key in done.stdout + done.stderr for key in (KEY, WRONG_KEY)
    )
    return (
        server,
        output,
        [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")],
    )


def test_refusals_say_in_one_line_what_to_do(saved):
    server, _, (wrong_key, _, _, stranger) = saved
    assert (
        server.rejected
        and "wandb login" in wrong_key["refused"]
        and "\n" not in wrong_key["refused"]
    )
    assert "entity=nobody" in stranger["refused"] and TEAM in stranger["refused"]


def test_workspace_report_and_charts_are_saved_and_saved_again_in_place(saved):
    server, output, (_, first, again, _) = saved
    kinds = {view["type"]: view for view in server.views.values()}
    assert len(server.views) == 2 and set(kinds) == {"project-view", "runs"}
    assert first["saved"] == again["saved"]
    assert (
        f"{ENTITY}/{PROJECT}" in first["saved"]["workspace"]
        and "/reports/" in first["saved"]["report"]
    )
    written = json.loads((output / "workspace.json").read_text())
    assert titles(kinds["project-view"]["spec"]) == titles(written)
    grids = [block for block in kinds["runs"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == len(titles(written))
    assert '"abcd1234"' in json.dumps(grids[0]["metadata"]["runSets"])
    assert '"abcd1234-charts"' in json.dumps(grids[-1]["metadata"]["runSets"])
    assert {name: chart["spec"] for name, chart in server.charts.items()} == {
        f"{ENTITY}/loadstone_{name}": vega.spec_of(preset) for name, preset in vega.PRESETS.items()
    }
    assert all(chart["access"] == "PRIVATE" for chart in server.charts.values())


def test_the_charts_have_their_rows_in_a_run_of_their_own(saved):
    """The panel of a preset asks for the table that was logged, as the panel that the client makes
    for it does.
    """
    server, _, (_, first, _, _) = saved
    assert list(server.runs) == ["abcd1234-charts"] and first["saved"]["charts"].endswith(
        "/runs/abcd1234-charts"
    )
    (run,) = server.runs.values()
    (view,) = [view for view in server.views.values() if view["type"] == "project-view"]
    panels = {
        panel["config"]["panelDefId"]: panel["config"]
        for panel in view["spec"]["section"]["panelBankConfig"]["sections"][-1]["panels"]
    }
    for name, preset in vega.PRESETS.items():
        table = json.loads(server.files[run.history[-1][f"charts/{name}_table"]["path"]])
        rows = preset.rows([{"step": 1, "counts": COUNTS, "k_histogram": COUNTS}], LAYERS)
        assert [dict(zip(table["columns"], values, strict=True)) for values in table["data"]] == [
            {field: row[field] for field in preset.fields} for row in rows
        ]
        theirs = run.config["_wandb"]["value"]["visualize"][f"charts/{name}"]["panel_config"]
        ours = panels[theirs["panelDefId"]]
        assert all(
            ours[part] == theirs[part] for part in ("fieldSettings", "stringSettings", "transform")
        )
        assert all(
            f'"value": "charts/{name}_table"' in json.dumps(panel["userQuery"])
            for panel in (ours, theirs)
        )


def titles(workspace: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (section["name"], [str(panel["config"].get("chartTitle")) for panel in section["panels"]])
        for section in workspace["section"]["panelBankConfig"]["sections"]
    ]
