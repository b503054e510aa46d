"""What the dashboard of a run shows: sections of panels over metrics that this run logs, as plain
records.

launch/dashboard/command.py turns them into a W&B workspace and report. A panel is there when the
catalogue of metrics says that the run logs what it shows, so that none stays empty
(tests/launch/test_dashboard.py compares both with what training logs).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.attention.config.sparse import SparseAttentionConfig
from model.cost.parameters import has_index, sparse_layers
from model.routers.config import BudgetedConfig
from train.config.run import RunConfig
from train.config.watching import AlarmRule
from train.observe.catalogue.names import find, matching
from train.observe.catalogue.pictures import MEDIA
from train.observe.catalogue.record import Need


@dataclass(frozen=True)
class Lines:
    """A line plot over tokens."""

    title: str
    """What stands above the plot."""
    metrics: tuple[str, ...] = ()
    """Their names."""
    regex: str | None = None
    """Instead of names: all that match it as a whole, such as one metric of every layer."""
    low: float | None = None
    """Where the axis begins; None: where the data do."""
    high: float | None = None
    """Where the axis ends."""
    log: bool = False
    """Whether the axis is logarithmic."""


@dataclass(frozen=True)
class Media:
    """Images or histograms, with a slider over steps."""

    title: str
    """What stands above the panel."""
    keys: tuple[str, ...]
    """Names of the catalogue's MEDIA."""


@dataclass(frozen=True)
class Chart:
    """A preset of launch/dashboard/vega.py over the table that launch.dashboard logs for it."""

    preset: str
    """A key of PRESETS."""


@dataclass(frozen=True)
class Text:
    """A panel of words."""

    markdown: str
    """The words."""


Panel = Lines | Media | Chart | Text


@dataclass(frozen=True)
class Section:
    """Panels that answer one question."""

    name: str
    """Title of the section."""
    meaning: str
    """What to look for: one sentence, which the report shows."""
    panels: tuple[Panel, ...]
    """In reading order."""
    is_open: bool = False
    """Whether it is unfolded at first."""


@dataclass(frozen=True)
class Shape:
    """What of a config decides which metrics a run logs."""

    moe_layers: tuple[int, ...]
    """Numbers of the layers that have experts."""
    conditions: frozenset[Need]
    """What the run has, or may turn out to have."""
    alarms: dict[str, AlarmRule]
    """Rules of the run's config by name."""

    def shows(self, panel: Panel) -> bool:
        """Whether the run logs all that the panel is about."""
        if isinstance(panel, Lines):
            shown = [find(name) for name in panel.metrics]
            shown += matching(panel.regex) if panel.regex else []
        elif isinstance(panel, Media):
            shown = [metric for metric in MEDIA.metrics if metric.name in panel.keys]
        else:
            return True
        return all(metric.needs <= self.conditions for metric in shown)


def shape_of(run: RunConfig) -> Shape:
    router = run.router.arguments
    attention = run.attention.arguments
    dispatcher = run.dispatcher.arguments

    has_experts = bool(run.model.moe_layers)
    law = run.router.law
    adaptive = has_experts and isinstance(run.router, BudgetedConfig)
    spreads_experts = has_experts and run.parallel.expert_parallel_size > 1
    is_indexed = has_index(attention)
    is_sparse = isinstance(run.attention, SparseAttentionConfig) and bool(
        sparse_layers(run.model.num_layers, attention)
    )

    has = {
        Need.EXPERTS: has_experts,
        Need.BUDGET: adaptive,
        Need.TOP_P: law == "top_p",
        Need.NULL_EXPERTS: bool(router.get("num_null_experts")),
        Need.LOGIT_Z_LOSS: run.train.z_loss_coeff > 0,
        Need.AUX_LOSS_SCHEDULE: run.balance.aux_loss_schedule.style != "constant",
        Need.BIAS_RATE_SCHEDULE: run.balance.bias_rate_schedule.style != "constant",
        Need.QK_CLIP: run.optim.qk_clip is not None,
        Need.MTP: run.model.num_mtp_layers > 0,
        Need.TEACHER: run.objective.name != "next_token",
        Need.LOWER_BUDGET: run.objective.name == "self_distil",
        Need.BIAS: run.balance.bias_update != "none" or law in ("quantile", "relu", "null"),
        Need.AUX_LOSS: run.balance.aux_loss_coeff > 0,
        Need.WHOLE_ROUTERS: run.zero_stage < 3,
        Need.SPREAD_EXPERTS: spreads_experts,
        Need.EXCHANGE: spreads_experts
        or max(run.parallel.parts_size, run.parallel.pipeline_parallel_size) > 1,
        Need.LOCAL_EXPERTS: has_experts and not spreads_experts,
        Need.ROUNDED_PAYLOAD: (spreads_experts and dispatcher.get("payload", "native") != "native"),
        Need.SPARSE: is_sparse,
        Need.SELECTED_BLOCKS: is_sparse,
        Need.DENSE_CHECK: is_sparse and attention.get("audit_rows", 0.002) > 0,
        Need.RESIDENT: is_sparse and attention.get("resident_blocks") is not None,
        Need.INDEXED: is_indexed,
        Need.INDEX_CHECK: is_indexed and attention["audit_rows"] > 0,
        Need.DETAILED: run.tracker.metrics == "detailed",
        Need.KNOWN_PEAK: True,
        Need.KNOWN_BYTES: True,
        Need.SEVERAL_SOURCES: len(run.data.sources) + len(run.data.validation.sources) > 1,
        Need.TWO_EVALUATIONS: 0 < run.train.eval_interval < run.train.num_steps,
        Need.VARYING_EXPERTS: adaptive,
        Need.ALARMS: bool(run.alarms),
        Need.MEDIA: has_experts and run.tracker.media_interval > 0,
    }
    conditions = frozenset(need for need, holds in has.items() if holds)
    return Shape(run.model.moe_layers, conditions, run.alarms)


def sections(shape: Shape, *further: Section) -> list[Section]:
    """The sections that have anything to show, and further ones, numbered."""
    made = [health(shape)]
    if Need.EXPERTS in shape.conditions:
        made.append(balance())
        if Need.BUDGET in shape.conditions:
            made.append(budget())
        made += [internals(shape), fallbacks()]
    if Need.SPARSE in shape.conditions:
        made.append(attention())
    if Need.INDEXED in shape.conditions:
        made.append(index())
    made += [communication_and_time(shape), *further]
    return [
        Section(f"{i} {s.name}", s.meaning, tuple(filter(shape.shows, s.panels)), s.is_open)
        for i, s in enumerate(made, 1)
    ]


def health(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("loss", ("train/loss",)),
        Lines("held-out loss", ("eval/val_loss",)),
        Lines("held-out bits per byte", ("eval/bits_per_byte",)),
        Lines("gradient norm", ("train/grad_norm",), log=True),
        Lines("learning rate", ("train/lr",), low=0),
        Lines("skipped steps", ("train/skipped_steps",), low=0),
        Lines("alarms: 1 rings", regex=r"alarm/.*", low=0, high=1),
    ]
    if shape.alarms:
        panels.append(Text(alarm_table(shape.alarms)))
    return Section(
        "health",
        "The loss falls, the gradient norm is steady, no alarm rings, no step is skipped.",
        tuple(panels),
        is_open=True,
    )


def alarm_table(alarms: dict[str, AlarmRule]) -> str:
    rows = [
        f"| {name} | `{rule.metric}` | {rule.limit_text} | {rule.for_steps} | {rule.meaning} |"
        for name, rule in alarms.items()
    ]
    return "\n".join(
        ["| alarm | metric | rings | for steps | because |", "|---|---|---|---|---|", *rows]
    )


def balance() -> Section:
    panels: list[Panel] = [
        Media("load over the mean, layer by expert", ("routing/expert_load",)),
        Media("distribution of the load", ("routing/expert_load_histogram",)),
        Lines(
            "max violation: busiest expert over the mean, minus 1",
            ("moe/max_vio", "moe/max_vio/max"),
            low=0,
        ),
        Lines("max violation by layer", regex=by_layer("max_vio"), low=0),
        Lines("max violation of single steps", ("moe/max_vio_step",), low=0),
        Lines(
            "busiest rank over the mean: sets the step time",
            ("moe/rank_load", "moe/rank_load/max"),
            low=1,
        ),
        Lines("largest and smallest load over the mean", ("moe/max_load", "moe/min_load"), low=0),
        Lines("dead experts", ("moe/dead_experts",), low=0),
        Lines("share of experts below 5% of the mean", ("moe/dead_fraction",), low=0, high=1),
        Lines(
            "entropy of the load over its largest: 1 is even",
            ("moe/load_entropy_ratio", "moe/load_entropy_ratio/min"),
            low=0,
            high=1,
        ),
        Lines(
            "concentration on the busiest k experts: 1 is collapse",
            ("moe/concentration", "moe/concentration/max"),
            low=0,
            high=1,
        ),
        Lines(
            "Gini and coefficient of variation of the load", ("moe/load_gini", "moe/load_cv"), low=0
        ),
    ]
    return Section(
        "balance",
        "1 is fair: max violation near 0 on every layer, no dead experts, an even heatmap.",
        tuple(panels),
        is_open=True,
    )


def budget() -> Section:
    panels: list[Panel] = [
        Media("tokens by number of experts", ("routing/experts_per_token",)),
        Lines("experts per token", ("moe/experts_per_token", "eval/experts_per_token"), low=0),
        Lines("experts per token by layer", regex=by_layer("experts_per_token"), low=0),
        Lines("budget error: mean over the target, minus 1", ("moe/budget_error",)),
        Lines("budget error by layer", regex=by_layer("budget_error")),
        Lines("deviation of experts per token over tokens", ("moe/experts_per_token_std",), low=0),
        Lines(
            "experts per token by decile of the token's frequency: 0 is rarest",
            regex=r"eval/experts_per_token/frequency_\d",
            low=0,
        ),
        Lines(
            "experts per token by decile of loss: 0 is easiest",
            regex=r"eval/experts_per_token/loss_\d",
            low=0,
        ),
        Lines("theta: the controller's state", ("moe/theta",)),
        Lines("mode share: 1 is all adaptive", ("moe/mode_share",), low=0, high=1),
        Lines("FLOPs of routed experts per token", ("moe/expert_flops_per_token",), low=0),
        Lines("top-p", ("moe/top_p",), low=0, high=1),
        Lines("share of choices that went to null experts", ("moe/null_fraction",), low=0, high=1),
    ]
    return Section(
        "budget",
        "The mean number of experts per token keeps to router.budget, on every layer.",
        tuple(panels),
    )


def internals(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines(
            "entropy of the router's softmax: 1 is undecided",
            ("moe/router_entropy",),
            low=0,
            high=1,
        ),
        Lines("router entropy by layer", regex=by_layer("router_entropy"), low=0, high=1),
        Lines("margin of the last selected expert", ("moe/margin_p05", "moe/margin_p50")),
        Lines("log-sum-exp of the logits", ("moe/log_z_p99", "moe/log_z_max")),
        Lines(
            "gates of a token: sum, largest share, root mean square",
            ("moe/gate_sum", "moe/gate_top1_share", "moe/gate_rms"),
            low=0,
        ),
        Lines("co-activation: 0 is independent", ("moe/co_activation",), low=0),
        Lines("z-loss", ("moe/z_loss",), low=0),
        Lines("auxiliary loss: 1 is even", ("moe/aux_loss",)),
        Lines("selection bias: range, root mean square", ("moe/bias_range", "moe/bias_rms"), low=0),
        Lines(
            "correlation of bias and load: balancing makes it negative",
            ("moe/bias_load_correlation",),
            low=-1,
            high=1,
        ),
        Lines("similarity of the experts' router rows", ("moe/router_similarity",)),
        Lines(
            "share of experts kept since the last evaluation",
            ("eval/router_stability",),
            low=0,
            high=1,
        ),
        Lines("spread of the experts' gradients by layer", regex=by_layer("expert_grad_cv"), low=0),
        Lines(
            "router's gradient over the experts' by layer",
            regex=by_layer("router_grad_ratio"),
            low=0,
        ),
        Lines(
            "share of tokens' gradients through the router, by layer",
            regex=by_layer("gate_grad_share"),
            low=0,
            high=1,
        ),
    ]
    if Need.BUDGET not in shape.conditions:  # else they stand in the section of the budget
        panels.append(
            Lines(
                "share of choices that went to null experts", ("moe/null_fraction",), low=0, high=1
            )
        )
    return Section(
        "router internals",
        "Logits that grow, margins near 0 and an entropy that collapses come before imbalance.",
        tuple(panels),
    )


def fallbacks() -> Section:
    return Section(
        "fallbacks and audit",
        "Nothing is dropped; reasons other than raised and capped are rare.",
        (
            Lines("tokens by reason of their fallback", regex=r"moe/fallback/.*", low=0),
            Lines(
                "rate of fallbacks: 1 in the warm start of an adaptive router",
                ("moe/fallback_rate",),
                low=0,
            ),
            Lines(
                "layers routed by plain top-k",
                ("moe/layers_in_fallback", "moe/layers_collapsed"),
                low=0,
            ),
            Lines("assignments no expert computed", ("moe/dropped",), low=0),
            Lines("assignments that moved to another expert", ("moe/spilled",), low=0),
        ),
    )


def attention() -> Section:
    panels: list[Panel] = [
        Lines(
            "mass of the pooled tail and of selected blocks",
            ("attention/tail_mass", "attention/selected_mass"),
            low=0,
            high=1,
        ),
        Lines("tail mass by layer", regex=by_layer("tail_mass", "attention"), low=0, high=1),
        Lines("selected blocks per query", ("attention/selected_blocks",), low=0),
        Lines(
            "union factor: 1 is all the same, 16 all different",
            ("attention/union_factor",),
            low=1,
            high=16,
        ),
        Lines("error of audited rows", ("attention/error", "attention/error/max"), low=0),
        Lines("error by layer", regex=by_layer("error", "attention"), low=0),
        Lines("bound on the mean error", ("attention/error_bound",), low=0, high=1),
        Lines(
            "certificate and its coverage",
            ("attention/certificate", "attention/certificate_coverage"),
            low=0,
            high=1,
        ),
        Lines(
            "violations of the bound: anything but 0 is a bug",
            ("attention/bound_violations",),
            low=0,
        ),
        Lines("KL divergence of estimated block masses", ("attention/mass_kl",), low=0),
        Lines("variance within pooled entries", ("attention/coherence",), low=0),
        Lines("mass of resident blocks", ("attention/resident_recall",), low=0, high=1),
    ]
    return Section(
        "attention",
        "The error stays small and below its bound; a rising tail mass asks for more blocks.",
        tuple(panels),
    )


def index() -> Section:
    panels: list[Panel] = [
        Lines(
            "share of dense attention that the index chooses",
            ("attention/index_recall", "attention/index_recall/min"),
            low=0,
            high=1,
        ),
        Lines("its share by layer", regex=by_layer("index_recall", "attention"), low=0, high=1),
        Lines("loss of the index", ("attention/index_loss",), low=0),
        Lines("loss by layer", regex=by_layer("index_loss", "attention"), low=0),
    ]
    return Section(
        "index of attention",
        "Its recall rises in the dense steps, and holds once it chooses.",
        tuple(panels),
    )


def communication_and_time(shape: Shape) -> Section:
    panels: list[Panel] = [
        Lines("tokens per second", ("perf/tokens_per_second",), low=0),
        Lines("seconds per step", ("perf/step_seconds",), low=0),
        Lines("share of the device's peak FLOPs", ("perf/mfu",), low=0),
        Lines("memory, GiB", ("perf/memory_gib",), low=0),
        Lines("slowest rank's own time over the median", ("perf/rank_skew",), low=1),
        Lines("seconds stood still for checkpoints", ("perf/save_seconds",), low=0),
        Lines("bytes sent per step and rank", ("comm/bytes",), low=0),
        Lines("share of the step spent waiting for rows", ("comm/exposed_fraction",), low=0),
        Lines("seconds of a step spent waiting for rows", ("comm/exposed_seconds",), low=0),
        Lines("rounding error of rows sent", ("comm/payload_error",), low=0),
    ]
    return Section(
        "communication and time" if Need.EXCHANGE in shape.conditions else "time",
        "Throughput is flat; waiting for rows or for a slow rank shows first here.",
        tuple(panels),
    )


def charts(presets: Iterable[str], step: int) -> Section:
    """Of a run that has routing.jsonl."""
    return Section(
        "charts",
        f"The experts of this run at step {step}; saving "
        "the dashboard again brings them up to date.",
        tuple(Chart(name) for name in presets),
    )


def by_layer(metric: str, group: str = "moe") -> str:
    return rf"{group}/{metric}/layer_\d+"


def metrics_of(panels: Iterable[Panel]) -> list[str]:
    return [name for panel in panels if isinstance(panel, Lines) for name in panel.metrics]
