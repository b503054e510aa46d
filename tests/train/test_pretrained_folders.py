"""Folders of published weights: what is refused before a number is read, what is stored otherwise,
and that reading and writing a config.json are each other's inverse.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.families.names import respelled
from model.families.reading import FamilyError, read
from model.families.writing import express
from tests.published import CASES, SHAPE, OfModel, in_fp32, ours, saved, theirs
from train.pretrained.described import describe, end_of_text
from train.pretrained.export import _write_weights
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import PretrainedError, ShardedReader, write_shards


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    saved("mixtral", folder)
    return folder


def copy(source: Path, to: Path, **config: Any) -> Path:
    """The folder with other keys in its config.json."""
    shutil.copytree(source, to)
    text = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(text | config))
    return to


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def rewritten(folder: Path, found: dict[str, torch.Tensor], to: Path) -> Path:
    """A folder of one file with these tensors."""
    to.mkdir()
    shutil.copyfile(folder / "config.json", to / "config.json")
    save_file(found, to / "model.safetensors")
    return to


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_was_read_is_written_as_one_that_reads_the_same(case):
    config = theirs(case).config.to_dict()
    reading = read(config)
    written, again = express(reading.model, reading.router, reading.attention)
    assert (again.model, again.router, again.attention) == (
        reading.model,
        reading.router,
        reading.attention,
    )
    # Two families may be one model: any that says the same will do.
    assert read(written).model == reading.model


@pytest.mark.parametrize(
    "changes", [{"entry_layers": 2}, {"csa_overlap": False}, {"index_keys": "projected"}]
)
def test_what_deepseek_v4_does_not_have_is_not_written_as_such(changes):
    """Layers that share entries, and entries and index keys of another make."""
    reading = read(theirs(V4).config.to_dict())
    attention = {**reading.attention, **changes}
    with pytest.raises(FamilyError, match=f"attention.{next(iter(changes))}="):
        express(reading.model, reading.router, attention)


@pytest.mark.parametrize(
    ("case", "key", "value", "said"),
    [
        ("llama", "new_scale", 2.0, "new_scale=2.0 is unknown to the reader of llama"),
        ("llama", "mlp_bias", True, "mlp_bias=True is not computed here, only False"),
        ("llama", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("llama", "vocab_size", None, "no number for vocab_size"),
        ("mixtral", "sliding_window", 16, "sliding_window=16 is not computed here"),
        ("mixtral", "num_local_experts", None, "lacks one of num_local_experts"),
        ("olmoe", "clip_qkv", 8.0, "clip_qkv=8.0"),
        ("qwen3_moe", "layer_types", ["sliding_attention"] * 2, "'sliding_attention'"),
        ("qwen3_moe", "mlp_only_layers", [1], "mlp_only_layers=[1] are not the first layers"),
        ("deepseek_v2", "topk_method", "noaux_tc", "topk_method='noaux_tc'"),
        ("deepseek_v2", "norm_topk_prob", True, "norm_topk_prob=True"),
        ("deepseek_v3, moonlight", "kv_lora_rank", None, "no number kv_lora_rank"),
        ("llama 3.1", "rope_parameters", {"rope_type": "longrope"}, "rope type 'longrope'"),
        ("llama", "quantization_config", {"quant_method": "gptq"}, "quantised (gptq)"),
        ("llama", "model_type", "rwkv", "model_type 'rwkv' is not known; known are llama"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(case, key, value, said):
    config = theirs(case).config.to_dict()
    config |= {key: value}
    with pytest.raises(FamilyError) as caught:
        read(config)
    assert said in str(caught.value)


V4 = "with hyper-connections, deepseek_v4"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hc_mult", 1, "hc_mult=1 is not computed here, only 2 and more"),
        ("swiglu_limit", 7.0, "swiglu_limit=7.0 is not computed here, only 10.0"),
        ("norm_topk_prob", False, "norm_topk_prob=False is not computed here, only True"),
        ("scoring_func", "sigmoid", "scoring_func='sigmoid' is not computed here"),
        ("n_shared_experts", 2, "n_shared_experts=2 is not computed here, only 1"),
        ("num_key_value_heads", 2, "num_key_value_heads=2 is not computed here, only 1"),
        ("index_topk", None, "no number index_topk, which compressed attention needs"),
        ("layer_types", ["full_attention"] * 4, "attention is 'full_attention', which is not"),
        ("layer_types", ["sliding_attention"], "says the attention of 1 layers, not of 4"),
        ("mlp_layer_types", ["moe", "hash_moe", "moe", "moe"], "(hash_moe) first and others"),
        ("compress_rope_theta", 1.0, "compress_rope_theta=1.0 and rope_parameters.compress"),
        ("first_k_dense_replace", 1, "first_k_dense_replace=1 is not computed here, only 0"),
        ("engram_layers", [1], "engram_layers=[1] is unknown to the reader of deepseek_v4"),
        ("quantization_config", {"quant_method": "mxfp4"}, "stored quantised (mxfp4)"),
        (
            "quantization_config",
            {"quant_method": "fp8", "weight_block_size": [8, 8], "expert_dtype": "nvfp4"},
            "expert_dtype='nvfp4' is not read here, only 'fp8' and 'fp4'",
        ),
    ],
)
def test_what_is_not_computed_of_deepseek_v4_is_refused_by_name(key, value, said):
    with pytest.raises(FamilyError) as caught:
        read(theirs(V4).config.to_dict() | {key: value})
    assert said in str(caught.value)


def test_the_keys_of_the_hub_say_what_those_of_transformers_do():
    """compress_ratios go on with those of layers that predict further tokens."""
    config = theirs(V4).config.to_dict()
    expected = read(config)
    ropes = config.pop("rope_parameters")
    for key in ("layer_types", "mlp_layer_types", "partial_rotary_factor", "compress_rates"):
        del config[key]
    scaling = {key: ropes["compress"][key] for key in ("factor", "rope_type")}
    scaling["original_max_position_embeddings"] = 16
    of_hub = {
        "rope_theta": ropes["main"]["rope_theta"],
        "compress_rope_theta": ropes["compress"]["rope_theta"],
        "rope_scaling": scaling,
        "qk_rope_head_dim": 8,
        "num_hash_layers": 2,
        "compress_ratios": [128, 4, 0, 4, 0],
        "topk_method": "noaux_tc",
    }
    found = read(config | of_hub)
    assert found.model == expected.model and found.router == expected.router
    # Of another name there is no other ratio.
    assert found.attention == expected.attention | {"hca_ratio": 128}


def test_a_table_of_tokens_that_is_none_is_refused(tmp_path):
    saved(V4, tmp_path / "there")
    found = tensors(tmp_path / "there")
    name = next(name for name in found if name.endswith("tid2eid"))
    twice = found | {name: torch.zeros_like(found[name])}
    folder = rewritten(tmp_path / "there", twice, tmp_path / "twice")
    with pytest.raises(PretrainedError, match=r"names an expert twice for token 0: \[0, 0\]"):
        ours(PretrainedFolder(folder))
    real = found | {name: found[name].float()}
    with pytest.raises(PretrainedError, match="is a table of F32, not of whole numbers"):
        describe(rewritten(tmp_path / "there", real, tmp_path / "real"))


def test_layers_of_deepseek_v4_that_predict_further_tokens_are_left_out(tmp_path):
    saved(V4, tmp_path / "there")
    found = tensors(tmp_path / "there")
    further = {"mtp.0.enorm.weight": torch.ones(32), "mtp.0.hc_head_scale": torch.ones(1)}
    folder = rewritten(tmp_path / "there", found | further, tmp_path / "further")
    assert "1 layers that predict further tokens are left out" in describe(folder).reading.notes
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(PretrainedError, match=r"is no part of what config\.json describes"):
        describe(folder)


def test_what_acts_in_training_alone_and_what_is_left_out_is_told():
    config = theirs("deepseek_v3, moonlight").config.to_dict()
    config |= {"attention_dropout": 0.1, "num_nextn_predict_layers": 1}
    notes = "; ".join(read(config).notes)
    assert "attention_dropout=0.1 acts in training alone" in notes
    assert "1 layers that predict further tokens are left out, unless model.num_mtp" in notes


def test_kimi_k2_is_read_as_deepseek_v3():
    config = theirs("deepseek_v3, kimi_k2").config.to_dict()
    assert read(config | {"model_type": "kimi_k2"}) == read(config)


def test_a_rope_that_transformers_4_wrote_is_read_as_that_of_5():
    config = theirs("llama 3.1").config.to_dict()
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    older = read(config | {"rope_theta": theta, "rope_scaling": rope})
    assert older.model["rope_scaling"]["type"] == "llama3"
    assert older.model == read(theirs("llama 3.1").config.to_dict()).model


# --- in and out again -----------------------------------------------------------------------------


def came_out(folder: Path, to: Path) -> dict[str, torch.Tensor]:
    """What is exported in bf16 of a model that was read from a folder and did no step."""
    source = PretrainedFolder(folder)
    to.mkdir()
    reader: Any = OfModel(ours(source))
    config, reading = express(source.reading.model, source.reading.router, source.reading.attention)
    _write_weights(reading, reader, to, "bf16", 20_000)
    assert len(list(to.glob("*.safetensors"))) > 1
    (to / "config.json").write_text(json.dumps(config))
    assert describe(to).reading.model == source.reading.model
    return tensors(to)


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().view(torch.uint8).numpy().tobytes(),
    )


@pytest.mark.parametrize("case", CASES)
def test_what_no_step_has_changed_comes_out_byte_for_byte_in_every_family(case, tmp_path):
    """Through real files: as transformers writes them in bf16, with selection biases in fp32 as the
    Hub has them, into a model of ours and out of it.
    """
    saved(case, tmp_path / "there", torch.bfloat16)
    found = {
        name: value.float() + 1e-3 if in_fp32(name) else value
        for name, value in tensors(tmp_path / "there").items()
    }
    folder = rewritten(tmp_path / "there", found, tmp_path / "in")
    after = came_out(folder, tmp_path / "out")
    family = PretrainedFolder(folder).reading.family
    assert after.keys() == {respelled(name, family) for name in found}
    for name, tensor in found.items():
        assert raw(after[respelled(name, family)]) == raw(tensor), name


# --- files ----------------------------------------------------------------------------------------


def test_a_shard_that_is_not_there_is_called_an_interrupted_download(mixtral, tmp_path):
    folder = copy(mixtral, tmp_path / "copy")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(PretrainedError, match=rf"names {shard.name}, which is not there: an inter"):
        describe(folder)


def test_a_shard_that_is_cut_off_is_called_an_interrupted_download(mixtral, tmp_path):
    folder = copy(mixtral, tmp_path / "copy")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(PretrainedError, match=r"bytes, and its header means .*: an interrupted"):
        describe(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_none_of_theirs_is_named(mixtral, tmp_path, damage):
    folder = copy(mixtral, tmp_path / "copy")
    sorted(folder.glob("*.safetensors"))[0].write_bytes(damage)
    with pytest.raises(PretrainedError, match="is no safetensors file: an interrupted download"):
        describe(folder)


def test_what_git_leaves_in_the_place_of_a_large_file_is_told(mixtral, tmp_path):
    folder = copy(mixtral, tmp_path / "copy")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    sorted(folder.glob("*.safetensors"))[0].write_bytes(pointer)
    with pytest.raises(PretrainedError, match=rf"run git lfs pull in {folder}$"):
        describe(folder)


def test_a_name_of_the_hub_is_told_how_to_become_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PretrainedError, match="here: hf download allenai/OLMoE-1B --local-dir DIR"):
        describe(Path("allenai/OLMoE-1B"))
    (tmp_path / "models").mkdir()
    for folder in (Path("models/a"), tmp_path / "a", Path("a")):
        with pytest.raises(PretrainedError, match=rf"^{folder}/config.json does not exist; give a"):
            describe(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [(b'{"a": 1,\n"b"', " at line 2"), (b"", " at line 1"), (b"\xff\xff", ""), (b"[" * 9999, "")],
)
def test_a_config_that_was_cut_off_is_told_in_words_of_ours(mixtral, tmp_path, text, told):
    folder = copy(mixtral, tmp_path / "copy")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(PretrainedError, match=rf"config.json is no JSON{told}: an interrupted"):
        describe(folder)


def test_names_are_held_against_config_json_in_both_directions(mixtral, tmp_path):
    found = tensors(mixtral)
    key = next(name for name in found if "experts.3.w1" in name)
    short = {name: tensor for name, tensor in found.items() if name != key}
    with pytest.raises(PretrainedError, match=rf"{key} of shape \[48, 32\] is missing"):
        describe(rewritten(mixtral, short, tmp_path / "short"))

    with pytest.raises(PretrainedError, match=r"model.layers.0.extra.weight is no part of what"):
        extra = found | {"model.layers.0.extra.weight": torch.zeros(2)}
        describe(rewritten(mixtral, extra, tmp_path / "extra"))

    with pytest.raises(PretrainedError, match=rf"{key} has shape \[47, 32\], where config.json"):
        describe(rewritten(mixtral, found | {key: found[key][:-1].clone()}, tmp_path / "other"))


def test_an_index_may_not_lead_out_of_its_folder(mixtral, tmp_path):
    folder = copy(mixtral, tmp_path / "copy")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(PretrainedError, match="no weight_map of tensors to files beside it"):
        describe(folder)


def test_a_head_beside_a_tied_embedding_must_be_equal_to_it(tmp_path):
    case = "llama tied, biased, wide heads"
    saved(case, tmp_path / "there")
    found = tensors(tmp_path / "there")
    same = found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}
    ours(PretrainedFolder(rewritten(tmp_path / "there", same, tmp_path / "same")))

    other = same | {"lm_head.weight": same["lm_head.weight"] + 1}
    with pytest.raises(PretrainedError, match=r"tie_word_embeddings, but lm_head.weight differs"):
        ours(PretrainedFolder(rewritten(tmp_path / "there", other, tmp_path / "other")))


def test_tables_and_layers_of_further_tokens_may_lie_beside_the_weights(tmp_path):
    case = "deepseek_v3, moonlight"
    saved(case, tmp_path / "there")
    config = json.loads((tmp_path / "there/config.json").read_text())
    (tmp_path / "there/config.json").write_text(json.dumps(config | {"num_mtp_layers": 1}))
    beside = {
        "model.layers.2.enorm.weight": torch.ones(32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    found = tensors(tmp_path / "there") | beside
    describe(rewritten(tmp_path / "there", found, tmp_path / "with"))


def test_a_selection_bias_keeps_its_digits_among_bf16_weights(tmp_path):
    """Near 7, as in DeepSeek-V3, bf16 has steps of 1/32: biases that differ would be equal."""
    saved("dots1", tmp_path / "there", torch.bfloat16)
    bias = 7 + torch.linspace(0, 0.01, 8)
    found = tensors(tmp_path / "there")
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    source = PretrainedFolder(rewritten(tmp_path / "there", found | {key: bias}, tmp_path / "with"))
    model = ours(source)
    read_back = dict(model.named_buffers())["blocks.1.mlp.router.balance_bias"]
    assert torch.equal(read_back, bias)
    assert len(bias.bfloat16().unique()) == 1


def test_fp8_weights_are_the_numbers_that_they_stand_for(tmp_path):
    """Blocks of 16 x 12 over matrices whose sides they do not divide."""
    case, block = "deepseek_v3, kimi_k2", (16, 12)
    model = saved(case, tmp_path / "there")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(tmp_path / "there").items():
        if tensor.ndim != 2 or "proj" not in name:
            stored[name] = plain[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        scales, small = torch.empty(rows, columns), torch.empty_like(tensor)
        for i in range(rows):
            for j in range(columns):
                place = (slice(i * 16, i * 16 + 16), slice(j * 12, j * 12 + 12))
                scales[i, j] = tensor[place].abs().max() / 448
                small[place] = tensor[place] / scales[i, j]
        stored[name] = small.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        numbers = stored[name].float()
        for i in range(rows):
            for j in range(columns):
                numbers[i * 16 : i * 16 + 16, j * 12 : j * 12 + 12] *= scales[i, j]
        plain[name] = numbers

    config = json.loads((tmp_path / "there/config.json").read_text())
    fp8 = rewritten(tmp_path / "there", stored, tmp_path / "fp8")
    quantised = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}
    (fp8 / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = ours(PretrainedFolder(rewritten(tmp_path / "there", plain, tmp_path / "plain")))
    assert torch.equal(ours(PretrainedFolder(fp8)).logits(tokens), expected.logits(tokens))
    assert not torch.equal(expected.logits(tokens), model(input_ids=tokens).logits)
    for name, tensor in came_out(fp8, tmp_path / "out").items():
        dtype = torch.float32 if "correction_bias" in name else torch.bfloat16
        assert raw(tensor) == raw(plain[name].to(dtype)), name

    lost = next(name for name in stored if name.endswith("_scale_inv"))
    del stored[lost]
    without = rewritten(tmp_path / "there", stored, tmp_path / "without")
    shutil.copyfile(fp8 / "config.json", without / "config.json")
    with pytest.raises(PretrainedError, match=f"{lost} is missing"):
        describe(without)


def test_weights_of_deepseek_v4_are_the_numbers_that_transformers_makes_of_them(tmp_path):
    """As the Hub has them: fp8 in blocks with scales that are powers of two, experts in pairs of
    4-bit floats.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    case, block = V4, (8, 16)
    with mock.patch.dict(CASES[case][1], {"intermediate_size": 32, "moe_intermediate_size": 32}):
        saved(case, tmp_path / "there")
    theirs_of = Fp8Dequantize.__new__(Fp8Dequantize)
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}

    def scales_of(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-9, -3, shape, generator=generator).float()
        return exponents.exp2().to(torch.float8_e8m0fnu)

    for name, tensor in tensors(tmp_path / "there").items():
        base, (rows, *columns) = name.removesuffix(".weight"), tensor.shape
        if ".ffn.experts." in name:
            pairs = torch.randint(-128, 128, (rows, columns[0] // 2), generator=generator)
            stored[name] = pairs.to(torch.int8)
            stored[f"{base}.scale"] = scales_of(rows, columns[0] // 32)
        elif ".wq_a." in name or ".wo_b." in name:
            stored[name] = (100 * tensor).to(torch.float8_e4m3fn)
            stored[f"{base}.scale"] = scales_of(rows // block[0], columns[0] // block[1])
        else:
            stored[name] = plain[name] = tensor
            continue
        scales = stored[f"{base}.scale"]
        plain[name] = theirs_of._dequantize_one(stored[name], scales, torch.float32)

    config = json.loads((tmp_path / "there/config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": "ue8m0"}
    hub = rewritten(tmp_path / "there", stored, tmp_path / "hub")
    asked = config | {"quantization_config": quantised, "expert_dtype": "fp4"}
    (hub / "config.json").write_text(json.dumps(asked))
    found = ours(PretrainedFolder(hub))
    expected = ours(PretrainedFolder(rewritten(tmp_path / "there", plain, tmp_path / "plain")))
    for (name, value), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name

    lost = next(name for name in stored if ".experts." in name and name.endswith(".scale"))
    del stored[lost]
    without = rewritten(tmp_path / "there", stored, tmp_path / "without")
    shutil.copyfile(hub / "config.json", without / "config.json")
    with pytest.raises(PretrainedError, match=r"needs scales of F8_E8M0, one for each 16"):
        describe(without)


def test_mxfp4_stacks_are_the_numbers_that_transformers_makes_of_them(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    with mock.patch.dict(SHAPE, {"intermediate_size": 64}):  # of blocks of 32
        saved("gpt_oss", tmp_path / "there")
    generator = torch.Generator().manual_seed(0)
    stored, plain = {}, {}
    for name, tensor in tensors(tmp_path / "there").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, into, out = tensor.shape
        size = (experts, out, -(-into // 32))
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, size, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        plain[name] = numbers if numbers.shape == tensor.shape else numbers.transpose(1, 2)
        plain[name] = plain[name].contiguous()
    config = json.loads((tmp_path / "there/config.json").read_text())
    mxfp4 = rewritten(tmp_path / "there", stored, tmp_path / "mxfp4")
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    (mxfp4 / "config.json").write_text(json.dumps(config | quantised))
    reader = describe(mxfp4).shards
    for name, tensor in plain.items():
        assert torch.equal(reader.tensor(name).float(), tensor.float()), name
        if tensor.ndim == 3:
            assert torch.equal(reader.tensor(name, 3), tensor[3])
    for name, tensor in came_out(mxfp4, tmp_path / "out").items():
        assert raw(tensor) == raw(plain[name].to(torch.bfloat16)), name

    del stored["model.layers.1.mlp.experts.down_proj_scales"]
    lost = rewritten(tmp_path / "there", stored, tmp_path / "lost")
    (lost / "config.json").write_text(json.dumps(config | quantised))
    with pytest.raises(PretrainedError, match="are no MXFP4 weight"):
        describe(lost)


@pytest.mark.parametrize("case", ["deepseek_v3, kimi_k2", "glm4_moe"])
def test_layers_of_further_tokens_are_read_and_written_where_the_model_has_them(case, tmp_path):
    """The layer on disk is one of the model's own, under the number after the last one; so what a
    module reads must be what that layer gave to the block.
    """
    saved(case, tmp_path / "there")
    found = tensors(tmp_path / "there")
    last = {name: value for name, value in found.items() if name.startswith("model.layers.1.")}
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    own = {
        "enorm.weight": drawn(32),
        "hnorm.weight": drawn(32),
        "eh_proj.weight": drawn(32, 64),
        "shared_head.norm.weight": drawn(32),
    }
    further = {name.replace("layers.1.", "layers.2."): value + 1 for name, value in last.items()}
    further |= {f"model.layers.2.{name}": value for name, value in own.items()}
    folder = rewritten(tmp_path / "there", found | further, tmp_path / "with")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))

    model = ours(PretrainedFolder(folder), num_mtp_layers=1)
    for ending, name in {
        "enorm.weight": "embedding_norm.weight",
        "hnorm.weight": "hidden_norm.weight",
        "eh_proj.weight": "projection.weight",
        "shared_head.norm.weight": "norm.weight",
    }.items():
        assert torch.equal(model.get_parameter(f"mtp.0.{name}"), own[ending])
    for name, value in model.blocks[1].named_parameters():
        assert torch.equal(model.get_parameter(f"mtp.0.block.{name}"), value + 1), name
    bias = "mlp.router.balance_bias"
    assert torch.equal(
        model.get_buffer(f"mtp.0.block.{bias}"), model.get_buffer(f"blocks.1.{bias}") + 1
    )

    # Out again, with the copies of embedding and head that files of the family have.
    reading = PretrainedFolder(folder).reading
    shape, router = reading.model | {"num_mtp_layers": 1}, reading.router
    config, again = express(shape, router, reading.attention)
    assert config["num_nextn_predict_layers"] == again.num_further_layers == 1
    (tmp_path / "out").mkdir()
    files = _write_weights(again, OfModel(model), tmp_path / "out", "fp32", 10**9)
    written = load_file(tmp_path / "out" / files[0])
    for name, value in (found | further).items():
        assert torch.equal(written.pop(name), value), name
    for ending, original in {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "shared_head.head.weight": "lm_head.weight",
    }.items():
        assert torch.equal(written.pop(f"model.layers.2.{ending}"), found[original])
    assert not written

    del further["model.layers.2.hnorm.weight"]
    without = rewritten(tmp_path / "there", found | further, tmp_path / "without")
    shutil.copyfile(folder / "config.json", without / "config.json")
    with pytest.raises(PretrainedError, match=r"model.layers.2.hnorm.weight has shape None"):
        ours(PretrainedFolder(without), num_mtp_layers=1)


def test_shards_are_written_whole_in_their_order_and_found_again(tmp_path):
    numbers = torch.arange(48, dtype=torch.float32)
    found = {"a": numbers[:32].view(4, 8), "b": numbers[32:40], "c": numbers[40:].view(2, 2, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}
    asked = []

    def give(name: str) -> torch.Tensor:
        asked.append(name)
        return found[name]

    files = write_shards(tmp_path, shapes, dtypes, 100, give)
    assert asked == ["a", "b", "c"] and len(files) == 3  # a is too large for company
    reader = ShardedReader(tmp_path)
    for name, tensor in found.items():
        assert torch.equal(reader.tensor(name), tensor.to(dtypes[name]))
        assert torch.equal(load_file(tmp_path / reader._file_of[name])[name], reader.tensor(name))


def test_the_token_that_ends_a_text_is_found_where_any_file_says(tmp_path):
    assert end_of_text(tmp_path) is None
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 4]}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 3, "content": "<end>"}]}')
    assert end_of_text(tmp_path) == "<end>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<im_end>"}}')
    assert end_of_text(tmp_path) == "<im_end>"
