// Products on tensor cores (NVIDIA, sm_80 and newer) of tiles in half precision, summed in float.
// On the CPU the lanes of a wave of 32 exchange their parts. A register holds a pair of values.
#pragma once

#include <type_traits>

#include "device.h"

#if !defined(__HIPCC__)

namespace glm::gpu {

__device__ inline uint32_t lows(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
__device__ inline uint32_t highs(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

template <class T>
constexpr bool is_bf16 = std::is_same_v<T, bf16>;

template <class T>
__device__ inline float half_of(uint32_t pair, int at) {
  T x;
  x.bits = uint16_t(pair >> 16 * at);
  return to_float(x);
}

// Subtracts a pair of values; exact where the differences are representable.
template <class T>
__device__ inline uint32_t minus(uint32_t pair, uint32_t other) {
  const uint32_t negative = other ^ 0x80008000u;
#if defined(GLM_FIBERS)
  T y[2];
  for (int i = 0; i < 2; ++i) from_float(half_of<T>(pair, i) + half_of<T>(negative, i), y[i]);
  return uint32_t(y[0].bits) | uint32_t(y[1].bits) << 16;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // never launched there
  return negative;
#else
  uint32_t y;  // sm_80 adds no pairs of bf16
  if constexpr (is_bf16<T>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(pair), "r"(0x3f803f80u), "r"(negative));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(pair), "r"(0x3c003c00u), "r"(negative));
  return y;
#endif
}

// Adds a tile [16, 16] times a tile [16, 8] to sums [16, 8]. Lane 4 g + t holds of the first tile
// row g (a[0], a[2]) and row g + 8 (a[1], a[3]), of the second column g, each in two pairs; and of
// the sums columns 2 t and 2 t + 1 of row g, then of row g + 8. Which inputs a pair stands for does
// not matter, as long as both tiles agree.
template <class T>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(GLM_FIBERS)
  const int lane = int(threadIdx.x) % 32, t = lane % 4;
  for (int other = 0; other < 4; ++other) {
    uint32_t rows[4], columns[2][2];
    for (int i = 0; i < 4; ++i) rows[i] = swapped(a[i], t ^ other);
    for (int c = 0; c < 2; ++c) {
      const int source = 4 * (2 * t + c) + other;
      columns[c][0] = swapped(b0, lane ^ source), columns[c][1] = swapped(b1, lane ^ source);
    }
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k)
        sum[i] +=
            half_of<T>(rows[i / 2 + k / 2 * 2], k % 2) * half_of<T>(columns[i % 2][k / 2], k % 2);
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
  if constexpr (is_bf16<T>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace glm::gpu

#endif
