"""A run that begins with another run's weights and moments (init.moments) takes the steps that the
other would have taken. All rows here are the same, and the rate is constant, so that where a run
stands in its data and schedule is all that the two differ in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, launch, losses, train_on

from train.checkpoint.folder import find_checkpoint
from train.checkpoint.reader import CheckpointReader

pytestmark = [pytest.mark.slow]
SETTINGS = (
    *TINY,
    "optim.decay_style=constant",
    "optim.warmup_steps=0",
    "balance=none",  # a loss over a micro-batch is another on two ranks
    "data=tokens",
    "data.sources.0.path=npy",
    "data.tokenizer.end_of_document_id=299",
    "data.validation_fraction=0",
    "checkpoint.save_interval=5",
    "checkpoint.keep_last=9",
    "train.eval_max_sequences=4",
)
FIVE = "init.checkpoint=step-00000005"
MOMENTS = "init.moments=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder, and settings that train on rows of one document each, all alike."""
    folder = tmp_path_factory.mktemp("moments")
    draw = np.random.default_rng(0)
    for name, number in (("rows", 64), ("held", 8)):
        document = np.append(draw.integers(0, 299, 31), 299).astype(np.int32)
        np.save(folder / f"{name}.npy", np.tile(document, (number, 1)), allow_pickle=False)
    return folder, [
        *SETTINGS,
        f"data.sources.0.data_files={folder / 'rows.npy'}",
        f"data.validation.sources=[{{path:npy,data_files:{folder / 'held.npy'}}}]",
        f"data.cache_dir={folder / 'cache'}",
    ]


def whole_run(data: tuple[Path, list[str]], *settings: str) -> Path:
    """Ten steps in one process."""
    folder, common = data
    run = folder / "-".join(["whole", *(setting.rpartition("=")[2] for setting in settings)])
    if not run.exists():
        launch("train", *common, *settings, "train.num_steps=10", f"run_dir={run}")
    return run


def after(run: Path, first: int) -> list[float]:
    return [loss for step, loss in losses(run).items() if step > first]


def states(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint."""
    reader = CheckpointReader(find_checkpoint(run, prefer="latest"))
    want = {key: torch.empty(s) for key, s in reader.shapes.items() if "buffer/" not in key}
    reader.read(want)
    return want


def test_the_steps_are_those_of_the_uninterrupted_run(data, tmp_path):
    """To the last bit, over a resumption of its own, and again from the run that has begun so, by
    two ranks that share its experts; and they are others without moments.
    """
    _, common = data
    whole = whole_run(data)
    one, two, cold = tmp_path / "one", tmp_path / "two", tmp_path / "cold"
    more = [*common, "train.num_steps=3"]
    begun = launch(
        *("train", *more, f"init.run={whole}", FIVE, MOMENTS),
        *("train.stop_after_step=1", f"run_dir={one}"),
    )
    assert "with the moments of 5 updates" in begun.stdout + begun.stderr
    launch("train", f"resume={one}")
    assert list(losses(one).values()) == after(whole, 5)[:3]
    state = json.loads((one / "checkpoints/step-00000003/state.json").read_text())
    assert (state["step"], state["updates_before"], state["consumed_samples"]) == (3, 5, 12)

    shared = ("parallel.expert_parallel_size=2", "deepspeed=zero1", "train.num_steps=2")
    train_on(
        *(2, *common, *shared, f"init.run={one}", "init.checkpoint=latest", MOMENTS),
        f"run_dir={two}",
    )
    assert list(losses(two).values()) == pytest.approx(after(whole, 8), rel=2e-5)
    state = json.loads((two / "checkpoints/step-00000002/state.json").read_text())
    assert state["updates_before"] == 8
    ours, theirs = states(two), states(whole)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5, msg=key)

    # The first loss is that of the same weights; the update after it is another.
    launch("train", *more, f"init.run={whole}", FIVE, f"run_dir={cold}")
    found = list(losses(cold).values())
    assert found[0] == after(whole, 5)[0] and found[1] != pytest.approx(
        after(whole, 5)[1], rel=1e-4
    )


LAYOUTS = [
    ("deepspeed=zero0", "parallel.expert_parallel_size=2"),
    ("deepspeed=zero1",),
    ("deepspeed=zero2", "parallel.expert_parallel_size=2"),
    ("deepspeed=zero3", "parallel.expert_parallel_size=2"),
    ("deepspeed=zero3",),
    ("parallel=tp2", "deepspeed=zero1"),
    ("parallel=cp2", "deepspeed=zero2"),
    ("parallel=pp2", "deepspeed=zero1"),
]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("layout", "optimizer"),
    # Muon has no parts of matrices, so that tensor parallelism refuses it.
    [
        (la, o)
        for la in LAYOUTS
        for o in ("adamw", "muon")
        if (la[0], o) != ("parallel=tp2", "muon")
    ],
    ids=lambda word: (
        word if isinstance(word, str) else "-".join(s.rpartition("=")[2] for s in word)
    ),
)
def test_any_layout_goes_on_with_the_moments(data, tmp_path, optimizer, layout):
    """Saved by one process and by the layout itself, begun under the layout, and resumed there."""
    _, common = data
    common = [*common, "model.num_kv_heads=2"]
    settings = (f"optim={optimizer}", "optim.warmup_steps=0", "model.num_kv_heads=2")
    settings += ("optim.orthogonalize_dtype=fp32",) if optimizer == "muon" else ()
    whole = whole_run(data, *settings)
    first = tmp_path / "first"
    more = [*common, *settings, *layout, FIVE, MOMENTS]
    half = ("train.num_steps=3", "train.stop_after_step=1")
    train_on(2, *more, f"init.run={whole}", *half, f"run_dir={first}")
    train_on(2, f"resume={first}")
    assert list(losses(first).values()) == pytest.approx(after(whole, 5)[:3], rel=5e-5)

    last = tmp_path / "last"
    launch(
        *("train", *common, *settings, MOMENTS, f"init.run={first}", "init.checkpoint=latest"),
        *("train.num_steps=2", f"run_dir={last}"),
    )
    assert list(losses(last).values()) == pytest.approx(after(whole, 8), rel=5e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("masters", ["fp32", "bf16"])
def test_master_weights_of_a_bf16_run_keep_every_digit(data, tmp_path, masters):
    """Masters of bf16 are rounded as the updates are numbered, those of the other run included."""
    _, common = data
    settings = ("train.precision=bf16", f"train.master_dtype={masters}")
    whole = whole_run(data, *settings)
    launch(
        *("train", *common, *settings, "train.num_steps=5"),
        *(f"init.run={whole}", FIVE, MOMENTS, f"run_dir={tmp_path / 'run'}"),
    )
    assert list(losses(tmp_path / "run").values()) == after(whole, 5)
    ours = states(tmp_path / "run")
    assert all(torch.equal(ours[key], value) for key, value in states(whole).items())


@pytest.mark.nightly
def test_a_decay_is_that_of_a_branch(data, tmp_path):
    """launch.branch of the same checkpoint decays alike, and ends with the same weights."""
    folder, common = data
    whole = whole_run(data)
    branch, begun = tmp_path / "branch", tmp_path / "begun"
    launch(
        *("branch", f"run={whole}", "checkpoint=step-5", f"to={branch}", "decay_steps=4"),
        "min_lr=0",
    )
    launch("train", f"resume={branch}")
    launch(
        *("train", *common, f"init.run={whole}", FIVE, MOMENTS, "train.num_steps=4"),
        *("optim.decay_style=linear", "optim.min_lr=0", f"run_dir={begun}"),
    )
    expected = after(branch, 5)
    assert len(expected) == 4
    assert list(losses(begun).values()) == pytest.approx(expected, rel=1e-6)
    ours = states(begun)
    for key, value in states(branch).items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("optim=muon",), "has moments of adamw, not of muon; add optim=adamw, or drop init."),
        pytest.param(
            ("lora.rank=2",),
            "has none of the adapters, and adapters begin anew",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_what_moments_do_not_fit_is_refused_before_anything_is_written(
    data, tmp_path, settings, words
):
    _, common = data
    run = tmp_path / "never"
    done = launch(
        *("train", *common, f"init.run={whole_run(data)}", FIVE, MOMENTS, *settings),
        f"run_dir={run}",
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr and not run.exists()
