"""Adapters as folders, of every family, held against peft: what it loads onto transformers' model
gives the logits of our model with the adapters added.
"""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
import transformers

from launch.saved.run import load_folder
from model.lora import is_adapter
from tests.published import published
from train.components import build_model
from train.config.lora import LoraConfig
from train.config.training import InitConfig
from train.files.strict_json import dumps
from train.pretrained.adapter import CONFIG, WEIGHTS, plan_adapter
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import write_shards

LORA = LoraConfig(
    rank=2, alpha=6.0, targets=("attention", "experts", "shared_experts", "mlp"), expert_rank=3
)
CASES = {
    "llama": (),
    "mixtral": (),
    "qwen2_moe": (),
    "qwen3_moe": (),
    "deepseek_v3, kimi_k2": (),
    "gpt_oss": ("shared_experts", "mlp"),
    "granitemoe": ("shared_experts", "mlp"),
    "glm4_moe": (),
    "minimax_m2": ("shared_experts", "mlp"),
    "dots1": (),
    "olmoe": (),
}
"""Family -> targets that it has not."""


class Held:
    """What a CheckpointReader gives, out of a model."""

    def __init__(self, model: torch.nn.Module):
        self.tensors = {}
        for name, parameter in model.named_parameters():
            if is_adapter(name) and ".experts." in name:
                for expert, value in enumerate(parameter.detach()):
                    self.tensors[f"{name}.{expert}/fp32"] = value
            else:
                self.tensors[f"{name}/fp32"] = parameter.detach()
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}

    def read(self, want: dict[str, torch.Tensor]) -> None:
        for key, tensor in want.items():
            tensor.copy_(self.tensors[key])


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_run_computes(case, tmp_path):
    """Complaint (vllm 41384): adapters of stacked experts that are silently dropped."""
    published(case, tmp_path / "base", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    run = load_folder(str(tmp_path / "base"))
    dense = not run.model.num_experts
    missing = {*CASES[case], *(("experts", "shared_experts") if dense else ())}
    if not dense and not run.model.num_dense_layers:
        missing.add("mlp")
    if not run.model.num_shared_experts:
        missing.add("shared_experts")
    targets = tuple(target for target in LORA.targets if target not in missing)
    lora = dataclasses.replace(LORA, targets=targets, expert_rank=None if dense else 3)
    init = InitConfig(path=str(tmp_path / "base"))
    run = dataclasses.replace(run, lora=lora, init=init)

    folder = PretrainedFolder(tmp_path / "base")
    model = build_model(run).eval()
    folder.fill_model(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.2 * torch.randn_like(parameter))

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    plan, reader = plan_adapter(run, folder.reading), Held(model)
    dtypes = dict.fromkeys(plan.shapes, torch.float32)
    (file,) = write_shards(
        adapter, plan.shapes, dtypes, 2**40, lambda name: plan.read(reader, name)
    )
    (adapter / file).rename(adapter / WEIGHTS)
    (adapter / CONFIG).write_text(dumps(plan.config))

    ids = torch.randint(0, 96, (2, 24))
    with torch.no_grad():
        plain = theirs(input_ids=ids).logits
        with_adapter = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        found, expected = with_adapter(input_ids=ids).logits, model.logits(ids)
    assert float((found - plain).abs().max()) > 0.1
    assert float((found - expected).abs().max()) < 2e-5
    adapters = [p for name, p in with_adapter.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in adapters) == sum(
        torch.Size(shape).numel() for shape in plan.shapes.values()
    )
