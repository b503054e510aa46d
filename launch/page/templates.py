"""Pages as templates: one file that needs neither network nor server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from launch.page.numbers import fmt
from launch.process.secrets import redact_text
from train.files.strict_json import dumps

HERE = Path(__file__).parent


def templates(folder: Path, **names: Any) -> jinja2.Environment:
    """Templates of a folder, which may include the files of this one: every value is escaped, and
    a name not given is an error.

    Args:
        names: what every template of the folder may use.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"redact": redact_text, "fmt": fmt}
    environment.globals |= names
    return environment


def embedded(payload: Any) -> Markup:
    """Data for a page's script, as the content of a script element of type application/json."""
    # "<" as an escape, so that no text of a run can end the script element.
    return Markup(dumps(payload, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
