"""Which moments of an optimizer a run may begin with: of the same optimizer, and of exactly what it
trains; everything else is refused, with the parameters' names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from launch.config.build import build_record
from launch.saved.initial import Given, _of_moments
from model.config import BalanceConfig
from model.parallel.groups import initialize_parallel
from tests.pairwise import some_daily
from train.checkpoint.reader import fill_moments
from train.checkpoint.writer import CheckpointWriter
from train.config.training import CheckpointConfig, InitConfig, OptimConfig, TrainConfig
from train.engine.average import AVERAGE
from train.engine.deepspeed import Engine
from train.files.manifest import CheckpointError
from train.rank.runtime import process_group

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import batch, build, take, tiny_config

MUON = {"optimizer": "muon", "orthogonalize_dtype": "fp32"}


def engine_of(groups, stage: int = 1, layers: int | None = None, **optim) -> Engine:
    shape = tiny_config() if layers is None else tiny_config(num_layers=layers)
    return Engine(
        build(shape, BalanceConfig(), groups),
        groups,
        TrainConfig(num_steps=9, seq_len=16, micro_batch_size=2, global_batch_size=2),
        OptimConfig(lr=0.02, **optim),
        {"zero_optimization": {"stage": stage}},
    )


def step(engine: Engine, number: int) -> None:
    output = engine.forward(take(batch(number, 0, 2), 0, 2))
    engine.backward(output.loss_sum / 20, is_last=True)
    engine.step()


def gathered(engine: Engine) -> dict[str, torch.Tensor]:
    engine.prepare_gather()
    return {
        f"{name}/{key}": engine.gather_state(parameter, key).detach().clone()
        for name, parameter in engine.named_parameters()
        for key in engine.state_keys(parameter)
    }


def saved(engine: Engine, folder: Path, groups, number: int) -> Path:
    writer = CheckpointWriter(folder, CheckpointConfig(), groups, "config: {}\n")
    return writer.save(engine, {"step": number})


@pytest.mark.parametrize(
    ("stage", "optim"), some_daily([(3, {}), (0, MUON), (1, {})], one_in=3), ids=str
)
def test_an_engine_goes_on_with_moments_and_begins_its_average_anew(tmp_path, stage, optim):
    """Against an engine that went on without a checkpoint: weights and moments to the last bit; the
    average of the weights is that of the new run alone, so after its first update the weights.
    """
    with process_group(60):
        groups = initialize_parallel(1)
        engine = engine_of(groups, stage, **optim)
        for number in (1, 2, 3):
            step(engine, number)
        folder = saved(engine, tmp_path, groups, 3)
        step(engine, 4)
        expected = gathered(engine)
        engine.close()

        begun = engine_of(groups, stage, ema_decay=0.5, **optim)
        fill_moments(begun, folder, 3)
        step(begun, 4)
        found = gathered(begun)
        begun.close()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        if key.endswith("/fp32"):
            assert torch.equal(found[key.replace("/fp32", f"/{AVERAGE}")], value), key


def test_parameters_that_only_one_has_moments_of_are_named(tmp_path):
    with process_group(60):
        groups = initialize_parallel(1)

        def refused(source: dict, then: dict, words: str, weights_alone: bool = False) -> None:
            engine = engine_of(groups, **source)
            step(engine, 1)
            if weights_alone:
                engine.state_keys = lambda parameter: ("fp32",)  # type: ignore[method-assign]
            folder = saved(engine, tmp_path / str(len(list(tmp_path.iterdir()))), groups, 1)
            engine.close()
            engine = engine_of(groups, **then)
            with pytest.raises(CheckpointError, match=words + r".*; drop init\.moments$"):
                fill_moments(engine, folder, 1)
            engine.close()

        frozen = {"freeze": ("norms",)}
        refused(frozen, {}, r"no moments, since they were frozen there, of blocks\.0\.\S*norm")
        refused({}, MUON, r"moments of another optimizer for blocks\.0\.")
        refused({"layers": 1}, {"layers": 2}, r"has no blocks\.1\.\S+, .* and \d+ more")
        refused({"layers": 2}, {"layers": 1}, r"that this run does not have: blocks\.1\.")
        refused({}, {}, "holds no moments of an optimiser", weights_alone=True)

        # What is frozen now leaves its moments behind.
        engine = engine_of(groups)
        step(engine, 1)
        folder = saved(engine, tmp_path / "all", groups, 1)
        engine.close()
        engine = engine_of(groups, freeze=("norms",))
        fill_moments(engine, folder, 1)
        engine.close()


OF_A_RUN = {
    "lora": {"rank": 0},
    "optim": {"optimizer": "adamw", "groups": [], "lr": 1e-3},
    "attention": {"name": "dense"},
    "model": {"num_layers": 2},
}


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("lora", {"rank": 2}, "has none of the adapters"),
        ("optim", {"optimizer": "muon"}, "has moments of adamw, not of muon"),
        ("optim", {"groups": [{"match": "head", "optimizer": "muon"}]}, "by other optim.groups"),
        ("attention", {"name": "windowed", "sinks": True}, "does not learn attention.sinks"),
        ("optim", {"lr": 1e-5, "beta2": 0.9, "weight_decay": 0.0}, None),
    ],
)
def test_settings_that_moments_do_not_fit_are_refused(section, change, words):
    from omegaconf import OmegaConf

    def found(was: dict, now: dict) -> list[str]:
        given = Given("init.run=x", {}, {}, {}, {}, None, None, is_run=True, settings=was)
        return _of_moments(OmegaConf.create(now), given)

    now = {**OF_A_RUN, section: {**OF_A_RUN[section], **change}}
    problems = found(OF_A_RUN, now)
    assert (words is None and not problems) or (len(problems) == 1 and words in problems[0])
    # Both ways: what only the other run has fits no better.
    assert bool(found(now, OF_A_RUN)) == bool(problems)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "moments are those of another run's optimizer"),
        ({"path": "x"}, "moments are those of another run's optimizer"),
        ({"run": "x", "upcycle": {"num_experts": 4}}, "experts and routers have no moments yet"),
    ],
)
def test_moments_of_nothing_are_refused(settings, words):
    problems: list[str] = []
    record = build_record({"moments": True, **settings}, InitConfig, "init.", problems)
    assert not problems and any(words in problem for problem in record.problems())
