"""Compressed attention from the command line: trained in both stages over ranks, resumed bit for
bit, evaluated and generated with.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import full_and_half, last_json, launch, losses, train_on

pytestmark = [pytest.mark.nightly]
ENTRIES = (
    "attention=csa",
    "attention.layer_kinds=[hca,csa]",
    "attention.sliding_window=4",
    "attention.csa_ratio=2",
    "attention.hca_ratio=4",
    "attention.top_k=3",
    "attention.q_lora_rank=12",
    "attention.output_groups=2",
    "attention.o_lora_rank=8",
    "attention.rope_head_dim=4",
    "attention.index_heads=2",
    "attention.index_head_dim=8",
    "attention.audit_rows=0.5",
    "model.num_layers=2",
    "model.num_kv_heads=1",
    "model.qk_norm=none",
)
SHARED = (
    "attention.layer_kinds=[csa,csa]",
    "attention.csa_overlap=false",
    "attention.slot_bias=false",
    "attention.entry_layers=2",
    "attention.index_layers=2",
    "attention.index_keys=projected",
    "attention.top_k_blocks=2",
    "attention.index_block_size=2",
)
"""The second layer reads the entries of the first, and follows its choice."""


@pytest.mark.parametrize("more", [(), SHARED], ids=["own", "shared"])
def test_a_run_resumes_bit_for_bit_logs_its_index_and_generates(tmp_path, more):
    """On two expert-parallel ranks, all entries seen for 11 of 14 steps, stopped after 10."""
    full_and_half(tmp_path, *ENTRIES, *more, "attention.dense_steps=11", "train.num_steps=14")
    shutil.copytree(tmp_path / "half", tmp_path / "resumed")
    train_on(2, f"resume={tmp_path / 'resumed'}")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "full")
    lines = (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    assert all(r["attention/index_loss"] > 0 for r in records)
    assert all(0 < r["attention/index_recall"] <= 1 for r in records)

    run = f"run={tmp_path / 'full'}"
    said = last_json(launch("generate", run, "prompt=the quick", "max_new_tokens=9"))
    assert said["text"]
    assert 0 < last_json(launch("evaluate", run))["attention/index_recall"] <= 1
    result = launch("export", run, f"to={tmp_path / 'out'}", check=False)
    assert result.returncode != 0 and "attention=compressed" in result.stdout + result.stderr
