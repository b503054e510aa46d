"""The config of a run, as commands in one process use it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from launch.config.overrides import plain
from launch.process.secrets import redact_text
from model.dispatch.config import LocalDispatcherConfig
from model.routers.config import NO_BUDGET, BudgetedConfig
from train.config.data import no_tokenizer
from train.config.objective import NextTokenConfig

FOLDER_SEQ_LEN = 2048
"""Most tokens of a row where a folder of published weights is evaluated and nobody says."""


def load_run(
    run: str,
    attention: Any = None,
    checkpoint: Path | None = None,
    top_k: int | None = None,
    adapters: bool = False,
) -> Any:
    """The RunConfig that a checkpoint of a run was made under, for use in one process.

    A run may have been resumed under other settings since, or its config.yaml edited, so that says
    nothing about its checkpoints but where their data lie now. Where it differs in what they
    compute, a note on stderr says so.

    Args:
        attention: an AttentionConfig to use instead of its own; checkpoint: None: the run as it was
            last started; top_k: experts of every token, by the same router configured with so many.
        adapters: keep its lora settings; else they are left out, as those who read weights get
            adapters added to them.

    Raises:
        FileNotFoundError: the directory holds no config.
        ValueError: the run's weights are not those of `attention`.
    """
    from launch.saved.checkpoint import config_for
    from launch.saved.configs import load_run_config
    from launch.saved.index import without_index
    from launch.saved.resume import other_projections
    from train.config.component import renamed

    path = Path(run) / "config.yaml"
    if not path.is_file() and checkpoint is None:
        raise FileNotFoundError(
            f"{path} does not exist; give a run directory of launch.train, e.g. run=runs/.../..."
        )
    if checkpoint is None:
        saved = load_run_config(path)
    else:
        saved, note = config_for(
            Path(run), checkpoint, ("attention.*",) if attention is not None else ()
        )
        if note is not None:
            print(f"note: {redact_text(note)}", file=sys.stderr, flush=True)

    # One process, any device: what spreads the experts, and what was chosen for the device of the
    # training, is left out.
    saved.launch = {"kind": "inline"}
    saved.parallel = {}
    saved.experts = {}
    saved.objective = {"name": NextTokenConfig.name}
    if not adapters:
        saved.lora = {}
    saved.dispatcher = {"name": LocalDispatcherConfig.name}
    saved.train.micro_batch_size = saved.train.global_batch_size = 1
    saved.train.batch_size_rampup = None

    config = plain(saved)
    if attention is not None:
        asked = {"name": attention.name, **attention.arguments}
        own = renamed(config["attention"])
        if refusal := other_projections(own, asked) or without_index(own, asked):
            raise ValueError(f"{run}: {refusal}")
        # What an index has learned is said by the run alone.
        if "index_heads" in own and "index_heads" in asked:
            asked["dense_steps"] = own["dense_steps"]
        elif own.get("select") == asked.get("select") == "index":
            asked["index_steps"] = own["index_steps"]
        config["attention"] = asked
    return _at(config, top_k, run)


def require_average(run: Any, weights: str, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: weights=ema of a checkpoint that was saved without a moving average.
    """
    if weights == "ema" and run.optim.ema_decay is None:
        raise ValueError(
            f"weights=ema: {checkpoint} was saved without a moving average of its weights; train "
            "with optim.ema_decay=0.999, or leave weights out"
        )


def require_budget(run: Any) -> None:
    """
    Raises:
        ValueError: the run's router knows no budget.
    """
    if not isinstance(run.router, BudgetedConfig):
        raise ValueError(NO_BUDGET)


def load_folder(
    path: str, attention: Any = None, top_k: int | None = None, seq_len: int | None = None
) -> Any:
    """The RunConfig of a folder of published weights, for use in one process: its shape and router,
    and defaults for what only training reads.

    Args:
        attention: an AttentionConfig to use instead of dense attention; top_k: as load_run.
        seq_len: tokens of a row. None: those of the model, up to 2048.

    Raises:
        PretrainedError: its config.json cannot be read or expressed.
        ValueError: the weights are not those of `attention`.
    """
    from launch.saved.index import without_index
    from launch.saved.initial import of_folder
    from launch.saved.resume import other_projections

    given = of_folder(path, "path")
    own = dict(given.attention)
    if attention is not None:
        asked = {"name": attention.name, **attention.arguments}
        if refusal := other_projections(own, asked) or without_index(own, asked):
            raise ValueError(f"path={path}: {refusal}")
        own = asked
    router = given.router or {"name": "top_k", "top_k": 1, "normalize_weights": False}
    longest = given.model["max_seq_len"]
    config = {
        "model": given.model,
        "router": router,
        "attention": own,
        "dispatcher": {"name": LocalDispatcherConfig.name},
        "balance": given.balance,
        "train": {
            "num_steps": 1,
            "seq_len": seq_len or min(longest, FOLDER_SEQ_LEN),
            "micro_batch_size": 1,
            "global_batch_size": 1,
        },
        "optim": {"lr": 1e-3},
        "parallel": {},
        "data": {
            "sources": [{"path": "sample"}],
            "tokenizer": {"path": None if given.tokenizer is None else str(given.tokenizer)}
            | ({"end_of_document": given.end_of_document} if given.end_of_document else {}),
        },
        "checkpoint": {},
        "tracker": {},
        "launch": {"kind": "inline"},
        "deepspeed": {},
    }
    return _at(config, top_k, path)


def require_text(config: Any, run: str) -> None:
    """
    Raises:
        ValueError: the run was trained on tokens alone, and has no tokenizer.
    """
    if not config.data.has_tokenizer:
        raise ValueError(no_tokenizer(run))


def require_tokenizer(config: Any, path: str) -> Any:
    """The TokenizerConfig of a folder of published weights.

    Raises:
        ValueError: the folder has no tokenizer that is read here.
    """
    if config.data.tokenizer.path is None:
        raise ValueError(
            f"{path} has no tokenizer.json; transformers writes one: "
            f"AutoTokenizer.from_pretrained({path!r}).save_pretrained({path!r})"
        )
    return config.data.tokenizer


def _at(config: dict[str, Any], top_k: int | None, source: str) -> Any:
    """The checked record of a config, with every token sent to `top_k` experts where that is a
    number: the same router configured with it (RouterConfig.fixed).
    """
    from launch.config.parse import parse

    run = parse(config, world_size=1, trains=False)
    if top_k is None:
        return run
    if not run.model.num_experts:
        raise ValueError(f"router.top_k={top_k}: {source} has no experts to choose of; drop it")
    router = run.router.fixed(run.model, top_k)
    config = {**config, "router": {"name": router.name, **router.arguments}}
    return parse(config, world_size=1, trains=False)
