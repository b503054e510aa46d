"""What is run: every variant at every size with every seed, at equal training FLOPs. Imports no
torch.

The rule: of a size, every run spends the training FLOPs of the first variant at its own
train.num_steps (or `flops`), counted by model/cost (forward and backward, at the experts per token
that the variant's budget asks for). So a variant whose token costs less sees more tokens. Rows,
batch and held-out text are the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from launch.command.arguments import setting
from launch.command.refusals import explained
from launch.comparing.settings import OWN, CompareConfig
from launch.config.build import ConfigError
from launch.config.length import with_length
from launch.config.overrides import plain
from launch.config.parse import parse, world_size
from launch.process.identity import ROOT
from launch.saved.defaults import complete
from launch.saved.resume import flat
from model.cost.parameters import flops_per_token

REFUSED = {
    "variant": "give variants=[...]",
    "size": "give sizes=[...]",
    "run_dir": "it is the comparison's directory, in which every run has its own",
    "saved_config": "it is of the ranks of a run",
    "train.num_epochs": "steps follow from the FLOPs; give train.num_steps or train.num_tokens",
    "train.batch_size_rampup": "all steps of a comparison have one batch; leave it out",
    "train.stop_after_step": "every run goes to its end; leave it out",
    "init": "runs of a comparison begin from nothing; leave it out",
    "lora": "adapters are of a model that is there, and runs of a comparison begin from nothing",
    "launch.slurm": "runs are started here one after another; leave it out",
}
"""Settings of a run that a comparison has no use for -> why."""
SAME = ("data", "seq_len", "eval_max_sequences", "vocab_size", "global_batch_size")
"""What no variant may change, as losses or tokens would be others'."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    size: str | None
    """None: the model as it is."""
    variant: str
    seed: int
    overrides: tuple[str, ...]
    """Of launch.train, without its directory."""
    config: DictConfig
    """As it was composed, with every default."""
    run: Any
    """The RunConfig."""
    num_ranks: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return "-".join(filter(None, (self.size, self.variant, str(self.seed))))

    @property
    def flops_per_token(self) -> float:
        """Of training, forward and backward, at the budget that is asked for."""
        run = self.run
        return flops_per_token(
            run.model, run.experts_per_token, run.train.seq_len, run.attention.arguments
        )

    @property
    def tokens(self) -> int:
        train = self.run.train
        return int(train.num_steps * train.global_batch_size * train.seq_len)

    @property
    def flops(self) -> float:
        """Of its training."""
        return self.tokens * self.flops_per_token


def cells_of(settings: CompareConfig, common: Sequence[str]) -> list[Cell]:
    """All runs: seeds outside, so that whatever ends it early leaves whole comparisons.

    Args:
        common: overrides of launch.train that every run has; `seed` among them is the first one.

    Raises:
        ConfigError: with everything that is wrong with any of them.
    """
    problems = [*_unknown(settings), *_refused(common)]
    if not problems:
        problems = _typed_twice(settings, common)
    if problems:
        raise ConfigError(problems)

    base: dict[tuple[str | None, str], Cell] = {}
    problems = []
    for size in settings.sizes or (None,):
        budget = settings.flops
        for variant in settings.variants:
            try:
                cell = _composed(size, variant, common, None, None)
                if budget is None:
                    budget = cell.flops
                batch = cell.run.train.global_batch_size * cell.run.train.seq_len
                steps = max(1, round(budget / (batch * cell.flops_per_token)))
                base[size, variant] = _composed(size, variant, common, steps, None)
            except ConfigError as error:
                where = f"variant {variant}" + (f" at size {size}" if size else "")
                problems += [f"{where}: {problem}" for problem in error.problems]
    if not problems:
        problems = not_the_same(base)
    if problems:
        raise ConfigError(problems)

    first = next(iter(base.values())).run.seed
    return [
        _composed(size, variant, common, cell.run.train.num_steps, first + i)
        for i in range(settings.seeds)
        for (size, variant), cell in base.items()
    ]


def _composed(
    size: str | None, variant: str, common: Sequence[str], steps: int | None, seed: int | None
) -> Cell:
    """steps, seed: None: those of the common overrides.

    Raises:
        ConfigError: it cannot run.
    """
    own = [f"variant={variant}", *([f"size={size}"] if size else [])]
    kept = list(common)
    if steps is not None:
        kept = [o for o in kept if key_of(o) not in ("train.num_steps", "train.num_tokens")]
        own += [f"train.num_steps={steps}", "train.num_tokens=null"]
    if seed is not None:
        kept = [o for o in kept if key_of(o) != "seed"]
        own.append(f"seed={seed}")
    # No text is drawn at the end: nobody reads it.
    kept = [o for o in kept if key_of(o) != "train.sample_prompt"]
    overrides = [setting(o) for o in (*kept, *own, "train.sample_prompt=null")]
    try:
        config = complete(compose("train", overrides=overrides))
    except HydraException as error:
        raise ConfigError(explained(error)) from error
    config = with_length(config, [o for o in overrides if not o.endswith("=null")])
    number = world_size(config)
    run = parse(plain(config), number)
    return Cell(size, variant, run.seed, tuple(overrides), config, run, number)


def key_of(override: str) -> str:
    """The setting that an override is of."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def value_of(override: str) -> Any:
    """Its value, as Hydra reads it."""
    return OverridesParser.create().parse_override(override).value()


def of_the_runs(typed: Sequence[str]) -> list[str]:
    """Of what was typed, what is a setting of the runs."""
    own = (*OWN, "resume", "run_dir", "launch.dry_run")
    return [o for o in typed if key_of(o) not in own and key_of(o).partition(".")[0] not in OWN]


# --- what is wrong --------------------------------------------------------------------------------


def _unknown(settings: CompareConfig) -> list[str]:
    found = []
    for group, names in (("variant", settings.variants), ("size", settings.sizes)):
        known = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        found += [
            f"{group}s has {name}, and there is no conf/{group}/{name}.yaml; choices: "
            f"{', '.join(known)}"
            for name in names
            if name not in known
        ]
    return found


def _refused(common: Sequence[str]) -> list[str]:
    keys = {key_of(o) for o in common if value_of(o) is not None}
    on_a_queue = ["launch=slurm: runs are started here, one after another; choose another launch"]
    return (on_a_queue if "launch=slurm" in common else []) + [
        f"{key}: {why}"
        for key in sorted(keys)
        for refused, why in REFUSED.items()
        if key == refused or key.startswith(f"{refused}.")
    ]


def _typed_twice(settings: CompareConfig, common: Sequence[str]) -> list[str]:
    """Settings of the command line that a variant or a size has as well: the command line would
    beat it, and the variant would not be what it is called.
    """
    typed = {key_of(o) for o in common}
    found = []
    for group, names in (("variant", settings.variants), ("size", settings.sizes)):
        for name in names:
            both = sorted(typed & set(sets(group, name)))
            found += [
                f"{key} is typed for all runs and set by {group} {name}; drop it, or write a "
                f"{group} of your own beside conf/{group}/{name}.yaml"
                for key in both
            ]
    return found


def sets(group: str, name: str) -> list[str]:
    """What an option sets: groups that it overrides, and its values by their dotted keys."""
    text = (ROOT / "conf" / group / f"{name}.yaml").read_text()
    found = yaml.safe_load(text) or {}
    groups = [
        key.removeprefix("override ").strip().lstrip("/")
        for entry in found.pop("defaults", [])
        if isinstance(entry, dict)
        for key in entry
    ]
    return [*groups, *flat(found)]


def not_the_same(cells: dict[tuple[str | None, str], Cell]) -> list[str]:
    """What would make of the losses something else than a comparison."""
    first = next(iter(cells.values()))
    found = []
    for (size, variant), cell in cells.items():
        for name in SAME:
            values = [_named(one.run, name) for one in (first, cell)]
            if values[0] != values[1]:
                where = f"variant {variant}" + (f" at size {size}" if size else "")
                told = "" if name == "data" else f" ({values[1]} instead of {values[0]})"
                found.append(
                    f"{where} has another {name}{told}; all runs need one, or their losses and "
                    "tokens do not compare"
                )
    return found


def _named(run: Any, name: str) -> Any:
    if name == "data":
        return run.data
    return run.model.vocab_size if name == "vocab_size" else getattr(run.train, name)


def directory_of(folder: Path, cell: Cell) -> Path:
    """The run directory of a cell."""
    return folder / "runs" / cell.name
