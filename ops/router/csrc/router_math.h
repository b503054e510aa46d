// One token: logits -> scores -> selection -> gates and statistics, and the gradient of all of it. The same source runs
// on both machines of lanes.h. The definition is ops/router/reference.py; the formulas are in ops/router/README.md.
#pragma once
#include "lanes.h"
#include "router_args.h"

namespace loadstone {

template <class M>
LS_BOTH typename M::Real score_of(int score, typename M::Real x) {
  using Real = typename M::Real;
  if (score == SIGMOID) return (Real)1 / ((Real)1 + exp_(-x));
  if (score == RELU) return x > 0 ? x : (Real)0;
  const Real tail = exp_(x > 0 ? -x : x);  // softplus(x) = max(x, 0) + log(1 + exp(-|x|))
  return sqrt_((x > 0 ? x : (Real)0) + log1p_(tail));
}

// Scores s of the logits x, padding 0; q is the softmax.
template <class M>
LS_BOTH void scores_of(const Spec& spec, typename M::F (&x)[M::L], typename M::F (&s)[M::L], typename M::F (&q)[M::L]) {
  using Real = typename M::Real;
  const int columns = spec.num_columns;
  if (spec.score == SOFTMAX) {
    M::each([&](int j, int l, int) { M::at(s, j, l) = M::at(q, j, l); });
  } else if (spec.score == SIGMOID) {
    M::each([&](int j, int l, int id) { M::at(s, j, l) = id < columns ? score_of<M>(SIGMOID, M::at(x, j, l)) : (Real)0; });
  } else if (spec.score == RELU) {
    M::each([&](int j, int l, int id) { M::at(s, j, l) = id < columns ? score_of<M>(RELU, M::at(x, j, l)) : (Real)0; });
  } else {
    M::each([&](int j, int l, int id) {
      M::at(s, j, l) = id < columns ? score_of<M>(SQRT_SOFTPLUS, M::at(x, j, l)) : (Real)0;
    });
  }
}

// logits x (finite; padding -inf) -> scores s (padding 0), softmax q, their log-sum-exp and entropy.
template <class M>
LS_BOTH void score_token(const Spec& spec, typename M::F (&x)[M::L], typename M::F (&s)[M::L], typename M::F (&q)[M::L],
                         typename M::Real& log_z, typename M::Real& entropy) {
  using Real = typename M::Real;
  const int columns = spec.num_columns;
  const Real top = M::maximum(x);
  M::each([&](int j, int l, int id) {
    const Real shifted = M::at(x, j, l) - top;
    const Real e = exp_(shifted);
    M::at(q, j, l) = id < columns ? e : (Real)0;
    M::at(s, j, l) = id < columns && e > 0 ? e * shifted : (Real)0;
  });
  const Real sum = M::total(q), weighted = M::total(s);
  const Real log_sum = log_(sum);
  log_z = top + log_sum;
  entropy = log_sum - weighted / sum;
  const Real scale = (Real)1 / sum;
  M::each([&](int j, int l, int) { M::at(q, j, l) = M::at(q, j, l) * scale; });
  scores_of<M>(spec, x, s, q);
}

// True where every logit is finite; x of other rows is set to zero, so that nothing else needs to care.
template <class M>
LS_BOTH bool clean_row(typename M::F (&x)[M::L], int columns) {
  int bad = 0;
  M::each([&](int j, int l, int id) { bad += id < columns && !finite_(M::at(x, j, l)); });
  bad = M::add(bad);
  if (bad) M::each([&](int j, int l, int id) { M::at(x, j, l) = id < columns ? (typename M::Real)0 : M::at(x, j, l); });
  return bad == 0;
}

// The share of the balance that a column's score stands for: scores over their sum over the experts (ReLU: as they are).
LS_BOTH bool shares_are_scores(const Spec& spec) {
  return spec.score == RELU || (spec.score == SOFTMAX && spec.num_columns == spec.num_experts);
}

constexpr float LEAST_SUM = 1e-20f;

// Sum of the experts' scores: what shares are divided by.
template <class M>
LS_BOTH typename M::Real expert_score_sum(const Spec& spec, typename M::F (&s)[M::L]) {
  using Real = typename M::Real;
  if (shares_are_scores(spec)) return (Real)1;
  typename M::F experts[M::L];
  M::each([&](int j, int l, int id) { M::at(experts, j, l) = id < spec.num_experts ? M::at(s, j, l) : (Real)0; });
  return M::total(experts);
}

// Scores whose sum is below LEAST_SUM lie in the tail of their function, where log s = slope * x: their shares are a softmax.
template <class Real>
LS_BOTH Real tail_slope(const Spec& spec) { return spec.score == SQRT_SOFTPLUS ? (Real)0.5 : (Real)1; }

// The experts' shares of a token in that tail, 0 elsewhere.
template <class M>
LS_BOTH void tail_shares(const Spec& spec, typename M::F (&x)[M::L], typename M::F (&p)[M::L]) {
  using Real = typename M::Real;
  const Real slope = tail_slope<Real>(spec);
  M::each([&](int j, int l, int id) { M::at(p, j, l) = id < spec.num_experts ? M::at(x, j, l) : (Real)-INFINITY; });
  const Real top = M::maximum(p);
  M::each([&](int j, int l, int id) {
    M::at(p, j, l) = id < spec.num_experts ? exp_(slope * (M::at(x, j, l) - top)) : (Real)0;
  });
  const Real scale = (Real)1 / M::total(p);
  M::each([&](int j, int l, int) { M::at(p, j, l) = M::at(p, j, l) * scale; });
}

// Sets u of the experts outside the best groups to -inf; a group counts the sum of its best group_keys keys.
// Returns how many columns are left.
template <class M>
LS_BOTH int limit_groups(const Spec& spec, typename M::F (&u)[M::L]) {
  using Real = typename M::Real;
  const int size = spec.num_experts / spec.num_groups;
  typename M::F keys[M::L];
  M::each([&](int j, int l, int) { M::at(keys, j, l) = M::at(u, j, l); });
  Real sums[64];
  for (int g = 0; g < spec.num_groups; ++g) {
    sums[g] = (Real)0;
    for (int r = 0; r < spec.group_keys; ++r) {
      Real key; int column;
      M::pop(keys, g * size, (g + 1) * size, key, column);
      sums[g] = sums[g] + key;
    }
  }
  uint64_t kept = 0;
  for (int r = 0; r < spec.top_groups; ++r) {
    int winner = -1;
    for (int g = 0; g < spec.num_groups; ++g)
      if (!(kept >> g & 1) && (winner < 0 || sums[g] > sums[winner])) winner = g;
    kept |= (uint64_t)1 << winner;
  }
  M::each([&](int j, int l, int id) {
    if (id < spec.num_experts && !(kept >> (id / size) & 1)) M::at(u, j, l) = -INFINITY;
  });
  return spec.top_groups * size + spec.num_columns - spec.num_experts;
}

// Where integer statistics go. CPU: plain memory of one worker; GPU: shared memory of the block, and the histogram in
// global memory. `add` must be exact in any order.
template <class Counter>
struct Sinks {
  Counter* expert_counts;   // [E] of this block
  Counter* integers;        // [num_integers(K) - 1]: all but the checksum
  int32_t* histogram;       // [E, B]; bin 0 is left to the caller
};

constexpr float LEAST_KEY = -3.0e38f;

// A number of experts out of router_inputs: 0 where it is negative or NaN.
LS_BOTH int whole_number(float value, int most) { return value >= 0.0f ? (value < (float)most ? (int)value : most) : 0; }

// Puts what the gates of a token in the tail are shares of in place of its scores in row_a, and returns the sum over its
// experts; tokens outside the tail keep their scores and their sum.
template <class M, class Args>
LS_BOTH typename M::Real tail_gates(M& m, const Args& a, int token, typename M::F (&x)[M::L], typename M::F (&s)[M::L],
                                    bool in_tail, int entries, typename M::Real sum) {
  using Real = typename M::Real;
  const Spec& spec = a.spec;
  const auto id_of = [&](int r) { return spec.mode == GIVEN ? a.given_ids[(size_t)token * spec.slots + r] : m.rank_ids[r]; };
  m.store_row(m.row_a, x);
  Real top = -INFINITY;
  for (int r = 0; in_tail && r < entries; ++r) {
    const int id = id_of(r);
    if (id >= 0 && id < spec.num_experts) top = m.row_a[id] > top ? m.row_a[id] : top;
  }
  const Real slope = tail_slope<Real>(spec);
  typename M::F e[M::L];
  M::each([&](int j, int l, int) { M::at(e, j, l) = in_tail ? exp_(slope * (M::at(x, j, l) - top)) : M::at(s, j, l); });
  m.store_row(m.row_a, e);
  if (!in_tail) return sum;
  sum = (Real)0;
  for (int r = 0; r < entries; ++r) {
    const int id = id_of(r);
    if (id >= 0 && id < spec.num_experts) sum = sum + m.row_a[id];
  }
  return sum;
}

// One token forward. `active` is false for tiles without a token, which only take part in exchanges.
// `score_acc`, `float_acc`: running sums of this tile.
template <class M, class In, class Counter, class Add, class AddHistogram>
LS_BOTH void route_token(M& m, const ForwardArgs<typename M::Real>& a, int token, bool active, Sinks<Counter> sinks,
                         uint64_t& checksum, typename M::F (&score_acc)[M::L], typename M::Real (&float_acc)[2],
                         Add add, AddHistogram add_histogram) {
  using Real = typename M::Real;
  using F = typename M::F;
  const Spec& spec = a.spec;
  const int columns = spec.num_columns, slots = spec.slots;
  const bool masked = active && a.token_mask && !a.token_mask[token];
  const bool reads = active && !masked;
  F x[M::L], s[M::L], q[M::L], u[M::L];
  M::load(x, (const In*)a.logits + (size_t)(active ? token : 0) * columns, columns, reads, (Real)-INFINITY);
  if (!reads) M::each([&](int j, int l, int id) { M::at(x, j, l) = id < columns ? (Real)0 : (Real)-INFINITY; });
  const bool finite = clean_row<M>(x, columns);
  const bool live = reads && finite;
  Real log_z, entropy;
  score_token<M>(spec, x, s, q, log_z, entropy);

  // Balance sums.
  const Real share_sum = expert_score_sum<M>(spec, s);
  const bool in_tail = live && !(share_sum > (Real)LEAST_SUM);
  if (M::any(in_tail)) {
    F shares[M::L];
    tail_shares<M>(spec, x, shares);
    if (in_tail) M::each([&](int j, int l, int) { M::at(score_acc, j, l) = M::at(score_acc, j, l) + M::at(shares, j, l); });
  }
  if (live) {
    if (shares_are_scores(spec)) {
      M::each([&](int j, int l, int) { M::at(score_acc, j, l) = M::at(score_acc, j, l) + M::at(s, j, l); });
    } else if (!in_tail) {
      const Real scale = (Real)1 / share_sum;
      M::each([&](int j, int l, int) { M::at(score_acc, j, l) = M::at(score_acc, j, l) + M::at(s, j, l) * scale; });
    }
    float_acc[0] = float_acc[0] + log_z * log_z;
    float_acc[1] = float_acc[1] + entropy;
  }

  // Tokens of one batch may be of several budgets, each with a bias and inputs of its own.
  int row = active && a.row_of ? a.row_of[token] : 0;
  row = row < 0 ? 0 : (row > 0 && row >= a.num_rows ? a.num_rows - 1 : row);
  const float* const inputs = a.router_inputs ? a.router_inputs + 4 * (size_t)row : nullptr;

  // Selection keys.
  if (spec.mode == EXPERT_CHOICE) {
    F cut[M::L];
    M::load(cut, a.cut_scores, columns, true, (Real)INFINITY);
    M::each([&](int j, int l, int id) {
      Real key = M::at(s, j, l) - M::at(cut, j, l);
      if (id < columns && M::at(s, j, l) == M::at(cut, j, l)) key = token > a.cut_tokens[id] ? (Real)-1e-37 : (Real)0;
      M::at(u, j, l) = id < columns ? key : (Real)-INFINITY;
    });
  } else if (a.bias) {
    F bias[M::L];
    M::load(bias, a.bias + (size_t)row * columns, columns, true, (Real)0);
    M::each([&](int j, int l, int id) {
      M::at(u, j, l) = id < columns ? M::at(s, j, l) + M::at(bias, j, l) : (Real)-INFINITY;
    });
  } else {
    M::each([&](int j, int l, int id) { M::at(u, j, l) = id < columns ? M::at(s, j, l) : (Real)-INFINITY; });
  }
  // A key that is no number, or beyond all numbers, ranks behind every other; -inf means taken already.
  M::each([&](int j, int l, int id) {
    if (id < columns && !finite_(M::at(u, j, l))) M::at(u, j, l) = LEAST_KEY;
  });
  int candidates = columns;
  if (spec.num_groups > 1 && spec.top_groups < spec.num_groups) candidates = limit_groups<M>(spec, u);
  m.store_row(m.row_a, s);

  const float value = inputs ? inputs[INPUT_VALUE] : 0.0f;
  const float share = inputs ? inputs[INPUT_SHARE] : 1.0f;
  int limit = inputs ? whole_number(inputs[INPUT_LIMIT], slots) : slots;
  limit = limit < candidates ? limit : candidates;
  const int override_k = inputs ? whole_number(inputs[INPUT_PLAIN_K], slots) : 0;
  int reason = live || masked || !active ? 0 : NONFINITE;
  int chosen = 0;        // selected columns, null experts included
  Real margin = (Real)0, alpha = (Real)0;
  bool has_alpha = true;
  // Null experts make a level of all experts' biases matter. What an expert has to beat is one of them: the best that was
  // not chosen to stay in, the worst that was chosen to come in; neither moves with that level. Without such a null expert
  // it is the first key not chosen, or the last chosen. Rows of their own count in no histogram: best_left below is for
  // tiles that have taken equally many ranks.
  const bool against_nulls = spec.mode == TOP_K && columns > spec.num_experts && share >= 1.0f;
  Real best_null_out = (Real)-INFINITY, worst_null_in = (Real)-INFINITY;

  if (spec.mode != GIVEN) {
    int by_mode = 0;     // what the mode alone would choose
    if (spec.mode == TOP_K) by_mode = spec.top_k;
    if (spec.mode == THRESHOLD || spec.mode == EXPERT_CHOICE) {
      M::each([&](int j, int l, int) {
        by_mode += spec.mode == THRESHOLD ? M::at(u, j, l) > (Real)value : M::at(u, j, l) >= (Real)0;
      });
      by_mode = M::add(by_mode);
    }
    const int most = slots < candidates ? slots : candidates;
    m.begin_ranking(u);
    Real mass = (Real)0, full = (Real)1;
    if (spec.mode == TOP_P && spec.score != SOFTMAX) full = M::total(s);
    // Ranks come one at a time, as many as the mode needs and one more for the margin.
    int ranks = 0;
    bool counting = spec.mode == TOP_P;
    for (;;) {
      const int last = by_mode < most ? by_mode : most;
      int need = last > override_k && share < 1.0f ? last : (share < 1.0f ? override_k : last);
      need = need < spec.min_experts ? spec.min_experts : need;
      need = need < most ? need : most;
      const bool wanted = live && ranks < columns && (counting ? ranks <= most : ranks <= need);
      if (!M::any(wanted)) break;
      m.next_rank(u, columns, ranks, wanted);
      if (wanted) {
        if (counting) {
          if (ranks < candidates && mass < (Real)value * full && ranks <= slots) {
            mass = mass + m.row_a[m.rank_ids[ranks]];
            by_mode = ranks + 1;
          } else {
            counting = false;
          }
        }
        ++ranks;
      }
    }
    if (live) {
      int n = by_mode < most ? by_mode : most;
      if (share < 1.0f) {
        reason |= OVERRIDDEN;
        n = (int)floorf((1.0f - share) * (float)override_k + share * (float)n + 0.5f);
        by_mode = n;
      }
      if (n == 0) reason |= EMPTY;
      if (n > 0 && n < spec.min_experts) reason |= RAISED;
      n = n < spec.min_experts ? spec.min_experts : n;
      if (by_mode > limit) reason |= CAPPED;
      n = n < limit ? n : limit;
      chosen = n;
      has_alpha = n < ranks && finite_(m.rank_keys[n]);
      if (has_alpha && n > 0) margin = m.rank_keys[n - 1] - m.rank_keys[n];
      if (has_alpha && (spec.mode == TOP_K || spec.mode == TOP_P)) alpha = m.rank_keys[n];
      if (spec.mode == THRESHOLD || spec.mode == EXPERT_CHOICE) has_alpha = true;
    }
    if (against_nulls && spec.num_bins > 0) {
      best_null_out = m.best_left(u, spec.num_experts, columns);
      for (int r = 0; live && r < ranks; ++r) {
        if (m.rank_ids[r] < spec.num_experts) continue;
        if (r < chosen) worst_null_in = m.rank_keys[r];
        else best_null_out = m.rank_keys[r] > best_null_out ? m.rank_keys[r] : best_null_out;
      }
      has_alpha = has_alpha && chosen > 0;
      if (live && !finite_(best_null_out)) best_null_out = alpha;
      if (has_alpha && !finite_(worst_null_in)) worst_null_in = m.rank_keys[chosen - 1];
    }
  }

  // Gates: the scores of the selected experts, in rank order (GIVEN: in the order given).
  const Real scale = (Real)spec.scale;
  Real sum = (Real)0;
  int num_real = 0, num_null = 0, top_id = -1;
  if (spec.mode == GIVEN) {
    for (int r = 0; r < slots; ++r) {
      const int id = live ? a.given_ids[(size_t)token * slots + r] : -1;
      if (id >= 0 && id < spec.num_experts) { sum = sum + m.row_a[id]; ++num_real; }
    }
  } else {
    for (int r = 0; r < chosen; ++r) {
      const int id = m.rank_ids[r];
      if (id < spec.num_experts) { sum = sum + m.row_a[id]; ++num_real; } else { ++num_null; }
    }
  }
  const bool gates_in_tail = live && spec.normalize && num_real > 0 && spec.score != RELU && !(sum > (Real)LEAST_SUM);
  if (M::any(gates_in_tail)) sum = tail_gates<M>(m, a, token, x, s, gates_in_tail, spec.mode == GIVEN ? slots : chosen, sum);
  const Real factor = spec.normalize ? (gates_in_tail || sum > (Real)LEAST_SUM ? scale / sum : (Real)0) : scale;
  if (active) {
    Real* weights = a.weights + (size_t)token * slots;
    int32_t* ids = a.expert_ids + (size_t)token * slots;
    const uint64_t key = a.token_ids ? (uint64_t)a.token_ids[token] : 0;
    int used = 0;
    const int entries = spec.mode == GIVEN ? slots : chosen;
    for (int r = 0; r < entries; ++r) {
      int id = spec.mode == GIVEN ? (live ? a.given_ids[(size_t)token * slots + r] : -1) : m.rank_ids[r];
      if (id < 0 || id >= spec.num_experts) id = -1;
      if (spec.mode != GIVEN && id < 0) continue;  // a null expert leaves no slot
      const int slot = spec.mode == GIVEN ? r : used;
      ++used;
      if (m.owns(slot)) {
        ids[slot] = id;
        weights[slot] = id >= 0 ? m.row_a[id] * factor : (Real)0;
        if (id >= 0) {
          add(sinks.expert_counts + id, 1);
          if (a.token_ids) checksum += mix64(key * (uint64_t)(2 * MAX_COLUMNS + 1) + (uint64_t)id + 1);
        }
      }
    }
    if (reason & NONFINITE && !spec.skip_nonfinite) {  // no shared expert serves this token: one expert, gate 0
      top_id = token % spec.num_experts;
      if (m.owns(0)) {
        ids[0] = top_id; weights[0] = (Real)0;
        add(sinks.expert_counts + top_id, 1);
        if (a.token_ids) checksum += mix64(key * (uint64_t)(2 * MAX_COLUMNS + 1) + (uint64_t)top_id + 1);
      }
      used = num_real = 1;
      for (int slot = 1; slot < slots; ++slot) if (m.owns(slot)) { ids[slot] = -1; weights[slot] = (Real)0; }
    } else {
      for (int slot = used; slot < slots; ++slot) if (m.owns(slot)) { ids[slot] = -1; weights[slot] = (Real)0; }
    }
    if (m.leads()) {
      a.log_z[token] = live ? log_z : (Real)0;
      a.margin[token] = live ? margin : (Real)0;
      a.entropy[token] = live ? entropy : (Real)0;
      a.reasons[token] = (uint8_t)reason;
      if (!masked) {
        add(sinks.integers + num_real, 1);
        for (int bit = 0; bit < NUM_REASONS; ++bit) if (reason >> bit & 1) add(sinks.integers + slots + 1 + bit, 1);
        if (num_null) add(sinks.integers + null_picks_at(slots), num_null);
      }
    }
  }

  if (spec.num_bins > 0 && spec.mode != GIVEN) {
    const bool counts = live && has_alpha;
    if (counts && m.leads()) add(sinks.integers + histogram_tokens_at(slots), 1);
    const float most = (float)(spec.num_bins - 1);
    F bins[M::L], bars[M::L];
    M::each([&](int j, int l, int) { M::at(bars, j, l) = against_nulls ? worst_null_in : alpha; });
    for (int r = 0; against_nulls && r < chosen; ++r) {
      const int taken = m.rank_ids[r];
      M::each([&](int j, int l, int id) { M::at(bars, j, l) = id == taken ? best_null_out : M::at(bars, j, l); });
    }
    M::each([&](int j, int l, int id) {
      const bool expert = id < spec.num_experts;
      const float lowest = expert ? a.histogram_range[2 * id] : 0.0f, per_unit = expert ? a.histogram_range[2 * id + 1] : 0.0f;
      const Real counted = spec.score == RELU ? M::at(x, j, l) : M::at(s, j, l);  // logits: also what lies below zero
      float bin = ((float)(counted - M::at(bars, j, l)) - lowest) * per_unit;
      bin = bin < 0.0f ? 0.0f : (bin > most ? most : bin);
      M::at(bins, j, l) = counts && expert ? (Real)bin : (Real)0;
    });
    M::each([&](int j, int l, int id) {
      if (M::at(bins, j, l) >= (Real)1) add_histogram(sinks.histogram + (size_t)id * spec.num_bins + (int)M::at(bins, j, l));
    });
  }
}

// Adds to t the gradient of the gates of a token in the tail.
template <class M>
LS_BOTH void tail_gates_backward(M& m, const BackwardArgs<typename M::Real>& a, int token, typename M::F (&x)[M::L],
                                 typename M::F (&t)[M::L], bool in_tail) {
  using Real = typename M::Real;
  const Spec& spec = a.spec;
  const Real slope = tail_slope<Real>(spec), scale = (Real)spec.scale;
  const int32_t* ids = a.expert_ids + (size_t)(in_tail ? token : 0) * spec.slots;
  const Real* grad = a.grad_weights + (size_t)(in_tail ? token : 0) * spec.slots;
  typename M::F direct[M::L];
  m.store_row(m.row_a, x);
  M::each([&](int j, int l, int) { M::at(direct, j, l) = (Real)0; });
  m.store_row(m.row_b, direct);
  Real top = -INFINITY, sum = (Real)0, dot = (Real)0;
  for (int r = 0; in_tail && r < spec.slots; ++r)
    if (ids[r] >= 0) top = m.row_a[ids[r]] > top ? m.row_a[ids[r]] : top;
  for (int r = 0; in_tail && r < spec.slots; ++r) {
    if (ids[r] < 0) continue;
    const Real e = exp_(slope * (m.row_a[ids[r]] - top));
    sum = sum + e;
    dot = dot + e * grad[r];
  }
  for (int r = 0; in_tail && r < spec.slots; ++r)
    if (ids[r] >= 0 && m.owns(r))
      m.row_b[ids[r]] = slope * scale / sum * exp_(slope * (m.row_a[ids[r]] - top)) * (grad[r] - dot / sum);
  m.load_row(direct, m.row_b);
  M::each([&](int j, int l, int) { M::at(t, j, l) = M::at(t, j, l) + M::at(direct, j, l); });
}

// One token backward: all gradients of its logits in one pass.
template <class M, class In>
LS_BOTH void route_token_backward(M& m, const BackwardArgs<typename M::Real>& a, int token, int segment, bool active) {
  using Real = typename M::Real;
  using F = typename M::F;
  const Spec& spec = a.spec;
  const int columns = spec.num_columns, slots = spec.slots, experts = spec.num_experts;
  const bool live = active && !(a.token_mask && !a.token_mask[token]) && !(a.reasons[token] & NONFINITE);
  F x[M::L], s[M::L], q[M::L], t[M::L];
  M::load(x, (const In*)a.logits + (size_t)(active ? token : 0) * columns, columns, live, (Real)-INFINITY);
  if (!live) M::each([&](int j, int l, int id) { M::at(x, j, l) = id < columns ? (Real)0 : (Real)-INFINITY; });
  const Real log_z = live ? a.log_z[token] : (Real)0, entropy = live ? a.entropy[token] : (Real)0;
  M::each([&](int j, int l, int id) { M::at(q, j, l) = id < columns ? exp_(M::at(x, j, l) - log_z) : (Real)0; });
  scores_of<M>(spec, x, s, q);
  m.store_row(m.row_a, s);

  // Gates: dL/ds of the selected.
  M::each([&](int j, int l, int) { M::at(t, j, l) = (Real)0; });
  m.store_row(m.row_b, t);
  bool gates_in_tail = false, shares_in_tail = false;
  if (live) {
    const int32_t* ids = a.expert_ids + (size_t)token * slots;
    const Real* grad = a.grad_weights + (size_t)token * slots;
    const Real scale = (Real)spec.scale;
    Real sum = (Real)0, dot = (Real)0;
    bool used = false;
    if (spec.normalize)
      for (int r = 0; r < slots; ++r)
        if (ids[r] >= 0) { sum = sum + m.row_a[ids[r]]; dot = dot + m.row_a[ids[r]] * grad[r]; used = true; }
    const bool usable = !spec.normalize || sum > (Real)LEAST_SUM;
    gates_in_tail = !usable && used && spec.score != RELU;
    for (int r = 0; r < slots; ++r)
      if (m.owns(r) && ids[r] >= 0 && usable)
        m.row_b[ids[r]] = spec.normalize ? scale / sum * (grad[r] - dot / sum) : scale * grad[r];
  }
  m.load_row(t, m.row_b);

  // Balance shares: p = s / sum over the experts (or s itself).
  F g[M::L];
  M::load(g, a.grad_score_sums + (size_t)segment * experts, experts, live, (Real)0);
  if (shares_are_scores(spec)) {
    M::each([&](int j, int l, int) { M::at(t, j, l) = M::at(t, j, l) + M::at(g, j, l); });
  } else {
    const Real sum = expert_score_sum<M>(spec, s);
    shares_in_tail = live && !(sum > (Real)LEAST_SUM);
    F product[M::L];
    M::each([&](int j, int l, int id) {
      M::at(product, j, l) = id < experts ? M::at(g, j, l) * M::at(s, j, l) : (Real)0;
    });
    const Real scale = shares_in_tail ? (Real)0 : (Real)1 / sum, dot = M::total(product) * scale;
    M::each([&](int j, int l, int id) {
      if (id < experts) M::at(t, j, l) = M::at(t, j, l) + (M::at(g, j, l) - dot) * scale;
    });
  }

  // Through the score function.
  if (spec.score == SOFTMAX) {
    F product[M::L];
    M::each([&](int j, int l, int) { M::at(product, j, l) = M::at(s, j, l) * M::at(t, j, l); });
    const Real dot = M::total(product);
    M::each([&](int j, int l, int) { M::at(t, j, l) = M::at(s, j, l) * (M::at(t, j, l) - dot); });
  } else if (spec.score == SIGMOID) {
    M::each([&](int j, int l, int) { M::at(t, j, l) = M::at(t, j, l) * (M::at(s, j, l) * ((Real)1 - M::at(s, j, l))); });
  } else if (spec.score == RELU) {
    M::each([&](int j, int l, int) { M::at(t, j, l) = M::at(s, j, l) > 0 ? M::at(t, j, l) : (Real)0; });
  } else {
    M::each([&](int j, int l, int id) {
      // sigmoid(x) / (2 s); far below zero both vanish and the quotient is s / 2.
      const Real score = M::at(s, j, l);
      const Real slope = M::at(x, j, l) < (Real)-20 ? score / (Real)2 : score_of<M>(SIGMOID, M::at(x, j, l)) / ((Real)2 * score);
      M::at(t, j, l) = id < columns ? M::at(t, j, l) * slope : (Real)0;
    });
  }

  // Tokens in the tail: of what is a softmax of their logits.
  if (M::any(shares_in_tail)) {
    F p[M::L], product[M::L];
    tail_shares<M>(spec, x, p);
    M::each([&](int j, int l, int id) { M::at(product, j, l) = id < experts ? M::at(p, j, l) * M::at(g, j, l) : (Real)0; });
    const Real dot = M::total(product), slope = tail_slope<Real>(spec);
    M::each([&](int j, int l, int id) {
      if (shares_in_tail && id < experts) M::at(t, j, l) = M::at(t, j, l) + slope * (M::at(p, j, l) * (M::at(g, j, l) - dot));
    });
  }
  if (M::any(gates_in_tail)) tail_gates_backward<M>(m, a, token, x, t, gates_in_tail);

  // z-loss sum of log_z^2 and entropy sum, both of the softmax q.
  const Real grad_z = a.grad_float_sums[0], grad_entropy = a.grad_float_sums[1];
  const Real factor = (Real)2 * grad_z * log_z;
  M::each([&](int j, int l, int id) {
    const Real log_q = id < columns ? M::at(x, j, l) - log_z : (Real)0;
    const Real both = factor - grad_entropy * (log_q + entropy);
    M::at(t, j, l) = live && id < columns ? M::at(t, j, l) + M::at(q, j, l) * both : (Real)0;
  });
  M::write((In*)a.grad_logits + (size_t)(active ? token : 0) * columns, t, columns, active);
}

}  // namespace loadstone
