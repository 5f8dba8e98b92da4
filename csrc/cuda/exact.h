// What exact kernels compute with (docs/exact.md): the CPU's own functions for single floats, and
// sums in the order of its 16 lanes, all in float32.
#pragma once

#include "device.h"

#define GLM_SPACE gpu::exact
#define GLM_INLINE static __device__ inline

namespace glm::gpu::exact {

using vf = float;
using vi = int32_t;

GLM_INLINE vf all(float x) { return x; }
GLM_INLINE vf fma(vf a, vf b, vf c) { return fmaf(a, b, c); }

template <class To, class From>
GLM_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace glm::gpu::exact

#include "functions.h"
#include "routing.h"

namespace glm::gpu::exact {

constexpr int lanes = 16, block_elements = 32 * lanes;

// Threads that sum up a row: a lane of a block of elements each.
inline int threads_for_row(int64_t size) {
  return threads_for(divided_up(size, block_elements) * lanes);
}

// K sums over a row, as `sums` of csrc/include/vec.h forms them: f(i, sums) adds element i to each.
// Every thread of the block gets them. A thread sees what another wrote in f after the call.
template <int K, class F>
__device__ inline void row_sums(int64_t size, float (&out)[K], F f) {
  GLM_SHARED(float, parts, K* max_threads);
  const int lane = int(threadIdx.x) % lanes, mine = int(threadIdx.x) / lanes;
  const int blocks = int(blockDim.x) / lanes;
  for (int k = 0; k < K; ++k) out[k] = 0.0f;
  for (int64_t begin = 0; begin < size; begin += int64_t(blocks) * block_elements) {
    const int64_t first = begin + mine * block_elements, rest = size - begin;
    const int64_t end = first + block_elements < size ? first + block_elements : size;
    float part[K] = {};
    for (int64_t i = first + lane; i < end; i += lanes) f(i, part);
    for (int k = 0; k < K; ++k) parts[k * max_threads + int(threadIdx.x)] = part[k];
    __syncthreads();
    for (int b = 0; b < blocks && b * int64_t(block_elements) < rest; ++b)
      for (int k = 0; k < K; ++k) out[k] += parts[k * max_threads + b * lanes + lane];
    __syncthreads();
  }
  for (int half = lanes / 2; half; half /= 2)
    for (int k = 0; k < K; ++k) out[k] += swapped(out[k], half);
}

struct Larger {
  __device__ float operator()(float a, float b) const { return a < b ? b : a; }
};

}  // namespace glm::gpu::exact
