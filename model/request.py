"""What goes into a forward pass: the tokens, and what is wanted of them besides their loss.

Both are NamedTuples, because ZeRO-3's hooks look for tensors in tuples but not in dataclasses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from model.parallel.deal import Deal


class Taught(NamedTuple):
    """What a teacher says of every token of a micro-batch. Either `hidden`, or `ids` and
    `log_probs`. A NamedTuple, as what it goes into a forward pass with.
    """

    temperature: float = 1.0
    """Of both distributions."""
    hidden: torch.Tensor | None = None
    """[B, S, teacher's D], what its head projects. Logits are made of it where the model's are: so
    few tokens' are in memory at a time as there are of the model's own.
    """
    weight: torch.Tensor | None = None
    """[vocab_size, teacher's D], its head; None: the head of the model that learns."""
    ids: torch.Tensor | None = None
    """[B, S, K] int64, its most likely tokens, the likeliest first."""
    log_probs: torch.Tensor | None = None
    """[B, S, K + 1] fp32, their log-probabilities and that of all others together, which sum up to
    probability 1; [B, S, K] where K is the whole vocabulary.
    """

    def chunks(self, size: int) -> list[Taught]:
        """Of so many tokens each, of all B * S."""
        parts = {
            name: value.flatten(0, 1).split(size)
            for name in ("hidden", "ids", "log_probs")
            if (value := getattr(self, name)) is not None
        }
        number = len(next(iter(parts.values())))
        return [self._replace(**{k: v[i] for k, v in parts.items()}) for i in range(number)]


class TokenBatch(NamedTuple):
    """Packed rows of one micro-batch on one rank, on the model's device: B rows of S tokens. Under
    context parallelism these are a part of longer rows.
    """

    input_ids: torch.Tensor
    """[B, S] int64."""
    targets: torch.Tensor
    """[B, S] int64, the token that follows each one; model.loss.IGNORE_INDEX where none is
    predicted.
    """
    positions: torch.Tensor
    """[B, S] int64, within the token's own document: they restart at 0 with each document."""
    cu_seqlens: torch.Tensor
    """[documents + 1] int32, cumulative lengths of the documents over the flattened tokens of whole
    rows.
    """
    max_seqlen: int
    """Tokens of the longest document."""
    token_mask: torch.Tensor | None = None
    """[B, S] bool, False for padding; None when nothing is padded."""
    token_ids: torch.Tensor | None = None
    """[B, S] int64 names of the tokens, for checksum, audit and random selection; None: none."""
    whole: TokenBatch | None = None
    """The rows that these tokens are a part of, for attention and the tokens ahead; None: these are
    whole.
    """
    first: int = 0
    """Place in its row of the first token here; of dealt rows, in the order of the deal."""
    deal: Deal | None = None
    """In which order tokens of whole rows are dealt out to ranks; None: in that of the rows."""
    taught: Taught | None = None
    """What a teacher says of the tokens here; None: nobody teaches."""

    @property
    def rows(self) -> TokenBatch:
        """The whole rows."""
        return self if self.whole is None else self.whole

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """[B, S'] of the tokens of whole rows -> [B, S] of the tokens here."""
        return run_of(whole, self.deal, self.first, self.input_ids.shape[1])


def part_of(whole: TokenBatch, first: int, length: int, deal: Deal | None = None) -> TokenBatch:
    """`length` tokens of each of the rows, from place `first` on, in the order of the deal."""
    return whole._replace(**fields_of_part(whole, first, length, deal))


def fields_of_part(whole: Any, first: int, length: int, deal: Deal | None = None) -> dict[str, Any]:
    """The fields in which a part of rows differs from them, of a TokenBatch or of its source on the
    host, train.data.loader.Batch: every [B, S] tensor is cut.
    """
    names = ("input_ids", "targets", "positions", "token_mask", "token_ids")
    found = {name: getattr(whole, name) for name in names}
    cut = {name: t if t is None else run_of(t, deal, first, length) for name, t in found.items()}
    return {**cut, "whole": whole, "first": first, "deal": deal}


def run_of(whole: torch.Tensor, deal: Deal | None, first: int, length: int) -> torch.Tensor:
    """Of [B, S'] those `length` of each row from place `first` on, in the order of the deal."""
    if deal is None:
        return whole[:, first : first + length]
    return whole.gather(1, deal.order[:, first : first + length])


class ForwardRequest(NamedTuple):
    """What a caller wants of a forward pass besides the sums of its losses."""

    previous_counts: torch.Tensor | None = None
    """[moe_layers, E] int64, ModelOutput.scope_counts of the step's earlier micro-batches, for
    balance.aux_loss_scope=global_batch.
    """
    given_ids: tuple[torch.Tensor, ...] | None = None
    """[B * S, K] for each MoE layer, experts to use instead of the routers' choice (replay)."""
    keep_routing: bool = False
    """Return every layer's routing, and in evaluation the tokens' losses as well."""
    with_histogram: bool | None = None
    """Count the routers' scores; None: in training only."""
    frozen: bool = False
    """Choose experts with the snapshots of the routers' weights."""
    snapshot: bool = False
    """Take snapshots of the routers' weights."""
    measure_attention: bool = False
    """Fill ModelOutput.attention_stats."""
    plain_k: int = 0
    """Route by plain top-k with so many experts a token, whatever the controllers say; 0: as they
    say.
    """
    keep_hidden: bool = False
    """Fill ModelOutput.hidden."""
    measure_logits: bool = False
    """Fill ModelOutput.largest_logits."""
    with_logit_z: bool = False
    """Fill ModelOutput.logit_z_sum."""


SUMS_ALONE = ForwardRequest()
"""The default: the sums of the losses, and nothing besides."""
