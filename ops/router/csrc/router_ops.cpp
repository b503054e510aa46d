// Dispatcher ops over torch's stable ABI: one binary serves CPU and CUDA builds of every later torch. The CUDA launchers
// live in a library of their own (plain C, built by nvcc), which `use_launchers` opens at run time.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#endif
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "router_host.h"
#include "router_launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace loadstone;

struct Launchers {
  decltype(&loadstone_router_forward) forward = nullptr;
  decltype(&loadstone_router_backward) backward = nullptr;
  decltype(&loadstone_router_scores) scores = nullptr;
};
Launchers cuda_launchers, cpu_launchers;  // cpu_launchers: tests only, the CUDA source built for the CPU

void use_launchers(std::string path, bool on_cpu) {
  Launchers found;
  if (!path.empty()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    STD_TORCH_CHECK(library, "cannot open ", path, ": ", dlerror());
    found.forward = (decltype(found.forward))dlsym(library, "loadstone_router_forward");
    found.backward = (decltype(found.backward))dlsym(library, "loadstone_router_backward");
    found.scores = (decltype(found.scores))dlsym(library, "loadstone_router_scores");
    STD_TORCH_CHECK(found.forward && found.backward && found.scores, path, " lacks a launcher of the router");
  }
  (on_cpu ? cpu_launchers : cuda_launchers) = found;
}

// The order of ops/router/spec.py RouteSpec.integers.
Spec read_spec(const std::vector<int64_t>& v, double scale, const Tensor& logits) {
  STD_TORCH_CHECK(v.size() == 14, "the router's settings have ", v.size(), " numbers, expected 14");
  Spec s{};
  int* const fields[] = {&s.num_experts, &s.slots,      &s.mode,      &s.score,          &s.top_k,        &s.min_experts, &s.num_groups,
                         &s.top_groups,  &s.normalize,  &s.skip_nonfinite, &s.num_segments, &s.num_bins};
  for (int i = 0; i < 12; ++i) *fields[i] = (int)v[i];
  s.num_columns = (int)v[12];
  s.group_keys = (int)v[13];
  s.num_tokens = (int)logits.size(0);
  s.scale = scale;
  const ScalarType type = logits.scalar_type();
  s.dtype = type == ScalarType::BFloat16 ? BF16 : type == ScalarType::Double ? FP64 : FP32;
  STD_TORCH_CHECK(s.num_columns == logits.size(1) && s.num_columns <= (s.dtype == FP64 ? 64 : MAX_COLUMNS) && s.slots <= MAX_SLOTS, "logits [", logits.size(0),
                  ", ", logits.size(1), "] do not fit the router's settings");
  return s;
}

template <class T>
T* pointer(const MaybeTensor& t) { return t.has_value() ? (T*)t->data_ptr() : nullptr; }

// torch's stable ABI has no CUDA stream to ask for. The library that has one is loaded, but not in the global scope.
void* current_stream(const Tensor& t) {
  static const auto get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? (int (*)(int32_t, void**))dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(t.get_device_index(), &stream) == 0, "this torch has no CUDA stream to offer");
  return stream;
}

// Hands the arguments to the library that holds the kernels; false where the CPU code of this file is to run.
template <class Args, class Launch>
bool launched(bool on_cuda, Launch Launchers::* which, const Args& args, const Tensor& logits) {
  if constexpr (std::is_same_v<Launch, int (*)(const Args*, int, void*)>) {  // fp32 only
    const Launch launch = (on_cuda ? cuda_launchers : cpu_launchers).*which;
    if (launch) {
      const int code = on_cuda ? launch(&args, logits.get_device_index(), current_stream(logits)) : launch(&args, 0, nullptr);
      STD_TORCH_CHECK(code == 0, "router: CUDA error ", code);
      return true;
    }
  }
  STD_TORCH_CHECK(!on_cuda, "the router on CUDA takes fp32 or bf16 logits and its CUDA library");
  return false;
}

// f(worker, begin, end) over [0, n) on torch's threads.
constexpr int MAX_WORKERS = 64;
struct Parallel {
  int workers;
  template <class Fn>
  void operator()(int64_t n, Fn fn) const {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) fn((int)w, n * w / workers, n * (w + 1) / workers);
    });
  }
};

inline int num_workers(const Spec& s) {
  const int64_t most = (int64_t)s.num_tokens * s.num_columns / 16384;
  return (int)std::max<int64_t>(1, std::min<int64_t>({most, MAX_WORKERS, (int64_t)torch::stable::get_num_threads()}));
}

template <class Fn>
void by_type(const Spec& s, Fn fn) {
  if (s.dtype == FP64) fn((double)0, (double)0);
  else if (s.dtype == BF16) fn((float)0, bf16{});
  else fn((float)0, (float)0);
}

using ForwardOut = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardOut forward(bool on_cuda, Tensor logits, MaybeTensor bias, MaybeTensor router_inputs, MaybeTensor token_mask,
                   MaybeTensor given_ids, MaybeTensor cut_scores, MaybeTensor cut_tokens, MaybeTensor histogram_range,
                   MaybeTensor token_ids, MaybeTensor row_of, const std::vector<int64_t>& settings, double scale) {
  const Spec s = read_spec(settings, scale, logits);
  const int64_t T = s.num_tokens, E = s.num_experts, K = s.slots, N = s.num_segments;
  const ScalarType real = s.dtype == FP64 ? ScalarType::Double : ScalarType::Float;
  const auto make = [&](std::vector<int64_t> size, ScalarType type) { return torch::stable::new_empty(logits, size, type); };
  Tensor weights = make({T, K}, real), expert_ids = make({T, K}, ScalarType::Int), counts = make({N, E}, ScalarType::Long),
         score_sums = make({N, E}, real), float_sums = make({2}, real), log_z = make({T}, real), margin = make({T}, real),
         entropy = make({T}, real), reasons = make({T}, ScalarType::Byte), slots = make({T * K}, ScalarType::Int),
         inverse = make({T, K}, ScalarType::Int), offsets = make({E + 1}, ScalarType::Int),
         histogram = make({E, s.num_bins}, ScalarType::Int), integers = make({num_integers(s.slots)}, ScalarType::Long);
  const int num_rows = !row_of.has_value() ? 1 : (int)(bias.has_value() ? *bias : *router_inputs).size(0);
  by_type(s, [&](auto real_zero, auto in_zero) {
    using Real = decltype(real_zero);
    using In = decltype(in_zero);
    ForwardArgs<Real> a{s,
                        logits.data_ptr(),
                        pointer<Real>(bias),
                        pointer<float>(router_inputs),
                        pointer<int32_t>(row_of),
                        num_rows,
                        pointer<uint8_t>(token_mask),
                        pointer<int32_t>(given_ids),
                        pointer<Real>(cut_scores),
                        pointer<int32_t>(cut_tokens),
                        pointer<float>(histogram_range),
                        pointer<int64_t>(token_ids),
                        (Real*)weights.data_ptr(),
                        (int32_t*)expert_ids.data_ptr(),
                        (int64_t*)counts.data_ptr(),
                        (Real*)score_sums.data_ptr(),
                        (Real*)float_sums.data_ptr(),
                        (Real*)log_z.data_ptr(),
                        (Real*)margin.data_ptr(),
                        (Real*)entropy.data_ptr(),
                        (uint8_t*)reasons.data_ptr(),
                        (int32_t*)slots.data_ptr(),
                        (int32_t*)inverse.data_ptr(),
                        (int32_t*)offsets.data_ptr(),
                        (int32_t*)histogram.data_ptr(),
                        (int64_t*)integers.data_ptr(),
                        nullptr};
    STD_TORCH_CHECK(!on_cuda || T > 0, "the router on CUDA takes at least one token");
    if (T > 0 && (on_cuda || cpu_launchers.forward)) {
      const Tensor scratch = torch::stable::new_empty(logits, {(int64_t)workspace(s, sizeof(Real)).bytes}, ScalarType::Byte);
      a.workspace = scratch.data_ptr();
      if (launched(on_cuda, &Launchers::forward, a, logits)) return;
    }
    const Parallel parallel{num_workers(s)};
    with_width<Real>(s.num_columns, [&](auto width) { forward_columns<Real, In, decltype(width)::value>(a, parallel.workers, parallel); });
  });
  return {weights, expert_ids, counts, score_sums, float_sums, log_z, margin, entropy, reasons, slots, inverse, offsets, histogram, integers};
}

Tensor backward(bool on_cuda, Tensor logits, Tensor expert_ids, MaybeTensor token_mask, Tensor reasons, Tensor log_z,
                Tensor entropy, Tensor grad_weights, Tensor grad_score_sums, Tensor grad_float_sums,
                const std::vector<int64_t>& settings, double scale) {
  const Spec s = read_spec(settings, scale, logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {(int64_t)s.num_tokens, (int64_t)s.num_columns}, logits.scalar_type());
  by_type(s, [&](auto real_zero, auto in_zero) {
    using Real = decltype(real_zero);
    using In = decltype(in_zero);
    const BackwardArgs<Real> a{s,
                               logits.data_ptr(),
                               (int32_t*)expert_ids.data_ptr(),
                               pointer<uint8_t>(token_mask),
                               (uint8_t*)reasons.data_ptr(),
                               (Real*)log_z.data_ptr(),
                               (Real*)entropy.data_ptr(),
                               (Real*)grad_weights.data_ptr(),
                               (Real*)grad_score_sums.data_ptr(),
                               (Real*)grad_float_sums.data_ptr(),
                               grad_logits.data_ptr()};
    if (s.num_tokens == 0 || launched(on_cuda, &Launchers::backward, a, logits)) return;
    const Parallel parallel{num_workers(s)};
    with_width<Real>(s.num_columns, [&](auto width) { backward_columns<Real, In, decltype(width)::value>(a, parallel); });
  });
  return grad_logits;
}

Tensor scores(bool on_cuda, Tensor logits, const std::vector<int64_t>& settings, double scale) {
  const Spec s = read_spec(settings, scale, logits);
  const ScalarType real = s.dtype == FP64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(logits, {(int64_t)s.num_tokens, (int64_t)s.num_columns}, real);
  by_type(s, [&](auto real_zero, auto in_zero) {
    using Real = decltype(real_zero);
    using In = decltype(in_zero);
    const ScoresArgs<Real> a{s, logits.data_ptr(), (Real*)out.data_ptr()};
    if (s.num_tokens == 0 || launched(on_cuda, &Launchers::scores, a, logits)) return;
    const Parallel parallel{num_workers(s)};
    with_width<Real>(s.num_columns, [&](auto width) { scores_columns<Real, In, decltype(width)::value>(a, parallel); });
  });
  return out;
}

#define FORWARD_PARAMETERS                                                                                            \
  Tensor logits, MaybeTensor bias, MaybeTensor router_inputs, MaybeTensor token_mask, MaybeTensor given_ids,          \
      MaybeTensor cut_scores, MaybeTensor cut_tokens, MaybeTensor histogram_range, MaybeTensor token_ids,             \
      MaybeTensor row_of, std::vector<int64_t> settings, double scale
#define FORWARD_ARGUMENTS \
  logits, bias, router_inputs, token_mask, given_ids, cut_scores, cut_tokens, histogram_range, token_ids, row_of, settings, scale
#define BACKWARD_PARAMETERS                                                                                           \
  Tensor logits, Tensor expert_ids, MaybeTensor token_mask, Tensor reasons, Tensor log_z, Tensor entropy,             \
      Tensor grad_weights, Tensor grad_score_sums, Tensor grad_float_sums, std::vector<int64_t> settings, double scale
#define BACKWARD_ARGUMENTS \
  logits, expert_ids, token_mask, reasons, log_z, entropy, grad_weights, grad_score_sums, grad_float_sums, settings, scale

ForwardOut forward_cpu(FORWARD_PARAMETERS) { return forward(false, FORWARD_ARGUMENTS); }
Tensor backward_cpu(BACKWARD_PARAMETERS) { return backward(false, BACKWARD_ARGUMENTS); }
Tensor scores_cpu(Tensor logits, std::vector<int64_t> settings, double scale) { return scores(false, logits, settings, scale); }

ForwardOut forward_cuda(FORWARD_PARAMETERS) { return forward(true, FORWARD_ARGUMENTS); }
Tensor backward_cuda(BACKWARD_PARAMETERS) { return backward(true, BACKWARD_ARGUMENTS); }
Tensor scores_cuda(Tensor logits, std::vector<int64_t> settings, double scale) { return scores(true, logits, settings, scale); }

}  // namespace

STABLE_TORCH_LIBRARY(loadstone, m) {
  m.def(
      "router_forward(Tensor logits, Tensor? bias, Tensor? router_inputs, Tensor? token_mask, Tensor? given_ids, "
      "Tensor? cut_scores, Tensor? cut_tokens, Tensor? histogram_range, Tensor? token_ids, Tensor? row_of, int[] settings, float scale) -> (Tensor weights, "
      "Tensor expert_ids, Tensor counts, Tensor score_sums, Tensor float_sums, Tensor log_z, Tensor margin, Tensor entropy, "
      "Tensor reasons, Tensor slots, Tensor inverse, Tensor offsets, Tensor histogram, Tensor integers)");
  m.def(
      "router_backward(Tensor logits, Tensor expert_ids, Tensor? token_mask, Tensor reasons, Tensor log_z, Tensor entropy, Tensor grad_weights, "
      "Tensor grad_score_sums, Tensor grad_float_sums, int[] settings, float scale) -> Tensor");
  m.def("router_scores(Tensor logits, int[] settings, float scale) -> Tensor");
  m.def("router_use_launchers(str path, bool on_cpu) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(loadstone, CPU, m) {
  m.impl("router_forward", TORCH_BOX(&forward_cpu));
  m.impl("router_backward", TORCH_BOX(&backward_cpu));
  m.impl("router_scores", TORCH_BOX(&scores_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(loadstone, CUDA, m) {
  m.impl("router_forward", TORCH_BOX(&forward_cuda));
  m.impl("router_backward", TORCH_BOX(&backward_cuda));
  m.impl("router_scores", TORCH_BOX(&scores_cuda));
}
STABLE_TORCH_LIBRARY_IMPL(loadstone, CompositeExplicitAutograd, m) { m.impl("router_use_launchers", TORCH_BOX(&use_launchers)); }
