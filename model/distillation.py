"""Learning from a teacher: how far what the model says of the next token is from what it says.

Per predicted token, at temperature T, with p the teacher's and q the model's probabilities of the
tokens (Hinton, Vinyals and Dean, arXiv 1503.02531):

    KL(p || q) = sum over tokens of p (log p - log q),    log p = log_softmax(teacher's logits / T)

A teacher whose words were written down is known by its K most likely tokens. What is left of it
stands in one bucket, all other tokens together, on both sides:

    KL = sum over the K of p (log p - log q)  +  r (log r - log s),    r = 1 - sum p, s = 1 - sum q

It is the divergence of two coarser distributions, so never above the whole one, and the same where
K is the whole vocabulary. Without the bucket, with p renormalised over the K, the model is taught
that nothing else exists.
"""

from __future__ import annotations

import torch

from model.loss import IGNORE_INDEX
from model.request import Taught


def divergence(
    logits: torch.Tensor,
    targets: torch.Tensor,
    taught: Taught,
    teacher_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL in nats summed over the predicted tokens, [] fp32, with a gradient to the logits alone,
    and [] int64, at how many of them the model's likeliest token is the teacher's.

    logits: [..., vocab_size] of the model; targets: [...] int64, IGNORE_INDEX where nothing is
        predicted. teacher_logits: [..., vocab_size] of a teacher that is known whole, else None.
    """
    known = (targets != IGNORE_INDEX).reshape(-1)
    logits = logits.reshape(-1, logits.shape[-1])
    if teacher_logits is not None:
        theirs = teacher_logits.detach().reshape(-1, logits.shape[-1])
        of_tokens = _whole(logits, theirs, taught.temperature)
        likeliest = theirs.argmax(-1)
    else:
        assert taught.ids is not None and taught.log_probs is not None
        ids = taught.ids.reshape(len(logits), -1)
        log_p = taught.log_probs.reshape(len(logits), -1)
        of_tokens = _with_bucket(logits, ids, log_p, taught.temperature)
        likeliest = ids[:, 0]
    agreed = ((logits.detach().argmax(-1) == likeliest) & known).sum()
    return torch.where(known, of_tokens, 0.0).sum(), agreed


def _whole(logits: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q = (_wide(logits) / temperature).log_softmax(-1)
    log_p = (_wide(theirs) / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _with_bucket(
    logits: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, temperature: float
) -> torch.Tensor:
    scaled = _wide(logits) / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    log_q = scaled.gather(-1, ids) - total
    if log_p.shape[-1] > ids.shape[-1]:
        # Of the others' logits, and not as log(1 - sum q), which has no digits left where the K
        # have nearly everything.
        others = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat((log_q, others - total), -1)
    # A token that the teacher rules out says nothing, and would say 0 times infinity.
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def likeliest(
    logits: torch.Tensor, num_ids: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a teacher: ids [..., K] int64, the likeliest first, and log-probabilities
    [..., K + 1] fp32, or [..., K] where K is the whole vocabulary, as Taught has them.

    logits: [..., vocab_size]; num_ids: K. Ties are broken for the lower id.
    """
    log_p = (_wide(logits) / temperature).log_softmax(-1)
    order = log_p.sort(dim=-1, descending=True, stable=True)
    ids, kept = order.indices[..., :num_ids], order.values[..., :num_ids]
    if num_ids == logits.shape[-1]:
        return ids, kept
    rest = order.values[..., num_ids:].logsumexp(-1, keepdim=True)
    return ids, torch.cat((kept, rest), -1)
