"""Which tokens went to which experts, and why: python -m launch.audit run=DIR [layer= step=
expert= reason= token= limit=20] [compare=DIR2].
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.audit")
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import record, require_given
from launch.saved.run import load_run

if TYPE_CHECKING:
    from train.audit.records import AuditLogConfig, AuditRecords, AuditSteps
from launch.runs.texts import Texts, _one_line, open_texts

MAX_BYTES, STEPS = 1 << 26, 64
"""Of larger audits so many steps are read at most, and as many bytes."""
BUSIEST = 3
"""Experts per layer whose tokens are shown."""
TOP_TOKENS = 5
MIN_ASSIGNMENTS = 10
"""An expert with fewer sampled assignments is nobody's favourite."""


def main(config: DictConfig) -> None:
    """Print a summary of a run's routing and single records of it; with compare, where two runs
    part.
    """
    from train.audit.files import steps_that_fit
    from train.audit.format import FOLDER
    from train.audit.records import AuditLogConfig, read_records, read_steps
    from train.checkpoint.folder import newest_complete

    require_given(config, AuditLogConfig, config.run is not None, "give run=DIR")
    settings: AuditLogConfig = record(config, AuditLogConfig)
    run = load_run(settings.run, checkpoint=newest_complete(Path(settings.run)))
    folder = Path(settings.run) / FOLDER
    steps = read_steps(folder)

    if settings.layer is not None and settings.layer not in steps.moe_layers:
        raise ValueError(
            f"layer {settings.layer} has no experts; choose one of "
            f"{', '.join(map(str, steps.moe_layers))}"
        )
    if settings.expert is not None and settings.expert >= run.model.num_experts:
        raise ValueError(
            f"expert is {settings.expert}; the run has experts 0 to {run.model.num_experts - 1}"
        )

    result: dict[str, Any] = {"run_dir": settings.run}
    if settings.compare is not None:
        result["compare"] = compare(steps, read_steps(Path(settings.compare) / FOLDER), settings)

    # A large audit is read in part, or it would fill the memory.
    chosen = (
        settings.step
        if settings.step is not None
        else steps_that_fit(folder, MAX_BYTES, STEPS, steps.step)
    )
    if isinstance(chosen, list):
        print(
            f"the audit is above {MAX_BYTES >> 20} MiB: {len(chosen)} steps of it are read, spread "
            "evenly (step=N reads another)"
        )

    records = read_records(folder, chosen)
    if settings.layer is not None:
        records = records.take(records.layer == settings.layer)

    texts = open_texts(settings.run, run)
    result |= summary(settings, steps, records)

    # Shares are counted over the sample alone: flagged tokens would bend them.
    layers = steps.moe_layers if settings.layer is None else (settings.layer,)
    sample = records.take(records.sampled)
    vocabulary_ids = (
        np.full(len(sample), -1) if texts is None else texts.vocabulary_ids(sample.token)
    )
    result["layers"] = [
        layer_summary(layer, sample, vocabulary_ids, texts, run.model.num_experts)
        for layer in layers
    ]
    if texts is not None:
        result["sources"] = source_summary(layers, sample, texts, run.model.num_experts)

    # Single records may be flagged ones: those are what one looks for.
    matching = records.take(_matching(records, settings))
    result["matching"] = len(matching)
    shown = matching.take(np.arange(min(settings.limit, len(matching))))
    print(
        f"\n{len(matching):,} matching records"
        + (f", the first {len(shown)}:" if len(shown) < len(matching) else ":")
    )
    for row in range(len(shown)):
        print_record(shown.take(np.array([row])), texts)

    print_result(result)


def _matching(records: AuditRecords, settings: AuditLogConfig) -> np.ndarray:
    """[N] bool: the records that the filters leave."""
    from ops.router import Reason

    mask = np.full(len(records), True)
    if settings.expert is not None:
        mask = (
            np.bincount(records.owner[records.experts == settings.expert], minlength=len(records))
            > 0
        )
    if settings.reason is not None:
        mask &= records.reasons & int(Reason[settings.reason.upper()]) > 0
    return mask if settings.token is None else mask & (records.token == settings.token)


def summary(settings: AuditLogConfig, steps: AuditSteps, records: AuditRecords) -> dict[str, Any]:
    """What the log covers."""
    covered = np.unique(records.step)
    span = f"steps {covered[0]} to {covered[-1]}" if len(covered) else "no step"
    rates = np.unique(steps.sample_one_in).tolist()
    num_sampled = int(records.sampled.sum())
    print(
        f"{settings.run}: {span}, {len(records):,} records; {num_sampled:,} of them sampled (one "
        f"token in {' or '.join(map(str, rates)) or '?'}), the others have a reason"
    )
    if steps.flagged_dropped or steps.lost_micro_batches:
        print(
            f"left out: {steps.flagged_dropped:,} tokens with a reason beyond audit.max_flagged, "
            f"{steps.lost_micro_batches:,} micro-batches the disk was too slow for"
        )
    print("shares and means below are over the sampled tokens")
    return {
        "records": len(records),
        "sampled": num_sampled,
        "steps": len(covered),
        "sample_one_in": rates,
        "flagged_dropped": steps.flagged_dropped,
        "lost_micro_batches": steps.lost_micro_batches,
    }


def layer_summary(
    layer: int,
    sample: AuditRecords,
    vocabulary_ids: np.ndarray,
    texts: Texts | None,
    num_experts: int,
) -> dict[str, Any]:
    """Means of a layer, its reasons, and what its busiest experts see most often."""
    from ops.router import Reason

    chosen = sample.layer == layer
    vocabulary_ids, part = vocabulary_ids[chosen], sample.take(chosen)
    if len(part) == 0:
        print(f"layer {layer:3d}  nothing sampled")
        return {"layer": layer, "sampled": 0}

    reasons = {
        str(r.name).lower(): share
        for r in Reason
        if (share := float((part.reasons & r > 0).mean()))
    }

    facts = {
        "layer": layer,
        "sampled": len(part),
        "mean_k": float(part.k.mean()),
        "mean_margin": float(part.margin.mean()),
        "mean_entropy": float(part.entropy.mean()),
        "reasons": reasons,
    }
    print(
        f"layer {layer:3d}  {len(part):,} sampled  k {facts['mean_k']:.3f}  margin "
        f"{facts['mean_margin']:.4f}  entropy {facts['mean_entropy']:.3f}  "
        + ("  ".join(f"{n} {s:.1%}" for n, s in reasons.items()) or "no reasons")
    )

    counts = np.bincount(part.experts, minlength=num_experts)
    busiest = []
    for expert in np.argsort(-counts, kind="stable")[:BUSIEST].tolist():
        seen = vocabulary_ids[part.owner[part.experts == expert]]
        values, times = np.unique(seen[seen >= 0], return_counts=True)
        top = np.argsort(-times, kind="stable")[:TOP_TOKENS]
        tokens = (
            [] if texts is None else [(texts.decode(values[i : i + 1]), int(times[i])) for i in top]
        )

        share = counts[expert] / max(1, counts.sum())
        busiest.append({"expert": expert, "share": float(share), "tokens": tokens})
        print(
            f"    expert {expert:3d} {share:6.1%}  "
            + "  ".join(f"{_one_line(text)} {n}" for text, n in tokens)
        )
    return {**facts, "experts": busiest}


def source_summary(
    layers: tuple[int, ...], sample: AuditRecords, texts: Texts, num_experts: int
) -> list[dict[str, Any]]:
    """Per data source the experts per token, and in each layer the expert whose share among the
    source's assignments most exceeds (lift) its share among all.
    """
    tokens, where = np.unique(sample.token, return_inverse=True)
    source_of = np.array([texts.source(int(token)) for token in tokens], dtype=np.int64)[where]

    found = []
    for source, name in enumerate(texts.names):
        own = source_of == source
        mean_k = float(sample.k[own].mean()) if own.any() else None

        # One source alone has nothing to be compared with.
        favourites = []
        for layer in layers if len(texts.names) > 1 and own.any() else ():
            everyone = np.bincount(
                sample.take(sample.layer == layer).experts, minlength=num_experts
            )
            ours = np.bincount(
                sample.take(own & (sample.layer == layer)).experts, minlength=num_experts
            )
            lift = ours / max(1, ours.sum()) / np.maximum(everyone, 1) * everyone.sum()
            lift[everyone < MIN_ASSIGNMENTS] = 0
            if lift.max() > 0:
                favourites.append(
                    {"layer": layer, "expert": int(lift.argmax()), "lift": float(lift.max())}
                )

        found.append({"source": source, "name": name, "mean_k": mean_k, "experts": favourites})
        print(
            f"source {name}: "
            + ("nothing sampled" if mean_k is None else f"k {mean_k:.3f}  ")
            + "  ".join(
                f"layer {f['layer']}: expert {f['expert']} {f['lift']:.2f}x" for f in favourites
            )
        )
    return found


def print_record(one: AuditRecords, texts: Texts | None) -> None:
    """One record; its text, if there is one, on a second line."""
    from train.audit.format import reason_names

    token = int(one.token[0])
    source = "" if texts is None else f"  source {texts.names[texts.source(token)]}"
    gates = " ".join(
        f"{expert}:{gate:.3f}" for expert, gate in zip(one.experts, one.gates, strict=True)
    )
    print(
        f"step {one.step[0]}  layer {one.layer[0]}  token {token}{source}  k {one.k[0]}  reasons "
        f"{','.join(reason_names(int(one.reasons[0]))) or 'none'}  margin {one.margin[0]:.4f}  "
        f"entropy {one.entropy[0]:.3f}  experts {gates or 'none'}"
    )
    if texts is not None:
        print(f"    {texts.context(token)}")


def compare(ours: AuditSteps, theirs: AuditSteps, settings: AuditLogConfig) -> dict[str, Any]:
    """The first step and layer in which two runs sent some token to another expert.

    Raises:
        ValueError: they have experts in other layers, or no step in common.
    """
    if ours.moe_layers != theirs.moe_layers:
        raise ValueError(
            f"{settings.run} has experts in layers {list(ours.moe_layers)}, {settings.compare} in "
            f"{list(theirs.moe_layers)}: nothing to compare"
        )

    sums, other = (
        {int(s): c for s, c in zip(side.step, side.checksums, strict=True) if c is not None}
        for side in (ours, theirs)
    )

    common = sorted(sums.keys() & other.keys())
    if not common:
        raise ValueError(
            f"{settings.run} and {settings.compare} have no step with checksums in common"
        )

    # A checksum stands for all choices of a layer in a step: the first that differs is where they
    # part.
    for step in common:
        for layer, one, two in zip(ours.moe_layers, sums[step], other[step], strict=True):
            if one != two:
                print(
                    f"routing differs from {settings.compare} first in step "
                    f"{step}, layer {layer}: {one} against {two}; common "
                    f"steps before it, all agreeing: {common.index(step)}"
                )
                return {"common_steps": len(common), "step": step, "layer": layer}
    print(
        f"routing agrees with {settings.compare} in all {len(common)} common steps ({common[0]} to "
        f"{common[-1]}) and {len(ours.moe_layers)} layers"
    )
    return {"common_steps": len(common), "step": None, "layer": None}


if __name__ == "__main__":
    # the output is long: `| head` ends it in silence
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run_main("audit", main)
