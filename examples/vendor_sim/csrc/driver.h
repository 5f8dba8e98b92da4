// The simulated accelerator's driver: device memory and one queue. A vendor ships this below
// PyTorch, so it knows no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace sim {

// The device is gone; every call fails until reset().
struct Lost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Memory {
  std::size_t allocated, peak, limit;  // bytes
};

// Device addresses lie in a range that the host may neither read nor write: it would fault.
void* allocate(std::size_t bytes);  // throws OutOfMemory
void release(void* address) noexcept;

// Returns the host memory behind `bytes` bytes at a device address. Throws std::runtime_error for a
// host pointer, freed memory, or a range that leaves its allocation.
void* resolve(const void* address, std::size_t bytes);

Memory memory();
void set_memory_limit(std::size_t bytes);
void reset_peak();

// Queues a kernel and returns before it has run; kernels run one after another. Throws Lost.
void enqueue(std::string name, std::function<void()> kernel);

// Returns when the queue is empty; rethrows the first exception of a kernel. Throws Lost when the
// device is lost, or when the queue is not empty after the timeout, which also makes it lost.
void synchronize();
void set_timeout(double seconds);
std::size_t pending();  // kernels queued or running

// For the fault "hang": blocks the executor until there were more resets than `since`.
std::uint64_t resets();
void block_until_reset(std::uint64_t since);

// Releases a hung kernel. A lost device drops its queue and works again; its memory keeps its
// contents.
void reset();

}  // namespace sim
