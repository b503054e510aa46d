"""Tokenise the data of a config ahead of training: python -m launch.prepare [data=... data.sources.0...=...]."""

from __future__ import annotations

from omegaconf import DictConfig

from launch.common import check_working_directory, plain, print_result, run_main

check_working_directory(__package__, "prepare")


def main(config: DictConfig) -> None:
    """Make the token store unless it exists, and print its counts."""
    from launch.validate import ConfigError, build_record
    from train.config import DataConfig
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    problems: list[str] = []
    data = build_record(plain(config)["data"], DataConfig, "data.", problems)
    problems = problems or data.problems()
    if problems:
        raise ConfigError(problems)
    store = TokenStore(prepare(data))
    for source in store.manifest["sources"]:
        print(f"{source['path']:30s} {source['documents']:>10,} documents {source['tokens']:>14,} tokens "
              f"{source['bytes']:>14,} bytes")
    held_out = store.manifest["validation"]
    print(f"{'held out':30s} {held_out['documents']:>10,} documents {held_out['tokens']:>14,} tokens "
          f"{held_out['bytes']:>14,} bytes")
    print_result({"store": str(store.path), **store.manifest})


if __name__ == "__main__":
    run_main("prepare", main)
