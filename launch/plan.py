"""What a config would cost, without any device: python -m launch.plan [the overrides of
launch.train, resume=RUN too] [device=H200] [price=2.5].

Prints parameters, memory per device, batch arithmetic, FLOPs, time and every problem, files that
are not there included; exit code 1 if it cannot run. With parallel=auto world=N device=H100 it
searches the layouts that the run could have on so many devices, and prints the best with a command
line for each.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.plan")
import contextlib
import io
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.overrides import plain, typed_overrides
from launch.config.parse import searches_layout, world_size
from launch.job.disk import disk_usage, run_bytes
from launch.job.fit import Device, alternatives, device_of
from launch.job.memory import (
    planned_bubble,
    planned_exchange,
    planned_memory,
    planned_stages,
    planned_teacher,
)
from launch.layouts.micro_batch import is_asked, with_micro_batch
from launch.layouts.trial import described
from launch.saved.initial import check_weights
from launch.saved.teacher import check_teacher
from train.engine.muon.planned import planned_muon
from train.files.sizes import GIB, MIB
from train.objectives.cost import taught_flops

if TYPE_CHECKING:
    from train.config.commands.plan import PlanCommandConfig


def main(config: DictConfig) -> None:
    """Print the plan; raises SystemExit(1) when the config cannot run."""
    from launch.config.build import ConfigError, record
    from launch.config.parse import parse
    from launch.config.unread import unread
    from launch.job.worker import tell_changes
    from launch.saved.resume import with_saved_config
    from train.config.commands.plan import PlanCommandConfig

    own = [name for name in ("device", "mfu", "price", "world") if name in config]
    asked: PlanCommandConfig = record(OmegaConf.masked_copy(config, own), PlanCommandConfig)
    if asked.world is not None or searches_layout(plain(config)):
        search_layouts(config, asked)
        return
    config = with_saved_config(config)
    with open_dict(config):
        for name in own:
            config.pop(name, None)
    num_ranks = world_size(config)
    problems: list[str] = []
    try:
        if is_asked(config):
            config, planned = with_micro_batch(config, asked.device)
            print(planned.said)
            print(described(parse(plain(config), num_ranks), planned.sizes))
        run = parse(plain(config), num_ranks)
        problems += unread(typed_overrides(), run) + of_files(run)
        tell_changes(config, run)
        if config.resume is None:
            for line in check_weights(run.init):
                print(line)
        for line in check_teacher(run):
            print(line)
    except ConfigError as error:
        problems += error.problems
        run = built(plain(config))

    found: dict[str, Any] = {"problems": problems}
    if run is not None:
        found |= _as_far_as_possible(run, num_ranks, asked, problems)
    if problems:
        print(f"{len(problems)} problem(s); this config cannot run:")
        for problem in problems:
            print(f"  error: {problem}")
    print_result(found)
    if problems:
        raise SystemExit(1)


def of_files(run: Any) -> list[str]:
    """What speaks against the files that a config names: data, tokenizer, hostfile. launch.train
    would refuse the run for it.
    """
    from launch.config.build import ConfigError
    from launch.config.parse import check_sources, check_tokenizer
    from launch.launchers import hosts

    found: list[str] = []
    if run.launch.hostfile:
        try:
            hosts.check(run.launch)
        except ValueError as error:
            found.append(str(error))
    # The nodes of a Slurm job may see data and a tokenizer that this machine does not.
    for check in (check_tokenizer, check_sources) if run.launch.kind != "slurm" else ():
        try:
            check(run)
        except ConfigError as error:
            found += error.problems
    return found


def search_layouts(config: DictConfig, asked: PlanCommandConfig) -> None:
    """Print the best layouts; raises SystemExit(1) where none fits, ConfigError where half of what
    a search needs is given, or a run to resume.
    """
    from launch.config.build import ConfigError
    from launch.config.parse import AUTO, parse
    from launch.layouts.devices import cluster_of
    from launch.layouts.page import as_data, command_line, lines
    from launch.layouts.search import search

    settings = plain(config)
    problems = asked.search_problems(searches_layout(settings))
    if config.resume is not None:
        problems.append(
            "layouts are searched for a new run; with resume=RUN give their sizes, such as "
            "parallel.expert_parallel_size=8"
        )
    if problems:
        raise ConfigError(problems)
    assert asked.world is not None and asked.device is not None

    # As one process first: what the settings say by themselves, without what is searched for.
    for name in ("device", "mfu", "price", "world"):
        settings.pop(name, None)
    settings["parallel"] = {
        key: 1 if value == AUTO else value for key, value in settings["parallel"].items()
    }
    settings["train"]["micro_batch_size"] = 1
    settings["launch"] = {"kind": "inline"}
    run = parse(settings, 1)

    cluster = cluster_of(asked.device, asked.mfu)
    found = search(run, asked.world, cluster)
    given = typed_overrides()
    for line in lines(found, asked.world, cluster, given):
        print(line)
    layouts = [{**as_data(e), "command": command_line(e, given)} for e in found.best]
    problems = [] if layouts else found.problems or ["no layout fits"]
    print_result({"problems": problems, "layouts": layouts})
    if problems:
        raise SystemExit(1)


def built(config: dict[str, Any]) -> Any:
    """The record of a run whose settings contradict each other; None where there is none."""
    from launch.config.build import build_record
    from train.config.run import RunConfig

    return build_record(config, RunConfig, "", [])


def _as_far_as_possible(
    run: Any, num_ranks: int, asked: PlanCommandConfig, problems: list[str]
) -> dict[str, Any]:
    """The plan, also of a config with problems, where they leave something to plan."""
    with io.StringIO() as said, contextlib.redirect_stdout(said):
        try:
            found = describe(run, num_ranks) | told_of_device(run, num_ranks, asked)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
            if not problems:
                raise
            return {}
        text = said.getvalue()
    print(text, end="")
    return found


def describe(run: Any, num_ranks: int) -> dict[str, Any]:
    """Print the tables and return their numbers."""
    from model.cost.memory import cache_bytes, cache_growth
    from model.cost.parameters import count_parameters, flops_per_token

    model, settings = run.model, run.train

    count = count_parameters(model, run.experts_per_token, run.attention.arguments)
    expert_size = run.parallel.expert_parallel_size
    memory = planned_memory(run, num_ranks)
    context_size = run.parallel.context_parallel_size
    rows_size = run.parallel.rows_size(num_ranks)
    micro_steps = run.gradient_accumulation_steps(rows_size)
    tokens = settings.global_batch_size * settings.seq_len
    taught = taught_flops(run, planned_teacher(run))
    flops = taught + flops_per_token(
        model, run.experts_per_token, settings.seq_len, run.attention.arguments
    )

    trained = run.trained.total
    width = 4 if settings.precision == "fp32" else 2
    cached = cache_growth(model, width, run.attention.arguments)

    print("parameters")
    for label, value in (
        ("embedding and head", count.embedding),
        ("attention", count.attention),
        ("dense MLPs", count.dense_mlp),
        ("routers", count.router),
        ("shared experts", count.shared_experts),
        ("routed experts", count.experts),
        ("norms", count.norms),
        *([("residual streams", count.streams)] if count.streams else []),
        *([("multi-token prediction", count.mtp + count.mtp_experts)] if count.mtp else []),
        ("total", count.total),
        ("active per token", count.active),
        *([("adapters", run.trained.adapters)] if run.lora.rank else []),
        *([("trained", trained)] if trained != count.total else []),
    ):
        print(f"  {label:28s} {value:>20,}")
    shared = f"context parallel {context_size}, " if context_size > 1 else ""
    if run.parallel.context_gather_size > 1:
        by_heads, gather = run.parallel.context_heads_size, run.parallel.context_gather_size
        shared = f"context parallel {by_heads} by heads x {gather} that gather, "
    if run.parallel.tensor_parallel_size > 1:
        shared += f"tensor parallel {run.parallel.tensor_parallel_size}, "
    stages = run.parallel.pipeline_parallel_size
    if stages > 1:
        shared = f"{stages} stages, {shared}"
    print(
        f"memory per device ({num_ranks} ranks, {shared}expert parallel {expert_size}, ZeRO "
        f"{run.zero_stage}, {settings.precision}, gradients in {settings.grad_accum_dtype})"
    )
    for label, value in (
        ("dense weights", memory.dense_weights),
        ("expert weights", memory.expert_weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("activations (estimate)", memory.activations),
        ("logits", memory.logits),
        *([("teacher", memory.teacher)] if memory.teacher else []),
        *([("gathered weights", memory.gathered)] if memory.gathered else []),
        *([("bucket of gradients", memory.bucket)] if memory.bucket else []),
        ("total", memory.total),
    ):
        print(f"  {label:28s} {value / GIB:>16.3f} GiB")

    pipeline = _told_stages(run, num_ranks) if stages > 1 else {}

    print(
        f"  {'cache, for each token that is generated':28s} "
        f"{cached:>10,} bytes, in {settings.precision}"
    )
    length = model.max_seq_len
    row = cache_bytes(model, width, length, run.attention.arguments)
    whole = cache_bytes(model, width, length)
    print(
        f"  {'cache, for a row of max_seq_len':28s} {row:>14,} bytes for {length:,} tokens, "
        f"{row / whole:.1%} of what dense attention over the same heads keeps"
    )

    exchange = planned_exchange(run, num_ranks)
    if num_ranks > 1:
        print("exchange (model), what a device sends in an optimisation step")
        for label, value in (
            *([("stages of the pipeline", exchange.stages)] if stages > 1 else []),
            ("heads of attention", exchange.heads),
            *([("keys and values", exchange.keys)] if exchange.keys else []),
            *([("tokens for cut matrices", exchange.tensor)] if exchange.tensor else []),
            ("rows of experts", exchange.rows),
            ("gradients", exchange.gradients),
            ("weights", exchange.weights),
            ("total", exchange.total),
        ):
            print(f"  {label:28s} {value / GIB:>16.3f} GiB")

    parts = run.parallel.parts_size
    where = "ranks" if parts == 1 else f"groups of {parts} ranks that share rows"
    if stages > 1:
        where += " of every stage"
    print("batch")
    print(
        f"  {settings.global_batch_size} sequences of {settings.seq_len} = "
        f"{settings.micro_batch_size} per {'device' if parts == 1 else 'group'} x "
        f"{rows_size} {where} x {micro_steps} accumulation steps; {tokens:,} tokens a step, "
        f"{tokens * settings.num_steps:,} in {settings.num_steps:,} steps"
    )
    print(
        f"compute\n  {flops:.4g} FLOPs per token (forward and backward), "
        f"{flops * tokens:.4g} per step, {flops * tokens * settings.num_steps:.4g} for the run"
        + (f"; {taught / flops:.0%} of them for the teacher" if taught else "")
    )

    muon = planned_muon(run, num_ranks)
    if muon.num_matrices:
        print(
            f"muon\n  {sum(muon.parameters):,} parameters in {muon.num_matrices:,} matrices, of "
            f"which {muon.num_cut:,} are cut; a rank sends up to {muon.sent_bytes / MIB:,.1f} MiB "
            f"per step, computes {muon.flops:.4g} FLOPs and works in "
            f"{muon.work_bytes / MIB:,.1f} MiB, when activations are gone"
        )

    disk = disk_usage(run, num_ranks)
    print(
        f"disk, for {settings.num_steps:,} steps (without "
        "W&B, TensorBoard, and tokens with a fallback reason)"
    )
    for label, kind in disk.items():
        print(
            f"  {label:28s} {kind.total / GIB:>16.3f} GiB  {kind.number:,} x {kind.each:,} bytes"
            + (f", bounded by {kind.limit}" if kind.limit else "")
        )
    print(f"  {'total':28s} {run_bytes(disk) / GIB:>16.3f} GiB")

    return {
        "disk_bytes": {
            **{name: vars(kind) for name, kind in disk.items()},
            "total": run_bytes(disk),
        },
        "parameters": count.total,
        "active_parameters": count.active,
        "trained_parameters": trained,
        "memory_bytes": {**vars(memory), "total": memory.total},
        "exchange_bytes": {**vars(exchange), "total": exchange.total},
        **pipeline,
        **({"muon": vars(muon)} if muon.num_matrices else {}),
        "gradient_accumulation_steps": micro_steps,
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "cache_bytes_per_token": cached,
        "cache_bytes": row,
    }


def _told_stages(run: Any, num_ranks: int) -> dict[str, Any]:
    """Print the cut of the layers, with what each stage costs."""
    stages, bubble = planned_stages(run, num_ranks), planned_bubble(run, num_ranks)
    flops = sum(stage.flops for stage in stages)
    laps = run.parallel.virtual_stages
    # In the order of the model: the first run of every stage, then the second.
    cut = ",".join(str(len(part)) for lap in zip(*run.stage_runs, strict=True) for part in lap)
    how = "balanced" if run.parallel.pipeline_split is None else "as given"
    if laps > 1:
        how += f", {laps} virtual stages each"
    print(
        f"stages (parallel.pipeline_split=[{cut}], {how}; the memory above is of the fullest, "
        f"{bubble:.1%} of a step is spent filling and draining)"
    )
    owned = [
        " + ".join(f"{part.start} to {part.stop - 1}" for part in runs) for runs in run.stage_runs
    ]
    width = max(12, *map(len, owned))
    for number, (own, stage) in enumerate(zip(owned, stages, strict=True)):
        micro = f"{stage.in_flight} micro-batch" + ("es" if stage.in_flight > 1 else "")
        micro += " of one run of layers" * (laps > 1)
        print(
            f"  {number:>3}  layers {own:{width}s} {stage.flops / flops:>6.1%} of the "
            f"FLOPs  {stage.memory.total / GIB:>9.3f} GiB  {micro} in flight"
        )
    found = [
        {
            "layers": [stage.layers[0], stage.layers[-1]],
            "runs": [[part.start, part.stop - 1] for part in runs],
            "flops_per_token": stage.flops,
            "in_flight": stage.in_flight,
            "memory_bytes": stage.memory.total,
            "exchange_bytes": stage.exchange.total,
        }
        for stage, runs in zip(stages, run.stage_runs, strict=True)
    ]
    return {"stages": found, "bubble": bubble}


def told_of_device(run: Any, num_ranks: int, asked: PlanCommandConfig) -> dict[str, Any]:
    """Print whether the run fits the device, what else would help, and how long it takes."""
    device = device_of(asked.device)
    if device is None:
        print("device\n  none here, and none named: device=H200 says whether it fits, and how long")
        return {}
    memory = planned_memory(run, num_ranks).total
    found: dict[str, Any] = {"device": device.name, "fits": memory <= device.usable}
    print(f"device: {device.name}, {device.memory / GIB:.0f} GiB")
    verdict = "fits" if found["fits"] else "does not fit"
    print(
        f"  {verdict}: {memory / GIB:.1f} of {device.usable / GIB:.1f} GiB "
        f"({memory / device.usable:.0%}); the rest of the device is left to what the plan leaves "
        "out"
    )
    found["helps"] = _told_helps(run, num_ranks, device, memory)
    return found | _told_time(run, num_ranks, device, asked)


def _told_helps(run: Any, num_ranks: int, device: Device, memory: int) -> list[dict[str, Any]]:
    helps = alternatives(run, num_ranks)
    for setting, total in helps:
        suffices = ", and then fits" if total <= device.usable < memory else ""
        print(f"  {setting:44s} {(total - memory) / GIB:>+8.1f} GiB{suffices}")
    return [{"setting": setting, "memory_bytes": total} for setting, total in helps]


def _told_time(
    run: Any, num_ranks: int, device: Device, asked: PlanCommandConfig
) -> dict[str, Any]:
    from model.cost.parameters import flops_per_token

    if device.tflops is None:
        return {}
    settings = run.train
    tokens = settings.num_steps * settings.global_batch_size * settings.seq_len
    attention = run.attention.arguments
    flops = flops_per_token(run.model, run.experts_per_token, settings.seq_len, attention)
    flops += taught_flops(run, planned_teacher(run))
    rate = device.tflops * 1e12 * asked.mfu * num_ranks / flops
    hours = tokens / rate / 3600
    print(
        f"time, at {asked.mfu:.0%} of the peak (mfu={asked.mfu:g})\n  {rate:,.0f} tokens a second "
        f"on {num_ranks} devices; {tokens:,} tokens in {_long(hours)}, {hours * num_ranks:,.1f} "
        "device hours"
    )
    found = {"tokens_per_second": rate, "tokens": tokens, "hours": hours}
    if asked.price is not None:
        found["cost"] = hours * num_ranks * asked.price
        print(f"  costs {found['cost']:,.2f}, at {asked.price:g} for a device and hour")
    return found


def _long(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.1f} days"


if __name__ == "__main__":
    run_main("plan", main)
