"""Placement: the record, its file, and the plan made from loads."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from model.placement.planner import (
    TOLERANCE,
    copy_shares,
    imbalance,
    node_crossings,
    plan_layer,
    rank_loads,
)
from model.placement.record import LayerPlacement, Placement

ROOT = Path(__file__).resolve().parent.parent.parent
LAYER = LayerPlacement((2, 0, 3, 1), ((1,), (2,)))
"""Rank 0 owns 2 and 0 and borrows 1; rank 1 owns 3 and 1 and borrows 2."""


# --- the record and its file ----------------------------------------------------------------------


def test_a_layer_knows_who_owns_and_who_serves():
    assert [LAYER.owner(e) for e in range(4)] == [0, 1, 0, 1]
    assert [LAYER.ranks_of(e) for e in range(4)] == [(0,), (1, 0), (0, 1), (1,)]
    assert LayerPlacement.identity(6, 3) == LayerPlacement((0, 1, 2, 3, 4, 5), ((), (), ()))
    with pytest.raises(
        ValueError, match="num_experts 6 is not divisible by expert_parallel_size 4"
    ):
        LayerPlacement.identity(6, 4)


def test_a_saved_placement_comes_back(tmp_path):
    placement = Placement(2, (LAYER, LayerPlacement((0, 1, 2, 3), ((3,), (0,)))))
    placement.save(tmp_path / "p.json")
    assert Placement.load(tmp_path / "p.json") == placement
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    assert placement.problems(4, 2, 2) == []


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    Placement(2, (LAYER,)).save(path)
    before = path.read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Placement(2, ()).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 1, 4), "for expert_parallel_size 2, but parallel.expert_parallel_size is 4"),
        ((4, 3, 2), "has 1 layers, but the model has 3"),
        ((8, 1, 2), "places 4 experts, but model.num_experts is 8"),
    ],
)
def test_a_placement_of_another_run_is_told_what_differs(sizes, words):
    (problem,) = Placement(2, (LAYER,)).problems(*sizes)
    assert words in problem and f"launch.place run=DIR expert_parallel_size={sizes[2]}" in problem


@pytest.mark.parametrize(
    ("experts", "replicas", "words"),
    [
        ((0, 1, 2, 2), ((), ()), "no owner for expert 3"),
        ((0, 1, 2, 4), ((), ()), "places expert 4"),
        ((0, 1, 2, -1), ((), ()), "places expert -1"),
        ((0, 1, 2, 3), ((2,), ()), "0 experts to rank 1 but 1 to rank 0"),
        ((0, 1, 2, 3), ((1,), (0,)), "lends expert 1 to rank 0, which owns it"),
        ((0, 1, 2, 3), ((2, 2), (0, 1)), "twice"),
        ((0, 1, 2, 3), ((2,), (9,)), "lends expert 9 to rank 1"),
        ((0, 1, 2, 3), ((),), "is for 1 ranks, not 2"),
        ((0, 1, 2), ((), ()), "cannot be shared out evenly"),
        ((), ((), ()), "cannot be shared out evenly"),
    ],
)
def test_contradictions_within_a_layer_have_a_sentence_and_do_not_load(
    tmp_path, experts, replicas, words
):
    placement = Placement(2, (LAYER, LayerPlacement(experts, replicas)))
    if len(experts) == 4:
        (problem,) = placement.problems(4, 2, 2)
        assert words in problem and "MoE layer 1" in problem
    placement.save(tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"p\.json is damaged: MoE layer 1") as error:
        Placement.load(tmp_path / "p.json")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "holds no JSON"),
        ("\x00\xff", "holds no JSON"),
        ("[1, 2]", "no placement"),
        ("{}", "no placement"),
        ("[" * 100_000, "no JSON"),
        ('{"format": 2}', "format '2'"),
        ('{"format": true}', "format 'True'"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "expert_parallel_size": 2, "layers": [{}]}', "damaged"),
        ('{"format": 1, "expert_parallel_size": true, "layers": []}', "damaged"),
        (
            '{"format": 1, "expert_parallel_size": 1, "layers": [{"experts": [0.0], "replicas": '
            "[[]]}]}",
            "damaged",
        ),
        (
            '{"format": 1, "expert_parallel_size": 1, "layers": [{"experts": [false], "replicas": '
            "[[]]}]}",
            "damaged",
        ),
        ('{"format": 1, "expert_parallel_size": 1e999, "layers": []}', "damaged"),
        ("9" * 10_000, "no JSON"),
    ],
)
def test_a_foreign_file_gets_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        Placement.load(tmp_path / "p.json")
    assert (
        words in str(error.value) and "p.json" in str(error.value) and "\n" not in str(error.value)
    )
    with pytest.raises(ValueError, match="cannot be read"):
        Placement.load(tmp_path)


def test_damaged_files_either_load_whole_or_raise_one_line(tmp_path):
    """Bytes cut, flipped, inserted; values replaced anywhere in the tree."""
    path, random_ = tmp_path / "p.json", random.Random(0)
    Placement(2, (LAYER, LayerPlacement.identity(4, 2))).save(path)
    good = path.read_bytes()

    def mutate_tree(node):
        if random_.random() < 0.15:
            return random_.choice(
                [None, True, -1, 3, 2.5, "x", [], {}, [[0]], 10**30, float("nan")]
            )
        if isinstance(node, dict):
            return {k: mutate_tree(v) for k, v in node.items() if random_.random() > 0.05}
        return [mutate_tree(v) for v in node] if isinstance(node, list) else node

    loaded = 0
    for attempt in range(800):
        data = bytearray(good)
        if attempt % 2:
            data = bytearray(json.dumps(mutate_tree(json.loads(good))).encode())
        else:
            at = random_.randrange(len(data))
            data[at : at + random_.choice([0, 1, 5, 1000])] = random_.randbytes(
                random_.choice([0, 1, 3])
            )
        path.write_bytes(data)
        try:
            placement = Placement.load(path)
        except ValueError as error:
            assert "p.json" in str(error) and "\n" not in str(error)
        else:
            loaded += 1
            assert all(layer.problem() is None for layer in placement.layers)
            placement.problems(4, 2, 2)
    assert 10 < loaded < 400


def test_the_record_needs_no_torch():
    code = "import sys, model.placement, model.placement.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- what a placement costs -----------------------------------------------------------------------


def test_a_copy_has_its_share_of_the_load():
    assert rank_loads([10, 4, 6, 1], LAYER).tolist() == [10 + 2 + 3, 2 + 3 + 1]
    assert imbalance([10, 4, 6, 1], LAYER) == pytest.approx(15 / 10.5)
    assert imbalance([0, 0, 0, 0], LAYER) == 1.0
    # Two intervals, each busy elsewhere: their sum is level, but each waits for its busiest rank.
    in_order = LayerPlacement.identity(2, 2)
    assert imbalance([3, 3], in_order) == 1.0 and imbalance([[3, 0], [0, 3]], in_order) == 2.0


def test_crossings_are_the_share_of_pairs_on_two_nodes():
    pairs = np.zeros((4, 4))
    pairs[0, 1] = pairs[1, 0] = 3
    pairs[0, 2] = pairs[2, 0] = 1
    np.fill_diagonal(pairs, 50)
    assert node_crossings(pairs, LayerPlacement.identity(4, 4), 2) == pytest.approx(1 / 4)
    assert node_crossings(pairs, LayerPlacement.identity(4, 4), 1) == 1
    assert node_crossings(pairs, LayerPlacement.identity(4, 4), 4) == 0
    assert node_crossings(np.zeros((4, 4)), LayerPlacement.identity(4, 4), 2) == 0
    # 0 is on node 0 only, 1 on both by halves, 2 likewise.
    assert node_crossings(pairs, LAYER, 1) == pytest.approx(1 / 2)


# --- the plan -------------------------------------------------------------------------------------


def case(seed: int) -> tuple[np.ndarray, int, int, int, np.ndarray]:
    """loads, ranks, ranks per node, replicas, together: anything that is allowed."""
    g = np.random.default_rng(seed)
    per_node, nodes, own = int(g.integers(1, 5)), int(g.integers(1, 5)), int(g.integers(1, 7))
    ranks = per_node * nodes
    experts = ranks * own
    replicas = int(g.integers(0, min(4, experts - own) + 1))
    kind = seed % 5
    loads = [
        g.integers(0, 100, experts),
        np.zeros(experts),
        np.ones(experts),
        g.lognormal(0, 2, experts),
        g.permutation(1000 // np.arange(1, experts + 1)),
    ][kind]
    pairs = g.poisson(3, (experts, experts)) * g.integers(0, 2, (experts, experts))
    return loads, ranks, per_node, replicas, pairs


@pytest.mark.parametrize("start", range(0, 240, 60))
def test_any_plan_is_a_placement(start):
    """A permutation, L experts and the same number of replicas on every rank, none of them owned or
    twice there.
    """
    for seed in range(start, start + 60):
        loads, ranks, per_node, replicas, pairs = case(seed)
        for options in ({}, {"ranks_per_node": per_node, "together": pairs}):
            layer = plan_layer(loads, ranks, replicas_per_rank=replicas, **options)
            assert layer.problem() is None, (seed, layer.problem())
            assert {len(lent) for lent in layer.replicas} == {replicas if ranks > 1 else 0}
            assert sorted(layer.experts) == list(range(len(loads)))
            assert Placement(ranks, (layer,)).problems(len(loads), 1, ranks) == []
            assert rank_loads(loads, layer).sum() == pytest.approx(np.sum(loads))
            assert layer == plan_layer(
                loads.tolist(), ranks, replicas_per_rank=replicas, **options
            ), seed


@pytest.mark.parametrize("start", range(0, 240, 60))
def test_without_replicas_no_rank_is_busier_than_with_experts_in_order(start):
    for seed in range(start, start + 60):
        loads, ranks, per_node, _, pairs = case(seed)
        in_order = rank_loads(loads, LayerPlacement.identity(len(loads), ranks)).max()
        for options in ({}, {"ranks_per_node": per_node, "together": pairs}):
            assert rank_loads(loads, plan_layer(loads, ranks, **options)).max() <= in_order, seed


def test_replicas_that_must_be_placed_can_cost_a_little():
    """Experts in order are perfect here, and every way to fill a slot per rank leaves one rank with
    more: replicas split a load evenly. So the promise above is one without replicas.
    """
    loads = [1, 9, 2, 8]
    assert imbalance(loads, LayerPlacement.identity(4, 2)) == 1
    every = [
        LayerPlacement(order, ((lent0,), (lent1,)))
        for order in itertools.permutations(range(4))
        for lent0 in order[2:]
        for lent1 in order[:2]
    ]
    best = min(imbalance(loads, layer) for layer in every)
    assert (
        best == pytest.approx(1.05) == imbalance(loads, plan_layer(loads, 2, replicas_per_rank=1))
    )


@pytest.mark.parametrize(
    ("loads", "ranks"),
    [
        ([4, 3, 2, 1], 2),
        ([1, 2, 3, 4, 5, 6], 3),
        ([10, 10, 10, 1, 1, 1], 3),
        ([9, 1, 1, 1, 5, 7], 2),
        ([5, 0, 0, 0], 2),
        ([8, 7, 6, 5, 4, 3, 2, 1], 4),
        ([1, 1, 1, 1], 4),
        ([13, 11, 7, 5, 3, 2], 3),
    ],
)
def test_small_plans_are_optimal(loads, ranks):
    own = len(loads) // ranks
    best = min(
        max(sum(loads[e] for e in order[r * own : (r + 1) * own]) for r in range(ranks))
        for order in itertools.permutations(range(len(loads)))
    )
    assert rank_loads(loads, plan_layer(loads, ranks)).max() == best


def test_random_small_plans_are_near_optimal():
    g, ratios = np.random.default_rng(0), []
    splits = [
        c for c in itertools.permutations(range(6)) if c[0] < c[1] and c[2] < c[3] and c[4] < c[5]
    ]
    for _ in range(200):
        loads = g.integers(0, 100, 6).astype(float)
        best = min(max(loads[list(s[i : i + 2])].sum() for i in (0, 2, 4)) for s in splits)
        ratios.append(rank_loads(loads, plan_layer(loads, 3)).max() / best)
    assert np.mean(ratios) < 1.005 and max(ratios) < 1.2


def test_a_level_layer_stays_as_it_is():
    assert plan_layer([7] * 16, 4) == LayerPlacement.identity(16, 4)
    assert plan_layer([7] * 16, 1, replicas_per_rank=0) == LayerPlacement.identity(16, 1)


def test_a_hot_expert_is_split():
    """With half of all load, no rank of 8 could come below four times the mean; replicas bring all
    to it.
    """
    loads = np.ones(32)
    loads[5] = 31
    assert imbalance(loads, plan_layer(loads, 8)) == pytest.approx((31 + 3) / (62 / 8))
    layer = plan_layer(loads, 8, replicas_per_rank=1)
    assert len(layer.ranks_of(5)) >= 4
    assert imbalance(loads, layer) < 1.1


def test_an_expert_is_never_twice_on_a_rank_even_if_it_has_all_the_load():
    layer = plan_layer([0, 0, 0, 100, 0, 0, 0, 0], 4, replicas_per_rank=2)
    assert (
        layer.problem() is None
        and layer.ranks_of(3)[0] == layer.owner(3)
        and len(layer.ranks_of(3)) == 4
    )
    assert rank_loads([0, 0, 0, 100, 0, 0, 0, 0], layer).tolist() == [25] * 4


def test_as_many_replicas_as_possible_put_every_expert_everywhere():
    loads = np.arange(8)
    layer = plan_layer(loads, 4, replicas_per_rank=6)
    assert layer.problem() is None and (copy_shares(layer) == 1 / 4).all()
    assert imbalance(loads, layer) == 1


def test_more_replicas_level_a_skewed_layer():
    loads = np.random.default_rng(1).permutation(1e6 / np.arange(1, 65))
    by_replicas = [imbalance(loads, plan_layer(loads, 8, replicas_per_rank=r)) for r in (0, 1, 2)]
    assert by_replicas[0] > 1.5 and by_replicas[1] < 1.01 and by_replicas[2] < 1.01


def planted(
    experts: int, nodes: int, spread: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """loads, together and the block of each expert: experts of one block meet eleven times as often
    as others.
    """
    g = np.random.default_rng(seed)
    block = g.permutation(np.arange(experts) % nodes)
    loads = (1000 * g.lognormal(0, spread, experts)).round()
    return loads, g.poisson(2 + 20 * (block[:, None] == block)), block


@pytest.mark.parametrize(
    ("experts", "ranks", "per_node", "replicas"),
    [(64, 8, 2, 0), (64, 16, 4, 0), (64, 8, 4, 1), (128, 8, 2, 2)],
)
def test_experts_that_meet_come_onto_one_node(experts, ranks, per_node, replicas):
    # the planted nodes are uneven by 1 to 3%
    loads, pairs, block = planted(experts, ranks // per_node, 0.1)
    alone = plan_layer(loads, ranks, replicas_per_rank=replicas)
    both = plan_layer(
        loads, ranks, replicas_per_rank=replicas, ranks_per_node=per_node, together=pairs
    )
    assert imbalance(loads, both) <= imbalance(loads, alone) * (1 + TOLERANCE)
    off = pairs * ~np.eye(experts, dtype=bool)
    ideal = off[block[:, None] != block].sum() / off.sum()
    before, after = (node_crossings(pairs, layer, per_node) for layer in (alone, both))
    assert after < ideal + 0.3 * (before - ideal)


def test_planted_nodes_are_found_where_loads_are_level():
    loads, pairs, block = planted(64, 4, 0)
    layer = plan_layer(loads, 8, ranks_per_node=2, together=pairs)
    assert {
        len({int(block[e]) for e in layer.experts[n * 16 : (n + 1) * 16]}) for n in range(4)
    } == {1}
    assert imbalance(loads, layer) == 1


def test_no_swap_for_pairs_that_say_nothing():
    loads, _, _ = planted(32, 2, 0.3)
    level = plan_layer(loads, 8)
    for pairs in (np.zeros((32, 32)), np.ones((32, 32)), 100 * np.eye(32)):
        assert plan_layer(loads, 8, ranks_per_node=4, together=pairs) == level
    loads, pairs, _ = planted(32, 2, 0.3)
    assert (
        plan_layer(loads, 8, ranks_per_node=8, together=pairs)
        == plan_layer(loads, 8, together=pairs)
        == level
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(loads=[1] * 6, num_ranks=4), "num_experts 6 is not divisible"),
        (dict(loads=[1] * 6, num_ranks=0), "not divisible"),
        (dict(loads=[1, -1], num_ranks=2), "none negative"),
        (dict(loads=[1, float("nan")], num_ranks=2), "finite"),
        (
            dict(loads=[1] * 8, num_ranks=4, ranks_per_node=3),
            "ranks_per_node 3 does not divide expert_parallel_size 4",
        ),
        (dict(loads=[1] * 8, num_ranks=4, replicas_per_rank=7), "from 0 to 6"),
        (dict(loads=[1] * 8, num_ranks=4, replicas_per_rank=-1), "from 0 to 6"),
        (dict(loads=[1] * 4, num_ranks=2, together=[[1]]), "must be \\[4, 4\\]"),
    ],
)
def test_arguments_that_make_no_sense_get_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        plan_layer(**arguments)


def test_a_large_layer_takes_about_a_second():
    loads, pairs, _ = planted(256, 8, 1.0)
    start = time.perf_counter()
    plan_layer(loads, 64, ranks_per_node=8, replicas_per_rank=2, together=pairs)
    assert time.perf_counter() - start < 3  # 0.1 s on an idle core
