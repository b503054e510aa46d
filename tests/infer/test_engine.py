"""The engine: a request's tokens are those it has alone, whatever runs beside it, however it was
interrupted, and wherever its first tokens came from.
"""

from __future__ import annotations

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

from infer.budget import capture, use
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Completion, Request
from model.config import BalanceConfig
from model.generate import generate
from model.request import ForwardRequest, TokenBatch
from model.routers.config import ThresholdConfig

SPARSE = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4}
WINDOWED = {"window": 5, "sinks": True}
ATTENTIONS = {
    "dense": None,
    "scc": SPARSE,
    "mla": LATENT,
    "windowed": WINDOWED,
    "compressed": COMPRESSED | {"layer_kinds": ("csa", "hca", "window")},
}
SHAPES = {"mla": LATENT_SHAPE, "compressed": COMPRESSED_SHAPE}
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def dense():
    return model_of("dense")


def model_of(name: str):
    model = build(tiny_config(**SHAPES.get(name, {})), BalanceConfig(), attention=ATTENTIONS[name])
    with torch.no_grad():
        model.head.weight *= 10  # far from uniform, so that texts differ
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # which at 0 would hardly show
                parameter += 2.0
    return model


def prompts(number: int = 9, longest: int = 30) -> list[list[int]]:
    gen = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (number,), generator=gen).tolist()
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=gen).tolist() for n in lengths]


def requests_of(given: list[list[int]], **changes) -> list[Request]:
    """Requests that end at different times, with a seed of their own each."""
    settings = {"max_new_tokens": 12, "temperature": 0.0, **changes}
    return [
        Request(
            str(i),
            prompt,
            SamplingConfig(**settings | {"max_new_tokens": 3 + 5 * i % 17, "seed": i}),
        )
        for i, prompt in enumerate(given)
    ]


def run(model, requests: list[Request], **settings) -> dict[str, Completion]:
    engine = Engine(model, EngineConfig(**settings))
    found = {c.name: c for c in engine.run(requests)}
    assert not engine.has_work
    held = [h for h in engine.pool.holders if h]
    assert not held, "pages of requests that have ended are held"
    assert engine.pool.available == engine.pool.num_pages - 1
    assert engine.places is None or not engine.places.readers
    return found


def tokens(found: dict[str, Completion]) -> list[list[int]]:
    return [found[str(i)].tokens for i in range(len(found))]


def test_ragged_decode_equals_one_by_one(model):
    """The oracle is the plain loop of model/generate.py, which knows no pages."""
    given = requests_of(prompts())
    expected = [
        list(generate(model, r.prompt, r.sampling.max_new_tokens, temperature=0)) for r in given
    ]
    assert tokens(run(model, given, max_slots=4)) == expected
    assert tokens(run(model, given, max_slots=32)) == expected
    assert len({tuple(t) for t in expected}) == len(expected)


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_p": 0.6}, {"top_k": 3}, {"temperature": 2.5, "top_p": 1.0}],
    ids=["default", "top_p", "top_k", "hot"],
)
def test_what_is_drawn_does_not_depend_on_the_batch(dense, changes):
    given = requests_of(prompts(), **{"temperature": 0.9, "top_p": 0.95, **changes})
    together = tokens(run(dense, given, max_slots=5))
    alone = [run(dense, [r])[r.name].tokens for r in given]
    assert together == alone
    # rows with other settings beside them change nothing either
    mixed = [given[0], *requests_of(prompts())[1:]]
    assert tokens(run(dense, mixed, max_slots=9))[0] == alone[0]


def test_other_seeds_draw_other_tokens(dense):
    prompt = prompts()[0]
    given = [
        Request(str(seed), prompt, SamplingConfig(max_new_tokens=12, seed=seed))
        for seed in range(4)
    ]
    assert len({tuple(t) for t in tokens(run(dense, given))}) == 4


@pytest.mark.slow
def test_a_long_prompt_in_pieces_gives_the_same(model):
    given = requests_of(prompts(longest=50))
    expected = tokens(run(model, given))
    for size in (3, 17):
        assert tokens(run(model, given, prefill_tokens=size, max_slots=3)) == expected


def test_requests_that_lose_their_pages_end_as_if_nothing_had_been(model):
    given = requests_of(prompts(6, 20))
    expected = tokens(run(model, given))
    found = run(model, given, cache_tokens=48, prefix_reuse=False)
    assert tokens(found) == expected
    assert sum(c.num_preemptions for c in found.values()) > 0


def test_sampled_requests_that_lose_their_pages_draw_the_same(dense):
    given = requests_of(prompts(6, 20), temperature=0.9)
    found = run(dense, given, cache_tokens=64, prefix_reuse=False)
    assert sum(c.num_preemptions for c in found.values()) > 0
    assert tokens(found) == tokens(run(dense, given))


def test_prompts_that_begin_alike_share_pages(model):
    gen = torch.Generator().manual_seed(5)
    beginning = torch.randint(0, VOCAB_SIZE, (33,), generator=gen).tolist()
    given = [[*beginning, i, 2 * i] for i in range(6)] + [beginning, beginning[:32]]
    requests = [Request(str(i), p, GREEDY) for i, p in enumerate(given)]
    expected = tokens(run(model, requests, prefix_reuse=False))

    # One after the other: what the first has left is there for all that follow.
    found = run(model, requests, max_slots=1)
    assert tokens(found) == expected
    assert {i: c.num_reused_tokens for i, c in found.items()} == {
        **dict.fromkeys(map(str, range(7)), 32),
        "7": 0,  # the shortest comes first
    }
    assert tokens(run(model, requests)) == expected


def test_shared_pages_are_given_up_when_room_is_needed(dense):
    given = requests_of(prompts(9, 40))
    expected = tokens(run(dense, given, prefix_reuse=False))
    assert tokens(run(dense, given, cache_tokens=80)) == expected


def test_pages_of_another_budget_are_not_shared(dense):
    prompt = list(range(40))
    engine = Engine(dense, context="budget 1")

    def reused(name: str) -> int:
        (found,) = engine.run([Request(name, prompt, GREEDY)])
        return found.num_reused_tokens

    assert (reused("a"), reused("b")) == (0, 32)
    engine.use_context("budget 2")
    assert (reused("c"), reused("d")) == (0, 32)
    engine.use_context("budget 1")
    assert reused("e") == 32


def test_requests_of_different_budgets_run_together_and_share_nothing():
    """Each gets the tokens of an engine whose routers have its budget alone."""
    model = build(tiny_config(), BalanceConfig(), router=ThresholdConfig, budget=2.0).eval()
    with torch.no_grad():
        model.head.weight *= 10
        for router in model.routers():
            router.balance_bias.fill_(-0.5)
    before = capture(model.routers())
    budgets = {}
    for budget, cut in ((1.0, 0.6), (3.0, 0.4)):
        budgets[budget] = capture(model.routers())
        for state in budgets[budget]:
            state.balance_bias.fill_(-cut)
    beginning = list(range(40))
    requests = [
        Request(f"{budget} {i}", [*beginning, i], GREEDY, budget=budget)
        for i in range(3)
        for budget in (None, 1.0, 3.0)
    ]
    alone = {}
    for budget, states in {None: before, **budgets}.items():
        use(model.routers(), states)
        own = [Request(r.name, r.prompt, GREEDY) for r in requests if r.budget == budget]
        alone |= run(model, own)
    use(model.routers(), before)

    engine = Engine(model, EngineConfig(max_slots=4), budgets=budgets)
    found = {c.name: c for c in engine.run(requests)}
    assert {n: c.tokens for n, c in found.items()} == {n: c.tokens for n, c in alone.items()}
    # Four slots hold three budgets, and every step is one forward pass over all of them.
    assert engine.num_forwards["decode"] == 3 * 11
    spent = {n: c.experts_per_token for n, c in found.items()}
    assert spent["1.0 0"] < spent["None 0"] < spent["3.0 0"]
    # the first of each budget computes what they all begin with
    assert min(found[f"{b} 0"].num_reused_tokens for b in (None, 1.0, 3.0)) == 0
    later = [Request("late", [*beginning, 9], GREEDY, budget=b) for b in (None, 1.0, 3.0)]
    assert [next(engine.run([r])).num_reused_tokens for r in later] == [32, 32, 32]
    with pytest.raises(ValueError, match=r"no budget 2 has been saved .*; choose one of 1, 3"):
        engine.add(Request("x", [1], GREEDY, budget=2.0))


def test_routed_experts_are_those_of_the_training_forward(model):
    given = [Request(str(i), p, GREEDY, keep_routing=True) for i, p in enumerate(prompts(4, 40))]
    plain = run(model, requests_of(prompts(4, 40)))
    assert all(c.routed_experts is None for c in plain.values())
    engine = Engine(model, EngineConfig(prefill_tokens=16, cache_tokens=128))
    list(engine.run([Request("before", given[0].prompt, GREEDY)]))
    for completion in engine.run(given):
        assert not completion.num_reused_tokens
        ids = torch.tensor([given[int(completion.name)].prompt + completion.tokens[:-1]])
        length = ids.shape[1]
        ends = torch.tensor([0, length], dtype=torch.int32)
        batch = TokenBatch(ids, ids, torch.arange(length)[None], ends, length)
        with torch.no_grad():
            output = model(batch, ForwardRequest(keep_routing=True))
        expected = torch.stack([r.expert_ids for r in output.routings], 1)
        assert torch.equal(completion.routed_experts.long(), expected.long())


def test_alternatives_are_the_most_likely_tokens(dense):
    engine = Engine(dense)
    engine.add(Request("0", [5, 9, 2], GREEDY, num_alternatives=3, text=None))
    drawn = [d for _ in range(12) for e in engine.step() for d in e.drawn]
    with torch.no_grad():
        logits = dense.logits(torch.tensor([[5, 9, 2, *(d.token for d in drawn)]]))[0, 2:-1]
    values, ids = logits.log_softmax(-1).topk(3)
    assert [[t for t, _ in d.alternatives] for d in drawn] == ids.tolist()
    found = [v for d in drawn for _, v in d.alternatives]
    assert found == pytest.approx(values.flatten().tolist(), abs=1e-4)
    assert [d.alternatives[0][1] for d in drawn] == pytest.approx(
        [d.log_probability for d in drawn], abs=1e-5
    )


def test_a_switch_with_requests_running_is_refused(dense):
    engine = Engine(dense)
    engine.add(Request("a", [1, 2], GREEDY))
    engine.step()
    with pytest.raises(RuntimeError, match="1 requests are running"):
        engine.use_context("budget 2")


def test_a_cancelled_request_frees_its_pages(dense):
    engine = Engine(dense, EngineConfig(max_slots=2))
    for name in "abc":
        engine.add(Request(name, [1, 2, 3], GREEDY))
    engine.step()
    engine.cancel("a")  # runs
    engine.cancel("c")  # waits
    found = [e.completion.name for _ in range(20) for e in engine.step() if e.completion]
    assert found == ["b"] and engine.pool.available == engine.pool.num_pages - 1


def test_log_probabilities_are_the_models(dense):
    (found,) = run(
        dense, [Request("0", [5, 9, 2], SamplingConfig(max_new_tokens=8, temperature=0.7))]
    ).values()
    with torch.no_grad():
        logits = dense.logits(torch.tensor([[5, 9, 2, *found.tokens]]))[0]
    expected = logits.log_softmax(-1)[2:-1].gather(1, torch.tensor(found.tokens)[:, None])
    assert found.log_probabilities == pytest.approx(expected.flatten().tolist(), abs=1e-4)


def test_one_row_of_nan_ends_alone(dense):
    """A prompt whose embedding is not a number spoils itself, not its batch."""
    weight = dense.embedding.weight.data
    kept = weight[63].clone()
    given = [Request(str(i), [i + 1, i + 2], GREEDY) for i in range(5)]
    given[3].prompt = [1, 63]
    sound = [g for g in given if g.name != "3"]
    expected = {name: c.tokens for name, c in run(dense, sound).items()}
    weight[63] = float("nan")
    try:
        found = run(dense, given)
    finally:
        weight[63] = kept
    assert found["3"].finish_reason == "error" and not found["3"].tokens
    for name, ids in expected.items():
        if 63 not in ids:
            assert found[name].tokens == ids and found[name].finish_reason == "length"


def test_what_a_row_of_nan_leaves_behind_reaches_nobody(model):
    """Its pages go to other requests, and its padding has written to the scratch page; a key that
    is masked has weight 0, and 0 times NaN is NaN.
    """
    weight = model.embedding.weight.data
    kept = weight[63].clone()
    long = [i % 60 for i in range(37)]
    given = [Request(str(i), p, GREEDY) for i, p in enumerate(([3], [4] * 9, long, [5, 6]))]
    expected = {name: c.tokens for name, c in run(model, given).items()}

    engine = Engine(model, EngineConfig(max_slots=4, cache_tokens=80, prefill_tokens=16))
    bad = [Request(f"bad {i}", [i, 63, *range(n)], GREEDY) for i, n in enumerate((1, 30, 9))]
    weight[63] = float("nan")
    try:
        ended = list(engine.run([*bad, Request("beside", [1] * 4, GREEDY)]))
    finally:
        weight[63] = kept
    assert [c.finish_reason for c in ended if c.name != "beside"] == ["error"] * 3
    assert {c.name: c.tokens for c in engine.run(given)} == expected
    again = [Request(r.name, r.prompt, GREEDY) for r in bad]
    assert {c.finish_reason for c in engine.run(again)} == {"length"}, "its prefix was reused"


def test_the_end_of_a_document_ends_a_request_and_is_not_given(dense):
    (whole,) = run(dense, [Request("0", [5, 9, 2], GREEDY)]).values()
    end = whole.tokens[5]
    engine = Engine(dense, end_token=end)
    (found,) = engine.run([Request("0", [5, 9, 2], GREEDY)])
    assert found.tokens == whole.tokens[: whole.tokens.index(end)]
    assert found.finish_reason == "end"
    ignoring = SamplingConfig(max_new_tokens=12, temperature=0.0, ignore_end=True)
    (found,) = engine.run([Request("0", [5, 9, 2], ignoring)])
    assert found.tokens == whole.tokens and found.finish_reason == "length"


def test_a_request_ends_at_the_models_length(dense):
    (found,) = run(dense, [Request("0", [1] * 60, SamplingConfig(max_new_tokens=100))]).values()
    assert len(found.tokens) == 4 and found.finish_reason == "length"


def test_experts_per_token_are_the_routers(dense):
    found = run(dense, requests_of(prompts(4)))
    assert {c.experts_per_token for c in found.values()} == {2.0}


def test_decoding_together_takes_few_forward_passes(dense):
    engine = Engine(dense, EngineConfig(max_slots=8))
    given = [Request(str(i), [i + 1, 7, i], GREEDY) for i in range(16)]
    list(engine.run(given))
    # two rounds of eight requests, each with a first token from its prompt and eleven more
    assert engine.num_forwards == {"prefill": 2, "continue": 0, "decode": 22}
    assert engine.rows_decoded == 16 * 11

    # Prompts of many lengths are computed in groups, and all of them in the first step.
    engine = Engine(dense, EngineConfig(max_slots=8))
    list(engine.run([Request(str(n), [7] * n, GREEDY) for n in (1, 3, 5, 9, 17, 30, 44, 50)]))
    assert engine.num_forwards["prefill"] > 4 and engine.num_forwards["decode"] == 11


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, r"64 tokens; model\.max_seq_len is 64"),
        ([1], {"temperature": -1}, "temperature is -1"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"stop": ("",)}, "stop has an empty string"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(dense, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(dense).add(Request("a", prompt, SamplingConfig(**settings)))


def test_a_prompt_beyond_the_cache_is_refused(dense):
    engine = Engine(dense, EngineConfig(cache_tokens=32))
    with pytest.raises(ValueError, match="32 tokens, and the cache room for 32"):
        engine.add(Request("a", [1] * 32, GREEDY))
