// The router on the GPU: two kernels forward (route, place), one backward, no float atomics, no host synchronisation.
//
// route: a tile of 8 threads (32 above 256 columns) takes one token at a time through router_math.h. Integer statistics
//   go to shared memory and, once per block, to global memory; floating sums stay in registers and are written once per
//   block. Assignments are counted per block and per group of 16 blocks.
// place: every block finds where its rows begin from those two tables (at most 15 + 16 rows a column for 256 blocks),
//   places its tokens in order, and takes its share of the remaining work: sums over blocks, the histogram, the tail.
#include "../../csrc/cuda_compat.h"
#include "router_launch.h"
#include "router_math.h"

namespace loadstone {

constexpr int THREADS = 256, WARPS = THREADS / 32;

__device__ __forceinline__ int first_token(const Partition& p, const Spec& s, int block) {
  return block / p.blocks_per_segment * (s.num_tokens / s.num_segments) + block % p.blocks_per_segment * p.tokens_per_block;
}
__device__ __forceinline__ int last_token(const Partition& p, const Spec& s, int block) {
  const int segment_end = (block / p.blocks_per_segment + 1) * (s.num_tokens / s.num_segments);
  const int end = first_token(p, s, block) + p.tokens_per_block;
  return end < segment_end ? end : segment_end;
}

// Floats of shared memory per tile: a row of scores and the ranking. The rows are used again for the tiles' sums.
__host__ __device__ inline int tile_floats(int width, int slots) { return width + 2 * (slots + 1); }

template <class In, int G, int L>
__global__ void __launch_bounds__(THREADS, 1) route_kernel(ForwardArgs<float> a, Partition p, Workspace w) {
  using M = DeviceTile<G, L>;
  constexpr int WIDTH = G * L, TILES = THREADS / G;
  DYNAMIC_SHARED(float, shared);
  const Spec& s = a.spec;
  const int experts = s.num_experts, slots = s.slots, counted = checksum_at(slots);
  const int tile = threadIdx.x / G;
  float* const mine = shared + tile * tile_floats(WIDTH, slots);
  int* const expert_counts = (int*)(shared + TILES * tile_floats(WIDTH, slots));
  int* const integers = expert_counts + experts;
  for (int i = threadIdx.x; i < experts + counted; i += THREADS) expert_counts[i] = 0;
  __syncthreads();

  M m;
  m.row_a = mine;
  m.row_b = nullptr;
  m.rank_keys = mine + WIDTH;
  m.rank_ids = (int32_t*)(mine + WIDTH + slots + 1);
  char* const work = (char*)a.workspace;
  Sinks<int> sinks{expert_counts, integers, (int32_t*)(work + w.histogram)};
  const auto add = [](int* where, int value) { atomicAdd(where, value); };
  const auto add_histogram = [](int32_t* where) { atomicAdd(where, 1); };
  float scores[L], floats[2] = {0.0f, 0.0f};
LS_UNROLL
  for (int j = 0; j < L; ++j) scores[j] = 0.0f;
  uint64_t checksum = 0;
  const int begin = first_token(p, s, blockIdx.x), end = last_token(p, s, blockIdx.x);
  for (int first = begin; first < end; first += TILES) {  // the same count in every tile: they exchange in step
    const int token = first + tile;
    route_token<M, In>(m, a, token, token < end, sinks, checksum, scores, floats, add, add_histogram);
  }
  __syncthreads();  // all tiles have counted

  // Sums of the tiles, added in their order.
LS_UNROLL
  for (int j = 0; j < L; ++j) mine[M::id(j)] = scores[j];
  if (M::leads()) { m.rank_keys[0] = floats[0]; m.rank_keys[1] = floats[1]; }
  __syncthreads();
  float* const partial = (float*)(work + w.partial_sums) + (size_t)blockIdx.x * (experts + 2);
  for (int i = threadIdx.x; i < experts + 2; i += THREADS) {
    const int where = i < experts ? i : WIDTH + i - experts;
    float sum = 0.0f;
    for (int q = 0; q < TILES; ++q) sum = sum + shared[q * tile_floats(WIDTH, slots) + where];
    partial[i] = sum;
  }
  int* const block_counts = (int*)(work + w.block_counts) + (size_t)blockIdx.x * experts;
  int* const group_counts = (int*)(work + w.group_counts) + (size_t)(blockIdx.x / BLOCKS_PER_GROUP) * experts;
  for (int e = threadIdx.x; e < experts; e += THREADS) {
    block_counts[e] = expert_counts[e];
    if (expert_counts[e]) atomicAdd(group_counts + e, expert_counts[e]);
  }
  unsigned long long* const totals = (unsigned long long*)(work + w.integers);
  for (int i = threadIdx.x; i < counted; i += THREADS)
    if (integers[i]) atomicAdd(totals + i, (unsigned long long)integers[i]);
  if (a.token_ids && checksum) atomicAdd(totals + checksum_at(slots), (unsigned long long)checksum);
}

// Inclusive prefix sum over the block of one value per thread; `scratch` holds WARPS ints.
__device__ __forceinline__ int block_inclusive_sum(int value, int* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int o = 1; o < 32; o <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, value, o);
    if (lane >= o) value += other;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < warp; ++i) before += scratch[i];
  __syncthreads();
  return value + before;
}

__global__ void __launch_bounds__(THREADS, 1) place_kernel(ForwardArgs<float> a, Partition p, Workspace w) {
  DYNAMIC_SHARED(int, shared);
  const Spec& s = a.spec;
  const int experts = s.num_experts, slots = s.slots;
  int* const next = shared;                       // [WARPS][experts]: next row of each warp and expert
  int* const scratch = shared + WARPS * experts;  // [WARPS]
  const char* const work = (const char*)a.workspace;
  const int* const block_counts = (const int*)(work + w.block_counts);
  const int* const group_counts = (const int*)(work + w.group_counts);
  const int groups = (p.num_blocks + BLOCKS_PER_GROUP - 1) / BLOCKS_PER_GROUP;
  const int block = blockIdx.x, group = block / BLOCKS_PER_GROUP, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

  // Assignments of this block by warp and expert; warps hold consecutive tokens.
  for (int i = threadIdx.x; i < WARPS * experts; i += THREADS) next[i] = 0;
  __syncthreads();
  const int begin = first_token(p, s, block), end = last_token(p, s, block);
  const int per_warp = (p.tokens_per_block + WARPS - 1) / WARPS;
  const int from = begin + warp * per_warp < end ? begin + warp * per_warp : end;
  const int to = from + per_warp < end ? from + per_warp : end;
  for (long long i = (long long)from * slots + lane; i < (long long)to * slots; i += 32) {
    const int id = a.expert_ids[i];
    if (id >= 0) atomicAdd(next + warp * experts + id, 1);
  }

  // First row: all assignments of lower experts, then those of the same expert in earlier blocks and warps. The barriers of
  // the prefix sum stand between the counts above and their readers.
  int total = 0;  // of the experts handled so far
  for (int first = 0; first < experts; first += THREADS) {
    const int e = first + threadIdx.x;
    int all = 0, before = 0;
    if (e < experts) {
      for (int g = 0; g < groups; ++g) {
        const int count = group_counts[(size_t)g * experts + e];
        all += count;
        if (g < group) before += count;
      }
      for (int b = group * BLOCKS_PER_GROUP; b < block; ++b) before += block_counts[(size_t)b * experts + e];
    }
    const int inclusive = block_inclusive_sum(all, scratch);
    if (threadIdx.x == THREADS - 1) scratch[0] = inclusive;
    if (e < experts) {
      int row = total + inclusive - all;
      if (block == 0) a.offsets[e] = row;
      row += before;
      for (int i = 0; i < WARPS; ++i) {
        const int count = next[i * experts + e];
        next[i * experts + e] = row;
        row += count;
      }
    }
    __syncthreads();
    total += scratch[0];
    __syncthreads();
  }
  if (block == 0 && threadIdx.x == 0) a.offsets[experts] = total;

  // Stable placement: tokens of a warp in order, the experts of a token side by side.
  for (int token = from; token < to; ++token) {
    for (int slot = lane; slot < slots; slot += 32) {
      const long long i = (long long)token * slots + slot;
      const int id = a.expert_ids[i];
      int row = -1;
      if (id >= 0) {
        row = next[warp * experts + id];
        next[warp * experts + id] = row + 1;
        a.slots[row] = (int)i;
      }
      a.inverse[i] = row;
    }
    __syncwarp();
  }
  for (long long i = (long long)begin * slots + threadIdx.x; i < (long long)end * slots; i += THREADS)
    if (i >= total) a.slots[i] = -1;

  // Sums over blocks, a warp each: segments x experts, then z and entropy.
  const float* const partial = (const float*)(work + w.partial_sums);
  const int jobs = s.num_segments * experts + 2;
  for (int job = block * WARPS + warp; job < jobs; job += gridDim.x * WARPS) {
    const bool is_expert = job < s.num_segments * experts;
    const int column = is_expert ? job % experts : experts + job - s.num_segments * experts;
    const int start = is_expert ? job / experts * p.blocks_per_segment : 0;
    const int count = is_expert ? p.blocks_per_segment : p.num_blocks;
    float sum = 0.0f;
    int assignments = 0;
    for (int b = lane; b < count; b += 32) {
      sum = sum + partial[(size_t)(start + b) * (experts + 2) + column];
      if (is_expert) assignments += block_counts[(size_t)(start + b) * experts + column];
    }
    for (int o = 16; o; o >>= 1) {
      sum = sum + __shfl_xor_sync(0xffffffffu, sum, o);
      assignments += __shfl_xor_sync(0xffffffffu, assignments, o);
    }
    if (lane == 0) {
      if (is_expert) { a.score_sums[job] = sum; a.counts[job] = assignments; }
      else a.float_sums[job - s.num_segments * experts] = sum;
    }
  }
  const long long* const totals = (const long long*)(work + w.integers);
  if (block == 0)
    for (int i = threadIdx.x; i < num_integers(slots); i += THREADS) a.integers[i] = totals[i];
  const int* const histogram = (const int*)(work + w.histogram);
  if (s.num_bins > 0)
    for (int e = block * WARPS + warp; e < experts; e += gridDim.x * WARPS) {
      int above = 0;
      for (int b = lane; b < s.num_bins; b += 32) {
        const int count = b ? histogram[(size_t)e * s.num_bins + b] : 0;
        if (b) a.histogram[(size_t)e * s.num_bins + b] = count;
        above += count;
      }
      for (int o = 16; o; o >>= 1) above += __shfl_xor_sync(0xffffffffu, above, o);
      if (lane == 0) a.histogram[(size_t)e * s.num_bins] = (int)totals[histogram_tokens_at(slots)] - above;
    }
}

template <class In, int G, int L>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(BackwardArgs<float> a, int tokens_per_block) {
  using M = DeviceTile<G, L>;
  constexpr int WIDTH = G * L, TILES = THREADS / G;
  DYNAMIC_SHARED(float, shared);
  M m;
  m.row_a = shared + threadIdx.x / G * 2 * WIDTH;
  m.row_b = m.row_a + WIDTH;
  const int per_segment = a.spec.num_tokens / a.spec.num_segments;
  const int begin = blockIdx.x * tokens_per_block;
  int end = begin + tokens_per_block;
  end = end < a.spec.num_tokens ? end : a.spec.num_tokens;
  for (int first = begin; first < end; first += TILES) {
    const int token = first + threadIdx.x / G;
    route_token_backward<M, In>(m, a, token, (token < end ? token : begin) / per_segment, token < end);
  }
}

template <class In, int G, int L>
__global__ void __launch_bounds__(THREADS, 1) scores_kernel(ScoresArgs<float> a) {
  using M = DeviceTile<G, L>;
  const int token = blockIdx.x * (THREADS / G) + threadIdx.x / G, columns = a.spec.num_columns;
  const bool active = token < a.spec.num_tokens;
  float x[L], s[L], q[L], log_z, entropy;
  M::load(x, (const In*)a.logits + (size_t)(active ? token : 0) * columns, columns, active, -INFINITY);
  if (!active) M::each([&](int j, int l, int id) { M::at(x, j, l) = id < columns ? 0.0f : -INFINITY; });
  clean_row<M>(x, columns);
  score_token<M>(a.spec, x, s, q, log_z, entropy);
  M::write(a.scores + (size_t)(active ? token : 0) * columns, s, columns, active);
}

template <class In, int G, int L>
void launch_forward(const ForwardArgs<float>& a, cudaStream_t stream) {
  const Partition p = partition(a.spec);
  const Workspace w = workspace(a.spec, sizeof(float));
  const int experts = a.spec.num_experts, slots = a.spec.slots;
  const int shared = 4 * (THREADS / G * tile_floats(G * L, slots) + experts + checksum_at(slots));
  cudaMemsetAsync(a.workspace, 0, w.zeroed, stream);
  LAUNCH((route_kernel<In, G, L>), p.num_blocks, THREADS, shared, stream, a, p, w);
  LAUNCH(place_kernel, p.num_blocks, THREADS, 4 * (WARPS * experts + WARPS), stream, a, p, w);
}

template <class In, int G, int L>
void launch_backward(const BackwardArgs<float>& a, cudaStream_t stream) {
  constexpr int TILES = THREADS / G;
  int rounds = 1;  // tokens a tile takes, one after another
  while (rounds < 8 && (long long)a.spec.num_tokens > (long long)rounds * TILES * 1024) rounds *= 2;
  const int blocks = (a.spec.num_tokens + rounds * TILES - 1) / (rounds * TILES);
  LAUNCH((backward_kernel<In, G, L>), blocks, THREADS, 4 * TILES * 2 * G * L, stream, a, rounds * TILES);
}

template <class In, int G, int L>
void launch_scores(const ScoresArgs<float>& a, cudaStream_t stream) {
  constexpr int TILES = THREADS / G;
  LAUNCH((scores_kernel<In, G, L>), (a.spec.num_tokens + TILES - 1) / TILES, THREADS, 0, stream, a);
}

}  // namespace loadstone

#define DISPATCH(launch, args, device, stream)                                           \
  do {                                                                                   \
    using namespace loadstone;                                                           \
    const OnDevice guard(device);                                                        \
    const int columns = (args)->spec.num_columns;                                        \
    const bool half = (args)->spec.dtype == BF16;                                        \
    cudaStream_t on = (cudaStream_t)(stream);                                            \
    if (columns <= 32) { half ? launch<bf16, 8, 4>(*(args), on) : launch<float, 8, 4>(*(args), on); }             \
    else if (columns <= 64) { half ? launch<bf16, 8, 8>(*(args), on) : launch<float, 8, 8>(*(args), on); }        \
    else if (columns <= 128) { half ? launch<bf16, 8, 16>(*(args), on) : launch<float, 8, 16>(*(args), on); }     \
    else if (columns <= 256) { half ? launch<bf16, 8, 32>(*(args), on) : launch<float, 8, 32>(*(args), on); }     \
    else if (columns <= 512) { half ? launch<bf16, 32, 16>(*(args), on) : launch<float, 32, 16>(*(args), on); }   \
    else { half ? launch<bf16, 32, 32>(*(args), on) : launch<float, 32, 32>(*(args), on); }                       \
    return last_launch_error();                                                          \
  } while (0)

extern "C" int loadstone_router_forward(const loadstone::ForwardArgs<float>* args, int device, void* stream) {
  DISPATCH(launch_forward, args, device, stream);
}
extern "C" int loadstone_router_backward(const loadstone::BackwardArgs<float>* args, int device, void* stream) {
  DISPATCH(launch_backward, args, device, stream);
}
extern "C" int loadstone_router_scores(const loadstone::ScoresArgs<float>* args, int device, void* stream) {
  DISPATCH(launch_scores, args, device, stream);
}
