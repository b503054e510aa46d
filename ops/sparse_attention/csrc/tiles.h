// Products of tiles. Sums run over the depth in rising order, one fma a step, so that an element of a product is the
// same to the last bit whichever rows are computed beside it.
#pragma once
#include "vectors.h"

namespace loadstone::attention {

// c[i][x] (+)= sum over k of a[i][k] b[k * stride + x] for ROWS rows and NV vectors of columns.
template <class Real, int ROWS, int NV>
LS_INLINE void product_tile(const Real* const* a, int depth, const Real* b, int64_t stride, Real* const* c, int64_t at, bool add) {
  using V = Vector<Real>;
  constexpr int W = WIDTH<Real>;
  V sums[ROWS][NV];
  const Real* rows[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    rows[i] = a[i];
#pragma GCC unroll 8
    for (int x = 0; x < NV; ++x) sums[i][x] = add ? load(c[i] + at + x * W) : V{};
  }
  for (int k = 0; k < depth; ++k, b += stride) {
    V column[NV];
#pragma GCC unroll 8
    for (int x = 0; x < NV; ++x) column[x] = load(b + x * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V value = all(rows[i][k]);
#pragma GCC unroll 8
      for (int x = 0; x < NV; ++x) sums[i][x] = fma(value, column[x], sums[i][x]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int x = 0; x < NV; ++x) store(c[i] + at + x * W, sums[i][x]);
}

// c[j][x] += sum over i of a[i * width + j] b[i][x] for ROWS rows j and NV vectors of columns.
template <class Real, int ROWS, int NV>
LS_INLINE void transposed_tile(const Real* a, int64_t width, int depth, const Real* const* b, Real* c, int64_t stride, int64_t at) {
  using V = Vector<Real>;
  constexpr int W = WIDTH<Real>;
  V sums[ROWS][NV];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int x = 0; x < NV; ++x) sums[j][x] = load(c + j * stride + at + x * W);
  for (int i = 0; i < depth; ++i, a += width) {
    const Real* const row = b[i] + at;
    V column[NV];
#pragma GCC unroll 8
    for (int x = 0; x < NV; ++x) column[x] = load(row + x * W);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j) {
      const V value = all(a[j]);
#pragma GCC unroll 8
      for (int x = 0; x < NV; ++x) sums[j][x] = fma(value, column[x], sums[j][x]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int x = 0; x < NV; ++x) store(c + j * stride + at + x * W, sums[j][x]);
}

// f(integral constant) for n from 1 to TILE_ROWS.
template <class Fn>
LS_INLINE void with_rows(int n, Fn f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    default: return f(std::integral_constant<int, TILE_ROWS>{});
  }
}

// c[i][x] = (or, with add, +=) sum over k of a[i][k] b[k][x]; b has rows `stride` apart, and `columns` is a multiple of a
// vector's width.
template <class Real>
__attribute__((noinline)) void product(const Real* const* a, int rows, int depth, const Real* b, int64_t stride, int columns, Real* const* c, bool add) {
  constexpr int W = WIDTH<Real>, WIDE = W * TILE_VECTORS;
  int x = 0;
  for (; x + WIDE <= columns; x += WIDE)
    for (int i = 0; i < rows; i += TILE_ROWS)
      with_rows(rows - i, [&](auto n) { product_tile<Real, decltype(n)::value, TILE_VECTORS>(a + i, depth, b + x, stride, c + i, x, add); });
  for (; x < columns; x += W)
    for (int i = 0; i < rows; i += TILE_ROWS)
      with_rows(rows - i, [&](auto n) { product_tile<Real, decltype(n)::value, 1>(a + i, depth, b + x, stride, c + i, x, add); });
}

// c[j][x] += sum over i of a[i][j] b[i][x]; a has rows `width` apart and c rows `stride` apart.
template <class Real>
__attribute__((noinline)) void transposed_product(const Real* a, int64_t width, int depth, const Real* const* b, int rows, int columns, Real* c, int64_t stride) {
  constexpr int W = WIDTH<Real>, WIDE = W * TILE_VECTORS;
  int x = 0;
  for (; x + WIDE <= columns; x += WIDE)
    for (int j = 0; j < rows; j += TILE_ROWS)
      with_rows(rows - j, [&](auto n) { transposed_tile<Real, decltype(n)::value, TILE_VECTORS>(a + j, width, depth, b, c + j * stride, stride, x); });
  for (; x < columns; x += W)
    for (int j = 0; j < rows; j += TILE_ROWS)
      with_rows(rows - j, [&](auto n) { transposed_tile<Real, decltype(n)::value, 1>(a + j, width, depth, b, c + j * stride, stride, x); });
}

// Columns of `from` [rows, depth], rows `stride` apart, as rows of `to` [depth, width]; columns of `to` from `rows` on are 0.
template <class Real>
void transpose(const Real* from, int64_t stride, int rows, int depth, Real* to, int width) {
  constexpr int EDGE = 16;  // both sides stay within few cache lines
  for (int k = 0; k < depth; k += EDGE)
    for (int j = 0; j < rows; j += EDGE)
      for (int x = k; x < k + EDGE && x < depth; ++x)
        for (int y = j; y < j + EDGE && y < rows; ++y) to[(int64_t)x * width + y] = from[y * stride + x];
  if (rows < width)
    for (int x = 0; x < depth; ++x)
      for (int y = rows; y < width; ++y) to[(int64_t)x * width + y] = 0;
}

}  // namespace loadstone::attention
