"""What W&B and TensorBoard get beside the scalars."""

from __future__ import annotations

from train.observe.catalogue.record import (
    NEITHER,
    Metric,
    Need,
    group,
)

MEDIA = group(
    "In W&B and TensorBoard",
    "routing/",
    (Need.EXPERTS, Need.MEDIA),
    "The same scalars under the same names, over `train/tokens`; and, at every "
    "`tracker.media_interval`-th logged step, pictures. W&B is optional: without a key or a server "
    "it writes offline, `wandb leet RUN/wandb` shows the run live in a terminal, `wandb sync "
    "RUN/wandb/offline-run-*` uploads it later (`--no-skip-online` for one that began online and "
    "lost its server), and a failing sink is switched off with a warning while training goes on. A "
    "resumed run continues its W&B run.",
    Metric(
        "expert_load",
        "load of experts",
        "ratio",
        NEITHER,
        "heatmap: MoE layers down, experts across, load over the layer's mean; blue below 1, red "
        "above, full at 2",
    ),
    Metric(
        "expert_load_histogram",
        "distribution of the load",
        "ratio",
        NEITHER,
        "histogram of the same numbers",
    ),
    Metric(
        "experts_per_token",
        "tokens by number of experts",
        "experts",
        NEITHER,
        "histogram: tokens of all layers by their number of experts",
    ),
)
