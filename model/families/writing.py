"""The config.json of a family that says the same as a model of ours. Imports no torch.

A family is found by writing its config.json and reading it back: what comes back has to be the
model. So nothing can be written that reading would understand otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.families import deepseek_v4
from model.families.family import FAMILIES, Family
from model.families.reading import FamilyError, Reading, Settings, read

NOT_COMPARED = {"init_std", "init", "top_k"}
"""Settings of the shape that no weight or logit depends on (router.top_k counts)."""
IGNORED_WITHOUT_EXPERTS = {
    "expert_intermediate_size",
    "num_shared_experts",
    "num_dense_layers",
    "moe_layer_interval",
}
SCALING = {
    "original_max_seq_len": "original_max_position_embeddings",
    **{
        name: name
        for name in (
            *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
            *("truncate", "mscale", "mscale_all_dim", "attention_factor"),
        )
    },
}


def express(
    shape: Settings, router: Settings, attention: Settings | None = None
) -> tuple[Settings, Reading]:
    """The config.json (without dtype and token ids) of the first family that computes the same, and
    what reading it gives.

    Args:
        shape: fields of ModelConfig, resolved (head_dim is a number); router: of TopKConfig; {} for
            a dense model; attention: name and fields of the attention, None: dense.

    Raises:
        FamilyError: no family does; with what the nearest one has otherwise.
    """
    attention = {"name": "dense"} if attention is None else attention
    nearest: tuple[int, str] | None = None
    for family in FAMILIES.values():
        if family.is_moe != bool(shape["num_experts"]):
            continue
        if family.attention != attention["name"]:
            continue
        config = _config(family, shape, router, attention)
        try:
            reading = read(config)
        except FamilyError as error:
            others = error.problems
        else:
            others = _differences(reading, shape, router, attention)
            if not others:
                return config, reading
        if nearest is None or len(others) < nearest[0]:
            nearest = (len(others), f"{family.model_type}, the nearest, has {', '.join(others)}")
    if nearest is None:
        kind = "a mixture of experts" if shape["num_experts"] else "a dense model"
        raise FamilyError(
            [f"no published family here is {kind} with attention={attention['name']}"]
        )
    raise FamilyError([f"no published family computes this model: {nearest[1]}"])


def _differences(
    reading: Reading, shape: Settings, router: Settings, attention: Settings
) -> list[str]:
    left_out = NOT_COMPARED | (IGNORED_WITHOUT_EXPERTS if not shape["num_experts"] else set())
    if reading.family.attention == "compressed":
        left_out = left_out | {"intermediate_size"}  # every layer has experts
    found = [
        f"{key}={value} instead of {shape[key]}"
        for key, value in reading.model.items()
        if key not in left_out and value != shape[key]
    ]
    found += [
        f"attention.{key}={value} instead of {attention.get(key)}"
        for key, value in reading.attention.items()
        if key != "dense_steps" and value != attention.get(key)
    ]
    return found + [
        f"router.{key}={value} instead of {router.get(key)}"
        for key, value in reading.router.items()
        if key != "name" and value != router.get(key)
    ]


def _config(family: Family, shape: Settings, router: Settings, attention: Settings) -> Settings:
    config: Settings = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "head_dim": shape["head_dim"],
        "intermediate_size": shape["intermediate_size"],
        "max_position_embeddings": shape["max_seq_len"],
        "rms_norm_eps": shape["norm_eps"],
        "tie_word_embeddings": shape["tie_embeddings"],
        "initializer_range": shape["init_std"],
        "hidden_act": "silu",
        **_rotary(family, shape),
    }
    if not family.is_biased:
        config["attention_bias"] = shape["attention_bias"] != "none"
    if "use_sliding_window" in family.harmless:
        config["use_sliding_window"] = False
    if "use_qk_norm" in family.known:
        config["use_qk_norm"] = shape["qk_norm"] == "head"
    if family.model_type == "granitemoe":
        config |= {
            "attention_multiplier": shape["attention_multiplier"] or shape["head_dim"] ** -0.5,
            "embedding_multiplier": shape["embedding_multiplier"],
            "residual_multiplier": shape["residual_multiplier"],
            "logits_scaling": shape["logits_divisor"],
        }
    if family.attention == "compressed":
        config |= deepseek_v4.config_of(shape, router, attention)
        # One name for the width of experts and of dense layers, of which there are none.
        for key in ("intermediate_size", "rope_parameters"):
            del config[key]
    if family.attention == "windowed":
        config |= _windows(shape, attention)
    if family.attention == "mla":
        config |= {key: value for key, value in attention.items() if key != "name"}
        config["head_dim"] = attention["qk_rope_head_dim"]  # as transformers has it
        if "rope_interleave" in family.known and family.model_type != "deepseek_v2":
            config["rope_interleave"] = True
    return config | (_experts(family, shape, router) if family.is_moe else {})


def _windows(shape: Settings, attention: Settings) -> Settings:
    number, layers = shape["num_layers"], attention["window_layers"]
    if isinstance(layers, str):
        layers = range(0, number, 1 if layers == "all" else 2)
    sliding = {i % number for i in layers}
    kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(number)]
    return {"sliding_window": attention["window"], "layer_types": kinds}


def _rotary(family: Family, shape: Settings) -> Settings:
    """As both versions of transformers read it: 5 wants rope_parameters, 4 the other keys."""
    scaling: Mapping[str, Any] | None = shape["rope_scaling"]
    rope: Settings = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling["type"]} | {
            SCALING[key]: value
            for key, value in scaling.items()
            if key != "type" and value is not None and (key != "truncate" or value is not True)
        }
    config: Settings = {"rope_theta": shape["rope_theta"]}
    if scaling is not None:
        config["rope_scaling"] = dict(rope)
    rope["rope_theta"] = shape["rope_theta"]
    if shape["rotary_dim"] is not None or "partial_rotary_factor" in family.defaults:
        turned = shape["rotary_dim"] or shape["head_dim"]
        rope["partial_rotary_factor"] = turned / shape["head_dim"]
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "rotary_dim" in family.known:
        config["rotary_dim"] = shape["rotary_dim"] or shape["head_dim"]
    return config | {"rope_parameters": rope}


def _experts(family: Family, shape: Settings, router: Settings) -> Settings:
    width = shape["expert_intermediate_size"]
    config: Settings = {
        family.num_experts_key: shape["num_experts"],
        "num_experts_per_tok": router["top_k"],
        family.expert_width_key: width,
    }
    if "norm_topk_prob" in family.known:
        config["norm_topk_prob"] = router["normalize_weights"]
    if "first_k_dense_replace" in family.known:
        config |= {
            "first_k_dense_replace": shape["num_dense_layers"],
            "n_shared_experts": shape["num_shared_experts"],
            "routed_scaling_factor": router["scaling_factor"],
            "n_group": router["num_groups"],
            "topk_group": router["top_groups"],
        }
    if "topk_method" in family.known:
        config["topk_method"] = "greedy" if router["num_groups"] == 1 else "group_limited_greedy"
    if "num_nextn_predict_layers" in family.known:
        config["num_nextn_predict_layers"] = shape.get("num_mtp_layers", 0)
    if "mlp_layer_types" in family.known and family.attention != "compressed":
        dense = shape["num_dense_layers"]
        config["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (shape["num_layers"] - dense)
    if "mlp_only_layers" in family.known:
        config |= {
            "mlp_only_layers": list(range(shape["num_dense_layers"])),
            "decoder_sparse_step": shape["moe_layer_interval"],
        }
    if family.shared_gate is not None:
        config["shared_expert_intermediate_size"] = shape["num_shared_experts"] * width
    return config
