"""Every setting that a resumed run can be given acts and shows, or is refused with the reason: here
each key has its proof.

The keys are those of the composed config under every option of every group, of the records, and of
the components' records. A key without an entry in CASES fails the first test: say there what
changing it in a running run does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import evaluate, generate, plan
from launch import train as command
from launch.command.arguments import setting
from launch.config.build import ConfigError
from launch.config.deepspeed import DEEPSPEED_KEYS, ZERO_KEYS
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job import worker
from launch.place import command as place
from launch.runs.run import read_run
from launch.saved import files as saved
from launch.saved.files import load_config
from launch.saved.resume import OF_THE_COMMAND, examine, flat, merged
from launch.saved.run import load_run
from tests.composing import composed
from tests.pairwise import some_daily
from train.checkpoint.folder import find_checkpoint, point_best
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.writer import CheckpointError
from train.config.component import FORMER, KINDS, SETTINGS
from train.config.data import SourceConfig
from train.config.run import RunConfig
from train.config.watching import AlarmRule
from train.files.manifest import file_facts
from train.rank.stop import StopSignal

sys.path.insert(0, str(Path(__file__).parent))
from commandline import ROOT, TINY, write_text

pytestmark = [pytest.mark.slow]
CONF = ROOT / "conf"
DONE = 10
COMMON = (
    *TINY,
    "model.num_experts=8",
    "model.num_dense_layers=0",
    "train.num_steps=80",
    f"train.stop_after_step={DONE}",
    "train.eval_max_sequences=4",
    "tracker.metrics=detailed",
    "audit.sample_one_in=4",
)
EARLY = ("budget.warm_start_steps=2", "budget.blend_steps=2")
GUARD = ("budget.guard_steps=1", "budget.guard_error=1e-6")
BASES = {
    "top_k": (),
    "bias": ("balance.bias_update=sign", "balance.bias_update_rate=0.01"),
    "quantile": ("balance=quantile",),
    "threshold": ("router=threshold", "balance=none", *EARLY),
    "warm": (
        "router=threshold",
        "balance=none",
        "budget.warm_start_steps=50",
        "budget.blend_steps=2",
    ),
    "blending": (
        "router=threshold",
        "balance=none",
        "budget.warm_start_steps=2",
        "budget.blend_steps=50",
    ),
    "top_p": ("router=top_p", "balance=quantile", *EARLY),
    "relu": ("router=relu", "balance=none"),
    "null_experts": ("router=null_experts", "balance=quantile", *EARLY),
    "expert_choice": ("router=expert_choice", "balance=none"),
    "scc": (
        "attention=scc",
        "attention.block_size=4",
        "attention.coarse_block_size=2",
        "attention.window_size=8",
        "attention.top_k=1",
        "attention.audit_rows=1",
    ),
    "index": (
        "attention=scc",
        "attention.block_size=4",
        "attention.coarse_block_size=2",
        "attention.window_size=8",
        "attention.top_k=1",
        "attention.select=index",
        "attention.index_layers=2",
    ),
    "windowed": ("attention=windowed", "attention.window=8"),
    "indexed": (
        "attention=dsa",
        "attention.top_k=4",
        "attention.index_heads=2",
        "attention.dense_steps=5",
        "attention.audit_rows=1",
    ),
    "compressed": (
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
        "attention.dense_steps=5",
        "model.num_layers=2",
        "model.num_kv_heads=1",
        "model.qk_norm=none",
    ),
    "mla": (
        "attention=mla",
        "attention.q_lora_rank=12",
        "attention.kv_lora_rank=10",
        "attention.qk_nope_head_dim=8",
        "attention.qk_rope_head_dim=4",
        "attention.v_head_dim=8",
        "model.num_kv_heads=2",
        "model.qk_norm=none",
    ),
    "mtp": ("model.num_mtp_layers=1", "train.mtp_coeff=0.3"),
    "muon": ("optim=muon",),
    "self_distil": ("objective=self_distil", "router=top_k_raw", "model.top_k=3"),
    "plain_keys": ("model.qk_norm=none",),
    "spike": ("fail_safe.spike_zscore=1000", "train.stop_after_step=55"),
}
"""The runs that are resumed, by name; 10 steps each, unless they say otherwise."""
WANDB = "tracker.wandb.mode=disabled"


def trained(config) -> dict | None:
    """What one rank does."""
    with StopSignal() as stop:
        return worker._work(config, stop)


class Ran:
    """A resumed run after some more steps."""

    def __init__(self, folder: Path, done: int):
        self.folder = folder
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.records = [r for r in records if r["step"] > done]

    def values(self, name: str) -> list:
        return [r.get(name) for r in self.records]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@dataclass(frozen=True)
class Acts:
    override: str
    seen: str | Callable[[Ran, Ran], bool]
    base: str
    control: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Reaches:
    overrides: tuple[str, ...]
    world_size: int


@dataclass(frozen=True)
class Refused:
    override: str
    words: str
    base: str


def acts(
    override: str,
    seen: str | Callable[[Ran, Ran], bool],
    base: str = "top_k",
    control: tuple[str, ...] = (),
    steps: int = 3,
) -> Acts:
    """seen: metrics of which one must differ from those of the run that was resumed without the
    override, or a look at both runs (the changed one first). override: or several with spaces
    between, the key's own first. control: overrides that both get; steps: how far both go on.
    """
    return Acts(override, seen, base, control, steps)


def reaches(*overrides: str, world_size: int = 1) -> Reaches:
    """The effect needs other processes, devices or services, or is none on any number. No
    checkpoint holds such a setting, so it acts if it is in the record that the run is built from.
    The key's own override first.
    """
    return Reaches(overrides, world_size)


def refused(override: str, words: str = "", base: str = "top_k") -> Refused:
    """words: of the message, beside the key."""
    return Refused(override, words, base)


LOSS, EXPERTS = "train/loss", "moe/experts_per_token"
ROUTED = f"{LOSS} {EXPERTS}"
VALIDATION = "data.validation.sources=[{path:sample}]"
PHASE = "data.mixture.schedule=[{start_tokens:64,weights:[1.0]}]"
SHAPE, ORDER = "the saved tensors have this shape", "the order of the data would change"
EXPERT_PARALLEL = ("parallel.expert_parallel_size=2", "launch=deepspeed", "launch.num_devices=2")
NODES = (
    "launch=torchrun",
    "launch.num_nodes=2",
    "launch.num_devices=1",
    "launch.node_rank=1",
    "launch.master_addr=h",
    "launch.master_port=4",
)
ALARM = "alarm/collapse"


def profiled(ran: Ran) -> list[int]:
    """Steps that the profile of rank 0 is of."""
    return json.loads((ran.folder / "profile/rank-00000-phases.json").read_text())["steps"]


def averages_after_resuming(ran: Ran, control: Ran) -> bool:
    """It is in the checkpoint that follows, and no loss is another."""
    held = [
        any(key.endswith("/ema") for key in CheckpointReader(find_checkpoint(r.folder)).stored)
        for r in (ran, control)
    ]
    return held == [True, False] and ran.values(LOSS) == control.values(LOSS)


CASES: dict[str, Acts | Reaches | Refused] = {
    # what a run keeps for life
    "seed": refused("seed=1", ORDER),
    "experiment_name": refused("experiment_name=other", "it names the directory"),
    "init.path": refused("init.path=elsewhere", "its weights were read when the run began"),
    "init.run": refused("init.run=elsewhere", "its weights were read when the run began"),
    "init.checkpoint": refused(
        "init.checkpoint=latest", "its weights were read when the run began"
    ),
    "init.moments": refused("init.moments=true", "moments are those of another run's optimizer"),
    **{
        f"init.upcycle.{name}": refused(f"init.upcycle.{name}={value}", words)
        for name, value, words in (
            ("num_experts", 4, "there is no dense model"),
            ("top_k", 1, "init.upcycle.num_experts is 0"),
            ("granularity", 2, "init.upcycle.num_experts is 0"),
            ("num_shared_experts", 1, "init.upcycle.num_experts is 0"),
            ("reinit_ratio", 0.5, "init.upcycle.num_experts is 0"),
        )
    },
    "lora.rank": refused("lora.rank=4", "begins with weights that are drawn"),
    **{
        f"lora.{name}": refused(f"lora.{name}={value}", "but lora.rank is 0")
        for name, value in {
            "alpha": 8,
            "targets": "[experts]",
            "expert_rank": 2,
            "also_train": "[norms]",
        }.items()
    },
    "train.seq_len": refused("train.seq_len=16", ORDER),
    **{
        f"model.{name}": refused(f"model.{name}={value}", SHAPE)
        for name, value in {
            "vocab_size": 301,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 1,
            "num_kv_heads": 2,
            "intermediate_size": 64,
            "num_experts": 4,
            "expert_intermediate_size": 32,
            "max_seq_len": 65,
            "head_dim": 16,
            "num_shared_experts": 2,
            "num_dense_layers": 1,
            "moe_layer_interval": 2,
            "qk_norm": "none",
            "attention_bias": "qkv",
            "attention_multiplier": 0.1,
            "rope_theta": 1.0,
            "rotary_dim": 4,
            "rope_scaling": "{type:linear,factor:2.0}",
            "activation": "clamped_swiglu",
            "expert_bias": "true",
            "shared_expert_gate": "true",
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_divisor": 6.0,
            "num_residual_streams": 2,
            "norm_eps": 0.1,
            "tie_embeddings": "false",
            "init_std": 1.0,
            "init": "normal",
        }.items()
    },
    **{
        f"model.mup_base_{name}": refused(
            f"model.mup_base_{name}=4", f"model.mup_base_{name} is 4, but it belongs to"
        )
        for name in ("hidden_size", "head_dim", "num_layers")
    },
    **{
        f"model.rope_scaling.{name}": refused(f"model.rope_scaling={scaling}", SHAPE)
        for scaling, names in {
            "{type:llama3,factor:2.0,original_max_seq_len:16,low_freq_factor:1.0,"
            "high_freq_factor:4.0}": (
                *("type", "factor"),
                *("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
            ),
            "{type:yarn,factor:2.0,original_max_seq_len:16,beta_fast:16.0,beta_slow:2.0,"
            "truncate:false,mscale:0.7,mscale_all_dim:0.7,attention_factor:1.2}": (
                *("beta_fast", "beta_slow", "truncate"),
                *("mscale", "mscale_all_dim", "attention_factor"),
            ),
        }.items()
        for name in names
    },
    **{
        f"model.{name}": refused(f"model.{name}={value}", "model.num_residual_streams is 1")
        for name, value in {"sinkhorn_steps": 5, "sinkhorn_eps": 1e-5}.items()
    },
    "model.top_k": refused("model.top_k=3", "change router.top_k or router.budget instead"),
    "model.recompute": reaches("model.recompute=block"),
    "model.loss_chunk_size": reaches("model.loss_chunk_size=8"),
    **{
        f"data.sources.*.{name}": refused(f"data.sources.0.{name}={value}", ORDER)
        for name, value in {
            "path": "json",
            "split": "validation",
            "data_files": "other",
            "text_column": "body",
            "sample_by": "document",
            "weight": 2.0,
            "max_epochs": 0.5,
            "label": "other",
            "name": "part",
            "max_documents": 5,
        }.items()
    },
    "data.validation.sources": refused(VALIDATION, ORDER),
    **{
        f"data.validation.sources.*.{field.name}": refused(VALIDATION, ORDER)
        for field in dataclasses.fields(SourceConfig)
    },
    "data.mixture.temperature": refused("data.mixture.temperature=2", "there is one source"),
    "data.mixture.schedule": refused(PHASE, ORDER),
    "data.mixture.schedule.*.start_tokens": refused(PHASE, ORDER),
    "data.mixture.schedule.*.weights": refused(PHASE, ORDER),
    "data.tokenizer.path": refused("data.tokenizer.path=other", ORDER),
    "data.tokenizer.max_documents": refused("data.tokenizer.max_documents=9", ORDER),
    # a run on text has a tokenizer, which says it
    "data.tokenizer.end_of_document_id": refused("data.tokenizer.end_of_document_id=9", "drop it"),
    "data.tokenizer.vocab_size": refused("data.tokenizer.vocab_size=290", ORDER),
    "data.tokenizer.end_of_document": refused("data.tokenizer.end_of_document=x", ORDER),
    "data.validation_fraction": refused("data.validation_fraction=0.2", ORDER),
    "data.cache_dir": acts(
        "data.cache_dir=CACHE", lambda ran, other: "CACHE" in str(ran.lines("config.txt"))
    ),
    "data.streaming": refused("data.streaming=true", ORDER),
    # of a run that is prepared they do nothing, which is said before they are compared
    **{
        f"data.stream.{name}": refused(f"data.stream.{name}=3", "data.streaming=true only")
        for name in ("window_mib", "head_documents", "workers")
    },
    "data.max_bad_rows": reaches("data.max_bad_rows=0.5"),
    "data.on_bad_row": reaches("data.on_bad_row=fail"),
    # a run on text has no use for the others, which are refused before they are compared
    "data.format": refused("data.format=chat", "which holds no conversations"),
    **{
        f"data.{name}": refused(f"data.{name}={value}", "acts on conversations only")
        for name, value in (
            ("chat_template", "f"),
            ("thinking", "false"),
            ("train_on", "all"),
            ("too_long", "cut"),
        )
    },
    # routers
    "objective.name": acts("objective=self_distil", LOSS, control=("router=top_k_raw",)),
    "objective.top_k": acts("objective.top_k=[2]", "distil/kl", "self_distil"),
    "objective.weight": acts("objective.weight=3", LOSS, "self_distil"),
    "objective.temperature": acts("objective.temperature=3", "distil/kl", "self_distil"),
    "objective.run": reaches("objective.run=elsewhere", "objective=distil"),
    "objective.path": reaches("objective.path=elsewhere", "objective=distil"),
    "objective.checkpoint": reaches(
        "objective.checkpoint=latest", "objective.run=elsewhere", "objective=distil"
    ),
    "objective.cache": reaches("objective.cache=elsewhere", "objective=distil"),
    "router.name": acts("router=expert_choice", ROUTED, control=("balance=none",)),
    "router.top_k": acts("router.top_k=3", EXPERTS),
    "router.budget": acts("router.budget=3", EXPERTS, "threshold", steps=12),
    "router.budget_unit": acts(
        f"router.budget_unit=flops router.budget={3 * 6 * 16 * 16 * 2}",
        EXPERTS,
        "threshold",
        steps=12,
    ),
    "router.score_function": acts("router.score_function=sigmoid", LOSS),
    "router.normalize_weights": acts("router.normalize_weights=false", LOSS),
    "router.scaling_factor": acts("router.scaling_factor=2.0", LOSS),
    "router.num_groups": acts("router.num_groups=4", ROUTED, control=("router.top_groups=1",)),
    "router.top_groups": acts("router.top_groups=2", ROUTED, control=("router.num_groups=4",)),
    "router.group_keys": acts(
        "router.group_keys=1",
        ROUTED,
        control=("router.num_groups=2", "router.top_groups=1", "router.top_k=3"),
    ),
    "router.bias": refused("router.bias=true", "the routers' weights have no bias"),
    "router.hash_layers": refused(
        "router.hash_layers=1", "the checkpoint holds the tables of 0 layers"
    ),
    "router.capacity_factor": acts("router.capacity_factor=1.0", "moe/spilled moe/dropped " + LOSS),
    "router.min_experts": acts("router.min_experts=1", ROUTED, "threshold"),
    "router.max_experts": acts("router.max_experts=2", ROUTED, "threshold"),
    "router.initial_top_p": refused("router.initial_top_p=0.9", "a run starts with it", "top_p"),
    "router.initial_coeff": refused("router.initial_coeff=0.5", "no longer acts", "relu"),
    "router.num_null_experts": refused(
        "router.num_null_experts=4", "a row for every null expert", "null_experts"
    ),
    # balance
    "balance.aux_loss_coeff": acts("balance.aux_loss_coeff=1.0", LOSS),
    **{
        f"balance.{schedule}.{name}": acts(
            f"balance.{schedule}.{name}={value}", f"train/{metric}", base, control
        )
        for schedule, metric, base in (
            ("aux_loss_schedule", "aux_loss_coeff", "top_k"),
            ("bias_rate_schedule", "bias_update_rate", "bias"),
        )
        for name, value, control in (
            ("style", "step", ()),
            ("start", 12, (f"balance.{schedule}.style=linear",)),
            ("floor", 0.5, (f"balance.{schedule}.style=cosine",)),
        )
    },
    "balance.aux_loss_scope": acts(
        "balance.aux_loss_scope=global_batch", LOSS, control=("balance.aux_loss_coeff=1.0",)
    ),
    "balance.z_loss_coeff": acts("balance.z_loss_coeff=1.0", LOSS),
    "balance.entropy_coeff": acts("balance.entropy_coeff=1.0", LOSS),
    "balance.orthogonality_coeff": acts("balance.orthogonality_coeff=1.0", LOSS),
    "balance.bias_update": acts("balance.bias_update=quantile", ROUTED),
    "balance.bias_update_rate": acts("balance.bias_update_rate=0.5", ROUTED, "bias"),
    "balance.random_routing_steps": acts("balance.random_routing_steps=40", LOSS),
    "balance.quantile_momentum": acts("balance.quantile_momentum=0.0", ROUTED, "quantile"),
    "balance.histogram_bins": acts("balance.histogram_bins=16", ROUTED, "quantile"),
    # budget
    "budget.kp": acts("budget.kp=0.0", ROUTED, "threshold", steps=5),
    "budget.error_momentum": acts("budget.error_momentum=0.0", ROUTED, "threshold", steps=5),
    "budget.ki": acts("budget.ki=0.9", ROUTED, "threshold", steps=5),
    "budget.scope": acts("budget.scope=model", ROUTED, "threshold", steps=5),
    "budget.warm_start_steps": acts("budget.warm_start_steps=5", EXPERTS, "warm"),
    "budget.blend_steps": acts("budget.blend_steps=10", ROUTED, "blending"),
    "budget.guard_error": acts(
        "budget.guard_error=1e-6",
        ROUTED,
        "threshold",
        ("budget.guard_steps=1", "budget.guard_error=10"),
        12,
    ),
    "budget.guard_steps": acts(
        "budget.guard_steps=1", ROUTED, "threshold", ("budget.guard_error=1e-6",), 12
    ),
    "budget.guard_capped": acts(
        "budget.guard_capped=1e-6",
        ROUTED,
        "threshold",
        ("budget.guard_steps=1", "budget.guard_error=10", "router.max_experts=2"),
        12,
    ),
    "budget.hold_steps": acts("budget.hold_steps=1", ROUTED, "threshold", GUARD, 16),
    # fail-safes
    "fail_safe.collapse_share": acts("fail_safe.collapse_share=0.1", "moe/layers_collapsed"),
    "fail_safe.spike_zscore": acts(
        "fail_safe.spike_zscore=1e-3", "moe/fallback/frozen", "spike", steps=5
    ),
    "fail_safe.freeze_steps": acts(
        "fail_safe.freeze_steps=1",
        "moe/fallback/frozen",
        "spike",
        ("fail_safe.spike_zscore=1e-3",),
        9,
    ),
    "fail_safe.snapshot_interval": acts(
        "fail_safe.snapshot_interval=1", ROUTED, "spike", ("fail_safe.spike_zscore=1e-3",), 5
    ),
    "fail_safe.rank_overload": reaches("fail_safe.rank_overload=1.5"),
    "fail_safe.overload_steps": reaches("fail_safe.overload_steps=3"),
    "model.num_mtp_layers": refused("model.num_mtp_layers=2", SHAPE, "mtp"),
    "train.z_loss_coeff": acts("train.z_loss_coeff=0.1", "train/z_loss"),
    "train.mtp_coeff": acts("train.mtp_coeff=3", LOSS, "mtp"),
    # attention
    "attention.name": acts("attention=dense", LOSS, "scc"),
    **{
        f"attention.{name}": acts(f"attention.{name}={value}", LOSS, "scc", control)
        for name, value, control in (
            ("block_size", 8, ()),
            ("coarse_block_size", 4, ()),
            ("top_k", 2, ()),
            ("window_size", 12, ()),
            ("num_sink_blocks", 2, ()),
            ("order", 0, ()),
            ("max_variance", 1e-6, ()),
            ("score", "error_gain", ()),
            (
                "rank_lse",
                "super",
                (
                    "attention.fanout=2",
                    "attention.block_size=2",
                    "attention.coarse_block_size=2",
                    "attention.window_size=2",
                    "attention.top_k=1",
                ),
            ),
            ("tail", "drop", ()),
            ("top_p", 0.01, ()),
            ("min_sparse_length", 28, ()),
            ("num_levels", 2, ("attention.fanout=2", "attention.num_expanded=1")),
            (
                "fanout",
                4,
                (
                    "attention.num_levels=2",
                    "attention.num_expanded=1",
                    "attention.fanout=2",
                    "attention.block_size=2",
                    "attention.window_size=2",
                ),
            ),
            (
                "num_expanded",
                1,
                (
                    "attention.num_levels=2",
                    "attention.fanout=2",
                    "attention.block_size=2",
                    "attention.window_size=2",
                ),
            ),
            ("dense_layers", "[0]", ()),
            ("interval", 2, ()),
            ("dense_steps", 12, ()),
            ("noise_steps", 40, ()),
            ("temperature", 5.0, ("attention.noise_steps=40",)),
            ("min_top_k", 0, ("attention.noise_steps=40",)),
            ("mass_kl_coeff", 1.0, ()),
            ("coherence_coeff", 1.0, ()),
            ("alignment_coeff", 1.0, ()),
        )
    },
    "attention.audit_rows": acts("attention.audit_rows=0.5", "attention/error", "scc"),
    **{
        f"attention.{name}": acts(f"attention.{name}={value}", LOSS, "windowed")
        for name, value in (("window", 4), ("window_layers", "all"))
    },
    "attention.rule": refused("attention.rule=qsa", "does not hold", "indexed"),
    "attention.select": refused("attention.select=index", "does not hold", "scc"),
    "attention.index_steps": acts("attention.index_steps=40", LOSS, "index"),
    "attention.index_layers": refused("attention.index_layers=1", "does not hold", "index"),
    "attention.resident_blocks": acts(
        "attention.resident_blocks=0 attention.resident_interval=4", LOSS, "scc"
    ),
    "attention.resident_interval": acts(
        "attention.resident_interval=4", LOSS, "scc", ("attention.resident_blocks=0",)
    ),
    # Rows of these runs are too short for older intervals to decide; tests/ops/test_resident.py.
    "attention.resident_decay": reaches(
        "attention.resident_decay=0.5", "attention=scc", "attention.resident_blocks=2"
    ),
    "attention.entries_dtype": reaches(
        "attention.entries_dtype=fp8", "attention=scc", "attention.resident_blocks=2"
    ),
    "attention.index_heads": refused("attention.index_heads=4", "does not hold", "indexed"),
    "attention.index_head_dim": refused("attention.index_head_dim=64", "does not hold", "indexed"),
    "attention.index_coeff": acts(
        "attention.index_coeff=50", "attention/index_loss attention/index_recall", "indexed"
    ),
    **{
        f"attention.{name}": acts(f"attention.{name}={value}", LOSS, "compressed")
        for name, value in (
            ("sliding_window", 2),
            ("rope_head_dim", 8),
            ("compressed_rope_theta", 10.0),
        )
    },
    **{
        f"attention.{name}": refused(f"attention.{name}={value}", SHAPE, "compressed")
        for name, value in {
            "layer_kinds": "[csa,hca]",
            "csa_ratio": 4,
            "hca_ratio": 8,
            "output_groups": 1,
            "o_lora_rank": 6,
            "late_csa_ratio": 4,
            "csa_overlap": "false",
            "slot_bias": "false",
            "entry_layers": 2,
            "index_keys": "projected",
        }.items()
    },
    "attention.top_k_blocks": acts(
        "attention.top_k_blocks=2 attention.index_block_size=2", LOSS, "compressed"
    ),
    "attention.index_block_size": acts(
        "attention.index_block_size=4", LOSS, "compressed", ("attention.top_k_blocks=2",)
    ),
    "attention.sinks": refused("attention.sinks=true", "does not hold", "windowed"),
    "attention.merge": refused("attention.merge=gated", "does not hold", "scc"),
    "attention.entries": refused("attention.entries=gated", "does not hold", "scc"),
    "attention.offset": refused("attention.offset=true", "does not hold", "scc"),
    "attention.trust": refused("attention.trust=true", "does not hold", "scc"),
    "attention.sink": refused("attention.sink=true", "does not hold", "scc"),
    **{
        f"attention.{name}": refused(f"attention.{name}={value}", SHAPE, "mla")
        for name, value in {
            "q_lora_rank": "null",
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
        }.items()
    },
    # optimiser and schedule
    "optim.lr": acts("optim.lr=0.02", "train/lr"),
    "optim.min_lr": acts("optim.min_lr=0.001", "train/lr"),
    "optim.warmup_steps": acts("optim.warmup_steps=20", "train/lr"),
    "optim.warmup_fraction": acts("optim.warmup_fraction=0.9", "train/lr"),
    "optim.decay_style": acts("optim.decay_style=linear", "train/lr"),
    "optim.wsd_decay_steps": acts(
        "optim.wsd_decay_steps=75",
        "train/lr",
        control=("optim.decay_style=WSD", "optim.wsd_decay_steps=5"),
    ),
    "optim.wsd_decay_style": acts(
        "optim.wsd_decay_style=minus_sqrt",
        "train/lr",
        control=("optim.decay_style=WSD", "optim.wsd_decay_steps=75"),
    ),
    "optim.weight_decay": acts("optim.weight_decay=5.0", LOSS),
    "optim.beta1": acts("optim.beta1=0.1", LOSS),
    "optim.beta2": acts("optim.beta2=0.1", LOSS),
    "optim.eps": acts("optim.eps=0.1", LOSS),
    "optim.optimizer": refused("optim.optimizer=muon", "init.run=RUN init.checkpoint=latest"),
    "optim.ema_decay": acts("optim.ema_decay=0.9", averages_after_resuming),
    "optim.momentum": acts("optim.momentum=0.1", LOSS, "muon"),
    "optim.nesterov": acts("optim.nesterov=false", LOSS, "muon"),
    "optim.update_rms": acts("optim.update_rms=0.02", LOSS, "muon"),
    "optim.orthogonalize_steps": acts("optim.orthogonalize_steps=1", LOSS, "muon"),
    "optim.orthogonalize_dtype": acts("optim.orthogonalize_dtype=fp32", LOSS, "muon"),
    "optim.groups.*.optimizer": refused(
        "optim.groups=[{match: experts, optimizer: muon}]", "init.run=RUN init.checkpoint=latest"
    ),
    "optim.qk_clip": acts("optim.qk_clip=0.001", LOSS, "plain_keys"),
    "optim.qk_clip_interval": acts(
        "optim.qk_clip_interval=3", LOSS, "plain_keys", control=("optim.qk_clip=0.001",)
    ),
    "optim.router_warmup_steps": acts("optim.router_warmup_steps=40", LOSS),
    "optim.layer_lr_decay": acts("optim.layer_lr_decay=0.5", LOSS),
    "optim.freeze": refused("optim.freeze=[embedding]", "moments of what was trained alone"),
    **{
        f"optim.groups.*.{name}": reaches(f"optim.groups=[{{match: norms, {name}: {value}}}]")
        for name, value in (("lr_factor", 0.5), ("weight_decay", 0.5), ("layers", "[0, 0]"))
    },
    "optim.groups.*.match": reaches("optim.groups=[{match: norms}]"),
    # training
    "train.num_steps": acts("train.num_steps=30", "train/lr"),
    "train.num_tokens": acts("train.num_tokens=3840", "train/lr"),
    "train.num_epochs": acts("train.num_epochs=20", "train/lr"),
    "train.micro_batch_size": acts("train.micro_batch_size=2", LOSS),
    "train.global_batch_size": acts("train.global_batch_size=8", "tokens"),
    "train.batch_size_rampup_tokens": acts(
        "train.batch_size_rampup_tokens=12800 train.batch_size_rampup=[1,1]", "tokens"
    ),
    "train.batch_size_rampup": acts("train.batch_size_rampup=[1,1,400]", "tokens"),
    "train.precision": acts("train.precision=bf16", LOSS),
    "train.clip_grad_norm": acts("train.clip_grad_norm=0.001", LOSS, control=("optim.eps=0.1",)),
    "train.log_interval": acts(
        "train.log_interval=3", lambda ran, other: len(ran.records) < len(other.records)
    ),
    "train.eval_interval": acts("train.eval_interval=1", "eval/val_loss"),
    "train.eval_max_sequences": acts("train.eval_max_sequences=8", "eval/val_loss"),
    "train.stop_after_step": acts(
        "train.stop_after_step=12", lambda ran, other: max(ran.values("step")) == 12
    ),
    "train.sample_prompt": reaches("train.sample_prompt=x"),
    "train.compile": reaches("train.compile=blocks"),
    "train.deterministic": reaches("train.deterministic=true"),
    "train.on_nonfinite": reaches("train.on_nonfinite=skip"),
    # checkpoints, sinks, watching
    "checkpoint.save_interval": acts(
        "checkpoint.save_interval=1", lambda ran, other: ran.checkpoints() != other.checkpoints()
    ),
    "checkpoint.keep_last": acts(
        "checkpoint.keep_last=1",
        lambda ran, other: len(ran.checkpoints()) < len(other.checkpoints()),
        control=("checkpoint.keep_best=false",),
    ),
    "checkpoint.keep_best": acts(
        "checkpoint.keep_best=false", lambda ran, other: best_of(ran) != best_of(other)
    ),
    "profile.steps": acts(
        "profile.steps=[11,12]",
        lambda ran, other: profiled(ran) == [11, 12] and not (other.folder / "profile").exists(),
    ),
    "profile.all_ranks": reaches("profile.all_ranks=true", "profile.steps=[11,12]"),
    "checkpoint.asynchronous": reaches("checkpoint.asynchronous=true"),
    "checkpoint.on_error": reaches("checkpoint.on_error=continue"),
    "checkpoint.grace_seconds": reaches("checkpoint.grace_seconds=5.0"),
    "tracker.metrics": acts(
        "tracker.metrics=brief", lambda ran, other: len(ran.records[0]) < len(other.records[0])
    ),
    "tracker.tensorboard": acts(
        "tracker.tensorboard=true", lambda ran, other: (ran.folder / "tensorboard").is_dir()
    ),
    "tracker.media_interval": reaches("tracker.media_interval=3"),
    "tracker.max_log_mib": reaches("tracker.max_log_mib=3"),
    "tracker.wandb.mode": reaches("tracker.wandb.mode=offline"),
    "tracker.wandb.project": reaches("tracker.wandb.project=p"),
    "tracker.wandb.entity": reaches("tracker.wandb.entity=e"),
    "audit.sample_one_in": acts(
        "audit.sample_one_in=2", lambda ran, other: sampled(ran) > sampled(other)
    ),
    "audit.max_flagged": reaches("audit.max_flagged=3"),
    "audit.max_mib": reaches("audit.max_mib=3"),
    **{
        f"watchdog.{name}": reaches(f"watchdog.{name}={value}")
        for name, value in (
            ("timeout_seconds", 50.0),
            ("startup_seconds", 500.0),
            ("straggler_ratio", 3.0),
        )
    },
    # alarms
    "alarms.*.metric": acts(
        "alarms.collapse.metric=train/loss", ALARM, control=("alarms.collapse.above=1.1",)
    ),
    "alarms.*.above": acts(
        "alarms.collapse.above=0.01",
        ALARM,
        control=("alarms.collapse.metric=train/loss", "alarms.collapse.above=100"),
    ),
    "alarms.*.below": acts(
        "alarms.entropy.below=2.0",
        "alarm/entropy",
        control=("alarms.entropy.for_steps=0", "alarms.entropy.below=0.0"),
    ),
    "alarms.*.absolute": reaches("alarms.collapse.absolute=true"),
    "alarms.*.for_steps": acts(
        "alarms.imbalance.for_steps=0", "alarm/imbalance", control=("alarms.imbalance.above=0.01",)
    ),
    "alarms.*.after_step": acts(
        "alarms.collapse.after_step=40", ALARM, control=("alarms.collapse.metric=train/loss",)
    ),
    "alarms.*.action": acts(
        "alarms.collapse.action=freeze_bias",
        ROUTED,
        "bias",
        ("alarms.collapse.above=0.01", "balance.bias_update_rate=0.5"),
        5,
    ),
    "alarms.*.points_at": reaches("alarms.collapse.points_at=idlest"),
    "alarms.*.meaning": reaches("alarms.collapse.meaning=words"),
    # devices, processes, machines
    "experts.backend": reaches("experts.backend=reference"),
    "experts.recompute": reaches("experts.recompute=true"),
    "experts.precision": acts("experts.precision=fp8", LOSS),
    "train.grad_accum_dtype": acts(
        "train.grad_accum_dtype=bf16 train.micro_batch_size=1",
        LOSS,
        control=("train.precision=bf16", "train.micro_batch_size=1"),
    ),
    "train.master_dtype": acts("train.master_dtype=bf16", LOSS, control=("train.precision=bf16",)),
    "experts.token_rounding": acts("experts.token_rounding=8", ROUTED),
    "dispatcher.name": reaches("dispatcher=local"),
    **{
        f"dispatcher.{name}": reaches(f"dispatcher.{name}={value}", *EXPERT_PARALLEL, world_size=2)
        for name, value in (("num_chunks", 2), ("payload", "fp8"), ("buffer_factor", 2.0))
    },
    "parallel.expert_parallel_size": reaches(*EXPERT_PARALLEL, world_size=2),
    "parallel.tensor_parallel_size": reaches(
        "parallel.tensor_parallel_size=2",
        "model.num_kv_heads=2",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.pipeline_parallel_size": reaches(
        "parallel.pipeline_parallel_size=2",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.pipeline_split": reaches(
        "parallel.pipeline_split=[1,1]",
        "parallel.pipeline_parallel_size=2",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.virtual_stages": reaches(
        "parallel.virtual_stages=2",
        "parallel.pipeline_parallel_size=2",
        "model.num_layers=4",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.overlap_experts": reaches(
        "parallel.overlap_experts=true",
        "parallel.expert_parallel_size=2",
        "train.micro_batch_size=1",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.context_parallel_size": reaches(
        "parallel.context_parallel_size=2",
        "model.num_kv_heads=2",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.context_gather_size": reaches(
        "parallel.context_parallel_size=2",
        "parallel.context_gather_size=2",
        "launch=deepspeed",
        "launch.num_devices=2",
        world_size=2,
    ),
    "parallel.placement": refused("parallel.placement=/nowhere/p.json", "cannot be read"),
    "parallel.ranks_per_node": reaches("parallel.ranks_per_node=2"),
    "parallel.timeout_seconds": reaches("parallel.timeout_seconds=100"),
    "deepspeed.communication_data_type": reaches("deepspeed.communication_data_type=fp32"),
    **{
        f"deepspeed.zero_optimization.{name}": reaches(
            f"deepspeed.zero_optimization.{name}={value}", "deepspeed.zero_optimization.stage=3"
        )
        for name, value in (
            ("overlap_comm", "false"),
            ("reduce_bucket_size", 10),
            ("allgather_bucket_size", 10),
            ("allgather_partitions", "false"),
            ("offload_optimizer", "{device: cpu}"),
            ("offload_param", "{device: cpu}"),
            ("sub_group_size", 10),
            ("stage3_max_live_parameters", 10),
            ("stage3_max_reuse_distance", 10),
            ("stage3_prefetch_bucket_size", 10),
            ("stage3_param_persistence_threshold", 10),
            ("stage3_gather_16bit_weights_on_model_save", "false"),
        )
    },
    "deepspeed.zero_optimization.round_robin_gradients": refused(
        "deepspeed.zero_optimization.round_robin_gradients=true"
    ),
    "deepspeed.zero_optimization.stage": reaches("deepspeed.zero_optimization.stage=2"),
    "launch.kind": reaches("launch.kind=deepspeed"),
    "launch.num_devices": reaches("launch.num_devices=2", "launch=deepspeed", world_size=2),
    "launch.num_nodes": reaches("launch.num_nodes=2", "launch=slurm", world_size=2),
    "launch.hostfile": reaches("launch.hostfile=hosts", "launch=deepspeed"),
    "launch.launcher": reaches(
        "launch.launcher=openmpi", "launch=deepspeed", "launch.hostfile=hosts"
    ),
    "launch.elastic": reaches("launch.elastic=true", "launch=deepspeed", "launch.hostfile=hosts"),
    "launch.node_rank": reaches("launch.node_rank=0", *NODES[:3], *NODES[4:], world_size=2),
    "launch.master_addr": reaches("launch.master_addr=g", *NODES[:4], *NODES[5:], world_size=2),
    "launch.master_port": reaches("launch.master_port=5", *NODES[:5], world_size=2),
    "launch.max_restarts": reaches("launch.max_restarts=2", "launch=deepspeed"),
    **{
        f"launch.{name}": reaches(f"launch.{name}={value}")
        for name, value in (
            ("ssh_port", 22),
            ("listen_addr", "h"),
            ("forward_env", "[A]"),
            ("secrets_file", "s"),
            ("restart_delay_seconds", 1.0),
            ("dry_run", "true"),
            ("check_memory", "false"),
        )
    },
    "launch.env.*": reaches("launch.env.A_NAME=value"),
    **{
        f"launch.slurm.{name}": reaches(f"launch.slurm.{name}={value}")
        for name, value in (
            ("partition", "p"),
            ("account", "a"),
            ("qos", "q"),
            ("time", "'1:00:00'"),
            ("gpus_per_node", 2),
            ("requeue", "false"),
            ("extra", "['--exclusive']"),
        )
    },
}


def best_of(ran: Ran) -> dict:
    return json.loads((ran.folder / "checkpoints" / "best.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sampled(ran: Ran) -> int:
    return sum(path.stat().st_size for path in (ran.folder / "audit").glob("*") if path.is_file())


# --- all keys -------------------------------------------------------------------------------------


def general(key: str) -> str:
    """alarms.NAME.above -> alarms.*.above: names that people choose stand for one another."""
    key = re.sub(r"^alarms\.[^.]+\.", "alarms.*.", key)
    key = re.sub(r"^data\.sources\.\d+\.", "data.sources.*.", key)
    key = re.sub(r"^data\.validation\.sources\.\d+\.", "data.validation.sources.*.", key)
    key = re.sub(r"^data\.mixture\.schedule\.\d+\.", "data.mixture.schedule.*.", key)
    key = re.sub(r"^optim\.groups\.\d+\.", "optim.groups.*.", key)
    return re.sub(r"^launch\.env\..*", "launch.env.*", key)


def of_record(cls: type, path: str = "") -> set[str]:
    """Keys of a record and of the records in it."""
    found = set()
    for name, hint in typing.get_type_hints(cls).items():
        if name not in {f.name for f in dataclasses.fields(cls)}:
            continue
        parts = [hint, *typing.get_args(hint)]
        component = next((part for part in parts if part in KINDS), None)
        record = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        key = f"{path}{name}"
        if component is not None:
            found.add(f"{key}.name")
            found |= {
                f"{key}.{knob.name}"
                for choice in KINDS[component].values()
                for knob in dataclasses.fields(choice)
            }
        elif record is AlarmRule or (typing.get_origin(hint) is tuple and record is not None):
            found |= of_record(record, f"{key}.*.")
        elif record is not None:
            found |= of_record(record, f"{key}.")
        elif key == "deepspeed":
            found |= {f"{key}.{k}" for k in DEEPSPEED_KEYS - {"zero_optimization"}}
            found |= {f"{key}.zero_optimization.{k}" for k in ZERO_KEYS}
        elif key == "launch.env":
            found.add("launch.env.*")
        else:
            assert not isinstance(hint, types.GenericAlias) or typing.get_origin(hint) is tuple, (
                f"{key}: what keys has it?"
            )
            found.add(key)
    return found


def every_key() -> set[str]:
    found = of_record(RunConfig) | set(flat(plain(composed())))
    options = {
        path.name: sorted(file.stem for file in path.glob("*.yaml") if file.stem != "base")
        for path in sorted(CONF.iterdir())
        if path.is_dir() and path.name not in ("experiment", "debug")
    }
    # Each group has its own part of the config, so that options of all groups are composed at once.
    for choice in itertools.zip_longest(*options.values()):
        chosen = (f"{group}={name}" for group, name in zip(options, choice, strict=True) if name)
        found |= set(flat(OmegaConf.to_container(composed(*chosen), resolve=False)))
    empty = {"alarms", "launch.env", "optim.groups"}  # groups that hold nothing under some option
    return {general(key) for key in found if key not in empty} - set(OF_THE_COMMAND) | {
        "launch.dry_run"
    }


def test_every_key_is_classified():
    keys = every_key()
    assert len(keys) > 200
    assert keys == set(CASES), (
        f"say in CASES what changing these in a running run does: {sorted(keys - set(CASES))}; "
        f"no such keys: {sorted(set(CASES) - keys)}"
    )


def test_the_classification_fails_when_a_key_appears_that_nobody_classified(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Wider(RunConfig):
        brand_new: int = 0

    assert "brand_new" in of_record(Wider) and "brand_new" not in CASES


# --- each of them ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs.base(NAME): a run of BASES that was stopped; runs.resumed(NAME, overrides): a copy that
    has gone on.
    """
    return Runs(tmp_path_factory.mktemp("settings"))


class Runs:
    def __init__(self, folder: Path):
        self.folder, self.data = folder, write_text(folder)
        self.ran: dict[tuple, Ran] = {}

    def base(self, name: str) -> Path:
        run = self.folder / name
        if not run.exists():
            config = composed(*COMMON, *BASES[name], *self.data, f"run_dir={run}")
            saved.save_config(config)
            trained(config)
        return run

    def asked(self, run: Path, *overrides: str):
        """The config of a resume, and what it prints."""
        overrides = tuple(setting(o) for o in overrides)
        config = merged(
            load_config(str(run / "config.yaml")), composed(*overrides), list(overrides), str(run)
        )
        return config, examine(config, parse(plain(config), 1))

    def resumed(self, name: str, *overrides: str, steps: int = 3) -> Ran:
        key = (name, overrides, steps)
        if key not in self.ran:
            base = self.base(name)
            done = json.loads((base / "result.json").read_text())["step"]
            run = self.folder / f"resumed-{len(self.ran)}"
            shutil.copytree(base, run)
            config, lines = self.asked(run, f"train.stop_after_step={done + steps}", *overrides)
            saved.save_config(config)
            trained(config)
            (run / "config.txt").write_text(json.dumps(lines) + "\n")
            self.ran[key] = Ran(run, done)
        return self.ran[key]


def cases(kind: type) -> list:
    return [
        pytest.param(key, case, id=key) for key, case in CASES.items() if isinstance(case, kind)
    ]


@pytest.mark.parametrize(("key", "case"), some_daily(cases(Acts), 12))
def test_it_acts_and_is_told(runs, key, case):
    override = case.override.replace("CACHE", str(runs.folder / "CACHE"))
    control = runs.resumed(case.base, *case.control, steps=case.steps)
    ran = runs.resumed(case.base, *case.control, *override.split(), steps=case.steps)
    told = json.loads((ran.folder / "config.txt").read_text())
    name = key.removesuffix(".name")
    assert any(
        re.match(r"changed: " + re.escape(name).replace(r"\*", "[a-z_]+") + " ", line)
        for line in told
    ), told
    if callable(case.seen):
        assert case.seen(ran, control)
    else:
        values = {name: (ran.values(name), control.values(name)) for name in case.seen.split()}
        assert any(ours != others for ours, others in values.values()), values


@pytest.mark.parametrize(("key", "case"), some_daily(cases(Reaches), 8))
def test_it_is_in_the_record_that_the_run_is_built_from(runs, key, case):
    run = runs.base("top_k")
    overrides = tuple(setting(o) for o in case.overrides[::-1])
    config = merged(
        load_config(str(run / "config.yaml")), composed(*overrides), list(overrides), str(run)
    )
    before, after = (flat(plain(c)) for c in (load_config(str(run / "config.yaml")), config))
    own = case.overrides[0].split("=")[0]
    if own.count("."):
        assert general(own) == general(key) or key.startswith(own)
        assert {k for k in after if k == own or k.startswith(f"{own}.")} and any(
            after[k] != before.get(k) for k in after if k == own or k.startswith(f"{own}.")
        )
    assert parse(plain(config), case.world_size)


@pytest.mark.parametrize(("key", "case"), some_daily(cases(Refused), 8))
def test_it_is_refused_with_the_reason(runs, key, case):
    with pytest.raises(ValueError) as error:
        runs.asked(runs.base(case.base), case.override)
    message = str(error.value)
    assert key.replace(".*", ".0") in message or "attention" in message, message
    assert case.words in message
    assert isinstance(error.value, ConfigError)


def test_every_fail_safe_can_be_switched_on_and_off_again_on_one_rank(runs):
    """There is no load that an overload could compare, and no snapshot for a spike yet; switched
    off, nothing of them stays.
    """
    ran = runs.resumed("top_k", "fail_safe=full", "fail_safe.snapshot_interval=1", steps=4)
    assert len(ran.records) >= 4
    config, _ = runs.asked(ran.folder, "fail_safe=default", "train.stop_after_step=16")
    saved.save_config(config)
    trained(config)
    state = json.loads((ran.folder / "checkpoints" / "step-00000016" / "state.json").read_text())
    assert not state["spike"]["has_snapshot"] and not state["routing"]["spike"]


# --- a run's config and its checkpoints -----------------------------------------------------------


@pytest.fixture(scope="module")
def drifted(runs):
    """A run whose best checkpoint, of step 10, is older than its router and its attention."""
    ran = runs.resumed(
        "top_k",
        "router=expert_choice",
        "balance=none",
        "attention=scc",
        "attention.block_size=4",
        "attention.coarse_block_size=2",
        "attention.window_size=4",
        "attention.top_k=1",
        "checkpoint.keep_best=false",
        steps=2,
    )
    shutil.copytree(ran.folder, runs.folder / "drifted")
    folder = runs.folder / "drifted" / "checkpoints"
    shutil.copytree(
        runs.base("top_k") / "checkpoints" / "step-00000010",
        folder / "step-00000010",
        dirs_exist_ok=True,
    )
    point_best(
        folder,
        "step-00000010",
        json.loads((runs.base("top_k") / "result.json").read_text())["val_loss"],
        4,
    )
    return runs.folder / "drifted"


def test_a_resume_prints_what_changed(runs):
    _, lines = runs.asked(
        runs.base("top_k"),
        "router=expert_choice",
        "balance=none",
        "optim.lr=0.001",
        "train.stop_after_step=12",
    )
    assert (
        "changed: router top_k -> expert_choice" in lines
        and "changed: optim.lr 0.01 -> 0.001" in lines
    )
    assert runs.asked(runs.base("top_k"))[1] == ["changed: train.stop_after_step 10 -> null"]


@pytest.mark.parametrize("which", ["best", "latest"])
def test_evaluation_reads_the_config_that_the_checkpoint_was_made_with(runs, drifted, which):
    recorded = json.loads(
        ((runs.base("top_k") if which == "best" else drifted) / "result.json").read_text()
    )["val_loss"]
    config = composed(
        f"run={drifted}", f"checkpoint={which}", "max_sequences=4", command="evaluate"
    )
    assert evaluate.main(config) == pytest.approx(recorded, rel=1e-5)


def test_generation_and_the_sample_after_training_read_it_too(runs, drifted):
    texts = [
        "".join(generate.sample(str(run), "the quick", 8, 0.0, 1.0, 0))
        for run in (runs.base("top_k"), drifted)
    ]
    assert texts[0] == texts[1]


def test_the_config_of_a_checkpoint_says_what_it_was_made_under_but_not_where_the_data_lie_now(
    runs, drifted, tmp_path
):
    folder = tmp_path / "moved"
    shutil.copytree(drifted, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"cache_dir: .*", "cache_dir: elsewhere", text))
    best = load_run(str(folder), checkpoint=folder / "checkpoints" / "step-00000010")
    assert best.router.name == "top_k" and best.data.cache_dir == "elsewhere"
    assert load_run(str(folder)).router.name == "expert_choice"


# --- a run of an earlier version ------------------------------------------------------------------


@pytest.fixture(scope="module")
def earlier(runs):
    """A run whose configs are as versions wrote them that named components by dotted paths."""
    before = {name: dotted for dotted, name in reversed(FORMER.items())}
    folder = runs.folder / "earlier"
    shutil.copytree(runs.base("top_k"), folder)
    for path in (folder / "config.yaml", *folder.glob("checkpoints/*/config.yaml")):
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for kind in SETTINGS:
            if config[kind]["name"] in before:
                config[kind] = {"_target_": before[config[kind].pop("name")], **config[kind]}
            else:
                del config[kind]  # there was none yet
        path.write_text(OmegaConf.to_yaml(config))
        if path.parent != folder:  # a checkpoint lists what it holds
            manifest = json.loads((path.parent / "manifest.json").read_text())
            manifest["files"]["config.yaml"] = file_facts(path)
            (path.parent / "manifest.json").write_text(json.dumps(manifest))
    assert "model.dispatch.AllToAllDispatcher" in (folder / "config.yaml").read_text()
    return folder


def test_a_run_of_an_earlier_version_has_changed_in_nothing(runs, earlier):
    assert runs.asked(earlier)[1] == ["changed: train.stop_after_step 10 -> null"]
    _, lines = runs.asked(earlier, "router=expert_choice", "balance=none")
    assert "changed: router top_k -> expert_choice" in lines
    assert not any("dispatcher" in line or "attention" in line for line in lines)


def test_a_run_of_an_earlier_version_is_resumed_and_evaluated(runs, earlier, tmp_path):
    config = composed(f"run={earlier}", "max_sequences=4", command="evaluate")
    recorded = json.loads((earlier / "result.json").read_text())["val_loss"]
    assert evaluate.main(config) == pytest.approx(recorded, rel=1e-5)
    folder = tmp_path / "earlier"
    shutil.copytree(earlier, folder)
    config, _ = runs.asked(folder, "train.stop_after_step=13")
    saved.save_config(config)
    trained(config)
    assert "_target_" not in (folder / "config.yaml").read_text()
    expected = runs.resumed("top_k", steps=3)
    assert Ran(folder, 10).values("train/loss") == expected.values("train/loss")


def test_placement_goes_by_the_newest_checkpoint(runs, drifted, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(drifted, folder)
    config = load_config(str(folder / "config.yaml"))
    # of a start that saved nothing
    config.parallel.ranks_per_node, config.parallel.placement = 7, "/nowhere.json"
    OmegaConf.save(config, folder / "config.yaml")
    place.main(composed(f"run={folder}", "expert_parallel_size=2", command="place"))
    told = capsys.readouterr().out
    assert "now: experts in order" in told and "left out" not in told


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.num_steps=10",), "is finished: it has done all 10 steps of train.num_steps"),
        (("train.num_steps=9",), "train.num_steps 9 is below the 10 steps"),
        (("train.stop_after_step=10",), "it has done all 10 steps of train.stop_after_step"),
        (("train.stop_after_step=4",), "train.stop_after_step 4 is below the 10 steps"),
        (("train.num_steps=9", "seed=3"), "cannot change seed 1234 -> 3"),
    ],
)
def test_nothing_to_train_is_refused_and_nothing_is_overwritten(
    runs, tmp_path, monkeypatch, overrides, words
):
    """By the command itself, before a rank is started."""
    run = tmp_path / "run"
    shutil.copytree(runs.base("top_k"), run)
    before = contents(run)
    asked = [f"resume={run}", *overrides]
    config = composed(*asked)
    monkeypatch.setattr(
        command.HydraConfig, "get", lambda: OmegaConf.create({"overrides": {"task": asked}})
    )
    monkeypatch.setattr(command, "supervise", lambda *arguments: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match=re.escape(words)):
        command.train(config)
    assert contents(run) == before


def test_a_checkpoint_of_another_run_is_no_change_that_was_asked_for(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.base("top_k"), run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(
        CheckpointError,
        match=r"step-00000010 was made under another config.*model.num_layers 2 -> 3",
    ):
        runs.asked(run)


def test_a_checkpoint_whose_config_is_damaged_is_passed_over(runs, tmp_path):
    run = runs.resumed("top_k", "router.top_k=3", "checkpoint.keep_last=5", steps=3).folder
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = copy / "checkpoints" / "step-00000013" / "config.yaml"
    config.write_bytes(b"\0" * config.stat().st_size)
    _, lines = runs.asked(copy)
    # against the checkpoint before, which had two
    assert "changed: router.top_k 2 -> 3" in lines


def test_the_plan_of_a_resumed_run_is_that_of_its_own_config(runs, monkeypatch, capsys):
    asked = [f"resume={runs.base('top_k')}", "train.micro_batch_size=2"]
    monkeypatch.setattr(
        command.HydraConfig, "get", lambda: OmegaConf.create({"overrides": {"task": asked}})
    )
    plan.main(composed(*asked))
    told = capsys.readouterr().out
    assert (
        "changed: train.micro_batch_size 1 -> 2" in told
        and "4 sequences of 32 = 2 per device" in told
    )
    asked = [f"resume={runs.base('top_k')}", "train.num_steps=10"]
    with pytest.raises(SystemExit):
        plan.main(composed(*asked))
    assert "is finished" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_refused_before_it_starts(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.base("top_k"), run, ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        runs.asked(run)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_whose_last_evaluation_is_missing_may_make_up_for_it(runs, tmp_path, stopped):
    run = tmp_path / "run"
    shutil.copytree(runs.base("top_k"), run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(
        json.dumps(result | ({"stopped": True} if stopped else {"step": 5}))
    )
    config, _ = runs.asked(run, "train.stop_after_step=10")
    trained(config)
    again = json.loads((run / "result.json").read_text())
    assert again["step"] == 10 and again["val_loss"] == pytest.approx(result["val_loss"], rel=1e-6)
    assert not stopped or again["train_loss"] == result["train_loss"]


def test_losses_on_other_held_out_sequences_are_not_compared(runs):
    """Four sequences may be easier than sixteen: the best of the one says nothing about the best of
    the other.
    """
    base = runs.base("top_k")
    assert json.loads((base / "checkpoints" / "best.json").read_text())["sequences"] == 4
    for loss, best in ((0.1, 12), (99.0, 12)):
        run = runs.folder / f"subset-{loss}"
        shutil.copytree(base, run)
        point_best(run / "checkpoints", "step-00000010", loss, 4)
        config, _ = runs.asked(run, "train.stop_after_step=12", "train.eval_max_sequences=16")
        trained(config)
        assert (
            json.loads((run / "checkpoints" / "best.json").read_text())["checkpoint"]
            == f"step-{best:08d}"
        )
    same = runs.folder / "same-subset"
    shutil.copytree(base, same)
    point_best(same / "checkpoints", "step-00000010", 0.1, 4)
    config, _ = runs.asked(same, "train.stop_after_step=12")
    trained(config)
    assert json.loads((same / "checkpoints" / "best.json").read_text())["val_loss"] == 0.1


def test_a_sparse_run_is_evaluated_in_the_stage_it_had_reached(runs):
    """Still dense when the checkpoint was made: evaluated densely, as its recorded loss was."""
    ran = runs.resumed("scc", "attention.dense_steps=40", "checkpoint.keep_best=false", steps=2)
    recorded = json.loads((ran.folder / "result.json").read_text())["val_loss"]
    config = composed(
        f"run={ran.folder}", "checkpoint=latest", "max_sequences=4", command="evaluate"
    )
    assert evaluate.main(config) == pytest.approx(recorded, rel=1e-5)


def test_the_report_of_a_run_with_another_number_of_experts_keeps_its_histogram(runs):
    ran = runs.resumed("top_k", "router.top_k=3")
    frames = read_run(str(ran.folder)).frames
    assert (
        frames is not None and frames.k_histogram is not None and frames.k_histogram.shape[2] == 4
    )


def test_an_interpolation_in_an_override_means_the_runs_own_settings(runs):
    """Not those of the defaults, on which Hydra composes it."""
    config, _ = runs.asked(runs.base("scc"), "attention.min_sparse_length=${train.seq_len}")
    assert plain(config)["attention"]["min_sparse_length"] == 32 != composed().train.seq_len


def test_settings_of_the_runs_own_router_can_be_given_without_naming_it():
    """Hydra knows the keys of the default router only."""
    assert (
        setting("router.budget=3") == "++router.budget=3"
        and setting("router=top_p") == "router=top_p"
    )
    assert (
        setting("resume=runs/a.b=c") == "++resume='runs/a.b=c'"
        and setting("hydra.sweep.dir=x") == "hydra.sweep.dir=x"
    )
    assert setting("+alarms.mine={metric: a.b}") == "+alarms.mine={metric: a.b}"
