"""Measuring generation: definitions, intervals that hold what they promise, and costs against a
model that is counted part by part.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from infer.budget import capture
from launch.benchmarking.energy import Counter, EnergyMeter, _of_nvml, _of_packages
from launch.benchmarking.kpi import (
    RequestTimes,
    median,
    median_interval,
    quantile,
    ratio_of,
    speed_of,
)
from launch.benchmarking.measure import Bench, Cell, Variant, cells_of
from launch.benchmarking.rates import Rates
from launch.benchmarking.table import entry, lines
from launch.config.build import ConfigError, record
from launch.config.options import attention_named
from launch.process.identity import ROOT
from model.config import BalanceConfig
from model.cost.parameters import decode_cost, flops_per_token, prefill_flops
from model.moe.experts import Experts
from model.paging import new_pages
from train.config.commands.benchmark import BenchmarkConfig, SloConfig
from train.config.commands.generate import GenerateConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
from common import VOCAB_SIZE, build, tiny_config

# --- what times say -------------------------------------------------------------------------------


def test_times_are_those_of_the_definitions():
    request = RequestTimes(10.0, (10.5, 10.6, 10.9))
    assert request.first == pytest.approx(0.5)
    assert request.between == pytest.approx([0.1, 0.3]) and request.per_token == pytest.approx(0.2)
    speed = speed_of([request, RequestTimes(10.0, (11.0, 12.0))], 30, 0.6, 0.5)
    assert speed.tokens_per_second == pytest.approx(5 / 2)
    assert speed.total_tokens_per_second == pytest.approx(35 / 2)
    assert speed.goodput == pytest.approx(1 / 2), "the second is too late, and too slow"
    assert (speed.ttft_p50, speed.ttft_p99) == pytest.approx((0.5, 1.0))
    assert speed.itl_p50 == pytest.approx(0.3)


def test_goodput_counts_aborted():
    """One that was given up has missed: leaving late requests out would raise the figure."""
    good = [RequestTimes(0.0, (0.1, 0.2)) for _ in range(3)]
    assert speed_of([*good, RequestTimes(0.0, ())], 4, 1.0, 1.0).goodput == pytest.approx(3 / 0.2)
    assert speed_of([RequestTimes(0.0, (0.1,))], 1, 1.0, 1.0).goodput == 0, "no time between tokens"


def test_a_quantile_is_a_value_that_was_seen():
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0.25, 0.5, 0.51, 0.99)] == [1, 2, 3, 4]
    assert math.isnan(quantile([], 0.5)) and median([3.0, 1.0]) == 2.0


def test_paired_interval_covers():
    """95% at least, for a distribution with a tail; and no interval of five values does."""
    assert median_interval([1.0] * 5) == (-math.inf, math.inf)
    draw = random.Random(0)
    for number in (6, 11, 20):
        inside = 0
        for _ in range(4000):
            low, high = median_interval([draw.lognormvariate(0, 1) for _ in range(number)])
            inside += low <= 1 <= high
        assert 0.94 <= inside / 4000 <= 0.99
    values = [draw.random() for _ in range(20)]
    assert median_interval(values) == (sorted(values)[5], sorted(values)[14])  # binomial table


def test_a_ratio_is_of_the_same_round():
    """What disturbs a round hits both: 4% stay visible under disturbances of three times."""
    disturbed = [1.0, 3.0, 1.5, 1.0, 2.0, 3.0, 1.2, 1.0]
    found = ratio_of([1.04 * d for d in disturbed], disturbed)
    assert found.median == pytest.approx(1.04) and found.half_width < 1e-9


# --- costs ----------------------------------------------------------------------------------------


def counted(model) -> tuple[int, int]:
    """Parameters of all matrices but the embedding, without and of the routed experts."""
    experts = sum(
        p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters()
    )
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1)
    return matrices - experts - model.embedding.weight.numel(), experts


def test_costs_of_a_token_are_those_of_the_models_parts():
    config = tiny_config()
    model = build(config, BalanceConfig())
    dense, experts = counted(model)
    layers, heads, head_dim = config.num_layers, config.num_heads, config.attention_head_dim
    active, length, rows, distinct = experts // 8 * 2, 33, 3, 5.0
    cost = decode_cost(
        config, 2.0, distinct, rows, length, cache_bytes_per_token=100, weight_bytes=4
    )
    keys = layers * (length - 0.5)
    assert cost.flops == pytest.approx(2 * (dense + active) + 4 * heads * head_dim * keys)
    weights = 4 * (dense + experts // 8 * distinct)
    assert cost.num_bytes == pytest.approx(weights / rows + 100 / layers * keys)
    smaller = decode_cost(config, 2.0, distinct, rows, length, 100, 4, expert_bytes=1)
    saved = 3 * experts // 8 * distinct / rows
    assert cost.num_bytes - smaller.num_bytes == pytest.approx(saved)

    # A prompt is projected to logits once.
    head = model.head.weight.numel()
    whole = length * flops_per_token(config, 2.0, length) / 3
    assert prefill_flops(config, 2.0, length) == pytest.approx(whole - 2 * head * (length - 1))


# --- rounds ---------------------------------------------------------------------------------------


def test_a_bench_sees_where_tokens_go_and_stops_when_it_is_sure():
    model = build(tiny_config(), BalanceConfig()).eval()
    variants = [Variant("trained", None, model, capture(model.routers()))]
    cell, generator = Cell(3, 10), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, VOCAB_SIZE, (3, 10), generator=generator).tolist()
    bench, rounds = Bench(variants, cell, prompts, 5, SloConfig()), []
    (found,) = bench.run(6, 9, 0.02, rounds.append)
    assert rounds == [1, 2, 3, 4, 5, 6] and len(found.rounds) == 6
    assert found.routing.prefill_experts == found.routing.decode_experts == 2.0
    assert 2.0 <= found.routing.distinct_experts <= 6.0
    pages = sum(t[0].numel() * 4 for pool in new_pages(model, 1, 16) for t in pool.tensors())
    assert found.cache_bytes == (3 * 1 + 2) * pages  # with the scratch page, and one to spare
    assert found.ratio(found, "itl_p50").median == 1.0

    # Two that differ by more than the precision go on to the end.
    rounds.clear()
    spread = iter([1.0, 2.0] * 100)
    bench._timed = lambda variant: (FakeSpeed(next(spread)), 1, 0, None)
    bench.variants = [*variants, *variants]
    assert len(bench.run(6, 9, 0.02, rounds.append)) == 2 and len(rounds) == 9


class FakeSpeed:
    def __init__(self, tokens_per_second: float):
        self.tokens_per_second = tokens_per_second


# --- energy ---------------------------------------------------------------------------------------


def test_energy_is_what_the_counters_say_over_all_rounds():
    """A counter that moves in steps, as real ones do, and begins anew on the way."""
    model = build(tiny_config(), BalanceConfig()).eval()
    variants = [Variant("trained", None, model, capture(model.routers()))]
    told = iter(x % 100.0 for x in itertools.count(start=90.0, step=3.0))
    twice = Counter(lambda: next(told), wraps=100.0), Counter(itertools.count().__next__)
    meter = EnergyMeter(twice, "the test's")
    bench = Bench(variants, Cell(2, 4), [[1, 2, 3, 4]] * 2, 5, SloConfig(), meter)
    (found,) = bench.run(6, 6, 0.02)
    # of every round 3 J and 1 J, for ten tokens
    assert found.joules_per_token == pytest.approx(4 / 10)
    cost = entry_of(found, bench, price_per_kwh=0.2)
    assert cost["joules_per_token"] == found.joules_per_token
    assert cost["energy_cost_per_million_tokens"] == pytest.approx(0.4 * 1e6 / 3.6e6 * 0.2)
    head, row = lines(bench.cell, [cost])[1:]
    assert head.split()[-2:] == ["J/tok", "energy/M"] and row.split()[-2:] == ["0.4", "0.0222"]


def test_where_nobody_tells_energy_is_not_reported():
    model = build(tiny_config(), BalanceConfig()).eval()
    variants = [Variant("trained", None, model, capture(model.routers()))]
    bench = Bench(variants, Cell(1, 4), [[1, 2, 3, 4]], 3, SloConfig())
    (found,) = bench.run(6, 6, 0.02)
    cost = entry_of(found, bench, price_per_kwh=0.2)
    assert cost["joules_per_token"] is None and cost["energy_cost_per_million_tokens"] is None
    assert "J/tok" not in lines(bench.cell, [cost])[1]


def entry_of(measured, bench, **settings):
    rates = Rates("the test", 1e12, 1e11, "data sheet")
    variant = bench.variants[0]
    config = variant.model.config
    return entry(
        config, variant, bench.cell, measured, measured, 5, rates, 64.0, 4, {}, None, **settings
    )


def test_packages_are_read_and_their_parts_left_out(tmp_path):
    assert "has no counters" in _of_packages(tmp_path).source
    for name, used in (("intel-rapl:0", 5e6), ("intel-rapl:1", 7e6), ("intel-rapl:0:0", 1e6)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{used:.0f}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
    meter = _of_packages(tmp_path)
    before = meter.begin()
    assert before == (5.0, 7.0) and meter.source.startswith("RAPL, 2 packages")
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("2000000\n")  # begun anew
    assert meter.since(before) == pytest.approx(7.0)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("secret\n")
    refused = _of_packages(tmp_path)
    assert refused.source.startswith("not reported: ") and refused.since(refused.begin()) is None


class FakeNvml:
    """The three calls; `fails` ends with code 3."""

    def __init__(self, fails: str = ""):
        self.fails, self.used, self.asked = fails, 1000, b""

    def nvmlInit_v2(self):
        return 3 if self.fails == "init" else 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        self.asked = name
        return 3 if self.fails == "handle" else 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, used):
        used._obj.value = self.used
        self.used += 500
        return 3 if self.fails == "energy" else 0


def test_a_gpus_counter_is_read_by_its_identity_and_a_refusal_told():
    library = FakeNvml()
    meter = _of_nvml(library, "1-2")
    before = meter.begin()
    assert library.asked == b"GPU-1-2" and meter.since(before) == pytest.approx(0.5)
    for step in ("init", "handle", "energy"):
        refused = _of_nvml(FakeNvml(step), "1-2")
        assert not refused.counters and "NVML's code 3" in refused.source


def test_an_attention_by_its_name_is_the_one_that_hydra_composes():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    for name in sorted(path.stem for path in (ROOT / "conf/attention").glob("*.yaml")):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("generate", overrides=[f"attention={name}"])
        whole = OmegaConf.to_container(config, resolve=True)
        found = attention_named(name)
        expected = record(OmegaConf.create({**whole, "run": "x", "prompt": "y"}), GenerateConfig)
        assert found == expected.attention
    with pytest.raises(
        ValueError,
        match="there is no attention 'flash'; choices: compressed, csa, csa2, dense",
    ):
        attention_named("flash")


def test_cells_are_all_pairs():
    assert cells_of((1, 8), (32, 64)) == [Cell(1, 32), Cell(8, 32), Cell(1, 64), Cell(8, 64)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rows": [1, 1]}, "rows has a value twice"),
        ({"rows": [0]}, "rows has 0; it must be at least 1"),
        ({"contexts": []}, "contexts is empty"),
        ({"new_tokens": 1}, "new_tokens is 1; time between tokens needs at least 2"),
        ({"min_rounds": 3}, "min_rounds is 3 and max_rounds 20; an interval of 95% needs 6"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms is 0.0; it must be positive"),
        ({"router": {"budget": 2}}, "router.budget: give budgets=[...]"),
        ({"router": {"top_k": 2}, "budgets": [1]}, "drop path and router.top_k"),
        ({"price_per_hour": -1}, "price_per_hour is -1.0"),
        ({"price_per_kwh": 0}, "price_per_kwh is 0.0; it must be positive"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_cannot_be_measured_are_refused(settings, says):
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError) as found:
        record(OmegaConf.create({"run": "x", **settings}), BenchmarkConfig)
    assert says in str(found.value)
