"""The Triton kernels of sparse attention in Triton's interpreter against
ops/sparse_attention/reference.py.

Cases: tests/ops/interpreter/attention_cases.py.
"""

from __future__ import annotations

import pytest
import torch

from ops.compile.launch import without_tma
from ops.sparse_attention import SparseAttentionSpec
from tests.pairwise import some_daily

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["attend/4", "attend"]))
def test_attention_and_every_gradient_match_the_definition(interpret, cases) -> None:
    interpret("attention_cases.py", cases)


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["half/4", "half"]))
def test_attention_matches_the_definition_in_half_precision(interpret, cases) -> None:
    interpret("attention_cases.py", cases)


@pytest.mark.slow
def test_pooling_and_ranking_match_the_definition(interpret) -> None:
    interpret("attention_cases.py", "pool", "rank", "ties")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["weigh/3", "weigh"]))
def test_learned_entries_and_their_gradients_match_the_formula(interpret, cases) -> None:
    interpret("attention_cases.py", cases, "learned")


@pytest.mark.slow
def test_sets_of_queries_add_up_to_the_whole(interpret) -> None:
    interpret("attention_cases.py", "queries")


@pytest.mark.slow
def test_decoding_matches_the_last_token_of_the_definition(interpret) -> None:
    interpret("attention_cases.py", "decode")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["tma/3", "tma"]))
def test_tiles_loaded_by_tma_give_the_bits_that_pointers_give(interpret, cases) -> None:
    interpret("attention_cases.py", cases)


@pytest.mark.parametrize(
    ("target", "matrix", "said"),
    [
        (90, torch.zeros(5, 64, dtype=torch.bfloat16), None),
        (100, torch.zeros(2, 5, 4), None),
        (80, torch.zeros(5, 64), "sm_80 has no tensor memory accelerator"),
        (89, torch.zeros(5, 64), "sm_89 has no tensor memory accelerator"),
        (90, torch.zeros(0, 64), "a matrix has no values"),
        (90, torch.zeros(5, 20, dtype=torch.bfloat16), "rows of 40 bytes are no multiple of 16"),
        (90, torch.zeros(81)[1:].view(5, 16), "a matrix begins 4 bytes behind a multiple of 16"),
    ],
)
def test_what_tma_cannot_load_is_named(target, matrix, said) -> None:
    assert without_tma(target, torch.zeros(1, 8), matrix) == said


def test_tensors_that_tma_cannot_load_go_by_pointers(monkeypatch) -> None:
    """One rule decides it for the three kernels, which are never left without their tiles."""
    from ops.compile.ahead_of_time import sparse_attention_launches
    from ops.sparse_attention import triton_backend
    from ops.sparse_attention.kernels.configs import loading_by_tma

    def loads(architecture: int) -> dict[str, bool]:
        found = sparse_attention_launches(
            architecture, 8, 2, 64, SparseAttentionSpec(), decoding=False
        )
        return {
            x.kernel.__name__.removesuffix("_kernel"): x.options["TMA"]
            for x in found
            if "TMA" in x.options
        }

    kernels = ("attend", "query_grad", "key_grad")
    assert loads(90) == dict.fromkeys(kernels, False), "nobody asked for it"
    with loading_by_tma(True):
        assert loads(90) == dict.fromkeys(kernels, True)
        assert loads(80) == dict.fromkeys(kernels, False)
        monkeypatch.setattr(triton_backend, "without_tma", lambda *_: "rows are odd")
        assert loads(90) == dict.fromkeys(kernels, False)
    assert loads(90) == dict.fromkeys(kernels, False), "the switch did not go back"


def test_the_shim_is_needed(interpret) -> None:
    """The interpreter alone is silently wrong in bf16; once it is not,
    tests/ops/interpreter/shim.py can go.
    """
    assert float(interpret("raw_bf16.py")) > 1.0
    assert float(interpret("raw_bf16.py", "shim")) < 1e-4
