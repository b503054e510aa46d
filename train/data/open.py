"""The token store of a run, opened by all its ranks."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from train.config.run import RunConfig
from train.data.chat.samples import ChatValidationRows, samples_of
from train.data.chat.template import template_problems
from train.data.prepare import prepare
from train.data.store import CHAT_TEMPLATE, TokenStore, TrainingSamples, ValidationRows
from train.data.streaming.samples import StreamingSamples
from train.data.tokenizer import tokenizer_problems
from train.files.durable import replacing
from train.rank.runtime import from_rank_zero
from train.rank.stop import StopSignal

log = logging.getLogger("loadstone")


def open_store(config: RunConfig, run_dir: Path, stop: StopSignal) -> TokenStore:
    """The run's token store; rank 0 makes it if the launcher has not. Collective.

    RUN/data gets the tokenizer and the manifest, so that the run can be sampled from without the
    store.

    Raises:
        ValueError: the sources cannot be read, the model's vocabulary does not cover the
            tokenizer's ids, or a resumed run would go on with other data than it began with.
        Stopped: rank 0 was asked to stop meanwhile.
    """

    # A bad tokenizer is refused before hours of preparing, and preparing loses nothing when
    # stopped.
    def prepare_and_record() -> Path:
        problems = tokenizer_problems(config.data.tokenizer, config.model.vocab_size)
        if problems := problems + template_problems(config.data):
            raise ValueError("; ".join(problems))
        with stop.obeyed_at_once():
            path = prepare(config.data, log.info)
        _record_data(path, run_dir / "data")
        return path

    store = TokenStore(from_rank_zero(prepare_and_record))
    if store.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer's largest token id is {store.vocab_size - 1} but model.vocab_size is "
            f"{config.model.vocab_size}; raise it or use a smaller tokenizer"
        )
    return store


def training_samples(config: RunConfig, store: TokenStore, run_data: Path) -> TrainingSamples:
    """The training rows of a run, in the order that its seed gives; of a stream those of its head.

    Args:
        run_data: RUN/data, which all ranks share.

    Raises:
        ValueError: the store is damaged, or its documents do not fit train.seq_len.
    """
    data = config.data.head
    samples = samples_of(store, data, config.train.seq_len, config.seed, run_data)
    samples.mix(data)
    return samples


def stream_of(config: RunConfig, store: TokenStore, run_data: Path) -> TrainingSamples | None:
    """The training rows of a run whose text is tokenised meanwhile; None: they are in the store.

    Collective. Rank 0 starts a process, which is a fork.
    """
    if not config.data.streaming:
        return None
    samples = StreamingSamples(store, config.data, config.train.seq_len, config.seed, run_data)
    samples.mix(config.data)
    return samples


def trained_on(store: Path, own: TokenStore) -> TokenStore:
    """The store that a run was trained on: a loss on text that was trained on would be no held-out
    loss.

    Args:
        own: what RUN/data keeps of it.

    Raises:
        ValueError: it holds other tokens.
    """
    found = TokenStore(store)
    if found.manifest["content"] != own.manifest["content"]:
        raise ValueError(
            f"{store} holds other tokens than the run was trained on, so what was held out is not "
            "known: its data files have changed; put them back"
        )
    return found


def held_out_rows(config: RunConfig, store: TokenStore) -> ValidationRows:
    """The held-out rows of a run.

    Raises:
        ValueError: as training_samples.
    """
    if store.holds_conversations:
        return ChatValidationRows(store, config.train.seq_len, config.data.too_long)
    return ValidationRows(store, config.train.seq_len)


def _record_data(store: Path, folder: Path) -> None:
    known = (folder / "manifest.json").is_file()
    if known and TokenStore(folder).manifest["content"] != TokenStore(store).manifest["content"]:
        raise ValueError(
            f"the run began with other tokens than {store} now holds: its data files have changed; "
            "put them back, or start a new run"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest last: with it the folder is one.
    names = ["tokenizer.json", "token_bytes.npy", CHAT_TEMPLATE, "manifest.json"]
    for name in filter(lambda name: (store / name).is_file(), names):
        with replacing(folder / name) as scratch:
            shutil.copyfile(store / name, scratch)
