"""Can a trained sparse attention find one token among many? Key-value recall with a single layer,
on a CPU.

`python -m bench.quality.recall [--variants drop order0 order2 dense] [--seeds 0 1 2] [--steps 1000]
[--output FILE.json]` trains each variant with each seed, prints one JSON line per evaluation and a
table of accuracies as Markdown. --models FOLDER keeps the trained models there and takes those it
holds.

The task: a context of pairs (key, value) in random order, every key once, and filler between them;
then questions, keys whose values must be named. Every question needs one token of 96, blocks hold 8
tokens, and a query sees 5 of the 16 blocks exactly: the first one, its own, the one before, and two
that it selects by pooled keys. Guessing gives 1/16. There are no positions: where a pair stands
says nothing, and longer contexts are nothing new. The other attentions of this project see as much
by their own rules (bench/quality/rules.py), those with an index after a fifth of their steps in
which it learns alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import find_commit
from bench.quality.rules import HEADS, KV_HEADS, RULES, Rule, RuleLayer
from bench.quality.sweep import interval
from ops.sparse_attention import SelectionNoise, SparseAttentionSpec, sparse_attention
from train.files.strict_json import dumps

NUM_KEYS, NUM_VALUES, NUM_QUESTIONS = 64, 16, 32
FILLER, QUESTION = NUM_KEYS, NUM_VALUES
"""The key of tokens that are no pair; the value of tokens that ask."""
LENGTH, BATCH_SIZE, PEAK_LR = 128, 24, 4e-3
NOISY_SHARE = 0.7
"""Of the steps: selection noise falls from temperature 1 to 0 over them."""


@dataclass(frozen=True)
class Variant:
    """spec: None is dense attention. noisy: Gumbel noise on the selection in training. gated:
    entries under learned weights (attention.entries=gated). rule: one of bench/quality/rules.py.
    """

    spec: SparseAttentionSpec | None
    noisy: bool = False
    gated: bool = False
    rule: Rule | None = None


SPEC = SparseAttentionSpec(
    block_size=8, top_k=2, window_size=8, num_sink_blocks=1, coarse_block_size=8
)
assert SPEC.num_local_blocks == 2
VARIANTS = {
    "dense": Variant(None),
    "drop": Variant(replace(SPEC, tail="drop", order=0)),
    "drop2": Variant(replace(SPEC, tail="drop")),
    "order0": Variant(replace(SPEC, order=0)),
    "order2": Variant(SPEC),
    "order2_unbounded": Variant(replace(SPEC, max_variance=1e4)),
    "order2_noise": Variant(SPEC, noisy=True),
    "order0_gated": Variant(replace(SPEC, order=0), gated=True),
    "order2_gated": Variant(SPEC, gated=True),
    "order2_sub2": Variant(replace(SPEC, coarse_block_size=4)),
    "order2_super": Variant(replace(SPEC, rank_lse="super", fanout=4)),
    **{name: Variant(None, rule=rule) for name, rule in RULES.items()},
}
LEARNING_SHARE = 0.2
"""Of the steps: those in which an index learns and does not choose yet."""


class Sample(NamedTuple):
    """tokens: [B, N, 2] keys and values. answers: [B, questions]. asked_at: [B, questions]
    positions of the pairs asked for. The questions are the last tokens.
    """

    tokens: Tensor
    answers: Tensor
    asked_at: Tensor


def draw(batch_size: int, length: int, generator: torch.Generator) -> Sample:
    context = length - NUM_QUESTIONS
    assert context >= NUM_KEYS, (length, NUM_QUESTIONS, NUM_KEYS)
    # of key 0, key 1, ...
    places = torch.rand(batch_size, context, generator=generator).argsort(1)[:, :NUM_KEYS]
    keys = torch.full((batch_size, context), FILLER).scatter_(
        1, places, torch.arange(NUM_KEYS).expand(batch_size, -1)
    )
    values = torch.randint(0, NUM_VALUES, (batch_size, context), generator=generator)
    asked = torch.rand(batch_size, NUM_KEYS, generator=generator).argsort(1)[:, :NUM_QUESTIONS]
    asked_at = places.gather(1, asked)
    # a key asks by a name of its own
    asks = torch.stack((asked + FILLER + 1, torch.full_like(asked, QUESTION)), -1)
    return Sample(
        torch.cat((torch.stack((keys, values), -1), asks), 1), values.gather(1, asked_at), asked_at
    )


class Layer(nn.Module):
    def __init__(self, variant: Variant, hidden_size: int = 64):
        super().__init__()
        self.spec, self.num_heads, self.num_kv_heads = variant.spec, HEADS, KV_HEADS
        self.head_dim = hidden_size // HEADS
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.learning, self.penalty = False, torch.zeros(())
        self.rule = None if variant.rule is None else RuleLayer(variant.rule, hidden_size)
        if self.rule is None:
            self.qkv = nn.Linear(hidden_size, (HEADS + 2 * KV_HEADS) * self.head_dim, bias=False)
            # as SparseAttention.entry_weights: from values to weights in an entry's key and value
            self.entry_weights = (
                nn.Parameter(torch.zeros(KV_HEADS, self.head_dim, 2 * self.head_dim))
                if variant.gated
                else None
            )
            self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )

    def forward(self, hidden: Tensor, noise: SelectionNoise | None, first_token_id: int) -> Tensor:
        normed = self.attention_norm(hidden)
        if self.rule is not None:
            attended, self.penalty = self.rule(normed, self.learning)
        else:
            attended = self._by_op(normed, noise, first_token_id)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden))

    def _by_op(self, normed: Tensor, noise: SelectionNoise | None, first_token_id: int) -> Tensor:
        batch_size, length, _ = normed.shape
        heads = self.qkv(normed).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        if self.spec is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        else:
            cu_seqlens = torch.arange(0, batch_size * length + 1, length)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            token_ids = (
                None if noise is None else first_token_id + torch.arange(batch_size * length)
            )
            pool_logits = None
            if self.entry_weights is not None:
                pool_logits = torch.einsum("thd,hde->the", v, self.entry_weights)
                pool_logits = pool_logits.unflatten(-1, (2, self.head_dim))
            attended = sparse_attention(
                q,
                k,
                v,
                cu_seqlens,
                self.spec,
                pool_logits=pool_logits,
                noise=noise,
                token_ids=token_ids,
            ).out
        found: Tensor = self.out(attended.reshape(batch_size, length, -1))
        return found


class RecallModel(nn.Module):
    def __init__(self, variant: Variant, num_layers: int = 1, hidden_size: int = 64):
        super().__init__()
        self.keys, self.values = (
            nn.Embedding(2 * NUM_KEYS + 1, hidden_size),
            nn.Embedding(NUM_VALUES + 1, hidden_size),
        )
        for table in (self.keys, self.values):
            nn.init.normal_(table.weight, std=0.3)
        self.layers = nn.ModuleList(Layer(variant, hidden_size) for _ in range(num_layers))
        self.norm, self.head = (
            nn.RMSNorm(hidden_size),
            nn.Linear(hidden_size, NUM_VALUES, bias=False),
        )

    def forward(self, tokens: Tensor, temperature: float = 0.0, first_token_id: int = 0) -> Tensor:
        """[B, N, 2] -> logits [B, questions, values]."""
        hidden = self.keys(tokens[..., 0]) + self.values(tokens[..., 1])
        for number, layer in enumerate(self.layers):
            noise = SelectionNoise(number, temperature) if temperature > 0 else None
            hidden = layer(hidden, noise, first_token_id)
        return self.head(self.norm(hidden[:, -NUM_QUESTIONS:]))


@torch.no_grad()
def is_right(model: RecallModel, sample: Sample) -> Tensor:
    """[B, questions]: was the answer the right one."""
    return model(sample.tokens).argmax(-1) == sample.answers


def train(
    variant: str,
    seed: int,
    steps: int,
    num_layers: int = 1,
    length: int = LENGTH,
    eval_interval: int = 250,
    eval_sequences: int = 128,
) -> Iterator[tuple[RecallModel, dict[str, Any]]]:
    """The model and an evaluation on fresh sequences, every eval_interval steps and at the end."""
    torch.manual_seed(seed)
    model = RecallModel(VARIANTS[variant], num_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    generator = torch.Generator().manual_seed(100 + seed)
    # the same for all
    held_out = draw(eval_sequences, length, torch.Generator().manual_seed(7))
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LR * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        sample = draw(BATCH_SIZE, length, generator)
        temperature = max(0.0, 1 - step / (NOISY_SHARE * steps)) if VARIANTS[variant].noisy else 0.0
        for layer in model.layers:
            layer.learning = step < LEARNING_SHARE * steps
        logits = model(
            sample.tokens, temperature, first_token_id=step * sample.tokens[..., 0].numel()
        )
        loss = F.cross_entropy(logits.flatten(0, 1), sample.answers.flatten())
        objective = loss + sum(layer.penalty for layer in model.layers)
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % eval_interval == 0 or step + 1 == steps:
            yield (
                model,
                {
                    "variant": variant,
                    "seed": seed,
                    "step": step + 1,
                    "loss": round(loss.item(), 4),
                    "accuracy": round(is_right(model, held_out).float().mean().item(), 4),
                    "seconds": round(time.perf_counter() - began, 1),
                },
            )


def trained(
    variant: str,
    seed: int,
    steps: int,
    folder: Path | None,
    num_layers: int = 1,
    length: int = LENGTH,
    eval_interval: int = 250,
) -> tuple[RecallModel, list[dict[str, Any]]]:
    """The trained model with its evaluations, from the folder where it holds them; prints the
    evaluations.
    """
    file = (
        None
        if folder is None
        else folder / f"{variant}-seed{seed}-{num_layers}x{length}-{steps}steps.pt"
    )
    if file is not None and file.is_file():
        saved = torch.load(file)
        model = RecallModel(VARIANTS[variant], num_layers)
        model.load_state_dict(saved["model"])
        return model, saved["evaluations"]
    evaluations = []
    for reached in train(variant, seed, steps, num_layers, length, eval_interval):
        model, found = reached
        evaluations.append(found)
        print(dumps(found), flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "evaluations": evaluations}, file)
    return model, evaluations


def steps_of(variant: str, arguments: argparse.Namespace) -> int:
    return arguments.dense_steps if variant == "dense" else arguments.steps


def add_arguments(parser: argparse.ArgumentParser, variants: list[str], seeds: list[int]) -> None:
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=variants)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--dense-steps", type=int, default=300, help="of dense attention, which needs fewer"
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument(
        "--models", type=Path, help="keep trained models here, and take those that are here"
    )
    parser.add_argument(
        "--baseline", choices=VARIANTS, help="a variant that the others are compared with by seed"
    )
    parser.add_argument("--output", type=Path, help="also write all numbers to this file")


def print_differences(accuracies: dict[tuple[str, int], float], baseline: str | None) -> None:
    """Accuracies by variant and seed, less those of a variant with the same seeds: means with
    intervals, where there are several seeds.
    """
    seeds = [seed for variant, seed in accuracies if variant == baseline]
    for variant in dict.fromkeys(variant for variant, _ in accuracies):
        if variant == baseline or baseline is None or len(seeds) < 2:
            continue
        mean, half = interval([accuracies[variant, s] - accuracies[baseline, s] for s in seeds])
        print(f"{variant} less {baseline}: {mean:+.4f} +- {half:.4f} (95%)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.recall")
    add_arguments(parser, ["drop", "order0", "order2", "dense"], [0, 1, 2])
    parser.add_argument("--eval-interval", type=int, default=250)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            rows += trained(
                variant,
                seed,
                steps_of(variant, arguments),
                arguments.models,
                arguments.layers,
                arguments.length,
                arguments.eval_interval,
            )[1]
    final = {(row["variant"], row["seed"]): row for row in rows}
    print("| variant | steps | accuracy, mean over seeds | by seed |\n|---|---|---|---|")
    for variant in arguments.variants:
        by_seed = [final[variant, seed]["accuracy"] for seed in arguments.seeds]
        print(
            f"| {variant} | {steps_of(variant, arguments)} | {statistics.mean(by_seed):.4f} | "
            f"{' '.join(f'{x:.4f}' for x in by_seed)} |"
        )
    accuracies = {key: row["accuracy"] for key, row in final.items()}
    print_differences(accuracies, arguments.baseline)
    if arguments.output:
        arguments.output.write_text(
            dumps(
                {
                    "bench": "quality.recall",
                    "commit": find_commit(),
                    "torch": torch.__version__,
                    "rows": rows,
                }
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
