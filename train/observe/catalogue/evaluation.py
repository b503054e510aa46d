"""Held-out text, and the alarms."""

from __future__ import annotations

from train.observe.catalogue.record import (
    EVALUATION,
    LOWER,
    NEITHER,
    STATE,
    Metric,
    Need,
    group,
    needs,
)

EVALUATION_AND_ALARMS = (
    group(
        "Evaluation",
        "eval/",
        (),
        "In records of their own, at every evaluation. The last three are of rank 0's first "
        "held-out batch, the same at every evaluation (at most 4,096 tokens, kept in "
        "`RUN/probe/`).",
        Metric(
            "val_loss",
            "held-out loss",
            "nats",
            LOWER,
            "mean over the held-out targets",
            EVALUATION,
        ),
        Metric(
            "val_loss/<source>",
            "held-out loss by source",
            "nats",
            LOWER,
            "the same over the targets of one source of held-out text, by its label",
            EVALUATION,
            needs(Need.SEVERAL_SOURCES),
        ),
        Metric("perplexity", "perplexity", "", LOWER, "exp(eval/val_loss)", EVALUATION),
        Metric(
            "bits_per_byte",
            "bits per byte",
            "bits/byte",
            LOWER,
            "the loss of all held-out targets over the bytes they stand for: comparable between "
            "tokenizers",
            EVALUATION,
            needs(Need.KNOWN_BYTES),
        ),
        Metric(
            "experts_per_token",
            "experts per token, held out",
            "experts/token",
            NEITHER,
            "mean over held-out tokens and layers",
            EVALUATION,
            needs(Need.EXPERTS),
        ),
        Metric(
            "router_stability",
            "router stability",
            "share",
            NEITHER,
            "share of a token's experts that it had at the evaluation before",
            EVALUATION,
            needs(Need.EXPERTS, Need.TWO_EVALUATIONS),
        ),
        Metric(
            "experts_per_token/frequency_<decile>",
            "experts per token by frequency",
            "experts/token",
            NEITHER,
            "mean over the tokens in a decile of their frequency in held-out text, 0 the rarest",
            EVALUATION,
            needs(Need.EXPERTS, Need.VARYING_EXPERTS),
        ),
        Metric(
            "experts_per_token/loss_<decile>",
            "experts per token by loss",
            "experts/token",
            NEITHER,
            "mean over the tokens in a decile of their loss, 0 the easiest",
            EVALUATION,
            needs(Need.EXPERTS, Need.VARYING_EXPERTS),
        ),
    ),
    group(
        "Alarms",
        "alarm/",
        (Need.ALARMS,),
        "One of each alarm whose metric the run logs (docs/alarms.md).",
        Metric("<alarm>", "alarm", "0 or 1", LOWER, "1 while the alarm rings", STATE),
    ),
)
