// What crosses the C boundary between the dispatcher ops (router_ops.cpp) and an implementation: the CPU driver
// (router_host.h), the CUDA launchers (router.cu), or those launchers run on the CPU in tests. Plain data only.
//
// Shape letters: T tokens, C columns of the logits (E experts, then null experts), E experts, K slots, N segments of
// T / N consecutive tokens, B histogram bins.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define LS_INLINE __host__ __device__ inline
#else
#define LS_INLINE inline
#endif

namespace loadstone {

enum Mode : int { TOP_K = 0, TOP_P = 1, THRESHOLD = 2, EXPERT_CHOICE = 3, GIVEN = 4 };
enum Score : int { SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2, RELU = 3 };
enum Dtype : int { FP32 = 0, BF16 = 1, FP64 = 2 };

// Bits of `reasons`; ops/router/spec.py has the same table.
enum Reason : int { NONFINITE = 1, EMPTY = 2, RAISED = 4, CAPPED = 8, OVERRIDDEN = 16 };
constexpr int NUM_REASONS = 8;

// Integer statistics: [0, K] tokens by number of experts, then by reason, then these.
LS_INLINE int null_picks_at(int slots) { return slots + 1 + NUM_REASONS; }
LS_INLINE int histogram_tokens_at(int slots) { return slots + 2 + NUM_REASONS; }
LS_INLINE int checksum_at(int slots) { return slots + 3 + NUM_REASONS; }
LS_INLINE int num_integers(int slots) { return slots + 4 + NUM_REASONS; }

// router_inputs[4]: the mode's value (top_p: P; threshold: the cut), share of the mode against plain top-k, that
// top-k, and the largest number of experts at present.
constexpr int INPUT_VALUE = 0, INPUT_SHARE = 1, INPUT_PLAIN_K = 2, INPUT_LIMIT = 3;

struct Spec {
  int num_columns, num_experts, slots;
  int mode, score, top_k, min_experts, num_groups, top_groups, group_keys;
  int normalize, skip_nonfinite;
  int num_tokens, num_segments, num_bins, dtype;
  double scale;
};

// Tokens are cut into blocks that never straddle a segment. Floating sums are taken per tile of a block, then over the
// tiles, then over the blocks, always in the same order: the partition is part of the definition of the result.
struct Partition {
  int tokens_per_block, blocks_per_segment, num_blocks, tiles;
};

constexpr int BLOCKS_PER_GROUP = 16;  // two-level prefix sums over blocks

LS_INLINE Partition partition(const Spec& s) {
  Partition p{32, 0, 0, s.num_columns <= 256 ? 32 : 8};
  while ((long long)p.tokens_per_block * 256 < s.num_tokens) p.tokens_per_block *= 2;
  const int segment = s.num_segments ? s.num_tokens / s.num_segments : 0;
  p.blocks_per_segment = (segment + p.tokens_per_block - 1) / p.tokens_per_block;
  p.num_blocks = p.blocks_per_segment * s.num_segments;
  return p;
}

template <class Real>
struct ForwardArgs {
  Spec spec;
  const void* logits;             // [T, C]
  const Real* bias;               // [C], with row_of [P, C], or null
  const float* router_inputs;     // [4], with row_of [P, 4], or null
  const int32_t* row_of;          // [T], the row of both tables that a token reads, or null
  int num_rows;                   // P
  const uint8_t* token_mask;      // [T] or null
  const int32_t* given_ids;       // [T, K] for GIVEN
  const Real* cut_scores;         // [C] for EXPERT_CHOICE
  const int32_t* cut_tokens;      // [C] for EXPERT_CHOICE
  const float* histogram_range;   // [E, 2]: lowest value, bins per unit
  const int64_t* token_ids;       // [T] or null
  Real* weights;                  // [T, K]
  int32_t* expert_ids;            // [T, K]
  int64_t* counts;                // [N, E]
  Real* score_sums;               // [N, E]
  Real* float_sums;               // [2]: z, entropy
  Real* log_z;                    // [T]
  Real* margin;                   // [T]
  Real* entropy;                  // [T]
  uint8_t* reasons;               // [T]
  int32_t* slots;                 // [T * K]
  int32_t* inverse;               // [T, K]
  int32_t* offsets;               // [E + 1]
  int32_t* histogram;             // [E, B]
  int64_t* integers;              // [num_integers(K)]: k histogram, reasons, null picks, histogram tokens, checksum
  void* workspace;                // workspace_bytes()
};

template <class Real>
struct BackwardArgs {
  Spec spec;
  const void* logits;             // [T, C]
  const int32_t* expert_ids;      // [T, K]
  const uint8_t* token_mask;      // [T] or null
  const uint8_t* reasons;         // [T]
  const Real* log_z;              // [T]
  const Real* entropy;            // [T]
  const Real* grad_weights;       // [T, K]
  const Real* grad_score_sums;    // [N, E]
  const Real* grad_float_sums;    // [2]
  void* grad_logits;              // [T, C], dtype of the logits
};

template <class Real>
struct ScoresArgs {
  Spec spec;
  const void* logits;
  Real* scores;                   // [T, C]
};

// Workspace of the CUDA kernels: the first part is zeroed before the first kernel.
struct Workspace {
  size_t integers, group_counts, histogram, zeroed, block_counts, partial_sums, bytes;
};

inline Workspace workspace(const Spec& s, size_t real_bytes) {
  const Partition p = partition(s);
  const size_t groups = (p.num_blocks + BLOCKS_PER_GROUP - 1) / BLOCKS_PER_GROUP;
  Workspace w{};
  size_t at = 0;
  auto take = [&](size_t bytes) { const size_t start = at; at += (bytes + 15) / 16 * 16; return start; };
  w.integers = take(8 * (size_t)num_integers(s.slots));
  w.group_counts = take(4 * groups * s.num_experts);
  w.histogram = take(4 * (size_t)s.num_experts * s.num_bins);
  w.zeroed = at;
  w.block_counts = take(4 * (size_t)p.num_blocks * s.num_experts);
  w.partial_sums = take(real_bytes * p.num_blocks * (s.num_experts + 2));
  w.bytes = at;
  return w;
}

}  // namespace loadstone
