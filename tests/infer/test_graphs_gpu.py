"""Decoding steps as real CUDA graphs: texts and numbers of the same steps without them."""

from __future__ import annotations

import pytest
import torch
from common import COMPRESSED, COMPRESSED_SHAPE, LATENT, LATENT_SHAPE, build, tiny_config

import infer.graphs.steps as steps
from infer.budget import capture, use
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.graphs.capture import CudaCapture
from infer.request import Completion, Request
from model.config import BalanceConfig
from model.paging import step_pages
from model.routers.config import ThresholdConfig, TopPConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPARSE = {"block_size": 16, "coarse_block_size": 8, "top_k": 2, "window_size": 16}
CASES = {
    "dense": {},
    "windowed": {"attention": {"window": 5, "sinks": True}},
    "sparse": {"attention": SPARSE | {"entries": "gated"}},
    "mla": {"attention": LATENT, "shape": LATENT_SHAPE},
    "dsa": {"attention": {"rule": "dsa", "top_k": 6, "dense_steps": 0}},
    "compressed": {"attention": COMPRESSED, "shape": COMPRESSED_SHAPE},
    "threshold": {"router": ThresholdConfig, "budget": 2.0},
    "top_p": {"router": TopPConfig, "budget": 2.0},
}


def model_of(name: str, dtype: torch.dtype):
    options = dict(CASES[name])
    shape = {"expert_intermediate_size": 32, "hidden_size": 64, **options.pop("shape", {})}
    model = build(tiny_config(max_seq_len=256, **shape), BalanceConfig(), dtype=dtype, **options)
    with torch.no_grad():
        model.head.weight *= 5
    return model.to("cuda")


def requests(new_tokens: int = 40) -> list[Request]:
    gen = torch.Generator().manual_seed(0)
    return [
        Request(
            str(i),
            torch.randint(0, 64, (length,), generator=gen).tolist(),
            SamplingConfig(max_new_tokens=new_tokens + i, temperature=0.7, seed=i),
        )
        for i, length in enumerate((5, 40, 90))
    ]


def finished(engine: Engine) -> list[Completion]:
    return sorted(engine.run(requests()), key=lambda done: done.name)


def eagerly(run):
    """The same step on the same buffers, kernel by kernel."""
    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_replayed_step_gives_the_bits_of_the_same_step(name, dtype):
    model = model_of(name, dtype)
    # As `true` would have it: a reason against graphs, or a capture that fails, is an error.
    engine = Engine(model, EngineConfig(max_slots=4, cuda_graphs=True))
    replayed = finished(engine)
    assert engine.graphs is not None
    assert engine.graphs.num_replays == engine.num_forwards["decode"]
    assert len(engine.graphs.shapes) < engine.graphs.num_replays
    same = finished(Engine(model, EngineConfig(max_slots=4), capture_with=eagerly))
    for one, other in zip(replayed, same, strict=True):
        assert one.tokens == other.tokens
        assert one.log_probabilities == other.log_probabilities
        assert one.experts_per_token == other.experts_per_token


def test_graphs_are_on_by_themselves_and_a_budget_is_copied_under_them():
    model = model_of("threshold", torch.bfloat16)
    routers = model.routers()
    low = capture(routers)
    for state in low:
        state.balance_bias.sub_(0.1)
    high = capture(routers)
    engine = Engine(model, EngineConfig(max_slots=4, prefix_reuse=False))
    assert engine.graphs is not None and engine.without_graphs is None
    found = []
    for states in (high, low, high):
        use(routers, states)
        found.append(finished(engine))
        usual = Engine(model, EngineConfig(max_slots=4, prefix_reuse=False), capture_with=eagerly)
        assert [c.tokens for c in found[-1]] == [c.tokens for c in finished(usual)]
    assert [c.tokens for c in found[0]] == [c.tokens for c in found[2]]


def test_what_waits_for_the_host_ends_a_capture_with_its_reason(monkeypatch):
    model = model_of("dense", torch.bfloat16)

    def waiting(*args, **options):
        found = step_pages(*args, **options)
        found.experts.sum().item()
        return found

    monkeypatch.setattr(steps, "step_pages", waiting)
    engine = Engine(model, EngineConfig(max_slots=4))
    texts = [c.tokens for c in finished(engine)]
    assert engine.graphs is None and "the capture failed" in engine.without_graphs
    monkeypatch.undo()
    usual = Engine(model, EngineConfig(max_slots=4, cuda_graphs=False))
    assert texts == [c.tokens for c in finished(usual)]


def test_graphs_share_a_pool_of_memory():
    device = torch.device("cuda")
    capture_with, source = CudaCapture(device), torch.arange(4.0, device=device)
    places = [torch.zeros(4, device=device) for _ in range(2)]
    replays = [
        capture_with(lambda place=place, i=i: place.copy_(source * (i + 2)))
        for i, place in enumerate(places)
    ]
    source.fill_(3.0)
    for replay in replays:
        replay()
    assert [place[0].item() for place in places] == [6.0, 9.0]
