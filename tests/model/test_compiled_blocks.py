"""train.compile=blocks: one graph for each block, the numbers of eager blocks within rounding, the
same experts for every token, and eager blocks wherever a pass asks for more.
"""

from __future__ import annotations

import os

import pytest
import torch
from common import tiny_config

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig
from model.dispatch.config import AllToAllConfig
from model.moe.layer import ModelParts
from model.request import ForwardRequest, TokenBatch
from model.routers.config import RouterConfig, TopKConfig, TopPConfig
from model.transformer import Transformer
from ops.compile import cuda as kernels
from train.engine.compiled import compile_blocks
from train.timing.compiling import FirstSteps

CPU = torch.device("cpu")
KEPT = ForwardRequest(keep_routing=True)


def built(router: RouterConfig | None = None, **changes) -> Transformer:
    parts = ModelParts(
        router or TopKConfig(top_k=2), DenseAttentionConfig(), AllToAllConfig(), BalanceConfig()
    )
    return Transformer(tiny_config(**changes), parts, seed=3).train()


def rows(length: int = 16, documents: bool = True, seed: int = 0) -> TokenBatch:
    """Two rows; with documents, each of two of them and with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (2, length + 1), generator=generator)
    positions = torch.arange(length).repeat(2, 1)
    cut = 5
    if documents:
        positions[:, cut:] -= cut
    ends = [cut, length, length + cut, 2 * length] if documents else [length, 2 * length]
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -2:] = not documents
    return TokenBatch(
        input_ids=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        positions=positions,
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        max_seqlen=length - cut if documents else length,
        token_mask=mask if documents else None,
        token_ids=torch.arange(2 * length).view(2, length),
    )


def passed(model: Transformer, batch: TokenBatch, request: ForwardRequest = KEPT):
    """The output, and the gradient of every parameter."""
    out = model(batch, request)
    gradients = torch.autograd.grad(
        out.loss_sum + 0.01 * out.z_sum, list(model.parameters()), allow_unused=True
    )
    return out, gradients


def require_equal(model: Transformer, batches: list[TokenBatch], tolerance: float) -> None:
    compiled, model.compiled = model.compiled, {}
    expected = [passed(model, batch) for batch in batches]
    model.compiled = compiled
    for batch, (eager, eager_gradients) in zip(batches, expected, strict=True):
        found, gradients = passed(model, batch)
        torch.testing.assert_close(found.loss_sum, eager.loss_sum, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(found.routings, eager.routings, strict=True):
            assert torch.equal(ours.expert_ids, theirs.expert_ids)
        assert torch.equal(found.counts, eager.counts)
        for a, b in zip(gradients, eager_gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The compiler's code goes to a folder of the test's own."""
    torch.compiler.reset()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    yield tmp_path
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    torch.compiler.reset()


@pytest.mark.slow
def test_traced_blocks_are_eager_ones(caches, monkeypatch):
    """Forward and backward graphs as they are traced, one dense block and one of experts."""
    monkeypatch.setattr("train.engine.compiled.cache_folder", lambda: caches / "kernels")
    model = built(num_layers=2)
    compile_blocks(model, CPU, "aot_eager")
    require_equal(model, [rows(), rows(seed=1)], 1e-5)
    assert set(model.compiled) == {0, 1}
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(caches / "kernels" / "inductor")
    assert [n for n, _ in model.named_parameters() if "_orig_mod" in n] == []

    # Nothing that a step changes makes another graph.
    from torch._dynamo.utils import counters

    counters.clear()
    for step in (1, 7):
        model.set_step(step)
        passed(model, rows(seed=step))
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.nightly
def test_traced_blocks_of_tables_and_several_streams_are_eager_ones(caches, monkeypatch):
    monkeypatch.setattr("train.engine.compiled.cache_folder", lambda: caches / "kernels")
    router = TopKConfig(top_k=2, score_function="sqrt_softplus", hash_layers=1)
    model = built(router, num_residual_streams=3, sinkhorn_steps=3)
    compile_blocks(model, CPU, "aot_eager")
    require_equal(model, [rows(), rows(seed=1)], 1e-5)
    assert set(model.compiled) == {0, 1, 2}


def test_only_the_usual_passes_of_training_are_compiled(caches):
    model = built(num_layers=2)
    called: list[int] = []

    def counting(number: int):
        def call(*args):
            called.append(number)
            return model.blocks[number](*args)

        return call

    model.compiled = {0: counting(0), 1: counting(1)}
    model(rows())
    assert called == [0, 1]
    called.clear()
    given = torch.tensor([[0, 1]] * 32, dtype=torch.int32)
    for request in (
        ForwardRequest(plain_k=1),
        ForwardRequest(frozen=True),
        ForwardRequest(snapshot=True),
        ForwardRequest(measure_attention=True),
        ForwardRequest(measure_logits=True),
        ForwardRequest(given_ids=(given,)),
    ):
        model(rows(), request)
    model.eval()
    model(rows())
    model.logits(rows().input_ids)
    assert called == []


@pytest.mark.nightly
@pytest.mark.parametrize("router", [TopKConfig(top_k=2), TopPConfig(budget=2.0)])
def test_compiled_blocks_are_eager_ones_within_rounding(router, caches, monkeypatch):
    """By torch's C++ compiler; its code lies with our kernels."""
    monkeypatch.setattr("train.engine.compiled.cache_folder", lambda: caches / "kernels")
    model = built(router)
    compile_blocks(model, CPU)
    batches = [rows(), rows(seed=1), rows(documents=False), rows(seed=2)]
    require_equal(model, batches, 2e-5)
    assert any((caches / "kernels" / "inductor").rglob("*.so"))


def test_the_folder_of_compiled_code_must_be_ones_own(caches, monkeypatch):
    folder = caches / "kernels" / "inductor"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setattr("train.engine.compiled.cache_folder", lambda: caches / "kernels")
    with pytest.raises(kernels.BuildError, match="folder of your own"):
        compile_blocks(built(num_layers=1), CPU)


def test_what_compiling_took_is_said_once(caplog):
    watch = FirstSteps(3, prints=True)
    watch.seconds = [12.0, 0.5, 0.25]
    step = None
    with caplog.at_level("INFO", logger="loadstone"), watch.phase(step, "forward"):
        pass
    assert not caplog.records and len(watch.seconds) == 3
    for _ in range(2):
        with caplog.at_level("INFO", logger="loadstone"), watch.phase(step, "whole"):
            pass
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compile  3 blocks; the first step took 12.0 s with compiling them")
    assert len(watch.seconds) == 4
