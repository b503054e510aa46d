"""Bad settings get a sentence before anything starts, all of them at once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from launch.common import plain
from launch.validate import DEEPSPEED_KEYS, ZERO_KEYS, ConfigError, parse
from model.flops import count_parameters, flops_per_token
from model.placement import LayerPlacement, Placement

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")


def composed(*overrides: str) -> dict:
    with initialize_config_dir(CONF, version_base="1.3"):
        return plain(compose("train", overrides=list(overrides)))


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


@pytest.mark.parametrize("model", sorted(p.stem for p in (Path(CONF) / "model").glob("*.yaml")))
def test_every_preset_is_valid(model):
    router = "router=sigmoid_top_k" if "deepseek" in model else "router=top_k"
    assert parse(composed(f"model={model}", router), 1).model.num_layers > 0


@pytest.mark.parametrize(("experiment", "active"), [("olmoe_1b_7b", 1.28e9), ("mixtral_8x7b", 12.9e9),
                                                    ("qwen3_30b_a3b", 3.35e9), ("deepseek_v3_gqa", None)])
def test_published_experiments_route_as_published(experiment, active):
    run = parse(composed(f"experiment={experiment}"), 1)
    count = count_parameters(run.model, run.experts_per_token)
    assert run.train.precision == "bf16" and run.experiment_name == experiment
    assert active is None or count.active == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("group", ["balance", "deepspeed", "debug", "dispatcher", "data"])
def test_every_group_option_composes(group):
    for option in sorted(p.stem for p in (Path(CONF) / group).glob("*.yaml")):
        extra = ["data.sources.0.path=json", "data.sources.0.data_files=x.jsonl"] if option == "files" else []
        parse(composed(f"{group}={option}", *extra), 1)


@pytest.mark.parametrize(("place", "suggestion"), [
    ("model__num_expert", "model.num_experts"), ("train__num_step", "train.num_steps"), ("sed", "seed"),
    ("router__topk", "router.top_k"), ("tracker__wandb__mod", "tracker.wandb.mode"),
    ("deepspeed__zero_optimisation", "deepspeed.zero_optimization"),
])
def test_unknown_keys_get_a_suggestion(base, place, suggestion):
    (problem,) = problems(changed(base, **{place: 1}))
    assert f"did you mean {suggestion}?" in problem


@pytest.mark.parametrize(("change", "words"), [
    ({"model__num_experts": 6}, "num_experts 6 is not divisible by parallel.expert_parallel_size 4"),
    ({"train__global_batch_size": 33}, "global_batch_size 33 is not a multiple"),
    ({"model__num_kv_heads": 3}, "num_heads 4 is not a multiple of model.num_kv_heads 3"),
    ({"model__hidden_size": 255}, "hidden_size 255 is not divisible"),
    ({"router__top_k": 9}, "router.top_k is 9"),
    ({"router__top_k": 1}, "normalize_weights"),
    ({"train__seq_len": 4096}, "train.seq_len 4096 exceeds model.max_seq_len"),
    ({"train__precision": "fp16"}, "train.precision is 'fp16'; choose one of fp32, bf16"),
    ({"train__num_steps": "many"}, "train.num_steps is 'many'; it must be int"),
    ({"train__num_steps": 10}, "warmup_steps 20 must be below"),
    ({"train__batch_size_rampup": [8, 8]}, "must be [start, increment, samples]"),
    ({"train__batch_size_rampup": [6, 8, 100]}, "must be multiples"),
    ({"optim__lr": -1.0}, "optim.lr is -1.0"),
    ({"optim__wsd_decay_steps": 5}, "belongs to optim.decay_style=WSD"),
    ({"parallel__tensor_parallel_size": 2}, "parallel.tensor_parallel_size is 2; this version supports 1"),
    ({"deepspeed__gradient_clipping": 1.0}, "set train.clip_grad_norm"),
    ({"deepspeed__elasticity": {}}, "not available"),
    ({"deepspeed__zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "unknown key"),
    ({"deepspeed__zero_optimization": {"stage": 4}}, "choose 0, 1, 2 or 3"),
    ({"deepspeed__zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1"),
    ({"deepspeed__zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
    ({"router___target_": "os.system"}, "outside the model package"),
    ({"router___target_": "model.routers.top_k.Nothing"}, "does not exist"),
    ({"data__sources": []}, "data.sources is empty"),
    ({"checkpoint__keep_last": 0}, "at least the last one"),
    ({"dispatcher": {"_target_": "model.dispatch.LocalDispatcher"}}, "use dispatcher=all_to_all"),
    ({"dispatcher__num_chunks": 9}, "dispatcher.num_chunks is 9; a rank has"),
    ({"dispatcher__payload": "fp4"}, "dispatcher.payload is 'fp4'; choose native, bf16, fp8"),
    ({"dispatcher__buffer_factor": 0}, "dispatcher.buffer_factor is 0"),
    ({"parallel__ranks_per_node": 0}, "parallel.ranks_per_node is 0"),
    ({"parallel__placement": "/nowhere/placement.json"}, "parallel.placement"),
    ({"experts__token_rounding": -1}, "experts.token_rounding is -1"),
    ({"experts__token_rounding": 4096}, "experts.token_rounding 4096 is more than the"),
    ({"experts__backend": "fastest"}, "choose one of auto, triton, grouped_mm, torch, reference"),
    ({"deepspeed__zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "checkpoints would hold them"),
    ({"train__grad_accum_dtype": "bf16"}, "train.precision=fp32 has no bf16 gradients"),
    ({"train__grad_accum_dtype": "fp16"}, "choose one of fp32, bf16"),
    ({"deepspeed__data_types": {"grad_accum_dtype": "fp32"}}, "set train.grad_accum_dtype"),
    ({"balance__aux_loss_scope": "world"}, "choose one of sequence, batch, global_batch"),
])
def test_contradictions_are_named(base, change, words):
    config = changed(base, parallel__expert_parallel_size=4, launch__kind="deepspeed", launch__num_devices=4, **change)
    assert any(words in p for p in problems(config, 4)), problems(config, 4)


def test_half_precision_needs_a_zero_stage(base):
    config = changed(base, train__precision="bf16", deepspeed__zero_optimization={"stage": 0})
    assert any("use deepspeed=zero1" in p for p in problems(config))


def test_expert_size_must_divide_the_ranks(base):
    config = changed(base, parallel__expert_parallel_size=2, train__global_batch_size=24)
    assert any("does not divide the 3 ranks" in p for p in problems(config, 3))


def test_all_problems_are_reported_together(base):
    config = changed(base, model__num_kv_heads=3, optim__lr=-1.0, checkpoint__keep_last=0, router__top_k=99)
    assert len(problems(config)) == 4


def test_dense_model_needs_no_router_settings(base):
    assert parse(changed(base, model__num_experts=0, model__num_dense_layers=0), 1).experts_per_token == 0


def test_accepted_deepspeed_keys_exist_in_deepspeed():
    """DeepSpeed ignores keys it does not know: a renamed one would silently stop working."""
    from train.engine import import_deepspeed

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


# --- routers ---------------------------------------------------------------------------------------------------------

ROUTERS = sorted(p.stem for p in (Path(CONF) / "router").glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (Path(CONF) / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("router", ROUTERS)
def test_any_router_goes_into_any_preset(router):
    """With balance=none, since some routers balance by themselves."""
    for experiment in EXPERIMENTS:
        config = composed(f"experiment={experiment}", "parallel=single", f"router={router}", "balance=none",
                          "balance.aux_loss_coeff=0")
        run = parse(config, 1)
        assert run.experts_per_token == run.model.top_k


@pytest.mark.parametrize("attention", sorted(p.stem for p in (Path(CONF) / "attention").glob("*.yaml")))
def test_any_attention_goes_into_any_preset(attention):
    for experiment in EXPERIMENTS:
        run = parse(composed(f"experiment={experiment}", "parallel=single", f"attention={attention}"), 1)
        assert flops_per_token(run.model, run.experts_per_token, run.train.seq_len, run.attention.arguments) > 0


@pytest.mark.parametrize(("overrides", "message"), [
    (("router=relu",), "add balance=none"),
    (("router=threshold", "balance=loss_free"), "sets itself, by quantiles; add balance=none"),
    (("router=expert_choice", "balance=quantile"), "sets itself, by quantiles; add balance=none"),
    (("router=relu", "balance=loss_free"), "sets itself, by quantiles; add balance=none"),
    (("router=null_experts", "balance=loss_free"), "sets itself, by quantiles; add balance=none"),
    (("router=threshold", "balance.entropy_coeff=0.1"), "router.score_function is sigmoid"),
    (("router=top_p", "router.budget=20"), "router.budget 20"),
    (("router=top_p", "router.budget=1e8", "router.budget_unit=flops"), "router.budget 1e+08 (flops)"),
    (("router=threshold", "balance=none", "router.budget=3", "router.budget_unit=flops"), "must be between 0.1 and 8; one "
     "expert per token is 1.18e+06 FLOPs"),
    (("router=null_experts", "router.budget=0.01"), "must be between 0.1 and"),
    (("router=top_p", "router.budget=0.5"), "must be between 1 (router.min_experts is 1) and 8"),
    (("router=threshold", "balance=none", "router.min_experts=3"), "must be between 3 (router.min_experts is 3) and 8"),
    (("router=relu", "balance=none", "router.min_experts=3"), "must be between 3 (router.min_experts is 3) and 8"),
    (("router=expert_choice", "balance=none", "router.max_experts=1"), "router.max_experts 1 is below router.top_k 2"),
    (("router=expert_choice", "balance=none", "router.min_experts=3"), "router.min_experts 3 is above router.top_k 2"),
    (("budget.guard_capped=5",), "budget.guard_capped is 5"),
    (("balance.bias_update=sign",), "balance.bias_update_rate 0.0 belongs to balance.bias_update=sign"),
    (("balance.bias_update=quantile", "balance.quantile_momentum=1"), "balance.quantile_momentum is 1"),
    (("balance.histogram_bins=3",), "balance.histogram_bins is 3"),
    (("budget.ki=3",), "budget.kp 0.5 and budget.ki 3"),
    (("budget.hold_steps=0",), "budget.hold_steps is 0"),
    (("fail_safe.collapse_share=2",), "fail_safe.collapse_share is 2"),
    (("audit.sample_one_in=-1",), "audit.sample_one_in is -1"),
    (("model.top_k=9",), "model.top_k is 9"),
])
def test_routing_contradictions_are_named(overrides, message):
    assert any(message in problem for problem in problems(composed(*overrides))), problems(composed(*overrides))


def test_every_fail_safe_may_be_on_with_one_rank():
    """F5 has no ranks to compare then; the others act."""
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
    assert "add parallel.placement=null, or plan anew: python -m launch.place run=DIR expert_parallel_size=4" in problem
    assert parse(composed(*placed, *four, "parallel.placement=null"), 4).parallel.expert_parallel_size == 4


def test_the_advice_on_an_exchange_that_one_rank_does_not_have_holds_for_a_resumed_run(base):
    saved = changed(base, dispatcher__num_chunks=2)
    (problem,) = problems(saved)
    assert "add dispatcher=all_to_all" in problem
    assert parse(saved | {"dispatcher": composed("dispatcher=all_to_all")["dispatcher"]}, 1)
