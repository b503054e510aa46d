"""From files to documents: every file once by its literal name, and its text column alone."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import fnmatch
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.prepare import FORMAT, fingerprint, prepare
from train.data.sources import HOPELESS_ROWS, BadRows, documents, files_of
from train.data.store import TokenStore


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield


def json_lines(*rows: object) -> str:
    """Rows as JSON lines; a text stands for {"text": text}."""
    objects = [{"text": row} if isinstance(row, str) else row for row in rows]
    return "".join(json.dumps(row) + "\n" for row in objects)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def write_parquet(path: Path, columns: dict) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def read(path: Path | str, kind: str = "json", **options) -> list[str]:
    return list(documents(SourceConfig(kind, data_files=str(path), **options)))


def refused(path: Path | str, message: str, kind: str = "json", **options) -> None:
    with pytest.raises(ValueError, match=message):
        read(path, kind, **options)


def data_config(source: SourceConfig, folder: Path = Path("x"), **options) -> DataConfig:
    return DataConfig(
        (source,), TokenizerConfig(vocab_size=300), 0.2, str(folder / "cache"), **options
    )


# --- names ----------------------------------------------------------------------------------------

AWKWARD = (
    "part[1].jsonl",
    "part1.jsonl",
    "a*b.jsonl",
    "axxb.jsonl",
    "what?.jsonl",
    "whatx.jsonl",
    "{a,b}.jsonl",
    "[!a].jsonl",
    "a::b.jsonl",
    "http:x.jsonl",
    "50%.jsonl",
    "é 李.jsonl",
    "back\\slash.jsonl",
    ".hidden.jsonl",
    "~.jsonl",
    "#1.jsonl",
    'it\'s "so".jsonl',
    "${x}.jsonl",
    "**.jsonl",
    "[].jsonl",
    "[D]/x.jsonl",
    "__a__/x.jsonl",
    ".b/x.jsonl",
    "** /y.jsonl",
)


@pytest.mark.parametrize("kind", ["json", "text", "parquet", "csv"])
def test_every_file_that_a_pattern_matches_is_read_once_whatever_its_name(tmp_path, kind):
    for name in AWKWARD:
        quoted = name.replace('"', '""')
        content = {"json": json_lines(name), "text": name, "csv": f'text\n"{quoted}"\n'}
        write(tmp_path, {name: content.get(kind, "")})
        if kind == "parquet":
            write_parquet(tmp_path / name, {"text": [name]})
    pattern = str(tmp_path / "**" / "*.jsonl")
    assert sorted(read(pattern, kind)) == sorted(AWKWARD)
    files = files_of(SourceConfig(kind, data_files=pattern))
    assert files == sorted(str(tmp_path / name) for name in AWKWARD)


@pytest.mark.parametrize("name", AWKWARD)
def test_a_file_named_outright_is_that_file(tmp_path, name):
    others = [other for other in AWKWARD if not fnmatch.fnmatchcase(other, name)]
    write(tmp_path, {other: json_lines(other) for other in (name, *others)})
    assert read(tmp_path / name) == [name]


def test_a_name_that_is_also_a_pattern_of_other_files_is_refused_with_the_way_out(tmp_path):
    write(tmp_path, {"*.jsonl": json_lines("a slip of the shell"), "a.jsonl": json_lines("one")})
    refused(
        tmp_path / "*.jsonl",
        r"is the name of a file, and a pattern that also matches "
        r"'.*a\.jsonl'; for the file alone give '.*\[\*\]\.jsonl'",
    )
    assert read(tmp_path / "[*].jsonl") == ["a slip of the shell"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part[[]1].jsonl", "part[1].jsonl"),
        ("part[0-9].jsonl", "part1.jsonl"),
        ("what[?].jsonl", "what?.jsonl"),
        ("a[*]b.jsonl", "a*b.jsonl"),
        ("[[]D]/*", "[D]/x.jsonl"),
        ("[[]D]/x.jsonl", "[D]/x.jsonl"),
        ("[D]/*.jsonl", "[D]/x.jsonl"),
        ("[D]/?.jsonl", "[D]/x.jsonl"),
    ],
)
def test_a_pattern_takes_what_it_matches_and_nothing_else(tmp_path, pattern, expected):
    write(tmp_path, {name: json_lines(name) for name in (*AWKWARD, "D/x.jsonl")})
    assert read(tmp_path / pattern) == [expected]


def test_folders_are_no_files_and_one_without_any_is_refused_with_the_way_out(tmp_path):
    write(tmp_path, {"a.jsonl": json_lines("one"), "b.jsonl/c.txt": "no"})
    assert read(tmp_path / "*.jsonl") == ["one"]
    refused(
        tmp_path / "b.jsonl",
        r"the folder '.*b\.jsonl' has no file with \.json, \.jsonl, .*give a pattern of the files",
    )
    refused(tmp_path / "**.jsonl", r"data_files '.*\*\*\.jsonl' is no pattern of files")


def test_a_folder_stands_for_its_files_of_the_format(tmp_path):
    names = ("b.jsonl", "a.JSON.gz", "deep/er/c.ndjson", "d.jsonl.zst")
    others = ("notes.txt", ".hidden.jsonl", ".git/x.jsonl", "jsonl", "e.csv")
    write(tmp_path, dict.fromkeys((*names, *others), ""))
    files = files_of(SourceConfig("json", data_files=str(tmp_path)))
    assert files == sorted(str(tmp_path / name) for name in names)
    assert files_of(SourceConfig("text", data_files=f"{tmp_path}/")) == [f"{tmp_path}/notes.txt"]


def test_a_list_is_read_in_its_order_and_no_file_twice(tmp_path):
    write(tmp_path, {name: json_lines(name) for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")})
    names = tuple(str(tmp_path / name) for name in ("sub", "b.jsonl", "*.jsonl"))
    source = SourceConfig("json", data_files=names)
    assert list(documents(source)) == ["sub/c.jsonl", "b.jsonl", "a.jsonl"]
    # each has to stand for something
    with pytest.raises(ValueError, match=r"no file matches '.*/none\*'"):
        list(documents(SourceConfig("json", data_files=(*names, f"{tmp_path}/none*"))))


def test_a_list_of_files_has_the_label_of_its_first(tmp_path):
    assert SourceConfig("json", data_files=("/d/web.jsonl", "/d/x.jsonl")).default_label == "web"
    assert SourceConfig("json", data_files="/d/corpus/").default_label == "corpus"
    assert SourceConfig("json", data_files="/d/web/*.jsonl").default_label == "web"


def test_the_home_folder_is_that(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, {"x/a.jsonl": json_lines("one")})
    assert list(documents(SourceConfig("json", data_files=("~/x",)))) == ["one"]


def test_a_dead_link_named_outright_is_no_match_rather_than_a_pattern(tmp_path):
    write(tmp_path, {"a1": json_lines("another")})
    (tmp_path / "a[1]").symlink_to(tmp_path / "gone")
    refused(tmp_path / "a[1]", r"no file matches .*a\[1\]")


def test_a_data_set_folder_that_would_be_read_as_a_pattern_is_refused(tmp_path):
    write(tmp_path, {"x1/a.jsonl": json_lines("wrong"), "x[1]/a.jsonl": json_lines("right")})
    with pytest.raises(ValueError, match="takes the folder's name for a pattern; rename the fold"):
        list(documents(SourceConfig(str(tmp_path / "x[1]"))))
    assert read(tmp_path / "x[1]" / "*") == ["right"]
    (tmp_path / "x[1]" / "a.jsonl").unlink()
    refused(tmp_path / "x[1]" / "*", "no file matches")


def test_names_once_read_as_patterns_get_new_stores_and_other_names_keep_theirs(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files = ("part1.jsonl", "part[1].jsonl")
    write(tmp_path, {name: json_lines("one", "two") for name in files})

    def key(name: str, **more: object) -> tuple[str, str]:
        """The fingerprint, and what it was before names were literal (but for `more`)."""
        os.utime(name, ns=(10**18, 10**18))
        made = data_config(SourceConfig("json", data_files=name), max_bad_rows=0.5)
        facts = {
            "path": "json",
            "name": None,
            "split": "train",
            "data_files": name,
            "text_column": "text",
            "sample_by": "document",
            "max_documents": None,
            "files": [(name, os.path.getsize(name), 10**18)],
            **more,
        }
        tokenizer = dataclasses.asdict(made.tokenizer)
        for unknown in ("max_documents", "end_of_document_id"):  # to that version
            tokenizer.pop(unknown)
        before = json.dumps(
            [FORMAT, [facts], tokenizer, made.validation_fraction],
            sort_keys=True,
        )
        return fingerprint(made), hashlib.sha256(before.encode()).hexdigest()[:16]

    now, before = key("part1.jsonl")
    assert now == before
    now, before = key("part[1].jsonl")
    assert now != before and now == key("part[1].jsonl", literal_names=True)[1]


# --- other columns --------------------------------------------------------------------------------

MIXED = {
    "extra columns": (
        [{"text": "one", "id": "1", "added": "2024"}],
        [{"text": "two", "doc": {"x": 1}, "meta": {"y": [1]}, "attributes": {}}],
    ),
    "null, then a struct": ([{"text": "one", "meta": None}], [{"text": "two", "meta": {"u": 1}}]),
    "a number, then text": ([{"text": "one", "id": 7}], [{"text": "two", "id": "b-8"}]),
    "another order": ([{"text": "one", "id": 7}], [{"id": 8, "text": "two"}]),
    "other types in one file": (
        [
            {"text": "one", "id": 7},
            {"text": "one", "id": "x"},
            {"text": "one", "id": [{"y": None}]},
        ],
        [{"text": "two"}],
    ),
    "an empty struct": ([{"text": "one", "more": {}}], [{"text": "two", "more": {"a": {}}}]),
}


@pytest.mark.parametrize("kind", ["json", "csv"])
@pytest.mark.parametrize("files", MIXED.values(), ids=MIXED)
def test_other_columns_may_differ_from_file_to_file(tmp_path, files, kind):
    for i, rows in enumerate(files):
        if kind == "json":
            (tmp_path / f"{i}.data").write_text(json_lines(*rows))
            continue
        with (tmp_path / f"{i}.data").open("w", newline="") as stream:
            table = csv.DictWriter(stream, sorted({key for row in rows for key in row}))
            table.writeheader()
            table.writerows(rows)
    expected = [row["text"] for rows in files for row in rows]
    assert read(tmp_path / "*.data", kind) == expected


def test_other_columns_of_parquet_files_may_differ_from_file_to_file(tmp_path):
    write_parquet(tmp_path / "a", {"id": [1, 2], "text": ["one", "two"]})
    write_parquet(tmp_path / "b", {"text": ["three"], "id": ["x"], "meta": [{"url": "u"}]})
    write_parquet(tmp_path / "c", {"meta": [None], "text": ["four"]})
    assert read(tmp_path / "*", "parquet") == ["one", "two", "three", "four"]


def test_what_is_wrong_in_another_column_cannot_hurt(tmp_path):
    deep, digits = "[" * 900 + "]" * 900, "9" * 6000
    (tmp_path / "a").write_bytes(
        b'{"x": "\xff\xfe", "text": "one"}\n{"x": "\\ud800", "text": "two"}\n'
        b'{"x": NaN, "y": 1e999, "text": "three"}\n'
        + f'{{"x": {digits}, "text": "four"}}\n{{"x": {deep}, "text": "five"}}\n'.encode()
    )
    assert read(tmp_path / "a") == ["one", "two", "three", "four", "five"]
    (tmp_path / "b").write_bytes(b"x,text\n\xff,one\n" + b"9" * 200_000 + b",two\n")
    assert read(tmp_path / "b", "csv") == ["one", "two"]


@pytest.mark.parametrize(
    "name", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"]
)
def test_every_parquet_type_that_spells_text_is_read_as_text(tmp_path, name):
    import pyarrow

    texts = [f"é{i % 7}" for i in range(3000)]  # several batches
    if name == "dictionary":
        column = pyarrow.array(texts).dictionary_encode()
    else:
        values = [text.encode() for text in texts] if "binary" in name else texts
        column = pyarrow.array(values, getattr(pyarrow, name)())
    write_parquet(tmp_path / "a", {"text": column, "id": list(range(3000))})
    assert read(tmp_path / "a", "parquet") == texts


# --- forms of a format ----------------------------------------------------------------------------

JSON_FORMS = {
    "lines": '{"text": "one"}\n{"text": "two"}',
    "BOM, CRLF, empty lines": '\ufeff{"text": "one"}\r\n\r\n{"text": "two"}\r\n',
    "in one line": '{"text":"one"}{"text":"two"}\n',
    "array": '[{"text": "one"}, {"text": "two"}]',
    "array over lines": '\n [\n{"text": "one"},\n{"text": "two"}\n]\n',
    "array of texts": '["one", "two"]',
    "over lines": '{\n  "text": "one"\n}\n{\n  "text": "two"\n}\n',
}


@pytest.mark.parametrize("content", JSON_FORMS.values(), ids=JSON_FORMS)
def test_json_comes_in_several_forms(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode())
    assert read(tmp_path / "a.json") == ["one", "two"]


def test_only_a_line_feed_ends_a_json_line(tmp_path):
    text = "one\u2028two\x85three\x0bfour\rfive"
    (tmp_path / "a").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode())
    assert read(tmp_path / "a") == [text]


def test_csv_texts_hold_quotes_commas_and_lines_and_may_be_long(tmp_path):
    texts = ['a "quoted", text', "two\nlines\n\nand more", "long " * 60_000, "é", "last"]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "text"], *enumerate(texts)])
    assert read(tmp_path / "a.csv", "csv") == texts
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbftext\n\none\n")
    assert read(tmp_path / "b.csv", "csv") == ["one"]


def test_quotes_that_are_never_closed_are_refused_with_their_line(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,one\n2,"two\n3,three\n4,four\n')
    refused(
        tmp_path / "a.csv",
        r"a\.csv cannot be read: the quotes opened in the row at line 3 "
        "are never closed",
        "csv",
    )


def test_paragraphs_are_the_parts_between_empty_lines(tmp_path):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab\n\n", k=rng.randint(0, 12)))
        (tmp_path / "a.txt").write_text(text)
        expected = [part for part in text.split("\n\n") if part.strip()]
        assert read(tmp_path / "a.txt", "text", sample_by="paragraph") == expected, text


def test_nothing_is_read_ahead(tmp_path):
    """What lies behind the last row asked for is not looked at."""
    (tmp_path / "a.jsonl").write_text(json_lines(*(f"{i} " + "x" * 100 for i in range(50_000))))
    (tmp_path / "b.jsonl").write_text("no JSON at all\n")
    found = read(tmp_path / "*.jsonl", max_documents=3)
    assert [text.split()[0] for text in found] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "0123456789"),
        ("train[:30%]", "012"),
        ("train[-2:]", "89"),
        ("train[2:4]+train[8:]", "2389"),
    ],
)
def test_a_split_may_be_cut(tmp_path, split, expected):
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_text(json_lines(str(2 * i), str(2 * i + 1)))
    assert "".join(read(tmp_path / "*.jsonl", split=split)) == expected


def test_a_split_there_is_not_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines("one"))
    for split in ("test", "train[", "test[:10%]"):
        refused(tmp_path / "a.jsonl", r"source 'a-t\S*' cannot be read: split", split=split)


# --- what datasets finds --------------------------------------------------------------------------

README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: data/a*
  - split: validation
    path: data/v*
---
"""


def test_the_files_of_a_data_set_are_read_by_the_same_rules(tmp_path):
    """As on the Hub: the README names the files, datasets finds them, one column is read."""
    odd = {"text": "two", "id": "x", "meta": {"url": "u"}, "more": 1}
    write(
        tmp_path,
        {
            "README.md": README,
            "data/v.jsonl": json_lines("three"),
            "data/a[1].jsonl": json_lines({"text": "2024-01-01", "id": 1, "meta": None}),
            "data/a1.jsonl": json_lines(odd),
        },
    )

    def found(split: str) -> list[str]:
        return sorted(documents(SourceConfig(str(tmp_path), name="small", split=split)))

    assert found("train") == ["2024-01-01", "two"] and found("validation") == ["three"]
    assert found("train+validation") == ["2024-01-01", "three", "two"]
    with pytest.raises(ValueError, match=r"cannot be read: split 'test'"):
        found("test")


def test_a_change_in_a_data_set_folder_makes_a_new_store(tmp_path):
    write(tmp_path, {"data/a.jsonl": json_lines("one"), "data/b.jsonl": json_lines("two")})
    made = data_config(SourceConfig(str(tmp_path)))
    before = fingerprint(made)
    assert fingerprint(made) == before
    write(tmp_path, {"data/b.jsonl": json_lines("two and more")})
    assert fingerprint(made) != before


def test_a_tsv_in_a_data_set_is_read_with_tabs(tmp_path):
    write(tmp_path, {"a.tsv": "id\ttext\n1\t007\n"})
    assert list(documents(SourceConfig(str(tmp_path)))) == ["007"]


def test_files_of_the_hub_are_fetched_when_their_turn_comes(tmp_path, monkeypatch):
    import datasets

    write(tmp_path, {"repo/a.jsonl": json_lines("one"), "copy": json_lines("three", "four")})
    fetched = []

    def download(self, address):
        fetched.append(address)
        return str(tmp_path / "copy")

    builder = datasets.load_dataset_builder(str(tmp_path / "repo"))
    builder.config.data_files = {"train": [f"hf://datasets/x/y@main/{name}" for name in "ab"]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **options: builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", download)
    assert list(documents(SourceConfig("x/y", max_documents=2))) == ["three", "four"]
    assert fetched == ["hf://datasets/x/y@main/a"]


def test_formats_that_only_datasets_knows_go_through_it(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    table.save_to_disk(str(tmp_path / "saved[1]"))
    (arrow,) = (tmp_path / "saved[1]").glob("*.arrow")
    assert read(arrow, "arrow") == ["one", "two"]
    refused(arrow, r"columns \['text', 'id'\], not text_column 'body'", "arrow", text_column="body")


# --- rows without readable text -------------------------------------------------------------------

LIKE_OTHER_TYPES = [
    "2024-01-01",
    "2024-01-01T10:00:00Z",
    "007",
    "1e5",
    "true",
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "-",
]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "text"])
def test_text_that_looks_like_a_date_a_number_or_a_null_stays_text(tmp_path, kind):
    if kind == "parquet":
        write_parquet(tmp_path / "a", {"text": LIKE_OTHER_TYPES})
    else:
        content = {
            "json": json_lines(*LIKE_OTHER_TYPES),
            "text": "\n".join(LIKE_OTHER_TYPES),
            "csv": "\n".join(["text", *LIKE_OTHER_TYPES]),
        }
        (tmp_path / "a").write_text(content[kind])
    assert read(tmp_path / "a", kind, sample_by="line") == LIKE_OTHER_TYPES


# Lines of a JSON file, and why each holds no text.
ODD_LINES = {
    b'{"text": null}': r"'text' is null",
    b'{"id": 3}': r"has no 'text'",
    b'{"text": 7}': r"'text' holds int, not text",
    b'{"text": ["x"]}': "'text' holds list, not te",
    b'{"text": "half': r"is not valid JSON \(Unterminated string",
    b"null": "holds NoneType, not an",
    b'{"text": "a\\ud800"}': "'text' is not valid UTF-8 at character 1",
    b"7": "holds int, not an",
    b'{"text": "a\xff"}': "'text' is not valid UTF-8 at character 1",
    b"\0": "is not valid JSON",
    b'{"text": "x"} more': "is not valid JSON",
    b"[" * 100_000: "is not valid JSON",
}


@pytest.mark.parametrize("line", ODD_LINES, ids=ODD_LINES.values())
def test_an_odd_row_is_left_out_and_counted_with_its_file_and_line(tmp_path, line):
    good = [f"text {i}" for i in range(200)]
    content = json_lines(*good).encode().splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*content[:2], b"", line, *content[2:]]))
    source = SourceConfig("json", data_files=str(tmp_path / "a.jsonl"))
    bad_rows = BadRows(source)
    assert list(documents(source, bad_rows)) == good
    assert (bad_rows.rows, bad_rows.count) == (201, 1)
    assert re.search(
        rf"1 of 201 rows \(0\.50%\) without readable text: \S+a\.jsonl row 4 "
        rf"{ODD_LINES[line]}",
        str(bad_rows),
    )
    with pytest.raises(ValueError, match=rf"a\.jsonl row 4 {ODD_LINES[line]}"):
        list(documents(source, BadRows(source, limit=0)))


def test_odd_rows_of_parquet_csv_and_text_are_told_apart_from_documents(tmp_path):
    import pyarrow

    write_parquet(tmp_path / "p", {"text": pyarrow.array([b"one", None, b"\xff", b""])})
    write_parquet(tmp_path / "q", {"text": pyarrow.array([None, None])})  # of type null
    write_parquet(tmp_path / "r", {"text": [1, None], "id": [1, 2]})
    (tmp_path / "c").write_bytes(b'id,text\n1,one\n2\n3,a,b\n\n"4\n",\xff\n5,two\n')
    (tmp_path / "t").write_bytes(b"one\n\xff\ntwo\n")

    def found(name: str, kind: str) -> tuple[list[str], list[str]]:
        source = SourceConfig(kind, data_files=str(tmp_path / name), sample_by="line")
        bad_rows = BadRows(source, 1.0)
        return list(documents(source, bad_rows)), [r.split(maxsplit=1)[1] for r in bad_rows.first]

    assert found("p", "parquet") == (
        ["one"],
        ["row 2 'text' is null", "row 3 'text' is not valid UTF-8 at character 0"],
    )
    assert found("q", "parquet") == ([], ["row 1 'text' is null", "row 2 'text' is null"])
    assert found("r", "parquet") == (
        [],
        ["row 1 'text' holds int64, not text", "row 2 'text' is null"],
    )
    assert found("c", "csv") == (
        ["one", "two"],
        [
            "row 3 has 1 fields, the header 2",
            "row 4 has 3 fields, the header 2",
            "row 6 'text' is not valid UTF-8 at character 0",
        ],
    )
    assert found("t", "text") == (
        ["one", "two"],
        ["row 2 'text' is not valid UTF-8 at character 0"],
    )


def test_more_odd_rows_than_the_stated_share_are_an_error_that_names_the_first(tmp_path):
    nulls = [{"text": None}] * 3
    (tmp_path / "a.jsonl").write_text(json_lines(*nulls))
    (tmp_path / "b.jsonl").write_text(json_lines("one", {"id": 1}, *map(str, range(35))))
    source = SourceConfig("json", data_files=str(tmp_path / "*.jsonl"))
    # 4 of 40, in any order
    assert len(list(documents(source, BadRows(source, limit=0.1)))) == 36
    with pytest.raises(
        ValueError,
        match=(
            r"4 of 40 rows \(10\.00%\) without readable text: \S+a\.jsonl row 1 'text' is null, "
            r"\S+a\.jsonl row 2 'text' is null, \S+a\.jsonl row 3 'text' is null, \.\.\.\. Mend "
            r"these rows, set text_column if it is not 'text', or raise data\.max_bad_rows 0\.09"
        ),
    ):
        list(documents(source, BadRows(source, limit=0.099)))


def test_a_misspelt_column_is_found_early_but_a_first_file_of_nulls_is_no_reason_to_stop(tmp_path):
    count = HOPELESS_ROWS
    (tmp_path / "a.jsonl").write_text(json_lines(*[{"text": None, "id": 1}] * count))
    (tmp_path / "b.jsonl").write_text(json_lines(*map(str, range(count))))
    source = SourceConfig("json", data_files=str(tmp_path / "*.jsonl"))
    assert len(list(documents(source, BadRows(source, limit=0.5)))) == count
    for column, message in (
        ("body", r"columns \['text', 'id'\], not text_column 'body'"),
        ("id", f"{count:,} of {count:,} rows .*'id' holds int, not text"),
    ):
        wrong = dataclasses.replace(source, text_column=column)
        bad_rows = BadRows(wrong)
        with pytest.raises(ValueError, match=message):
            list(documents(wrong, bad_rows))
        assert bad_rows.rows == count


def test_preparing_says_what_was_left_out_and_the_store_counts_it(tmp_path):
    rows = [f"text {i} {'x' * (i % 7)}" for i in range(300)]
    (tmp_path / "a.jsonl").write_text(json_lines(*rows[:100], {"text": None}, *rows[100:]))
    source, reports = SourceConfig("json", data_files=str(tmp_path / "a.jsonl")), []
    store = TokenStore(prepare(data_config(source, tmp_path), report=reports.append))
    assert [line for line in reports if "left out" in line] == [
        "source a: left out 1 of 301 rows (0.33%) without readable text: "
        f"{tmp_path}/a.jsonl row 101 'text' is null"
    ]
    (counts,) = store.manifest["sources"]
    assert counts["bad_rows"] == 1
    assert counts["documents"] + store.manifest["validation"]["documents"] == 300
    strict = dataclasses.replace(data_config(source, tmp_path / "strict"), max_bad_rows=0.001)
    assert fingerprint(strict) == store.manifest["fingerprint"]  # the same text, if any
    with pytest.raises(ValueError, match=r"a\.jsonl row 101 'text' is null"):
        prepare(strict, report=reports.append)
    assert list((tmp_path / "strict" / "cache").iterdir()) == []


def test_max_bad_rows_is_a_share():
    source = SourceConfig("json", data_files="a.jsonl")
    for share in (-0.1, 1.5, float("nan")):
        (problem,) = data_config(source, max_bad_rows=share).problems()
        assert problem.startswith(f"data.max_bad_rows is {share}; it is a share")
    assert not data_config(source, max_bad_rows=0.0).problems()


# --- compression ----------------------------------------------------------------------------------


def arrow_compressed(data: bytes, codec: str) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: arrow_compressed(data, "zstd"),
    "lz4": lambda data: arrow_compressed(data, "lz4"),
}
TEXTS = [f"text {i} é {'x' * (i % 97)}" for i in range(5000)]


@pytest.mark.parametrize("kind", ["json", "csv", "text"])
@pytest.mark.parametrize("form", COMPRESSORS)
def test_compressed_files_are_read_as_they_are_whatever_they_are_called(tmp_path, form, kind):
    compress = COMPRESSORS[form]
    content = {
        "json": json_lines(*TEXTS),
        "csv": "\n".join(["text", *TEXTS]),
        "text": "\n".join(TEXTS),
    }[kind].encode()
    (tmp_path / f"a.jsonl.{form}").write_bytes(compress(content))
    # as parallel compressors and cat leave them
    half = content.index(b"\n", len(content) // 2)
    (tmp_path / "b").write_bytes(compress(content[:half]) + compress(content[half:]))
    assert read(tmp_path / f"a.jsonl.{form}", kind, sample_by="line") == TEXTS
    assert read(tmp_path / "b", kind, sample_by="line") == TEXTS


@pytest.mark.parametrize("form", COMPRESSORS)
def test_a_compressed_file_that_was_cut_short_is_refused_by_name(tmp_path, form):
    whole = COMPRESSORS[form](json_lines(*TEXTS).encode())
    for size in (len(whole) // 2, len(whole) - 3):
        (tmp_path / "a.jsonl").write_bytes(whole[:size])
        refused(tmp_path / "a.jsonl", r"source 'a' cannot be read: \S+a\.jsonl cannot be read:")


def test_what_zstd_tools_leave_around_frames_is_skipped(tmp_path):
    # pzstd's, and the seekable format's
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    one, two = (arrow_compressed(json_lines(text).encode(), "zstd") for text in ("one", "two"))
    for content in (skippable + one + two, one + skippable + two, one + two + skippable):
        (tmp_path / "a.zst").write_bytes(content)
        assert read(tmp_path / "a.zst") == ["one", "two"]


def test_a_zstd_window_beyond_the_usual_limit_is_refused_with_the_way_out(tmp_path):
    # A frame header alone: a window of 256 MiB (descriptor 0x00, exponent 18), no content size.
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([18 << 3]) + b"\x01\0\0")
    refused(tmp_path / "a.zst", r"a\.zst cannot be read: .*window of at most 128 MiB \(--long=27")


def test_archives_are_read_member_by_member_in_their_order(tmp_path):
    members = {
        "b.jsonl": json_lines("one").encode(),
        "a/c.jsonl": json_lines("two").encode(),
        "__MACOSX/._b.jsonl": b"\0",
        ".hidden": b"\0",
        "d.jsonl.gz": gzip.compress(json_lines("three", {"text": None}).encode()),
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    for mode in ("w", "w:gz", "w:xz"):
        with tarfile.open(tmp_path / f"a.tar.{mode}", mode) as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    for name in ("a.zip", "a.tar.w", "a.tar.w:gz", "a.tar.w:xz"):
        source = SourceConfig("json", data_files=str(tmp_path / name))
        bad_rows = BadRows(source, 1.0)
        assert list(documents(source, bad_rows)) == ["one", "two", "three"]
        assert bad_rows.first == [f"{tmp_path}/{name}/d.jsonl.gz row 2 'text' is null"]


def test_a_parquet_file_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(gzip.compress(b"PAR1"))
    refused(
        tmp_path / "a.parquet",
        r"source 'a' cannot be read: \S+a\.parquet cannot be",
        "parquet",
    )


# --- policy ---------------------------------------------------------------------------------------


def test_bad_rows_are_counted_by_kind_and_the_first_can_be_an_error(tmp_path):
    rows = [json.dumps({"text": str(i)}) for i in range(300)]
    rows[5] = rows[17] = '{"text": null}'
    rows[20] = '{"text": 7}'
    rows[30] = '{"text": "a'
    rows[31] = '{"text": "bc'
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = SourceConfig("json", data_files=str(tmp_path / "a.jsonl"))
    lines: list[str] = []
    config = dataclasses.replace(data_config(source, tmp_path / "cache"), max_bad_rows=0.1)
    store = TokenStore(prepare(config, lines.append))
    assert store.manifest["sources"][0]["bad_rows_by_reason"] == {
        "'text' is null": 2,
        "'text' holds int, not text": 1,
        "is not valid JSON": 2,
    }
    (said,) = [line for line in lines if "left out" in line]
    assert "; in all 2 'text' is null, 2 is not valid JSON, 1 'text' holds int" in said

    strict = dataclasses.replace(config, on_bad_row="fail", cache_dir=str(tmp_path / "strict"))
    with pytest.raises(ValueError, match=r"a\.jsonl row 6 'text' is null; mend it, or set data"):
        prepare(strict, lines.append)
    # what may be left out is no part of what the tokens are
    assert fingerprint(strict) == fingerprint(config)
