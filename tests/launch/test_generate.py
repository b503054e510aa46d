"""launch.generate: what it shows is what the whole sequence decodes to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import infer.engine
import launch.generate
import launch.saved.opened
import train.checkpoint.folder
import train.checkpoint.writer
import train.components
import train.data.store
import train.trained.averages
from infer.request import Drawn, Event
from infer.sequence import Sequence


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = [
        "<unk>",
        "</s>",
        "▁that",
        "▁is",
        "▁not",
        "▁to",
        "▁be",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    tokenizer = Tokenizer(
        models.Unigram(
            [(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


class Scripted:
    """An engine that generates the given tokens for any request."""

    def __init__(self, ids: list[int]):
        self.ids, self.has_work = list(ids), True

    def __call__(self, model, settings, end_token) -> Scripted:
        return self

    def add(self, request) -> None:
        self.sequence = Sequence(request, 0.0)

    def step(self) -> list[Event]:
        if not self.ids:
            self.has_work = False
            return [self.sequence.finish("", "length")]
        piece, _ = self.sequence.take(Drawn(self.ids.pop(0), 0.0), 0.0, None, 10**6)
        return [Event("0", piece)]


@pytest.mark.parametrize("continuation", ["not to be", "not 龍 be", ""])
def test_the_text_shown_is_the_decoded_sequence(monkeypatch, tokenizer, continuation):
    ids = tokenizer.encode(continuation).ids
    fake = SimpleNamespace(
        to=lambda device: fake, set_step=lambda step: None, sparse_attentions=lambda: []
    )
    monkeypatch.setattr(launch.saved.opened, "load_run", lambda *a, **k: None)
    monkeypatch.setattr(launch.saved.opened, "require_text", lambda config, run: None)
    store = SimpleNamespace(tokenizer=lambda: tokenizer, end_of_document=1)
    monkeypatch.setattr(train.data.store, "TokenStore", lambda path: store)
    monkeypatch.setattr(train.components, "build_model", lambda config: fake)
    monkeypatch.setattr(train.checkpoint.folder, "find_last", lambda *a, **k: (Path("here"),))
    monkeypatch.setattr(train.trained.averages, "reader_of", lambda *a, **k: None)
    monkeypatch.setattr(train.checkpoint.writer, "read_state", lambda folder: {"step": 0})
    monkeypatch.setattr(train.checkpoint.writer, "load_weights", lambda *a, **k: None)
    monkeypatch.setattr(infer.engine, "Engine", Scripted(ids))
    pieces = list(launch.generate.sample("nowhere", "that is", 10, 0.0, 1.0, 0))
    assert pieces[0] == "that is"
    assert "".join(pieces) == tokenizer.decode([*tokenizer.encode("that is").ids, *ids])
