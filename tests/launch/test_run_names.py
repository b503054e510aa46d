"""Runs and checkpoints as people name them become directories before a command sees them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from launch.command.arguments import ArgumentError, arranged
from launch.command.run_names import LATEST, resolved
from launch.config.build import ConfigError
from launch.config.overrides import typed
from launch.history.comparable import Measure, incomparable
from tests.end_to_end.commandline import ROOT
from train.checkpoint.folder import find_checkpoint
from train.config.commands.evaluate import EvaluateConfig
from train.config.commands.export import ExportConfig
from train.config.commands.generate import GenerateConfig
from train.config.data import SourceConfig, problem_of_path
from train.config.training import InitConfig
from train.files.manifest import CheckpointError


def begin(run: Path, seconds: int, steps: tuple[int, ...] = ()) -> Path:
    """A run that was last at work so many seconds after the epoch."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    os.utime(run / "config.yaml", (seconds, seconds))
    for step in steps:
        folder = run / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
    return run


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    begin(Path("runs/quickstart/20260101-a"), 100, steps=(10, 250))
    begin(Path("runs/quickstart/20260102-b"), 300, steps=(20,))
    begin(Path("runs/other/c"), 200)
    begin(Path("runs/my runs/d e"), 50)
    return tmp_path


def names(command: str, *arguments: str) -> list[str]:
    return resolved(command, list(arguments))[0]


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (["resume=latest"], ["resume=runs/quickstart/20260102-b"]),
        (["resume=runs/other/latest"], ["resume=runs/other/c"]),
        (["+resume=latest"], ["+resume=runs/quickstart/20260102-b"]),
        (
            ["resume=latest", "experiment_name=other"],
            ["resume=runs/other/c", "experiment_name=other"],
        ),
        # it says which runs are meant, and the run keeps it
        (
            ["experiment=quickstart", "resume=latest", "train.num_steps=5"],
            ["resume=runs/quickstart/20260102-b", "train.num_steps=5"],
        ),
        (["resume=runs/oth*/*"], ["resume=runs/other/c"]),
        (["init.run=latest"], ["init.run=runs/quickstart/20260102-b"]),
        (
            ["init.run=runs/quickstart/20260101-a/checkpoints/step-00000010"],
            ["init.run=runs/quickstart/20260101-a", "init.checkpoint=step-00000010"],
        ),
        (["init.checkpoint=step-250"], ["init.checkpoint=step-00000250"]),
        (["train.num_steps=5", "-m"], ["train.num_steps=5", "-m"]),
    ],
)
def test_training_takes_directories_for_names(runs, arguments, taken):
    assert names("train", *arguments) == taken


@pytest.mark.parametrize(
    ("command", "arguments", "taken"),
    [
        ("evaluate", ["run=latest"], ["run=runs/quickstart/20260102-b"]),
        ("evaluate", ["run=runs/other/c/"], ["run=runs/other/c"]),
        (
            "evaluate",
            ["run=runs/quickstart/*"],
            ["run=['runs/quickstart/20260101-a','runs/quickstart/20260102-b']"],
        ),
        (
            "evaluate",
            ["run=[runs/other/latest,runs/quick*/*-a]"],
            ["run=['runs/other/c','runs/quickstart/20260101-a']"],
        ),
        (
            "evaluate",
            ["run=runs/quickstart/20260101-a/checkpoints/*"],
            [
                "run=['runs/quickstart/20260101-a/checkpoints/step-00000010',"
                "'runs/quickstart/20260101-a/checkpoints/step-00000250']"
            ],
        ),
        (
            "generate",
            ["run=runs/quickstart/20260101-a/checkpoints/step-00000250", "prompt=a"],
            ["run=runs/quickstart/20260101-a", "checkpoint=step-00000250", "prompt=a"],
        ),
        (
            "export",
            ["run=runs/other/c", "checkpoint=250"],
            ["run=runs/other/c", "checkpoint=step-00000250"],
        ),
        (
            "evaluate",
            ["run=runs/other/c", "checkpoint=[best,step-7]"],
            ["run=runs/other/c", "checkpoint=[best,step-00000007]"],
        ),
        ("report", ["run=runs/my runs/d e"], ["run='runs/my runs/d e'"]),
        ("report", ["run=runs/gone"], ["run=runs/gone"]),
        ("audit", ["run=runs/other/c", "compare=latest"],
         ["run=runs/other/c", "compare=runs/quickstart/20260102-b"]),
    ],
)  # fmt: skip
def test_a_command_takes_directories_for_names(runs, command, arguments, taken):
    assert names(command, *arguments) == taken
    # ranks are given them once more
    assert names(command, *arranged(taken)) == arranged(taken)


@pytest.mark.parametrize(
    ("command", "argument", "words"),
    [
        ("train", "resume=runs/none/latest", "there is no run under runs/none"),
        ("train", "resume=runs/nothing*", "no run matches"),
        ("train", "resume=runs/quickstart/*", "are 2 runs, give one: runs/quickstart/20260101-a"),
        ("train", "resume=runs/quickstart", "give resume=runs/quickstart/latest for the newest"),
        (
            "train",
            "resume=runs/quickstart/20260101-a/checkpoints/step-00000010",
            "init.run=runs/quickstart/20260101-a init.checkpoint=step-00000010",
        ),
        ("generate", "run=runs/*/*", "are 4 runs"),
        (
            "report",
            "run=runs/quickstart/20260101-a/checkpoints/step-00000010",
            "launch.report reads a whole run; give runs/quickstart/20260101-a",
        ),
    ],
)
def test_what_names_no_run_is_told_with_what_does(runs, command, argument, words):
    begin(runs / "runs/odd/x", 1)
    (runs / "runs/odd/x/config.yaml").unlink()
    with pytest.raises(ArgumentError) as told:
        names(command, argument)
    assert words in str(told.value)


def test_two_checkpoints_are_one_too_many(runs):
    run = "run=runs/quickstart/20260101-a/checkpoints/step-00000010"
    assert names("generate", run, "checkpoint=10")[1] == "checkpoint=step-00000010"
    with pytest.raises(ArgumentError, match="two checkpoints"):
        names("generate", run, "checkpoint=best")


def test_what_latest_is_of_is_no_question_of_the_node(runs):
    with pytest.raises(ArgumentError, match="give the directory"):
        names("train", "resume=latest", "launch.node_rank=1")


def test_what_was_taken_is_said(runs):
    assert resolved("train", ["resume=latest"])[1] == ["resume=latest: runs/quickstart/20260102-b"]
    assert resolved("train", ["resume=runs/other/c"])[1] == []


def test_where_weights_are_wanted_latest_has_some(runs):
    """A run that was refused after it had begun, or stopped in its first steps, is passed over."""
    begin(Path("runs/quickstart/20260103-e"), 400)
    (runs / "runs/quickstart/20260103-e/checkpoints/step-00000005.partial").mkdir(parents=True)
    for command, key in (("evaluate", "run"), ("generate", "run"), ("train", "init.run")):
        assert names(command, f"{key}=latest") == [f"{key}=runs/quickstart/20260102-b"]
    for command, key in (("train", "resume"), ("report", "run")):
        assert names(command, f"{key}=latest") == [f"{key}=runs/quickstart/20260103-e"]
    begin(Path("runs/new/f"), 500)
    assert names("evaluate", "run=runs/new/latest") == ["run=runs/new/f"]


def test_a_run_of_the_name_latest_is_that_run(runs):
    begin(Path(f"runs/other/{LATEST}"), 1)
    assert names("train", f"resume=runs/other/{LATEST}") == [f"resume=runs/other/{LATEST}"]


def test_a_named_checkpoint_stands_for_itself(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-00000004", "step-00000008"):
        (folder / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no step-00000005; it has step-00000004, step"):
        find_checkpoint(tmp_path, "step-00000005")
    # nothing is read in its place
    with pytest.raises(CheckpointError, match="step-00000004 is damaged"):
        find_checkpoint(tmp_path, "step-00000004")


@pytest.mark.parametrize("name", ["newest", "step-250", "checkpoints/step-00000250", ""])
def test_what_names_no_checkpoint_is_refused(name):
    settings = (
        EvaluateConfig(run="a", checkpoint=name),
        EvaluateConfig(run="a", checkpoints=("best", name)),
        GenerateConfig(run="a", prompt="a", checkpoint=name),
        ExportConfig(run="a", to="b", checkpoint=name),
        InitConfig(run="a", checkpoint=name),
    )
    for each in settings:
        assert any("choose one of best, latest, or a name such as" in p for p in each.problems())
    for good in ("best", "latest", "step-00000250"):
        assert not GenerateConfig(run="a", prompt="a", checkpoint=good).problems()


def test_init_looks_for_no_checkpoint_of_a_wrong_name(tmp_path):
    from launch.saved.initial import _of_run

    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"init\.checkpoint is 'newest'"):
        _of_run(str(tmp_path), "newest")


# --- whether losses may be compared ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (Measure("a", "t", 8), Measure("b", "u", 8), "tokenizers differ"),
        (Measure("a", "t", 8), Measure("a", "u", 8), "texts differ"),
        (Measure("a", "t", 8), Measure("a", "t", 16), "rows have 8, 16 tokens"),
        (Measure("a", "t", 8), Measure("a", "t", 8), None),
        (Measure(None, None, 8), Measure("a", "t", 8), None),
    ],
)
def test_losses_of_other_tokens_texts_or_lengths_are_not_compared(one, other, words):
    reason = incomparable([one, other])
    assert reason is None if words is None else words in reason
    assert incomparable([one]) is None


# --- paths that are printed, and paths that are no source -----------------------------------------


def unquoted(text: str) -> list[str]:
    """Settings of a run whose directory is put into a sentence as it is: not what a shell takes."""
    return re.findall(
        r"[^\n]*(?:(?:continue|it) with |launch\.\w+ )\"?\s*f?\"?(?:run|resume)=(?:\{|%s)[^\n]*",
        text,
    )


def test_a_command_that_is_printed_can_be_pasted():
    files = [*(ROOT / "launch").rglob("*.py"), *(ROOT / "train").rglob("*.py")]
    told = {str(path.relative_to(ROOT)): unquoted(path.read_text()) for path in files}
    assert {path: lines for path, lines in told.items() if lines} == {}
    assert unquoted('print(f"continue with resume={run_dir}")')
    assert shlex.split(typed("run", "runs/a b")) == ["run='runs/a b'"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("jsonl", "did you mean json?"),
        ("ndjson", "did you mean json?"),
        ("txt", "did you mean text?"),
        ("tsv", "did you mean csv?"),
        ("JSON", "did you mean json?"),
    ],
)
def test_a_format_of_another_name_is_answered_at_once(path, words):
    for files in (None, "/data/*.jsonl"):
        (problem,) = SourceConfig(path, data_files=files).problems("data.sources[0]")
        assert problem.startswith(f"data.sources[0].path is {path!r}") and words in problem


def test_a_file_in_place_of_its_format_is_answered_at_once(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    file.write_text("")
    (problem,) = SourceConfig(str(file)).problems("data.sources[0]")
    assert f"path=json and data_files={file}" in problem
    (tmp_path / "jsonl").mkdir()  # a folder is a data set


def test_a_slip_in_a_format_is_told_from_a_name_of_the_hub():
    assert "did you mean parquet?" in (problem_of_path("parqet", "a.parquet") or "")
    assert problem_of_path("parqet", None) is None


def test_names_of_the_hub_are_none_of_ours(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("imdb", "org/jsonl", "wikitext", "arrow", "sample"):
        assert SourceConfig(name).problems("data.sources[0]") == []
    Path("jsonl").mkdir()
    assert SourceConfig("jsonl").problems("data.sources[0]") == []
