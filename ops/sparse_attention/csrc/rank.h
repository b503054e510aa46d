// Which candidates a query would select: estimated mass over all of its complete past blocks, best first (README.md,
// Select).
#pragma once
#include "attend.h"

namespace loadstone::attention {

enum Score { PROB = 0, MAX = 1, ERROR_GAIN = 2 };

constexpr float LARGEST = 64;  // spec.py

// Whole super-blocks as blocks of one entry each, in a table of their own; the queries are the same.
template <class Real>
struct SuperBlocks {
  Problem<Real> p;
  Packed<Real> packed;
  int fanout;  // blocks of a super-block
};

struct Ranking {
  int top_k, score;
  float temperature, trust;
  int64_t first_head, num_heads;  // of the layer, on which the draws hang
  const int64_t* hashed;          // [n] noise.token_hash; null at temperature 0
  int64_t* keys;                  // [Hk, n, top_k]
  float* mass;                    // [Hk, n]
};

// noise.py: 32 bits of a draw, and the draw.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
inline float gumbel(uint32_t hashed, uint32_t counter) {
  const float u = ((float)(mix(hashed + counter) >> 9) + 0.5f) * 1.1920928955078125e-7f;
  return -std::log(-std::log(u));
}

// ranking.py rank_keys: order by value, then by lower block.
inline int64_t rank_key(float value, int64_t block) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const int64_t order = (int64_t)(bits < 0 ? bits ^ 0x7FFFFFFF : bits) + (int64_t(1) << 31);
  return order << 31 | (0x7FFFFFFF - block);
}

// The best so far, falling; equal values stay in the order they came in.
class Best {
 public:
  explicit Best(int size) : size_(size), value_(size), block_(size) {}
  void clear() { count_ = 0; }
  void offer(float value, int64_t block) {
    if (count_ == size_ && !(value > value_[count_ - 1])) return;
    int at = count_ < size_ ? count_++ : count_ - 1;
    for (; at > 0 && value > value_[at - 1]; --at) value_[at] = value_[at - 1], block_[at] = block_[at - 1];
    value_[at] = value, block_[at] = block;
  }
  int count() const { return count_; }
  int64_t key(int i) const { return rank_key(value_[i], block_[i]); }

 private:
  int size_, count_ = 0;
  std::vector<float> value_;
  std::vector<int64_t> block_;
};

// Of every row of the task, the running sum over the whole super-blocks in its query's past.
template <class Real>
void add_super_blocks(const Task<Real>& task, const SuperBlocks<Real>& supers) {
  constexpr int W = WIDTH<Real>;
  RankScratch<Real>& s = task.s.ranking;
  s.top.resize(task.rows), s.total.resize(task.rows);
  std::fill_n(s.top.data(), task.rows, NEVER<Real>);
  std::fill_n(s.total.data(), task.rows, (Real)0);

  // It takes the scratch of the task, which has not begun.
  Task<Real> above(supers.p, supers.packed, task.s, task.kv_head, task.begin, task.end);
  above.each_tile([](int64_t) {}, [&](int tile, const RowSet<Real>& set) {
    const int width = above.entry_logits(tile, set);
    for (int i = 0; i < set.count; ++i) {
      const Real* const z = task.s.pointer[0][i];
      Vector<Real> highest = load(z), sums = {};
      for (int x = W; x < width; x += W) highest = larger<Real>(highest, load(z + x));
      Real& top = s.top[set.row[i]];
      const Real before = top;
      top = std::max(top, maximum<Real>(highest));
      for (int x = 0; x < width; x += W) sums += exponential(load(z + x) - all(top));
      Real& total = s.total[set.row[i]];
      total = total * std::exp(before - top) + sum<Real>(sums);
    }
  });
}

// The problem has exact = false, so that its tail is all that is past. supers: null where shares have their true denominator.
template <class Real>
void rank_task(Task<Real>& task, const Ranking& ranking, const SuperBlocks<Real>* supers) {
  using V = Vector<Real>;
  constexpr int W = WIDTH<Real>;
  RankScratch<Real>& s = task.s.ranking;
  const Problem<Real>& p = task.p;
  const Table& t = p.table;
  const int width = task.packed.shape.width, step = task.packed.shape.blocks, r = p.entries_per_block;
  const int64_t line = ranking.top_k;

  // Which tiles the task's queries can reach, if any of them has a choice.
  int low = INT32_MAX, high = 0;
  bool chooses = false;
  for (int64_t i = task.begin; i < task.end; ++i) {
    const int own = t.block_of[i];
    chooses |= t.sink_end[own] < t.local_start[own];
    if (t.first[own] < own) low = std::min(low, t.first[own]), high = std::max(high, own);
    std::fill_n(ranking.keys + (task.kv_head * t.num_queries + i) * line, line, (int64_t)-1);
    ranking.mass[task.kv_head * t.num_queries + i] = 0;
  }
  if (!chooses) return;
  if (supers) add_super_blocks(task, *supers);
  const int first_tile = low / step, tiles = (high + step - 1) / step - first_tile;
  const int64_t row_size = (int64_t)tiles * width;
  s.logits.resize(row_size * task.rows), s.sums.resize(row_size);
  if (ranking.score == ERROR_GAIN) s.kappa.resize(row_size * task.rows);
  s.values.resize(round_up((int64_t)tiles * step, WIDTH<float>)), s.mass.resize(round_up((int64_t)tiles * step, WIDTH<float>));

  // Rows that do not reach a tile have nothing there.
  for (int64_t x = 0; x < row_size * task.rows; x += W) store(&s.logits[x], all(NEVER<Real>));
  task.each_tile([](int64_t) {}, [&](int tile, const RowSet<Real>& set) {
    task.entry_logits(tile, set);
    for (int i = 0; i < set.count; ++i) {
      const int64_t at = set.row[i] * row_size + (int64_t)(tile - first_tile) * width;
      std::copy_n(task.s.pointer[0][i], width, &s.logits[at]);
      if (ranking.score == ERROR_GAIN) std::copy_n(task.s.pointer[1][i], width, &s.kappa[at]);
    }
  });

  Best best(ranking.top_k);
  for (int64_t i = task.begin; i < task.end; ++i) {
    const int own = t.block_of[i], from = t.sink_end[own], to = t.local_start[own];
    if (from >= to) continue;
    const int64_t first_row = (i - task.begin) * p.group;
    for (int64_t x = 0; x < row_size; x += W) store(&s.sums[x], V{});
    float* const values = s.values.data() - (int64_t)first_tile * step;  // by block
    float* const mass = s.mass.data() - (int64_t)first_tile * step;

    const auto by_block = [&](const Real* row, auto fn) {  // fn(block, its r entries)
      for (int tile = 0; tile < tiles; ++tile)
        for (int b = 0; b < step; ++b) {
          const int64_t block = (int64_t)(first_tile + tile) * step + b;
          if (block >= from && block < to) fn(block, row + (int64_t)tile * width + b * r);
        }
    };
    // Log-sum-exp of `top` with its sum `total` and of the blocks [low, high).
    const auto with_single = [&](const Real* row, int64_t low, int64_t high, Real top, Real total) {
      const auto entries = [&](int64_t block) { return row + (block / step - first_tile) * width + block % step * r; };
      const Real before = top;
      for (int64_t block = low; block < high; ++block)
        for (int e = 0; e < r; ++e) top = std::max(top, entries(block)[e]);
      total *= std::exp(before - top);
      for (int64_t block = low; block < high; ++block)
        for (int e = 0; e < r; ++e) total += std::exp(entries(block)[e] - top);
      return top + std::log(total);
    };
    if (ranking.score == MAX) std::fill_n(values + from, to - from, NEVER<float>);

    // Probabilities of every head, added up over the group.
    for (int g = 0; g < p.group; ++g) {
      Real* const row = &s.logits[(first_row + g) * row_size];
      if (ranking.score == MAX)
        by_block(row, [&](int64_t block, const Real* z) {
          const Real top = *std::max_element(z, z + r);
          Real total = 0;
          for (int e = 0; e < r; ++e) total += std::exp(z[e] - top);
          values[block] = std::max(values[block], (float)(top + std::log(total)));
        });
      if (supers) {
        // The estimate needs no sum over the row: super-blocks, and the blocks behind the last whole one.
        const Table& above = supers->p.table;
        const int64_t whole = above.block_of[i] - above.first[above.block_of[i]];
        const Real denominator = with_single(row, t.first[own] + whole * supers->fanout, own, s.top[first_row + g], s.total[first_row + g]);
        const V lse = all(denominator), most = all((Real)LARGEST);
        for (int64_t x = 0; x < row_size; x += W) {
          const V probs = exponential(smaller<Real>(load(row + x) - lse, most));
          store(row + x, probs);
          store(&s.sums[x], load(&s.sums[x]) + probs);
        }
        continue;
      }
      V highest = load(row), total = {};
      for (int64_t x = W; x < row_size; x += W) highest = larger<Real>(highest, load(row + x));
      const V top = all(maximum<Real>(highest));
      for (int64_t x = 0; x < row_size; x += W) {
        const V weight = exponential(load(row + x) - top);
        total += weight;
        store(row + x, weight);
      }
      const V share = all((Real)1 / sum<Real>(total));
      for (int64_t x = 0; x < row_size; x += W) {
        const V probs = load(row + x) * share;
        store(row + x, probs);
        store(&s.sums[x], load(&s.sums[x]) + probs);
      }
    }
    Real candidates = 0;
    by_block(s.sums.data(), [&](int64_t block, const Real* probs) {
      Real total = 0;
      for (int e = 0; e < r; ++e) total += probs[e];
      mass[block] = (float)total;
      candidates += total;
    });
    ranking.mass[task.kv_head * t.num_queries + i] = (float)candidates;

    // Rank values: logarithms of scores.
    const float* scores = mass;
    if (ranking.score == ERROR_GAIN) {
      std::fill_n(values + from, to - from, 0.0f);
      for (int g = 0; g < p.group; ++g) {
        const int64_t row = (first_row + g) * row_size;
        by_block(&s.logits[row], [&](int64_t block, const Real* probs) {
          const Real* const kappa = &s.kappa[row] + (probs - &s.logits[row]);
          Real total = 0;
          for (int e = 0; e < r; ++e) total += probs[e] * (1 - std::exp(-std::min(kappa[e], p.max_variance)) + (Real)ranking.trust);
          values[block] += (float)total;
        });
      }
      scores = values;
    }
    if (ranking.score != MAX)
      for (int64_t m = from; m < to; m += WIDTH<float>) {
        FloatVector some = {};
        const int count = (int)std::min<int64_t>(WIDTH<float>, to - m);
        std::memcpy(&some, scores + m, count * sizeof(float));
        some = logarithm(larger<float>(some, all(std::numeric_limits<float>::min())));
        std::memcpy(values + m, &some, count * sizeof(float));
      }
    if (ranking.hashed)
      for (int64_t m = from; m < to; ++m) {
        const int64_t counter = 1 + (m - t.first[own]) * ranking.num_heads + ranking.first_head + task.kv_head;
        values[m] += ranking.temperature * gumbel((uint32_t)ranking.hashed[i], (uint32_t)counter);
      }

    best.clear();
    for (int64_t m = from; m < to; ++m) best.offer(values[m], m);
    int64_t* const keys = ranking.keys + (task.kv_head * t.num_queries + i) * line;
    for (int n = 0; n < best.count(); ++n) keys[n] = best.key(n);
  }
}

}  // namespace loadstone::attention
