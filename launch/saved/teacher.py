"""The model that teaches another while that one learns: objective.run, objective.path. Imports no
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from launch.config.build import ConfigError
from launch.saved.run import load_folder, load_run, require_tokenizer
from train.checkpoint.folder import find_checkpoint
from train.config.objective import DistilConfig
from train.config.training import problems_of_checkpoint
from train.files.manifest import read_json, require_owned

if TYPE_CHECKING:
    from train.config.run import RunConfig


def with_named_checkpoint(config: DictConfig) -> DictConfig:
    """The composed config with the name of the teacher's checkpoint instead of best or latest, in
    place: what these stand for changes while the teacher trains, and a resumed run goes on with the
    teacher that it had.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    run, prefer = (OmegaConf.select(config, f"objective.{key}") for key in ("run", "checkpoint"))
    if run is not None and not problems_of_checkpoint("", str(prefer)):
        if not (Path(run) / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"objective.run: {run}/checkpoints does not exist; give a run directory of "
                "launch.train, or objective.path for a folder of published weights"
            )
        config.objective.checkpoint = find_checkpoint(Path(run), prefer=prefer).name
    return config


def teacher_of(run: RunConfig) -> RunConfig | None:
    """The config of an online teacher, for use in one process; None: the run has none.

    Raises:
        ConfigError: it does not fit the run.
        FileNotFoundError, PretrainedError: it cannot be read.
    """
    settings = run.objective
    if not isinstance(settings, DistilConfig) or not settings.needs_teacher:
        return None
    teacher = read_teacher(settings)
    if problems := teacher_problems(teacher, run):
        raise ConfigError(problems)
    return teacher


def read_teacher(settings: DistilConfig) -> RunConfig:
    """The config of an online teacher, for use in one process.

    Raises:
        FileNotFoundError, PretrainedError, CheckpointError: it cannot be read.
    """
    teacher: RunConfig
    if settings.run is not None:
        checkpoint = find_checkpoint(Path(settings.run), prefer=settings.checkpoint)
        teacher = load_run(settings.run, None, checkpoint)
    else:
        teacher = load_folder(str(settings.path))
        require_tokenizer(teacher, str(settings.path))
    return teacher


def teacher_problems(teacher: RunConfig, run: RunConfig) -> list[str]:
    """Why a model cannot teach the run's."""
    name, found = f"the teacher {_named(run.objective)}", []
    if teacher.model.vocab_size != run.model.vocab_size:
        found.append(
            f"{name} has a vocabulary of {teacher.model.vocab_size}, and model.vocab_size is "
            f"{run.model.vocab_size}; a teacher and its student need the same tokens"
        )
    if teacher.model.max_seq_len < run.train.seq_len:
        found.append(
            f"{name} knows rows of {teacher.model.max_seq_len} tokens, and train.seq_len is "
            f"{run.train.seq_len}; lower it"
        )
    size = run.parallel.expert_parallel_size
    if teacher.model.num_experts and teacher.model.num_experts % size:
        found.append(
            f"{name} has {teacher.model.num_experts} experts, which "
            f"parallel.expert_parallel_size {size} does not divide"
        )
    parallel = run.parallel
    found += [
        f"{name}: {problem}"
        for problem in teacher.attention.sharing_problems(
            teacher.model, parallel.context_parallel_size, parallel.context_gather_size
        )
    ]
    return found


def check_teacher(run: RunConfig) -> list[str]:
    """Look at the teacher before any rank is started: lines to print.

    Raises:
        ConfigError: it does not fit the run, or its tokens are others.
        FileNotFoundError, PretrainedError, CheckpointError: it cannot be read.
    """
    settings = run.objective
    if not isinstance(settings, DistilConfig):
        return []
    if settings.cache is not None:
        folder = Path(settings.cache).expanduser()
        require_owned(folder)
        told = read_json(folder / "manifest.json").get("teacher")
        name = told.get("from") if isinstance(told, dict) else None
        return [f"taught by {settings.cache}" + (f", what {name} said" if name else "")]
    assert teacher_of(run) is not None
    return [f"taught by {_named(settings)}"]


def _named(settings: Any) -> str:
    if settings.run is None:
        return str(settings.path)
    return f"{settings.run}/checkpoints/{settings.checkpoint}"
