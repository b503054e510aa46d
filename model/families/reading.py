"""A config.json in our words: the shape of the model and the settings of its router, with every
reason why they cannot be the same. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.families import deepseek_v4
from model.families.family import ALIASES, BOOKKEEPING, FAMILIES, SHAPE, TRAINING_ONLY, Family

Settings = dict[str, Any]


BLOCK_SCALES, CHANNEL_SCALES = "_scale_inv", "_scale"
"""Endings of the names of an fp8 weight's scales: of blocks, and (compressed-tensors) of rows. Both
are what the stored numbers are multiplied by.
"""
WHOLE_ROW = 2**31
"""Columns that share a scale where a row has one."""


@dataclass(frozen=True)
class Reading:
    """What a config.json says."""

    family: Family
    model: Settings
    """Fields of model.config.ModelConfig."""
    router: Settings = field(default_factory=dict)
    """Fields of model.routers.config.TopKConfig; empty for a dense model."""
    attention: Settings = field(default_factory=lambda: {"name": "dense"})
    """Name and fields of the attention (model/attention/config/)."""
    balance: Settings = field(default_factory=dict)
    """Fields of BalanceConfig that the model was trained with."""
    notes: tuple[str, ...] = ()
    """What is left out, in sentences: it has no say in the logits."""
    num_further_layers: int = 0
    """Layers after the model's own that predict further tokens: left out."""
    is_mxfp4: bool = False
    """Whether stacks of experts are stored as blocks of 4-bit numbers with a scale each."""
    has_fp4: bool = False
    """Whether matrices of experts are stored as pairs of 4-bit floats, with a scale for each 32
    columns.
    """
    fp8_block: tuple[int, int] | None = None
    """Rows and columns that share a scale, where weights are stored as fp8."""
    fp8_scales: str = BLOCK_SCALES
    """Ending of the name of those scales."""
    is_interleaved: bool = False
    """Whether the files interleave rotary pairs, which are half-split here."""


class FamilyError(ValueError):
    """A config.json that cannot be expressed; `problems` has a sentence for each reason."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


def read(config: Mapping[str, Any]) -> Reading:
    """The config in our words. Nothing is approximated: what comes back has the same logits.

    Raises:
        FamilyError: with everything in it that cannot be the same.
    """
    kind = str(config.get("model_type"))
    family = FAMILIES.get(ALIASES.get(kind, kind))
    if family is None:
        raise FamilyError(
            [f"model_type {kind!r} is not known; known are {', '.join((*FAMILIES, *ALIASES))}"]
        )
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if not isinstance(config.get(key), int)
    ]
    if missing:
        raise FamilyError([f"config.json has no number for {', '.join(missing)}"])

    problems = _unknown(config, family)
    notes = [
        f"{key}={config[key]} acts in training alone and is left out"
        for key in sorted(TRAINING_ONLY)
        if config.get(key)
    ]
    model = _shape(config, family)
    attention: Settings = {"name": "dense"}
    if family.attention == "compressed":
        attention = deepseek_v4.attention(config, model, problems)
        model |= deepseek_v4.streams(config, problems)
        config = deepseek_v4.with_one_rope(config, problems)
    elif family.attention == "mla":
        attention = _latent(config, model, problems)
    elif family.attention == "windowed":
        attention = _windows(config, model)
    model |= _rotary(config, family, model, problems)

    block, is_mxfp4, scales = _quantised(config, family, problems)
    if block is not None or is_mxfp4:
        kind = "MXFP4" if is_mxfp4 else "fp8"
        notes.append(f"its {kind} weights become the numbers that they stand for")

    router: Settings = {}
    balance: Settings = {}
    further = 0
    if family.is_moe:
        router = _router(config, family, model, problems)
        further = _further_layers(config)
        if further:
            unless = f", unless model.num_mtp_layers={further}"
            notes.append(
                f"{further} layers that predict further tokens are left out"
                + (unless if family.attention != "compressed" else "")
            )
        if coefficient := config.get("router_aux_loss_coef"):
            # Theirs is a mean over layers, ours a sum.
            balance["aux_loss_coeff"] = coefficient / max(1, len(moe_layers(model)))
    if problems:
        raise FamilyError(problems)
    return Reading(
        family,
        model,
        router,
        attention,
        balance,
        tuple(notes),
        num_further_layers=further,
        is_mxfp4=is_mxfp4,
        has_fp4=block is not None and _expert_dtype(config) == "fp4",
        fp8_block=block,
        fp8_scales=scales,
        is_interleaved=family.attention == "mla" and config.get("rope_interleave") is not False,
    )


def _unknown(config: Mapping[str, Any], family: Family) -> list[str]:
    """Keys that nobody reads, and known ones at values that we do not compute."""
    found = []
    for key, value in sorted(config.items()):
        if value is None or key in SHAPE | BOOKKEEPING | TRAINING_ONLY | family.known:
            continue
        if key not in family.harmless:
            found.append(
                f"{key}={value!r} is unknown to the reader of {family.model_type}: take it out of "
                "config.json if the logits do not depend on it"
            )
        elif value not in family.harmless[key] and not _unused_window(key, config):
            supported = " or ".join(repr(value) for value in family.harmless[key])
            found.append(f"{key}={value!r} is not computed here, only {supported}")

    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act={config['hidden_act']!r} is not computed here, only 'silu'")
    if family.attention == "compressed":
        return found
    allowed = {"full_attention"}
    if family.attention == "windowed":
        allowed.add("sliding_attention")
    others = sorted(set(config.get("layer_types") or ()) - allowed)
    if others:
        found.append(f"layer_types has {others[0]!r}; here every layer attends to its whole past")
    return found


def _quantised(
    config: Mapping[str, Any], family: Family, problems: list[str]
) -> tuple[tuple[int, int] | None, bool, str]:
    """How weights are stored: rows and columns that share a scale in fp8 (DeepSeek-V3, MiniMax-M2,
    compressed-tensors), whether stacks are MXFP4 (gpt-oss), and the ending of the scales' names.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None, False, BLOCK_SCALES
    method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
    block = stored.get("weight_block_size") if isinstance(stored, Mapping) else None
    if _expert_dtype(config) not in (None, "fp8", "fp4"):
        problems.append(
            f"expert_dtype={_expert_dtype(config)!r} is not read here, only 'fp8' and 'fp4'"
        )
    if method == "fp8" and isinstance(block, list) and len(block) == 2:
        return (int(block[0]), int(block[1])), False, BLOCK_SCALES
    if method == "mxfp4" and family.is_transposed:
        return None, True, BLOCK_SCALES
    if method == "compressed-tensors" and _is_fp8_by_row(stored):
        return (1, WHOLE_ROW), False, CHANNEL_SCALES
    problems.append(
        f"the weights are stored quantised ({method}); of such, fp8 with a scale for each block "
        "or (compressed-tensors) each row, and gpt-oss's MXFP4 are read: give a folder with "
        "dequantised weights"
    )
    return None, False, BLOCK_SCALES


def _expert_dtype(config: Mapping[str, Any]) -> Any:
    """What experts are stored as beside other weights of fp8 (DeepSeek-V4); None: as those."""
    stored = config.get("quantization_config")
    inside = stored.get("expert_dtype") if isinstance(stored, Mapping) else None
    return inside or config.get("expert_dtype")


def _is_fp8_by_row(stored: Mapping[str, Any]) -> bool:
    """Whether every group of compressed-tensors' quantization_config is of fp8 weights with a
    scale for each row, and nothing else has scales in the files.
    """
    groups = stored.get("config_groups")
    if stored.get("format") != "float-quantized" or stored.get("kv_cache_scheme"):
        return False
    if not isinstance(groups, Mapping) or not groups:
        return False
    wanted = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    for group in groups.values():
        weights = group.get("weights") or {}
        activations = group.get("input_activations")
        if any(weights.get(key) != value for key, value in wanted.items()):
            return False
        if weights.get("dynamic") or group.get("output_activations"):
            return False
        if activations and not activations.get("dynamic"):
            return False
    return True


def _unused_window(key: str, config: Mapping[str, Any]) -> bool:
    """Whether it is the width of a window that no layer has."""
    layers = config.get("layer_types")
    return key == "sliding_window" and (
        config.get("use_sliding_window") is False
        or (layers is not None and "sliding_attention" not in layers)
    )


def _shape(config: Mapping[str, Any], family: Family) -> Settings:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    shape = {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate_size": config.get("intermediate_size") or 4 * hidden,
        "num_experts": 0,
        "top_k": 1,
        "expert_intermediate_size": 0,
        "num_shared_experts": 0,
        "num_dense_layers": 0,
        "moe_layer_interval": 1,
        "max_seq_len": config.get("max_position_embeddings", 2048),
        "qk_norm": family.qk_norm,
        "attention_bias": family.biased
        if config.get("attention_bias", family.is_biased)
        else "none",
        "attention_multiplier": None,
        "activation": "clamped_swiglu" if family.is_transposed else "swiglu",
        "expert_bias": family.is_transposed,
        "shared_expert_gate": False,
        "num_residual_streams": 1,
        "sinkhorn_steps": 20,
        "sinkhorn_eps": 1e-6,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_divisor": 1.0,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": config.get("initializer_range", 0.02),
    }
    if "use_qk_norm" in family.known and config.get("use_qk_norm"):
        shape["qk_norm"] = "head"
    if family.model_type == "granitemoe":
        shape |= {
            "attention_multiplier": float(config.get("attention_multiplier", 1.0)),
            "embedding_multiplier": float(config.get("embedding_multiplier", 1.0)),
            "residual_multiplier": float(config.get("residual_multiplier", 1.0)),
            "logits_divisor": float(config.get("logits_scaling", 1.0)),
        }
    return shape


def _latent(config: Mapping[str, Any], model: Settings, problems: list[str]) -> Settings:
    """The settings of latent attention; takes out of the shape what it has in their place."""
    found: Settings = {"name": "mla", "q_lora_rank": config.get("q_lora_rank")}
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        found[key] = config.get(key)
        if not isinstance(found[key], int):
            problems.append(f"config.json has no number {key}, which latent attention needs")
            found[key] = 2
    if model["attention_bias"] != "none":
        problems.append("attention_bias=True is not computed here in latent attention")
    model |= {"num_kv_heads": model["num_heads"], "head_dim": None, "attention_bias": "none"}
    return found


def _windows(config: Mapping[str, Any], model: Settings) -> Settings:
    """The settings of attention with windows and sinks."""
    number = model["num_layers"]
    kinds = config.get("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(number)
    ]
    sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    layers = "alternate" if sliding == list(range(0, number, 2)) else sliding
    window = config.get("sliding_window") or 128
    return {"name": "windowed", "window": window, "window_layers": layers, "sinks": True}


def _rotary(
    config: Mapping[str, Any], family: Family, model: Settings, problems: list[str]
) -> Settings:
    """Base, turned dimensions and scaling: transformers 5 writes rope_parameters, 4 wrote
    rope_theta, rope_scaling and partial_rotary_factor.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    old_kind = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or old_kind or "default"
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    partial = rope.pop("partial_rotary_factor", None)
    if partial is None:
        partial = config.get(
            "partial_rotary_factor", family.defaults.get("partial_rotary_factor", 1.0)
        )
    found: Settings = {"rope_theta": float(theta), "rotary_dim": None, "rope_scaling": None}
    if family.attention not in ("mla", "compressed"):  # there qk_rope_head_dim says it
        head_dim = model["head_dim"]
        rotary_dim = config.get("rotary_dim") if "rotary_dim" in family.known else None
        rotary_dim = int(head_dim * partial) if rotary_dim is None else int(rotary_dim)
        found["rotary_dim"] = None if rotary_dim == head_dim else rotary_dim
    if kind == "default":
        return found

    if kind not in ("linear", "llama3", "yarn"):
        problems.append(f"rope type {kind!r} is not computed here, only linear, llama3 and yarn")
        return found
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        **{
            name: name
            for name in (
                *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"),
                *("mscale", "mscale_all_dim", "attention_factor"),
            )
        },
    }
    for key in sorted(rope.keys() - names.keys()):
        if rope[key] is not None:
            problems.append(f"rope_scaling.{key}={rope[key]!r} is unknown to this reader")
    scaling = {"type": kind} | {
        ours: rope[theirs] for theirs, ours in names.items() if rope.get(theirs) is not None
    }
    if kind == "yarn":
        # Without it the length that the model was made for counts as the one before.
        scaling.setdefault("original_max_seq_len", model["max_seq_len"])
    return found | {"rope_scaling": scaling}


def _router(
    config: Mapping[str, Any],
    family: Family,
    model: Settings,
    problems: list[str],
) -> Settings:
    """The router's settings; fills the MoE part of the shape."""
    num_experts = config.get(family.num_experts_key) or config.get("num_local_experts")
    top_k = config.get("num_experts_per_tok")
    width = config.get(family.expert_width_key)
    if not num_experts or not top_k or not width:
        problems.append(
            f"config.json lacks one of {family.num_experts_key}, num_experts_per_tok and "
            f"{family.expert_width_key}"
        )
        return {}
    model |= {"num_experts": num_experts, "top_k": top_k, "expert_intermediate_size": width}

    normalizes = family.normalizes
    if normalizes is None:
        normalizes = bool(config.get("norm_topk_prob", family.normalizes_by_default))
    router = {
        "name": "top_k",
        "top_k": top_k,
        "score_function": family.score_function,
        "normalize_weights": normalizes,
        "scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
        "bias": family.is_transposed,
        "hash_layers": 0,
        "num_groups": config.get("n_group") or 1,
        "top_groups": config.get("topk_group") or 1,
    }
    if "topk_method" in family.known:
        method = config.get("topk_method") or "greedy"
        if method == "greedy":
            router |= {"num_groups": 1, "top_groups": 1}
        elif method != "group_limited_greedy":
            problems.append(f"topk_method={method!r} is not computed here")
    if router["num_groups"] > 1:
        router["group_keys"] = family.group_keys  # whatever num_experts_per_tok is
    if family.attention == "compressed":
        router["hash_layers"] = deepseek_v4.hash_layers(config, model, problems)
    else:
        _dense_layers(config, family, model, problems)
    if family.shared is not None:
        _shared_expert(config, family, model, problems)
    return router


def _further_layers(config: Mapping[str, Any]) -> int:
    keys = ("num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers")
    return next((int(config[key]) for key in keys if config.get(key)), 0)


def _dense_layers(
    config: Mapping[str, Any], family: Family, model: Settings, problems: list[str]
) -> None:
    if "first_k_dense_replace" in family.known:
        default = family.defaults.get("first_k_dense_replace", 0)
        model["num_dense_layers"] = config.get("first_k_dense_replace", default)
    if "mlp_layer_types" in family.known and config.get("mlp_layer_types"):
        kinds = list(config["mlp_layer_types"])
        first = kinds.index("sparse") if "sparse" in kinds else len(kinds)
        if kinds != ["dense"] * first + ["sparse"] * (len(kinds) - first):
            problems.append("mlp_layer_types are not dense layers first and sparse ones after")
        model["num_dense_layers"] = first
    if "mlp_only_layers" not in family.known:
        return
    dense = sorted(config.get("mlp_only_layers") or [])
    step = config.get("decoder_sparse_step") or 1
    if dense != list(range(len(dense))):
        problems.append(f"mlp_only_layers={dense} are not the first layers")
    if step > 1 and dense:
        problems.append(
            "mlp_only_layers together with decoder_sparse_step above 1: layers are counted from 0 "
            "there, and here from the first MoE layer"
        )
    model |= {"num_dense_layers": len(dense), "moe_layer_interval": step}


def _shared_expert(
    config: Mapping[str, Any], family: Family, model: Settings, problems: list[str]
) -> None:
    width = model["expert_intermediate_size"]
    if family.shared_gate is not None:
        shared = config.get("shared_expert_intermediate_size") or 0
        model["shared_expert_gate"] = shared > 0
        if shared % width:
            problems.append(
                f"shared_expert_intermediate_size={shared} is no multiple of "
                f"moe_intermediate_size={width}, as the width of shared experts is here"
            )
        model["num_shared_experts"] = shared // width
    else:
        usual = 1 if family.attention == "compressed" else 0
        model["num_shared_experts"] = config.get("n_shared_experts") or usual


def moe_layers(model: Mapping[str, Any]) -> list[int]:
    """Layers with experts, as ModelConfig.is_moe_layer counts them."""
    first, step = model["num_dense_layers"], model["moe_layer_interval"]
    if not model["num_experts"]:
        return []
    return [i for i in range(model["num_layers"]) if i >= first and (i - first + 1) % step == 0]
