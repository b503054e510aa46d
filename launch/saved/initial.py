"""A run that begins with weights that exist: of a published folder (init.path), or of another run
(init.run). Shape, router and tokenizer come with them.

The composed config gets them in place of its defaults, and they are saved with it, so that a
resumed run needs neither. What the command line asks for besides is kept where the weights bear it,
and refused where they do not. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from launch.config.build import ConfigError, build_record
from launch.config.overrides import literal, plain
from launch.saved.configs import load_checkpoint_config
from launch.saved.index import without_index
from model.cost.parameters import has_index, is_compressed, is_indexed
from train.checkpoint.folder import find_checkpoint, step_of
from train.config.lora import LoraConfig
from train.config.training import OptimConfig, problems_of_checkpoint
from train.config.upcycling import UpcycleConfig
from train.pretrained.described import describe, end_of_text, reading_of
from train.pretrained.shards import PretrainedError

OWN = ("max_seq_len", "init_std", "rope_theta", "rope_scaling", "recompute", "loss_chunk_size")
"""Of the shape, what a run may choose otherwise: no tensor depends on it."""
OF_THE_SCORES = ("score_function", "normalize_weights", "scaling_factor")
"""Of the router, what another router keeps, too."""
DEFAULTS = {"model": "quickstart", "router": "top_k"}
"""What conf/train.yaml chooses: anything else was asked for."""


@dataclass(frozen=True)
class Given:
    """What the weights bring."""

    source: str
    """The override that named them."""
    model: dict[str, Any]
    router: dict[str, Any]
    """Empty for a dense model."""
    attention: dict[str, Any]
    balance: dict[str, Any]
    tokenizer: Path | None
    """A folder with a tokenizer.json."""
    end_of_document: str | None
    is_run: bool
    """Whether another router or attention may be chosen freely: a run knows them all."""
    step: int = 0
    """Of a run's checkpoint."""
    settings: dict[str, Any] = field(default_factory=dict)
    """That a run's checkpoint was made under."""


def with_initial_weights(config: DictConfig, overrides: list[str] | None = None) -> DictConfig:
    """The composed config with what init.path or init.run brings, in place.

    Args:
        overrides: of the command line; None: those of this process.

    Raises:
        ConfigError: an override contradicts the weights.
        PretrainedError: the folder's config.json cannot be read or expressed.
        FileNotFoundError: the run has no checkpoint.
    """
    given = _given(config)
    if given is None:
        return config
    typed = _typed(overrides)
    chosen = _chosen(typed)
    given = _upcycled(config, given, typed)

    problems = _of_shape(config, given, typed, chosen)
    problems += [] if given.is_run else _of_parts(config, given, typed, chosen)
    if problems:
        raise ConfigError(problems)

    with open_dict(config):
        for key, value in given.model.items():
            if key not in OWN or not _is_typed(f"model.{key}", typed):
                config.model[key] = literal(value)
        if given.router:
            config.router = _router(config, given, typed, chosen)
        if given.attention and "attention" not in typed:
            attention = dict(given.attention)
            _keep_typed(config, "attention", attention, typed)
            config.attention = literal(attention)
        if problem := _of_index(given, _plain(config.attention)):
            raise ConfigError([problem])
        for key, value in given.balance.items():
            if not typed & {"balance", f"balance.{key}"}:
                config.balance[key] = value
        _set_tokenizer(config, given, typed)
    # An upcycled model is refused with the other contradictions (train/config/training.py).
    if given.is_run and config.init.moments is True and not config.init.upcycle.num_experts:
        problems = _of_moments(config, given)
    if problems:
        raise ConfigError(problems)
    return config


def with_their_tokenizer(config: DictConfig, overrides: list[str] | None = None) -> DictConfig:
    """A config of data alone with the tokenizer that init.path or init.run brings, in place: what a
    run that begins with them reads.

    Args, Raises: as with_initial_weights.
    """
    given = _given(config)
    if given is None:
        return config
    typed = _typed(overrides)
    with open_dict(config):
        if not _is_typed("model.vocab_size", typed):
            config.model.vocab_size = given.model["vocab_size"]
        _set_tokenizer(config, given, typed)
    return config


def _given(config: DictConfig) -> Given | None:
    """What init.path or init.run brings; None: neither is set."""
    path, run = (OmegaConf.select(config, f"init.{key}") for key in ("path", "run"))
    if path is None and run is None:
        return None
    if path is not None and run is not None:
        raise ConfigError(["init.path and init.run are both set; a run begins with one of them"])
    return of_folder(path) if path is not None else _of_run(run, config.init.checkpoint)


def _typed(overrides: list[str] | None) -> set[str]:
    """Names of the settings that were given; overrides: None: on this process's command line."""
    if overrides is None:
        overrides = list(HydraConfig.get().overrides.task)
    names = {override.lstrip("+~").split("=", 1)[0] for override in overrides}
    return {name.split("@")[0].replace("/", ".") for name in names}


def _upcycled(config: DictConfig, given: Given, typed: set[str]) -> Given:
    """What the weights bring once the MLPs are experts. Which layers become experts is the run's
    choice.

    Raises:
        ConfigError: the settings contradict each other, or the weights.
    """
    problems: list[str] = []
    upcycle = build_record(_plain(config.init.upcycle), UpcycleConfig, "init.upcycle.", problems)
    if problems := problems or upcycle.problems():
        raise ConfigError(problems)
    if not upcycle.num_experts:
        return given
    try:
        shape = upcycle.shape(given.model)
    except ValueError as error:
        raise ConfigError([f"{given.source}: {error}"]) from None
    for key in ("num_dense_layers", "moe_layer_interval"):
        if f"model.{key}" in typed:
            shape[key] = config.model[key]
    return dataclasses.replace(given, model=shape, balance={})


def check_weights(init: Any) -> list[str]:
    """Look at what the weights are, by headers alone, before any rank is started: lines to print.
    None where a run begins with weights that are drawn.

    Raises:
        PretrainedError: the files are not those of the folder's config.json, or not all there.
        FileNotFoundError: the run has no checkpoint.
    """
    if init.run is not None:
        brought = "weights and moments" if init.moments else "weights"
        return [f"begins with the {brought} of {find_checkpoint(Path(init.run), init.checkpoint)}"]
    if init.path is None:
        return []
    described = describe(Path(init.path).expanduser())
    shards = described.shards
    return [
        f"begins with {init.path}: {described.reading.family.model_type}, {len(shards.shapes)} "
        f"tensors, {shards.num_bytes / 1e9:.3g} GB",
        *(f"note: {note}" for note in described.reading.notes),
    ]


# --- what there is --------------------------------------------------------------------------------


def of_folder(path: str, key: str = "init.path") -> Given:
    """What a folder of published weights brings. key: the override that names it.

    Raises:
        PretrainedError: its config.json cannot be read or expressed.
    """
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        instead = key.replace("path", "run")
        raise PretrainedError(f"{key}={path} is a run directory; give it as {instead}={path}")
    reading = reading_of(folder)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Given(
        source=f"{key}={path}",
        model=reading.model,
        router=reading.router,
        attention=reading.attention,
        balance=reading.balance,
        tokenizer=folder if has_tokenizer else None,
        end_of_document=end_of_text(folder) if has_tokenizer else None,
        is_run=False,
    )


def _of_run(run: str, prefer: str) -> Given:
    if not (Path(run) / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"init.run: {run}/checkpoints does not exist; give a run directory of launch.train"
        )
    if problems := problems_of_checkpoint("init.checkpoint", str(prefer)):
        raise ConfigError(problems)
    checkpoint = find_checkpoint(Path(run), prefer=prefer)
    config = plain(load_checkpoint_config(checkpoint))
    # Of tokens that came without one there is none.
    has_tokenizer = config["data"]["tokenizer"]["end_of_document_id"] is None
    return Given(
        source=f"init.run={run}",
        model=config["model"],
        router=config["router"] if config["model"]["num_experts"] else {},
        attention=config["attention"],
        balance=config["balance"],
        tokenizer=Path(run) / "data" if has_tokenizer else None,
        end_of_document=config["data"]["tokenizer"]["end_of_document"],
        is_run=True,
        step=step_of(checkpoint),
        settings=config,
    )


# --- what was asked for ---------------------------------------------------------------------------


def _chosen(typed: set[str]) -> set[str]:
    """Groups whose option somebody has chosen: on the command line, or in an experiment."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {
        group
        for group, default in DEFAULTS.items()
        if group in typed or choices.get(group, default) != default
    }


def _is_typed(key: str, typed: set[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in typed)


def _of_shape(config: DictConfig, given: Given, typed: set[str], chosen: set[str]) -> list[str]:
    found = []
    for key, value in given.model.items():
        asked = _plain(OmegaConf.select(config, f"model.{key}"))
        named = _is_typed(f"model.{key}", typed) or "model" in chosen
        # The width of dense layers says nothing where there are none, and null is a number's name.
        if key in OWN or not named or asked == value or _means_the_same(key, asked, given.model):
            continue
        found.append(
            f"model.{key}={asked} contradicts {given.source}, whose weights have {value}; drop "
            + ("it" if _is_typed(f"model.{key}", typed) else "the choice of a model")
        )
    return found


def _of_index(given: Given, asked: dict[str, Any]) -> str | None:
    """Why the weights' index may not choose from the first step on; None: it may, or is not to."""
    learns_inside = has_index(asked) and not is_indexed(asked) and not is_compressed(asked)
    if learns_inside:
        # By mass it selects well at once; an index has to learn before it takes over.
        if asked["index_steps"] == 0 and (refusal := without_index(given.attention, asked)):
            return f"attention.index_steps is 0 with {given.source}: {refusal}"
        return None
    if not has_index(asked) or asked["dense_steps"] != 0 or not given.is_run:
        return None
    if refusal := without_index(given.attention, asked):
        return f"attention.dense_steps is 0 with {given.source}: {refusal}"
    learned = int(given.attention["dense_steps"])
    if given.step < learned:
        return (
            f"attention.dense_steps is 0, but the index of {given.source} had learned for "
            f"{given.step} of its {learned} steps; raise it, or train that run further"
        )
    return None


def _of_moments(config: DictConfig, given: Given) -> list[str]:
    """Why the optimizer's moments of a run cannot be those of the new one, as far as settings say
    it. What one of the two trains and the other does not is found parameter by parameter, when the
    checkpoint is read (train/checkpoint/reader.py).
    """
    from launch.saved.resume import chosen_optimizers, learned

    asked, found = f"init.moments is true, but {given.source}", []
    was = given.settings
    now = {name: _plain(config[name]) for name in ("lora", "optim", "attention", "model")}
    # What is no setting at all is said where all settings are read.
    malformed: list[str] = []
    build_record(now["lora"], LoraConfig, "lora.", malformed)
    build_record(now["optim"], OptimConfig, "optim.", malformed)
    if malformed:
        return []

    if was["lora"]["rank"] or now["lora"]["rank"]:
        which = "has adapters" if was["lora"]["rank"] else "has none of the adapters"
        found.append(f"{asked} {which}, and adapters begin anew; drop init.moments")

    old, new = was["optim"], now["optim"]
    if old["optimizer"] != new["optimizer"]:
        found.append(
            f"{asked} has moments of {old['optimizer']}, not of {new['optimizer']}; add "
            f"optim={old['optimizer']}, or drop init.moments"
        )
    elif chosen_optimizers(old) != chosen_optimizers(new):
        found.append(
            f"{asked} chooses optimizers by other optim.groups; give those of its config.yaml, or "
            "drop init.moments"
        )

    attentions = [learned(settings["attention"], settings["model"]) for settings in (was, now)]
    if others := sorted(attentions[0] ^ attentions[1]):
        layer, name = others[0]
        where = "learns" if others[0] in attentions[0] else "does not learn"
        found.append(
            f"{asked} {where} attention.{name}, unlike this run (the first in layer {layer}); take "
            "the same attention, or drop init.moments"
        )
    return found


def _means_the_same(key: str, asked: Any, shape: dict[str, Any]) -> bool:
    if key == "head_dim" and asked is None:
        return bool(shape["head_dim"] == shape["hidden_size"] // shape["num_heads"])
    experts_everywhere = not shape.get("num_dense_layers") and shape.get("moe_layer_interval") == 1
    return key == "intermediate_size" and bool(shape["num_experts"]) and experts_everywhere


def _of_parts(config: DictConfig, given: Given, typed: set[str], chosen: set[str]) -> list[str]:
    """Contradictions of router and attention. A router of another kind is a decision, and so is
    sparse attention over dense projections; another number in the same rule is a mistake.
    """
    found = []
    if given.router and OmegaConf.select(config, "router.name") == given.router["name"]:
        for key, value in given.router.items():
            asked = OmegaConf.select(config, f"router.{key}")
            named = f"router.{key}" in typed or ("router" in chosen and key != "group_keys")
            if named and asked != value and key != "name":
                found.append(
                    f"router.{key}={asked} contradicts {given.source}, which was trained with "
                    f"{value}; drop it"
                )
    kind = given.attention.get("name", "dense")
    if kind != "dense" and "attention" in typed and config.attention.name != kind:
        found.append(
            f"attention={config.attention.name} contradicts {given.source}, whose projections are "
            f"those of attention={kind}; drop it"
        )
    return found


def _router(config: DictConfig, given: Given, typed: set[str], chosen: set[str]) -> dict[str, Any]:
    """The router that the weights were trained with, or the one that was asked for, which reads its
    scores as theirs did.
    """
    own = OmegaConf.to_container(config.router, resolve=False)
    assert isinstance(own, dict)
    if "router" in chosen and own.get("name") != given.router["name"]:
        for key in OF_THE_SCORES:
            if key in own and key in given.router and f"router.{key}" not in typed:
                own[key] = given.router[key]
        return own
    router: dict[str, Any] = literal(given.router)
    _keep_typed(config, "router", router, typed)
    return router


def _keep_typed(config: DictConfig, group: str, settings: dict[str, Any], typed: set[str]) -> None:
    for name in sorted(typed):
        section, _, key = name.partition(".")
        if section == group and key and "." not in key:
            settings[key] = _plain(OmegaConf.select(config, name))


def _set_tokenizer(config: DictConfig, given: Given, typed: set[str]) -> None:
    """Text is read by the tokenizer that the weights know, unless another one was named."""
    if "data.tokenizer.path" in typed or given.tokenizer is None:
        return
    config.data.tokenizer.path = literal(str(given.tokenizer))
    if "data.tokenizer.end_of_document" not in typed and given.end_of_document:
        config.data.tokenizer.end_of_document = literal(given.end_of_document)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
