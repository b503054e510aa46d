"""The house rules that a machine can hold: imports point down, between packages and between the
rooms of a package; a room is one idea; third parties have homes; names are ours.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("launch", "train", "infer", "model", "ops")
"""A package may import itself and anything to its right."""
COMMANDS = (
    "audit",
    "benchmark",
    "branch",
    "evaluate",
    "export",
    "generate",
    "place",
    "plan",
    "prepare",
    "quantize",
    "serve",
    "teach",
)
PAGES = ("dashboard", "doctor", "report")
"""Rooms that are commands with something to show."""
FLOORS = {
    "launch": (
        ("__main__", "compare", "train"),
        (*COMMANDS, *PAGES),
        ("comparing", "harness", "layouts"),
        ("job",),
        ("launchers", "runs"),
        ("history",),
        ("benchmarking", "prompts", "saved", "serving"),
        ("command", "page", "steering"),
        ("config",),
        ("process",),
    ),
    "train": (
        ("fit",),
        ("loop", "observers"),
        ("evaluation", "step"),
        ("parts",),
        ("progress",),
        ("audit", "objectives", "sinks", "trained"),
        ("guard", "timing"),
        ("observe", "pretrained"),
        ("checkpoint", "data", "pipeline"),
        ("components", "engine"),
        ("agenda", "rank"),
        ("config", "files"),
    ),
    "infer": (
        ("engine",),
        ("graphs",),
        ("batch",),
        ("sequence",),
        ("replay", "request", "sampling"),
        ("budget", "config", "pages", "speculate"),
    ),
    "model": (
        ("generate", "paging", "routing"),
        ("transformer",),
        ("adapters",),
        ("blocks", "init"),
        ("moe",),
        ("attention",),
        ("dispatch", "families", "routers", "target_loss"),
        ("distillation",),
        ("cost", "layers", "lora", "loss", "request", "weight_sums"),
        ("parallel", "placement", "scaling"),
        ("component", "config"),
    ),
    "ops": (
        ("compile/ahead_of_time",),
        ("compressed_attention",),
        ("index_attention",),
        ("gather_attention",),
        ("all_to_all", "grouped_mlp", "router", "sparse_attention", "testing"),
        ("grouped_mlp/fp8", "permute"),
        ("compile",),
        ("compiling", "device", "lazy"),
    ),
}
"""Rooms of a package by floor, from top to bottom: a room imports itself and rooms of floors below
it. A file beside the rooms is a room of its own; room/file takes one file of a room elsewhere.
"""
CROSSINGS: dict[tuple[str, str], str] = {}
"""(importing file, imported room) -> why this one import may run up or across."""
SIZES: dict[str, str] = {
    "launch": "a command is a file or a room, and there are many of them",
    "launch/saved": "each kind of saved thing that a run can name has its file",
}
"""Folder -> why it has fewer than 2 or more than 10 files."""
CODE_IN_INIT = {
    "launch": "Ctrl-C in the imports of a command needs no traceback, and this is the first import",
}
"""Folder -> why its __init__ does more than say what the folder is."""
HOMES = {
    "hydra": ("launch/",),
    "omegaconf": ("launch/",),
    "deepspeed": ("train/engine/",),
    "megatron": ("model/parallel/", "train/data/", "train/engine/schedule.py"),
    "wandb": ("train/sinks/weights_and_biases.py", "launch/dashboard/command.py"),
    "tensorboard": ("train/sinks/tensorboard.py",),
    "datasets": ("train/data/sources.py",),
    "tokenizers": ("train/data/",),
    "safetensors": ("train/pretrained/",),
    "transformers": ("train/pretrained/verify.py",),
    "peft": ("train/pretrained/verify.py",),
    "lm_eval": ("launch/harness/",),
    "jinja2": ("launch/page/", "train/data/chat/"),
    "markupsafe": ("launch/page/",),
    "starlette": ("launch/serving/",),
    "uvicorn": ("launch/serving/",),
    "prometheus_client": ("launch/serving/",),
}


def files(package: str, root: Path = ROOT) -> list[Path]:
    return sorted((root / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """Dotted names of absolute imports with their lines, those inside functions included.

    `from a import b` gives a.b, whether b is a module or a name in one.
    """
    return imports_in(path.read_text())


@functools.cache
def imports_in(text: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def first_words(path: Path) -> list[tuple[int, str]]:
    return list(dict.fromkeys((line, name.split(".")[0]) for line, name in imports(path)))


def upward(package: str, words: list[tuple[int, str]]) -> list[tuple[int, str]]:
    banned = {*ORDER[: ORDER.index(package)], "tests", "bench"}
    return [(line, word) for line, word in words if word in banned]


# --- between packages -----------------------------------------------------------------------------


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down(package):
    wrong = [
        f"{p.relative_to(ROOT)}:{line} imports {word}"
        for p in files(package)
        for line, word in upward(package, first_words(p))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_import_rule_catches_a_planted_violation(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from train.loop import fit\n")
    assert upward("model", first_words(tmp_path / "x.py")) == [(2, "train")]


# --- what is imported is there --------------------------------------------------------------------


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Where a module of ours lies, by its dotted name."""
    path = root.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@functools.cache
def names_of(path: Path) -> frozenset[str]:
    """What a module defines or imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return frozenset(found)


def is_there(name: str, root: Path = ROOT) -> bool:
    """Whether a dotted name is a module of ours or stands in one."""
    if module_file(name, root) or root.joinpath(*name.split(".")).is_dir():
        return True
    module, _, last = name.rpartition(".")
    file = module_file(module, root) if module else None
    return file is not None and (last in names_of(file) or "__getattr__" in names_of(file))


def test_what_benches_and_tests_import_is_there():
    """No run of the tests imports a bench, and a test that starts ranks imports late."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in ("bench", "tests", *ORDER)
        for path in files(package)
        for line, name in imports(path)
        if name.split(".")[0] in (*ORDER, "bench") and not is_there(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_an_import_of_what_is_gone_is_seen(tmp_path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house/tools.py").write_text("def saw(): ...\n")
    assert is_there("house.tools.saw", tmp_path) and is_there("house.tools", tmp_path)
    assert not is_there("house.tools.hammer", tmp_path) and not is_there("house.nails", tmp_path)


# --- rooms and floors -----------------------------------------------------------------------------


def room_of(parts: tuple[str, ...], floors: Iterable[Iterable[str]]) -> str | None:
    """The room of a module, from the parts of its name after the package. None: the package."""
    if not parts or parts == ("__init__",):
        return None
    named = {name for floor in floors for name in floor}
    return joined if (joined := "/".join(parts[:2])) in named else parts[0]


def crossings(
    package: str, floors: tuple[tuple[str, ...], ...], root: Path = ROOT
) -> list[tuple[str, int, str, str]]:
    """(file, line, its room, imported room) of imports from one room of a package into another."""
    found = []
    for path in files(package, root):
        name = path.relative_to(root)
        here = room_of(name.with_suffix("").parts[1:], floors)
        for line, imported in imports(path):
            first, *rest = imported.split(".")
            there = room_of(tuple(rest), floors) if first == package else None
            if there is not None and there != here:
                found.append((name.as_posix(), line, here or "__init__", there))
    return list(dict.fromkeys(found))


def not_downward(
    package: str,
    floors: tuple[tuple[str, ...], ...],
    allowed: Mapping[tuple[str, str], str],
    root: Path = ROOT,
) -> list[str]:
    """Imports that do not lead to a floor below, a line each."""
    level = {name: number for number, floor in enumerate(floors) for name in floor}
    return [
        f"{file}:{line} is in {here} and imports {there}, which stands on no floor below it"
        for file, line, here, there in crossings(package, floors, root)
        if level.get(here, len(floors)) >= level.get(there, -1)
        and (file, f"{package}/{there}") not in allowed
    ]


def a_circle(package: str, floors: tuple[tuple[str, ...], ...], root: Path = ROOT) -> str | None:
    """Rooms that import each other in a circle."""
    below: dict[str, set[str]] = {}
    for _, _, here, there in crossings(package, floors, root):
        below.setdefault(here, set()).add(there)
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        return " <- ".join(error.args[1])
    return None


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_stands_on_a_floor(package):
    there = {
        room_of(p.relative_to(ROOT / package).with_suffix("").parts, FLOORS[package])
        for p in files(package)
    }
    named = [name for floor in FLOORS[package] for name in floor]
    assert len(set(named)) == len(named)
    assert set(named) == there - {None}, f"FLOORS[{package!r}] and the rooms of {package}/ differ"


@pytest.mark.parametrize("package", FLOORS)
def test_a_room_imports_rooms_below_it_only(package):
    wrong = not_downward(package, FLOORS[package], CROSSINGS)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", FLOORS)
def test_no_rooms_import_each_other_in_a_circle(package):
    assert a_circle(package, FLOORS[package]) is None


def test_an_exception_that_nothing_needs_is_taken_back():
    needed = {
        (file, f"{package}/{there}")
        for package, floors in FLOORS.items()
        for file, _, _, there in crossings(package, floors)
    }
    assert set(CROSSINGS) <= needed


HOUSE = {
    "house/__init__.py": '"""A house."""\n',
    "house/top.py": "from house.upper import work\n",
    "house/upper/__init__.py": '"""Works."""\n',
    "house/upper/work.py": "import house.lower.tools\n",
    "house/lower/__init__.py": '"""Holds tools."""\n',
    "house/lower/tools.py": "import json\n",
}
HOUSE_FLOORS = (("top",), ("upper",), ("lower",))


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        (
            "lower/tools.py",
            "from house.upper.work import f\n",
            "house/lower/tools.py:1 is in lower",
        ),
        ("lower/tools.py", "def f():\n    import house.upper.work as w\n", "lower/tools.py:2"),
        ("lower/tools.py", "def f():\n    from house import top\n", "imports top"),
        ("lower/tools.py", "if TYPE_CHECKING:\n    from house.top import T\n", "imports top"),
        ("cellar/deep.py", "import house.lower.tools\n", "is in cellar and imports lower"),
        ("lower/tools.py", "from house.cellar import deep\n", "imports cellar"),
        ("__init__.py", "from house.top import f\n", "is in __init__ and imports top"),
    ],
)
def test_the_floors_catch_a_planted_violation(tmp_path, file, text, told):
    for name, content in {**HOUSE, f"house/{file}": text}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (wrong,) = not_downward("house", HOUSE_FLOORS, {}, tmp_path)
    assert told in wrong


def test_the_house_without_a_violation_is_quiet_and_a_listed_one_is_let_pass(tmp_path):
    for name, content in HOUSE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert not not_downward("house", HOUSE_FLOORS, {}, tmp_path)
    assert a_circle("house", HOUSE_FLOORS, tmp_path) is None
    (tmp_path / "house/lower/tools.py").write_text("def f():\n    import house.upper.work\n")
    allowed = {("house/lower/tools.py", "house/upper"): "planted"}
    assert not not_downward("house", HOUSE_FLOORS, allowed, tmp_path)
    assert a_circle("house", HOUSE_FLOORS, tmp_path) in (
        "lower <- upper <- lower",
        "upper <- lower <- upper",
    )
    apart = (*HOUSE_FLOORS[:1], ("lower/tools",), *HOUSE_FLOORS[1:])
    assert not not_downward(
        "house", apart, {("house/upper/work.py", "house/lower/tools"): ""}, tmp_path
    )


# --- what a room is -------------------------------------------------------------------------------


def folders() -> list[Path]:
    """launch, train, model, and every folder in them that holds modules."""
    return sorted({path.parent for package in ORDER[:3] for path in files(package)})


def problem_of_init(text: str) -> str | None:
    """What is wrong with the __init__ of a room: it holds one sentence and no code."""
    tree = ast.parse(text)
    said = ast.get_docstring(tree)
    if said is None:
        return "it does not say what the room is"
    if not said.endswith(".") or re.search(r"[.!?]\s", said):
        return "it says more or less than one sentence"
    return "it holds code" if len(tree.body) > 1 else None


def test_every_room_says_in_one_sentence_what_it_is():
    wrong = []
    for folder in folders():
        name, init = folder.relative_to(ROOT).as_posix(), folder / "__init__.py"
        problem = problem_of_init(init.read_text()) if init.is_file() else "it is missing"
        if problem is not None and (name not in CODE_IN_INIT or problem != "it holds code"):
            wrong.append(f"{name}/__init__.py: {problem}")
        elif problem is None and name in CODE_IN_INIT:
            wrong.append(f"{name} needs no exception in CODE_IN_INIT")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('"""Where records go."""\n', None),
        ("import os\n", "does not say"),
        ('"""Where records go"""\n', "one sentence"),
        ('"""Where records go. And more."""\n', "one sentence"),
        ('"""Where records go."""\n\nfrom x import y\n', "code"),
    ],
)
def test_an_init_that_says_too_much_or_too_little_is_seen(text, problem):
    found = problem_of_init(text)
    assert found is None if problem is None else problem in str(found)


def test_rooms_have_two_to_ten_files():
    sizes = {
        folder.relative_to(ROOT).as_posix(): len({*folder.glob("*.py")} - {folder / "__init__.py"})
        for folder in folders()
    }
    wrong = {name for name, size in sizes.items() if not 2 <= size <= 10}
    assert wrong == set(SIZES), {name: sizes.get(name) for name in wrong ^ set(SIZES)}


# --- third parties and names ----------------------------------------------------------------------


@pytest.mark.parametrize("package", ORDER)
def test_third_parties_stay_in_their_homes(package):
    wrong = []
    for path in files(package):
        name = str(path.relative_to(ROOT))
        wrong += [
            f"{name}:{line} imports {word}"
            for line, word in first_words(path)
            if word in HOMES and not name.startswith(HOMES[word])
        ]
    assert not wrong, "\n".join(wrong)


def test_relative_imports_are_not_used():
    wrong = [
        str(p)
        for package in ORDER
        for p in files(package)
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong


@pytest.mark.parametrize("package", ORDER)
def test_packages_come_from_this_tree(package):
    module = importlib.import_module(package)
    assert Path(module.__file__).parent == ROOT / package


def test_conf_holds_yaml_only_and_tests_are_no_package():
    assert not list((ROOT / "conf").rglob("*.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


# --- docs/architecture.md -------------------------------------------------------------------------

PAGE = ROOT / "docs/architecture.md"


def map_row(folder: Path) -> str:
    """The row of a room: what the first sentence of its __init__ says."""
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return f"| `{folder.relative_to(ROOT).as_posix()}/` | {said.split('. ')[0].rstrip('.')}. |"


def floor_line(package: str) -> str:
    return f"- {package}: " + " > ".join(", ".join(floor) for floor in FLOORS[package])


def test_the_map_has_every_room_with_its_sentence():
    rooms = [
        init.parent for package in ORDER for init in sorted(ROOT.glob(f"{package}/*/__init__.py"))
    ]
    expected = [map_row(room) for room in rooms]
    said = [
        line
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `") and line in expected
    ]
    assert said == expected, "rows that docs/architecture.md lacks: " + "\n".join(
        row for row in expected if row not in said
    )


def test_the_page_shows_the_floors():
    lines = PAGE.read_text().splitlines()
    missing = [line for package in FLOORS if (line := floor_line(package)) not in lines]
    assert not missing, "docs/architecture.md should say:\n" + "\n".join(missing)
