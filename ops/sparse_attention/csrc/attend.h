// One softmax over tokens and coarse entries, forward and backward (README.md, Definition and Backward). A task is a run
// of queries of one key/value head; it walks its tiles of entries and then its blocks in rising order.
#pragma once
#include <atomic>
#include <thread>

#include "problem.h"

namespace loadstone::attention {

constexpr int TASK_ROWS = 512;  // their outputs and gradients stay in a core's own cache
constexpr int ROWS = 72;        // of a product

// Keys and entries a column each; values stay where they are.
template <class Real>
struct Packed {
  EntryTiles shape;
  BlockColumns<Real> keys;
  EntryColumns<Real> mean, variance;

  // with_tokens: whether the tokens of blocks take part.
  template <class Parallel>
  Packed(const Problem<Real>& p, bool with_tokens, const Parallel& parallel)
      : shape(p.entries_per_block, WIDTH<Real>),
        keys(p, with_tokens ? p.k : nullptr, parallel),
        mean(p, shape, p.coarse ? p.mean : nullptr, parallel),
        variance(p, shape, p.coarse && p.second_order ? p.variance : nullptr, parallel) {}
};

// Rows of one product. For row i: its query's place in the task, its own place there, how many tokens of the block it sees,
// its token and its head, and whether it selected the block.
template <class Real>
struct RowSet {
  int count = 0;
  int query[ROWS], row[ROWS], seen[ROWS];
  int64_t token[ROWS];
  int head[ROWS];
  bool selected[ROWS];
  const Real* q[ROWS];
};

// Room for the logits of a task's rows with all entries in reach, and for one value a block (rank.h).
template <class Real>
struct RankScratch {
  Buffer<Real> logits, kappa;  // [rows, tiles * width]
  Buffer<Real> sums;           // [tiles * width]
  Buffer<Real> top, total;     // [rows] of a running softmax over super-blocks
  Buffer<float> values, mass;  // [blocks in reach]
};

// What a task knows of its rows, and room for its products.
template <class Real>
struct Scratch {
  Lists<Real> lists;
  RowSet<Real> rows;
  Buffer<Real> top, mass, tail, near;   // [rows] of the running softmax
  Buffer<Real> squares;                 // [rows, d] 0.5 scale^2 q o q
  Buffer<Real> extra;                   // [rows, d] sum of dkappa D
  Buffer<Real> lse, delta, shift;       // [rows]
  Buffer<Real> tile[3];                 // [ROWS, width]
  std::vector<int> cursor;              // [queries] of `chosen`
  Real* pointer[3][ROWS];
  RankScratch<Real> ranking;
};

template <class Real>
class Task {
 public:
  const Problem<Real>& p;
  const Packed<Real>& packed;
  Scratch<Real>& s;
  const int kv_head;
  const int64_t begin, end;
  const int queries, rows;

  Task(const Problem<Real>& p, const Packed<Real>& packed, Scratch<Real>& s, int kv_head, int64_t begin, int64_t end)
      : p(p), packed(packed), s(s), kv_head(kv_head), begin(begin), end(end), queries((int)(end - begin)), rows(queries * p.group) {
    s.lists.make(p, kv_head, begin, end);
    const int width = std::max<int>(packed.shape.width, (int)round_up(p.block_size, WIDTH<Real>));
    for (Buffer<Real>& t : s.tile) t.resize((int64_t)ROWS * width);
    if (p.coarse && p.second_order) {
      s.squares.resize((int64_t)rows * p.dim);
      const Vector<Real> half = all((Real)0.5 * p.scale * p.scale);
      each_row([&](int row, int64_t token, int head) {
        const Real* const q = p.query(token, head);
        for (int x = 0; x < p.dim; x += WIDTH<Real>) {
          const Vector<Real> value = load(q + x);
          store(&s.squares[(int64_t)row * p.dim + x], value * value * half);
        }
      });
    }
  }

  int head_of(int in_group) const { return kv_head * p.group + in_group; }
  const Real* squares(int row) const { return s.squares.data() + (int64_t)row * p.dim; }

  template <class Fn>
  void each_row(Fn fn) const {
    for (int i = 0; i < queries; ++i)
      for (int g = 0; g < p.group; ++g) fn(i * p.group + g, begin + i, head_of(g));
  }

  // First and last block whose entries may be in the tail of a query.
  std::pair<int, int> tail_range(int64_t token) const {
    const Table& t = p.table;
    const int own = t.block_of[token];
    return p.exact ? std::pair{t.sink_end[own], t.local_start[own]} : std::pair{t.first[own], own};
  }

  // f(tile, rows) for every tile of entries and every set of rows that may see some of it.
  template <class Before, class Fn>
  void each_tile(Before before, Fn fn) {
    if (!p.coarse) return;
    const int step = packed.shape.blocks;
    int low = INT32_MAX, high = 0;
    for (int i = 0; i < queries; ++i) {
      const auto [from, to] = tail_range(begin + i);
      if (from < to) low = std::min(low, from), high = std::max(high, to);
    }
    s.cursor.assign(queries, 0);
    for (int tile = low < high ? low / step : 0; tile * step < high; ++tile) {
      before(tile);
      s.rows.count = 0;
      for (int i = 0; i < queries; ++i) {
        const auto [from, to] = tail_range(begin + i);
        if (std::max(from, tile * step) >= std::min(to, (tile + 1) * step)) continue;
        for (int g = 0; g < p.group; ++g) {
          add(i, g, 0, false);
          if (s.rows.count == ROWS) fn(tile, s.rows), s.rows.count = 0;
        }
      }
      if (s.rows.count) fn(tile, s.rows);
    }
  }

  // f(block, rows) for every block and every set of rows that see its tokens.
  template <class Before, class Fn>
  void each_block(Before before, Fn fn) {
    if (!p.exact) return;
    const Table& t = p.table;
    for (int64_t m = s.lists.low; m < s.lists.high; ++m) {
      const int64_t from = s.lists.from(m), to = s.lists.from(m + 1);
      if (from == to) continue;
      before(m);
      s.rows.count = 0;
      for (int64_t at = from; at < to; ++at) {
        const int query = s.lists.queries[at] & ~Lists<Real>::SELECTED;
        const int seen = (int)std::min<int64_t>(t.end[m] - t.start[m], t.token(begin + query) - t.start[m] + 1);
        for (int g = 0; g < p.group; ++g) {
          add(query, g, seen, s.lists.queries[at] & Lists<Real>::SELECTED);
          if (s.rows.count == ROWS) fn(m, s.rows), s.rows.count = 0;
        }
      }
      if (s.rows.count) fn(m, s.rows);
    }
  }

  // Logits of a set of rows with the tokens of a block, in tile 0.
  int token_logits(int64_t block, const RowSet<Real>& set) {
    using V = Vector<Real>;
    constexpr int W = WIDTH<Real>;
    const int width = packed.keys.width(block);
    point(0, width, set.count);
    product(set.q, set.count, p.dim, packed.keys.at(kv_head, block), width, width, s.pointer[0], false);
    const V scale = all(p.scale), never = all(NEVER<Real>), place = lanes<Real>();
    for (int i = 0; i < set.count; ++i) {
      Real* const z = s.pointer[0][i];
      for (int x = 0; x < width; x += W) {
        const V value = load(z + x) * scale;
        store(z + x, x + W <= set.seen[i] ? value : place < all((Real)(set.seen[i] - x)) ? value : never);
      }
    }
    return width;
  }

  // Logits of a set of rows with a tile of entries, in tile 0, and their variance terms, in tile 1.
  int entry_logits(int tile, const RowSet<Real>& set) {
    using V = Vector<Real>;
    constexpr int W = WIDTH<Real>;
    const int width = packed.shape.width, r = p.entries_per_block, step = packed.shape.blocks, first = tile * step;
    point(0, width, set.count);
    product(set.q, set.count, p.dim, packed.mean.at(kv_head, tile), width, width, s.pointer[0], false);
    if (p.second_order) {
      const Real* squared[ROWS];
      for (int i = 0; i < set.count; ++i) squared[i] = squares(set.row[i]);
      point(1, width, set.count);
      product(squared, set.count, p.dim, packed.variance.at(kv_head, tile), width, width, s.pointer[1], false);
    }
    for (int i = 0; i < set.count; ++i) {
      Real* const z = s.pointer[0][i];
      const Real bias = p.bias ? p.bias[set.token[i] * p.num_heads + set.head[i]] : 0;
      const V scale = all(p.scale), size = all(p.log_size), shift = all(bias), most = all(p.max_variance);
      for (int x = 0; x < width; x += W) {
        V value = load(z + x) * scale;
        if (p.second_order) value += smaller<Real>(load(s.pointer[1][i] + x), most);
        store(z + x, value + size + shift);
      }
      // What the query may not see pooled: blocks out of its range, and those it selected.
      const auto [from, to] = tail_range(set.token[i]);
      if (from > first) hide(z, 0, (from - first) * r);
      hide(z, std::max(0, std::min(to - first, step)) * r, width);
      if (p.exact && p.top_k > 0) {
        const int32_t* const chosen = s.lists.chosen.data() + (int64_t)set.query[i] * p.top_k;
        int at = s.cursor[set.query[i]];
        while (at < p.top_k && chosen[at] >= 0 && chosen[at] < first) ++at;
        s.cursor[set.query[i]] = at;
        for (; at < p.top_k && chosen[at] >= 0 && chosen[at] < first + step; ++at) hide(z, (chosen[at] - first) * r, (chosen[at] - first + 1) * r);
      }
    }
    return width;
  }

  // Entries of a tile that exist.
  int entries_of(int tile) const { return (int)std::min<int64_t>(packed.shape.entries, p.num_entries() - (int64_t)tile * packed.shape.entries); }

  void point(int which, int width, int count) {
    for (int i = 0; i < count; ++i) s.pointer[which][i] = s.tile[which].data() + (int64_t)i * width;
  }

 private:
  void add(int query, int in_group, int seen, bool selected) {
    RowSet<Real>& set = s.rows;
    const int i = set.count++;
    set.query[i] = query;
    set.row[i] = query * p.group + in_group;
    set.token[i] = begin + query;
    set.head[i] = head_of(in_group);
    set.seen[i] = seen;
    set.selected[i] = selected;
    set.q[i] = p.query(set.token[i], set.head[i]);
  }
  static void hide(Real* z, int from, int to) {
    for (int x = from; x < to; ++x) z[x] = NEVER<Real>;
  }
};

template <class Real>
struct Attended {
  Real *out, *lse, *tail_mass, *selected_mass;  // [n, H, d], [n, H] each
};

// The running softmax takes in the logits of tile 0: they become probabilities under the row's new maximum, and what the
// row has so far shrinks by exp(old - new).
template <class Real>
void soften(Task<Real>& task, const RowSet<Real>& set, int width, bool pooled, Real* const* out) {
  using V = Vector<Real>;
  constexpr int W = WIDTH<Real>;
  Scratch<Real>& s = task.s;
  for (int i = 0; i < set.count; ++i) {
    Real* const z = s.pointer[0][i];
    V best = load(z);
    for (int x = W; x < width; x += W) best = larger<Real>(best, load(z + x));
    const int row = set.row[i];
    const Real old = s.top[row], highest = maximum<Real>(best), top = old > highest ? old : highest;
    if (top == NEVER<Real>) {  // nothing to see yet
      for (int x = 0; x < width; x += W) store(z + x, V{});
      continue;
    }
    V total = {};
    const V against = all(top);
    for (int x = 0; x < width; x += W) {
      const V weight = exponential(load(z + x) - against);
      total += weight;
      store(z + x, weight);
    }
    if (top > old) {
      const Real shrink = exponential_of(old - top);
      s.top[row] = top;
      s.mass[row] *= shrink, s.tail[row] *= shrink, s.near[row] *= shrink;
      for (int x = 0; x < task.p.dim; x += W) store(out[i] + x, load(out[i] + x) * all(shrink));
    }
    const Real mass = sum<Real>(total);
    s.mass[row] += mass;
    if (pooled) s.tail[row] += mass;
    if (set.selected[i]) s.near[row] += mass;
  }
}

template <class Real>
void attend_task(Task<Real>& task, const Attended<Real>& to) {
  constexpr int W = WIDTH<Real>;
  const Problem<Real>& p = task.p;
  Scratch<Real>& s = task.s;
  for (Buffer<Real>* b : {&s.top, &s.mass, &s.tail, &s.near}) b->resize(task.rows);
  const auto out_of = [&](int64_t token, int head) { return to.out + (token * p.num_heads + head) * p.dim; };
  task.each_row([&](int row, int64_t token, int head) {
    s.top[row] = NEVER<Real>;
    s.mass[row] = s.tail[row] = s.near[row] = 0;
    std::fill_n(out_of(token, head), p.dim, (Real)0);
  });

  Real* out[ROWS];
  const auto none = [](int64_t) {};
  task.each_tile(none, [&](int tile, const RowSet<Real>& set) {
    for (int i = 0; i < set.count; ++i) out[i] = out_of(set.token[i], set.head[i]);
    soften(task, set, task.entry_logits(tile, set), true, out);
    const int64_t first = task.kv_head * p.num_entries() + (int64_t)tile * task.packed.shape.entries;
    product<Real>(s.pointer[0], set.count, task.entries_of(tile), p.value + first * p.dim, p.dim, p.dim, out, true);
  });
  task.each_block(none, [&](int64_t block, const RowSet<Real>& set) {
    for (int i = 0; i < set.count; ++i) out[i] = out_of(set.token[i], set.head[i]);
    soften(task, set, task.token_logits(block, set), false, out);
    const int64_t start = p.table.start[block], stride = (int64_t)p.kv_heads * p.dim;
    product<Real>(s.pointer[0], set.count, (int)(p.table.end[block] - start), p.v + start * stride + task.kv_head * p.dim, stride, p.dim, out, true);
  });

  // The sink has a logit but no value: it widens the denominator and shrinks the rest.
  task.each_row([&](int row, int64_t token, int head) {
    const int64_t at = token * p.num_heads + head;
    Real top = s.top[row], mass = s.mass[row], kept = 1;
    if (p.sink) {
      const Real sink = p.sink[head];
      if (sink > top) {
        kept = top == NEVER<Real> ? 0 : std::exp(top - sink);
        top = sink;
        mass = mass * kept + 1;
      } else if (top != NEVER<Real>) {
        mass += std::exp(sink - top);
      }
    }
    const Real share = mass == 0 ? 0 : kept / mass;
    to.lse[at] = mass == 0 ? NEVER<Real> : top + std::log(mass);
    to.tail_mass[at] = s.tail[row] * share;
    to.selected_mass[at] = s.near[row] * share;
    Real* const o = out_of(token, head);
    for (int x = 0; x < p.dim; x += W) store(o + x, load(o + x) * all(share));
  });
}

template <class Real>
struct Gradients {
  const Real *out, *lse, *dout, *dlse;  // of the forward pass, and what reached it; dlse may be null
  Real *dq, *dk, *dv;                   // [n, H, d], [T, Hk, d], zeros at first
  Real *dbias, *delta;                  // [n, H]; dbias null without a bias
  Real *dmean, *dvalue, *dvariance;     // [Hk, E, d], zeros at first; null without entries
};

// Tasks of one key/value head add to the same keys. They do so in their order, so that sums have the same bits whatever
// the number of threads: a task may touch place n once all tasks before it have left everything up to n behind. Places
// rise within a task, and a task says how far it is only of those before it too, so that its neighbour's word is enough.
class Turns {
 public:
  explicit Turns(int64_t tasks) : left_(new std::atomic<int64_t>[tasks + 1]) {
    for (int64_t i = 0; i <= tasks; ++i) left_[i].store(i == 0 ? DONE : -1, std::memory_order_relaxed);
  }
  // Task `task` is about to touch `place`, and has left all places below.
  void wait(int64_t task, int64_t place) {
    for (int spins = 0; left_[task].load(std::memory_order_acquire) <= place; ++spins) {
      if (abandoned_.load(std::memory_order_relaxed)) return;
      if (spins > 64) std::this_thread::yield();
    }
    left_[task + 1].store(place, std::memory_order_release);
  }
  // A task has failed, for want of memory: nobody is to wait for it.
  void abandon() { abandoned_.store(true); }
  void finish(int64_t task) { wait(task, DONE - 1), left_[task + 1].store(DONE, std::memory_order_release); }

 private:
  static constexpr int64_t DONE = INT64_MAX;
  std::atomic<bool> abandoned_{false};
  std::unique_ptr<std::atomic<int64_t>[]> left_;  // [tasks + 1]; task i reads i and writes i + 1
};

template <class Real>
void attend_backward_task(Task<Real>& task, const BlockColumns<Real>& values, const EntryColumns<Real>& pooled_values,
                          const Gradients<Real>& g, Turns& turns, int64_t turn) {
  using V = Vector<Real>;
  constexpr int W = WIDTH<Real>;
  const Problem<Real>& p = task.p;
  Scratch<Real>& s = task.s;
  s.lse.resize(task.rows), s.delta.resize(task.rows), s.shift.resize(task.rows);
  const bool with_variance = p.coarse && p.second_order;
  if (with_variance) {
    s.extra.resize((int64_t)task.rows * p.dim);
    std::fill_n(s.extra.data(), (int64_t)task.rows * p.dim, (Real)0);
  }
  // delta is what the softmax's own derivative takes off every logit: dz = p (dp - delta). A row without any entry has
  // lse = -inf; +inf makes all its probabilities zero.
  task.each_row([&](int row, int64_t token, int head) {
    const int64_t at = token * p.num_heads + head;
    V total = {};
    for (int x = 0; x < p.dim; x += W) total = fma(load(g.out + at * p.dim + x), load(g.dout + at * p.dim + x), total);
    g.delta[at] = s.delta[row] = sum<Real>(total) - (g.dlse ? g.dlse[at] : 0);
    s.lse[row] = g.lse[at] == NEVER<Real> ? -NEVER<Real> : g.lse[at];
    s.shift[row] = 0;
  });

  const Real* dout[ROWS];
  Real* dq[ROWS];
  const auto gather = [&](const RowSet<Real>& set) {
    for (int i = 0; i < set.count; ++i) {
      const int64_t at = (set.token[i] * p.num_heads + set.head[i]) * p.dim;
      dout[i] = g.dout + at, dq[i] = g.dq + at;
    }
  };
  // Tile 0 holds logits and tile 2 dp; they become probabilities and scale * dz. Returns sums of dz to `shift`.
  const auto differentiate = [&](const RowSet<Real>& set, int width, bool sums) {
    const V scale = all(p.scale);
    for (int i = 0; i < set.count; ++i) {
      Real *const z = s.pointer[0][i], *const dp = s.pointer[2][i];
      const V lse = all(s.lse[set.row[i]]), delta = all(s.delta[set.row[i]]);
      V total = {};
      for (int x = 0; x < width; x += W) {
        const V weight = exponential(load(z + x) - lse), dz = weight * (load(dp + x) - delta);
        store(z + x, weight);
        store(dp + x, dz * scale);
        total += dz;
      }
      if (sums) s.shift[set.row[i]] += sum<Real>(total);
    }
  };

  const int64_t stride = (int64_t)p.kv_heads * p.dim;
  task.each_tile([&](int64_t tile) { turns.wait(turn, tile); }, [&](int tile, const RowSet<Real>& set) {
    gather(set);
    const int width = task.entry_logits(tile, set), entries = task.entries_of(tile);
    task.point(2, width, set.count);
    product<Real>(dout, set.count, p.dim, pooled_values.at(task.kv_head, tile), width, width, s.pointer[2], false);
    differentiate(set, width, p.bias != nullptr);
    const int64_t first = (task.kv_head * p.num_entries() + (int64_t)tile * task.packed.shape.entries) * p.dim;
    const Real* const weights = s.tile[0].data();
    Real* const dz = s.tile[2].data();
    transposed_product<Real>(weights, width, set.count, dout, entries, p.dim, g.dvalue + first, p.dim);
    product<Real>(s.pointer[2], set.count, entries, p.mean + first, p.dim, p.dim, dq, true);
    transposed_product<Real>(dz, width, set.count, set.q, entries, p.dim, g.dmean + first, p.dim);
    if (!p.second_order) return;

    // The variance term adds nothing where it was cut at max_variance. Its dz carries the scale once, which the last
    // factors make good.
    Real* extra[ROWS];
    const Real* squared[ROWS];
    const V most = all(p.max_variance);
    for (int i = 0; i < set.count; ++i) {
      extra[i] = s.extra.data() + (int64_t)set.row[i] * p.dim;
      squared[i] = task.squares(set.row[i]);
      Real *const kappa = s.pointer[1][i], *const d = s.pointer[2][i];
      for (int x = 0; x < width; x += W) store(d + x, load(kappa + x) < most ? load(d + x) : V{});
    }
    product<Real>(s.pointer[2], set.count, entries, p.variance + first, p.dim, p.dim, extra, true);
    transposed_product<Real>(dz, width, set.count, squared, entries, p.dim, g.dvariance + first, p.dim);
  });

  // Places of blocks follow those of all tiles.
  const int64_t tiles = p.num_entries() + 1;
  task.each_block([&](int64_t block) { turns.wait(turn, tiles + block); }, [&](int64_t block, const RowSet<Real>& set) {
    gather(set);
    const int width = task.token_logits(block, set), tokens = (int)(p.table.end[block] - p.table.start[block]);
    task.point(2, width, set.count);
    product<Real>(dout, set.count, p.dim, values.at(task.kv_head, block), width, width, s.pointer[2], false);
    differentiate(set, width, false);
    const int64_t at = p.table.start[block] * stride + task.kv_head * p.dim;
    transposed_product<Real>(s.tile[0].data(), width, set.count, dout, tokens, p.dim, g.dv + at, stride);
    product<Real>(s.pointer[2], set.count, tokens, p.k + at, stride, p.dim, dq, true);
    transposed_product<Real>(s.tile[2].data(), width, set.count, set.q, tokens, p.dim, g.dk + at, stride);
  });
  turns.finish(turn);

  task.each_row([&](int row, int64_t token, int head) {
    const int64_t at = token * p.num_heads + head;
    if (g.dbias) g.dbias[at] = s.shift[row];
    if (!with_variance) return;
    const V scale = all(p.scale);
    Real *const to = g.dq + at * p.dim, *const from = s.extra.data() + (int64_t)row * p.dim;
    const Real* const q = p.query(token, head);
    for (int x = 0; x < p.dim; x += W) store(to + x, fma(load(from + x) * scale, load(q + x), load(to + x)));
  });
}

}  // namespace loadstone::attention
