"""The table of families: for each architecture on the Hub which keys of its config.json mean what,
and how its tensors are called. Reading, writing, the check of names and the count of bytes all use
it, so that the two directions cannot drift apart. Imports no torch.

Names and meanings are those of transformers 5 and of the files on the Hub (which agree but for
experts: transformers stacks them in memory, and writes them one by one; and for DeepSeek-V4, whose
files on the Hub are named as their authors' code is, see Family.respelled).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PER_EXPERT = (
    "experts.{e}.gate_proj.weight",
    "experts.{e}.up_proj.weight",
    "experts.{e}.down_proj.weight",
)
"""Gate, up and down of expert e, in most families."""
NUMBERED = ("experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight")
"""The same in Mixtral's."""

SHAPE = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "model_type",
        "layer_types",
        "quantization_config",
        "attention_bias",
        "router_aux_loss_coef",
    }
)
"""Keys that the reader of every family looks at."""
BOOKKEEPING = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "name_or_path",
        "_name_or_path",
        "_model_name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "transformers.js_config",
        "unk_token_id",
        "use_cache",
        "_attn_implementation_autoset",
    }
)
"""Keys without a say in the logits. Any other key that is neither known to the family nor at a
harmless value is refused: silence is how wrong logits are made.
"""
TRAINING_ONLY = frozenset(
    {"attention_dropout", "router_jitter_noise", "hidden_dropout", "aux_loss_alpha"}
)
"""Keys that act in training alone; what is not 0 is told."""


@dataclass(frozen=True)
class Family:
    """One architecture."""

    model_type: str
    architecture: str
    """The class in transformers."""
    is_moe: bool = True
    qk_norm: Literal["none", "head", "hidden"] = "none"
    biased: Literal["qkv", "qkvo"] = "qkvo"
    """Projections that have a bias where attention_bias is true."""
    is_biased: bool = False
    """What a missing attention_bias means."""
    attention: Literal["dense", "windowed", "mla", "compressed"] = "dense"
    """Name of the attention (model/attention/config/)."""
    score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    group_keys: int = 2
    """How many best experts a group of experts is ranked by."""
    normalizes: bool | None = None
    """Whether gates are divided by their sum. None: norm_topk_prob says."""
    normalizes_by_default: bool = True
    """What a missing norm_topk_prob means."""
    num_experts_key: str = "num_experts"
    expert_width_key: str = "moe_intermediate_size"
    mlp: str = "mlp"
    """Name of an MoE layer within a block."""
    gate: str = "gate.weight"
    """Name of the router's weight within an MoE layer."""
    selection_bias: str | None = None
    """Name of the bias that only the choice of experts sees, within an MoE layer."""
    experts: tuple[str, str, str] = PER_EXPERT
    """Gate, up and down of expert {e}, within an MoE layer."""
    stacked: tuple[str, str] | None = None
    """Instead of them: gate over up of all experts [E, 2F, D], and down [E, D, F]."""
    is_transposed: bool = False
    """Whether the stacks are [E, D, 2F], with gate and up taking turns, and [E, F, D]; each has a
    bias beside it, and so has the router.
    """
    shared: str | None = None
    """Name of the shared expert within an MoE layer."""
    shared_gate: str | None = None
    """Name of the weight of its gate."""
    respelled: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names as transformers writes them -> as the Hub has them, where these differ.
    Files of both are read, and the Hub's names are written.
    """
    known: frozenset[str] = frozenset()
    """Further keys that reading this family looks at."""
    harmless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key -> values at which it changes nothing."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a missing key means, where that is not what it means elsewhere."""


NO_WINDOW: Mapping[str, tuple[Any, ...]] = {
    "use_sliding_window": (False,),
    "sliding_window": (None,),
}
NO_BIAS: Mapping[str, tuple[Any, ...]] = {"mlp_bias": (False,)}
ROUTED = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"})
DEEPSEEK_ROUTING = frozenset(
    {
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "moe_intermediate_size",
        "num_local_experts",
    }
)
LATENT = frozenset(
    {
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "qk_head_dim",
        "v_head_dim",
        "rope_interleave",
    }
)
"""Keys of latent attention."""
FURTHER = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})
"""Keys of layers that predict further tokens."""
COMPRESSED = frozenset(
    {
        "compress_rates",
        "compress_ratios",
        "compress_rope_theta",
        "q_lora_rank",
        "qk_rope_head_dim",
        "o_groups",
        "o_lora_rank",
        "sliding_window",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
    }
)
"""Keys of compressed attention."""
STREAMS = frozenset({"hc_mult", "hc_sinkhorn_iters", "hc_eps"})
"""Keys of several residual streams."""
ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types that are another family's, with code of their own on the Hub."""

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            is_moe=False,
            harmless={**NO_BIAS},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            is_moe=False,
            harmless={"sliding_window": (None,)},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            is_moe=False,
            biased="qkv",
            is_biased=True,
            harmless={**NO_WINDOW},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            is_moe=False,
            qk_norm="head",
            harmless={**NO_BIAS, **NO_WINDOW},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            normalizes=True,
            num_experts_key="num_local_experts",
            expert_width_key="intermediate_size",
            mlp="block_sparse_moe",
            experts=NUMBERED,
            known=ROUTED,
            harmless={"sliding_window": (None,)},
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            qk_norm="hidden",
            normalizes_by_default=False,
            expert_width_key="intermediate_size",
            known=ROUTED | {"norm_topk_prob"},
            harmless={**NO_BIAS, "clip_qkv": (None,)},
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            biased="qkv",
            is_biased=True,
            normalizes_by_default=False,
            shared="shared_expert",
            shared_gate="shared_expert_gate.weight",
            known=ROUTED
            | {
                "norm_topk_prob",
                "moe_intermediate_size",
                "shared_expert_intermediate_size",
                "decoder_sparse_step",
                "mlp_only_layers",
            },
            harmless={"qkv_bias": (True,), **NO_WINDOW},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qk_norm="head",
            normalizes_by_default=False,
            known=ROUTED
            | {"norm_topk_prob", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"},
            harmless={**NO_BIAS, **NO_WINDOW},
        ),
        Family(
            "dots1",
            "Dots1ForCausalLM",
            qk_norm="head",
            score_function="sigmoid",
            num_experts_key="n_routed_experts",
            selection_bias="gate.e_score_correction_bias",
            shared="shared_experts",
            known=DEEPSEEK_ROUTING,
            harmless={
                **NO_BIAS,
                **NO_WINDOW,
                "scoring_func": ("noaux_tc", "sigmoid"),
                "topk_method": ("noaux_tc",),
                "moe_layer_freq": (1,),
            },
        ),
        Family(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            biased="qkv",
            score_function="sigmoid",
            num_experts_key="n_routed_experts",
            selection_bias="gate.e_score_correction_bias",
            shared="shared_experts",
            known=DEEPSEEK_ROUTING | FURTHER | {"use_qk_norm"},
            harmless={
                "scoring_func": ("sigmoid",),
                "topk_method": ("noaux_tc",),
                "moe_layer_freq": (1,),
            },
            defaults={"partial_rotary_factor": 0.5},
        ),
        Family(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            attention="mla",
            normalizes=False,
            group_keys=1,
            num_experts_key="n_routed_experts",
            shared="shared_experts",
            known=DEEPSEEK_ROUTING - {"norm_topk_prob"} | LATENT | {"topk_method"},
            harmless={
                **NO_BIAS,
                "attention_bias": (False,),
                "norm_topk_prob": (False,),
                "scoring_func": ("softmax",),
                "moe_layer_freq": (1,),
                "ep_size": (1,),
                "seq_aux": (True, False),
            },
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            attention="mla",
            score_function="sigmoid",
            num_experts_key="n_routed_experts",
            selection_bias="gate.e_score_correction_bias",
            shared="shared_experts",
            known=DEEPSEEK_ROUTING | LATENT | FURTHER,
            harmless={
                **NO_BIAS,
                "scoring_func": ("sigmoid",),
                "topk_method": ("noaux_tc",),
                "moe_layer_freq": (1,),
                "ep_size": (1,),
                "seq_aux": (True, False),
            },
        ),
        Family(
            "deepseek_v4",
            "DeepseekV4ForCausalLM",
            attention="compressed",
            score_function="sqrt_softplus",
            normalizes=True,
            num_experts_key="n_routed_experts",
            mlp="ffn",
            selection_bias="gate.bias",
            experts=NUMBERED,
            shared="shared_experts",
            respelled={
                r"^model\.embed_tokens\.": "embed.",
                r"^lm_head\.": "head.",
                r"^model\.hc_head\.hc_": "hc_head_",
                r"^model\.": "",
                r"\.attn\.norm\.": ".attn.kv_norm.",
                r"\.scale$": ".weight_scale_inv",  # of stored 8- and 4-bit floats
            },
            known=COMPRESSED
            | STREAMS
            | {
                "n_routed_experts",
                "n_shared_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "routed_scaling_factor",
                "num_local_experts",
                "num_hash_layers",
                "mlp_layer_types",
                "num_nextn_predict_layers",
                "swiglu_limit",
                "expert_dtype",
            },
            harmless={
                **NO_BIAS,
                "attention_bias": (False,),
                "norm_topk_prob": (True,),
                "scoring_func": ("sqrtsoftplus",),
                "topk_method": ("noaux_tc",),
                "n_group": (1,),
                "topk_group": (1,),
                "first_k_dense_replace": (0,),
                "moe_layer_freq": (1,),
                "ep_size": (1,),
                "seq_aux": (True, False),
            },
        ),
        Family(
            "glm4_moe_lite",
            "Glm4MoeLiteForCausalLM",
            attention="mla",
            score_function="sigmoid",
            num_experts_key="n_routed_experts",
            selection_bias="gate.e_score_correction_bias",
            shared="shared_experts",
            known=DEEPSEEK_ROUTING | LATENT | FURTHER | {"mlp_layer_types"},
            harmless={
                **NO_BIAS,
                "scoring_func": ("sigmoid",),
                "topk_method": ("noaux_tc",),
                "moe_layer_freq": (1,),
            },
            defaults={"first_k_dense_replace": 1},
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            is_biased=True,
            attention="windowed",
            normalizes=True,
            num_experts_key="num_local_experts",
            expert_width_key="intermediate_size",
            gate="router.weight",
            stacked=("experts.gate_up_proj", "experts.down_proj"),
            is_transposed=True,
            known=ROUTED | {"sliding_window"},
            harmless={
                "swiglu_limit": (7.0,),
                "swiglu_alpha": (1.702,),
                "experts_per_token": (1, 2, 4, 8),  # num_experts_per_tok again
                "initial_context_length": (4096,),  # rope's original length again
            },
        ),
        Family(
            "minimax_m2",
            "MiniMaxM2ForCausalLM",
            qk_norm="hidden",
            score_function="sigmoid",
            normalizes=True,
            num_experts_key="num_local_experts",
            expert_width_key="intermediate_size",
            mlp="block_sparse_moe",
            selection_bias="e_score_correction_bias",
            experts=NUMBERED,
            known=ROUTED | {"rotary_dim", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"},
            harmless={
                "scoring_func": ("sigmoid",),
                "use_qk_norm": (True,),
                "qk_norm_type": ("per_layer",),
                "use_routing_bias": (True,),
                "shared_intermediate_size": (0,),
            },
        ),
        Family(
            "granitemoe",
            "GraniteMoeForCausalLM",
            normalizes=True,
            num_experts_key="num_local_experts",
            expert_width_key="intermediate_size",
            mlp="block_sparse_moe",
            gate="router.layer.weight",
            stacked=("input_linear.weight", "output_linear.weight"),
            known=ROUTED
            | {
                "attention_multiplier",
                "embedding_multiplier",
                "residual_multiplier",
                "logits_scaling",
            },
            harmless={**NO_BIAS},
        ),
    )
}
