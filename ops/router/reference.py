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
    """Which experts each token visits, everything that is counted on the way, and the order the experts need.

    weights: [T, K] gates, fp32 (fp64 for fp64 logits), 0 where unused; with gradient.
    expert_ids: [T, K] int32 in rank order, -1 where unused.
    counts: [N, E] int64, assignments per segment of T / N consecutive tokens.
    score_sums: [N, E] with gradient, sums over tokens of the scores normalised to 1 over the experts (ReLU: as they are).
    z_sum, entropy_sum: [] with gradient, sums over tokens of log_z^2 and of the entropy of the softmax, in nats.
    log_z: [T], log-sum-exp of the logits; margin: [T], key of the last selected minus that of the first not selected;
        entropy: [T], nats, of the softmax. 0 for tokens that are masked or not finite.
    reasons: [T] uint8, bits of Reason.
    slots: [T * K] int32, flat indices t * K + k sorted by (expert, token, slot), -1 behind the last assignment.
    inverse: [T, K] int32, where in `slots` an assignment stands; -1 where unused.
    offsets: [E + 1] int32, first row of each expert in `slots`; the last is the number of assignments.
    histogram: [E, B] int32, tokens by (score - alpha), alpha the key of the first not selected (top_k, top_p) or 0. With
        null experts top_k counts over those that an expert has to beat (null_bars) while the control's share is 1; of ReLU
        scores by (logit - alpha), so that it also shows what lies below zero. Bin b holds [lowest + b / per_unit, lowest +
        (b + 1) / per_unit), the first and last bin what lies outside.
    k_histogram: [K + 1] int64, unmasked tokens by number of experts. reason_counts: [8] int64, tokens by bit of Reason.
    null_count: [] int64, null experts chosen. checksum: [] int64, sum modulo 2^64 of a mix of (token id, expert).
    overflow: [2] int64, assignments that moved to another expert and that were dropped (spill.py); zeros of the op itself.
    """

    weights: Tensor
    expert_ids: Tensor
    counts: Tensor
    score_sums: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    log_z: Tensor
    margin: Tensor
    entropy: Tensor
    reasons: Tensor
    slots: Tensor
    inverse: Tensor
    offsets: Tensor
    histogram: Tensor
    k_histogram: Tensor
    reason_counts: Tensor
    null_count: Tensor
    checksum: Tensor
    overflow: Tensor


def score(logits: Tensor, function: str) -> Tensor:
    """[T, C] logits -> scores."""
    if function == "relu":
        return logits.relu()
    x = logits.double()  # rounded at the end: torch's vector and scalar code differ in the last bit, which would break ties
    if function == "softmax":
        scores = x.softmax(-1)
    elif function == "sigmoid":
        scores = x.sigmoid()
    else:
        scores = F.softplus(x.clamp_min(-700)).sqrt()  # the root has no slope at zero
    return scores.to(logits.dtype)


def normalized(scores: Tensor, logits: Tensor, function: str, used: Tensor | None = None) -> Tensor:
    """[T, N] scores over their sum, of the `used` ones (None: of all).

    Where the sum is at most LEAST_SUM, the scores lie in the tail of their function, log s = slope * logit,
    and their shares are the softmax of that: they do not vanish with the scores, which underflow. ReLU
    scores have no tail and give zeros.
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


def null_bars(ranked: torch.return_types.sort, n: Tensor, inside: Tensor, outside: Tensor, num_experts: int) -> Tensor:
    """[T, E]: the key of the null expert that each expert has to beat.

    That is the best null expert not chosen for an expert that was, to stay in; the worst chosen one for the
    others, to come in. A bias that all experts have in common moves neither, so the scores over these bars
    say at which level of it how many experts are chosen. Without such a null expert it is the first key not
    chosen, or the last chosen.

    ranked: keys [T, C] of all columns; n: [T] columns that are chosen; inside, outside: [T] keys on both
        sides of it.
    """
    chosen = torch.arange(ranked.values.shape[1], device=n.device) < n.unsqueeze(1)
    null = ranked.indices >= num_experts
    worst_in = torch.where(null & chosen, ranked.values, torch.inf).amin(1)
    best_out = torch.where(null & ~chosen, ranked.values, -torch.inf).amax(1)
    worst_in, best_out = torch.where(worst_in.isinf(), inside, worst_in), torch.where(best_out.isinf(), outside, best_out)
    of_chosen = torch.zeros_like(chosen).scatter_(1, ranked.indices, chosen)[:, :num_experts]
    return torch.where(of_chosen, best_out.unsqueeze(1), worst_in.unsqueeze(1))


def expert_choice_cuts(scores: Tensor, live: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Score [C] and token index [C] int32 of the last token each expert takes: it takes round(top_k * T / E) of the live
    tokens (half to even), at least one, by (score desc, token asc). Without tokens the cut is infinite."""
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return scores.new_full((num_experts,), torch.inf), scores.new_zeros(num_experts, dtype=torch.int32)
    ranked = scores.masked_fill(~live.unsqueeze(1), -torch.inf).sort(dim=0, descending=True, stable=True)
    capacity = ((live.sum() * top_k).double() / num_experts).round().long().clamp(min=1)  # fp32 ends at 2^24
    last = (capacity - 1).clamp(max=num_tokens - 1).expand(1, num_experts)
    cut = ranked.values.gather(0, last)[0]
    return cut.masked_fill(cut.isneginf(), torch.inf), ranked.indices.gather(0, last)[0].int()


def limit_to_groups(keys: Tensor, spec: RouteSpec) -> Tensor:
    """Keys of experts outside the best groups become -inf (RouteSpec.num_groups)."""
    experts = keys[:, :spec.num_experts].unflatten(1, (spec.num_groups, -1))
    best = experts.sort(dim=-1, descending=True).values[..., :max(1, spec.top_k // spec.top_groups)].sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :spec.top_groups]
    lost = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    experts = experts.masked_fill(lost.unsqueeze(-1), -torch.inf)
    return torch.cat((experts.flatten(1), keys[:, spec.num_experts:]), dim=1)


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (arithmetic modulo 2^64, logical shifts)."""
    def shift(v: Tensor, bits: int) -> Tensor:
        return (v >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift(x, 31)


def reference_route(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None, control: Tensor | None = None,
                    token_mask: Tensor | None = None, given_ids: Tensor | None = None,
                    histogram_range: Tensor | None = None, num_bins: int = 0, token_ids: Tensor | None = None,
                    num_segments: int = 1) -> RouterOutput:
    """See ops.router.route."""
    num_tokens, num_columns = logits.shape
    num_experts, num_slots = spec.num_experts, spec.max_experts
    x = logits if logits.dtype == torch.float64 else logits.float()
    unmasked = torch.ones(num_tokens, dtype=torch.bool, device=x.device) if token_mask is None else token_mask
    live = unmasked & x.isfinite().all(1)
    x = torch.where(live.unsqueeze(1), x, 0.0)

    # Scores and the sums of the balance.
    scores = score(x, spec.score_function)
    log_q = x.log_softmax(-1)
    log_z, entropy = x.logsumexp(-1) * live, -(log_q.exp() * log_q).sum(-1) * live
    shares = scores[:, :num_experts]
    if spec.score_function != "relu" and (spec.score_function != "softmax" or spec.num_null_experts):
        shares = normalized(shares, x[:, :num_experts], spec.score_function)
    score_sums = (shares * live.unsqueeze(1)).view(num_segments, -1, num_experts).sum(1)

    # Selection: the first n columns by (key desc, id asc).
    with torch.no_grad():
        value, portion, plain_k, limit = [0.0, 1.0, 0.0, num_slots] if control is None else control.tolist()
        portion = torch.tensor(portion, dtype=torch.float32, device=x.device)  # as the kernels do, step by step
        plain_k, limit = (min(int(v), num_slots) if v >= 0 else 0 for v in (plain_k, limit))  # NaN: 0
        keys = scores.detach() if bias is None else scores.detach() + bias
        if spec.mode == "expert_choice":
            cuts, last_tokens = expert_choice_cuts(scores.detach(), live, spec.top_k)
            late = (scores == cuts) & (torch.arange(num_tokens, device=x.device).unsqueeze(1) > last_tokens)
            keys = (scores.detach() - cuts).masked_fill(late, -1e-37)
        keys = torch.where(keys.isfinite(), keys, -3.0e38)  # behind every other
        candidates = num_columns
        if spec.top_groups < spec.num_groups:
            keys = limit_to_groups(keys, spec)
            candidates = spec.top_groups * num_experts // spec.num_groups + spec.num_null_experts
        ranked = keys.sort(dim=-1, descending=True, stable=True)
        ranked_scores = scores.detach().gather(1, ranked.indices)
        by_mode = torch.full((num_tokens,), spec.top_k, device=x.device)
        if spec.mode in ("threshold", "relu"):
            by_mode = (keys > value).sum(1)
        elif spec.mode == "expert_choice":
            by_mode = (keys >= 0).sum(1)
        elif spec.mode == "top_p":
            mass_before = ranked_scores.cumsum(1) - ranked_scores
            total = 1.0 if spec.score_function == "softmax" else scores.detach().sum(1, keepdim=True)
            by_mode = (mass_before < value * total)[:, :candidates].sum(1)
        most = min(num_slots, candidates)
        limit = min(limit, most)
        n = by_mode.clamp(max=most)
        if portion < 1:
            by_mode = n = ((1 - portion) * plain_k + portion * n.float() + 0.5).floor().long()
        reasons = (by_mode == 0) * int(Reason.EMPTY) + (by_mode > limit) * int(Reason.CAPPED)
        reasons += ((n > 0) & (n < spec.min_experts)) * int(Reason.RAISED) + int(portion < 1) * int(Reason.OVERRIDDEN)
        n = n.clamp(min=spec.min_experts).clamp(max=limit)
        if spec.mode == "given":
            reasons, n = torch.zeros_like(reasons), torch.zeros_like(n)
        reasons = torch.where(live, reasons, 0) + (unmasked & ~live) * int(Reason.NONFINITE)
        n = torch.where(live, n, 0)

        # What stands behind the selection: the margin and the threshold of the histogram.
        padded = F.pad(ranked.values, (1, 1), value=-torch.inf)
        inside, outside = padded.gather(1, n.unsqueeze(1))[:, 0], padded.gather(1, n.unsqueeze(1) + 1)[:, 0]
        margin = torch.where((n > 0) & outside.isfinite(), inside - outside, 0.0)
        ranks_alone = spec.mode in ("top_k", "top_p")
        alpha = outside if ranks_alone else torch.zeros_like(outside)
        in_histogram, bars = live & alpha.isfinite(), alpha.unsqueeze(1)
        if spec.mode == "top_k" and spec.num_null_experts and portion >= 1:
            in_histogram, bars = in_histogram & (n > 0), null_bars(ranked, n, inside, outside, num_experts)

        # Slots: the selected experts in rank order, null experts left out.
        if given_ids is not None:
            ids = torch.where(live.unsqueeze(1) & (given_ids < num_experts), given_ids.long(), -1)
        else:
            chosen = torch.where(torch.arange(num_columns, device=x.device) < n.unsqueeze(1), ranked.indices, -1)
            null_count = (chosen >= num_experts).sum()
            chosen = torch.where(chosen >= num_experts, -1, chosen)
            first = (chosen < 0).to(torch.int8).sort(dim=1, stable=True).indices[:, :num_slots]
            ids = chosen.gather(1, first)
        null_count = torch.zeros((), dtype=torch.int64, device=x.device) if spec.mode == "given" else null_count
        used = ids >= 0
    weights = torch.where(used, scores.gather(1, ids.clamp_min(0)), 0.0)
    if spec.normalize_weights:
        weights = normalized(weights, x.gather(1, ids.clamp_min(0)), spec.score_function, used)
    weights = weights * spec.scaling_factor
    with torch.no_grad():
        if not spec.skip_nonfinite:  # F0: no shared expert serves the row
            spread = torch.full_like(ids, -1)
            spread[:, 0] = torch.arange(num_tokens, device=x.device) % num_experts
            ids = torch.where((unmasked & ~live).unsqueeze(1), spread, ids)

        # Counts, histograms, permutation.
        keyed = torch.where(ids < 0, num_experts, ids)
        table = torch.zeros(num_segments, num_experts + 1, dtype=torch.int64, device=x.device)
        counts = table.scatter_add_(1, keyed.view(num_segments, -1), torch.ones_like(keyed).view(num_segments, -1))
        counts = counts[:, :num_experts]
        k_histogram = torch.bincount((ids >= 0).sum(1)[unmasked], minlength=num_slots + 1)
        bits = torch.arange(NUM_REASONS, device=x.device)
        reason_counts = (reasons.unsqueeze(1) >> bits & 1).sum(0)
        histogram = torch.zeros(num_experts, num_bins, dtype=torch.int32, device=x.device)
        if num_bins and spec.mode != "given":
            assert histogram_range is not None
            counted = x.detach() if spec.score_function == "relu" else scores
            place = (counted[:, :num_experts] - bars).float()
            place = ((place - histogram_range[:, 0]) * histogram_range[:, 1]).clamp(0, num_bins - 1).nan_to_num().int()
            place = place[in_histogram] + num_bins * torch.arange(num_experts, device=x.device, dtype=torch.int32)
            histogram = torch.bincount(place.flatten(), minlength=num_experts * num_bins).int()
            histogram = histogram.view(num_experts, num_bins)
        order = keyed.flatten().sort(stable=True).indices.int()
        offsets = F.pad(counts.sum(0).cumsum(0), (1, 0)).int()
        rank = torch.arange(num_tokens * num_slots, device=x.device, dtype=torch.int32)
        slots = torch.where(rank < offsets[-1], order, -1)
        inverse = torch.empty_like(rank).scatter_(0, order.long(), rank).view(num_tokens, num_slots)
        inverse = torch.where(ids >= 0, inverse, -1)
        checksum = torch.zeros((), dtype=torch.int64, device=x.device)
        if token_ids is not None:
            mixed = _mix64(token_ids.unsqueeze(1) * 2049 + ids + 1)
            checksum = torch.where(ids >= 0, mixed, 0).sum()
    return RouterOutput(weights, ids.int(), counts, score_sums, log_z.square().sum(), entropy.sum(), log_z.detach(), margin,
                        entropy.detach(), reasons.to(torch.uint8), slots, inverse, offsets, histogram, k_histogram,
                        reason_counts, null_count, checksum, counts.new_zeros(2))
