"""Nothing from a checkpoint, a data set or a config is executed, and no secret is written, printed
or on a command line.
"""

from __future__ import annotations

import ast
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from launch.config.build import ConfigError
from launch.config.parse import parse
from launch.saved.files import load_config
from launch.saved.resume import with_saved_config
from launch.saved.run import load_run
from model.placement.record import Placement
from train.config.component import SETTINGS
from train.config.data import SourceConfig
from train.data.sources import documents

sys.path.insert(0, str(Path(__file__).parent / "end_to_end"))
sys.path.insert(0, str(Path(__file__).parent / "launch"))
from commandline import ROOT, TINY, launch, write_text
from test_validate import composed

SOURCES = [
    p
    for package in ("launch", "train", "infer", "model", "ops")
    for p in sorted((ROOT / package).rglob("*.py"))
]


# --- our sources ----------------------------------------------------------------------------------

FORBIDDEN = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "builtins",
    "os.system",
    "os.popen",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pickle.load",
    "pickle.loads",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "runpy",
    "torch.hub",
    "torch.package",
    "torch.jit.load",
    "torch.utils.cpp_extension",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "hydra.utils",
    "transformers",
    "numpy.lib.npyio",
)
"""Names that execute what they read, with all that is below them."""
OFF = {"shell": "False", "trust_remote_code": "False", "allow_pickle": "False"}
"""Arguments that may have no other value."""
UNPICKLER = "train/checkpoint/reader.py"
"""The one file that unpickles, with an unpickler that knows a list of names
(tests/train/test_checkpoint.py).
"""

VERIFIER = "train/pretrained/verify.py"
"""The one file that imports transformers, to load a folder that this process has just written; no
code of a repository is trusted.
"""


def violations(path: Path, name: str) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                alias.asname or alias.name.split(".")[0]: alias.name
                if alias.asname
                else alias.name.split(".")[0]
                for alias in node.names
            }
            yield from (
                f"{node.lineno}: {alias.name}" for alias in node.names if forbidden(alias.name)
            )
        elif isinstance(node, ast.ImportFrom):
            aliases |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
            yield from (
                f"{node.lineno}: {node.module}.{alias.name}"
                for alias in node.names
                if forbidden(f"{node.module}.{alias.name}")
            )

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        # A name that is given a value, as the field of a record is, calls nothing.
        given = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        if isinstance(node, (ast.Attribute, ast.Name)) and not given:
            called = dotted(node)
            its_own = "transformers" if name == VERIFIER else None
            if forbidden(called, its_own) or (
                called.startswith("pickle.Unpickler") and name != UNPICKLER
            ):
                yield f"{node.lineno}: {called}"
        if isinstance(node, ast.Call):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield from (
                f"{node.lineno}: {option}={options[option]}"
                for option in OFF
                if options.get(option, OFF[option]) != OFF[option]
            )
            if dotted(node.func) == "torch.load" and options.get("weights_only") != "True":
                yield f"{node.lineno}: torch.load without weights_only=True"


def forbidden(name: str, but: str | None = None) -> bool:
    return any(
        name == word or name.startswith(f"{word}.") for word in FORBIDDEN if word != but
    ) or name.startswith(("os.exec", "os.spawn", "os.posix_spawn"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    assert not list(violations(path, str(path.relative_to(ROOT))))


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "exec(x)",
        "import os as o; o.system('x')",
        "from os import system; system('x')",
        "import runpy",
        "import torch; torch.load(f)",
        "from torch import load; load(f, weights_only=False)",
        "import pickle as p; p.loads(b)",
        "from pickle import load",
        "import pickle; pickle.Unpickler(f).load()",
        "run('x', shell=True)",
        "run('x', shell=flag)",
        "import yaml; yaml.load(f, Loader=L)",
        "from hydra.utils import instantiate",
        "import hydra; hydra.utils.get_class(x)",
        "load_dataset(p, trust_remote_code=True)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "f = eval",
        "from transformers import AutoModel",
        "import torch; torch.hub.load(x)",
        "import os; os.execvp('x', [])",
    ],
)
def test_the_walk_finds_planted_violations(line, tmp_path):
    (tmp_path / "bad.py").write_text(line)
    assert list(violations(tmp_path / "bad.py", "bad.py"))


def test_the_walk_lets_honest_code_pass(tmp_path):
    (tmp_path / "good.py").write_text(
        "import json, pickle, re, torch, numpy as "
        "np\nmodel.eval()\nre.compile('x')\ntorch.compile(model)\n"
        "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\njson.load(f)\nrun([x], "
        "shell=False)\n"
        "raise pickle.UnpicklingError()\n"
        "class Settings:\n    compile: str = 'none'\n"
    )
    assert not list(violations(tmp_path / "good.py", "good.py"))


# --- every call that opens, loads, runs or connects -----------------------------------------------

REVIEWED = Path(__file__).parent / "reviewed_calls.txt"
"""PATH FUNCTION CALL: KIND, a line for each; the kinds are rows of docs/reliability.md, "What is
read and run".
"""
CALLS = (
    "open",
    "io.open",
    "os.open",
    "os.fdopen",
    "mmap",
    "shutil.copyfile",
    "shutil.copytree",
    "shutil.move",
    "os.symlink",
    "os.link",
    "numpy.load",
    "numpy.memmap",
    "numpy.fromfile",
    "numpy.loadtxt",
    "numpy.genfromtxt",
    "numpy.save",
    "numpy.savez",
    "numpy.savez_compressed",
    "torch.load",
    "torch.save",
    "torch.ops.load_library",
    "torch.classes.load_library",
    "ctypes.CDLL",
    "ctypes.cdll",
    "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.save",
    "pickle.Unpickler",
    "pickle.dump",
    "yaml",
    "omegaconf.OmegaConf.load",
    "omegaconf.OmegaConf.create",
    "hydra.main",
    "importlib.import_module",
    "importlib.util.spec_from_file_location",
    "subprocess",
    "os.popen",
    "os.fork",
    "multiprocessing",
    "tempfile",
    "zipfile.ZipFile",
    "tarfile.open",
    "gzip",
    "bz2",
    "lzma",
    "zstandard",
    "csv.reader",
    "pyarrow.CompressedInputStream",
    "pyarrow.memory_map",
    "pyarrow.parquet.ParquetFile",
    "tokenizers.Tokenizer",
    "datasets.load_dataset",
    "datasets.load_dataset_builder",
    "datasets.load_from_disk",
    "datasets.DownloadManager",
    "huggingface_hub",
    "megatron.core.datasets.gpt_dataset.GPTDataset",
    "megatron.core.datasets.indexed_dataset.IndexedDataset",
    "megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder",
    "socket.socket",
    "socket.create_server",
    "socket.create_connection",
    "socket.socketpair",
    "urllib.request",
    "requests",
    "http",
    "wandb.init",
    "wandb.Api",
    "torch.utils.tensorboard.SummaryWriter",
    "torch.distributed.init_process_group",
    "torch.distributed.TCPStore",
    "torch.distributed.FileStore",
    "torch.distributed.HashStore",
    "deepspeed.initialize",
    "triton.compile",
    "sqlite3",
    "asyncio",
    "ssl",
    "eval",
    "exec",
    "compile",
    "__import__",
)
"""Functions, and modules with all that is below them."""
NO_CALLS = ("subprocess.TimeoutExpired", "subprocess.CompletedProcess")
METHODS = frozenset(
    {
        "open",
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
        "extractall",
        "hardlink_to",
        "symlink_to",
    }
)
"""Of any object, since a path is not told from others by its name."""
OTHER_OPEN = ("samples.open", "self.samples.open")
"""Methods of ours that open nothing themselves."""


def opening_calls(path: Path, name: str) -> Iterator[str]:
    """ "PATH FUNCTION CALL" of every call of CALLS and METHODS in a file, as often as it stands
    there.
    """
    tree = ast.parse(path.read_text())
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    def walk(node: ast.AST, within: tuple[str, ...]) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inside = within
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = (*within, child.name)
            if isinstance(child, ast.Call):
                called = dotted(child.func)
                known = called not in NO_CALLS and any(
                    called == word or called.startswith(f"{word}.") for word in CALLS
                )
                method = (
                    isinstance(child.func, ast.Attribute)
                    and child.func.attr in METHODS
                    and called not in OTHER_OPEN
                )
                if known or method:
                    shown = called if known else f".{called.rpartition('.')[2]}"
                    yield f"{name} {'.'.join(within) or '(module)'} {shown}"
            yield from walk(child, inside)

    yield from walk(tree, ())


def reviewed() -> dict[str, str]:
    lines = [
        line for line in REVIEWED.read_text().splitlines() if line and not line.startswith("#")
    ]
    return {call: kind for call, _, kind in (line.partition(": ") for line in lines)}


def test_every_call_that_opens_or_runs_something_is_reviewed():
    found = {call for path in SOURCES for call in opening_calls(path, str(path.relative_to(ROOT)))}
    known = set(reviewed())
    assert not found - known, (
        "who may have written what these read or run, and what is promised then? Answer in "
        f"docs/reliability.md, and name its row in {REVIEWED.name}:\n"
        + "\n".join(sorted(found - known))
    )
    gone = sorted(known - found)
    assert not gone, f"no longer there, drop from {REVIEWED.name}:\n" + "\n".join(gone)


def test_every_kind_of_reviewed_call_is_a_row_of_the_documentation():
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert not [kind for kind in sorted(set(reviewed().values())) if f"\n| {kind} |" not in text]


@pytest.mark.parametrize(
    "line",
    [
        "open('x')",
        "import numpy as np; np.load(f)",
        "p.open('w')",
        "from pathlib import Path; Path('x').read_text()",
        "import subprocess; subprocess.run(['x'])",
        "from subprocess import Popen; Popen(['x'])",
        "import tempfile; tempfile.mktemp()",
        "import socket as s; s.socket()",
        "from torch import load; load(f)",
        "import os; os.open('x', 0)",
        "import yaml; yaml.safe_load(t)",
        "import torch.distributed as dist; dist.TCPStore('h', 1)",
        "class A:\n    def f(self):\n        self.p.write_bytes(b'')",
    ],
)
def test_the_review_sees_planted_calls(line, tmp_path):
    (tmp_path / "new.py").write_text(line)
    assert len(list(opening_calls(tmp_path / "new.py", "new.py"))) == 1


def test_the_review_leaves_other_calls_alone(tmp_path):
    (tmp_path / "fine.py").write_text(
        "samples.open(0, 1)\njson.loads(t)\nmodel.load(x)\nimport re\nre.compile('x')\n"
    )
    assert not list(opening_calls(tmp_path / "fine.py", "fine.py"))


# --- configs, metadata, data ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "runpy.run_path",
        "evil.Evil",
        "model.os.system",
        "model",
        "model.transformer.torch.load",
    ],
)
def test_a_component_that_is_not_ours_is_refused_and_nothing_runs(target, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = {
        "command": f"touch {marker}",
        "args": ["touch", str(marker)],
        "_args_": [f"touch {marker}"],
        "path_name": str(tmp_path / "evil.py"),
    }
    for kind in SETTINGS:
        with pytest.raises(ConfigError, match=f"^{kind}.name is .*; choose one of"):
            parse(composed() | {kind: {"name": target, **arguments}}, 1)
        with pytest.raises(ConfigError, match=f"^{kind}._target_ is .*, to one of"):
            parse(composed() | {kind: {"_target_": target, **arguments}}, 1)
    assert not marker.exists() and "evil" not in sys.modules


TAGS = (
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:os.system ['touch {}']",
    "!!python/name:os.system",
    "!!python/module:evil",
)


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags_do_not_execute(tag, tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "config.yaml").write_text(f"seed: {tag.format(marker)}\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        OmegaConf.load(tmp_path / "config.yaml")
    with pytest.raises(Exception, match=r"config\.yaml"):
        load_run(str(tmp_path))
    (tmp_path / "placement.json").write_text(tag.format(marker))
    with pytest.raises(ValueError, match=r"placement\.json"):
        Placement.load(tmp_path / "placement.json")
    data = tmp_path / "data"
    data.mkdir()
    (data / "README.md").write_text(f"---\nconfigs: {tag.format(marker)}\n---\n")
    (data / "data.txt").write_text("text\n")
    with pytest.raises(Exception, match=r"data|tag"):
        list(documents(SourceConfig(str(data), text_column="text")))
    assert not marker.exists()


def test_a_data_set_brings_no_code(tmp_path):
    marker, data = tmp_path / "executed", tmp_path / "evil"
    data.mkdir()
    (data / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises((ValueError, RuntimeError), match=r"evil\.py"):
        list(documents(SourceConfig(str(data))))
    assert not marker.exists()


# --- secrets --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_secrets_are_neither_written_nor_printed_nor_on_a_command_line(tmp_path):
    secrets = {
        "WANDB_API_KEY": "deadbeef" * 5,
        "HF_TOKEN": "hf_" + "q" * 34,
        "MY_PASSWORD": "correct-horse-battery",
    }
    in_file = "only-in-the-secrets-file"
    (tmp_path / "secrets").write_text(f"SITE_TOKEN={in_file}\n")
    (tmp_path / "secrets").chmod(0o600)
    lines: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                lines.add(" ".join(process.info["cmdline"] or ()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = launch(
            "train",
            *TINY,
            *write_text(tmp_path),
            "train.num_steps=3",
            f"run_dir={tmp_path / 'run'}",
            "launch=torchrun",
            "+launch.env.MY_SETTING=seen",
            "tracker.wandb.mode=offline",
            f"launch.secrets_file={tmp_path / 'secrets'}",
            env=secrets,
        )
    finally:
        done.set()
        watcher.join()
    output = result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["step"] == 3
    written = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(written) > 5 and any(p.suffix == ".wandb" for p in written)
    assert (
        any("launch.job.agent" in line for line in lines)
        and "seen" in (tmp_path / "run" / "config.yaml").read_text()
    )
    for secret in (*secrets.values(), in_file):
        assert secret not in output
        assert not [p for p in written if secret.encode() in p.read_bytes()]
        assert not [line for line in lines if secret in line]


def test_a_secret_in_launch_env_is_refused_without_showing_it():
    result = launch(
        "train",
        "+launch.env.WANDB_API_KEY=0123456789abcdef0123",
        "launch.dry_run=true",
        check=False,
    )
    assert (
        result.returncode == 2
        and "WANDB_API_KEY" in result.stderr
        and "secrets_file" in result.stderr
    )
    assert "0123456789abcdef0123" not in result.stderr + result.stdout


# --- what stands in settings is printed and saved -------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "experiment_name",
        "tracker.wandb.project",
        "train.sample_prompt",
        "run_dir",
        "data.tokenizer.end_of_document",
        "data.cache_dir",
        "data.sources.0.name",
    ],
)
@pytest.mark.parametrize("form", ["{}", "before {} after"])
def test_no_setting_may_hold_a_secret_of_the_environment(setting, form, monkeypatch):
    monkeypatch.setenv("SITE_TOKEN", "correct-horse-battery-staple")
    config = composed(f"++{setting}='{form.format('${oc.env:SITE_TOKEN}')}'")
    with pytest.raises(ConfigError) as error:
        parse(config, 1)
    assert f"{setting} holds the secret of the variable SITE_TOKEN" in str(error.value)
    assert "correct-horse" not in str(error.value)


def test_a_variable_that_holds_a_word_hides_no_setting(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "disabled")
    parse(composed("tracker.wandb.mode=disabled"), 1)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c "
        "[*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f "
        "[*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
        "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\ni: &i "
        "[*h,*h,*h,*h,*h,*h,*h,*h,*h]\n",
        "a: &a {b: *a}\n",
        "[" * 5000,
        "x: " * 3000,
    ],
)
def test_no_saved_config_keeps_a_command_busy(text, tmp_path):
    """Aliases of aliases stand for 9^9 nodes; deep nesting for more stack than there is."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_config(str(tmp_path / "config.yaml"))


def test_a_run_that_others_can_write_is_not_resumed(tmp_path):
    """Its config says what ranks load and where keys are sent, so the owner is looked at before the
    config.
    """
    (tmp_path / "config.yaml").write_text("launch: {env: {PYTHONPATH: elsewhere}}\n")
    for place in (tmp_path, tmp_path / "config.yaml"):
        mode = place.stat().st_mode
        place.chmod(0o777)
        with pytest.raises(ValueError, match="can be written by everybody"):
            with_saved_config(OmegaConf.create({"resume": str(tmp_path), "run_dir": None}))
        place.chmod(mode)
