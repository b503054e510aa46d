"""Newton-Schulz: the nearest orthogonal matrix, by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Muon's quintic x -> a x + b x^3 + c x^5. They are the steepest at zero that stay bounded: five
steps bring singular values from 0.005 up into 0.7 .. 1.2, and further steps bring none to one.
"""
EPS = 1e-7
"""No norm is taken to be smaller: a matrix of zeros stays one."""


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Replace the singular values of every matrix by ones, about: U S V^T -> U f(S) V^T.

    Each matrix is divided by its Frobenius norm, and then `steps` times X <- a X + (b A + c A A) X
    with A = X X^T, from the side on which A is smaller. What one matrix becomes does not depend on
    the others.

    Args:
        matrices: [B, m, n], any floating dtype, in which all is computed (Muon's own is bf16).
        steps: of the iteration; 5 as published.

    Returns:
        [B, m, n] of the same dtype. Its singular values lie in 0.7 .. 1.2 where those of the
        matrix were above some 0.5% of its norm.

    Source: K. Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    # The quintic converges where no singular value is above one, and Frobenius bounds them all.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPS)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if is_tall else x
