"""What learning from a teacher costs besides: FLOPs and memory. Imports no torch."""

from __future__ import annotations

from model.cost.parameters import count_parameters, flops_per_token
from train.config.objective import DistilConfig, SelfDistilConfig
from train.config.run import RunConfig

LOGIT_BYTES = 16
"""Per logit that backward keeps for the divergence: log-probabilities of model and teacher, the
teacher's probabilities, and the difference that these weigh; fp32 each.
"""


def taught_flops(run: RunConfig, teacher: RunConfig | None) -> float:
    """FLOPs per token besides those of the model at its own budget. teacher: of an online one."""
    settings, length = run.objective, run.train.seq_len
    head = 2 * run.model.hidden_size * run.model.vocab_size
    if isinstance(settings, SelfDistilConfig):
        # Forward and backward at the lower budgets in turn, and the full budget's logits anew.
        lower = [
            flops_per_token(run.model, float(k), length, run.attention.arguments)
            for k in settings.top_k
        ]
        return sum(lower) / len(lower) + head
    if teacher is None:
        return 0.0
    # Forward is a third of forward and backward.
    attention = teacher.attention.arguments
    return flops_per_token(teacher.model, teacher.experts_per_token, length, attention) / 3


def taught_bytes(run: RunConfig, teacher: RunConfig | None) -> int:
    """Bytes on a device besides: a teacher's weights with its share of the experts, and what the
    divergence keeps of the logits at hand.
    """
    if not isinstance(run.objective, DistilConfig | SelfDistilConfig):
        return 0
    tokens = run.train.micro_batch_size * -(-run.train.seq_len // run.parallel.parts_size)
    chunk = min(tokens, run.model.loss_chunk_size or tokens)
    found = chunk * run.model.vocab_size * LOGIT_BYTES
    if teacher is None:
        return found
    count = count_parameters(teacher.model, teacher.experts_per_token, teacher.attention.arguments)
    held = count.dense + -(-count.all_experts // run.parallel.expert_parallel_size)
    return found + held * (4 if run.train.precision == "fp32" else 2)
