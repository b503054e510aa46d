"""Drawing tokens on the device, each request by its own seed: a draw is a hash of (seed, number of
the token), so it is the same in any batch and after any interruption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer.config import SamplingConfig
from ops.sparse_attention.noise import mix

_MASK = 0xFFFFFFFF


def uniform(seeds: Tensor, numbers: Tensor) -> Tensor:
    """[R] int64 seeds and numbers of draws -> [R] fp64 in (0, 1), 52 random bits each."""

    def bits(salt: int) -> Tensor:
        hashed = mix(mix(torch.full_like(seeds, salt) ^ (seeds & _MASK)) ^ (seeds >> 32 & _MASK))
        return mix(mix(hashed ^ (numbers & _MASK)) ^ (numbers >> 32 & _MASK))

    high, low = bits(0x9E3779B9) >> 6, bits(0x85EBCA6B) >> 6
    return (high.double() * 2.0**26 + low.double() + 0.5) * 2.0**-52


def sample(
    logits: Tensor, settings: list[SamplingConfig], numbers: list[int]
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: [R, vocab_size]. settings: of the R requests. numbers: tokens that each has already.

    Returns:
        (tokens [R] int64, -1 where a row of logits is not finite; log-probabilities [R] fp32 of
        them under the model, that is before temperature, top_p and top_k). Ties of the most likely
        token fall to the lowest id.
    """
    logits = logits.float()
    device, vocab_size = logits.device, logits.shape[1]
    best = logits.amax(-1, keepdim=True)
    ids = torch.arange(vocab_size, device=device)
    tokens = torch.where(logits == best, ids, vocab_size).amin(-1).clamp_max(vocab_size - 1)

    # Rows by what they need: sorting a vocabulary costs more than the rest, and a row must be drawn
    # the same way whatever the rows beside it need.
    warm = [i for i, s in enumerate(settings) if s.temperature > 0]
    cut = [i for i in warm if settings[i].top_p < 1 or _limit(settings[i], vocab_size) < vocab_size]
    whole = [i for i in warm if i not in set(cut)]
    for rows in (cut, whole):
        if not rows:
            continue
        at = torch.tensor(rows, device=device)
        chosen = [settings[i] for i in rows]
        temperature = torch.tensor([s.temperature for s in chosen], device=device).unsqueeze(1)
        probabilities = (logits[at] / temperature).softmax(-1).double()
        order = None
        if rows is cut:
            top_p = torch.tensor([s.top_p for s in chosen], dtype=torch.float64, device=device)
            top_k = torch.tensor([_limit(s, vocab_size) for s in chosen], device=device)
            probabilities, order = probabilities.sort(descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            kept = (before < top_p.unsqueeze(1)) & (ids < top_k.unsqueeze(1))
            kept[:, 0] = True
            probabilities = probabilities.masked_fill(~kept, 0.0)

        draw = uniform(
            torch.tensor([s.seed for s in chosen], device=device),
            torch.tensor([numbers[i] for i in rows], device=device),
        )
        mass = probabilities.cumsum(-1)
        place = torch.searchsorted(mass, (draw * mass[:, -1]).unsqueeze(1), right=True)
        # Rounding may leave the last place beyond what has mass.
        last = (probabilities > 0).long().mul(ids).amax(-1, keepdim=True)
        place = place.minimum(last)
        tokens[at] = (place if order is None else order.gather(1, place)).squeeze(1)

    log_probabilities = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
    finite = logits.isfinite().all(-1)
    return torch.where(finite, tokens, -1), log_probabilities


def _limit(settings: SamplingConfig, vocab_size: int) -> int:
    return vocab_size if settings.top_k is None else min(settings.top_k, vocab_size)
