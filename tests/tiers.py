"""Which tier a test belongs to, how much CPU time one of its cases may take, and which files run
first.

README.md of this folder says what the tiers are. Limits are of CPU time, which a busy machine does
not stretch as it does the clock: no test fails because something else runs beside it.
"""

from __future__ import annotations

import ast
import functools
import os
import resource
from multiprocessing import forkserver
from pathlib import Path

OTHERS = ("slow", "nightly", "faults", "gpu")
"""Marks of tests that are not fast."""
PROCESSES = frozenset(
    {
        "subprocess",
        "multiprocessing",
        "forked",
        "fork",
        "run_ranks",
        "interpret",
        "train_on",
        "full_and_half",
        "build_cuda_on_cpu",
    }
)
"""Names by which tests start processes."""
SECONDS = {"fast": 60.0, "default": 400.0}
"""CPU time of one case with the fixtures that it is the first to need, in its tier. Several times
what any takes.
"""
FIRST = (
    "tests/distributed/test_parity.py",
    "tests/end_to_end/test_resume_settings.py",
    "tests/end_to_end/test_commands.py",
    "tests/end_to_end/test_resume.py",
    "tests/launch/test_report_browser.py",
    "tests/end_to_end/test_placement.py",
    "tests/end_to_end/test_published_weights.py",
    "tests/distributed/test_nonfinite.py",
    "tests/distributed/test_context_parallel.py",
    "tests/distributed/test_tensor_parallel.py",
    "tests/ops/test_sparse_attention_triton.py",
    "tests/ops/test_grouped_mlp_triton.py",
    "tests/ops/test_gather_attention_triton.py",
    "tests/ops/test_index_attention_triton.py",
    "tests/end_to_end/test_routing.py",
    "tests/end_to_end/test_sparse_attention.py",
    "tests/distributed/test_grad_accum.py",
    "tests/model/test_budget.py",
    "tests/launch/test_stop.py",
    "tests/launch/test_layouts.py",
    "tests/end_to_end/test_distillation.py",
    "tests/infer/test_engine.py",
    "tests/train/test_metric_names.py",
    "tests/train/test_checkpoint.py",
    "tests/test_security.py",
    "tests/ops/test_router.py",
    "tests/ops/test_sparse_attention.py",
    "tests/model/test_independence.py",
)
"""The files that take longest. A worker takes whole files: begun last, one of them would keep it
busy alone.
"""


def order(path: str) -> int:
    """Where a file stands in the order of the run, by its path from the repository's root."""
    return FIRST.index(path) if path in FIRST else len(FIRST)


@functools.cache
def starting_processes(path: Path) -> frozenset[str]:
    """Functions of a file that start processes, through others of that file or its fixtures as
    well.
    """
    return found_in(path.read_text())


def found_in(source: str) -> frozenset[str]:
    tree = ast.parse(source)
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("commandline")
        for alias in node.names
        if alias.name == "launch"
    }
    uses = {
        node.name: _names(node)
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    found = {name for name, names in uses.items() if names & (PROCESSES | foreign)}
    while True:
        more = {name for name, names in uses.items() if names & found} - found
        if not more:
            return frozenset(found)
        found |= more


def _names(tree: ast.AST) -> set[str]:
    """Variables, attributes and parameters, which are what a test calls its fixtures."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def cpu_seconds() -> float:
    """Of this process, the children it has waited for, and the server of tests/forked.py with its
    forks.
    """
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(u.ru_utime + u.ru_stime for u in used)
    server = forkserver._forkserver._forkserver_pid
    if server is None:
        return total
    try:
        fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # another system than Linux
        return total
    return total + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
