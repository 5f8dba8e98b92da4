// Turns torch tensors into the plain pointers that kernels take. The caller keeps a tensor alive
// for as long as its pointer is used.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace glm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Calls f(T{}) with the kernels' element type of x.
template <class F>
void by_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == at::kFloat) return f(float{});
  TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() == at::kBFloat16, "glm_core: kernels take float32 ",
                              "and bfloat16; received ", x.scalar_type(), "; convert it");
  f(bf16{});
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
T* data(const OptionalTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

inline OptionalTensor contiguous(const OptionalTensor& x) {
  return x ? OptionalTensor(x->contiguous()) : x;
}

// Runs f(begin, end) over [0, size) on torch's threads; `cost` is how many elements an index
// touches.
template <class F>
void parallel(int64_t size, int64_t cost, const F& f) {
  constexpr int64_t worth_a_thread = 16384;
  at::parallel_for(0, size, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, cost)), f);
}

// How many rows are summed into one partial result. Only the number of rows decides, so that
// results do not depend on the number of threads.
inline int64_t chunk_rows(int64_t rows) { return std::max<int64_t>(16, (rows + 63) / 64); }

// The width to which the inputs of a quantised product are padded.
inline int64_t padded(int64_t width) {
  return (width + input_padding - 1) / input_padding * input_padding;
}

inline int64_t num_rows(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

// Raises IndexError unless all of ids (int64, contiguous) lie in [0, size).
inline void check_indices(const Tensor& ids, int64_t size, const char* what) {
  const int64_t* id = data<int64_t>(ids);
  for (int64_t n = 0; n < ids.numel(); ++n)
    TORCH_CHECK_INDEX(0 <= id[n] && id[n] < size, what, " ", id[n], " at position ", n,
                      ": must lie in [0, ", size, ")");
}

// Raises ValueError unless shapes are as attention's.
inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& key_start, const Tensor& key_end) {
  const bool fit = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 &&
                   k.sizes().slice(0, 3) == v.sizes().slice(0, 3) && k.size(0) == q.size(0) &&
                   k.size(3) == q.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0 &&
                   key_start.sizes() == q.sizes().slice(0, 2) &&
                   key_end.sizes() == key_start.sizes();
  TORCH_CHECK_VALUE(
      fit, "attention: q [B, L, H, E] needs k [B, S, K, E] and v [B, S, K, C] with K dividing H, ",
      "key_start and key_end [B, L]; received q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
      ", key_start ", key_start.sizes());
}

// How many rows of logits exist at a time: few enough to stay in the last-level cache, enough for
// efficient products. With several chunks each adds to the weight's gradient, so the order of exact
// sums is in this, on every device.
inline int64_t loss_chunk(int64_t rows, int64_t vocab, int64_t element_size) {
  constexpr int64_t budget_bytes = 16 << 20, fewest = 128;
  return std::min(rows, std::max(fewest, budget_bytes / (vocab * element_size)));
}

// Whether autograd must record this call.
template <class... Tensors>
bool wants_gradient(const Tensors&... xs) {
  return at::GradMode::is_enabled() && (xs.requires_grad() || ...);
}

// Returns an operator of this library, to be called through the dispatcher so that tracing sees it.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace glm
