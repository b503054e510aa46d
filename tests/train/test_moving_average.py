"""The moving average of the weights: against a loop over the weights that the run had, also where
ZeRO has cut them, through a checkpoint and over an update that was not made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from model.config import BalanceConfig
from model.parallel.groups import initialize_parallel
from train.checkpoint.folder import find_last
from train.checkpoint.reader import load_engine, load_weights
from train.checkpoint.writer import CheckpointWriter
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.engine.average import AVERAGE
from train.engine.deepspeed import Engine
from train.files.manifest import CheckpointError
from train.rank.runtime import process_group
from train.trained.averages import reader_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import batch, build, take, tiny_config

DECAY = 0.5
BALANCE = BalanceConfig()
MUON = dict(optimizer="muon", orthogonalize_dtype="fp32")


def engine_of(groups, stage: int, decay: float | None = DECAY, **optim) -> Engine:
    return Engine(
        build(tiny_config(), BALANCE, groups),
        groups,
        TrainConfig(num_steps=9, seq_len=16, micro_batch_size=2, global_batch_size=2),
        OptimConfig(lr=0.02, ema_decay=decay, **optim),
        {"zero_optimization": {"stage": stage}},
    )


def step(engine: Engine, number: int, factor: float = 1.0) -> None:
    output = engine.forward(take(batch(number, 0, 2), 0, 2))
    engine.backward(factor * output.loss_sum / 20, is_last=True)
    engine.step()


def gathered(engine: Engine, key: str) -> dict[str, torch.Tensor]:
    engine.prepare_gather()
    return {
        name: engine.gather_state(p, key).detach().clone() for name, p in engine.named_parameters()
    }


def defined(history: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The average of all weights so far, by its definition, in fp64."""
    found = {name: value.double() for name, value in history[0].items()}
    for number, weights in enumerate(history[1:], 2):
        decay = min(DECAY, (1 + number) / (10 + number))
        for name, value in weights.items():
            found[name] = decay * found[name] + (1 - decay) * value.double()
    return found


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("stage", "optim"), [(0, {}), (1, MUON), (2, {}), (3, {}), (3, MUON)], ids=str
)
def test_the_average_is_that_of_its_definition(tmp_path, stage, optim):
    """Before and after a checkpoint is loaded, which continues it to the last bit; an update that
    was not finite counts for nothing.
    """
    with process_group(60):
        groups = initialize_parallel(1)
        engine, history = engine_of(groups, stage, **optim), []
        for number in range(1, 4):
            step(engine, number)
            history.append(gathered(engine, "fp32"))
        assert_close(gathered(engine, AVERAGE), defined(history))
        step(engine, 4, float("nan"))
        assert_close(gathered(engine, AVERAGE), defined(history))

        writer = CheckpointWriter(tmp_path, CheckpointConfig(), groups, "config: {}\n")
        folder = writer.save(engine, {"step": 3})
        for number in (5, 6):
            step(engine, number)
            history.append(gathered(engine, "fp32"))
        whole = gathered(engine, AVERAGE)
        assert_close(whole, defined(history))
        engine.close()

        resumed = engine_of(groups, stage, **optim)
        load_engine(resumed, folder, 3)
        for number in (5, 6):
            step(resumed, number)
        for name, value in gathered(resumed, AVERAGE).items():
            assert torch.equal(value, whole[name]), name
        resumed.close()

    # Read in the place of the weights, from packs and stacks, as other commands do.
    model = build(tiny_config(), BALANCE)
    load_weights(model, reader_of(find_last(tmp_path, "latest", 1), "ema"))
    assert_close({n: p.detach() for n, p in model.named_parameters()}, defined(history[:3]))


def test_a_run_begins_an_average_with_the_weights_it_stands_at(tmp_path, caplog):
    with process_group(60):
        groups = initialize_parallel(1)
        engine = engine_of(groups, 1, decay=None)
        step(engine, 1)
        weights = gathered(engine, "fp32")
        folder = CheckpointWriter(tmp_path, CheckpointConfig(), groups, "config: {}\n").save(
            engine, {"step": 1}
        )
        engine.close()
        with pytest.raises(CheckpointError, match=r"no moving average .* optim\.ema_decay"):
            reader_of((folder,), "ema")

        engine = engine_of(groups, 1)
        with caplog.at_level("INFO", logger="loadstone"):
            load_engine(engine, folder, 1)
        assert "it begins with them" in caplog.text
        assert_close(gathered(engine, AVERAGE), weights)
        step(engine, 2)
        decay = min(DECAY, 3 / 12)
        after = gathered(engine, "fp32")
        expected = {n: decay * w + (1 - decay) * after[n] for n, w in weights.items()}
        assert_close(gathered(engine, AVERAGE), expected)
        engine.close()
