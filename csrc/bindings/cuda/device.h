// Turns torch's device tensors into what the GPU kernels take. The stream comes from torch's device
// guard, so none of torch's CUDA libraries are linked: the extension builds beside any torch.
#pragma once

#include "../tensor.h"
#include "cuda/launch.h"
#include "stream.h"

// The same operators on the CPU, one fiber per thread, for tests: see csrc/fibers.
#if defined(GLM_FIBERS)
#define GLM_LIBRARY glm_core_fibers
#define GLM_KEY CPU
#else
#define GLM_LIBRARY glm_core
#define GLM_KEY CUDA
#endif

namespace glm::gpu {

// Makes x's device the current one for its lifetime; torch queues work there on `stream`.
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.device()), stream(current_stream(x.device())) {}
  c10::DeviceGuard guard;
  Stream stream;
};

// Calls f(T{}) with the kernels' element type of x.
template <class F>
void by_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == at::kFloat) return f(float{});
  if (x.scalar_type() == at::kBFloat16) return f(bf16{});
  TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() == at::kHalf, "glm_core: kernels take float32, ",
                              "bfloat16 and float16; received ", x.scalar_type(), "; convert it");
  f(f16{});
}

// Returns x with a contiguous last dimension; its other strides may be anything.
inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// Whether exact kernels take x: an exact run of one thread is no matter of others in float16.
inline bool has_exact(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
}

// Whether sums have the order of docs/exact.md: the switch is the CPU's extension's.
inline bool wants_exact() {
  static const auto asked = op<bool()>("glm_core::exact");
  return asked.call();
}

// The same as by_dtype, for the exact kernels.
template <class F>
void by_exact_dtype(const Tensor& x, F f) {
  TORCH_CHECK_NOT_IMPLEMENTED(has_exact(x), "exact: kernels take float32 and bfloat16; received ",
                              x.scalar_type(), "; convert it or leave exact out");
  x.scalar_type() == at::kFloat ? f(float{}) : f(bf16{});
}

namespace bindings {
// x weight^T + bias, exact, whatever the strides; all in one dtype.
Tensor exact_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = {});
// The same, written into y [N, F]; x [N, D].
void exact_linear_into(const Tensor& y, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias = {});
}  // namespace bindings

}  // namespace glm::gpu
