// The vector type of every CPU kernel: W floats. The compiler flags of a file set W: 16 with
// AVX-512, 8 with AVX2, else 4, which any 64-bit machine has.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef GLM_ISA
#error "compile with -DGLM_ISA=scalar, avx2 or avx512"
#endif

namespace glm {

namespace GLM_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

#define GLM_INLINE static inline __attribute__((always_inline))
// For the lambdas given to `sweep` and `sums`, so that n == W is known when they are compiled.
#define GLM_INLINED __attribute__((always_inline))

template <class To, class From>
GLM_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

GLM_INLINE vf all(float x) {
#if defined(__AVX512F__)
  return bits_as<vf>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return bits_as<vf>(_mm256_set1_ps(x));
#else
  return vf{x, x, x, x};
#endif
}

GLM_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}

GLM_INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return bits_as<vf>(__builtin_convertvector(h, vu) << 16);
}

GLM_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

// The upper halves, rounded to nearest even, as integers; a NaN stays a NaN. Integer arithmetic,
// because vcvtneps2bf16 flushes denormals and torch does not.
GLM_INLINE vu rounded(vf x) {
  vu u = bits_as<vu>(x);
  return x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : vu{} + 0x7fc0;
}

GLM_INLINE void store(bf16* p, vf x) {
  vh h = __builtin_convertvector(rounded(x), vh);
  memcpy(p, &h, sizeof h);
}

GLM_INLINE float get(const float* p) { return *p; }
GLM_INLINE float get(const bf16* p) { return bits_as<float>(uint32_t(p->bits) << 16); }
GLM_INLINE void put(float* p, float x) { *p = x; }
GLM_INLINE void put(bf16* p, float x) {
  uint32_t u = bits_as<uint32_t>(x);
  p->bits = x == x ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

// Loads the first n < W elements; the other lanes are `rest`, and their memory is not touched.
template <class T>
GLM_INLINE vf load_n(const T* p, int64_t n, float rest = 0.0f) {
  T part[W];
  store(part, all(rest));
  memcpy(part, p, size_t(n) * sizeof(T));
  return load(part);
}

template <class T>
GLM_INLINE void store_n(T* p, vf x, int64_t n) {
  T part[W];
  store(part, x);
  memcpy(p, part, size_t(n) * sizeof(T));
}

// x with the lanes from n on set to zero.
GLM_INLINE vf first(vf x, int64_t n) {
  if (n == W) return x;
  float lane[W];
  store(lane, x);
  return load_n(lane, n);
}

// f(i, n) for i = 0, W, 2W, ...: n = W while whole vectors fit, then once with the rest.
template <class F>
GLM_INLINE void sweep(int64_t size, F f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, int64_t(W));
  if (i < size) f(i, size - i);
}

template <class T>
GLM_INLINE vf take(const T* p, int64_t n) {
  return n == W ? load(p) : load_n(p, n);
}

template <class T>
GLM_INLINE void give(T* p, vf x, int64_t n) {
  n == W ? store(p, x) : store_n(p, x, n);
}

// A NaN in x survives; limits are never NaN.
GLM_INLINE vf at_most(vf x, float limit) { return x > all(limit) ? all(limit) : x; }
GLM_INLINE vf at_least(vf x, float limit) { return x < all(limit) ? all(limit) : x; }
GLM_INLINE vf larger(vf a, vf b) { return a < b ? b : a; }

// a * b + c, rounded once where the instruction set can. Spelled out, never left to the compiler
// (-ffp-contract=off): contracted, dy * weight - mean(dy * weight) is not zero where it should be.
GLM_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return bits_as<vf>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__AVX2__)
  return bits_as<vf>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
  return a * b + c;
#endif
}
GLM_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, all(c)); }
GLM_INLINE vf fma(vf a, float b, vf c) { return fma(a, all(b), c); }
GLM_INLINE vf fma(vf a, float b, float c) { return fma(a, all(b), all(c)); }

GLM_INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return bits_as<vf>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(x)));
#elif defined(__AVX2__)
  return bits_as<vf>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

#if defined(__AVX2__)
// The lanes halved to four.
GLM_INLINE __m128 sum_to_four(vf x) {
#if defined(__AVX512F__)
  const __m512 z = bits_as<__m512>(x);
  const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, z, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, z, 1));
#else
  const __m256 half = bits_as<__m256>(x);
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// Sum of the lanes in a fixed order: halves, quarters, ...
GLM_INLINE float sum(vf x) {
#if defined(__AVX2__)
  const __m128 four = sum_to_four(x), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[W];
  store(lane, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const vf (&x)[4], float* out) {
#if defined(__AVX2__)
  const __m128 s = sum_to_four(x[0]), t = sum_to_four(x[1]);
  const __m128 u = sum_to_four(x[2]), v = sum_to_four(x[3]);
  const __m128 st = _mm_add_ps(_mm_movelh_ps(s, t), _mm_movehl_ps(t, s));
  const __m128 uv = _mm_add_ps(_mm_movelh_ps(u, v), _mm_movehl_ps(v, u));
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(st, uv, 0x88), _mm_shuffle_ps(st, uv, 0xdd)));
#else
  for (int k = 0; k < 4; ++k) out[k] = sum(x[k]);
#endif
}

// K sums over a row: f(i, n, sums) adds the n elements at i to each of the K. Blocks of 32 vectors
// are summed by themselves, so that rounding errors grow with the row's square root at most.
template <int K, class F>
GLM_INLINE void sums(int64_t size, float (&out)[K], F f) {
  constexpr int64_t block = 32 * W;
  vf total[K] = {};
  for (int64_t begin = 0; begin < size; begin += block) {
    vf part[K] = {};
    const int64_t length = size - begin < block ? size - begin : block;
    sweep(length, [&](int64_t i, int64_t n) GLM_INLINED { f(begin + i, n, part); });
    for (int k = 0; k < K; ++k) total[k] += part[k];
  }
  for (int k = 0; k < K; ++k) out[k] = sum(total[k]);
}

GLM_INLINE float largest(vf x) {
  float lane[W];
  store(lane, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] < lane[i + half] ? lane[i + half] : lane[i];
  return lane[0];
}

GLM_INLINE vi larger(vi a, vi b) { return a < b ? b : a; }

GLM_INLINE int32_t largest(vi x) {
#if defined(__AVX2__)
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
#else
  int32_t top = x[0];
  for (int i = 1; i < W; ++i) top = top < x[i] ? x[i] : top;
  return top;
#endif
}

// 2^n for n in [-126, 127].
GLM_INLINE vf power_of_two(vi n) { return bits_as<vf>((n + 127) << 23); }

// e^x within 1 ulp, gradual underflow included; NaN, infinities and overflow as expf.
// x = n ln2 + r; e^r = 1 + r + r^2 q(r), q fitted at Chebyshev nodes (relative error 1e-8).
GLM_INLINE vf exp(vf x) {
  x = at_least(at_most(x, 89.0f), -104.0f);
  vf shifted = fma(x, 0x1.715476p+0f, 0x1.8p+23f);  // the sum's last bits are round(x / ln2)
  vi n = bits_as<vi>(shifted) - 0x4b400000;
  vf k = shifted - 0x1.8p+23f;
  vf r = fma(k, -0x1.7f7d1cp-20f, fma(k, -0x1.62e4p-1f, x));  // ln2 in two parts
  vf q = all(0x1.6d444ep-10f);
  constexpr float fitted[] = {0x1.120c68p-7f, 0x1.5554e8p-5f, 0x1.5554dcp-3f, 0.5f};
  for (float c : fitted) q = fma(q, r, c);
  vf y = fma(q, r * r, r) + 1.0f;
  n = x == x ? n : vi{};
  vi half = n >> 1;  // two factors, since 2^n alone leaves the normal range at both ends
  return y * power_of_two(half) * power_of_two(n - half);
}

GLM_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// The normal distribution at x: `cdf` = (1 + erf(x / sqrt 2)) / 2 and `density`.
// For z = |x|, cdf(-z) = e^(-z^2/2) P(1 / (1 + 0.3 z)), P fitted to relative error 1e-7.
struct Normal {
  vf cdf, density;
};

GLM_INLINE Normal normal(vf x) {
  vf z = bits_as<vf>(bits_as<vi>(x) & 0x7fffffff);
  vf e = exp(z * z * -0.5f);
  vf u = 1.0f / fma(z, 0.3f, 1.0f);
  vf p = all(0.0f);
  constexpr float fitted[] = {0x1.3e6e3ap-5f,  -0x1.5f1dccp-3f, 0x1.dd6774p-3f,
                              -0x1.4ceeacp-4f, 0x1.2a357cp-3f,  0x1.7edd1cp-4f,
                              0x1.f48ccep-4f,  0x1.e945ep-4f,   0x1.3138b2p-17f};
  for (float c : fitted) p = fma(p, u, c);
  vf tail = e * p;
  return {x < all(0.0f) ? tail : 1.0f - tail, e * 0x1.988454p-2f};
}

}  // namespace GLM_ISA
}  // namespace glm
