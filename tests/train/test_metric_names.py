"""One catalogue of metrics: what runs log, what docs/metrics.md explains, what the dashboard, the
report and alarms speak of.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.config.parse import parse
from launch.dashboard.panels import shape_of
from launch.process.identity import ROOT
from launch.report.page import CHARTS, KPIS
from launch.runs.alarms import RULES
from model.cost.parameters import sparse_layers
from ops.router import Reason
from tests.end_to_end.commandline import TINY, train_on, write_text
from tests.launch.test_stop import train_here
from tests.pairwise import some_daily
from train.config.data import labels
from train.config.run import RunConfig
from train.observe.catalogue import names, page
from train.observe.catalogue.names import GROUPS, METRICS, find
from train.observe.catalogue.pictures import MEDIA
from train.observe.catalogue.record import SEEN_IN_THE_RUN, UNITS, Need

pytestmark = [pytest.mark.slow]  # seconds of a core


def test_the_page_is_written_from_the_catalogue():
    written = (ROOT / "docs/metrics.md").read_text()
    assert written == page.page(), "run `make docs`"


def test_every_metric_is_described():
    described = [metric for group in (*GROUPS, MEDIA) for metric in group.metrics]
    assert len({metric.name for metric in described}) == len(described)
    for metric in described:
        assert metric.meaning and metric.label and metric.unit in UNITS, metric.name
        assert not metric.meaning.endswith("."), metric.name
        assert all(metric.needs >= group.needs for group in GROUPS if metric in group.metrics)


def test_the_catalogue_needs_no_torch():
    code = "import sys, train.observe.catalogue.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_reasons_are_those_of_the_router():
    assert tuple(str(reason.name).lower() for reason in Reason) == names.REASONS


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("moe/max_vio/max", "moe/max_vio"),
        ("moe/load_entropy_ratio/min", "moe/load_entropy_ratio"),
        ("attention/error/layer_12", "attention/error"),
        ("eval/experts_per_token/loss_3", "eval/experts_per_token/loss_<decile>"),
        ("alarm/mine", "alarm/<alarm>"),
        ("moe/margin_p05", "moe/margin_p05"),
    ],
)
def test_a_logged_name_leads_to_its_metric(name, metric):
    assert find(name).name == metric


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean moe/max_vio"):
        find("moe/maxvio")


def test_the_report_and_its_rules_speak_of_metrics_that_exist():
    for chart in CHARTS:
        for name, _ in chart.series:
            find(name)
    for name, *_ in RULES:
        find(name)
    shown = {kpi.key.removesuffix("/median") for kpi in KPIS}
    assert {"train/loss", "moe/max_load", "perf/step_seconds"} <= shown & set(METRICS)


def names_of(run: RunConfig, conditions: set[Need]) -> set[str]:
    """What the catalogue says of a run on one rank, with an alarm for every rule with a metric."""
    sparse = sparse_layers(run.model.num_layers, run.attention.arguments)
    found = names.names_under(conditions, run.model.moe_layers, sparse) - {"alarm/<alarm>"}
    family = "eval/val_loss/<source>"
    if family in found:
        sources = (*run.data.sources, *run.data.validation.sources)
        found = found - {family} | {f"eval/val_loss/{label}" for label in labels(sources)}
    watched = {name for name in found if not name.startswith("eval/")}
    return found | {
        f"alarm/{name}" for name, rule in run.alarms.items() if fnmatch.filter(watched, rule.metric)
    }


LOGGED = [
    ("tracker.metrics=detailed", "balance=loss_free", "train.eval_interval=0"),
    (
        "router=threshold",
        "balance=none",
        "router.budget=1.5",
        "budget.warm_start_steps=0",
        "tracker.metrics=detailed",
    ),
    ("router=top_p", "balance=aux_loss", "train.eval_interval=0"),
    ("router=relu", "balance=none", "tracker.metrics=detailed", "train.eval_interval=0"),
    ("router=null_experts", "balance=quantile", "train.eval_interval=0"),
    (
        "attention=scc_short",
        "train.seq_len=512",
        "model.max_seq_len=512",
        "attention.audit_rows=0.1",
        "tracker.metrics=detailed",
        "train.eval_interval=0",
    ),
    (
        "attention=msa",
        "attention.block_size=8",
        "attention.top_k=2",
        "attention.dense_steps=2",
        "attention.audit_rows=0.5",
        "train.eval_interval=0",
    ),
    ("router.capacity_factor=0.5", "train.eval_interval=0"),
    ("model.num_mtp_layers=2", "train.mtp_coeff=0.3", "tracker.metrics=detailed"),
    ("model.num_experts=0", "balance=none"),
    ("objective=self_distil", "router=top_k_raw", "train.eval_interval=0"),
]
"""Settings of runs that have other metrics than most."""


@pytest.mark.parametrize("overrides", some_daily([pytest.param(o, id=o[0]) for o in LOGGED]))
def test_a_run_logs_what_the_catalogue_says_and_nothing_else(tmp_path, overrides):
    train_here(tmp_path / "run", write_text(tmp_path), *overrides)
    compare(tmp_path / "run", 1)


@pytest.mark.slow
def test_ranks_that_share_experts_log_what_the_catalogue_says_and_nothing_else(tmp_path):
    train_on(
        2,
        *TINY,
        *write_text(tmp_path),
        "train.num_steps=3",
        "parallel.expert_parallel_size=2",
        "dispatcher.payload=bf16",
        "deepspeed=zero3",
        f"run_dir={tmp_path / 'run'}",
    )
    assert {"comm/payload_error", "moe/rank_load"} <= compare(tmp_path / "run", 2)


def compare(run_dir: Path, world_size: int) -> set[str]:
    """Fails where metrics.jsonl and the catalogue differ; returns what was logged."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    logged = {name for line in lines for name in line} - {"step", "tokens"}
    saved = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=True)
    run = parse(saved, world_size)
    conditions = set(shape_of(run).conditions)
    missing = names_of(run, conditions - SEEN_IN_THE_RUN) - logged
    assert not missing, f"in the catalogue, but not logged: {sorted(missing)}"
    # With ZeRO-3, DeepSpeed leaves parameters whole that are as small as these.
    possible = conditions | SEEN_IN_THE_RUN | {Need.WHOLE_ROUTERS}
    unknown = logged - names_of(run, possible)
    assert not unknown, f"logged, but not in the catalogue: {sorted(unknown)}"
    return logged


def test_the_comparison_sees_a_planted_difference(tmp_path):
    train_here(tmp_path / "run", write_text(tmp_path), "train.num_steps=3", "train.eval_interval=0")
    path = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    compare(tmp_path / "run", 1)
    path.write_text("".join(json.dumps({**line, "moe/planted": 1}) + "\n" for line in lines))
    with pytest.raises(AssertionError, match=r"not in the catalogue: \['moe/planted'\]"):
        compare(tmp_path / "run", 1)
    for line in lines:
        line.pop("moe/load_gini", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(AssertionError, match=r"not logged: \['moe/load_gini'\]"):
        compare(tmp_path / "run", 1)
