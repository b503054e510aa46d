"""The endpoints: completions, chats, models, health, metrics, and a page to try them."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from infer.config import SamplingConfig
from launch.serving.answers import NOT_FINITE, Answer, Choice, error_body
from launch.serving.asked import Asked, BadRequest, read_asked
from launch.serving.meters import CONTENT_TYPE, Meters
from launch.serving.worker import RESTART_SECONDS, Ended, QueueFull, Worker
from train.files.strict_json import dumps

if TYPE_CHECKING:
    from infer.request import Event
    from infer.request import Request as EngineRequest
    from train.data.chat.template import ChatTemplate

MAX_BODY = 16 * 2**20
"""Bytes."""
ALIVE_SECONDS = 15.0
"""A stream says something at least so often, or a proxy between would end it."""
PAGE = Path(__file__).parent / "chat.html"
OPEN = ("/", "/health")
"""What needs no token: the page holds nothing, and a probe of a cluster has none."""
LOCAL = ("localhost", "127.0.0.1", "[::1]")
FAILED = "the engine has failed; ask again when the server is back"


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        encode: text to tokens, a ValueError where it cannot; stream: for the text behind a prompt.
        chat_problem: why there is no template.
    """

    name: str
    created: int
    vocab_size: int
    max_len: int
    budgets: tuple[float, ...]
    sampling: SamplingConfig
    encode: Callable[[str], list[int]]
    stream: Callable[[list[int]], Any]
    spelled: Callable[[int], str]
    template: ChatTemplate | None
    chat_problem: str
    chat_stop: tuple[int, ...]
    """Tokens that end an answer of a chat."""
    max_active: int | None = None
    """engine.max_active_experts, which every answer names."""


class Guard:
    """Lets in who may: with a token, whoever has it; without, whoever speaks to this machine by its
    own name, so that no web page reaches it under a name of its own.
    """

    def __init__(self, app: ASGIApp, token: str | None, local: bool):
        self.app, self.token, self.local = app, token, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        if self.local and not _is_local(request.headers.get("host", "")):
            refusal = _refuse("this server answers to its own machine alone", 403)
        elif self.token is not None and scope["path"] not in OPEN and not self._knows(request):
            refusal = _refuse("send the header Authorization: Bearer TOKEN", 401)
            refusal.headers["WWW-Authenticate"] = "Bearer"
        else:
            await self.app(scope, receive, send)
            return
        await refusal(scope, receive, send)

    def _knows(self, request: Request) -> bool:
        assert self.token is not None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.token.encode())
        return same and kind.lower() == "bearer"


def _is_local(host: str) -> bool:
    name, _, port = host.rpartition(":") if host[-1:] != "]" else (host, "", "")
    return (name if port.isdigit() else host) in LOCAL


def make_app(
    model: Model, worker: Worker, meters: Meters, token: str | None, local: bool
) -> ASGIApp:
    """The server as an ASGI application. local: it listens to this machine alone."""

    async def page(request: Request) -> Response:
        headers = {
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(PAGE.read_text(), media_type="text/html", headers=headers)

    async def health(request: Request) -> Response:
        if worker.failure is not None:
            return _unavailable(_json({"status": "failed"}, 503))
        return _json({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(meters.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(request: Request) -> Response:
        found = {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "loadstone",
            "max_model_len": model.max_len,
            "budgets": list(model.budgets),
            "chat": model.template is not None,
        }
        return _json({"object": "list", "data": [found]})

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/completions", Endpoint(model, worker, meters, False), methods=["POST"]),
        Route("/v1/chat/completions", Endpoint(model, worker, meters, True), methods=["POST"]),
    ]

    async def elsewhere(request: Request, error: Exception) -> Response:
        """Another path, or another method: clients read errors as JSON."""
        asked = f"{request.method} {request.url.path}"
        known = ", ".join(f"{_method(route)} {route.path}" for route in routes)
        status = getattr(error, "status_code", 404)
        refusal = _json(
            error_body(f"{asked} is not served; there is {known}", "invalid_request_error"), status
        )
        refusal.headers.update(getattr(error, "headers", None) or {})
        return refusal

    app = Starlette(routes=routes, exception_handlers={404: elsewhere, 405: elsewhere})
    return Guard(app, token, local and token is None)


def _method(route: Route) -> str:
    return "POST" if route.methods and "POST" in route.methods else "GET"


class Endpoint:
    """Completions or chats."""

    def __init__(self, model: Model, worker: Worker, meters: Meters, chat: bool):
        self.model, self.worker, self.meters, self.chat = model, worker, meters, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        given: list[EngineRequest] = []
        try:
            response = await self._response(request, name, given)
            await response(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            # Those that have ended are not known any more; the others have lost their client.
            self.worker.cancel([r.name for r in given])

    async def _response(self, request: Request, name: str, given: list[EngineRequest]) -> Response:
        """The answer, or the beginning of its stream. What the engine gets goes into `given`."""
        try:
            asked = read_asked(
                await _body(request),
                self.chat,
                self.model.sampling,
                self.model.name,
                self.model.max_active,
            )
            made = await asyncio.to_thread(self._requests, asked, name)
            events = self._submit(made)
            given += made
        except BadRequest as error:
            self.meters.refused.labels("invalid").inc()
            body = error_body(error.message, "invalid_request_error", error.param)
            return _json(body, error.status)
        except QueueFull as error:
            self.meters.refused.labels("queue_full").inc()
            self.meters.fallback.labels("queue_full").inc()
            full = _json(error_body(str(error), "rate_limit_error"), 429)
            full.headers["Retry-After"] = str(error.retry_after)
            return full
        except Ended:
            failed = self.worker.failure is not None
            return _unavailable(_refuse(FAILED if failed else "the server is ending", 503))

        answer = Answer(
            name,
            self.model.name,
            self.chat,
            [Choice(i) for i in range(len(made))],
            asked.alternatives,
            self.model.spelled,
            self.model.max_active,
        )
        if asked.stream:
            return StreamingResponse(
                _streamed(answer, events, asked.include_usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        return await _collected(answer, events, request)

    def _requests(self, asked: Asked, name: str) -> list[EngineRequest]:
        """What the engine is asked. In a thread, since long prompts take a while to encode."""
        from infer.request import Request as EngineRequest

        model, sampling = self.model, asked.sampling
        prompts = asked.prompts
        if asked.messages is not None:
            if model.template is None:
                raise BadRequest(model.chat_problem)
            try:
                prompts = (model.template.render(asked.messages, add_generation_prompt=True),)
            except ValueError as error:
                raise BadRequest(str(error), "messages") from None
            sampling = dataclasses.replace(sampling, stop_token_ids=model.chat_stop)
        found: list[EngineRequest] = []
        for prompt in prompts:
            ids = self._ids(prompt)
            for _ in range(asked.n):
                number = len(found)
                found.append(
                    EngineRequest(
                        f"{name}-{number}",
                        ids,
                        dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**63),
                        model.stream(ids),
                        asked.budget,
                        asked.alternatives or 0,
                        asked.routed_experts,
                    )
                )
        return found

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.model.encode(prompt)
            except ValueError as error:
                raise BadRequest(str(error), "prompt") from None
        if (largest := max(prompt)) >= self.model.vocab_size:
            size = self.model.vocab_size
            raise BadRequest(f"prompt has token {largest}; the model knows {size}", "prompt")
        return prompt

    def _submit(self, made: list[EngineRequest]) -> asyncio.Queue[tuple[int, Event | None]]:
        """Hand requests over; returns where the events of choice i come as (i, event)."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

        def deliver(number: int) -> Callable[[Event | None], None]:
            def put(event: Event | None) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(queue.put_nowait, (number, event))

            return put

        try:
            self.worker.submit((r, deliver(i)) for i, r in enumerate(made))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return queue


async def _collected(
    answer: Answer, events: asyncio.Queue[tuple[int, Event | None]], request: Request
) -> Response:
    """The whole answer. A client that leaves before it is there is noticed.

    Raises:
        ClientDisconnect: it has left.
    """
    gone = asyncio.create_task(_disconnected(request))
    left = len(answer.choices)
    try:
        while left:
            following = asyncio.create_task(events.get())
            await asyncio.wait((gone, following), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                raise ClientDisconnect
            number, event = following.result()
            if event is None:
                return _unavailable(_refuse(FAILED, 503))
            answer.add(number, event)
            if event.completion is not None:
                left -= 1
                if event.completion.finish_reason == "error":
                    return _refuse(NOT_FINITE, 500)
    finally:
        gone.cancel()
    return _json(answer.whole())


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(
    answer: Answer, events: asyncio.Queue[tuple[int, Event | None]], include_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    if answer.chat:
        for choice in answer.choices:
            yield _event(answer.header(choice.number))
    left = len(answer.choices)
    while left:
        try:
            number, event = await asyncio.wait_for(events.get(), ALIVE_SECONDS)
        except TimeoutError:
            yield ": alive\n\n"
            continue
        failed = None
        if event is None:
            failed = FAILED
        elif event.completion is not None and event.completion.finish_reason == "error":
            failed = NOT_FINITE
        if failed is not None or event is None:
            yield _event(error_body(str(failed), "server_error"))
            break
        answer.add(number, event)
        left -= event.completion is not None
        yield _event(answer.piece(number, event))
    if include_usage:
        yield _event(answer.last())
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {dumps(body)}\n\n"


async def _body(request: Request) -> Any:
    """The JSON of a body.

    Raises:
        BadRequest: it is none, or too long. ClientDisconnect.
    """
    # A web page cannot send this kind to another site without asking first, which is refused.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("send the header Content-Type: application/json", status=415)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BODY:
            raise BadRequest(f"the body has more than {MAX_BODY} bytes", status=413)
    try:
        return json.loads(data)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"the body is not JSON at {at}") from None
    except ValueError:
        raise BadRequest("the body is not JSON: it is not UTF-8") from None


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(dumps(body), status, media_type="application/json")


def _unavailable(response: Response) -> Response:
    """With the time after which a client may ask again."""
    response.headers["Retry-After"] = str(RESTART_SECONDS)
    return response


def _refuse(message: str, status: int) -> Response:
    kinds = {401: "authentication_error", 403: "permission_error"}
    return _json(error_body(message, kinds.get(status, "server_error")), status)
