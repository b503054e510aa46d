"""What is said of a metric: its record, the words that the records share, and groups of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum


class Better(Enum):
    """Which way a metric is better, all else being equal."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


class Moment(Enum):
    """What a record of the metric covers."""

    INTERVAL = "interval"
    STEP = "step"
    SAMPLE = "sample"
    STATE = "state"
    SO_FAR = "so far"
    EVALUATION = "evaluation"

    @property
    def explained(self) -> str:
        return {
            Moment.INTERVAL: "all ranks and all steps since the last logged step",
            Moment.STEP: "the logged step alone, all ranks",
            Moment.SAMPLE: "rank 0's last micro-batch of the logged step: a sample",
            Moment.STATE: "how things stand after the logged step",
            Moment.SO_FAR: "the run up to here",
            Moment.EVALUATION: "held-out text, at every evaluation",
        }[self]


class Need(Enum):
    """What a run must have for the metric to be there; the text goes on from "where"."""

    EXPERTS = "the model has MoE layers"
    BUDGET = "the router has a budget"
    TOP_P = "the budget moves top_p"
    NULL_EXPERTS = "the router has null experts"
    BIAS = "a selection bias is not 0"
    MTP = "model.num_mtp_layers is above 0"
    TEACHER = "objective is distil or self_distil"
    LOWER_BUDGET = "objective is self_distil"
    LOGIT_Z_LOSS = "train.z_loss_coeff is above 0"
    QK_CLIP = "optim.qk_clip is set, from the first measured step on"
    AUX_LOSS_SCHEDULE = "balance.aux_loss_schedule is not constant"
    BIAS_RATE_SCHEDULE = "balance.bias_rate_schedule is not constant"
    AUX_LOSS = "balance.aux_loss_coeff is above 0"
    WHOLE_ROUTERS = "ranks hold whole routers (with ZeRO-3 small ones only)"
    SPREAD_EXPERTS = "experts are spread over ranks"
    EXCHANGE = "experts or the tokens of rows are spread over ranks"
    LOCAL_EXPERTS = "experts are not spread over ranks"
    ROUNDED_PAYLOAD = "dispatcher.payload is bf16 or fp8"
    SPARSE = "attention is sparse"
    SELECTED_BLOCKS = "blocks were selected"
    DENSE_CHECK = "attention.audit_rows is above 0"
    RESIDENT = "attention.resident_blocks is set"
    INDEXED = "attention is indexed"
    INDEX_CHECK = "attention is indexed and attention.audit_rows above 0"
    DETAILED = "tracker.metrics=detailed"
    CUDA = "the device is a GPU"
    KNOWN_PEAK = "the device's peak is known"
    TILES = "the experts' kernels work in tiles"
    KNOWN_BYTES = "the bytes of the targets are known"
    SEVERAL_SOURCES = "several sources hold out text"
    TWO_EVALUATIONS = "there was an evaluation before"
    VARYING_EXPERTS = "tokens differ in their number of experts"
    ALARMS = "the run has alarms"
    MEDIA = "tracker.media_interval is above 0"


SEEN_IN_THE_RUN = frozenset(
    {
        Need.BIAS,
        Need.SELECTED_BLOCKS,
        Need.CUDA,
        Need.KNOWN_PEAK,
        Need.TILES,
        Need.KNOWN_BYTES,
        Need.SEVERAL_SOURCES,
        Need.VARYING_EXPERTS,
    }
)
"""What the config alone does not say: it depends on the machine, or on what training does."""


class Level(Enum):
    """Further names of a metric of layers, whose own name is the mean over them."""

    MAX = "max"
    MIN = "min"
    LAYERS = "layers"
    DETAILED_LAYERS = "layers*"


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them where the name has a <placeholder>."""

    name: str
    """As in metrics.jsonl. A group adds its prefix to the names of its metrics."""
    label: str
    """In a few words, as the report shows it."""
    unit: str
    """A key of UNITS."""
    better: Better
    meaning: str
    """The definition, for docs/metrics.md."""
    moment: Moment = Moment.INTERVAL
    needs: frozenset[Need] = frozenset()
    """All of them must hold; those of the group are among them."""
    levels: tuple[Level, ...] = ()

    def names(
        self, moe_layers: Iterable[int], sparse_layers: Iterable[int], detailed: bool
    ) -> set[str]:
        """All names it is logged under in a run with these layers. detailed: with
        tracker.metrics=detailed. Placeholders stay, but for the deciles of <decile>.
        """
        if "<decile>" in self.name:
            return {self.name.replace("<decile>", str(d)) for d in range(DECILES)}
        found = {self.name}
        found |= {
            f"{self.name}/{level.value}" for level in self.levels if level in (Level.MAX, Level.MIN)
        }
        every_layer = Level.LAYERS in self.levels
        if every_layer or (detailed and Level.DETAILED_LAYERS in self.levels):
            layers = sparse_layers if self.name.startswith("attention/") else moe_layers
            found |= {f"{self.name}/layer_{layer}" for layer in layers}
        return found


@dataclass(frozen=True)
class Group:
    """Metrics that are read together: a section of docs/metrics.md."""

    title: str
    introduction: str
    metrics: tuple[Metric, ...]
    needs: frozenset[Need] = frozenset()
    """What all metrics of the group need; the introduction says so."""


DECILES = 10
UNITS = {
    "": "none",
    "share": "a part of a whole, 0 to 1",
    "relative": "a difference over what it should be: 0.02 is 2%",
    "ratio": "a quotient of equal quantities",
    "nats": "natural units of information",
    "bits/byte": "bits per byte of text",
    "logits": "as the router's logits",
    "experts": "a number of experts",
    "heads": "a number of attention heads",
    "experts/token": "a mean number of experts per token",
    "blocks": "a mean number of blocks of keys",
    "layer": "the number of a layer, from 0",
    "layers": "a number of layers",
    "rows": "a number of rows of attention (a token in a head)",
    "steps": "a number of optimisation steps",
    "calls": "a number of calls",
    "FLOPs/token": "floating-point operations per token",
    "tokens/s": "tokens per second",
    "s": "seconds",
    "bytes": "bytes",
    "GiB": "2^30 bytes",
    "0 or 1": "no or yes",
}


def group(
    title: str,
    prefix: str,
    needs: Iterable[Need],
    introduction: str,
    *metrics: Metric,
) -> Group:
    """A group whose metrics get the prefix before their names and the group's needs."""
    shared = frozenset(needs)
    whole = tuple(replace(m, name=prefix + m.name, needs=m.needs | shared) for m in metrics)
    return Group(title, introduction, whole, shared)


def needs(*needs: Need) -> frozenset[Need]:
    return frozenset(needs)


HIGHER, LOWER, NEITHER = Better.HIGHER, Better.LOWER, Better.NEITHER
STEP, SAMPLE, STATE = Moment.STEP, Moment.SAMPLE, Moment.STATE
SO_FAR, EVALUATION = Moment.SO_FAR, Moment.EVALUATION
EVERY_LAYER = (Level.MAX, Level.LAYERS)
SPREAD = (Level.MAX, Level.DETAILED_LAYERS)
"""Mean and largest always; single layers with tracker.metrics=detailed."""
