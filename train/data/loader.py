"""Batches: packed rows with document boundaries kept, shared out over data-parallel ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model.loss import IGNORE_INDEX
from train.data.store import TrainingSamples, ValidationRows


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the host.

    input_ids, targets, positions: [B, S] int64. Positions restart after each end_of_document; the first token of a
    document is nobody's target (IGNORE_INDEX), and padding is no target either.
    cu_seqlens: [documents + 1] int32 over the flattened tokens; max_seqlen: the longest document.
    token_mask: [B, S] bool, False for padding; None when nothing is padded.
    token_ids: [B, S] int64, sample * S + position, the same under every layout; None outside of training.
    target_bytes: bytes of text that the targets stand for; None in training, and where the store does not say.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    token_mask: torch.Tensor | None
    token_ids: torch.Tensor | None = None
    target_bytes: int | None = None

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        return self.targets.numel() if self.token_mask is None else int(self.token_mask.sum())

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor | int | None]:
        """Keyword arguments of Transformer.forward, on the device."""
        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return {"input_ids": move(self.input_ids), "targets": move(self.targets), "positions": move(self.positions),
                "cu_seqlens": move(self.cu_seqlens), "max_seqlen": self.max_seqlen,
                "token_mask": None if self.token_mask is None else move(self.token_mask),
                "token_ids": None if self.token_ids is None else move(self.token_ids)}


def pack(rows: list[np.ndarray], seq_len: int, end_of_document: int) -> Batch:
    """Turn token rows (each up to seq_len + 1 ids; shorter ones get padded) into a Batch."""
    size = (len(rows), seq_len)
    input_ids = torch.full(size, end_of_document, dtype=torch.int64)
    targets = torch.full(size, IGNORE_INDEX, dtype=torch.int64)
    token_mask = torch.zeros(size, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens = torch.from_numpy(np.asarray(row, dtype=np.int64))
        length = max(0, len(tokens) - 1)
        input_ids[i, :length] = tokens[:length]
        targets[i, :length] = tokens[1:]
        token_mask[i, :length] = True
    targets[input_ids == end_of_document] = IGNORE_INDEX
    starts = torch.ones(size, dtype=torch.bool)
    starts[:, 1:] = (input_ids[:, :-1] == end_of_document) & token_mask[:, 1:]
    starts[:, 1:] |= token_mask[:, :-1] & ~token_mask[:, 1:]  # the padded tail is a document of its own
    order = torch.arange(seq_len).expand(size)
    positions = order - torch.where(starts, order, 0).cummax(dim=1).values
    boundaries = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat((boundaries, torch.tensor([starts.numel()])))
    return Batch(input_ids, targets, positions, cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max()),
                 None if bool(token_mask.all()) else token_mask)


class TrainingLoader:
    """Micro-batches in a deterministic global order. Its whole state is one integer, `consumed_samples`.

    The samples of a step are consecutive; micro-batch m of rank r takes the r-th share of the m-th slice. The union
    over ranks and micro-batches is therefore the same under every layout.
    """

    def __init__(self, samples: TrainingSamples, seq_len: int, micro_batch_size: int, end_of_document: int,
                 data_rank: int, data_size: int):
        self.samples, self.seq_len, self.end_of_document = samples, seq_len, end_of_document
        self.micro_batch_size, self.data_rank, self.data_size = micro_batch_size, data_rank, data_size
        self.consumed_samples = 0

    def next_step(self, num_micro_batches: int) -> list[Batch]:
        """The micro-batches of this rank for one optimisation step. Collective when a new epoch begins."""
        start, slice_size = self.consumed_samples, self.micro_batch_size * self.data_size
        stop = start + num_micro_batches * slice_size
        self.samples.open(start, stop)
        batches = []
        for micro in range(num_micro_batches):
            first = start + micro * slice_size + self.data_rank * self.micro_batch_size
            rows = [self.samples.tokens(i) for i in range(first, first + self.micro_batch_size)]
            batch = pack(rows, self.seq_len, self.end_of_document)
            ids = torch.arange(first * self.seq_len, (first + self.micro_batch_size) * self.seq_len)
            batches.append(dataclasses.replace(batch, token_ids=ids.view(-1, self.seq_len)))
        self.consumed_samples = stop
        return batches


def validation_batches(rows: ValidationRows, micro_batch_size: int, end_of_document: int, data_rank: int,
                       data_size: int, max_sequences: int | None) -> Iterator[Batch]:
    """This rank's share of the held-out rows. Every rank gets the same number of batches, padding rows included."""
    count = len(rows) if max_sequences is None else min(max_sequences, len(rows))
    slice_size = micro_batch_size * data_size
    for start in range(0, count, slice_size):
        first = start + data_rank * micro_batch_size
        share = [rows.tokens(i) if i < count else np.empty(0, dtype=np.int64)
                 for i in range(first, first + micro_batch_size)]
        batch = pack(share, rows.seq_len, end_of_document)
        num_bytes = [rows.num_bytes(i) for i in range(first, min(first + micro_batch_size, count))]
        yield dataclasses.replace(batch, target_bytes=_target_bytes(num_bytes, batch.targets.numpy()))


def _target_bytes(num_bytes: list[np.ndarray | None], targets: np.ndarray) -> int | None:
    """Bytes that the targets [rows, seq_len] stand for, from those of the rows' tokens; the last rows may be padding."""
    total = 0
    for counts, row in zip(num_bytes, targets, strict=False):
        if counts is None:
            return None
        counts = counts[1:]  # a row's first token is the last target of the row before
        total += int(counts[row[:len(counts)] != IGNORE_INDEX].sum())
    return total
