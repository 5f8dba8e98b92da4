// Quantised weights as kernels read them. 4 bits: two codes a byte, the even element in the high
// nibble.
#pragma once

#include "device.h"

namespace glm::gpu {

__device__ inline float scale_of(const Codes& w, int64_t at) {
  return w.scale16 ? to_float(w.scale16[at]) : w.scale32[at];
}

// Returns V weights of row f from element i on, times their scale; V divides a group. Their V *
// BITS / 8 bytes are one load.
template <int BITS, int V>
__device__ inline void weights(const Codes& w, int64_t f, int64_t i, float (&out)[V]) {
  constexpr int bytes = V * BITS / 8;
  const int64_t at = f * (w.width * BITS / 8) + i * BITS / 8;
  const Pack<uint8_t, bytes> code = *reinterpret_cast<const Pack<uint8_t, bytes>*>(w.codes + at);
  const float scale = scale_of(w, f * w.groups + i / (w.width / w.groups));
  for (int j = 0; j < V; ++j) {
    const uint8_t byte = code.x[j * BITS / 8];
    const uint8_t high = BITS == 4 && j % 2 ? uint8_t(byte << 4) : byte;
    out[j] = float(BITS == 4 ? int8_t(high) >> 4 : int8_t(byte)) * scale;
  }
}

struct alignas(16) Words {
  uint32_t x[4];
};

// Returns the bits of x that a mask chooses, some of them flipped: one instruction on NVIDIA's
// chips, where the compiler makes two of it.
__device__ inline uint32_t chosen(uint32_t x, uint32_t mask, uint32_t flipped) {
#if defined(__CUDA_ARCH__)
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(flipped));
  return y;
#else
  return (x & mask) ^ flipped;
#endif
}

__device__ inline uint32_t as_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof y);
  return y;
}

__device__ inline float as_float(uint32_t bits) {
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// The signed code of BITS bits that begins at bit p of a word, without a conversion: at bit p of a
// mantissa it is worth itself where the exponent is 23 - p, if it fits below. The top bit, which
// counts negatively, is flipped and the sum of both offsets subtracted; all of it is exact.
template <int BITS>
__device__ inline float code_at(uint32_t word, int p) {
  constexpr int top = 1 << (BITS - 1), shift = BITS == 4 ? 12 : 16;
  const int at = p > 23 - BITS ? p - shift : p;
  const uint32_t moved = p > 23 - BITS ? word >> shift : word;
  const uint32_t exponent = uint32_t(127 + 23 - at) << 23;
  const uint32_t bits = chosen(moved, uint32_t(2 * top - 1) << at, exponent | uint32_t(top) << at);
  return as_float(bits) - (float(1 << (23 - at)) + float(top));
}

// Whether rows and groups can be read `bytes` at a time.
inline bool wide_codes(const Codes& w, int64_t bytes) {
  const int64_t step = bytes * 8 / w.bits;
  return w.width % step == 0 && w.width / w.groups % step == 0 &&
         reinterpret_cast<uintptr_t>(w.codes) % bytes == 0;
}

}  // namespace glm::gpu
