"""Links of pages that leave docs/ name files of the repository, which the site does not have: there
they become names. A hook of mkdocs (mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with `[text](../../ops/x.md)` as "text (`ops/x.md`)"."""
    folder = posixpath.dirname(page.file.src_uri)

    def without(match: re.Match[str]) -> str:
        text, target = match[1], match[2].partition("#")[0]
        place = posixpath.normpath(posixpath.join("docs", folder, target))
        if "://" in target or place.startswith("docs/") or not target:
            return match[0]
        return text if text.strip("`") == place else f"{text} (`{place}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", without, markdown)
