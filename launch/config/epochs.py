"""How many rows so many passes over the data are, where they are prepared."""

from __future__ import annotations

from omegaconf import DictConfig

from launch.config.build import build_record
from launch.config.overrides import plain
from train.config.data import DataConfig


def rows_of_epochs(config: DictConfig) -> int | None:
    """Rows of train.num_epochs passes over all training text; None: it is not set, or the data are
    not prepared yet.
    """
    train = config.get("train")
    if not isinstance(train, DictConfig) or train.get("num_epochs") is None:
        return None
    problems: list[str] = []
    settings = plain(config)
    data = build_record(settings.get("data"), DataConfig, "data.", problems)
    seq_len, seed = settings["train"].get("seq_len"), settings.get("seed")
    if problems or data.problems() or type(seq_len) is not int or type(seed) is not int:
        return None  # said by whoever reads the whole config
    if data.streaming:
        return None  # refused: nobody knows how long a pass is
    from train.data.chat.samples import samples_of
    from train.data.prepare import store_path
    from train.data.store import TokenStore

    try:
        store = store_path(data)
    except (OSError, ValueError):
        return None
    if not (store / "manifest.json").is_file():
        return None
    samples = samples_of(TokenStore(store), data, seq_len, seed)
    epochs = settings["train"]["num_epochs"]
    if not isinstance(epochs, (int, float)) or not 0 < epochs < 1e6:
        return None
    return sum(int(samples.samples_in(i, epochs)) for i in range(len(data.sources)))
