"""The layouts that the plan's search prefers for the large presets, as a page.

`python -m bench.layout_tables [--only NAME ...] [--device H100] [--page docs/runs/layouts.md]
[--json FILE]`. Each row of CASES is one `launch.plan parallel=auto`. Nothing is run or measured:
the page says what the plan's model of memory, products and links gives, and by which shares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import ROOT, find_commit
from train.files.sizes import GIB
from train.files.strict_json import dumps

CASES = {
    "Qwen3-30B-A3B, rows of 4,096": (64, ("experiment=qwen3_30b_a3b",)),
    "Qwen3-30B-A3B, rows of 131,072, dense": (64, ("experiment=qwen3_30b_a3b_128k",)),
    "Qwen3-30B-A3B, rows of 131,072, sparse": (
        64,
        ("experiment=qwen3_30b_a3b_128k", "attention=scc"),
    ),
    "Qwen3-30B-A3B, rows of 1,048,576, dense": (
        256,
        ("experiment=qwen3_30b_a3b_1m", "attention=dense"),
    ),
    "Qwen3-30B-A3B, rows of 1,048,576, sparse": (256, ("experiment=qwen3_30b_a3b_1m",)),
    "DeepSeek-V3, 256 devices": (256, ("experiment=deepseek_v3",)),
    "DeepSeek-V3, 2,048 devices": (2048, ("experiment=deepseek_v3",)),
}
"""Heading -> devices, overrides."""
HEAD = """\
# Layouts of the large presets

{date}, commit {commit}. What `launch.plan parallel=auto` finds for {device} devices in nodes of
eight: the best two of each search. **Nothing here was run on such devices.** The numbers are those
of the plan's model: {model} Its memory was compared with that of ranks on a CPU
([out of memory](../troubleshooting.md#out-of-memory)); its times were compared with nothing yet.

The page is written by a command, and each search is one:

    python -m bench.layout_tables --page docs/runs/layouts.md --json docs/runs/layouts.json
    {example}
"""


def asked(devices: int, overrides: tuple[str, ...], device: str) -> tuple[str, ...]:
    return ("launch.plan", *overrides, "parallel=auto", f"world={devices}", f"device={device}")


def searched(words: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """The first two lines of a search, and its result."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    return lines[:2], json.loads(lines[-1])


def row_of(layout: dict[str, Any]) -> str:
    """A line of the table."""
    context = str(layout["context_parallel_size"])
    if layout["context_gather_size"] > 1:
        context += f" ({layout['context_gather_size']} gather)"
    seconds = {
        name: s for name, s in layout["seconds"].items() if s >= 0.01 * layout["step_seconds"]
    }
    parts = ", ".join(f"{name} {s:.3g}" for name, s in seconds.items())
    fields = [
        layout["pipeline_parallel_size"],
        context,
        layout["tensor_parallel_size"],
        layout["expert_parallel_size"],
        layout["zero_stage"],
        layout["recompute"],
        layout["micro_batch_size"],
        f"{layout['step_seconds']:.3g}",
        f"{layout['tokens_per_second']:,.0f}",
        parts,
        f"{layout['memory_bytes']['total'] / GIB:.1f}",
        layout["limits"],
    ]
    return "| " + " | ".join(map(str, fields)) + " |"


COLUMNS = (
    *("stages", "context", "tensor", "expert", "ZeRO", "recompute", "rows of a micro-batch"),
    *("s a step", "tokens/s", "parts of a step from 1% on, s", "GiB", "limits"),
)


def page(found: dict[str, Any], device: str, date: str, commit: str) -> str:
    """Markdown of all searches."""
    first = next(iter(found.values()))
    model = first["lines"][1].removeprefix("model: ")
    example = "python -m " + " ".join(first["asked"])
    head = HEAD.format(
        date=date,
        commit=commit,
        device=device,
        model=model + ".",
        example=example,
    )
    blocks = [head]
    for name, result in found.items():
        table = [
            f"## {name}",
            "",
            f"{result['lines'][0]}. `{' '.join(result['asked'])}`",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *(row_of(layout) for layout in result["layouts"][:2]),
        ]
        blocks.append("\n".join(table) + "\n")
    return "\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CASES), help="headings of CASES")
    parser.add_argument("--device", default="H100")
    parser.add_argument("--page", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if unknown := set(options.only) - set(CASES):
        parser.error(f"no such heading: {sorted(unknown)}; choose from {list(CASES)}")

    found: dict[str, Any] = {}
    for name in options.only:
        words = asked(*CASES[name], options.device)
        lines, result = searched(words)
        found[name] = {"asked": words, "lines": lines, "layouts": result["layouts"]}
        print(f"{name}: {lines[0]}; best {result['layouts'][0]['step_seconds']:.3g} s a step")

    commit = find_commit()
    date = time.strftime("%Y-%m-%d", time.gmtime())
    if options.page:
        options.page.write_text(page(found, options.device, date, commit[:7]))
    if options.json:
        result = {"bench": "layout_tables", "commit": commit, "date": date, "found": found}
        options.json.write_text(dumps(result))


if __name__ == "__main__":
    main()
