// Small matrix products on the machine's own vectors, for operands that lie in the cache.
//
// Operands consist of 4-byte words along the dimension that is summed over (the depth). A word is
// one float (Single), or two neighbouring bfloat16 (Pair: one instruction of AVX512_BF16, or Arm's
// BFDOT, multiplies and adds both in float). Sums are float.
#pragma once

#include <type_traits>

#include "vec.h"

namespace glm::GLM_ISA {

struct Single {
  static constexpr int64_t per_word = 1;
  __attribute__((always_inline)) static nf add(nf sum, nf a, nf b) { return fma(a, b, sum); }
};

struct TwoBf16 {
  static constexpr int64_t per_word = 2;
  __attribute__((always_inline)) static nf add(nf sum, nf a, nf b) {
    return add_pairs(sum, bits_as<ni>(a), bits_as<ni>(b));
  }
};
using Pair = std::conditional_t<pair_products, TwoBf16, Single>;  // where has_pair_products

// A register tile: ROWS x (COLUMNS * NATIVE) sums, one broadcast and COLUMNS loads per step.
// Six rows of NATIVE = 4 would leave no registers for the broadcasts, of which Arm has one a row.
constexpr int COLUMNS = REGISTERS == 32 ? 4 : 2, ROWS = NATIVE == 4 && REGISTERS == 32 ? 4 : 6;

// A matrix of words with any strides, read word by word: rows by depth.
struct Strided {
  const float* p;
  int64_t row, depth;
  Strided from(int64_t i) const { return {p + i * row, row, depth}; }
};

template <class Words, int M, int V>
static void product_tile(int64_t depth, Strided a, const float* b, int64_t ldb, float* c,
                         int64_t ldc, bool add) {
  nf acc[M][V];
  GLM_UNROLLED
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = add ? load<nf>(c + m * ldc + v * NATIVE) : native(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    nf row[V];
    for (int v = 0; v < V; ++v) row[v] = load<nf>(b + k * ldb + v * NATIVE);
    GLM_UNROLLED
    for (int m = 0; m < M; ++m) {
      const nf x = native(a.p[m * a.row + k * a.depth]);
      for (int v = 0; v < V; ++v) acc[m][v] = Words::add(acc[m][v], x, row[v]);
    }
  }
  GLM_UNROLLED
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * NATIVE, acc[m][v]);
}

template <class Words, int V>
static void product_columns(int64_t rows, int64_t depth, Strided a, const float* b, int64_t ldb,
                            float* c, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS)
    product_tile<Words, ROWS, V>(depth, a.from(m), b, ldb, c + m * ldc, ldc, add);
  const Strided rest = a.from(m);
  float* out = c + m * ldc;
  switch (rows - m) {
    case 5:
      return product_tile<Words, 5, V>(depth, rest, b, ldb, out, ldc, add);
    case 4:
      return product_tile<Words, 4, V>(depth, rest, b, ldb, out, ldc, add);
    case 3:
      return product_tile<Words, 3, V>(depth, rest, b, ldb, out, ldc, add);
    case 2:
      return product_tile<Words, 2, V>(depth, rest, b, ldb, out, ldc, add);
    case 1:
      return product_tile<Words, 1, V>(depth, rest, b, ldb, out, ldc, add);
  }
}

// c [rows, columns] = a b, or += with `add`;  a [rows, depth], b [depth, columns], depth in words.
// columns is a multiple of NATIVE; b and c have contiguous rows.
template <class Words>
static void product(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + COLUMNS * NATIVE <= columns; n += COLUMNS * NATIVE)
    product_columns<Words, COLUMNS>(rows, depth, a, b + n, ldb, c + n, ldc, add);
  for (; n < columns; n += NATIVE)
    product_columns<Words, 1>(rows, depth, a, b + n, ldb, c + n, ldc, add);
}

}  // namespace glm::GLM_ISA
