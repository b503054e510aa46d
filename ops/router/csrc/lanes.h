// Two machines for one source. A token's columns are spread over lanes: on the GPU a tile of G threads, each with a few
// columns in registers; on the CPU 32 lanes in an array that the compiler turns into vector instructions.
//
// Every floating-point step is an IEEE add, multiply, divide, square root or explicit fma in a fixed order, so host and
// device agree bit for bit when built with -ffp-contract=off (g++) and -fmad=false (nvcc). Sums over columns are taken
// as 32 running sums by column mod 32, which are then added pairwise, neighbours first.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__) || defined(LOADSTONE_CUDA_ON_CPU)
#define LS_BOTH __host__ __device__ __forceinline__
#define LS_UNROLL _Pragma("unroll")
#else
#define LS_BOTH inline __attribute__((always_inline))
#define LS_UNROLL
#endif
#if defined(LOADSTONE_CUDA_ON_CPU)
#undef LS_UNROLL
#define LS_UNROLL
#endif

namespace loadstone {

constexpr int MAX_COLUMNS = 1024, MAX_SLOTS = 64;

template <class To, class From>
LS_BOTH To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// exp in fp32 (Cephes' polynomial, about 1 ulp), above 88 that of 88, below -105 zero, with gradual underflow between; no
// branch, so that it vectorises.
LS_BOTH float exp_(float x) {
  x = x < -105.0f ? -105.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = fmaf(x, 1.44269504088896341f, 12582912.0f);  // rounds to the nearest integer
  const int32_t n = bit_cast<int32_t>(shifted) - 0x4B400000;
  const float nf = shifted - 12582912.0f;
  float r = fmaf(nf, -0.693359375f, x);
  r = fmaf(nf, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const int32_t half = n >> 1;  // in two steps, since 2^n alone may lie below the normal numbers
  return p * bit_cast<float>((half + 127) << 23) * bit_cast<float>((n - half + 127) << 23);
}
LS_BOTH double exp_(double x) { return exp(x); }

// Natural logarithm of a normal positive fp32 number (Cephes, about 1 ulp).
LS_BOTH float log_(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  int32_t e = (bits >> 23) - 126;
  float m = bit_cast<float>((bits & 0x007FFFFF) | 0x3F000000);
  const bool low = m < 0.707106781186547524f;
  e = low ? e - 1 : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const float z = m * m, ef = (float)e;
  float p = 7.0376836292e-2f;
  p = fmaf(p, m, -1.1514610310e-1f);
  p = fmaf(p, m, 1.1676998740e-1f);
  p = fmaf(p, m, -1.2420140846e-1f);
  p = fmaf(p, m, 1.4249322787e-1f);
  p = fmaf(p, m, -1.6668057665e-1f);
  p = fmaf(p, m, 2.0000714765e-1f);
  p = fmaf(p, m, -2.4999993993e-1f);
  p = fmaf(p, m, 3.3333331174e-1f);
  float y = p * m * z;
  y = fmaf(ef, -2.12194440e-4f, y);
  y = fmaf(z, -0.5f, y);
  return fmaf(ef, 0.693359375f, m + y);
}
LS_BOTH double log_(double x) { return log(x); }

// log(1 + y) for y in [0, 1].
LS_BOTH float log1p_(float y) {
  const float u = 1.0f + y, d = u - 1.0f;
  return d == 0.0f ? y : log_(u) * (y / d);
}
LS_BOTH double log1p_(double y) { return log1p(y); }
LS_BOTH float sqrt_(float x) { return sqrtf(x); }
LS_BOTH double sqrt_(double x) { return sqrt(x); }

template <class Real>
LS_BOTH bool finite_(Real x) { return x - x == (Real)0; }

struct bf16 { uint16_t bits; };
LS_BOTH float widen(float x) { return x; }
LS_BOTH double widen(double x) { return x; }
LS_BOTH float widen(bf16 x) { return bit_cast<float>((uint32_t)x.bits << 16); }
template <class To, class Real>
LS_BOTH To narrow(Real x) {
  if constexpr (sizeof(To) == 2) {  // round to nearest even
    const uint32_t bits = bit_cast<uint32_t>((float)x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return To{(uint16_t)((bits >> 16) | 0x40)};
    return To{(uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    return (To)x;
  }
}

// splitmix64's finaliser; the checksum adds the mixes of all (token id, expert) pairs.
LS_BOTH uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

#if defined(__CUDACC__) || defined(LOADSTONE_CUDA_ON_CPU)
// G threads per token (8 or 32; all lanes of a warp take part in every call). Element j of lane l is column
// 32 * (j / 4) + 4 * l + j % 4 for G = 8 (16-byte loads), and 32 * j + l for G = 32.
template <int G, int L_>
struct DeviceTile {
  using Real = float;
  using F = float;
  static constexpr int L = L_;
  static constexpr unsigned ALL = 0xffffffffu;
  float* row_a;        // [32 * columns / 32] shared, private to the tile
  float* row_b;
  int32_t* rank_ids;   // [slots + 1] shared
  float* rank_keys;

  static __device__ __forceinline__ int lane() { return (int)(threadIdx.x & (G - 1)); }
  static __device__ __forceinline__ int id(int j) { return G == 8 ? 32 * (j >> 2) + 4 * lane() + (j & 3) : 32 * j + lane(); }
  static __device__ __forceinline__ bool owns(int slot) { return lane() == (slot & (G - 1)); }
  static __device__ __forceinline__ bool leads() { return lane() == 0; }
  static __device__ __forceinline__ bool any(bool p) { return __any_sync(ALL, p) != 0; }

  template <class Fn> static __device__ __forceinline__ void each(Fn fn) {
#pragma unroll
    for (int j = 0; j < L; ++j) fn(j, 0, id(j));
  }
  static __device__ __forceinline__ float& at(float (&x)[L], int j, int) { return x[j]; }

  template <class T>
  static __device__ __forceinline__ void load(float (&x)[L], const T* row, int columns, bool read, float pad) {
#pragma unroll
    for (int j = 0; j < L; ++j) x[j] = read && id(j) < columns ? (float)widen(row[id(j)]) : pad;
  }
  static __device__ __forceinline__ void load(float (&x)[L], const float* row, int columns, bool read, float pad) {
    if (G == 8 && (columns & 3) == 0 && ((uintptr_t)row & 15) == 0) {
#pragma unroll
      for (int j = 0; j < L; j += 4) {
        float4 v = make_float4(pad, pad, pad, pad);
        if (read && id(j) < columns) v = *reinterpret_cast<const float4*>(row + id(j));
        x[j] = v.x; x[j + 1] = v.y; x[j + 2] = v.z; x[j + 3] = v.w;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < L; ++j) x[j] = read && id(j) < columns ? row[id(j)] : pad;
  }

  static __device__ __forceinline__ float total(const float (&x)[L]) {
    float sum;
    if (G == 8) {
      float part[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
      for (int j = 4; j < L; ++j) part[j & 3] = part[j & 3] + x[j];
      sum = (part[0] + part[1]) + (part[2] + part[3]);
    } else {
      sum = x[0];
#pragma unroll
      for (int j = 1; j < L; ++j) sum = sum + x[j];
    }
#pragma unroll
    for (int o = 1; o < G; o <<= 1) sum = sum + __shfl_xor_sync(ALL, sum, o);
    return sum;
  }
  static __device__ __forceinline__ float maximum(const float (&x)[L]) {
    float best = x[0];
#pragma unroll
    for (int j = 1; j < L; ++j) best = best > x[j] ? best : x[j];
#pragma unroll
    for (int o = 1; o < G; o <<= 1) { const float other = __shfl_xor_sync(ALL, best, o); best = best > other ? best : other; }
    return best;
  }
  static __device__ __forceinline__ int add(int v) {
#pragma unroll
    for (int o = 1; o < G; o <<= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
  }

  // Removes the best (key desc, column asc) of the columns in [from, to) from `keys`.
  static __device__ __forceinline__ void pop(float (&keys)[L], int from, int to, float& key, int& column) {
    key = -INFINITY; column = 1 << 30;
#pragma unroll
    for (int j = 0; j < L; ++j) {
      const bool better = id(j) >= from && id(j) < to && (keys[j] > key || (keys[j] == key && id(j) < column));
      key = better ? keys[j] : key; column = better ? id(j) : column;
    }
#pragma unroll
    for (int o = 1; o < G; o <<= 1) {
      const float k2 = __shfl_xor_sync(ALL, key, o); const int c2 = __shfl_xor_sync(ALL, column, o);
      const bool better = k2 > key || (k2 == key && c2 < column);
      key = better ? k2 : key; column = better ? c2 : column;
    }
#pragma unroll
    for (int j = 0; j < L; ++j) if (id(j) == column) keys[j] = -INFINITY;
  }
  // Ranking: columns by (key desc, column asc), one at a time. Destroys `keys`.
  __device__ __forceinline__ void begin_ranking(float (&)[L]) {}
  __device__ __forceinline__ void next_rank(float (&keys)[L], int columns, int rank, bool wanted) {
    float key; int column;
    pop(keys, 0, columns, key, column);
    if (wanted && leads()) { rank_ids[rank] = column; rank_keys[rank] = key; }
    __syncwarp();
  }
  // The largest key of the columns in [from, to) that no rank has taken, -inf without one. Tiles of a warp must have taken
  // equally many ranks: next_rank also takes from those that did not want it.
  static __device__ __forceinline__ float best_left(const float (&keys)[L], int from, int to) {
    float left[L];
#pragma unroll
    for (int j = 0; j < L; ++j) left[j] = id(j) >= from && id(j) < to ? keys[j] : -INFINITY;
    return maximum(left);
  }
  __device__ __forceinline__ void store_row(float* row, const float (&x)[L]) {
    __syncwarp();  // the previous token's readers are done
#pragma unroll
    for (int j = 0; j < L; ++j) row[id(j)] = x[j];
    __syncwarp();
  }
  __device__ __forceinline__ void load_row(float (&x)[L], const float* row) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < L; ++j) x[j] = row[id(j)];
  }
  template <class T>
  static __device__ __forceinline__ void write(T* row, const float (&x)[L], int columns, bool active) {
#pragma unroll
    for (int j = 0; j < L; ++j) if (active && id(j) < columns) row[id(j)] = narrow<T>(x[j]);
  }
};
#endif

// 32 lanes in an array. Element j of lane l is column 32 * j + l.
template <class Real_, int L_>
struct HostTile {
  using Real = Real_;
  struct F { alignas(64) Real v[32]; };
  static constexpr int L = L_;
  F a[L], b[L];
  Real* row_a = a[0].v;
  Real* row_b = b[0].v;
  int32_t rank_ids[MAX_SLOTS + 1];
  Real rank_keys[MAX_SLOTS + 1];

  static bool owns(int) { return true; }
  static bool leads() { return true; }
  static bool any(bool p) { return p; }

  template <class Fn> static LS_BOTH void each(Fn fn) {
    for (int j = 0; j < L; ++j)
      for (int l = 0; l < 32; ++l) fn(j, l, 32 * j + l);
  }
  static LS_BOTH Real& at(F (&x)[L], int j, int l) { return x[j].v[l]; }

  template <class T>
  static LS_BOTH void load(F (&x)[L], const T* row, int columns, bool read, Real pad) {
    for (int j = 0; j < L; ++j) {
      if (read && 32 * j + 32 <= columns) {
        for (int l = 0; l < 32; ++l) x[j].v[l] = (Real)widen(row[32 * j + l]);
      } else {
        for (int l = 0; l < 32; ++l) x[j].v[l] = read && 32 * j + l < columns ? (Real)widen(row[32 * j + l]) : pad;
      }
    }
  }

  static LS_BOTH Real total(const F (&x)[L]) {
    F sum = x[0];
    for (int j = 1; j < L; ++j)
      for (int l = 0; l < 32; ++l) sum.v[l] = sum.v[l] + x[j].v[l];
    Real s16[16], s8[8], s4[4];
    for (int l = 0; l < 16; ++l) s16[l] = sum.v[2 * l] + sum.v[2 * l + 1];
    for (int l = 0; l < 8; ++l) s8[l] = s16[2 * l] + s16[2 * l + 1];
    for (int l = 0; l < 4; ++l) s4[l] = s8[2 * l] + s8[2 * l + 1];
    return (s4[0] + s4[1]) + (s4[2] + s4[3]);
  }
  static LS_BOTH Real maximum(const F (&x)[L]) {
    F best = x[0];
    for (int j = 1; j < L; ++j)
      for (int l = 0; l < 32; ++l) best.v[l] = best.v[l] > x[j].v[l] ? best.v[l] : x[j].v[l];
    for (int l = 0; l < 16; ++l) best.v[l] = best.v[l] > best.v[l + 16] ? best.v[l] : best.v[l + 16];
    for (int l = 0; l < 8; ++l) best.v[l] = best.v[l] > best.v[l + 8] ? best.v[l] : best.v[l + 8];
    for (int l = 0; l < 4; ++l) best.v[l] = best.v[l] > best.v[l + 4] ? best.v[l] : best.v[l + 4];
    const Real a = best.v[0] > best.v[1] ? best.v[0] : best.v[1], b = best.v[2] > best.v[3] ? best.v[2] : best.v[3];
    return a > b ? a : b;
  }
  static int add(int v) { return v; }

  static void pop(F (&keys)[L], int from, int to, Real& key, int& column) {
    key = -INFINITY; column = 1 << 30;
    for (int c = from; c < to; ++c) {
      const Real k = keys[c >> 5].v[c & 31];
      if (column == 1 << 30 || k > key) { key = k; column = c; }
    }
    if (column < 1 << 30) keys[column >> 5].v[column & 31] = -INFINITY;
  }
  // No branch that depends on the data: key and column are one integer that sorts by (key asc, column desc), and the
  // columns fall into groups (column mod GROUPS) whose best is kept.
  static constexpr int WIDTH = 32 * L, GROUPS = WIDTH / 8 < 32 ? WIDTH / 8 : 32;
  using Packed = std::conditional_t<sizeof(Real) == 4, uint64_t, unsigned __int128>;
  alignas(64) Packed packed[WIDTH];
  alignas(64) Packed best[GROUPS];
  // Largest of COUNT elements, STEP apart, by scalar loads: a vector load of what was just stored would stall.
  template <int STEP, int COUNT>
  static LS_BOTH Packed largest(const Packed* at) {
    Packed top = scalar(at[0]);
#pragma GCC unroll 32
    for (int i = 1; i < COUNT; ++i) {
      const Packed other = scalar(at[i * STEP]);
      top = top > other ? top : other;
    }
    return top;
  }
  static LS_BOTH Packed scalar(Packed x) {
    if constexpr (sizeof(Packed) == 8) asm("" : "+r"(x));
    return x;
  }
  void begin_ranking(F (&keys)[L]) {
    using Bits = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;
    constexpr Bits SIGN = (Bits)1 << (8 * sizeof(Bits) - 1);
    const Real* const flat = reinterpret_cast<const Real*>(keys);
    for (int c = 0; c < WIDTH; ++c) {
      const Bits bits = bit_cast<Bits>(flat[c] + (Real)0);  // -0 counts as 0
      const Bits order = bits & SIGN ? ~bits : bits | SIGN;
      packed[c] = (Packed)order << 32 | (uint32_t)~c;
    }
    for (int g = 0; g < GROUPS; ++g) best[g] = packed[g];
    for (int c = GROUPS; c < WIDTH; ++c) best[c % GROUPS] = best[c % GROUPS] > packed[c] ? best[c % GROUPS] : packed[c];
  }
  void next_rank(F (&keys)[L], int, int rank, bool wanted) {
    if (!wanted) return;
    const Packed top = largest<1, GROUPS>(best);
    const unsigned column = ~(uint32_t)top, group = column % GROUPS;
    rank_ids[rank] = column;
    rank_keys[rank] = reinterpret_cast<const Real*>(keys)[column];
    packed[column] = 0;
    best[group] = largest<GROUPS, WIDTH / GROUPS>(packed + group);
  }
  Real best_left(const F (&keys)[L], int from, int to) const {
    Real left = -INFINITY;
    for (int c = from; c < to; ++c) {
      const Real key = keys[c >> 5].v[c & 31];
      left = packed[c] != 0 && key > left ? key : left;
    }
    return left;
  }
  LS_BOTH void store_row(Real* row, const F (&x)[L]) { memcpy(row, x, sizeof(x)); }
  LS_BOTH void load_row(F (&x)[L], const Real* row) { memcpy(x, row, sizeof(x)); }
  template <class T>
  static LS_BOTH void write(T* row, const F (&x)[L], int columns, bool active) {
    if (!active) return;
    for (int j = 0; j < L; ++j) {
      const int stop = columns - 32 * j < 32 ? columns - 32 * j : 32;
      for (int l = 0; l < stop; ++l) row[32 * j + l] = narrow<T>(x[j].v[l]);
    }
  }
};

}  // namespace loadstone
