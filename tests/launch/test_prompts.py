"""Files of prompts and answers: what a line may say, what is refused, and what a restart finds."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from infer.config import SamplingConfig
from infer.request import Completion
from launch.command.messages import failure_of
from launch.process.exits import CANNOT_WRITE, FAILURES
from launch.prompts.answering import answer_file, answer_of
from launch.prompts.answers import AnswerFile
from launch.prompts.lines import BadLine, PromptLine, read_prompts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))


def lines_of(tmp_path: Path, *lines: object, **settings) -> list[PromptLine | BadLine]:
    path = tmp_path / "prompts.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw))
    return list(read_prompts(path, SamplingConfig(**settings)))


def test_a_line_sets_what_it_says_and_the_rest_travels(tmp_path):
    first, second = lines_of(
        tmp_path,
        {"prompt": "a", "id": "x", "temperature": 0, "stop": "b", "label": [1]},
        {"prompt": "c", "max_new_tokens": 3, "budget": 1.5},
        max_new_tokens=7,
        stop=("d",),
    )
    assert first.name == "x" and first.rest == {"label": [1]} and first.budget is None
    assert second.budget == 1.5 and second.rest == {"budget": 1.5}
    assert (first.sampling.temperature, first.sampling.stop) == (0, ("b",))
    assert first.sampling.max_new_tokens == 7
    assert second.name == "2" and second.sampling.stop == ("d",)
    assert second.sampling.max_new_tokens == 3


def test_equal_prompts_draw_texts_of_their_own_and_seeds_hold(tmp_path):
    found = lines_of(
        tmp_path, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 4}, seed=2**63 - 2
    )
    assert [line.sampling.seed for line in found] == [2**63 - 1, 0, 4]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "is not JSON"),
        (b'{"prompt": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        ([1], "is not an object but list"),
        ({}, 'has no "prompt"'),
        ({"prompt": ""}, 'has no "prompt"'),
        ({"prompt": 3}, 'has no "prompt"'),
        ({"prompt_tokens": []}, "has prompt_tokens that are no list"),
        ({"prompt_tokens": [1, -1]}, "has prompt_tokens that are no list"),
        ({"prompt_tokens": [1], "tokens": "a"}, "has tokens that are no list"),
        ({"prompt": "a", "stop_token_ids": 3}, "has stop_token_ids that are no list"),
        ({"prompt": "a", "ignore_end": 1}, "has ignore_end 1"),
        ({"prompt": "a", "id": [1]}, "has the id"),
        ({"prompt": "a", "id": True}, "has the id"),
        ({"prompt": "a", "temperature": "hot"}, "has temperature 'hot'"),
        ({"prompt": "a", "budget": "low"}, "has budget 'low'"),
        ({"prompt": "a", "budget": True}, "has budget True"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a", "max_new_tokens": 2.5}, "has max_new_tokens 2.5"),
        ({"prompt": "a", "top_k": 0}, "top_k is 0"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "stop": [1]}, "has stop"),
        ({"prompt": "a", "stop": ""}, "stop has an empty string"),
    ],
)
def test_bad_lines_are_told_and_the_others_read(tmp_path, line, problem):
    before, bad, after = lines_of(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    assert isinstance(bad, BadLine) and bad.number == 2 and problem in bad.problem
    assert isinstance(before, PromptLine) and isinstance(after, PromptLine)
    assert (before.number, after.number) == (1, 3)


def test_an_id_that_comes_twice_is_a_bad_line(tmp_path):
    _, bad, number = lines_of(
        tmp_path, {"prompt": "a", "id": "3"}, {"prompt": "b", "id": "3"}, {"prompt": "c"}
    )
    assert "'3' has been there before" in bad.problem
    assert isinstance(number, BadLine)  # its number is another line's id


def test_answers_are_appended_and_found_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, {"seed": 1}) as file:
        file.append({"id": "a", "text": "ü\u2028"})
        file.append({"id": 7})
    with AnswerFile(path, {"seed": 1}) as file:
        assert file.done == {"a", "7"}
        file.append({"id": "b"})
    assert [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]] == ["a", 7, "b"]


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, {}) as file:
        file.append({"id": "a"})
    path.write_bytes(path.read_bytes() + b'{"id": "b"')
    with AnswerFile(path, {}) as file:
        assert file.done == {"a"}
        file.append({"id": "c"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_restart_skips_finished_prompts(tmp_path):
    """What is answered is not computed again, half an answer is, and the answers are those of a
    start that nothing cut short.
    """
    import torch
    from common import build, tiny_config

    from infer.engine import Engine
    from infer.request import Request
    from model.config import BalanceConfig

    model = build(tiny_config(vocab_size=128), BalanceConfig()).eval()
    with torch.no_grad():
        model.head.weight *= 10
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts = ["the quick", "brown fox", "jumps", "over a lazy dog"]
    source.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    asked: list[str] = []

    def to_request(line: PromptLine) -> Request:
        asked.append(line.name)
        return Request(line.name, list(line.prompt.encode()), line.sampling)

    def answered() -> tuple[int, int]:
        sampling = SamplingConfig(max_new_tokens=5)
        with AnswerFile(output, {}) as file:
            tally = answer_file(Engine(model), source, file, sampling, to_request)
        return tally.answered, tally.skipped

    assert answered() == (4, 0) and sorted(asked) == ["1", "2", "3", "4"]
    lines = output.read_text().splitlines(keepends=True)
    whole = {a["id"]: a["generated_tokens"] for a in map(json.loads, lines)}
    output.write_text("".join(lines[:2]) + lines[2][:-10])
    asked.clear()
    assert answered() == (2, 2)
    done = {json.loads(line)["id"] for line in lines[:2]}
    assert set(asked) == {"1", "2", "3", "4"} - done
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(again) == 4 and {a["id"]: a["generated_tokens"] for a in again} == whole
    assert answered() == (0, 4)


def test_other_settings_and_other_files_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, {"seed": 1}) as file:
        file.append({"id": "a"})
    with pytest.raises(ValueError, match=r"seed 1 \(now 2\)"):
        AnswerFile(path, {"seed": 2})
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="line 1 is no answer"):
        AnswerFile(path, {"seed": 1})
    assert path.read_text() == "hello\n"
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="its settings file is gone"):
        AnswerFile(path, {"seed": 1})


def test_a_full_disk_is_an_error_of_its_own():
    """Every write to /dev/full fails as one to a full disk does. The command ends with the code of
    that kind, and says which file and how to go on.
    """
    with (
        pytest.raises(OSError, match="No space left") as caught,
        AnswerFile(Path("/dev/full"), {}) as file,
    ):
        file.append({"id": "a"})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"
    assert "the same command goes on behind the last answer" in str(caught.value)
    assert FAILURES[failure_of(caught.value)].code == CANNOT_WRITE


def test_keys_of_a_line_do_not_replace_those_of_the_answer():
    from infer.request import Completion

    line = PromptLine(1, "a", "b", SamplingConfig(), {"text": "old", "label": 2})
    found = answer_of(line, Completion("a", text="new"))
    assert found["text"] == "new" and found["label"] == 2


def test_a_recorded_line_tells_how_much_came_again(tmp_path):
    recorded = {"prompt_tokens": [3, 4], "tokens": [5, 6, 7], "stop_token_ids": [9], "id": "x"}
    (line,) = lines_of(tmp_path, recorded)
    assert line.prompt == (3, 4) and line.sampling.stop_token_ids == (9,) and not line.rest
    for tokens, same in (([5, 6, 7], 3), ([5, 8, 7], 1), ([5, 6], 2), ([5, 6, 7, 8], 3)):
        told = answer_of(line, Completion("x", tokens=tokens))
        assert (told["same_tokens"], told["recorded_tokens"]) == (same, 3)
    # beside a prompt these words are whatever the line means by them
    (other,) = lines_of(tmp_path, {"prompt": "a", "tokens": "b"})
    assert other.rest == {"tokens": "b"} and other.expected is None
