"""Decoding steps as graphs: what a graph may hold, when one is captured, and that its numbers are
those of plain decoding. On a CPU a tape of operators stands in for CUDA (recorded.py);
test_graphs_gpu.py has the real ones.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from common import (
    COMPRESSED,
    COMPRESSED_SHAPE,
    LATENT,
    LATENT_SHAPE,
    VOCAB_SIZE,
    build,
    tiny_config,
)

import infer.graphs.steps as steps
from infer.budget import capture, use
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.graphs.capture import CaptureError
from infer.graphs.steps import doubled
from infer.graphs.waits import waits, why_not
from infer.replay import use_top_k
from infer.request import Completion, Request
from model.config import BalanceConfig, ExpertsConfig
from model.paging import step_pages
from model.routers.config import (
    ExpertChoiceConfig,
    NullExpertsConfig,
    ReLUConfig,
    ThresholdConfig,
    TopPConfig,
)
from ops.grouped_mlp import grouped_mm_backend
from tests.infer.recorded import Broken, Guard, Recorder
from train.config.commands.benchmark import BenchmarkConfig
from train.config.commands.generate import GenerateConfig
from train.config.commands.serve import ServeConfig

SPARSE = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4}
ATTENTIONS = {
    "dense": {},
    "windowed": {"attention": {"window": 5, "sinks": True}},
    "sparse": {"attention": SPARSE},
    "learned entries": {"attention": SPARSE | {"entries": "gated"}},
    "gated branches": {"attention": SPARSE | {"merge": "gated"}},
    "index in sparse": {"attention": SPARSE | {"select": "index"}},
    "mla": {"attention": LATENT, "shape": LATENT_SHAPE},
    "dsa": {"attention": {"rule": "dsa", "top_k": 6, "dense_steps": 0}},
    "msa": {"attention": {"rule": "msa", "block_size": 4, "top_k": 2, "dense_steps": 0}},
    "qsa": {"attention": {"rule": "qsa", "block_size": 4, "top_k": 2, "dense_steps": 0}},
    "compressed": {"attention": COMPRESSED, "shape": COMPRESSED_SHAPE},
}
ROUTERS = {
    "threshold": {"router": ThresholdConfig, "budget": 2.0},
    "top_p": {"router": TopPConfig, "budget": 2.0},
    "relu": {"router": ReLUConfig, "budget": 2.0},
    "null_experts": {"router": NullExpertsConfig, "budget": 2.0, "num_null_experts": 4},
    "expert_choice": {"router": ExpertChoiceConfig, "top_k": 2},
    "hash layers": {"top_k": 2, "hash_layers": 1},
    "residual streams": {"shape": {"num_residual_streams": 2}},
    "no experts": {"shape": {"num_experts": 0}},
}


def model_of(**options):
    shape = options.pop("shape", {})
    model = build(tiny_config(**shape), BalanceConfig(), **options)
    with torch.no_grad():
        model.head.weight *= 10  # far from uniform, so that texts differ
    return model


def requests(lengths=(5, 9, 14), new_tokens=9, **options) -> list[Request]:
    gen = torch.Generator().manual_seed(0)
    return [
        Request(
            str(i),
            torch.randint(0, VOCAB_SIZE, (length,), generator=gen).tolist(),
            SamplingConfig(max_new_tokens=new_tokens + i, temperature=0.7, seed=i),
            **options,
        )
        for i, length in enumerate(lengths)
    ]


def finished(engine: Engine, given: list[Request]) -> list[Completion]:
    found = {c.name: c for c in engine.run(given)}
    return [found[request.name] for request in given]


def said(found: list[Completion]) -> list[list[int]]:
    return [c.tokens for c in found]


def recording(model, **settings) -> tuple[Engine, Recorder]:
    recorder = Recorder()
    budgets = settings.pop("budgets", None)
    engine = Engine(
        model,
        EngineConfig(**{"max_slots": 4, **settings}),
        budgets=budgets,
        capture_with=recorder,
    )
    return engine, recorder


def eagerly(run):
    """A capture that records nothing: the same step on the same buffers, all of it in Python."""
    run()
    return run


@pytest.mark.parametrize("name", [*ATTENTIONS, *ROUTERS])
def test_a_replayed_step_gives_the_bits_of_the_same_step_and_the_texts_of_plain_decoding(name):
    """A step whose capture passes the guard waits for nothing and has no shape that hangs on
    numbers; one whose tape gives its bits hangs on nothing but memory.
    """
    model = model_of(**(ATTENTIONS | ROUTERS)[name])
    engine, recorder = recording(model)
    replayed = finished(engine, requests())
    assert recorder.replays == engine.num_forwards["decode"] > len(recorder.tapes)

    same = finished(Engine(model, EngineConfig(max_slots=4), capture_with=eagerly), requests())
    plain = finished(Engine(model, EngineConfig(max_slots=4)), requests())
    for one, other, usual in zip(replayed, same, plain, strict=True):
        assert one.tokens == other.tokens == usual.tokens
        assert one.log_probabilities == other.log_probabilities
        assert one.log_probabilities == pytest.approx(usual.log_probabilities, abs=2e-5)
        assert one.experts_per_token == other.experts_per_token
        assert one.experts_per_token == pytest.approx(usual.experts_per_token)


@pytest.mark.parametrize("name", ["dense", "sparse", "mla", "compressed"])
def test_rows_without_a_request_touch_no_page_but_the_scratch_page(name):
    """Three requests in four rows: pages are those of plain decoding, to the bit where a row's
    products are, and pages that nobody holds are as they were.
    """
    model = model_of(**ATTENTIONS[name])
    engine, _ = recording(model)
    plain = Engine(model, EngineConfig(max_slots=4))
    for one in (engine, plain):
        for request in requests(new_tokens=30):
            one.add(request)
        one.step()
    free = [page for page, holders in enumerate(engine.pool.holders) if not holders and page]
    before = [[t[free].clone() for t in pool.tensors()] for pool in engine.pages]
    for _ in range(6):
        engine.step()
        plain.step()
    held = sorted(page for sequence in engine.running for page in sequence.pages)
    untouched = [i for i, page in enumerate(free) if page not in held]
    assert len(engine.running) == 3 and untouched
    for pool, old, other in zip(engine.pages, before, plain.pages, strict=True):
        for now, was, usual in zip(pool.tensors(), old, other.tensors(), strict=True):
            assert torch.equal(now[free][untouched], was[untouched])
            torch.testing.assert_close(now[held], usual[held], rtol=1e-5, atol=1e-6)


def test_steps_that_are_captured_before_any_request_are_those_that_requests_need(monkeypatch):
    """And with no request in any row no page changes but the scratch page."""
    monkeypatch.setattr(steps, "LEAST_PAGES", 1)
    model = model_of(**ATTENTIONS["sparse"])
    engine, recorder = recording(model, max_slots=3)
    for one in engine.pages:
        for tensor in one.tensors():
            tensor[1:] = torch.nan
    made = list(engine.capture_steps())
    assert engine.graphs is not None
    shapes = engine.graphs.shapes
    assert len(made) == len(shapes) == len(recorder.tapes) and recorder.replays == 0
    assert {rows for _, rows, _ in shapes} == {1, 2, 3}
    widths = sorted({width for *_, width in shapes})
    assert widths[:3] == [1, 2, 4] and widths[-1] == engine.graphs.max_pages
    for one in engine.pages:
        for tensor in one.tensors():
            assert tensor[0].isfinite().all() and tensor[1:].isnan().all()
            tensor[1:] = 0

    told = said(finished(engine, requests()))
    assert len(recorder.tapes) == len(shapes) and recorder.replays > 0
    assert told == said(finished(Engine(model, EngineConfig(max_slots=3)), requests()))
    assert list(engine.capture_steps()) == [None] * len(shapes)  # they are there


def test_the_first_step_of_a_shape_is_captured_and_later_ones_copy_and_replay(monkeypatch):
    monkeypatch.setattr(steps, "LEAST_PAGES", 1)
    model = model_of()
    calls = []

    def counted(*args, **options):
        calls.append(len(args[1]))
        return step_pages(*args, **options)

    monkeypatch.setattr(steps, "step_pages", counted)
    engine, recorder = recording(model, max_slots=3)
    assert engine.page_size == 16
    # Prompts of 5, 9 and 14 tokens: three rows of one page, of two from the third token on, then
    # two rows and one, as requests end.
    found = finished(engine, requests(new_tokens=20))
    shapes = [shape[1:] for shape in engine.graphs.shapes]
    assert shapes == [(3, 1), (3, 2), (3, 4), (2, 4), (1, 4)]
    assert len(recorder.tapes) == len(shapes)
    assert calls == [rows for rows, _ in shapes for _ in range(2)]
    assert engine.graphs.num_replays == recorder.replays == 21

    # Nothing new comes up: nothing is captured.
    again = finished(engine, requests(new_tokens=20))
    assert len(recorder.tapes) == len(shapes) and len(calls) == 2 * len(shapes)
    assert said(again) == said(found)
    assert said(found) == said(finished(Engine(model, EngineConfig()), requests(new_tokens=20)))


@torch.no_grad()
def test_what_a_step_reads_and_gives_lies_where_it_lay():
    engine, _ = recording(model_of())
    for request in requests(new_tokens=12):
        engine.add(request)
    engine.step()
    seen = set()
    for _ in range(5):
        decoded, _ = engine._step(engine._ready(), keep=False)
        graphs = engine.graphs
        buffers = (graphs._ids, graphs._slots, graphs._lengths, graphs._pages, graphs._mask)
        seen.add(tuple(t.data_ptr() for t in (*buffers, decoded.logits, decoded.experts)))
        assert decoded.expert_ids is None
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("number", "least", "most", "size"),
    [(1, 1, 8, 1), (3, 1, 8, 4), (5, 1, 6, 6), (8, 1, 8, 8), (1, 8, 4, 4), (9, 8, 100, 16)],
)
def test_sizes_double_up_to_the_most(number, least, most, size):
    assert doubled(number, least, most) == size


# --- what may change under a graph ----------------------------------------------------------------


def test_weights_that_are_copied_in_place_hold_from_the_next_step_on():
    model, other = model_of(), model_of(seed=11)
    engine, recorder = recording(model)
    before = said(finished(engine, requests()))
    expected = said(finished(Engine(other, EngineConfig()), requests()))
    number = len(recorder.tapes)
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    engine.use_context("other weights")  # pages of before are of the others
    assert said(finished(engine, requests())) == expected != before
    assert len(recorder.tapes) == 2 * number  # another context

    # And in the same context, without pages of before.
    engine, recorder = recording(model, prefix_reuse=False)
    finished(engine, requests())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    number = len(recorder.tapes)
    expected = said(finished(Engine(model, EngineConfig()), requests()))
    assert said(finished(engine, requests())) == expected
    assert len(recorder.tapes) == number


def threshold_model():
    """Cuts in the middle of the scores, and others, under which tokens visit fewer experts."""
    model = model_of(router=ThresholdConfig, budget=2.0)
    routers = model.routers()
    with torch.no_grad():
        for router in routers:
            router.balance_bias.fill_(-0.45)
    low = capture(routers)
    for state in low:
        state.balance_bias.fill_(-0.52)
    return model, low


def test_a_budget_that_is_copied_into_the_routers_holds_from_the_next_step_on():
    model, low = threshold_model()
    high = capture(model.routers())
    engine, recorder = recording(model, prefix_reuse=False)
    found = {}
    for name, states in (("high", high), ("low", low), ("high again", high)):
        use(model.routers(), states)
        found[name] = finished(engine, requests())
        plain = finished(Engine(model, EngineConfig(prefix_reuse=False)), requests())
        assert said(found[name]) == said(plain)
        assert [c.experts_per_token for c in found[name]] == pytest.approx(
            [c.experts_per_token for c in plain]
        )
    assert said(found["high again"]) == said(found["high"])
    assert found["low"][0].experts_per_token < found["high"][0].experts_per_token
    assert len(recorder.tapes) == len(engine.graphs.shapes) <= 3


def test_requests_of_several_budgets_share_a_graph():
    model, low = threshold_model()
    engine, recorder = recording(model, budgets={1.0: low})
    given = requests()
    given[1].budget = 1.0
    found = finished(engine, given)
    plain = Engine(model, EngineConfig(max_slots=4), budgets={1.0: low})
    usual = finished(plain, given)
    assert said(found) == said(usual)
    experts = [c.experts_per_token for c in found]
    assert experts == pytest.approx([c.experts_per_token for c in usual])
    assert experts[1] < min(experts[0], experts[2])
    assert recorder.replays == engine.num_forwards["decode"]


def test_a_number_in_python_that_changes_needs_another_context():
    """A tape, as a graph, goes on selecting as many blocks as when it was made."""
    model = model_of(attention=SPARSE)
    engine, recorder = recording(model, prefix_reuse=False)
    given = requests((30, 33), new_tokens=6)
    finished(engine, given)
    number = len(recorder.tapes)
    engine.use_context("attention.top_k 5")
    use_top_k(model, 5)
    lifted = finished(engine, given)
    assert len(recorder.tapes) > number
    plain = finished(Engine(model, EngineConfig(prefix_reuse=False)), given)
    assert said(lifted) == said(plain)
    number = len(recorder.tapes)
    engine.use_context("")
    use_top_k(model, 2)
    finished(engine, given)
    assert len(recorder.tapes) == number


def test_where_tokens_went_is_told_as_without_graphs():
    model = model_of()
    engine, _ = recording(model)
    found = finished(engine, requests(keep_routing=True))
    plain = finished(Engine(model, EngineConfig()), requests(keep_routing=True))
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.routed_experts, other.routed_experts)


def test_a_limit_on_experts_and_drafts_go_through_graphs():
    model, low = threshold_model()
    engine, recorder = recording(model, max_active_experts=3)
    plain = Engine(model, EngineConfig(max_slots=4, max_active_experts=3))
    assert said(finished(engine, requests())) == said(finished(plain, requests()))
    assert engine.confined == plain.confined and engine.confined.rerouted
    assert recorder.replays == engine.num_forwards["decode"]

    drafting = {"draft_budget": 1.0, "draft_rounds": 2, "draft_tokens": 2}
    engine, recorder = recording(model, budgets={1.0: low}, **drafting)
    found = said(finished(engine, requests(new_tokens=16)))
    assert found == said(finished(Engine(model, EngineConfig()), requests(new_tokens=16)))
    # Drafts are graphs; what verifies them, of several tokens a row, is none.
    assert engine.drafted.drafts and recorder.replays > engine.num_forwards["decode"]


def test_requests_that_lose_their_pages_or_are_cancelled_leave_graphs_right():
    model = model_of()
    engine, _ = recording(model, cache_tokens=64, prefix_reuse=False)
    given = requests((9, 9, 9, 9), new_tokens=12)
    found = finished(engine, given)
    assert sum(c.num_preemptions for c in found) > 0
    assert said(found) == said(finished(Engine(model, EngineConfig()), given))
    for request in given:
        engine.add(request)
    for _ in range(3):
        engine.step()
    engine.cancel("0")
    ended = []
    while engine.has_work:
        ended += [event.completion for event in engine.step() if event.completion]
    assert said(sorted(ended, key=lambda c: c.name)) == said(found[1:])


# --- where there are none -------------------------------------------------------------------------


def test_a_capture_that_fails_leaves_plain_decoding_with_the_reason():
    def failing(run):
        run()
        raise CaptureError("the capture failed (RuntimeError: not permitted)")

    model = model_of()
    engine = Engine(model, EngineConfig(), capture_with=failing)
    assert said(finished(engine, requests())) == said(
        finished(Engine(model, EngineConfig()), requests())
    )
    assert engine.graphs is None and "not permitted" in engine.without_graphs
    with pytest.raises(CaptureError, match="not permitted"):
        finished(Engine(model, EngineConfig(cuda_graphs=True), capture_with=failing), requests())

    # Likewise where it fails before the first request.
    engine = Engine(model, EngineConfig(), capture_with=failing)
    assert list(engine.capture_steps()) == [] and "not permitted" in engine.without_graphs
    with pytest.raises(CaptureError, match="not permitted"):
        list(Engine(model, EngineConfig(cuda_graphs=True), capture_with=failing).capture_steps())


def test_on_a_cpu_there_are_none_and_asking_for_them_is_an_error():
    model = model_of()
    for asked, told in (("auto", "the model is on cpu"), (False, "engine.cuda_graphs is false")):
        engine = Engine(model, EngineConfig(cuda_graphs=asked))
        assert engine.graphs is None and told in engine.without_graphs
    with pytest.raises(ValueError, match="cuda_graphs is true, but the model is on cpu"):
        Engine(model, EngineConfig(cuda_graphs=True))
    assert why_not(model) == ["the model is on cpu, and graphs are of a CUDA device"]


def test_metrics_say_how_many_there_are_or_why_there_are_none():
    pytest.importorskip("prometheus_client")
    from launch.serving.meters import Meters

    def text_of(engine: Engine) -> str:
        meters = Meters()
        meters.watch(SimpleNamespace(engine=engine, num_running=0, num_waiting=0))
        return meters.text().decode()

    model = model_of()
    engine, recorder = recording(model)
    finished(engine, requests((5,), new_tokens=4))
    text = text_of(engine)
    assert f"loadstone_cuda_graphs {float(len(recorder.tapes))}" in text
    assert f"loadstone_cuda_graph_steps {float(recorder.replays)}" in text
    assert "loadstone_without_cuda_graphs{" not in text
    text = text_of(Engine(model, EngineConfig()))
    assert "loadstone_cuda_graphs 0.0" in text
    reason = "the model is on cpu, and graphs are of a CUDA device"
    assert f'loadstone_without_cuda_graphs{{reason="{reason}"}} 1.0' in text


def test_what_waits_for_the_host_is_named():
    cpu = torch.device("cpu")
    static = ExpertsConfig(backend="grouped_mm")
    assert waits(model_of(experts=static), cpu) == []
    assert waits(model_of(shape={"num_experts": 0}), cpu) == []
    (told,) = waits(model_of(), cpu)
    assert told.startswith("experts.backend=torch")
    two = SPARSE | {"num_levels": 2, "fanout": 2, "num_expanded": 1}
    (told,) = waits(model_of(attention=two, experts=static), cpu)
    assert told.startswith("attention.num_levels=2")
    bounded = SPARSE | {"resident_blocks": 1, "resident_interval": 8}
    (told,) = waits(model_of(attention=bounded, experts=static), cpu)
    assert told.startswith("attention.resident_blocks")
    model = model_of(experts=static)
    model.groups = dataclasses.replace(model.groups, expert_size=2)
    (told,) = waits(model, cpu)
    assert told.startswith("experts are spread over 2 ranks")


def test_two_levels_are_what_the_guard_stops():
    """The reason that is named is a true one."""
    two = SPARSE | {"num_levels": 2, "fanout": 2, "num_expanded": 1}
    engine, _ = recording(model_of(attention=two))
    with pytest.raises(Broken, match="tolist"):
        finished(engine, requests())


@pytest.mark.parametrize("biased", [False, True])
def test_products_of_experts_by_torchs_grouped_gemm_wait_for_nothing(biased):
    """The guard does not look inside an operator of ours, so the back-end is called by itself."""
    model = model_of(shape={"expert_intermediate_size": 24})
    layer = model.moe_layers()[0]
    hidden = torch.randn(6, 16)
    routing = layer.router.eval()(hidden)
    weights = [p.detach().bfloat16() for p in (layer.experts.gate_up, layer.experts.down)]
    biases = [w.new_ones(w.shape[:2]) for w in weights] if biased else [None, None]
    given = (routing.weights, *weights, routing.slots, routing.inverse, routing.offsets)
    with torch.no_grad(), Guard():
        grouped_mm_backend.forward(hidden.bfloat16(), *given, False, "swiglu", *biases)


def violations():
    values, mask = torch.arange(4), torch.tensor([True, False, True, False])
    return {
        "item": lambda: values[0].item(),
        "tolist": lambda: values.tolist(),
        "int": lambda: int(values[1]),
        "if": lambda: 1 if values[0] == 0 else 2,
        "cpu": lambda: values.cpu(),
        "numpy": lambda: values.numpy(),
        "index of a list": lambda: [0, 1][values[1]],
        "nonzero": lambda: values.nonzero(),
        "where": lambda: torch.where(mask),
        "mask": lambda: values[mask],
        "write by a mask": lambda: values.__setitem__(mask, values[:2]),
        "masked_select": lambda: values.masked_select(mask),
        "unique": lambda: values.unique(),
        "repeat_interleave": lambda: values.repeat_interleave(values),
        "bincount": lambda: torch.bincount(values),
        "a list": lambda: torch.tensor([1, 2]),
        "another device": lambda: values.to("meta") + 1,
    }


@pytest.mark.parametrize("name", violations())
def test_the_guard_catches_a_planted_violation(name):
    violation = violations()[name]
    with pytest.raises(Broken), Guard():
        violation()


def test_the_guard_lets_pass_what_a_graph_can_hold():
    values = torch.arange(4)
    with Guard():
        found = torch.where(values > 1, values, 0)[values.flip(0)].cumsum(0)
        found.scatter_(0, values, found.sort().indices)
        values.repeat_interleave(2)
    assert found.shape == (4,)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            GenerateConfig(run="RUN", prompt="a", engine=EngineConfig(cuda_graphs=True)),
            "engine.cuda_graphs=true is for requests that are decoded together",
        ),
        (BenchmarkConfig(run="RUN", cuda_graphs=True), "cuda_graphs=true"),
        (ServeConfig(run="RUN", engine=EngineConfig(cuda_graphs=True)), "cuda_graphs=true"),
    ],
)
def test_graphs_that_cannot_be_are_refused_before_anything_starts(config, told, monkeypatch):
    monkeypatch.setattr("train.config.commands.source.DEVICES", ("/nowhere",))
    assert any(told in problem for problem in config.problems())
