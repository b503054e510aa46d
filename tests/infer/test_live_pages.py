"""Pages that keep pooled entries alone, once no request reads their tokens' own keys any more: the
same texts with a fraction of the room.
"""

from __future__ import annotations

import pytest
import torch
from common import COMPRESSED, COMPRESSED_SHAPE, build, tiny_config

import infer.engine as engines
from infer.config import EngineConfig
from infer.engine import Engine
from infer.pages import Places
from infer.request import Request
from model.config import BalanceConfig
from model.generate import generate
from model.paging import live_window
from tests.infer.poisoned import prompt, request, texts

LENGTH, PAGE = 64, 5
"""Of the model; tokens of a page, as many as the longest entry has."""
SETTINGS = EngineConfig(max_slots=2, prefill_tokens=10, cache_tokens=4 * LENGTH)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(engines, "USUAL_PAGE", PAGE)


@pytest.fixture(scope="module")
def model():
    kinds = {"layer_kinds": ("csa", "hca", "window")}
    model = build(tiny_config(**COMPRESSED_SHAPE), BalanceConfig(), attention=COMPRESSED | kinds)
    with torch.no_grad():
        model.head.weight *= 10  # far from uniform, so that texts differ
    return model


def poison(engine: Engine) -> None:
    """What has no room any more is nobody's: let it be no number."""
    assert engine.places is not None
    used = {0, *engine.places.place.values()}
    unused = [i for i in range(engine.live.num_places) if i not in used]
    for pages in engine.pages:
        for of_tokens in (pages.kv, pages.rows):
            of_tokens[unused] = torch.nan


def run(engine: Engine, given: list[Request]) -> dict[str, list[int]]:
    """Texts, with rooms that are nobody's full of NaN before every step."""
    found = texts(engine, given, poison)
    assert not engine.places.readers
    return found


def expected(model, given: list[Request]) -> dict[str, list[int]]:
    """By the plain loop, which knows no pages."""
    return {
        r.name: list(generate(model, r.prompt, r.sampling.max_new_tokens, temperature=0))
        for r in given
    }


def test_long_texts_need_the_room_of_their_last_tokens(model):
    """Prompts in pieces, beside each other, decoded to the end of the model: two requests hold 26
    pages, of which at most 12 have room for tokens.
    """
    given = [
        request("short", prompt(3), 60),
        request("long", prompt(47, 1), 16),
        request("whole", prompt(9, 2), 54),
    ]
    engine = Engine(model, SETTINGS)
    assert live_window(model) == max(4 - 1, 2 * 5 - 1) and engine.page_size == PAGE
    assert engine.live.num_places == 13 < engine.pool.num_pages == 53
    assert all(len(p.kv) == len(p.rows) == 13 and len(p.entries) == 53 for p in engine.pages)
    assert run(engine, given) == expected(model, given)


def test_a_room_that_is_given_up_too_early_shows(model, monkeypatch):
    """A planted mistake: only the page that is being filled is read."""
    monkeypatch.setattr(Engine, "_first_live", lambda self, held: held // PAGE)
    given = [request("a", prompt(12), 40)]
    assert run(Engine(model, SETTINGS), given) != expected(model, given)


def test_a_beginning_is_shared_as_far_as_its_last_tokens_have_room(model):
    """What follows a shared beginning reads its last tokens' own keys. As long as nobody needs
    their room they stay; then an earlier beginning is shared, or none.
    """
    beginning = prompt(30)
    follow = [request(str(i), [*beginning, i], 5) for i in range(4)]
    engine = Engine(model, SETTINGS)
    texts = expected(model, follow)

    for one in follow[:2]:
        assert run(engine, [one]) == {one.name: texts[one.name]}
    engine.add(follow[2])
    engine.step()
    assert engine.running[0].result.num_reused_tokens == 30
    assert run(engine, []) == {"2": texts["2"]}

    # Others take all rooms: the beginning's pages are found, and are of no use.
    others = [request(f"other {i}", prompt(40, 10 + i), 20) for i in range(4)]
    assert run(engine, others) == expected(model, others)
    assert engine._known_pages(engines.Sequence(follow[3], 0.0))[0] == []
    assert run(engine, [follow[3]]) == {"3": texts["3"]}


def test_requests_that_lose_their_pages_begin_again(model):
    given = [request(str(i), prompt(20 + i, i), 30) for i in range(4)]
    engine = Engine(model, EngineConfig(max_slots=3, prefill_tokens=10, cache_tokens=100))
    found = {c.name: c for c in engine.run(given)}
    assert {name: c.tokens for name, c in found.items()} == expected(model, given)
    assert sum(c.num_preemptions for c in found.values()) and not engine.places.readers


def test_rooms_go_to_readers_and_idle_ones_to_whoever_needs_them():
    places = Places(4)
    for page in (10, 11, 12):
        places.enter(page)
    assert places.take_changed() == {10: 1, 11: 2, 12: 3} and not places.take_changed()
    with pytest.raises(IndexError):
        places.enter(13)

    places.enter(11)
    places.leave(11, stays=True)  # one of two readers
    with pytest.raises(IndexError):
        places.enter(13)
    places.leave(12, stays=True)
    places.leave(10, stays=True)
    places.enter(12)  # it was there still
    assert not places.changed
    places.enter(13)
    assert places.place == {11: 2, 12: 3, 13: 1} and places.take_changed() == {10: 0, 13: 1}
    places.leave(13, stays=False)
    assert 13 not in places.place and places.take_changed() == {13: 0}
    places.drop(99)  # has none
