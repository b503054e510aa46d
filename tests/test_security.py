"""Nothing from a checkpoint, a data set or a config is executed, and no secret is written."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

from train.components import resolve
from train.config import ComponentConfig

sys.path.insert(0, str(Path(__file__).parent / "end_to_end"))
from commandline import ROOT, TINY, launch, write_text

SOURCES = [p for package in ("launch", "train", "model", "ops") for p in sorted((ROOT / package).rglob("*.py"))]
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
             "hydra.utils.instantiate", "instantiate", "marshal.loads", "shelve.open", "joblib.load", "runpy.run_path"}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_call_executes_what_it_reads(path):
    for name, options in calls(path):
        assert name not in FORBIDDEN, name
        assert name != "torch.load" or options.get("weights_only") == "True", name
        assert options.get("shell", "False") == "False", name
        assert options.get("trust_remote_code", "False") == "False", name
        assert options.get("allow_pickle", "False") == "False", name


def test_the_walk_finds_what_it_looks_for(tmp_path):
    (tmp_path / "bad.py").write_text("import os, torch\nos.system('x')\ntorch.load('f')\nprint(1, shell=True)\n")
    found = dict(calls(tmp_path / "bad.py"))
    assert "os.system" in found and found["torch.load"] == {} and found["print"] == {"shell": "True"}


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "builtins.eval", "torch.load", "runpy.run_path",
                                    "model.os.system", "model", "model.transformer.torch.load"])
def test_a_target_outside_our_classes_is_refused(target):
    for kind in ("router", "attention", "dispatcher"):
        with pytest.raises(ValueError, match="choose one of"):
            resolve(ComponentConfig(target, {}), kind)


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(tmp_path):
    secrets = {"WANDB_API_KEY": "deadbeef" * 5, "HF_TOKEN": "hf_" + "q" * 34, "MY_PASSWORD": "correct-horse-battery"}
    result = launch("train", *TINY, *write_text(tmp_path), "train.num_steps=3", f"run_dir={tmp_path / 'run'}",
                    "launch=torchrun", "+launch.env.MY_SETTING=seen", env=secrets)
    output = result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["step"] == 3
    written = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(written) > 5
    for secret in secrets.values():
        assert secret not in output
        assert not [p for p in written if secret.encode() in p.read_bytes()]


def test_a_secret_in_launch_env_is_refused_without_showing_it(tmp_path):
    result = launch("train", "+launch.env.WANDB_API_KEY=0123456789abcdef0123", "launch.dry_run=true", check=False,
                    env={"PATH": os.environ["PATH"]})
    assert result.returncode == 2 and "WANDB_API_KEY" in result.stderr and "secrets_file" in result.stderr
    assert "0123456789abcdef0123" not in result.stderr + result.stdout
