"""launch.generate: what it shows is what the whole sequence decodes to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import launch.generate
import model.generate
import train.checkpoint
import train.components
import train.data.store


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = ["<unk>", "</s>", "▁that", "▁is", "▁not", "▁to", "▁be", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("continuation", ["not to be", "not 龍 be", ""])
def test_the_text_shown_is_the_decoded_sequence(monkeypatch, tokenizer, continuation):
    ids = tokenizer.encode(continuation).ids
    fake = SimpleNamespace(to=lambda device: fake, set_step=lambda step: None)
    monkeypatch.setattr(launch.generate, "load_run", lambda run, attention=None, checkpoint=None: None)
    store = SimpleNamespace(tokenizer=lambda: tokenizer, end_of_document=1)
    monkeypatch.setattr(train.data.store, "TokenStore", lambda path: store)
    monkeypatch.setattr(train.components, "build_model", lambda config: fake)
    monkeypatch.setattr(train.checkpoint, "find_checkpoint", lambda *a, **k: None)
    monkeypatch.setattr(train.checkpoint, "read_state", lambda folder: {"step": 0})
    monkeypatch.setattr(train.checkpoint, "load_weights", lambda *a, **k: None)
    monkeypatch.setattr(model.generate, "generate", lambda *a, **k: iter(ids))
    pieces = list(launch.generate.sample("nowhere", "that is", 10, 0.0, 1.0, 0))
    assert pieces[0] == "that is"
    assert "".join(pieces) == tokenizer.decode([*tokenizer.encode("that is").ids, *ids])
