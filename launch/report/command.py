"""A run's routing on one page: python -m launch.report run=DIR (or run=[DIR,DIR2]) [output=FILE]
[png=false] [watch=true].

Reads the run directory only and writes RUN/report/index.html, which needs neither network nor
server (docs/report.md).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from launch.command.messages import print_result
from launch.command.progress import followed, working
from launch.config.build import record, require_given
from launch.process.secrets import redact_text
from train.files.durable import replacing

SAID = 5
"""Alarms of a run that the console lists."""
WATCHED = ("metrics.jsonl", "routing.jsonl", "alarms.jsonl", "audit/steps.jsonl")


@dataclass(frozen=True)
class ReportConfig:
    """Settings of launch.report."""

    run: tuple[str, ...]
    """Run directories, side by side."""
    output: str | None = None
    """A file *.html, or a folder for index.html and the pictures. None: RUN/report of the first
    run.
    """
    png: bool = True
    """Whether to draw the pictures as well."""
    watch: bool = False
    """Rebuild when files change, until interrupted."""
    interval: float = 10.0
    """Seconds between looks at the files, and between reloads of the page."""

    def problems(self) -> list[str]:
        found = [] if self.run else ["run is an empty list; give run=DIR or run=[DIR,DIR2]"]
        if not self.interval >= 0.1:
            found.append(f"interval is {self.interval}; it must be at least 0.1 seconds")
        return found


def main(config: DictConfig) -> None:
    """Write the page and its pictures; with watch, again whenever the runs' files change."""
    is_given = config.run is not None
    require_given(config, ReportConfig, is_given, "give run=DIR, or run=[DIR,DIR2]")
    if not isinstance(config.run, ListConfig):
        config = OmegaConf.merge(config, {"run": [str(config.run)]})
    settings: ReportConfig = record(config, ReportConfig)
    if settings.watch:
        try:
            watch(settings)
        except KeyboardInterrupt:
            print("\nthe last build, which no longer reloads itself:", flush=True)
    print_result(build(settings, reloads=False))


def build(settings: ReportConfig, reloads: bool) -> dict[str, Any]:
    """Read the runs, write the page and the pictures. reloads: the page reloads itself every so
    often.
    """
    from launch.report.figures import write_figures
    from launch.report.page import render, run_names
    from launch.runs.run import read_run

    started = time.perf_counter()
    runs = list(map(read_run, followed(settings.run, "reading runs", len(settings.run))))
    output = Path(settings.output or Path(settings.run[0]) / "report")
    if output.suffix.lower() not in (".html", ".htm"):
        output /= "index.html"

    with working("writing the page"):
        page = render(runs, settings.interval if reloads else None)
    names = run_names(runs)

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # a browser that reloads never sees half a page
        with replacing(output) as scratch:
            scratch.write_text(page)
        with working("drawing pictures"):
            pictures = write_figures(runs, names, output.parent) if settings.png else []
    except OSError as error:
        raise ValueError(
            f"output={output} cannot be written ({error.strerror}); choose another place"
        ) from error

    seconds = time.perf_counter() - started
    for run, name in zip(runs, names, strict=True):
        active = [alarm for alarm in run.alarms if alarm.active]
        print(f"{name}: {len(active) or 'no'} active alarm{'' if len(active) == 1 else 's'}")
        for alarm in active[:SAID]:
            print(f"    {alarm.severity}: {redact_text(alarm.text)} since step {alarm.since}")
    print(
        f"{output}: {output.stat().st_size / 1e6:.2f} MB in {seconds:.1f} s; open it in a browser",
        flush=True,
    )

    return {
        "output": str(output),
        "pictures": [str(p) for p in pictures],
        "bytes": output.stat().st_size,
        "seconds": round(seconds, 3),
        "alarms": {
            name: sum(a.active for a in run.alarms) for name, run in zip(names, runs, strict=True)
        },
    }


def watch(settings: ReportConfig) -> None:
    """Build now and after every change, for ever. A run that has nothing to show yet is waited
    for.
    """
    print(f"watching {', '.join(settings.run)}; Ctrl-C ends it", flush=True)
    built = None
    while True:
        now = stamps(settings.run)
        if now != built:
            try:
                build(settings, reloads=True)
            except ValueError as error:
                print(f"waiting: {redact_text(str(error))}", flush=True)
            built = now
        time.sleep(settings.interval)


def stamps(runs: tuple[str, ...]) -> list[tuple[int, int] | None]:
    """Size and time of the files that the page is made of."""
    facts = [
        path.stat() if (path := Path(run) / name).is_file() else None
        for run in runs
        for name in WATCHED
    ]
    return [None if f is None else (f.st_size, f.st_mtime_ns) for f in facts]
