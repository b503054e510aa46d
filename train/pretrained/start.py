"""What a new run begins with: the weights of a published folder, or of another run, with the
moments of its optimiser if asked for.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Protocol

import torch

from model.moe.restart import RoutingFacts, adopt_state, state_of
from model.transformer import Transformer
from train.checkpoint.folder import find_checkpoint, read_state, updates_before, updates_of
from train.checkpoint.reader import (
    MergedReader,
    fill_masters,
    fill_moments,
    load_parameters,
    load_router_buffers,
    load_tables,
)
from train.config.run import RunConfig
from train.engine.deepspeed import Engine
from train.files.durable import replacing
from train.pretrained.described import KEPT, PRETRAINED
from train.pretrained.folder import PretrainedFolder
from train.pretrained.upcycle import UpcycledWeights
from train.rank.runtime import from_rank_zero

log = logging.getLogger("loadstone")


class Weights(Protocol):
    """Weights that a run begins with."""

    def fill_model(self, model: Transformer) -> None:
        """Set the parameters of a plain model with this rank's experts."""

    def fill_masters(self, engine: Engine) -> None:
        """Set the master weights of what a bf16 model has rounded. Collective."""


def starting_weights(config: RunConfig, run_dir: Path) -> Weights | None:
    """The weights that a new run begins with; None: they are drawn. The small files that came with
    them are copied to RUN/pretrained. Collective.

    Raises:
        PretrainedError: the folder's files are not those of its config.json, or not all there.
        CheckpointError: the run has no checkpoint that can be used.
    """
    init = config.init
    if init.path is not None:
        folder = Path(init.path).expanduser()
        from_rank_zero(lambda: _keep(folder, run_dir))
        published = PretrainedFolder(folder)
        return UpcycledWeights(published, config) if init.upcycle.num_experts else published
    if init.run is not None:
        run = Path(init.run)
        from_rank_zero(lambda: _keep(run / PRETRAINED, run_dir))
        checkpoint = from_rank_zero(lambda: find_checkpoint(run, prefer=init.checkpoint))
        if init.upcycle.num_experts:
            return UpcycledWeights(DenseCheckpoint(checkpoint), config)
        return RunWeights(checkpoint, config)
    return None


def fill_optimizer(weights: Weights | None, engine: Engine, config: RunConfig) -> int:
    """Bring to an engine what it keeps beside the model that `weights` have filled: master weights
    of a bf16 model, and with init.moments the optimiser's moments. Collective.

    Returns:
        Updates that the moments have behind them, 0 where there are none.

    Raises:
        CheckpointError: the moments do not fit what this run trains.
    """
    if config.init.moments and isinstance(weights, RunWeights):
        return weights.fill_moments(engine)
    if weights is not None and config.train.precision == "bf16":
        weights.fill_masters(engine)
    return 0


class DenseCheckpoint:
    """The parameters of a dense run by name."""

    def __init__(self, checkpoint: Path):
        self.checkpoint, self._reader = checkpoint, MergedReader(checkpoint)

    def __str__(self) -> str:
        return str(self.checkpoint)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._reader.shapes.get(f"{name}/fp32")

    def read(self, name: str) -> torch.Tensor:
        value = torch.empty(self._reader.shapes[f"{name}/fp32"])
        self._reader.read({f"{name}/fp32": value})
        return value


class RunWeights:
    """Weights of a checkpoint, without step or position in the data, and without moments unless
    init.moments asks for them. Routers keep what they have learned beside their weights (bias,
    cuts) where the new run's are of the same kind.
    """

    def __init__(self, checkpoint: Path, config: RunConfig):
        self.checkpoint, self.config = checkpoint, config

    def __str__(self) -> str:
        if not self.config.init.moments:
            return str(self.checkpoint)
        return f"{self.checkpoint}, with the moments of {self._updates():,} updates"

    def fill_model(self, model: Transformer) -> None:
        load_parameters(model, self.checkpoint, converts=True)
        routers, config = model.routers(), self.config
        after = RoutingFacts.of(
            model.router_kind,
            config.balance,
            config.budget,
            config.fail_safe,
            model.rank_shares,
        )
        if after is None:
            return
        load_tables(model, self.checkpoint)
        state = read_state(self.checkpoint)
        before = RoutingFacts.read(state.get("routing"))
        kind = (after.law, after.score_function)
        if before is None or (before.law, before.score_function) != kind:
            log.info("routers of another kind than the weights': their bias and cuts start anew")
            return
        fresh = state_of(routers)
        load_router_buffers(model, self.checkpoint)
        adopt_state(routers, fresh, before, after, updates_of(state))

    def fill_masters(self, engine: Engine) -> None:
        fill_masters(engine, self.checkpoint)

    def fill_moments(self, engine: Engine) -> int:
        """Set master weights and moments; returns the updates behind them. Collective.

        Raises:
            CheckpointError: on every rank, naming parameters that only one of the two has moments
                of.
        """
        updates = self._updates()
        fill_moments(engine, self.checkpoint, updates)
        return updates

    def _updates(self) -> int:
        """Of the checkpoint's moments: those of its run, and those that this began with."""
        state = read_state(self.checkpoint)
        return updates_of(state) + updates_before(state)


def _keep(folder: Path, run_dir: Path) -> None:
    found = [name for name in KEPT if (folder / name).is_file()]
    if not found:
        return
    (run_dir / PRETRAINED).mkdir(parents=True, exist_ok=True)
    for name in found:
        with replacing(run_dir / PRETRAINED / name) as scratch:
            shutil.copyfile(folder / name, scratch)
