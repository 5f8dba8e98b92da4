// Device kernels of linear and attention for exact runs (docs/exact.md). Fast runs multiply by
// torch's products, and attend in Triton.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "device.h"

namespace glm::gpu::bindings {

template <class T>
static Operand<T> matrix(const Tensor& x) {
  return {data<T>(x), 0, 0, x.stride(0), x.stride(1)};
}

void exact_linear_into(const Tensor& y, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias_) {
  const OnDevice on(x);
  TORCH_CHECK_VALUE(x.size(1) == weight.size(1), "linear: x has width ", x.size(1),
                    ", the weight takes ", weight.size(1));
  const OptionalTensor bias = contiguous(bias_);
  by_exact_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Products<T, T, T> a{matrix<T>(x),
                              matrix<T>(weight),
                              matrix<T>(y),
                              data<T>(bias),
                              nullptr,
                              1.0f,
                              x.size(0),
                              weight.size(0),
                              weight.size(1),
                              1,
                              1,
                              1};
    exact_product(a, on.stream);
  });
}

Tensor exact_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  Tensor y = at::empty(sizes, x.options());
  const Tensor a = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});  // [N, D]
  exact_linear_into(y.view({a.size(0), weight.size(0)}), a, weight, bias);
  return y;
}

namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return exact_linear(x, weight, bias);
}

// A [B, L, H, E] tensor from batch element b and head h on; `heads` of it are a kv head's.
template <class T>
Operand<T> heads_of(const Tensor& x, int64_t b, int64_t h, int64_t heads) {
  const int64_t head = x.stride(2);
  return {data<T>(x) + b * x.stride(0) + h * head, heads * head, head, x.stride(1), x.stride(3)};
}

template <class T>
Operand<T> shared_by_heads(const Tensor& x, int64_t b, int64_t h) {
  Operand<T> one = heads_of<T>(x, b, h, 1);
  one.member = 0;
  return one;
}

// How many floats of scores exist at a time, unless one kv head has more.
#if defined(GLM_FIBERS)
constexpr int64_t budget = 1024;
#else
constexpr int64_t budget = 64 << 20;
#endif

// Calls run(arguments, batch element, first kv head, first head) for a few kv heads at a time.
template <class T, class Run>
void parts(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_start,
           const Tensor& key_end, double scale, const Run& run) {
  const int64_t queries = q.size(1), keys = k.size(1), kv_heads = k.size(2);
  const int64_t members = q.size(2) / kv_heads;
  const int64_t each = std::max<int64_t>(1, members * queries * keys);
  const int64_t most = std::clamp<int64_t>(budget / each, 1, kv_heads);
  for (int64_t b = 0; b < q.size(0); ++b)
    for (int64_t g = 0; g < kv_heads; g += most) {
      ExactAttention<T> a{};
      a.q = heads_of<T>(q, b, g * members, members);
      a.k = shared_by_heads<T>(k, b, g), a.v = shared_by_heads<T>(v, b, g);
      a.key_start = data<int32_t>(key_start) + b * queries;
      a.key_end = data<int32_t>(key_end) + b * queries;
      a.queries = queries, a.keys = keys, a.width = q.size(3), a.values = v.size(3);
      a.members = members, a.units = std::min(most, kv_heads - g), a.scale = float(scale);
      const auto floats = q.options().dtype(at::kFloat);
      const Tensor scores = at::empty({a.units * members, queries, keys}, floats);
      const Tensor dscores = at::empty(scores.sizes(), floats);
      const Tensor shares = at::empty({a.units * members, queries}, floats);
      a.scores = data<float>(scores), a.dscores = data<float>(dscores);
      a.shares = data<float>(shares);
      run(a, b, g, g * members);
    }
}

Tensor attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& key_start_, const Tensor& key_end_, double scale) {
  check_attention(q, k, v, key_start_, key_end_);
  const OnDevice on(q);
  const Tensor key_start = key_start_.contiguous(), key_end = key_end_.contiguous();
  const Tensor y = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  by_exact_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    parts<T>(q, k, v, key_start, key_end, scale, [&](auto& a, int64_t b, int64_t, int64_t head) {
      a.y = heads_of<T>(y, b, head, a.members);
      exact_attention_forward(a, on.stream);
    });
  });
  return y;
}

Three attention_backward(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& key_start_, const Tensor& key_end_, double scale) {
  const OnDevice on(q);
  const Tensor key_start = key_start_.contiguous(), key_end = key_end_.contiguous();
  const Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
               dv = at::empty(v.sizes(), v.options());
  by_exact_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    parts<T>(q, k, v, key_start, key_end, scale,
             [&](auto& a, int64_t b, int64_t group, int64_t head) {
               a.dy = heads_of<T>(dy, b, head, a.members);
               a.dq = heads_of<T>(dq, b, head, a.members);
               a.dk = shared_by_heads<T>(dk, b, group), a.dv = shared_by_heads<T>(dv, b, group);
               exact_attention_backward(a, on.stream);
             });
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(GLM_LIBRARY, GLM_KEY, m) {
  m.impl("linear_forward", linear_forward);
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}

}  // namespace glm::gpu::bindings
