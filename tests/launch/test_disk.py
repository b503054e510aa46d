"""launch.plan's bytes on disk: bounded by the limits, and the arithmetic of a large run."""

from __future__ import annotations

from omegaconf import OmegaConf

from launch import plan
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job.disk import disk_usage, run_bytes
from tests.composing import composed

LARGE = (
    "model.num_layers=64",
    "model.num_dense_layers=0",
    "model.num_experts=1024",
    "model.top_k=8",
    "train.num_steps=1000000",
    "train.global_batch_size=4096",
    "checkpoint.save_interval=1000",
    "train.eval_interval=1000",
)


def usage(*overrides: str):
    return disk_usage(parse(plain(composed(*LARGE, *overrides)), 1), 1)


def test_the_logs_of_a_million_steps_are_bounded_by_the_limits():
    free, held = usage("tracker.max_log_mib=0", "audit.max_mib=0"), usage()
    assert free["routing"].number == 100_000 and free["routing"].total > 18 * 2**30
    assert held["routing"].total == held["metrics"].total == 256 * 2**20
    assert held["audit records"].total + held["audit steps"].total == 1024 * 2**20
    assert held["probe"].number == 128 and held["checkpoints"].number == 3
    assert held["routing"].limit == "tracker.max_log_mib=256" and free["routing"].limit == ""
    assert (
        run_bytes(held) - held["checkpoints"].total
        < 4 * 2**30
        < run_bytes(free) - free["checkpoints"].total
    )


def test_a_dense_run_has_metrics_and_checkpoints_only():
    assert set(usage("model.num_experts=0", "model.top_k=0")) == {"metrics", "checkpoints"}


def test_the_plan_prints_every_kind_and_their_sum(capsys):
    config = composed("model.num_layers=2")
    OmegaConf.set_readonly(config, False)
    plan.main(config)
    out = capsys.readouterr().out
    kinds = ("metrics", "routing", "audit records", "audit steps", "checkpoints", "total")
    assert all(f"  {kind:28s}" in out for kind in kinds)
    assert '"disk_bytes"' in out
