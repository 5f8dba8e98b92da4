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

// Whether rows and groups can be read `bytes` at a time.
inline bool wide_codes(const Codes& w, int64_t bytes) {
  const int64_t step = bytes * 8 / w.bits;
  return w.width % step == 0 && w.width / w.groups % step == 0 &&
         reinterpret_cast<uintptr_t>(w.codes) % bytes == 0;
}

}  // namespace glm::gpu
