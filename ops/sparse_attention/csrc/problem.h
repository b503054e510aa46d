// What the loops are given, how they cut it into tasks, and which queries of a task see which block.
//
// Shape letters: T tokens, n queries (all of them, or a rank's), H heads, Hk key/value heads, G heads of a group, d head dimension, M blocks, r entries of a
// block, E = M * r entries, K selected blocks. d is a multiple of a vector's width.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "tiles.h"

namespace loadstone::attention {

// ops/sparse_attention/blocks.py BlockTable.
struct Table {
  int64_t num_queries, num_blocks;
  const int32_t *start, *end, *first, *sink_end, *local_start;  // [M]
  const int32_t* block_of;                                      // [n] of a query
  const int32_t* place;                                         // [n] tokens of the queries, rising; null: all tokens are

  int64_t token(int64_t query) const { return place ? place[query] : query; }
};

template <class Real>
struct Problem {
  Table table;
  int num_heads, kv_heads, group, dim;
  int block_size, entries_per_block, top_k;
  bool second_order, exact, coarse;
  Real scale, max_variance, log_size;
  const Real *q, *k, *v;                // [n, H, d], [T, Hk, d]
  const Real *bias, *sink;              // [n, H], [H]; null: none
  const int32_t* selected;              // [Hk, n, K]
  const Real *mean, *value, *variance;  // [Hk, E, d]; null: no coarse entry takes part

  int64_t num_entries() const { return table.num_blocks * entries_per_block; }
  const Real* query(int64_t number, int head) const { return q + (number * num_heads + head) * dim; }
};

// Memory at the start of a cache line.
template <class Real>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { resize(size); }
  // Contents are lost.
  void resize(int64_t size) {
    if (size <= size_) return;
    data_.reset((Real*)std::aligned_alloc(64, round_up(std::max<int64_t>(size, 1) * sizeof(Real), 64)));
    if (!data_) throw std::bad_alloc();
    size_ = size;
  }
  Real* data() const { return data_.get(); }
  Real& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free { void operator()(Real* p) const { std::free(p); } };
  std::unique_ptr<Real[], Free> data_;
  int64_t size_ = 0;
};

// Keys or values of one token a column, block by block: that of block m is [d, width(m)], for sums over d. Of null: none.
template <class Real>
struct BlockColumns {
  Buffer<Real> data;
  std::vector<int64_t> offset;  // [M + 1] columns before a block
  int64_t per_head = 0;
  int dim = 0;

  int width(int64_t block) const { return (int)(offset[block + 1] - offset[block]); }
  const Real* at(int head, int64_t block) const { return data.data() + (head * per_head + offset[block]) * dim; }

  template <class Parallel>
  BlockColumns(const Problem<Real>& p, const Real* from, const Parallel& parallel) : dim(p.dim) {
    if (!from) return;
    const Table& t = p.table;
    offset.assign(t.num_blocks + 1, 0);
    for (int64_t m = 0; m < t.num_blocks; ++m) offset[m + 1] = offset[m] + round_up(t.end[m] - t.start[m], WIDTH<Real>);
    per_head = offset[t.num_blocks];
    data.resize(per_head * p.kv_heads * dim);
    parallel(t.num_blocks * p.kv_heads, [&](int64_t task) {
      const int64_t m = task / p.kv_heads, head = task % p.kv_heads, stride = (int64_t)p.kv_heads * dim;
      transpose(from + t.start[m] * stride + head * dim, stride, t.end[m] - t.start[m], dim,
                data.data() + (head * per_head + offset[m]) * dim, width(m));
    });
  }
};

// Entries of whole blocks, about 64 to a tile.
struct EntryTiles {
  int blocks;   // of a tile
  int entries;  // of a tile
  int width;    // entries, rounded up to a vector
  explicit EntryTiles(int entries_per_block, int vector_width)
      : blocks(std::max(1, 64 / entries_per_block)), entries(blocks * entries_per_block), width((int)round_up(entries, vector_width)) {}
};

// One tensor of entries, an entry a column, tile by tile: [Hk, tiles, d, width]. Of null: none.
template <class Real>
struct EntryColumns {
  Buffer<Real> data;
  int64_t tiles = 0, size = 0;

  const Real* at(int head, int64_t tile) const { return data.data() + (head * tiles + tile) * size; }

  template <class Parallel>
  EntryColumns(const Problem<Real>& p, const EntryTiles& shape, const Real* from, const Parallel& parallel) {
    if (!from) return;
    tiles = (p.num_entries() + shape.entries - 1) / shape.entries;
    size = (int64_t)p.dim * shape.width;
    data.resize(tiles * size * p.kv_heads);
    parallel(tiles * p.kv_heads, [&](int64_t task) {
      const int64_t tile = task / p.kv_heads, head = task % p.kv_heads, first = tile * shape.entries;
      transpose(from + (head * p.num_entries() + first) * p.dim, p.dim, (int)std::min<int64_t>(shape.entries, p.num_entries() - first),
                p.dim, data.data() + (head * tiles + tile) * size, shape.width);
    });
  }
};

// Queries of a task: as many as make up `rows` rows with all heads of a group, and at least eight.
inline int task_queries(int rows, int group) { return std::max(8, rows / group); }

// For the queries [begin, end) of one key/value head: which blocks each sees token by token, sorted by block, and which
// candidates each has taken out of its tail, in rising order.
template <class Real>
class Lists {
 public:
  static constexpr int32_t SELECTED = 1 << 30;
  int64_t low = 0, high = 0;       // blocks that any query can see
  std::vector<int32_t> chosen;     // [queries, K] selected blocks, rising, then -1
  std::vector<int32_t> queries;    // of block m: [from(m), from(m + 1)), SELECTED where the block was not forced
  int64_t from(int64_t block) const { return begin_[block - low]; }

  void make(const Problem<Real>& p, int head, int64_t begin, int64_t end) {
    const Table& t = p.table;
    low = t.first[t.block_of[begin]];
    high = t.block_of[end - 1] + 1;
    const int k = p.exact ? p.top_k : 0;
    chosen.assign((end - begin) * std::max(k, 1), -1);
    for (int64_t i = begin; i < end && k > 0; ++i) {
      const int32_t* const given = p.selected + (head * t.num_queries + i) * k;
      int32_t* const row = chosen.data() + (i - begin) * k;
      int n = 0;
      for (int s = 0; s < k; ++s)
        if (given[s] >= 0) row[n++] = given[s];
      std::sort(row, row + n);
    }
    begin_.assign(high - low + 1, 0);
    queries.clear();
    if (!p.exact) return;
    each(p, begin, end, [&](int64_t block, int32_t) { ++begin_[block - low + 1]; });
    for (size_t m = 1; m < begin_.size(); ++m) begin_[m] += begin_[m - 1];
    queries.resize(begin_.back());
    next_.assign(begin_.begin(), begin_.end() - 1);
    each(p, begin, end, [&](int64_t block, int32_t query) { queries[next_[block - low]++] = query; });
  }

 private:
  std::vector<int64_t> begin_, next_;

  template <class Fn>
  void each(const Problem<Real>& p, int64_t begin, int64_t end, Fn fn) const {
    const Table& t = p.table;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t own = t.block_of[i], query = (int32_t)(i - begin);
      for (int32_t m = t.first[own]; m < t.sink_end[own]; ++m) fn(m, query);
      for (int s = 0; s < p.top_k && chosen[query * p.top_k + s] >= 0; ++s) fn(chosen[query * p.top_k + s], query | SELECTED);
      for (int32_t m = t.local_start[own]; m <= own; ++m) fn(m, query);
    }
  }
};

}  // namespace loadstone::attention
