"""python -m launch.runs: what it lists is what the files say, conditions and orders hold, and
losses that do not compare are not compared.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.history.differences import SET, differences
from launch.history.past import newest_metrics, read_past
from launch.history.table import print_table
from launch.runs.command import main
from launch.saved.configs import load_run_config
from launch.saved.resume import UNSET
from tests.launch.test_report import CONF, write_config, write_lines


def make(
    folder: Path, *overrides: str, loss: float, at: int, tokenizer: str = "a", state: str = "ended"
) -> Path:
    """A run with a few records, that was last at work so many seconds after the epoch."""
    write_config(folder, *overrides)
    write_lines(
        folder / "metrics.jsonl",
        [
            {"step": 1, "tokens": 100, "train/loss": 9.0, "perf/tokens_per_second": 50.0},
            {"step": 20, "tokens": 2000, "train/loss": loss - 0.5, "moe/max_vio": loss / 10},
            {"step": 20, "tokens": 2000, "eval/val_loss": loss, "eval/bits_per_byte": loss / 2},
        ],
        tail='{"step": 21, "train/lo',
    )
    if state in ("ended", "stopped"):
        result = {"step": 20, "val_loss": loss, "tokens_per_second": 60.0}
        (folder / "result.json").write_text(json.dumps({**result, "stopped": state == "stopped"}))
    if state == "running":
        (folder / "lock").write_text("{}")
    (folder / "data").mkdir()
    (folder / "data/tokenizer.json").write_text(tokenizer)
    (folder / "data/manifest.json").write_text(json.dumps({"content": tokenizer}))
    for name in ("config.yaml", "metrics.jsonl", "result.json"):
        if (folder / name).exists():
            os.utime(folder / name, (at, at))
    return folder


@functools.cache
def parsed_once(text: str):
    file = Path("parsed.yaml")
    file.write_text(text)
    return load_run_config(file)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # reading YAML is most of what these tests cost
    monkeypatch.setattr(
        "launch.history.past.load_run_config", lambda path: parsed_once(path.read_text())
    )
    top = Path("runs")
    make(top / "q/a", "optim.lr=0.001", loss=4.0, at=100)
    make(top / "q/b", "optim.lr=0.002", "router=top_p", loss=3.0, at=300, state="running")
    make(top / "q/c", "optim.lr=0.002", loss=5.0, at=200, tokenizer="b", state="stopped")
    make(top / "d", "alarms=off", "optim.lr=0.003", loss=2.0, at=50, state="broken off")
    return top


def told(capsys, **settings) -> tuple[dict, str]:
    """The JSON line and the table of the command."""
    config = OmegaConf.merge(OmegaConf.load(Path(CONF) / "runs.yaml"), settings)
    main(config)  # type: ignore[arg-type]
    out = capsys.readouterr().out.strip()
    return json.loads(out.splitlines()[-1]), out


def listed(capsys, **settings) -> list[str]:
    return [run["run_dir"] for run in told(capsys, **settings)[0]["runs"]]


def test_all_runs_are_listed_the_newest_first(runs, capsys):
    found, out = told(capsys)
    assert [run["run_dir"] for run in found["runs"]] == [
        "runs/q/b",
        "runs/q/c",
        "runs/q/a",
        "runs/d",
    ]
    assert [run["state"] for run in found["runs"]] == ["running", "stopped", "ended", "broken off"]
    a = found["runs"][2]
    assert (a["step"], a["val_loss"], a["train_loss"]) == (20, 4.0, 3.5)
    # of the whole run where it has ended, of the last record before
    assert a["tokens_per_second"] == 60.0 and found["runs"][0]["tokens_per_second"] == 50.0
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["runs/q/a"][1:6] == ["ended", "20", "4.0000", "3.5000", "60"]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (["val_loss<4"], ["runs/q/b", "runs/d"]),
        (["val_loss >= 4"], ["runs/q/c", "runs/q/a"]),
        (["optim.lr=2e-3"], ["runs/q/b", "runs/q/c"]),
        (["optim.lr=2e-3", "state=stopped"], ["runs/q/c"]),
        (["router.name!=top_p", "step==20"], ["runs/q/c", "runs/q/a", "runs/d"]),
        (["router.name~TOP_"], ["runs/q/b", "runs/q/c", "runs/q/a", "runs/d"]),
        (["moe/max_vio<=0.3"], ["runs/q/b", "runs/d"]),
        (["train.deterministic=false", "model.tie_embeddings!=x"], None),
        (["train.sample_prompt=null"], None),
        (["train.sample_prompt==null"], None),
        (["when>=1970-01-01", "when<1970-01-03 00:00"], None),
        (["when>1970-01-03"], []),
    ],
)
def test_conditions_are_of_columns_metrics_and_settings(runs, capsys, where, found):
    everything = ["runs/q/b", "runs/q/c", "runs/q/a", "runs/d"]
    assert listed(capsys, where=where) == (everything if found is None else found)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("val_loss<abc", "'abc' is no number, and val_loss is one"),
        ("val_loss=low", "'low' is no number, and val_loss is one"),
        ("step!=many", "'many' is no number, and step is one"),
        ("optim.lr>=", "'' is no number, and optim.lr is one"),
        ("state<5", "state is no number but '"),
        ("train.deterministic>0", "train.deterministic is no number but 'false'; use"),
        ("when>yesterday", "'yesterday' is no date; write it as 2026-11-30"),
    ],
)
def test_what_does_not_compare_is_refused(runs, capsys, where, told):
    with pytest.raises(ValueError, match=f"^{re.escape(f'where={where!r}: {told}')}"):
        listed(capsys, where=where)


def test_conditions_that_nothing_meets_are_told_and_not_the_runs_that_do_not(runs, capsys):
    _, out = told(capsys, where="val_loss<1")
    assert out.startswith("no run with where=['val_loss<1'] under runs\n")
    _, out = told(capsys, where="val_loss<1", run=["runs/q/a", "runs/d"])
    assert out.startswith("no run with where=['val_loss<1'] among the 2 that were named\n")


def test_conditions_that_the_grammar_of_lists_does_not_know_are_read(runs, capsys):
    """As the command line hands them on: a text with brackets."""
    assert listed(capsys, where="[val_loss<4, optim.lr=2e-3]") == ["runs/q/b"]


@pytest.mark.parametrize(
    ("sort", "found"),
    [
        ("val_loss", ["runs/d", "runs/q/b", "runs/q/a", "runs/q/c"]),
        ("-moe/max_vio", ["runs/q/c", "runs/q/a", "runs/q/b", "runs/d"]),
        ("optim.lr", ["runs/q/a", "runs/q/b", "runs/q/c", "runs/d"]),
        ("router.budget", ["runs/q/b", "runs/q/c", "runs/q/a", "runs/d"]),
        ("state", ["runs/d", "runs/q/a", "runs/q/b", "runs/q/c"]),
    ],
)
def test_runs_without_the_value_come_last(runs, capsys, sort, found):
    order = listed(capsys, sort=sort)
    if sort == "optim.lr":  # of equal ones nothing is said
        assert order[0] == found[0] and set(order) == set(found)
    elif sort == "router.budget":
        assert order[0] == found[0]
    else:
        assert order == found


def test_only_so_many_are_listed_and_the_rest_is_told(runs, capsys):
    found, out = told(capsys, limit=1, sort="val_loss")
    assert [run["run_dir"] for run in found["runs"]] == ["runs/d"]
    assert "3 more: limit=4 lists all" in out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"where": ["val_los<4"]}, "where: no run has val_los; did you mean val_loss?"),
        ({"where": ["val_loss"]}, "is no condition; give NAME<VALUE"),
        ({"sort": "optim.le"}, "sort: no run has optim.le; did you mean optim.lr?"),
        ({"limit": 0}, "limit is 0"),
        ({"tag": ["x"]}, "tag needs run=RUN"),
        ({"note": "x"}, "note needs run=RUN"),
        ({"run": ["runs/d"], "tag": ["two words"]}, "a tag is a word"),
        ({"run": ["runs"]}, "runs/config.yaml does not exist"),
    ],
)
def test_a_mistake_is_told_with_what_was_meant(runs, capsys, settings, words):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        told(capsys, **settings)
    assert words in str(raised.value)


def test_no_run_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told(capsys)[0] == {"runs": []}


def test_tags_and_notes_are_kept_and_taken_away(runs, capsys):
    told(capsys, run=["runs/d", "runs/q/a"], tag=["good", "base"], note="two experts")
    told(capsys, run=["runs/d"], untag=["good"])
    assert (read_past("runs/d").tags, read_past("runs/d").note) == (("base",), "two experts")
    assert listed(capsys, where=["tags~good"]) == ["runs/q/a"]
    assert "two experts" in told(capsys)[1]
    told(capsys, run=["runs/d"], note="")
    assert read_past("runs/d").note is None
    Path("runs/d/notes.json").write_text("{")
    assert read_past("runs/d").tags == ()


# --- comparing ------------------------------------------------------------------------------------


def test_settings_that_differ_come_first_and_then_the_best(runs, capsys):
    found, out = told(capsys, run=["runs/q/a", "runs/q/b"], compare=True, columns=["moe/max_vio"])
    assert next(iter(found["differences"])) == "router.name"
    assert found["differences"]["router.name"] == ["top_p", "top_k"]  # the newest first
    assert found["differences"]["optim.lr"] == [0.002, 0.001]
    assert not any(key.startswith("router.top") for key in found["differences"])
    assert out.index("optim.lr") < out.index("val_loss") < out.index("moe/max_vio")
    assert "lowest held-out loss: runs/q/b (3.0000)" in out


def test_losses_of_other_tokenizers_have_no_best(runs, capsys):
    _, out = told(capsys, run=["runs/q/a", "runs/q/c"], compare=True)
    assert "no loss is best here: their tokenizers differ" in out and "lowest" not in out


def test_runs_with_the_same_settings_say_so(runs, capsys):
    make(Path("runs/again"), "optim.lr=0.001", loss=4.5, at=1)
    found, out = told(capsys, run=["runs/q/a", "runs/again"], compare=True)
    assert found["differences"] == {} and "no setting differs" in out


def test_a_group_that_one_run_has_is_one_line(runs):
    configs = [read_past(f"runs/{name}").settings for name in ("q/a", "d")]
    found = differences(configs)
    assert found["alarms.collapse"] == (SET, UNSET)
    assert not any(key.startswith("alarms.collapse.") for key in found)


def test_a_list_that_one_run_has_is_told_by_its_items_alone():
    item = {"path": "json", "label": "exam"}
    found = differences([{"data": {"validation": {"sources": s}}} for s in ([], [item])])
    assert found == {"data.validation.sources.0": (UNSET, SET)}


def test_what_is_passed_on_holds_no_text_of_a_person(runs):
    texts = ("train.sample_prompt=sesame", "tracker.wandb.entity=sesame", "data.cache_dir=sesame")
    make(Path("runs/mine"), *texts, "+launch.env.WORD=sesame", "seed=7", loss=1.0, at=1)
    configs = [read_past(f"runs/{name}").settings for name in ("q/a", "mine")]
    assert differences(configs, shareable=True)["seed"] == (1234, 7)
    assert "sesame" not in str(differences(configs, shareable=True))
    assert "sesame" in str(differences(configs))


def test_secrets_are_hidden_on_the_terminal_too(runs, capsys):
    key = "hf_" + "a1b2c3d4" * 4
    make(Path("runs/mine"), f"+launch.env.WORD={key}", loss=1.0, at=1)
    assert key not in told(capsys, run=["runs/q/a", "runs/mine"], compare=True)[1]


# --- reading --------------------------------------------------------------------------------------


def test_the_newest_numbers_stand_at_the_end_of_a_long_log(tmp_path):
    lines = [{"step": i, "train/loss": float(i), "text": "x" * 500} for i in range(2000)]
    write_lines(tmp_path / "m.jsonl", lines)
    assert newest_metrics(tmp_path / "m.jsonl") == {"step": 1999, "train/loss": 1999.0}
    assert newest_metrics(tmp_path / "none") == {}


def test_a_run_is_running_while_its_lock_is_refreshed(runs):
    old = time.time() - 3600
    os.utime("runs/q/b/lock", (old, old))
    assert read_past("runs/q/b").state == "broken off"


def test_numbers_stand_to_the_right(capsys):
    print_table(["name", "n"], [["a", "1"], ["bb", "10"]])
    assert capsys.readouterr().out == "name   n\na      1\nbb    10\n"
