"""Settings of launch.serve."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infer.config import EngineConfig, SamplingConfig
from model.attention.config.base import AttentionConfig
from train.config.commands.devices import DevicesConfig, devices_problems
from train.config.commands.pilot import (
    AttentionAuditConfig,
    CanaryConfig,
    DriftConfig,
    ShadowConfig,
)
from train.config.commands.source import (
    InferenceRouterConfig,
    Weights,
    problems_of_drafts,
    problems_of_graphs,
    problems_of_limit,
    problems_of_source,
    problems_of_weights,
)
from train.config.training import ParallelConfig, problems_of_checkpoint


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
        found += devices_problems(self.launch, self.parallel, self.router, self.path)
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
        found += problems_of_drafts(self.engine, self.path, self.router, self.attention)
        found += problems_of_limit(self.engine, self.launch.num_devices)
        found += problems_of_graphs(
            self.engine.cuda_graphs, "engine.cuda_graphs", self.parallel.expert_parallel_size
        )
        if self.engine.draft_budget is not None and self.serve.budget is not None:
            found.append(
                "serve.budget=auto holds a latency that was measured of single tokens, and "
                "engine.draft_budget delivers several at a time; drop one of them"
            )
        if self.serve.drift.sample_one_in and self.path is not None:
            found.append("serve.drift compares with the training of a run; give run=RUN")
        found += [f"engine.{problem}" for problem in self.engine.problems()]
        return found
