"""launch.plan: what it finds without any device or data."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from launch import plan, train
from launch.validate import ConfigError
from train.config import TokenizerConfig
from train.data.prepare import train_bpe

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")


@pytest.fixture
def tokenizer(tmp_path) -> str:
    """Of 290 tokens."""
    train_bpe(iter(["the cat sat on the mat"] * 3), TokenizerConfig(vocab_size=290)).save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_a_plan_says_that_the_model_does_not_cover_the_tokenizer(tokenizer, capsys):
    with pytest.raises(SystemExit) as exit_code:
        plan.main(composed(f"data.tokenizer.path={tokenizer}", "model.vocab_size=200"))
    assert exit_code.value.code == 1
    assert "model.vocab_size 200 must be at least" in capsys.readouterr().out


def test_a_plan_with_a_tokenizer_that_is_elsewhere_says_what_was_not_checked(capsys):
    plan.main(composed("data.tokenizer.path=/nowhere/tokenizer.json"))
    out = capsys.readouterr().out
    assert "data.tokenizer.path=/nowhere/tokenizer.json is not on this machine" in out and '"problems": []' in out


def test_a_covered_tokenizer_is_no_problem(tokenizer, capsys):
    plan.main(composed(f"data.tokenizer.path={tokenizer}"))
    assert "not checked" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["inline", "deepspeed"])
def test_a_job_is_refused_before_its_run_directory_is_made(tokenizer, tmp_path, kind):
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"model\.vocab_size 200 must be at least"):
        train.train(composed(f"data.tokenizer.path={tokenizer}", "model.vocab_size=200", f"launch={kind}",
                             f"run_dir={run_dir}"))
    assert not run_dir.exists()
