"""Bytes that a run writes into its directory, by arithmetic: what `launch.plan` prints of logs and
checkpoints. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.attention.config.sparse import SparseAttentionConfig
from model.cost.parameters import count_parameters, has_index, sparse_layers
from train.config.run import RunConfig
from train.engine.muon.planned import planned_muon
from train.files.sizes import MIB
from train.observe.catalogue.names import metric_names

STATE_BYTES = 12
"""Of a parameter in a checkpoint: fp32 weight and Adam's two moments; Muon has one."""
WEIGHT_BYTES = 4
"""Of one that is not trained: it has no moments."""
VALUE = 18
"""Characters of a measured number and of the comma and space after it."""
RNG_BYTES = 25_000
"""Of a rank's random state."""
LINES_SHARE = 0.125
"""Of audit.max_mib for the lines of the steps (train.audit.log.LINES_SHARE)."""
PROBE_TOKENS, PROBES_KEPT = 4096, 128
"""train.observe.probe.MAX_TOKENS and MAX_KEPT."""


@dataclass(frozen=True)
class Written:
    """One kind of file that a run writes."""

    each: int
    """Bytes of one record or checkpoint."""
    number: int
    """How many the run writes, or keeps of them."""
    total: int
    """Bytes at the end of the run."""
    limit: str = ""
    """What bounds it; "" if nothing does."""


def disk_usage(run: RunConfig, num_ranks: int) -> dict[str, Written]:
    """What a run of train.num_steps steps leaves on disk, by kind.

    Without what depends on the tokens (records of tokens with a fallback reason, at most
    audit.max_flagged per layer, micro-batch and rank; alarms), and without the files of W&B and
    TensorBoard.
    """
    # How often each kind is written; the last step is evaluated and saved in any case.
    model, settings = run.model, run.train
    steps = settings.num_steps
    logged = math.ceil(steps / settings.log_interval)
    evaluations = 1 + (0 if not settings.eval_interval else (steps - 1) // settings.eval_interval)

    # Logs are thinned at their limit, but records of evaluations stay.
    log_limit = run.tracker.max_log_mib * MIB
    found = {
        "metrics": _bounded(
            _metrics_line(run, num_ranks),
            logged,
            log_limit,
            "tracker.max_log_mib",
            _evaluation_line(run) * evaluations,
        )
    }

    if model.num_experts:
        found["routing"] = _bounded(_routing_line(run), logged, log_limit, "tracker.max_log_mib")
        found["probe"] = _probes(run, evaluations)
        if run.audit.sample_one_in:
            limit = run.audit.max_mib * MIB
            found["audit records"] = _bounded(
                _audit_records(run), steps, int((1 - LINES_SHARE) * limit), "audit.max_mib"
            )
            found["audit steps"] = _bounded(
                _audit_line(run), steps, int(LINES_SHARE * limit), "audit.max_mib"
            )

    # The newest and the best are kept beside each other, and may be the same.
    saves = 1 + (
        0 if not run.checkpoint.save_interval else (steps - 1) // run.checkpoint.save_interval
    )
    most = run.checkpoint.keep_last + run.checkpoint.keep_best
    kept = min(saves + (evaluations if run.checkpoint.keep_best else 0), most)
    each = checkpoint_bytes(run, num_ranks)
    found["checkpoints"] = Written(each, kept, each * kept, "checkpoint.keep_last")
    return found


def checkpoint_bytes(run: RunConfig, num_ranks: int) -> int:
    """Parameters with their optimiser state, and the random states of the ranks; headers and the
    index, at most 2 kB a tensor, come on top.
    """
    count = count_parameters(run.model, run.experts_per_token, run.attention.arguments)
    trained = run.trained
    frozen = count.total + trained.adapters - trained.total
    one_moment = sum(planned_muon(run, num_ranks).parameters)
    each = STATE_BYTES + (4 if run.optim.ema_decay is not None else 0)
    states = each * trained.total + WEIGHT_BYTES * frozen - 4 * one_moment
    return states + RNG_BYTES * num_ranks


def run_bytes(found: dict[str, Written]) -> int:
    """All kinds together, at the end of the run."""
    return sum(kind.total for kind in found.values())


def _bounded(each: int, number: int, limit: int, key: str, further: int = 0) -> Written:
    total = each * number + further
    return Written(
        each,
        number,
        min(total, limit) if limit else total,
        f"{key}={limit // MIB}" if total > limit > 0 else "",
    )


def _digits(value: float) -> int:
    return len(str(round(value)))


def _most_experts(run: RunConfig) -> int:
    """Slots of a token, as the routers have them."""
    arguments = run.router.arguments
    most = arguments.get("max_experts")
    if most is None:
        most = (
            4 * max(1, math.ceil(run.experts_per_token))
            if "budget" in arguments
            else run.model.top_k
        )
    return min(int(most), run.model.num_experts)


def _tokens(run: RunConfig) -> int:
    """Of a step."""
    return run.train.global_batch_size * run.train.seq_len


def _of_options(run: RunConfig) -> set[str]:
    """Metrics of settings that the run has not."""
    clips = run.optim.qk_clip is not None
    logged = {
        "train/z_loss": run.train.z_loss_coeff > 0,
        "train/aux_loss_coeff": run.balance.aux_loss_schedule.style != "constant",
        "train/bias_update_rate": run.balance.bias_rate_schedule.style != "constant",
        "train/max_attention_logit": clips,
        "train/clipped_heads": clips,
        "train/mtp_loss": run.model.num_mtp_layers > 0,
    }
    return {name for name, is_logged in logged.items() if not is_logged}


def _metrics_line(run: RunConfig, num_ranks: int) -> int:
    """Bytes of a record of training, with the metrics that such a run can measure."""
    model = run.model
    names = metric_names(
        model.moe_layers,
        sparse_layers(model.num_layers, run.attention.arguments)
        if isinstance(run.attention, SparseAttentionConfig) or has_index(run.attention.arguments)
        else (),
        run.tracker.metrics == "detailed",
    )

    # What the run cannot measure it does not write.
    absent = {"perf/mfu"}
    if run.parallel.expert_parallel_size == 1 or num_ranks == 1:
        absent |= {name for name in names if name.startswith("moe/rank_load")}
        if run.parallel.parts_size == run.parallel.pipeline_parallel_size == 1:
            absent |= {name for name in names if name.startswith("comm/")}
    if "budget" not in run.router.arguments:
        absent |= {
            name
            for name in names
            if name.startswith(("moe/budget_error", "moe/theta", "moe/mode_share", "moe/top_p"))
        }
    if not run.router.arguments.get("num_null_experts"):
        absent |= {name for name in names if name.startswith("moe/null_fraction")}
    if not model.num_experts:
        absent |= {name for name in names if name.startswith("moe/")}
    by_index = {name for name in names if name.startswith("attention/index_")}
    if not has_index(run.attention.arguments):
        absent |= by_index
    if not isinstance(run.attention, SparseAttentionConfig):
        absent |= {name for name in names if name.startswith("attention/")} - by_index
    if run.attention.arguments.get("resident_blocks") is None:
        absent |= {name for name in names if name.startswith("attention/resident_")}

    absent |= _of_options(run)

    written = [*(names - absent), *(f"alarm/{name}" for name in run.alarms)]
    return 40 + sum(len(name) + 4 + VALUE for name in written)


def _evaluation_line(run: RunConfig) -> int:
    adaptive = "budget" in run.router.arguments and run.model.num_experts
    return 180 + (20 * (len("eval/experts_per_token/frequency_0") + 4 + VALUE) if adaptive else 0)


def _routing_line(run: RunConfig) -> int:
    """Bytes of a record of routing: three tables with a row per MoE layer."""
    model, tokens = run.model, _tokens(run) * run.train.log_interval
    most = _most_experts(run)
    counts = model.num_experts * (_digits(tokens * run.experts_per_token / model.num_experts) + 2)
    busy = most + 1 if "budget" in run.router.arguments else 1
    histogram = busy * (_digits(tokens / busy) + 2) + (most + 1 - busy) * 3
    return 90 + len(model.moe_layers) * (counts + histogram + 8 * 3 + 6)


def _probes(run: RunConfig, evaluations: int) -> Written:
    """Before they are compressed."""
    tokens = min(PROBE_TOKENS, run.train.micro_batch_size * run.train.seq_len)
    each = tokens * (2 * len(run.model.decoder_moe_layers) * _most_experts(run) + 8)
    kept = min(evaluations, PROBES_KEPT)
    return Written(each, kept, each * kept, f"{PROBES_KEPT} files" if kept < evaluations else "")


def _audit_records(run: RunConfig) -> int:
    """Of a step: 16 bytes a sampled token and layer, and 3 an expert."""
    sampled = _tokens(run) / run.audit.sample_one_in
    return round(sampled * len(run.model.moe_layers) * (16 + 3 * run.experts_per_token))


def _audit_line(run: RunConfig) -> int:
    """Of a step: a checksum per layer."""
    return (
        125
        + _digits(run.train.num_steps)
        + _digits(run.train.num_steps * _tokens(run))
        + 20 * len(run.model.moe_layers)
    )
