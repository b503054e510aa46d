"""How long a run is, as people say it: in tokens, in passes over the data, with a warm-up that is a
share of it. All of it becomes numbers of steps before a config is saved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.config.build import ConfigError

LENGTHS = ("num_steps", "num_tokens", "num_epochs")
"""Settings of train that say how long it is; the first holds where no other is set."""
SCALES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
NUMBER = re.compile(r"([\d_]+(?:\.\d+)?(?:e\d+)?)([kmbgt]?)", re.IGNORECASE)


def count(value: Any) -> Any:
    """10B, 1.5e9 and 300M as whole numbers; anything else as it is, for its record to refuse."""
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, str) and (found := NUMBER.fullmatch(value.strip())):
        return round(float(found[1].replace("_", "")) * SCALES.get(found[2].lower(), 1))
    return value


def with_length(
    config: DictConfig, overrides: Iterable[str], rows_of_epochs: int | None = None
) -> DictConfig:
    """The config with train.num_steps and optim.warmup_steps worked out, in place.

    Args:
        overrides: of the command line, which beat what an experiment or a saved config says.
        rows_of_epochs: what train.num_epochs passes over the prepared data are; None: it is not
            known yet, and train.num_steps stays what it is where it depends on that.

    Raises:
        ConfigError: the command line says it twice.
    """
    typed = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    train, optim = config.get("train"), config.get("optim")
    if not isinstance(train, DictConfig) or not isinstance(optim, DictConfig):
        return config  # its record refuses it

    _set_rampup(train, typed)
    _keep_one(train, "train", LENGTHS, typed)
    _keep_one(optim, "optim", ("warmup_steps", "warmup_fraction"), typed)
    if train.get("num_tokens") is not None:
        train.num_tokens = count(train.num_tokens)
        _set_steps(train, train.num_tokens, _whole(train.get("seq_len")))
    elif train.get("num_epochs") is not None and rows_of_epochs is not None:
        _set_steps(train, rows_of_epochs, 1)

    fraction, steps = optim.get("warmup_fraction"), train.get("num_steps")
    if _is_number(fraction) and _is_number(steps) and 0 <= fraction < 1:
        optim.warmup_steps = round(fraction * steps)
    return config


def _set_rampup(train: DictConfig, typed: set[str]) -> None:
    """The samples of train.batch_size_rampup for the tokens it takes, where these are given. A
    resumed run has both; then what is typed holds.
    """
    tokens, rampup = train.get("batch_size_rampup_tokens"), train.get("batch_size_rampup")
    if tokens is None or not OmegaConf.is_list(rampup):
        return
    train.batch_size_rampup_tokens = count(tokens)
    if "train.batch_size_rampup" in typed and len(rampup) == 3:
        if "train.batch_size_rampup_tokens" in typed:
            raise ConfigError(
                [
                    f"train.batch_size_rampup={list(rampup)} says over how many samples the batch "
                    f"grows, and train.batch_size_rampup_tokens={tokens} over how many tokens; "
                    "give [start,increment] with the tokens, or drop them"
                ]
            )
        train.batch_size_rampup_tokens = None
        return
    row, amount = _whole(train.get("seq_len")), train.batch_size_rampup_tokens
    if row and _is_number(amount) and amount > 0:
        train.batch_size_rampup = [*rampup[:2], math.ceil(amount / row)]


def _keep_one(node: DictConfig, path: str, names: tuple[str, ...], typed: set[str]) -> None:
    """Of settings that say the same, the one that was typed."""
    given = [name for name in names if f"{path}.{name}" in typed and node.get(name) is not None]
    if len(given) > 1:
        both = " and ".join(f"{path}.{name}={node.get(name)}" for name in given)
        raise ConfigError([f"{both} say the same thing twice; drop one"])
    for name in names[1:]:
        if given and name != given[0]:
            node[name] = None


def _set_steps(train: DictConfig, amount: Any, row: float | None) -> None:
    """num_steps for an amount of what rows of `row` make; the records refuse what is no number."""
    batch, rampup = _whole(train.get("global_batch_size")), train.get("batch_size_rampup")
    if not _is_number(amount) or amount <= 0 or not row or not batch:
        return
    ramp = OmegaConf.to_container(rampup) if OmegaConf.is_list(rampup) else None
    train.num_steps = steps_for(math.ceil(amount / row), batch, ramp)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def steps_for(rows: int, batch: int, rampup: Any = None) -> int:
    """Steps that consume so many sequences at least.

    Args:
        rampup: train.batch_size_rampup, [start, increment, samples]: the batch grows by the
            increment, in steps of equally many samples (as megatron-core's calculator has it).
    """
    consumed = steps = 0
    if isinstance(rampup, list) and len(rampup) == 3 and all(map(_whole, rampup)):
        start, increment, samples = rampup
        stages = (batch - start) / increment
        while stages > 0 and consumed <= samples and consumed < rows:
            consumed += start + int(consumed / (samples / stages)) * increment
            steps += 1
    return max(1, steps + math.ceil(max(0, rows - consumed) / batch))
