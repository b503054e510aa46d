"""Continue a prompt, or all prompts of a file.

python -m launch.generate run=RUN|path=DIR prompt="..." [temperature= top_p= top_k= seed=
max_new_tokens= stop= router.budget=]
python -m launch.generate run=RUN|path=DIR input=prompts.jsonl output=out.jsonl
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.generate")

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from launch.command.arguments import replaced
from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import record, require_given
from launch.process.identity import is_worker
from launch.process.ranks import run_on_ranks
from launch.saved.opened import checkpoint_name, opened, saved_budgets
from launch.saved.run import load_run

if TYPE_CHECKING:
    from infer.request import Request
    from launch.prompts.lines import PromptLine
    from train.config.commands.generate import GenerateConfig


def sample(
    run_dir: str | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    checkpoint: str = "best",
    budget: float | None = None,
    attention: Any = None,
    top_k: int | None = None,
    path: str | None = None,
    sampling: Any = None,
    weights: str = "native",
    average: int = 1,
) -> Iterator[str]:
    """Yield the prompt and then the text as it is generated, piece by piece, from one process.
    Joined it is what all tokens decode to: a piece may be empty, while a character or a run of
    bytes is unfinished. top_k: of the router; sampling: a SamplingConfig instead of the numbers.
    """
    from infer.config import EngineConfig, SamplingConfig

    model, store, _ = opened(
        run_dir,
        checkpoint,
        budget,
        attention,
        top_k,
        path,
        weights=weights,
        average=average,
        for_text=True,
    )
    tokenizer = store.tokenizer()

    from infer.engine import Engine
    from infer.request import Request
    from train.data.tokenizer import TextStream, tokenizers_errors

    with tokenizers_errors(f"the tokenizer of {path or run_dir} cannot encode the prompt"):
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids

    yield prompt
    settings = sampling or SamplingConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    room = EngineConfig(max_slots=1, cache_tokens=len(prompt_ids) + settings.max_new_tokens)
    engine = Engine(model, room, store.end_of_document)
    engine.add(Request("0", prompt_ids, settings, TextStream(tokenizer, prompt_ids)))
    while engine.has_work:
        for event in engine.step():
            if event.completion is not None and event.completion.finish_reason == "error":
                raise ValueError(
                    "the model's logits are not finite: its weights are damaged; try "
                    "checkpoint=best or an earlier one"
                )
            yield event.piece


def _source(settings: GenerateConfig) -> dict[str, str]:
    """Where the model of a file's answers comes from."""
    if settings.run is None:
        return {"path": str(Path(str(settings.path)).expanduser().resolve())}
    return {"run": str(Path(settings.run).resolve()), "checkpoint": settings.checkpoint}


def answer(settings: GenerateConfig) -> None:
    """Answer the prompts of a file, all together."""
    settings = dataclasses.replace(
        settings, checkpoint=checkpoint_name(settings.run, settings.checkpoint)
    )
    assert settings.input is not None and settings.output is not None
    from launch.prompts.answering import Tally
    from launch.prompts.answers import AnswerFile

    # What an answer depends on: a restart under other settings would mix two kinds of texts.
    kept: dict[str, Any] = {
        **_source(settings),
        "router": dataclasses.asdict(settings.router),
        "attention": settings.attention
        and {"name": settings.attention.name, **settings.attention.arguments},
        "sampling": dataclasses.asdict(settings.sampling),
    }
    if settings.weights != "native":
        kept["weights"] = settings.weights
    if settings.average > 1:
        kept["average"] = settings.average
    if settings.engine.max_active_experts is not None:
        kept["max_active_experts"] = settings.engine.max_active_experts
    from train.trained.ranks import joined

    with contextlib.ExitStack() as stack:
        place = stack.enter_context(joined(settings.launch.num_devices, settings.parallel))
        # Rank 0 cuts off half a line before others append.
        for rank in range(place.size):
            if rank == place.rank:
                output = stack.enter_context(AnswerFile(Path(settings.output), kept))
            place.meet()
        model, store, _ = opened(
            settings.run,
            settings.checkpoint,
            settings.router.budget,
            settings.attention,
            settings.router.top_k,
            settings.path,
            place,
            settings.parallel,
            settings.weights,
            settings.average,
            for_text=True,
        )
        tokenizer = store.tokenizer()
        table, no_budgets = saved_budgets(
            settings.run,
            settings.checkpoint,
            settings.attention,
            settings.router.top_k,
            settings.weights,
            settings.average,
        )

        from infer.engine import Engine
        from infer.request import Request
        from launch.prompts.answering import answer_file
        from train.data.tokenizer import TextStream, tokenizers_errors

        def to_request(line: PromptLine) -> Request:
            if line.budget is not None and table is None:
                raise ValueError(f"has budget {line.budget:g}, and {no_budgets}")
            if isinstance(line.prompt, tuple):
                ids = list(line.prompt)
                if max(ids) >= model.config.vocab_size:
                    raise ValueError(
                        f"has the token {max(ids)}; model.vocab_size is {model.config.vocab_size}"
                    )
            else:
                with tokenizers_errors("the run's tokenizer cannot encode the prompt"):
                    ids = tokenizer.encode(line.prompt, add_special_tokens=False).ids
            stream = TextStream(tokenizer, ids)
            return Request(line.name, ids, line.sampling, stream, budget=line.budget)

        budgets = None if table is None else table.on(model.any_weight.device)
        engine = Engine(model, settings.engine, store.end_of_document, budgets=budgets)
        share = (place.rank, place.size)
        tally = answer_file(
            engine, Path(settings.input), output, settings.sampling, to_request, share
        )
        tally = Tally(*place.added(list(dataclasses.astuple(tally))))
        if place.rank:
            return
    found = dataclasses.asdict(tally)
    print(
        f"{tally.answered} answered, {tally.skipped} answered before, {tally.bad_lines} bad lines"
        f" -> {settings.output}"
    )
    if tally.replayed:
        print(f"of {tally.replayed} recorded requests {tally.same} came again token by token")
    if engine.utility is not None:
        found["speculation"] = {
            **dataclasses.asdict(engine.drafted),
            "utility": engine.utility.value,
            "on": engine.utility.is_on,
        }
    if engine.limit is not None:
        found["max_active_experts"] = {"limit": engine.limit, **dataclasses.asdict(engine.confined)}
    print_result({**_told(settings), "output": settings.output, **found})
    if tally.bad_lines and not tally.answered + tally.skipped:
        raise ValueError(f"input={settings.input} has no line that could be answered")


def _told(settings: GenerateConfig) -> dict[str, Any]:
    return {"run_dir": settings.run} if settings.path is None else {"path": settings.path}


def main(config: DictConfig) -> None:
    from train.checkpoint.folder import find_checkpoint
    from train.config.commands.devices import require_even_experts
    from train.config.commands.generate import GenerateConfig

    has_model = config.run is not None or config.path is not None
    has_prompt = config.prompt is not None or config.input is not None
    give = "give run=RUN (or path=DIR) and prompt='...', or input=FILE output=FILE"
    require_given(config, GenerateConfig, has_model and has_prompt, give)
    if config.prompt is not None:
        config.prompt = str(config.prompt)  # Hydra reads prompt=5 as a number
    settings = record(config, GenerateConfig)
    if settings.launch.num_devices > 1 and not is_worker():
        folder = find_checkpoint(Path(str(settings.run)), prefer=settings.checkpoint)
        run = load_run(str(settings.run), settings.attention, folder, settings.router.top_k)
        require_even_experts(run.model, settings.parallel)
        arguments = replaced(sys.argv[1:], "checkpoint", folder.name)
        if code := run_on_ranks(settings.launch.num_devices, "launch.generate", arguments):
            raise SystemExit(code)
        return
    if settings.input is not None:
        answer(settings)
        return
    pieces = []
    for piece in sample(
        settings.run,
        settings.prompt,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        settings.seed,
        settings.checkpoint,
        settings.router.budget,
        settings.attention,
        settings.router.top_k,
        settings.path,
        settings.sampling,
        settings.weights,
        settings.average,
    ):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    print_result({**_told(settings), "prompt": settings.prompt, "text": "".join(pieces[1:])})


if __name__ == "__main__":
    run_main("generate", main)
