"""python -m launch.report: what the page says is what the run's files say, and no run or text
breaks it.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.page.numbers import fmt
from launch.report import command
from launch.report.page import KPIS, load_levels, run_names
from launch.runs.loads import _deciles
from launch.runs.records import Curve, evenly, spans
from launch.runs.run import read_run
from model.cost.parameters import flops_per_token
from ops.router import RouterOutput
from train.audit.format import FOLDER
from train.audit.log import AuditLog
from train.config.watching import AuditConfig

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")
LAYERS, EXPERTS, TOKENS = (1, 2, 3), 8, 1000


@lru_cache
def composed(*overrides: str) -> str:
    with initialize_config_dir(CONF, version_base="1.3"):
        return OmegaConf.to_yaml(
            compose(
                "train",
                overrides=[
                    "model.vocab_size=300",
                    f"model.num_layers={max(LAYERS) + 1}",
                    f"model.num_experts={EXPERTS}",
                    "model.num_dense_layers=1",
                    *overrides,
                ],
            )
        )


def write_config(folder: Path, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(composed(*overrides))
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def make_run(folder: Path, *overrides: str, steps: int = 20, collapse: int | None = None) -> Path:
    """A run as training leaves it, every step logged. collapse: from this step on, expert 5 of
    layer 3 takes nearly all.
    """
    write_config(folder, *overrides)
    rng = np.random.default_rng(steps)
    metrics, routing = [], []
    for step in range(1, steps + 1):
        counts = rng.integers(200, 300, (len(LAYERS), EXPERTS))
        if collapse is not None and step >= collapse:
            counts[2] = 12
            counts[2, 5] = 916
        histogram = np.zeros((len(LAYERS), EXPERTS + 1), int)
        histogram[:, 1], histogram[:, 2] = 10 * step, TOKENS - 10 * step
        at = {"step": step, "tokens": TOKENS * step}
        metrics.append(
            {
                **at,
                "train/loss": 6 - 0.1 * step,
                "train/lr": 1e-3,
                "train/grad_norm": 1.0 + 0.01 * step,
                "moe/max_vio": float((counts.max(1) / counts.mean(1) - 1).mean()),
                "moe/dead_experts": 0,
                "moe/experts_per_token": 1.9,
                "moe/budget_error": -0.05,
                "moe/expert_flops_per_token": 1000.0 * step,
                "moe/load_entropy": 2.05,
                "moe/fallback/capped": 0.001 * step,
                "moe/fallback/empty": 0,
                "perf/tokens_per_second": 1000.0 + step,
                "perf/step_seconds": 0.5,
                "perf/memory_gib": 1.25,
            }
        )
        routing.append(
            {
                **at,
                "counts": counts.tolist(),
                "k_histogram": histogram.tolist(),
                "reasons": [[0] * 8] * len(LAYERS),
            }
        )
        if step == max(1, steps // 2):
            metrics.append(
                {**at, **{f"eval/experts_per_token/loss_{d}": 1 + 0.1 * d for d in range(10)}}
            )
    metrics.append(
        {"step": steps, "tokens": TOKENS * steps, "eval/val_loss": 4.5, "eval/bits_per_byte": 1.75}
    )
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "routing.jsonl", routing)
    return folder


def alarm(step: int, event: str = "raised", **facts: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": TOKENS * step,
        "alarm": "crowded",
        "event": event,
        "value": 3.0,
        "threshold": 1.0,
        "layer": None,
        "expert": None,
        "message": "MaxVio is 3, above 1",
        "action": None,
        **facts,
    }


def build(run: Path | list[Path], capsys, output: Path | None = None, **settings) -> str:
    """The page that `python -m launch.report run=RUN ...` writes."""
    runs = [str(r) for r in run] if isinstance(run, list) else str(run)
    config = OmegaConf.merge(
        OmegaConf.load(Path(CONF) / "report.yaml"),
        {"run": runs, "png": False, "output": output and str(output), **settings},
    )
    command.main(config)  # type: ignore[arg-type]
    return Path(json.loads(capsys.readouterr().out.strip().splitlines()[-1])["output"]).read_text()


def payload(page: str) -> dict[str, Any]:
    return json.loads(
        re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page, re.S)[0]
    )


class Page(HTMLParser):
    """numbers: (data-key, data-run) -> data-value; text: what a reader sees without scripts; tags:
    all start tags.
    """

    def __init__(self, page: str):
        super().__init__()
        self.numbers: dict[tuple[str, str], float] = {}
        self.text, self.tags, self._hidden = "", [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        facts = dict(attrs)
        self._hidden = tag in ("script", "style")
        if "data-key" in facts and "data-value" in facts:
            self.numbers[facts["data-key"], facts["data-run"]] = float(facts["data-value"])

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


def test_numbers_and_curves_are_those_of_the_files(run, capsys):
    page = build(run, capsys)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last, evaluation = records[-2], records[-1]
    numbers = Page(page).numbers
    for key in (
        "train/loss",
        "moe/max_vio",
        "moe/experts_per_token",
        "perf/memory_gib",
        "moe/dead_experts",
    ):
        assert numbers[key, "run"] == last[key]
    for key in ("eval/val_loss", "eval/bits_per_byte"):
        assert numbers[key, "run"] == evaluation[key]
    assert (
        numbers["perf/tokens_per_second/median", "run"] == 1010.5
        and numbers["tokens", "run"] == 20 * TOKENS
    )
    shown = payload(page)["runs"][0]
    grid, values = shown["series"]["moe/max_vio"]
    assert values == pytest.approx(
        [r["moe/max_vio"] for r in records if "moe/max_vio" in r], rel=1e-5
    )
    assert (
        shown["grids"][grid]["step"] == list(range(1, 21))
        and shown["grids"][grid]["tokens"][-1] == 20 * TOKENS
    )


def test_spent_flops_are_integrated_over_tokens(run):
    data = read_run(str(run))
    dense = flops_per_token(
        data.config.model, 0.0, data.config.train.seq_len, data.config.attention.arguments
    )
    expected = np.cumsum([TOKENS * (dense + 3 * 1000.0 * step) for step in range(1, 21)])
    np.testing.assert_allclose(data.flops.values, expected)


def test_a_fixed_router_spends_what_the_plan_says(tmp_path):
    run = make_run(tmp_path / "run", "model.top_k=2")
    data = read_run(str(run))
    visited = (
        6.0
        * data.config.model.hidden_size
        * data.config.model.expert_intermediate_size
        * 2
        * len(LAYERS)
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(
        run / "metrics.jsonl", [{**line, "moe/expert_flops_per_token": visited} for line in lines]
    )
    planned = flops_per_token(data.config.model, 2.0, data.config.train.seq_len)
    assert read_run(str(run)).flops.last == pytest.approx(planned * 20 * TOKENS)


def test_a_collapse_stands_on_the_first_screen(tmp_path, capsys):
    """Without a file of alarms the loads speak for themselves; with one, it decides."""
    run = make_run(tmp_path / "run", steps=50, collapse=40)
    text = Page(build(run, capsys)).text
    assert (
        "1 active alarm" in text
        and "layer 3: expert 5 takes 92% of assignments" in text
        and "since step 40" in text
    )
    write_lines(
        run / "alarms.jsonl",
        [
            alarm(5),
            alarm(9, "cleared"),
            alarm(
                40,
                alarm="collapse",
                layer=3,
                expert=5,
                message="one expert takes all",
                action="stop",
            ),
        ],
        tail='{"step": 50, "al',
    )
    page = build(run, capsys)
    text = Page(page).text
    assert (
        "layer 3: expert 5 takes 92% of assignments (a fair share is 12.5%) since step 40" in text
    )
    assert "one expert takes all; action: stop" in text
    assert "1 past alarm" in text and "MaxVio is 3, above 1 from step 5 to 9" in text
    assert Page(page).numbers["alarms/active", "run"] == 1 and 'class="verdict critical"' in page


def test_an_alarm_that_rings_is_worded_by_the_newest_record(tmp_path, capsys):
    """It was raised at 9% and an expert of layer 1; by now it is worse and elsewhere."""
    run = make_run(tmp_path / "run", steps=50, collapse=40)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {
            "moe/dropped": 0.002 * line["step"],
            "moe/max_vio/layer_1": 1.2,
            "moe/max_vio/layer_3": 6.3 if line["step"] >= 40 else 0.1,
        }
    write_lines(run / "metrics.jsonl", lines)
    raised = alarm(30, alarm="imbalance", value=1.2, layer=1, expert=2, message="then at layer 1")
    write_lines(
        run / "alarms.jsonl",
        [
            alarm(
                10, alarm="dropped", value=0.02, message="dropped: moe/dropped is 0.02, above 0.01"
            ),
            raised,
            alarm(20, alarm="dead_experts", message="over soon"),
            alarm(25, "cleared", alarm="dead_experts"),
        ],
    )
    text = Page(build(run, capsys)).text
    assert "moe/dropped is 0.1, above 0.01 since step 10" in text
    assert "when it was raised: dropped: moe/dropped is 0.02, above 0.01" in text
    assert (
        "layer 3: expert 5 takes 92% of assignments (a fair share is 12.5%) since step 30" in text
    )
    assert (
        "moe/max_vio/layer_3 is 6.3, above 1" in text
        and "when it was raised: then at layer 1" in text
    )
    assert "over soon from step 20 to 25" in text  # one that is over keeps its words


def test_a_healthy_run_has_no_alarm(run, capsys):
    assert "No alarm" in Page(build(run, capsys)).text


def test_an_alarm_that_rings_again_counts_once_per_episode(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    write_lines(
        run / "alarms.jsonl",
        [alarm(2), alarm(4, "cleared"), alarm(8), alarm(12, value=float("nan"), alarm="loss")],
    )
    numbers = Page(build(run, capsys)).numbers
    assert (numbers["alarms/active", "run"], numbers["alarms/past", "run"]) == (2, 1)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{payload}} <!-- "


def test_text_of_a_run_cannot_break_out(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "{{payload}}<b>run")
    write_lines(
        run / "alarms.jsonl",
        [alarm(3, message=HOSTILE), alarm(4, alarm="other", message="key hf_" + "a1" * 12)],
    )
    page = build(run, capsys)
    shown = Page(page)
    assert (
        shown.tags.count("script") == 2
        and "img" not in shown.tags
        and shown.text.count(HOSTILE) == 1
    )
    assert "hf_a1" not in page and "<b>run" not in page
    assert payload(page)["runs"][0]["name"] == "{{payload}}<b>run"


def test_values_of_the_config_are_not_shown(tmp_path, capsys):
    run = make_run(
        tmp_path / "run",
        "+launch.env.MY_WORD=hunter2",
        "tracker.wandb.entity=somebody",
        "data.sources=[{path: text, data_files: 'https://user:sesame@host/x'}]",
    )
    page = build(run, capsys)
    assert not any(word in page for word in ("hunter2", "somebody", "sesame"))


class FakeTexts:
    """Ten words, two sources: even tokens are prose, odd ones code."""

    names = ("prose", "s3://user:sesame@bucket/code")
    words = ("a", "</script>", "<b>", "d", "e", "f", "g", "h", "i", "\n")

    def vocabulary_ids(self, tokens: np.ndarray) -> np.ndarray:
        return tokens % 10

    def source(self, token: int) -> int:
        return token % 2

    def decode(self, ids: np.ndarray) -> str:
        return self.words[int(ids[0])]


def test_tokens_of_experts_come_from_the_audit(tmp_path, capsys, monkeypatch):
    """Expert = token % EXPERTS: an expert sees one source only, and few words."""
    run = make_run(tmp_path / "run", steps=4)
    log = AuditLog(run / FOLDER, AuditConfig(sample_one_in=1), LAYERS, 0)
    ids = torch.arange(400)
    unused = dict.fromkeys(RouterOutput._fields, torch.zeros(len(ids)))
    out = RouterOutput(
        **{
            **unused,
            "expert_ids": (ids % EXPERTS)[:, None].int(),
            "weights": torch.ones(len(ids), 1),
            "reasons": torch.zeros(len(ids), dtype=torch.uint8),
        }
    )
    log.add(1, ids.view(1, -1), None, (out,) * len(LAYERS))
    log.end_step(1, 0, [1] * len(LAYERS))
    log.close()
    assert "the run's tokens are no longer" in Page(build(run, capsys)).text
    monkeypatch.setattr("launch.runs.origins._tokens_at_hand", lambda *_: True)
    monkeypatch.setattr("launch.runs.texts.open_texts", lambda *_: FakeTexts())
    page = build(run, capsys)
    found = payload(page)["runs"][0]["origins"]
    assert (
        Page(page).tags.count("script") == 2
        and "sesame" not in page
        and len(found["layers"]) == len(LAYERS)
    )
    experts = {e["expert"]: e for e in found["layers"][0]}
    assert experts[1]["sources"] == [0, 1] and experts[2]["sources"] == [1, 0]
    assert experts[1]["assignments"] == 50
    assert {word for word, _, _ in experts[1]["frequent"]} == {"</script>", "d", "f", "h", "\n"}
    assert all(times == 10 and lift == 2 for _, times, lift in experts[1]["typical"])


def test_no_record_is_a_clear_error(tmp_path, capsys):
    run = write_config(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "tok')
    with pytest.raises(ValueError, match=r"nothing to show.*first log step"):
        build(run, capsys)
    with pytest.raises(ValueError, match="give run=DIR"):
        command.main(OmegaConf.load(Path(CONF) / "report.yaml"))  # type: ignore[arg-type]


def test_one_record_is_enough(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=1)
    page = build(run, capsys, png=True)
    assert payload(page)["runs"][0]["frames"]["step"] == [1]
    assert {p.name for p in (run / "report").iterdir()} == {
        "balance.png",
        "heatmap.png",
        "index.html",
        "k_histogram.png",
        "loss.png",
    }


def test_a_dense_model_has_no_experts_to_show(tmp_path, capsys):
    run = write_config(tmp_path / "run", "model.num_experts=0", "router.top_k=0")
    write_lines(
        run / "metrics.jsonl",
        [
            {"step": 1, "tokens": 5, "train/loss": 3.0},
            {"step": 2, "tokens": 9, "train/loss": float("nan")},
        ],
    )
    page = build(run, capsys, png=True)
    assert "dense model" in Page(page).text and payload(page)["runs"][0]["frames"] is None
    assert "the training loss is not a finite number since step 2" in Page(page).text


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity"])
def test_a_number_that_is_not_finite_is_no_number_to_show(tmp_path, capsys, value):
    # null as it is written now, NaN as older versions wrote it
    run = make_run(tmp_path / "run")
    (run / "alarms.jsonl").write_text("")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            f'{{"step": 21, "tokens": 21000, "train/loss": {value}, "train/lr": 1e-3, '
            f'"perf/step_seconds": {value}}}\n'
            f'{{"step": 21, "tokens": 21000, "eval/val_loss": {value}}}\n'
        )
    page = build(run, capsys, png=True)
    text = Page(page).text
    assert (
        "2 active alarms" in text
        and "the held-out loss is not a finite number since step 21" in text
    )
    assert "the training loss is not a finite number since step 21" in text
    assert Page(page).numbers["perf/step_seconds/median", "run"] == 0.5
    assert payload(page)["runs"][0]["series"]["train/loss"][1][-1] is None


def skipping(run: Path, total: list[int]) -> None:
    """Records get so many skipped steps so far, and no loss where the number grew."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "train/lr" in line]
    for i, (record, skipped) in enumerate(zip(records, total, strict=True)):
        record["train/skipped_steps"] = skipped
        if skipped > (total[i - 1] if i else 0):
            record["train/grad_norm"] = record["train/loss"] = None
    write_lines(run / "metrics.jsonl", lines)


def test_the_first_screen_says_that_steps_were_skipped(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=4)
    # the run has alarms, and none of them looks at this
    (run / "alarms.jsonl").write_text("")
    skipping(run, [0, 1, 2, 3])
    page = Page(build(run, capsys))
    assert "2 active alarms" in page.text and "No alarm" not in page.text
    assert (
        "3 of 4 steps were skipped: their loss or gradient was not finite since step 2" in page.text
    )
    assert "the training loss is not a finite number since step 2" in page.text
    assert page.numbers["train/skipped_steps", "run"] == 3
    # tokens of skipped steps were consumed
    assert page.numbers["tokens", "run"] == 4 * TOKENS


def test_skipped_steps_that_are_over_are_a_past_alarm(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=4)
    skipping(run, [0, 2, 2, 2])
    page = Page(build(run, capsys))
    assert "from step 2 to 3" in page.text and "2 of 4 steps were skipped" in page.text
    assert page.numbers["alarms/active", "run"] == 0


def test_the_first_screen_says_which_step_ended_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=4)
    (run / "failures" / "step-00000005").mkdir(parents=True)
    (run / "failures" / "step-00000005" / "rank-00000.json").write_text("{}")
    assert (
        "loss or gradient of step 5 was not finite, and nothing was logged since"
        in Page(build(run, capsys)).text
    )
    (run / "metrics.jsonl").write_text("")
    (run / "routing.jsonl").write_text("")
    with pytest.raises(
        ValueError, match=r"first log step .*; loss or gradient of step 5 was not finite"
    ):
        build(run, capsys)


def test_an_alarm_whose_value_was_not_finite_is_critical(tmp_path):
    run = make_run(tmp_path / "run")
    write_lines(run / "alarms.jsonl", [alarm(3, value=None)])
    assert read_run(str(run)).alarms[0].severity == "critical"


def test_damaged_lines_are_skipped(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "routing.jsonl").open("a") as file:
        file.write(
            '{"step": 21, "tokens": 3, "counts": [[1, 2]]}\nnonsense\n[1]\n{"step": 22, "tokens": '
            '4, "coun'
        )
    frames = read_run(str(run)).frames
    assert (
        frames is not None and frames.step.tolist() == list(range(1, 21)) and frames.num_lines == 20
    )


def test_runs_stand_side_by_side_and_the_best_is_marked(tmp_path, run, capsys):
    other = make_run(tmp_path / "other", steps=10)
    page = build([run, other], capsys, output=tmp_path / "both.html")
    numbers = Page(page).numbers
    assert (numbers["train/loss", "run"], numbers["train/loss", "other"]) == (4.0, 5.0)
    assert re.search(r'data-key="train/loss" data-run="run"[^>]*>4 <span class="best">', page)
    assert len(payload(page)["runs"]) == 2 and (tmp_path / "both.html").is_file()


def of_tokenizer(run: Path, text: str) -> None:
    (run / "data").mkdir(exist_ok=True)
    (run / "data/tokenizer.json").write_text(text)
    (run / "data/manifest.json").write_text(json.dumps({"content": text}))


def test_losses_of_other_tokenizers_have_no_best_but_speeds_do(tmp_path, capsys):
    folders = [make_run(tmp_path / name, steps=steps) for name, steps in (("a", 20), ("b", 10))]
    for folder, text in zip(folders, ("x", "y"), strict=True):
        of_tokenizer(folder, text)
    page = build(folders, capsys)
    assert "No loss is best here: their tokenizers differ" in Page(page).text
    marked = re.findall(r'data-key="([^"]+)"[^>]*>[^<]*<span class="best">', page)
    assert marked and not {key for key in marked if key.startswith(("train/loss", "eval/"))}

    of_tokenizer(folders[1], "x")
    page = build(folders, capsys)
    marked = re.findall(r'data-key="([^"]+)"[^>]*>[^<]*<span class="best">', page)
    assert "train/loss" in marked and "No loss is best" not in page


def test_what_differs_stands_before_what_came_of_it(tmp_path, capsys):
    one = make_run(tmp_path / "one", "optim.lr=0.001", "tracker.wandb.entity=sesame")
    two = make_run(tmp_path / "two", "optim.lr=0.003", "router=top_p", "data.cache_dir=sesame")
    page = build([one, two], capsys)
    rows = re.findall(r'<tr data-setting="([^"]+)">.*?<td>([^<]*)</td><td>([^<]*)</td>', page)
    assert rows == [("router.name", "top_k", "top_p"), ("optim.lr", "0.001", "0.003")]
    assert page.index("What differs") < page.index("What came of it") < page.index('id="loss"')
    assert "sesame" not in page


def test_one_number_is_large_few_stand_beside_it_and_all_can_be_unfolded(run, capsys):
    page = build(run, capsys)
    first, _, rest = page.partition('<div class="first">')[2].partition("<details>")
    assert re.findall(r'class="headline">.*?data-key="([^"]+)"', first, re.S) == ["eval/val_loss"]
    assert 4 <= first.count("data-key=") <= 9
    assert all(f'data-key="{kpi.key}"' in rest for kpi in KPIS if kpi.key == "perf/memory_gib")
    assert first.count('data-key="eval/val_loss"') == 1
    assert '<th scope="row">optim.lr</th>' in rest


def test_the_time_in_steps_is_that_of_all_steps(run, capsys):
    assert Page(build(run, capsys)).numbers["duration", "run"] == 20 * 0.5
    assert [fmt(s, "duration") for s in (10.0, 59.6, 3599, 3600, 7325)] == [
        *("10 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 02 min"),
    ]


def test_names_tell_runs_apart(tmp_path):
    paths = [make_run(tmp_path / parent / "run", steps=1) for parent in "ab"]
    assert run_names([read_run(str(p)) for p in paths]) == ["a/run", "b/run"]
    assert run_names([read_run(str(paths[0]))] * 2) != ["run", "run"]


def test_nothing_is_fetched(run, capsys):
    page = re.sub(r"http://www.w3.org/2000/svg", "", build(run, capsys))
    assert not re.search(r"https?://|<link|@import|src=|fetch\(|XMLHttpRequest", page)


def test_long_runs_are_thinned_evenly_and_say_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.runs.loads.MAX_CELLS", 6 * len(LAYERS) * EXPERTS)
    monkeypatch.setattr("launch.report.page.MAX_POINTS", 5)
    run = make_run(tmp_path / "run", steps=21)
    page = build(run, capsys)
    assert payload(page)["runs"][0]["frames"]["step"] == [1, 5, 9, 13, 17, 21]
    assert (
        "6 of 21 lines of routing.jsonl" in Page(page).text and "5 of 21 records" in Page(page).text
    )
    with (run / "routing.jsonl").open("a") as file:
        file.write('{"step": 22, "coun')
    assert read_run(str(run)).frames.step[-1] == 21


def test_watching_rebuilds_when_a_file_grows(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", steps=3)
    metrics, routing = (
        (run / name).rename(run / f"{name}.later") for name in ("metrics.jsonl", "routing.jsonl")
    )
    looks = []

    def sleep(_: float) -> None:
        # nothing to show yet: it waits
        if not looks and not (run / "metrics.jsonl").exists():
            assert not (run / "report").exists()
            metrics.rename(run / "metrics.jsonl")
            routing.rename(run / "routing.jsonl")
            return
        page = (run / "report" / "index.html").read_text()
        looks.append(len(payload(page)["runs"][0]["frames"]["step"]))
        assert payload(page)["refresh"] == 10
        if len(looks) == 3:
            raise KeyboardInterrupt
        if len(looks) == 1:
            lines = (run / "routing.jsonl").read_text().splitlines()
            (run / "routing.jsonl").write_text(
                "\n".join([*lines, lines[-1].replace('"step": 3', '"step": 4')]) + "\n"
            )

    monkeypatch.setattr("launch.report.command.time.sleep", sleep)
    page = build(run, capsys, watch=True)
    assert looks == [3, 4, 4] and payload(page)["refresh"] is None


def test_levels_hold_loads_to_within_their_width():
    loads = np.array([0, 1e-6, 0.04, 0.999, 1.0, 1.96, 2.0, 2.1, 7.3, 255.0])
    levels = load_levels(loads).astype(int)
    shown = np.where(
        levels == 0,
        0,
        np.where(levels <= 40, (levels - 0.5) * 0.05, 2 * 2 ** ((levels - 40.5) / 24)),
    )
    assert (np.abs(shown - loads) <= np.maximum(0.0251, 0.015 * loads)).all() and (
        np.diff(levels) >= 0
    ).all()
    assert levels[0] == 0 < levels[1]


def test_small_helpers():
    assert (
        evenly(3, 10).tolist() == [0, 1, 2]
        and evenly(100, 3).tolist() == [0, 50, 99]
        and evenly(0, 5).tolist() == []
    )
    assert spans(np.array([True, True, False, True, False, True, True])) == [(0, 2), (5, 7)]
    shown = {
        (1.46e12, "flops"): "1.46T",
        (0.0254, "percent"): "2.54%",
        (1e-9, "percent"): "<0.0001%",
        (61440, "count"): "61.4k",
        (0.05, "seconds"): "50 ms",
        (1.5, "gib"): "1.50 GiB",
        (None, "number"): "–",
        (2.2711, "number"): "2.271",
    }
    assert {case: fmt(*case) for case in shown} == shown


def test_deciles_are_those_of_the_newest_evaluation_up_to_a_step():
    curve = Curve(np.array([10, 20]), np.array([1, 2]), np.array([1.5, 2.5]))
    found = _deciles({"eval/experts_per_token/loss_3": curve}, np.array([5, 10, 15, 20, 99]))
    assert list(found) == ["loss"] and np.isnan(np.delete(found["loss"], 3, axis=1)).all()
    assert np.isnan(found["loss"][0, 3]) and found["loss"][1:, 3].tolist() == [1.5, 1.5, 2.5, 2.5]
