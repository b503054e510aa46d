// The CPU implementation: blocks in parallel, then a stable counting sort. Sums follow the same tree as the CUDA kernels.
// `parallel(n, f)` runs f(worker, begin, end) over a split of [0, n) and may use fewer workers than `num_workers`.
#pragma once
#include <algorithm>
#include <vector>

#include "router_math.h"

namespace loadstone {

inline int64_t block_begin(const Partition& p, const Spec& s, int block) {
  const int segment = block / p.blocks_per_segment, within = block % p.blocks_per_segment;
  return (int64_t)segment * (s.num_tokens / s.num_segments) + (int64_t)within * p.tokens_per_block;
}
inline int64_t block_end(const Partition& p, const Spec& s, int block) {
  const int64_t segment_end = (int64_t)(block / p.blocks_per_segment + 1) * (s.num_tokens / s.num_segments);
  return std::min(block_begin(p, s, block) + p.tokens_per_block, segment_end);
}

template <class Real, class In, int L, class Parallel>
void forward_columns(const ForwardArgs<Real>& a, int num_workers, Parallel parallel) {
  using M = HostTile<Real, L>;
  const Spec& s = a.spec;
  const Partition p = partition(s);
  const int experts = s.num_experts, slots = s.slots, num_counted = checksum_at(slots);
  std::vector<int32_t> block_counts((size_t)p.num_blocks * experts, 0);
  std::vector<Real> partial((size_t)p.num_blocks * (experts + 2), (Real)0);
  std::vector<int32_t> integers((size_t)num_workers * num_counted, 0);
  std::vector<uint64_t> checksums(num_workers, 0);
  std::vector<int32_t> histograms((size_t)num_workers * experts * s.num_bins, 0);
  const auto add = [](int32_t* where, int value) { *where += value; };
  const auto add_histogram = [](int32_t* where) { *where += 1; };

  parallel(p.num_blocks, [&](int worker, int64_t first, int64_t last) {
    M m;
    for (int block = (int)first; block < last; ++block) {
      int32_t* const counts = block_counts.data() + (size_t)block * experts;
      Sinks<int32_t> sinks{counts, integers.data() + (size_t)worker * num_counted,
                           histograms.data() + (size_t)worker * experts * s.num_bins};
      Real* const sums = partial.data() + (size_t)block * (experts + 2);
      const int64_t begin = block_begin(p, s, block), end = block_end(p, s, block);
      for (int tile = 0; tile < p.tiles; ++tile) {
        typename M::F scores[L];
        memset(scores, 0, sizeof(scores));
        Real floats[2] = {(Real)0, (Real)0};
        for (int64_t token = begin + tile; token < end; token += p.tiles)
          route_token<M, In>(m, a, (int)token, true, sinks, checksums[worker], scores, floats, add, add_histogram);
        const Real* const flat = reinterpret_cast<const Real*>(scores);
        for (int e = 0; e < experts; ++e) sums[e] = sums[e] + flat[e];
        for (int i = 0; i < 2; ++i) sums[experts + i] = sums[experts + i] + floats[i];
      }
    }
  });

  // Sums over blocks: 32 running sums by block mod 32, then pairs at distance 16, 8, 4, 2, 1 (a warp's butterfly).
  const auto reduce = [&](int first, int count, int column) {
    Real lanes[32];
    for (int l = 0; l < 32; ++l) {
      lanes[l] = (Real)0;
      for (int b = l; b < count; b += 32) lanes[l] = lanes[l] + partial[(size_t)(first + b) * (experts + 2) + column];
    }
    for (int o = 16; o; o >>= 1)
      for (int l = 0; l < o; ++l) lanes[l] = lanes[l] + lanes[l + o];
    return lanes[0];
  };
  for (int n = 0; n < s.num_segments; ++n)
    for (int e = 0; e < experts; ++e) {
      const int first = n * p.blocks_per_segment;
      a.score_sums[(size_t)n * experts + e] = reduce(first, p.blocks_per_segment, e);
      int64_t count = 0;
      for (int b = first; b < first + p.blocks_per_segment; ++b) count += block_counts[(size_t)b * experts + e];
      a.counts[(size_t)n * experts + e] = count;
    }
  for (int i = 0; i < 2; ++i) a.float_sums[i] = reduce(0, p.num_blocks, experts + i);

  for (int i = 0; i < num_counted; ++i) {
    a.integers[i] = 0;
    for (int w = 0; w < num_workers; ++w) a.integers[i] += integers[(size_t)w * num_counted + i];
  }
  uint64_t checksum = 0;
  for (uint64_t part : checksums) checksum += part;
  a.integers[checksum_at(slots)] = (int64_t)checksum;

  // Stable permutation by (expert, token, slot).
  int32_t at = 0;
  for (int e = 0; e < experts; ++e) {
    a.offsets[e] = at;
    for (int b = 0; b < p.num_blocks; ++b) {
      int32_t& count = block_counts[(size_t)b * experts + e];
      const int32_t here = at;
      at += count;
      count = here;
    }
  }
  a.offsets[experts] = at;
  parallel(p.num_blocks, [&](int, int64_t first, int64_t last) {
    for (int block = (int)first; block < last; ++block) {
      int32_t* const next = block_counts.data() + (size_t)block * experts;
      const int64_t stop = block_end(p, s, block) * slots;
      for (int64_t i = block_begin(p, s, block) * slots; i < stop; ++i) {
        const int32_t id = a.expert_ids[i];
        const int32_t row = id >= 0 ? next[id]++ : -1;
        a.inverse[i] = row;
        if (row >= 0) a.slots[row] = (int32_t)i;
      }
    }
  });
  std::fill(a.slots + at, a.slots + (size_t)s.num_tokens * slots, -1);

  // The bin below the range is what the others leave.
  for (int e = 0; e < experts; ++e) {
    int64_t above = 0;
    for (int b = 1; b < s.num_bins; ++b) {
      int32_t sum = 0;
      for (int w = 0; w < num_workers; ++w) sum += histograms[((size_t)w * experts + e) * s.num_bins + b];
      a.histogram[(size_t)e * s.num_bins + b] = sum;
      above += sum;
    }
    if (s.num_bins) a.histogram[(size_t)e * s.num_bins] = (int32_t)(a.integers[histogram_tokens_at(slots)] - above);
  }
}

template <class Real, class In, int L, class Parallel>
void backward_columns(const BackwardArgs<Real>& a, Parallel parallel) {
  const int per_segment = a.spec.num_segments ? a.spec.num_tokens / a.spec.num_segments : 1;
  parallel(a.spec.num_tokens, [&](int, int64_t first, int64_t last) {
    HostTile<Real, L> m;
    for (int64_t t = first; t < last; ++t)
      route_token_backward<HostTile<Real, L>, In>(m, a, (int)t, (int)(t / per_segment), true);
  });
}

template <class Real, class In, int L, class Parallel>
void scores_columns(const ScoresArgs<Real>& a, Parallel parallel) {
  using M = HostTile<Real, L>;
  const int columns = a.spec.num_columns;
  parallel(a.spec.num_tokens, [&](int, int64_t first, int64_t last) {
    typename M::F x[L], s[L], q[L];
    Real log_z, entropy;
    for (int64_t t = first; t < last; ++t) {
      M::load(x, (const In*)a.logits + t * columns, columns, true, (Real)-INFINITY);
      clean_row<M>(x, columns);
      score_token<M>(a.spec, x, s, q, log_z, entropy);
      M::write(a.scores + t * columns, s, columns, true);
    }
  });
}

// fn(L) with enough registers of 32 columns. fp64 is for numerical checks and stops at 64 columns.
template <class Real, class Fn>
void with_width(int columns, Fn fn) {
  if (columns <= 32) fn(std::integral_constant<int, 1>{});
  else if (columns <= 64) fn(std::integral_constant<int, 2>{});
  else if constexpr (sizeof(Real) == 4) {
    if (columns <= 128) fn(std::integral_constant<int, 4>{});
    else if (columns <= 256) fn(std::integral_constant<int, 8>{});
    else if (columns <= 512) fn(std::integral_constant<int, 16>{});
    else fn(std::integral_constant<int, 32>{});
  }
}

}  // namespace loadstone
