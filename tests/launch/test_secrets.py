"""A secret is told from a setting, hidden wherever it stands, and never handed on."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from launch.config.overrides import plain
from launch.process.secrets import (
    REDACTED,
    forwarded_environment,
    is_secret_name,
    looks_secret,
    problems_of_env,
    read_secrets_file,
    redact,
    redact_text,
)
from tests.composing import composed

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")
HF, HEX, GITHUB, AWS = (
    "hf_" + "aB3" * 12,
    "0123456789abcdef" * 2 + "01234567",
    "ghp_" + "x1" * 18,
    "AKIA" + "ABCD" * 4,
)
KEY_FILE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn\nzaC1\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HF_TOKEN_2",
        "GITHUB_TOKEN_RO",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "MYSQL_PASSWD",
        "OPENAI_API_KEYS",
        "REDIS_AUTH",
        "DOCKER_AUTH_CONFIG",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "SECRET",
        "api_key",
        "apiKey",
        "apikey",
        "wandb.api_key",
        "token",
        "accessToken",
        "password",
        "client_secret",
        "auth",
        "*_TOKEN",
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "tokens",
        "num_tokens",
        "token_rounding",
        "keep_last",
        "key_size",
        "eos_token",
        "pad_token_id",
        "sort_key",
        "flops_per_token",
        "experts_per_token",
        "monkey",
        "author",
        "secrets_file",
        "TOKENIZERS_PARALLELISM",
        "SSH_AUTH_SOCK",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "HF_TOKEN_PATH",
        "MAX_TOKENS",
        "NUM_KEY_HEADS",
        "PATH",
        "PWD",
        "",
        "_",
        "1",
    ],
)
def test_names_of_settings(name):
    assert not is_secret_name(name)


def test_no_key_of_our_configs_is_taken_for_a_secret():
    def keys(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield str(key)
            if isinstance(value, (dict, list)):
                yield from keys(value)

    for experiment in sorted(p.stem for p in (Path(CONF) / "experiment").glob("*.yaml")):
        config = plain(composed(f"experiment={experiment}"))
        assert [key for key in keys(config) if is_secret_name(key)] == []
        assert redact(config) == config


@pytest.mark.parametrize(
    "value",
    [
        HF,
        HEX,
        GITHUB,
        AWS,
        KEY_FILE,
        "wandb_v1_" + "k" * 30,
        "sk-proj-" + "a1" * 20,
        "https://me:word@host/path",
        "http://:word@proxy:3128",
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2ln",
        f"Authorization: Bearer {'a' * 30}",
        f"key={HEX}",
    ],
)
def test_values_that_are_secrets(value):
    assert looks_secret(value) and REDACTED in redact_text(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "https://api.wandb.ai/v1",
        "http://proxy:3128",
        "https://me@host/",
        "scikit-learn",
        "task-level-0-of-experiment-1",
        f"commit {HEX}",
        f"/cache/snapshots/{HEX}/tokenizer.json",
        "a" * 40 + "f",
        HEX * 2,
        "hf_transfer",
        "model.routers.top_k",
        "<|endoftext|>",
        "runs/default/20260101-000000-a1b2c3",
        "ssh://host:22/path",
        "1e-3",
    ],
)
def test_values_that_are_none(value):
    assert not looks_secret(value) and redact_text(value) == value


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("WANDB_API_KEY=abc next", f"WANDB_API_KEY={REDACTED} next"),
        ("+launch.env.HF_TOKEN='a b'", f"+launch.env.HF_TOKEN='{REDACTED}'"),
        ('{"token": "x", "tokens": 5}', f'{{"token": "{REDACTED}", "tokens": 5}}'),
        ("https://h/p?api_key=abc&x=1", f"https://h/p?api_key={REDACTED}&x=1"),
        ("https://u:pw@h/p", f"https://{REDACTED}@h/p"),
        ("eos_token=<s> token: expected one", "eos_token=<s> token: expected one"),
        ("api_key=null", "api_key=null"),
        (f"before\n{KEY_FILE}\nafter", f"before\n{REDACTED}\nafter"),
    ],
)
def test_text_loses_its_secrets_and_nothing_else(text, clean):
    assert redact_text(text) == clean and redact_text(clean) == clean


def test_values_of_secret_variables_are_hidden_wherever_they_occur(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "open sesame")
    monkeypatch.setenv("OTHER_TOKEN", "short")
    monkeypatch.setenv("PROXY_AUTH", "disabled")
    data = {
        "note": "say open sesame",
        "mode": "disabled",
        "list": [("open sesame", 1)],
        "size": "short",
    }
    assert redact(data) == {
        "note": f"say {REDACTED}",
        "mode": "disabled",
        "list": [(REDACTED, 1)],
        "size": "short",
    }


def test_redact_hides_what_secret_keys_hold_and_keeps_the_rest():
    data = {
        "api_key": "abc",
        "credentials": {"user": "me", "retries": 3, "on": True, "none": None},
        "password": 1234,
        "tokens": 5,
        "token": None,
        "secrets_file": "/home/me/.secrets",
        "urls": ["https://a:b@c/d"],
        "lr": 0.1,
    }
    assert redact(data) == {
        "api_key": REDACTED,
        "credentials": {"user": REDACTED, "retries": REDACTED, "on": True, "none": None},
        "password": REDACTED,
        "tokens": 5,
        "token": None,
        "secrets_file": "/home/me/.secrets",
        "urls": [f"https://{REDACTED}@c/d"],
        "lr": 0.1,
    }


def test_redacting_takes_time_proportional_to_the_text():
    began = time.monotonic()
    for piece in (
        "x",
        "a.",
        "sk-",
        "eyJ-",
        "a='",
        "x://",
        "x://a:",
        "-----BEGIN KEY",
        "A_KEY=",
        "Bearer ",
        "ab12cdef",
    ):
        redact_text(piece * (100_000 // len(piece)))
    assert time.monotonic() - began < 10


# --- what ranks are given -------------------------------------------------------------------------


def test_settings_of_libraries_are_handed_on_and_nothing_else():
    environ = {
        name: "1"
        for name in (
            "NCCL_DEBUG",
            "GLOO_SOCKET_IFNAME",
            "TORCH_LOGS",
            "PYTORCH_CUDA_ALLOC_CONF",
            "OMP_NUM_THREADS",
            "CUDA_HOME",
            "TRITON_CACHE_DIR",
            "DS_ACCELERATOR",
            "HF_HOME",
            "HF_HUB_OFFLINE",
            "WANDB_MODE",
            "LD_LIBRARY_PATH",
            "PYTHONPATH",
            "UCX_TLS",
            "FI_PROVIDER",
            "TMPDIR",
            "LC_ALL",
            "no_proxy",
        )
    }
    kept_back = {
        name: "1"
        for name in (
            "CUDA_VISIBLE_DEVICES",
            "HOME",
            "PATH",
            "RANK",
            "HF_TOKEN",
            "WANDB_API_KEY",
            "MY_APP",
            "WANDB_SERVICE",
            "TORCH_API_KEY",
            "SSH_CONNECTION",
        )
    }
    assert forwarded_environment(environ | kept_back, ()) == environ
    assert forwarded_environment(
        environ | kept_back, ("MY_*", "CUDA_VISIBLE_DEVICES")
    ) == environ | {"MY_APP": "1", "CUDA_VISIBLE_DEVICES": "1"}


def test_secret_values_are_never_handed_on():
    environ = {
        "https_proxy": "http://me:word@proxy:3128",
        "http_proxy": "http://proxy:3128",
        "MY_A": HF,
        "NCCL_B": HEX,
        "SITE_PASSWORD": "open sesame",
        "MY_C": "x open sesame",
        "MY_D": "fine",
    }
    assert forwarded_environment(environ, ("MY_*", "*")) == {
        "http_proxy": "http://proxy:3128",
        "MY_D": "fine",
    }


@pytest.mark.parametrize("pattern", ["HF_TOKEN", "*_TOKEN", "WANDB_*KEY", "PLAIN"])
def test_a_pattern_that_names_a_secret_is_refused(pattern):
    with pytest.raises(ValueError, match=r"launch\.secrets_file") as error:
        forwarded_environment({"PLAIN": HF}, ("NCCL_*", pattern))
    assert pattern in str(error.value) and HF not in str(error.value)


def test_launch_env_holds_no_secrets(monkeypatch):
    monkeypatch.setenv("SITE_PASSWORD", "open sesame")
    env = {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "abcdefgh",
        "PLAIN": GITHUB,
        "COPY": "open sesame",
        "a=b": "1",
        "NUL": "a\0b",
    }
    found = problems_of_env(env)
    assert [re.search(r"HF_TOKEN|PLAIN|COPY|a=b|NUL", p)[0] for p in found] == [
        "HF_TOKEN",
        "PLAIN",
        "COPY",
        "a=b",
        "NUL",
    ]
    assert not any(
        value in problem for value in ("abcdefgh", GITHUB, "open sesame") for problem in found
    )


# --- secrets file ---------------------------------------------------------------------------------


def secrets_file(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "secrets"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_a_secrets_file_is_read_as_a_shell_would(tmp_path):
    text = f"# comment\n\nHF_TOKEN={HF}\r\nexport A='a b'\n  B=\"c\"\nC=x=y # z\nD=\nE='\"'\n"
    assert read_secrets_file(secrets_file(tmp_path, text)) == {
        "HF_TOKEN": HF,
        "A": "a b",
        "B": "c",
        "C": "x=y # z",
        "D": "",
        "E": '"',
    }


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_secrets_file_that_others_can_use_is_refused(tmp_path, mode):
    with pytest.raises(ValueError, match="chmod 600"):
        read_secrets_file(secrets_file(tmp_path, "A=1", mode))


@pytest.mark.parametrize(
    "line",
    [
        "hunter2",
        "A B=hunter2",
        "=hunter2",
        "1A=hunter2",
        "A='hunter2",
        "A='",
        b"A=\xffhunter2",
        "A=hunter2\0",
    ],
)
def test_a_malformed_line_is_named_by_its_number_alone(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(ValueError, match="line 3 is not NAME=VALUE") as error:
        read_secrets_file(secrets_file(tmp_path, b"A=1\n\n" + line))
    assert "hunter2" not in str(error.value)


def test_a_secrets_file_must_be_a_file_of_ones_own(tmp_path, monkeypatch):
    path = secrets_file(tmp_path, "A=1")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ValueError, match="not to you"):
        read_secrets_file(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, words in (
        ("missing", "No such file"),
        ("pipe", "not a regular file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(ValueError, match=words):
            read_secrets_file(tmp_path / name)
