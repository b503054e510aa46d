"""`--help`: what a command does, how it is called, and every setting with its sentence."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator

from launch.command.arguments import options
from launch.command.fields import OWN, RECORDS, Setting, groups_of, own_settings, settings
from launch.process.identity import ROOT

WIDTH = 96
EXAMPLES = {
    "train": (
        "experiment=quickstart launch=deepspeed launch.num_devices=2",
        "router=threshold router.budget=2 train.num_steps=300",
        "data=files data.sources.0.path=json data.sources.0.data_files='/data/*.jsonl'",
        "init.path=DIR data=files data.sources.0.path=text data.sources.0.data_files=FILE",
        "resume=latest train.num_steps=600",
        "-m optim.lr=1e-3,1e-4",
    ),
    "plan": (
        "experiment=qwen3_30b_a3b launch=deepspeed launch.num_devices=8 parallel=ep8",
        "experiment=olmoe_1b_7b device=H100 train.num_tokens=100B price=2.5",
        "experiment=qwen3_30b_a3b parallel=auto world=64 device=H100",
    ),
    "compare": (
        "experiment=quickstart train.num_steps=250 variants=[top_k,dense,adaptive]",
        "variants=[top_k,sparse] sizes=[] seeds=5 launch.dry_run=true",
        "resume=DIR seeds=6",
    ),
    "prepare": ("data=files data.sources.0.path=text data.sources.0.data_files=FILE",),
    "evaluate": (
        "run=RUN",
        "run=RUN router.budget=1.5",
        "run=RUN router.budget=[1,1.5,2] save_budgets=true",
        "run=RUN attention=scc",
        "run=[RUN,RUN2]",
        "run=RUN checkpoint=all",
    ),
    "generate": (
        "run=RUN prompt='To be, or not to be' temperature=0",
        "run=RUN input=prompts.jsonl output=out.jsonl",
    ),
    "branch": ("run=RUN checkpoint=step-250 to=DIR decay_steps=50",),
    "export": ("run=RUN to=DIR", "run=RUN to=DIR router.top_k=2 dtype=fp32"),
    "serve": ("run=RUN", "path=DIR serve.port=8080 engine.max_slots=64"),
    "quantize": ("run=RUN", "run=RUN max_loss_increase=0.002"),
    "teach": ("objective=distil objective.run=RUN to=CACHE",),
    "benchmark": ("run=RUN rows=[1,8,32]", "run=RUN budgets=[2,1] contexts=[128,1024]"),
    "report": ("run=RUN", "run=[RUN,RUN2]", "run=RUN watch=true"),
    "dashboard": ("run=RUN",),
    "audit": ("run=RUN", "run=RUN compare=RUN2"),
    "place": ("run=RUN expert_parallel_size=8 replicas_per_rank=1",),
    "runs": (
        "",
        "where='val_loss<4.5' sort=val_loss",
        "run='runs/quickstart/*' compare=true",
        "run=RUN tag=baseline note='two experts, warm start'",
    ),
    "doctor": ("", "launch=deepspeed launch.hostfile=HOSTS launch.num_nodes=2"),
}
"""Command -> what people write after it."""


def commands() -> dict[str, str]:
    """Command -> its first sentence, in the order of their names."""
    found = {}
    for path in sorted([*(ROOT / "launch").glob("*.py"), *(ROOT / "launch").glob("*/__main__.py")]):
        name = path.stem if path.parent.name == "launch" else path.parent.name
        source = path if path.stem != "__main__" else path.with_name("command.py")
        if name != "__main__" and "run_main(" in path.read_text():
            text = ast.get_docstring(ast.parse(source.read_text())) or ""
            (sentence, end) = re.split(r"([.:?])(?:\s|$)", " ".join(text.split()), maxsplit=1)[:2]
            found[name] = sentence + end.replace(":", ".")
    return found


def command_name() -> str:
    """The command of this process: launch.plan composes what launch.train does."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    parts = [part for part in (spec.name if spec else "").split(".") if part != "__main__"]
    return parts[-1] if len(parts) > 1 else "train"


def overview() -> str:
    """All commands, a line each."""
    lines = ["usage: python -m launch.COMMAND [name=value ...]", ""]
    lines += [f"  {name:10} {sentence}" for name, sentence in commands().items()]
    lines += [
        "",
        "python -m launch.COMMAND --help explains a command; docs/index.md is the way in.",
    ]
    return "\n".join(lines)


def page(command: str) -> str:
    """The help of a command."""
    lines = [
        commands()[command],
        "",
        f"usage: python -m launch.{command} [GROUP=OPTION ...] [name=value ...]",
        "",
        "examples:",
        *(f"  python -m launch.{command} {example}".rstrip() for example in EXAMPLES[command]),
    ]
    groups = [(group, default) for group, default in groups_of(command) if options(group)]
    if groups:
        lines += ["", "groups, and what each may be (the first is what it is):"]
        for group, default in groups:
            rest = [option for option in options(group) if option != default]
            chosen = [default] if default != "null" else []
            lines += _filled(f"  {group}=", ", ".join([*chosen, *rest]))
    lines += ["", "settings:"]
    lines += [line for setting in settings(command) for line in _setting(setting)]
    lines += [
        "",
        "--cfg job prints the composed settings; -m runs a job for each of several values a,b.",
    ]
    return "\n".join(lines)


def _setting(setting: Setting) -> list[str]:
    head = f"  {setting.key}" + (f"={setting.default}" if setting.default else "")
    sentence = " ".join(
        part
        for part in (
            f"{' | '.join(setting.choices)}." if setting.choices else "",
            setting.sentence,
        )
        if part
    )
    return [
        head,
        *textwrap.wrap(sentence, WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def _filled(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)


def reference() -> str:
    """docs/reference/settings.md."""
    parts = [
        "# Settings\n\nWritten by `make docs` from the records and `conf/`; `--help` of a command "
        "prints the same. A default with `${...}` is that of another setting.\n"
    ]
    for command in ("train", *sorted(RECORDS.keys() - {"train", "plan", "prepare"})):
        parts.append(f"## launch.{command}\n")
        if command in OWN:
            parts.append("Beside the settings of launch.train:\n")
        parts.append("".join(_rows(own_settings(command) or settings(command))))
    return "\n".join(parts)


def _rows(found: list[Setting]) -> Iterator[str]:
    yield "| setting | default | choices | meaning |\n|---|---|---|---|\n"
    seen = set()
    for setting in found:
        cells = (
            f"`{setting.key}`",
            f"`{setting.default}`" if setting.default else "",
            ", ".join(setting.choices),
            setting.sentence,
        )
        row = "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
        if row not in seen:
            yield row
        seen.add(row)


if __name__ == "__main__":
    sys.stdout.write(reference())
