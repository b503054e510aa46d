"""The mean of a run's last checkpoints: of every tensor, whole or a rank's experts, with adapters
added, against the mean of the weights that the run had.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from model.config import BalanceConfig
from model.parallel.groups import initialize_parallel
from train.checkpoint.folder import find_last, name_of
from train.checkpoint.reader import MergedReader, load_weights
from train.checkpoint.writer import CheckpointWriter
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.files.manifest import CheckpointError
from train.rank.runtime import process_group
from train.trained.averages import reader_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import batch, build, take, tiny_config

STEPS = 4
BALANCE = BalanceConfig(bias_update="sign", bias_update_rate=0.01)


def train(run: Path, **shape) -> list[dict[str, torch.Tensor]]:
    """A run of four saved steps; its parameters and buffers after each."""
    with process_group(60):
        groups = initialize_parallel(1)
        model = build(tiny_config(**shape), BALANCE, groups)
        engine = Engine(
            model,
            groups,
            TrainConfig(num_steps=STEPS, seq_len=16, micro_batch_size=2, global_batch_size=2),
            OptimConfig(lr=0.05),
            {"zero_optimization": {"stage": 1}},
        )
        writer = CheckpointWriter(run, CheckpointConfig(keep_last=9), groups, "config: {}\n")
        states = []
        for step in range(1, STEPS + 1):
            output = engine.forward(take(batch(step, 0, 2), 0, 2))
            engine.backward(output.loss_sum / 20, is_last=True)
            engine.step()
            for number, router in enumerate(engine.module.routers()):
                router.balance_bias += step * (number + 1)
                router.controller.fill_(float(step))
            writer.save(engine, {"step": step, "wandb_id": None})
            states.append({n: v.detach().clone() for n, v in engine.module.state_dict().items()})
        engine.close()
    return states


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("averages") / "run"
    return run, train(run)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def mean(states, name: str) -> torch.Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0).float()


@pytest.mark.parametrize(("last", "number"), [(4, 3), (3, 2), (4, 1)])
def test_every_weight_is_the_mean_of_those_of_the_steps(trained, last, number):
    run, states = trained
    model = build(tiny_config(), BALANCE)
    load_weights(model, reader_of(find_last(run, name_of(last), number)))
    for name, value in model.state_dict().items():
        averaged = name in dict(model.named_parameters()) or name.endswith("balance_bias")
        chosen = states[last - number : last] if averaged else states[last - 1 : last]
        torch.testing.assert_close(value, mean(chosen, name), rtol=1e-6, atol=1e-7)
    assert not torch.equal(states[0]["embedding.weight"], states[3]["embedding.weight"])


def test_a_rank_gets_the_mean_of_its_experts(trained):
    """As one of several ranks asks, in an order of its own; and expert by expert."""
    run, states = trained
    reader = reader_of(find_last(run, "latest", 2))
    name = "blocks.1.mlp.experts.gate_up"
    expected = mean(states[2:], name)
    asked = {f"{name}/fp32": torch.empty(2, *expected.shape[1:])}
    reader.read_parameters(asked, {name: (5, 2)})
    torch.testing.assert_close(asked[f"{name}/fp32"], expected[[5, 2]], rtol=1e-6, atol=1e-7)
    single = {f"{name}.7/fp32": torch.empty(expected.shape[1:])}
    reader.read(single)
    torch.testing.assert_close(single[f"{name}.7/fp32"], expected[7], rtol=1e-6, atol=1e-7)


def test_optimizer_state_is_that_of_the_newest(trained):
    run, _ = trained
    paths = find_last(run, "latest", 2)
    found, alone = ({"norm.weight/exp_avg": torch.empty(16)} for _ in "ab")
    reader_of(paths).read(found)
    MergedReader(paths[0]).read(alone)
    torch.testing.assert_close(found["norm.weight/exp_avg"], alone["norm.weight/exp_avg"])


def test_adapters_are_added_before_the_mean_is_taken(trained, monkeypatch):
    """The mean of products, not the product of means."""
    run, states = trained
    paths = find_last(run, "latest", 2)
    adapters = {path: float(i + 1) for i, path in enumerate(paths)}

    def merged(self, want):
        super(MergedReader, self).read(want)
        for tensor in want.values():
            tensor += adapters[self.checkpoint]

    monkeypatch.setattr(MergedReader, "read", merged)
    found = {"norm.weight/fp32": torch.empty(16)}
    reader_of(paths).read(found)
    expected = mean(states[2:], "norm.weight") + 1.5
    torch.testing.assert_close(found["norm.weight/fp32"], expected)


def test_a_damaged_checkpoint_is_left_out_and_too_few_are_refused(run):
    """Names what there is, and what keeps more."""
    assert [path.name for path in find_last(run, "step-00000003", 3)] == [
        name_of(3),
        name_of(2),
        name_of(1),
    ]
    weights = next((run / "checkpoints" / name_of(2) / "weights").glob("__0_*"))
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    assert [path.name for path in find_last(run, "latest", 3)] == [
        name_of(4),
        name_of(3),
        name_of(1),
    ]
    with pytest.raises(ValueError, match=r"average=4 needs 4 .* has 3: step-00000001, step-0"):
        find_last(run, "latest", 4)
    with pytest.raises(ValueError, match=r"train with checkpoint\.keep_last=2"):
        find_last(run, "step-00000001", 2)


def test_models_of_other_shapes_have_no_mean(trained, tmp_path):
    run, _ = trained
    other = tmp_path / "other"
    train(other, intermediate_size=48)
    paths = (find_last(run, "latest", 1)[0], find_last(other, "latest", 1)[0])
    words = r"different models.*blocks.0.mlp.down.weight is \(16, 32\) in one and \(16, 48\)"
    with pytest.raises(CheckpointError, match=words):
        reader_of(paths)
