"""What a rank sets up for itself before anything is built."""

from __future__ import annotations

import torch

from train.rank.runtime import seed_everything


def test_products_in_bf16_add_up_in_fp32_on_a_gpu():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        seed_everything(0, 0, deterministic=False)
        assert matmul.allow_bf16_reduced_precision_reduction is False
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
