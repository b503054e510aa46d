"""A branch of a run with a constant learning rate: it takes the steps of a run that was to decay
from the beginning, to the last bit, and the run that it is of stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, last_json, launch, losses, write_text

pytestmark = [pytest.mark.slow]
CONSTANT = (
    "optim.decay_style=constant",
    "optim.ema_decay=0.9",
    "train.num_steps=10",
    "checkpoint.save_interval=3",
    "checkpoint.keep_last=9",
)
DECAY = (
    "optim.decay_style=WSD",
    "optim.wsd_decay_steps=3",
    "optim.wsd_decay_style=minus_sqrt",
    "optim.min_lr=0.0",
    "optim.ema_decay=0.9",
    "train.num_steps=9",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("branch")
    settings = [*TINY, *write_text(folder)]
    launch("train", *settings, *CONSTANT, f"run_dir={folder / 'run'}")
    return folder, settings


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "verified.json"  # whoever reads remembers what he hashed
    }


def branch(folder: Path, name: str, *settings: str, **options):
    return launch("branch", f"run={folder / 'run'}", f"to={folder / name}", *settings, **options)


def test_a_branch_takes_the_steps_of_a_run_that_decays_and_leaves_its_run_alone(trained):
    folder, settings = trained
    before = content(folder / "run")
    made = branch(
        folder, "new", "checkpoint=step-6", "decay_steps=3", "decay_style=minus_sqrt", "min_lr=0"
    )
    assert last_json(made)["step"] == 6 and f"resume={folder / 'new'}" in made.stdout
    resumed = launch("train", f"resume={folder / 'new'}")
    assert "changed: optim.decay_style constant -> WSD" in resumed.stdout + resumed.stderr
    assert "is gone" not in resumed.stderr  # all records that a resumed run goes on with
    assert content(folder / "run") == before

    launch("train", *settings, *DECAY, f"run_dir={folder / 'whole'}")
    whole, found = losses(folder / "whole"), losses(folder / "new")
    assert found == whole and len(whole) == 9
    rates = [
        [
            record["train/lr"]
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
            if "train/lr" in (record := json.loads(line))
        ]
        for name in ("whole", "new")
    ]
    assert rates[0] == rates[1] and rates[0][8] < rates[0][6] < rates[0][5] == 0.01
    state = json.loads((folder / "new/checkpoints/step-00000006/state.json").read_text())
    assert state["wandb_id"] is None and state["consumed_samples"] == 24


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("checkpoint=step-3", "decay_steps=0"), "decay_steps is 0; it must be at least 1"),
        (("checkpoint=step-3",), "give run=RUN, checkpoint=step-N, to=DIR and decay_steps=K"),
        (("checkpoint=step-4", "decay_steps=2"), "has no step-00000004"),
        (("checkpoint=step-3", "decay_steps=2", "min_lr=1"), "must be between 0 and optim.lr"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(trained, settings, words):
    refused = branch(trained[0], "never", *settings, check=False)
    assert refused.returncode in (2, 65) and words in refused.stderr
    assert not list(trained[0].glob("*never*"))


@pytest.mark.parametrize(
    ("optim", "step", "words"),
    [
        (dict(decay_style="cosine"), 5, "whose learning rate falls all the time"),
        (dict(decay_style="constant", warmup_steps=9), 5, "lies in the warm-up of 9 steps"),
        (dict(decay_style="WSD", wsd_decay_steps=4), 17, "in the decay that begins after step 16"),
    ],
)
def test_a_rate_that_is_not_constant_is_no_place_to_branch(optim, step, words):
    from omegaconf import OmegaConf

    from launch.branch import require_constant

    given = {"warmup_steps": 0, "wsd_decay_steps": None, **optim}
    saved = OmegaConf.create({"optim": given, "train": {"num_steps": 20}})
    with pytest.raises(ValueError, match=words):
        require_constant(saved, step, Path("step-5"))
    if optim["decay_style"] != "cosine":
        require_constant(saved, 16 if step > 16 else 9, Path("step-5"))
