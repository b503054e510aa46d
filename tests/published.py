"""Tiny random models of published families as transformers writes them, for several tests. Gains,
biases and router rows are random, because ones and zeros would hide a mistake.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.attention.config.kinds import ATTENTIONS
from model.config import BalanceConfig, ModelConfig, RopeScaling
from model.dispatch.config import LocalDispatcherConfig
from model.moe.experts import expert_ids_of
from model.moe.layer import ModelParts
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.pretrained.folder import PretrainedFolder

SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.1,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)
DEEPSEEK = dict(
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=3,
    norm_topk_prob=True,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
)
QWEN = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)


def rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, biased, wide heads": (
        "llama",
        dict(tie_word_embeddings=True, attention_bias=True, head_dim=16),
    ),
    "llama 3.1": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "mistral": ("mistral", dict(head_dim=16, sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen3 with yarn": (
        "qwen3",
        dict(head_dim=16) | rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=8, num_experts_per_tok=2)),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=3)),
    "qwen2_moe": ("qwen2_moe", QWEN | dict(shared_expert_intermediate_size=48)),
    "qwen3_moe": ("qwen3_moe", QWEN | dict(head_dim=16, norm_topk_prob=True, mlp_only_layers=[0])),
    "qwen3_moe, every second layer": (
        "qwen3_moe",
        QWEN | dict(head_dim=16, norm_topk_prob=False, decoder_sparse_step=2),
    ),
    "dots1": ("dots1", DEEPSEEK | dict(head_dim=16)),
    "glm4_moe": (
        "glm4_moe",
        DEEPSEEK | dict(head_dim=16, use_qk_norm=True, attention_bias=True),
    ),
    "deepseek_v3, kimi_k2": (
        "deepseek_v3",
        DEEPSEEK
        | LATENT
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=1.0,
            mscale_all_dim=0.8,
            beta_fast=1.0,
            beta_slow=1.0,
        ),
    ),
    "deepseek_v3, moonlight": ("deepseek_v3", DEEPSEEK | LATENT | dict(q_lora_rank=None)),
    "deepseek_v2, lite": (
        "deepseek_v2",
        DEEPSEEK | LATENT | dict(q_lora_rank=None, norm_topk_prob=False, topk_method="greedy"),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        DEEPSEEK | LATENT | dict(norm_topk_prob=False, topk_method="group_limited_greedy"),
    ),
    "glm4_moe_lite": ("glm4_moe_lite", DEEPSEEK | LATENT | dict(n_group=1, topk_group=1)),
    "gpt_oss": (
        "gpt_oss",
        dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16, sliding_window=8)
        | rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
    ),
    "minimax_m2": (
        "minimax_m2",
        dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16)
        | rope(partial_rotary_factor=0.5),
    ),
    "granitemoe": (
        "granitemoe",
        dict(
            num_local_experts=8,
            num_experts_per_tok=2,
            embedding_multiplier=12.0,
            attention_multiplier=0.3,
            residual_multiplier=0.22,
            logits_scaling=6.0,
        ),
    ),
    # Many index heads: torch's choice among equal scores, which relu makes, is not ours.
    "with hyper-connections, deepseek_v4": (
        "deepseek_v4",
        dict(
            num_hidden_layers=4,
            layer_types=[
                *("heavily_compressed_attention", "compressed_sparse_attention"),
                *("sliding_attention", "compressed_sparse_attention"),
            ],
            compress_rates={
                "compressed_sparse_attention": 4,
                "heavily_compressed_attention": 8,
            },
            num_hash_layers=2,
            num_key_value_heads=1,
            head_dim=16,
            qk_rope_head_dim=8,
            q_lora_rank=24,
            o_groups=2,
            o_lora_rank=8,
            index_n_heads=24,
            index_head_dim=12,
            index_topk=3,
            sliding_window=8,
            n_routed_experts=8,
            num_experts_per_tok=2,
            intermediate_size=24,
            moe_intermediate_size=24,
            hc_mult=4,
            hc_sinkhorn_iters=6,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
}


def in_fp32(name: str) -> bool:
    """Whether files on the Hub hold a tensor in fp32 whatever the others are in, as transformers
    names it in files.
    """
    ends = ("correction_bias", ".gate.bias", ".attn_sink", ".ape")
    return name.endswith(ends) or re.search(r"\bhc_", name) is not None


def theirs(case: str) -> Any:
    """A random model of transformers in fp32."""
    kind, settings = CASES[case]
    torch.manual_seed(sorted(CASES).index(case))
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tid2eid" in name:
                experts = torch.rand(len(tensor), model.config.n_routed_experts).argsort(1)
                tensor.copy_(experts[:, : tensor.shape[1]])
            elif "_hc." in name and name.endswith("scale"):
                tensor.copy_(torch.randn_like(tensor))
            elif tensor.ndim == 1 and "inv_freq" not in name:
                scale = 0.3 if "correction_bias" in name else 0.1
                tensor.copy_((1.0 if "norm" in name else 0.0) + scale * torch.randn_like(tensor))
            elif ("gate" in name and "proj" not in name) or "router" in name:
                tensor.copy_(torch.randn_like(tensor))
            elif "proj_bias" in name or "position_bias" in name:
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model.float().eval()


def saved(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model and its files, several of them."""
    model = theirs(case)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return model.float()


def ours(source: PretrainedFolder, top_k: int | None = None, **settings: Any) -> Transformer:
    """Our model of a folder. top_k: experts of a token instead of its own; settings: of
    ModelConfig, beside those of its config.json.
    """
    reading = source.reading
    shape = reading.model | settings
    if shape["rope_scaling"] is not None:
        shape["rope_scaling"] = RopeScaling(**shape["rope_scaling"])
    router = {k: v for k, v in reading.router.items() if k != "name"} or {"top_k": 1}
    attention = {key: value for key, value in reading.attention.items() if key != "name"}
    routing = TopKConfig(**router)
    if top_k is not None:
        routing = routing.fixed(ModelConfig(**shape), top_k)
    parts = ModelParts(
        routing,
        ATTENTIONS[reading.attention["name"]](**attention),
        LocalDispatcherConfig(),
        BalanceConfig(),
    )
    model = Transformer(ModelConfig(**shape), parts)
    with torch.no_grad():  # whatever is not read is seen
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    source.fill_model(model)
    return model.eval()


END = "<|im_end|>"


def published(
    case: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    """A folder as the Hub has it: weights of transformers, tokenizer and chat template.

    settings: of config.json, beside those of the case.
    """
    with mock.patch.dict(SHAPE, {"vocab_size": 300, **settings}):
        saved(case, folder, dtype)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 0], "temperature": 0.6}')
    return folder


class OfModel:
    """What a reader of a checkpoint gives, out of a model and without a copy."""

    def __init__(self, model: torch.nn.Module):
        experts = expert_ids_of(model)
        self.found = {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
        for name, value in model.named_parameters():
            rows = {f"{name}.{e}": v for e, v in zip(experts.get(name, ()), value, strict=False)}
            self.found |= {f"{key}/fp32": v.detach() for key, v in (rows or {name: value}).items()}
        self.shapes = {key: tuple(value.shape) for key, value in self.found.items()}

    def read(self, want: dict[str, torch.Tensor]) -> None:
        for key, tensor in want.items():
            tensor.copy_(self.found[key])
