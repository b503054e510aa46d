"""The server in this process, spoken to over a socket: what is answered is what the engine alone
generates, and whatever a client does costs that client.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import infer.engine as engines
import launch.serve
from infer.budget import capture
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from launch.serving.asked import BadRequest, read_asked
from launch.serving.worker import QueueFull, Worker
from launch.steering.budgets import LatencyTable, LoadController, Point
from launch.steering.drift import Drift
from model.config import BalanceConfig
from model.routers.config import ThresholdConfig
from train.config.commands.pilot import CanaryConfig
from train.config.commands.serve import EndpointConfig
from train.data.chat.template import ChatTemplate
from train.data.tokenizer import TextInside, TextStream

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import build, tiny_config

TOKEN = "a-token-of-some-length"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LETTERS = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c.isascii()]
VOCAB_SIZE, END, END_OF_TURN, UNUSED = 100, len(LETTERS), len(LETTERS) + 1, 99


def make_tokenizer() -> Tokenizer:
    """A token for each printable character of ASCII, and two special ones."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|end|>"])
    return tokenizer


def make_engine(groups=None, **settings) -> Engine:
    """groups: of ranks that share the experts; None: one process."""
    config = tiny_config(vocab_size=VOCAB_SIZE, max_seq_len=256, num_layers=2)
    model = build(config, BalanceConfig(), groups, router=ThresholdConfig, budget=2.0).eval()
    budgets = {}
    with torch.no_grad():
        model.head.weight *= 10
        model.head.weight[END_OF_TURN + 1 :] = 0  # never the most likely
        for router in model.routers():
            router.balance_bias.fill_(-0.5)
        for budget, cut in ((1.0, 0.6), (3.0, 0.4)):
            budgets[budget] = capture(model.routers())
            for state in budgets[budget]:
                state.balance_bias.fill_(-cut)
    return Engine(model, EngineConfig(**settings), end_token=END, budgets=budgets)


class Gate:
    """Holds an engine before its next step."""

    def __init__(self, engine: Engine):
        self.open = threading.Event()
        self.open.set()
        step = engine.step

        def gated():
            self.open.wait(300)
            return step()

        engine.step = gated


@contextlib.contextmanager
def serving(
    engine: Engine,
    max_waiting: int = 8,
    token: str | None = None,
    template: str | None = TEMPLATE,
    pause: float | None = None,
    **decided,
) -> Iterator[SimpleNamespace]:
    """A server on a free port, in a thread. engine: or one over ranks, with a pause. decided: what
    its policy has beside engine and meters.
    """
    from launch.serving.app import Model, make_app
    from launch.serving.meters import Meters
    from launch.serving.policy import Policy
    from launch.serving.server import listen

    tokenizer = make_tokenizer()
    model = Model(
        name="tiny",
        created=1,
        vocab_size=VOCAB_SIZE,
        max_len=256,
        budgets=(1.0, 3.0),
        sampling=SamplingConfig(max_new_tokens=16, temperature=0.0),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        stream=lambda ids: TextStream(tokenizer, ids),
        spelled=lambda token: TextInside(tokenizer).decode([token]),
        template=template and ChatTemplate(template, {}, "the test"),
        chat_problem="no template here",
        chat_stop=(END_OF_TURN,),
    )
    meters, running = Meters(), SimpleNamespace(ended=threading.Event())
    policy = running.policy = Policy(engine, meters, **decided)

    def told(request, done):
        policy.ended(request, done)
        meters.ended(request, done)

    ended = running.ended.set
    worker = Worker(engine, max_waiting, told, ended, policy.take, policy.stepped, pause)
    meters.watch(worker)
    started = threading.Event()

    def ready(server, port):
        worker.start()
        running.server, running.port = server, port
        started.set()

    app = make_app(model, worker, meters, token, True)
    thread = threading.Thread(target=listen, args=(app, "127.0.0.1", 0, 20, ready), daemon=True)
    thread.start()
    assert started.wait(20)
    running.worker, running.engine, running.tokenizer = worker, engine, tokenizer
    try:
        yield running
    finally:
        running.server.should_exit = True
        thread.join(30)
        worker.close(30)
        assert not thread.is_alive() and not worker._thread.is_alive()


@pytest.fixture(scope="module")
def served():
    with serving(make_engine(max_slots=4)) as running:
        yield running


def send(served, method: str, path: str, body=None, headers=None):
    """(status, headers, body) of a request; the body of JSON parsed."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method, path, data, {**kind, **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, response.headers, json.loads(text) if is_json else text


def complete(served, chat: bool = False, **body):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, _, found = send(served, "POST", path, body)
    assert status == 200, found
    return found


def pieces_of(text: str) -> list[dict]:
    events = [e.removeprefix("data: ") for e in text.split("\n\n") if e.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def begun(served, **body) -> http.client.HTTPConnection:
    """A request on its way, whose answer nobody has read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alone(served, prompt: list[int], **settings) -> tuple[str, list[int]]:
    """What an engine of its own generates."""
    sampling = SamplingConfig(**{"max_new_tokens": 16, "temperature": 0.0, **settings})
    engine = Engine(served.engine.model, EngineConfig(), end_token=END)
    stream = TextStream(served.tokenizer, prompt)
    (found,) = engine.run([Request("a", prompt, sampling, stream)])
    return found.text, found.tokens


def test_a_completion_is_what_the_engine_generates(served):
    ids = served.tokenizer.encode("hello").ids
    text, tokens = alone(served, ids)
    found = complete(served, model="tiny", prompt="hello")
    assert found["object"] == "text_completion" and found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["text"] == text and choice["finish_reason"] in ("length", "stop")
    usage = found["usage"]
    assert usage["prompt_tokens"] == 5 and usage["completion_tokens"] == len(tokens)
    assert usage["experts_per_token"] > 1
    assert complete(served, prompt=ids)["choices"][0]["text"] == text


def test_a_stream_is_the_same_in_pieces(served):
    settings = dict(prompt="hello", max_tokens=24, temperature=0.9, seed=5)
    whole = complete(served, **settings)
    options = {"include_usage": True}
    body = {**settings, "stream": True, "stream_options": options}
    status, headers, text = send(served, "POST", "/v1/completions", body)
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    *pieces, last = pieces_of(text)
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    reasons = [p["choices"][0]["finish_reason"] for p in pieces]
    assert reasons[-1] == whole["choices"][0]["finish_reason"] and not any(reasons[:-1])
    assert len(pieces) > 3 and last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_chat_is_rendered_by_the_template_and_ends_with_its_token(served):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ids = served.tokenizer.encode("<user>hi<|end|><assistant>").ids
    text, tokens = alone(served, ids)
    found = complete(served, chat=True, messages=messages)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert found["usage"]["prompt_tokens"] == len(ids)

    # The template's own token ends an answer: made likely, it does.
    head = served.engine.model.head.weight.data
    kept = head[END_OF_TURN].clone()
    head[END_OF_TURN] = head[tokens[4]] * 1.5
    try:
        (choice,) = complete(served, chat=True, messages=messages)["choices"]
    finally:
        head[END_OF_TURN] = kept
    assert choice["finish_reason"] == "stop"
    assert text.startswith(choice["message"]["content"]) and choice["message"]["content"] != text

    body = {"messages": messages, "stream": True}
    _, _, stream = send(served, "POST", "/v1/chat/completions", body)
    first, *pieces = pieces_of(stream)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == text


def test_a_seed_repeats_and_answers_to_one_prompt_differ(served):
    settings = dict(prompt=["one", "two"], n=2, temperature=1.2, seed=3)
    first, again = complete(served, **settings), complete(served, **settings)
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in again["choices"]] and len(set(texts)) == 4
    assert [c["index"] for c in first["choices"]] == [0, 1, 2, 3]
    texts = {complete(served, prompt="x", temperature=1.2)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1, "without a seed each request draws anew"


def test_a_stop_string_cuts_the_text(served):
    text, _ = alone(served, served.tokenizer.encode("hello").ids)
    stop = text[3:5]
    (choice,) = complete(served, prompt="hello", stop=stop)["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_log_probabilities_are_the_models_in_both_forms(served):
    found = complete(served, prompt="hello", logprobs=2)["choices"][0]["logprobs"]
    ids = served.tokenizer.encode("hello").ids
    _, tokens = alone(served, ids)
    with torch.no_grad():
        logits = served.engine.model.logits(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    own = expected.gather(1, torch.tensor(tokens)[:, None]).flatten().tolist()
    assert found["token_logprobs"] == pytest.approx(own, abs=1e-4)
    assert [len(top) for top in found["top_logprobs"]] == [2] * 16
    texts = [TextInside(served.tokenizer).decode([t]) for t in tokens]
    assert found["tokens"] == texts
    assert found["text_offset"] == [len("".join(texts[:i])) for i in range(16)]
    assert complete(served, prompt="hello")["choices"][0]["logprobs"] is None

    messages = [{"role": "user", "content": "hi"}]
    settings = dict(messages=messages, logprobs=True, top_logprobs=3)
    whole = complete(served, chat=True, **settings)["choices"][0]["logprobs"]["content"]
    assert all(
        e["top_logprobs"][0]["logprob"] == pytest.approx(e["logprob"], abs=1e-4) for e in whole
    )
    body = {**settings, "stream": True}
    _, _, stream = send(served, "POST", "/v1/chat/completions", body)
    parts = [p["choices"][0].get("logprobs") for p in pieces_of(stream)]
    assert [e["logprob"] for p in parts if p for e in p["content"]] == pytest.approx(
        [e["logprob"] for e in whole], abs=1e-4
    )


def test_routed_experts_are_told_for_every_token_that_was_read(served):
    found = complete(served, prompt="hello", return_routed_experts=True)
    told = found["choices"][0]["routed_experts"]
    ids = np.frombuffer(base64.b64decode(told["data"]), "<i2").reshape(told["shape"])
    layers = len(served.engine.model.routers())
    assert told["dtype"] == "int16" and ids.shape[:2] == (5 + 15, layers)
    spent = (ids >= 0).sum(-1).mean()
    assert spent == pytest.approx(found["usage"]["experts_per_token"], rel=1e-6)


def test_a_budget_of_the_table_is_used_and_another_refused(served):
    spent = [
        complete(served, prompt="hello there", budget=b)["usage"]["experts_per_token"]
        for b in (1, None, 3.0)
    ]
    assert spent[0] < spent[1] < spent[2]
    status, _, found = send(served, "POST", "/v1/completions", {"prompt": "a", "budget": 2})
    assert status == 400 and "; choose one of 1, 3" in found["error"]["message"]
    _, _, found = send(served, "GET", "/v1/models")
    assert found["data"][0]["id"] == "tiny" and found["data"][0]["budgets"] == [1.0, 3.0]


def test_a_canary_has_the_budget_it_tries_and_is_counted_apart():
    decided = {"canary": CanaryConfig(1.0, 0.5), "drift": Drift([[1.0] * 8] * 2, 100, 0.5)}
    with serving(make_engine(max_slots=4), **decided, sample_one_in=1) as running:
        found = [complete(running, prompt="hello there") for _ in range(12)]
        fixed = complete(running, prompt="hello there", budget=3.0)
        arms = running.policy.summary()["arms"]
        metrics = send(running, "GET", "/metrics")[2]
    spent = [answer["usage"]["experts_per_token"] for answer in found]
    # two budgets, two texts; the client's own is in no arm
    assert len({round(number, 6) for number in spent}) == 2
    assert arms["control"]["requests"] + arms["canary"]["requests"] == 12
    assert arms["canary"]["experts_per_token"] == pytest.approx(min(spent))
    assert arms["control"]["experts_per_token"] == pytest.approx(max(spent))
    assert fixed["usage"]["experts_per_token"] not in spent
    assert 'arm_generation_tokens_total{arm="canary"}' in metrics
    # routing is looked at, and nobody is told who has not asked
    assert running.policy.drift.windows >= 1 and "loadstone_routing_drift" in metrics
    assert not any("routed_experts" in answer["choices"][0] for answer in found)


def test_a_latency_is_held_by_a_saved_budget():
    """What steps take is what the table says times the machine's mood, so the limit is set by what
    is seen: with one that nothing can hold, the least budget is given; with one that all hold, the
    largest.
    """
    table = LatencyTable([Point(b, r, 32, b) for b in (1.0, 3.0) for r in (1, 4)])
    for limit, budget in ((1e-3, 1.0), (1e6, 3.0)):
        controller = LoadController(table, limit)
        with serving(make_engine(max_slots=4), controller=controller) as running:
            for _ in range(5):
                complete(running, prompt="hello there", ignore_eos=True)
            assert controller.budget == budget
            given = complete(running, prompt="hello there", max_tokens=8)
            alike = complete(running, prompt="hello there", max_tokens=8, budget=budget)
            assert given["choices"][0]["text"] == alike["choices"][0]["text"]


def test_metrics_count_what_was_served(served):
    from prometheus_client.parser import text_string_to_metric_families

    def look() -> dict[str, float]:
        _, headers, text = send(served, "GET", "/metrics")
        assert headers.get_content_type() == "text/plain"
        samples = (s for f in text_string_to_metric_families(text) for s in f.samples)
        return {"|".join((s.name, *s.labels.values())): s.value for s in samples}

    before = look()
    complete(served, prompt="hello", max_tokens=7)
    send(served, "POST", "/v1/completions", {"prompt": 5})
    after = look()
    more = {name: after[name] - before.get(name, 0.0) for name in after}
    assert more["loadstone_prompt_tokens_total"] == 5
    assert more["loadstone_generation_tokens_total"] == 7
    assert more["loadstone_request_success_total|length"] == 1
    assert more["loadstone_request_refused_total|invalid"] == 1
    assert more["loadstone_time_to_first_token_seconds_count"] == 1
    assert more["loadstone_inter_token_latency_seconds_count"] == 6
    assert after["loadstone_num_requests_running"] == after["loadstone_kv_cache_usage_perc"] == 0


# --- who is let in, and what is refused -----------------------------------------------------------


def test_a_token_opens_all_but_the_page_and_health():
    with serving(make_engine(), token=TOKEN) as served:
        body = {"prompt": "a", "max_tokens": 1}
        for given in (None, "wrong", TOKEN[:-1], TOKEN + "x", "é"):
            headers = {} if given is None else {"Authorization": f"Bearer {given}"}
            headers = {k: v.encode() for k, v in headers.items()}
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models")):
                status, told, found = send(
                    served, method, path, body if method == "POST" else None, headers
                )
                assert status == 401 and told["WWW-Authenticate"] == "Bearer"
                assert TOKEN not in json.dumps(found)
            assert send(served, "GET", "/metrics", headers=headers)[0] == 401
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert send(served, "POST", "/v1/completions", body, good)[0] == 200
        assert send(served, "POST", "/v1/completions", body, {"Authorization": TOKEN})[0] == 401
        assert send(served, "GET", "/health")[0] == 200
        assert "<textarea" in send(served, "GET", "/")[2]


def test_what_is_not_installed_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(launch.serve, "NEEDED", ("json", "no_such_library"))
    with pytest.raises(ValueError, match=r"^serving needs no_such_library: pip install -r req"):
        launch.serve._require_libraries()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.evil.org")),
    ],
)
def test_who_can_reach_an_address(host, is_local):
    assert EndpointConfig(host=host).is_local == is_local


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_a_web_page_of_somebody_cannot_reach_it(served, headers, status):
    """Neither under a name of its own, nor with a kind of body that browsers send unasked."""
    found = send(served, "POST", "/v1/completions", '{"prompt": "a", "max_tokens": 1}', headers)
    assert found[0] == status


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("{", 400, "the body is not JSON at line 1, column 2"),
        ("[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
        ("[]", 400, "the body is list; send a JSON object"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": [300]}, 400, "prompt has token 300; the model knows 100"),
        ({"prompt": [1] * 256}, 400, "the prompt has 256 tokens; model.max_seq_len is 256"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "the model 'gpt-4' is not served; it is 'tiny'"),
        ("x" * (16 * 2**20 + 1), 413, "more than 16777216 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_body_that_cannot_be_answered_is_told_why(served, body, status, says):
    found = send(served, "POST", "/v1/completions", body)
    assert found[0] == status and says in found[2]["error"]["message"], found[2]


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/v1/completions", 405, None),
        ("POST", "/v1/models", 405, {}),
        ("POST", "/v1/completion", 404, {"prompt": "a"}),
        ("GET", "/favicon.ico", 404, None),
    ],
)
def test_another_path_or_method_is_told_what_there_is(served, method, path, status, body):
    code, _, found = send(served, method, path, body)
    told = found["error"]["message"]
    assert code == status and told.startswith(f"{method} {path} is not served; there is GET /, ")
    assert "GET /v1/models, POST /v1/completions, POST /v1/chat/completions" in told


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt must be text"),
        ({"prompt": [True]}, "prompt must be text"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; it must be a whole number from 1"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is true"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan; it must be a number"),
        ({"prompt": "a", "top_p": 0}, "top_p is 0"),
        ({"prompt": "a", "stop": [""]}, "stop must be text, or a list of up to 16"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop must be text, or a list of up to 16"),
        ({"prompt": "a", "n": 17}, "n is 17; it must be a whole number from 1 to 16"),
        ({"prompt": ["a"] * 9, "n": 2}, "n times the prompts is more than 16"),
        ({"prompt": "a", "logprobs": True}, "logprobs is true"),
        ({"prompt": "a", "stream": "yes"}, "stream is 'yes'; it must be true or false"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options knows include_usage alone"),
        ({"prompt": "a", "echo": True}, "echo is true, which is not done here; leave it out"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty is 0.5, which is not done"),
        (
            {"prompt": "a", "max_tokns": 5},
            "'max_tokns' is not known here; did you mean max_tokens?",
        ),
        ({"prompt": "a", "messages": []}, "is not known here; /v1/chat/completions takes it"),
        ({"prompt": "a", "tops": 5}, "the field 'tops' is not known here; did you mean"),
        ({"prompt": "a", "colour": 5}, "the field 'colour' is not known here; leave it out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_no_field_is_silently_ignored(body, says):
    with pytest.raises(BadRequest) as found:
        read_asked(body, False, SamplingConfig(), "tiny")
    assert says in found.value.message


def test_fields_that_ask_for_nothing_are_taken():
    body = {"prompt": "a", "user": "u", "presence_penalty": 0.0, "best_of": 1, "top_k": -1}
    asked = read_asked(body, False, SamplingConfig(), "tiny")
    assert asked.sampling.top_k is None and asked.prompts == ("a",)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "messages must be a list"),
        ([], "messages must be a list"),
        (["hi"], "messages[0] must be an object with a role"),
        ([{"role": "user"}], "messages[0].content must be text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "messages[0].content has a part that is not text",
        ),
    ],
)
def test_messages_are_text(messages, says):
    with pytest.raises(BadRequest) as found:
        read_asked({"messages": messages}, True, SamplingConfig(), "tiny")
    assert says in found.value.message


def test_a_model_without_a_template_does_not_chat():
    with serving(make_engine(), template=None) as served:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        status, _, found = send(served, "POST", "/v1/chat/completions", body)
        assert status == 400 and found["error"]["message"] == "no template here"


def test_what_a_template_refuses_is_the_clients_to_mend():
    template = "{{ raise_exception('only users speak') }}"
    with serving(make_engine(), template=template) as served:
        body = {"messages": [{"role": "system", "content": "hi"}]}
        status, _, found = send(served, "POST", "/v1/chat/completions", body)
        assert status == 400 and "only users speak" in found["error"]["message"]


# --- faults ---------------------------------------------------------------------------------------


def test_full_queue_says_429():
    engine = make_engine(max_slots=1)
    gate = Gate(engine)
    with serving(engine, max_waiting=1) as served:
        gate.open.clear()
        held = [begun(served, prompt="ab", max_tokens=2)]
        until(lambda: served.worker.num_waiting == 1)
        held.append(begun(served, prompt="cd", max_tokens=2))
        until(lambda: served.worker.num_waiting == 2)
        status, headers, found = send(served, "POST", "/v1/completions", {"prompt": "ef"})
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 120
        metrics = send(served, "GET", "/metrics")[2]
        assert 'loadstone_fallback_total{reason="queue_full"} 1.0' in metrics
        assert "the queue is full" in found["error"]["message"]
        # neither is a part taken of what does not fit as a whole
        assert send(served, "POST", "/v1/completions", {"prompt": "ef", "n": 3})[0] == 429
        gate.open.set()
        for connection in held:
            assert connection.getresponse().status == 200
        assert send(served, "POST", "/v1/completions", {"prompt": "ef"})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_gone_frees_pages(stream):
    engine = make_engine(max_slots=2)
    gate = Gate(engine)
    with serving(engine) as served:
        connection = begun(served, prompt="hello", max_tokens=200, stream=stream, ignore_eos=True)
        until(lambda: engine.running)
        if stream:
            response = connection.getresponse()
            assert response.read(6) == b"data: "
            response.close()
        connection.close()
        until(lambda: not engine.running and engine.pool.available == engine.pool.num_pages - 1)
        ended = send(served, "GET", "/metrics")[2]
        assert 'loadstone_request_success_total{finished_reason="cancelled"} 1.0' in ended
        # A client that leaves before its request has a slot leaves the queue.
        gate.open.clear()
        held = [begun(served, prompt="a", max_tokens=2) for _ in range(3)]
        until(lambda: served.worker.num_waiting == 3)
        for connection in held:
            connection.close()
        until(lambda: len(served.worker._cancelled) == 3)
        gate.open.set()
        until(lambda: served.worker.num_waiting == 0 and not engine.has_work)
        assert complete(served, prompt="a", max_tokens=2)


def test_one_request_of_nan_ends_alone():
    engine = make_engine(max_slots=4)
    gate = Gate(engine)
    with serving(engine) as served:
        expected = complete(served, prompt="hello")["choices"][0]["text"]
        weight = engine.model.embedding.weight.data
        weight[UNUSED] = float("nan")
        gate.open.clear()
        beside = begun(served, prompt="hello")
        spoilt = begun(served, prompt=[5, UNUSED])
        until(lambda: served.worker.num_waiting == 2)
        gate.open.set()
        response = spoilt.getresponse()
        assert response.status == 500 and b"logits are not finite" in response.read()
        found = json.loads(beside.getresponse().read())
        assert found["choices"][0]["text"] == expected
        _, _, text = send(served, "POST", "/v1/completions", {"prompt": [UNUSED], "stream": True})
        (error,) = pieces_of(text)
        assert "logits are not finite" in error["error"]["message"]
        assert complete(served, prompt="hello")["choices"][0]["text"] == expected
        assert send(served, "GET", "/health")[0] == 200


def test_an_engine_that_fails_tells_every_client_and_health(monkeypatch):
    engine = make_engine(max_slots=1)
    gate = Gate(engine)
    with serving(engine) as served:
        gate.open.clear()
        held = [begun(served, prompt="a"), begun(served, prompt="b", stream=True)]
        until(lambda: served.worker.num_waiting == 2)

        def broken(*given):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engines, "prefill_pages", broken)
        gate.open.set()
        assert held[0].getresponse().status == 503
        assert b"the engine has failed" in held[1].getresponse().read()
        assert served.ended.wait(10) and "out of memory" in str(served.worker.failure)
        for asked in (("GET", "/health"), ("POST", "/v1/completions", {"prompt": "a"})):
            status, headers, _ = send(served, *asked)
            assert status == 503 and int(headers["Retry-After"]) > 0


def test_requests_on_their_way_end_before_the_server_does():
    engine = make_engine(max_slots=2)
    gate = Gate(engine)
    with serving(engine) as served:
        gate.open.clear()
        connection = begun(served, prompt="hello", max_tokens=30, ignore_eos=True)
        until(lambda: served.worker.num_waiting == 1)
        served.server.should_exit = True
        until(lambda: not served.server.servers[0].is_serving())
        with pytest.raises(OSError):
            send(served, "GET", "/health")
        gate.open.set()
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["usage"]["completion_tokens"] == 30


def test_a_worker_that_closes_ends_what_it_has_and_takes_no_more():
    engine, told = make_engine(max_slots=1), []
    worker = Worker(engine, 1, lambda request, completion: told.append(completion))
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.0)
    worker.submit([(Request(n, [1, 2], sampling), lambda event: None) for n in "ab"])
    with pytest.raises(QueueFull):
        worker.submit([(Request("c", [1], sampling), lambda event: None)])
    worker.start()
    worker.close(30)
    assert [(c.name, c.finish_reason) for c in told] == [("a", "length"), ("b", "length")]
