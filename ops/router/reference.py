"""The definition of the router: plain torch, any dtype, gradients by autograd.

Shape letters: T tokens, C columns (E experts, then null experts), K slots, N segments, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.router.spec import NUM_REASONS, Reason, RouteSpec

LEAST_SUM = 1e-20
"""Sums of scores that are normalised from their logits instead."""


class RouterOutput(NamedTuple):
    """Which experts each token visits, everything that is counted on the way, and the order the
    experts need.
    """

    weights: Tensor
    """[T, K] gates, fp32 (fp64 for fp64 logits), 0 where unused; with gradient."""
    expert_ids: Tensor
    """[T, K] int32 in rank order, -1 where unused."""
    counts: Tensor
    """[N, E] int64, assignments per segment of T / N consecutive tokens."""
    score_sums: Tensor
    """[N, E] with gradient, sums over tokens of the scores normalised to 1 over the experts (ReLU:
    as they are).
    """
    z_sum: Tensor
    """[] with gradient, sum over tokens of log_z^2."""
    entropy_sum: Tensor
    """[] with gradient, sum over tokens of the entropy of the softmax, in nats."""
    log_z: Tensor
    """[T], log-sum-exp of the logits; 0 for tokens that are masked or not finite."""
    margin: Tensor
    """[T], key of the last selected minus that of the first not selected; 0 where there is no such
    pair.
    """
    entropy: Tensor
    """[T], nats, of the softmax; 0 for tokens that are masked or not finite."""
    reasons: Tensor
    """[T] uint8, bits of Reason."""
    slots: Tensor
    """[T * K] int32, flat indices t * K + k sorted by (expert, token, slot), -1 behind the last
    assignment.
    """
    inverse: Tensor
    """[T, K] int32, where in `slots` an assignment stands; -1 where unused."""
    offsets: Tensor
    """[E + 1] int32, first row of each expert in `slots`; the last is the number of assignments."""
    histogram: Tensor
    """[E, B] int32, tokens by (score - alpha), alpha the key of the first not selected (top_k,
    top_p) or 0. With null experts top_k counts over those that an expert has to beat (null_bars)
    while the share of the mode is 1; of ReLU scores by (logit - alpha), so that it also shows what
    lies below zero. Bin b holds [lowest + b / per_unit, lowest + (b + 1) / per_unit), the first and
    last bin what lies outside.
    """
    k_histogram: Tensor
    """[K + 1] int64, unmasked tokens by number of experts."""
    reason_counts: Tensor
    """[NUM_REASONS] int64, tokens by bit of Reason."""
    null_count: Tensor
    """[] int64, null experts chosen."""
    checksum: Tensor
    """[] int64, sum modulo 2^64 of a mix of (token id, expert)."""
    overflow: Tensor
    """[2] int64, assignments that moved to another expert and that were dropped (overflow.py);
    zeros of the op itself.
    """


def score(logits: Tensor, function: str) -> Tensor:
    """[T, C] logits -> scores."""
    if function == "relu":
        return logits.relu()
    # rounded at the end: torch's vector and scalar code differ in the last bit, which would break
    # ties
    x = logits.double()
    if function == "softmax":
        scores = x.softmax(-1)
    elif function == "sigmoid":
        scores = x.sigmoid()
    else:
        scores = F.softplus(x.clamp_min(-700)).sqrt()  # the root has no slope at zero
    return scores.to(logits.dtype)


def normalized(scores: Tensor, logits: Tensor, function: str, used: Tensor | None = None) -> Tensor:
    """[T, N] scores over their sum, of the `used` ones (None: of all).

    Where the sum is at most LEAST_SUM, the scores lie in the tail of their function, log s = slope
    * logit, and their shares are the softmax of that: they do not vanish with the scores, which
    underflow. ReLU scores have no tail and give zeros.
    """
    kept = scores if used is None else torch.where(used, scores, 0.0)
    total = kept.sum(-1, keepdim=True)
    shares = kept / total.clamp_min(LEAST_SUM)
    if function == "relu":
        return torch.where(total > LEAST_SUM, shares, 0.0)
    tail = logits * (0.5 if function == "sqrt_softplus" else 1.0)
    if used is not None:
        tail = torch.where(used.any(-1, keepdim=True), tail.masked_fill(~used, -torch.inf), 0.0)
    tail = tail.softmax(-1) if used is None else tail.softmax(-1) * used
    return torch.where(total > LEAST_SUM, shares, tail)


def null_bars(
    ranked: torch.return_types.sort, n: Tensor, inside: Tensor, outside: Tensor, num_experts: int
) -> Tensor:
    """[T, E]: the key of the null expert that each expert has to beat.

    That is the best null expert not chosen for an expert that was, to stay in; the worst chosen one
    for the others, to come in. A bias that all experts have in common moves neither, so the scores
    over these bars say at which level of it how many experts are chosen. Without such a null expert
    it is the first key not chosen, or the last chosen.

    ranked: keys [T, C] of all columns; n: [T] columns that are chosen; inside, outside: [T] keys on
        both sides of it.
    """
    chosen = torch.arange(ranked.values.shape[1], device=n.device) < n.unsqueeze(1)
    null = ranked.indices >= num_experts
    worst_in = torch.where(null & chosen, ranked.values, torch.inf).amin(1)
    best_out = torch.where(null & ~chosen, ranked.values, -torch.inf).amax(1)
    worst_in, best_out = (
        torch.where(worst_in.isinf(), inside, worst_in),
        torch.where(best_out.isinf(), outside, best_out),
    )
    of_chosen = torch.zeros_like(chosen).scatter_(1, ranked.indices, chosen)[:, :num_experts]
    return torch.where(of_chosen, best_out.unsqueeze(1), worst_in.unsqueeze(1))


def expert_choice_cuts(scores: Tensor, live: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Score [C] and token index [C] int32 of the last token each expert takes: it takes round(top_k
    * T / E) of the live tokens (half to even), at least one, by (score desc, token asc). Without
    tokens the cut is infinite.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return scores.new_full((num_experts,), torch.inf), scores.new_zeros(
            num_experts, dtype=torch.int32
        )
    ranked = scores.masked_fill(~live.unsqueeze(1), -torch.inf).sort(
        dim=0, descending=True, stable=True
    )
    # fp32 ends at 2^24
    capacity = ((live.sum() * top_k).double() / num_experts).round().long().clamp(min=1)
    last = (capacity - 1).clamp(max=num_tokens - 1).expand(1, num_experts)
    cut = ranked.values.gather(0, last)[0]
    return cut.masked_fill(cut.isneginf(), torch.inf), ranked.indices.gather(0, last)[0].int()


def limit_to_groups(keys: Tensor, spec: RouteSpec) -> Tensor:
    """Keys of experts outside the best groups become -inf (RouteSpec.num_groups)."""
    experts = keys[:, : spec.num_experts].unflatten(1, (spec.num_groups, -1))
    best = experts.sort(dim=-1, descending=True).values[..., : spec.keys_of_a_group].sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_groups]
    lost = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    experts = experts.masked_fill(lost.unsqueeze(-1), -torch.inf)
    return torch.cat((experts.flatten(1), keys[:, spec.num_experts :]), dim=1)


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (arithmetic modulo 2^64, logical shifts)."""

    def shift(v: Tensor, bits: int) -> Tensor:
        return (v >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift(x, 31)


class _Rows(NamedTuple):
    """The logits as they are computed with."""

    x: Tensor
    """[T, C] fp32 (fp64), 0 in rows that are not live."""
    unmasked: Tensor
    """[T] bool, what is no padding."""
    live: Tensor
    """[T] bool, unmasked and finite in every column: what is routed."""


class _Inputs(NamedTuple):
    """What the controllers say: [1] for all tokens, or [T] where each reads a row of a table."""

    value: Tensor
    """fp32, the mode's own: P of top_p, the cut of threshold and relu."""
    share: Tensor
    """fp32, share of the mode against plain top-k: the kernels blend in fp32 whatever the
    logits.
    """
    plain_k: Tensor
    """int64, experts per token of that plain top-k."""
    limit: Tensor
    """int64, most experts of a token."""

    @staticmethod
    def read(
        router_inputs: Tensor | None, row_of: Tensor | None, num_slots: int, device: torch.device
    ) -> _Inputs:
        if router_inputs is None:
            router_inputs = torch.tensor([0.0, 1.0, 0.0, num_slots], device=device)
            row_of = None
        rows = router_inputs.unsqueeze(0) if row_of is None else router_inputs[row_of.long()]
        value, share, plain_k, limit = rows.unbind(1)

        # whole numbers; what is negative or NaN counts as 0
        def whole(v: Tensor) -> Tensor:
            return torch.where(v >= 0, v, 0.0).clamp(max=num_slots).long()

        return _Inputs(value, share, whole(plain_k), whole(limit))


class _Ranking(NamedTuple):
    """Columns by (key desc, id asc)."""

    keys: Tensor
    """[T, C] in the order of the columns."""
    order: torch.return_types.sort
    """Keys and columns [T, C], best first."""
    candidates: int
    """How many of them take part; those outside the best groups come behind."""


def reference_route(
    logits: Tensor,
    spec: RouteSpec,
    bias: Tensor | None = None,
    router_inputs: Tensor | None = None,
    token_mask: Tensor | None = None,
    given_ids: Tensor | None = None,
    histogram_range: Tensor | None = None,
    num_bins: int = 0,
    token_ids: Tensor | None = None,
    num_segments: int = 1,
    row_of: Tensor | None = None,
) -> RouterOutput:
    """See ops.router.route. Rank the columns, say how many a row takes, fill its slots with them,
    weigh what is in the slots, and count. bias: [C], or with row_of the bias_table [P, C].
    """
    rows = _read(logits, token_mask)
    x, unmasked, live = rows
    scores = score(x, spec.score_function)
    log_q = x.log_softmax(-1)
    log_z, entropy = x.logsumexp(-1) * live, -(log_q.exp() * log_q).sum(-1) * live
    score_sums = _score_sums(x, scores, live, spec, num_segments)

    inputs = _Inputs.read(router_inputs, row_of, spec.max_experts, x.device)
    if bias is not None and row_of is not None:
        bias = bias[row_of.long()]
    ranking = _rank(scores.detach(), live, spec, bias)
    n, reasons = _how_many(ranking, scores.detach(), rows, spec, inputs)
    ids, null_count = _fill(ranking, n, live, spec, given_ids)
    weights = _weigh(x, scores, ids, spec)

    margin, in_histogram, bars = _behind_the_selection(ranking, n, live, spec, inputs)
    histogram = _histogram(x, scores, in_histogram, bars, spec, histogram_range, num_bins)

    if not spec.skip_nonfinite:
        ids = _serve_nonfinite(ids, unmasked & ~live, spec.num_experts)
    counts, order, inverse, offsets = _count_and_sort(ids, spec.num_experts, num_segments)
    bits = torch.arange(NUM_REASONS, device=x.device)
    return RouterOutput(
        weights=weights,
        expert_ids=ids.int(),
        counts=counts,
        score_sums=score_sums,
        z_sum=log_z.square().sum(),
        entropy_sum=entropy.sum(),
        log_z=log_z.detach(),
        margin=margin,
        entropy=entropy.detach(),
        reasons=reasons.to(torch.uint8),
        slots=order,
        inverse=inverse,
        offsets=offsets,
        histogram=histogram,
        k_histogram=torch.bincount((ids >= 0).sum(1)[unmasked], minlength=spec.max_experts + 1),
        reason_counts=(reasons.unsqueeze(1) >> bits & 1).sum(0),
        null_count=null_count,
        checksum=_checksum(ids, token_ids),
        overflow=counts.new_zeros(2),
    )


def _read(logits: Tensor, token_mask: Tensor | None) -> _Rows:
    x = logits if logits.dtype == torch.float64 else logits.float()
    unmasked = token_mask
    if unmasked is None:
        unmasked = torch.ones(len(x), dtype=torch.bool, device=x.device)
    live = unmasked & x.isfinite().all(1)
    return _Rows(torch.where(live.unsqueeze(1), x, 0.0), unmasked, live)


def _score_sums(
    x: Tensor, scores: Tensor, live: Tensor, spec: RouteSpec, num_segments: int
) -> Tensor:
    """[N, E] sums of every expert's share of a row's scores, null experts left out."""
    num_experts = spec.num_experts
    shares = scores[:, :num_experts]
    sums_to_one = spec.score_function == "softmax" and not spec.num_null_experts
    if spec.score_function != "relu" and not sums_to_one:
        shares = normalized(shares, x[:, :num_experts], spec.score_function)
    return (shares * live.unsqueeze(1)).view(num_segments, -1, num_experts).sum(1)


@torch.no_grad()
def _rank(scores: Tensor, live: Tensor, spec: RouteSpec, bias: Tensor | None) -> _Ranking:
    """Keys are scores with their bias, [C] or [T, C]; of expert choice they are scores over the
    expert's cut.
    """
    keys = scores if bias is None else scores + bias
    if spec.mode == "expert_choice":
        cuts, last_tokens = expert_choice_cuts(scores, live, spec.top_k)
        token = torch.arange(len(scores), device=scores.device).unsqueeze(1)
        # of the tokens at the cut an expert takes the first ones
        late = (scores == cuts) & (token > last_tokens)
        keys = (scores - cuts).masked_fill(late, -1e-37)
    keys = torch.where(keys.isfinite(), keys, -3.0e38)  # behind every other

    candidates = spec.num_columns
    if spec.limits_groups:
        keys = limit_to_groups(keys, spec)
        candidates = spec.top_groups * spec.num_experts // spec.num_groups + spec.num_null_experts
    return _Ranking(keys, keys.sort(dim=-1, descending=True, stable=True), candidates)


@torch.no_grad()
def _how_many(
    ranking: _Ranking, scores: Tensor, rows: _Rows, spec: RouteSpec, inputs: _Inputs
) -> tuple[Tensor, Tensor]:
    """n [T], how many of its columns a row takes, and reasons [T] int64: README, Selection, whose
    four steps these are. A row that is not live takes none.
    """
    asked = _asked(ranking, scores, spec, inputs.value)
    most = min(spec.max_experts, ranking.candidates)
    limit = inputs.limit.clamp(max=most)

    # 1 and 2: what there is room for, blended with plain top-k.
    n = asked.clamp(max=most)
    blended = inputs.share < 1
    plain, own = (1 - inputs.share) * inputs.plain_k, inputs.share * n.float()
    blend = (plain + own + 0.5).floor().long()
    asked, n = torch.where(blended, blend, asked), torch.where(blended, blend, n)

    # 3: reasons are judged on what was asked for.
    reasons = (asked == 0) * int(Reason.EMPTY) + (asked > limit) * int(Reason.CAPPED)
    reasons += ((n > 0) & (n < spec.min_experts)) * int(Reason.RAISED)
    reasons += blended * int(Reason.OVERRIDDEN)

    # 4: the limit wins over min_experts.
    n = n.clamp(min=spec.min_experts).minimum(limit)

    if spec.mode == "given":
        reasons, n = torch.zeros_like(reasons), torch.zeros_like(n)
    lost = rows.unmasked & ~rows.live
    reasons = torch.where(rows.live, reasons, 0) + lost * int(Reason.NONFINITE)
    return torch.where(rows.live, n, 0), reasons


def _asked(ranking: _Ranking, scores: Tensor, spec: RouteSpec, value: Tensor) -> Tensor:
    """[T] int64: the columns that the mode asks for. value: [1] or [T]."""
    value = value.unsqueeze(1)
    if spec.mode in ("threshold", "relu"):
        return (ranking.keys > value).sum(1)
    if spec.mode == "expert_choice":
        return (ranking.keys >= 0).sum(1)
    if spec.mode == "top_p":
        ranked_scores = scores.gather(1, ranking.order.indices)
        mass_before = ranked_scores.cumsum(1) - ranked_scores
        total = 1.0 if spec.score_function == "softmax" else scores.sum(1, keepdim=True)
        return (mass_before < value * total)[:, : ranking.candidates].sum(1)
    return torch.full((len(scores),), spec.top_k, device=scores.device)


@torch.no_grad()
def _fill(
    ranking: _Ranking, n: Tensor, live: Tensor, spec: RouteSpec, given_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ids [T, K] int64, the experts among the first n columns in rank order or the given ones, -1
    where unused; and [] int64, how many null experts were among them.
    """
    num_experts = spec.num_experts
    if given_ids is not None:
        known = live.unsqueeze(1) & (given_ids < num_experts)
        ids = torch.where(known, given_ids.long(), -1)
        return ids, torch.zeros((), dtype=torch.int64, device=n.device)
    rank = torch.arange(spec.num_columns, device=n.device)
    chosen = torch.where(rank < n.unsqueeze(1), ranking.order.indices, -1)
    null_count = (chosen >= num_experts).sum()
    chosen = torch.where(chosen >= num_experts, -1, chosen)
    # a stable sort moves the experts to the front, in their order
    first = (chosen < 0).to(torch.int8).sort(dim=1, stable=True).indices[:, : spec.max_experts]
    return chosen.gather(1, first), null_count


def _weigh(x: Tensor, scores: Tensor, ids: Tensor, spec: RouteSpec) -> Tensor:
    """[T, K] gates of the experts in the slots."""
    used, expert = ids >= 0, ids.clamp_min(0)
    weights = torch.where(used, scores.gather(1, expert), 0.0)
    if spec.normalize_weights:
        weights = normalized(weights, x.gather(1, expert), spec.score_function, used)
    return weights * spec.scaling_factor


@torch.no_grad()
def _behind_the_selection(
    ranking: _Ranking, n: Tensor, live: Tensor, spec: RouteSpec, inputs: _Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    """margin [T]; the rows [T] bool that count in the histogram; and what their scores are counted
    over, [T, 1] or [T, E].
    """
    padded = F.pad(ranking.order.values, (1, 1), value=-torch.inf)
    inside = padded.gather(1, n.unsqueeze(1))[:, 0]
    outside = padded.gather(1, n.unsqueeze(1) + 1)[:, 0]
    margin = torch.where((n > 0) & outside.isfinite(), inside - outside, 0.0)

    ranks_alone = spec.mode in ("top_k", "top_p")
    alpha = outside if ranks_alone else torch.zeros_like(outside)
    counted, bars = live & alpha.isfinite(), alpha.unsqueeze(1)
    # Rows of their own count in no histogram, so the share is one for all where it matters.
    alone = len(inputs.share) == 1 and bool(inputs.share >= 1)
    if spec.mode == "top_k" and spec.num_null_experts and alone:
        counted = counted & (n > 0)
        bars = null_bars(ranking.order, n, inside, outside, spec.num_experts)
    return margin, counted, bars


@torch.no_grad()
def _histogram(
    x: Tensor,
    scores: Tensor,
    in_histogram: Tensor,
    bars: Tensor,
    spec: RouteSpec,
    histogram_range: Tensor | None,
    num_bins: int,
) -> Tensor:
    """[E, B] int32: see RouterOutput.histogram."""
    num_experts = spec.num_experts
    if not num_bins or spec.mode == "given":
        return torch.zeros(num_experts, num_bins, dtype=torch.int32, device=x.device)
    assert histogram_range is not None
    lowest, per_unit = histogram_range.unbind(1)
    counted = x if spec.score_function == "relu" else scores
    place = (counted[:, :num_experts] - bars).float()
    place = ((place - lowest) * per_unit).clamp(0, num_bins - 1).nan_to_num().int()
    expert = torch.arange(num_experts, device=x.device, dtype=torch.int32)
    place = place[in_histogram] + num_bins * expert
    found = torch.bincount(place.flatten(), minlength=num_experts * num_bins).int()
    return found.view(num_experts, num_bins)


def _serve_nonfinite(ids: Tensor, lost: Tensor, num_experts: int) -> Tensor:
    """[T, K]: no shared expert serves the rows that are not finite, so that row t visits expert
    t mod E, with gate 0.
    """
    spread = torch.full_like(ids, -1)
    spread[:, 0] = torch.arange(len(ids), device=ids.device) % num_experts
    return torch.where(lost.unsqueeze(1), spread, ids)


def _count_and_sort(
    ids: Tensor, num_experts: int, num_segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """counts, slots, inverse and offsets of RouterOutput."""
    num_tokens, num_slots = ids.shape
    keyed = torch.where(ids < 0, num_experts, ids)  # unused slots come last
    table = torch.zeros(num_segments, num_experts + 1, dtype=torch.int64, device=ids.device)
    by_segment = keyed.view(num_segments, -1)
    counts = table.scatter_add_(1, by_segment, torch.ones_like(by_segment))[:, :num_experts]

    order = keyed.flatten().sort(stable=True).indices.int()
    offsets = F.pad(counts.sum(0).cumsum(0), (1, 0)).int()
    rank = torch.arange(num_tokens * num_slots, device=ids.device, dtype=torch.int32)
    slots = torch.where(rank < offsets[-1], order, -1)
    inverse = torch.empty_like(rank).scatter_(0, order.long(), rank).view(num_tokens, num_slots)
    return counts, slots, torch.where(ids >= 0, inverse, -1), offsets


def _checksum(ids: Tensor, token_ids: Tensor | None) -> Tensor:
    """[] int64: see RouterOutput.checksum."""
    if token_ids is None:
        return torch.zeros((), dtype=torch.int64, device=ids.device)
    mixed = _mix64(token_ids.unsqueeze(1) * 2049 + ids + 1)
    return torch.where(ids >= 0, mixed, 0).sum()
