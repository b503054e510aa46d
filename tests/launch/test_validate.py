"""Bad settings get a sentence before anything starts, all of them at once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from launch.config.build import ConfigError
from launch.config.deepspeed import DEEPSPEED_KEYS, ZERO_KEYS
from launch.config.overrides import plain
from launch.config.parse import parse
from model.cost.parameters import count_parameters, flops_per_token
from model.placement.record import LayerPlacement, Placement
from tests import composing
from train.config.component import FORMER, SETTINGS

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")


def composed(*overrides: str) -> dict:
    return plain(composing.composed(*overrides))


@pytest.fixture(scope="module")
def base() -> dict:
    return composed()


def problems(config: dict, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(config, world_size)
    return error.value.problems


def changed(base: dict, **changes) -> dict:
    """changed(base, model__hidden_size=3): a copy with nested values replaced or added."""
    config = copy.deepcopy(base)
    for name, value in changes.items():
        node, keys = config, name.split("__")
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
    return config


def test_the_default_config_is_valid(base):
    assert parse(base, 1).model.num_experts == 8


MODELS = sorted({p.stem for p in (Path(CONF) / "model").glob("*.yaml")} - {"base"})


@pytest.mark.parametrize("model", MODELS)
def test_every_preset_is_valid(model):
    router = "router=sigmoid_top_k" if "deepseek" in model else "router=top_k"
    assert parse(composed(f"model={model}", router), 1).model.num_layers > 0


# Total and active parameters in billions, as papers and model cards give them; whole numbers of
# parameters where the files on the Hub say so. Some leave embedding and head, or the embedding
# alone, out of what is active.
PUBLISHED = {
    "olmoe_1b_7b": (6.92, 1.28),
    "mixtral_8x7b": (46.7, 12.9),
    "qwen3_30b_a3b": (30.5, 3.35),
    "qwen3_30b_a3b_128k": (30.5, 3.35),
    "qwen3_30b_a3b_1m": (30.5, 3.35),
    "deepseek_v2_lite": (15.7, "2.4 without look-up"),
    "deepseek_v2": (236, "21 without look-up"),
    "deepseek_v3": (671, "36.7 without look-up"),
    "deepseek_v4_flash": (284, "13 without look-up"),
    "moonlight_16b_a3b": (15.96, "2.24 without embeddings"),
    "kimi_k2": (1040, 32.6),
    "llama_3_1_8b": (8_030_261_248, None),
    "qwen2_5_7b": (7_615_616_512, None),
    "qwen3_8b": (8_190_735_360, None),
    "qwen2_57b_a14b": (57.4, 14.2),
    "glm_4_5_air": (106, "12 without embeddings"),
    "granite_3_1_3b_a800m": (3.3, "0.8 without embeddings"),
    "minimax_m2": (229, "10 without embeddings"),
    "dots_llm1": (142, 14),
    "gpt_oss_20b": (20.9, "3.61 with the head alone"),
}


CONTINUED = ("qwen3_30b_a3b_128k", "qwen3_30b_a3b_1m")
"""Presets that go on from a model on longer rows, and train less."""


def test_every_published_preset_is_compared_with_its_publication():
    names = {p.stem for p in (Path(CONF) / "experiment").glob("*.yaml")}
    assert set(PUBLISHED) == {name for name in names if not name.startswith("quickstart")}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_experiments_are_the_published_models(experiment):
    run = parse(composed(f"experiment={experiment}"), 1)
    assert run.train.precision == "bf16" and run.experiment_name == experiment
    count = count_parameters(run.model, run.experts_per_token, run.attention.arguments)
    total, active = PUBLISHED[experiment]
    # multi-token prediction is told apart: of DeepSeek-V3's 11.5B are no copies
    main = count.total - count.mtp - count.mtp_experts
    mtp = {"deepseek_v3": 11.5e9}.get(experiment, 0)
    assert count.total - main == pytest.approx(mtp, rel=0.01)
    if isinstance(total, int) and total > 1e6:
        assert count.total == total
    elif total is not None:
        assert main == pytest.approx(total * 1e9, rel=0.015)
    if isinstance(active, str):
        left_out = count.embedding / (1 if "embeddings" in active else 2)
        expected = float(active.split()[0]) * 1e9
        assert count.active - left_out == pytest.approx(expected, rel=0.025)
    elif active is not None:
        assert count.active == pytest.approx(active * 1e9, rel=0.01)


@pytest.mark.parametrize("experiment", [e for e in PUBLISHED if e not in CONTINUED])
def test_a_published_preset_plans_batches_that_such_a_model_is_trained_with(experiment):
    """Not those of the quickstart, with which a plan of its cost would mean nothing."""
    run = parse(composed(f"experiment={experiment}"), 1)
    assert run.train.seq_len >= 4096 and run.train.seq_len <= run.model.max_seq_len
    tokens = run.train.seq_len * run.train.global_batch_size
    assert 4e6 < tokens < 7e7 and tokens * run.train.num_steps > 1e12
    assert 500 <= run.optim.warmup_steps < run.train.num_steps / 50


@pytest.mark.parametrize("group", ["balance", "deepspeed", "debug", "dispatcher", "data"])
def test_every_group_option_composes(group):
    for option in sorted(p.stem for p in (Path(CONF) / group).glob("*.yaml")):
        form = {"files": "json", "chat": "json", "tokens": "npy"}.get(option)
        extra = [f"data.sources.0.path={form}", f"data.sources.0.data_files=x.{form}"]
        if option == "tokens":
            extra.append("data.tokenizer.end_of_document_id=0")
        parse(composed(f"{group}={option}", *(extra if form else ())), 1)


@pytest.mark.parametrize(
    ("place", "suggestion"),
    [
        ("model__num_expert", "model.num_experts"),
        ("train__num_step", "train.num_steps"),
        ("sed", "seed"),
        ("router__topk", "router.top_k"),
        ("tracker__wandb__mod", "tracker.wandb.mode"),
        ("deepspeed__zero_optimisation", "deepspeed.zero_optimization"),
    ],
)
def test_unknown_keys_get_a_suggestion(base, place, suggestion):
    (problem,) = problems(changed(base, **{place: 1}))
    assert f"did you mean {suggestion}?" in problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model__num_experts": 6},
            "num_experts 6 is not divisible by parallel.expert_parallel_size 4",
        ),
        ({"train__global_batch_size": 33}, "global_batch_size 33 is not a multiple"),
        ({"model__num_kv_heads": 3}, "num_heads 4 is not a multiple of model.num_kv_heads 3"),
        ({"model__hidden_size": 255}, "hidden_size 255 is not divisible"),
        ({"router__top_k": 9}, "router.top_k is 9"),
        ({"router__top_k": 1}, "normalize_weights"),
        ({"train__seq_len": 4096}, "train.seq_len 4096 exceeds model.max_seq_len"),
        ({"train__precision": "fp16"}, "train.precision is 'fp16'; choose one of fp32, bf16"),
        ({"train__num_steps": "many"}, "train.num_steps is 'many'; it must be a whole number"),
        ({"train__num_steps": 10}, "warmup_steps 20 must be below"),
        ({"train__batch_size_rampup": [8, 8]}, "must be [start, increment, samples]"),
        ({"train__batch_size_rampup": [6, 8, 100]}, "must be multiples"),
        ({"optim__lr": -1.0}, "optim.lr is -1.0"),
        ({"optim__wsd_decay_steps": 5}, "belongs to optim.decay_style=WSD"),
        ({"parallel__tensor_parallel_size": 0}, "parallel.tensor_parallel_size is 0"),
        (
            {"parallel__tensor_parallel_size": 3},
            "parallel.tensor_parallel_size 3 does not divide the 4 ranks",
        ),
        (
            {"parallel__tensor_parallel_size": 4, "train__global_batch_size": 8},
            "parallel.tensor_parallel_size 4 does not divide model.num_kv_heads 2, which its ranks "
            "share out",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "parallel__context_parallel_size": 2},
            "parallel.tensor_parallel_size 2 x parallel.context_parallel_size 2 does not divide "
            "model.num_kv_heads 2",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "train__seq_len": 127},
            "train.seq_len 127 is not divisible by parallel.tensor_parallel_size 2, whose ranks",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "model__vocab_size": 4097},
            "parallel.tensor_parallel_size 2 does not divide model.vocab_size 4097",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "model__num_dense_layers": 1}
            | {"model__intermediate_size": 63},
            "parallel.tensor_parallel_size 2 does not divide model.intermediate_size 63",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "optim__optimizer": "muon"},
            "with Muon (optim.optimizer, optim.groups): a part of a matrix",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "optim__freeze": ["embedding"]},
            "with optim.freeze ['embedding']: what is frozen is not cut yet",
        ),
        ({"deepspeed__gradient_clipping": 1.0}, "set train.clip_grad_norm"),
        ({"deepspeed__elasticity": {}}, "not available"),
        (
            {"deepspeed__zero_optimization": {"stage": 2, "contiguous_gradients": False}},
            "unknown key",
        ),
        ({"deepspeed__zero_optimization": {"stage": 4}}, "choose 0, 1, 2 or 3"),
        (
            {"deepspeed__zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "needs stage 1",
        ),
        (
            {"deepspeed__zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "needs stage 3",
        ),
        ({"router__name": "os.system"}, "router.name is 'os.system'; choose one of top_k, top_p"),
        ({"router": {"top_k": 2}}, "router needs a name; choose one of top_k, top_p"),
        (
            {"router": {"_target_": "model.routers.top_k.Nothing", "top_k": 2}},
            "which no version of this project has written; set router.name instead",
        ),
        ({"router___target_": "os.system"}, "unknown key router._target_"),
        ({"data__sources": []}, "data.sources is empty"),
        ({"checkpoint__keep_last": 0}, "at least the last one"),
        (
            {"dispatcher": {"name": "local"}},
            "use dispatcher=all_to_all",
        ),
        ({"dispatcher__num_chunks": 9}, "dispatcher.num_chunks is 9; a rank has"),
        ({"dispatcher__payload": "fp4"}, "dispatcher.payload is 'fp4'; choose native, bf16, fp8"),
        ({"dispatcher__buffer_factor": 0}, "dispatcher.buffer_factor is 0"),
        ({"parallel__ranks_per_node": 0}, "parallel.ranks_per_node is 0"),
        ({"parallel__placement": "/nowhere/placement.json"}, "parallel.placement"),
        ({"experts__token_rounding": -1}, "experts.token_rounding is -1"),
        ({"experts__token_rounding": 4096}, "experts.token_rounding 4096 is more than the"),
        (
            {"experts__backend": "fastest"},
            "choose one of auto, triton, grouped_mm, torch, reference",
        ),
        (
            {"deepspeed__zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "checkpoints would hold them",
        ),
        ({"train__grad_accum_dtype": "bf16"}, "train.precision=fp32 has no bf16 gradients"),
        ({"train__master_dtype": "bf16"}, "train.precision=fp32 trains the masters themselves"),
        (
            {"train__precision": "bf16", "train__master_dtype": "bf16", "optim__ema_decay": 0.9},
            "train.master_dtype is bf16 with optim.ema_decay=0.9",
        ),
        (
            {"train__precision": "bf16", "train__master_dtype": "bf16", "optim__optimizer": "muon"},
            "train.master_dtype is bf16, but Muon",
        ),
        (
            {
                "train__precision": "bf16",
                "train__master_dtype": "bf16",
                "deepspeed__zero_optimization": {"stage": 3},
            },
            "train.master_dtype is bf16 with deepspeed zero stage 3",
        ),
        (
            {
                "train__precision": "bf16",
                "train__master_dtype": "bf16",
                "parallel__pipeline_parallel_size": 2,
            },
            "train.master_dtype is bf16 with parallel.pipeline_parallel_size 2",
        ),
        ({"train__grad_accum_dtype": "fp16"}, "choose one of fp32, bf16"),
        ({"deepspeed__data_types": {"grad_accum_dtype": "fp32"}}, "set train.grad_accum_dtype"),
        ({"parallel__context_parallel_size": 0}, "parallel.context_parallel_size is 0"),
        (
            {"parallel__context_parallel_size": 4, "train__global_batch_size": 8},
            "parallel.context_parallel_size 4 does not divide model.num_kv_heads 2, which its "
            "ranks share out; choose one of 1, 2, or let more ranks gather keys and values "
            "(parallel.context_gather_size)",
        ),
        (
            {"parallel__context_parallel_size": 4, "parallel__context_gather_size": 3},
            "parallel.context_gather_size is 3; it must be at least 1 and divide "
            "parallel.context_parallel_size 4",
        ),
        ({"parallel__context_gather_size": 0}, "parallel.context_gather_size is 0"),
        ({"parallel__context_gather_size": 2}, "divide parallel.context_parallel_size 1"),
        (
            {
                "parallel__context_parallel_size": 4,
                "parallel__context_gather_size": 2,
                "model__num_kv_heads": 1,
                "train__global_batch_size": 8,
            },
            "parallel.context_parallel_size 4 / parallel.context_gather_size 2 = 2 does not divide "
            "model.num_kv_heads 1",
        ),
        (
            {"parallel__context_parallel_size": 3},
            "parallel.context_parallel_size 3 does not divide the 4 ranks",
        ),
        (
            {"parallel__context_parallel_size": 2, "train__seq_len": 127},
            "train.seq_len 127 is not divisible by parallel.context_parallel_size 2, whose ranks "
            "have equal parts of a row; nearest: 128",
        ),
        (
            {"parallel__context_parallel_size": 2, "train__global_batch_size": 15},
            "x 2 groups of ranks with rows of their own",
        ),
        ({"parallel__pipeline_parallel_size": 0}, "parallel.pipeline_parallel_size is 0"),
        (
            {"parallel__pipeline_parallel_size": 3},
            "parallel.pipeline_parallel_size 3 does not divide the 4 ranks; start a multiple of 3",
        ),
        (
            {"parallel__pipeline_parallel_size": 2},
            "parallel.expert_parallel_size 4 does not divide the 2 ranks of a stage; start a "
            "multiple of 8",
        ),
        (
            {"parallel__pipeline_parallel_size": 4, "model__num_layers": 3},
            "parallel.pipeline_parallel_size 4 is more than model.num_layers 3",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__pipeline_split": [4]},
            "for each of the parallel.pipeline_parallel_size 2 stages, or be null",
        ),
        ({"parallel__pipeline_split": [2, 2]}, "parallel.pipeline_split is [2, 2]; it must have"),
        (
            {"parallel__virtual_stages": 2},
            "parallel.virtual_stages is 2; it must be at least 1, and more than 1 takes "
            "parallel.pipeline_parallel_size of more than 1",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__virtual_stages": 0},
            "parallel.virtual_stages is 0",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__virtual_stages": 3},
            "parallel.pipeline_parallel_size 2 x parallel.virtual_stages 3 is more than "
            "model.num_layers 4",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__virtual_stages": 2}
            | {"parallel__pipeline_split": [2, 2]},
            "at least 1, for each of 2 virtual stages of each of the "
            "parallel.pipeline_parallel_size 2 stages, or be null",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__virtual_stages": 2}
            | {"deepspeed__zero_optimization": {"stage": 1, "overlap_comm": True}},
            "parallel.virtual_stages 2 with deepspeed.zero_optimization.overlap_comm under zero "
            "stage 1",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__virtual_stages": 2}
            | {
                "deepspeed__zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "cpu"},
                }
            },
            "parallel.virtual_stages 2 with deepspeed.zero_optimization.offload_optimizer under "
            "zero stage 2",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__pipeline_split": [1, 2]},
            "parallel.pipeline_split [1, 2] has 3 layers, model.num_layers is 4",
        ),
        (
            {
                "parallel__pipeline_parallel_size": 2,
                "deepspeed__zero_optimization": {"stage": 3},
            },
            "parallel.pipeline_parallel_size 2 with deepspeed zero stage 3: every stage would",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "lora__rank": 4},
            "parallel.pipeline_parallel_size 2 with lora.rank 4",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "optim__ema_decay": 0.99},
            "parallel.pipeline_parallel_size 2 with optim.ema_decay 0.99",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "optim__qk_clip": 100.0},
            "parallel.pipeline_parallel_size 2 with optim.qk_clip 100",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "optim__freeze": ["norms"]},
            "parallel.pipeline_parallel_size 2 with optim.freeze ['norms']",
        ),
        (
            {"parallel__overlap_experts": True, "train__global_batch_size": 16}
            | {"train__micro_batch_size": 4},
            "parallel.overlap_experts with one micro-batch a step: train.global_batch_size 16 is "
            "one of 4 rows on each of 4 ranks",
        ),
        (
            {"parallel__overlap_experts": True, "deepspeed__zero_optimization": {"stage": 3}},
            "parallel.overlap_experts with deepspeed zero stage 3",
        ),
        (
            {"parallel__overlap_experts": True, "train__compile": "blocks"},
            "parallel.overlap_experts with train.compile=blocks",
        ),
        ({"balance__aux_loss_scope": "world"}, "choose one of sequence, batch, global_batch"),
    ],
)
def test_contradictions_are_named(base, change, words):
    config = changed(
        base,
        parallel__expert_parallel_size=4,
        launch__kind="deepspeed",
        launch__num_devices=4,
        **change,
    )
    assert any(words in p for p in problems(config, 4)), problems(config, 4)


def test_nothing_travels_that_could_be_overlapped(base):
    alone = changed(base, parallel__overlap_experts=True)
    found = problems(alone)
    assert any("parallel.expert_parallel_size 1: no rows travel to experts" in p for p in found)


def test_half_precision_needs_a_zero_stage(base):
    config = changed(base, train__precision="bf16", deepspeed__zero_optimization={"stage": 0})
    assert any("use deepspeed=zero1" in p for p in problems(config))


def test_expert_size_must_divide_the_ranks(base):
    config = changed(base, parallel__expert_parallel_size=2, train__global_batch_size=24)
    assert any("does not divide the 3 ranks" in p for p in problems(config, 3))


def test_all_problems_are_reported_together(base):
    config = changed(
        base, model__num_kv_heads=3, optim__lr=-1.0, checkpoint__keep_last=0, router__top_k=99
    )
    assert len(problems(config)) == 4


def test_dense_model_needs_no_router_settings(base):
    assert (
        parse(changed(base, model__num_experts=0, model__num_dense_layers=0), 1).experts_per_token
        == 0
    )


def test_accepted_deepspeed_keys_exist_in_deepspeed():
    """DeepSpeed ignores keys it does not know: a renamed one would silently stop working."""
    from train.engine.library import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = set()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        known |= {name, field.alias}
    assert known >= ZERO_KEYS
    values = {v for v in vars(constants).values() if isinstance(v, str)}
    values.add("zero_optimization")  # named in a module of its own
    assert values >= DEEPSPEED_KEYS


# --- routers --------------------------------------------------------------------------------------

ROUTERS = sorted(p.stem for p in (Path(CONF) / "router").glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (Path(CONF) / "experiment").glob("*.yaml"))


ATTENTIONS = sorted(p.stem for p in (Path(CONF) / "attention").glob("*.yaml"))


def with_presets(options: list[str]) -> list:
    """Each option with every eighth preset, all of which are met; nightly with every one."""
    few = [(option, tuple(EXPERIMENTS[i % 8 :: 8])) for i, option in enumerate(options)]
    every = [
        pytest.param(o, tuple(EXPERIMENTS), id=f"{o}-all", marks=pytest.mark.nightly)
        for o in options
    ]
    return [*(pytest.param(*case, id=case[0]) for case in few), *every]


def test_a_day_meets_every_option_and_every_preset():
    for options in (ROUTERS, ATTENTIONS):
        daily = [case.values for case in with_presets(options) if not case.marks]
        assert [option for option, _ in daily] == options
        assert {experiment for _, few in daily for experiment in few} == set(EXPERIMENTS)


@pytest.mark.slow
@pytest.mark.parametrize(("router", "experiments"), with_presets(ROUTERS))
def test_any_router_goes_into_any_preset(router, experiments):
    """With balance=none, since some routers balance by themselves."""
    for experiment in experiments:
        config = composed(
            f"experiment={experiment}",
            "parallel=single",
            f"router={router}",
            "balance=none",
            "balance.aux_loss_coeff=0",
        )
        run = parse(config, 1)
        assert run.experts_per_token == (run.model.top_k if run.model.num_experts else 0)


@pytest.mark.parametrize("name", FORMER)
def test_a_config_of_an_earlier_version_means_the_same(name):
    """Dotted paths of classes stood where names stand now."""
    kind = next(kind for kind in SETTINGS if name.startswith(f"model.{kind[:8]}"))
    option = {"sparse": "scc"}.get(FORMER[name], FORMER[name])
    config = composed(f"{kind}={option}", "balance=none")
    settings = {key: value for key, value in config[kind].items() if key != "name"}
    before = config | {kind: {"_target_": name, **settings}}
    assert parse(before, 1) == parse(config, 1)


def test_presets_move_by_what_their_models_were_trained_with():
    """Muon: Kimi K2 (arXiv 2507.20534) with the clip, Moonlight (2502.16982), GLM-4.5 (2508.06471).
    DeepSeek-V3 (2412.19437) let the bias of its routers stand still for the last 500B tokens.
    """
    found = {}
    for experiment in PUBLISHED:
        optim = parse(composed(f"experiment={experiment}"), 1).optim
        found[experiment] = (optim.optimizer, optim.qk_clip)
    muon = {"kimi_k2": ("muon", 100)}
    muon |= dict.fromkeys(("moonlight_16b_a3b", "glm_4_5_air", "deepseek_v4_flash"), ("muon", None))
    assert found == {name: muon.get(name, ("adamw", None)) for name in PUBLISHED}

    run = parse(composed("experiment=deepseek_v3"), 1)
    still = run.balance.at(run.train.num_steps - 1, run.train.num_steps).bias_update_rate
    assert (run.balance.bias_update_rate, still) == (0.001, 0)
    start = run.balance.bias_rate_schedule.start_step(run.train.num_steps)
    tokens = run.train.global_batch_size * run.train.seq_len
    assert (run.train.num_steps - start) * tokens == pytest.approx(500e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "experiments"), with_presets(ATTENTIONS))
def test_any_attention_goes_into_any_preset(attention, experiments):
    """Latent and compressed attention, and Kimi K2's clip, with what their refusals ask for."""
    plain = ["rotary_dim=null", "qk_norm=none", "attention_bias=none", "attention_multiplier=null"]
    mended: list[str] = []
    if attention.startswith("mla"):
        mended = ["num_kv_heads=${model.num_heads}", "head_dim=192", *plain]
    elif attention in ("compressed", "csa", "csa2", "hca", "v4", "v4_flash"):
        mended = ["num_kv_heads=1", "head_dim=64", *plain, "num_mtp_layers=0", "rope_scaling=null"]
    more = [f"++model.{override}" for override in mended]
    if mended and not attention.startswith("mla"):
        more += ["++attention.output_groups=1", "train.mtp_coeff=0"]
    for experiment in experiments:
        overrides = (f"experiment={experiment}", "parallel=single", f"attention={attention}")
        overrides += ("optim.qk_clip=null",) if experiment == "kimi_k2" else ()
        run = parse(composed(*overrides, *more), 1)
        assert (
            flops_per_token(
                run.model, run.experts_per_token, run.train.seq_len, run.attention.arguments
            )
            > 0
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("router=relu",), "add balance=none"),
        (("router=threshold", "balance=loss_free"), "sets itself, by quantiles; add balance=none"),
        (
            ("router=expert_choice", "balance=quantile"),
            "sets itself, by quantiles; add balance=none",
        ),
        (("router=relu", "balance=loss_free"), "sets itself, by quantiles; add balance=none"),
        (
            ("router=null_experts", "balance=loss_free"),
            "sets itself, by quantiles; add balance=none",
        ),
        (("router=threshold", "balance.entropy_coeff=0.1"), "router.score_function is sigmoid"),
        (("router=top_p", "router.budget=20"), "router.budget 20"),
        (
            ("router=top_p", "router.budget=1e8", "router.budget_unit=flops"),
            "router.budget 1e+08 (flops)",
        ),
        (
            ("router=threshold", "balance=none", "router.budget=3", "router.budget_unit=flops"),
            "must be between 0.1 and 8; one expert per token is 1.18e+06 FLOPs",
        ),
        (("router=null_experts", "router.budget=0.01"), "must be between 0.1 and"),
        (
            ("router=top_p", "router.budget=0.5"),
            "must be between 1 (router.min_experts is 1) and 8",
        ),
        (
            ("router=threshold", "balance=none", "router.min_experts=3"),
            "must be between 3 (router.min_experts is 3) and 8",
        ),
        (
            ("router=relu", "balance=none", "router.min_experts=3"),
            "must be between 3 (router.min_experts is 3) and 8",
        ),
        (
            ("router=expert_choice", "balance=none", "router.max_experts=1"),
            "router.max_experts 1 is below router.top_k 2",
        ),
        (
            ("router=expert_choice", "balance=none", "router.min_experts=3"),
            "router.min_experts 3 is above router.top_k 2",
        ),
        (("budget.guard_capped=5",), "budget.guard_capped is 5"),
        (
            ("balance.bias_update=sign",),
            "balance.bias_update_rate 0.0 belongs to balance.bias_update=sign",
        ),
        (
            ("balance.bias_update=quantile", "balance.quantile_momentum=1"),
            "balance.quantile_momentum is 1",
        ),
        (("balance.histogram_bins=3",), "balance.histogram_bins is 3"),
        (("budget.ki=3",), "budget.kp 0.5 and budget.ki 3"),
        (("budget.hold_steps=0",), "budget.hold_steps is 0"),
        (("fail_safe.collapse_share=2",), "fail_safe.collapse_share is 2"),
        (("audit.sample_one_in=-1",), "audit.sample_one_in is -1"),
        (("model.top_k=9",), "model.top_k is 9"),
    ],
)
def test_routing_contradictions_are_named(overrides, message):
    assert any(message in problem for problem in problems(composed(*overrides))), problems(
        composed(*overrides)
    )


MUP = ("model.init=mup", "model.mup_base_hidden_size=128")
COMPILED = "train.compile=blocks"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.init=mup",), "needs model.mup_base_hidden_size"),
        (("model.mup_base_hidden_size=64",), "belongs to model.init=mup, which is depth_scaled"),
        ((*MUP, "model.mup_base_num_layers=0"), "model.mup_base_num_layers is 0"),
        ((*MUP, "attention=scc"), "no rule for attention=sparse"),
        ((*MUP, "lora.rank=4"), "no rule for adapters"),
        (("model.init=small", "+model.init_std=0.1"), "model.init_std is 0.1"),
        (("optim.router_warmup_steps=-1",), "optim.router_warmup_steps is -1"),
        (("balance.random_routing_steps=-1",), "balance.random_routing_steps is -1"),
        ((COMPILED, "deepspeed=zero3"), "does not go with ZeRO 3"),
        ((COMPILED, "attention=scc"), "does not go with attention=sparse; use attention=dense"),
        ((COMPILED, "router.capacity_factor=1.0"), "use router.capacity_factor=null"),
        ((COMPILED, "model.recompute=block"), "model.recompute=block; use model.recompute=none"),
        ((COMPILED, "balance.random_routing_steps=5"), "balance.random_routing_steps=5"),
        ((COMPILED, "objective=self_distil"), "objective=self_distil; use objective=next_token"),
    ],
)
def test_contradictions_of_the_recipe_are_named(overrides, message):
    """First weights, routers in their first steps, compiled blocks."""
    found = problems(composed(*overrides))
    assert any(message in problem for problem in found), found


def test_a_recipe_with_all_of_it_is_valid():
    run = parse(composed(*MUP, "model.mup_base_num_layers=2", COMPILED, "optim=muon"), 1)
    assert (run.model.width_ratio, run.model.depth_ratio) == (2, 2)
    assert run.model.whole_logits_divisor == 2  # the quickstart's head is tied


def test_compiled_blocks_and_expert_parallelism_are_refused_together():
    found = problems(composed(COMPILED, "parallel.expert_parallel_size=2"), 2)
    assert any("use parallel.expert_parallel_size=1" in problem for problem in found), found


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (("attention=scc", "attention.select=index"), "is 2, but with attention.select=index a"),
        (("attention=scc", "attention.resident_blocks=4"), "is 2, but attention.resident_blocks 4"),
        (("attention=csa",), "is 2, but attention=compressed does not compute queries of a part"),
        (("attention=qsa",), "is 2, but attention=indexed does not compute queries of a part"),
    ],
)
def test_an_attention_that_needs_all_queries_of_a_row_is_not_gathered_for(attention, message):
    ranks = ("parallel.context_parallel_size=2", "launch=deepspeed", "launch.num_devices=2")
    found = problems(composed(*attention, *ranks, "parallel.context_gather_size=2"), 2)
    assert any(f"parallel.context_gather_size {message}" in p for p in found), found


def test_every_fail_safe_may_be_on_with_one_rank():
    """An overload has no ranks to compare then; the others act."""
    assert parse(composed("fail_safe=full"), 1).fail_safe.collapse_share == 0.95


def test_the_advice_on_a_placement_leads_to_no_other_error(tmp_path):
    """On one rank there is nothing to plan anew: without the placement the run starts."""
    Placement(2, (LayerPlacement.identity(8, 2),) * 3).save(tmp_path / "placement.json")
    placed = (f"parallel.placement={tmp_path / 'placement.json'}",)
    (problem,) = problems(composed(*placed))
    assert problem.endswith("add parallel.placement=null") and "launch.place" not in problem
    assert parse(composed(*placed, "parallel.placement=null"), 1).parallel.placement is None
    four = ("parallel.expert_parallel_size=4", "launch=deepspeed", "launch.num_devices=4")
    (problem,) = problems(composed(*placed, *four), 4)
    assert (
        "add parallel.placement=null, or plan anew: python -m launch.place run=DIR "
        "expert_parallel_size=4" in problem
    )
    assert (
        parse(composed(*placed, *four, "parallel.placement=null"), 4).parallel.expert_parallel_size
        == 4
    )


def test_the_advice_on_an_exchange_that_one_rank_does_not_have_holds_for_a_resumed_run(base):
    saved = changed(base, dispatcher__num_chunks=2)
    (problem,) = problems(saved)
    assert "add dispatcher=all_to_all" in problem
    assert parse(saved | {"dispatcher": composed("dispatcher=all_to_all")["dispatcher"]}, 1)
