"""List, filter, sort and compare runs, and keep notes about them.

python -m launch.runs [run=...] [where='val_loss<4.5'] [sort=val_loss] [compare=true]
python -m launch.runs run=RUN tag=baseline note='two experts, warm start'
Reads run directories only; tags and notes lie in RUN/notes.json.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from launch.command.messages import print_result
from launch.command.run_names import RUNS, runs_under
from launch.config.build import record
from launch.history.comparable import incomparable, measure_of
from launch.history.differences import SET, differences
from launch.history.past import Past, annotate, read_past
from launch.history.table import print_table
from launch.process.secrets import redact_text
from launch.saved.resume import UNSET, shown

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
ORDERS = ("<=", ">=", "<", ">")
NONE = ("null", "None")
CONDITION = re.compile(r"\s*([\w./-]+)\s*(<=|>=|!=|==?|<|>|~)\s*(.*?)\s*", re.DOTALL)
DATE = re.compile(r"\d{4}-\d\d-\d\d( \d\d:\d\d)?")
"""What the column `when` is compared with; a date alone is its first minute."""
COLUMNS = ("state", "step", "val_loss", "train_loss", "tokens_per_second", "when")
"""Of every list, after the run."""
WIDEST = 48
"""Characters of a cell."""


@dataclass(frozen=True)
class RunsConfig:
    """Settings of launch.runs."""

    run: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    sort: str = "-time"
    limit: int = 20
    columns: tuple[str, ...] = ()
    compare: bool = False
    tag: tuple[str, ...] = ()
    untag: tuple[str, ...] = ()
    note: str | None = None

    def problems(self) -> list[str]:
        found = [
            f"where={text!r} is no condition; give NAME<VALUE, =, !=, <=, >, >= or ~ (holds)"
            for text in self.where
            if CONDITION.fullmatch(text) is None
        ]
        if self.limit < 1:
            found.append(f"limit is {self.limit}; it must be at least 1")
        if not self.sort.strip("-"):
            found.append("sort is empty; give a column, metric or setting")
        changes = [name for name in ("tag", "untag") if getattr(self, name)]
        changes += [] if self.note is None else ["note"]
        if changes and not (self.run or self.where):
            found.append(f"{changes[0]} needs run=RUN: it is written about these runs alone")
        found += [
            f"{name} is {tag!r}; a tag is a word"
            for name in ("tag", "untag")
            for tag in getattr(self, name)
            if not re.fullmatch(r"[\w.+-]+", tag)
        ]
        return found


def main(config: DictConfig) -> None:
    """Print a table of runs, or what they differ in; the last line is JSON."""
    for name in ("run", "where", "columns", "tag", "untag"):
        config[name] = _listed(config[name])
    settings: RunsConfig = record(config, RunsConfig)

    runs = [read_past(path) for path in settings.run or runs_under(RUNS)]
    runs = _sorted(_chosen(runs, settings.where), settings.sort)
    if settings.tag or settings.untag or settings.note is not None:
        for run in runs:
            annotate(run, settings.tag, settings.untag, settings.note)
    listed = runs[: settings.limit]
    if not listed:
        asked = f" with where={list(settings.where)}" if settings.where else ""
        named = len(settings.run)
        place = f"among the {named} that were named" if named else f"under {RUNS}"
        print(f"no run{asked} {place}")
        print_result({"runs": []})
        return

    _require_columns(listed, settings.columns)
    found = differences([run.settings for run in listed]) if len(listed) > 1 else {}
    if settings.compare:
        _print_comparison(listed, found, settings.columns)
    else:
        _print_list(listed, settings.columns)
        if len(runs) > len(listed):
            print(f"{len(runs) - len(listed)} more: limit={len(runs)} lists all")
    print_result(
        {
            "runs": [run.facts(settings.columns) for run in listed],
            "differences": {key: [_json(v) for v in values] for key, values in found.items()},
        }
    )


def _listed(value: Any) -> list[Any]:
    """One, or several; what Hydra's grammar cannot read as a list comes as its text."""
    if isinstance(value, ListConfig):
        return [str(item) for item in value]
    if value is None:
        return []
    text = str(value)
    if text.startswith("[") and text.endswith("]"):
        return [item.strip() for item in text[1:-1].split(",") if item.strip()]
    return [text]


# --- which, and in which order --------------------------------------------------------------------


def _chosen(runs: list[Past], conditions: Iterable[str]) -> list[Past]:
    """Runs of which every condition is true; one that lacks the name is none.

    Raises:
        ValueError: no run has the name, or what it has does not compare with the value.
    """
    for text in conditions:
        match = CONDITION.fullmatch(text)
        assert match is not None
        name, sign, wanted = match.groups()
        values = [run.value(name) for run in runs]
        _require_known(name, values, runs, "where")
        _require_comparable(text, name, sign, wanted, values)
        runs = [run for run, v in zip(runs, values, strict=True) if _holds(v, sign, wanted)]
    return runs


def _require_comparable(
    text: str, name: str, sign: str, wanted: str, values: Sequence[Any]
) -> None:
    """A condition that would hold for no run, or for all, whatever their values are.

    Raises:
        ValueError: it compares numbers with text.
    """
    known = [value for value in values if value is not None]
    if sign == "~" or not known or (sign not in ORDERS and wanted in NONE):
        return
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in known]
    if name == "when" and sign in ORDERS:
        if DATE.fullmatch(wanted) is None:
            raise ValueError(f"where={text!r}: {wanted!r} is no date; write it as 2026-11-30")
    elif sign in ORDERS and not any(numbers):
        example = _plain(known[0])
        raise ValueError(f"where={text!r}: {name} is no number but {example!r}; use =, != or ~")
    elif (sign in ORDERS or all(numbers)) and not _is_number(wanted):
        raise ValueError(f"where={text!r}: {wanted!r} is no number, and {name} is one")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _holds(value: Any, sign: str, wanted: str) -> bool:
    if value is None:
        return sign in ("=", "==") and wanted in NONE
    if sign == "~":
        return wanted.lower() in str(_plain(value)).lower()
    sign = "=" if sign == "==" else sign
    try:
        if isinstance(value, bool):
            raise ValueError
        return OPERATORS[sign](float(value), float(wanted))
    except (TypeError, ValueError):
        # Of texts dates alone have an order.
        compares = sign not in ORDERS or DATE.fullmatch(wanted) is not None
        return compares and OPERATORS[sign](_plain(value), wanted)


def _require_columns(runs: list[Past], columns: Sequence[str]) -> None:
    """Raises ValueError where no run has one of them."""
    for name in columns:
        _require_known(name, [run.value(name) for run in runs], runs, "columns")


def _sorted(runs: list[Past], by: str) -> list[Past]:
    """Those without a value last, whichever way."""
    name, downwards = by.lstrip("-"), by.startswith("-")
    values = {run.directory: run.value(name) for run in runs}
    _require_known(name, list(values.values()), runs, "sort")
    having = [run for run in runs if values[run.directory] is not None]
    are_numbers = all(isinstance(values[run.directory], (int, float)) for run in having)

    def key(run: Past) -> Any:
        value = values[run.directory]
        return value if are_numbers else str(_plain(value))

    having = sorted(having, key=key, reverse=downwards)
    return having + [run for run in runs if values[run.directory] is None]


def _require_known(name: str, values: Sequence[Any], runs: list[Past], setting: str) -> None:
    if not runs or any(value is not None for value in values):
        return
    known = sorted({key for run in runs for key in run.names()})
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1, 0.6)
    # A setting is named with its group.
    near += [key for key in known if key.endswith(f".{name}")][:3]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    raise ValueError(f"{setting}: no run has {name}{hint}")


# --- tables ---------------------------------------------------------------------------------------


def _print_list(runs: list[Past], columns: Sequence[str]) -> None:
    extra = [column for column in columns if column not in COLUMNS]
    names = [*COLUMNS, *extra]
    rows = [[run.directory, *(_cell(run, name) for name in names)] for run in runs]
    head = ["run", *(name.replace("tokens_per_second", "tok/s") for name in names)]
    if any(run.tags for run in runs):
        head.append("tags")
        rows = [[*row, " ".join(run.tags)] for row, run in zip(rows, runs, strict=True)]
    if any(run.note for run in runs):
        head.append("note")
        rows = [[*row, run.note or ""] for row, run in zip(rows, runs, strict=True)]
    print_table(head, rows)


def _print_comparison(
    runs: list[Past], found: dict[str, tuple[Any, ...]], columns: Sequence[str]
) -> None:
    """What differs first, then what came of it."""
    labels = [_label(run.directory, runs) for run in runs]
    rows = [[key, *(_cell_of(value) for value in values)] for key, values in found.items()]
    if not found:
        rows = [["no setting differs", *([""] * len(runs))]]
    rows.append([""] * (len(runs) + 1))
    for name in (*COLUMNS, *columns):
        rows.append([name, *(_cell(run, name) for run in runs)])
    if any(run.tags for run in runs):
        rows.append(["tags", *(" ".join(run.tags) for run in runs)])
    print_table(["setting", *labels], rows)

    reason = reason_against(runs)
    having = [run for run in runs if isinstance(run.value("val_loss"), float)]
    if reason is not None:
        print(f"no loss is best here: {reason}")
    elif len(having) > 1:
        best = min(having, key=lambda run: float(run.value("val_loss")))
        print(f"lowest held-out loss: {best.directory} ({best.value('val_loss'):.4f})")


def reason_against(runs: Sequence[Past]) -> str | None:
    """Why the losses of these runs are not to be compared; None: they may be."""
    return incomparable(
        [measure_of(run.directory, run.settings["train"]["seq_len"]) for run in runs]
    )


def _label(directory: str, runs: Sequence[Past]) -> str:
    """The last part of a directory, with as much before it as tells it apart."""
    parts = directory.split("/")
    others = [run.directory for run in runs if run.directory != directory]
    for number in range(1, len(parts) + 1):
        label = "/".join(parts[-number:])
        if not any(f"/{other}".endswith(f"/{label}") for other in others):
            return label
    return directory


def _cell(run: Past, name: str) -> str:
    value = run.value(name)
    if value is None:
        return "-"
    if name in ("val_loss", "train_loss", "best_val_loss", "bits_per_byte"):
        return f"{value:.4f}" if isinstance(value, float) else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return _short(_plain(value))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _cell_of(value: Any) -> str:
    return repr(value) if value is SET else _short(shown(value))


def _json(value: Any) -> Any:
    return repr(value) if value in (SET, UNSET) else value


def _short(text: str) -> str:
    text = redact_text(text)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
