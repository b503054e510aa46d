"""Chat templates: from messages to the text that a model reads.

A template is a program by whoever made the tokenizer. It runs in jinja's sandbox, in the process
that reads files of strangers (train/data/worker.py), where time and memory are bounded. What it can
call is what transformers' apply_chat_template offers, so that the text is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from train.config.data import DataConfig
from train.data.tokenizer import LOADING_SECONDS, tokenizer_file
from train.data.worker import apart, doing

PLAIN = (
    "{% for message in messages %}"
    "{{ '\\n\\n' if not loop.first }}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}"
    "{% endfor %}"
    "{{ '\\n\\nAssistant:' if add_generation_prompt }}"
)
"""For a tokenizer without a template: the speaker's name before each message, and the token that
ends documents after each answer.
"""
PLAIN_NAME = "the built-in plain form"
SPECIAL_TOKENS = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""What a template may call by name, where tokenizer_config.json names it."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that data sets have for the reasoning of a message; templates read the first two."""

THINKING = ("enable_thinking", "thinking")
"""Names of the switch for reasoning: Qwen's, and that of DeepSeek and Granite."""


class ChatTemplate:
    """Turns messages into text.

    Args:
        source: of the template; special: names of special tokens and what they are; where: as
            messages call it; thinking: for templates that can be told whether answers are
            reasoned, None: as they do by themselves.

    Raises:
        ValueError: the source is no template, or cannot be told.
    """

    def __init__(
        self, source: str, special: Mapping[str, str], where: str, thinking: bool | None = None
    ):
        self.source, self.where = source, where
        self.values: dict[str, Any] = dict(special)
        if thinking is not None:
            if not any(name in source for name in THINKING):
                raise ValueError(
                    f"data.thinking is {thinking}, but the chat template of {where} has no switch "
                    f"for it ({' or '.join(THINKING)}); set it to null"
                )
            self.values |= dict.fromkeys(THINKING, thinking)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {where} is none: {_said(error)}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: whether the header of the next answer follows.

        Raises:
            ValueError: the template refuses the messages, or fails on them.
        """
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.values,
            )
        except MemoryError:
            raise
        except Exception as error:  # a program of a stranger, on data of another
            raise ValueError(f"the chat template refuses it: {_said(error)}") from error


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- the sandbox ----------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}`, which some templates put around answers: the text is what is inside."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own form)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_inside")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` in templates: the class itself would hand out more than its instances."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)


class _Namespace(Namespace):
    """`namespace(...)` in templates, without names that Python keeps for itself."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, rest = arguments[0], arguments[1:]
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace keeps no {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    # One moment for all conversations of a store: a template that writes the date writes one.
    now = datetime.now()

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # What the template writes, in its own form: text for a model, no file of ours.
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return encoder.encode(value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json  # jinja's own escapes markup
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": now.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


# --- which template -------------------------------------------------------------------------------


def template_files(config: DataConfig) -> list[Path]:
    """Files that a data set's template is made of, those that exist: what the text depends on."""
    files = [] if config.chat_template is None else [Path(config.chat_template).expanduser()]
    if config.tokenizer.path is not None:
        folder = tokenizer_file(config.tokenizer).parent
        files += [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    return [file for file in files if file.is_file()]


def template_facts(config: DataConfig) -> list[str]:
    """SHA-256 of each of template_files, for the fingerprint of a store."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in template_files(config)]


def chat_template(config: DataConfig) -> ChatTemplate:
    """The template of a data set's conversations: the file that is given, else the tokenizer's own,
    else PLAIN.

    Raises:
        ValueError: a file cannot be read, or holds none.
    """
    settings: dict[str, Any] = {}
    source = where = None
    for file in reversed(template_files(config)):
        text = _text_of(file)
        if file.name == "tokenizer_config.json":
            settings = _settings(file, text)
            found = _default_of(settings.get("chat_template"))
        else:
            found = text
        # In the reverse order: what is given comes last and stays.
        if found:
            source, where = found, str(file)
        elif config.chat_template is not None and file == Path(config.chat_template).expanduser():
            raise ValueError(f"data.chat_template: {file} is empty")

    special = {
        name: str(value["content"] if isinstance(value, dict) else value)
        for name in SPECIAL_TOKENS
        if (value := settings.get(name)) and (not isinstance(value, dict) or "content" in value)
    }
    if source is None or where is None:
        special["eos_token"] = config.tokenizer.end_of_document
        source, where = PLAIN, PLAIN_NAME
    return ChatTemplate(source, special, where, config.thinking)


def own_template(config: DataConfig, kept: Path | None = None) -> ChatTemplate | None:
    """How a trained model is spoken to: by the template that its run on conversations has kept,
    else by its tokenizer's own. None: it has none, and was trained on text.

    Raises:
        ValueError: a file cannot be read, or holds no template.
    """
    if kept is not None and kept.is_file() and _text_of(kept) != PLAIN:
        config = dataclasses.replace(config, chat_template=str(kept))
    template = chat_template(config)
    return None if config.format == "text" and template.where == PLAIN_NAME else template


def template_problems(config: DataConfig) -> list[str]:
    """What keeps conversations from being written out, before any is read; [] for data that are
    text.
    """
    if config.format == "text":
        return []

    def look() -> None:
        with doing("reading the chat template", LOADING_SECONDS):
            chat_template(config)

    try:
        apart(look)
    except ValueError as error:
        return [str(error)]
    return []


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {_said(error)}") from error


def _settings(file: Path, text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({_said(error)})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds {type(settings).__name__}, not an object")
    return settings


def _default_of(value: Any) -> str | None:
    """The template in tokenizer_config.json, which may hold several by name."""
    if isinstance(value, list):
        value = next(
            (
                entry.get("template")
                for entry in value
                if isinstance(entry, dict) and entry.get("name") == "default"
            ),
            None,
        )
    return value if isinstance(value, str) else None
