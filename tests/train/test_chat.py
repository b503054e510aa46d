"""Conversations: read in any of their forms, written out as transformers does, learnt where the
assistant speaks and nowhere else, packed whole.

The templates in chat_templates/ are ours, each with what a family of published ones does: a
default system turn, dates and tools, namespaces and marks around answers, thoughts that are
forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.loss import IGNORE_INDEX
from model.routers.config import TopKConfig
from model.transformer import ModelParts, Transformer
from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.chat.packing import WINDOW, pack_epoch, pack_window
from train.data.chat.rows import as_conversation, read_conversations
from train.data.chat.samples import ChatSamples, ChatValidationRows, Conversations
from train.data.chat.show import shown_example
from train.data.chat.targets import example, render
from train.data.chat.template import PLAIN, ChatTemplate, chat_template, template_problems
from train.data.files import Format, Odd
from train.data.loader import TrainingLoader, pack, validation_batches
from train.data.prepare import fingerprint, prepare
from train.data.store import CHAT_TEMPLATE, TokenStore

SHAPE = ModelConfig(
    vocab_size=400,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=32,
    num_experts=4,
    expert_intermediate_size=16,
    max_seq_len=512,
    init_std=0.2,
)
PARTS = ModelParts(
    TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BalanceConfig()
)
TEMPLATES = Path(__file__).parent / "chat_templates"
MARKS = ("<|turn|>", "<|end|>", "<|header|>", "<|/header|>", "<|User|>", "<|Assistant|>", "<s>")
END = "<|end|>"
WORDS = ["quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "owls", "é", "日本", "😀"]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour.\n"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another?"},
        {"role": "assistant", "content": " Red, é 日本 😀."},
    ],
    [{"role": "user", "content": "Say <|end|> please"}, {"role": "assistant", "content": "No."}],
    [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning": "\nHm, é.\n"},
    ],
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é<"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer as a checkpoint has it, without a template: byte-level, with the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [" ".join(WORDS) * 3, "user assistant system Assistant: User:" * 3],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[*MARKS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    # As in Llama's: it moves offsets past spaces, and would put <s> before everything.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                "<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            ),
        ]
    )
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": END, "__type": "AddedToken", "special": True},
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def with_template(folder: Path, place: Path, name: str | None) -> Path:
    """A copy of the tokenizer's folder with one of our templates."""
    place.mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / file).write_bytes((folder / file).read_bytes())
    if name is not None:
        text = (TEMPLATES / f"{name}.jinja").read_text()
        (place / CHAT_TEMPLATE).write_text(text)
    return place


def chat_config(folder: Path, rows: list[dict] | None = None, **options) -> DataConfig:
    """Of a tokenizer's folder, with rows written beside it."""
    file = folder / "chats.jsonl"
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"validation_fraction": 0.2, "cache_dir": str(folder / "cache"), **options}
    return DataConfig(
        (SourceConfig("json", data_files=str(file), text_column="messages"),),
        TokenizerConfig(path=str(folder), end_of_document=END),
        format="chat",
        **settings,
    )


def made_up(count: int, seed: int = 0) -> list[dict]:
    """Conversations of one to three questions, none like another."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": f"number {i}"}] if i % 3 == 0 else []
        for _ in range(1 + i % 3):
            question = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
            messages += [
                {"role": "user", "content": f"{question} {i}"},
                {"role": "assistant", "content": question[::-1]},
            ]
        rows.append({"messages": messages})
    return rows


def tokens_of(config: DataConfig, messages: list[dict], train_on="assistant", **values):
    """(ids, is_target, tokenizer) of a conversation, by the tokenizer of a config's folder."""
    tokenizer = _tokenizer(config)
    template = chat_template(dataclasses.replace(config, **values))
    rendered = render({"messages": messages}, template, train_on)
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    encoding = tokenizer.encode(rendered.text, add_special_tokens=False)
    found = example(rendered, encoding, special.__contains__, train_on)
    return found.ids, found.is_target, tokenizer


def _tokenizer(config: DataConfig):
    from train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.post_processor = None
    return tokenizer


def learnt(config: DataConfig, messages: list[dict], train_on="assistant", **values) -> str:
    """The text of the targets."""
    ids, is_target, tokenizer = tokens_of(config, messages, train_on, **values)
    return tokenizer.decode(ids[is_target].tolist(), skip_special_tokens=False)


# --- templates ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    return library


@pytest.mark.parametrize("name", ["turns", "headers", "markers", "forgets"])
def test_text_and_tokens_are_those_of_transformers(tmp_path, folder, transformers, name):
    place = with_template(folder, tmp_path / "t", name)
    config = chat_config(place)
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    template = chat_template(config)
    for chat in CHATS:
        assert template.render(chat) == theirs.apply_chat_template(chat, tokenize=False)
        header = theirs.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        assert template.render(chat[:-1], add_generation_prompt=True) == header
        ids, _, _ = tokens_of(config, chat, "last")
        assert ids.tolist() == theirs.apply_chat_template(chat, return_dict=True)["input_ids"]


def test_tools_and_calls_are_written_as_transformers_writes_them(tmp_path, folder, transformers):
    place = with_template(folder, tmp_path / "t", "headers")
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    row = {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
        "tools": json.dumps(TOOLS),  # as many data sets keep them
    }
    conversation = json.loads(as_conversation(row, "messages"))
    text = chat_template(chat_config(place)).render(conversation["messages"], tools=TOOLS)
    assert text == theirs.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False)
    assert conversation["tools"] == TOOLS and '"a": 2, "b": "é<"' in text


def test_the_file_that_is_given_comes_before_the_tokenizers_own_and_that_before_its_settings(
    tmp_path, folder
):
    place = with_template(folder, tmp_path / "t", None)
    assert chat_template(chat_config(place)).source == PLAIN
    settings = json.loads((place / "tokenizer_config.json").read_text())
    for value in ("in settings", [{"name": "default", "template": "in settings"}]):
        (place / "tokenizer_config.json").write_text(
            json.dumps(settings | {"chat_template": value})
        )
        assert chat_template(chat_config(place)).source == "in settings"
    (place / CHAT_TEMPLATE).write_text("in a file")
    assert chat_template(chat_config(place)).source == "in a file"
    (tmp_path / "given.jinja").write_text("given")
    config = chat_config(place, chat_template=str(tmp_path / "given.jinja"))
    assert chat_template(config).source == "given"

    # Each of them makes another store.
    before = fingerprint(config)
    (tmp_path / "given.jinja").write_text("given anew")
    assert fingerprint(config) != before
    (tmp_path / "given.jinja").write_text("")
    assert "is empty" in template_problems(config)[0]


def test_a_tokenizer_without_a_template_gets_a_plain_form(folder):
    config = chat_config(folder)
    text = chat_template(config).render(CHATS[1])
    assert text == (
        "System: Be brief.\n\nUser: Name a colour.\n\n\nAssistant: Blue.<|end|>\n\n"
        "User: Another?\n\nAssistant:  Red, é 日本 😀.<|end|>"
    )
    assert learnt(config, CHATS[1]) == " Blue.<|end|>  Red, é 日本 😀.<|end|>"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safe|unsafe|safely"),
        ("{{ dict.__subclasses__() }}", "unsafe|has no attribute"),
        ("{% set ns = namespace(_x=1) %}", "keeps no"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[7].content.x }}", "no element 7"),
    ],
)
def test_a_template_that_reaches_out_or_refuses_is_one_line(source, said):
    with pytest.raises(ValueError, match=said) as raised:
        ChatTemplate(source, {}, "here").render(CHATS[0])
    assert "\n" not in str(raised.value)


def test_what_is_no_template_is_said_before_any_conversation_is_read(tmp_path, folder):
    config = chat_config(with_template(folder, tmp_path / "t", None))
    (tmp_path / "t" / CHAT_TEMPLATE).write_text("{% for %}")
    (problem,) = template_problems(config)
    assert str(tmp_path / "t" / CHAT_TEMPLATE) in problem and "\n" not in problem
    (tmp_path / "t" / CHAT_TEMPLATE).write_bytes(b"\xff")
    assert "cannot be read" in template_problems(config)[0]
    (tmp_path / "t" / CHAT_TEMPLATE).unlink()
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    assert "is not valid JSON" in template_problems(config)[0]
    assert template_problems(dataclasses.replace(config, format="text")) == []


def test_a_template_that_never_comes_back_is_given_up(tmp_path, folder, monkeypatch):
    from train.data.chat import examples

    config = chat_config(with_template(folder, tmp_path / "t", None), made_up(4))
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "t" / CHAT_TEMPLATE).write_text(loop)
    monkeypatch.setattr(examples, "RENDERING_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"rendering .*chats.jsonl row 1 took more than 0.5 s"):
        prepare(config, report=lambda line: None)


# --- targets --------------------------------------------------------------------------------------


def test_answers_and_the_ends_of_their_turns_are_learnt_and_nothing_else(tmp_path, folder):
    config = chat_config(with_template(folder, tmp_path / "t", "turns"))
    assert learnt(config, CHATS[1]) == "Blue.<|end|> Red, é 日本 😀.<|end|>"
    assert learnt(config, CHATS[1], "last") == " Red, é 日本 😀.<|end|>"
    # what the template writes after the end of a turn is nobody's to say
    ids, is_target, tokenizer = tokens_of(config, CHATS[1])
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False).endswith("<|end|>\n")
    assert not is_target[-1]
    whole = tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False)
    assert learnt(config, CHATS[1], "all") == whole


def test_every_turn_of_a_random_conversation_is_found_by_its_offsets(tmp_path, folder):
    """Whatever stands in it: answers that repeat questions, begin with spaces, are empty, or spell
    marks.
    """
    config = chat_config(with_template(folder, tmp_path / "t", "turns"))
    rng = random.Random(1)
    pieces = [*WORDS, " ", "\n", "assistant\n", "<|turn|>", "<|end|>", "user", ""]
    for _ in range(60):
        messages = []
        for _ in range(rng.randint(1, 4)):
            messages += [
                {"role": role, "content": "".join(rng.choices(pieces, k=rng.randint(0, 5)))}
                for role in ("user", "assistant")
            ]
        expected = "".join(m["content"] + END for m in messages if m["role"] == "assistant")
        assert learnt(config, messages) == expected


def test_the_header_of_an_answer_is_never_learnt_an_empty_block_of_thoughts_included(
    tmp_path, folder
):
    config = chat_config(with_template(folder, tmp_path / "t", "forgets"))
    block = "<think>\n\n</think>\n\n"
    assert learnt(config, CHATS[0]) == f"{block}4{END}"  # here the model has to write it
    assert learnt(config, CHATS[0], thinking=False) == f"4{END}"
    assert learnt(config, CHATS[3]) == f"<think>\nHm, é.\n</think>\n\nSo.{END}"


def test_a_template_that_rewrites_what_came_before_is_refused_with_the_number(tmp_path, folder):
    config = chat_config(with_template(folder, tmp_path / "t", "forgets"))
    with pytest.raises(ValueError, match=r"^message 2: .* otherwise once later .*train_on=last"):
        tokens_of(config, CHATS[1])
    assert learnt(config, CHATS[1], "last") == f"<think>\n\n</think>\n\n Red, é 日本 😀.{END}"
    with pytest.raises(ValueError, match=r"^message 1: the header that the template asks"):
        tokens_of(config, CHATS[3], thinking=False)


def test_an_answer_that_comes_first_is_refused_with_its_number_by_a_template_that_cannot(
    tmp_path, folder
):
    config = chat_config(with_template(folder, tmp_path / "t", "turns"))
    with pytest.raises(ValueError, match=r"^message 0: .* the chat template refuses it"):
        tokens_of(config, [{"role": "assistant", "content": "Hello."}])


def test_a_switch_that_a_template_does_not_have_is_refused(tmp_path, folder):
    config = chat_config(with_template(folder, tmp_path / "t", "turns"), thinking=True)
    assert "has no switch for it" in template_problems(config)[0]


# --- rows -----------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": [{**ASKED, "name": None}, ANSWERED], "id": 3, "tools": None},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"dialogue": [ASKED, ANSWERED], "messages": None},
    ],
)
def test_all_forms_of_a_conversation_are_one(row):
    column = "dialogue" if "dialogue" in row else "messages"
    assert json.loads(as_conversation(row, column)) == {"messages": [ASKED, ANSWERED]}


def test_a_system_column_of_sharegpt_comes_first():
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "?"}, {"from": "observation", "value": "!"}],
    }
    roles = [m["role"] for m in json.loads(as_conversation(row, "messages"))["messages"]]
    assert roles == ["system", "user", "tool"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hello"}, "holds str, not a list"),
        ({"messages": []}, "holds no message"),
        ({"messages": [ASKED, 3]}, "message 1 of 'messages' holds int"),
        ({"messages": [{"content": "x"}]}, "message 0 of 'messages' has no role"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "message 1 .* content of NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content of list"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "is from 'martian'"),
        ({"messages": [ASKED], "tools": "{"}, "Expecting"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid UTF-8"),
        ({"messages": None}, "has no messages"),
        ({"text": "x"}, "has no 'messages'"),
        (["x"], "holds list, not an object"),
    ],
)
def test_what_is_no_conversation_says_why(row, said):
    import re

    found = as_conversation(row, "messages")
    assert isinstance(found, Odd) and re.search(said, found.reason)


def test_parquet_and_json_hold_the_same_conversations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = made_up(7)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    table = pyarrow.table({"id": list(range(7)), "messages": [r["messages"] for r in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [
        [row.text for row in read_conversations(str(tmp_path / f"a.{kind}"), form, "messages")]
        for kind, form in (("json", Format("json")), ("parquet", Format("parquet")))
    ]
    assert found[0] == found[1] and len(found[0]) == 7
    with pytest.raises(ValueError, match="holds no conversations"):
        next(read_conversations("x.txt", Format("text"), "messages"))


def test_large_numbers_in_a_call_stay_what_they_are(tmp_path):
    number = 12345678901234567890
    row = {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"a": number}]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (found,) = read_conversations(str(tmp_path / "a.jsonl"), Format("json"), "messages")
    assert str(number) in found.text


# --- the store ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory, folder) -> tuple[DataConfig, TokenStore]:
    place = with_template(folder, tmp_path_factory.mktemp("chats") / "t", "turns")
    config = chat_config(place, made_up(60))
    return config, TokenStore(prepare(config, report=lambda line: None))


def stored(rows) -> list[tuple[list[int], list[bool]]]:
    """Conversations of rows, in their order."""
    return [
        (ids.tolist(), marks.tolist())
        for row in rows
        for ids, marks in zip(row.ids, row.is_target, strict=True)
    ]


def test_the_store_holds_every_conversation_up_to_its_last_target_on_one_side(chats):
    config, store = chats
    expected = []
    for row in made_up(60):
        ids, marks, _ = tokens_of(config, row["messages"])
        length = int(np.flatnonzero(marks)[-1]) + 1
        expected.append((ids[:length].tolist(), marks[:length].tolist()))
    samples = ChatSamples(store, (1.0,), 4096, 0, "refuse")
    held_out = ChatValidationRows(store, 4096, "refuse")
    train = stored(samples.row(i) for i in range(samples.rows[0].rows_of_epoch(0)))
    held = stored(held_out.row(i) for i in range(len(held_out)))
    assert sorted(train + held) == sorted(expected) and held and train
    assert store.manifest["sources"][0]["targets"] == sum(sum(marks) for _, marks in train)
    assert store.manifest["chat"]["train_on"] == "assistant"
    assert (store.path / CHAT_TEMPLATE).read_text() == (TEMPLATES / "turns.jinja").read_text()


def test_a_store_of_text_is_named_as_before(tmp_path):
    """Settings of conversations are no part of its name, so no store is made again."""
    (tmp_path / "a.txt").write_text("text")
    config = DataConfig(
        (SourceConfig("text", data_files=str(tmp_path / "a.txt")),), TokenizerConfig()
    )
    others = {"train_on": "last", "too_long": "cut", "thinking": False}
    assert fingerprint(config) == fingerprint(dataclasses.replace(config, **others))


def test_rows_that_cannot_be_learnt_from_are_counted_or_refused_with_their_place(tmp_path, folder):
    place = with_template(folder, tmp_path / "t", "turns")
    bad = [
        {"messages": [ASKED]},
        {"messages": [ASKED, {"role": "assistant", "content": "x"}], "tools": "3"},
        {"messages": [ANSWERED]},
    ]
    rows = made_up(20)
    rows[3:3] = bad
    config = chat_config(place, rows, max_bad_rows=0.1)
    with pytest.raises(ValueError) as raised:
        prepare(config, report=lambda line: None)
    said = str(raised.value)
    assert "3 of 23 rows (13.04%) that cannot be learnt from" in said
    assert "chats.jsonl row 4 has no message of the assistant to learn from" in said
    assert "row 5 'tools' holds no list" in said and "row 6 message 0: " in said
    lines: list[str] = []
    store = TokenStore(prepare(dataclasses.replace(config, max_bad_rows=0.2), lines.append))
    assert store.manifest["sources"][0]["bad_rows"] == 3
    assert any("left out 3 of 23 rows" in line for line in lines)
    assert any("of the tokens learnt (" in line for line in lines)


def test_a_data_set_without_any_answer_is_refused(tmp_path, folder):
    """Complaint: masks of zeros everywhere, and a run that looks healthy."""
    place = with_template(folder, tmp_path / "t", "turns")
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(20)]
    with pytest.raises(ValueError, match=r"20 of 20 rows .* no message of the assistant"):
        prepare(chat_config(place, rows), report=lambda line: None)


def test_settings_that_do_nothing_are_refused(tmp_path, folder):
    config = chat_config(folder)
    assert config.problems() == []
    text = dataclasses.replace(config, format="text", train_on="last", too_long="cut")
    assert [p.split()[0] for p in text.problems()] == ["data.train_on", "data.too_long"]
    sample = dataclasses.replace(config, sources=(SourceConfig("sample"),))
    assert "holds no conversations" in sample.problems()[0]
    missing = dataclasses.replace(config, chat_template=str(tmp_path / "none"))
    assert "does not exist" in missing.problems()[0]


# --- packing --------------------------------------------------------------------------------------


def test_first_fit_decreasing_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        capacity = int(rng.integers(5, 40))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 60)))
        rows: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            fits = [r for r in rows if sum(lengths[j] for j in r) + lengths[i] <= capacity]
            fits[0].append(i) if fits else rows.append([i])
        assert [r.tolist() for r in pack_window(lengths, capacity)] == [sorted(r) for r in rows]


def test_an_epoch_holds_every_conversation_once_and_few_places_are_filler():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 200, 2 * WINDOW + 50)
    rows = pack_epoch(lengths, 512, np.random.RandomState(3))
    found = np.concatenate(rows)
    assert sorted(found.tolist()) == np.flatnonzero(lengths).tolist()
    assert all(lengths[row].sum() <= 512 for row in rows)
    assert lengths.sum() / (512 * len(rows)) > 0.98
    # long ones are not first: neither half of a window has more of them
    heads = np.array([lengths[row].max() for row in rows[:1000]])
    assert abs(heads[:500].mean() - heads[500:].mean()) < 10
    again = pack_epoch(lengths, 512, np.random.RandomState(3))
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))


def test_sample_i_is_the_same_wherever_reading_begins(chats):
    _, store = chats
    samples = ChatSamples(store, (1.0,), 256, 7, "refuse")
    per_epoch = samples.rows[0].rows_of_epoch(0)
    count = 3 * per_epoch
    in_order = [stored([samples.row(i)]) for i in range(count)]
    later = ChatSamples(store, (1.0,), 256, 7, "refuse")
    for i in (count - 1, per_epoch, 0, per_epoch - 1):
        assert stored([later.row(i)]) == in_order[i]
    first, second = (
        sorted(c for row in in_order[begin : begin + per_epoch] for c in row)
        for begin in (0, per_epoch)
    )
    assert first == second or samples.rows[0].rows_of_epoch(1) != per_epoch
    assert in_order[:per_epoch] != in_order[per_epoch : 2 * per_epoch]
    assert in_order[0] != stored([ChatSamples(store, (1.0,), 256, 8, "refuse").row(0)])


@pytest.mark.parametrize(("micro_batch_size", "ranks"), [(1, 1), (2, 2), (1, 4)])
def test_any_layout_reads_the_same_rows_and_a_restored_loader_goes_on(
    chats, micro_batch_size, ranks
):
    _, store = chats

    def loaders() -> list[TrainingLoader]:
        return [
            TrainingLoader(
                ChatSamples(store, (1.0,), 256, 7, "refuse"),
                256,
                micro_batch_size,
                store.end_of_document,
                rank,
                ranks,
            )
            for rank in range(ranks)
        ]

    number = 8 // (micro_batch_size * ranks)
    group, seen = loaders(), []
    for _ in range(4):
        steps = [loader.next_step(number) for loader in group]
        parts = [steps[rank][micro] for micro in range(number) for rank in range(ranks)]
        seen.append(torch.cat([part.input_ids for part in parts]))
    samples = ChatSamples(store, (1.0,), 256, 7, "refuse")
    expected = pack([samples.row(i) for i in range(32)], 256, store.end_of_document)
    assert torch.equal(torch.cat(seen), expected.input_ids)

    restored = loaders()
    for loader in restored:
        loader.consumed_samples = 24
    first = torch.cat([loader.next_step(number)[0].input_ids for loader in restored])
    assert torch.equal(first, seen[3][: micro_batch_size * ranks])


def test_boundaries_come_from_the_packer_though_every_turn_ends_with_the_end_of_a_document(chats):
    _, store = chats
    samples = ChatSamples(store, (1.0,), 256, 7, "refuse")
    row = samples.row(0)
    batch = pack([row], 256, store.end_of_document)
    lengths = [len(ids) - 1 for ids in row.ids]
    ends = (batch.input_ids == store.end_of_document).sum()
    assert int(ends) > len(row.ids)  # turns end in the midst of documents
    filler = 256 - sum(lengths)
    expected = np.cumsum([0, *lengths, *([filler] if filler else [])])
    assert batch.cu_seqlens.tolist() == expected.tolist()
    at = 0
    for ids, marks in zip(row.ids, row.is_target, strict=True):
        part = slice(at, at + len(ids) - 1)
        assert batch.input_ids[0, part].tolist() == ids[:-1].tolist()
        assert batch.positions[0, part].tolist() == list(range(len(ids) - 1))
        wanted = [i if mark else IGNORE_INDEX for i, mark in zip(ids[1:], marks[1:], strict=True)]
        assert batch.targets[0, part].tolist() == wanted
        at = part.stop
    assert batch.num_targets == sum(int(marks.sum()) for marks in row.is_target)


def test_conversations_packed_have_the_loss_of_conversations_one_by_one(chats):
    _, store = chats
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SHAPE, vocab_size=store.vocab_size), PARTS).eval()
    samples = ChatSamples(store, (1.0,), 256, 7, "refuse")
    row = next(row for i in range(20) if len((row := samples.row(i)).ids) >= 3)
    with torch.no_grad():
        whole = model(pack([row], 256, 0).inputs(torch.device("cpu")))
        alone = 0.0
        for ids, marks in zip(row.ids, row.is_target, strict=True):
            single = Conversations(len(ids) - 1, (ids,), (marks,))
            batch = pack([single], len(ids) - 1, 0).inputs(torch.device("cpu"))
            alone += float(model(batch).loss_sum)
    assert float(whole.loss_sum) == pytest.approx(alone, rel=1e-6)


def test_a_conversation_that_is_too_long_is_refused_or_cut_with_its_mask(chats):
    _, store = chats
    with pytest.raises(
        ValueError, match=r"\d\d of \d\d conversations of source json do not fit .*56"
    ):
        ChatSamples(store, (1.0,), 56, 7, "refuse")
    with pytest.raises(ValueError, match="those held out do not fit"):
        ChatValidationRows(store, 8, "refuse")
    long = ChatSamples(store, (1.0,), 4096, 7, "refuse")
    whole = stored(long.row(i) for i in range(long.rows[0].rows_of_epoch(0)))
    short = ChatSamples(store, (1.0,), 56, 7, "cut")
    cut = stored(short.row(i) for i in range(short.rows[0].rows_of_epoch(0)))
    expected = [(ids[:57], marks[:57]) for ids, marks in whole]
    kept = [pair for pair in expected if any(pair[1])]
    assert sorted(cut) == sorted(kept) and len(kept) < len(expected)
    (line,) = short.description()
    number = sum(len(ids) > 57 for ids, _ in whole)
    assert f"{number} cut to train.seq_len, of which {len(expected) - len(kept)} left out" in line


def test_held_out_conversations_are_evaluated_once_each_on_any_number_of_ranks(chats):
    _, store = chats
    rows = ChatValidationRows(store, 256, "refuse")
    expected = store.manifest["validation"]["targets"]
    assert sum(int(m.sum()) for i in range(len(rows)) for m in rows.row(i).is_target) == expected
    for ranks in (1, 2, 3):
        batches = [
            batch
            for rank in range(ranks)
            for batch in validation_batches(rows, 2, store.end_of_document, rank, ranks, None)
        ]
        assert sum(batch.num_targets for batch in batches) == expected
        assert not any(batch.target_bytes for batch in batches)
    assert "bits_per_byte is left out" in rows.bytes_problem


def test_sources_are_blended_by_their_weights(tmp_path, folder):
    place = with_template(folder, tmp_path / "t", "turns")
    one, two = place / "one.jsonl", place / "two.jsonl"
    for file, seed in ((one, 1), (two, 2)):
        file.write_text("".join(json.dumps(row) + "\n" for row in made_up(30, seed)))
    config = chat_config(place)
    source = config.sources[0]
    config = dataclasses.replace(
        config, sources=tuple(dataclasses.replace(source, data_files=str(f)) for f in (one, two))
    )
    store = TokenStore(prepare(config, report=lambda line: None))
    samples = ChatSamples(store, (3.0, 1.0), 256, 7, "refuse")
    of = [samples.source_of(i) for i in range(400)]
    assert of.count(0) == 300
    assert stored([samples.row(399)]) == stored(
        [samples.rows[of[399]].conversations(of[:399].count(of[399]))]
    )


def test_a_damaged_mask_is_refused(chats, tmp_path):
    import shutil

    _, store = chats
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    marks = copy / "train_0_targets.bin"
    marks.write_bytes(bytes([1]) * marks.stat().st_size)
    with pytest.raises(ValueError, match=r"train_0_targets.bin has another checksum"):
        ChatSamples(TokenStore(copy), (1.0,), 256, 7, "refuse")
    marks.unlink()
    with pytest.raises(ValueError, match="is missing"):
        ChatSamples(TokenStore(copy), (1.0,), 256, 7, "refuse")


def test_the_example_shows_what_is_learnt(chats, monkeypatch):
    _, store = chats
    samples = ChatSamples(store, (1.0,), 256, 7, "refuse")
    ids, marks = samples.row(0).ids[0], samples.row(0).is_target[0]
    text = shown_example(samples, 0)
    tokenizer = store.tokenizer()
    body = text.split("\n", 1)[1]
    answers = [part.split("⟧")[0] for part in body.split("⟦")[1:]]
    expected = tokenizer.decode(ids[marks].tolist(), skip_special_tokens=False)
    assert "".join(answers) == expected
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[2m" in shown_example(samples, 0) and "⟦" not in shown_example(samples, 0)
