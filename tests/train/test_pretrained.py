"""Weights of published families through real files: what transformers writes is read, and the
logits and all gradients are transformers' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.families.family import FAMILIES
from model.families.names import on_disk, parts_of
from model.transformer import Transformer
from tests.published import CASES, ours, saved
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import ShardedReader


def gradients_by_disk(source: PretrainedFolder, model: Transformer) -> dict[str, torch.Tensor]:
    """Ours, under the names and in the shapes of the files."""
    parts = parts_of(source.reading)
    found: dict[str, torch.Tensor] = {
        name: torch.zeros(shape) for name, shape in on_disk(parts).items()
    }
    gradients = {}
    for name, parameter in model.named_parameters():
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
            order = list(range(len(value))) if part.order is None else list(part.order)
            (there.T if part.is_transposed else there)[order] = value
    return found


def gradients_on_disk(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Theirs, by writing gradients as weights: transformers renames and splits them itself."""
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data.copy_(grad)
    model.save_pretrained(folder)
    reader = ShardedReader(folder)
    return {name: reader.tensor(name) for name in reader.shapes}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case, tmp_path):
    model = saved(case, tmp_path / "there")
    source = PretrainedFolder(tmp_path / "there")
    own = ours(source)

    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens).logits
    logits = own.logits(tokens)
    assert (logits - expected).abs().max() < 5e-6 * max(1.0, float(expected.abs().max()))

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    wanted = gradients_on_disk(model, tmp_path / "gradients")
    found = gradients_by_disk(source, own)
    assert wanted.keys() - found.keys() <= {name for name in wanted if "correction_bias" in name}, (
        "a tensor of theirs that nothing of ours stands for"
    )
    for name, gradient in wanted.items():
        if name in found and "correction_bias" not in name:
            scale = max(1.0, float(gradient.abs().max()))
            assert (found[name] - gradient).abs().max() < 1e-5 * scale, name


def test_every_family_of_the_table_is_tried():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)
