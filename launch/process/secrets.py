"""What must not be shown, saved or sent: telling a secret from a setting, redacting it, handing
variables on without it.

Imports neither torch nor deepspeed: the agents of a job read their secrets with it.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

REDACTED = "<redacted>"
MIN_LENGTH = 8
"""A shorter value of a secret-named variable is not looked for in text: it would match by
chance.
"""

# --- names ----------------------------------------------------------------------------------------

_ANYWHERE = frozenset(
    {
        "secret",
        "secrets",
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "credential",
        "credentials",
        "apikey",
    }
)
_LAST = frozenset({"key", "token", "auth", "authorization"})
"""Words of everyday settings too (key_size, token_rounding): in a config key they count at the end
only.
"""
_API_PLURALS = frozenset({"keys", "tokens"})
_OF_TEXT = frozenset(
    {
        "pad",
        "eos",
        "bos",
        "unk",
        "mask",
        "sep",
        "cls",
        "special",
        "image",
        "audio",
        "per",
        "first",
        "last",
        "next",
        "end",
        "start",
        "max",
        "min",
        "num",
    }
)
"""pad_token, flops_per_token: a piece of text."""
_OF_TABLES = frozenset(
    {
        "public",
        "primary",
        "foreign",
        "sort",
        "group",
        "cache",
        "dict",
        "map",
        "column",
        "row",
        "text",
        "query",
        "per",
        "first",
        "last",
        "next",
        "max",
        "min",
        "num",
    }
)
"""sort_key, public_key: no secret."""
_ABOUT = frozenset(
    {
        "file",
        "path",
        "dir",
        "folder",
        "sock",
        "socket",
        "size",
        "sizes",
        "len",
        "length",
        "count",
        "type",
        "rounding",
        "dim",
        "limit",
        "ratio",
        "url",
        "endpoint",
        "mode",
        "method",
        "format",
        "name",
        "interval",
        "seconds",
        "timeout",
    }
)
"""secrets_file, key_size, SSH_AUTH_SOCK: something about a secret."""


def is_secret_name(name: str) -> bool:
    """Whether a variable or config key of this name holds a secret: HF_TOKEN, wandb.api_key,
    db_password; not num_tokens, tokenizer, eos_token, key_size, secrets_file.
    """
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or words[-1] in _ABOUT:
        return False
    is_variable = name.isupper()
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        last = i == len(words) - 1
        if word in _ANYWHERE or (last and before == "api" and word in _API_PLURALS):
            return True
        if word in _LAST and (last or is_variable):
            excused = _OF_TEXT if word == "token" else _OF_TABLES if word == "key" else ()
            if before not in excused:
                return True
    return False


# --- values ---------------------------------------------------------------------------------------

_SHAPES = re.compile(
    r"""
      -----BEGIN[ ][A-Z ]*KEY(?:[ ]BLOCK)?-----.*?(?:-----END[ ][A-Z ]*-----|\Z)
    | (?<![A-Za-z0-9])(?:
          hf_[A-Za-z0-9]{16,}                                       # Hugging Face
        | wandb_v1_[A-Za-z0-9_]{16,}                                # W&B
        | sk-(?=[\w-]{0,80}\d)[\w-]{16,}                             # OpenAI, Anthropic
        | (?:gh[pousr]|github_pat|glpat|xox[abeoprs])[_-][\w-]{16,} # GitHub, GitLab, Slack
        | (?:AKIA|ASIA)[A-Z0-9]{16}                                 # AWS
        | AIza[\w-]{35}                                             # Google
        | eyJ[\w-]{8,2000}\.eyJ[\w-]{8,9000}\.[\w-]+                # JSON web token
      )
""",
    re.VERBOSE | re.DOTALL,
)
_HEX = re.compile(
    r"(?:(?P<not>(?i:commit|revision|rev|sha1?))\W{1,3})?(?<![\w@/.+-])[0-9a-f]{40}(?![\w/-])"
)
"""A W&B key, unless it is called a commit or stands in a path."""
_USER_IN_URL = re.compile(
    r"(?<![A-Za-z0-9+.-])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#@:]*:(?P<password>[^\s/?#]+)@"
)
_BEARER = re.compile(r"(?P<word>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{12,}")
_ASSIGNED = re.compile(
    r"""(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)(?P<between>["']?\s*(?:=|:(?=\s*["']))\s*)
                           (?P<value>"[^"]*"|'[^']*'|[^\s&;,"'})\]]+)""",
    re.VERBOSE,
)
"""NAME=VALUE, also in a URL's query, and "name": "value" as JSON and YAML write it. Every pattern
here begins at the edge of a word or is bounded, so that the time stays proportional to the length
of the text.
"""


def looks_secret(value: str) -> bool:
    """Whether text has, or holds, the shape of a well-known kind of key, or a URL with a
    password.
    """
    return _without_shapes(value) != value


def _without_shapes(text: str) -> str:
    text = _SHAPES.sub(REDACTED, text)
    text = _HEX.sub(lambda m: m[0] if m["not"] else REDACTED, text)
    text = _USER_IN_URL.sub(
        lambda m: m[0] if m["password"] == REDACTED else f"{m['scheme']}{REDACTED}@", text
    )
    return _BEARER.sub(lambda m: m["word"] + REDACTED, text)


def held_secrets(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of secret-named variables, the longest first. A word such as AUTH=disabled is none."""
    found = {
        value
        for name, value in (os.environ if environ is None else environ).items()
        if len(value) >= MIN_LENGTH
        and is_secret_name(name)
        and not (name.upper().endswith("AUTH") and value.isalpha())
    }
    return tuple(sorted(found, key=len, reverse=True))


def redact_text(text: str, held: Iterable[str] | None = None) -> str:
    """Log text or a URL without secrets: known shapes, NAME=VALUE with a secret name, and values
    the environment holds.

    held: values to hide wherever they occur; None: held_secrets().
    """
    for value in held_secrets() if held is None else held:
        text = text.replace(value, REDACTED)
    return _ASSIGNED.sub(_hide_assigned, _without_shapes(text))


def _hide_assigned(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"]) or match["value"].strip("\"'") in (
        "",
        "null",
        "None",
        REDACTED,
    ):
        return match[0]
    quote = match["value"][0] if match["value"][0] in "\"'" else ""
    return f"{match['name']}{match['between']}{quote}{REDACTED}{quote}"


def redact(data: Any) -> Any:
    """Plain nested data with every secret replaced: what a secret name holds, and secrets inside
    other text.
    """
    held = held_secrets()
    return _redact(data, False, lambda text: redact_text(text, held))


def _redact(data: Any, named: bool, clean: Callable[[str], str]) -> Any:
    if isinstance(data, dict):
        return {
            key: _redact(value, named or (isinstance(key, str) and is_secret_name(key)), clean)
            for key, value in data.items()
        }
    if isinstance(data, (list, tuple)):
        return type(data)(_redact(item, named, clean) for item in data)
    if named and data is not None and not isinstance(data, bool):
        return REDACTED
    return clean(data) if isinstance(data, str) else data


# --- what ranks are given -------------------------------------------------------------------------

FORWARDED = (
    "NCCL_*",
    "GLOO_*",
    "TORCH_*",
    "PYTORCH_*",
    "OMP_NUM_THREADS",
    "MKL_*",
    "CUDA_*",
    "TRITON_*",
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_*",
    "HF_DATASETS_*",
    "WANDB_*",
    "TOKENIZERS_PARALLELISM",
    "LOADSTONE_KERNELS",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "UCX_*",
    "FI_*",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "LANG",
    "LC_*",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
)
"""Variables of the starting process that every rank gets."""
_OF_THIS_HOST = frozenset({"CUDA_VISIBLE_DEVICES", "WANDB_SERVICE"})
"""Mean something else on another machine; handed on only when launch.forward_env names them."""


def forwarded_environment(environ: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """The variables that are handed on to ranks: FORWARDED and those that match launch.forward_env,
    without secrets.

    Args:
        environ: of the process that starts the job; patterns: names, or patterns as of a shell
            (MY_APP_*).

    Raises:
        ValueError: a pattern names a secret.
    """
    patterns, held = tuple(patterns), held_secrets(environ)
    for pattern in patterns:
        if is_secret_name(pattern) or (
            pattern in environ and _is_secret(pattern, environ[pattern], held)
        ):
            raise ValueError(
                f"launch.forward_env names {pattern}, which is a secret: what "
                "is handed on stands on command lines that others can read; put "
                "it into a file of yours, and name that in launch.secrets_file"
            )

    return {
        name: value
        for name, value in environ.items()
        if (
            any(fnmatch.fnmatchcase(name, p) for p in patterns)
            or (name not in _OF_THIS_HOST and any(fnmatch.fnmatchcase(name, p) for p in FORWARDED))
        )
        and not _is_secret(name, value, held)
    }


def _is_secret(name: str, value: str, held: Iterable[str]) -> bool:
    return is_secret_name(name) or looks_secret(value) or any(secret in value for secret in held)


def problems_of_env(env: Mapping[str, str]) -> list[str]:
    """Entries of launch.env, which is saved with the run, that are secrets or no variables; values
    are not shown.
    """
    held, found = held_secrets(), []
    for name, value in env.items():
        if not _NAME.fullmatch(name):
            found.append(
                f"launch.env holds {name!r}, which is not the "
                "name of a variable: letters, digits and _"
            )
        elif "\0" in value:
            found.append(f"launch.env.{name} holds a NUL character, which no variable can")
        elif _is_secret(name, value, held):
            found.append(
                f"launch.env.{name} is a secret, and launch.env is saved with the run; put it into "
                "a file of yours (chmod 600), and name that in launch.secrets_file"
            )
    return found


def problems_of_settings(settings: Any, path: str = "") -> list[str]:
    """Settings that hold what a secret-named variable of this process holds, as ${oc.env:HF_TOKEN}
    puts it there.

    Whatever stands in a setting is printed, saved with the run and sent to its sinks, so none may
    hold a secret.

    Args:
        settings: plain nested data, resolved; path: leads the names in messages. Values are not
            shown.
    """
    # A variable set to a word (WANDB_API_KEY=disabled) says nothing; that word may stand in any
    # setting.
    held = {
        name: value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and is_secret_name(name) and not value.isalpha()
    }

    def visit(value: Any, where: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from visit(item, f"{where}.{key}" if where else str(key))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from visit(item, f"{where}.{i}")
        elif isinstance(value, str):
            for name, secret in held.items():
                if secret in value:
                    yield (
                        f"{where} holds the secret of the variable {name}: settings are printed "
                        "and saved with the run; leave it out (tools read their variables "
                        "themselves), or put it into launch.secrets_file"
                    )

    return list(visit(settings, path.rstrip(".")))


# --- secrets file ---------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_secrets_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Variables of a file of NAME=VALUE lines; `export ` before and quotes around the value are
    dropped, lines of # skipped.

    Raises:
        ValueError: no such file, not yours, readable by others, or a line is malformed (named by
            its number alone).
    """
    where = f"launch.secrets_file={path}"
    try:
        # a pipe would wait
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError(f"{where} is not a regular file")
            if facts.st_uid != os.geteuid():
                raise ValueError(
                    f"{where} belongs to user {facts.st_uid}, not to you ({os.geteuid()}); make a "
                    "file of your own, and chmod 600 it"
                )
            if facts.st_mode & 0o077:
                raise ValueError(
                    f"{where} can be read by others (mode "
                    f"{stat.S_IMODE(facts.st_mode):o}); chmod 600 {path}"
                )
            lines = file.read().split(b"\n")
    except OSError as error:
        raise ValueError(
            f"{where} cannot be read: {error.strerror}; give "
            "a file of NAME=VALUE lines, or leave it out"
        ) from error
    variables = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        entry = _entry(line)
        if entry is None:
            raise ValueError(f"{where}: line {number} is not NAME=VALUE")
        variables[entry[0]] = entry[1]
    return variables


def _entry(line: bytes) -> tuple[str, str] | None:
    try:
        name, equals, value = line.decode().strip().removeprefix("export ").lstrip().partition("=")
    except UnicodeDecodeError:
        return None
    if not equals or not _NAME.fullmatch(name) or "\0" in value:
        return None
    if value[:1] in ("'", '"'):
        if len(value) < 2 or value[-1] != value[0]:
            return None
        value = value[1:-1]
    return name, value
