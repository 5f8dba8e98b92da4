// Vector primitives for x86-64 with AVX2 or AVX-512.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace glm::GLM_ISA {

#if defined(__AVX512F__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

GLM_INLINE nf native(float x) {
#if defined(__AVX512F__)
  return bits_as<nf>(_mm512_set1_ps(x));
#else
  return bits_as<nf>(_mm256_set1_ps(x));
#endif
}

// a * b + c, rounded once.
GLM_INLINE nf fma(nf a, nf b, nf c) {
#if defined(__AVX512F__)
  return bits_as<nf>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#else
  return bits_as<nf>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#endif
}

GLM_INLINE nf root(nf x) {
#if defined(__AVX512F__)
  return bits_as<nf>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(x)));
#else
  return bits_as<nf>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#endif
}

// The lanes halved to four.
GLM_INLINE __m128 sum_to_four(nf x) {
#if defined(__AVX512F__)
  const __m512 z = bits_as<__m512>(x);
  const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, z, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, z, 1));
#else
  const __m256 half = bits_as<__m256>(x);
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Sum of the lanes in a fixed order: halves, quarters, ...
GLM_INLINE float sum(nf x) {
  const __m128 four = sum_to_four(x), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const nf (&x)[4], float* out) {
  const __m128 s = sum_to_four(x[0]), t = sum_to_four(x[1]);
  const __m128 u = sum_to_four(x[2]), v = sum_to_four(x[3]);
  const __m128 st = _mm_add_ps(_mm_movelh_ps(s, t), _mm_movehl_ps(t, s));
  const __m128 uv = _mm_add_ps(_mm_movelh_ps(u, v), _mm_movehl_ps(v, u));
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(st, uv, 0x88), _mm_shuffle_ps(st, uv, 0xdd)));
}

GLM_INLINE int32_t largest(ni x) {
#if defined(__AVX512F__)
  const __m512i z = bits_as<__m512i>(x);
  const __m256i half = _mm256_max_epi32(_mm512_maskz_extracti32x8_epi32(0xff, z, 0),
                                        _mm512_maskz_extracti32x8_epi32(0xff, z, 1));
#else
  const __m256i half = bits_as<__m256i>(x);
#endif
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// sum += the products of each lane's two bf16, in float. Denormals count as 0.
#if defined(__AVX512F__) && !defined(GLM_EXACT)
constexpr bool pair_products = true;  // where has_pair_products
GLM_INLINE bool has_pair_products() { return __builtin_cpu_supports("avx512bf16"); }
GLM_INLINE nf add_pairs(nf sum, ni a, ni b) {
  // assembly, since this file must compile for CPUs that lack the instruction
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
constexpr bool pair_products = false;
GLM_INLINE bool has_pair_products() { return false; }
GLM_INLINE nf add_pairs(nf sum, ni, ni) { return sum; }
#endif

}  // namespace glm::GLM_ISA
