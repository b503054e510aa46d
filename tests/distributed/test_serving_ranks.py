"""A server over ranks that share experts: what it answers is what one process answers, and the end
of a rank is told to every client.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import serving_worker
from prometheus_client.parser import text_string_to_metric_families
from serving_worker import http

from infer.config import EngineConfig, SamplingConfig
from infer.request import Completion, Drawn, Event, Request
from launch.serving.ranks import read_event, read_request, told_event, told_request
from tests import forked
from train.config.commands.devices import DevicesConfig
from train.config.commands.serve import EndpointConfig, ServeConfig
from train.config.commands.source import InferenceRouterConfig
from train.data.tokenizer import TextStream
from train.files.strict_json import dumps
from train.rank.channel import Channel, Unsealed


@pytest.fixture(scope="module")
def found(run_ranks) -> dict:
    """What two ranks answered."""
    (line,) = run_ranks("distributed/serving_worker.py", 2, "whole")
    return line


@pytest.mark.slow
def test_two_ranks_serve_the_texts_of_one_process(found):
    """Requests of several budgets, greedy and drawn, together; each alone in one process."""
    with http.serving(http.make_engine(max_slots=2)) as served:
        expected = [serving_worker.answered(served, body) for body in serving_worker.bodies()]
    assert found["answers"] == expected
    assert {0, 1} == set(found["dealt"]), "a rank has computed nothing"


@pytest.mark.slow
def test_clients_that_leave_free_the_pages_of_every_rank(found):
    assert found["busy"] == [serving_worker.SLOTS] * 2
    free, pages = found["pages"]
    assert free == pages > 0


@pytest.mark.slow
def test_a_queue_of_several_ranks_is_full_when_all_their_slots_are(found):
    assert found["full"][0] == 429 and found["full"][1] >= 1
    assert found["after"] == [200] * (2 * serving_worker.SLOTS + 1)


@pytest.mark.slow
def test_metrics_and_health_are_of_all_ranks(found):
    samples = {
        "|".join((s.name, *s.labels.values())): s.value
        for family in text_string_to_metric_families(found["metrics"])
        for s in family.samples
    }
    served = sum(len(choices) for choices in found["answers"])
    assert samples["loadstone_request_success_total|length"] == served + len(found["after"])
    assert samples["loadstone_request_success_total|cancelled"] == 2 * serving_worker.SLOTS
    assert samples["loadstone_request_refused_total|queue_full"] == 1
    assert samples["loadstone_num_requests_running"] == 0
    assert samples["loadstone_kv_cache_usage_perc"] == 0
    # times of both ranks are of one clock
    assert samples["loadstone_request_queue_time_seconds_sum"] >= 0
    assert found["health"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["stream", pytest.param("idle", marks=pytest.mark.nightly)])
def test_lost_rank_fails_requests(scene):
    """Rank 1 is killed: open streams end with an error, who asks then gets 503 with Retry-After,
    and nobody waits for a timeout.
    """
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    script = root / "tests/distributed/serving_worker.py"
    first, second = forked.run_ranks(script, 2, [scene], environment, 300)
    assert first.returncode == 0 and second.returncode == -9, first.stderr[-3000:]
    told = json.loads(first.stdout.splitlines()[-1])
    for text in told["streams"]:
        *pieces, error = http.pieces_of(text)
        assert pieces and "the engine has failed" in error["error"]["message"]
    assert len(told["streams"]) == (2 if scene == "stream" else 0)
    assert told["asked"][0] == told["health"][0] == 503
    assert int(told["asked"][1]) > 0 and int(told["health"][1]) > 0
    assert told["failure"][0] == "LostRank" and "rank 1 is gone" in told["failure"][1]
    assert told["seconds"] < 120, "the process group's timeout is 30 minutes"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": "DIR"}, "path=DIR is read in one process"),
        ({"weights": "int8"}, "weights=int8 is for one process"),
        ({"router": InferenceRouterConfig(budget=2.0)}, "router.budget is calibrated in one"),
        (
            {"engine": EngineConfig(draft_budget=1.0)},
            "engine.draft_budget with launch.num_devices=2: drafting is of one process",
        ),
        (
            {"serve": EndpointConfig(budget="auto", latency="x")},
            "serve.budget=auto with launch.num_devices=2: latencies are measured of one process",
        ),
    ],
)
def test_what_ranks_do_not_serve_is_refused_before_anything_is_read(settings, says):
    given = {"run": None if "path" in settings else "RUN", **settings}
    found = ServeConfig(launch=DevicesConfig(num_devices=2), **given).problems()
    assert any(says in problem for problem in found), found


def test_a_request_and_its_end_are_the_same_on_the_other_side():
    """In JSON, with what is not finite, text that is half a character, and no text at all."""
    sampling = SamplingConfig(7, 0.3, 0.9, 5, 2**63 - 1, ("a", "\ud83d"), (3, 4), True)
    request = Request("a", [1, 2], sampling, None, 1.5, 3, True)
    again, arrived = read_request(json.loads(dumps(told_request(request, 0.1))), TextStream)
    assert vars(again) == vars(request) and arrived == 0.1
    done = Completion("a", [1], "b", "stop", [-0.1], 2, 1, 3, 1.7, arrived=1.1, token_times=[2.2])
    done.routed_experts = torch.tensor([[[1, -1]], [[300, 2]]], dtype=torch.int16)
    drawn = (Drawn(1, -0.1), Drawn(2, float("-inf"), ((2, float("nan")),)))
    event = read_event(json.loads(dumps(told_event(Event("a", "\ud83d", drawn, done)))))
    ids = event.completion.routed_experts
    assert ids.dtype == torch.int16 and torch.equal(ids, done.routed_experts)
    event.completion.routed_experts = done.routed_experts = None
    assert event.completion == done and (event.name, event.piece) == ("a", "\ud83d")
    assert event.drawn[0] == drawn[0] and math.isnan(event.drawn[1].log_probability)
    assert read_event(told_event(Event("a", "b"))) == Event("a", "b")
    empty = Completion("a", routed_experts=torch.zeros((0, 2, 3), dtype=torch.int16))
    told = json.loads(dumps(told_event(Event("a", "", (), empty))))
    assert read_event(told).completion.routed_experts.shape == (0, 2, 3)


def test_a_record_of_somebody_else_is_not_taken(monkeypatch):
    """Changed, made with another key, sent twice, or moved to another rank."""
    wire: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "send", lambda tensor, to, tag: wire.append(tensor))
    monkeypatch.setattr(dist, "recv", lambda tensor, of, tag: tensor.copy_(wire.pop(0)))

    def end(rank: int, key: bytes = b"key") -> Channel:
        channel = Channel(key)
        channel.rank = rank
        return channel

    def sent(*records: dict) -> list[torch.Tensor]:
        sender = end(0)
        for record in records:
            sender.send(1, record)
        found, wire[:] = list(wire), []
        return found

    def taken(parts: list[torch.Tensor], rank: int = 1, key: bytes = b"key") -> list[dict]:
        wire[:] = [part.clone() for part in parts]
        receiver, found = end(rank, key), []
        while wire:
            found.append(receiver.receive(0))
        return found

    first, second = {"a": 1}, {"b": [1.5, None]}
    good = sent(first, second)
    assert taken(good) == [first, second]
    changed = [part.clone() for part in good]
    changed[1][-2] ^= 1
    shorter = [good[0] - 1, good[1][:-1]]
    for wrong in (changed, shorter, good[:2] * 2, good[2:], [torch.tensor([5]), good[1]]):
        with pytest.raises(Unsealed):
            taken(wrong)
    with pytest.raises(Unsealed):
        taken(good, rank=2)
    with pytest.raises(Unsealed):
        taken(good, key=b"another")
