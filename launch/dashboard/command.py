"""The W&B dashboard of a run as code: python -m launch.dashboard run=DIR [save=true] ..., or the
overrides of launch.train.

Writes a workspace, a report and presets of Vega charts as JSON, and the charts of a run that has
routing.jsonl as PNG. With save=true the first three go to the server, and the rows of the charts as
tables of a W&B run of their own; saving again updates what was saved before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import DictConfig

from launch.command.messages import print_result
from launch.config.overrides import plain, typed_overrides
from launch.config.parse import world_size
from launch.dashboard import vega
from launch.dashboard.panels import (
    Chart,
    Lines,
    Media,
    Panel,
    Section,
    Text,
    charts,
    sections,
    shape_of,
)
from launch.process.secrets import redact_text
from launch.runs.lines import spread_records
from launch.saved.configs import load_run_config
from train.files.durable import replacing
from train.files.strict_json import dumps

X_AXIS = "train/tokens"
PINNED = (
    "summary:train/loss",
    "summary:eval/val_loss",
    "summary:moe/max_vio",
    "summary:perf/tokens_per_second",
)
"""Columns of the table of runs that are always in sight."""
MAX_LOADS = 4_000_000
"""Most expert loads (records * layers * experts) that are read for the charts."""
HTTP_SECONDS = 20
"""How long one request to the server may take."""


@dataclass(frozen=True)
class DashboardConfig:
    """Settings of launch.dashboard."""

    run: str | None = None
    """Run directory; None: a workspace for any run of the project."""
    save: bool = False
    """Whether to save the workspace on the server; else it is only written to files."""
    report: bool = True
    """Whether to write the report as well."""
    charts: bool = True
    """Whether to write the Vega charts and log the tables that they draw."""
    project: str | None = None
    """None: tracker.wandb.project of the run."""
    entity: str | None = None
    """None: tracker.wandb.entity of the run, or else the account's default."""
    name: str | None = None
    """None: "Loadstone: <experiment_name>"."""
    output: str | None = None
    """None: RUN/dashboard, or runs/dashboard without a run."""

    def problems(self) -> list[str]:
        return [
            f"{name} is empty; leave it out or name one"
            for name in ("run", "project", "entity", "name", "output")
            if getattr(self, name) == ""
        ]


@dataclass(frozen=True)
class Dashboard:
    """What is written and saved."""

    entity: str
    """"": the account's default, which only the server knows."""
    project: str
    """W&B project that holds the workspace."""
    name: str
    """Title of the workspace."""
    sections: tuple[Section, ...]
    """Its sections, from top to bottom."""
    run_ids: tuple[str, ...]
    """W&B ids of the run directory: pinned in the workspace, and what the report shows."""
    presets: tuple[str, ...]
    """Names of the Vega charts that are used, keys of PRESETS."""
    tables: dict[str, list[vega.Row]]
    """Rows of the charts, by preset; {} without routing.jsonl."""

    @property
    def charts_id(self) -> str:
        """The W&B run that holds the tables: not the training's own, which may still be written."""
        return f"{self.run_ids[-1] if self.run_ids else 'loadstone'}-charts"


def main(config: DictConfig) -> None:
    """Write the files, save them to the server with save=true, and print where things are."""
    settings, run = read(config)
    shape = shape_of(run)
    presets = tuple(vega.PRESETS) if settings.charts and shape.moe_layers else ()

    # The charts are drawn from the routing records of a run, thinned to what W&B takes.
    records = []
    if settings.run and presets:
        loads = len(shape.moe_layers) * run.model.num_experts
        records = spread_records(
            Path(settings.run) / "routing.jsonl", max(2, min(vega.MAX_COLUMNS, MAX_LOADS // loads))
        )

    # A chart stands in the dashboard only where there are rows for it to draw.
    further = [charts(presets, records[-1]["step"])] if records else []
    dashboard = Dashboard(
        settings.entity or run.tracker.wandb.entity or "",
        settings.project or run.tracker.wandb.project,
        as_title(settings.name or f"Loadstone: {run.experiment_name}"),
        tuple(sections(shape, *further)),
        wandb_ids(Path(settings.run)) if settings.run else (),
        presets,
        {name: vega.PRESETS[name].rows(records, shape.moe_layers) for name in presets if records},
    )

    output = Path(
        settings.output or (Path(settings.run) / "dashboard" if settings.run else "runs/dashboard")
    )
    found: dict[str, Any] = {
        "output": str(output),
        "files": write(dashboard, output, settings.report),
    }

    for section in dashboard.sections:
        print(f"{section.name}: {len(section.panels)} panels")
    print(f"written to {output}: {', '.join(found['files'])}")

    if settings.save:
        found["saved"] = save(dashboard, output, settings.report)
        for kind, address in found["saved"].items():
            print(f"{kind}: {address}")
    else:
        print("nothing was sent; save=true saves to W&B")
    print_result(found)


def read(config: DictConfig) -> tuple[DashboardConfig, Any]:
    """The command's settings, and the RunConfig that they are about: that of the run, or that of
    the overrides.
    """
    from launch.config.build import ConfigError, build_record
    from launch.config.parse import parse
    from train.config.run import RunConfig

    own = {field.name for field in fields(DashboardConfig)}
    given = plain(config)
    problems: list[str] = []
    settings = build_record(
        {key: value for key, value in given.items() if key in own}, DashboardConfig, "", problems
    )
    problems = problems or settings.problems()
    if problems:
        raise ConfigError(problems)

    # Without a run the remaining overrides describe one.
    if settings.run is None:
        return settings, parse(
            {key: value for key, value in given.items() if key not in own}, world_size(config)
        )

    # With a run they would contradict its config, and be ignored without a word.
    overrides = typed_overrides()
    foreign = [override for override in overrides if override.split("=")[0].lstrip("+~") not in own]
    if foreign:
        raise ValueError(f"run={settings.run} has a config of its own; drop {', '.join(foreign)}")

    path = Path(settings.run) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a run directory of launch.train, e.g. run=runs/.../..."
        )
    run = build_record(plain(load_run_config(path)), RunConfig, "", problems)
    if problems:
        raise ConfigError(problems)
    return settings, run


def as_title(name: str) -> str:
    """The name without what W&B refuses: symbols such as = and +, and more than 128 characters."""
    return "".join("-" if unicodedata.category(c)[0] in "SC" else c for c in name)[:128]


def wandb_ids(run_dir: Path) -> tuple[str, ...]:
    """Ids of the W&B runs a run directory has logged to: the last part of
    wandb/[offline-]run-<time>-<id>.
    """
    return tuple(
        sorted(
            {
                path.name.split("-")[-1]
                for path in (run_dir / "wandb").glob("*run-*-*")
                if path.is_dir()
            }
        )
    )


# --- records to the objects of wandb-workspaces ---------------------------------------------------


def panel_of(panel: Panel, entity: str) -> Any:
    import wandb_workspaces.reports.v2 as reports

    match panel:
        case Lines():
            return reports.LinePlot(
                title=panel.title,
                x=X_AXIS,
                y=list(panel.metrics),
                metric_regex=panel.regex,
                range_y=(panel.low, panel.high),
                log_y=panel.log or None,
            )
        case Media():
            return reports.MediaBrowser(
                title=panel.title, media_keys=list(panel.keys), num_columns=1
            )
        case Chart():
            preset = vega.PRESETS[panel.preset]
            return reports.CustomChart(
                query={"summaryTable": {"tableKey": f"charts/{panel.preset}_table"}},
                chart_name=chart_id(entity, panel.preset),
                chart_fields={name: name for name in preset.fields},
                chart_strings=preset.strings,
            )
        case Text():
            return reports.MarkdownPanel(markdown=panel.markdown)


def chart_id(entity: str, preset: str) -> str:
    return f"{entity}/loadstone_{preset}"


def workspace_of(dashboard: Dashboard) -> Any:
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=dashboard.entity,
        project=dashboard.project,
        name=dashboard.name,
        sections=[
            workspaces.Section(
                name=section.name,
                panels=[panel_of(p, dashboard.entity) for p in section.panels],
                is_open=section.is_open,
            )
            for section in dashboard.sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis=X_AXIS, max_runs=20),
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=list(PINNED), pinned_runs=list(dashboard.run_ids)
        ),
    )


def report_of(dashboard: Dashboard, online: bool) -> Any:
    """online: the runs' project is named, which the library looks up on the server."""
    import wandb_workspaces.reports.v2 as reports

    blocks: list[Any] = [reports.TableOfContents()]
    for section in dashboard.sections:
        is_charts = any(isinstance(panel, Chart) for panel in section.panels)
        shown = [dashboard.charts_id] if is_charts else list(dashboard.run_ids)

        runs = reports.Runset(
            name=dashboard.name,
            filters=f"ID in {shown}" if shown else "",
            entity=dashboard.entity if online else "",
            project=dashboard.project if online else "",
        )

        # A grid of panels holds no words, which go above it.
        blocks += [reports.H1(section.name), reports.P(section.meaning)]
        blocks += [
            reports.MarkdownBlock(panel.markdown)
            for panel in section.panels
            if isinstance(panel, Text)
        ]
        blocks.append(
            reports.PanelGrid(
                runsets=[runs],
                panels=[
                    panel_of(panel, dashboard.entity)
                    for panel in section.panels
                    if not isinstance(panel, Text)
                ],
            )
        )
    return reports.Report(
        entity=dashboard.entity,
        project=dashboard.project,
        title=dashboard.name,
        blocks=blocks,
        description="Routing, budget, attention and time of Loadstone runs",
        width="fluid",
    )


# --- files ----------------------------------------------------------------------------------------


def write(dashboard: Dashboard, output: Path, report: bool) -> list[str]:
    """What save=true would send, as JSON, and the charts as PNG; returns the files' names."""
    made = {"workspace.json": _spec(workspace_of(dashboard))}
    if report:
        made["report.json"] = _spec(report_of(dashboard, online=False))
    made |= {f"charts/{name}.json": vega.spec_of(vega.PRESETS[name]) for name in dashboard.presets}
    try:
        for name, data in made.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(output / name) as scratch:
                scratch.write_text(dumps(data, indent=1) + "\n")
        return [*made, *draw(dashboard.tables, output / "charts")]
    except OSError as error:
        raise ValueError(
            f"output={output} cannot be written ({error.strerror}); choose another directory"
        ) from error


def _spec(built: Any) -> dict[str, Any]:
    """The JSON that the library would send (no public way leads to it without a server; the version
    is pinned).
    """
    spec: dict[str, Any] = json.loads(
        built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    return spec


def draw(tables: dict[str, list[vega.Row]], folder: Path) -> list[str]:
    """The charts as PNG; returns the files' names."""
    try:
        for name, rows in tables.items():
            with replacing(folder / f"{name}.png") as scratch:
                scratch.write_bytes(vega.render(vega.filled(vega.PRESETS[name], rows)))
    except ImportError:
        print("no PNG of the charts: pip install vl-convert-python")
        return []
    return [f"{folder.name}/{name}.png" for name in tables]


# --- server ---------------------------------------------------------------------------------------


class Refused(ValueError):
    """Nothing can be saved, and why."""


def save(dashboard: Dashboard, output: Path, report: bool) -> dict[str, str]:
    """Save to the server and return the addresses. What an earlier call saved from the same output
    is updated.

    Raises:
        Refused: there is no key, no server, or the server refuses.
    """
    from train.sinks.weights_and_biases import wandb_mode

    mode, reason = wandb_mode("auto")
    if mode != "online":
        raise Refused(
            f"save=true needs W&B online, but it is {mode}: {reason}"
            + (
                ""
                if "wandb login" in reason
                else "; unset WANDB_MODE, or set WANDB_BASE_URL to a server that can be reached"
            )
        )

    os.environ |= {"WANDB_SILENT": "true", "WANDB_HTTP_TIMEOUT": str(HTTP_SECONDS)}
    try:
        return _save(dashboard, output, report)
    except Refused:
        raise
    except Exception as error:
        # The client raises kinds of its own, from its service and from HTTP.
        text = redact_text(
            (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
        )
        raise Refused(
            "W&B refused to save to "
            f"{dashboard.entity or 'your default entity'}/{dashboard.project}: {text}; "
            "check the key (wandb login), entity= and project="
        ) from None


def _save(dashboard: Dashboard, output: Path, report: bool) -> dict[str, str]:
    import wandb
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    api = wandb.Api(timeout=HTTP_SECONDS)
    dashboard = dataclasses.replace(dashboard, entity=_entity(dashboard.entity, api))

    # Panels name the charts, which must exist before the workspace does.
    for name in dashboard.presets:
        api.create_custom_chart(
            entity=dashboard.entity,
            name=chart_id("", name).strip("/"),
            spec_type="vega2",
            display_name=f"Loadstone: {vega.PRESETS[name].display_name}",
            access="private",
            spec=vega.spec_of(vega.PRESETS[name]),
        )

    saved = {"charts": _log_tables(dashboard, output)} if dashboard.tables else {}

    # What was saved by an earlier call is changed in place, so that its address lives on.
    before = _saved_before(dashboard, output)
    saved["workspace"] = _update(
        workspace_of(dashboard),
        workspaces.Workspace.from_url,
        before.get("workspace"),
        ("name", "sections", "settings", "runset_settings"),
    )
    if report:
        saved["report"] = _update(
            report_of(dashboard, online=True),
            reports.Report.from_url,
            before.get("report"),
            ("title", "description", "blocks", "width"),
        )

    with replacing(output / "saved.json") as scratch:
        scratch.write_text(dumps(before | saved, indent=1) + "\n")
    return saved


def _entity(entity: str, api: Any) -> str:
    """Where to save: what was asked for, if the account may write there, or its default."""
    viewer = api.viewer
    known = [viewer.entity, *(team for team in viewer.teams if team != viewer.entity)]
    if entity and entity not in known:
        raise Refused(f"entity={entity} is none of your account's: choose {', '.join(known)}")
    return entity or viewer.entity


def _log_tables(dashboard: Dashboard, output: Path) -> str:
    """Log the rows of the charts into a W&B run of their own, the same one every time, and return
    its address.
    """
    import wandb

    run = wandb.init(
        entity=dashboard.entity,
        project=dashboard.project,
        id=dashboard.charts_id,
        resume="allow",
        name=f"{dashboard.name}, charts",
        job_type="charts",
        dir=str(output),
        settings=wandb.Settings(
            console="off",
            init_timeout=HTTP_SECONDS,
            finish_timeout=3 * HTTP_SECONDS,
            x_disable_stats=True,
            disable_git=True,
            disable_code=True,
        ),
    )

    # W&B keeps only so many rows of a table: of larger ones whole layers are left out.
    drawn = {}
    for name, rows in dashboard.tables.items():
        preset = vega.PRESETS[name]
        cells = [[row[field] for field in preset.fields] for row in vega.thinned(rows)]
        table = wandb.Table(columns=list(preset.fields), data=cells)
        drawn[f"charts/{name}"] = wandb.plot_table(
            chart_id(dashboard.entity, name),
            table,
            {field: field for field in preset.fields},
            preset.strings,
        )

    run.log(drawn)
    run.finish()
    return str(run.url)


def _update(
    built: Any, load: Callable[[str], Any], address: str | None, parts: tuple[str, ...]
) -> str:
    """Save what was built in place of what is at the address, and return the new address."""
    if address is not None:
        try:
            saved = load(address)
        except Exception:  # it was deleted: save a new one
            pass
        else:
            for part in parts:
                setattr(saved, part, getattr(built, part))
            built = saved
    return str(built.save().url)


def _saved_before(dashboard: Dashboard, output: Path) -> dict[str, str]:
    """Addresses in output/saved.json that belong to the same entity and project."""
    try:
        saved = json.loads((output / "saved.json").read_text())
    except (OSError, ValueError):
        return {}
    return {
        kind: url
        for kind, url in saved.items()
        if urlparse(url).path.strip("/").split("/")[:2] == [dashboard.entity, dashboard.project]
    }
