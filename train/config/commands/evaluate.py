"""Settings of launch.evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.attention.config.base import AttentionConfig
from train.config.commands.devices import DevicesConfig, devices_problems
from train.config.commands.source import (
    InferenceRouterConfig,
    Weights,
    problems_of_average,
    problems_of_source,
    problems_of_weights,
)
from train.config.training import ParallelConfig, problems_of_checkpoint


@dataclass(frozen=True)
class EvaluateConfig:
    run: str | None = None
    runs: tuple[str, ...] = ()
    """Runs, or checkpoints as RUN/checkpoints/step-..., of a table; run=[...] fills it."""
    path: str | None = None
    """Instead of a run: a folder as the Hub has it."""
    text: str | None = None
    """A text file to evaluate on instead of the run's held-out text."""
    seq_len: int | None = None
    """Tokens of a row of `text`. None: as the run was trained, or up to 2048 for a folder."""
    launch: DevicesConfig = field(default_factory=DevicesConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig | None = None
    """Attention to use instead of the trained one; None: as trained."""
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250. A list or all: a table, which `checkpoints` holds."""
    checkpoints: tuple[str, ...] = ()
    """What checkpoint=[...] and checkpoint=all fill."""
    average: int = 1
    """The mean of so many checkpoints of the run, up to the one that `checkpoint` names."""
    weights: Weights = "native"
    """int8, fp8: with the experts that launch.quantize has made for the run. ema: the moving
    average of the weights, of a run with optim.ema_decay.
    """
    batch_size: int = 8
    max_sequences: int | None = None
    budgets: tuple[float, ...] = ()
    """Budgets of a table, each calibrated and measured; none: one evaluation. router.budget=[...]
    fills it.
    """
    save_budgets: bool = False
    """Keep the table in RUN/budgets, from where launch.generate takes a budget without
    calibrating.
    """
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness instead of held-out text (pip install -r
    requirements-tasks.txt).
    """
    tasks_path: str = "bench/tasks"
    """A folder with tasks in the harness's form. Its own tasks are known besides, and fetch their
    data from the Hub.
    """
    max_documents: int | None = None
    """Documents of a task; None: all of them."""

    def _task_problems(self) -> list[str]:
        if not self.tasks:
            return []
        given = {
            "text": self.text,
            "seq_len": self.seq_len,
            "max_sequences": self.max_sequences,
            "router.budget=[...]": self.budgets or None,
            "a list of runs or checkpoints": self.runs or self.checkpoints or None,
        }
        found = [
            f"tasks are asked of one model and bring their own documents; drop {name}"
            for name, value in given.items()
            if value is not None
        ]
        if self.router.budget is not None and self.launch.num_devices > 1:
            found.append("router.budget is calibrated in one process; set launch.num_devices=1")
        if self.max_documents is not None and self.max_documents < 1:
            found.append(f"max_documents is {self.max_documents}; it must be at least 1, or null")
        return found

    def problems(self) -> list[str]:
        found = problems_of_source(self.run, self.path, self.router) + self.router.problems()
        found += self._task_problems()
        found += [
            problem
            for name in self.checkpoints or (self.checkpoint,)
            if self.checkpoints != ("all",)
            for problem in problems_of_checkpoint("checkpoint", name)
        ]
        if self.path is not None and (self.runs or self.checkpoints):
            found.append("path=DIR is one folder of weights; it has no checkpoints to choose from")
        if self.budgets and (self.runs or self.checkpoints):
            found.append(
                "a list of budgets is measured of one checkpoint; name one run and one checkpoint"
            )
        is_folder = self.path is not None and self.run is None
        if is_folder and self.text is None and not self.tasks:
            found.append("path=DIR has no held-out text; give text=FILE, or tasks=[...]")
        if self.seq_len is not None and self.text is None:
            found.append(f"seq_len={self.seq_len} cuts the rows of text=FILE, which is not given")
        if self.budgets and (self.path is not None or self.text is not None):
            found.append(
                "a list of budgets is measured on the held-out text of run=RUN; drop path and text"
            )
        found += [
            f"{name} is {value}; it must be at least 1"
            for name, value in (
                ("batch_size", self.batch_size),
                ("max_sequences", self.max_sequences),
                ("seq_len", self.seq_len),
            )
            if value is not None and value < 1
        ]
        found += [
            f"router.budget has {budget:g} in its list; budgets must be positive"
            for budget in self.budgets
            if budget <= 0
        ]
        found += devices_problems(self.launch, self.parallel, self.router, self.path)
        if self.text is not None and self.launch.num_devices > 1:
            found.append("text=FILE is evaluated in one process; set launch.num_devices=1")
        if self.budgets and self.launch.num_devices > 1:
            found.append("a list of budgets is measured in one process; set launch.num_devices=1")
        if len(set(self.budgets)) < len(self.budgets):
            found.append("router.budget has a budget twice in its list; name each once")
        found += problems_of_average(self.average, self.path, self.weights)
        found += problems_of_weights(self.weights, self.path, self.launch.num_devices)
        if self.save_budgets and (self.average > 1 or self.weights != "native"):
            found.append(
                "save_budgets=true keeps the table of a checkpoint's own weights, and "
                f"average={self.average} weights={self.weights} are others; drop one of them"
            )
        if self.save_budgets and not self.budgets:
            found.append("save_budgets=true needs a list of budgets: router.budget=[1,1.5,2]")
        if self.budgets and (self.router.budget or self.router.top_k) is not None:
            found.append("a list of budgets does not combine with router.budget or router.top_k")
        return found
