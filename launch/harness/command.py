"""launch.evaluate tasks=[...]: what it needs, and its table."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.process.identity import ROOT
from train.files.strict_json import dumps

if TYPE_CHECKING:
    from model.transformer import Transformer
    from train.config.commands.evaluate import EvaluateConfig
    from train.trained.ranks import Place

NAMED = 8
"""Tasks of a folder that a message names."""


def require_harness() -> None:
    """
    Raises:
        ValueError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks=[...] needs lm-evaluation-harness, which is not installed: "
            "pip install -r requirements-tasks.txt"
        )


def evaluate_tasks(
    settings: EvaluateConfig, model: Transformer, tokens: Any, place: Place, label: str
) -> dict[str, Any]:
    """Ask the tasks on all ranks; rank 0 prints the harness's table and returns its results, others
    {}. Collective.

    tokens: with `tokenizer()` and `end_of_document`.

    Raises:
        ValueError: there is no such task, or its data cannot be had.
    """
    from train.data.tokenizer import TextStream
    from train.trained.scoring import Scorer

    tokenizer = tokens.tokenizer()
    end = max(0, tokens.end_of_document)
    scorer = Scorer(
        model, place, lambda prompt: TextStream(tokenizer, prompt), end, settings.batch_size
    )
    if place.rank:
        scorer.serve()
        return {}
    try:
        return _asked(settings, scorer, tokenizer)
    finally:
        scorer.ended()


def _asked(settings: EvaluateConfig, scorer: Any, tokenizer: Any) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from launch.harness.model import Loadstone

    folder = Path(settings.tasks_path).expanduser()
    folder = (folder if folder.is_dir() else ROOT / folder).resolve()
    own = str(folder) if folder.is_dir() else None
    manager = TaskManager(include_path=own)
    known = manager.all_tasks
    if missing := [name for name in settings.tasks if name not in known]:
        there = sorted(path.stem for path in folder.glob("*.yaml")) if own else []
        raise ValueError(
            f"no task is called {', '.join(missing)}; {folder} has "
            f"{', '.join(there[:NAMED]) or 'none'}, and the harness its own (lm_eval ls tasks)"
        )
    here = Path.cwd()
    try:
        os.chdir(folder if own else here)  # paths of data in a task are beside it
        found = evaluator.simple_evaluate(
            model=Loadstone(scorer, tokenizer),
            tasks=list(settings.tasks),
            task_manager=manager,
            limit=settings.max_documents,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:
        raise ValueError(
            f"the data of {', '.join(settings.tasks)} cannot be had ({type(error).__name__}: "
            f"{str(error)[:200]}); tasks of the harness fetch theirs from the Hub, those of "
            "tasks_path=bench/tasks need no network"
        ) from error
    finally:
        os.chdir(here)
    print(make_table(found))
    numbers = {task: _numbers(values) for task, values in found["results"].items()}
    samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    return {"tasks": numbers, "documents": samples}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """acc,none -> acc; what is no number is left out."""
    found = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name.removesuffix(",none")] = float(value)
    dumps(found)  # a number that JSON cannot hold ends here
    return found
