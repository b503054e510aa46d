"""From the composed config to the checked record of a run."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from launch.config.build import ConfigError, build_record
from launch.config.contradictions import contradictions
from launch.process.secrets import problems_of_settings
from train.config.run import RunConfig

AUTO = "auto"


def world_size(config: DictConfig) -> int:
    """Ranks the launch settings start."""
    launch = config.launch
    return 1 if launch.kind == "inline" else int(launch.num_devices) * int(launch.num_nodes)


def searches_layout(config: dict[str, Any]) -> bool:
    """Whether sizes of groups are left to a search (conf/parallel/auto.yaml)."""
    parallel = config.get("parallel")
    return isinstance(parallel, dict) and AUTO in parallel.values()


def parse(config: dict[str, Any], world_size: int, trains: bool = True) -> RunConfig:
    """Build the records and check them.

    Args:
        config: plain data (OmegaConf.to_container, resolved); world_size: ranks the run will have;
            trains: whether it will learn; else what speaks against learning alone is no problem.

    Raises:
        ConfigError: with every unknown key, wrong type and contradiction found.
    """
    if searches_layout(config):
        raise ConfigError(
            [
                "parallel=auto leaves sizes to a search: python -m launch.plan parallel=auto "
                "world=N device=H100 prints commands that have them"
            ]
        )
    if isinstance(config.get("train"), dict) and config["train"].get("micro_batch_size") == AUTO:
        raise ConfigError(
            [
                "train.micro_batch_size=auto is chosen by the command that starts the ranks "
                "(launch=inline, deepspeed or torchrun); here give a number"
            ]
        )
    problems = problems_of_settings(config)
    run: RunConfig = build_record(config, RunConfig, "", problems)
    if problems:
        raise ConfigError(problems)
    problems = contradictions(run, world_size, trains)
    if problems:
        raise ConfigError(problems)
    return run


def check_tokenizer(run: RunConfig) -> None:
    """The given tokenizer and chat template can be read and the model covers the tokenizer's ids:
    said before any text is tokenised.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    if run.data.tokenizer.path is not None:  # else one is trained, and fits
        from train.data.tokenizer import tokenizer_problems

        problems += tokenizer_problems(run.data.tokenizer, run.model.vocab_size)
    if run.data.format == "chat" and not problems:
        from train.data.chat.template import template_problems

        problems += template_problems(run.data)
    if problems:
        raise ConfigError(problems)


def check_sources(run: RunConfig) -> None:
    """The local files of every source are there: said before a run directory is made.

    Raises:
        ConfigError: with every source that has none.
    """
    from train.data.sources import checked_files

    problems = []
    for source in (*run.data.sources, *run.data.validation.sources):
        try:
            checked_files(source)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
