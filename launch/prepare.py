"""Tokenise the data of a config ahead of training.

python -m launch.prepare [data=... data.sources.0...=...] [prepare.workers=N]
python -m launch.prepare [data=... data.sources.0...=...] inspect=true
python -m launch.prepare init.path=MODEL data=chat [...]

Ended at any moment, it goes on where it was when it is started again.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.prepare")

import dataclasses
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import ConfigError, record
from launch.saved.initial import with_their_tokenizer
from train.config.data import DataConfig, labels
from train.config.run import RunConfig
from train.config.training import InitConfig
from train.files.strict_json import dumps


def main(config: DictConfig) -> None:
    """Make the token store unless it exists, and print its counts."""
    from train.config.commands.prepare import PrepareCommandConfig

    record(config.init, InitConfig, "init.")
    config = with_their_tokenizer(config)
    settings = record(config.data, DataConfig, "data.")
    of_the_data = ("data", "model", "seed", "init")
    own = [str(name) for name in config if name not in of_the_data]
    of_training = {field.name for field in dataclasses.fields(RunConfig)}
    if other := sorted(of_training & set(own)):
        raise ConfigError(
            [
                f"{name} is read by launch.train alone; leave it out: launch.prepare reads data, "
                "model.vocab_size, init.path, init.run, seed, inspect and prepare.workers"
                for name in other
            ]
        )
    how = record(OmegaConf.masked_copy(config, own), PrepareCommandConfig)
    if how.inspect:
        _inspect(settings)
        return

    # Only now what imports torch: a mistake in the settings is told at once.
    from launch.command.progress import reading_bar
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    with reading_bar() as (report, progress):
        path = prepare(settings, report, how.prepare.workers, progress)
    store = TokenStore(path)
    names = [*labels(settings.sources), "held out"]
    found = [*store.manifest["sources"], store.manifest["validation"]]
    for name, counts in zip(names, found, strict=True):
        size = f"{counts['bytes']:>14,} bytes" if "bytes" in counts else ""
        print(
            f"{name:30s} {counts['documents']:>10,} documents {counts['tokens']:>14,} "
            f"tokens {size}".rstrip()
        )
    print_result({"store": str(store.path), **store.manifest})


def _inspect(settings: DataConfig) -> None:
    """Print a page for every source; make nothing."""
    from train.data.prepare import store_path
    from train.data.shards.inspect import inspect
    from train.data.tokenizer import tokenizer_file

    # The one that is given, or that an earlier preparation trained.
    trained = store_path(settings) / "tokenizer.json"
    tokenizer = trained if trained.is_file() else None
    if settings.tokenizer.path is not None:
        tokenizer = tokenizer_file(settings.tokenizer)

    pages = inspect(settings, tokenizer)
    for page in pages:
        share = page.duplicates / max(page.documents, 1)
        size = f"{page.bytes:,} bytes" if page.tokens is None else f"{page.tokens:,} tokens"
        print(f"{page.label}: {page.documents:,} documents, {size}")
        print(f"  duplicates   {page.duplicates:,} ({share:.2%})")
        print(f"  {page.unit:12s} " + _listed(page.lengths, "{:,}"))
        if page.scripts:
            print("  scripts      " + _listed(page.scripts, "{:.1%}"))
        if page.bad_rows:
            print("  left out     " + _listed(page.bad_rows, "{:,}"))
        if page.bytes_per_token is not None:
            print(
                f"  tokenizer    {page.bytes_per_token:.2f} bytes per token"
                + ("" if page.unknown_share is None else f", {page.unknown_share:.2%} unknown")
            )
        for rate, place, begin in page.worst:
            print(
                f"  few bytes    {rate:.2f} per token: {place} {dumps(begin, ensure_ascii=False)}"
            )
    if tokenizer is None and settings.has_tokenizer:
        print("no tokenizer yet: prepare first, or give data.tokenizer.path")
    print_result({"sources": [dataclasses.asdict(page) for page in pages]})


def _listed(numbers: Mapping[str, float], form: str) -> str:
    return "  ".join(f"{name} {form.format(number)}" for name, number in numbers.items())


if __name__ == "__main__":
    run_main("prepare", main)
