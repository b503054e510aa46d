"""One list of metrics: what runs log, what docs/metrics.md explains and what alarms may watch."""

from __future__ import annotations

import html
import json
import re

import pytest

from launch.common import ROOT
from ops.router import Reason
from tests.end_to_end.commandline import write_text
from tests.launch.test_stop import train_here
from train import metric_names as names

SECTIONS = {"Metrics of routing and attention": "moe/", "Attention": "attention/"}


def documented() -> set[str]:
    """Full names in the first columns of the tables, without the levels of a spread."""
    found, prefix = set(), ""
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("#"):
            prefix = SECTIONS.get(line.lstrip("# "), "")
        cell = re.match(r"\| ([^|]+) \|", line)
        if cell is None or cell[1] in ("metric", "---"):
            continue
        for name in html.unescape(cell[1]).replace(" (L)", "").split(", "):
            full = re.match(r"(train|perf|comm|eval)/", name)
            found |= ({f"moe/fallback/{reason}" for reason in names.REASONS}
                      if name == "fallback/<reason>" else {name if full else prefix + name})
    return found


def test_the_page_and_the_list_name_the_same_metrics():
    listed = {name for name in names.metric_names((), (), True) if not name.startswith("moe/")}
    routing = (*names.ROUTING, *names.BY_LAYER, *names.SPREAD, *names.GRADIENTS)
    listed |= {f"moe/{name}" for name in routing}
    explained = {name for name in documented() if not name.startswith("eval/")}
    assert explained == listed


def test_the_reasons_are_those_of_the_router():
    assert tuple(str(reason.name).lower() for reason in Reason) == names.REASONS


@pytest.mark.parametrize("overrides", [
    ("tracker.metrics=detailed", "balance=loss_free"),
    ("router=threshold", "balance=none", "router.budget=1.5", "budget.warm_start_steps=0",
     "tracker.metrics=detailed"),
    ("router=top_p", "balance=aux_loss"),
    ("router=relu", "balance=none", "tracker.metrics=detailed"),
    ("router=null_experts", "balance=quantile"),
    ("attention=scc_short", "train.seq_len=512", "model.max_seq_len=512",
     "attention.audit_rows=0.1", "tracker.metrics=detailed"),
    ("router.capacity_factor=0.5",)], ids=lambda o: o[0])
def test_runs_log_nothing_that_the_list_does_not_have(tmp_path, overrides):
    train_here(tmp_path / "run", write_text(tmp_path), "train.eval_interval=0", *overrides)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    logged = {name for line in lines for name in line if not name.startswith(("alarm/", "eval/"))}
    known = names.metric_names((1,), (0, 1), True)
    assert logged - {"step", "tokens"} <= known and "train/loss" in logged
