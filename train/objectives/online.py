"""A teacher that is there while the model learns: another model, frozen, on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from model.parallel.groups import ParallelGroups
from model.request import Taught, TokenBatch
from model.transformer import Transformer
from train.checkpoint.folder import find_checkpoint
from train.checkpoint.reader import load_weights
from train.components import build_model, training_dtype
from train.config.objective import DistilConfig
from train.config.run import RunConfig
from train.data.loader import Batch
from train.files.manifest import MANIFEST, file_facts
from train.pretrained.folder import PretrainedFolder


class OnlineTeacher:
    """A frozen model in evaluation: its tokens' experts depend on nobody else's."""

    def __init__(self, model: Transformer, temperature: float):
        self.model, self.temperature = model.eval().requires_grad_(False), temperature
        self._weight = model.output_projection().detach()

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] of the teacher's -> [..., vocab_size]."""
        return F.linear(hidden, self._weight)

    @torch.no_grad()
    def taught(self, batch: Batch, inputs: TokenBatch) -> Taught:
        hidden = self.model.last_hidden(inputs)
        return Taught(self.temperature, hidden=hidden, weight=self._weight)


def load_teacher(
    settings: DistilConfig,
    own: RunConfig,
    config: RunConfig,
    groups: ParallelGroups,
    device: torch.device,
) -> OnlineTeacher:
    """The teacher on this rank's device, in the precision of the training, with this rank's share
    of its experts. Collective.

    own: the teacher's config; config: of the run that learns.

    Raises:
        CheckpointError, PretrainedError: its weights cannot be read.
    """
    spread = dataclasses.replace(
        own,
        dispatcher=config.dispatcher,
        parallel=dataclasses.replace(config.parallel, placement=None),
        experts=dataclasses.replace(config.experts, token_rounding=0),
    )
    model = build_model(spread, groups)
    if settings.run is not None:
        load_weights(model, find_checkpoint(Path(settings.run), prefer=settings.checkpoint))
    else:
        assert settings.path is not None
        PretrainedFolder(Path(settings.path).expanduser()).fill_model(model)
    dtype = training_dtype(config)
    return OnlineTeacher(model.to(device, dtype), settings.temperature)


def files_of(settings: DistilConfig) -> str:
    """What tells the weights of a teacher from others of the same name: the SHA-256 of what lists
    them, for a run the manifest of its checkpoint, for a folder its config and the sizes and times
    of its files.
    """
    if settings.run is not None:
        manifest = find_checkpoint(Path(settings.run), prefer=settings.checkpoint) / MANIFEST
        return str(file_facts(manifest)["sha256"])
    assert settings.path is not None
    folder = Path(settings.path).expanduser()
    listed = [str(file_facts(folder / "config.json")["sha256"])]
    for file in sorted(folder.glob("*.safetensors")):
        facts = file.stat()
        listed.append(f"{file.name} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()
