// The vectors of every CPU kernel: loads, stores, tails, sums and functions on lanes. What needs
// instructions of one machine lies in vec_x86.h, vec_arm.h and vec_portable.h.
#pragma once

#include "bf16.h"
#include "lanes.h"

#if defined(__AVX2__)
#include "vec_x86.h"
#elif defined(GLM_ARM)
#include "vec_arm.h"
#else
#include "vec_portable.h"
#endif

#if defined(GLM_WIDE)
#include "vec_wide.h"
#endif

namespace glm {

namespace GLM_ISA {

#if !defined(GLM_WIDE)
GLM_INLINE vf all(float x) { return native(x); }
#endif

template <class V = vf>
GLM_INLINE V load(const float* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}

#if !defined(GLM_WIDE)
GLM_INLINE vf load(const bf16* p) {
#if defined(GLM_ARM)
  return upper_halves(p);
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return bits_as<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
#endif

template <class V>
GLM_INLINE void store(float* p, V x) {
  memcpy(p, &x, sizeof x);
}

// The upper halves, rounded to nearest even, as integers; a NaN stays a NaN. Integer arithmetic,
// because vcvtneps2bf16 flushes denormals and torch does not.
GLM_INLINE nu rounded(nf x) {
  nu u = bits_as<nu>(x);
  return x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : nu{} + 0x7fc0;
}

GLM_INLINE void store(bf16* p, vf x) {
#if defined(GLM_WIDE)
  const Parts parts = bits_as<Parts>(x);
  for (int i = 0; i < W / NATIVE; ++i) {
    const nh h = __builtin_convertvector(rounded(parts.part[i]), nh);
    memcpy(p + i * NATIVE, &h, sizeof h);
  }
#elif defined(GLM_ARM)
  store_lower_halves(p, rounded(x));
#else
  vh h = __builtin_convertvector(rounded(x), vh);
  memcpy(p, &h, sizeof h);
#endif
}

GLM_INLINE vi load_words(const void* p) {
  vi x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Loads one of the machine's vectors.
#if !defined(GLM_WIDE)
template <class T>
GLM_INLINE nf part_of(const T* p) {
  return load(p);
}
#endif

// The same of n elements; the other lanes are zero.
template <class T>
GLM_INLINE nf part_of(const T* p, int64_t n) {
  if (n == NATIVE) return part_of(p);
  T part[NATIVE] = {};
  memcpy(part, p, size_t(n) * sizeof(T));
  return part_of(part);
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

#if !defined(GLM_WIDE)
GLM_INLINE vf larger(vf a, vf b) { return a < b ? b : a; }
#endif

// a * b + c, rounded once where the instruction set can. Spelled out, never left to the compiler
// (-ffp-contract=off): contracted, dy * weight - mean(dy * weight) is not zero where it should be.
GLM_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, all(c)); }
GLM_INLINE vf fma(vf a, float b, vf c) { return fma(a, all(b), c); }
GLM_INLINE vf fma(vf a, float b, float c) { return fma(a, all(b), all(c)); }

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

}  // namespace GLM_ISA
}  // namespace glm

#if defined(GLM_WIDE)
#include "functions_wide.h"
#else
#include "functions.h"
#endif
