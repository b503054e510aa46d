"""Tokenise the data of a config ahead of training: python -m launch.prepare [data=... data.sources.0...=...]."""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.prepare")

from omegaconf import DictConfig

from launch.common import print_result, record, run_main


def main(config: DictConfig) -> None:
    """Make the token store unless it exists, and print its counts."""
    from train.config import DataConfig
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    store = TokenStore(prepare(record(config.data, DataConfig, "data.")))
    for source in store.manifest["sources"]:
        print(f"{source['path']:30s} {source['documents']:>10,} documents {source['tokens']:>14,} tokens "
              f"{source['bytes']:>14,} bytes")
    held_out = store.manifest["validation"]
    print(f"{'held out':30s} {held_out['documents']:>10,} documents {held_out['tokens']:>14,} tokens "
          f"{held_out['bytes']:>14,} bytes")
    print_result({"store": str(store.path), **store.manifest})


if __name__ == "__main__":
    run_main("prepare", main)
