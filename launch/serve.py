"""Serve a trained model over HTTP, in the form of OpenAI's API.

python -m launch.serve run=RUN|path=DIR [serve.port=8000 serve.host= serve.model_name=
serve.max_waiting= engine.max_slots= engine.cache_tokens= router.budget=]
python -m launch.serve run=RUN launch.num_devices=2 parallel=ep2
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.serve")

import dataclasses
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from launch.command.arguments import replaced
from launch.command.main import run_main
from launch.command.messages import fail, failure_of, print_result
from launch.command.progress import followed
from launch.config.build import record, require_given
from launch.config.overrides import typed
from launch.process.exits import FAILED
from launch.process.identity import is_worker, rank
from launch.process.ranks import run_on_ranks
from launch.saved.opened import checkpoint_name, opened, saved_budgets
from launch.saved.run import load_folder, load_run
from train.rank.errors import LostRank

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.request import Completion, Request
    from launch.serving.app import Model
    from launch.serving.meters import Meters
    from launch.serving.policy import Policy
    from launch.serving.ranks import EngineOverRanks
    from launch.serving.replays import Recorder, Replays
    from model.routers.state import RouterState
    from model.transformer import Transformer
    from train.config.commands.serve import ServeConfig
    from train.data.chat.template import ChatTemplate
    from train.trained.budgets import BudgetTable
    from train.trained.ranks import Place

TOKEN = "LOADSTONE_SERVE_TOKEN"
SHORTEST_TOKEN = 16
UNHEALTHY_SECONDS = 3.0
"""From the engine's failure to the end of the process, in which requests and /health get 503."""
PATIENCE_SECONDS = 10.0
"""That rank 0 has for it when another rank is gone."""
NEEDED = ("starlette", "uvicorn", "prometheus_client")
"""Of requirements-serve.txt, as modules."""


def _token(settings: ServeConfig) -> str | None:
    """The token that clients must send; None: none, on this machine's own address.

    Raises:
        ValueError: others could reach the server, and no good token is there.
    """
    token = os.environ.get(TOKEN) or None
    if token is None and not settings.serve.is_local:
        raise ValueError(
            f"serve.host={settings.serve.host} can be reached by others: set the variable {TOKEN} "
            "to a secret that clients send as Authorization: Bearer, or leave serve.host at "
            "127.0.0.1"
        )
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii()):
        raise ValueError(
            f"{TOKEN} must have at least {SHORTEST_TOKEN} ASCII characters; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def _require_libraries() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"serving needs {', '.join(missing)}: pip install -r requirements-serve.txt"
        )


def main(config: DictConfig) -> None:
    from train.config.commands.devices import require_even_experts
    from train.config.commands.serve import ServeConfig

    is_given = config.run is not None or config.path is not None
    give = "give run=RUN, or path=DIR with published weights"
    require_given(config, ServeConfig, is_given, give)
    settings: ServeConfig = record(config, ServeConfig)
    token = _token(settings)
    _require_libraries()
    began = time.monotonic()
    settings = dataclasses.replace(
        settings, checkpoint=checkpoint_name(settings.run, settings.checkpoint)
    )
    if settings.launch.num_devices > 1 and not is_worker():
        from train.checkpoint.folder import find_checkpoint

        folder = find_checkpoint(Path(str(settings.run)), prefer=settings.checkpoint)
        run = load_run(str(settings.run), settings.attention, folder, settings.router.top_k)
        require_even_experts(run.model, settings.parallel)
        arguments = replaced(sys.argv[1:], "checkpoint", folder.name)
        number = settings.launch.num_devices
        if code := run_on_ranks(number, "launch.serve", arguments, patience=PATIENCE_SECONDS):
            raise SystemExit(code)
        return

    try:
        if settings.launch.num_devices == 1:
            model, store, engine, table = _opened(settings)
            _answer(settings, token, engine, _served(settings, model, store, table), table, began)
        else:
            _serve_with_others(settings, token, began)
    except LostRank as error:
        fail([str(error)], code=FAILED)


def _opened(
    settings: ServeConfig, place: Place | None = None
) -> tuple[Transformer, Any, Engine, BudgetTable | None]:
    """The model, its tokens, what generates with it, and the budgets that requests may ask for:
    those that launch.evaluate has saved for this checkpoint, these weights and this attention.
    """
    model, store, device = opened(
        settings.run,
        settings.checkpoint,
        settings.router.budget,
        settings.attention,
        settings.router.top_k,
        settings.path,
        place,
        None if place is None else settings.parallel,
        weights=settings.weights,
        for_text=True,
    )
    table, reason = saved_budgets(
        settings.run,
        settings.checkpoint,
        settings.attention,
        settings.router.top_k,
        settings.weights,
    )
    if table is None and settings.run is not None and rank() == 0:
        print(f"note: requests cannot choose a budget: {reason}", file=sys.stderr)

    from infer.engine import Engine

    budgets = None if table is None else table.on(device)
    engine = Engine(model, settings.engine, store.end_of_document, budgets=budgets)
    _capture(engine)
    return model, store, engine, table


def _capture(engine: Engine) -> None:
    """Decoding steps become CUDA graphs before the first request, where they can."""
    if engine.graphs is None:
        return
    began, number = time.monotonic(), len(engine.graphs.every_shape(engine.context))
    for _ in followed(engine.capture_steps(), "capturing decoding steps", number):
        pass
    if engine.graphs is not None and rank() == 0:
        seconds = time.monotonic() - began
        print(f"decoding steps are {number} CUDA graphs, captured in {seconds:.0f} s", flush=True)


def _serve_with_others(settings: ServeConfig, token: str | None, began: float) -> None:
    """This rank's part: rank 0 answers, and deals requests out; the others obey.

    Raises:
        LostRank: another rank is gone.
    """
    from train.rank.channel import Channel, Watch, take_key

    if (key := take_key()) is None:
        raise ValueError(
            f"launch.serve starts its {settings.launch.num_devices} ranks itself, on one machine: "
            "leave the launcher out, or set launch.num_devices=1"
        )

    from launch.serving.ranks import EngineOverRanks, follow
    from train.data.tokenizer import TextStream
    from train.trained.ranks import joined

    with joined(settings.launch.num_devices, settings.parallel) as place:
        model, store, engine, table = _opened(settings, place)
        place.meet()
        # Who stops a service may signal each of its processes: rank 0 hears of it from the command
        # that has started it, and the others end when rank 0 tells them to.
        for taken in (signal.SIGTERM, signal.SIGINT):
            signal.signal(taken, signal.SIG_IGN)
        channel, watch = Channel(key), Watch()
        if place.rank == 0:
            over = EngineOverRanks(engine, channel, watch)
            _answer(settings, token, over, _served(settings, model, store, table), table, began)
        else:
            tokenizer = store.tokenizer()
            try:
                follow(engine, channel, lambda ids: TextStream(tokenizer, ids))
            except RuntimeError as error:
                if failure_of(error) != "communication":
                    raise
                raise LostRank("another rank is gone, so this one ends") from error
        watch.leave()


def _answer(
    settings: ServeConfig,
    token: str | None,
    engine: Engine | EngineOverRanks,
    served: Model,
    table: BudgetTable | None,
    began: float,
) -> None:
    """The server, from its first to its last request.

    Raises:
        LostRank: a rank is gone.
    """
    from launch.serving.app import make_app
    from launch.serving.meters import Meters
    from launch.serving.ranks import ASKED_TO_END, PAUSE_SECONDS, EngineOverRanks
    from launch.serving.server import ENDING, listen
    from launch.serving.worker import Worker

    over = engine if isinstance(engine, EngineOverRanks) else None
    own = engine.own if isinstance(engine, EngineOverRanks) else engine
    meters, failed = Meters(), list[Callable[[], None]]()
    policy = _policy(settings, own, meters, table)
    replays = _replays(
        settings, own, meters, None if table is None else table.on(own.model.any_weight.device)
    )
    recorder = _recorder(settings)

    def stepped(seconds: float, rows: int, held: float) -> None:
        policy.stepped(seconds, rows, held)
        if own.utility is not None and (line := own.utility.take_line()) is not None:
            print(line, flush=True)

    def taken(request: Request) -> None:
        policy.take(request)
        replays.taken(request)

    def ended(request: Request, done: Completion) -> None:
        policy.ended(request, done)
        meters.ended(request, done)
        replays.ended(request, done)
        if recorder is not None:
            recorder.ended(request, done, replays.top_k)

    worker = Worker(
        engine,
        settings.serve.max_waiting,
        ended,
        lambda: failed[0](),
        taken,
        stepped,
        None if over is None else PAUSE_SECONDS,
        replays.idle,
    )
    meters.watch(worker)
    app = make_app(served, worker, meters, token, settings.serve.is_local)

    def ready(server: Any, port: int) -> None:
        # Requests that are waiting are told; those that come get 503 for a moment, which a load
        # balancer sees. Then whoever watches over the process starts another.
        ends = threading.Timer(UNHEALTHY_SECONDS, lambda: setattr(server, "should_exit", True))
        ends.daemon = True
        failed.append(ends.start)
        worker.start()
        if over is not None:
            over.watch.tell(worker.fail)
        host = settings.serve.host
        shown = f"[{host}]" if ":" in host else host
        ranks = "" if over is None else f" on each of {over.size} ranks"
        print(
            f"serving {served.name} on http://{shown}:{port} after "
            f"{time.monotonic() - began:.0f} s: cache {own.cache_bytes / 2**20:.0f} MiB, "
            f"{settings.engine.max_slots} slots{ranks}, chat "
            f"{'no' if served.template is None else 'yes'}, budgets "
            f"{', '.join(f'{b:g}' for b in served.budgets) or 'none'}",
            flush=True,
        )

    endpoint = settings.serve
    ending = ENDING if over is None else (ASKED_TO_END,)
    listen(app, endpoint.host, endpoint.port, endpoint.drain_seconds, ready, ending)
    if worker.failure is None:
        worker.close(timeout=5.0)
    if worker.failure is not None:
        raise worker.failure
    if recorder is not None:
        recorder.close()
    if over is not None:
        if not worker.is_over:
            raise LostRank("the engine has not ended 5 s after the last request")
        over.close()
    print_result({"model": served.name, **meters.totals(), **policy.summary(), **replays.summary()})


def _policy(
    settings: ServeConfig, engine: Engine, meters: Meters, table: BudgetTable | None
) -> Policy:
    """What is decided about requests that leave it open.

    Raises:
        ValueError: a budget that is asked for is not there, or nothing is known of its latency or
            of the training's loads.
    """
    from launch.serving.policy import Policy
    from launch.steering.budgets import LoadController, read_latency
    from launch.steering.drift import Drift

    asked = settings.serve
    there = () if table is None else tuple(sorted(table.states))
    for name, budget in (
        ("serve.canary.budget", asked.canary.budget),
        ("serve.budget_min", asked.budget_min),
    ):
        if budget is not None and budget not in there:
            wanted = ",".join(f"{b:g}" for b in sorted({*there, budget}))
            raise ValueError(
                f"{name} is {budget:g}, which is none of the saved budgets "
                f"({', '.join(f'{b:g}' for b in there) or 'none'}): python -m launch.evaluate "
                f"{typed('run', settings.run)} router.budget=[{wanted}] save_budgets=true"
            )
    controller = None
    if asked.budget is not None:
        if len(there) < 2:
            raise ValueError(
                "serve.budget=auto chooses among saved budgets, and the run has "
                f"{len(there) or 'none'}: python -m launch.evaluate {typed('run', settings.run)} "
                "router.budget=[1,1.5,2] save_budgets=true"
            )
        from launch.benchmarking.rates import name_of

        known = read_latency(str(asked.latency), there, name_of(engine.device))
        controller = LoadController(known, asked.itl_ms, asked.budget_min)

    drift = None
    if asked.drift.sample_one_in:
        counts = _trained_loads(settings)
        drift = Drift(counts, asked.drift.window_tokens, asked.drift.limit)
    return Policy(
        engine,
        meters,
        controller,
        asked.canary,
        drift,
        asked.drift.sample_one_in,
        asked.drift.action == "full_budget",
    )


def _replays(
    settings: ServeConfig,
    engine: Engine,
    meters: Meters,
    states: dict[float, list[RouterState]] | None,
) -> Replays:
    """What is looked at again when nobody asks for anything.

    Raises:
        ValueError: there is nothing to compare with.
    """
    from infer.budget import capture
    from launch.serving.replays import Replays, Shadow, audit_of

    asked, model = settings.serve, engine.model
    audit = shadow = None
    if asked.attention_audit.sample_one_in:
        audit = audit_of(asked.attention_audit, engine)
    if asked.shadow.sample_one_in:
        densely = bool(model.sparse_attentions())
        if not densely and not states:
            raise ValueError(
                "serve.shadow compares with the largest saved budget and with dense attention, and "
                "this model has neither saved budgets nor sparse attention; set "
                "serve.shadow.sample_one_in=0"
            )
        shadow = Shadow(max(states) if states else None, densely)
    known: dict[float | None, Sequence[RouterState]] = {None: capture(model.routers())}
    for budget, state in (states or {}).items():
        known[budget] = state
    return Replays(
        engine,
        meters,
        known,
        audit,
        asked.attention_audit.sample_one_in,
        asked.attention_audit.rows,
        shadow,
        asked.shadow.sample_one_in,
    )


def _recorder(settings: ServeConfig) -> Recorder | None:
    """Where requests are kept, if they are."""
    from launch.serving.replays import Recorder

    if settings.serve.record is None:
        return None
    source = {
        "model": str(settings.run or settings.path),
        "checkpoint": settings.checkpoint,
        "weights": settings.weights,
    }
    return Recorder(Path(settings.serve.record), source)


LAST_LINES = 10
"""Of routing.jsonl, whose mean is how training used its experts."""


def _trained_loads(settings: ServeConfig) -> Any:
    """Loads of the experts at the end of training, [layers, experts].

    Raises:
        ValueError: the run has no record of them.
    """
    from launch.runs.loads import read_frames

    run = load_run(str(settings.run))
    layers = len(run.model.decoder_moe_layers)
    frames = None
    if layers:
        path = Path(str(settings.run)) / "routing.jsonl"
        frames = read_frames(path, len(run.model.moe_layers), run.model.num_experts)
    if frames is None:
        raise ValueError(
            f"serve.drift compares with the loads of training, and {settings.run} has none of "
            "them; set serve.drift.sample_one_in=0"
        )
    return frames.load[-LAST_LINES:].sum(0)[:layers]


def _served(
    settings: ServeConfig, model: Transformer, store: Any, table: BudgetTable | None
) -> Model:
    from launch.serving.app import Model
    from train.data.tokenizer import TextInside, TextStream, tokenizers_errors

    source = settings.run or settings.path
    assert source is not None
    tokenizer = store.tokenizer()
    template, problem = _template(settings)
    ends = {} if template is None else template.values
    end = tokenizer.token_to_id(str(ends.get("eos_token", "")))
    inside = TextInside(tokenizer)

    def encode(text: str) -> list[int]:
        with tokenizers_errors("the tokenizer cannot encode the prompt"):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return Model(
        name=settings.serve.model_name or Path(source).expanduser().resolve().name,
        created=int(time.time()),
        vocab_size=model.config.vocab_size,
        max_len=model.config.max_seq_len,
        budgets=() if table is None else tuple(sorted(table.states)),
        sampling=settings.sampling,
        encode=encode,
        stream=lambda ids: TextStream(tokenizer, ids),
        spelled=lambda token: inside.decode([token]),
        template=template,
        chat_problem=problem,
        chat_stop=() if end is None else (end,),
        max_active=settings.engine.max_active_experts,
    )


def _template(settings: ServeConfig) -> tuple[ChatTemplate | None, str]:
    """How the model is spoken to, or why it is not."""
    from train.checkpoint.folder import find_checkpoint
    from train.data.chat.template import own_template
    from train.data.store import CHAT_TEMPLATE

    kept = None
    if settings.run is not None:
        folder = find_checkpoint(Path(settings.run), prefer=settings.checkpoint)
        config = load_run(settings.run, settings.attention, folder, settings.router.top_k)
        kept = Path(settings.run) / "data" / CHAT_TEMPLATE
    else:
        config = load_folder(str(settings.path), settings.attention, settings.router.top_k)
    try:
        template = own_template(config.data, kept)
    except ValueError as error:
        print(f"note: no chat: {error}", file=sys.stderr)
        return None, f"this model's chat template cannot be used: {error}"
    return template, ("this model has no chat template: it continues text; use /v1/completions")


if __name__ == "__main__":
    run_main("serve", main)
