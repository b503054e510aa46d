"""Routing by a table: which experts a token visits depends on its id in the vocabulary alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.routers.base import RoutingRequest, as_given
from model.routers.config import TopKConfig
from model.routers.top_k import TopKRouter
from ops.router import RouterOutput, route
from ops.sparse_attention.noise import token_hash, uniform

PIECE = 2**13
"""Words whose experts are drawn at a time."""


class HashedRouter(TopKRouter):
    """Each token visits the experts that a table names for its id (hash routing, arXiv 2106.04426;
    first layers of DeepSeek-V4). The weight gives their gates, as of top-k: scores of the chosen
    ones, over their sum where that is asked for.

    Nothing moves the choice, so nothing presses on it: no selection bias, no balance loss, no
    fallback, no capacity, no snapshot after a spike. Loads are counted as everywhere.

    Attributes:
        hash_table: [vocab_size, top_k] int32, experts that differ within a row; saved with the
            weights, equal on every rank. A new one is drawn by a hash of the word and of the
            layer's number: each word's experts are a draw without replacement, so that loads are
            even over words, and as uneven over tokens as words are.
    """

    is_balanced = False

    def __init__(self, config: ModelConfig, settings: TopKConfig, number: int):
        super().__init__(config, settings)
        self.hash_table: torch.Tensor
        table = hashed_experts(config.vocab_size, config.num_experts, settings.top_k, number)
        self.register_buffer("hash_table", table)

    def keep_snapshots(self) -> None:
        """There is no choice that a snapshot could make."""

    def forward(self, hidden: torch.Tensor, request: RoutingRequest | None = None) -> RouterOutput:
        """hidden [T, hidden_size] -> RouterOutput with top_k slots.

        Raises:
            ValueError: the request says neither which words the tokens are nor their experts.
        """
        request = request or RoutingRequest()
        if self.training and not torch.compiler.is_compiling():
            self.watch.look_at_gates(self)
        chosen = request.given_ids
        if chosen is None:
            if request.words is None:
                raise ValueError(
                    "router.hash_layers: this layer routes by token id, and got hidden states "
                    "alone; give RoutingRequest.words"
                )
            chosen = self.hash_table[request.words]

        logits = self._logits(hidden, self.weight)
        options: dict[str, Any] = {
            "token_mask": request.token_mask,
            "token_ids": request.token_ids,
            "num_segments": request.num_segments,
        }
        routing = route(logits, as_given(self.spec), given_ids=chosen, **options)
        # Of scores that choose nothing there is none, in the shape that other layers have.
        empty = routing.histogram.new_zeros((self.spec.num_experts, request.num_bins))
        routing = routing._replace(histogram=empty)
        return self._confined(routing, logits, self.spec, None, request, options)


def hashed_experts(vocab_size: int, num_experts: int, top_k: int, number: int) -> torch.Tensor:
    """[vocab_size, top_k] int32: of every word the experts with the largest of num_experts draws,
    which are hashes of the word, of layer `number` and of the expert; ties go to the lower id.
    """
    found = []
    experts = torch.arange(num_experts, device="cpu")
    for words in torch.arange(vocab_size, device="cpu").split(PIECE):
        draws = uniform(token_hash(number, words).unsqueeze(1), experts)
        ranked = draws.sort(dim=1, descending=True, stable=True).indices
        found.append(ranked[:, :top_k].to(torch.int32))
    return torch.cat(found)


def table_problems(table: torch.Tensor, num_experts: int) -> list[str]:
    """Whether rows of a table [V, K] name K different experts each, in words that follow its
    name.
    """
    lowest, highest = int(table.min()), int(table.max())
    if lowest < 0 or highest >= num_experts:
        return [f"names expert {lowest if lowest < 0 else highest} of {num_experts}"]
    ordered = table.sort(dim=1).values
    twice = F.pad(ordered[:, 1:] == ordered[:, :-1], (0, 1)).any(1)
    if twice.any():
        word = int(twice.nonzero()[0, 0])
        return [f"names an expert twice for token {word}: {table[word].tolist()}"]
    return []
