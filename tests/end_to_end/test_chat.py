"""Training on conversations: what is shown, how it goes on, on one rank and on two."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, launch, losses, train_on

pytestmark = [pytest.mark.slow]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "seven", "owls"]


def write_chats(folder: Path) -> list[str]:
    """Questions answered by their words backwards, and the overrides that train on them."""
    rng = random.Random(0)
    rows = []
    for i in range(120):
        messages = []
        for _ in range(1 + i % 2):
            words = rng.choices(WORDS, k=rng.randint(2, 5))
            messages += [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": " ".join(words[::-1])},
            ]
        rows.append({"messages": messages})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *TINY,
        "model.max_seq_len=128",
        "data=chat",
        "data.sources.0.path=json",
        f"data.sources.0.data_files={folder / 'chats.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        "train.seq_len=128",
        "train.num_steps=8",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str], str]:
    folder = tmp_path_factory.mktemp("chat")
    settings = write_chats(folder)
    done = launch("train", *settings, f"run_dir={folder / 'full'}")
    return folder, settings, done.stdout + done.stderr


def test_a_run_shows_its_form_what_is_learnt_and_an_example_before_it_begins(trained):
    _, _, printed = trained
    assert "conversations are written out by the built-in plain form" in printed
    assert "of the tokens learnt (" in printed and " rows an epoch, " in printed
    before, after = printed.split("step 1/8")[0], printed.split("step 1/8")[1]
    assert "(⟦learnt⟧, the rest is read):\nUser: " in before and "Assistant:⟦ " in before
    assert "<|endoftext|>⟧" in before and "bits_per_byte unknown" in after


def test_a_resumed_run_is_the_uninterrupted_one(trained):
    folder, settings, _ = trained
    launch("train", *settings, f"run_dir={folder / 'half'}", "train.stop_after_step=3")
    launch("train", f"resume={folder / 'half'}")
    assert losses(folder / "half") == losses(folder / "full")


def test_two_expert_parallel_ranks_have_the_losses_of_one(trained):
    folder, settings, _ = trained
    train_on(2, *settings, f"run_dir={folder / 'two'}", "parallel.expert_parallel_size=2")
    one, two = losses(folder / "full"), losses(folder / "two")
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=2e-5)


def test_the_order_and_the_mask_stay_on_resume(trained):
    folder, _, _ = trained
    for change in ("data.too_long=cut", "data.train_on=last"):
        refused = launch("train", f"resume={folder / 'full'}", change, check=False)
        assert refused.returncode == 2
        assert "the order of the data would change" in refused.stdout + refused.stderr
