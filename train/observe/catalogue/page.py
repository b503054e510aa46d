"""docs/metrics.md: `python -m train.observe.catalogue.page` prints it (`make docs`)."""

from __future__ import annotations

import textwrap

from train.observe.catalogue.names import GROUPS
from train.observe.catalogue.pictures import MEDIA
from train.observe.catalogue.record import UNITS, Group, Moment, Need

INTRODUCTION = """\
# Metrics

<!-- Written by `make docs` from train/observe/catalogue: change that, not this page. -->

In `metrics.jsonl`, W&B and TensorBoard, every `train.log_interval` steps, at the last step, and at
the one a run is stopped after. Every record has `step` and `tokens` (consumed so far), which are
`train/step` and `train/tokens` in W&B.

Of metrics of layers, `NAME` is the mean over the layers that have it, and the column *also* says
what else is there: *max* and *min* are `NAME/max` and `NAME/min`, the largest and smallest layer;
*layers* is `NAME/layer_<l>` for each of them, *layers\\** with tracker.metrics=detailed only. That
is about 60 keys and 4 per MoE layer, detailed about 20 per layer. Numbers of single experts are
never scalars: they are in routing.jsonl, heatmaps and histograms.

A step that was skipped (train.on_nonfinite=skip) counts in the speed, the bytes and
`train/skipped_steps`, for it took its time and consumed its tokens, and in nothing else. null is
what the files have for every number that is not finite (they are strict JSON); W&B and TensorBoard
get it as it is.

*Better* says which way is better, all else being equal. *When* says what a record covers:
"""
FILES = """\
## Files beside the metrics

`routing.jsonl` has, per layer, assignments by expert, tokens by number of experts, and tokens by
reason. `audit/steps.jsonl` has a 64-bit checksum of the routing per step and layer, the same for
any order of tokens; `python -m launch.audit run=A compare=B` finds the first step in which two runs
part. `audit/records-*.bin` holds sampled tokens and flagged ones (format.json).

### How large the files become

`metrics.jsonl` and `routing.jsonl` stay below `tracker.max_log_mib` each (256; 0: no limit),
`audit/` below `audit.max_mib` over all ranks (1024, shared evenly; an eighth for `steps.jsonl`),
`probe/` at 128 files. `launch.plan` prints what a run would write of each. Beyond three quarters
of a limit the old part is thinned to a fifth of it, and the newest fifth stays as it was:

- **routing.jsonl**: neighbours are added up, entry by entry, so that every total stays exact. A
  merged line has the step and tokens of its last one and `records`, the number it stands for;
  like every line it is about the steps since the line before it. The old part is even: a line for
  every so many steps, a power of two.
- **metrics.jsonl**: the same stretches keep their last record, with the means over tokens of
  `train/loss` and `moe/expert_flops_per_token` (so FLOPs spent stay exact). Records of
  evaluations all stay, and are counted against the limit.
- **audit/records-*.bin**: of older steps those stay, whole, whose number a power of two divides.
  `steps.jsonl` keeps the lines of such steps; what was left out (`flagged_dropped`,
  `lost_micro_batches`) adds up. A step that one rank still has and another has not is not among
  those that the report picks.

Nothing is merged across the step of a checkpoint that is there, so a resume from it finds the
sums up to it exact; a resume from a checkpoint that was copied back later may find the record
around it gone. The new file is written beside the old one, a little with every record, synced and
renamed: a killed process leaves one or the other whole. A resume reads the logs from their ends,
as far as the records reach that it drops; the audit's binary files are read through, piece by
piece.
"""


def page() -> str:
    """docs/metrics.md."""
    parts = [INTRODUCTION]
    parts.append("".join(f"- *{moment.value}*: {moment.explained}\n" for moment in Moment))
    parts.append("Units:\n")
    parts.append("".join(f"- {unit}: {text}\n" for unit, text in UNITS.items() if unit))
    parts += [_section(group) for group in GROUPS]
    parts += [_section(MEDIA), FILES]
    return "\n".join(parts)


def _section(group: Group) -> str:
    """A heading, the introduction, and a row for every metric."""
    rows = ["| metric | also | unit | better | meaning | when |", "|---|---|---|---|---|---|"]
    for metric in group.metrics:
        where = [need.value for need in Need if need in metric.needs - group.needs]
        cells = (
            f"`{metric.name}`",
            ", ".join(level.value.replace("*", r"\*") for level in metric.levels),
            metric.unit,
            metric.better.value,
            metric.meaning.replace("|", r"\|"),
            metric.moment.value + (f"; where {' and '.join(where)}" if where else ""),
        )
        rows.append("| " + " | ".join(cells) + " |")
    introduction = textwrap.fill(group.introduction, 100, break_on_hyphens=False)
    return "\n\n".join((f"## {group.title}", introduction, "\n".join(rows))) + "\n"


if __name__ == "__main__":
    print(page(), end="")
