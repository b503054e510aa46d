"""How training goes, how fast it is, and what ranks send to each other."""

from __future__ import annotations

from train.observe.catalogue.record import (
    HIGHER,
    LOWER,
    NEITHER,
    SAMPLE,
    SO_FAR,
    STEP,
    Metric,
    Need,
    group,
    needs,
)

TRAINING = (
    group(
        "Loss",
        "train/",
        (),
        "How training goes. A record whose interval trained nothing has no `moe/*`, and its loss "
        "is null.",
        Metric(
            "loss",
            "training loss",
            "nats",
            LOWER,
            "mean over the predicted targets of the interval's updates, without auxiliary losses",
        ),
        Metric(
            "mtp_loss",
            "multi-token prediction",
            "nats",
            LOWER,
            "loss of the modules of multi-token prediction: mean over the targets that each has in "
            "the interval's updates, and over the modules; without its weight train.mtp_coeff",
            needs=needs(Need.MTP),
        ),
        Metric(
            "z_loss",
            "z-loss of the logits",
            "",
            NEITHER,
            "squared logsumexp of the output logits, mean over the predicted targets of the "
            "interval's updates, without its weight train.z_loss_coeff",
            needs=needs(Need.LOGIT_Z_LOSS),
        ),
        Metric("lr", "learning rate", "", NEITHER, "of the logged step, as scheduled", STEP),
        Metric(
            "aux_loss_coeff",
            "balance loss coefficient",
            "",
            NEITHER,
            "balance.aux_loss_coeff of the logged step, as scheduled",
            STEP,
            needs=needs(Need.AUX_LOSS_SCHEDULE),
        ),
        Metric(
            "bias_update_rate",
            "bias update rate",
            "",
            NEITHER,
            "balance.bias_update_rate of the logged step, as scheduled",
            STEP,
            needs=needs(Need.BIAS_RATE_SCHEDULE),
        ),
        Metric(
            "max_attention_logit",
            "largest attention logit",
            "",
            NEITHER,
            "over all layers, heads and tokens of the last step that was measured "
            "(optim.qk_clip_interval), before its clip",
            STEP,
            needs=needs(Need.QK_CLIP),
        ),
        Metric(
            "clipped_heads",
            "clipped heads",
            "heads",
            LOWER,
            "of all layers, whose projections were scaled after that step",
            STEP,
            needs=needs(Need.QK_CLIP),
        ),
        Metric(
            "grad_norm",
            "gradient norm",
            "",
            NEITHER,
            "over all parameters, before clipping; null where it was not finite",
            STEP,
        ),
        Metric(
            "skipped_steps",
            "skipped steps",
            "steps",
            LOWER,
            "steps without an update, because their gradient was not finite "
            "(train.on_nonfinite=skip)",
            SO_FAR,
        ),
    ),
    group(
        "Distillation",
        "distil/",
        (Need.TEACHER,),
        "What a model has learned of its teacher: of another model, or, with "
        "objective=self_distil, of itself at its full budget.",
        Metric(
            "kl",
            "divergence from the teacher",
            "nats",
            LOWER,
            "KL(teacher || model) per predicted target of the interval's updates, at "
            "objective.temperature; of a cache, with all tokens beside its own in one",
        ),
        Metric(
            "agreement",
            "agreement with the teacher",
            "share",
            HIGHER,
            "of those targets, at how many the likeliest token is the teacher's",
        ),
        Metric(
            "student_loss",
            "loss at the lower budget",
            "nats",
            LOWER,
            "cross-entropy of the second pass, at the lower budgets of objective.top_k in turn; "
            "train/loss is of the full one",
            needs=needs(Need.LOWER_BUDGET),
        ),
    ),
    group(
        "Speed and memory",
        "perf/",
        (),
        "The time of an interval is without evaluation and saving. The summary's "
        "`tokens_per_second` (result.json, the last line on stdout) is that of the steps after the "
        "first log interval, which warms up; of all steps where the run has no more than that. It "
        "counts what this attempt did: a resumed run starts anew.",
        Metric(
            "tokens_per_second",
            "tokens/s",
            "tokens/s",
            HIGHER,
            "unpadded tokens, skipped steps' too, over the interval's time",
        ),
        Metric("step_seconds", "step", "s", LOWER, "the interval's time over its steps"),
        Metric(
            "mfu",
            "model FLOPs utilisation",
            "share",
            HIGHER,
            "the model's FLOPs for these tokens (docs/numerics.md) over the interval's time and "
            "the devices' dense bf16 peak",
            needs=needs(Need.KNOWN_PEAK),
        ),
        Metric(
            "memory_gib",
            "memory, fullest rank",
            "GiB",
            LOWER,
            "most memory a process has held, of the fullest rank",
            SO_FAR,
        ),
        Metric(
            "tile_padding",
            "tile padding",
            "share",
            LOWER,
            "rows in the tiles of the experts' products without an assignment, over all rows in "
            "tiles",
            SAMPLE,
            needs(Need.EXPERTS, Need.LOCAL_EXPERTS, Need.TILES),
        ),
        Metric(
            "host_syncs",
            "waits for the device",
            "calls",
            LOWER,
            "calls of rank 0 that waited for the device, as torch reports them",
            STEP,
            needs(Need.DETAILED, Need.CUDA),
        ),
        Metric(
            "rank_skew",
            "slowest rank / median",
            "ratio",
            LOWER,
            "the slowest rank's own seconds (reading data, forward pass, without waits for others' "
            "tokens) over the lower median of all ranks, in a pipeline of those of its stage; 1 "
            "with one rank",
            STEP,
        ),
        Metric(
            "save_seconds",
            "saving",
            "s",
            LOWER,
            "how long training stood still for checkpoints since the last logged step",
        ),
    ),
    group(
        "Communication",
        "comm/",
        (Need.EXCHANGE,),
        "What a rank sends and waits for, in the logged steps of runs whose experts, layers, or "
        "the tokens of whose rows, are spread over ranks.",
        Metric(
            "bytes",
            "bytes sent",
            "bytes",
            LOWER,
            "rows, gates, lent weights, heads of attention, and hidden states between stages that "
            "a rank sends to others, forward and backward, mean over ranks",
            STEP,
        ),
        Metric(
            "exposed_seconds",
            "waiting for tokens",
            "s",
            LOWER,
            "time a rank waits for rows, heads and other stages: what is not hidden behind "
            "compute, the others' lateness, and a pipeline's filling and draining; mean over ranks",
            STEP,
        ),
        Metric(
            "exposed_fraction",
            "waiting for tokens",
            "share",
            LOWER,
            "comm/exposed_seconds over the step's time",
            STEP,
        ),
        Metric(
            "payload_error",
            "rounding of rows",
            "relative",
            LOWER,
            "sqrt(sum |x - rounded x|^2 / sum |x|^2) of the rows sent",
            STEP,
            needs(Need.ROUNDED_PAYLOAD),
        ),
    ),
)
