"""What the config.json of DeepSeek-V4 says that others do not: attention by layer, residual
streams, layers that route by token id; in the keys of the Hub's files and in those that
transformers writes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.cost.entries import compressed_kinds

Settings = dict[str, Any]
KINDS = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
"""Of a layer's attention, in transformers' words -> in ours."""
RATIOS = {"csa": 4, "hca": 128}
"""Tokens of an entry where config.json does not say, and the numbers by which compress_ratios names
the kinds; 0 is a window alone.
"""
LIMIT = 10.0
"""Of activation=limited_swiglu."""


def attention(config: Mapping[str, Any], model: Settings, problems: list[str]) -> Settings:
    """The settings of compressed attention; puts into the shape what it asks of it. What is wrong
    is added to `problems`.
    """
    kinds = _kinds(config, model["num_layers"], problems)
    ratios = _ratios(config)
    found: Settings = {
        "name": "compressed",
        "layer_kinds": named(kinds),
        "sliding_window": config.get("sliding_window") or 128,
        "csa_ratio": ratios["csa"],
        "hca_ratio": ratios["hca"],
        "rope_head_dim": _rope_head_dim(config, model["head_dim"]),
        "compressed_rope_theta": compressed_theta(config),
        # its index has learned
        "dense_steps": 0,
        # Every layer has entries and an index of its own.
        "csa_overlap": True,
        "slot_bias": True,
        "late_csa_ratio": None,
        "entry_layers": 1,
        "index_layers": 1,
        "index_keys": "pooled",
        "top_k_blocks": None,
    }
    keys = {
        "index_topk": "top_k",
        "q_lora_rank": "q_lora_rank",
        "o_groups": "output_groups",
        "o_lora_rank": "o_lora_rank",
        "index_n_heads": "index_heads",
        "index_head_dim": "index_head_dim",
    }
    for theirs, ours in keys.items():
        found[ours] = config.get(theirs)
        if not isinstance(found[ours], int):
            problems.append(f"config.json has no number {theirs}, which compressed attention needs")
            found[ours] = 1
    if config.get("num_key_value_heads", 1) != 1:
        problems.append(
            f"num_key_value_heads={config['num_key_value_heads']} is not computed here, only 1"
        )
    if (limit := config.get("swiglu_limit", LIMIT)) != LIMIT:
        problems.append(f"swiglu_limit={limit} is not computed here, only {LIMIT}")
    if (config.get("n_shared_experts") or 1) != 1:
        problems.append(
            f"n_shared_experts={config['n_shared_experts']} is not computed here, only 1"
        )
    model |= {
        "num_kv_heads": 1,
        "attention_bias": "none",
        "activation": "limited_swiglu",
    }
    return found


def named(kinds: list[str]) -> str | list[str]:
    """Kinds by layer under the one name that they have, if they have one."""
    for name in ("csa", "hca", "v4"):
        if kinds == compressed_kinds(len(kinds), {"layer_kinds": name}):
            return name
    return kinds


def as_read(attention: Settings, shape: Mapping[str, Any]) -> Settings:
    """The settings of a run's compressed attention as reading gives them."""
    theta = attention["compressed_rope_theta"]
    return {
        **attention,
        "layer_kinds": named(compressed_kinds(shape["num_layers"], attention)),
        "compressed_rope_theta": float(shape["rope_theta"] if theta is None else theta),
    }


def _kinds(config: Mapping[str, Any], number: int, problems: list[str]) -> list[str]:
    """Of every layer. compress_ratios may go on with those of layers that predict further
    tokens.
    """
    kinds = compressed_kinds(number, {"layer_kinds": "v4"})
    if (named_kinds := config.get("layer_types")) is not None:
        kinds = [KINDS.get(kind, str(kind)) for kind in named_kinds]
    elif (ratios := config.get("compress_ratios")) is not None:
        names = {0: "window", **{ratio: kind for kind, ratio in RATIOS.items()}}
        kinds = [names.get(ratio, str(ratio)) for ratio in ratios[:number]]
    unknown = sorted({*kinds} - {*KINDS.values()})
    if unknown:
        problems.append(f"a layer's attention is {unknown[0]!r}, which is not computed here")
    if len(kinds) != number:
        problems.append(f"config.json says the attention of {len(kinds)} layers, not of {number}")
    return kinds


def _ratios(config: Mapping[str, Any]) -> dict[str, int]:
    rates = config.get("compress_rates") or {}
    return {kind: rates.get(name, RATIOS.get(kind, 0)) for name, kind in KINDS.items()}


def _rope_head_dim(config: Mapping[str, Any], head_dim: int) -> int:
    if (size := config.get("qk_rope_head_dim")) is not None:
        return int(size)
    ropes = config.get("rope_parameters") or {}
    main = ropes.get("main")
    nested = main if isinstance(main, Mapping) else ropes
    partial = config.get("partial_rotary_factor") or nested.get("partial_rotary_factor")
    return int(head_dim * (64 / 512 if partial is None else partial))


def with_one_rope(config: Mapping[str, Any], problems: list[str]) -> Settings:
    """The config with the angles of windows as its base, and what stretches those of entries as
    its scaling, as other families write both. The base of entries is a key of its own.
    """
    ropes = config.get("rope_parameters") or {}
    main, compress = ropes.get("main"), ropes.get("compress")
    theta = config.get("rope_theta", 10000.0)
    scaling: Settings = {**(config.get("rope_scaling") or {})}
    if isinstance(main, Mapping) and isinstance(compress, Mapping):
        if main.get("rope_type", "default") != "default":
            problems.append(
                f"rope type {main['rope_type']!r} of windows is not computed here, only 'default'"
            )
        theta, scaling = main.get("rope_theta", theta), {**compress}
        given = config.get("compress_rope_theta")
        if given is not None and scaling.get("rope_theta", given) != given:
            problems.append(
                f"compress_rope_theta={given} and rope_parameters.compress.rope_theta="
                f"{scaling['rope_theta']} contradict each other"
            )
    elif ropes:
        scaling = {**scaling, **ropes}
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    if scaling.get("rope_type", scaling.get("type")) == "yarn":
        # Their code stretches and does not enlarge, whatever yarn's own rule is.
        scaling.setdefault("attention_factor", 1.0)
        if scaling["attention_factor"] != 1:
            problems.append(
                f"attention_factor={scaling['attention_factor']} is not computed here, only 1"
            )
    return {**config, "rope_theta": theta, "rope_scaling": scaling, "rope_parameters": None}


def compressed_theta(config: Mapping[str, Any]) -> float:
    """Base of the angles of layers with entries."""
    ropes = config.get("rope_parameters") or {}
    nested = ropes.get("compress")
    if isinstance(nested, Mapping) and "rope_theta" in nested:
        return float(nested["rope_theta"])
    return float(config.get("compress_rope_theta", 160_000.0))


def streams(config: Mapping[str, Any], problems: list[str]) -> Settings:
    """The shape's settings of the residual streams."""
    usual = ModelConfig.__dataclass_fields__
    number = config.get("hc_mult", 4)
    if not isinstance(number, int) or number < 2:
        problems.append(f"hc_mult={number} is not computed here, only 2 and more")
        number = 2
    return {
        "num_residual_streams": number,
        "sinkhorn_steps": config.get("hc_sinkhorn_iters", usual["sinkhorn_steps"].default),
        "sinkhorn_eps": config.get("hc_eps", usual["sinkhorn_eps"].default),
    }


def hash_layers(config: Mapping[str, Any], model: Settings, problems: list[str]) -> int:
    """How many first layers route by token id; every layer has experts."""
    number = int(model["num_layers"])
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return min(number, int(config.get("num_hash_layers", 3)))
    found = list(kinds).count("hash_moe")
    if list(kinds) != ["hash_moe"] * found + ["moe"] * (number - found):
        problems.append(
            "mlp_layer_types are not layers that route by token id (hash_moe) first and others "
            "with experts (moe) after"
        )
    return found


def config_of(shape: Settings, router: Settings, attention: Settings) -> Settings:
    """The keys that say all this, the Hub's and those of transformers, which agree."""
    kinds = compressed_kinds(shape["num_layers"], attention)
    theirs = {ours: name for name, ours in KINDS.items()}
    hashed = router["hash_layers"]
    ratios = {"window": 0, "csa": attention["csa_ratio"], "hca": attention["hca_ratio"]}
    theta = attention["compressed_rope_theta"]
    return {
        "layer_types": [theirs[kind] for kind in kinds],
        "compress_ratios": [ratios[kind] for kind in kinds],
        "compress_rates": {theirs[kind]: ratios[kind] for kind in RATIOS},
        "compress_rope_theta": shape["rope_theta"] if theta is None else theta,
        "qk_rope_head_dim": attention["rope_head_dim"],
        "sliding_window": attention["sliding_window"],
        "q_lora_rank": attention["q_lora_rank"],
        "o_groups": attention["output_groups"],
        "o_lora_rank": attention["o_lora_rank"],
        "index_n_heads": attention["index_heads"],
        "index_head_dim": attention["index_head_dim"],
        "index_topk": attention["top_k"],
        "hc_mult": shape["num_residual_streams"],
        "hc_sinkhorn_iters": shape["sinkhorn_steps"],
        "hc_eps": shape["sinkhorn_eps"],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (shape["num_layers"] - hashed),
        "num_hash_layers": hashed,
        "n_shared_experts": shape["num_shared_experts"],
        "routed_scaling_factor": router["scaling_factor"],
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "swiglu_limit": LIMIT,
    }
