"""What sparse attention selects, and what it loses against dense attention."""

from __future__ import annotations

from train.observe.catalogue.record import (
    EVERY_LAYER,
    HIGHER,
    LOWER,
    NEITHER,
    STEP,
    Level,
    Metric,
    Need,
    group,
    needs,
)

ATTENTION = (
    group(
        "Sparse attention",
        "attention/",
        (Need.SPARSE,),
        "Of sparse layers, measured in logged steps: sums over unpadded tokens and all ranks. "
        "Audited rows are compared with dense attention; they are drawn by a hash of the token's "
        "id (attention.audit_rows), the same ones under any layout.",
        Metric(
            "tail_mass",
            "mass of the tail",
            "share",
            LOWER,
            "share of the softmax that went to pooled entries, mean over tokens and heads",
            STEP,
            levels=(Level.LAYERS,),
        ),
        Metric(
            "selected_mass",
            "mass of selected blocks",
            "share",
            HIGHER,
            "share that went to selected blocks. With merge=gated both are those of the softmax "
            "over selected blocks",
            STEP,
            levels=(Level.LAYERS,),
        ),
        Metric(
            "selected_blocks",
            "selected blocks",
            "blocks",
            NEITHER,
            "selected blocks per query and key/value head",
            STEP,
            levels=(Level.DETAILED_LAYERS,),
        ),
        Metric(
            "union_factor",
            "union factor",
            "ratio",
            LOWER,
            "distinct blocks that 16 neighbouring queries selected, over what one of them "
            "selected: 1 is all the same, 16 all different. It multiplies the work of a kernel's "
            "tile",
            STEP,
            needs(Need.SELECTED_BLOCKS),
            (Level.LAYERS,),
        ),
        Metric(
            "error",
            "attention error",
            "relative",
            LOWER,
            "audited rows: |o - dense| / |dense|, at most 1",
            STEP,
            needs(Need.DENSE_CHECK),
            EVERY_LAYER,
        ),
        Metric(
            "error_bound",
            "bound on the error",
            "relative",
            LOWER,
            "upper bound on the mean error over all rows, empirical Bernstein, fails with "
            "probability 0.001",
            STEP,
            needs(Need.DENSE_CHECK),
            (Level.DETAILED_LAYERS,),
        ),
        Metric(
            "certificate",
            "certificate",
            "relative",
            LOWER,
            "sub-Gaussian bound on the error per row, at most 1",
            STEP,
            needs(Need.DENSE_CHECK),
            (Level.LAYERS,),
        ),
        Metric(
            "certificate_coverage",
            "covered rows",
            "share",
            HIGHER,
            "share of audited rows that the certificate covers",
            STEP,
            needs(Need.DENSE_CHECK),
            (Level.DETAILED_LAYERS,),
        ),
        Metric(
            "bound_violations",
            "violations of the bound",
            "rows",
            LOWER,
            "audited rows of all layers whose error exceeds its bound by more than rounding can "
            "explain (ops/sparse_attention/README.md): anything but 0 is a bug",
            STEP,
            needs(Need.DENSE_CHECK),
        ),
        Metric(
            "mass_kl",
            "KL of block masses",
            "nats",
            LOWER,
            "KL divergence of the estimated from the true shares of the past blocks",
            STEP,
            needs(Need.DENSE_CHECK),
            (Level.DETAILED_LAYERS,),
        ),
        Metric(
            "coherence",
            "variance within entries",
            "",
            LOWER,
            "variance of logits within pooled entries, weighted by their mass: what the correction "
            "has to correct",
            STEP,
            needs(Need.DENSE_CHECK),
            (Level.DETAILED_LAYERS,),
        ),
    ),
    group(
        "A bounded cache",
        "attention/",
        (Need.RESIDENT,),
        "Of sparse layers with attention.resident_blocks, on the audited rows.",
        Metric(
            "resident_recall",
            "mass of resident blocks",
            "share",
            HIGHER,
            "share of what dense attention gives the blocks between the first ones and the window "
            "that is on blocks whose tokens a cache still has: what is missing was evicted",
            STEP,
            needs(Need.DENSE_CHECK),
            (Level.LAYERS,),
        ),
    ),
    group(
        "Attention by an index",
        "attention/",
        (Need.INDEXED,),
        "Of layers with an index, measured in logged steps: sums over unpadded tokens and all "
        "ranks. Audited rows are compared with dense attention, also in the first "
        "attention.dense_steps, in which the index chooses nothing.",
        Metric(
            "index_loss",
            "loss of the index",
            "nats",
            LOWER,
            "KL divergence of the index's softmax from the attention's own masses, over everything "
            "in the dense steps and over what was chosen after them; with attention.select=index "
            "over all candidates",
            STEP,
            levels=(Level.LAYERS,),
        ),
        Metric(
            "index_recall",
            "recall of the index",
            "share",
            HIGHER,
            "audited rows: share of dense attention's softmax on what the index chooses, mean over "
            "heads; with attention.select=index, of the part of it on candidates; with "
            "attention=compressed, of what attention to all entries gives to entries",
            STEP,
            needs(Need.INDEX_CHECK),
            (Level.MIN, Level.LAYERS),
        ),
    ),
)
