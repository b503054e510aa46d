"""Sampling text from a trained model, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.transformer import Transformer


def sample_token(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Draw from logits [vocab_size]; temperature 0 takes the most likely token (lowest id on ties).

    top_p keeps the smallest set of tokens whose probability reaches it (nucleus sampling, arXiv
    1904.09751).
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    probabilities = (logits / temperature).softmax(-1)
    ranked = probabilities.sort(descending=True, stable=True)
    mass_before = ranked.values.cumsum(0) - ranked.values
    kept = torch.where(mass_before < top_p, ranked.values, 0.0)
    kept[0] = ranked.values[0]
    return int(ranked.indices[torch.multinomial(kept, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens after the prompt; stops at `stop_token` or at the model's
    max_seq_len.

    Raises:
        ValueError: empty or over-long prompt, negative temperature, or top_p outside (0, 1].
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1]")
    max_len = model.config.max_seq_len
    if len(prompt) >= max_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; model.max_seq_len is {max_len}")
    model.eval()
    device = model.any_weight.device
    generator = torch.Generator().manual_seed(seed)
    budget = min(max_new_tokens, max_len - len(prompt))
    caches = model.new_caches(1, len(prompt) + budget)
    inputs = torch.tensor([prompt], device=device)
    for _ in range(budget):
        logits = model.logits(inputs, caches, last_only=True)[0, -1]
        token = sample_token(logits, temperature, top_p, generator)
        if token == stop_token:
            return
        yield token
        inputs = torch.tensor([[token]], device=device)
