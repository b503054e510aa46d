"""Conversations in rows of data files, whatever their columns are called, in one form.

    messages                   a list of {"role", "content", ...}; the column is source.text_column
    conversations              ShareGPT: a list of {"from", "value"}, and a `system` column if any
    prompt and completion      two texts, or two lists of messages, one after the other

A conversation is handed on as text, the JSON of {"messages": [...]}, and "tools" where the row has
them: the text tells duplicates apart and says what is held out. Keys keep their order, in which
templates write the arguments of calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from train.data.files import PARQUET_BATCH_ROWS, Format, Meter, Odd, Row, json_rows, streams
from train.data.worker import doing
from train.files.strict_json import dumps

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks, in ShareGPT's words and in those of chat templates."""
OTHER_COLUMNS = ("messages", "conversations", "prompt", "completion", "system", "tools")
"""What may be read of a row beside the column that the source names."""
_DECODER = json.JSONDecoder(strict=False)


def read_conversations(
    path: str, form: Format, column: str, meter: Meter | None = None
) -> Iterator[Row]:
    """Yield every row of a file of JSON or Parquet: a conversation as text, or why there is none.

    Raises:
        ValueError: the file cannot be read to its end, or is of another format; the message names
            it.
    """
    if form.kind not in ("json", "parquet"):
        raise ValueError(
            f"{path} is {form.kind}, which holds no conversations; give JSON lines or Parquet"
        )
    try:
        with doing(f"reading {path}"):
            yield from _rows_in(path, form, column, meter or Meter())
    except Exception as error:  # of several libraries, about a file that can hold anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _rows_in(path: str, form: Format, column: str, meter: Meter) -> Iterator[Row]:
    if form.kind == "parquet":
        yield from _parquet_rows(path, column, meter)
        return
    for name, stream in streams(path, meter):
        for number, text in json_rows(stream, lambda v: as_conversation(v, column), _DECODER):
            yield Row(name, number, text)


def _parquet_rows(path: str, column: str, meter: Meter) -> Iterator[Row]:
    import pyarrow.parquet

    with open(path, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        meter.begin(file)
        wanted = wanted_columns(table.schema_arrow.names, column)
        number = 0
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                # What a row lacks is null in a table, and names of other columns are not read.
                found = as_conversation(record or dict.fromkeys(table.schema_arrow.names), column)
                yield Row(path, number, found)


def wanted_columns(names: list[str], column: str) -> list[str]:
    """Those of a table's columns that a conversation can stand in."""
    return [name for name in names if name == column or name in OTHER_COLUMNS]


# --- one row --------------------------------------------------------------------------------------


def as_conversation(value: Any, column: str) -> str | Odd:
    """The conversation of a row as the text described above.

    Args:
        value: the row, of any kind; column: where messages are looked for first.
    """
    if isinstance(value, Odd):
        return value
    if not isinstance(value, Mapping):
        return Odd(f"holds {type(value).__name__}, not an object")
    try:
        messages = _messages(value, column)
        if isinstance(messages, Odd):
            return messages
        whole: dict[str, Any] = {"messages": messages}
        if value.get("tools"):
            whole["tools"] = _tools(value["tools"])
        text = dumps(whole, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        return Odd("is not valid UTF-8")
    except (ValueError, TypeError, RecursionError) as error:
        return Odd(str(error))
    return text


def _messages(row: Mapping[str, Any], column: str) -> list[dict[str, Any]] | Odd:
    """The messages of a row, in the words of chat templates.

    Raises:
        ValueError: a message is none; it says which.
    """
    for name in dict.fromkeys((column, "messages", "conversations")):
        if row.get(name) is not None:
            return _mapped(row[name], name, row.get("system"))
    if row.get("prompt") is not None and row.get("completion") is not None:
        asked = _one_side(row["prompt"], "prompt", "user")
        return asked + _one_side(row["completion"], "completion", "assistant")
    if any(name in row for name in (column, "messages", "conversations", "completion")):
        return Odd("has no messages", is_null=True)
    return Odd(f"has no {column!r}", columns=tuple(map(str, row)))


def _one_side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _mapped(value, name, None)


def _mapped(value: Any, name: str, system: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{name!r} holds {type(value).__name__}, not a list of messages")
    messages = [_message(part, name, number) for number, part in enumerate(value)]
    if not messages:
        raise ValueError(f"{name!r} holds no message")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(part: Any, name: str, number: int) -> dict[str, Any]:
    """One message, without what is null in it, as transformers' templates get it."""
    about = f"message {number} of {name!r}"
    if not isinstance(part, Mapping):
        raise ValueError(f"{about} holds {type(part).__name__}, not an object")
    message = {str(key): item for key, item in part.items() if item is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in SPEAKERS:
            raise ValueError(f"{about} is from {speaker!r}; known are {', '.join(SPEAKERS)}")
        message = {"role": SPEAKERS[speaker], "content": message.pop("value", None), **message}

    if not isinstance(message.get("role"), str):
        raise ValueError(f"{about} has no role")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"{about} has content of {type(content).__name__}, not text")
    return message


def _tools(value: Any) -> Any:
    """Tools of a row: schemas, or the JSON that many data sets keep them as."""
    tools = json.loads(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' holds no list of schemas")
    return tools
