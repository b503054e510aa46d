"""Continuing a run under settings of this command line: what may change, what is refused and why,
what is said about it.

A run's config.yaml says what its last start asked for; the config.yaml of a checkpoint says what
its state was made under. Changes are taken against the latter. Imports no torch.
"""

from __future__ import annotations

import fnmatch
import itertools
import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launch.config.build import ConfigError
from launch.config.epochs import rows_of_epochs
from launch.config.length import with_length
from launch.config.overrides import literal, plain
from launch.process.identity import ROOT
from launch.process.secrets import redact
from launch.saved.configs import load_checkpoint_config, load_run_config
from launch.saved.defaults import complete
from launch.saved.environment import require_confirmed
from launch.saved.files import read_result
from launch.saved.initial import with_initial_weights
from launch.saved.teacher import with_named_checkpoint
from model.cost.parameters import (
    has_index,
    index_layers,
    is_compressed,
    is_indexed,
    is_latent,
    sparse_layers,
)
from train.checkpoint.folder import find_checkpoint, newest_complete, step_of
from train.config.component import SETTINGS
from train.files.manifest import CheckpointError, require_owned
from train.files.strict_json import dumps
from train.pretrained.described import PRETRAINED

OTHER_OPTIMIZER = (
    "the checkpoint holds the moments of the optimizer that moved each parameter; a new run can "
    "begin with its weights: init.run=RUN init.checkpoint=latest"
)
FIXED = {
    "model.*": "the saved tensors have this shape",
    "data.*": "the order of the data would change",
    "seed": "the order of the data would change",
    "init.*": "its weights were read when the run began",
    "train.seq_len": "the order of the data would change",
    "lora.*": "the checkpoint holds adapters of this shape, and moments of what was trained alone",
    "optim.optimizer": OTHER_OPTIMIZER,
    "optim.freeze": "the checkpoint holds moments of what was trained alone",
    "experiment_name": "it names the directory, which stays",
    "router.initial_top_p": "a run starts with it, and the controller has moved on; change "
    "router.budget",
}
"""Keys that a run keeps for life, as patterns, and why."""
FREE = (
    "model.recompute",
    "model.loss_chunk_size",
    "data.cache_dir",
    "data.max_bad_rows",
    "data.on_bad_row",
    "data.stream.workers",
)
"""Keys under those patterns that may change: memory (but for the order of a sum), places, and what
preparing bears. The tokens themselves are compared when the store is opened.
"""
INSTEAD = {"model.top_k": "router.top_k or router.budget"}
"""What to change instead of a key that is fixed."""
OF_THE_COMMAND = ("run_dir", "resume", "saved_config", "attempt", "trial", "launch.dry_run")
"""Keys that say nothing about how the run trains."""
KEPT_GROUPS = ("experiment", "size", "variant", "debug", "model")


class _Unset:
    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()
"""Value of a key that a config does not have."""
Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> what it was and what it is."""


# --- the config of the resumed run ----------------------------------------------------------------


def merged(
    saved: DictConfig, composed: DictConfig, overrides: list[str], run_dir: str
) -> DictConfig:
    """The run's saved config with the command line's overrides on top, interpolations kept.

    Args:
        saved: RUN/config.yaml; composed: the defaults with the same overrides, which holds their
            values.

    Raises:
        ValueError: an override is for a group that a run keeps, or takes something away.
    """
    values = OmegaConf.to_container(composed, resolve=False)
    saved.train.stop_after_step = None
    for override in overrides:
        key = override.lstrip("+").split("=", 1)[0].split("@")[0].replace("/", ".")
        if key in KEPT_GROUPS or override.startswith("~"):
            raise ValueError(
                f"resume={run_dir} keeps the model and experiment of the run; drop {override!r}"
            )
        OmegaConf.update(saved, key, _select(values, key), force_add=True, merge=False)
    saved.resume = saved.run_dir = literal(run_dir)
    saved.launch.dry_run = composed.launch.dry_run
    _use_kept_tokenizer(saved, Path(run_dir))
    # an override may have put another component in place, without its defaults
    return with_length(complete(saved), overrides, rows_of_epochs(saved))


def _use_kept_tokenizer(saved: DictConfig, run_dir: Path) -> None:
    """Read the run's own copy of a tokenizer whose folder is gone: published weights are needed
    once, to begin with them.
    """
    path = OmegaConf.select(saved, "data.tokenizer.path")
    kept = run_dir / PRETRAINED
    if path and not Path(path).expanduser().exists() and (kept / "tokenizer.json").is_file():
        saved.data.tokenizer.path = literal(str(kept))


def _select(values: Any, key: str) -> Any:
    """The value at a dotted key of plain data, as it is written: interpolations are the run's then,
    escapes stay.
    """
    for name in key.split("."):
        values = values[int(name)] if isinstance(values, list) else values[name]
    return values


# --- what has changed -----------------------------------------------------------------------------


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists of plain values are values."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {
        key: value
        for name, item in node.items()
        for key, value in flat(item, f"{path}.{name}" if path else str(name)).items()
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> Changes:
    """Every key whose value differs between two resolved configs, but for those of the command
    itself.
    """
    old, new = flat(before), flat(after)
    return {
        key: (old.get(key, UNSET), new.get(key, UNSET))
        for key in {**old, **new}
        if old.get(key, UNSET) != new.get(key, UNSET) and key not in OF_THE_COMMAND
    }


def refusals(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Changes that the saved state does not bear, each with the reason."""
    found = []
    for key, (old, new) in changes(before, after).items():
        reason = next(
            (why for pattern, why in FIXED.items() if fnmatch.fnmatchcase(key, pattern)), None
        )
        of_another_router = key.startswith("router.") and UNSET in (old, new)
        is_own_copy = key == "data.tokenizer.path" and new == f"{after.get('run_dir')}/{PRETRAINED}"
        if reason is not None and key not in FREE and not of_another_router and not is_own_copy:
            instead = f"; change {INSTEAD[key]} instead" if key in INSTEAD else ""
            found.append(f"cannot change {key} {shown(old)} -> {shown(new)}: {reason}{instead}")
    return found + _new_parameters(before, after) + _other_optimizers(before, after)


def _other_tables(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The tables of layers that route by token id are saved, each with top_k experts of a token."""
    old, new = (config.get("router", {}).get("hash_layers", 0) for config in (before, after))
    if not after["model"]["num_experts"]:
        return []
    if old != new:
        return [
            f"cannot change router.hash_layers {old} -> {new}: the checkpoint holds the tables of "
            f"{old} layers"
        ]
    old_k, new_k = (config.get("router", {}).get("top_k") for config in (before, after))
    if new and old_k != new_k:
        return [
            f"cannot change router.top_k {old_k} -> {new_k}: the tables of router.hash_layers "
            f"{new} name {old_k} experts of every token"
        ]
    return []


def _other_optimizers(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Groups of parameters may be others, but not where one of them chooses an optimizer: the first
    that matches a parameter says which moments it has.
    """
    old, new = (chosen_optimizers(config.get("optim", {})) for config in (before, after))
    for i, (was, now) in enumerate(itertools.zip_longest(old, new, fillvalue=UNSET)):
        if was != now:
            return [
                f"cannot change optim.groups.{i}.optimizer, {shown(was)} -> {shown(now)}: "
                f"{OTHER_OPTIMIZER}"
            ]
    return []


def chosen_optimizers(optim: dict[str, Any]) -> list[dict[str, Any]]:
    """What every group is about, and its optimizer; none where no group chooses one."""
    groups = optim.get("groups") or []
    if not any(group.get("optimizer") for group in groups):
        return []
    names = ("match", "layers", "optimizer")
    return [{name: group.get(name) for name in names} for group in groups]


def _new_parameters(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Router and attention may be others, but not with parameters that the checkpoint does not
    hold.
    """
    found, model = [], after["model"]
    if model["num_experts"]:
        old, new = (
            config.get("router", {}).get("num_null_experts", 0) for config in (before, after)
        )
        if old != new:
            found.append(
                f"cannot change router.num_null_experts {old} -> {new}: "
                "the router's weight has a row for every null expert"
            )

    old, new = (bool(config.get("router", {}).get("bias", False)) for config in (before, after))
    if model["num_experts"] and old != new:
        found.append(
            f"cannot change router.bias {shown(old)} -> {shown(new)}: the routers' weights "
            + ("have no bias" if new else "have a bias")
        )
    found += _other_tables(before, after)

    if refusal := other_projections(before.get("attention", {}), after["attention"]):
        return [*found, refusal]
    missing = sorted(
        learned(after["attention"], model) - learned(before.get("attention", {}), model)
    )
    if missing:
        layer, name = missing[0]
        found.append(
            f"cannot change to attention.{name}: it learns parameters that the checkpoint does not "
            f"hold (the first in layer {layer})"
        )
    return found


SHAPING_PROJECTIONS = (
    *("layer_kinds", "csa_ratio", "hca_ratio", "q_lora_rank", "output_groups", "o_lora_rank"),
    *("index_heads", "index_head_dim", "late_csa_ratio", "csa_overlap", "slot_bias"),
    *("entry_layers", "index_layers", "index_keys"),
)
"""Settings of compressed attention that say which tensors there are."""


def other_projections(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why weights of one attention do not fit another; None where they do. Dense and sparse
    attention have the same, latent attention (MLA) and compressed attention have others.

    old, new: settings of attention, with its name.
    """
    if is_compressed(old) != is_compressed(new):
        return (
            f"cannot change attention {old.get('name', 'dense')} -> {new.get('name', 'dense')}: "
            "the projections of compressed attention are others than those of any other"
        )
    for key in SHAPING_PROJECTIONS if is_compressed(old) else ():
        if shown(old[key]) != shown(new[key]):
            return (
                f"cannot change attention.{key} {shown(old[key])} -> {shown(new[key])}: "
                "the saved tensors have this shape"
            )
    if is_latent(old) != is_latent(new):
        return (
            f"cannot change attention {old.get('name', 'dense')} -> {new.get('name', 'dense')}: "
            "the projections of latent attention (mla) are others than those of any other"
        )
    for key in old if is_latent(old) else ():
        if old[key] != new[key]:
            return (
                f"cannot change attention.{key} {shown(old[key])} -> {shown(new[key])}: "
                "the saved tensors have this shape"
            )
    return None


def learned(attention: dict[str, Any], model: dict[str, Any]) -> set[tuple[int, str]]:
    """(layer, setting) of what layers learn beside the projections."""
    if is_indexed(attention):
        shape = [attention[key] for key in ("rule", "index_heads", "index_head_dim")]
        name = "name=indexed with rule, index_heads, index_head_dim = " + ", ".join(
            map(shown, shape)
        )
        return {(layer, name) for layer in sparse_layers(model["num_layers"], attention)}
    if attention.get("sinks"):
        return {(layer, "sinks") for layer in range(model["num_layers"])}
    if "block_size" not in attention:
        return set()
    names = [name for name in ("offset", "trust", "sink") if attention.get(name)]
    names += [f"{name}=gated" for name in ("merge", "entries") if attention.get(name) == "gated"]
    found = {
        (layer, name) for layer in sparse_layers(model["num_layers"], attention) for name in names
    }
    if has_index(attention):
        name = f"select=index with index_head_dim = {shown(attention['index_head_dim'])}"
        found |= {(layer, name) for layer in index_layers(model["num_layers"], attention)}
    return found


def described(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line a change: "changed: router top_k -> expert_choice", "changed: optim.lr 0.002 ->
    0.001".
    """
    lines, found = [], changes(before, after)
    for kind in SETTINGS:
        if f"{kind}.name" in found:
            del found[f"{kind}.name"]
            lines.append(
                f"changed: {kind} {_option(kind, before.get(kind, {}))} -> "
                f"{_option(kind, after[kind])}"
            )
            for key in [
                k for k, pair in found.items() if k.startswith(f"{kind}.") and UNSET in pair
            ]:
                del found[key]  # what only one of the two has
    return lines + [
        f"changed: {key} {shown(old)} -> {shown(new)}" for key, (old, new) in sorted(found.items())
    ]


def _option(kind: str, settings: dict[str, Any]) -> str:
    """The option of conf/<kind> that a component's settings are nearest to; its own name where
    there is none.
    """

    def likeness(path: Path) -> int:
        options = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert isinstance(options, dict)
        same = sum(options.get(key, UNSET) == value for key, value in settings.items())
        return same if options.get("name") == settings.get("name") else 0

    best = max(sorted((ROOT / "conf" / kind).glob("*.yaml")), key=likeness)
    return best.stem if likeness(best) else str(settings.get("name"))


def shown(value: Any) -> str:
    """A setting's value as messages have it."""
    return value if isinstance(value, str) else repr(value) if value is UNSET else dumps(value)


# --- whether there is anything to do --------------------------------------------------------------


def problem_of_steps(
    run_dir: Path, done: int, num_steps: int, stop_after_step: int | None
) -> str | None:
    """Why a run whose newest checkpoint is of step `done` has nothing to train up to the steps
    asked for; None: it has, or its last evaluation is missing.
    """
    key, last = "train.num_steps", num_steps
    if stop_after_step is not None and stop_after_step < num_steps:
        key, last = "train.stop_after_step", stop_after_step
    if last < done:
        return (
            f"{key} {last} is below the {done} steps that {run_dir} has done; give a larger {key}"
        )
    if last == done and _has_ended(run_dir, done):
        return f"{run_dir} is finished: it has done all {done} steps of {key}; give a larger {key}"
    return None


def _has_ended(run_dir: Path, step: int) -> bool:
    """Whether result.json is that of the step: it is written after the last evaluation."""
    result = read_result(run_dir) or {}
    return result.get("step") == step and not result.get("stopped")


def examine(config: DictConfig, run: Any) -> list[str]:
    """Look at the checkpoint that a run would go on from, before anything is started or written:
    what has changed since, as lines to print.

    Args:
        config: of `merged`; run: its RunConfig.

    Raises:
        ConfigError: changes are refused, or there is nothing to train.
        CheckpointError: there is no checkpoint, or it is of another run.
    """
    run_dir = Path(config.resume)
    checkpoint, before = _made_under(run_dir)
    _refuse(config, before, checkpoint)
    steps = problem_of_steps(
        run_dir, step_of(checkpoint), run.train.num_steps, run.train.stop_after_step
    )
    if steps is not None:
        raise ConfigError([steps])
    return described(before, redact(plain(config)))


def examine_restart(config: DictConfig, run_dir: Path) -> list[str]:
    """The same for an attempt that goes on by itself, without anybody's overrides: RUN/config.yaml
    may have been edited meanwhile. A run that has no checkpoint yet has nothing to compare.

    Raises:
        CheckpointError: the two do not belong together.
    """
    if newest_complete(run_dir) is None:
        return []
    checkpoint, before = _made_under(run_dir)
    _refuse(config, before, checkpoint)
    return described(before, redact(plain(config)))


def _made_under(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a run would go on from, and what it was made under, resolved, without
    secrets.
    """
    checkpoint = newest_complete(run_dir) or find_checkpoint(run_dir)
    try:
        return checkpoint, plain(load_checkpoint_config(checkpoint))
    except ValueError:  # damaged, in a file of the right size
        checkpoint = find_checkpoint(run_dir)
        return checkpoint, plain(load_checkpoint_config(checkpoint))


def _refuse(config: DictConfig, before: dict[str, Any], checkpoint: Path) -> None:
    """
    Raises:
        ConfigError: the command line asks for what the saved state does not bear.
        CheckpointError: nobody asked for it: RUN/config.yaml and the checkpoint do not belong
            together.
    """
    run_dir = checkpoint.parent.parent
    found = refusals(before, redact(plain(config)))
    saved = redact(plain(load_run_config(run_dir / "config.yaml")))
    if found and not refusals(saved, redact(plain(config))):
        raise CheckpointError(
            f"{checkpoint} was made under another config than "
            f"{run_dir}/config.yaml: it {found[0]}. Put the run's own "
            f"config.yaml back ({checkpoint} has it, without interpolations)"
        )
    if found:
        raise ConfigError(
            [f"resume={run_dir} {problem}; start a new run for it" for problem in found]
        )


def with_saved_config(config: DictConfig) -> DictConfig:
    """The whole config of the run, defaults written out. With resume=DIR the run's saved one
    applies, with this command line's overrides on top.
    """
    if config.resume is None:
        # once more, as the weights may have brought another router or attention
        config = complete(with_named_checkpoint(with_initial_weights(complete(config))))
        typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        return with_length(config, typed, rows_of_epochs(config))
    path = Path(config.resume) / "config.yaml"
    if not path.is_file():
        copies = sorted(Path(config.resume).glob("checkpoints/step-*/config.yaml"))
        raise FileNotFoundError(
            f"resume: {path} does not exist; "
            + (
                f"{copies[-1]} has it without interpolations: "
                f"{shlex.join(['cp', str(copies[-1]), str(path)])}"
                if copies
                else "give a run directory, e.g. resume=runs/.../..."
            )
        )
    # Before its settings are looked at: they say what ranks load and where keys are sent.
    require_owned(path.parent)
    require_owned(path)
    if config.run_dir is not None and config.run_dir != config.resume:
        raise ValueError(
            f"resume={config.resume} continues in its own directory; drop run_dir={config.run_dir}"
        )
    saved, overrides = load_run_config(path), list(HydraConfig.get().overrides.task)
    require_confirmed(OmegaConf.to_container(saved, resolve=False), overrides, config.resume)
    return with_named_checkpoint(merged(saved, config, overrides, config.resume))
