// Vector primitives for any machine, in the compiler's portable vectors. There is no fused
// multiply-add, which not every machine has.
#pragma once

#include "lanes.h"

namespace glm::GLM_ISA {

constexpr int REGISTERS = 16;  // vectors at hand, as far as a loop may count on

GLM_INLINE vf all(float x) { return vf{x, x, x, x}; }
GLM_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

GLM_INLINE vf root(vf x) {
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Sum of the lanes in a fixed order.
GLM_INLINE float sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const vf (&x)[4], float* out) {
  for (int k = 0; k < 4; ++k) out[k] = sum(x[k]);
}

GLM_INLINE int32_t largest(vi x) {
  int32_t top = x[0];
  for (int i = 1; i < W; ++i) top = top < x[i] ? x[i] : top;
  return top;
}

constexpr bool pair_products = false;
GLM_INLINE bool has_pair_products() { return false; }
GLM_INLINE vf add_pairs(vf sum, vi, vi) { return sum; }

}  // namespace glm::GLM_ISA
