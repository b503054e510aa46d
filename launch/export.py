"""Write a run as a folder that transformers and vLLM load unchanged.

python -m launch.export run=RUN to=DIR [checkpoint=best|latest] [average=N] [dtype=bf16|fp8]
[max_shard_size=5] [verify=true] [adapter=true] [router.top_k=K]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.export")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from launch.command.main import run_main
from launch.command.messages import print_result
from launch.config.build import ConfigError, record, require_given
from launch.saved.run import load_run, require_average, require_text

if TYPE_CHECKING:
    from train.config.commands.export import ExportConfig
    from train.config.run import RunConfig
    from train.pretrained.export import Export, Tokenizer
    from train.pretrained.verify import AdapterComparison, Comparison


def main(config: DictConfig) -> None:
    """Export a checkpoint; refuses before anything is written."""
    from model.families.reading import FamilyError
    from train.checkpoint.folder import find_last
    from train.config.commands.export import ExportConfig

    is_given = config.run is not None and config.to is not None
    require_given(config, ExportConfig, is_given, "give run=RUN and to=DIR")
    settings = record(config, ExportConfig)
    to = Path(settings.to).expanduser()
    if to.exists():
        raise ValueError(f"{to} exists; give a folder that does not, or remove it")
    checkpoints = find_last(Path(settings.run), settings.checkpoint, settings.average)
    checkpoint = checkpoints[0]
    run = load_run(settings.run, None, checkpoint, settings.router.top_k, adapters=settings.adapter)
    require_average(run, settings.weights, checkpoint)
    require_text(run, settings.run)

    from train.pretrained.export import export, plan_export, tokenizer_of
    from train.trained.averages import reader_of

    try:
        plan = plan_export(run, settings.dtype)
    except FamilyError as error:
        raise ConfigError(error.problems) from None
    for note in plan.notes:
        print(f"note: {note}")
    if settings.verify:
        _require_memory(run)
    tokenizer = tokenizer_of(run, Path(settings.run))
    result: dict[str, Any] = {}
    if len(checkpoints) > 1:
        result["averaged"] = [c.name for c in checkpoints]
    if settings.weights == "ema":
        result["weights"] = "ema"
    reader = reader_of(checkpoints, settings.weights)

    def verify(folder: Path) -> dict[str, Any]:
        if not settings.verify:
            return result
        from train.pretrained.verify import compare, compare_adapter

        found: Comparison | AdapterComparison
        if settings.adapter:
            found = compare_adapter(run, checkpoint, Path(settings.run), folder)
        else:
            found = compare(run, reader, Path(settings.run), folder)
        print(found.line)
        result["verified"] = found.facts
        return result

    if settings.adapter:
        size = _export_adapter(settings, run, plan, checkpoint, tokenizer, verify)
        told = {"to": str(to), "checkpoint": checkpoint.name, "base": run.init.path, "bytes": size}
        print_result({**told, **result})
        return
    if len(checkpoints) > 1:
        print(f"the mean of {', '.join(c.name for c in reversed(checkpoints))}")
    if settings.weights == "ema":
        print("the moving average of the weights (optim.ema_decay)")
    print(f"{checkpoint} as {plan.config['architectures'][0]}")

    files = export(
        plan,
        reader,
        tokenizer,
        to,
        settings.dtype,
        int(settings.max_shard_size * 1e9),
        verify,
    )
    size = sum((to / file).stat().st_size for file in files)
    print(f"{to}: {len(files)} files of weights, {size / 1e9:.3g} GB in {settings.dtype}")
    print_result(
        {
            "to": str(to),
            "checkpoint": checkpoint.name,
            "architecture": plan.config["architectures"][0],
            "bytes": size,
            **result,
        }
    )


def _export_adapter(
    settings: ExportConfig,
    run: RunConfig,
    plan: Export,
    checkpoint: Path,
    tokenizer: Tokenizer,
    verify: Callable[[Path], dict[str, Any]],
) -> int:
    """The adapters alone; returns their bytes."""
    from train.pretrained.adapter import export_adapter, plan_adapter

    to = Path(settings.to).expanduser()
    adapter = plan_adapter(run, plan.reading)
    if settings.verify and run.init.path is None:
        raise ValueError(
            f"verify=true loads the adapter onto a folder of published weights, but {settings.run} "
            f"began with init.run={run.init.run}; export that run and use the folder as the "
            "adapter's base, with verify=false here"
        )
    print(f"adapters of {checkpoint}, for {run.init.path or 'the weights of init.run'}")
    files = export_adapter(
        adapter,
        checkpoint,
        tokenizer,
        to,
        settings.dtype,
        verify,
        plan.reading.model["max_seq_len"],
    )
    size = sum((to / file).stat().st_size for file in files)
    print(f"{to}: {size / 1e9:.3g} GB in {settings.dtype}")
    return size


def _require_memory(run: Any) -> None:
    """
    Raises:
        ValueError: the model does not fit this machine twice in fp32, as verifying needs it.
    """
    from launch.job.memory import this_machine
    from model.cost.parameters import count_parameters
    from train.files.sizes import GIB

    count = count_parameters(run.model, run.experts_per_token, run.attention.arguments)
    needed, there = 2 * 4 * count.total, this_machine().host
    if needed > there:
        raise ValueError(
            f"verify=true holds the model twice in fp32, {needed / GIB:.1f} GiB, and this machine "
            f"has {there / GIB:.1f} GiB; add verify=false, or export where there is more"
        )


if __name__ == "__main__":
    run_main("export", main)
