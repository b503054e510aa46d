"""Settings of launch.generate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from infer.config import EngineConfig, SamplingConfig
from model.attention.config.base import AttentionConfig
from train.config.commands.devices import DevicesConfig, devices_problems
from train.config.commands.source import (
    InferenceRouterConfig,
    Weights,
    problems_of_average,
    problems_of_drafts,
    problems_of_graphs,
    problems_of_limit,
    problems_of_source,
    problems_of_weights,
)
from train.config.training import ParallelConfig, problems_of_checkpoint


@dataclass(frozen=True)
class GenerateConfig:
    run: str | None = None
    path: str | None = None
    """Instead of a run: a folder as the Hub has it."""
    weights: Weights = "native"
    """int8, fp8: with the experts that launch.quantize has made for the run. ema: the moving
    average of the weights, of a run with optim.ema_decay.
    """
    average: int = 1
    """The mean of so many checkpoints of the run, up to the one that `checkpoint` names."""
    prompt: str | None = None
    """Text to continue."""
    input: str | None = None
    """A file of prompts instead, one JSON object a line, and `output` the file of its answers."""
    output: str | None = None
    launch: DevicesConfig = field(default_factory=DevicesConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig | None = None
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: always the most likely token."""
    top_p: float = 0.95
    top_k: int | None = None
    """Tokens are drawn from the top_k most likely ones; None: from all. router.top_k is about
    experts.
    """
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end a text, which then ends before them."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What is computed at a time, for the prompts of a file."""

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
        )

    def problems(self) -> list[str]:
        found = problems_of_source(self.run, self.path, self.router) + self.router.problems()
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        found += problems_of_weights(self.weights, self.path, self.launch.num_devices)
        found += problems_of_average(self.average, self.path, self.weights)
        found += self.sampling.problems()
        found += [f"engine.{problem}" for problem in self.engine.problems()]
        found += devices_problems(self.launch, self.parallel, self.router, self.path)
        if self.launch.num_devices > 1 and self.input is None:
            found.append(
                f"launch.num_devices is {self.launch.num_devices}, but one prompt is generated in "
                "one process; give input=FILE output=FILE"
            )
        if self.prompt == "":
            found.append("prompt is empty; give some text")
        found += problems_of_drafts(self.engine, self.path, self.router, self.attention)
        found += problems_of_limit(self.engine, self.launch.num_devices)
        if self.engine.draft_budget is not None and self.input is None:
            found.append(
                "engine.draft_budget is for the prompts of a file, whose speed is measured; give "
                "input=FILE output=FILE, or drop it"
            )
        if self.engine.max_active_experts is not None and self.input is None:
            found.append(
                "engine.max_active_experts is for requests that are decoded together; give "
                "input=FILE output=FILE, or drop it"
            )
        asked, size = self.engine.cuda_graphs, self.parallel.expert_parallel_size
        found += problems_of_graphs(asked, "engine.cuda_graphs", size)
        if asked is True and self.input is None:
            found.append(
                "engine.cuda_graphs=true is for requests that are decoded together; give "
                "input=FILE output=FILE, or drop it"
            )
        if self.engine.draft_budget is not None and self.launch.num_devices > 1:
            found.append(
                f"engine.draft_budget with launch.num_devices={self.launch.num_devices}: drafting "
                "is of one process; drop one of them"
            )
        if self.prompt is not None and self.input is not None:
            found.append("prompt and input are two ways to give prompts; drop one")
        if (self.input is None) != (self.output is None):
            found.append("input and output belong together; give both, or prompt alone")
        if self.input is not None and not Path(self.input).is_file():
            found.append(f"input={self.input} does not exist; give a file of prompts")
        if self.output is not None and not Path(self.output).absolute().parent.is_dir():
            found.append(f"output={self.output} is in a folder that does not exist; make it first")
        if self.input is not None and self.output is not None and _same(self.input, self.output):
            found.append(f"output={self.output} is the input; give another file")
        return found


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
