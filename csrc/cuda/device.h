// What kernels need from their platform: CUDA, HIP, or one CPU fiber per thread (GLM_FIBERS,
// csrc/fibers). Kernels never assume a number of lanes: `wave` is 32 on NVIDIA and RDNA, 64 on
// gfx9. Every block has a multiple of 64 threads, so that waves are whole on all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launch.h"

#if defined(GLM_FIBERS)
#include "fibers.h"
#elif defined(__HIPCC__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if defined(GLM_FIBERS)
#define GLM_UNROLL
#else
#include <cstdio>
#define GLM_SHARED(T, name, size) __shared__ T name[size]
#define GLM_UNROLL _Pragma("unroll")
#endif

namespace glm::gpu {

#if defined(GLM_FIBERS)
inline int wave() { return fibers::wave; }
#elif defined(__HIPCC__)
#if defined(__GFX9__) || !defined(__HIP_DEVICE_COMPILE__)
__device__ constexpr int wave() { return 64; }
#else
__device__ constexpr int wave() { return 32; }
#endif
#else
__device__ constexpr int wave() { return 32; }
#endif

// Returns the value of the lane whose number differs in the bit `mask`; all lanes of a wave take
// part.
template <class T>
__device__ inline T swapped(T x, int mask) {
#if defined(GLM_FIBERS)
  return fibers::swapped(x, mask);
#elif defined(__HIPCC__)
  return __shfl_xor(x, mask);
#else
  return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// Ends the kernel because an index is out of range.
__device__ inline void out_of_range(const char* what, int64_t index, int64_t size) {
#if defined(GLM_FIBERS)
  throw std::out_of_range(std::string(what) + " " + std::to_string(index) + ": must lie in [0, " +
                          std::to_string(size) + ")");
#else
  printf("%s %lld: must lie in [0, %lld)\n", what, (long long)index, (long long)size);
#if defined(__HIPCC__)
  __builtin_trap();
#else
  __trap();
#endif
#endif
}

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

__device__ inline float to_float(f16 x) {
#if defined(GLM_FIBERS)
  _Float16 h;
  memcpy(&h, &x, sizeof h);
  return float(h);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

__device__ inline void from_float(float x, float& y) { y = x; }

// Rounded to nearest even; a NaN stays a NaN. Integer arithmetic, the same on every platform.
__device__ inline void from_float(float x, bf16& y) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  y.bits = x == x ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

// Never by memcpy of a __half: nvcc 13.0 makes two stores of a byte of it, and ptxas converts the
// value to 0..255 for the first (tests/backends/machine_code.py).
__device__ inline void from_float(float x, f16& y) {
#if defined(GLM_FIBERS)
  const _Float16 h = _Float16(x);
  memcpy(&y.bits, &h, sizeof h);
#else
  y.bits = __half_as_ushort(__float2half_rn(x));
#endif
}

// Elements of T in 16 bytes, the widest load of one thread.
template <class T>
constexpr int wide = 16 / int(sizeof(T));

// N elements moved as one: aligned to their own size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

// V values, A of them per load.
template <int V, int A = V, class T>
__device__ inline void take(const T* p, float (&x)[V]) {
  constexpr int N = A < wide<T> ? A : wide<T>;
  for (int i = 0; i < V; i += N) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p + i);
    for (int j = 0; j < N; ++j) x[i + j] = to_float(pack.x[j]);
  }
}

template <int V, int A = V, class T>
__device__ inline void give(T* p, const float (&x)[V]) {
  constexpr int N = A < wide<T> ? A : wide<T>;
  for (int i = 0; i < V; i += N) {
    Pack<T, N> pack;
    for (int j = 0; j < N; ++j) from_float(x[i + j], pack.x[j]);
    *reinterpret_cast<Pack<T, N>*>(p + i) = pack;
  }
}

constexpr int max_threads = 512, max_waves = max_threads / 32;

// Combines a value of every thread of the block with f, in a fixed order; every thread gets the
// result. `none` is f's neutral element. The closing barrier frees the shared memory for the next.
template <class T, class F>
__device__ inline T across_block(T x, T none, F f) {
  GLM_SHARED(T, of_wave, max_waves);
  const int lane = int(threadIdx.x) % wave(), mine = int(threadIdx.x) / wave();
  for (int mask = wave() / 2; mask; mask /= 2) x = f(x, swapped(x, mask));
  if (lane == 0) of_wave[mine] = x;
  __syncthreads();
  x = lane < int(blockDim.x) / wave() ? of_wave[lane] : none;
  for (int mask = wave() / 2; mask; mask /= 2) x = f(x, swapped(x, mask));
  __syncthreads();
  return x;
}

template <class T>
struct Plus {
  __device__ T operator()(T a, T b) const { return a + b; }
};

template <class T>
__device__ inline T block_sum(T x) {
  return across_block(x, T(0), Plus<T>());
}

// Host side.

// Threads for a row of `units` packs: whole waves of either size.
inline int threads_for(int64_t units) {
  const int64_t waves = divided_up(units, 64);
  return int(waves < 1 ? 64 : waves > max_threads / 64 ? max_threads : waves * 64);
}

// Whether rows of `width` elements can be read 16 bytes at a time from all these pointers that are
// not null.
template <class T, class... P>
bool fits_wide(int64_t width, const P*... p) {
  return width % wide<T> == 0 && ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// clang-format off: it takes <<< >>> apart
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, int threads, Stream stream, const Args&... args) {
#if defined(GLM_FIBERS)
  (void)stream;
  fibers::run(grid, dim3(unsigned(threads)), [=] { kernel(args...); });
#elif defined(__HIPCC__)
  kernel<<<grid, threads, 0, static_cast<hipStream_t>(stream)>>>(args...);
  const hipError_t error = hipGetLastError();
  if (error != hipSuccess) throw std::runtime_error(hipGetErrorString(error));
#else
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
#endif
}
// clang-format on

}  // namespace glm::gpu
