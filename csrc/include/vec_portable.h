// Vector primitives for any machine, in the compiler's portable vectors. There is no fused
// multiply-add, which not every machine has; the exact kernels call the C library's.
#pragma once

#include "lanes.h"

namespace glm::GLM_ISA {

constexpr int REGISTERS = 16;  // vectors at hand, as far as a loop may count on

GLM_INLINE nf native(float x) { return nf{x, x, x, x}; }
#if defined(GLM_EXACT)
GLM_INLINE nf fma(nf a, nf b, nf c) {
  for (int i = 0; i < NATIVE; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
GLM_INLINE nf fma(nf a, nf b, nf c) { return a * b + c; }
#endif

GLM_INLINE nf root(nf x) {
  for (int i = 0; i < NATIVE; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Sum of the lanes in a fixed order.
GLM_INLINE float sum(nf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const nf (&x)[4], float* out) {
  for (int k = 0; k < 4; ++k) out[k] = sum(x[k]);
}

GLM_INLINE int32_t largest(ni x) {
  int32_t top = x[0];
  for (int i = 1; i < NATIVE; ++i) top = top < x[i] ? x[i] : top;
  return top;
}

constexpr bool pair_products = false;
GLM_INLINE bool has_pair_products() { return false; }
GLM_INLINE nf add_pairs(nf sum, ni, ni) { return sum; }

}  // namespace glm::GLM_ISA
