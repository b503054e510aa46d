"""launch.plan parallel=auto: what the search finds is possible, is what a plan of its own says, and
nothing possible is faster.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex

import pytest

from launch import plan
from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job.memory import planned_exchange, planned_memory, planned_stages
from launch.layouts.devices import LINKS, cluster_of
from launch.layouts.estimate import estimated
from launch.layouts.page import command_line
from launch.layouts.search import layouts, search, under
from model.cost.parameters import flops_per_token
from tests.composing import composed
from tests.pairwise import some_daily
from train.config.run import RunConfig

pytestmark = [pytest.mark.slow]  # seconds of a core

LARGE = ("experiment=qwen3_30b_a3b", "model.loss_chunk_size=4096")
SMALL = ("model.num_kv_heads=2", "train.global_batch_size=16", "train.micro_batch_size=1")
H100, H200 = cluster_of("H100", 0.4), cluster_of("H200", 0.4)


def run_of(*overrides: str, world_size: int = 1) -> RunConfig:
    return parse(plain(composed(*overrides)), world_size)


def asked(*overrides: str) -> None:
    plan.main(composed(*overrides, command="plan"))


@pytest.fixture(scope="module")
def large() -> RunConfig:
    return run_of(*LARGE)


def test_the_command_of_a_layout_plans_to_what_the_search_says(large):
    found = search(large, 64, H100)
    assert len(found.best) == 5 and found.nearest is None
    for estimate in found.best:
        words = shlex.split(command_line(estimate, [*LARGE, "++world=64", "parallel=auto"]))
        assert words[:3] == ["python", "-m", "launch.train"]
        run = run_of(*(word.replace("=HOSTS", "=/etc/hosts") for word in words[3:]), world_size=64)
        assert run.launch.num_devices * run.launch.num_nodes == 64
        assert planned_memory(run, 64) == estimate.memory
        assert planned_exchange(run, 64) == planned_exchange(estimate.run, 64)


@pytest.mark.parametrize("world_size", some_daily([4, 8, 1], 3))
def test_the_layouts_are_those_that_contradict_nothing_and_the_first_is_the_fastest(world_size):
    run = run_of(*SMALL)
    sizes = [2**i for i in range(5)]
    possible = {}
    # two key/value heads: more ranks can share a row where some of them gather
    shared = [(1, 1), (2, 1), (4, 2), (8, 4)]
    for pipeline, (context, gather), tensor, expert, stage, recompute, rows in itertools.product(
        sizes[:3], shared, sizes[:2], sizes, range(4), ("none", "block"), sizes
    ):
        overrides = (
            f"parallel.pipeline_parallel_size={pipeline}",
            f"parallel.context_parallel_size={context}",
            f"parallel.context_gather_size={gather}",
            f"parallel.tensor_parallel_size={tensor}",
            f"parallel.expert_parallel_size={expert}",
            f"deepspeed.zero_optimization.stage={stage}",
            f"model.recompute={recompute}",
        )
        place = (pipeline, context, gather, tensor, expert, stage, recompute, rows)
        one = under(run, *place)
        ranks = world_size // pipeline
        if world_size % pipeline or (pipeline > 1 and stage == 3):
            continue
        parts = context * tensor
        if ranks % parts or ranks % expert or 2 % (parts // gather) or 8 % expert:
            continue
        if 16 % (rows * (ranks // parts)) == 0:
            possible[place] = estimated(one, world_size, H100)
            if rows == 1 and stage == 1:  # the whole of the checks agrees
                many = ("launch=deepspeed", f"launch.num_devices={world_size}")
                more = many if world_size > 1 else ()
                assert run_of(*SMALL, *overrides, *more, world_size=world_size)
    found = [
        (
            r.parallel.pipeline_parallel_size,
            r.parallel.context_parallel_size,
            r.parallel.context_gather_size,
            r.parallel.tensor_parallel_size,
            r.parallel.expert_parallel_size,
            r.zero_stage,
            r.model.recompute,
            r.train.micro_batch_size,
        )
        for r in layouts(run, world_size)
    ]
    assert len(found) == len(set(found)) and set(found) == set(possible)
    best = search(run, world_size, H100).best
    seconds = [estimate.step_seconds for estimate in best]
    assert seconds == sorted(seconds)
    assert seconds[0] == min(e.step_seconds for e in possible.values() if e.fits)


def test_the_time_is_bytes_over_links_and_flops_over_rates(large):
    run = under(large, 1, 4, 1, 1, 16, 1, "block", 1)
    found = estimated(run, 64, H100).seconds
    sent = planned_exchange(run, 64)
    tokens = run.train.global_batch_size * run.train.seq_len
    flops = flops_per_token(run.model, 8.0, run.train.seq_len) * tokens * 4 / 3
    assert found["compute"] == pytest.approx(flops / (64 * 989.4e12 * 0.4))
    # Four ranks of a node; then 7 of 15 peers on it, and 8 on the other node.
    assert found["heads"] == pytest.approx(sent.heads / 450e9 / LINKS)
    assert found["rows"] == pytest.approx(sent.rows / LINKS * (7 / 15 / 450e9 + 8 / 15 / 50e9))
    # All ranks leave a node by eight cards; replicas of an expert lie one on every second node.
    assert found["gradients"] == pytest.approx(
        sent.dense_gradients / LINKS / 400e9 + sent.expert_gradients / LINKS / 50e9
    )


def test_a_pipeline_takes_its_slowest_stage_and_once_a_micro_batch_of_the_others(large):
    run = under(large, 4, 1, 1, 1, 8, 1, "none", 1)
    found, stages = estimated(run, 64, H100).seconds, planned_stages(run, 64)
    num_micro = run.train.global_batch_size // 16
    tokens = run.train.global_batch_size * run.train.seq_len
    flops = [stage.flops * tokens / (16 * 989.4e12 * 0.4) for stage in stages]
    sent = [stage.exchange for stage in stages]
    # Rows travel within a node; hidden states and gradients go from node to node.
    whole = [
        f + s.rows / LINKS / 450e9 + s.stages / LINKS / 50e9
        for f, s in zip(flops, sent, strict=True)
    ]
    slowest = whole.index(max(whole))
    assert found["compute"] == pytest.approx(flops[slowest])
    assert found["stages"] == pytest.approx(sent[slowest].stages / LINKS / 50e9)
    assert found["bubble"] == pytest.approx((sum(whole) - max(whole)) / num_micro)
    assert sum(stage.flops for stage in stages) == pytest.approx(
        flops_per_token(run.model, 8.0, run.train.seq_len)
    )


def test_virtual_stages_divide_the_waiting_and_multiply_what_travels(large):
    run = under(large, 4, 1, 1, 1, 8, 1, "none", 1)
    split = dataclasses.replace(run.parallel, pipeline_split=(12,) * 4)
    laps = dataclasses.replace(split, virtual_stages=2, pipeline_split=(6,) * 8)
    plain, twice = (
        estimated(dataclasses.replace(run, parallel=parallel), 64, H100).seconds
        for parallel in (split, laps)
    )
    # The slowest is the last, with the head: it sends gradients back, of two runs of layers both
    # ways between them as well.
    assert twice["stages"] == pytest.approx(3 * plain["stages"])
    assert twice["compute"] == pytest.approx(plain["compute"])
    assert twice["bubble"] == pytest.approx(plain["bubble"] / 2, rel=0.1)


def test_virtual_stages_are_found_where_stages_wait_most():
    """Of few micro-batches, where the layers can be cut so finely."""
    few = ("model.num_layers=64", "train.global_batch_size=8", "train.seq_len=4096")
    found = search(run_of(*LARGE, *few), 8, H200)
    pipelines = [e for e in found.best if e.run.parallel.pipeline_parallel_size > 1]
    assert any(e.run.parallel.virtual_stages > 1 for e in pipelines)
    for estimate in pipelines:
        if estimate.run.parallel.virtual_stages > 1:
            one = dataclasses.replace(estimate.run.parallel, virtual_stages=1)
            alone = estimated(dataclasses.replace(estimate.run, parallel=one), 8, H200)
            assert estimate.step_seconds < alone.step_seconds
            words = shlex.split(command_line(estimate, [*LARGE, *few]))
            assert f"parallel.virtual_stages={estimate.run.parallel.virtual_stages}" in words


def test_a_published_layout_comes_first(large):
    """Megatron-Bridge's table has Qwen3-30B-A3B under expert parallelism of 8 on H100 nodes, or in
    stages that are interleaved.
    """
    one_stage = (c for c in layouts(large, 64) if c.parallel.pipeline_parallel_size == 1)
    fitting = [e for e in (estimated(c, 64, H100) for c in one_stage) if e.fits]
    first = min(fitting, key=lambda e: e.step_seconds).run
    assert first.parallel.expert_parallel_size == 8 and first.zero_stage == 1
    assert first.parallel.parts_size == 1


def test_more_memory_is_never_slower_and_long_rows_want_to_be_shared(large):
    seconds = {
        name: search(large, 16, device).best[0].step_seconds
        for name, device in (("h100", H100), ("h200", H200))
    }
    assert seconds["h200"] <= seconds["h100"]
    million = (
        "model.max_seq_len=1048576",
        "train.seq_len=1048576",
        "train.global_batch_size=16",
        "attention=scc",
    )
    found = search(run_of(*LARGE, *million), 64, H200)
    assert found.best
    # by the four heads of attention, or over more ranks that gather
    assert all(e.run.parallel.parts_size >= 4 for e in found.best)
    assert found.best[0].run.parallel.context_parallel_size >= 4


def test_where_nothing_fits_the_nearest_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        asked("experiment=deepseek_v3", "parallel=auto", "world=16", "device=h100")
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "0 fit" in out and "none fits; the least memory takes" in out


def test_a_search_prints_five_layouts_with_their_parts_and_commands(capsys):
    asked(*LARGE, "parallel=auto", "world=64", "device=h100")
    lines = capsys.readouterr().out.splitlines()
    data = json.loads(lines[-1])
    assert [line[:2] for line in lines if line[0].isdigit()][1:] == ["1.", "2.", "3.", "4.", "5."]
    assert len(data["layouts"]) == 5
    for layout in data["layouts"]:
        assert sum(layout["seconds"].values()) == pytest.approx(layout["step_seconds"])
        parts = {k: v for k, v in layout["memory_bytes"].items() if k != "total"}
        assert sum(parts.values()) == layout["memory_bytes"]["total"]
        assert layout["command"] in "\n".join(lines)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("world=64",),
            "give parallel=auto and device=H100 (or another) as well, or leave world=64 out",
        ),
        (
            ("parallel=auto",),
            "give world=N and device=H100 (or another) as well, or leave parallel=auto out",
        ),
        (
            ("parallel=auto", "world=8"),
            "together: give device=H100 (or another) as well",
        ),
        (("parallel=auto", "world=8", "device=L40S"), "of whose links nothing is known"),
        (("parallel=auto", "world=12", "device=h100"), "above 8 whole nodes of 8"),
        (("parallel=auto", "world=8", "device=v100"), "device is 'v100'; choose one of"),
        (("parallel=auto", "world=8", "device=h100", "resume=RUN"), "searched for a new run"),
    ],
)
def test_half_a_search_is_refused(overrides, words):
    with pytest.raises(ConfigError) as error:
        asked(*overrides)
    assert words in str(error.value)


def test_training_does_not_search():
    with pytest.raises(ConfigError, match="leaves sizes to a search"):
        run_of("parallel=auto")


def test_a_mistake_in_the_settings_is_told_before_anything_is_searched(capsys):
    with pytest.raises(ConfigError, match=r"optim\.lr is -1"):
        asked("parallel=auto", "world=8", "device=h100", "optim.lr=-1")
    assert not capsys.readouterr().out
