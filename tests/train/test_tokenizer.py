"""Tokenizers of every kind that models ship with: the bytes of a token, and text from tokens as
they come.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from model.loss import IGNORE_INDEX
from model.request import ForwardRequest, TokenBatch
from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.damage import seal
from train.data.loader import validation_batches
from train.data.prepare import prepare, train_bpe
from train.data.store import TokenStore, ValidationRows
from train.data.tokenizer import (
    TextInside,
    TextStream,
    encoded_bytes,
    token_bytes,
    tokenizer_problems,
    vocabulary_size,
)
from train.trained.evaluate import evaluate, one_by_one

TEXT = (
    "The cat sat on the mat, and the dog's log sat on the cat; don't ask why it is so. "
    "Naïve café über straße, 你好 世界 😀 again and again.\n\tdef f(x):\n        return x  # two  "
    "spaces\n"
)
ASCII_TEXT = TEXT.encode("ascii", "ignore").decode()
BYTES = [f"<0x{b:02X}>" for b in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(**options) -> Tokenizer:
    """As GPT-2, Llama 3 and DeepSeek: with an added token of several bytes a character, and offsets
    moved afterwards.
    """
    tokenizer = train_bpe(iter([TEXT] * 3), TokenizerConfig(vocab_size=330))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens([AddedToken("<｜User｜>", special=False, normalized=False)])
    return tokenizer


def _bpe_with_byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        [ASCII_TEXT] * 3,
        trainers.BpeTrainer(vocab_size=360, special_tokens=[*SPECIAL, *BYTES], show_progress=False),
    )
    plain = Tokenizer(
        models.BPE(
            vocab=tokenizer.get_vocab(),
            merges=_merges(tokenizer),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    plain.add_special_tokens(SPECIAL)  # pieces of bytes are none of them
    return plain


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def llama_2() -> Tokenizer:
    """As Llama 2 and Mixtral shipped it: the space before a word by a normalizer, the text put
    together by a chain.
    """
    tokenizer = _bpe_with_byte_fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def metaspace(scheme: str = "first") -> Tokenizer:
    """As they ship it now."""
    tokenizer = _bpe_with_byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if scheme != "never" else []),
        ]
    )
    return tokenizer


def unigram(byte_fallback: bool) -> Tokenizer:
    """As T5 and ALBERT: text is normalized and runs of spaces are one."""
    pieces = [(piece, -20.0) for piece in [*SPECIAL, *BYTES]] + [
        (piece, -float(len(TEXT) - TEXT.count(piece.strip("▁")) * len(piece)) / len(TEXT) * 8)
        for piece in [
            "▁",
            *sorted({c for c in TEXT if c.isascii() and not c.isspace()}),
            "▁the",
            "▁sat",
            "▁on",
            "▁cat",
            "é",
            "again",
            "▁and",
            "in",
        ]
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(SPECIAL)
    if not byte_fallback:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace("  ", " ")]
        )
        tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: lower case, accents and spaces dropped, whole words unknown."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        [ASCII_TEXT] * 3,
        trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False
        ),
    )
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte level, space before the text": lambda: byte_level(add_prefix_space=True),
    "Llama 2": llama_2,
    "Metaspace": metaspace,
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, never": lambda: metaspace("never"),
    "Unigram": lambda: unigram(byte_fallback=True),
    "Unigram, normalized": lambda: unigram(byte_fallback=False),
    "WordPiece": word_piece,
}
LOSSLESS = ("byte level", "Llama 2", "Metaspace", "Metaspace, never", "Unigram")
made = functools.cache(lambda kind: KINDS[kind]())

PIECES = st.sampled_from(
    [
        "the",
        " the",
        "cat",
        "  ",
        " ",
        "\n",
        "\t",
        "é",
        "e\u0301",
        "你",
        "😀",
        "▁",
        "<0x41>",
        "<｜User｜>",
        "</s>",
        "ﬁ",
        "\u00a0",
        "\u200b",
        "\ufffd",
        "don't",
        "İ",
        "THE",
        "x" * 120,
        "\U0001f468\u200d\U0001f469",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(PIECES, max_size=12).map("".join),
    st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12).map("".join),
)


def counted(tokenizer: Tokenizer, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids of a text, and the bytes each stands for with those after the last."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoded_bytes(text, encoding, token_bytes(tokenizer))


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_documents_tokens_add_up_to_its_utf8_length(kind):
    tokenizer = Tokenizer.from_str(made(kind).to_str())
    tokenizer.encode_special_tokens, tokenizer.post_processor = True, None
    spelled = token_bytes(tokenizer)

    def check(text: str) -> None:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        counts = encoded_bytes(text, encoding, spelled)
        assert counts.shape == (len(encoding.ids) + 1,) and counts.min() >= 0
        assert counts.sum() == len(text.encode())

    for length in range(0, len(TEXT), 7):
        check(TEXT[length:])
        check(TEXT[:length])
    settings(max_examples=150, derandomize=True, deadline=None, database=None)(
        given(TEXTS)(check)
    )()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_token_of_a_lossless_tokenizer_counts_the_bytes_it_spells(kind):
    tokenizer = made(kind)
    spelled = token_bytes(tokenizer)
    for text in (TEXT, TEXT[5:], "the cat  sat", "你好 世界 😀é"):
        ids, counts = counted(tokenizer, text)
        assert counts[-1] == 0
        expected = spelled[ids]
        if kind not in ("byte level", "Metaspace, never"):
            # the space that the first token spells does not stand in the text
            expected[0] -= 1
        np.testing.assert_array_equal(counts[:-1], expected)
        # and where the text is whole after a token, so is the count
        so_far, total = 0, 0
        for end, count in enumerate(counts[:-1], 1):
            total += count
            decoded = tokenizer.decode(ids[:end])
            if not decoded.endswith("\ufffd") and text.startswith(decoded):
                so_far += 1
                assert len(decoded.encode()) == total
        assert so_far > len(ids) // 3


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_pieces_of_bytes_and_words_count_as_they_stand_in_the_text(scheme):
    ids, counts = counted(metaspace(scheme), "the cat 龍 sat")
    tokens = [made("Metaspace").id_to_token(i) for i in ids]
    assert "".join(tokens).lstrip("▁") == "the▁cat▁<0xE9><0xBE><0x8D>▁sat"
    assert counts.tolist() == [
        len(t.lstrip("▁") if i == 0 else t) if t not in BYTES else 1 for i, t in enumerate(tokens)
    ] + [0]


def test_an_added_token_of_a_byte_level_tokenizer_counts_its_utf8_length():
    tokenizer = made("byte level")
    text = "<｜User｜> the cat <｜User｜> sat"
    ids, _ = counted(tokenizer, text)
    lengths = token_bytes(tokenizer)
    assert lengths[tokenizer.token_to_id("<｜User｜>")] == 12
    assert lengths[ids].sum() == len(text.encode())
    assert lengths[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_what_a_tokenizer_drops_or_does_not_know_is_counted_too():
    tokenizer = made("WordPiece")
    ids, counts = counted(tokenizer, "  The  Cat, 界 sat \n")
    assert [tokenizer.id_to_token(i) for i in ids] == ["the", "cat", ",", "[UNK]", "sat"]
    # the last: what only the end of the document stands for
    assert counts.tolist() == [5, 5, 1, 4, 4, 2]
    assert counted(tokenizer, "\u200b\n")[1].tolist() == [4]


def test_special_tokens_and_unused_ids_have_no_bytes():
    tokenizer = made("Llama 2")
    lengths = token_bytes(tokenizer)
    assert [lengths[tokenizer.token_to_id(t)] for t in SPECIAL] == [0, 0, 0]
    assert {lengths[tokenizer.token_to_id(t)] for t in BYTES} == {1}
    assert lengths[tokenizer.token_to_id("▁the")] == 4 and lengths[tokenizer.token_to_id("▁")] == 1


def test_random_bytes_of_text_count_once_each():
    """Long random texts of every plane, through a tokenizer that splits most characters."""
    rng, tokenizer = random.Random(0), made("byte level")
    text = "".join(
        chr(
            rng.choice([rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0xE000, 0x110000)])
        )
        for _ in range(3000)
    )
    ids, counts = counted(tokenizer, text)
    assert counts.sum() == len(text.encode()) and len(ids) > 3000
    np.testing.assert_array_equal(counts[:-1], token_bytes(tokenizer)[ids])


# --- ids ------------------------------------------------------------------------------------------


def with_hole(tokenizer: Tokenizer, moved: dict[str, int]) -> Tokenizer:
    """The same with other ids for some tokens. (Added tokens alone get the next free ids when a
    file is loaded.)
    """
    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"].update(
        {token: i for token, i in moved.items() if token in data["model"]["vocab"]}
    )
    for added in data["added_tokens"]:
        added["id"] = moved.get(added["content"], added["id"])
    return Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize(
    "moved", [{"<|endoftext|>": 900}, {"Ġthe": 700}, {"Ġthe": 70_000, "<|endoftext|>": 401}]
)
def test_a_vocabulary_is_as_large_as_its_largest_id(tmp_path, moved):
    tokenizer = with_hole(byte_level(), moved)
    size = max(moved.values()) + 1
    assert tokenizer.get_vocab_size() < vocabulary_size(tokenizer) == size
    store = store_of(tmp_path, tokenizer, "<|endoftext|>")
    assert store.vocab_size == size == len(store.token_bytes())
    assert store.end_of_document == tokenizer.token_to_id("<|endoftext|>")
    rows = ValidationRows(store, 16)
    assert max(rows.tokens(i).max() for i in range(len(rows))) >= min(moved.values())
    assert "bits_per_byte" in evaluated(store)


def test_a_tokenizer_that_the_model_does_not_cover_is_found_before_any_text_is_read(tmp_path):
    tokenizer = with_hole(byte_level(), {"Ġthe": 700})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(path=str(tmp_path), end_of_document="<eot>")
    size, end = tokenizer_problems(config, 700)
    assert (
        "largest token id" in size
        and "700" in size
        and "model.vocab_size 700 must be at least 701" in size
    )
    assert "no token '<eot>'; set data.tokenizer.end_of_document" in end
    assert tokenizer_problems(TokenizerConfig(path=str(tmp_path)), 701) == []
    assert tokenizer_problems(TokenizerConfig(), 1) == []
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizers file" in tokenizer_problems(config, 701)[0]
    assert (
        "does not exist" in tokenizer_problems(TokenizerConfig(path=str(tmp_path / "none")), 701)[0]
    )


def test_a_run_ends_before_the_corpus_is_tokenised_when_the_model_does_not_cover_the_tokenizer(
    tmp_path, monkeypatch
):
    import train.data.open

    data = data_of(tmp_path, byte_level(), "<|endoftext|>")
    monkeypatch.setattr(train.data.open, "from_rank_zero", lambda function: function())
    monkeypatch.setattr(
        train.data.open, "prepare", lambda *args: pytest.fail("the corpus was read")
    )
    with pytest.raises(
        ValueError, match=r"largest token id .* model\.vocab_size 300 must be at least 331"
    ):
        train.data.open.open_store(
            SimpleNamespace(data=data, model=SimpleNamespace(vocab_size=300)),
            tmp_path / "run",
            None,
        )


# --- text from tokens as they come ----------------------------------------------------------------


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: list[int], **options) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


def streamed(tokenizer, prompt: list[int], continuation: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in continuation), stream.end()]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_pieces_are_what_the_whole_sequence_decodes_to(kind):
    tokenizer = made(kind)
    size = tokenizer.get_vocab_size()
    unfinished = [i for i in range(size) if "\ufffd" in tokenizer.decode([i])] or [0]
    ids = st.one_of(st.integers(0, size + 1), st.sampled_from(unfinished))

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(
        TEXTS, st.one_of(st.lists(ids, max_size=60), TEXTS.map(lambda t: tokenizer.encode(t).ids))
    )
    def check(prompt, continuation):
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        before, whole = tokenizer.decode(prompt_ids), tokenizer.decode(prompt_ids + continuation)
        text = "".join(streamed(tokenizer, prompt_ids, continuation))
        # bytes may spoil the last of the prompt, which is shown as it was given
        assume(whole.startswith(before))
        assert before + text == whole

    check()


@pytest.mark.parametrize(
    "kind", ["Llama 2", "Metaspace", "Metaspace, always", "Unigram", "WordPiece"]
)
def test_the_first_space_of_a_continuation_is_kept(kind):
    tokenizer = made(kind)
    prompt, continuation = tokenizer.encode("the cat").ids, tokenizer.encode("sat on").ids
    assert "".join(streamed(tokenizer, prompt, continuation)) == " sat on"


@pytest.mark.parametrize("kind", KINDS)
def test_text_appears_with_its_token_and_never_half_a_character(kind):
    tokenizer = made(kind)
    pieces = streamed(tokenizer, tokenizer.encode("the cat").ids, tokenizer.encode(TEXT).ids)
    assert sum(map(bool, pieces)) > len(pieces) // 2
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte level", "Llama 2", "Unigram", "WordPiece"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(kind):
    """Of words, and of bytes that are no characters."""
    plain = made(kind)
    noise = [i for i in range(plain.get_vocab_size()) if "\ufffd" in plain.decode([i])][-1:]
    for ids in (plain.encode(TEXT).ids * 30, noise * 3000):
        tokenizer = CountingTokenizer(plain)
        assert (
            "".join(streamed(tokenizer, plain.encode("the cat").ids, ids))[:3000]
            == plain.decode([*plain.encode("the cat").ids, *ids])[7:3007]
        )
        assert tokenizer.decoded < 40 * len(ids) + 200


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_token_from_the_midst_of_a_text_shows_its_space(kind):
    tokenizer = made(kind)
    ids = tokenizer.encode("the cat sat on the cat").ids
    assert (
        TextInside(tokenizer).decode(ids[-1:])
        == tokenizer.decode(ids)[len(tokenizer.decode(ids[:-1])) :]
    )
    assert TextInside(tokenizer).decode(ids).strip() == "the cat sat on the cat"


# --- stores ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def data_of(folder: Path, tokenizer: Tokenizer, end_of_document: str) -> DataConfig:
    """A config of one file of short documents, two fifths of them held out."""
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = [f"{TEXT[i % 90 : i % 90 + 60]} {i}" for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(
        (SourceConfig("json", data_files=str(folder / "data.jsonl")),),
        TokenizerConfig(path=str(folder / "tokenizer.json"), end_of_document=end_of_document),
        0.4,
        str(folder / "cache"),
    )


def store_of(folder: Path, tokenizer: Tokenizer, end_of_document: str) -> TokenStore:
    return TokenStore(
        prepare(data_of(folder, tokenizer, end_of_document), report=lambda line: None)
    )


def evaluated(store: TokenStore) -> dict:
    """By a model that knows nothing of 2 ** 16 tokens: 16 bits for each target."""

    def forward(batch: TokenBatch, request: ForwardRequest) -> SimpleNamespace:
        return SimpleNamespace(
            loss_sum=float((batch.targets != IGNORE_INDEX).sum()) * 16 * np.log(2),
            stats=torch.zeros(1),
        )

    rows = ValidationRows(store, 16)
    return evaluate(
        one_by_one(forward),
        validation_batches(rows, 3, store.end_of_document, 0, 1, None),
        torch.device("cpu"),
        [],
    )


@pytest.mark.parametrize(
    ("kind", "end", "has_file"),
    [
        ("byte level", "<|endoftext|>", False),
        ("Llama 2", "</s>", True),
        ("Unigram, normalized", "</s>", True),
        ("WordPiece", "[SEP]", True),
    ],
)
def test_bits_per_byte_are_of_the_bytes_that_the_targets_stand_for(tmp_path, kind, end, has_file):
    store = store_of(tmp_path, KINDS[kind](), end)
    assert (store.path / "validation_bytes.bin").exists() == has_file
    rows = ValidationRows(store, 16)
    assert rows.bytes_problem is None
    tokens = np.concatenate([rows.tokens(0)[:1], *(rows.tokens(i)[1:] for i in range(len(rows)))])
    counts = np.concatenate(
        [rows.num_bytes(0)[:1], *(rows.num_bytes(i)[1:] for i in range(len(rows)))]
    )
    assert counts.sum() == store.manifest["validation"]["bytes"]
    # nobody predicts the first token of a document
    is_first = np.append(True, tokens[:-1] == store.end_of_document)
    result = evaluated(store)
    assert result["bits_per_byte"] == pytest.approx(
        16 * (~is_first).sum() / counts[~is_first].sum(), rel=1e-12
    )


def test_a_store_that_does_not_know_its_bytes_leaves_the_metric_out_with_the_reason(tmp_path):
    """As earlier versions made it: a table of single tokens, and for this tokenizer a wrong one."""
    store = store_of(tmp_path, llama_2(), "</s>")
    (store.path / "validation_bytes.bin").unlink()
    manifest = {k: v for k, v in store.manifest.items() if k not in ("files", "checksum")}
    (store.path / "manifest.json").write_text(json.dumps(seal(manifest, store.path)))
    old = TokenStore(store.path)
    assert "bits_per_byte is left out" in ValidationRows(old, 16).bytes_problem
    assert str(store.path) in ValidationRows(old, 16).bytes_problem
    assert "bits_per_byte" not in evaluated(old) and evaluated(old)["val_loss"] == pytest.approx(
        16 * np.log(2)
    )


def test_a_damaged_file_of_bytes_is_named(tmp_path):
    store = store_of(tmp_path, llama_2(), "</s>")
    (store.path / "validation_bytes.bin").write_bytes(b"1234")
    with pytest.raises(
        ValueError, match=r"validation_bytes\.bin has 4 bytes instead of \d+; delete the folder"
    ):
        evaluated(store)
