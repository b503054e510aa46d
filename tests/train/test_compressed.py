"""Exported folders of 8-bit floats, held against the published layout: dequantised by hand from the
raw files, and computed by transformers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.families.reading import FamilyError, read
from tests.published import CASES, SHAPE, OfModel, ours, saved, theirs
from train.pretrained.compressed import in_fp8, quantise
from train.pretrained.export import _write_weights
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import PretrainedError
from train.pretrained.verify import _theirs

LINEAR = re.compile(r"model\.layers\.\d+\..*(_proj|w[123])(_with_mqa)?\.weight")
"""Matrices of a layer that are linear layers in the models that files are made from."""


def exported(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """The weights before, and a folder of 8-bit floats of them."""
    saved(case, folder / "there")
    config = json.loads((folder / "there" / "config.json").read_text())
    source = PretrainedFolder(folder / "there")
    to = folder / "fp8"
    to.mkdir()
    # transformers writes none of the layers that predict further tokens, and ours has none
    reading = dataclasses.replace(source.reading, num_further_layers=0)
    names, quantised = in_fp8(reading)
    _write_weights(reading, OfModel(ours(source)), to, "fp8", 20_000, names)
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    before = {}
    for file in sorted((folder / "there").glob("*.safetensors")):
        before |= load_file(file)
    return before, to


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """By the layout of compressed-tensors alone: what config_groups and ignore say is stored as
    e4m3 with a scale for each row under NAME_scale, all else as it is.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "float-quantized"
    assert config["quantization_status"] == "compressed"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["output_activations"] is None
    weights, activations = group["weights"], group["input_activations"]
    assert (weights["num_bits"], weights["type"], weights["strategy"]) == (8, "float", "channel")
    assert (activations["strategy"], activations["dynamic"]) == ("token", True)
    assert weights["symmetric"] and not weights["dynamic"]

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    found = {}
    for name, value in stored.items():
        if name.endswith("_scale"):
            continue
        is_fp8 = (
            bool(LINEAR.fullmatch(name)) and name.removesuffix(".weight") not in config["ignore"]
        )
        assert (value.dtype == torch.float8_e4m3fn) == is_fp8, name
        if not is_fp8:
            assert value.dtype in (torch.bfloat16, torch.float32), name
            found[name] = value.float()
            continue
        scale = stored[f"{name}_scale"]
        assert scale.dtype == torch.bfloat16 and scale.shape == (len(value), 1)
        found[name] = value.float() * scale.float()
    assert sum(name.endswith("_scale") for name in stored) == sum(
        value.dtype == torch.float8_e4m3fn for value in stored.values()
    )
    return found


@pytest.mark.parametrize(
    "case",
    [
        "mixtral",
        "deepseek_v3, moonlight",
        pytest.param("qwen3_moe", marks=pytest.mark.nightly),
        pytest.param("llama 3.1", marks=pytest.mark.nightly),
    ],
)
def test_fp8_folders_hold_the_weights_as_the_published_layout_says(case, tmp_path):
    before, folder = exported(case, tmp_path)
    found = dequantised(folder)
    assert found.keys() == before.keys()
    num_fp8 = 0
    for name, value in found.items():
        error, was = (value - before[name]).abs(), before[name].abs()
        if LINEAR.fullmatch(name):
            # half a step of 3 mantissa bits, and below 2^-6 of a row's scale half a step there
            least = was.amax(1, keepdim=True) / 448 * 2**-9
            assert (error <= was / 16 + least).all(), name
            assert error.any(), name
            num_fp8 += value.numel()
        else:
            assert (error <= was / 256).all(), name
    # what Linear means to the library: every such module of transformers is in fp8 or named
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    for name, module in theirs(case).named_modules():
        if isinstance(module, torch.nn.Linear):
            assert name in ignored or LINEAR.fullmatch(f"{name}.weight"), name
    assert num_fp8 > 0.5 * sum(value.numel() for value in before.values())


@pytest.mark.parametrize(
    "case", ["mixtral", pytest.param("deepseek_v3, moonlight", marks=pytest.mark.nightly)]
)
def test_transformers_computes_what_we_read_from_a_folder_of_fp8(case, tmp_path):
    _, folder = exported(case, tmp_path)
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    source = PretrainedFolder(folder)
    assert any("fp8 weights become" in note for note in source.reading.notes)
    model = ours(source)
    by_hand = dequantised(folder)
    assert torch.equal(
        model.get_parameter("blocks.1.attention.o_proj.weight"),
        by_hand["model.layers.1.self_attn.o_proj.weight"],
    )
    with torch.no_grad():
        expected = _theirs(folder)(input_ids=tokens).logits
        torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "there"]


@pytest.mark.parametrize("case", ["granitemoe", "gpt_oss"])
def test_families_that_stack_their_experts_are_refused(case):
    kind, settings = CASES[case]
    import transformers

    config = transformers.AutoConfig.for_model(kind, **(SHAPE | settings)).to_dict()
    with pytest.raises(FamilyError, match=r"in one tensor .* give dtype=bf16"):
        in_fp8(read(config))


def test_a_row_of_zeros_of_tiny_or_of_huge_numbers_keeps_its_meaning():
    weight = torch.tensor([[0.0, 0.0], [1e-42, -3e-40], [3e38, -1e38], [1.0, -448.0]])
    small, scale = quantise(weight)
    found = small.float() * scale.float()
    assert torch.equal(found[0], weight[0]) and scale[0] == 1
    assert found.isfinite().all()
    torch.testing.assert_close(found[2:], weight[2:], rtol=1 / 16, atol=0)
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, float("nan")]]))


SCHEME: dict[str, Any] = in_fp8(
    read(
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        | {
            "vocab_size": 8,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 8,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
        }
    )
)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "pack-quantized"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"weights": {"strategy": "group", "group_size": 128}},
        {"weights": {"num_bits": 4}},
        {"input_activations": {"dynamic": False}},
        {"output_activations": {"num_bits": 8}},
    ],
    ids=str,
)
def test_what_compressed_tensors_may_say_besides_is_refused(change, tmp_path):
    quantised = json.loads(json.dumps(SCHEME))
    group = quantised["config_groups"]["group_0"]
    for key, value in change.items():
        if key in group:
            group[key] = (group[key] or {}) | value
        else:
            quantised[key] = value
    saved("mixtral", tmp_path / "there")
    path = tmp_path / "there" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(PretrainedError, match="stored quantised \\(compressed-tensors\\)"):
        PretrainedFolder(tmp_path / "there")
