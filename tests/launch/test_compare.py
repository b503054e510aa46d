"""launch.compare: equal FLOPs, what is run and run again, what is decided, and its page."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from launch.comparing import work
from launch.comparing.cost import Rate, is_open, seconds_left
from launch.comparing.decision import Candidate, decide
from launch.comparing.grid import cells_of, not_the_same, of_the_runs
from launch.comparing.intervals import Difference, difference, holm, t_probability, t_quantile
from launch.comparing.page import orders, plots, render, risks, rows_of
from launch.comparing.result import mean_interval
from launch.comparing.settings import CompareConfig
from launch.comparing.work import Outcome
from launch.config.build import ConfigError
from launch.process.exits import IN_USE
from launch.process.identity import ROOT

SMALL = (
    *("train.num_steps=40", "train.seq_len=64", "train.global_batch_size=4"),
    *("train.micro_batch_size=4", "parallel=single", "optim.warmup_steps=2"),
)


@functools.cache
def grid(*common: str, **settings):
    asked = CompareConfig(**{"variants": ("top_k", "dense"), "seeds": 2, **settings})
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cells_of(asked, [*SMALL, *common])


# --- how sure -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "degrees", "table"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.95, 5, 2.0150),
        (0.99, 10, 2.7638),
        (0.995, 30, 2.7500),
    ],
)
def test_students_t_is_that_of_the_tables(probability, degrees, table):
    assert t_quantile(probability, degrees) == pytest.approx(table, abs=5e-5)
    assert t_probability(table, degrees) == pytest.approx(probability, abs=1e-5)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-table, abs=5e-5)


def simulated(draw: np.random.Generator, seeds: int, of_seed: float, of_text: float) -> Difference:
    """Losses of 100 rows of 50 targets whose true difference is 0.1 nats."""
    counts = np.full(100, 50.0)
    text = draw.normal(0, of_text, 100)
    base = [draw.normal(200, 20, 100) for _ in range(seeds)]
    ours = [
        one + counts * (0.1 + draw.normal(0, of_seed)) + 50 * (text + draw.normal(0, 0.01, 100))
        for one in base
    ]
    return difference(ours, base, counts)


@pytest.mark.parametrize(
    ("of_seed", "of_text", "least", "most"),
    [(0.05, 0.0, 0.935, 0.975), (0.05, 0.2, 0.935, 1.0), (0.0, 0.5, 0.95, 1.0)],
)
def test_paired_interval_covers(of_seed, of_text, least, most):
    """95% where seeds alone differ; never fewer where the text does as well."""
    draw = np.random.default_rng(1)
    found = [simulated(draw, 3, of_seed, of_text).interval() for _ in range(2000)]
    assert least <= np.mean([low <= 0.1 <= high for low, high in found]) <= most


def test_a_difference_is_paired_by_seed_and_by_row():
    counts = np.array([10.0, 30.0, 0.0])
    base = [np.array([20.0, 90.0, 0.0]), np.array([25.0, 80.0, 0.0])]
    found = difference([base[0] + [1, 3, 0], base[1] + [3, 9, 0]], base, counts)
    assert found.by_seed == (0.1, 0.3) and found.mean == pytest.approx(0.2)
    # every row has the same difference per token, so the text says nothing against it
    assert found.text_error == pytest.approx(0.0, abs=1e-12)
    assert found.error() == pytest.approx(np.std([0.1, 0.3], ddof=1) / math.sqrt(2))


def test_one_seed_has_no_interval():
    found = Difference(-0.5, (-0.5,), 0.01)
    assert found.interval() == (-math.inf, math.inf) and found.below(0.0) == 0.5
    assert found.seeds_for(0.1, 0.95) is None and mean_interval([4.0]) == (None, None)


def test_seeds_for_is_the_first_number_that_suffices():
    found = Difference(-0.02, (-0.05, 0.0, -0.01), 0.002)
    number = found.seeds_for(0.02, 0.95)
    halves = [t_quantile(0.95, n - 1) * found.error(n) for n in range(2, number + 1)]
    assert halves[-1] <= 0.02 < halves[-2]
    assert Difference(-0.02, (-0.05, 0.0, -0.01), 0.02).seeds_for(0.02, 0.95) is None


def test_holm_is_that_of_a_calculation_by_hand():
    # three statements: errors 0.01, 0.02, 0.04 against 0.05/3, 0.05/2, 0.05
    assert holm([0.98, 0.99, 0.96]) == [True, True, True]
    # 0.02 against 0.0167: the surest one fails, and the others with it
    assert holm([0.98, 0.97, 0.96]) == [False, False, False]
    assert holm([0.96, 0.99]) == [True, True] and holm([]) == []


# --- what is decided ------------------------------------------------------------------------------


def candidate(name: str, *by_seed: float, cost: float | None = 1.0, **more) -> Candidate:
    found = Difference(float(np.mean(by_seed)), by_seed, 0.001) if by_seed else None
    return Candidate(name, found, cost, 60.0, **more)


def decided(*candidates: Candidate, first_failed: int = 0, pairs=None):
    return decide("top_k", candidates, 0.01, "flops", 0.1, 60.0, first_failed, pairs)


def test_a_lower_loss_is_recommended():
    found = decided(candidate("a", -0.1, -0.11, -0.09), candidate("b", 0.2, 0.0, -0.2))
    assert (found.kind, found.variant) == ("recommended", "a")
    assert "-0.1000" in found.reasons[0] and "3 seeds" in found.reasons[0]


def test_a_winner_that_is_not_told_apart_from_another_says_so():
    a, b = candidate("a", -0.1, -0.11, -0.09), candidate("b", -0.1, -0.10, -0.09)
    between = Difference(-0.003, (0.0, -0.01, 0.0), 0.001)
    found = decided(a, b, pairs={("a", "b"): between, ("b", "a"): between})
    assert found.variant == "a" and "not told apart from b" in found.reasons[1]


def test_the_same_loss_for_less_cost_is_recommended():
    found = decided(candidate("a", 0.001, 0.002, 0.0, cost=0.8))
    assert (found.kind, found.variant) == ("recommended", "a") and "0.80" in found.reasons[1]
    # the cost of an interval that reaches too far is none
    assert decided(candidate("a", 0.001, 0.002, 0.0, cost=0.95)).variant == "top_k"


def test_the_first_stays_where_no_other_can_gain():
    found = decided(candidate("a", 0.1, 0.11, 0.09), candidate("b", 0.0, 0.001, -0.001))
    assert (found.kind, found.variant) == ("recommended", "top_k")
    assert any("its loss is higher" in reason for reason in found.reasons)


def test_compare_says_undecided():
    found = decided(candidate("a", -0.05, 0.03, 0.0))
    assert (found.kind, found.variant) == ("undecided", None)
    # its mean is -0.0067 and the margin 0.01: whichever bound is nearer decides
    spread = np.std([-0.05, 0.03, 0.0], ddof=1)
    needed = next(
        n
        for n in range(2, 1000)
        if t_quantile(0.95, n - 1) * math.sqrt(spread**2 / n + 1e-6) <= 0.02 / 3
    )
    assert found.more_seeds == needed - 3 and found.more_seconds == 120.0 * found.more_seeds
    assert f"{found.more_seeds} more seeds cost" in found.sentence and "hours" in found.sentence


def test_one_seed_asks_for_another():
    found = decided(candidate("a", -0.5))
    assert found.kind == "undecided" and "one more seed" in found.sentence
    assert found.more_seconds == 120.0


def test_more_seeds_are_not_promised_where_the_text_is_too_short():
    short = Candidate("a", Difference(0.0, (-0.001, 0.0, 0.001), 0.5), 1.0, 60.0)
    found = decided(short)
    assert found.kind == "undecided" and found.more_seeds is None
    assert "would not decide it" in found.sentence and "0.5000 nats" in found.reasons[0]


def test_a_variant_that_failed_is_never_recommended_and_named():
    failed = Candidate("a", None, None, 0.0, failed=2)
    found = decided(failed, candidate("b", 0.1, 0.11, 0.09))
    assert found.variant == "top_k" and "a is out: 2 of its runs failed." in found.reasons
    assert decided(failed).kind == "failed"


def test_nothing_is_decided_without_the_first():
    found = decided(candidate("a", -0.1, -0.11, -0.09), first_failed=1)
    assert (found.kind, found.variant) == ("failed", None) and "top_k" in found.sentence


# --- what is run ----------------------------------------------------------------------------------


def test_every_run_of_a_size_spends_the_same_flops():
    cells = grid("model.intermediate_size=128", sizes=())
    dense = next(cell for cell in cells if cell.variant == "dense")
    first = cells[0]
    assert first.run.train.num_steps == 40
    # its token costs far less, so it sees more of them
    assert dense.flops_per_token < 0.8 * first.flops_per_token
    assert dense.run.train.num_steps > 50
    a_step = 4 * 64 * dense.flops_per_token
    assert abs(dense.flops - first.flops) <= a_step / 2
    assert [cell.seed for cell in cells] == [1234, 1234, 1235, 1235]
    assert len({cell.name for cell in cells}) == 4


def test_flops_may_be_given_and_sizes_crossed():
    cells = grid("seed=7", sizes=("tiny", "small"), flops=2e11, seeds=1)
    assert [c.name for c in cells] == [
        "tiny-top_k-7",
        "tiny-dense-7",
        "small-top_k-7",
        "small-dense-7",
    ]
    for cell in cells:
        assert abs(cell.flops - 2e11) <= 4 * 64 * cell.flops_per_token / 2
    assert cells[0].run.model.hidden_size == 64 and cells[2].run.model.hidden_size == 128


@pytest.mark.parametrize(
    ("common", "settings", "told"),
    [
        ((), {"variants": ("top_k", "densee")}, "there is no conf/variant/densee.yaml; choices: "),
        (("router=threshold",), {}, "router is typed for all runs and set by variant top_k"),
        (("model.hidden_size=64",), {"sizes": ("tiny",)}, "model.hidden_size is typed for all"),
        (("variant=dense",), {}, "give variants="),
        (("init.path=x",), {}, "begin from nothing"),
        (("train.num_epochs=2",), {}, "give train.num_steps or train.num_tokens"),
        (("train.stop_after_step=2",), {}, "every run goes to its end"),
        (("launch=slurm",), {}, "launch=slurm"),
        (("router.budget=2",), {}, "variant top_k: router.budget is no setting of"),
    ],
)
def test_what_does_not_compare_is_refused_before_anything_runs(common, settings, told):
    with pytest.raises(ConfigError) as error:
        grid(*common, **settings)
    assert told in str(error.value)


def test_a_variant_that_changes_what_is_compared_is_refused():
    """Rows of another length have other losses."""
    one, other = grid()[0], grid("train.seq_len=32")[0]
    found = not_the_same({(None, "one"): one, (None, "other"): other})
    assert [line.partition(";")[0] for line in found] == [
        "variant other has another seq_len (32 instead of 64)",
    ]
    assert not_the_same({(None, "one"): one, (None, "other"): grid("optim.lr=0.001")[0]}) == []


def test_settings_of_the_comparison_are_told_from_those_of_the_runs():
    typed = ["++speed.rows=2", "variants=[dense]", "data=files", "++train.num_steps=3"]
    assert of_the_runs([*typed, "resume=X", "launch.dry_run=true"]) == typed[2:]


# --- what became of it ----------------------------------------------------------------------------


@pytest.fixture
def cells():
    return grid(seeds=1)


class Trainer:
    """launch.train as the runner sees it: what it was asked, and what it leaves behind."""

    def __init__(self, monkeypatch, cells, *codes: int):
        self.asked, self.cells, self.codes, self.ends = [], cells, list(codes), False
        monkeypatch.setattr(work, "run_child", self.run)

    def run(self, command, log):
        self.asked.append(command[3:])
        code = self.codes.pop(0)
        log.write_text("loading\nerror: the disk said no\n" if code else "fine\n")
        cell = next(c for c in self.cells if c.name == log.stem)
        run_dir = log.parent.parent / "runs" / cell.name
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cell.config, run_dir / "config.yaml")
        if not code or self.ends:
            record = {"step": cell.run.train.num_steps, "stopped": False, "val_loss": 5.0}
            (run_dir / "result.json").write_text(json.dumps(record))
        return code


def test_a_finished_run_is_known_and_a_failed_one_keeps_its_reason(tmp_path, cells, monkeypatch):
    trainer = Trainer(monkeypatch, cells, 0, 70)
    one, other = cells
    assert work.outcome_of(tmp_path, one) is None
    assert work.run_cell(tmp_path, one).state == "done"
    assert work.run_cell(tmp_path, other).state == "failed"
    assert "variant=dense" in trainer.asked[1] and any("run_dir=" in a for a in trainer.asked[1])

    # as another process finds them
    assert work.outcome_of(tmp_path, one).state == "done"
    found = work.outcome_of(tmp_path, other)
    assert (found.state, found.code, found.lines) == ("failed", 70, ("error: the disk said no",))
    assert not is_open(work.outcome_of(tmp_path, one), retry_failed=True)
    assert not is_open(found, retry_failed=False) and is_open(found, retry_failed=True)

    # one that trained to its end and failed behind it has ended
    trainer.codes, trainer.ends = [1], True
    assert work.run_cell(tmp_path, other).state == "done"

    # a lost record does not make a finished run run again, and a record alone does not finish one
    (tmp_path / "outcomes" / f"{one.name}.json").unlink()
    assert work.outcome_of(tmp_path, one).state == "done"
    (tmp_path / "runs" / one.name / "result.json").unlink()
    assert is_open(work.outcome_of(tmp_path, one), retry_failed=False)


def test_a_run_that_began_goes_on_or_begins_anew(tmp_path, cells, monkeypatch):
    trainer = Trainer(monkeypatch, cells, 70, 0, 0)
    work.run_cell(tmp_path, cells[0])
    # without a checkpoint: what it left stands aside
    assert work.run_cell(tmp_path, cells[0]).state == "done"
    assert [p.name for p in (tmp_path / "begun").iterdir()] == [f"{cells[0].name}-0"]
    assert "variant=top_k" in trainer.asked[1]
    # with one: it is resumed
    monkeypatch.setattr(work, "newest_complete", lambda run_dir: run_dir)
    work.run_cell(tmp_path, cells[0])
    assert [a.partition("=")[0] for a in trainer.asked[2]] == ["resume"]


def test_a_run_that_another_process_works_on_is_no_failure(tmp_path, cells, monkeypatch):
    Trainer(monkeypatch, cells, IN_USE)
    with pytest.raises(ValueError, match="at work in another process"):
        work.run_cell(tmp_path, cells[0])
    assert work.outcome_of(tmp_path, cells[0]) is None


def test_runs_under_other_settings_are_found(tmp_path, cells, monkeypatch):
    Trainer(monkeypatch, cells, 0)
    work.run_cell(tmp_path, cells[0])
    assert work.changed(tmp_path, cells) == []
    (line,) = work.changed(tmp_path, grid("optim.lr=0.5", "optim.weight_decay=0.2", seeds=1))
    assert "optim.lr=0.0003" in line and "0.5 now" in line and "1 other setting" in line


def test_the_time_left_is_as_runs_of_its_kind_took(cells):
    a, b = grid(seeds=2)[::2], grid(seeds=2)[1::2]
    rate = Rate(1e9, 10.0, "assumed")
    assert seconds_left([*a, *b], {}, rate, False) == pytest.approx(
        sum(10 + c.flops / 1e9 for c in (*a, *b))
    )
    outcomes = {a[0].name: Outcome("done", 100.0), b[0].name: Outcome("failed", 5.0, 1)}
    scale = 100.0 / rate.seconds(a[0])
    expected = 100.0 + scale * rate.seconds(b[1])  # the failed one is not run again
    assert seconds_left([*a, *b], outcomes, rate, False) == pytest.approx(expected)


# --- the page -------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=document.title='hit'>"


def entry(variant: str, loss: float | None, flops: float, failures=()) -> dict:
    known = loss is not None
    return {
        "variant": variant,
        "runs": 3,
        "done": 3 - len(failures),
        "failures": list(failures),
        "losses": [loss] * 3 if known else [],
        "seeds": [1, 2, 3] if known else [],
        "loss": loss,
        "loss_low": loss - 0.02 if known else None,
        "loss_high": loss + 0.02 if known else None,
        "difference": None,
        "parameters": 427_648,
        "active_parameters": 280_192,
        "router": "top_k",
        "attention": "dense",
        "num_steps": 40,
        "tokens": 10_240,
        "training_flops_per_token": 3 * flops,
        "training_flops": 2e11,
        "training_flops_spent": 2.1e11 if known else None,
        "experts_per_token": 2.0 if known else None,
        "flops_per_token": flops if known else None,
        "memory_bytes": 1.7e6,
        "training_memory_bytes": 9e6,
        "seconds_per_run": 61.0 if known else None,
        "speed": {
            "itl_p50": flops / 1e8,
            "itl_low": flops / 1.1e8,
            "itl_high": flops / 0.9e8,
            "ttft_p50": 0.02,
            "tokens_per_second": 400.0,
            "ratio": 1.0,
            "ratio_low": 0.9,
            "ratio_high": 1.1,
            "decode_experts": 2.0,
            "distinct_experts": 5.0,
            "rounds": 6,
        }
        if known
        else None,
        "risks": {
            "alarms": [],
            "fallback": 0.0,
            "dropped": 0.03 if known else None,
            "max_vio": 0.2,
            "skipped_steps": None,
            "attention_error": None,
        },
    }


def made_up() -> dict:
    """A comparison in which one variant is better, and one has failed with an attack."""
    broken = [
        {"run": f"tiny-odd-{i}", "state": "failed", "code": -9, "lines": [HOSTILE]}
        for i in range(3)
    ]
    better = {**entry("adaptive", 4.9, 0.6e6), "difference": None}
    better["difference"] = {
        "mean": -0.1,
        "low": -0.12,
        "high": -0.08,
        "by_seed": [-0.1] * 3,
        "spread": 0.01,
        "text_error": 0.001,
        "better": 0.999,
    }
    sizes = [
        {
            "size": size,
            "variants": [
                entry("top_k", 5.0 + shift, 0.7e6),
                {**better, "loss": 4.9 + shift},
                entry("odd", None, 0.7e6, broken),
            ],
        }
        for size, shift in (("tiny", 0.3), ("small", 0.0))
    ]
    return {
        "question": f"Is it worth it? {HOSTILE}",
        "first": "top_k",
        "variants": ["top_k", "adaptive", "odd"],
        "seeds": 3,
        "margin": 0.01,
        "cost": "flops",
        "saving": 0.1,
        "largest": "small",
        "sizes": sizes,
        "decision": {
            "kind": "recommended",
            "variant": "adaptive",
            "sentence": "Take adaptive: its loss is lower than that of top_k.",
            "reasons": ("It is lower.", "odd is out: 3 of its runs failed."),
            "flips": "New seeds.",
            "more_seeds": None,
            "more_seconds": None,
        },
        "differing": [{"setting": "router.name", "values": ["top_k", "threshold", "odd"]}],
        "effort": {
            "runs": 18,
            "done": 12,
            "failed": 6,
            "seconds": 732.0,
            "device_hours": 0.2,
            "flops": 2.4e12,
        },
        "batch": {"seq_len": 64, "global_batch_size": 4},
        "speed": {"rows": 8, "context": 64, "new_tokens": 32},
        "incomparable": None,
        "target": {
            "overrides": "experiment=olmoe_1b_7b",
            "device": "H100",
            "mfu": 0.3,
            "plans": {
                "top_k": {"parameters": 6.9e9, "memory_bytes": 9e10, "fits": False},
                "adaptive": {"parameters": 6.9e9, "memory_bytes": 9e10, "fits": True},
                "odd": {"problems": ["model.top_k is 0"]},
            },
        },
    }


def test_the_page_shows_what_failed_and_escapes_it():
    page = render(made_up())
    assert page.count('data-run="tiny-odd-') == 6 and "signal 9" in page
    assert HOSTILE not in page and "&lt;img src=x" in page
    assert "Take adaptive" in page and "odd is out" in page and "model.top_k is 0" in page


def test_numbers_stand_in_the_table_as_they_were_measured():
    result = made_up()
    rows = {row.label: row.cells for row in rows_of(result["sizes"][1], result)}
    assert rows["runs that ended"] == ("3 of 3", "3 of 3", "0 of 3")
    assert rows["difference to top_k"] == ("–", "-0.1000 [-0.1200, -0.0800]", "–")
    assert rows["held-out loss, nats per token"][2] == "–"
    assert rows["latency per token (ITL)"] == ("7 ms", "6 ms", "–")
    assert orders(result)[0] == ("tiny", ["adaptive", "top_k"])
    said = risks(result)
    assert any("assignments dropped 3%" in line for line in said)
    assert any("spent +5.0% of the planned FLOPs" in line for line in said)
    assert [len(axis["points"]) for axis in plots(result)["axes"]] == [4, 4, 4]
