"""From the composed config to frozen records: strict keys with suggestions, types, and every contradiction at once."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from launch.secrets import problems_of_env, problems_of_settings, redact_text
from model.placement import Placement
from train.config import ComponentConfig, RunConfig
from train.metric_names import metric_names

# DeepSpeed settings that users may give. Everything else is refused: DeepSpeed itself ignores unknown keys silently.
# tests/launch/test_validate.py checks these names against DeepSpeed's own models.
ZERO_KEYS = frozenset({
    "stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions",
    "round_robin_gradients", "offload_optimizer", "offload_param", "sub_group_size", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
})
ZERO_SWITCHES = frozenset({"overlap_comm", "allgather_partitions", "round_robin_gradients",
                           "stage3_gather_16bit_weights_on_model_save"})
ZERO_SIZES = ZERO_KEYS - ZERO_SWITCHES - {"stage", "offload_optimizer", "offload_param"}
DEEPSPEED_KEYS = frozenset({"zero_optimization", "communication_data_type"})
OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size", "gradient_clipping": "train.clip_grad_norm",
    "bf16": "train.precision", "fp16": "train.precision=bf16", "data_types": "train.grad_accum_dtype",
    "optimizer": "optim", "scheduler": "optim.decay_style",
    "activation_checkpointing": "model.recompute", "expert_parallel": "parallel.expert_parallel_size",
    "tensorboard": "tracker.tensorboard", "wandb": "tracker.wandb.mode", "steps_per_print": "train.log_interval",
}
REMOVED_KEYS = frozenset({"elasticity", "sparse_attention", "compression_training", "amp", "progressive_layer_drop",
                          "eigenvalue", "curriculum_learning", "nebula", "zero_force_ds_cpu_optimizer"})


LARGEST = {"model.num_layers": 10_000}
"""Above these, the checks themselves would take for ever."""
MAX_LINE = 600
"""Characters of a problem: a config may hold anything, and messages repeat its values."""


class ConfigError(ValueError):
    """All problems of a config, each one printable line without secrets."""

    def __init__(self, problems: list[str]):
        self.problems = [_line(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


def _line(text: str) -> str:
    text = redact_text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
    return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE // 2]} ... {text[-(MAX_LINE // 3):]}"


def parse(config: dict[str, Any], world_size: int) -> RunConfig:
    """Build the records and check them.

    Args:
        config: plain data (OmegaConf.to_container, resolved); world_size: ranks the run will have.

    Raises:
        ConfigError: with every unknown key, wrong type and contradiction found.
    """
    problems = problems_of_settings(config)
    run = build_record(config, RunConfig, "", problems)
    if problems:
        raise ConfigError(problems)
    problems = contradictions(run, world_size)
    if problems:
        raise ConfigError(problems)
    return run


def check_tokenizer(run: RunConfig) -> None:
    """The given tokenizer can be read and the model covers its ids: said before any text is tokenised.

    Raises:
        ConfigError: with every problem found.
    """
    from train.data.tokenizer import tokenizer_problems

    if problems := tokenizer_problems(run.data.tokenizer, run.model.vocab_size):
        raise ConfigError(problems)


# --- keys and types --------------------------------------------------------------------------------------------------

def _suggest(name: Any, path: str, known: set[str]) -> str:
    name = name if isinstance(name, str) else repr(name)
    near = difflib.get_close_matches(name[:100], sorted(known), 1, 0.5)
    hint = f"did you mean {path}{near[0]}?" if near else f"known keys: {', '.join(sorted(known)) or 'none'}"
    return f"unknown key {path}{name}: {hint}"


def build_record(node: Any, cls: type, path: str, problems: list[str]) -> Any:
    """A frozen record from plain data, or None with the reasons appended to `problems`."""
    if not isinstance(node, dict):
        problems.append(f"{path.rstrip('.')} is {node!r}; it must be a group of settings")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    problems += [_suggest(key, path, set(fields)) for key in node if key not in fields]
    values = {}
    for name, field in fields.items():
        if name in node:
            values[name] = _value(node[name], hints[name], f"{path}{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{path}{name} is missing")
    return None if problems else cls(**values)


def _value(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(value, next(a for a in arguments if a is not type(None)), path, problems)
    if hint is ComponentConfig:
        return _component(value, path, problems)
    if dataclasses.is_dataclass(hint):
        return build_record(value, typing.cast(type, hint), f"{path}.", problems)
    if origin is tuple:
        if isinstance(value, dict) and all(str(k).isdigit() for k in value):
            value = list(value.values())
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path} is {value!r}; it must be a list")
            return None
        return tuple(_value(item, arguments[0], f"{path}[{i}]", problems) for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{path} is {value!r}; choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is dict:
        return _table(value, arguments[1], path, problems)
    if value == "???":
        problems.append(f"{path} is missing; set it")
        return value
    largest = LARGEST.get(path, 2**63 - 1)
    if type(value) is int and abs(value) > largest:
        problems.append(f"{path} is a number of {value.bit_length()} bits; it must be at most {largest}")
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path} is {value}; it must be a finite number")
    if hint in (int, float, str, bool) and type(value) is not hint:
        problems.append(f"{path} is {value!r}; it must be {hint.__name__}")
    return value


def _table(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """A group of settings with names of its own. Numbers become text where text is wanted: launch.env.OMP_NUM_THREADS=4."""
    if not isinstance(value, dict):
        problems.append(f"{path} is {value!r}; it must be a group of settings")
        return value
    problems += [f"{path} has the key {key!r}; it must be text" for key in value if not isinstance(key, str)]
    if hint is Any:
        return value
    numbers = {key: str(v) for key, v in value.items() if hint is str and type(v) in (int, float)}
    return {key: _value(v, hint, f"{path}.{key}", problems) for key, v in (value | numbers).items()}


def _component(value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
        problems.append(f"{path} needs a _target_ naming its class")
        return None
    from train.components import parameters, resolve

    component = ComponentConfig(value["_target_"], {k: v for k, v in value.items() if k != "_target_"})
    kind = path.rpartition(".")[2]
    try:
        known = parameters(component, kind)
    except ValueError as error:
        problems.append(f"{path}: {error}")
        return None
    problems += [_suggest(key, f"{path}.", set(known)) for key in component.arguments if key not in known]
    problems += [f"{path}.{key} is missing" for key, needed in known.items() if needed and key not in component.arguments]
    hints = typing.get_type_hints(resolve(component, kind).__init__)
    arguments = {key: _value(argument, hints[key], f"{path}.{key}", problems)
                 for key, argument in component.arguments.items() if key in hints}
    return ComponentConfig(component.target, arguments)


# --- contradictions --------------------------------------------------------------------------------------------------

def contradictions(run: RunConfig, world_size: int) -> list[str]:
    """Every problem that one look at the values shows, before any process starts."""
    sections = (run.model, run.balance, run.budget, run.fail_safe, run.audit, run.experts, run.train, run.optim,
                run.parallel, run.launch, run.watchdog, run.data, run.checkpoint, run.tracker)
    problems = [problem for section in sections for problem in section.problems()]
    problems += [problem for name, rule in run.alarms.items() for problem in rule.problems(f"alarms.{name}")]
    problems += _alarms(run)
    if not 0 <= run.seed < 2**31:
        problems.append(f"seed is {run.seed}; it must be between 0 and 2**31 - 1")
    problems += problems_of_env(run.launch.env)
    problems += _deepspeed(run)
    if any(p.startswith(("parallel.expert_parallel_size", "train.", "deepspeed.")) for p in problems):
        return problems
    problems += _attention(run)
    problems += _components(run) if run.model.num_experts > 0 else []
    problems += _lengths(run) + _batch(run, world_size) + _parallel(run, world_size)
    return problems


def _alarms(run: RunConfig) -> list[str]:
    """Alarms on what no run of this model can log; other routers' and layouts' are silent."""
    num_layers = run.model.num_layers
    every = range(num_layers)
    found = []
    for name, rule in run.alarms.items():
        path, metric = f"alarms.{name}.metric", rule.metric

        def logged(detailed: bool, moe: Iterable[int], metric: str = metric) -> bool:
            return bool(fnmatch.filter(metric_names(moe, every, detailed), metric))

        # A dense model logs nothing of routing, and its default alarms on that are no mistake.
        moe_layers = run.model.moe_layers or tuple(every)
        if not metric or logged(run.tracker.metrics == "detailed", moe_layers):
            continue
        if logged(True, moe_layers):
            found.append(f"{path} is {metric!r}, which is logged with tracker.metrics=detailed only; "
                         "add that")
        elif logged(True, range(1 << 10)):
            found.append(f"{path} is {metric!r}, but no such layer has experts: choose one of "
                         f"layers {', '.join(map(str, moe_layers))}, or layer_* for all")
        elif metric.startswith("eval/"):
            found.append(f"{path} is {metric!r}, but alarms watch logged steps, not evaluations")
        else:
            known = metric_names(moe_layers, every, True)
            near = difflib.get_close_matches(metric, sorted(known), 1)
            found.append(f"{path} is {metric!r}, which no run logs"
                         + (f"; did you mean {near[0]}?" if near else "; docs/metrics.md lists what runs log"))
    return found


def _attention(run: RunConfig) -> list[str]:
    from train.components import resolve

    return list(resolve(run.attention, "attention").problems(run.model, **run.attention.arguments))


def _components(run: RunConfig) -> list[str]:
    from train.components import resolve

    router = resolve(run.router, "router")
    problems = list(router.problems(run.model, **run.router.arguments)) + _routing(run, router)
    tokens = run.experts_per_token * run.train.micro_batch_size * run.train.seq_len / run.model.num_experts
    if run.experts.token_rounding > tokens:
        problems.append(f"experts.token_rounding {run.experts.token_rounding} is more than the {tokens:.3g} tokens an "
                        "expert gets of a micro-batch, so most would get none; lower it, or raise train.micro_batch_size")
    return problems + list(resolve(run.dispatcher, "dispatcher").problems(
        run.model, run.parallel.expert_parallel_size, **run.dispatcher.arguments))


def _routing(run: RunConfig, router: Any) -> list[str]:
    """Contradictions between the router and how the load is balanced."""
    problems, law = [], getattr(router, "law", "none")
    if law == "relu" and run.balance.aux_loss_coeff > 0:
        problems.append("router=relu balances by its own cuts, and balance.aux_loss_coeff "
                        f"{run.balance.aux_loss_coeff} would only shrink its gates, whose scores are not normalised; add "
                        "balance=none or balance.aux_loss_coeff=0")
    own = law in ("relu", "quantile", "null")
    if own and run.balance.bias_update != "none" and (law, run.balance.bias_update) != ("null", "quantile"):
        problems.append(f"balance.bias_update={run.balance.bias_update} moves a selection bias, which this router sets "
                        "itself, by quantiles; add balance=none, or balance.bias_update=none and "
                        "balance.bias_update_rate=0")
    if run.balance.entropy_coeff > 0 and run.router.arguments.get("score_function", "softmax") != "softmax":
        problems.append(f"balance.entropy_coeff {run.balance.entropy_coeff} acts on the softmax of the router's logits, but "
                        f"router.score_function is {run.router.arguments.get('score_function')}; set it to 0")
    if law in ("none", "relu"):
        reason = "chooses plain top-k anyway" if law == "none" else "has no plain top-k to fall back on"
        problems += [f"alarms.{name}.action is top_k, but router={run.router.target.rpartition('.')[2]} {reason}; choose "
                     "another action" for name, rule in run.alarms.items() if rule.action == "top_k"]
    return problems


def _lengths(run: RunConfig) -> list[str]:
    train, problems = run.train, []
    if train.seq_len > run.model.max_seq_len:
        problems.append(f"train.seq_len {train.seq_len} exceeds model.max_seq_len {run.model.max_seq_len}")
    if run.optim.warmup_steps >= train.num_steps:
        problems.append(f"optim.warmup_steps {run.optim.warmup_steps} must be below train.num_steps {train.num_steps}")
    if run.optim.wsd_decay_steps is not None and not 0 < run.optim.wsd_decay_steps <= train.num_steps:
        problems.append(f"optim.wsd_decay_steps {run.optim.wsd_decay_steps} must be between 1 and train.num_steps "
                        f"{train.num_steps}")
    vocab_size = run.data.tokenizer.vocab_size
    if run.data.tokenizer.path is None and vocab_size > run.model.vocab_size:
        problems.append(f"data.tokenizer.vocab_size {vocab_size} exceeds model.vocab_size {run.model.vocab_size}")
    return problems


def _batch(run: RunConfig, world_size: int) -> list[str]:
    train, problems = run.train, []
    slice_size = train.micro_batch_size * world_size
    if train.global_batch_size % slice_size:
        problems.append(f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size "
                        f"{train.micro_batch_size} x {world_size} ranks = {slice_size}; nearest: "
                        f"{max(1, round(train.global_batch_size / slice_size)) * slice_size}")
    if train.batch_size_rampup is not None:
        if len(train.batch_size_rampup) != 3:
            problems.append(f"train.batch_size_rampup {list(train.batch_size_rampup)} must be [start, increment, samples]")
        else:
            start, increment, samples = train.batch_size_rampup
            if start % slice_size or increment % slice_size:
                problems.append(f"train.batch_size_rampup start {start} and increment {increment} must be multiples of "
                                f"micro_batch_size {train.micro_batch_size} x {world_size} ranks = {slice_size}")
            if not 0 < start < train.global_batch_size or increment < 1 or samples < 1:
                problems.append(f"train.batch_size_rampup {list(train.batch_size_rampup)}: start must be below "
                                f"train.global_batch_size {train.global_batch_size}, increment and samples positive")
            elif (train.global_batch_size - start) % increment:
                problems.append(f"train.batch_size_rampup: global_batch_size {train.global_batch_size} - start {start} "
                                f"is not a multiple of the increment {increment}")
    return problems


def _parallel(run: RunConfig, world_size: int) -> list[str]:
    problems, size = [], run.parallel.expert_parallel_size
    if world_size % size:
        problems.append(f"parallel.expert_parallel_size {size} does not divide the {world_size} ranks; start a multiple "
                        f"of {size} (launch.num_devices x launch.num_nodes)")
    if run.parallel.placement is not None:
        try:
            placement = Placement.load(Path(run.parallel.placement))
            problems += placement.problems(run.model.num_experts, len(run.model.moe_layers), size)
        except ValueError as error:
            problems.append(f"parallel.placement: {error}")
    if size > 1 and run.model.num_experts == 0:
        problems.append(f"parallel.expert_parallel_size {size} with model.num_experts 0: there are no experts to spread")
    if run.zero_stage == 0 and run.train.precision != "fp32":
        problems.append(f"deepspeed zero stage 0 with train.precision={run.train.precision}: DeepSpeed then clips by a "
                        "wrong norm with experts; use deepspeed=zero1 (same speed, less memory)")
    return problems


def _deepspeed(run: RunConfig) -> list[str]:
    problems = []
    for key in run.deepspeed:
        if key in OWNED_KEYS:
            problems.append(f"deepspeed.{key} belongs to Loadstone: set {OWNED_KEYS[key]}")
        elif key in REMOVED_KEYS:
            problems.append(f"deepspeed.{key} is not available in this DeepSpeed version")
        elif key not in DEEPSPEED_KEYS:
            problems.append(_suggest(key, "deepspeed.", set(DEEPSPEED_KEYS)))
    zero = run.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*problems, f"deepspeed.zero_optimization is {zero!r}; it must be a group of settings"]
    problems += [_suggest(key, "deepspeed.zero_optimization.", set(ZERO_KEYS)) for key in zero if key not in ZERO_KEYS]
    for key, value in zero.items():
        if key in ZERO_SIZES and (type(value) is not int or value < 0):
            problems.append(f"deepspeed.zero_optimization.{key} is {value!r}; it must be a whole number")
        elif key in ZERO_SWITCHES and not isinstance(value, bool):
            problems.append(f"deepspeed.zero_optimization.{key} is {value!r}; it must be true or false")
        elif str(key).startswith("offload_") and not (isinstance(value, dict) and set(value) <= {"device", "pin_memory"}):
            problems.append(f"deepspeed.zero_optimization.{key} is {value!r}; give {{device: cpu, pin_memory: true|false}}")
            return problems
    if zero.get("round_robin_gradients"):
        problems.append("deepspeed.zero_optimization.round_robin_gradients is true: this DeepSpeed version then takes other "
                        "parameters' fp32 weights and moments for a parameter's own, and checkpoints would hold them; leave "
                        "it out")
    if run.deepspeed.get("communication_data_type") not in (None, "fp32", "bf16", "fp16"):
        problems.append(f"deepspeed.communication_data_type is {run.deepspeed['communication_data_type']!r}; choose fp32, "
                        "bf16 or fp16")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
        return problems
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "cpu")
        if device not in ("cpu", "none"):
            problems.append(f"deepspeed.zero_optimization.{name}.device is {device!r}; only cpu is supported")
    if zero.get("offload_optimizer") and stage < 1:
        problems.append("deepspeed.zero_optimization.offload_optimizer needs stage 1, 2 or 3")
    if zero.get("offload_param") and stage != 3:
        problems.append("deepspeed.zero_optimization.offload_param needs stage 3")
    return problems
