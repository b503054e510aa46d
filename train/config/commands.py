"""Settings of the commands that use a trained run."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infer.config import EngineConfig, SamplingConfig
from model.attention.config import AttentionConfig
from model.config import ModelConfig
from ops.device import known_devices, link_rates, memory_gib
from ops.grouped_mlp.spec import Stored
from train.config.training import ParallelConfig, problems_of_checkpoint

NODE_SIZE = 8
"""Devices of a node, where layouts are searched for."""


@dataclass(frozen=True)
class InferenceRouterConfig:
    """What a trained router can be asked to do differently."""

    budget: float | None = None
    """Mean experts per token; None: as trained. The routers are calibrated to it on training text
    first.
    """
    top_k: int | None = None
    """Every token visits so many experts, those of its highest scores, by fixed top-k; None: as
    trained.
    """

    def problems(self) -> list[str]:
        if self.budget is not None and self.budget <= 0:
            return [
                f"router.budget is {self.budget}; it must be positive, or null for the budget of "
                "the training"
            ]
        if self.top_k is not None and self.budget is not None:
            return ["router.budget and router.top_k are two ways to choose; drop one"]
        if self.top_k is not None and self.top_k < 1:
            return [f"router.top_k is {self.top_k}; it must be at least 1"]
        return []


Weights = Literal["native", "int8", "fp8", "ema"]
"""native: as they were saved. int8, fp8: experts of 8 bits, made by launch.quantize. ema: their
moving average (optim.ema_decay).
"""


def problems_of_weights(weights: Weights, path: str | None, num_devices: int = 1) -> list[str]:
    """Of the experts that launch.quantize has made, and of the average that training kept."""
    if weights == "native":
        return []
    if weights == "ema":
        return [] if path is None else ["weights=ema is kept by a run; give run=RUN"]
    found = []
    if path is not None:
        found.append(f"weights={weights} is made for a run by launch.quantize; give run=RUN")
    if num_devices > 1:
        found.append(f"weights={weights} is for one process; set launch.num_devices=1")
    return found


def problems_of_drafts(
    engine: EngineConfig, path: str | None, router: InferenceRouterConfig
) -> list[str]:
    """Where drafts cannot be made: their budget is one of those saved for a run."""
    if engine.draft_budget is None or (path is None and router.top_k is None):
        return []
    other = "path" if path is not None else "router.top_k"
    return [f"engine.draft_budget is a saved budget of a run; drop it, or drop {other}"]


def problems_of_limit(engine: EngineConfig, num_devices: int) -> list[str]:
    """Where the experts of a step cannot be limited: ranks would have to choose them together."""
    if engine.max_active_experts is None or num_devices == 1:
        return []
    return [
        f"engine.max_active_experts with launch.num_devices={num_devices}: it is of one process; "
        "drop one of them"
    ]


def problems_of_average(average: int, path: str | None, weights: Weights = "native") -> list[str]:
    """Of the mean of a run's last checkpoints."""
    if average == 1:
        return []
    if average < 1:
        return [f"average is {average}; it is a number of checkpoints, at least 1"]
    if path is not None:
        return [f"average={average} is of a run's checkpoints, and path=DIR has none; give run=RUN"]
    if weights != "native":
        return [
            f"average={average} and weights={weights} are two kinds of weights; drop one of them"
        ]
    return []


def problems_of_source(
    run: str | None, path: str | None, router: InferenceRouterConfig
) -> list[str]:
    """Of the two places that a model may come from."""
    if (run is None) == (path is None):
        both = "run and path are both set; drop one" if run else "give"
        return [f"{both}: run=RUN of launch.train, or path=DIR with published weights"]
    if path is not None and router.budget is not None:
        return [
            "router.budget is calibrated on the training text of a run, which path=DIR does not "
            "have; give router.top_k"
        ]
    return []


@dataclass(frozen=True)
class PrepareConfig:
    """How data are prepared."""

    workers: int | None = None
    """Processes that tokenise; null: one for every core that the command may use. The tokens do not
    depend on it.
    """

    def problems(self) -> list[str]:
        if self.workers is not None and not 1 <= self.workers <= 1024:
            return [f"prepare.workers is {self.workers}; it must be between 1 and 1024, or null"]
        return []


@dataclass(frozen=True)
class PrepareCommandConfig:
    """What launch.prepare does; what the data are stands under data."""

    inspect: bool = False
    """Only say what is in the sources, and what the tokenizer does to it."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def problems(self) -> list[str]:
        return self.prepare.problems()


@dataclass(frozen=True)
class TeachCommandConfig:
    """What launch.teach writes; the rows are those of the run whose settings it is given."""

    to: str
    """The folder to write."""
    num_ids: int = 32
    """Likeliest tokens that are kept one by one; all others are kept together."""

    def problems(self) -> list[str]:
        if self.num_ids < 1:
            return [f"num_ids is {self.num_ids}; it must be at least 1"]
        return []


@dataclass(frozen=True)
class PlanCommandConfig:
    """What launch.plan is asked beside the config of a run."""

    device: str | None = None
    """What the run is planned for: H100, H200, B200, ... None: the devices of this machine."""
    mfu: float = 0.3
    """Share of the devices' peak that the time is worked out with; perf/mfu of a run says it."""
    price: float | None = None
    """Of a device and hour, in any currency; None: no cost."""
    world: int | None = None
    """With parallel=auto: the number of devices that layouts are searched for, in nodes of eight.
    """

    def search_problems(self, searches: bool) -> list[str]:
        """searches: parallel=auto leaves the sizes of groups to a search."""
        if not searches and self.world is None:
            return []
        found = []
        if not searches or self.world is None or self.device is None:
            found.append(
                "layouts are searched for with parallel=auto world=N device=H100 (or another) "
                f"together; world is {self.world}, device {self.device} and parallel="
                + ("auto" if searches else "one of given sizes")
            )
        if self.world is not None and (
            self.world < 1 or (self.world > NODE_SIZE and self.world % NODE_SIZE)
        ):
            found.append(
                f"world is {self.world}; it must be at least 1, and above {NODE_SIZE} whole nodes "
                f"of {NODE_SIZE}"
            )
        if self.device is not None and link_rates(self.device) is None:
            found.append(
                f"device is {self.device}, of whose links nothing is known; layouts are searched "
                "for A100, H100, H200, B200"
            )
        return found

    def problems(self) -> list[str]:
        found = []
        if self.device is not None and memory_gib(self.device) is None:
            found.append(
                f"device is {self.device!r}; choose one of {', '.join(known_devices())}, or null "
                "for those of this machine"
            )
        if not 0 < self.mfu <= 1:
            found.append(f"mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1")
        if self.price is not None and self.price < 0:
            found.append(f"price is {self.price}; it must not be negative")
        return found


@dataclass(frozen=True)
class DevicesConfig:
    """Of a command that reads a run."""

    num_devices: int = 1
    """Processes on this machine, one a device; each has a share of the rows or prompts."""


def _devices_problems(
    launch: DevicesConfig,
    parallel: ParallelConfig,
    router: InferenceRouterConfig,
    path: str | None,
) -> list[str]:
    found = parallel.problems()
    number, size = launch.num_devices, parallel.expert_parallel_size
    if number < 1:
        found.append(f"launch.num_devices is {number}; it must be at least 1")
    elif size >= 1 and number % size:
        found.append(
            f"launch.num_devices {number} is not divisible by parallel.expert_parallel_size {size}"
        )
    alone = {
        "ranks_per_node": None,
        "placement": None,
        "context_parallel_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "pipeline_split": None,
        "overlap_experts": False,
    }
    for name, default in alone.items():
        if getattr(parallel, name) != default:
            found.append(f"parallel.{name} is of training alone; leave it out here")
    if number > 1 and path is not None:
        found.append(
            "path=DIR is read in one process; with several devices give run=RUN, or set "
            "launch.num_devices=1"
        )
    if number > 1 and router.budget is not None:
        found.append(
            "router.budget is calibrated in one process; with several devices leave it out, or set "
            "launch.num_devices=1"
        )
    return found


def require_even_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ValueError where the experts of a run cannot be spread as asked."""
    if model.num_experts % parallel.expert_parallel_size:
        raise ValueError(
            f"the run has {model.num_experts} experts, which parallel.expert_parallel_size "
            f"{parallel.expert_parallel_size} does not divide"
        )


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
        if self.path is not None and self.text is None and not self.tasks:
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
        found += _devices_problems(self.launch, self.parallel, self.router, self.path)
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


@dataclass(frozen=True)
class ExportConfig:
    run: str
    to: str
    """The folder to write; it must not exist."""
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """fp8: the linear layers as compressed-tensors' FP8_DYNAMIC, all else as bf16. Selection biases
    of routers stay fp32.
    """
    max_shard_size: float = 5.0
    """GB of a file; a larger tensor gets a file of its own."""
    verify: bool = True
    """Load the folder with transformers and compare logits of held-out text."""
    adapter: bool = False
    """Write the adapters of a run with lora.rank alone, as peft reads them, and not the weights
    with the adapters added.
    """
    average: int = 1
    """The mean of so many checkpoints of the run, up to the one that `checkpoint` names."""
    weights: Literal["native", "ema"] = "native"
    """ema: the moving average of the weights, of a run with optim.ema_decay."""

    def problems(self) -> list[str]:
        found = self.router.problems()
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        if self.router.budget is not None:
            found.append("router.budget has no place in config.json; give router.top_k")
        found += problems_of_average(self.average, None, self.weights)
        if self.adapter and (self.average > 1 or self.weights != "native"):
            found.append(
                f"adapter=true with average={self.average} weights={self.weights}: an average of A "
                "and one of B make another product; leave adapter=true out, and the weights are "
                "written with adapters added"
            )
        if self.adapter and self.dtype == "fp8":
            found.append("dtype=fp8 is of whole weights; give adapter=true a dtype of bf16")
        if self.max_shard_size <= 0:
            found.append(f"max_shard_size is {self.max_shard_size}; give GB, more than 0")
        return found


@dataclass(frozen=True)
class BranchConfig:
    run: str
    to: str
    """The run directory to make; it must not exist."""
    decay_steps: int
    """Steps of the decay, which ends the branch."""
    checkpoint: str = "latest"
    """best, latest, or a name: step-00000250. The learning rate must be constant there."""
    decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Form of the decay (optim.wsd_decay_style)."""
    min_lr: float | None = None
    """The learning rate at the end; None: optim.min_lr of the run."""

    def problems(self) -> list[str]:
        found = problems_of_checkpoint("checkpoint", self.checkpoint)
        if self.decay_steps < 1:
            found.append(f"decay_steps is {self.decay_steps}; it must be at least 1")
        return found


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
        found += _devices_problems(self.launch, self.parallel, self.router, self.path)
        if self.launch.num_devices > 1 and self.input is None:
            found.append(
                f"launch.num_devices is {self.launch.num_devices}, but one prompt is generated in "
                "one process; give input=FILE output=FILE"
            )
        if self.prompt == "":
            found.append("prompt is empty; give some text")
        found += problems_of_drafts(self.engine, self.path, self.router)
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


@dataclass(frozen=True)
class CanaryConfig:
    """A budget that is tried on some of the requests."""

    budget: float | None = None
    """One of the saved ones; null: no canary."""
    share: float = 0.05
    """Of the requests that fix no budget themselves."""

    def problems(self) -> list[str]:
        if not 0 < self.share < 1:
            return [f"serve.canary.share is {self.share}; it must be between 0 and 1"]
        return []


@dataclass(frozen=True)
class DriftConfig:
    """Whether experts are used as in training: a request in so many tells where its tokens went."""

    sample_one_in: int = 0
    """Requests; 0: off. The prompt of such a request is computed anew."""
    window_tokens: int = 10_000
    """That a comparison is made of."""
    limit: float = 0.1
    """Of the Jensen-Shannon divergence of a layer's loads to those of training, in nats (ln 2 at
    most), beyond which the alarm rings.
    """
    action: Literal["none", "full_budget"] = "none"
    """full_budget: until a window is below the limit, no request gets less than the trained budget
    unasked.
    """

    def problems(self) -> list[str]:
        found = [
            f"serve.drift.{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("sample_one_in", self.sample_one_in, 0),
                ("window_tokens", self.window_tokens, 100),
            )
            if value < least
        ]
        if not 0 < self.limit < 0.7:
            found.append(f"serve.drift.limit is {self.limit}; it must be between 0 and ln 2")
        return found


@dataclass(frozen=True)
class AttentionAuditConfig:
    """Whether sparse attention is near dense attention on what is served: a request in so many is
    read again when nobody asks for anything.
    """

    sample_one_in: int = 0
    """Requests; 0: off."""
    rows: int = 64
    """Tokens of a request that are compared, in every sparse layer and head."""
    limit: float = 0.3
    """Of the relative error of a layer's output, beyond which the alarm rings."""
    action: Literal["none", "lift_top_k"] = "none"
    """lift_top_k: attention selects more blocks, as many as the last audits needed to stay below
    the limit.
    """
    max_top_k: int | None = None
    """That it may select; None: four times those of the model."""

    def problems(self) -> list[str]:
        found = [
            f"serve.attention_audit.{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("sample_one_in", self.sample_one_in, 0),
                ("rows", self.rows, 1),
                ("max_top_k", self.max_top_k, 1),
            )
            if value is not None and value < least
        ]
        if not 0 < self.limit < 1:
            found.append(f"serve.attention_audit.limit is {self.limit}; it must be between 0 and 1")
        if not self.sample_one_in and (self.action != "none" or self.max_top_k is not None):
            found.append(
                "serve.attention_audit has an action and looks at no request; give "
                "serve.attention_audit.sample_one_in=256"
            )
        elif self.action == "none" and self.max_top_k is not None:
            found.append(
                "serve.attention_audit.max_top_k is of action=lift_top_k; add that, or drop it"
            )
        return found


@dataclass(frozen=True)
class ShadowConfig:
    """What the largest saved budget and dense attention would have said of what was served: a
    request in so many is read again when nobody asks for anything.
    """

    sample_one_in: int = 0
    """Requests; 0: off."""

    def problems(self) -> list[str]:
        if self.sample_one_in < 0:
            return [f"serve.shadow.sample_one_in is {self.sample_one_in}; it must be at least 0"]
        return []


@dataclass(frozen=True)
class EndpointConfig:
    """Where answers are given, and to whom."""

    host: str = "127.0.0.1"
    """The address to listen on. Any but this machine's own needs a token."""
    port: int = 8000
    """0: a free one, which is printed."""
    model_name: str | None = None
    """What clients call the model; None: the name of its folder."""
    max_waiting: int = 256
    """Requests that may wait for a slot; one more is answered with 429 and Retry-After."""
    drain_seconds: int = 60
    """After SIGTERM, until requests that have not ended are given up."""
    budget: Literal["auto"] | None = None
    """auto: requests that fix no budget get the largest saved one that holds itl_ms. None: all get
    the one of router.budget.
    """
    itl_ms: float = 40.0
    """With budget=auto: 95% of the times between two tokens are to stay below."""
    budget_min: float | None = None
    """With budget=auto: the least that a request gets unasked; None: the least saved one."""
    latency: str | None = None
    """With budget=auto: the file that launch.benchmark output=FILE has written on this device, for
    these budgets.
    """
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    attention_audit: AttentionAuditConfig = field(default_factory=AttentionAuditConfig)
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    record: str | None = None
    """A file to which prompts, seeds, budgets and generated tokens are appended, for
    launch.generate input=FILE; None: nothing is kept.
    """

    @property
    def looks_again(self) -> dict[str, int]:
        """One of how many requests is looked at again when nobody asks, by setting; 0: none."""
        return {
            "serve.attention_audit": self.attention_audit.sample_one_in,
            "serve.shadow": self.shadow.sample_one_in,
        }

    def problems(self) -> list[str]:
        found = []
        if not self.host or any(c.isspace() or c in "/[]@" for c in self.host):
            found.append(f"serve.host is {self.host!r}; give an address, such as 127.0.0.1 or ::1")
        if not 0 <= self.port < 2**16:
            found.append(f"serve.port is {self.port}; it must be between 0 and 65535")
        if self.model_name == "":
            found.append("serve.model_name is empty; give a name, or null for the folder's")
        found += [
            f"serve.{name} is {value}; it must be at least 0"
            for name, value in (
                ("max_waiting", self.max_waiting),
                ("drain_seconds", self.drain_seconds),
            )
            if value < 0
        ]
        if self.budget == "auto" and self.latency is None:
            found.append(
                "serve.budget=auto holds a latency by what was measured: give serve.latency=FILE "
                "of python -m launch.benchmark run=RUN budgets=[...] rows=[...] output=FILE"
            )
        if self.budget is None and (self.latency is not None or self.budget_min is not None):
            found.append("serve.latency and serve.budget_min are of serve.budget=auto; add it")
        if not self.itl_ms > 0:
            found.append(f"serve.itl_ms is {self.itl_ms}; it must be positive")
        if self.record is not None and not Path(self.record).absolute().parent.is_dir():
            found.append(
                f"serve.record={self.record} is in a folder that does not exist; make it first"
            )
        found += self.attention_audit.problems() + self.shadow.problems()
        return found + self.canary.problems() + self.drift.problems()

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return self.host == "localhost"


@dataclass(frozen=True)
class ServeConfig:
    run: str | None = None
    path: str | None = None
    """Instead of a run: a folder as the Hub has it."""
    weights: Weights = "native"
    """int8, fp8: with the experts that launch.quantize has made for the run. ema: the moving
    average of the weights, of a run with optim.ema_decay.
    """
    launch: DevicesConfig = field(default_factory=DevicesConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig | None = None
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    max_new_tokens: int = 512
    """Of a request that does not say how many; so the following ones."""
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What is computed at a time."""
    serve: EndpointConfig = field(default_factory=EndpointConfig)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def problems(self) -> list[str]:
        found = problems_of_source(self.run, self.path, self.router) + self.router.problems()
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        found += problems_of_weights(self.weights, self.path, self.launch.num_devices)
        found += self.sampling.problems() + self.serve.problems()
        found += _devices_problems(self.launch, self.parallel, self.router, self.path)
        if self.launch.num_devices > 1:
            found += [
                f"{name} with launch.num_devices={self.launch.num_devices}: {why}; drop one of them"
                for name, is_set, why in (
                    ("engine.draft_budget", self.engine.draft_budget, "drafting is of one process"),
                    (
                        "serve.budget=auto",
                        self.serve.budget,
                        "latencies are measured of one process",
                    ),
                    *(
                        (name, is_set or None, "requests are looked at again in one process")
                        for name, is_set in self.serve.looks_again.items()
                    ),
                )
                if is_set is not None
            ]
        if self.engine.max_active_experts is not None:
            again = {**self.serve.looks_again, "serve.record": self.serve.record}
            found += [
                f"engine.max_active_experts with {name}: a request that is made again has other "
                "neighbours and so other experts; drop one of them"
                for name, is_set in again.items()
                if is_set
            ]
        chosen = self.serve.budget is not None or self.serve.canary.budget is not None
        if chosen and (self.path is not None or self.router.top_k is not None):
            found.append(
                "serve.budget and serve.canary.budget are of the saved budgets of a run; drop "
                "them, or " + ("give run=RUN" if self.path is not None else "drop router.top_k")
            )
        found += problems_of_drafts(self.engine, self.path, self.router)
        found += problems_of_limit(self.engine, self.launch.num_devices)
        if self.engine.draft_budget is not None and self.serve.budget is not None:
            found.append(
                "serve.budget=auto holds a latency that was measured of single tokens, and "
                "engine.draft_budget delivers several at a time; drop one of them"
            )
        if self.serve.drift.sample_one_in and self.path is not None:
            found.append("serve.drift compares with the training of a run; give run=RUN")
        found += [f"engine.{problem}" for problem in self.engine.problems()]
        return found


@dataclass(frozen=True)
class SloConfig:
    """What a request must keep to count: the limits of MLPerf 5.0's interactive Llama-2-70B."""

    ttft_ms: float = 450.0
    """To the first token, waiting included."""
    tpot_ms: float = 40.0
    """Mean between its tokens."""

    def problems(self) -> list[str]:
        return [
            f"slo.{name} is {value}; it must be positive"
            for name, value in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms))
            if value <= 0
        ]


@dataclass(frozen=True)
class BenchmarkConfig:
    run: str | None = None
    path: str | None = None
    """Instead of a run: a folder as the Hub has it."""
    weights: Weights = "native"
    """int8, fp8: with the experts that launch.quantize has made for the run. ema: the moving
    average of the weights, of a run with optim.ema_decay.
    """
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    router: InferenceRouterConfig = field(default_factory=InferenceRouterConfig)
    """Of all variants; budgets are given in `budgets`."""
    budgets: tuple[float, ...] = ()
    """Of the run's saved table; none: the routers as trained."""
    attentions: tuple[str, ...] = ("trained",)
    """Names under conf/attention beside "trained"; each is measured with each budget."""
    rows: tuple[int, ...] = (1, 8)
    """Requests that arrive at once and are generated together."""
    contexts: tuple[int, ...] = (128,)
    """Tokens of their prompts."""
    new_tokens: int = 32
    """Generated by each, whatever ends a document."""
    min_rounds: int = 6
    max_rounds: int = 20
    precision: float = 0.02
    """Rounds go on until the 95% interval of every ratio to the first variant is this narrow, to
    each side, as a share.
    """
    slo: SloConfig = field(default_factory=SloConfig)
    price_per_hour: float | None = None
    """Of the device, in any currency; None: no cost is told."""
    price_per_kwh: float | None = None
    """Of energy, where the machine tells what it has used; None: its cost is not told."""
    output: str | None = None
    """A file for everything that was measured, as JSON."""

    def problems(self) -> list[str]:
        found = problems_of_source(self.run, self.path, self.router) + self.router.problems()
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        found += problems_of_weights(self.weights, self.path)
        found += self.slo.problems()
        if self.router.budget is not None:
            found.append("router.budget: give budgets=[...], which are measured beside each other")
        if self.budgets and (self.path is not None or self.router.top_k is not None):
            found.append(
                "budgets are those that launch.evaluate saved for a run; drop path and router.top_k"
            )
        for name in ("budgets", "attentions", "rows", "contexts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                found.append(f"{name} has a value twice; name each once")
            if not values and name != "budgets":
                found.append(f"{name} is empty; give at least one")
        found += [
            f"{name} has {value}; it must be at least 1"
            for name, values in (("rows", self.rows), ("contexts", self.contexts))
            for value in values
            if value < 1
        ]
        if self.new_tokens < 2:
            found.append(f"new_tokens is {self.new_tokens}; time between tokens needs at least 2")
        if not 6 <= self.min_rounds <= self.max_rounds:
            found.append(
                f"min_rounds is {self.min_rounds} and max_rounds {self.max_rounds}; an interval of "
                "95% needs 6, and max_rounds must be as many at least"
            )
        if not 0 < self.precision < 1:
            found.append(f"precision is {self.precision}; it must be between 0 and 1")
        found += [
            f"{name} is {price}; it must be positive, or null"
            for name, price in (
                ("price_per_hour", self.price_per_hour),
                ("price_per_kwh", self.price_per_kwh),
            )
            if price is not None and price <= 0
        ]
        if self.output is not None and not Path(self.output).absolute().parent.is_dir():
            found.append(f"output={self.output} is in a folder that does not exist; make it first")
        return found


@dataclass(frozen=True)
class QuantizeConfig:
    run: str
    weights: Stored = "int8"
    """What the experts' weights become; all others stay as they are."""
    checkpoint: str = "best"
    """best, latest, or a name: step-00000250."""
    batch_size: int = 8
    max_sequences: int | None = None
    """Held-out rows that are measured; None: all."""
    max_loss_increase: float = 0.01
    """Nats per token. Nothing is written where the upper end of the 95% interval lies above."""

    def problems(self) -> list[str]:
        found = [
            f"{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("batch_size", self.batch_size, 1),
                ("max_sequences", self.max_sequences, 2),
            )
            if value is not None and value < least
        ]
        found += problems_of_checkpoint("checkpoint", self.checkpoint)
        if self.max_loss_increase <= 0:
            found.append(f"max_loss_increase is {self.max_loss_increase}; it must be positive")
        return found


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
