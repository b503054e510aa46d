"""The decoder-only transformer: embedding, blocks, head, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import (
    STATS,
    AttentionSums,
    Paging,
    SequenceLayout,
    has_varlen_kernel,
)
from model.attention.cache import LayerCache, Pages
from model.attention.compressed import CompressedAttention
from model.attention.indexed import IndexedAttention
from model.attention.largest import LargestLogits
from model.attention.sparse import SparseAttention
from model.blocks.block import Block, BlockOutput
from model.blocks.mtp import PredictionModule, tokens_ahead
from model.blocks.streams import StreamSum
from model.config import ModelConfig
from model.init import materialize, matrices_on_meta
from model.layers import RMSNorm, rotary_tables, times
from model.loss import (
    ModelOutput,
    targets_ahead,
)
from model.moe.balance import (
    BalanceSums,
    RouterSums,
    balance_sums,
    histogram_bins,
    no_balance_sums,
    rank_shares,
    stats_size,
)
from model.moe.layer import ModelParts, MoELayer
from model.parallel.deal import Deal
from model.parallel.family import Cut, cut
from model.parallel.gather import Gathering
from model.parallel.groups import ParallelGroups
from model.parallel.heads import HeadExchange
from model.parallel.part import ModelPart
from model.parallel.tensor import TensorExchange
from model.request import SUMS_ALONE, ForwardRequest, TokenBatch, run_of
from model.routers.base import Router, RoutingRequest
from model.routers.state import RouterState
from model.target_loss import TargetLoss, TargetSums
from model.weight_sums import Embedding, looked_up
from ops.all_to_all import Communication, total_communication
from ops.router import RouterOutput


class Hidden(NamedTuple):
    """What the blocks leave behind."""

    last: torch.Tensor
    """[B, S, D], normalised: what the head projects. Of a stage before the last: what the next one
    goes on with, [B, S, n D] of several residual streams.
    """
    attentions: list[AttentionSums]
    """Of the sparse layers, in layer order."""
    balances: list[RouterSums]
    """Of the MoE layers, in layer order; those of multi-token prediction come after."""
    routings: list[RouterOutput]
    """Likewise."""


class Read(NamedTuple):
    """What a forward pass over rows gives that nothing is to be drawn from."""

    hidden: torch.Tensor
    """[B, S, D], what the head projects."""
    attention_stats: torch.Tensor
    """[measured_attentions, len(STATS)], as ModelOutput has them; zeros where nothing was
    measured.
    """


class Layers(nn.Module):
    """Neighbouring blocks, by their numbers in the whole model: a stage of a pipeline has some of
    them, and its parameters are named as the whole model's are.
    """

    def __init__(self, blocks: Mapping[int, Block]):
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __iter__(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, number: int) -> Block:
        """Block `number` of the model; of negative numbers, counted from the last one here."""
        if number < 0:
            from_the_end: list[Block] = [*self]
            return from_the_end[number]
        return cast(Block, self.get_submodule(str(number)))


class Transformer(nn.Module):
    """Token ids in, summed losses out (or logits, through `logits`). Or one stage of a pipeline:
    the first embeds, the last projects and has the loss, and between them hidden states travel.

    Args:
        config: the shape; parts: records of router, attention, dispatcher, and the balance
            settings.
        groups: parallel groups; this rank builds only its own experts.
        seed: of the initial weights, which are the same under every parallel layout. None: they
            have no numbers.
        layers: of this stage, one run of neighbours for each of its laps; None: all.
        dtype: of the weights.
        settle: of model.init.materialize.

    Attributes:
        part: which layers these are; laps: the same, one part for each run of them, which is what
            a forward pass goes through. One, but for virtual stages of a pipeline.
        router_kind: what all routers have in common, also where no layer with experts is on this
            stage; a router without numbers. None for a dense model.
        compiled: blocks of this part by their numbers, as one graph each, which passes in training
            go through where they ask for nothing but the usual sums; empty: none
            (train/engine/compiled.py).
        lent_embedding: [V, D], on a last stage that needs the embedding, which the first has (tied
            to the head, or for multi-token prediction): who trains it puts it here, and what it
            gathers as a gradient goes back to the first stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: ModelParts,
        groups: ParallelGroups | None = None,
        seed: int | None = 0,
        layers: Sequence[range] | None = None,
        dtype: torch.dtype = torch.float32,
        settle: Callable[[nn.Parameter], None] | None = None,
    ):
        super().__init__()
        groups = groups or ParallelGroups.single()
        self.config, self.parts, self.groups = config, parts, groups
        self.balance = parts.balance
        every = range(config.num_layers)
        settings = parts.attention
        self.part = ModelPart.of(
            (every,) if layers is None else layers,
            config.num_layers,
            config.moe_layers,
            [i for i in every if settings.is_sparse(config, i)],
        )
        self.laps = self.part.laps()
        # In a tuple, so that it is no part of the model.
        self._router_kind: tuple[Router, ...] = ()
        self.compiled: dict[int, Callable[..., BlockOutput]] = {}
        if config.num_experts:
            with torch.device("meta"):
                self._router_kind = (parts.router.build(config),)
        self.exchange = HeadExchange(groups.heads, groups.heads_rank, groups.heads_size)
        self.gather: TensorExchange | None = None
        if groups.gather_size > 1:
            self.gather = TensorExchange(groups.gather, groups.gather_rank, groups.gather_size)
        self.tensor: TensorExchange | None = None
        if groups.tensor_size > 1:
            self.tensor = TensorExchange(groups.tensor, groups.tensor_rank, groups.tensor_size)
        self.rotary_size = parts.attention.rotary_size(config)
        self.rank_shares = rank_shares(
            config.num_experts, len(config.moe_layers), groups.expert_size, parts.placement
        )
        with matrices_on_meta():
            self._build(config, groups, parts)
        if seed is not None:
            materialize(self, seed, config, dtype, settle)

    def _build(self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts) -> None:
        self.embedding: Embedding | None = None
        self.lent_embedding: torch.Tensor | None = None
        if self.part.is_first:
            self.embedding = Embedding(config.vocab_size // groups.tensor_size, config.hidden_size)
            self._cut_vocabulary(self.embedding)
        self.blocks = Layers({i: Block(config, groups, parts, i) for i in self.part.layers})
        self.streams: StreamSum | None = None
        self.norm: RMSNorm | None = None
        self.head: nn.Linear | None = None
        if self.part.is_last:
            if config.num_residual_streams > 1:
                self.streams = StreamSum(config)
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            if not config.tie_embeddings:
                run = config.vocab_size // groups.tensor_size
                self.head = nn.Linear(config.hidden_size, run, bias=False)
                self._cut_vocabulary(self.head)
        self.mtp = nn.ModuleList(
            PredictionModule(config, groups, parts, k)
            for k in range(config.num_mtp_layers if self.part.is_last else 0)
        )

    def _cut_vocabulary(self, table: Embedding | nn.Linear) -> None:
        if self.tensor is not None:
            cut(table.weight, Cut(0, self.tensor.rank, self.tensor.size))

    @property
    def router_kind(self) -> Router | None:
        return self._router_kind[0] if self._router_kind else None

    @property
    def borrows_embedding(self) -> bool:
        """Whether this stage needs the embedding of the first one in training."""
        needs = self.config.tie_embeddings or self.config.num_mtp_layers > 0
        return self.part.is_last and not self.part.is_first and needs

    def whole(self) -> Transformer:
        """The model that this is a stage of, with this rank's experts: names and shapes, no
        numbers. A whole model is itself.
        """
        if self.part.is_whole:
            return self
        return Transformer(self.config, self.parts, self.groups, seed=None)

    def moe_layers(self) -> list[MoELayer]:
        """Those here, as ModelConfig.moe_layers has them: of the blocks, then of multi-token
        prediction.
        """
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        return [block.mlp for block in blocks if isinstance(block.mlp, MoELayer)]

    def routers(self) -> list[Router]:
        """The routers of `moe_layers`. In evaluation those of multi-token prediction, which are the
        last ones, route nothing.
        """
        return [layer.router for layer in self.moe_layers()]

    def sparse_attentions(self) -> list[SparseAttention]:
        """The attention of the layers that are sparse, in layer order."""
        return [
            block.attention
            for block in self.blocks
            if isinstance(block.attention, SparseAttention) and block.attention.is_sparse
        ]

    def measured_attentions(
        self,
    ) -> list[SparseAttention | IndexedAttention | CompressedAttention]:
        """The attention of the layers that leave something out by a choice, in layer order: those
        of ModelOutput.attention_stats.
        """
        return [
            block.attention
            for block in self.blocks
            if isinstance(block.attention, SparseAttention | IndexedAttention | CompressedAttention)
            and block.attention.is_sparse
        ]

    def measure_communication(self, measuring: bool) -> Communication:
        """Count from now on, or no longer, what the MoE layers and attention exchange; returns what
        was counted so far.
        """
        meters = [layer.dispatcher.meter for layer in self.moe_layers()]
        meters.append(self.exchange.meter)
        meters += [x.meter for x in (self.gather, self.tensor) if x is not None]
        for meter in meters:
            meter.measuring = measuring
        return total_communication([meter.take() for meter in meters])

    def attentions(self) -> Iterator[tuple[str, nn.Module]]:
        """Every attention and its name, in the order of ModelOutput.largest_logits."""
        for i, block in zip(self.part.layers, self.blocks, strict=True):
            yield f"blocks.{i}.attention", cast(nn.Module, block.attention)
        for i, module in enumerate(self.mtp):
            yield f"mtp.{i}.block.attention", cast(nn.Module, cast(Block, module.block).attention)

    def set_step(self, step: int) -> None:
        """Optimisation steps done so far: sparse layers may be dense, or select with noise, early
        in training, and routers may route at random.
        """
        for attention in self.measured_attentions():
            attention.step = step
        for router in self.routers():
            router.step = step

    def layout(
        self,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        token_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        measure: bool = False,
        paging: Paging | None = None,
        whole_positions: torch.Tensor | None = None,
        largest: LargestLogits | None = None,
        deal: Deal | None = None,
    ) -> SequenceLayout:
        """What every attention reads, of the tokens that it sees before heads are exchanged;
        token_ids and token_mask, those of whole rows, are flattened here. whole_positions: where
        the positions are of a part of rows, those of whole ones; deal: how these are shared out.
        """
        dtype = self.any_weight.dtype
        config = self.config
        cos, sin = rotary_tables(
            positions, self.rotary_size, config.rope_theta, config.rope_scaling
        )
        exchange, masked, gathering, own_positions = None, None, None, positions
        if whole_positions is not None:
            exchange, positions = self.exchange, whole_positions
        if exchange is not None and exchange.size == 1:
            exchange = None
        if deal is not None:
            assert self.gather is not None
            gathering = Gathering(self.gather, deal)
        # Queries that are some of the tokens attend run by run and need no mask of all pairs.
        if (
            gathering is None
            and not has_varlen_kernel(positions.device, dtype)
            and cu_seqlens.numel() - 1 > positions.shape[0]
        ):
            masked = positions
        return SequenceLayout(
            cos=cos,
            sin=sin,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            masked_positions=masked,
            token_ids=None if token_ids is None else token_ids.reshape(-1),
            token_mask=None if token_mask is None else token_mask.reshape(-1),
            measure=measure,
            paging=paging,
            exchange=exchange,
            gathering=gathering,
            tensor=self.tensor,
            positions=own_positions,
            largest=largest,
        )

    @property
    def any_weight(self) -> torch.Tensor:
        """Any of the weights, for their dtype and device."""
        return next(iter(self.blocks)).attention_norm.weight

    @property
    def _embedding_weight(self) -> torch.Tensor:
        """[V, D], own or lent."""
        if self.embedding is not None:
            return self.embedding.weight
        assert self.lent_embedding is not None, "nobody has lent this stage the embedding"
        return self.lent_embedding

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, S] token ids, those of the tensor group (`_of_group`) -> [B, s, D] of own tokens."""
        if self.tensor is None:
            return times(self._looked_up(ids), self.config.embedding_multiplier)
        # Each token's row is on one rank: the sum over ranks adds zeros to it.
        run = self.config.vocab_size // self.tensor.size
        places = ids - self.tensor.rank * run
        here = (places >= 0) & (places < run)
        found = self._looked_up(places.clamp(0, run - 1)) * here.unsqueeze(-1)
        return times(self.tensor.sum_own_rows(found), self.config.embedding_multiplier)

    def _looked_up(self, places: torch.Tensor) -> torch.Tensor:
        # As a call of the module where it is here, since ZeRO-3 gathers weights for such calls.
        if self.embedding is not None:
            found: torch.Tensor = self.embedding(places)
            return found
        return looked_up(self._embedding_weight, places)

    def _of_group(self, batch: TokenBatch, whole: torch.Tensor) -> torch.Tensor:
        """[B, S'] of the tokens of whole rows -> those of all ranks of the tensor group, which are
        neighbours; of a rank alone, its own.
        """
        length = batch.input_ids.shape[1] * self.groups.tensor_size
        return run_of(whole, batch.deal, batch.first // length * length, length)

    def backbone(
        self,
        input_ids: torch.Tensor,
        layout: SequenceLayout,
        request: RoutingRequest,
        given_ids: tuple[torch.Tensor, ...] | None = None,
        caches: Sequence[LayerCache | Pages] | None = None,
        hidden: torch.Tensor | None = None,
        tables: Sequence[RouterState] = (),
        lap: int = 0,
    ) -> Hidden:
        """[B, S] token ids (as `_embedded`) through all blocks here, or those of a lap; hidden:
        what the stage before has made of them. See ForwardRequest for given_ids.
        """
        part = self.laps[lap]
        assert (hidden is None) == part.is_first, part
        if hidden is None:
            hidden = self._embedded(input_ids)
            if self.config.num_residual_streams > 1:  # each begins as the token
                hidden = hidden.repeat(1, 1, self.config.num_residual_streams)
        attentions: list[AttentionSums] = []
        balances: list[RouterSums] = []
        routings: list[RouterOutput] = []
        usual = self.training and caches is None and _is_usual(layout, request, given_ids)
        compiled = self.compiled if usual else {}
        for i, number in enumerate(part.layers):
            block = self.blocks[number]
            own = self._of_layer(request, given_ids, len(routings), part)
            if tables:
                own = own._replace(budgets=tables[len(routings)])
            if self._recomputes():
                found = checkpoint(block, hidden, layout, own, use_reentrant=False)
            elif number in compiled:
                found = compiled[number](hidden, layout, own)
            else:
                found = block(hidden, layout, own, None if caches is None else caches[i])
            hidden, attention, balance, routing = found

            if attention is not None:
                attentions.append(attention)
            if balance is not None:
                balances.append(balance)
                routings.append(routing)
        if part.is_last:
            if self.streams is not None:
                hidden = self.streams(hidden)
            assert self.norm is not None
            hidden = self.norm(hidden)
        return Hidden(hidden, attentions, balances, routings)

    def _recomputes(self) -> bool:
        return self.config.recompute == "block" and self.training and torch.is_grad_enabled()

    def _predict_further(
        self,
        found: Hidden,
        batch: TokenBatch,
        layout: SequenceLayout,
        request: RoutingRequest,
        given_ids: tuple[torch.Tensor, ...] | None,
    ) -> list[torch.Tensor]:
        """ModelOutput.mtp_sums. What the modules' layers report is added to `found`."""
        whole = batch.rows
        sums, hidden = [], found.last
        for number, module in enumerate(self.mtp, 1):
            # A token without another so far ahead in its document is padding here: no later one
            # attends to it, no expert sees it, and nothing counts it.
            ids, there = tokens_ahead(whole, number)
            embedded, there = self._embedded(self._of_group(batch, ids)), batch.own(there)
            own = self._of_layer(request, given_ids, len(found.routings), self.laps[-1])
            own = own._replace(token_mask=there.reshape(-1))
            if self._recomputes():
                out = checkpoint(module, hidden, embedded, layout, own, use_reentrant=False)
            else:
                out = module(hidden, embedded, layout, own)
            hidden, _, balance, routing = out
            if balance is not None:
                found.balances.append(balance)
                found.routings.append(routing)

            targets = batch.own(targets_ahead(whole.targets, whole.positions, number))
            sums.append(self._loss()(hidden, targets, by_token=False).loss_sum)
        return sums

    def project(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states that the blocks leave, or some of their tokens [..., D] -> logits [...,
        vocab_size]. weight: a use of the head's, as uses_of gives them.
        """
        hidden = times(hidden, 1 / self.config.whole_logits_divisor)
        if weight is None and self.head is not None:
            logits: torch.Tensor = self.head(hidden)
            return logits
        return F.linear(hidden, self._head_weight() if weight is None else weight)

    def _head_weight(self) -> torch.Tensor:
        """[V, D], its own or the embedding's."""
        return self._embedding_weight if self.head is None else self.head.weight

    def _loss(self) -> TargetLoss:
        """What makes losses of hidden states that the blocks leave."""
        size = self.config.loss_chunk_size
        return TargetLoss(self.project, self._head_weight, self.tensor, size)

    def output_projection(self) -> torch.Tensor:
        """[vocab_size, D] of the weights, what the last hidden states are multiplied by to be
        logits, model.logits_divisor and muP's divisor included.
        """
        return times(self._head_weight(), 1 / self.config.whole_logits_divisor)

    @torch.no_grad()
    def last_hidden(self, batch: TokenBatch) -> torch.Tensor:
        """[B, S, D], what the head projects, of packed rows as `forward` reads them; no loss is
        computed.
        """
        layout, request = self._reading(batch, SUMS_ALONE)
        ids = self._of_group(batch, batch.rows.input_ids)
        return self.backbone(ids, layout, request).last

    def _balance_sums(
        self,
        layers: list[RouterSums],
        previous_counts: torch.Tensor | None,
        like: torch.Tensor,
        counting: bool,
    ) -> BalanceSums:
        """Those of the MoE layers; a dense model's are zeros and empty, as `like` is."""
        kind = self.router_kind
        if not layers and kind is not None:
            bins = histogram_bins(self.balance, kind) if counting else 0
            size = stats_size(self.config.num_experts, kind.max_top_k, bins)
            return no_balance_sums(like, self.config.num_experts, size)
        if not layers:
            return no_balance_sums(like)
        return balance_sums(layers, self.balance, self.groups, previous_counts)

    def forward(
        self,
        batch: TokenBatch,
        request: ForwardRequest = SUMS_ALONE,
        before: torch.Tensor | None = None,
        lap: int = 0,
    ) -> ModelOutput:
        """Sums over the micro-batch `batch`, and what `request` asks for besides. before: what the
        stage before has handed on, None where the model begins. lap: whose layers it goes through,
        of which alone are the tables then.
        """
        part = self.laps[lap]
        layout, routing_request = self._reading(batch, request)
        ids = self._of_group(batch, batch.rows.input_ids)
        hidden = self.backbone(
            ids, layout, routing_request, request.given_ids, hidden=before, lap=lap
        )
        if part.is_last:
            found = self._loss()(
                hidden.last,
                batch.targets,
                request.keep_routing and not self.training,
                batch.taught,
                request.with_logit_z,
            )
        else:
            zero = hidden.last.new_zeros((), dtype=torch.float32)
            found = TargetSums(zero, zero.new_zeros(0), zero, zero, zero)
        loss_sum = found.loss_sum
        further: list[torch.Tensor] = []
        if self.training and part.is_last:
            further = self._predict_further(
                hidden, batch, layout, routing_request, request.given_ids
            )
        elif self.training:
            further = [loss_sum] * self.config.num_mtp_layers
        balance = self._balance_sums(
            hidden.balances, request.previous_counts, loss_sum, routing_request.num_bins > 0
        )

        # Attention's penalties first, then the routers': the order of a sum decides its last bit.
        penalty_sum, attention_stats = _attention_totals(hidden.attentions, loss_sum)
        for penalty in balance.penalties:
            penalty_sum = penalty_sum + penalty

        return ModelOutput(
            loss_sum=loss_sum,
            aux_sum=balance.aux_sum,
            z_sum=balance.z_sum,
            penalty_sum=penalty_sum,
            counts=balance.counts,
            scope_counts=balance.scope_counts,
            stats=balance.stats,
            processed=balance.processed,
            routings=tuple(hidden.routings) if request.keep_routing else (),
            attention_stats=attention_stats,
            token_losses=found.token_losses,
            mtp_sums=torch.stack(further) if further else loss_sum.new_zeros(0),
            largest_logits=_stacked(layout.largest, loss_sum),
            logit_z_sum=found.logit_z_sum,
            kl_sum=found.kl_sum,
            agreed=found.agreed,
            hidden=hidden.last.detach() if request.keep_hidden else hidden.last.new_zeros(0),
            handed_on=None if part.is_last else hidden.last,
        )

    def _reading(
        self, batch: TokenBatch, request: ForwardRequest
    ) -> tuple[SequenceLayout, RoutingRequest]:
        """What attention and the routers read of a micro-batch besides its hidden states."""
        # Attention sees whole rows; all else is of the tokens here.
        whole = batch.rows
        assert (batch.whole is not None) == (self.groups.parts_size > 1), (
            f"{self.groups.parts_size} ranks share rows, which are to be cut (Batch.part)"
        )
        assert (batch.deal is not None) == (self.gather is not None), (
            f"{self.groups.gather_size} ranks gather, to whom rows are to be dealt out"
        )
        layout = self.layout(
            self._of_group(batch, whole.positions),
            batch.cu_seqlens,
            batch.max_seqlen,
            whole.token_ids,
            whole.token_mask,
            request.measure_attention,
            whole_positions=whole.positions if self.groups.context_size > 1 else None,
            largest=LargestLogits() if request.measure_logits else None,
            deal=batch.deal,
        )
        counting = self.training if request.with_histogram is None else request.with_histogram
        routing_request = RoutingRequest(
            token_mask=None if batch.token_mask is None else batch.token_mask.reshape(-1),
            num_bins=int(counting),
            token_ids=None if batch.token_ids is None else batch.token_ids.reshape(-1),
            words=batch.input_ids.reshape(-1),
            frozen=request.frozen,
            snapshot=request.snapshot,
            plain_k=request.plain_k,
        )
        return layout, routing_request

    def logits(
        self,
        input_ids: torch.Tensor,
        caches: list[LayerCache] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Next-token logits [B, S, vocab_size] of unpacked rows; with caches, input_ids continue
        what they hold. last_only: those of the last position alone, [B, 1, vocab_size].
        """
        hidden = self.read(input_ids, caches).hidden
        return self.project(hidden[:, -1:] if last_only else hidden)

    def read(
        self,
        input_ids: torch.Tensor,
        caches: list[LayerCache] | None = None,
        measure_attention: bool = False,
    ) -> Read:
        """Unpacked rows [B, S] -> what `project` makes logits of; with caches, input_ids continue
        what they hold.
        """
        assert self.tensor is None, "whoever generates reads the model whole"
        batch, length = input_ids.shape
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + length, device=input_ids.device).expand(
            batch, length
        )
        cu_seqlens = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=input_ids.device
        )
        layout = self.layout(positions, cu_seqlens, length, measure=measure_attention)
        request = RoutingRequest(words=input_ids.reshape(-1))
        found = self.backbone(input_ids, layout, request, caches=caches)
        return Read(found.last, _attention_totals(found.attentions, found.last)[1])

    def new_caches(self, batch_size: int, max_len: int) -> list[LayerCache]:
        """Empty caches, one per layer."""
        weight = self.any_weight
        return [
            block.attention.new_cache(batch_size, max_len, weight.dtype, weight.device)
            for block in self.blocks
        ]

    def _of_layer(
        self,
        request: RoutingRequest,
        given_ids: tuple[torch.Tensor, ...] | None,
        before: int,
        part: ModelPart,
    ) -> RoutingRequest:
        """The request for the layer of a part before which so many have routed there: a replay
        names the experts by layer.
        """
        if given_ids is None or before == len(part.moe.own):
            return request
        layer = part.moe.own[before]
        return request._replace(given_ids=given_ids[layer] if layer < len(given_ids) else None)


def _is_usual(
    layout: SequenceLayout, request: RoutingRequest, given_ids: tuple[torch.Tensor, ...] | None
) -> bool:
    """Whether a pass asks the blocks for nothing that would make another graph of them."""
    asked = request.frozen or request.snapshot or request.plain_k or request.max_active
    return not (asked or given_ids is not None or layout.measure or layout.largest is not None)


def _stacked(largest: LargestLogits | None, like: torch.Tensor) -> torch.Tensor:
    """largest_logits of ModelOutput."""
    if largest is None or not largest.layers:
        return like.new_zeros((0, 0))
    return torch.stack(largest.layers)


def _attention_totals(
    layers: list[AttentionSums], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """penalty_sum [] and attention_stats [sparse layers, len(STATS)] of ModelOutput, as far as they
    come from attention; without sparse layers zero and empty, as `like` is.
    """
    if not layers:
        return like.new_zeros(()), like.new_zeros((0, len(STATS)))
    penalty_sum = torch.stack([layer.penalty_sum for layer in layers]).sum()
    return penalty_sum, torch.stack([layer.stats for layer in layers])
