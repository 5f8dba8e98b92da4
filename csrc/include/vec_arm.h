// Vector primitives for 64-bit Arm with Advanced SIMD (neon), which every such CPU has.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace glm::GLM_ISA {

constexpr int REGISTERS = 32;

GLM_INLINE nf native(float x) { return bits_as<nf>(vdupq_n_f32(x)); }

// a * b + c, rounded once.
GLM_INLINE nf fma(nf a, nf b, nf c) {
  return bits_as<nf>(
      vfmaq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(a), bits_as<float32x4_t>(b)));
}

GLM_INLINE nf root(nf x) { return bits_as<nf>(vsqrtq_f32(bits_as<float32x4_t>(x))); }

// bf16 in memory become the upper halves of floats, and the lower halves of x become bf16. The
// compiler's own conversions of short vectors go lane by lane.
GLM_INLINE nf upper_halves(const bf16* p) {
  return bits_as<nf>(vshll_n_u16(vld1_u16(&p->bits), 16));
}
GLM_INLINE void store_lower_halves(bf16* p, nu x) {
  vst1_u16(&p->bits, vmovn_u32(bits_as<uint32x4_t>(x)));
}

// Sum of the lanes in a fixed order: neighbours, then their sums.
GLM_INLINE float sum(nf x) { return vaddvq_f32(bits_as<float32x4_t>(x)); }

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const nf (&x)[4], float* out) {
  const float32x4_t low = vpaddq_f32(bits_as<float32x4_t>(x[0]), bits_as<float32x4_t>(x[1]));
  const float32x4_t high = vpaddq_f32(bits_as<float32x4_t>(x[2]), bits_as<float32x4_t>(x[3]));
  vst1q_f32(out, vpaddq_f32(low, high));
}

GLM_INLINE int32_t largest(ni x) { return vmaxvq_s32(bits_as<int32x4_t>(x)); }

// sum += the products of each lane's two bf16. BFDOT rounds sums of two products to odd, not to
// nearest, and counts denormals as 0, so it serves where results are bfloat16 alone.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(GLM_EXACT)
constexpr bool pair_products = true;
GLM_INLINE bool has_pair_products() { return true; }  // the whole variant asks for it
GLM_INLINE nf add_pairs(nf sum, ni a, ni b) {
  return bits_as<nf>(
      vbfdotq_f32(bits_as<float32x4_t>(sum), bits_as<bfloat16x8_t>(a), bits_as<bfloat16x8_t>(b)));
}
#else
constexpr bool pair_products = false;
GLM_INLINE bool has_pair_products() { return false; }
GLM_INLINE nf add_pairs(nf sum, ni, ni) { return sum; }
#endif

}  // namespace glm::GLM_ISA
