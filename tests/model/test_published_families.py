"""The model features that published families need, against the families' own models: tiny random
ones of Hugging Face's transformers, whose weights are copied in memory. Logits within 5e-6 and
every gradient within 1e-5 of the largest value, in fp32; the same logits with a cache.

Gains, biases and router rows are random here, because ones and zeros would hide a mistake.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.process.identity import ROOT
from launch.saved.defaults import complete
from model.attention.config.base import AttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.latent import MlaConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.config.windowed import WindowedAttentionConfig
from model.config import BalanceConfig, ModelConfig, RopeScaling
from model.dispatch.config import LocalDispatcherConfig
from model.moe.layer import ModelParts
from model.routers.config import TopKConfig
from model.transformer import Transformer

VOCAB_SIZE, LENGTH = 96, 40
THEIRS = dict(
    vocab_size=VOCAB_SIZE,
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
OURS = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    num_experts=0,
    expert_intermediate_size=24,
    max_seq_len=64,
    norm_eps=1e-5,
)
MOE = dict(num_experts=8, top_k=2)
DENSE = DenseAttentionConfig()


@dataclass(frozen=True)
class Family:
    kind: str
    """model_type of transformers."""
    theirs: dict[str, Any]
    """Its config, beyond THEIRS."""
    ours: dict[str, Any]
    """Ours, beyond OURS."""
    router: dict[str, Any] = field(default_factory=lambda: {"top_k": 2})
    attention: AttentionConfig = DENSE


def rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(factor=4.0, beta_fast=4.0, beta_slow=1.0)
ORIGINAL = {"original_max_position_embeddings": 16}
SIGMOID = dict(top_k=2, score_function="sigmoid")
LATENT = dict(
    q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14
)
NO_QUERY_LATENT = LATENT | dict(q_lora_rank=None)
DEEPSEEK = dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    n_shared_experts=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
)
OUR_DEEPSEEK = MOE | dict(num_kv_heads=4, num_shared_experts=2, num_dense_layers=1)
DEEPSEEK_YARN = dict(factor=40.0, mscale=0.7, mscale_all_dim=0.7, beta_fast=4.0, beta_slow=1.0)
FAMILIES = {
    "llama with llama3 scaling": Family(
        "llama",
        dict(head_dim=16) | rope("llama3", **LLAMA3, **ORIGINAL),
        dict(
            head_dim=16,
            rope_scaling=RopeScaling(type="llama3", original_max_seq_len=16, **LLAMA3),
        ),
    ),
    "llama with linear scaling and biases": Family(
        "llama",
        dict(attention_bias=True) | rope("linear", factor=4.0),
        dict(attention_bias="qkvo", rope_scaling=RopeScaling(type="linear", factor=4.0)),
    ),
    "qwen2": Family("qwen2", dict(use_sliding_window=False), dict(attention_bias="qkv")),
    "qwen3 with yarn": Family(
        "qwen3",
        dict(head_dim=16) | rope("yarn", **YARN, **ORIGINAL),
        dict(
            head_dim=16,
            qk_norm="head",
            rope_scaling=RopeScaling(type="yarn", original_max_seq_len=16, **YARN),
        ),
    ),
    "llama with yarn as deepseek's": Family(
        "llama",
        dict(head_dim=16)
        | rope("yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.5, truncate=False, **ORIGINAL),
        dict(
            head_dim=16,
            rope_scaling=RopeScaling(
                type="yarn",
                factor=40.0,
                original_max_seq_len=16,
                mscale=1.0,
                mscale_all_dim=0.5,
                truncate=False,
            ),
        ),
    ),
    "llama with yarn and a factor of its own": Family(
        "llama",
        rope("yarn", **YARN, attention_factor=1.3, **ORIGINAL),
        dict(
            rope_scaling=RopeScaling(
                type="yarn", original_max_seq_len=16, attention_factor=1.3, **YARN
            )
        ),
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        dict(
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=48,
        ),
        MOE | dict(num_shared_experts=2, attention_bias="qkv", shared_expert_gate=True),
        dict(top_k=2, normalize_weights=False),
    ),
    "glm4_moe": Family(
        "glm4_moe",
        dict(
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            use_qk_norm=True,
            attention_bias=True,
            head_dim=16,
        )
        | rope(partial_rotary_factor=0.5),
        MOE
        | dict(
            num_shared_experts=1,
            num_dense_layers=1,
            attention_bias="qkv",
            qk_norm="head",
            head_dim=16,
            rotary_dim=8,
        ),
        SIGMOID | dict(scaling_factor=1.5),
    ),
    "granitemoe": Family(
        "granitemoe",
        dict(
            num_local_experts=8,
            num_experts_per_tok=2,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.2,
            logits_scaling=6.0,
        ),
        MOE
        | dict(
            expert_intermediate_size=48,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.2,
            logits_divisor=6.0,
        ),
        dict(top_k=2),
    ),
    "minimax_m2": Family(
        "minimax_m2",
        dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16)
        | rope(partial_rotary_factor=0.5),
        MOE | dict(expert_intermediate_size=48, head_dim=16, rotary_dim=8, qk_norm="hidden"),
        SIGMOID,
    ),
    "gpt_oss": Family(
        "gpt_oss",
        dict(
            num_local_experts=8,
            num_experts_per_tok=2,
            head_dim=16,
            sliding_window=8,
            attention_bias=True,
        )
        | rope("yarn", **YARN, truncate=False, **ORIGINAL),
        MOE
        | dict(
            expert_intermediate_size=48,
            head_dim=16,
            attention_bias="qkvo",
            activation="clamped_swiglu",
            expert_bias=True,
            rope_scaling=RopeScaling(type="yarn", original_max_seq_len=16, truncate=False, **YARN),
        ),
        dict(top_k=2, bias=True),
        WindowedAttentionConfig(window=8, sinks=True),
    ),
    "deepseek_v3 with yarn": Family(
        "deepseek_v3",
        DEEPSEEK
        | LATENT
        | dict(num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
        | rope("yarn", **DEEPSEEK_YARN, **ORIGINAL),
        OUR_DEEPSEEK
        | dict(
            top_k=4,
            rope_scaling=RopeScaling(type="yarn", original_max_seq_len=16, **DEEPSEEK_YARN),
        ),
        SIGMOID | dict(top_k=4, num_groups=4, top_groups=2, scaling_factor=2.5),
        MlaConfig(**LATENT),
    ),
    "deepseek_v3 as moonlight": Family(
        "deepseek_v3",
        DEEPSEEK
        | NO_QUERY_LATENT
        | dict(num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=2.446)
        | rope(),
        OUR_DEEPSEEK,
        SIGMOID | dict(scaling_factor=2.446),
        MlaConfig(**NO_QUERY_LATENT),
    ),
    "deepseek_v3 as kimi_k2": Family(
        "deepseek_v3",
        DEEPSEEK
        | LATENT
        | dict(num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=2.827)
        | dict(v_head_dim=20)  # wider than a key
        | rope("yarn", **(DEEPSEEK_YARN | dict(beta_fast=1.0)), **ORIGINAL),
        OUR_DEEPSEEK
        | dict(
            rope_scaling=RopeScaling(
                type="yarn", original_max_seq_len=16, **(DEEPSEEK_YARN | dict(beta_fast=1.0))
            )
        ),
        SIGMOID | dict(scaling_factor=2.827),
        MlaConfig(**(LATENT | dict(v_head_dim=20))),
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        DEEPSEEK
        | LATENT
        | dict(num_experts_per_tok=3, topk_method="group_limited_greedy", norm_topk_prob=False)
        | dict(n_group=4, topk_group=2, routed_scaling_factor=16.0)
        | rope(),
        OUR_DEEPSEEK | dict(top_k=3),
        dict(
            top_k=3,
            normalize_weights=False,
            scaling_factor=16.0,
            num_groups=4,
            top_groups=2,
            group_keys=1,
        ),
        MlaConfig(**LATENT),
    ),
    "deepseek_v2_lite": Family(
        "deepseek_v2",
        DEEPSEEK
        | NO_QUERY_LATENT
        | dict(num_experts_per_tok=2, topk_method="greedy", norm_topk_prob=False)
        | rope("yarn", **DEEPSEEK_YARN, **ORIGINAL),
        OUR_DEEPSEEK
        | dict(rope_scaling=RopeScaling(type="yarn", original_max_seq_len=16, **DEEPSEEK_YARN)),
        dict(top_k=2, normalize_weights=False),
        MlaConfig(**NO_QUERY_LATENT),
    ),
}


# --- weights from one to the other ----------------------------------------------------------------

WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
PARTS = (
    (r"blocks\.(\d+)\.attention_norm", r"model.layers.\1.input_layernorm"),
    (r"blocks\.(\d+)\.mlp_norm", r"model.layers.\1.post_attention_layernorm"),
    (r"blocks\.(\d+)\.attention", r"model.layers.\1.self_attn"),
    (r"blocks\.(\d+)\.mlp", r"model.layers.\1.MLP"),
    (r"experts\.(gate_up|down)(_bias)?$", r"experts.\1_proj\2"),
    (r"shared_gate", "shared_expert_gate"),
    (r"(q|kv)_a_norm", r"\1_a_layernorm"),
    (r"kv_a_proj", "kv_a_proj_with_mqa"),
    (r"MLP\.shared\.", "MLP.SHARED."),
)
PLACES = {
    "MLP": ("mlp", "block_sparse_moe"),
    "SHARED": ("shared_experts", "shared_expert"),
    "router": ("gate", "router"),
    "router.balance_bias": ("gate.e_score_correction_bias", "e_score_correction_bias"),
}
"""What families name differently."""


def sources(name: str, theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that make up one of ours, to be put under each other."""
    name = WHOLE.get(name, name)
    for pattern, replacement in PARTS:
        name = re.sub(pattern, replacement, name)
    names = [name]
    for place in sorted(PLACES, key=len, reverse=True):
        names = [n.replace(place, other) for n in names for other in PLACES[place]]
    for found in names:
        if found in theirs:
            return [found]
        halves = [
            re.sub(r"gate_up\.", f"{half}_proj.", re.sub(r"down\.", "down_proj.", found))
            for half in ("gate", "up")
        ]
        if halves[0] in theirs:
            return list(dict.fromkeys(halves))
    raise KeyError(f"{name} is none of {sorted(theirs)}")


def ours_from(name: str, pieces: list[torch.Tensor], family: Family) -> torch.Tensor:
    """Tensors of theirs, put under each other in the order of ours: DeepSeek interleaves the two
    halves of rotary rows; gpt-oss holds experts transposed, with gate and up taking turns.
    """
    tensor, attention = torch.cat(pieces), family.attention
    if family.kind == "gpt_oss" and ".experts." in name:
        if not name.endswith("bias"):
            tensor = tensor.transpose(1, 2)
        return torch.cat((tensor[:, ::2], tensor[:, 1::2]), 1) if "gate_up" in name else tensor
    if not isinstance(attention, MlaConfig):
        return tensor
    halves = torch.arange(attention.qk_rope_head_dim).view(-1, 2).T.flatten()
    if name.endswith(("attention.q_proj.weight", "q_b_proj.weight")):
        heads = tensor.view(-1, attention.qk_head_dim, tensor.shape[-1])
        nope, rope = heads.split((attention.qk_nope_head_dim, attention.qk_rope_head_dim), 1)
        return torch.cat((nope, rope[:, halves]), 1).view(tensor.shape)
    if name.endswith("kv_a_proj.weight"):
        return torch.cat(
            (tensor[: attention.kv_lora_rank], tensor[attention.kv_lora_rank :][halves])
        )
    return tensor


def draw(model: torch.nn.Module) -> None:
    """Gains around 1, and vectors and router rows that are not small."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "correction_bias" in name or re.search(r"bias$|sinks|(gate|router)\.weight", name):
                tensor.normal_(0.0, 0.3, generator=generator)


class Pair(NamedTuple):
    ours: Transformer
    theirs: torch.nn.Module


def pair(family: Family) -> Pair:
    """Two models with the same weights."""
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(family.kind, **(THEIRS | family.theirs))
    theirs = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    theirs = theirs.float().eval()
    draw(theirs)

    config = ModelConfig(**(OURS | family.ours))
    router = TopKConfig(**family.router)
    found = config.problems() + family.attention.problems(config)
    assert found + (router.problems(config) if config.num_experts else []) == []
    parts = ModelParts(router, family.attention, LocalDispatcherConfig(), BalanceConfig())
    ours = Transformer(config, parts).eval()

    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    used: set[str] = set()
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            names = sources(name, tensors)
            tensor.copy_(ours_from(name, [tensors[n] for n in names], family))
            used |= set(names)
        for router in ours.routers():
            if any("correction_bias" in name for name in tensors):
                module = next(n for n, m in ours.named_modules() if m is router)
                (found,) = sources(f"{module}.balance_bias", tensors)
                router.balance_bias.copy_(tensors[found])
    left = {name for name, _ in theirs.named_parameters()} - used
    assert not left, f"not copied: {sorted(left)}"
    return Pair(ours, theirs)


def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(2))


# --- the families ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_every_gradient_are_those_of_the_family(name):
    family = FAMILIES[name]
    ours, theirs = pair(family)
    ids = token_ids()
    found, expected = ours.logits(ids), theirs(input_ids=ids).logits
    # 5e-6 of logits of order 1
    torch.testing.assert_close(
        found, expected, rtol=0, atol=5e-6 * max(1.0, float(expected.detach().abs().max()))
    )

    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    tensors = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = ours_from(name, [tensors[n] for n in sources(name, tensors)], family)
        error = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert gradient.abs().max() > 0 and error < 1e-5, (name, float(error))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_with_a_cache_are_those_of_the_whole_row(name):
    ours, theirs = pair(FAMILIES[name])
    ids = token_ids()
    caches = ours.new_caches(len(ids), LENGTH)
    pieces = [ids[:, :17], *(ids[:, i : i + 1] for i in range(17, LENGTH))]
    found = torch.cat([ours.logits(piece, caches) for piece in pieces], dim=1)
    expected = theirs(input_ids=ids).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max()))
    )


@pytest.mark.parametrize(
    "name", ["llama with llama3 scaling", "qwen3 with yarn", "glm4_moe", "granitemoe"]
)
@torch.no_grad()
def test_sparse_attention_that_selects_everything_is_the_familys(name):
    """Biases, rotation and multipliers act before attention, so every attention has them."""
    everything = SparseAttentionConfig(
        block_size=4, top_k=LENGTH // 4, window_size=8, coarse_block_size=2
    )
    ours, theirs = pair(dataclasses.replace(FAMILIES[name], attention=everything))
    assert len(ours.sparse_attentions()) == 2
    ids = token_ids()
    caches = ours.new_caches(len(ids), LENGTH)
    pieces = [ids[:, :17], *(ids[:, i : i + 1] for i in range(17, LENGTH))]
    cached = torch.cat([ours.logits(piece, caches) for piece in pieces], dim=1)
    expected = theirs(input_ids=ids).logits
    for found in (ours.logits(ids), cached):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max()))
        )


CHANGES = {
    "attention_bias": ("qwen2", dict(attention_bias="none")),
    "rotary_dim": ("glm4_moe", dict(rotary_dim=None)),
    "rope_scaling": ("llama with llama3 scaling", dict(rope_scaling=None)),
    "rope_scaling of latents": ("deepseek_v2_lite", dict(rope_scaling=None)),
    "shared_expert_gate": ("qwen2_moe", dict(shared_expert_gate=False)),
    "embedding_multiplier": ("granitemoe", dict(embedding_multiplier=1.0)),
    "residual_multiplier": ("granitemoe", dict(residual_multiplier=1.0)),
    "attention_multiplier": ("granitemoe", dict(attention_multiplier=None)),
    "logits_divisor": ("granitemoe", dict(logits_divisor=1.0)),
    "activation": ("gpt_oss", dict(activation="swiglu")),
    "expert_bias": ("gpt_oss", dict(expert_bias=False)),
}


@pytest.mark.parametrize("feature", CHANGES)
@torch.no_grad()
def test_the_comparison_sees_every_feature(feature):
    """Without it the logits are others, by far more than the bound."""
    name, without = CHANGES[feature]
    whole, theirs = pair(FAMILIES[name])
    parts = ModelParts(
        TopKConfig(**FAMILIES[name].router),
        FAMILIES[name].attention,
        LocalDispatcherConfig(),
        BalanceConfig(),
    )
    ours = Transformer(dataclasses.replace(whole.config, **without), parts).eval()
    ours.load_state_dict(whole.state_dict(), strict=False)
    ids = token_ids()
    expected = theirs(input_ids=ids).logits
    assert (ours.logits(ids) - expected).abs().max() > 1e-3 * expected.abs().max()


# --- what contradicts itself ----------------------------------------------------------------------

YARN_OF_16 = dict(type="yarn", factor=4.0, original_max_seq_len=16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(rotary_dim=3), "model.rotary_dim is 3; it must be an even number from 2 to the head"),
        (dict(rotary_dim=10), "model.rotary_dim is 10; it must be an even number from 2 to"),
        (dict(shared_expert_gate=True), "there is no shared expert to gate"),
        (dict(residual_multiplier=0.0), "model.residual_multiplier is 0.0; it must be positive"),
        (dict(attention_multiplier=-1.0), "model.attention_multiplier is -1.0"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "original_max_seq_len is null"),
        (
            dict(rope_scaling=dict(type="llama3", factor=4.0, original_max_seq_len=16)),
            "model.rope_scaling.low_freq_factor is null; model.rope_scaling.type=llama3 needs it",
        ),
        (
            dict(rope_scaling=dict(type="linear", factor=4.0, original_max_seq_len=16)),
            "model.rope_scaling.original_max_seq_len is 16, but model.rope_scaling.type=linear",
        ),
        (dict(rope_scaling=YARN_OF_16 | dict(factor=0.5)), "factor is 0.5; it must be at least 1"),
        (dict(rope_scaling=YARN_OF_16 | dict(mscale=0.0)), "mscale is 0.0; it must be positive"),
        (
            dict(rope_scaling=YARN_OF_16 | dict(beta_fast=0.5)),
            "beta_slow and beta_fast are 1.0 and 0.5; the first must be the smaller one",
        ),
        (
            dict(rope_scaling=dict(type="linear", factor=4.0, truncate=False)),
            "model.rope_scaling.truncate=false belongs to model.rope_scaling.type=yarn, not linear",
        ),
    ],
)
def test_a_feature_that_contradicts_itself_is_named(changes, words):
    if scaling := changes.get("rope_scaling"):
        changes = changes | {"rope_scaling": RopeScaling(**scaling)}
    (problem,) = [p for p in ModelConfig(**(OURS | changes)).problems() if words in p]
    assert problem.startswith("model.")


def test_a_rope_scaling_of_the_command_line_becomes_a_record():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "train",
            overrides=["model.rope_scaling={type: yarn, factor: 4, original_max_seq_len: 128}"],
        )
    complete(config)
    assert config.model.rope_scaling.truncate is True  # every default is saved with the run
    run = parse(plain(config), 1)
    assert run.model.rope_scaling == RopeScaling("yarn", 4.0, 128)
    with pytest.raises(ConfigError, match=r"did you mean model\.rope_scaling.factor"):
        config = plain(config)
        config["model"]["rope_scaling"]["factr"] = 1.0
        parse(config, 1)
