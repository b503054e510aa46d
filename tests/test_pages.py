"""Pages say what is there: files that they name exist, every decision is listed, checks before a
commit need no network.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("ops/**/*.md"))
    # These two tell what was, by the names of its time.
    if page.name not in ("log.md", "CHANGELOG.md")
)
DECISIONS = sorted(p for p in ROOT.glob("docs/decisions/*.md") if p.name != "README.md")
FOLDERS = "launch|train|infer|model|ops|bench|tests|conf|docs"
FILE = re.compile(
    rf"(?:{FOLDERS})/(?:[\w./-]+\.(?:py|md|ya?ml|json|html|sh|cu|cpp|h|txt)|[\w./-]*/)"
)
"""A path from the root with the ending of a file, or of a folder: names of metrics have neither."""
PARTS = ("**Context.**", "**Decision.**", "**Consequence.**", "**What would change our mind.**")


def named_files(text: str) -> list[str]:
    """Paths from the root in code spans, without patterns such as `conf/<group>` or `model/*`."""
    return [span for span in re.findall(r"`([^`\n]+)`", text) if FILE.fullmatch(span)]


def missing(page: Path, text: str) -> list[str]:
    """Files, links and anchors of a page that do not exist, but for files that a diff of the page
    makes.
    """
    made = re.findall(r"^\+\+\+ b/(\S+)$", text, re.M)
    named = [name for name in named_files(text) if name not in made]
    found = [name for name in named if not (ROOT / name).exists()]

    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if path and not target.exists():
            found.append(path)
        elif anchor and anchor not in anchors(text if not path else target.read_text()):
            found.append(link)
    return found


def anchors(text: str) -> set[str]:
    """What a page's headings can be reached by."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    assert not missing(page, page.read_text())


def test_a_page_that_names_what_is_not_there_is_seen():
    page = ROOT / "docs" / "made_up.md"
    text = (
        "# A heading\n\nSee `train/loop.py`, `train/nowhere.py` and [this](log.md) or "
        "[that](nowhere.md); [here](#a-heading), [not here](#another), "
        "[there](metrics.md#nothing-of-this-name)."
    )
    assert missing(page, text) == [
        "train/nowhere.py",
        "nowhere.md",
        "#another",
        "metrics.md#nothing-of-this-name",
    ]


def test_every_page_of_the_site_is_in_its_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": ([\w/]+\.md)$", contents, re.M))
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert listed == pages


def test_every_decision_is_listed_and_has_its_parts():
    index = (ROOT / "docs/decisions/README.md").read_text()
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\)", index, re.M)
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == {page.stem for page in DECISIONS}
    for page in DECISIONS:
        text = page.read_text()
        places = [text.find(part) for part in PARTS]
        assert -1 not in places and places == sorted(places), page.name


def test_checks_before_a_commit_are_those_of_make_check_and_download_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert all(hook["language"] == "system" for hook in hooks)
    commands = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    makefile = (ROOT / "Makefile").read_text()
    parts = re.search(r"^check: ([^#\n]*)", makefile, re.M)[1].split()
    recipes = "".join(re.search(rf"^{part}:.*\n((?:\t.*\n)+)", makefile, re.M)[1] for part in parts)
    made = [line.strip().replace("$(PY)", ".venv/bin/python") for line in recipes.splitlines()]
    made = [line.removesuffix(" .") for line in made if "pytest" not in line]
    assert commands == made


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text[:200] and "Version 2.0, January 2004" in text[:200]
    assert "END OF TERMS AND CONDITIONS" in text
