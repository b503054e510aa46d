"""What the dashboard of a run shows: sections of panels over metrics that this run logs, as plain records.

launch/dashboard.py turns them into a W&B workspace and report. Names are those of docs/metrics.md; which panels there are
follows from the config, so that none stays empty (tests/launch/test_dashboard.py compares both with what training logs).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.flops import sparse_layers
from train.components import resolve
from train.config import AlarmRule, RunConfig


@dataclass(frozen=True)
class Lines:
    """A line plot over tokens. metrics: names; regex: instead of them, all names that match (one of each layer)."""

    title: str
    metrics: tuple[str, ...] = ()
    regex: str | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Media:
    """Images or histograms, with a slider over steps."""

    title: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """A preset of launch/vega.py over the table that launch.dashboard logs for it."""

    preset: str


@dataclass(frozen=True)
class Text:
    markdown: str


Panel = Lines | Media | Chart | Text


@dataclass(frozen=True)
class Section:
    """meaning: what to look for, one sentence, shown in the report."""

    name: str
    meaning: str
    panels: tuple[Panel, ...]
    is_open: bool = False


@dataclass(frozen=True)
class Shape:
    """What of a config decides which metrics a run logs."""

    moe_layers: tuple[int, ...]
    adaptive: bool
    """Experts per token vary around a budget."""
    law: str
    """Of the budget's controller: none, quantile, top_p, relu, null."""
    has_null_experts: bool
    has_bias: bool
    has_aux_loss: bool
    has_whole_routers: bool
    """Router weights are in one piece on a rank: not with ZeRO-3."""
    is_detailed: bool
    evaluates_often: bool
    is_sparse: bool
    is_audited: bool
    """Sparse attention is compared with dense attention at log steps."""
    spreads_experts: bool
    rounds_payload: bool
    media: bool
    alarms: dict[str, AlarmRule]


def shape_of(run: RunConfig) -> Shape:
    router, attention, dispatcher = run.router.arguments, run.attention.arguments, run.dispatcher.arguments
    moe_layers = run.model.moe_layers
    law = getattr(resolve(run.router, "router"), "law", "none")
    spreads_experts = bool(moe_layers) and run.parallel.expert_parallel_size > 1
    is_sparse = run.attention.target.endswith(".SparseAttention") and bool(sparse_layers(run.model.num_layers, attention))
    return Shape(
        moe_layers=moe_layers, adaptive=bool(moe_layers) and router.get("budget") is not None, law=law,
        has_null_experts=bool(router.get("num_null_experts")),
        has_bias=run.balance.bias_update != "none" or law in ("quantile", "relu", "null"),
        has_aux_loss=run.balance.aux_loss_coeff > 0,
        has_whole_routers=run.zero_stage < 3, is_detailed=run.tracker.metrics == "detailed",
        evaluates_often=0 < run.train.eval_interval < run.train.num_steps,
        is_sparse=is_sparse, is_audited=is_sparse and attention.get("audit_rows", 0.002) > 0,
        spreads_experts=spreads_experts,
        rounds_payload=spreads_experts and dispatcher.get("payload", "native") != "native",
        media=bool(moe_layers) and run.tracker.media_interval > 0, alarms=run.alarms)


def sections(shape: Shape, *further: Section) -> list[Section]:
    """The sections that have anything to show, and further ones, numbered."""
    made = [health(shape)]
    if shape.moe_layers:
        made.append(balance(shape))
        if shape.adaptive:
            made.append(budget(shape))
        made += [internals(shape), fallbacks()]
    if shape.is_sparse:
        made.append(attention(shape))
    made += [communication_and_time(shape), *further]
    return [Section(f"{i} {s.name}", s.meaning, s.panels, s.is_open) for i, s in enumerate(made, 1)]


def health(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("loss", ("train/loss",)),
        Lines("held-out loss", ("eval/val_loss",)),
        Lines("held-out bits per byte", ("eval/bits_per_byte",)),
        Lines("gradient norm", ("train/grad_norm",), log=True),
        Lines("learning rate", ("train/lr",), low=0),
        Lines("skipped steps", ("train/skipped_steps",), low=0),
    ]
    if shape.alarms:
        panels += [Lines("alarms: 1 rings", regex=r"alarm/.*", low=0, high=1), Text(alarm_table(shape.alarms))]
    return Section("health", "The loss falls, the gradient norm is steady, no alarm rings, no step is skipped.",
                   tuple(panels), is_open=True)


def alarm_table(alarms: dict[str, AlarmRule]) -> str:
    rows = [f"| {name} | `{rule.metric}` | {rule.limit_text} | {rule.for_steps} | {rule.meaning} |"
            for name, rule in alarms.items()]
    return "\n".join(["| alarm | metric | rings | for steps | because |", "|---|---|---|---|---|", *rows])


def balance(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("max violation: busiest expert over the mean, minus 1", ("moe/max_vio", "moe/max_vio/max"), low=0),
        Lines("max violation by layer", regex=by_layer("max_vio"), low=0),
        Lines("max violation of single steps", ("moe/max_vio_step",), low=0),
        Lines("largest and smallest load over the mean", ("moe/max_load", "moe/min_load"), low=0),
        Lines("dead experts", ("moe/dead_experts",), low=0),
        Lines("share of experts below 5% of the mean", ("moe/dead_fraction",), low=0, high=1),
        Lines("entropy of the load over its largest: 1 is even", ("moe/load_entropy_ratio", "moe/load_entropy_ratio/min"),
              low=0, high=1),
        Lines("concentration on the busiest k experts: 1 is collapse", ("moe/concentration", "moe/concentration/max"), low=0,
              high=1),
        Lines("Gini and coefficient of variation of the load", ("moe/load_gini", "moe/load_cv"), low=0),
    ]
    if shape.spreads_experts:
        panels.insert(3, Lines("busiest rank over the mean: sets the step time", ("moe/rank_load", "moe/rank_load/max"),
                               low=1))
    if shape.media:
        panels[:0] = [Media("load over the mean, layer by expert", ("routing/expert_load",)),
                      Media("distribution of the load", ("routing/expert_load_histogram",))]
    return Section("balance", "1 is fair: max violation near 0 on every layer, no dead experts, an even heatmap.",
                   tuple(panels), is_open=True)


def budget(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("experts per token", ("moe/experts_per_token", "eval/experts_per_token"), low=0),
        Lines("experts per token by layer", regex=by_layer("experts_per_token"), low=0),
        Lines("budget error: mean over the target, minus 1", ("moe/budget_error",)),
        Lines("budget error by layer", regex=by_layer("budget_error")),
        Lines("deviation of experts per token over tokens", ("moe/experts_per_token_std",), low=0),
        Lines("experts per token by decile of the token's frequency: 0 is rarest",
              regex=r"eval/experts_per_token/frequency_\d", low=0),
        Lines("experts per token by decile of loss: 0 is easiest", regex=r"eval/experts_per_token/loss_\d", low=0),
        Lines("theta: the controller's state", ("moe/theta",)),
        Lines("mode share: 1 is all adaptive", ("moe/mode_share",), low=0, high=1),
        Lines("FLOPs of routed experts per token", ("moe/expert_flops_per_token",), low=0),
    ]
    if shape.media:
        panels.insert(0, Media("tokens by number of experts", ("routing/experts_per_token",)))
    if shape.law == "top_p":
        panels.append(Lines("top-p", ("moe/top_p",), low=0, high=1))
    if shape.has_null_experts:
        panels.append(Lines("share of choices that went to null experts", ("moe/null_fraction",), low=0, high=1))
    return Section("budget", "The mean number of experts per token keeps to router.budget, on every layer.", tuple(panels))


def internals(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("entropy of the router's softmax: 1 is undecided", ("moe/router_entropy",), low=0, high=1),
        Lines("router entropy by layer", regex=by_layer("router_entropy"), low=0, high=1),
        Lines("margin of the last selected expert", ("moe/margin_p05", "moe/margin_p50")),
        Lines("log-sum-exp of the logits", ("moe/log_z_p99", "moe/log_z_max")),
        Lines("gates of a token: sum, largest share, root mean square",
              ("moe/gate_sum", "moe/gate_top1_share", "moe/gate_rms"), low=0),
        Lines("co-activation: 0 is independent", ("moe/co_activation",), low=0),
        Lines("z-loss", ("moe/z_loss",), low=0),
    ]
    if shape.has_aux_loss:
        panels.append(Lines("auxiliary loss: 1 is even", ("moe/aux_loss",)))
    if shape.has_bias:
        panels += [Lines("selection bias: range, root mean square", ("moe/bias_range", "moe/bias_rms"), low=0),
                   Lines("correlation of bias and load: balancing makes it negative", ("moe/bias_load_correlation",), low=-1,
                         high=1)]
    if shape.has_whole_routers:
        panels.append(Lines("similarity of the experts' router rows", ("moe/router_similarity",)))
    if shape.evaluates_often:
        panels.append(Lines("share of experts kept since the last evaluation", ("eval/router_stability",), low=0, high=1))
    if shape.is_detailed:
        panels += [Lines("spread of the experts' gradients by layer", regex=by_layer("expert_grad_cv"), low=0),
                   Lines("router's gradient over the experts' by layer", regex=by_layer("router_grad_ratio"), low=0),
                   Lines("share of tokens' gradients through the router, by layer", regex=by_layer("gate_grad_share"), low=0,
                         high=1)]
    if shape.has_null_experts and not shape.adaptive:
        panels.append(Lines("share of choices that went to null experts", ("moe/null_fraction",), low=0, high=1))
    return Section("router internals", "Logits that grow, margins near 0 and an entropy that collapses come before "
                                       "imbalance.", tuple(panels))


def fallbacks() -> Section:
    return Section("fallbacks and audit", "Nothing is dropped; reasons other than raised and capped are rare.", (
        Lines("tokens by reason of their fallback", regex=r"moe/fallback/.*", low=0),
        Lines("rate of fallbacks: 1 in the warm start of an adaptive router", ("moe/fallback_rate",), low=0),
        Lines("layers routed by plain top-k", ("moe/layers_in_fallback", "moe/layers_collapsed"), low=0),
        Lines("assignments no expert computed", ("moe/dropped",), low=0),
        Lines("assignments that moved to another expert", ("moe/spilled",), low=0)))


def attention(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("mass of the pooled tail and of selected blocks", ("attention/tail_mass", "attention/selected_mass"), low=0,
              high=1),
        Lines("tail mass by layer", regex=by_layer("tail_mass", "attention"), low=0, high=1),
        Lines("selected blocks per query", ("attention/selected_blocks",), low=0),
        Lines("union factor: 1 is all the same, 16 all different", ("attention/union_factor",), low=1, high=16),
    ]
    if shape.is_audited:
        panels += [
            Lines("error of audited rows", ("attention/error", "attention/error/max"), low=0),
            Lines("error by layer", regex=by_layer("error", "attention"), low=0),
            Lines("bound on the mean error", ("attention/error_bound",), low=0, high=1),
            Lines("certificate and its coverage", ("attention/certificate", "attention/certificate_coverage"), low=0,
                  high=1),
            Lines("violations of the bound: anything but 0 is a bug", ("attention/bound_violations",), low=0),
            Lines("KL divergence of estimated block masses", ("attention/mass_kl",), low=0),
            Lines("variance within pooled entries", ("attention/coherence",), low=0)]
    return Section("attention", "The error stays small and below its bound; a rising tail mass asks for more blocks.",
                   tuple(panels))


def communication_and_time(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("tokens per second", ("perf/tokens_per_second",), low=0),
        Lines("seconds per step", ("perf/step_seconds",), low=0),
        Lines("share of the device's peak FLOPs", ("perf/mfu",), low=0),
        Lines("memory, GiB", ("perf/memory_gib",), low=0),
        Lines("slowest rank's own time over the median", ("perf/rank_skew",), low=1),
        Lines("seconds stood still for checkpoints", ("perf/save_seconds",), low=0),
    ]
    if shape.spreads_experts:
        panels += [Lines("bytes sent per step and rank", ("comm/bytes",), low=0),
                   Lines("share of the step spent waiting for rows", ("comm/exposed_fraction",), low=0),
                   Lines("seconds of a step spent waiting for rows", ("comm/exposed_seconds",), low=0)]
    if shape.rounds_payload:
        panels.append(Lines("rounding error of rows sent", ("comm/payload_error",), low=0))
    return Section("communication and time" if shape.spreads_experts else "time",
                   "Throughput is flat; waiting for rows or for a slow rank shows first here.", tuple(panels))


def charts(presets: Iterable[str], step: int) -> Section:
    """Of a run that has routing.jsonl."""
    return Section("charts", f"The experts of this run at step {step}; saving the dashboard again brings them up to date.",
                   tuple(Chart(name) for name in presets))


def by_layer(metric: str, group: str = "moe") -> str:
    return rf"{group}/{metric}/layer_\d+"


def metrics_of(panels: Iterable[Panel]) -> list[str]:
    return [name for panel in panels if isinstance(panel, Lines) for name in panel.metrics]
