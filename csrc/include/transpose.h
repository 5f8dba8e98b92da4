// Transposes small squares of floats.
#pragma once

#include "vec.h"

namespace glm::GLM_ISA {

#if defined(__AVX2__)
constexpr int64_t SIDE = 8;  // of a square
#else
constexpr int64_t SIDE = 4;
#endif

#if defined(__AVX2__)
GLM_INLINE __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
GLM_INLINE __m256 eight(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
#endif

// to(j)[c] = x[c * stride + j] for j < SIDE, c < columns <= SIDE. All of the square is read.
template <class T, class To>
GLM_INLINE void transpose(const T* x, int64_t stride, int64_t columns, const To& to) {
#if defined(__AVX2__)
  __m256 r[8], s[8];
  for (int c = 0; c < 8; ++c) r[c] = eight(x + c * stride);
  for (int c = 0; c < 8; c += 2) {
    s[c] = _mm256_unpacklo_ps(r[c], r[c + 1]);
    s[c + 1] = _mm256_unpackhi_ps(r[c], r[c + 1]);
  }
  for (int c = 0; c < 8; c += 4)
    for (int i = 0; i < 2; ++i) {
      r[c + 2 * i] = _mm256_shuffle_ps(s[c + i], s[c + i + 2], 0x44);
      r[c + 2 * i + 1] = _mm256_shuffle_ps(s[c + i], s[c + i + 2], 0xee);
    }
  for (int j = 0; j < 4; ++j) {
    s[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
    s[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
  }
  for (int j = 0; j < 8; ++j) memcpy(to(j), &s[j], size_t(columns) * sizeof(float));
#else
  for (int64_t j = 0; j < SIDE; ++j)
    for (int64_t c = 0; c < columns; ++c) to(j)[c] = get(x + c * stride + j);
#endif
}

}  // namespace glm::GLM_ISA
