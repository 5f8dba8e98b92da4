// Device kernels of route, permute, unpermute and grouped_linear for exact runs (docs/exact.md).
// Fast runs have Triton kernels of the same names, so these are operators of their own. Shapes: N
// tokens, X experts, T chosen for a token, M = N T rows, D in, F out.
#include "../experts.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "device.h"

namespace glm::gpu::bindings {
namespace {

// Returns experts, weights and scores, each [N, T].
Three route_forward(const Tensor& x_, const Tensor& weight, const Tensor& bias_, int64_t top_k,
                    int64_t groups, int64_t top_groups, double scale, bool normalize) {
  const OnDevice on(x_);
  const Tensor x = x_.to(at::kFloat), bias = bias_.contiguous();
  check_route(x, weight, bias);
  const int64_t tokens = x.size(0);
  const auto floats = x.options(), ints = x.options().dtype(at::kLong);
  const Tensor logits = exact_linear(x, weight), biased = at::empty_like(logits);
  const Tensor chosen = at::empty({tokens, top_k}, ints);
  const Tensor weights = at::empty({tokens, top_k}, floats), scores = at::empty_like(weights);
  const Tensor group_scores = at::empty({tokens, 2 * groups}, floats);
  const Tensor group_places = at::empty({tokens, groups}, ints);
  exact_choose({data<float>(logits), data<float>(bias), data<int64_t>(chosen), data<float>(weights),
                data<float>(scores), data<float>(biased), data<float>(group_scores),
                data<int64_t>(group_places), weight.size(0), top_k, groups, top_groups,
                float(scale), normalize},
               tokens, on.stream);
  return {chosen, weights, scores};
}

// Returns dx and dweight.
Two route_backward(const Tensor& dweights_, const Tensor& experts, const Tensor& scores,
                   const Tensor& x, const Tensor& weight, double scale, bool normalize) {
  const OnDevice on(x);
  const Tensor dweights = dweights_.contiguous();
  const Tensor dlogits = at::zeros({x.size(0), weight.size(0)}, weight.options());
  exact_choose_backward(
      {data<float>(dweights), data<float>(scores), data<int64_t>(experts), data<float>(dlogits),
       weight.size(0), scores.size(1), float(scale), normalize},
      x.size(0), on.stream);
  const Tensor dx = exact_linear(dlogits, weight.t()).to(x.scalar_type());
  return {dx, exact_linear(dlogits.t(), x.to(at::kFloat).t())};
}

// Where each place of a permutation went: out[order[i]] = i.
Tensor inverse(const Tensor& order) {
  return at::empty_like(order).scatter_(0, order, at::arange(order.numel(), order.options()));
}

// Returns rows [M, D], order [M] and counts [X].
Three permute_forward(const Tensor& x_, const Tensor& experts, int64_t num_experts) {
  const OnDevice on(x_);
  check_permute(x_, experts);
  const Tensor x = x_.contiguous();
  const int64_t width = x.size(1), top_k = std::max<int64_t>(1, experts.size(1));
  const auto [sorted, order] =
      at::sort(experts.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor starts = at::searchsorted(sorted, at::arange(num_experts + 1, experts.options()));
  const Tensor token = order.floor_divide(top_k),
               rows = at::empty({order.numel(), width}, x.options());
  by_exact_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingForward<T> a{data<int64_t>(token), data<T>(x), data<T>(rows), width, width};
    gpu::embedding_forward<T>({a, order.numel(), x.size(0)}, on.stream);
  });
  return {rows, order, at::diff(starts)};
}

// Returns dx [N, D]: a token's rows, summed in the order of its choices.
Tensor permute_backward(const Tensor& drows_, const Tensor& order, int64_t tokens) {
  const OnDevice on(drows_);
  const Tensor drows = drows_.contiguous(), back = inverse(order);
  const int64_t width = drows.size(1), top_k = tokens ? order.numel() / tokens : 0;
  const Tensor starts = at::arange(tokens + 1, order.options()).mul(top_k);
  const Tensor dx = at::empty({tokens, width}, drows.options());
  by_exact_dtype(drows, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingBackward<T> a{
        data<T>(drows), data<int64_t>(back), data<int64_t>(starts), data<T>(dx), width, 1.0f};
    gpu::embedding_backward<T>({a, tokens}, on.stream);
  });
  return dx;
}

// Returns y [N, D].
Tensor unpermute_forward(const Tensor& rows_, const Tensor& order, const Tensor& weights_) {
  const OnDevice on(rows_);
  check_unpermute(rows_, order, weights_);
  const Tensor rows = rows_.contiguous(), weights = weights_.contiguous(), back = inverse(order);
  const int64_t tokens = weights.size(0), width = rows.size(1);
  const Tensor y = at::empty({tokens, width}, rows.options());
  by_exact_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    const WeightedRows<T> a{data<T>(rows), data<int64_t>(back), data<float>(weights), data<T>(y),
                            width,         weights.size(1)};
    exact_weighted_rows(a, tokens, on.stream);
  });
  return y;
}

// Returns drows and dweights.
Two unpermute_backward(const Tensor& dy_, const Tensor& rows_, const Tensor& order,
                       const Tensor& weights_) {
  const OnDevice on(rows_);
  const Tensor dy = dy_.contiguous(), rows = rows_.contiguous();
  const Tensor weights = weights_.contiguous(), back = inverse(order);
  const Tensor drows = at::empty_like(rows), dweights = at::empty_like(weights);
  by_exact_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    const WeightedRowsBackward<T> a{data<T>(dy),          data<T>(rows),  data<int64_t>(back),
                                    data<float>(weights), data<T>(drows), data<float>(dweights),
                                    rows.size(1),         weights.size(1)};
    exact_weighted_rows_backward(a, weights.size(0), on.stream);
  });
  return {drows, dweights};
}

// The host has to know how many rows an expert has: it waits for the device.
Tensor grouped_linear_forward(const Tensor& rows, const Tensor& weight, const Tensor& counts) {
  const OnDevice on(rows);
  check_grouped(rows, weight);
  const Tensor y = at::empty({rows.size(0), weight.size(1)}, rows.options());
  each_expert(
      counts.cpu(), rows.size(0), weight.size(0), [&](int64_t e, int64_t first, int64_t count) {
        exact_linear_into(y.narrow(0, first, count), rows.narrow(0, first, count), weight[e]);
      });
  return y;
}

// Returns drows [M, D] and dweight [X, F, D], empty where they are not wanted.
Two grouped_linear_backward(const Tensor& dy, const Tensor& rows, const Tensor& weight,
                            const Tensor& counts, bool wants_rows, bool wants_weight) {
  const OnDevice on(rows);
  const Tensor drows = wants_rows ? at::empty_like(rows) : at::empty({0}, rows.options());
  const Tensor dweight =
      wants_weight ? at::zeros(weight.sizes(), weight.options()) : at::empty({0}, weight.options());
  each_expert(counts.cpu(), rows.size(0), weight.size(0),
              [&](int64_t e, int64_t first, int64_t count) {
                const Tensor g = dy.narrow(0, first, count), x = rows.narrow(0, first, count);
                if (wants_rows) exact_linear_into(drows.narrow(0, first, count), g, weight[e].t());
                if (wants_weight) exact_linear_into(dweight[e], g.t(), x.t());
              });
  return {drows, dweight};
}

}  // namespace

// Each has the schema of the operator without `exact_`.
TORCH_LIBRARY_FRAGMENT(GLM_LIBRARY, m) {
  const auto add = [&](const char* name, auto* function) {
    const auto of = c10::Dispatcher::singleton().findSchemaOrThrow(
        (std::string("glm_core::") + name).c_str(), "");
    m.def(of.schema().cloneWithName(std::string("exact_") + name, ""));
    m.impl((std::string("exact_") + name).c_str(),
           torch::dispatch(c10::DispatchKey::GLM_KEY, function));
  };
  add("route_forward", route_forward);
  add("route_backward", route_backward);
  add("permute_forward", permute_forward);
  add("permute_backward", permute_backward);
  add("unpermute_forward", unpermute_forward);
  add("unpermute_backward", unpermute_backward);
  add("grouped_linear_forward", grouped_linear_forward);
  add("grouped_linear_backward", grouped_linear_backward);
}

}  // namespace glm::gpu::bindings
