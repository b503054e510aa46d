"""Batches: packed rows with document boundaries kept, shared out over data-parallel ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.loss import IGNORE_INDEX, targets_ahead
from model.parallel.deal import Deal, Dealer
from model.request import TokenBatch, fields_of_part, part_of, run_of
from train.data.chat.samples import Conversations
from train.data.store import TrainingSamples, ValidationRows


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the host: B rows of S tokens, or a part of longer rows."""

    input_ids: torch.Tensor
    """[B, S] int64."""
    targets: torch.Tensor
    """[B, S] int64. The first token of a document is nobody's target (IGNORE_INDEX), padding is no
    target either, and of conversations only what is learnt is one.
    """
    positions: torch.Tensor
    """[B, S] int64, restarting with every document."""
    cu_seqlens: torch.Tensor
    """[documents + 1] int32, cumulative lengths of the documents over the flattened tokens of whole
    rows.
    """
    max_seqlen: int
    """Tokens of the longest document."""
    token_mask: torch.Tensor | None
    """[B, S] bool, False for padding; None when nothing is padded."""
    token_ids: torch.Tensor | None = None
    """[B, S] int64, sample * S + position, the same under every layout; None outside of
    training.
    """
    source: int | None = None
    """Which source the rows are of, where held-out text has several; counted over data.sources and
    data.validation.sources.
    """
    target_bytes: int | None = None
    """Bytes of text that the targets stand for; None in training, and where the store does not
    say.
    """
    whole: Batch | None = None
    """The rows that these tokens are a part of; None: these are whole."""
    first: int = 0
    """Place in its row of the first token here; of dealt rows, in the order of the deal."""
    deal: Deal | None = None
    """In which order tokens of whole rows are dealt out to ranks; None: in that of the rows."""

    def part(self, rank: int, size: int, dealer: Dealer | None = None) -> Batch:
        """The tokens of one rank of those that share rows: a run of each row, or what the dealer
        deals out to it. What they are asked to predict was settled on whole rows, so that nothing
        is lost where two runs meet.
        """
        if size == 1:
            return self
        length = self.input_ids.shape[1] // size
        deal = None if dealer is None else dealer(self.positions)
        return dataclasses.replace(self, **fields_of_part(self, rank * length, length, deal))

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """[B, S'] of the tokens of whole rows -> [B, S] of the tokens here."""
        return run_of(whole, self.deal, self.first, self.input_ids.shape[1])

    @property
    def rows(self) -> Batch:
        """The whole rows."""
        return self if self.whole is None else self.whole

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())

    def num_targets_ahead(self, number: int) -> int:
        """Targets so many tokens further on than `targets`."""
        rows = self.rows
        ahead = targets_ahead(rows.targets, rows.positions, number)
        return int((self.own(ahead) != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        return self.targets.numel() if self.token_mask is None else int(self.token_mask.sum())

    def inputs(self, device: torch.device) -> TokenBatch:
        """What the model reads of it, on the device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        rows = self.rows
        whole = TokenBatch(
            input_ids=move(rows.input_ids),
            targets=move(rows.targets),
            positions=move(rows.positions),
            cu_seqlens=move(rows.cu_seqlens),
            max_seqlen=rows.max_seqlen,
            token_mask=None if rows.token_mask is None else move(rows.token_mask),
            token_ids=None if rows.token_ids is None else move(rows.token_ids),
        )
        if self.whole is None:
            return whole
        deal = None if self.deal is None else self.deal.moved(move)
        return part_of(whole, self.first, self.input_ids.shape[1], deal)


def pack(rows: Sequence[np.ndarray | Conversations], seq_len: int, end_of_document: int) -> Batch:
    """Turn rows into a Batch: tokens (each row up to seq_len + 1 ids; shorter ones get padded), in
    which documents end with end_of_document, or conversations, which know their own ends.
    """
    size = (len(rows), seq_len)
    input_ids = torch.full(size, end_of_document, dtype=torch.int64)
    targets = torch.full(size, IGNORE_INDEX, dtype=torch.int64)
    token_mask = torch.zeros(size, dtype=torch.bool)
    # A document begins with every row.
    starts = torch.zeros(size, dtype=torch.bool)
    starts[:, 0] = True

    for i, row in enumerate(rows):
        if isinstance(row, Conversations):
            _lay_out(row, input_ids[i], targets[i], token_mask[i], starts[i])
            continue
        tokens = torch.from_numpy(np.asarray(row, dtype=np.int64))
        length = max(0, len(tokens) - 1)
        input_ids[i, :length] = tokens[:length]
        targets[i, :length] = tokens[1:]
        token_mask[i, :length] = True

        # One begins after the end of the one before, and no token is asked to predict its first.
        ends = input_ids[i] == end_of_document
        targets[i, ends] = IGNORE_INDEX
        starts[i, 1:] = ends[:-1] & token_mask[i, 1:]

    # the padded tail is a document of its own
    starts[:, 1:] |= token_mask[:, :-1] & ~token_mask[:, 1:]

    # Positions count from the start of their document; the largest start so far is its own.
    order = torch.arange(seq_len).expand(size)
    positions = order - torch.where(starts, order, 0).cummax(dim=1).values

    boundaries = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat((boundaries, torch.tensor([starts.numel()])))
    return Batch(
        input_ids,
        targets,
        positions,
        cu_seqlens.to(torch.int32),
        int(cu_seqlens.diff().max()),
        None if bool(token_mask.all()) else token_mask,
    )


def _lay_out(
    row: Conversations,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    token_mask: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Write conversations into a row of a batch, [S] each."""
    for start, ids, is_target in zip(row.starts, row.ids, row.is_target, strict=True):
        part = slice(int(start), int(start) + len(ids) - 1)
        input_ids[part] = torch.from_numpy(ids[:-1])
        targets[part] = torch.from_numpy(np.where(is_target[1:], ids[1:], IGNORE_INDEX))
        token_mask[part] = True
        starts[part.start] = True


class TrainingLoader:
    """Micro-batches in a deterministic global order. Its whole state is one integer,
    `consumed_samples`.

    The samples of a step are consecutive; micro-batch m of rank r takes the r-th share of the m-th
    slice. The union over ranks and micro-batches is therefore the same under every layout.

    Args:
        data_rank, data_size: along the axis on which ranks have different rows.
        context_rank, context_size: along the one on which they have parts of the same rows.
        dealer: who says which parts; None: runs of equal length.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        seq_len: int,
        micro_batch_size: int,
        end_of_document: int,
        data_rank: int,
        data_size: int,
        context_rank: int = 0,
        context_size: int = 1,
        dealer: Dealer | None = None,
    ):
        self.samples = samples
        self.seq_len = seq_len
        self.end_of_document = end_of_document
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        self.context_rank = context_rank
        self.context_size = context_size
        self.dealer = dealer
        self.consumed_samples = 0

    def next_step(self, num_micro_batches: int) -> list[Batch]:
        """The micro-batches of this rank for one optimisation step. Collective when a new epoch
        begins.
        """
        start, slice_size = self.consumed_samples, self.micro_batch_size * self.data_size
        stop = start + num_micro_batches * slice_size
        self.samples.open(start, stop)
        batches = []
        for micro in range(num_micro_batches):
            first = start + micro * slice_size + self.data_rank * self.micro_batch_size
            rows = [self.samples.row(i) for i in range(first, first + self.micro_batch_size)]
            batch = pack(rows, self.seq_len, self.end_of_document)
            ids = torch.arange(first * self.seq_len, (first + self.micro_batch_size) * self.seq_len)
            batch = dataclasses.replace(batch, token_ids=ids.view(-1, self.seq_len))
            batches.append(batch.part(self.context_rank, self.context_size, self.dealer))
        self.consumed_samples = stop
        return batches


def validation_batches(
    rows: ValidationRows,
    micro_batch_size: int,
    end_of_document: int,
    data_rank: int,
    data_size: int,
    max_sequences: int | None,
    context_rank: int = 0,
    context_size: int = 1,
    dealer: Dealer | None = None,
) -> Iterator[Batch]:
    """This rank's share of the held-out rows, of which it has a part where context_size ranks have
    the same ones (dealer: TrainingLoader). Every rank gets the same number of batches, padding rows
    included.

    Where several sources hold out text, each batch is of one of them, and max_sequences are shared
    out in proportion to their rows.
    """
    by_source, place = rows.by_source, (data_rank, data_size, context_rank, context_size)
    most = shared_out([len(part) for part in by_source.values()], max_sequences)
    for (source, part), share in zip(by_source.items(), most, strict=True):
        for batch in _batches_of(part, micro_batch_size, end_of_document, *place, share, dealer):
            yield dataclasses.replace(batch, source=source)
    if not by_source:
        yield from _batches_of(
            rows, micro_batch_size, end_of_document, *place, max_sequences, dealer
        )


def shared_out(sizes: list[int], most: int | None) -> list[int]:
    """`most` divided in proportion to the sizes, at least 1 of each, none more than there are."""
    if most is None or most >= sum(sizes):
        return sizes
    shares = [max(1, most * size // sum(sizes)) for size in sizes]
    # What rounding has left goes to the largest, first come first served.
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        shares[i] += max(0, min(most - sum(shares), sizes[i] - shares[i]))
    return shares


def _batches_of(
    rows: ValidationRows,
    micro_batch_size: int,
    end_of_document: int,
    data_rank: int,
    data_size: int,
    context_rank: int,
    context_size: int,
    max_sequences: int | None,
    dealer: Dealer | None,
) -> Iterator[Batch]:
    count = len(rows) if max_sequences is None else min(max_sequences, len(rows))
    slice_size = micro_batch_size * data_size
    for start in range(0, count, slice_size):
        first = start + data_rank * micro_batch_size
        share = [
            rows.row(i) if i < count else np.empty(0, dtype=np.int64)
            for i in range(first, first + micro_batch_size)
        ]
        whole = pack(share, rows.seq_len, end_of_document)
        batch = whole.part(context_rank, context_size, dealer)

        # Every target's bytes are counted by the rank that has it.
        places = batch.own(torch.arange(rows.seq_len).expand_as(whole.targets))
        targets = torch.full_like(whole.targets, IGNORE_INDEX)
        targets.scatter_(1, places, batch.targets)
        num_bytes = [rows.num_bytes(i) for i in range(first, min(first + micro_batch_size, count))]
        yield dataclasses.replace(batch, target_bytes=_target_bytes(num_bytes, targets.numpy()))


def _target_bytes(num_bytes: list[np.ndarray | None], targets: np.ndarray) -> int | None:
    """Bytes that the targets [rows, seq_len] stand for, from those of the rows' tokens; the last
    rows may be padding.
    """
    total = 0
    for counts, row in zip(num_bytes, targets, strict=False):
        if counts is None:
            return None
        counts = counts[1:]  # a row's first token is the last target of the row before
        total += int(counts[row[: len(counts)] != IGNORE_INDEX].sum())
    return total
