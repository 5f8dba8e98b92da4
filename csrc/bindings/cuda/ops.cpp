// Device kernels of norm, activation, rope and embedding; the CPU's bindings hold schemas and
// autograd.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "device.h"

namespace glm::gpu::bindings {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Rows in a partial sum of the weight's gradient: at most 128 sums, few enough to add up fast.
int64_t rows_per_sum(int64_t rows) { return std::max<int64_t>(16, (rows + 127) / 128); }

// Calls exact(a) in an exact run where there is such a kernel, and fast(a) otherwise.
template <class T, class Exact, class Fast, class Args>
void exactly(const Exact& exact, const Fast& fast, const Args& a) {
  if constexpr (!std::is_same_v<T, f16>)
    if (wants_exact()) return exact(a);
  fast(a);
}

Three norm_forward(const Tensor& x_, const OptionalTensor& residual_, const Tensor& weight_,
                   const OptionalTensor& bias_, double eps, double alpha) {
  const OnDevice on(x_);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor residual = contiguous(residual_), bias = contiguous(bias_);
  const int64_t rows = num_rows(x), width = x.size(-1);
  Tensor y = at::empty_like(x), total = residual ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor stats = at::empty({bias ? 2 : 1, rows}, x.options().dtype(at::kFloat));
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const NormForward<T> a{data<T>(x), data<T>(residual), data<T>(weight),    data<T>(bias),
                           data<T>(y), data<T>(total),    data<float>(stats), rows,
                           width,      float(eps),        float(alpha)};
    exactly<T>([&](auto& all) { exact_norm_forward(all, on.stream); },
               [&](auto& all) { gpu::norm_forward(all, on.stream); }, a);
  });
  return {y, total, stats};
}

Four norm_backward(const Tensor& dy_, const OptionalTensor& dtotal_, const Tensor& total_,
                   const Tensor& weight_, const Tensor& stats, bool layer, bool residual,
                   double alpha) {
  const OnDevice on(total_);
  const Tensor dy = dy_.contiguous(), total = total_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor dtotal = contiguous(dtotal_);
  const int64_t rows = num_rows(total), width = total.size(-1);
  const int64_t per_sum =
      wants_exact() && has_exact(total_) ? chunk_rows(rows) : rows_per_sum(rows);
  const int64_t chunks = (rows + per_sum - 1) / per_sum;
  const bool scaled = residual && alpha != 1.0;  // otherwise the residual's gradient is dx
  Tensor dx = at::empty_like(total), dweight = at::empty_like(weight);
  Tensor dresidual = scaled ? at::empty_like(total) : at::empty({0}, total.options());
  Tensor dbias = layer ? at::empty_like(weight) : at::empty({0}, weight.options());
  Tensor partial = at::empty({layer ? 2 : 1, chunks, width}, stats.options());
  by_dtype(total, [&](auto zero) {
    using T = decltype(zero);
    float* sums = data<float>(partial);
    float* bias_sums = layer ? sums + chunks * width : nullptr;
    NormBackward<T> a{};
    a.dy = data<T>(dy), a.dtotal = data<T>(dtotal), a.total = data<T>(total);
    a.weight = data<T>(weight), a.stats = data<float>(stats), a.dx = data<T>(dx);
    a.dresidual = scaled ? data<T>(dresidual) : nullptr, a.dweight = sums, a.dbias = bias_sums;
    a.rows = rows, a.width = width, a.chunk_rows = per_sum, a.alpha = float(alpha);
    exactly<T>([&](auto& all) { exact_norm_backward(all, on.stream); },
               [&](auto& all) { gpu::norm_backward(all, on.stream); }, a);
    sum_chunks<T>({sums, data<T>(dweight), chunks, width}, on.stream);
    if (layer) sum_chunks<T>({bias_sums, data<T>(dbias), chunks, width}, on.stream);
  });
  return {dx, dresidual, dweight, dbias};
}

template <class T>
void run_activation(const Activation<T>& a, Kind kind, Stream stream) {
  exactly<T>([&](auto& all) { exact_activation(all, kind, stream); },
             [&](auto& all) { activation(all, kind, stream); }, a);
}

Tensor activation_forward(const Tensor& x_, int64_t kind) {
  const OnDevice on(x_);
  const Tensor x = x_.contiguous();
  const int64_t gates = Kind(kind) == Kind::gelu ? 1 : 2;
  TORCH_CHECK_VALUE(x.size(-1) % gates == 0, "last dimension ", x.size(-1),
                    ": must be even, both halves of a gated activation");
  auto shape = x.sizes().vec();
  shape.back() /= gates;
  Tensor y = at::empty(shape, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    run_activation<T>({data<T>(x), nullptr, data<T>(y), num_rows(y), y.size(-1)}, Kind(kind),
                      on.stream);
  });
  return y;
}

Tensor activation_backward(const Tensor& dy_, const Tensor& x_, int64_t kind) {
  const OnDevice on(x_);
  const Tensor dy = dy_.contiguous(), x = x_.contiguous();
  Tensor dx = at::empty_like(x);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    run_activation<T>({data<T>(x), data<T>(dy), data<T>(dx), num_rows(dy), dy.size(-1)}, Kind(kind),
                      on.stream);
  });
  return dx;
}

Tensor rope_turn(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, bool interleaved,
                 bool back) {
  const OnDevice on(x_);
  const Tensor x = with_contiguous_rows(x_), cos = cos_.contiguous(), sin = sin_.contiguous();
  TORCH_CHECK_VALUE(x.dim() == 4 && cos.dim() == 4 && cos.sizes() == sin.sizes() &&
                        (cos.size(0) == 1 || cos.size(0) == x.size(0)) &&
                        cos.size(1) == x.size(1) && 2 * cos.size(2) * cos.size(3) <= x.size(3),
                    "rope: x [B, L, H, E] needs cos and sin [B or 1, L, G, P] with 2GP <= E; "
                    "received x ",
                    x.sizes(), ", cos ", cos.sizes(), ", sin ", sin.sizes());
  Tensor y = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Rope<T> a{data<T>(x),       data<float>(cos), data<float>(sin),   data<T>(y),
                    x.size(1),        x.size(2),        x.size(3),          x.stride(0),
                    x.stride(1),      x.stride(2),      cos.size(2),        cos.size(3),
                    cos.size(0) == 1, interleaved,      back ? -1.0f : 1.0f};
    gpu::rope_turn<T>({a, x.size(0)}, on.stream);
  });
  return y;
}

Tensor embedding_forward(const Tensor& ids_, const Tensor& weight_) {
  const OnDevice on(weight_);
  const Tensor ids = ids_.contiguous(), weight = with_contiguous_rows(weight_);
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  Tensor y = at::empty(shape, weight.options());
  by_dtype(weight, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingForward<T> table{data<int64_t>(ids), data<T>(weight), data<T>(y), weight.size(1),
                                    weight.stride(0)};
    gpu::embedding_forward<T>({table, ids.numel(), weight.size(0)}, on.stream);
  });
  return y;
}

Tensor embedding_backward(const Tensor& dy_, const Tensor& ids_, int64_t vocab, double shrink) {
  const OnDevice on(dy_);
  const Tensor dy = dy_.contiguous(), ids = ids_.flatten();
  const auto [sorted, order] = at::sort(ids, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor starts = at::searchsorted(sorted, at::arange(vocab + 1, ids.options()));
  Tensor dweight = at::empty({vocab, dy.size(-1)}, dy.options());
  by_dtype(dy, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingBackward<T> a{data<T>(dy),      data<int64_t>(order), data<int64_t>(starts),
                                 data<T>(dweight), dy.size(-1),          float(shrink)};
    gpu::embedding_backward<T>({a, vocab}, on.stream);
  });
  return dweight;
}

}  // namespace

TORCH_LIBRARY_IMPL(GLM_LIBRARY, GLM_KEY, m) {
  m.impl("norm_forward", norm_forward);
  m.impl("norm_backward", norm_backward);
  m.impl("activation_forward", activation_forward);
  m.impl("activation_backward", activation_backward);
  m.impl("rope_turn", rope_turn);
  m.impl("embedding_forward", embedding_forward);
  m.impl("embedding_backward", embedding_backward);
}

}  // namespace glm::gpu::bindings
