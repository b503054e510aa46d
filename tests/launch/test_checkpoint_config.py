"""Commands read a checkpoint under its own config; a RUN/config.yaml that asks for something else
is told, and changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.config.overrides import plain
from launch.process.identity import ROOT
from launch.saved.configs import load_run_config
from launch.saved.defaults import complete
from launch.saved.resume import examine_restart
from launch.saved.run import load_run
from model.attention.config.sparse import SparseAttentionConfig
from train.files.manifest import CheckpointError, file_facts


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with a checkpoint of which only the config is real."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = complete(
            compose(
                "train",
                overrides=[
                    "data=files",
                    "data.sources.0.path=text",
                    "data.sources.0.data_files=a.txt",
                    f"run_dir={tmp_path}",
                ],
            )
        )
    OmegaConf.save(config, tmp_path / "config.yaml")
    folder = checkpoint(tmp_path)
    (folder / "weights").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(plain(config)), folder / "config.yaml")
    for name in ("state.json", "weights/.metadata"):
        (folder / name).write_text("{}")
    vouch(folder)
    return tmp_path


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000010"


def vouch(folder: Path) -> None:
    names = ("state.json", "weights/.metadata", "config.yaml")
    (folder / "manifest.json").write_text(
        json.dumps({"format": 1, "files": {n: file_facts(folder / n) for n in names}})
    )


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new, 1))


def loaded(run: Path, capsys, **more):
    found = load_run(str(run), checkpoint=checkpoint(run), **more)
    return found, capsys.readouterr().err


def test_a_config_as_it_was_saved_says_nothing(run, capsys):
    assert loaded(run, capsys)[1] == ""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "normalize_weights: true",
            "normalize_weights: false",
            "router.normalize_weights true (there false)",
        ),
        ("scaling_factor: 1.0", "scaling_factor: 1.4", "router.scaling_factor 1.0 (there 1.4)"),
        ("rope_theta: 10000.0", "rope_theta: 10001.0", "model.rope_theta 10000.0 (there 10001.0)"),
        (
            "  rope_theta: 10000.0\n",
            "  rope_theta: 500.0\n",
            "model.rope_theta 10000.0 (there 500.0)",
        ),
        (
            "validation_fraction: 0.01",
            "validation_fraction: 0.5",
            "data.validation_fraction 0.01 (there 0.5)",
        ),
        ("seq_len: 256", "seq_len: 128", "train.seq_len 256 (there 128)"),
    ],
)
def test_an_edited_config_changes_nothing_and_is_told(run, capsys, old, new, told):
    whole = loaded(run, capsys)[0]
    edit(run, old, new)
    found, said = loaded(run, capsys)
    assert found == whole
    assert (
        said
        == f"note: {run}/config.yaml differs from what step-00000010 was made under, which holds "
        f"here: {told}\n"
    )


def test_many_differences_are_one_line(run, capsys):
    for name in (
        "num_layers: 4",
        "num_heads: 4",
        "hidden_size: 256",
        "num_kv_heads: 2",
        "top_k: 2",
        "max_seq_len: 512",
    ):
        edit(run, f"  {name}", f"  {name.split(':')[0]}: 3")
    said = loaded(run, capsys)[1]
    # router.top_k follows model.top_k
    assert (
        said.count("\n") == 1
        and "model.num_heads 4 (there 3)" in said
        and said.endswith(" and 2 more\n")
    )


def test_where_the_data_lie_is_the_runs_to_say(run, capsys):
    edit(run, "cache_dir: ", "cache_dir: elsewhere #")
    edit(run, "data_files: a.txt", "data_files: moved/\\${a}.txt")
    found, said = loaded(run, capsys)
    assert (found.data.cache_dir, found.data.sources[0].data_files, said) == (
        "elsewhere",
        "moved/${a}.txt",
        "",
    )


def test_how_the_run_was_spread_and_watched_is_no_matter(run, capsys):
    edit(run, "expert_parallel_size: 1", "expert_parallel_size: 8")
    edit(run, "log_interval: 10", "log_interval: 1")
    assert loaded(run, capsys)[1] == ""


def test_an_attention_that_was_asked_for_is_no_difference(run, capsys):
    edit(run, "attention:\n", "attention:\n  order: 1\n")
    chosen = SparseAttentionConfig(block_size=64)
    assert loaded(run, capsys, attention=chosen)[1] == ""


def test_a_config_that_is_gone_is_read_from_the_checkpoint(run, capsys):
    whole = loaded(run, capsys)[0]
    (run / "config.yaml").unlink()
    found, said = loaded(run, capsys)
    assert found == whole and "config.yaml is gone" in said


@pytest.mark.parametrize("text", ["data: [1]\n", "data: 3\n", "data: {cache_dir: x}\n"])
def test_a_config_whose_data_cannot_be_read_is_damaged_and_the_copy_is_named(run, text):
    (run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"under data cannot be read .*/config\.yaml is a copy"):
        load_run(str(run), checkpoint=checkpoint(run))


def test_a_setting_that_stands_twice_is_named_with_its_line(run):
    edit(run, "  rope_theta: 10000.0", "  rope_theta: 10000.0\n  rope_theta: 10001.0")
    line = (run / "config.yaml").read_text().splitlines().index("  rope_theta: 10001.0") + 1
    with pytest.raises(
        ValueError, match=rf"cannot be read: found duplicate key rope_theta in line {line}$"
    ):
        load_run(str(run), checkpoint=checkpoint(run))


def test_a_checkpoint_whose_config_was_edited_is_refused(run):
    edit(checkpoint(run), "rope_theta: 10000.0", "rope_theta: 20000.0")
    with pytest.raises(CheckpointError, match=r"config\.yaml has another checksum"):
        load_run(str(run), checkpoint=checkpoint(run))


def test_a_job_that_is_queued_again_tells_what_was_edited_and_refuses_another_model(run):
    again = load_run_config(run / "config.yaml")
    assert examine_restart(again, run) == []
    edit(run, "normalize_weights: true", "normalize_weights: false")
    assert examine_restart(load_run_config(run / "config.yaml"), run) == [
        "changed: router.normalize_weights true -> false"
    ]
    edit(run, "rope_theta: 10000.0", "rope_theta: 10001.0")
    with pytest.raises(CheckpointError, match=r"cannot change model.rope_theta 10000.0 -> 10001.0"):
        examine_restart(load_run_config(run / "config.yaml"), run)
