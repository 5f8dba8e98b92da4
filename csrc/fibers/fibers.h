// Runs CUDA kernels on the CPU: every thread of a block is a fiber, and blocks run one after
// another. Every launch shuffles the order of blocks, of waves and of the threads in a wave. A wave
// runs ahead to its next barrier, as far as a device ever may, so that a missing barrier gives
// wrong numbers. Shared memory is filled with NaNs before each block. `run` throws the kernel's
// errors.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace glm::fibers {

// Lanes of a wave: 32 or 64.
extern int wave;

// Runs `thread` for every thread of every block. Throws what a thread throws, and std::logic_error
// where a block cannot continue: some threads of a wave wait at a shuffle while others wait at a
// barrier or have ended.
void run(dim3 grid, dim3 block, const std::function<void()>& thread);

// The calling thread waits for its block.
void barrier();

// The calling thread waits for its wave; the 8 bytes at `value` are exchanged with another lane's.
void exchange(void* value, size_t size, int mask);

template <class T>
T swapped(T x, int mask) {
  static_assert(sizeof(T) <= 8, "a lane's slot has 8 bytes");
  exchange(&x, sizeof x, mask);
  return x;
}

// Memory that all threads of a block share. Blocks run one after another, so one array is enough.
struct Shared {
  Shared(void* start, size_t size);
};

}  // namespace glm::fibers

#define GLM_SHARED(T, name, size) \
  static T name[size];            \
  static const glm::fibers::Shared name##_is_shared(name, sizeof name)

inline void __syncthreads() { glm::fibers::barrier(); }
