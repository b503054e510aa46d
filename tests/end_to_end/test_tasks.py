"""launch.evaluate tasks=[...]: log-likelihoods and greedy texts that the harness gets, against the
model alone and over ranks; and what is said where something is missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, last_json, launch, write_text

from launch.saved.opened import opened
from model.generate import generate
from model.parallel.groups import ParallelGroups
from train.data.tokenizer import TextStream
from train.trained.ranks import Place
from train.trained.scoring import Generation, Scorer

pytestmark = [pytest.mark.slow]
HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HARNESS, reason="lm-eval is not installed: pip install -r requirements-tasks.txt"
)
TASKS = "tasks=[plays_answer,plays_text,plays_name]"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    short = ("train.num_steps=3", "train.eval_max_sequences=4")
    launch("train", *TINY, *short, *write_text(folder), f"run_dir={folder / 'run'}")
    return folder / "run"


@pytest.fixture(scope="module")
def scorer(run) -> Scorer:
    model, store, device = opened(str(run))
    tokenizer = store.tokenizer()
    place = Place(ParallelGroups.single(), device, 0, 1)
    return Scorer(model, place, lambda ids: TextStream(tokenizer, ids), store.end_of_document, 2)


PAIRS = [([5, 9, 3], [8, 2]), ([7], [4, 6, 1, 9]), ([1, 2, 3, 4, 5, 6, 7], [8]), ([4, 4], [4])]


def test_rows_of_other_lengths_beside_a_pair_change_nothing(scorer):
    for pair, scored in zip(PAIRS, scorer.score(PAIRS), strict=True):
        ids = torch.tensor([pair[0] + pair[1]])
        with torch.no_grad():
            said = F.log_softmax(scorer.model.logits(ids[:, :-1])[0].double(), -1)[-len(pair[1]) :]
        wanted = torch.tensor(pair[1])
        total = said.gather(1, wanted.unsqueeze(1)).sum()
        assert scored.log_likelihood == pytest.approx(float(total), rel=1e-5)
        assert scored.is_greedy == bool((said.argmax(-1) == wanted).all())


def test_what_is_longer_than_the_model_loses_its_beginning(scorer):
    length = scorer.max_len
    context = [int(i) for i in torch.randint(5, 250, (length + 9,))]
    (whole,) = scorer.score([(context, [7, 8])])
    (cut,) = scorer.score([(context[-(length - 1) :], [7, 8])])
    assert whole == cut


def test_a_greedy_text_is_the_models_own_up_to_its_stop_string(scorer, run):
    prompt = [5, 9, 3, 8]
    (text,) = scorer.generate([Generation(prompt, (), 6)])
    ids = list(generate(scorer.model, prompt, 6, temperature=0.0, stop_token=scorer.end_token))
    stream = scorer.text(prompt)
    assert text == "".join(stream.add(token) for token in ids) + stream.end()
    if len(text) > 2:
        (stopped,) = scorer.generate([Generation(prompt, (text[1:3],), 6)])
        assert stopped == text[: text.index(text[1:3])]


def test_the_harness_that_is_missing_is_named(run, monkeypatch):
    from launch.harness import command

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-tasks\.txt"):
        command.require_harness()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("text=here.txt",), "drop text"),
        (("max_documents=0",), "max_documents is 0"),
        (("checkpoint=all",), "drop a list of runs or checkpoints"),
    ],
)
def test_settings_of_held_out_text_are_refused(run, overrides, words):
    done = launch("evaluate", f"run={run}", TASKS, *overrides, check=False)
    assert done.returncode == 2 and words in done.stderr


@needs_harness
def test_tasks_of_the_folder_run_without_a_network_and_alike_on_two_ranks(run):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    asked = (f"run={run}", TASKS, "max_documents=8")
    one = last_json(launch("evaluate", *asked, env=offline))
    spread = ("launch.num_devices=2", "parallel=ep2")
    two = last_json(launch("evaluate", *asked, *spread, env=offline))
    assert one["documents"] == dict.fromkeys(("plays_answer", "plays_text", "plays_name"), 8)
    assert 1 < one["tasks"]["plays_text"]["bits_per_byte"] < 20
    assert 0 <= one["tasks"]["plays_answer"]["acc"] <= 1
    for task, values in one["tasks"].items():
        assert two["tasks"][task] == pytest.approx(values, rel=1e-4), task


@needs_harness
def test_a_task_that_is_not_there_is_named(run):
    done = launch("evaluate", f"run={run}", "tasks=[plays_anser]", check=False)
    assert done.returncode == 2
    assert "no task is called plays_anser" in done.stderr and "plays_answer" in done.stderr
