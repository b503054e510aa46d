"""Settings that cannot hold together, all found at once."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from launch.config.deepspeed import _deepspeed
from launch.process.secrets import problems_of_env
from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.cost.parameters import has_index
from model.placement.record import Placement
from train.config.kinds import matches
from train.config.lora import target_problems
from train.config.run import RunConfig
from train.config.upcycling import upcycling_problems
from train.observe.catalogue.names import metric_names


def contradictions(run: RunConfig, world_size: int, trains: bool = True) -> list[str]:
    """Every problem that one look at the values shows, before any process starts; trains: of
    launch.config.parse.
    """
    sections = (
        run.init,
        run.model,
        run.balance,
        run.budget,
        run.fail_safe,
        run.audit,
        run.profile,
        run.experts,
        run.train,
        run.optim,
        run.lora,
        run.parallel,
        run.launch,
        run.watchdog,
        run.data,
        run.checkpoint,
        run.tracker,
    )

    # First what every section says of itself, then what holds between them.
    problems = [problem for section in sections for problem in section.problems()]
    problems += [
        problem for name, rule in run.alarms.items() for problem in rule.problems(f"alarms.{name}")
    ]

    problems += _alarms(run)
    if not 0 <= run.seed < 2**31:
        problems.append(f"seed is {run.seed}; it must be between 0 and 2**31 - 1")
    problems += problems_of_env(run.launch.env)
    problems += _deepspeed(run)

    axes = ("expert", "tensor", "context", "pipeline")
    sizes = (*(f"parallel.{axis}_parallel_size" for axis in axes), "parallel.context_gather_size")
    if run.model.size_problems() or any(
        p.startswith((*sizes, "train.", "deepspeed.")) for p in problems
    ):
        return problems
    problems += run.attention.problems(run.model) + _frozen(run) + _adapters(run)
    problems += _rounding(run)
    problems += _clipping(run) + _scaling(run) + _index(run, trains) + _compiling(run)
    if run.model.num_experts > 0:
        problems += _components(run)
        problems += run.router.training_problems(run.model) if trains else []
    problems += _prediction(run) + _lengths(run) + layout_problems(run, world_size)
    problems += run.objective.problems(run.model, run.router, run.train)
    return problems


def layout_problems(run: RunConfig, world_size: int) -> list[str]:
    """Those of batch, groups and dispatcher with each other and the number of ranks."""
    problems = _batch(run, world_size) + _parallel(run, world_size)
    if run.model.num_experts > 0:
        problems += run.dispatcher.problems(run.model, run.parallel.expert_parallel_size)
    return problems


def _alarms(run: RunConfig) -> list[str]:
    """Alarms on what no run of this model can log; other routers' and layouts' are silent."""
    num_layers = run.model.num_layers
    every = range(num_layers)
    found = []

    # the same for every rule
    @cache
    def names(detailed: bool, moe: Sequence[int]) -> set[str]:
        return metric_names(moe, every, detailed)

    for name, rule in run.alarms.items():
        path, metric = f"alarms.{name}.metric", rule.metric

        def logged(detailed: bool, moe: Sequence[int], metric: str = metric) -> bool:
            return bool(fnmatch.filter(names(detailed, moe), metric))

        # A dense model logs nothing of routing, and its default alarms on that are no mistake.
        moe_layers = run.model.moe_layers or tuple(every)
        if not metric or logged(run.tracker.metrics == "detailed", moe_layers):
            continue
        if logged(True, moe_layers):
            found.append(
                f"{path} is {metric!r}, which is logged with "
                "tracker.metrics=detailed only; add that"
            )
        elif logged(True, range(1 << 10)):
            found.append(
                f"{path} is {metric!r}, but no such layer has experts: choose one of "
                f"layers {', '.join(map(str, moe_layers))}, or layer_* for all"
            )
        elif metric.startswith("eval/"):
            found.append(f"{path} is {metric!r}, but alarms watch logged steps, not evaluations")
        else:
            known = names(True, moe_layers)
            near = difflib.get_close_matches(metric, sorted(known), 1)
            found.append(
                f"{path} is {metric!r}, which no run logs"
                + (
                    f"; did you mean {near[0]}?"
                    if near
                    else "; docs/metrics.md lists what runs log"
                )
            )
    return found


def _components(run: RunConfig) -> list[str]:
    problems = run.router.problems(run.model) + _routing(run)
    problems += upcycling_problems(
        run.init.upcycle, run.model, run.router, run.budget.warm_start_steps
    )
    tokens = (
        run.experts_per_token
        * run.train.micro_batch_size
        * run.train.seq_len
        / run.parallel.parts_size
        / run.model.num_experts
    )
    if run.experts.token_rounding > tokens:
        problems.append(
            f"experts.token_rounding {run.experts.token_rounding} is more "
            f"than the {tokens:.3g} tokens an expert gets of a micro-batch, "
            "so most would get none; lower it, or raise train.micro_batch_size"
        )
    low = run.experts.precision
    if low != "native" and run.experts.backend == "grouped_mm":
        problems.append(
            "experts.backend=grouped_mm has no products of 8-bit floats, which "
            f"experts.precision={low} asks for; set experts.backend=auto"
        )
    if low != "native" and run.train.precision == "fp32" and (run.experts.backend == "triton"):
        problems.append(
            f"experts.precision={low} by experts.backend=triton goes with train.precision=bf16, "
            "not fp32; set experts.backend=auto, or train.precision=bf16"
        )
    if run.experts.backend == "triton" and not run.model.plain_experts:
        problems.append(
            "experts.backend=triton computes plain SwiGLU without biases, but model.activation is "
            f"{run.model.activation} and model.expert_bias {str(run.model.expert_bias).lower()}; "
            "set experts.backend=auto"
        )
    return problems


def _routing(run: RunConfig) -> list[str]:
    """Contradictions between the router and how the load is balanced."""
    problems, law = [], run.router.law

    if law == "relu" and run.balance.aux_loss_coeff > 0:
        problems.append(
            "router=relu balances by its own cuts, and balance.aux_loss_coeff "
            f"{run.balance.aux_loss_coeff} would only shrink its gates, whose scores are not "
            "normalised; add balance=none or balance.aux_loss_coeff=0"
        )

    own = law in ("relu", "quantile", "null")
    if (
        own
        and run.balance.bias_update != "none"
        and (law, run.balance.bias_update) != ("null", "quantile")
    ):
        problems.append(
            f"balance.bias_update={run.balance.bias_update} moves a selection "
            "bias, which this router sets itself, by quantiles; add balance=none, "
            "or balance.bias_update=none and balance.bias_update_rate=0"
        )
    if (
        run.balance.entropy_coeff > 0
        and run.router.arguments.get("score_function", "softmax") != "softmax"
    ):
        problems.append(
            f"balance.entropy_coeff {run.balance.entropy_coeff} acts on the softmax of the "
            "router's logits, but router.score_function is "
            f"{run.router.arguments.get('score_function')}; set it to 0"
        )

    if (tables := run.router.arguments.get("hash_layers")) and run.experts.token_rounding:
        problems.append(
            f"experts.token_rounding {run.experts.token_rounding} moves tokens to other experts, "
            f"but router.hash_layers {tables} name the experts of a token; set one of them to 0"
        )

    if run.router.arguments.get("bias") and run.fail_safe.spike_zscore > 0:
        problems.append(
            f"fail_safe.spike_zscore {run.fail_safe.spike_zscore} goes back to a snapshot of the "
            "routers' weights, which router.bias=true is no part of; set one of them to 0 or false"
        )

    if law in ("none", "relu"):
        reason = (
            "chooses plain top-k anyway" if law == "none" else "has no plain top-k to fall back on"
        )
        problems += [
            f"alarms.{name}.action is top_k, but router={run.router.name} {reason}; "
            "choose another action"
            for name, rule in run.alarms.items()
            if rule.action == "top_k"
        ]
    return problems


def _prediction(run: RunConfig) -> list[str]:
    """Modules of multi-token prediction and the weight of their loss go together."""
    number, coeff = run.model.num_mtp_layers, run.train.mtp_coeff
    if number > 0 and coeff == 0:
        return [
            f"model.num_mtp_layers is {number}, but train.mtp_coeff is 0, so that they would learn "
            "nothing; set train.mtp_coeff, to 0.3 as DeepSeek-V3 did, say"
        ]
    if number == 0 and coeff > 0:
        return [
            f"train.mtp_coeff {coeff:g} weighs multi-token prediction, but model.num_mtp_layers is "
            "0; set both or neither"
        ]
    if number >= run.train.seq_len:
        return [
            f"model.num_mtp_layers {number} predicts so many tokens further ahead, which rows of "
            f"train.seq_len {run.train.seq_len} do not have; lower it"
        ]
    return []


def _frozen(run: RunConfig) -> list[str]:
    """Parts that the model does not have, and balancing that a frozen router cannot follow."""
    model, problems = run.model, []
    missing = {
        "indexer": not has_index(run.attention.arguments)
        and "attention is not indexed, nor attention.select=index",
        "head": model.tie_embeddings and "model.tie_embeddings makes the embedding its head",
        "router": not model.num_experts and "model.num_experts is 0",
        "experts": not model.num_experts and "model.num_experts is 0",
        "shared_experts": not (model.num_experts and model.num_shared_experts)
        and "model.num_shared_experts is 0, or there are no experts",
        "mlp": len(model.moe_layers) == model.num_layers and "every layer has experts",
    }
    named = [("optim.freeze", part) for part in run.optim.freeze]
    named += [(f"optim.groups[{i}].match", g.match) for i, g in enumerate(run.optim.groups)]
    problems += [
        f"{setting}: {part} means no parameter of this model, for {missing[part]}; drop it"
        for setting, part in named
        if missing.get(part)
    ]

    problems += [
        f"optim.groups[{i}].layers is {list(group.layers)}, but the model has the layers 0 to "
        f"{model.num_layers - 1}"
        for i, group in enumerate(run.optim.groups)
        if group.layers is not None and group.layers[-1] >= model.num_layers
    ]

    routers = [f"blocks.{layer}.mlp.router.weight" for layer in model.moe_layers]
    by_adapters = bool(run.lora.rank) and "router" not in run.lora.also_train and bool(routers)
    by_freeze = any(matches(name, part) for name in routers for part in run.optim.freeze)
    if by_freeze or by_adapters:
        acting = [
            f"balance.{name} {value}"
            for name in ("aux_loss_coeff", "z_loss_coeff", "entropy_coeff", "orthogonality_coeff")
            if (value := getattr(run.balance, name)) > 0
        ]
        if run.balance.bias_update != "none":
            acting.append(f"balance.bias_update {run.balance.bias_update}")
        if acting:
            setting = "optim.freeze" if by_freeze else f"lora.rank {run.lora.rank}"
            instead = "" if by_freeze else ", or train the router, too: lora.also_train=[router]"
            problems.append(
                f"{setting} leaves the router as it is, but {' and '.join(acting)} would move "
                f"what it chooses, or the other weights to suit it; add balance=none{instead}"
            )
    return problems


def _rounding(run: RunConfig) -> list[str]:
    """Masters of bf16 are AdamW's, on the device, and known by the elements of whole parameters."""
    if run.train.master_dtype != "bf16":
        return []
    offload = (run.deepspeed.get("zero_optimization") or {}).get("offload_optimizer")
    asked = {
        "optim.ema_decay": (
            run.optim.ema_decay,
            "its average would lose what rounding keeps; drop",
        ),
        "optim.qk_clip": (run.optim.qk_clip, "clipping would round its factors away; drop"),
        "deepspeed.zero_optimization.offload_optimizer": (
            offload,
            "masters are rounded on the device; drop",
        ),
    }
    problems = [
        f"train.master_dtype is bf16 with {name}={value}: {why} {name}, or use "
        "train.master_dtype=fp32"
        for name, (value, why) in asked.items()
        if value
    ]
    if run.optim.uses_muon:
        problems.append(
            "train.master_dtype is bf16, but Muon (optim.optimizer, optim.groups) moves masters of "
            "fp32; use optim=adamw, or train.master_dtype=fp32"
        )
    if run.zero_stage == 3:
        problems.append(
            "train.master_dtype is bf16 with deepspeed zero stage 3, whose checkpoints would hold "
            "moments in bf16 as well; use deepspeed=zero2, or train.master_dtype=fp32"
        )
    for axis in ("tensor", "pipeline"):
        name = f"parallel.{axis}_parallel_size"
        size = getattr(run.parallel, f"{axis}_parallel_size")
        if size > 1:
            problems.append(
                f"train.master_dtype is bf16 with {name} {size}, which holds parts of what is "
                f"rounded as a whole; use {name}=1, or train.master_dtype=fp32"
            )
    return problems


def _adapters(run: RunConfig) -> list[str]:
    """Adapters sit on weights that somebody has trained, and on projections that there are."""
    lora = run.lora
    if not lora.rank:
        return []
    problems = target_problems(lora, run.model, run.attention.arguments)
    if run.optim.uses_muon:
        problems.append(
            f"lora.rank is {lora.rank}, but Muon moves matrices between layers and no adapters; "
            "use optim=adamw"
        )
    if run.init.path is None and run.init.run is None:
        problems.append(
            f"lora.rank is {lora.rank}, but this run begins with weights that are drawn, which "
            "adapters would leave as they are; give init.path or init.run"
        )
    return problems


def _scaling(run: RunConfig) -> list[str]:
    """muP knows how matrices between layers, and between a layer and a fixed number of values, are
    scaled. Latent attention has ranks that may grow or not, and sparse attention maps of its own.
    """
    if run.model.init != "mup":
        return []
    problems = []
    if run.attention.name not in ("dense", "windowed"):
        problems.append(
            f"model.init=mup has no rule for attention={run.attention.name}; use attention=dense, "
            "or another model.init"
        )
    if run.lora.rank:
        problems.append(
            f"lora.rank is {run.lora.rank}, but model.init=mup has no rule for adapters' learning "
            "rates; set lora.rank=0"
        )
    return problems


def _compiling(run: RunConfig) -> list[str]:
    """What does not go through one graph for each block: what visits the host or other ranks inside
    of one, and what was not tried.
    """
    if run.train.compile == "none":
        return []
    parallel, optim, router = run.parallel, run.optim, run.router
    asked = {
        "parallel.expert_parallel_size": (parallel.expert_parallel_size, 1),
        "parallel.context_parallel_size": (parallel.context_parallel_size, 1),
        "parallel.pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "parallel.tensor_parallel_size": (parallel.tensor_parallel_size, 1),
        "attention": (run.attention.name, "dense"),
        "objective": (run.objective.name, "next_token"),
        "model.recompute": (run.model.recompute, "none"),
        "model.num_mtp_layers": (run.model.num_mtp_layers, 0),
        "optim.qk_clip": (optim.qk_clip, None),
        "lora.rank": (run.lora.rank, 0),
        "experts.token_rounding": (run.experts.token_rounding, 0),
        "router.capacity_factor": (getattr(router, "capacity_factor", None), None),
        "balance.random_routing_steps": (run.balance.random_routing_steps, 0),
    }
    found = [
        f"train.compile=blocks does not go with {name}={value}; use "
        f"{name}={'null' if other is None else other}, or train.compile=none"
        for name, (value, other) in asked.items()
        if value != other
    ]
    if run.zero_stage == 3:
        found.append(
            "train.compile=blocks does not go with ZeRO 3, which gathers weights between the "
            "modules of a block; use deepspeed=zero2, or train.compile=none"
        )
    return found


def _clipping(run: RunConfig) -> list[str]:
    """Attention logits are clipped by scaling the projections that they are linear in."""
    threshold = run.optim.qk_clip
    if threshold is None:
        return []
    problems, about = [], f"optim.qk_clip is {threshold:g}"
    if run.attention.name not in ("dense", "mla"):
        problems.append(
            f"{about}, and attention={run.attention.name} has no largest logit over all that a "
            "query sees; use attention=dense or mla, or drop optim.qk_clip"
        )
    elif run.attention.name == "dense" and run.model.qk_norm != "none":
        problems.append(
            f"{about}, but with model.qk_norm={run.model.qk_norm} the size of queries and keys is "
            "that of the norms, which bounds logits by itself; drop optim.qk_clip, or set "
            "model.qk_norm=none"
        )
    if run.lora.rank or "attention" in run.optim.freeze:
        problems.append(
            f"{about}, but lora.rank {run.lora.rank} and optim.freeze {list(run.optim.freeze)} "
            "leave projections of attention as they are; drop optim.qk_clip"
        )
    return problems


def _index(run: RunConfig, trains: bool) -> list[str]:
    """An index that has learned nothing would choose at random, and nobody would notice: runs that
    others reported trained for weeks so.
    """
    attention, problems = run.attention, []
    is_compressed = isinstance(attention, CompressedAttentionConfig)
    if is_compressed and run.lora.rank:
        problems.append(
            f"lora.rank is {run.lora.rank}, but which matrices of attention=compressed have "
            "adapters is not defined; set lora.rank=0"
        )
    layers = range(run.model.num_layers)
    if not has_index(attention.arguments) or not any(
        attention.is_sparse(run.model, i) for i in layers
    ):
        return problems
    inside = not is_compressed and not isinstance(attention, IndexedAttentionConfig)
    kind = "attention.select=index" if inside else f"attention={attention.name}"
    instead = "attention.select=mass" if inside else "attention=scc"
    # Inside sparse attention what a bad choice leaves out stays in the softmax through its entries,
    # and an index learns from all of it from the first step on.
    # The index of published weights has learned, and so has that of weights that are evaluated.
    learned = run.init.run is not None or (is_compressed and run.init.path is not None)
    if trains and not inside and attention.arguments["dense_steps"] == 0 and not learned:
        problems.append(
            "attention.dense_steps is 0, so that an index which has learned nothing would choose; "
            "raise it, or begin with init.run of a run whose index has learned"
        )
    if run.lora.rank and not is_compressed:
        problems.append(
            f"lora.rank is {run.lora.rank}, but adapters leave the index of {kind} as it is, while "
            f"what it has to find moves; set lora.rank=0, or use {instead}"
        )
    names = [
        f"blocks.{i}.attention.indexer.q_proj.weight"
        for i in layers
        if attention.is_sparse(run.model, i)
    ]
    if frozen := [p for p in run.optim.freeze if any(matches(name, p) for name in names)]:
        problems.append(
            f"optim.freeze={frozen[0]} leaves the index of {kind} as it is, while what it has to "
            "find moves; drop it"
        )
    return problems


def _lengths(run: RunConfig) -> list[str]:
    train, problems = run.train, []

    if train.seq_len > run.model.max_seq_len:
        problems.append(
            f"train.seq_len {train.seq_len} exceeds model.max_seq_len {run.model.max_seq_len}"
        )

    if run.optim.warmup_steps >= train.num_steps:
        problems.append(
            f"optim.warmup_steps {run.optim.warmup_steps} "
            f"must be below train.num_steps {train.num_steps}; give fewer, or "
            "optim.warmup_fraction=0.05"
        )
    if (
        run.optim.wsd_decay_steps is not None
        and not 0 < run.optim.wsd_decay_steps <= train.num_steps
    ):
        problems.append(
            f"optim.wsd_decay_steps {run.optim.wsd_decay_steps} must be between 1 and "
            f"train.num_steps {train.num_steps}"
        )

    if run.profile.steps and run.profile.steps[-1] > train.num_steps:
        problems.append(
            f"profile.steps {list(run.profile.steps)} goes beyond train.num_steps {train.num_steps}"
        )

    vocab_size = run.data.tokenizer.vocab_size
    if run.data.streaming and getattr(run.objective, "cache", None) is not None:
        problems.append(
            "objective.cache holds what a teacher said of prepared rows, and those of a stream are "
            "others (data.streaming=true); give objective.path or objective.run, or "
            "data.streaming=false"
        )
    if run.data.streaming and train.num_epochs is not None:
        problems.append(
            f"train.num_epochs is {train.num_epochs:g}, but nobody knows how long a pass over a "
            "stream is (data.streaming=true); give train.num_steps or train.num_tokens"
        )
    if train.sample_prompt and not run.data.has_tokenizer:
        problems.append(
            f"train.sample_prompt is {train.sample_prompt!r}, but the data are tokens and there is "
            "no tokenizer to read it; set it to null, or give data.tokenizer.path"
        )
    if run.data.tokenizer.path is None and vocab_size > run.model.vocab_size:
        problems.append(
            f"data.tokenizer.vocab_size {vocab_size} exceeds model.vocab_size "
            f"{run.model.vocab_size}"
        )
    return problems


def _batch(run: RunConfig, world_size: int) -> list[str]:
    train, problems = run.train, []

    # Ranks that share rows count once; where they do not come out even, _parallel says so.
    rows_size = max(1, run.parallel.rows_size(world_size))
    ranks = f"{rows_size} ranks"
    if rows_size != world_size:
        ranks = f"{rows_size} groups of ranks with rows of their own"
    slice_size = train.micro_batch_size * rows_size
    if train.global_batch_size % slice_size:
        problems.append(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of "
            f"micro_batch_size {train.micro_batch_size} x {ranks} = {slice_size}; "
            f"nearest: {max(1, round(train.global_batch_size / slice_size)) * slice_size}"
        )

    if train.batch_size_rampup is not None:
        if len(train.batch_size_rampup) != 3:
            problems.append(
                f"train.batch_size_rampup {list(train.batch_size_rampup)} "
                "must be [start, increment, samples], or [start, increment] with "
                "train.batch_size_rampup_tokens"
            )
        else:
            start, increment, samples = train.batch_size_rampup
            if start % slice_size or increment % slice_size:
                problems.append(
                    f"train.batch_size_rampup start {start} and increment "
                    f"{increment} must be multiples of micro_batch_size "
                    f"{train.micro_batch_size} x {ranks} = {slice_size}"
                )
            if not 0 < start < train.global_batch_size or increment < 1 or samples < 1:
                problems.append(
                    f"train.batch_size_rampup {list(train.batch_size_rampup)}: "
                    "start must be below train.global_batch_size "
                    f"{train.global_batch_size}, increment and samples positive"
                )
            elif (train.global_batch_size - start) % increment:
                problems.append(
                    f"train.batch_size_rampup: global_batch_size {train.global_batch_size} - start "
                    f"{start} is not a multiple of the increment {increment}"
                )
    return problems


def _start(size: int, world_size: int) -> str:
    """How to have ranks that a size divides."""
    if world_size == 1:  # most likely nobody said that there are to be ranks
        return f"start {size}: launch=deepspeed launch.num_devices={size}; or give parallel=single"
    return f"start a multiple of {size} (launch.num_devices x launch.num_nodes)"


def _stages(run: RunConfig, world_size: int) -> list[str]:
    """What stages of a pipeline do not go together with."""
    size, split = run.parallel.pipeline_parallel_size, run.parallel.pipeline_split
    if size == 1:
        return []
    problems = []
    name = f"parallel.pipeline_parallel_size {size}"
    if world_size % size:
        problems.append(
            f"{name} does not divide the {world_size} ranks; {_start(size, world_size)}"
        )
    laps, parts = run.parallel.virtual_stages, run.parallel.num_parts
    if size > run.model.num_layers:
        problems.append(
            f"{name} is more than model.num_layers {run.model.num_layers}, and every stage needs "
            "a layer; lower it"
        )
    elif parts > run.model.num_layers:
        problems.append(
            f"{name} x parallel.virtual_stages {laps} is more than model.num_layers "
            f"{run.model.num_layers}, and every virtual stage needs a layer; lower either"
        )
    if split is not None and len(split) == parts and sum(split) != run.model.num_layers:
        problems.append(
            f"parallel.pipeline_split {list(split)} has {sum(split)} layers, model.num_layers is "
            f"{run.model.num_layers}"
        )
    if laps > 1:
        problems += _virtual_stages(run)
    if run.zero_stage == 3:
        problems.append(
            f"{name} with deepspeed zero stage 3: every stage would gather its weights anew for "
            "each micro-batch; use deepspeed=zero1, or deepspeed=zero2"
        )
    if run.lora.rank:
        problems.append(
            f"{name} with lora.rank {run.lora.rank}: adapters are not shared out over stages; use "
            "parallel.pipeline_parallel_size=1"
        )
    for setting in ("qk_clip", "ema_decay"):
        if (value := getattr(run.optim, setting)) is not None:
            problems.append(
                f"{name} with optim.{setting} {value:g}: stages do not know of it yet; drop "
                f"optim.{setting}, or use parallel.pipeline_parallel_size=1"
            )
    if run.objective.name != "next_token":
        problems.append(
            f"{name} with objective={run.objective.name}: a teacher's words are compared where the "
            "model is whole; use parallel.pipeline_parallel_size=1"
        )
    if run.optim.freeze:
        problems.append(
            f"{name} with optim.freeze {list(run.optim.freeze)}: a stage may be left with nothing "
            "to train; use parallel.pipeline_parallel_size=1"
        )
    # What a layer reads of an earlier one is not handed on, between virtual stages neither; asked
    # once the layers can be dealt out at all.
    sections = (run.parallel.problems(), run.model.problems(), run.attention.problems(run.model))
    if not problems and not any(sections):
        every = [part for runs in run.stage_runs for part in runs]
        problems += run.attention.parted_problems(run.model, every)
    return problems


def _virtual_stages(run: RunConfig) -> list[str]:
    """Where DeepSpeed takes it that the last backward pass of a step goes through all weights."""
    laps, zero = run.parallel.virtual_stages, run.deepspeed.get("zero_optimization", {})
    problems = []
    if run.zero_stage == 1 and zero.get("overlap_comm"):
        problems.append(
            f"parallel.virtual_stages {laps} with deepspeed.zero_optimization.overlap_comm under "
            "zero stage 1, which then reduces what the last pass of a step goes through and no "
            "other virtual stage's gradients; drop overlap_comm, or use deepspeed=zero2"
        )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if run.zero_stage == 2 and offload != "none":
        problems.append(
            f"parallel.virtual_stages {laps} with deepspeed.zero_optimization.offload_optimizer "
            "under zero stage 2, which then updates with what the last pass of a step goes through "
            "and no other virtual stage's gradients; use deepspeed=zero1"
        )
    return problems


def _overlap(run: RunConfig, world_size: int) -> list[str]:
    """What passes by turns do not go together with."""
    if not run.parallel.overlap_experts:
        return []
    name, without = "parallel.overlap_experts", "drop parallel.overlap_experts"
    problems = []
    if run.parallel.expert_parallel_size == 1:
        problems.append(
            f"{name} with parallel.expert_parallel_size 1: no rows travel to experts; {without}"
        )
    rows_size = run.parallel.rows_size(world_size)
    held = run.train.micro_batch_size * rows_size
    if rows_size and run.train.global_batch_size <= held:
        problems.append(
            f"{name} with one micro-batch a step: train.global_batch_size "
            f"{run.train.global_batch_size} is one of {run.train.micro_batch_size} rows on each of "
            f"{rows_size} ranks; raise it or lower train.micro_batch_size, or {without}"
        )
    if run.zero_stage == 3:
        problems.append(
            f"{name} with deepspeed zero stage 3, which gathers weights in the order of one pass "
            f"at a time; use deepspeed=zero1 or deepspeed=zero2, or {without}"
        )
    if run.train.compile != "none":
        problems.append(
            f"{name} with train.compile={run.train.compile}: blocks that are compiled hand over "
            f"to nobody; {without} or train.compile"
        )
    return problems


def _cut(run: RunConfig, ranks: int) -> list[str]:
    """What tensor parallelism does not go together with. ranks: of a stage."""
    model, size = run.model, run.parallel.tensor_parallel_size
    context, name = run.parallel.context_parallel_size, f"parallel.tensor_parallel_size {size}"
    alone = "use parallel.tensor_parallel_size=1"
    problems = []

    by_heads, gather = run.parallel.context_heads_size, run.parallel.context_gather_size
    told = f"parallel.context_parallel_size {by_heads}"
    whole = f"parallel.context_parallel_size {context} / parallel.context_gather_size {gather}"
    problems += [
        p if gather == 1 else p.replace(told, whole)
        for p in run.attention.tensor_problems(model, size, by_heads)
    ]
    if context > 1 and ranks % (size * context):
        problems.append(
            f"{name} x parallel.context_parallel_size {context} does not divide the {ranks} ranks "
            "that hold the same layers; lower one of them"
        )
    if model.vocab_size % size:
        problems.append(
            f"{name} does not divide model.vocab_size {model.vocab_size}, whose rows its ranks "
            f"share out; nearest: {max(1, round(model.vocab_size / size)) * size}"
        )
    if len(model.moe_layers) < model.num_layers and model.intermediate_size % size:
        problems.append(
            f"{name} does not divide model.intermediate_size {model.intermediate_size}, the width "
            "of dense MLPs, which its ranks share out; lower it"
        )
    if run.lora.rank:
        problems.append(
            f"{name} with lora.rank {run.lora.rank}: adapters are not cut with their matrices; "
            f"{alone}"
        )
    if run.optim.uses_muon:
        problems.append(
            f"{name} with Muon (optim.optimizer, optim.groups): a part of a matrix has other "
            f"singular values than the whole; use optim=adamw, or {alone}"
        )
    if run.optim.qk_clip is not None:
        problems.append(
            f"{name} with optim.qk_clip {run.optim.qk_clip:g}: factors are of all heads, of which "
            f"a rank has a part; drop optim.qk_clip, or {alone}"
        )
    if run.optim.freeze:
        problems.append(
            f"{name} with optim.freeze {list(run.optim.freeze)}: what is frozen is not cut yet; "
            f"{alone}"
        )
    if run.objective.name != "next_token":
        problems.append(
            f"{name} with objective={run.objective.name}: a teacher's words are of the whole "
            f"vocabulary, of which a rank has a part; {alone}"
        )
    return problems


def _parallel(run: RunConfig, world_size: int) -> list[str]:
    problems, size = [], run.parallel.expert_parallel_size

    context, tensor = run.parallel.context_parallel_size, run.parallel.tensor_parallel_size
    problems += _stages(run, world_size) + _overlap(run, world_size)
    ranks = run.parallel.stage_size(world_size)
    of_stage = " of a stage" if run.parallel.pipeline_parallel_size > 1 else ""
    shared = [("expert", size), ("context", context)]
    if tensor > 1:
        shared.append(("tensor", tensor))
    for name, number in shared:
        if ranks % number and not world_size % run.parallel.pipeline_parallel_size:
            problems.append(
                f"parallel.{name}_parallel_size {number} does not divide the {ranks} "
                f"ranks{of_stage}; "
                f"{_start(number * run.parallel.pipeline_parallel_size, world_size)}"
            )
    gather = run.parallel.context_gather_size
    problems += run.attention.sharing_problems(run.model, context, gather)
    parts = run.parallel.parts_size
    if parts > 1 and run.train.seq_len % parts:
        product = " x ".join(
            f"parallel.{name}_parallel_size {number}"
            for name, number in (("context", context), ("tensor", tensor))
            if number > 1
        )
        problems.append(
            f"train.seq_len {run.train.seq_len} is not divisible by {product}, whose ranks have "
            f"equal parts of a row; nearest: {max(1, round(run.train.seq_len / parts)) * parts}"
        )
    if tensor > 1:
        problems += _cut(run, ranks)

    if run.parallel.placement is not None:
        try:
            placement = Placement.load(Path(run.parallel.placement))
            problems += placement.problems(run.model.num_experts, len(run.model.moe_layers), size)
        except ValueError as error:
            problems.append(f"parallel.placement: {error}")

    if size > 1 and run.model.num_experts == 0:
        problems.append(
            f"parallel.expert_parallel_size {size} with "
            "model.num_experts 0: there are no experts to spread"
        )

    if run.zero_stage == 0 and run.train.precision != "fp32":
        problems.append(
            f"deepspeed zero stage 0 with train.precision={run.train.precision}: DeepSpeed then "
            "clips by a wrong norm with experts; use deepspeed=zero1 (same speed, less memory)"
        )
    return problems
