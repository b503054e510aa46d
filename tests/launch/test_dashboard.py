"""The dashboard follows from the config, shows only what training logs, and needs neither account
nor network to be made.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.dashboard import command, vega
from launch.dashboard.panels import Lines, Media, Section, by_layer, metrics_of, sections, shape_of
from model.cost.parameters import sparse_layers
from model.moe.balance import LayerStats, unpack_stats
from model.moe.budget import update_routers
from model.request import ForwardRequest, TokenBatch
from tests import composing
from train.components import build_model
from train.observe.catalogue.names import METRICS, names_under
from train.observe.catalogue.pictures import MEDIA
from train.observe.catalogue.record import SEEN_IN_THE_RUN, Need
from train.observe.routing import mean_details, routing_details
from train.observe.step_metrics import StepMetrics

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from commandline import ROOT, TINY, launch, write_text

DEVICE_METRICS = {"perf/mfu"}
"""Logged where the device's peak is known."""
SPARSE = (
    "attention=scc",
    "attention.block_size=16",
    "attention.coarse_block_size=8",
    "attention.window_size=17",
    "attention.top_k=1",
    "attention.audit_rows=0.5",
)
CONFIGS = {
    "top_k": (),
    "threshold": ("router=threshold", "balance=none"),
    "top_p": ("router=top_p",),
    "relu": ("router=relu", "balance=none"),
    "null_experts": ("router=null_experts",),
    "top_p_null": ("router=top_p", "router.num_null_experts=2"),
    "expert_choice": ("router=expert_choice", "balance=none"),
    "loss_free": ("balance=loss_free",),
    "quantile": ("balance=quantile",),
    "dense_first": ("model.num_dense_layers=1",),
    "dense": ("model.num_experts=0", "balance=none"),
    "sparse": SPARSE,
    "unaudited": (*SPARSE[:-1], "attention.audit_rows=0"),
    "indexed": ("attention=msa", "attention.block_size=16", "attention.audit_rows=0.5"),
    "dropping": (*SPARSE, "attention.tail=drop"),
    "index inside": (*SPARSE, "attention.select=index"),
    "bounded": (*SPARSE, "attention.resident_blocks=1", "attention.resident_interval=16"),
}


def composed(name: str, *overrides: str):
    return composing.composed(*overrides, command=name)


def run_of(*overrides: str, world_size: int = 1):
    return parse(
        plain(composed("train", *TINY, "model.max_seq_len=128", "train.seq_len=128", *overrides)),
        world_size,
    )


def shown(made: list[Section], kind: type = Lines) -> list:
    return [panel for section in made for panel in section.panels if isinstance(panel, kind)]


def logged_by(run) -> set[str]:
    """Names of the metrics of routing and attention after one step of a model with this config."""
    torch.manual_seed(0)
    model = build_model(run).train()
    rows, length = 2, run.train.seq_len
    tokens = torch.randint(0, run.model.vocab_size, (rows, length + 1))
    routers = model.routers()
    layers = (
        sparse_layers(run.model.num_layers, run.attention.arguments)
        if model.measured_attentions()
        else []
    )
    metrics = StepMetrics(
        run.model, routers, torch.device("cpu"), 1.0, run.balance, model.rank_shares, layers
    )
    output = model(
        TokenBatch(
            input_ids=tokens[:, :-1],
            targets=tokens[:, 1:],
            positions=torch.arange(length).expand(rows, -1),
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
            max_seqlen=length,
            token_ids=torch.arange(rows * length).view(rows, length),
        ),
        ForwardRequest(keep_routing=True, measure_attention=True),
    )
    metrics.add(output, rows * length, rows * length)
    if routers:
        stats: LayerStats = unpack_stats(output.stats, run.model.num_experts, routers[0].max_top_k)
        update_routers(routers, stats, run.balance, run.budget, run.fail_safe)
        metrics.add_stats(stats)
    return {*metrics.reduce()[0], *mean_details(routing_details(output.routings))}


def catalogued(run, conditions: frozenset[Need]) -> set[str]:
    """What the catalogue says of one of those steps: routing and attention, without gradients."""
    layers = sparse_layers(run.model.num_layers, run.attention.arguments)
    given = conditions - {Need.DETAILED}
    return {
        name
        for name in names_under(given, run.model.moe_layers, layers)
        if name.startswith(("moe/", "attention/"))
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_catalogue_says_what_a_model_of_the_config_logs(name):
    run = run_of(*CONFIGS[name])
    conditions = shape_of(run).conditions
    logged = {n for n in logged_by(run) if n.startswith(("moe/", "attention/"))}
    assert catalogued(run, conditions - SEEN_IN_THE_RUN) <= logged
    assert logged <= catalogued(run, conditions | SEEN_IN_THE_RUN)


@pytest.mark.parametrize("name", CONFIGS)
def test_panels_show_what_a_run_of_the_config_logs_and_no_more(name):
    run = run_of(*CONFIGS[name])
    shape = shape_of(run)
    made = sections(shape)
    logged = logged_by(run) | {
        name
        for name in names_under(shape.conditions, (), ())
        if not name.startswith(("moe/", "attention/"))
    }
    missing = sorted(metric for metric in metrics_of(shown(made)) if metric not in logged)
    assert not missing, f"panels of metrics that are not logged: {missing}"
    for panel in shown(made):
        if panel.regex and panel.regex.startswith(("moe/", "attention/")):
            assert any(re.fullmatch(panel.regex, metric) for metric in logged), panel.regex
    of_some_configs = {
        metric.name
        for metric in METRICS.values()
        if metric.name.startswith("moe/") and metric.needs - {Need.EXPERTS, Need.DETAILED}
    }
    of_some_configs |= {metric for metric in logged if re.fullmatch(r"attention/\w+", metric)}
    assert not (logged & of_some_configs) - set(metrics_of(shown(made))), (
        "logged by this config, but shown nowhere"
    )


def test_a_panel_of_an_unknown_metric_is_an_error():
    with pytest.raises(KeyError, match="did you mean moe/max_vio"):
        shape_of(run_of()).shows(Lines("planted", ("moe/max_violation",)))


@pytest.mark.slow
def test_panels_match_the_metrics_of_a_real_run(tmp_path):
    text = write_text(tmp_path)
    lines = (tmp_path / "text.txt").read_text().splitlines()
    (tmp_path / "text.txt").write_text(
        "\n".join(" ".join(lines[i : i + 20]) for i in range(0, len(lines), 5))
    )
    launch(
        "train",
        *TINY,
        *text,
        "router=threshold",
        "balance=none",
        "budget.warm_start_steps=0",
        *SPARSE,
        "model.max_seq_len=128",
        "train.seq_len=128",
        "train.global_batch_size=1",
        "train.num_steps=4",
        "train.eval_interval=2",
        "tracker.metrics=detailed",
        f"run_dir={tmp_path / 'run'}",
    )
    logged: set[str] = set()
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        logged |= set(json.loads(line))
    settings, run = command.read(composed("dashboard", f"run={tmp_path / 'run'}"))
    made = sections(shape_of(run))
    assert {s.name.split(" ", 1)[1] for s in made} == {
        "health",
        "balance",
        "budget",
        "router internals",
        "fallbacks and audit",
        "attention",
        "time",
    }
    missing = sorted({*metrics_of(shown(made))} - logged - DEVICE_METRICS)
    assert not missing
    assert not [
        p.regex
        for p in shown(made)
        if p.regex and not any(re.fullmatch(p.regex, name) for name in logged)
    ]
    assert {"eval/router_stability", "moe/bias_rms", "attention/union_factor"} <= set(
        metrics_of(shown(made))
    )


def test_sections_follow_the_config():
    def names(*overrides: str, world_size: int = 1) -> list[str]:
        return [s.name for s in sections(shape_of(run_of(*overrides, world_size=world_size)))]

    assert names("model.num_experts=0", "balance=none") == ["1 health", "2 time"]
    assert names() == [
        "1 health",
        "2 balance",
        "3 router internals",
        "4 fallbacks and audit",
        "5 time",
    ]
    assert "3 budget" in names("router=threshold", "balance=none") and "5 attention" in names(
        *SPARSE
    )
    spread = ("launch=deepspeed", "launch.num_devices=2", "parallel.expert_parallel_size=2")
    assert names(*spread, world_size=2)[-1] == "5 communication and time"
    made = sections(shape_of(run_of(*spread, "dispatcher.payload=bf16", world_size=2)))
    assert {"comm/bytes", "comm/payload_error", "moe/rank_load"} <= set(metrics_of(shown(made)))
    assert not {"moe/rank_load", "comm/bytes"} & set(
        metrics_of(shown(sections(shape_of(run_of()))))
    )


def test_media_and_alarms_can_be_switched_off():
    everything = sections(shape_of(run_of()))
    assert {key for panel in shown(everything, Media) for key in panel.keys} == {
        "routing/expert_load",
        "routing/expert_load_histogram",
    }
    assert any(panel.regex == "alarm/.*" for panel in shown(everything))
    quiet = sections(shape_of(run_of("tracker.media_interval=0", "alarms=off")))
    assert not shown(quiet, Media) and not any(panel.regex == "alarm/.*" for panel in shown(quiet))


def test_media_names_are_those_of_the_sinks():
    source = (ROOT / "train/sinks/media.py").read_text()
    made = sections(shape_of(run_of("router=threshold", "balance=none")))
    named = {metric.name for metric in MEDIA.metrics}
    assert {key for panel in shown(made, Media) for key in panel.keys} == named
    assert all(f'"{name}"' in source for name in named)


# --- the command ----------------------------------------------------------------------------------


def make_run(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    OmegaConf.save(composed("train", *TINY, *overrides), folder / "config.yaml")
    records = [
        {"step": step, "tokens": 9, "counts": [[8, 0, 4, 4]], "k_histogram": [[0, 3, 5]]}
        for step in (1, 2)
    ]
    (folder / "routing.jsonl").write_text(
        "\n".join(map(json.dumps, records)) + '\n{"step": 3, "cut o'
    )
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the dry command used the network")

    monkeypatch.setattr("socket.create_connection", refuse)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")


def test_a_dry_call_writes_what_would_be_saved(tmp_path, capsys, no_network):
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.workspaces import internal

    run = make_run(tmp_path / "run", "experiment_name=mine", "tracker.wandb.project=elsewhere")
    command.main(composed("dashboard", f"run={run}"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "saved" not in result and all(
        (run / "dashboard" / name).is_file() for name in result["files"]
    )
    text = (run / "dashboard/workspace.json").read_text()
    spec = internal.WorkspaceViewspec.model_validate_json(text)
    assert [section.name for section in spec.section.panel_bank_config.sections] == [
        "1 health",
        "2 balance",
        "3 router internals",
        "4 fallbacks and audit",
        "5 time",
        "6 charts",
    ]
    lines = [
        panel["config"]
        for section in json.loads(text)["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
        if panel["viewType"] == "Run History Line Plot"
    ]
    assert lines and all(line["xAxis"] == "train/tokens" for line in lines)
    assert any(
        line.get("metricRegex") == by_layer("max_vio") and line["useMetricRegex"] for line in lines
    )
    report = json.loads((run / "dashboard/report.json").read_text())
    assert [block["type"] for block in report["blocks"]].count("panel-grid") == 6


def test_a_call_without_a_run_takes_the_overrides_of_training(tmp_path, capsys, no_network):
    pytest.importorskip("wandb_workspaces")
    command.main(
        composed(
            "dashboard", *TINY, "router=top_p", "report=false", "charts=false", f"output={tmp_path}"
        )
    )
    assert "3 budget" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["workspace.json"]


def test_names_hold_only_what_the_server_takes(tmp_path, no_network):
    pytest.importorskip("wandb_workspaces")
    command.main(
        composed("dashboard", *TINY, f"output={tmp_path}", f"experiment_name='lr=0.1+{'x' * 200}'")
    )
    assert command.as_title("lr=0.1 🚀") == "lr-0.1 -"


def test_saving_without_a_key_or_a_server_says_what_to_do(tmp_path, monkeypatch, no_network):
    pytest.importorskip("wandb_workspaces")
    arguments = [*TINY, "save=true", "report=false", "charts=false", f"output={tmp_path}"]
    with pytest.raises(ValueError, match="no API key: `wandb login`"):
        command.main(composed("dashboard", *arguments))
    monkeypatch.undo()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 cannot be reached") as caught:
        command.main(composed("dashboard", *arguments))
    assert "0" * 40 not in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a run directory"):
        command.read(composed("dashboard", f"run={tmp_path}"))
    with pytest.raises(ConfigError, match="save is 'yes'"):
        command.read(composed("dashboard", "save=yes"))
    with pytest.raises(ConfigError, match="entity is empty"):
        command.read(composed("dashboard", "entity=''"))


# --- charts ---------------------------------------------------------------------------------------

COUNTS = [[16, 0, 4, 4, 4, 4, 0, 0], [4] * 8]
"""Layer 1: expert 0 has four times its share, beyond the colour's domain; layer 2 is even."""
RECORDS = [
    {"step": step, "counts": COUNTS, "k_histogram": [[0, 6, 2], [1, 6, 1]]} for step in (5, 10)
]


@pytest.mark.parametrize("name", vega.PRESETS)
def test_placeholders_are_declared_and_filled(name):
    preset = vega.PRESETS[name]
    declared = {("field", field) for field in preset.fields} | {
        ("string", text) for text in preset.strings
    }
    assert vega.placeholders(vega.spec_of(preset)) == declared
    chart = vega.filled(preset, preset.rows(RECORDS, (1, 2)), {"title": 'a "quoted" title'})
    assert not vega.placeholders(chart) and chart["title"] == 'a "quoted" title'
    with pytest.raises(ValueError, match="needs the columns"):
        vega.filled(preset, [{"other": 1}])


def test_rows_follow_their_definition():
    load = vega.load_rows(RECORDS, (1, 2))
    assert [row["load"] for row in load if row["layer"] == 1] == [4, 0, 1, 1, 1, 1, 0, 0]
    assert {row["load"] for row in load if row["layer"] == 2} == {1}
    assert [row["share"] for row in vega.k_rows(RECORDS, (1, 2)) if row["layer"] == 1] == [
        0,
        0.75,
        0.25,
    ]
    violations = vega.violation_rows(RECORDS * 500, (1, 2))
    assert {(row["layer"], row["violation"]) for row in violations} == {(1, 3), (2, 0)}
    assert len(violations) <= 2 * vega.MAX_COLUMNS


def test_large_tables_leave_out_layers():
    rows = vega.load_rows([{"counts": [[1] * 256] * 48}], range(48))
    kept = vega.thinned(rows)
    assert len(kept) <= vega.MAX_ROWS < len(rows) and {row["expert"] for row in kept} == set(
        range(256)
    )
    assert vega.thinned(kept) == kept


@pytest.mark.parametrize("name", vega.PRESETS)
def test_charts_render_without_a_browser(name, tmp_path):
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    from matplotlib.image import imread

    preset = vega.PRESETS[name]
    (tmp_path / "chart.png").write_bytes(
        vega.render(vega.filled(preset, preset.rows(RECORDS, (1, 2))))
    )
    pixels = imread(tmp_path / "chart.png")[..., :3]
    assert min(pixels.shape[:2]) > 100
    if name == "expert_load":
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        over, under = (red > 2 * blue) & (green < 0.2), (blue > 2 * red) & (green < 0.5)
        fair = abs(pixels - 0.94).max(-1) < 0.02
        assert (
            over.mean() > 0.01 and under.mean() > 2 * over.mean() and fair.mean() > 5 * over.mean()
        )
        assert (pixels.max(-1) < 0.05).mean() < over.mean(), (
            "loads beyond the domain are drawn black without clamp"
        )
