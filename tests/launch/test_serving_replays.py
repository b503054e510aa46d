"""What a server looks at again when nobody asks for anything: the audit of its attention, what the
full budget would have said, and the record that a request is generated again from.
"""

from __future__ import annotations

import stat
import sys
import threading
from pathlib import Path

import pytest
import torch

import launch.serve
from infer.budget import capture
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.replay import top_k_of
from infer.request import Request
from launch.prompts.lines import read_prompts
from launch.serving.meters import Meters
from launch.serving.replays import (
    KEPT,
    LONGEST,
    WINDOW,
    AttentionAudit,
    Recorder,
    Replays,
    Shadow,
    audit_of,
)
from launch.serving.worker import Worker
from model.config import BalanceConfig
from train.config.commands.pilot import AttentionAuditConfig, ShadowConfig
from train.config.commands.serve import EndpointConfig, ServeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import VOCAB_SIZE, build, tiny_config

SPARSE = {"block_size": 4, "coarse_block_size": 2, "top_k": 1, "window_size": 4}


def engine_of(attention=SPARSE) -> Engine:
    model = build(tiny_config(), BalanceConfig(), attention=attention).eval()
    with torch.no_grad():
        model.head.weight *= 10
        for block in model.blocks:
            block.attention.q_proj.weight *= 8
    return Engine(model, EngineConfig(max_slots=4))


def prompt(i: int = 0, length: int = 30) -> list[int]:
    g = torch.Generator().manual_seed(i)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=g).tolist()


def ask(engine: Engine, name: str, i: int = 0, **settings):
    sampling = SamplingConfig(**{"max_new_tokens": 8, "temperature": 1.0, "seed": 3, **settings})
    request = Request(name, prompt(i), sampling)
    (done,) = engine.run([request])
    return request, done


def replays_of(engine: Engine, audit=None, shadow=None, one_in: int = 1) -> Replays:
    return Replays(engine, Meters(), {None: None}, audit, one_in, 1000, shadow, one_in)


# --- how many blocks ------------------------------------------------------------------------------


def test_the_least_blocks_that_the_last_audits_wanted_are_selected():
    audit = AttentionAudit(trained=2, most=16, limit=0.1, lifts=True)
    assert audit.ladder == (2, 4, 8, 16) and audit.top_k == 2

    def error_at(good: int):
        return lambda top_k: [0.01, 0.05 if top_k >= good else 0.5]

    assert audit.saw(error_at(2)) and not audit.rings and audit.top_k == 2
    audit.saw(error_at(8))
    assert audit.rings and audit.top_k == 8 and audit.by_layer == [0.01, 0.5]
    # the error that is told stays that of the trained number, and one good text is no all-clear
    for _ in range(WINDOW - 1):
        audit.saw(error_at(2))
        assert not audit.rings and audit.top_k == 8
    audit.saw(error_at(2))
    assert audit.top_k == 2 and (audit.audits, audit.alarms) == (WINDOW + 2, 1)
    # where nothing helps, the most
    audit.saw(error_at(1000))
    assert audit.top_k == 16
    assert not audit.saw(lambda top_k: None) and audit.audits == WINDOW + 3


def test_an_audit_without_an_action_only_rings():
    audit = AttentionAudit(trained=2, most=16, limit=0.1, lifts=False)
    audit.saw(lambda top_k: [0.5])
    assert audit.rings and audit.top_k == 2 and audit.ladder == (2,)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention_audit": AttentionAuditConfig(1, limit=1.5)}, "between 0 and 1"),
        ({"attention_audit": AttentionAuditConfig(1, rows=0)}, "rows is 0; it must be at least 1"),
        ({"attention_audit": AttentionAuditConfig(action="lift_top_k")}, "looks at no request"),
        ({"attention_audit": AttentionAuditConfig(1, max_top_k=9)}, "is of action=lift_top_k"),
        ({"shadow": ShadowConfig(-1)}, "serve.shadow.sample_one_in is -1"),
        ({"record": "/nowhere/at/all.jsonl"}, "is in a folder that does not exist"),
    ],
)
def test_contradictions_are_said_before_anything_is_read(settings, told):
    assert any(told in problem for problem in EndpointConfig(**settings).problems())
    assert not EndpointConfig().problems()


def test_an_audit_of_attention_that_leaves_nothing_out_is_refused():
    with pytest.raises(ValueError, match=r"this model has none; set serve\.attention_audit"):
        audit_of(AttentionAuditConfig(1), engine_of(None))
    with pytest.raises(ValueError, match="this model has none"):
        audit_of(AttentionAuditConfig(1), engine_of({**SPARSE, "merge": "gated"}))
    lifting = AttentionAuditConfig(1, action="lift_top_k")
    assert audit_of(lifting, engine_of()).ladder == (1, 2, 4)
    four = engine_of({**SPARSE, "top_k": 4})
    with pytest.raises(ValueError, match="max_top_k is 2, and the model selects 4"):
        audit_of(AttentionAuditConfig(1, action="lift_top_k", max_top_k=2), four)


def test_what_has_nothing_to_compare_with_is_refused():
    dense = engine_of(None)
    shadowed = ServeConfig(run="x", serve=EndpointConfig(shadow=ShadowConfig(1)))
    with pytest.raises(ValueError, match="neither saved budgets nor sparse attention"):
        launch.serve._replays(shadowed, dense, Meters(), None)
    budgets = {b: capture(dense.model.routers()) for b in (1.0, 2.0)}
    found = launch.serve._replays(shadowed, dense, Meters(), budgets)
    assert (found.shadow.budget, found.shadow.densely) == (2.0, False) and found.audit is None
    sparse = launch.serve._replays(shadowed, engine_of(), Meters(), None)
    assert (sparse.shadow.budget, sparse.shadow.densely) == (None, True)
    assert not launch.serve._replays(ServeConfig(run="x"), dense, Meters(), None).summary()


# --- in the engine's thread -----------------------------------------------------------------------


def test_an_alarm_lifts_the_blocks_and_later_audits_take_them_back(capsys):
    engine = engine_of()
    audit = AttentionAudit(1, 16, limit=1e-3, lifts=True)
    replays = replays_of(engine, audit)
    replays.ended(*ask(engine, "a"))
    assert top_k_of(engine.model) == 1, "nothing happens before there is time"
    assert replays.idle() and not replays.idle()
    lifted = top_k_of(engine.model)
    assert lifted == audit.top_k == replays.top_k and lifted > 1
    assert engine.context == f"attention.top_k {lifted}"
    said = capsys.readouterr().err
    assert "alarm: sparse attention of layer" in said and f"top_k is {lifted} now" in said

    request, done = ask(engine, "b")
    assert done.num_reused_tokens == 0, "pages of fewer blocks are not those of more"
    replays.taken(request)
    text = replays.meters.text().decode()
    for line in (
        'loadstone_fallback_total{reason="attention_alarm"} 1.0',
        'loadstone_fallback_total{reason="attention_top_k"} 1.0',
        'loadstone_attention_audits_total{result="failed"} 1.0',
        f"loadstone_attention_top_k {lifted:.1f}",
    ):
        assert line in text, line

    audit.limit = 0.99
    for i in range(WINDOW):
        replays.ended(*ask(engine, f"c{i}", i))
        assert replays.idle()
    assert top_k_of(engine.model) == 1 and engine.context == ""
    assert replays.summary()["attention_audit"]["alarms"] == 1


def test_a_share_of_the_requests_is_read_again_and_too_many_or_long_ones_dropped():
    engine = engine_of()
    request, done = ask(engine, "a")
    none = replays_of(engine, shadow=Shadow(None, True), one_in=0)
    none.ended(request, done)
    assert not none.idle()
    replays = replays_of(engine, shadow=Shadow(None, True))
    for _ in range(KEPT + 2):
        replays.ended(request, done)
    done.finish_reason = "cancelled"
    replays.ended(request, done)
    done.finish_reason = "length"
    replays.ended(Request("long", [1] * LONGEST, SamplingConfig()), done)
    while replays.idle():
        pass
    assert replays.shadow.requests == KEPT
    text = replays.meters.text().decode()
    assert 'loadstone_replays_total{result="dropped"} 3.0' in text
    assert f'loadstone_replays_total{{result="read"}} {KEPT:.1f}' in text


@pytest.mark.parametrize("densely", [False, True])
def test_a_shadow_agrees_with_itself_and_tells_what_dense_attention_would_have_said(densely):
    engine = engine_of()
    replays = replays_of(engine, shadow=Shadow(None, densely))
    for i in range(3):
        replays.ended(*ask(engine, f"{i}", i))
    while replays.idle():
        pass
    found = replays.summary()["shadow"]
    assert (found["requests"], found["tokens"]) == (3, 24) and found["replay_difference"] < 1e-4
    assert (found["agreement"] == 1.0 and found["divergence"] == 0.0) is not densely
    text = replays.meters.text().decode()
    assert "loadstone_shadow_tokens_total 24.0" in text
    assert f"loadstone_shadow_same_tokens_total {24 * found['agreement']:.1f}" in text


def test_requests_are_read_again_between_others_and_no_answer_changes():
    """The worker does so when it has nothing else to do; a request that comes meanwhile waits for
    one pass, and its tokens are those of an engine that nobody looked at.
    """
    plain, engine = engine_of(), engine_of()
    replays = replays_of(engine, shadow=Shadow(None, True))
    read = threading.Semaphore(0)

    def idle() -> bool:
        found = replays.idle()
        if found:
            read.release()
        return found

    worker = Worker(engine, 8, replays.ended, idle=idle)
    worker.start()
    for i in range(3):
        ended, tokens = threading.Event(), []

        def deliver(event, tokens=tokens, ended=ended):
            if event.completion is not None:
                tokens += event.completion.tokens
                ended.set()

        sampling = SamplingConfig(max_new_tokens=8, temperature=1.0, seed=3)
        worker.submit([(Request(f"{i}", prompt(i), sampling), deliver)])
        assert ended.wait(30) and tokens == ask(plain, f"{i}", i)[1].tokens
    for _ in range(3):
        assert read.acquire(timeout=30)
    worker.close(30)
    assert worker.failure is None and replays.shadow.requests == 3


# --- generated again ------------------------------------------------------------------------------


def test_a_recorded_request_is_generated_again_from_its_seed(tmp_path):
    engine, path = engine_of(), tmp_path / "served.jsonl"
    recorder = Recorder(path, {"model": "m", "checkpoint": "step-1"})
    asked = [ask(engine, f"r{i}", i, seed=40 + i, top_p=0.9, stop=("x",)) for i in range(3)]
    for request, done in asked:
        recorder.ended(request, done, 1)
    recorder.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(ValueError, match="is not yours alone"):
        Recorder(path, {})
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        Recorder(tmp_path / "link", {})
    again = engine_of()
    for (request, done), line in zip(asked, read_prompts(path, SamplingConfig()), strict=True):
        assert line.name == request.name and line.sampling == request.sampling
        assert list(line.prompt) == request.prompt and line.budget is None
        assert line.expected == tuple(done.tokens)
        assert line.rest["recorded"]["attention_top_k"] == 1
        (found,) = again.run([Request(line.name, list(line.prompt), line.sampling)])
        assert found.tokens == done.tokens
