"""Complete blocks of packed documents, for index keys that stand for one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def group_starts(bounds: Sequence[int], size: int) -> Tensor:
    """[M] int64, the first token of every complete block of `size` tokens, document after document;
    blocks start where documents do. bounds: where documents begin, and the end of the last one.
    """
    parts = [
        begin + size * torch.arange((end - begin) // size)
        for begin, end in itertools.pairwise(bounds)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def group_means(x: Tensor, starts: Tensor, size: int) -> Tensor:
    """x [T, w] -> [M, w] in its dtype: means over the blocks that begin at `starts`, in fp32
    (fp64).
    """
    tokens = starts.unsqueeze(1) + torch.arange(size, device=starts.device)
    real = torch.promote_types(x.dtype, torch.float32)
    return x[tokens].to(real).mean(1).to(x.dtype)
