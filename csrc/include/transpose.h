// Transposes small squares of floats.
#pragma once

#include "vec.h"

namespace glm::GLM_ISA {

#if defined(__AVX2__)
constexpr int64_t SIDE = 8;  // of a square
#else
constexpr int64_t SIDE = 4;
#endif

// to(j)[c] = x[c * stride + j] for j < SIDE, c < columns <= SIDE. All of the square is read.
template <class To>
GLM_INLINE void transpose(const float* x, int64_t stride, int64_t columns, const To& to) {
#if defined(__AVX2__)
  __m256 r[8], s[8];
  for (int c = 0; c < 8; ++c) r[c] = _mm256_loadu_ps(x + c * stride);
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
    for (int64_t c = 0; c < columns; ++c) to(j)[c] = x[c * stride + j];
#endif
}

}  // namespace glm::GLM_ISA
