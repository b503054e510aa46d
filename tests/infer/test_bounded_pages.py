"""A bounded cache in the engine: pages hold entries alone, tokens are in a region of each request,
and texts are those of the plain loop.
"""

from __future__ import annotations

import pytest
import torch
from common import build, tiny_config

from infer.config import EngineConfig
from infer.engine import Engine
from infer.request import Request
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.sparse import ResidentKVPages
from model.config import BalanceConfig
from model.cost.memory import cache_bytes
from model.generate import generate
from ops.sparse_attention.resident_cache import ResidentPages
from tests.infer.poisoned import prompt, request, texts
from train.config.commands.generate import GenerateConfig
from train.config.commands.serve import ServeConfig

LENGTH = 64
SMALL = {
    **{"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4},
    **{"resident_blocks": 1, "resident_interval": 8},
}
LEARNED = {
    **SMALL,
    **{"offset": True, "sink": True, "entries": "gated", "num_sink_blocks": 0},
    **{"dense_layers": (1,), "score": "error_gain"},
}
SETTINGS = EngineConfig(max_slots=2, prefill_tokens=10, cache_tokens=4 * LENGTH)


def model_of(settings):
    model = build(
        tiny_config(init_std=0.3, max_seq_len=LENGTH), BalanceConfig(), seed=7, attention=settings
    )
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("offset", "sink", "entry_weights"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=gen))
    return model.eval()


@pytest.fixture(scope="module", params=[SMALL, LEARNED], ids=["plain", "learned"])
def model(request):
    return model_of(request.param)


def bounded(engine: Engine) -> list[ResidentPages]:
    return [pages.held for pages in engine.pages if isinstance(pages, ResidentKVPages)]


def poison(engine: Engine) -> None:
    """What no block has is nobody's: let it be no number."""
    assert engine.regions is not None
    for pool in bounded(engine):
        for region in engine.regions:
            pool.places[region] = -1
            pool.state.mass[region] = torch.nan
        for head in pool.head.tolist():
            used = set(pool.places[:, head].flatten().tolist())
            unused = [room for room in range(len(pool.keys)) if room not in used]
            for held in (pool.keys, pool.values):
                held[unused, :, head] = torch.nan


def run(engine: Engine, given: list[Request]) -> dict[str, list[int]]:
    """Texts, with rooms that are nobody's full of NaN before every step."""
    found = texts(engine, given, poison)
    assert sorted(engine.regions) == list(range(engine.num_slots))
    return found


def expected(model, given: list[Request]) -> dict[str, list[int]]:
    """By the plain loop, which knows no pages."""
    return {
        r.name: list(generate(model, r.prompt, r.sampling.max_new_tokens, temperature=0))
        for r in given
    }


GIVEN = [
    request("short", prompt(3), 50),
    request("long", prompt(47, 1), 16),
    request("whole", prompt(9, 2), 40),
    request("block", prompt(8, 3), 12),
]


def test_requests_beside_each_other_have_the_texts_of_the_plain_loop(model):
    """Prompts in pieces, whatever lies beside them; tokens take a region whose size is fixed."""
    engine = Engine(model, SETTINGS)
    assert engine.page_size == 4 and not engine.shares
    for pool in bounded(engine):
        rooms = pool.spec.num_sink_blocks + 1 + 2 + pool.spec.num_local_blocks - 1
        assert pool.num_slots == rooms and len(pool.keys) == 2 * rooms < engine.pool.num_pages
    assert run(engine, GIVEN) == expected(model, GIVEN)
    assert engine.num_forwards["continue"]


@pytest.mark.parametrize("kind", ["native", "fp8"])
def test_prompts_that_begin_together_leave_what_they_would_alone(kind):
    """In one pass, with padding behind the shorter one that is no query of its document."""
    model = model_of(SMALL | {"entries_dtype": kind})
    given = [request(str(n), prompt(n, n), 30) for n in (25, 31, 32)]
    engine = Engine(model, EngineConfig(max_slots=3))
    assert run(engine, given) == expected(model, given)
    assert engine.num_forwards["prefill"] == 1 and not engine.num_forwards["continue"]


def test_requests_that_lose_their_pages_begin_again(model):
    given = [request(str(i), prompt(20 + i, i), 30) for i in range(4)]
    engine = Engine(model, EngineConfig(max_slots=3, prefill_tokens=10, cache_tokens=100))
    found = {c.name: c for c in engine.run(given)}
    assert {name: c.tokens for name, c in found.items()} == expected(model, given)
    assert sum(c.num_preemptions for c in found.values())


def test_a_prompt_that_begins_like_another_is_computed_again():
    model = model_of(SMALL)
    given = [request(str(i), [*prompt(30), i], 5) for i in range(2)]
    engine = Engine(model, SETTINGS)
    for one in given:
        assert run(engine, [one]) == expected(model, [one])
    assert not engine.pool.keys


@pytest.mark.parametrize("kind", ["native", "fp8"])
def test_one_request_takes_what_the_plan_says(kind):
    """But for the scratch page of the entries."""
    settings = SMALL | {"entries_dtype": kind}
    model = model_of(settings)
    engine = Engine(model, EngineConfig(max_slots=1))
    page = sum(
        e[0].numel() * e.element_size() for p in bounded(engine) for e in p.entries.tensors()
    )
    planned = cache_bytes(model.config, 4, LENGTH, SparseAttentionConfig(**settings).arguments)
    assert engine.cache_bytes - page == planned


def test_drafts_are_refused_in_a_line():
    drafting = EngineConfig(draft_budget=1.0)
    asked = {"run": "RUN", "engine": drafting, "attention": SparseAttentionConfig(**SMALL)}
    for settings in (ServeConfig(**asked), GenerateConfig(**asked, input=__file__, output="OUT")):
        (problem,) = settings.problems()
        assert "drafts would evict tokens for good" in problem
    with pytest.raises(ValueError, match=r"draft_budget is 1, but attention\.resident_blocks"):
        Engine(model_of(SMALL), drafting)
