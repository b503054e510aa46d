"""Files of the run directory that vanish while a job runs: said once, put back where they are
needed.
"""

from __future__ import annotations

import os
import stat

import pytest

from launch.job.kept_file import KeptFile
from launch.job.supervisor import Supervisor
from train.config.launching import LaunchConfig, WatchdogConfig
from train.config.training import CheckpointConfig


@pytest.fixture
def kept(tmp_path) -> KeptFile:
    path = tmp_path / "supervisor.json"
    path.write_text("token")
    path.chmod(0o600)
    return KeptFile(path)


@pytest.fixture
def supervisor(tmp_path, kept) -> Supervisor:
    class Config:
        launch, watchdog, checkpoint = (
            LaunchConfig("deepspeed"),
            WatchdogConfig(5, 10),
            CheckpointConfig(),
        )

    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return Supervisor(
        Config(), tmp_path, [], lambda size: [], {}, kept=[kept, KeptFile(tmp_path / "config.yaml")]
    )


def test_a_file_as_it_was_is_left_alone(kept):
    before = kept.path.stat()
    assert kept.intact() and kept.mend() is None and kept.path.stat() == before
    os.utime(kept.path)  # touched, or copied back by the user
    assert kept.intact() and kept.mend() is None


def test_what_was_removed_or_changed_is_put_back_with_its_mode(kept):
    kept.path.unlink()
    assert not kept.intact() and kept.mend() == "removed" and kept.path.read_text() == "token"
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600 and kept.intact()
    kept.path.write_text("other")
    assert kept.mend() == "changed" and kept.path.read_text() == "token"
    assert kept.path.with_name("supervisor.json.edited").read_text() == "other"


def test_the_supervisor_says_so_once_and_goes_on(supervisor, capsys):
    supervisor.mend_files()
    assert capsys.readouterr().err == ""
    (supervisor.run_dir / "config.yaml").write_text("seed: 2\n")
    supervisor.address_file.unlink()
    supervisor.mend_files()
    supervisor.mend_files()
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "supervisor.json was removed while the job runs" in said
    assert (
        "config.yaml was changed while the job runs" in said
        and "what it held is in config.yaml.edited" in said
    )
    assert (supervisor.run_dir / "config.yaml").read_text() == "seed: 1\n"


def test_nothing_is_put_back_in_a_directory_that_another_job_has_taken_over(supervisor, capsys):
    """Whoever takes over removes supervisor.json, by which the agents of the job before know it."""
    supervisor.still_ours = lambda: False
    supervisor.address_file.unlink()
    supervisor.mend_files()
    assert not supervisor.address_file.exists() and capsys.readouterr().err == ""


def test_a_story_that_is_removed_or_cannot_be_written_ends_no_job(supervisor, capsys):
    path = supervisor.run_dir / "supervisor.jsonl"
    supervisor.event("attempt", attempt=0)
    path.unlink()
    supervisor.event("straggler", rank=1)
    assert (
        "straggler" in path.read_text()
        and "was removed: what it told up to here is lost" in capsys.readouterr().err
    )
    path.unlink()
    path.mkdir()
    supervisor.event("end", code=0)
    supervisor.event("end", code=0)
    assert capsys.readouterr().err.count("cannot be written (Is a directory)") == 1
