"""Weights of published families through real files: what transformers writes is read, and the
logits and all gradients are transformers' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from model.families.family import FAMILIES, Family
from model.families.names import on_disk, parts_of, respelled
from model.generate import generate
from model.transformer import Transformer
from tests.published import CASES, ours, saved, theirs
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import ShardedReader

BUFFERS = ("correction_bias", ".gate.bias", "tid2eid")
"""Endings of names of what no gradient moves."""


def gradients_by_disk(source: PretrainedFolder, model: Transformer) -> dict[str, torch.Tensor]:
    """Ours, under the names and in the shapes of the files."""
    parts = parts_of(source.reading)
    found: dict[str, torch.Tensor] = {
        name: torch.zeros(shape) for name, shape in on_disk(parts).items()
    }
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None and ".indexer." in name:  # it learns from a loss of its own
            parameter.grad = torch.zeros_like(parameter)
        assert parameter.grad is not None, name
        if ".experts." in name:
            gradients |= {f"{name}.{e}": row for e, row in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    for key, several in parts.items():
        if key.startswith("buffer/"):
            continue
        rows = gradients[key].split([part.shape[0] for part in several])
        for part, value in zip(several, rows, strict=True):
            there = found[part.name] if part.index is None else found[part.name][part.index]
            there = there.view(-1) if part.columns is not None else there
            order = list(range(len(value))) if part.order is None else list(part.order)
            (there.T if part.is_transposed else there)[order] = value
    return found


def gradients_on_disk(model: Any, folder: Path, family: Family) -> dict[str, torch.Tensor]:
    """Theirs, by writing gradients as weights: transformers renames and splits them itself."""
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data.copy_(grad)
    model.save_pretrained(folder)
    reader = ShardedReader(folder)
    reader.respell(lambda name: respelled(name, family))
    return {name: reader.tensor(name) for name in reader.shapes}


@torch.no_grad()
def likeliest_text(model: Any, prompt: list[int], number: int) -> list[int]:
    """Theirs, token by token and without a cache."""
    ids = list(prompt)
    for _ in range(number):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case, tmp_path):
    model = saved(case, tmp_path / "there")
    source = PretrainedFolder(tmp_path / "there")
    own = ours(source)

    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens).logits
    logits = own.logits(tokens)
    assert (logits - expected).abs().max() < 5e-6 * max(1.0, float(expected.abs().max()))

    # Greedy text, ours with a cache: 12 tokens, which reach beyond the windows of gpt-oss.
    prompt = tokens[0, :6].tolist()
    assert list(generate(own, prompt, 12, temperature=0)) == likeliest_text(model, prompt, 12)

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    wanted = gradients_on_disk(model, tmp_path / "gradients", source.reading.family)
    found = gradients_by_disk(source, own)
    buffers = {name for name in wanted if name.endswith(BUFFERS)}
    assert wanted.keys() - found.keys() <= buffers, (
        "a tensor of theirs that nothing of ours stands for"
    )
    for name, gradient in wanted.items():
        if name in found and name not in buffers:
            scale = max(1.0, float(gradient.abs().max()))
            assert (found[name] - gradient).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "dots1", "gpt_oss"])
def test_one_expert_instead_of_several_is_transformers_with_num_experts_per_tok_1(case, tmp_path):
    """Gates over their sum, raw ones, groups with a scaling factor, and a bias of the logits."""
    model = saved(case, tmp_path / "there")
    with mock.patch.dict(CASES[case][1], {"num_experts_per_tok": 1}):
        fewer = theirs(case)
    fewer.load_state_dict(model.state_dict())
    source = PretrainedFolder(tmp_path / "there")
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, full = fewer(input_ids=tokens).logits, model(input_ids=tokens).logits
        found = ours(source, top_k=1).logits(tokens)
    assert (found - expected).abs().max() < 5e-6 * max(1.0, float(expected.abs().max()))
    assert (found - full).abs().max() > 1e-2


def test_every_family_of_the_table_is_tried():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)
