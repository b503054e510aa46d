"""Answering a file: from its lines to requests of the engine, and from completions to answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.config import SamplingConfig
from launch.prompts.answers import AnswerFile
from launch.prompts.lines import BadLine, PromptLine, read_prompts

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.request import Completion, Request

NUM_SHOWN = 20
"""Bad lines that are named; the others are counted."""
PROGRESS_SECONDS = 5.0


@dataclass
class Tally:
    """What has become of the lines."""

    answered: int = 0
    skipped: int = 0
    """Answered by an earlier start."""
    bad_lines: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    ended: int = 0
    """By the token that ends a document, or by a stop string."""
    cut: int = 0
    """By max_new_tokens or the model's max_seq_len."""
    failed: int = 0
    """By logits that are not finite."""
    replayed: int = 0
    """Whose recorded tokens stood beside the prompt."""
    same: int = 0
    """Of which all tokens came again."""


def answer_file(
    engine: Engine,
    source: Path,
    output: AnswerFile,
    sampling: SamplingConfig,
    to_request: Callable[[PromptLine], Request],
    share: tuple[int, int] = (0, 1),
) -> Tally:
    """Answer every line of `source` that has no answer yet. to_request may raise ValueError, which
    makes the line a bad one. share: (rank, ranks); the lines are dealt out in turn.

    Raises:
        OSError: an answer could not be written.
    """
    tally, lines = Tally(), dict[str, PromptLine]()

    def bad(number: int, problem: str) -> None:
        tally.bad_lines += 1
        if tally.bad_lines <= NUM_SHOWN:
            print(f"{source}:{number}: {problem}; skipped", file=sys.stderr, flush=True)

    def asked() -> Iterator[Request]:
        for i, line in enumerate(read_prompts(source, sampling)):
            if i % share[1] != share[0]:
                continue
            if isinstance(line, BadLine):
                bad(line.number, line.problem)
                continue
            if line.name in output.done:
                tally.skipped += 1
                continue
            try:
                request = to_request(line)
                problem = engine.problem(request)
            except ValueError as error:
                problem = str(error)
            if problem is not None:
                bad(line.number, problem)
                continue
            lines[line.name] = line
            yield request

    begin = shown = time.monotonic()
    for completion in engine.run(asked()):
        if engine.utility is not None and (told := engine.utility.take_line()) is not None:
            print(told, file=sys.stderr, flush=True)
        line = lines.pop(completion.name)
        answer = answer_of(line, completion)
        if engine.limit is not None:
            answer["max_active_experts"] = engine.limit
        output.append(answer)
        _count(tally, completion)
        if line.expected is not None:
            tally.replayed += 1
            tally.same += tuple(completion.tokens) == line.expected
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS:
            shown = now
            rate = tally.generated_tokens / (now - begin)
            print(
                f"{tally.answered} answered, {len(lines)} under way or waiting, "
                f"{tally.bad_lines} bad lines, {rate:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    if tally.bad_lines > NUM_SHOWN:
        print(f"{tally.bad_lines - NUM_SHOWN} more bad lines", file=sys.stderr, flush=True)
    return tally


def answer_of(line: PromptLine, completion: Completion) -> dict[str, Any]:
    """One line of the output. Of a recorded request, how many of its tokens came again before the
    first other one, and of how many.
    """
    replay: dict[str, Any] = {}
    if line.expected is not None:
        pairs = zip(line.expected, completion.tokens, strict=False)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        same = min(len(line.expected), len(completion.tokens)) if alike is None else alike
        replay = {"same_tokens": same, "recorded_tokens": len(line.expected)}
    return {
        "id": line.name,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.num_prompt_tokens,
        "generated_tokens": len(completion.tokens),
        "log_probability": sum(completion.log_probabilities),
        "experts_per_token": completion.experts_per_token,
        **replay,
        **{key: value for key, value in line.rest.items() if key not in _ANSWER},
    }


_ANSWER = (
    "text",
    "finish_reason",
    "prompt_tokens",
    "generated_tokens",
    "log_probability",
    "experts_per_token",
    "same_tokens",
    "recorded_tokens",
)
"""Keys of an answer that a key of the line does not replace."""


def _count(tally: Tally, completion: Completion) -> None:
    tally.answered += 1
    tally.prompt_tokens += completion.num_prompt_tokens
    tally.generated_tokens += len(completion.tokens)
    tally.reused_tokens += completion.num_reused_tokens
    tally.preemptions += completion.num_preemptions
    tally.ended += completion.finish_reason in ("end", "stop")
    tally.cut += completion.finish_reason == "length"
    tally.failed += completion.finish_reason == "error"
