"""Write down what a teacher says of the rows of a run, for objective=distil objective.cache=CACHE.

python -m launch.teach objective=distil objective.run=TEACHER to=CACHE [num_ids=32] [the overrides
of launch.train]

The teacher is a run, or a folder as the Hub has it (objective.path=DIR). The other settings are
those of the run that will learn: they say which rows there are, and in which order. The same
command after a kill goes on where it stood.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.teach")

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.command.progress import followed, working
from launch.config.build import ConfigError, record
from launch.config.overrides import plain
from launch.saved.resume import with_saved_config
from launch.saved.teacher import teacher_of

if TYPE_CHECKING:
    from train.config.commands.prepare import TeachCommandConfig
    from train.config.run import RunConfig

OWN = ("to", "num_ids")
"""Settings of this command beside those of a run."""


def main(config: DictConfig) -> None:
    """Write the cache; refuses before anything is written."""
    from launch.config.parse import check_sources, check_tokenizer, parse
    from train.config.commands.prepare import TeachCommandConfig

    if config.to is None:
        raise ValueError("give to=CACHE, the folder to write")
    asked: TeachCommandConfig = record(OmegaConf.masked_copy(config, OWN), TeachCommandConfig)
    with open_dict(config):
        for name in OWN:
            config.pop(name, None)
        # One process: what spreads the run that will learn says nothing about its rows.
        config.launch = {"kind": "inline"}
        config.parallel, config.dispatcher = {}, {"name": "local"}
    run = parse(plain(with_saved_config(config)), 1)
    problems = _problems(run, asked)
    teacher = teacher_of(run)
    if teacher is None:
        problems.append(
            "there is no teacher; give objective=distil and objective.run=RUN or objective.path=DIR"
        )
    if problems:
        raise ConfigError(problems)
    assert teacher is not None
    check_tokenizer(run)
    check_sources(run)
    _write(run, teacher, asked)


def _problems(run: RunConfig, asked: TeachCommandConfig) -> list[str]:
    found = []
    if run.data.streaming:
        found.append(
            "data.streaming is true, and rows of a stream are not kept: prepare them, "
            "data.streaming=false"
        )
    if Path(asked.to).expanduser().exists():
        found.append(f"{asked.to} exists; give a folder that does not, or remove it")
    if asked.num_ids > run.model.vocab_size:
        found.append(
            f"num_ids {asked.num_ids} is more than the {run.model.vocab_size} tokens that there are"
        )
    return found


def _write(run: RunConfig, teacher: RunConfig, asked: TeachCommandConfig) -> None:
    # Only now what imports torch: a mistake in the settings is told at once.
    import tempfile

    import torch

    from launch.command.progress import reading_bar
    from model.parallel.groups import ParallelGroups
    from train.config.objective import DistilConfig
    from train.data.loader import TrainingLoader
    from train.data.open import training_samples
    from train.data.prepare import prepare
    from train.data.store import TokenStore
    from train.objectives.cache import bytes_per_token, facts_of, write_cache
    from train.objectives.online import files_of, load_teacher
    from train.objectives.teachers import require_same_tokens

    settings = run.objective
    assert isinstance(settings, DistilConfig)
    with reading_bar() as (report, progress):
        store = TokenStore(prepare(run.data, report, progress=progress))
    require_same_tokens(settings, teacher, store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.path or f"{settings.run}/checkpoints/{settings.checkpoint}"
    with working(f"loading {name}"):
        model = load_teacher(settings, teacher, run, ParallelGroups.single(), device)

    facts = facts_of(run, store, asked.num_ids, settings.temperature)
    each = bytes_per_token(facts.num_ids, facts.vocab_size)
    size = each * facts.num_rows * facts.seq_len
    print(
        f"{facts.num_rows:,} rows of {facts.seq_len} tokens, {each:,} bytes a token, "
        f"{size / 1e9:.3g} GB",
        flush=True,
    )
    to = Path(asked.to).expanduser()
    told = {
        "from": name,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "files": files_of(settings),
        "precision": run.train.precision,
    }
    with tempfile.TemporaryDirectory(prefix="loadstone-teach-") as scratch:
        samples = training_samples(run, store, Path(scratch))
        batch = run.train.micro_batch_size
        loader = TrainingLoader(samples, run.train.seq_len, batch, store.end_of_document, 0, 1)
        done = write_cache(to, model, loader, facts, told, device)
        for _ in followed(done, f"asking {name}", -(-facts.num_rows // batch)):
            pass
    print(f"-> {to}; learn from it with objective=distil objective.cache={to}")
    print_result(
        {"cache": str(to), "bytes": size, "rows": facts.num_rows, "num_ids": asked.num_ids}
    )


if __name__ == "__main__":
    run_main("teach", main)
