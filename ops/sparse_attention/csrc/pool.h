// Tokens to coarse entries and back: means and elementwise variance (README.md, Definition and Backward).
#pragma once
#include "problem.h"

namespace loadstone::attention {

template <class Real>
struct Pooling {
  Table table;
  int kv_heads, dim, block_size, entries_per_block;
  const Real *k, *v;  // [T, Hk, d]

  int size() const { return block_size / entries_per_block; }
  bool complete(int64_t block) const { return table.end[block] - table.start[block] == block_size; }
  // Offset of an entry in [Hk, E, d].
  int64_t entry(int head, int64_t block, int e) const {
    return ((head * table.num_blocks + block) * entries_per_block + e) * dim;
  }
};

// mean, value, variance: [Hk, E, d]; zeros for blocks that are not complete.
template <class Real>
void pool_block(const Pooling<Real>& p, int head, int64_t block, Real* mean, Real* value, Real* variance) {
  using V = Vector<Real>;
  const int64_t stride = (int64_t)p.kv_heads * p.dim;
  const bool complete = p.complete(block);
  const V share = all((Real)1 / p.size());
  for (int e = 0; e < p.entries_per_block; ++e) {
    const int64_t to = p.entry(head, block, e), from = (p.table.start[block] + e * p.size()) * stride + head * p.dim;
    for (int x = 0; x < p.dim; x += WIDTH<Real>) {
      V keys = {}, values = {}, squares = {};
      if (complete) {
        const Real *k = p.k + from + x, *v = p.v + from + x;
        for (int i = 0; i < p.size(); ++i) keys += load(k + i * stride), values += load(v + i * stride);
        keys *= share, values *= share;
        for (int i = 0; i < p.size(); ++i) {
          const V apart = load(k + i * stride) - keys;
          squares = fma(apart, apart, squares);
        }
      }
      store(mean + to + x, keys), store(value + to + x, values), store(variance + to + x, squares * share);
    }
  }
}

// Adds to dk and dv what reached a block's entries; dvariance comes `scale` times too large.
template <class Real>
void pool_backward_block(const Pooling<Real>& p, int head, int64_t block, const Real* mean, const Real* dmean, const Real* dvalue,
                         const Real* dvariance, Real scale, Real* dk, Real* dv) {
  using V = Vector<Real>;
  if (!p.complete(block)) return;
  const int64_t stride = (int64_t)p.kv_heads * p.dim;
  const V share = all((Real)1 / p.size()), twice = all((Real)2 / (scale * p.size()));
  for (int e = 0; e < p.entries_per_block; ++e) {
    const int64_t of = p.entry(head, block, e), at = (p.table.start[block] + e * p.size()) * stride + head * p.dim;
    for (int x = 0; x < p.dim; x += WIDTH<Real>) {
      const V middle = load(mean + of + x), keys = load(dmean + of + x) * share, values = load(dvalue + of + x) * share,
              slope = load(dvariance + of + x) * twice;
      for (int64_t i = at + x; i < at + x + p.size() * stride; i += stride) {
        store(dk + i, load(dk + i) + fma(load(p.k + i) - middle, slope, keys));
        store(dv + i, load(dv + i) + values);
      }
    }
  }
}

}  // namespace loadstone::attention
