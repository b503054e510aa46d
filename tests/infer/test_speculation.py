"""Budget speculation: what it keeps is what plain decoding draws, whatever is drafted, and it is on
where it was measured to be faster.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from common import COMPRESSED, COMPRESSED_SHAPE, VOCAB_SIZE, build, tiny_config

from infer.budget import RouterState, capture
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Completion, Request
from infer.speculate import PAUSE, Utility, kept
from launch.prompts.lines import PromptLine
from model.config import BalanceConfig
from model.routers.config import ThresholdConfig
from train.config.commands.devices import DevicesConfig
from train.config.commands.generate import GenerateConfig
from train.config.commands.serve import EndpointConfig, ServeConfig

SPARSE = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4}
DRAFT, FULL = 1.0, 3.0


def model_of(attention: dict | None = None, sharpness: float = 10.0, **shape):
    model = build(
        tiny_config(**shape),
        BalanceConfig(),
        attention=attention,
        router=ThresholdConfig,
        budget=2.0,
    ).eval()
    with torch.no_grad():
        model.head.weight *= sharpness
        for router in model.routers():
            router.balance_bias.fill_(-0.4)
    return model


@pytest.fixture(scope="module")
def dense():
    return model_of()


def budgets_of(model) -> dict[float, list[RouterState]]:
    states = capture(model.routers())

    def cut_at(cut: float) -> list[RouterState]:
        return [s._replace(balance_bias=torch.full_like(s.balance_bias, -cut)) for s in states]

    return {DRAFT: cut_at(0.6), FULL: cut_at(0.4)}


class Always(Utility):
    """Rounds, whatever they take."""

    def next(self):
        return "round"

    def told(self, kind, tokens, seconds):
        pass


class Clock:
    """A second passes each time somebody looks, so every step takes as long, and rounds pay."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def run(
    model, requests: list[Request], drafts: int | None = None, **settings
) -> tuple[dict[str, Completion], Engine]:
    """drafts: of a round; None: plain decoding."""
    given = {} if drafts is None else {"draft_budget": DRAFT, "draft_tokens": drafts}
    engine = Engine(model, EngineConfig(**given, **settings), 3, budgets=budgets_of(model))
    if drafts is not None:
        engine.utility = Always(1, DRAFT, drafts)
    found = {c.name: c for c in engine.run(requests)}
    assert engine.pool.available == engine.pool.num_pages - 1
    return found, engine


def requests_of(**changes) -> list[Request]:
    """Of several lengths and budgets; one tells its experts, and one has a stop token."""
    gen = torch.Generator().manual_seed(0)
    found = []
    for i in range(8):
        prompt = torch.randint(0, VOCAB_SIZE, (1 + 5 * i,), generator=gen).tolist()
        settings = {"temperature": 0.0, "max_new_tokens": 3 + 5 * i % 17, "seed": i, **changes}
        if i == 6:
            settings["stop_token_ids"] = tuple(range(0, VOCAB_SIZE, 5))
        found.append(
            Request(
                str(i),
                prompt,
                SamplingConfig(**settings),
                budget=(None, FULL, DRAFT)[i % 3],
                keep_routing=i == 4,
                num_alternatives=2 * (i == 5),
            )
        )
    return found


def assert_same(found: dict[str, Completion], plain: dict[str, Completion]) -> None:
    for name, expected in plain.items():
        ours = found[name]
        assert ours.tokens == expected.tokens, name
        assert ours.finish_reason == expected.finish_reason, name
        assert ours.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)
        if expected.routed_experts is not None:
            assert torch.equal(ours.routed_experts, expected.routed_experts)


@pytest.mark.parametrize("attention", [None, SPARSE, COMPRESSED], ids=["dense", "scc", "csa"])
def test_speculation_keeps_the_greedy_text(attention):
    model = model_of(attention, **(COMPRESSED_SHAPE if attention is COMPRESSED else {}))
    plain, _ = run(model, requests_of())
    for drafts, slots in ((1, 8), (4, 3)):
        found, engine = run(model, requests_of(), drafts, max_slots=slots)
        assert_same(found, plain)
        done = engine.drafted
        assert done.rounds and 0 < done.kept < done.drafts, done


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.7}, {"top_k": 4}], ids=str)
def test_speculation_keeps_the_text_of_every_seed(dense, changes):
    changes = {"temperature": 0.9, "top_p": 1.0, **changes}
    plain, _ = run(dense, requests_of(**changes))
    found, engine = run(dense, requests_of(**changes), 3)
    assert_same(found, plain)
    assert engine.drafted.kept


def test_speculation_keeps_the_text_when_pages_are_short_and_are_lost(dense):
    plain, _ = run(dense, requests_of())
    found, engine = run(dense, requests_of(), 4, cache_tokens=64, prefix_reuse=False)
    assert {n: c.tokens for n, c in found.items()} == {n: c.tokens for n, c in plain.items()}
    assert sum(c.num_preemptions for c in found.values()) and engine.drafted.kept


def test_pages_that_drafts_have_touched_are_reused_with_what_was_verified(dense):
    """The second prompt is the first one's whole text: its pages must be of the full budget."""
    first = Request("a", [5, 9, 2], SamplingConfig(max_new_tokens=40, temperature=0.0), budget=FULL)
    engine = Engine(
        dense,
        EngineConfig(draft_budget=DRAFT, draft_rounds=3),
        budgets=budgets_of(dense),
        clock=Clock(),
    )
    assert engine.utility is not None and not engine.utility.is_on
    (one,) = engine.run([first])
    again = Request(
        "b",
        first.prompt + one.tokens[:35],
        SamplingConfig(max_new_tokens=5, temperature=0.0),
        budget=FULL,
    )
    (two,) = engine.run([again])
    assert two.num_reused_tokens >= 32 and two.tokens == one.tokens[35:]
    # a plain step and a round took as long, and the round gave more tokens
    assert engine.utility.is_on and "on for 512 steps" in engine.utility.take_line()


def test_speculation_keeps_the_distribution():
    """Chi-square of the first three tokens together against the product of the model's own
    conditional probabilities, over a vocabulary of 4 and 1,500 seeds.
    """
    model, number, length = model_of(vocab_size=4, sharpness=3.0), 1500, 3
    prompt = [1, 2]
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": length, "ignore_end": True}
    requests = [
        Request(str(i), prompt, SamplingConfig(seed=i, **settings), budget=FULL)
        for i in range(number)
    ]
    found, engine = run(model, requests, 2, max_slots=500, prefill_tokens=1000)
    assert engine.drafted.rounds > number / 2
    assert 0.2 < engine.drafted.kept / engine.drafted.drafts < 0.999

    texts = torch.cartesian_prod(*[torch.arange(4)] * length)
    for router, state in zip(model.routers(), budgets_of(model)[FULL], strict=True):
        router.balance_bias.copy_(state.balance_bias)
    with torch.no_grad():
        ids = torch.cat((torch.tensor(prompt).expand(len(texts), 2), texts), 1)
        logs = model.logits(ids)[:, 1:-1].double().log_softmax(-1)
    expected = logs.gather(2, texts.unsqueeze(2)).sum((1, 2)).exp() * number
    places = torch.tensor(
        [sum(t * 4 ** (2 - i) for i, t in enumerate(c.tokens)) for c in found.values()]
    )
    counts = torch.bincount(places, minlength=64).double()
    assert float(expected.sum()) == pytest.approx(number, rel=1e-6)
    usual = expected >= 5
    chi_square = float(((counts - expected)[usual].square() / expected[usual]).sum())
    degrees = int(usual.sum()) - 1
    assert degrees > 10
    # five standard deviations of the chi-square distribution above its mean
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5, (chi_square, degrees)


def test_a_round_that_is_not_faster_is_off_and_looked_at_again_later():
    utility = Utility(rounds=2, budget=1.0, drafts=4)
    kinds = []
    for _ in range(4):
        kinds.append(utility.next())
        utility.told(
            kinds[-1], 3 if kinds[-1] == "round" else 1, 3.0 if kinds[-1] == "round" else 1.0
        )
    assert kinds == ["plain", "round"] * 2
    assert not utility.is_on and utility.value == pytest.approx(1.0)
    line = utility.take_line()
    assert "off for 512 steps: 2 rounds of 4 drafts at budget 1" in line and "utility 1.00" in line
    assert utility.take_line() is None
    for _ in range(PAUSE):
        assert utility.next() == "plain"
        utility.told("plain", 1, 1.0)
    for _ in range(4):
        kind = utility.next()
        utility.told(kind, 3 if kind == "round" else 1, 2.0 if kind == "round" else 1.0)
    assert utility.is_on and utility.value == pytest.approx(1.5) and utility.next() == "round"


def test_a_draft_that_is_no_number_changes_nothing(dense, monkeypatch):
    """What the verifying pass makes of it stands in pages, behind a mask that does not stop NaN."""
    weight = dense.embedding.weight.data
    kept_row = weight[63].clone()
    sampling = SamplingConfig(max_new_tokens=9, temperature=0.0, ignore_end=True)
    request = Request("a", [1, 2, 3], sampling)
    weight[63] = float("nan")

    def draft(sequences):
        for sequence in sequences:
            sequence.tokens.append(63)
            if len(sequence.pages) * 16 < len(sequence.tokens):
                sequence.tokens.pop()
                return [[]]
        return [[63]]

    try:
        plain, _ = run(dense, [request])
        assert plain["a"].finish_reason == "length" and 63 not in plain["a"].tokens
        monkeypatch.setattr(Engine, "_draft", lambda self, sequences: draft(sequences))
        found, engine = run(dense, [request], 1)
    finally:
        weight[63] = kept_row
    assert found["a"].tokens == plain["a"].tokens and found["a"].num_preemptions
    assert engine.drafted.rounds and not engine.drafted.kept


def test_drafts_are_kept_up_to_the_first_that_was_not_drawn():
    assert [kept([1, 2, 3], drawn) for drawn in ([1, 2, 3, 9], [1, 2, 9, 3], [9, 2, 3, 1])] == [
        3,
        2,
        0,
    ]
    assert kept([], [4]) == 0


def test_what_speculation_has_done_is_told(dense, tmp_path, capsys):
    """On stderr of a file's answers, and to Prometheus."""
    pytest.importorskip("prometheus_client")
    from launch.prompts.answering import answer_file
    from launch.prompts.answers import AnswerFile
    from launch.serving.meters import Meters

    settings = EngineConfig(draft_budget=DRAFT, draft_rounds=2)
    engine = Engine(dense, settings, budgets=budgets_of(dense), clock=Clock())
    source, sampling = tmp_path / "in.jsonl", SamplingConfig(max_new_tokens=9, temperature=0.0)
    source.write_text('{"prompt": "a", "budget": 3}\n{"prompt": "b"}\n')

    def to_request(line: PromptLine) -> Request:
        return Request(line.name, [5, line.number], line.sampling, budget=line.budget)

    with AnswerFile(tmp_path / "out.jsonl", {}) as output:
        assert answer_file(engine, source, output, sampling, to_request).answered == 2
    done = engine.drafted
    assert "for 512 steps: 2 rounds of 4 drafts at budget 1 gave" in capsys.readouterr().err
    meters = Meters()
    meters.watch(SimpleNamespace(engine=engine, num_running=0, num_waiting=0))
    text = meters.text().decode()
    assert f"loadstone_spec_decode_num_draft_tokens {float(done.drafts)}" in text
    assert f"loadstone_spec_decode_num_accepted_tokens {float(done.kept)}" in text
    assert f"loadstone_speculation_utility {engine.utility.value}" in text and done.drafts


def test_settings_that_speculation_contradicts_are_refused_before_anything_is_read(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("{}")
    files = {"input": str(source), "output": str(tmp_path / "out.jsonl")}
    drafting = EngineConfig(draft_budget=DRAFT)
    for told, settings in {
        "drop it, or drop path": GenerateConfig(path="DIR", engine=drafting, **files),
        "give input=FILE output=FILE": GenerateConfig(run="RUN", prompt="a", engine=drafting),
        "drafting is of one process": GenerateConfig(
            run="RUN", engine=drafting, launch=DevicesConfig(num_devices=2), **files
        ),
        "serve.budget=auto holds a latency": ServeConfig(
            run="RUN", engine=drafting, serve=EndpointConfig(budget="auto", latency="x")
        ),
        "engine.draft_tokens is 0": ServeConfig(run="RUN", engine=EngineConfig(draft_tokens=0)),
    }.items():
        assert any(told in problem for problem in settings.problems()), (told, settings.problems())
    assert not GenerateConfig(run="RUN", engine=drafting, **files).problems()


def test_speculation_that_cannot_be_is_refused(dense):
    for budgets in (None, {FULL: budgets_of(dense)[FULL]}):
        with pytest.raises(ValueError, match=r"draft_budget is 1, which is none of the saved"):
            Engine(dense, EngineConfig(draft_budget=DRAFT), budgets=budgets)
    with pytest.raises(ValueError, match="draft_budget is -1; it must be positive"):
        Engine(dense, EngineConfig(draft_budget=-1.0), budgets=budgets_of(dense))
