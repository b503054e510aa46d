"""What Prometheus reads. Names are vLLM's with another beginning, where the meaning is the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.request import Completion, Request
    from launch.serving.ranks import EngineOverRanks
    from launch.serving.worker import Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Meters:
    """Counts what ends; what stands is looked up when it is asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"loadstone_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"loadstone_{name}", text, buckets=buckets, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.reused_tokens = counter(
            "prefix_cache_hits", "Tokens of prompts whose pages were there already."
        )
        self.preemptions = counter("num_preemptions", "Requests that lost their pages for a while.")
        self.requests = counter(
            "request_success", "Requests that ended, by reason.", "finished_reason"
        )
        self.refused = counter("request_refused", "Requests that were not taken.", "reason")
        self.experts = counter(
            "token_experts", "Experts visited, summed over tokens, by budget.", "budget"
        )
        self.expert_tokens = counter(
            "token_experts_tokens", "Tokens that token_experts counts, by budget.", "budget"
        )
        self.first = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", SECONDS
        )
        self.between = histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", TOKEN_SECONDS
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean of a request between its tokens.",
            TOKEN_SECONDS,
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", SECONDS
        )
        self.queued = histogram("request_queue_time_seconds", "From arrival to a slot.", SECONDS)
        self.fallback = counter(
            "fallback", "What was done less well than asked, by reason.", "reason"
        )
        self.budget = Gauge(
            "loadstone_budget",
            "Experts per token that a request gets which fixes none, with serve.budget=auto.",
            registry=self.registry,
        )
        self.drift = Gauge(
            "loadstone_routing_drift",
            "Largest divergence of a layer's loads from those of training, in nats.",
            registry=self.registry,
        )
        self.replays = counter(
            "replays", "Requests kept to be read again in idle time, by result.", "result"
        )
        self.attention_audits = counter(
            "attention_audits", "Requests whose sparse attention was compared.", "result"
        )
        self.shadow_tokens = counter("shadow_tokens", "Generated tokens that were compared.")
        self.shadow_same = counter(
            "shadow_same_tokens",
            "Of which the likeliest is that of the full budget and dense attention.",
        )

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"loadstone_{name}", text, registry=self.registry)

        self.attention_error = gauge(
            "attention_error",
            "Relative error of the worst sparse layer in the last audit, at the trained top_k.",
        )
        self.attention_top_k = gauge("attention_top_k", "Blocks that sparse layers select.")
        self.shadow_divergence = gauge(
            "shadow_divergence", "Mean divergence of the compared tokens, in nats."
        )
        self.replay_difference = gauge(
            "replay_difference",
            "Largest difference of a log-probability to that of its replay, in nats.",
        )
        self.arm_requests = counter(
            "arm_request_success", "Requests that ended, by arm and reason.", "arm", "reason"
        )
        self.arm_tokens = counter("arm_generation_tokens", "Generated tokens, by arm.", "arm")
        self.arm_log_probability = Gauge(
            "loadstone_arm_log_probability_sum",
            "Sum of log-probabilities of the generated tokens, by arm.",
            ("arm",),
            registry=self.registry,
        )
        self.arm_per_token = Histogram(
            "loadstone_arm_time_per_output_token_seconds",
            "Mean of a request between its tokens, by arm.",
            ("arm",),
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )

    def watch(self, worker: Worker) -> None:
        """Look at a worker whenever somebody asks."""
        engine = worker.engine
        for name, text, value in (
            ("num_requests_running", "Requests in slots.", lambda: worker.num_running),
            ("num_requests_waiting", "Requests without a slot.", lambda: worker.num_waiting),
            (
                "kv_cache_usage_perc",
                "Share of the pages that requests hold.",
                lambda: _share_held(*engine.num_pages),
            ),
            (
                "spec_decode_num_drafts",
                "Rounds of drafts, of single requests.",
                lambda: engine.drafted.rounds,
            ),
            (
                "spec_decode_num_draft_tokens",
                "Drafted tokens.",
                lambda: engine.drafted.drafts,
            ),
            (
                "spec_decode_num_accepted_tokens",
                "Drafted tokens that were kept.",
                lambda: engine.drafted.kept,
            ),
            (
                "confined_num_tokens",
                "Tokens by MoE layer that decoded under engine.max_active_experts.",
                lambda: engine.confined.routed,
            ),
            (
                "confined_num_rerouted",
                "Of those, the ones that had other experts for it than by their own choice.",
                lambda: engine.confined.rerouted,
            ),
            (
                "cuda_graphs",
                "Shapes of decoding steps that are CUDA graphs.",
                lambda: 0 if engine.graphs is None else len(engine.graphs.shapes),
            ),
            (
                "cuda_graph_steps",
                "Decoding steps that were replayed as CUDA graphs.",
                lambda: 0 if engine.graphs is None else engine.graphs.num_replays,
            ),
            (
                "speculation_utility",
                "Tokens per second of rounds over plain steps, as last measured; 0: never.",
                lambda: _utility(engine),
            ),
        ):
            gauge = Gauge(f"loadstone_{name}", text, registry=self.registry)
            gauge.set_function(value)
        self.registry.register(_WithoutGraphs(engine))

    def ended(self, request: Request, done: Completion) -> None:
        """Count a request that has come to its end."""
        self.requests.labels(done.finish_reason).inc()
        self.prompt_tokens.inc(done.num_prompt_tokens)
        self.generation_tokens.inc(len(done.tokens))
        self.reused_tokens.inc(done.num_reused_tokens)
        self.preemptions.inc(done.num_preemptions)
        if done.num_preemptions:
            self.fallback.labels("preempted").inc(done.num_preemptions)
        if done.finish_reason == "error":
            self.fallback.labels("nonfinite").inc()
        name = "default" if request.budget is None else f"{request.budget:g}"
        computed = done.num_prompt_tokens - done.num_reused_tokens + len(done.tokens)
        self.experts.labels(name).inc(done.experts_per_token * computed)
        self.expert_tokens.labels(name).inc(computed)

        times = done.token_times
        if done.started:
            self.queued.observe(done.started - done.arrived)
        if times:
            self.first.observe(times[0] - done.arrived)
            self.whole.observe(times[-1] - done.arrived)
        for before, after in itertools.pairwise(times):
            self.between.observe(after - before)
        if len(times) > 1:
            self.per_token.observe((times[-1] - times[0]) / (len(times) - 1))

    def arm_ended(self, arm: str, done: Completion) -> None:
        """Count a request of an arm that has come to its end."""
        self.arm_requests.labels(arm, done.finish_reason).inc()
        self.arm_tokens.labels(arm).inc(len(done.tokens))
        self.arm_log_probability.labels(arm).inc(sum(done.log_probabilities))
        times = done.token_times
        if len(times) > 1:
            self.arm_per_token.labels(arm).observe((times[-1] - times[0]) / (len(times) - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def totals(self) -> dict[str, int]:
        """What has been served, for the end of the command."""
        ended = (s.value for m in self.requests.collect() for s in m.samples if _counts(s.name))
        return {
            "requests": round(sum(ended)),
            "prompt_tokens": round(_value(self.prompt_tokens)),
            "generated_tokens": round(_value(self.generation_tokens)),
        }


class _WithoutGraphs(Collector):
    """Says why decoding steps are no CUDA graphs, as a label: it may come up while requests run."""

    def __init__(self, engine: Engine | EngineOverRanks):
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        found = GaugeMetricFamily(
            "loadstone_without_cuda_graphs",
            "1 where decoding steps are no CUDA graphs, with the reason.",
            labels=("reason",),
        )
        if (reason := self.engine.without_graphs) is not None:
            found.add_metric((reason,), 1.0)
        return (found,)


def _share_held(free: int, pages: int) -> float:
    return 1 - free / max(1, pages)


def _utility(engine: Engine | EngineOverRanks) -> float:
    found = None if engine.utility is None else engine.utility.value
    return 0.0 if found is None else found


def _counts(name: str) -> bool:
    return name.endswith("_total")


def _value(counter: Counter) -> float:
    return sum(s.value for m in counter.collect() for s in m.samples if _counts(s.name))
