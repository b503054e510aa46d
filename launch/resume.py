"""Continuing a run under settings of this command line: what may change, what is refused and why, what is said about it.

A run's config.yaml says what its last start asked for; the config.yaml of a checkpoint says what its state was made under.
Changes are taken against the latter. Imports no torch.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.common import ROOT, literal, load_config, plain
from launch.secrets import redact
from launch.validate import ConfigError
from model.flops import sparse_layers
from train.checkpoint_folder import find_checkpoint, newest_complete, step_of
from train.manifest import CheckpointError
from train.strict_json import dumps

FIXED = {
    "model.*": "the saved tensors have this shape",
    "data.*": "the order of the data would change",
    "seed": "the order of the data would change",
    "train.seq_len": "the order of the data would change",
    "experiment_name": "it names the directory, which stays",
    "router.initial_top_p": "a run starts with it, and the controller has moved on; change router.budget",
}
"""Keys that a run keeps for life, as patterns, and why."""
FREE = ("model.recompute", "model.loss_chunk_size", "data.cache_dir", "data.max_bad_rows")
"""Keys under those patterns that may change: memory (but for the order of a sum), places, and what preparing bears. The
tokens themselves are compared when the store is opened."""
INSTEAD = {"model.top_k": "router.top_k or router.budget"}
"""What to change instead of a key that is fixed."""
OF_THE_COMMAND = ("run_dir", "resume", "saved_config", "attempt", "launch.dry_run")
"""Keys that say nothing about how the run trains."""
COMPONENTS = ("router", "attention", "dispatcher")
KEPT_GROUPS = ("experiment", "debug", "model")


class _Unset:
    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()
"""Value of a key that a config does not have."""
Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> what it was and what it is."""


# --- the config of the resumed run -----------------------------------------------------------------------------------

def merged(saved: DictConfig, composed: DictConfig, overrides: list[str], run_dir: str) -> DictConfig:
    """The run's saved config with the command line's overrides on top, interpolations kept.

    Args:
        saved: RUN/config.yaml; composed: the defaults with the same overrides, which holds their values.

    Raises:
        ValueError: an override is for a group that a run keeps, or takes something away.
    """
    values = OmegaConf.to_container(composed, resolve=False)
    saved.train.stop_after_step = None
    for override in overrides:
        key = override.lstrip("+").split("=", 1)[0].split("@")[0].replace("/", ".")
        if key in KEPT_GROUPS or override.startswith("~"):
            raise ValueError(f"resume={run_dir} keeps the model and experiment of the run; drop {override!r}")
        OmegaConf.update(saved, key, _select(values, key), force_add=True, merge=False)
    saved.resume = saved.run_dir = literal(run_dir)
    saved.launch.dry_run = composed.launch.dry_run
    return saved


def _select(values: Any, key: str) -> Any:
    """The value at a dotted key of plain data, as it is written: interpolations are the run's then, escapes stay."""
    for name in key.split("."):
        values = values[int(name)] if isinstance(values, list) else values[name]
    return values


# --- what has changed ------------------------------------------------------------------------------------------------

def config_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made under, resolved, without secrets.

    Raises:
        ValueError: its config is damaged.
    """
    return plain(load_config(str(checkpoint / "config.yaml")))


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists of plain values are values."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {key: value for name, item in node.items()
            for key, value in flat(item, f"{path}.{name}" if path else str(name)).items()}


def changes(before: dict[str, Any], after: dict[str, Any]) -> Changes:
    """Every key whose value differs between two resolved configs, but for those of the command itself."""
    old, new = flat(before), flat(after)
    return {key: (old.get(key, UNSET), new.get(key, UNSET)) for key in {**old, **new}
            if old.get(key, UNSET) != new.get(key, UNSET) and key not in OF_THE_COMMAND}


def refusals(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Changes that the saved state does not bear, each with the reason."""
    found = []
    for key, (old, new) in changes(before, after).items():
        reason = next((why for pattern, why in FIXED.items() if fnmatch.fnmatchcase(key, pattern)), None)
        of_another_router = key.startswith("router.") and UNSET in (old, new)
        if reason is not None and key not in FREE and not of_another_router:
            instead = f"; change {INSTEAD[key]} instead" if key in INSTEAD else ""
            found.append(f"cannot change {key} {_shown(old)} -> {_shown(new)}: {reason}{instead}")
    return found + _new_parameters(before, after)


def _new_parameters(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Router and attention may be others, but not with parameters that the checkpoint does not hold."""
    found, model = [], after["model"]
    if model["num_experts"]:
        old, new = (config.get("router", {}).get("num_null_experts", 0) for config in (before, after))
        if old != new:
            found.append(f"cannot change router.num_null_experts {old} -> {new}: the router's weight has a row for every "
                         "null expert")
    missing = sorted(_learned(after["attention"], model) - _learned(before.get("attention", {}), model))
    if missing:
        layer, name = missing[0]
        found.append(f"cannot change to attention.{name}: it learns parameters that the checkpoint does not hold (the first "
                     f"in layer {layer})")
    return found


def _learned(attention: dict[str, Any], model: dict[str, Any]) -> set[tuple[int, str]]:
    """(layer, setting) of what sparse layers learn beside the projections."""
    if "block_size" not in attention:
        return set()
    names = [name for name in ("offset", "trust", "sink") if attention.get(name)]
    names += ["merge=gated"] if attention.get("merge") == "gated" else []
    return {(layer, name) for layer in sparse_layers(model["num_layers"], attention) for name in names}


def described(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line a change: "changed: router top_k -> expert_choice", "changed: optim.lr 0.002 -> 0.001"."""
    lines, shown = [], changes(before, after)
    for kind in COMPONENTS:
        if f"{kind}._target_" in shown:
            del shown[f"{kind}._target_"]
            lines.append(f"changed: {kind} {_option(kind, before.get(kind, {}))} -> {_option(kind, after[kind])}")
            for key in [k for k, pair in shown.items() if k.startswith(f"{kind}.") and UNSET in pair]:
                del shown[key]  # what only one of the two has
    return lines + [f"changed: {key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in sorted(shown.items())]


def _option(kind: str, settings: dict[str, Any]) -> str:
    """The option of conf/<kind> that a component's settings are nearest to; the name of its class where there is none."""
    def likeness(path: Path) -> int:
        options = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert isinstance(options, dict)
        same = sum(options.get(key, UNSET) == value for key, value in settings.items())
        return same if options.get("_target_") == settings.get("_target_") else 0

    best = max(sorted((ROOT / "conf" / kind).glob("*.yaml")), key=likeness)
    return best.stem if likeness(best) else str(settings.get("_target_")).rpartition(".")[2]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value) if value is UNSET else dumps(value)


# --- whether there is anything to do ---------------------------------------------------------------------------------

def problem_of_steps(run_dir: Path, done: int, num_steps: int, stop_after_step: int | None) -> str | None:
    """Why a run whose newest checkpoint is of step `done` has nothing to train up to the steps asked for; None: it has,
    or its last evaluation is missing."""
    key, last = "train.num_steps", num_steps
    if stop_after_step is not None and stop_after_step < num_steps:
        key, last = "train.stop_after_step", stop_after_step
    if last < done:
        return f"{key} {last} is below the {done} steps that {run_dir} has done; give a larger {key}"
    if last == done and _has_ended(run_dir, done):
        return f"{run_dir} is finished: it has done all {done} steps of {key}; give a larger {key}"
    return None


def _has_ended(run_dir: Path, step: int) -> bool:
    """Whether result.json is that of the step: it is written after the last evaluation."""
    try:
        result = json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("step") == step and not result.get("stopped")


def examine(config: DictConfig, run: Any) -> list[str]:
    """Look at the checkpoint that a run would go on from, before anything is started or written: what has changed since,
    as lines to print.

    Args:
        config: of `merged`; run: its RunConfig.

    Raises:
        ConfigError: changes are refused, or there is nothing to train.
        CheckpointError: there is no checkpoint, or it is of another run.
    """
    run_dir = Path(config.resume)
    checkpoint = newest_complete(run_dir) or find_checkpoint(run_dir)
    try:
        before = config_of(checkpoint)
    except ValueError:  # damaged, in a file of the right size
        checkpoint = find_checkpoint(run_dir)
        before = config_of(checkpoint)
    after, saved = redact(plain(config)), redact(plain(load_config(str(run_dir / "config.yaml"))))
    found = refusals(before, after)
    if found and not refusals(saved, after):  # nobody asked for it: the checkpoint is not of this run
        raise CheckpointError(f"{checkpoint} was made under another config than {run_dir}/config.yaml: it {found[0]}")
    found = [f"resume={run_dir} {problem}; start a new run for it" for problem in found]
    steps = problem_of_steps(run_dir, step_of(checkpoint), run.train.num_steps, run.train.stop_after_step)
    if found or steps is not None:
        raise ConfigError([*found, *([steps] if steps is not None else [])])
    return described(before, after)
