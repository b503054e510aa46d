"""Benches run: none may rot unseen between the sessions on the machines that they are for.

Those of kernels start with `make bench`; here are the ones that a CPU does in little.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from bench.quality import adapted, attentions, budget_table, optimizers, recall, sweep, widths
from bench.sparse_attention import slowly
from launch.command.arguments import setting
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.saved.defaults import complete
from ops.sparse_attention import SparseAttentionSpec, sparse_attention
from ops.sparse_attention.ranking import union_counts

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = {
    "checkpoint_scale": {"layers": 2, "experts": 8, "repeats": 1},
    "load_row": {"millions": 1, "rows": 2, "layers": 1, "length": 1024},
    "large_run": {"layers": 2, "experts": 8, "ranks": 2, "mib": 1, "audit-mib": 1},
    "prepare_data": {"megabytes": 1, "workers": 1, "rounds": 1, "vocabulary": 300},
    "killed_preparation": {"megabytes": 2, "kills": 1, "workers": 1, "vocabulary": 300},
    "long_row": {"length": 4096, "ranks": 2, "gather": 2, "steps": 2},
    "reliability": {"steps": 12, "save-interval": 4},
    "plan_memory": {"size": "small", "cases": "ep2, ZeRO 3;pp2, ZeRO 1"},
    "layout_tables": {"only": "Qwen3-30B-A3B, rows of 4,096", "page": "page.md"},
    "zero3_building": {"size": "small", "ranks": "2"},
    "fp8_experts": {"largest": 256, "train": "runs", "steps": 3, "width": 32},
    "step_parts": {
        "size": "tiny",
        "kinds": "adamw",
        "steps": 2,
        "rounds": 1,
        "settings": "train.seq_len=32",
    },
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALLEST)
def test_a_bench_runs_and_writes_what_it_found(name, tmp_path):
    found = tmp_path / "found.json"
    options = [word for key, value in SMALLEST[name].items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", f"bench.{name}", *options, "--json", str(found)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(found.read_text())
    assert result["bench"] == name and result["commit"]


def test_every_bench_of_a_cpu_is_run():
    """A new one belongs to the list above, or to those that are run otherwise."""
    otherwise = {
        *("common", "collect", "tune", "peers"),  # parts, and what needs a GPU
        *("grouped_mlp", "moe_layer", "router", "sparse_attention", "train_step"),  # make bench
        *("stored_experts", "gather_attention", "index_attention"),  # make bench
        *("generation", "small_model"),  # need a run, and a package
        # need a commit to compare with; some minutes
        *("start_up", "optimizer_step", "compiled_blocks"),
    }
    there = {path.stem for path in (ROOT / "bench").glob("*.py")} - {"__init__"}
    assert there == otherwise | set(SMALLEST)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["optimizer_step", pytest.param("compiled_blocks", marks=pytest.mark.nightly)]
)
def test_a_bench_of_a_step_runs_in_little(name, tmp_path, monkeypatch):
    """Of the quickstart's shape they take minutes."""
    bench = importlib.import_module(f"bench.{name}")
    little = dataclasses.replace(
        bench.QUICKSTART, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2
    )
    little = dataclasses.replace(little, intermediate_size=64, expert_intermediate_size=32)
    monkeypatch.setattr(bench, "QUICKSTART", little)
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda given, device, _: real(given, device, 1))
    found = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--json", str(found)])
    bench.main(name, bench.run)
    result = json.loads(found.read_text())
    assert result["bench"] == name and result["rows"]
    for row in result["rows"]:
        assert row["device"] == "cpu" and row["commit"] and row["ours_ms"] > 0 and row["rivals"]


def cells_of(plan: dict) -> optimizers.Results:
    """Results in which a cell has a loss: {(optimizer, rate): {seed: loss}}."""
    found: optimizers.Results = {name: {rate: {} for rate in RATES} for name in ("adamw", "muon")}
    for (name, rate), losses in plan.items():
        for seed, loss in losses.items():
            found[name][rate][seed] = {
                "val_loss": loss,
                "tokens_per_second": 10.0,
                "processor_seconds": 2.0,
            }
    return found


RATES = [0.1, 0.2, 0.4, 0.8]
FIRST = {
    **{("adamw", rate): {7: loss} for rate, loss in zip(RATES, (3.0, 2.0, 2.5, 4.0), strict=True)},
    **{("muon", rate): {7: loss} for rate, loss in zip(RATES, (3.0, 2.5, 2.0, 1.5), strict=True)},
}


def test_a_sweep_of_optimizers_goes_on_from_what_is_there():
    """The first seed from the middle rate outwards, then others at the best rates and beside."""
    todo = optimizers.missing(cells_of({}), RATES, [7, 8], every=False)
    assert [rate for _, rate, _ in todo[::2]] == [0.2, 0.4, 0.1, 0.8]
    assert {seed for *_, seed in todo} == {7} and len(todo) == 8

    found = optimizers.missing(cells_of(FIRST), RATES, [7, 8], every=False)
    assert found == [
        *(("adamw", rate, 8) for rate in (0.2, 0.1, 0.4)),
        *(("muon", rate, 8) for rate in (0.8, 0.4)),
    ]
    # What the second seed found does not change where it runs.
    more = FIRST | {("adamw", 0.2): {7: 2.0, 8: 9.0}}
    assert optimizers.missing(cells_of(more), RATES, [7, 8], every=False) == found[1:]
    assert len(optimizers.missing(cells_of(FIRST), RATES, [7, 8], every=True)) == 8


def test_a_table_of_optimizers_takes_the_best_from_rates_with_all_seeds_and_says_how_sure():
    cells = cells_of(FIRST | {("adamw", 0.2): {7: 2.0, 8: 2.2}, ("muon", 0.4): {7: 1.9, 8: 2.0}})
    table = optimizers.tables(cells)
    assert "| adamw | 0.2 | 2.0000 | 2.2000 | **2.1000** |" in table
    # The lowest number of all has one seed.
    assert "| muon | 0.8 | 1.5000 |  | 1.5000 |" in table
    assert "| muon | 0.4 | 1.9000 | 2.0000 | **1.9500** |" in table
    # Differences -0.1 and -0.2: mean -0.15, standard error 0.05, times 12.706.
    assert "each at its best rate: -0.1500 ± 0.6353 nats, 2 seeds" in table
    assert "both at 0.8: -2.5000 (one seed: no interval) nats" in table
    assert "Muon" not in optimizers.tables(cells_of({("adamw", 0.2): {7: 2.0}}))


def test_a_cell_that_was_stopped_is_not_done(tmp_path):
    run = optimizers.cell(tmp_path, "muon", 2e-3, 1)
    assert run.name == "muon-0.002-1" and not sweep.is_done(run)
    run.mkdir()
    for stopped in (True, False):
        (run / "result.json").write_text(json.dumps({"stopped": stopped}))
        assert sweep.is_done(run) != stopped


def test_a_sweep_trains_what_is_missing_and_takes_up_what_was_stopped(
    tmp_path, monkeypatch, capsys
):
    """Its loop, with a training that only says how it was asked for."""

    def pretended(words: list[str]) -> None:
        settings = dict(word.split("=", 1) for word in words)
        run = Path(settings.get("resume") or settings["run_dir"])
        resumed = "resume" in settings
        (run / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        loss = float(run.name.split("-")[1])
        record = {"step": 2, "train/loss": loss, "perf/tokens_per_second": 5.0}
        (run / "metrics.jsonl").write_text(json.dumps(record))
        # The first try of one cell is cut short.
        stopped = run.name == "muon-0.2-7" and not resumed
        result = {"stopped": stopped, "val_loss": loss, "step": 2, "tokens": 9}
        (run / "result.json").write_text(json.dumps(result))
        print(*words)

    monkeypatch.setattr(sweep, "command", pretended)
    monkeypatch.setattr(sweep, "preload", lambda: None)
    words = ["optimizers", str(tmp_path / "sweep"), "--rates", "0.1", "0.2", "--seeds", "7", "8"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(tmp_path / "found.json")])
    with pytest.raises(RuntimeError, match=r"muon-0\.2-7 did not train to its end"):
        optimizers.main()
    assert (tmp_path / "sweep" / "adamw-0.1-7" / "processor_seconds").is_file()
    optimizers.main()
    said = capsys.readouterr().out
    assert "| muon | 0.2 | 0.2000 | 0.2000 | 0.2000 |" in said and "Not run" not in said
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert results["adamw"]["0.1"].keys() == {"7", "8"}
    # Numbers stay, weights and outputs do not.
    assert not list((tmp_path / "sweep").glob("*/checkpoints"))
    assert not list((tmp_path / "sweep").glob("*.log"))
    (tmp_path / "sweep" / "muon-0.1-8" / "result.json").unlink()
    monkeypatch.setattr(sys, "argv", [*words, "--report"])
    optimizers.main()
    assert "Not run: muon-0.1-8." in capsys.readouterr().out


def test_a_sweep_of_attentions_takes_over_what_was_trained_elsewhere(tmp_path):
    told = {"steps": 100, "results": {"scc": {"7": {"val_loss": 1.5}, "9": {"val_loss": 1.0}}}}
    (tmp_path / "told.json").write_text(json.dumps(told))
    earlier = attentions.known(tmp_path / "told.json", 100)
    found = attentions.gather(tmp_path, ["dense", "scc"], [7, 8], earlier)
    assert found == {"dense": {}, "scc": {7: {"val_loss": 1.5}}}
    assert ("scc", 7) not in attentions.missing(found, list(found), [7, 8])
    with pytest.raises(SystemExit, match="of runs of 100 steps, these have 300"):
        attentions.known(tmp_path / "told.json", 300)


@pytest.mark.parametrize("variant", attentions.VARIANTS)
def test_every_attention_that_is_compared_can_be_trained(variant):
    words = attentions.words_of(variant, 1, 100)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        asked = complete(compose("train", overrides=[setting(word) for word in words]))
    run = parse(plain(asked), 1)
    assert (run.train.num_steps, run.train.seq_len) == (100, 2048)
    # What an index learns before it chooses is a fifth.
    told = run.attention.arguments
    learning = told.get("index_steps") or told.get("dense_steps", 0)
    assert learning == (20 if variant in ("scc_index", "dsa", "msa", "qsa", "csa", "v4") else 0)


@pytest.mark.parametrize("variant", adapted.VARIANTS)
def test_every_attention_that_a_published_model_is_adapted_to_can_be_trained(variant):
    words = adapted.words_of(variant, 1, 100, Path("model"))
    assert {"init.path=model", "seed=1", "train.num_steps=100"} <= {*words}
    rest = [setting(word) for word in words if not word.startswith("init.")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        asked = complete(compose("train", overrides=[*rest, "model.max_seq_len=1024"]))
    run = parse(plain(asked), 1)
    arguments = run.attention.arguments
    assert run.optim.freeze == ("mlp", "embedding")
    assert "optim.freeze=[mlp,embedding]" not in adapted.words_of(variant, 1, 100, Path("m"), True)
    if variant in ("msa", "qsa", "dsa"):
        spans = {"msa": 32, "qsa": 4, "dsa": 1}
        assert (arguments["top_k"] * spans[variant], arguments["dense_steps"]) == (256, 20)
    elif variant != "dense":
        window = SparseAttentionSpec(block_size=32, window_size=arguments["window_size"])
        blocks = window.num_local_blocks + arguments["top_k"] + arguments["num_sink_blocks"]
        assert blocks * 32 == 256


def test_losses_of_rows_before_and_after_are_told_with_intervals(tmp_path):
    """Two rows of ten and thirty targets; differences of 0.1 and 0.3 nats, then 0.1 both."""
    for name, before, after in (
        ("dense", (2.0, 3.0), (1.0, 2.0)),
        ("drop", (2.1, 3.3), (1.1, 2.1)),
    ):
        run = tmp_path / f"{name}-7"
        run.mkdir()
        (run / "result.json").write_text(json.dumps({"stopped": False}))
        for file, (one, other) in ((adapted.BEFORE, before), (adapted.AFTER, after)):
            sums = {"sums": [one * 10, other * 30], "counts": [10, 30]}
            (run / file).write_text(json.dumps(sums))
    told = adapted.by_rows(tmp_path, 7)
    # 0.25 and 1.96 sqrt(2 * (1.5^2 + 1.5^2)) / 40; the second has no spread.
    assert (
        "| drop | 3.0000 | +0.2500 [+0.1030, +0.3970] | 1.8500 | +0.1000 [+0.1000, +0.1000] |"
        in told
    )
    assert "| dense | 2.7500 |  | 1.7500 |  |" in told
    # Without dense attention there is nothing to compare with.
    (tmp_path / "dense-7").rename(tmp_path / "elsewhere")
    assert "| drop | 3.0000 |  | 1.8500 |  |" in adapted.by_rows(tmp_path, 7)


def test_attentions_are_compared_over_the_seeds_that_both_have():
    numbers = {"processor_seconds": 2.0}
    found: attentions.Results = {
        "dense": {7: {"val_loss": 2.0, **numbers}, 8: {"val_loss": 2.2, **numbers}},
        "scc": {7: {"val_loss": 1.9, **numbers}, 8: {"val_loss": 2.0, **numbers}},
        "dsa": {7: {"val_loss": 2.5, **numbers}},
    }
    # Differences -0.1 and -0.2, as above.
    table = attentions.table(found, [7, 8])
    assert "| scc | 1.9000 | 2.0000 | 1.9500 | -0.1500 ± 0.6353 | 2 |" in table
    assert "| dsa | 2.5000 |  | 2.5000 | +0.5000 (one seed) | 2 |" in table
    assert attentions.missing(found, list(found), [7, 8]) == [("dsa", 8)]


@pytest.mark.parametrize("variant", recall.RULES)
def test_every_rule_learns_the_recall_task(variant, monkeypatch):
    """Both stages of an index, in little: each step changes every parameter that it should."""
    monkeypatch.setattr(recall, "BATCH_SIZE", 1)
    ((model, found),) = recall.train(variant, 0, 2, length=96, eval_sequences=1)
    assert math.isfinite(found["loss"]) and model.layers[0].rule is not None
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("span", "low", "high"), [(0, 6, 16), (9, 2.2, 3.2), (22, 1.5, 2.1)])
def test_queries_that_turn_slowly_select_as_those_of_trained_models_do(span, low, high):
    """The rows of the bench that are called alike, on a document of 8,192 tokens."""
    generator, length = torch.Generator().manual_seed(1), 8192
    q = torch.randn(length, 8, 64, generator=generator)
    k, v = torch.randn(2, length, 1, 64, generator=generator)
    if span:
        q = slowly(q, span)
        # Blends keep the size of what they are made of.
        assert 0.95 < float(q.std()) < 1.05
    last = torch.arange(length - 512, length)
    bounds = torch.tensor([0, length])
    found = sparse_attention(q[last], k, v, bounds, SparseAttentionSpec(), queries=last)
    different, of_one = union_counts(found.selected, 16)
    assert low < float(different / of_one) < high


def generated(budget: float, rows: int, loss: tuple[float, ...], rate: tuple[float, ...]) -> dict:
    """What launch.benchmark says of a budget in a cell. loss: difference and its interval; rate:
    likewise, a ratio.
    """
    ratio = dict(zip(("median", "low", "high"), rate, strict=True))
    return {
        "budget": budget,
        "rows": rows,
        "context": 8,
        "decode_experts": budget,
        "distinct_experts": 4.0,
        "decode_flops_per_token": 2e6 + 1e6 * budget,
        "decode_bytes_per_token": 4e6,
        "itl_p50_ms": 5.0,
        "ttft_p50_ms": 7.0,
        "tokens_per_second": 100.0,
        "ratios": {"itl_p50": ratio, "tokens_per_second": ratio},
        "loss": {
            "experts_per_token": budget,
            "val_loss": 4.0,
            "low": 3.9,
            "high": 4.1,
            "flops_per_token": 3e6,
            **dict(zip(("difference", "difference_low", "difference_high"), loss, strict=True)),
        },
    }


MEASURED = [
    generated(3, 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    generated(1, 1, (0.02, 0.01, 0.03), (1.2, 1.1, 1.3)),
    generated(3, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    generated(1, 8, (0.02, 0.01, 0.03), (1.01, 0.99, 1.02)),
]


def test_a_table_of_budgets_runs_what_is_missing_and_says_what_its_intervals_say(
    tmp_path, monkeypatch
):
    """Its stages, with commands that only say how they were asked for."""
    asked: list[list[str]] = []

    def pretended(command: str, words: list[str], log: Path) -> None:
        asked.append([command, *words])
        settings = dict(word.split("=", 1) for word in words)
        if command == "benchmark":
            found = {
                "measured": MEASURED,
                "prompts": "held-out text",
                "device": {"device": "CPU", "flops": 1e9, "num_bytes": 1e9, "source": "measured"},
            }
            Path(settings["output"]).write_text(json.dumps(found))
        if command == "train":
            run = Path(settings.get("resume") or settings["run_dir"])
            (run / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
            result = {"stopped": "resume" not in settings, "step": 2, "tokens": 2048}
            (run / "result.json").write_text(json.dumps(result))

    size = {"parameters": 7e6, "experts": 8, "moe_layers": 3, "shared_experts": 1, "seq_len": 256}
    size["trained_budget"] = 2.0
    monkeypatch.setattr(budget_table, "call", pretended)
    monkeypatch.setattr(budget_table, "size_of", lambda run: size)
    words = ["budget_table", str(tmp_path / "f"), "--budgets", "1", "3", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", words)

    # The training is stopped on its way, and taken up by the next call.
    with pytest.raises(RuntimeError, match=r"quickstart-2-1234 did not train to its end"):
        budget_table.main()
    budget_table.main()
    assert [one[0] for one in asked] == ["train", "train", "evaluate", "benchmark"]
    assert "router=threshold" in asked[0] and asked[1] == [
        "train",
        f"resume={tmp_path / 'f' / 'quickstart-2-1234'}",
    ]
    # Ratios are to the first variant.
    assert "router.budget=[3,1]" in asked[2] and "budgets=[3,1]" in asked[3]

    page = (tmp_path / "f" / "budgets.md").read_text()
    assert str(tmp_path) not in page and "The upcycled real model was not run" in page
    assert "| 1 | 1.000 | 4.0000 [3.900, 4.100] | +0.0200 [+0.0100, +0.0300] | higher |" in page
    assert "1 instead of 3 experts changes it by +0.0200 nats [+0.0100, +0.0300]: higher." in page
    assert "takes 0.60 of the FLOPs and 1.00 of the bytes" in page
    assert "are 1.200 [1.100, 1.300] of those at 3: faster." in page
    assert "are 1.010 [0.990, 1.020] of those at 3: undecided." in page
    assert json.loads((tmp_path / "f" / "budgets.json").read_text())[0]["size"] == size

    # Nothing is run twice; another question is asked anew.
    budget_table.main()
    assert len(asked) == 4
    monkeypatch.setattr(sys, "argv", [*words, "--rows", "1"])
    budget_table.main()
    assert [one[0] for one in asked[4:]] == ["evaluate", "benchmark"]


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-2.0, -1.0, "lower"),
        (1.0, 2.0, "higher"),
        (-1.0, 1.0, "undecided"),
        (0.0, 1.0, "undecided"),
        (None, None, "undecided (no interval)"),
    ],
)
def test_a_verdict_is_what_its_interval_decides(low, high, told):
    assert budget_table.verdict(low, high, 0.0, "lower", "higher") == told


def test_a_table_of_budgets_without_its_dense_model_says_how_to_get_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["budget_table", str(tmp_path), "--dense", "nowhere"])
    with pytest.raises(SystemExit):
        budget_table.main()
    assert "python -m bench.small_model --to nowhere" in capsys.readouterr().err


def test_the_best_rate_is_the_vertex_of_a_parabola_where_it_has_neighbours():
    losses = {2.0**x: (x - 0.3) ** 2 + 1 for x in range(-3, 4)}
    best, inside = widths.vertex(losses)
    assert inside and best == pytest.approx(2**0.3)
    assert widths.vertex({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}) == (1.0, False)


def test_a_best_rate_that_moves_and_one_that_stays_are_told_apart():
    """Made losses: at the first width best at 4, under the ordinary rules at 1 for four times the
    width.
    """
    rates, found = [1.0, 2.0, 4.0, 8.0], {}
    for seed in (1, 2):
        for rule, width, best in (("mup", 64, 4), ("mup", 256, 4), ("ordinary", 256, 1)):
            for rate in rates:
                loss = 2 + abs(math.log2(rate / best)) / 10 + seed / 100
                found[widths.Cell(rule, width, rate, seed)] = loss
    rows = {(r["rule"], r["width"]): r for r in widths.summary(found, [64, 256])}
    assert rows["ordinary", 64]["losses"] == rows["mup", 64]["losses"]
    assert rows["mup", 256]["doublings"] == 0
    assert rows["mup", 256]["cost_of_the_first_widths_rate"] == 0
    assert rows["ordinary", 256]["doublings"] == pytest.approx(-2)
    assert rows["ordinary", 256]["cost_of_the_first_widths_rate"] == pytest.approx(0.2)
    table = widths.tables(found, [64, 256], rates)
    assert (
        "| ordinary | 256 | **2.0150** | 2.1150 | 2.2150 | 2.3150 | 1 or beyond | -2.00 |" in table
    )

    # A rate that one seed alone has does not change the means of the others.
    found[widths.Cell("mup", 256, 4.0, 3)] = 9.0
    assert widths.summary(found, [64, 256])[3]["cost_of_the_first_widths_rate"] == 0


@pytest.mark.slow
def test_a_sweep_of_widths_goes_on_and_both_rules_are_one_model_at_the_first(
    tmp_path, monkeypatch, capsys
):
    words = ["widths", str(tmp_path / "cells"), "--widths", "32", "64", "--rates", "4e-3", "8e-3"]
    words += ["--steps", "2", "--seeds", "1"]
    trained = []
    real = widths.train

    def counted(cell, base, steps):
        trained.append(cell.name)
        return real(cell, base, steps)

    monkeypatch.setattr(widths, "train", counted)
    monkeypatch.setattr(sys, "argv", words)
    widths.main()
    assert len(trained) == 6 and trained[0] == "mup-32-0.004-1"
    (tmp_path / "cells" / "ordinary-64-0.008-1.json").unlink()
    monkeypatch.setattr(sys, "argv", [*words, "--report"])
    widths.main()
    assert "Not run: ordinary-64-0.008-1." in capsys.readouterr().out
    found = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(found)])
    widths.main()
    assert trained[6:] == ["ordinary-64-0.008-1"]
    cells = json.loads(found.read_text())["cells"]
    ordinary = real(widths.Cell("ordinary", 32, 4e-3, 1), 32, 2)
    assert ordinary["val_loss"] == cells["mup-32-0.004-1"]
    monkeypatch.setattr(sys, "argv", [*words[:-3], "3", "--seeds", "1"])
    with pytest.raises(ValueError, match="give another folder"):
        widths.main()
