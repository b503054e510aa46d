"""A test that starts a process is not fast, however it does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiers

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("body", "starts"),
    [
        ("    subprocess.run(['ls'])", True),
        ("    helper()", True),
        ("    return made", False),
        ("    assert launch('train')", True),
        ("    assert other('train')", False),
    ],
)
def test_a_test_that_starts_a_process_is_seen(body, starts):
    source = (
        "import subprocess\nfrom tests.end_to_end.commandline import launch\n"
        "def deeper():\n    subprocess.Popen(['ls'])\n"
        f"def helper():\n    deeper()\ndef other(x):\n    return 1\ndef test(made):\n{body}\n"
    )
    assert ("test" in tiers.found_in(source)) == starts


def test_a_fixture_that_starts_a_process_is_seen():
    assert tiers.found_in(
        "def runs(run_ranks):\n    run_ranks(1)\ndef test(runs):\n    assert runs\n"
    ) == {"runs", "test"}


def test_the_module_of_our_package_is_no_process():
    """launch is also the name of a package."""
    assert not tiers.found_in("import launch.plan\ndef test():\n    launch.plan.describe()\n")


def test_files_that_run_first_exist():
    assert not [path for path in tiers.FIRST if not (ROOT / path).is_file()]


def test_this_test_is_fast(request):
    assert request.node.get_closest_marker("fast")


@pytest.mark.slow
def test_this_test_is_not(request):
    assert not request.node.get_closest_marker("fast")


def test_the_processor_time_of_a_test_is_counted():
    before = tiers.cpu_seconds()
    while tiers.cpu_seconds() < before + 0.05:
        sum(range(1000))
