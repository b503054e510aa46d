"""The teacher of a run, whoever it is."""

from __future__ import annotations

from pathlib import Path

import torch

from model.parallel.groups import ParallelGroups
from train.config.objective import DistilConfig, SelfDistilConfig
from train.config.run import RunConfig
from train.data.store import TokenStore
from train.data.tokenizer import load_tokenizer
from train.objectives.cache import CachedTeacher
from train.objectives.objective import Distillation, Objective, SelfDistillation
from train.objectives.online import load_teacher
from train.rank.runtime import from_rank_zero


def require_same_tokens(settings: DistilConfig, teacher: RunConfig, store: TokenStore) -> None:
    """
    Raises:
        ValueError: a number stands for another token where the teacher learned.
    """
    if settings.run is not None:
        theirs = TokenStore(Path(settings.run) / "data").tokenizer()
    else:
        theirs = load_tokenizer(teacher.data.tokenizer)
    own, other = store.tokenizer().get_vocab(), theirs.get_vocab()
    if own != other:
        differing = sum(other.get(token) != number for token, number in own.items())
        raise ValueError(
            f"the teacher {settings.run or settings.path} has other tokens than this run: "
            f"{differing} of {len(own)} mean something else; give data.tokenizer.path the "
            "tokenizer of the teacher"
        )


def objective_of(
    config: RunConfig,
    teacher: RunConfig | None,
    store: TokenStore,
    groups: ParallelGroups,
    device: torch.device,
) -> Objective:
    """What a run learns from. Collective.

    teacher: the config of an online teacher; None: there is none.

    Raises:
        CheckpointError, PretrainedError: a teacher's weights, or a cache, cannot be read.
        ValueError: a cache was written for another run.
    """
    settings = config.objective
    if isinstance(settings, SelfDistilConfig):
        return SelfDistillation(settings)
    if not isinstance(settings, DistilConfig):
        return Objective()
    if not settings.needs_teacher:
        # Looked at on one rank first, so that all end with what it says.
        from_rank_zero(lambda: CachedTeacher(settings, config, store) and None)
        return Distillation(settings, CachedTeacher(settings, config, store))
    assert teacher is not None
    from_rank_zero(lambda: require_same_tokens(settings, teacher, store))
    return Distillation(settings, load_teacher(settings, teacher, config, groups, device))
