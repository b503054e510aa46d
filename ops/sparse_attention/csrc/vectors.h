// Vectors of a register's width, and the functions of them that the tiles need. Whatever the machine has, a value goes
// through the same operations wherever it stands in a vector, so that what a row comes to does not hang on its
// neighbours. Multiplications and additions are fused where the machine can (fma), and apart elsewhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

#define LS_INLINE inline __attribute__((always_inline))

namespace loadstone::attention {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_VECTORS = 4;  // of 32 registers, 6 x 4 hold sums
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, TILE_VECTORS = 2;  // of 16 registers, 6 x 2
#else
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 2;
#endif
constexpr int TILE_ROWS = 6;

// Loads and stores need no alignment beyond that of one number.
typedef float FloatVector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double DoubleVector __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef int32_t IntVector __attribute__((vector_size(VECTOR_BYTES)));

template <class Real> struct VectorOf;
template <> struct VectorOf<float> { using type = FloatVector; };
template <> struct VectorOf<double> { using type = DoubleVector; };
template <class Real> using Vector = typename VectorOf<Real>::type;
template <class Real> constexpr int WIDTH = VECTOR_BYTES / sizeof(Real);
template <class Real> constexpr Real NEVER = -std::numeric_limits<Real>::infinity();

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class Real> LS_INLINE Vector<Real> load(const Real* from) { return *reinterpret_cast<const Vector<Real>*>(from); }
template <class Real> LS_INLINE void store(Real* to, Vector<Real> x) { *reinterpret_cast<Vector<Real>*>(to) = x; }
template <class Real> LS_INLINE Vector<Real> all(Real x) { return x - Vector<Real>{}; }

#if defined(__AVX512F__)
LS_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return _mm512_fmadd_ps(a, b, c); }
LS_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
LS_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return _mm256_fmadd_ps(a, b, c); }
LS_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) { return _mm256_fmadd_pd(a, b, c); }
#else
LS_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return a * b + c; }
LS_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) { return a * b + c; }
#endif

// Sum and maximum over the lanes, halves upon halves.
template <class Real>
LS_INLINE Real sum(Vector<Real> x) {
  Real lane[WIDTH<Real>];
  store(lane, x);
  for (int half = WIDTH<Real> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
template <class Real> LS_INLINE Vector<Real> larger(Vector<Real> a, Vector<Real> b) { return a > b ? a : b; }
template <class Real> LS_INLINE Vector<Real> smaller(Vector<Real> a, Vector<Real> b) { return a < b ? a : b; }
template <class Real>
LS_INLINE Real maximum(Vector<Real> x) {
  Real lane[WIDTH<Real>];
  store(lane, x);
  for (int half = WIDTH<Real> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// 0, 1, 2, ...
template <class Real>
LS_INLINE Vector<Real> lanes() {
  Vector<Real> x;
  for (int i = 0; i < WIDTH<Real>; ++i) x[i] = (Real)i;
  return x;
}

// exp in fp32 (Cephes' polynomial, about 1 ulp; the router's exp_): 0 below -87.3, where results leave the normal
// numbers, and that of 88 above 88; NaN stays.
LS_INLINE FloatVector exponential(FloatVector x) {
  const FloatVector low = all(-87.3f), high = all(88.0f);
  const IntVector vanishes = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const FloatVector shifted = fma(x, all(1.44269504088896341f), all(12582912.0f));  // rounds to the nearest integer
  const IntVector n = (IntVector)shifted - 0x4B400000;
  const FloatVector nf = shifted - 12582912.0f;
  FloatVector r = fma(nf, all(-0.693359375f), x);
  r = fma(nf, all(2.12194440e-4f), r);
  FloatVector p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  p = p * (FloatVector)((n + 127) << 23);
  return (FloatVector)(~vanishes & (IntVector)p);
}
LS_INLINE DoubleVector exponential(DoubleVector x) {
  for (int i = 0; i < WIDTH<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
template <class Real> LS_INLINE Real exponential_of(Real x) { return exponential(all(x))[0]; }

// Natural logarithm of normal positive fp32 numbers (Cephes, about 1 ulp; the router's log_).
LS_INLINE FloatVector logarithm(FloatVector x) {
  const IntVector bits = (IntVector)x;
  IntVector e = (bits >> 23) - 126;
  FloatVector m = (FloatVector)((bits & 0x007FFFFF) | 0x3F000000);
  const IntVector low = m < all(0.707106781186547524f);
  e = low ? e - 1 : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const FloatVector z = m * m, ef = __builtin_convertvector(e, FloatVector);
  FloatVector p = all(7.0376836292e-2f);
  p = fma(p, m, all(-1.1514610310e-1f));
  p = fma(p, m, all(1.1676998740e-1f));
  p = fma(p, m, all(-1.2420140846e-1f));
  p = fma(p, m, all(1.4249322787e-1f));
  p = fma(p, m, all(-1.6668057665e-1f));
  p = fma(p, m, all(2.0000714765e-1f));
  p = fma(p, m, all(-2.4999993993e-1f));
  p = fma(p, m, all(3.3333331174e-1f));
  FloatVector y = p * m * z;
  y = fma(ef, all(-2.12194440e-4f), y);
  y = fma(z, all(-0.5f), y);
  return fma(ef, all(0.693359375f), m + y);
}

}  // namespace loadstone::attention
