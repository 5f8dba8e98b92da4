// Vectors of 16 lanes on machines whose own are shorter, for the exact kernels (docs/exact.md).
// Lanes are added up in the order that vec_x86.h has for AVX-512.
#pragma once

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

GLM_INLINE vf root(vf x) {
  Parts p = bits_as<Parts>(x);
  for (nf& part : p.part) part = root(part);
  return bits_as<vf>(p);
}

// Sum of the lanes in a fixed order: halves, quarters, ...
GLM_INLINE float sum(vf x) {
  float lane[W];
  memcpy(lane, &x, sizeof x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// out[k] = sum(x[k]), the same bits.
GLM_INLINE void sums(const vf (&x)[4], float* out) {
  for (int k = 0; k < 4; ++k) out[k] = sum(x[k]);
}

}  // namespace glm::GLM_ISA
