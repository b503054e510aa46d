"""Serve on two ranks that share the experts. Rank 0 is asked over HTTP by this script, and prints
one JSON object of what it was answered.

python serving_worker.py whole|stream|idle: all ranks stay; or rank 1 is killed while two streams
run, or while nobody asks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
import test_serving as http

from launch.serving.ranks import EngineOverRanks, follow
from model.parallel.groups import destroy_parallel, initialize_parallel
from train.data.tokenizer import TextStream
from train.rank.channel import Channel, Watch

KEY = b"the key of this test"
STEPS_TO_LIVE = 12
SLOTS = 2
"""Of each rank."""


def bodies() -> list[dict]:
    """Of every kind that a server answers alike whatever runs beside it."""
    found = []
    for i in range(10):
        body = {"prompt": "hello there"[: 3 + i], "max_tokens": 4 + i, "ignore_eos": True}
        if budget := (None, 1.0, 3.0)[i % 3]:
            body["budget"] = budget
        if i % 2:
            body |= {"temperature": 0.9, "seed": i}
        found.append(body)
    found[4] |= {"logprobs": 2}
    found[5] |= {"return_routed_experts": True}
    found[7] |= {"n": 2}
    return found


def answered(served, body: dict) -> list[dict]:
    """The choices, without what hangs on rounding."""
    choices = http.complete(served, **body)["choices"]
    for choice in choices:
        told = choice.pop("logprobs", None)
        choice["tokens"] = told and told["tokens"]
    return choices


def ask_all(served) -> list[list[dict]]:
    """All bodies at once."""
    found: list = [None] * len(bodies())

    def ask(i: int, body: dict) -> None:
        found[i] = answered(served, body)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(bodies())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def whole(served, over: EngineOverRanks) -> dict:
    """Answers, clients that leave, a full queue, and the metrics of all ranks."""
    dealt: list[int] = []
    rank_of = over._rank_of

    class Noted(dict):
        def __setitem__(self, name, rank):
            dealt.append(rank)
            super().__setitem__(name, rank)

    over._rank_of = Noted(rank_of)
    answers = ask_all(served)

    # A client that leaves frees the pages of the rank that has its request.
    gone = [
        http.begun(served, prompt="hello", max_tokens=240, stream=True, ignore_eos=True)
        for _ in range(2 * SLOTS)
    ]
    http.until(lambda: over.num_running == 2 * SLOTS)
    busy = [standing.running for standing in over.standings]
    for connection in gone:
        connection.close()
    http.until(lambda: over.num_running == 0 and not over.has_work)
    free, pages = over.num_pages

    # The queue is full when the slots of all ranks are taken, and what may wait does.
    served.worker.max_waiting = 1
    gate = http.Gate(over)
    gate.open.clear()
    held = [http.begun(served, prompt="ab", max_tokens=2) for _ in range(2 * SLOTS + 1)]
    http.until(lambda: served.worker.num_waiting == 2 * SLOTS + 1)
    status, headers, _ = http.send(served, "POST", "/v1/completions", {"prompt": "a"})
    gate.open.set()
    after = [connection.getresponse().status for connection in held]
    return {
        "answers": answers,
        "dealt": dealt[: len(answers) + 1],
        "busy": busy,
        "pages": [free, pages],
        "full": [status, int(headers["Retry-After"])],
        "after": after,
        "health": http.send(served, "GET", "/health")[0],
        "metrics": http.send(served, "GET", "/metrics")[2],
    }


def lost(served, scene: str) -> dict:
    """What clients are told when rank 1 is killed."""
    began = time.monotonic()
    texts = []
    if scene == "stream":
        body = {"prompt": "hello", "max_tokens": 240, "stream": True, "ignore_eos": True}
        streams = [http.begun(served, **body) for _ in range(2)]
        texts = [stream.getresponse().read().decode() for stream in streams]
    assert served.ended.wait(60)
    asked = http.send(served, "POST", "/v1/completions", {"prompt": "a"})
    health = http.send(served, "GET", "/health")
    return {
        "streams": texts,
        "asked": [asked[0], asked[1]["Retry-After"]],
        "health": [health[0], health[1]["Retry-After"]],
        "failure": [type(served.worker.failure).__name__, str(served.worker.failure)],
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    (scene,) = sys.argv[1:]
    dist.init_process_group("gloo")
    engine = http.make_engine(initialize_parallel(2), max_slots=SLOTS)
    channel, watch = Channel(KEY), Watch()
    if dist.get_rank():
        step, steps = engine.step, []

        def mortal():
            steps.append(1)
            if scene == "stream" and len(steps) == STEPS_TO_LIVE:
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        engine.step = mortal
        if scene == "idle":
            channel.receive(0)
            os.kill(os.getpid(), signal.SIGKILL)
        tokenizer = http.make_tokenizer()
        follow(engine, channel, lambda ids: TextStream(tokenizer, ids))
    else:
        over = EngineOverRanks(engine, channel, watch)
        # nothing but the watch sees the end of a rank while nobody asks
        pause = 300.0 if scene == "idle" else 0.2
        if scene == "idle":
            channel.send(1, {})
        # every request that waits has a place but one
        with http.serving(over, 16, pause=pause) as served:
            watch.tell(served.worker.fail)
            found = whole(served, over) if scene == "whole" else lost(served, scene)
        print(json.dumps(found), flush=True)
        if scene != "whole":
            return
        over.close()
    watch.leave()
    destroy_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
