"""python -m launch.place: from what a run measured to a file that trains on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.config.build import ConfigError
from launch.place import command, measure
from launch.place.settings import Layout, PlaceConfig
from launch.saved.run import load_run
from model.placement.planner import imbalance, plan_layer
from model.placement.record import LayerPlacement, Placement
from ops.router import RouterOutput
from train.audit.format import FOLDER
from train.audit.log import AuditLog
from train.config.watching import AuditConfig

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")
NUM_EXPERTS, LAYERS, TOKENS = 8, (1, 2), 64
HOT = {1: (0, 1), 2: (6, 7)}
"""In each layer two experts with a hundred assignments a step; the others have ten. In order, one
of four ranks has both.
"""


def make_run(folder: Path, *overrides: str, steps: int = 10, drift: bool = False) -> Path:
    """A run directory as training leaves it. Odd experts meet odd ones and even experts even ones.
    drift: in the later half of the steps, the experts are hot that a plan made on the earlier half
    puts on one rank.
    """
    folder.mkdir()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose(
            "train",
            overrides=[
                "model.vocab_size=300",
                f"model.num_layers={max(LAYERS) + 1}",
                f"model.num_experts={NUM_EXPERTS}",
                "model.num_dense_layers=1",
                *overrides,
            ],
        )
    OmegaConf.save(config, folder / "config.yaml")
    lines = []
    log = AuditLog(folder / FOLDER, AuditConfig(sample_one_in=2), LAYERS, 0)
    for step in range(1, steps + 1):
        counts = np.full((2, NUM_EXPERTS), 10)
        for row, layer in zip(counts, LAYERS, strict=True):
            row[[*HOT[layer]]] = 100
            if drift and step > steps // 2:
                together = plan_layer(row, 4).experts[:2]
                row[:] = 10
                row[[*together]] = 100
        lines.append(
            json.dumps({"step": 10 * step, "tokens": TOKENS * step, "counts": counts.tolist()})
        )
        ids = torch.stack(
            (torch.arange(TOKENS) % NUM_EXPERTS, (torch.arange(TOKENS) + 2 * step) % NUM_EXPERTS), 1
        ).int()
        ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
        unused = dict.fromkeys(RouterOutput._fields, torch.zeros(TOKENS))
        out = RouterOutput(
            **{
                **unused,
                "expert_ids": ids,
                "weights": (ids >= 0).float(),
                "reasons": torch.zeros(TOKENS, dtype=torch.uint8),
            }
        )
        first = TOKENS * (step - 1)
        log.add(10 * step, torch.arange(first, first + TOKENS).view(1, -1), None, (out, out))
        log.end_step(10 * step, first, [step, step])
    log.close()
    (folder / "routing.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("place") / "run", "parallel=ep4")


def ask(run: Path | str | None, capsys, **settings) -> tuple[list[str], dict]:
    """Lines and final JSON of `python -m launch.place run=RUN ...`."""
    config = OmegaConf.merge(
        OmegaConf.load(Path(CONF) / "place.yaml"), {"run": run and str(run), **settings}
    )
    assert isinstance(config, type(OmegaConf.create()))
    command.main(config)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    return lines, json.loads(last)


def test_the_plan_levels_the_ranks_and_holds_on_later_steps(run, capsys):
    lines, result = ask(run, capsys)
    now, planned = 200 / (260 / 4), 110 / (260 / 4)
    assert result["imbalance"] == pytest.approx({"now": now, "planned": planned})
    assert result["held_out"]["imbalance"] == pytest.approx({"now": now, "planned": planned})
    assert [layer["layer"] for layer in result["layers"]] == [1, 2] and "crossings" not in result
    assert result["steps"] == [10, 100] and result["lines"] == 10
    words = next(line for line in lines if line.startswith("the busiest rank"))
    assert "does 3.08x the mean now, 1.69x after" in words and "up to 45% less time" in words
    placement = Placement.load(run / "placement.json")
    assert placement.problems(NUM_EXPERTS, 2, 4) == []
    assert placement.layers[0] == plan_layer([1000, 1000, *[100] * 6], 4)
    assert (
        lines[-1]
        == f"next: python -m launch.train resume={run} parallel.placement={run}/placement.json"
    )


def test_replicas_are_counted(run, capsys, tmp_path):
    lines, result = ask(run, capsys, replicas_per_rank=1, output=str(tmp_path / "p.json"))
    assert result["imbalance"]["planned"] < 1.2
    assert [(layer["replicas"], layer["replicated_experts"]) for layer in result["layers"]] == [
        (4, 2),
        (4, 2),
    ]
    assert all(len(lent) == 1 for lent in Placement.load(tmp_path / "p.json").layers[0].replicas)
    assert any("replicas of experts" in line for line in lines)


def test_experts_that_meet_come_onto_one_node(run, capsys, tmp_path):
    lines, result = ask(run, capsys, ranks_per_node=2, output=str(tmp_path / "p.json"))
    # In order each node has two odd and two even experts.
    assert result["crossings"]["now"] > 0.5 and result["crossings"]["planned"] == 0
    assert result["held_out"]["crossings"]["planned"] == 0
    layer = Placement.load(tmp_path / "p.json").layers[0]
    assert len({expert % 2 for expert in layer.experts[:4]}) == 1
    assert "parallel.ranks_per_node=2" in lines[-1]


def test_loads_that_move_are_told(tmp_path, capsys):
    lines, result = ask(make_run(tmp_path / "run", "parallel=ep4", drift=True), capsys)
    assert result["held_out"]["imbalance"] == pytest.approx({"now": 110 / 65, "planned": 200 / 65})
    assert any("loads move too much" in line for line in lines)


def test_only_the_last_lines_count_if_asked(tmp_path, capsys):
    run = make_run(tmp_path / "run", "parallel=ep4", drift=True)
    _, result = ask(run, capsys, last_steps=4, ranks_per_node=2)
    assert result["steps"] == [70, 100] and result["lines"] == 4
    assert result["held_out"]["imbalance"]["planned"] == pytest.approx(
        result["imbalance"]["planned"]
    )
    measured = measure.measure(
        PlaceConfig(str(run), last_steps=4),
        load_run(str(run)).model,
        Layout(4, 2, 0),
    )
    assert measured.step.tolist() == [70, 80, 90, 100]
    from train.audit.records import read_records

    records = read_records(run / FOLDER)
    pairs = [
        int((records.sampled & (records.step > a) & (records.step <= b) & (records.k == 2)).sum())
        for a, b in ((60, 80), (80, 100))
    ]
    assert measured.together.sum((1, 2, 3)).tolist() == [2 * n for n in pairs] and min(pairs) > 0


def test_large_audits_are_read_in_pieces(run, monkeypatch, capsys, tmp_path):
    output = str(tmp_path / "p.json")
    _, whole = ask(run, capsys, ranks_per_node=2, output=output)
    size = sum(path.stat().st_size for path in (run / FOLDER).glob("records-*.bin"))
    monkeypatch.setattr(measure, "MAX_AUDIT_BYTES", size - 1)
    monkeypatch.setattr(measure, "AUDIT_STEPS", 5)
    assert ask(run, capsys, ranks_per_node=2, output=output)[1] == whole


def test_co_activation_counts_pairs_of_a_token():
    g = np.random.default_rng(0)
    visits = g.random((9000, 6)) < 0.3
    owner, experts = np.nonzero(visits)
    together = visits.T.astype(int) @ visits
    np.testing.assert_array_equal(
        measure.co_activation(owner, experts, 9000, 6), together * ~np.eye(6, dtype=bool)
    )


def test_without_audit_nodes_are_not_told_apart(tmp_path, capsys):
    run = make_run(tmp_path / "run", "parallel=ep4")
    (run / FOLDER / "format.json").unlink()
    lines, result = ask(run, capsys, ranks_per_node=2)
    assert "crossings" not in result and any("nodes are not told apart" in line for line in lines)


def test_the_runs_own_placement_is_what_the_plan_is_held_against(run, tmp_path, capsys):
    loads = np.full(NUM_EXPERTS, 10)
    loads[[0, 1]] = 100
    own = LayerPlacement((0, 2, 1, 3, 4, 6, 5, 7), ((),) * 4)
    Placement(4, (own, own)).save(tmp_path / "own.json")
    other = make_run(
        tmp_path / "run", "parallel=ep4", f"parallel.placement={tmp_path / 'own.json'}"
    )
    lines, result = ask(other, capsys)
    assert lines[0] == f"now: {tmp_path / 'own.json'}"
    assert result["layers"][0]["imbalance"]["now"] == pytest.approx(imbalance(loads, own))
    (tmp_path / "own.json").write_text("{}")
    lines, _ = ask(other, capsys)
    assert "left out" in lines[0] and lines[1] == "now: experts in order"


def test_another_size_is_in_the_next_command(run, tmp_path, capsys):
    lines, result = ask(run, capsys, expert_parallel_size=2, output=str(tmp_path / "a file.json"))
    assert result["expert_parallel_size"] == 2
    assert (
        lines[-2].endswith("parallel.expert_parallel_size=2") and "multiple of 2 ranks" in lines[-1]
    )
    assert f"parallel.placement='\"'\"'{tmp_path}/a file.json'\"'\"''" in lines[-2]


def test_torn_lines_are_skipped(run, tmp_path):
    lines = (run / "routing.jsonl").read_text().splitlines()
    text = "\n".join(
        [
            lines[0],
            lines[1][:40],
            "[]",
            "{}",
            '{"step": null, "counts": 1}',
            '{"step": 1, "counts": [[1], [1, 2]]}',
            lines[2],
            lines[3][:-1],
        ]
    )
    (tmp_path / "routing.jsonl").write_text(text)
    _, step, loads = measure.read_loads(tmp_path / "routing.jsonl", (2, NUM_EXPERTS))
    assert step.tolist() == [10, 30] and loads.shape == (2, 2, NUM_EXPERTS)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run": None}, "give run=DIR"),
        ({"run": "nowhere"}, "config.yaml does not exist; give a run directory"),
        (
            {"expert_parallel_size": 3},
            "model.num_experts 8 is not divisible by expert_parallel_size 3",
        ),
        ({"expert_parallel_size": 1}, "expert_parallel_size is 1: one rank holds all experts"),
        ({"expert_parallel_size": 0}, "expert_parallel_size is 0; it must be at least 1"),
        ({"ranks_per_node": 3}, "ranks_per_node 3 does not divide expert_parallel_size 4"),
        (
            {"replicas_per_rank": 7},
            "replicas_per_rank is 7; the experts that a rank does not own are 6",
        ),
        ({"replicas_per_rank": -1}, "must not be negative"),
        ({"last_steps": 1}, "last_steps is 1; it must be at least 2"),
        ({"replicas": 1}, "unknown key replicas: did you mean replicas_per_rank"),
        ({"last_steps": "x"}, "last_steps is 'x'; it must be a whole number"),
        ({"output": "/nowhere/p.json"}, "output=/nowhere/p.json cannot be written"),
    ],
)
def test_mistakes_get_a_sentence(run, capsys, settings, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        ask(capsys=capsys, **{"run": run, **settings})
    assert "\n" not in str(error.value)


def test_several_mistakes_are_told_together(run, capsys):
    with pytest.raises(ConfigError) as error:
        ask(run, capsys, expert_parallel_size=5, ranks_per_node=2)
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has not reached its first log step"),
        ("", "has 0 usable lines"),
        ('{"step": 1, "counts": [[1]]}', "belongs to another run"),
    ],
)
def test_runs_that_measured_nothing_are_told_why(tmp_path, capsys, text, words):
    run = make_run(tmp_path / "run", "parallel=ep4", steps=1)
    if text is None:
        (run / "routing.jsonl").unlink()
    else:
        (run / "routing.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        ask(run, capsys)


def test_a_run_of_one_line_is_too_short(tmp_path, capsys):
    with pytest.raises(ValueError, match="has 1 usable lines; planning needs two"):
        ask(make_run(tmp_path / "run", "parallel=ep4", steps=1), capsys)


def test_a_dense_model_has_nothing_to_place(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    config.model.num_experts, config.balance.aux_loss_coeff = 0, 0.0
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(ValueError, match="is a dense model"):
        ask(run, capsys, expert_parallel_size=2)


# --- a real run -----------------------------------------------------------------------------------
