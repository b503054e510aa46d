"""`--help` and docs/reference/settings.md say what the records say."""

from __future__ import annotations

import pytest

from launch.command import help as helping
from launch.command.fields import settings
from tests.end_to_end.commandline import ROOT, launch


def test_every_command_is_listed_with_a_sentence():
    commands = helping.commands()
    modules = {p.stem for p in (ROOT / "launch").glob("*.py")} - {"__init__", "__main__"}
    modules |= {p.parent.name for p in (ROOT / "launch").glob("*/__main__.py")}
    assert set(commands) == modules
    assert all(len(sentence) > 10 and "\n" not in sentence for sentence in commands.values())
    assert all(f"  {name} " in helping.overview() for name in commands)


@pytest.mark.parametrize("command", sorted(helping.commands()))
def test_a_page_has_usage_examples_and_every_setting(command):
    page = helping.page(command)
    assert f"usage: python -m launch.{command} " in page
    assert f"  python -m launch.{command}" in page.partition("examples:")[2]
    for setting in settings(command):
        assert f"  {setting.key}" in page
    assert max(map(len, page.splitlines())) <= 120


def test_settings_have_their_default_choices_and_sentence():
    found = {setting.key: setting for setting in settings("train")}
    precision = found["train.precision"]
    assert (precision.default, precision.choices) == ("fp32", ("fp32", "bf16"))
    assert found["model.qk_norm"].choices == ("none", "head", "hidden")
    assert "Optimisation steps of the whole run" in found["train.num_steps"].sentence
    assert found["data.sources.0.weight"].default == "1.0"
    assert found["audit.sample_one_in"].sentence  # of its YAML or its record


def test_help_is_printed_without_composing_anything():
    done = launch("evaluate", "--help", "no=such", check=False)
    assert done.returncode == 0 and "usage: python -m launch.evaluate" in done.stdout


def test_the_reference_is_written_by_make_docs():
    page = ROOT / "docs/reference/settings.md"
    assert page.read_text() == helping.reference(), "run make docs"
