"""launch.plan: what it finds without any device or data."""

from __future__ import annotations

import contextlib
import json

import pytest
from omegaconf import open_dict

from launch import plan, train
from launch.config.build import ConfigError
from launch.job.fit import LEFT_OUT
from tests.composing import composed
from train.config.data import TokenizerConfig
from train.data.prepare import train_bpe
from train.files.sizes import GIB


@pytest.fixture
def tokenizer(tmp_path) -> str:
    """Of 290 tokens."""
    train_bpe(iter(["the cat sat on the mat"] * 3), TokenizerConfig(vocab_size=290)).save(
        str(tmp_path / "tokenizer.json")
    )
    return str(tmp_path)


def test_a_plan_says_that_the_model_does_not_cover_the_tokenizer(tokenizer, capsys):
    with pytest.raises(SystemExit) as exit_code:
        plan.main(composed(f"data.tokenizer.path={tokenizer}", "model.vocab_size=200"))
    assert exit_code.value.code == 1
    assert "model.vocab_size 200 must be at least" in capsys.readouterr().out


NOT_THERE = (
    (("data.tokenizer.path=/nowhere/tokenizer.json",), "/nowhere/tokenizer.json does not exist"),
    (
        ("data=files", "data.sources.0.path=json", "data.sources.0.data_files='/nowhere/*.jsonl'"),
        "no file matches '/nowhere/*.jsonl'",
    ),
    (
        ("data.validation.sources=[{path:text,data_files:/nowhere/held.txt}]",),
        "no file matches '/nowhere/held.txt'",
    ),
    (
        ("launch=deepspeed", "launch.num_devices=2", "launch.hostfile=/nowhere/hosts"),
        "launch.hostfile=/nowhere/hosts cannot be read: No such file or directory",
    ),
)


@pytest.mark.parametrize(("settings", "words"), NOT_THERE)
def test_files_that_are_not_there_are_problems_of_a_plan(settings, words, capsys):
    """The plan is printed all the same."""
    with pytest.raises(SystemExit) as exit_code:
        plan.main(composed(*settings))
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert exit_code.value.code == 1
    assert [problem for problem in found["problems"] if words in problem], found["problems"]
    assert "memory per device" in out and found["parameters"] > 0


def test_every_file_that_is_not_there_is_named_at_once(capsys):
    with pytest.raises(SystemExit):
        plan.main(composed(*(word for settings, _ in NOT_THERE for word in settings)))
    problems = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert all(any(words in problem for problem in problems) for _, words in NOT_THERE)


def test_the_nodes_of_slurm_may_see_what_this_machine_does_not(capsys):
    plan.main(composed("launch=slurm", "data.tokenizer.path=/nowhere/tokenizer.json"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["problems"] == []


def test_a_covered_tokenizer_is_no_problem(tokenizer, capsys):
    plan.main(composed(f"data.tokenizer.path={tokenizer}"))
    assert '"problems": []' in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["inline", "deepspeed"])
def test_a_job_is_refused_before_its_run_directory_is_made(tokenizer, tmp_path, kind):
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"model\.vocab_size 200 must be at least"):
        train.train(
            composed(
                f"data.tokenizer.path={tokenizer}",
                "model.vocab_size=200",
                f"launch={kind}",
                f"run_dir={run_dir}",
            )
        )
    assert not run_dir.exists()


# --- a device that is named -----------------------------------------------------------------------

OLMOE = (
    *("experiment=olmoe_1b_7b", "launch=deepspeed", "launch.num_devices=8", "parallel=ep8"),
    *("train.micro_batch_size=8", "train.num_tokens=100B"),
)


def planned(capsys, *overrides: str, **asked) -> tuple[dict, str]:
    """What launch.plan says of a device, as JSON and as text."""
    config = composed(*overrides)
    with open_dict(config):
        config.update({"device": None, "mfu": 0.3, "price": None, **asked})
    with contextlib.suppress(SystemExit):
        plan.main(config)
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_a_plan_says_whether_it_fits_and_what_would_help(capsys):
    found, out = planned(capsys, *OLMOE, device="H100")
    assert not found["fits"] and found["memory_bytes"]["total"] > 80 * GIB
    assert planned(capsys, *OLMOE, device="H200")[0]["fits"]
    # each is what the plan says with that setting
    assert len(found["helps"]) >= 4
    for help in found["helps"]:
        other, _ = planned(capsys, *OLMOE, help["setting"])
        assert other["memory_bytes"]["total"] == help["memory_bytes"], help
        fits = help["memory_bytes"] <= (1 - LEFT_OUT) * 80 * GIB
        line = next(line for line in out.splitlines() if help["setting"] in line)
        assert ("and then fits" in line) == fits
    totals = [help["memory_bytes"] for help in found["helps"]]
    assert totals == sorted(totals) and totals[-1] < found["memory_bytes"]["total"]


def test_settings_that_contradict_the_rest_are_no_help(capsys):
    tight = ("train.global_batch_size=64", "train.micro_batch_size=8")
    helps = planned(capsys, *OLMOE, *tight, device="H100")[0]["helps"]
    settings = [help["setting"] for help in helps]
    assert "train.micro_batch_size=4" in settings
    # 64 sequences are 8 for each of 8 ranks: twice the ranks would have half a micro-batch
    assert not any(setting.startswith("launch.num_nodes") for setting in settings)


def test_time_and_cost_are_those_of_the_tokens(capsys):
    found, _ = planned(capsys, *OLMOE, device="H200", mfu=0.5, price=2.0)
    tokens = found["tokens"]
    assert 10**11 <= tokens < 10**11 + found["tokens_per_step"]
    seconds = tokens * found["flops_per_token"] / (8 * 0.5 * 989.4e12)
    assert found["hours"] == pytest.approx(seconds / 3600)
    assert found["cost"] == pytest.approx(seconds / 3600 * 8 * 2.0)


def test_a_plan_is_printed_beside_its_problems(capsys):
    found, out = planned(capsys, "train.global_batch_size=33", device="H100")
    assert "train.global_batch_size 33 is not a multiple" in found["problems"][0]
    assert found["parameters"] > 0 and found["fits"]
    assert out.index("memory per device") < out.index("problem(s)")
    # where nothing can be worked out, the problems alone
    found, out = planned(capsys, "model.num_heads=0")
    assert found["problems"] and "parameters" not in found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"device": "H300"}, "device is 'H300'; choose one of GB200, B200, H200"),
        ({"mfu": 1.5}, "mfu is 1.5"),
        ({"price": -1.0}, "price is -1.0"),
    ],
)
def test_what_no_device_is_is_refused(asked, words):
    with pytest.raises(ConfigError, match=words):
        config = composed()
        with open_dict(config):
            config.update({"device": None, "mfu": 0.3, "price": None, **asked})
        plan.main(config)
