// Vectors of 16 lanes on machines whose own are shorter, for the exact kernels (docs/exact.md).
// What compares or converts goes by the machine's own vectors: of longer ones GCC takes each lane
// apart. Lanes are added up in the order that vec_x86.h has for AVX-512.
#pragma once

#include "bf16.h"
#include "lanes.h"

namespace glm::GLM_ISA {

// A vector as those of the machine.
struct Parts {
  nf part[W / NATIVE];
};

GLM_INLINE vf all(float x) {
  Parts p;
  for (nf& part : p.part) part = native(x);
  return bits_as<vf>(p);
}

// a * b + c, rounded once.
GLM_INLINE vf fma(vf a, vf b, vf c) {
  const Parts x = bits_as<Parts>(a), y = bits_as<Parts>(b);
  Parts z = bits_as<Parts>(c);
  for (int i = 0; i < W / NATIVE; ++i) z.part[i] = fma(x.part[i], y.part[i], z.part[i]);
  return bits_as<vf>(z);
}

// f of each of the machine's vectors.
template <class F>
GLM_INLINE vf by_parts(vf x, F f) {
  Parts p = bits_as<Parts>(x);
  for (nf& part : p.part) part = f(part);
  return bits_as<vf>(p);
}

GLM_INLINE vf root(vf x) {
  return by_parts(x, [](nf part) GLM_INLINED { return root(part); });
}

GLM_INLINE vf larger(vf a, vf b) {
  const Parts x = bits_as<Parts>(a);
  Parts y = bits_as<Parts>(b);
  for (int i = 0; i < W / NATIVE; ++i) y.part[i] = x.part[i] < y.part[i] ? y.part[i] : x.part[i];
  return bits_as<vf>(y);
}

typedef uint16_t nh __attribute__((vector_size(NATIVE * 2)));

GLM_INLINE nf part_of(const float* p) {
  nf x;
  memcpy(&x, p, sizeof x);
  return x;
}

GLM_INLINE nf part_of(const bf16* p) {
  nh h;
  memcpy(&h, p, sizeof h);
  return bits_as<nf>(__builtin_convertvector(h, nu) << 16);
}

GLM_INLINE vf load(const bf16* p) {
  Parts x;
  for (int i = 0; i < W / NATIVE; ++i) x.part[i] = part_of(p + i * NATIVE);
  return bits_as<vf>(x);
}

#if defined(__AVX2__)
GLM_INLINE nf halved(const Parts& p) { return p.part[0] + p.part[1]; }
GLM_INLINE nf halved(vf x) { return halved(bits_as<Parts>(x)); }

// Sum of the lanes in a fixed order: halves, quarters, ...
GLM_INLINE float sum(const Parts& p) { return sum(halved(p)); }
GLM_INLINE float sum(vf x) { return sum(halved(x)); }

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const vf (&x)[4], float* out) {
  sums({halved(x[0]), halved(x[1]), halved(x[2]), halved(x[3])}, out);
}
#else
GLM_INLINE float sum(const Parts& x) {
  float lane[W];
  memcpy(lane, &x, sizeof x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
GLM_INLINE float sum(vf x) { return sum(bits_as<Parts>(x)); }

GLM_INLINE void sums(const vf (&x)[4], float* out) {
  for (int k = 0; k < 4; ++k) out[k] = sum(x[k]);
}
#endif

}  // namespace glm::GLM_ISA
