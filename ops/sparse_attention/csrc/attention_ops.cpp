// Dispatcher ops over torch's stable ABI, of the CPU alone. Outputs are tensors that the caller made
// (ops/sparse_attention/cpp_backend.py).
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "pool.h"
#include "rank.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace loadstone::attention;

template <class T>
T* pointer(const MaybeTensor& t) { return t.has_value() ? (T*)t->data_ptr() : nullptr; }
template <class T>
T* pointer(const Tensor& t) { return (T*)t.data_ptr(); }

// f(worker, next) on torch's threads; next(task) gives every worker the next task that nobody has, in order.
constexpr int MAX_WORKERS = 256;
template <class Fn>
void in_turn(int64_t tasks, Fn fn) {
  const int64_t workers = std::min<int64_t>({tasks, MAX_WORKERS, (int64_t)torch::stable::get_num_threads()});
  std::atomic<int64_t> taken{0};
  const auto next = [&](int64_t& task) { return (task = taken.fetch_add(1)) < tasks; };
  if (tasks > 0)
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) fn(next);
    });
}
const auto each = [](int64_t tasks, auto fn) {
  in_turn(tasks, [&](auto next) {
    for (int64_t task; next(task);) fn(task);
  });
};

Table read_table(const std::vector<Tensor>& t) {
  const int32_t* const place = t.size() > 6 ? pointer<int32_t>(t[6]) : nullptr;
  return {t[5].size(0),           t[0].size(0),           pointer<int32_t>(t[0]), pointer<int32_t>(t[1]), pointer<int32_t>(t[2]),
          pointer<int32_t>(t[3]), pointer<int32_t>(t[4]), pointer<int32_t>(t[5]), place};
}

// The order of cpp_backend.py _settings.
template <class Real>
Problem<Real> read_problem(const Tensor& q, int64_t kv_heads, const std::vector<Tensor>& table, const std::vector<int64_t>& n,
                           const std::vector<double>& x) {
  Problem<Real> p{};
  p.table = read_table(table);
  p.num_heads = (int)q.size(1), p.kv_heads = (int)kv_heads, p.group = p.num_heads / p.kv_heads, p.dim = (int)q.size(2);
  p.block_size = (int)n[0], p.entries_per_block = (int)n[1], p.second_order = n[2] == 2;
  p.exact = n[3], p.coarse = n[4];
  p.scale = (Real)x[0], p.max_variance = (Real)x[1], p.log_size = (Real)x[2];
  p.q = pointer<Real>(q);
  STD_TORCH_CHECK(p.dim % WIDTH<Real> == 0, "head_dim ", p.dim, " is not a multiple of ", WIDTH<Real>);
  return p;
}

template <class Fn>
void by_type(const Tensor& q, Fn fn) {
  if (q.scalar_type() == ScalarType::Double) fn((double)0);
  else fn((float)0);
}

// Tasks of all key/value heads side by side: f(task) with a task's scratch, `turn` counts those of its head.
// `failed` is called before an exception leaves a worker.
template <class Real, class Fn, class Failed = void (*)()>
void each_task(const Problem<Real>& p, const Packed<Real>& packed, int queries, Fn fn, Failed failed = [] {}) {
  const int64_t runs = (p.table.num_queries + queries - 1) / queries;
  in_turn(runs * p.kv_heads, [&](auto next) {
    Scratch<Real> scratch;
    for (int64_t id; next(id);) {
      const int64_t run = id / p.kv_heads, begin = run * queries;
      try {
        Task<Real> task(p, packed, scratch, (int)(id % p.kv_heads), begin, std::min(begin + queries, p.table.num_queries));
        fn(task, run);
      } catch (...) {
        failed();
        throw;
      }
    }
  });
}

void pool(Tensor k, Tensor v, std::vector<Tensor> table, std::vector<int64_t> settings, Tensor mean, Tensor value, Tensor variance) {
  by_type(k, [&](auto zero) {
    using Real = decltype(zero);
    const Pooling<Real> p{read_table(table), (int)k.size(1), (int)k.size(2), (int)settings[0], (int)settings[1], pointer<Real>(k), pointer<Real>(v)};
    each(p.table.num_blocks * p.kv_heads, [&](int64_t task) {
      pool_block(p, (int)(task % p.kv_heads), task / p.kv_heads, pointer<Real>(mean), pointer<Real>(value), pointer<Real>(variance));
    });
  });
}

void pool_backward(Tensor k, Tensor v, std::vector<Tensor> table, std::vector<int64_t> settings, double scale, Tensor mean, Tensor dmean,
                   Tensor dvalue, Tensor dvariance, Tensor dk, Tensor dv) {
  by_type(k, [&](auto zero) {
    using Real = decltype(zero);
    const Pooling<Real> p{read_table(table), (int)k.size(1), (int)k.size(2), (int)settings[0], (int)settings[1], pointer<Real>(k), pointer<Real>(v)};
    each(p.table.num_blocks * p.kv_heads, [&](int64_t task) {
      pool_backward_block(p, (int)(task % p.kv_heads), task / p.kv_heads, pointer<Real>(mean), pointer<Real>(dmean), pointer<Real>(dvalue),
                          pointer<Real>(dvariance), (Real)scale, pointer<Real>(dk), pointer<Real>(dv));
    });
  });
}

void rank(Tensor q, Tensor mean, Tensor variance, std::vector<Tensor> table, MaybeTensor hashed, std::vector<int64_t> settings,
          std::vector<double> numbers, std::vector<int64_t> choice, std::vector<Tensor> supers, std::vector<Tensor> super_table,
          std::vector<int64_t> super_settings, std::vector<double> super_numbers, Tensor keys, Tensor mass) {
  by_type(q, [&](auto zero) {
    using Real = decltype(zero);
    Problem<Real> p = read_problem<Real>(q, mean.size(0), table, settings, numbers);
    p.mean = pointer<Real>(mean), p.variance = pointer<Real>(variance);
    const Ranking ranking{(int)choice[0], (int)choice[1],          (float)numbers[3],       (float)numbers[4],   choice[2],
                          choice[3],      pointer<int64_t>(hashed), pointer<int64_t>(keys), pointer<float>(mass)};
    const Packed<Real> packed(p, false, each);
    std::unique_ptr<SuperBlocks<Real>> above;
    if (!supers.empty()) {
      Problem<Real> s = read_problem<Real>(q, mean.size(0), super_table, super_settings, super_numbers);
      s.mean = pointer<Real>(supers[0]), s.variance = pointer<Real>(supers[1]);
      above.reset(new SuperBlocks<Real>{s, Packed<Real>(s, false, each), (int)choice[4]});
    }
    // The logits of a task stay in a core's own cache, until documents are too long for that.
    int64_t longest = 1;
    for (int64_t m = 0; m < p.table.num_blocks; ++m) longest = std::max<int64_t>(longest, m - p.table.first[m] + 1);
    const int rows = (int)std::clamp<int64_t>((1 << 17) / (longest * p.entries_per_block), ROWS / 2, 4 * ROWS);
    each_task(p, packed, task_queries(rows, p.group), [&](Task<Real>& task, int64_t) { rank_task(task, ranking, above.get()); });
  });
}

template <class Real>
Problem<Real> read_attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, const MaybeTensor& sink,
                             const Tensor& selected, const std::vector<Tensor>& entries, const std::vector<Tensor>& table,
                             const std::vector<int64_t>& settings, const std::vector<double>& numbers) {
  Problem<Real> p = read_problem<Real>(q, k.size(1), table, settings, numbers);
  p.k = pointer<Real>(k), p.v = pointer<Real>(v), p.bias = pointer<Real>(bias), p.sink = pointer<Real>(sink);
  p.selected = pointer<int32_t>(selected), p.top_k = (int)selected.size(2);
  p.coarse = p.coarse && !entries.empty();
  if (p.coarse) p.mean = pointer<Real>(entries[0]), p.value = pointer<Real>(entries[1]), p.variance = pointer<Real>(entries[2]);
  return p;
}

void attend(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor sink, Tensor selected, std::vector<Tensor> entries,
            std::vector<Tensor> table, std::vector<int64_t> settings, std::vector<double> numbers, Tensor out, Tensor lse, Tensor tail_mass,
            Tensor selected_mass) {
  by_type(q, [&](auto zero) {
    using Real = decltype(zero);
    const Problem<Real> p = read_attention<Real>(q, k, v, bias, sink, selected, entries, table, settings, numbers);
    const Attended<Real> to{pointer<Real>(out), pointer<Real>(lse), pointer<Real>(tail_mass), pointer<Real>(selected_mass)};
    const Packed<Real> packed(p, p.exact, each);
    each_task(p, packed, task_queries(TASK_ROWS, p.group), [&](Task<Real>& task, int64_t) { attend_task(task, to); });
  });
}

void attend_backward(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor sink, Tensor selected, std::vector<Tensor> entries,
                     std::vector<Tensor> table, std::vector<int64_t> settings, std::vector<double> numbers, Tensor out, Tensor lse, Tensor dout,
                     MaybeTensor dlse, Tensor dq, Tensor dk, Tensor dv, MaybeTensor dbias, MaybeTensor dsink, std::vector<Tensor> dentries) {
  by_type(q, [&](auto zero) {
    using Real = decltype(zero);
    const Problem<Real> p = read_attention<Real>(q, k, v, bias, sink, selected, entries, table, settings, numbers);
    const int64_t num_queries = p.table.num_queries;
    Buffer<Real> delta(num_queries * p.num_heads);
    Gradients<Real> g{pointer<Real>(out), pointer<Real>(lse), pointer<Real>(dout), pointer<Real>(dlse), pointer<Real>(dq),
                      pointer<Real>(dk),  pointer<Real>(dv),  pointer<Real>(dbias), delta.data(), nullptr, nullptr, nullptr};
    if (p.coarse) g.dmean = pointer<Real>(dentries[0]), g.dvalue = pointer<Real>(dentries[1]), g.dvariance = pointer<Real>(dentries[2]);
    const Packed<Real> packed(p, p.exact, each);
    const BlockColumns<Real> values(p, p.exact ? p.v : nullptr, each);
    const EntryColumns<Real> pooled(p, packed.shape, p.coarse ? p.value : nullptr, each);
    const int queries = task_queries(TASK_ROWS, p.group);
    std::vector<std::unique_ptr<Turns>> turns;
    for (int head = 0; head < p.kv_heads; ++head) turns.push_back(std::make_unique<Turns>((num_queries + queries - 1) / queries));
    const auto abandon = [&] {
      for (const auto& t : turns) t->abandon();
    };
    each_task(
        p, packed, queries, [&](Task<Real>& task, int64_t run) { attend_backward_task(task, values, pooled, g, *turns[task.kv_head], run); }, abandon);

    // The sink has no value, so that only -p delta remains of its dz.
    if (dsink.has_value())
      each(p.num_heads, [&](int64_t head) {
        double total = 0;
        for (int64_t at = head; at < num_queries * p.num_heads; at += p.num_heads) total -= std::exp((double)(p.sink[head] - g.lse[at])) * (double)delta[at];
        pointer<Real>(dsink)[head] = (Real)total;
      });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(loadstone, m) {
  m.def(
      "attention_pool(Tensor k, Tensor v, Tensor[] table, int[] settings, Tensor(a!) mean, Tensor(b!) value, Tensor(c!) variance) -> ()");
  m.def(
      "attention_pool_backward(Tensor k, Tensor v, Tensor[] table, int[] settings, float scale, Tensor mean, Tensor dmean, Tensor dvalue, "
      "Tensor dvariance, Tensor(a!) dk, Tensor(b!) dv) -> ()");
  m.def(
      "attention_rank(Tensor q, Tensor mean, Tensor variance, Tensor[] table, Tensor? hashed, int[] settings, float[] numbers, int[] choice, "
      "Tensor[] supers, Tensor[] super_table, int[] super_settings, float[] super_numbers, Tensor(a!) keys, Tensor(b!) mass) -> ()");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sink, Tensor selected, Tensor[] entries, Tensor[] table, "
      "int[] settings, float[] numbers, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) tail_mass, Tensor(d!) selected_mass) -> ()");
  m.def(
      "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sink, Tensor selected, Tensor[] entries, Tensor[] table, "
      "int[] settings, float[] numbers, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
      "Tensor(d!)? dbias, Tensor(e!)? dsink, Tensor[] dentries) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(loadstone, CPU, m) {
  m.impl("attention_pool", TORCH_BOX(&pool));
  m.impl("attention_pool_backward", TORCH_BOX(&pool_backward));
  m.impl("attention_rank", TORCH_BOX(&rank));
  m.impl("attention_forward", TORCH_BOX(&attend));
  m.impl("attention_backward", TORCH_BOX(&attend_backward));
}
