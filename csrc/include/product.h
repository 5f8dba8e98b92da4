// Small matrix products on the vector type, for operands that lie in the cache.
#pragma once

#include "vec.h"

namespace glm::GLM_ISA {

// A register tile: ROWS x (COLUMNS * W) sums, one broadcast and COLUMNS loads per step.
#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;  // of 32 registers
#else
constexpr int ROWS = 6, COLUMNS = 2;  // of 16
#endif

// A matrix of floats with any strides, read by element.
struct Strided {
  const float* p;
  int64_t row, column;
  Strided at(int64_t i, int64_t j) const { return {p + i * row + j * column, row, column}; }
};

template <int M, int V>
static void product_tile(int64_t depth, Strided a, const float* b, int64_t ldb, float* c,
                         int64_t ldc, bool add) {
  vf acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = add ? load(c + m * ldc + v * W) : all(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    vf row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * W);
    for (int m = 0; m < M; ++m) {
      const vf x = all(a.p[m * a.row + k * a.column]);
      for (int v = 0; v < V; ++v) acc[m][v] = fma(x, row[v], acc[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * W, acc[m][v]);
}

template <int V>
static void product_columns(int64_t rows, int64_t depth, Strided a, const float* b, int64_t ldb,
                            float* c, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS)
    product_tile<ROWS, V>(depth, a.at(m, 0), b, ldb, c + m * ldc, ldc, add);
  const Strided rest = a.at(m, 0);
  float* out = c + m * ldc;
  switch (rows - m) {
    case 5:
      return product_tile<5, V>(depth, rest, b, ldb, out, ldc, add);
    case 4:
      return product_tile<4, V>(depth, rest, b, ldb, out, ldc, add);
    case 3:
      return product_tile<3, V>(depth, rest, b, ldb, out, ldc, add);
    case 2:
      return product_tile<2, V>(depth, rest, b, ldb, out, ldc, add);
    case 1:
      return product_tile<1, V>(depth, rest, b, ldb, out, ldc, add);
  }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], or += with `add`. columns is a multiple
// of W; b and c have contiguous rows.
static inline void product(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b,
                           int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + COLUMNS * W <= columns; n += COLUMNS * W)
    product_columns<COLUMNS>(rows, depth, a, b + n, ldb, c + n, ldc, add);
  for (; n < columns; n += W) product_columns<1>(rows, depth, a, b + n, ldb, c + n, ldc, add);
}

}  // namespace glm::GLM_ISA
