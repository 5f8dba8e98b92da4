// Bindings of route, permute, unpermute, grouped_linear and quantized_grouped_linear. Shapes: N
// tokens, X experts, T chosen for a token, M = N T rows, D in, F out.
#include "experts.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "product.h"

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t few_rows = 8;  // the most for which our own product reads a weight once

// y [N, F] = x weight^T, with a weight that is read once; all contiguous, y as x's dtype says.
void times_few(const Tensor& x, const Tensor& weight, const Tensor& y) {
  const Tensor floats = x.to(at::kFloat);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const LinearFew<T> a{data<float>(floats), data<T>(x), data<T>(weight), nullptr,
                         data<T>(y),          x.size(0),  x.size(1),       weight.size(0)};
    parallel(weight.size(0), x.size(1),
             [&](int64_t i, int64_t j) { kernels<T>().linear_few(a, i, j); });
  });
}

// route --------------------------------------------------------------------------------

using RouteSignature = Three(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t,
                             double, bool);
using RouteBackwardSignature = Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, double, bool);

// Returns experts, weights and scores, each [N, T].
Three route_forward(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, int64_t top_k,
                    int64_t groups, int64_t top_groups, double scale, bool normalize) {
  const Tensor x = x_.to(at::kFloat).contiguous(), weight = weight_.contiguous();
  const Tensor bias = bias_.contiguous();
  const int64_t tokens = x.size(0), experts = weight.size(0);
  check_route(x, weight, bias);
  const auto floats = x.options(), ints = x.options().dtype(at::kLong);
  Tensor logits;
  if (tokens <= few_rows) {
    logits = at::empty({tokens, experts}, floats);
    times_few(x, weight, logits);
  } else {
    logits = product(x, weight);
  }
  const Tensor chosen = at::empty({tokens, top_k}, ints),
               weights = at::empty({tokens, top_k}, floats);
  const Tensor scores = at::empty_like(weights), biased = at::empty_like(logits);
  const Tensor group_scores = at::empty({tokens, 2 * groups}, floats);
  const Tensor group_places = at::empty({tokens, groups}, ints);
  const Route<float> a{data<float>(logits),
                       data<float>(bias),
                       data<int64_t>(chosen),
                       data<float>(weights),
                       data<float>(scores),
                       data<float>(biased),
                       data<float>(group_scores),
                       data<int64_t>(group_places),
                       experts,
                       top_k,
                       groups,
                       top_groups,
                       float(scale),
                       normalize};
  parallel(tokens, 8 * experts,
           [&](int64_t i, int64_t j) { kernels<float>().route_choose(a, i, j); });
  return {chosen, weights, scores};
}

Tensor times_floats(const Tensor& a, const Tensor& b) {
  return exact() ? exact_times(a, b) : at::mm(a, b);
}

// Returns dx and dweight.
Two route_backward(const Tensor& dweights_, const Tensor& experts, const Tensor& scores,
                   const Tensor& x, const Tensor& weight, double scale, bool normalize) {
  const Tensor dweights = dweights_.contiguous();
  const Tensor dlogits = at::zeros({x.size(0), weight.size(0)}, weight.options());
  const RouteBackward<float> a{
      data<float>(dweights), data<float>(scores), data<int64_t>(experts), data<float>(dlogits),
      weight.size(0),        scores.size(1),      float(scale),           normalize};
  parallel(x.size(0), 8 * scores.size(1),
           [&](int64_t i, int64_t j) { kernels<float>().route_backward(a, i, j); });
  const Tensor dx = times_floats(dlogits, weight).to(x.scalar_type());
  return {dx, times_floats(dlogits.t(), x.to(at::kFloat))};
}

Three call_route(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t top_k,
                 int64_t groups, int64_t top_groups, double scale, bool normalize) {
  static const auto forward = op<RouteSignature>("glm_core::route_forward");
  return forward.call(x, weight, bias, top_k, groups, top_groups, scale, normalize);
}

struct RouteGrad : torch::autograd::Function<RouteGrad> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, int64_t top_k, int64_t groups,
                               int64_t top_groups, double scale, bool normalize) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [experts, weights, scores] =
        call_route(x, weight, bias, top_k, groups, top_groups, scale, normalize);
    ctx->save_for_backward({experts, scores, x, weight});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["normalize"] = normalize;
    ctx->mark_non_differentiable({experts});
    return {experts, weights};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back = op<RouteBackwardSignature>("glm_core::route_backward");
    const variable_list s = ctx->get_saved_variables();
    auto [dx, dweight] =
        back.call(grads[1], s[0], s[1], s[2], s[3], ctx->saved_data["scale"].toDouble(),
                  ctx->saved_data["normalize"].toBool());
    return {dx, dweight, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Two route(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t top_k, int64_t groups,
          int64_t top_groups, double scale, bool normalize) {
  if (wants_gradient(x, weight)) {
    const variable_list out =
        RouteGrad::apply(x, weight, bias, top_k, groups, top_groups, scale, normalize);
    return {out[0], out[1]};
  }
  auto [experts, weights, scores] =
      call_route(x, weight, bias, top_k, groups, top_groups, scale, normalize);
  return {experts, weights};
}

// permute ------------------------------------------------------------------------------

using PermuteSignature = Three(const Tensor&, const Tensor&, c10::SymInt);

// Where each place of a permutation went: out[order[i]] = i.
Tensor inverse(const Tensor& order) {
  const Tensor back = at::zeros(order.sizes(), order.options());
  const int64_t* from = data<int64_t>(order);
  int64_t* to = data<int64_t>(back);
  for (int64_t i = 0; i < order.numel(); ++i) to[from[i]] = i;
  return back;
}

// Returns rows [M, D], order [M] and counts [X].
Three permute_forward(const Tensor& x_, const Tensor& experts_, int64_t num_experts) {
  const Tensor x = x_.contiguous(), experts = experts_.contiguous();
  const int64_t rows = experts.numel(), top_k = experts.size(1), width = x.size(1);
  check_permute(x, experts);
  check_indices(experts, num_experts, "permute: expert");
  const auto ints = experts.options();
  const Tensor order = at::empty({rows}, ints), token = at::empty({rows}, ints);
  const Tensor counts = at::zeros({num_experts}, ints);
  const int64_t* of = data<int64_t>(experts);
  int64_t *count = data<int64_t>(counts), *places = data<int64_t>(order);
  for (int64_t i = 0; i < rows; ++i) ++count[of[i]];
  std::vector<int64_t> next(size_t(num_experts), 0);
  for (int64_t e = 1; e < num_experts; ++e) next[size_t(e)] = next[size_t(e - 1)] + count[e - 1];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = next[size_t(of[i])]++;
    places[at] = i;
    data<int64_t>(token)[at] = i / top_k;
  }
  const Tensor y = at::empty({rows, width}, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingForward<T> a{data<int64_t>(token), data<T>(x), data<T>(y), width, width};
    parallel(rows, width, [&](int64_t i, int64_t j) { kernels<T>().embedding_forward(a, i, j); });
  });
  return {y, order, counts};
}

// Returns dx [N, D]: a token's rows, summed in the order of its choices.
Tensor permute_backward(const Tensor& drows_, const Tensor& order, int64_t tokens) {
  const Tensor drows = drows_.contiguous(), back = inverse(order);
  const int64_t width = drows.size(1), top_k = tokens ? order.numel() / tokens : 0;
  const Tensor starts =
      at::arange(0, (tokens + 1) * top_k + !top_k, std::max<int64_t>(1, top_k), order.options());
  const Tensor dx = at::empty({tokens, width}, drows.options());
  by_dtype(drows, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingBackward<T> a{
        data<T>(drows), data<int64_t>(back), data<int64_t>(starts), data<T>(dx), width, 1.0f};
    parallel(tokens, top_k * width,
             [&](int64_t i, int64_t j) { kernels<T>().embedding_backward(a, i, j); });
  });
  return dx;
}

Three call_permute(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  static const auto forward = op<PermuteSignature>("glm_core::permute_forward");
  return forward.call(x, experts, num_experts);
}

struct PermuteGrad : torch::autograd::Function<PermuteGrad> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& experts,
                               int64_t num_experts) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [rows, order, counts] = call_permute(x, experts, num_experts);
    ctx->save_for_backward({order});
    ctx->saved_data["tokens"] = x.sym_size(0);
    ctx->mark_non_differentiable({order, counts});
    return {rows, order, counts};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back =
        op<Tensor(const Tensor&, const Tensor&, c10::SymInt)>("glm_core::permute_backward");
    const Tensor order = ctx->get_saved_variables()[0];
    return {back.call(grads[0], order, ctx->saved_data["tokens"].toSymInt()), Tensor(), Tensor()};
  }
};

Three permute(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  if (!wants_gradient(x)) return call_permute(x, experts, num_experts);
  const variable_list out = PermuteGrad::apply(x, experts, num_experts);
  return {out[0], out[1], out[2]};
}

// unpermute ----------------------------------------------------------------------------

using Rows = Tensor(const Tensor&, const Tensor&, const Tensor&);
using RowsBackward = Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&);

// Returns y [N, D].
Tensor unpermute_forward(const Tensor& rows_, const Tensor& order_, const Tensor& weights_) {
  const Tensor rows = rows_.contiguous(), order = order_.contiguous();
  const Tensor weights = weights_.contiguous();
  const int64_t tokens = weights.size(0), top_k = weights.size(1), width = rows.size(1);
  check_unpermute(rows, order, weights);
  check_indices(order, rows.size(0), "unpermute: place");
  const Tensor back = inverse(order), y = at::empty({tokens, width}, rows.options());
  by_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    const WeightedRows<T> a{
        data<T>(rows), data<int64_t>(back), data<float>(weights), data<T>(y), width, top_k};
    parallel(tokens, top_k * width,
             [&](int64_t i, int64_t j) { kernels<T>().weighted_rows(a, i, j); });
  });
  return y;
}

// Returns drows and dweights.
Two unpermute_backward(const Tensor& dy_, const Tensor& rows_, const Tensor& order_,
                       const Tensor& weights_) {
  const Tensor dy = dy_.contiguous(), rows = rows_.contiguous();
  const Tensor weights = weights_.contiguous(), back = inverse(order_.contiguous());
  const int64_t top_k = weights.size(1), width = rows.size(1);
  const Tensor drows = at::empty_like(rows), dweights = at::empty_like(weights);
  by_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    const WeightedRowsBackward<T> a{data<T>(dy),
                                    data<T>(rows),
                                    data<int64_t>(back),
                                    data<float>(weights),
                                    data<T>(drows),
                                    data<float>(dweights),
                                    width,
                                    top_k};
    parallel(weights.size(0), top_k * width,
             [&](int64_t i, int64_t j) { kernels<T>().weighted_rows_backward(a, i, j); });
  });
  return {drows, dweights};
}

Tensor call_unpermute(const Tensor& rows, const Tensor& order, const Tensor& weights) {
  static const auto forward = op<Rows>("glm_core::unpermute_forward");
  return forward.call(rows, order, weights);
}

struct UnpermuteGrad : torch::autograd::Function<UnpermuteGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& order,
                        const Tensor& weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, order, weights});
    return call_unpermute(rows, order, weights);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back = op<RowsBackward>("glm_core::unpermute_backward");
    const variable_list s = ctx->get_saved_variables();
    auto [drows, dweights] = back.call(grads[0], s[0], s[1], s[2]);
    return {drows, Tensor(), dweights};
  }
};

Tensor unpermute(const Tensor& rows, const Tensor& order, const Tensor& weights) {
  if (wants_gradient(rows, weights)) return UnpermuteGrad::apply(rows, order, weights);
  return call_unpermute(rows, order, weights);
}

// grouped_linear -----------------------------------------------------------------------

// out = a b, rounded once.
void times_into(const Tensor& out, const Tensor& a_, const Tensor& b_) {
  if (exact()) {
    out.copy_(exact_times(a_, b_));
    return;
  }
  const Tensor a = multiplied(a_), b = multiplied(b_);
  if (a.scalar_type() != out.scalar_type()) {
    out.copy_(at::mm(a, b));
    return;
  }
  Tensor target = out;
  at::mm_out(target, a, b);
}

Tensor grouped_linear_forward(const Tensor& rows_, const Tensor& weight_, const Tensor& counts) {
  const Tensor rows = rows_.contiguous(), weight = weight_.contiguous();
  check_grouped(rows, weight);
  const Tensor y = at::empty({rows.size(0), weight.size(1)}, rows.options());
  each_expert(counts, rows.size(0), weight.size(0), [&](int64_t e, int64_t first, int64_t count) {
    const Tensor x = rows.narrow(0, first, count), out = y.narrow(0, first, count);
    if (count <= few_rows)
      times_few(x, weight[e], out);
    else
      times_into(out, x, weight[e].t());
  });
  return y;
}

// Returns drows [M, D] and dweight [X, F, D], empty where they are not wanted.
Two grouped_linear_backward(const Tensor& dy_, const Tensor& rows_, const Tensor& weight_,
                            const Tensor& counts, bool wants_rows, bool wants_weight) {
  const Tensor dy = dy_.contiguous(), rows = rows_.contiguous(), weight = weight_.contiguous();
  const Tensor drows = wants_rows ? at::empty_like(rows) : at::empty({0}, rows.options());
  const Tensor dweight =
      wants_weight ? at::zeros(weight.sizes(), weight.options()) : at::empty({0}, weight.options());
  each_expert(counts, rows.size(0), weight.size(0), [&](int64_t e, int64_t first, int64_t count) {
    const Tensor g = dy.narrow(0, first, count);
    if (wants_rows) times_into(drows.narrow(0, first, count), g, weight[e]);
    if (wants_weight) times_into(dweight[e], g.t(), rows.narrow(0, first, count));
  });
  return {drows, dweight};
}

Tensor call_grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& counts) {
  static const auto forward = op<Rows>("glm_core::grouped_linear_forward");
  return forward.call(rows, weight, counts);
}

using GroupedBackward = Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool);

struct GroupedLinearGrad : torch::autograd::Function<GroupedLinearGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weight,
                        const Tensor& counts) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, weight, counts});
    return call_grouped_linear(rows, weight, counts);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back = op<GroupedBackward>("glm_core::grouped_linear_backward");
    const variable_list s = ctx->get_saved_variables();
    const bool wants_rows = ctx->needs_input_grad(0), wants_weight = ctx->needs_input_grad(1);
    auto [drows, dweight] = back.call(grads[0], s[0], s[1], s[2], wants_rows, wants_weight);
    return {wants_rows ? drows : Tensor(), wants_weight ? dweight : Tensor(), Tensor()};
  }
};

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& counts) {
  if (wants_gradient(rows, weight)) return GroupedLinearGrad::apply(rows, weight, counts);
  return call_grouped_linear(rows, weight, counts);
}

// quantized_grouped_linear -------------------------------------------------------------

using QuantizedGroups = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                               int64_t);
using QuantizedGroupsBackward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       int64_t);

// Each expert's product is that of quantized_linear, bit for bit.
Tensor quantized_grouped_linear_forward(const Tensor& rows, const Tensor& weight,
                                        const Tensor& scale, const Tensor& counts, int64_t bits,
                                        int64_t activation_bits) {
  static const auto one =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                int64_t)>("glm_core::quantized_linear_forward");
  int64_t most = 0;
  each_expert(counts, rows.size(0), weight.size(0),
              [&](int64_t, int64_t, int64_t count) { most = std::max(most, count); });
  if (most <= fused_rows(activation_bits == 8))
    return fused_groups(rows, weight, scale, data<int64_t>(counts.contiguous()), bits,
                        activation_bits == 8);
  const Tensor y = at::empty({rows.size(0), weight.size(1)}, rows.options());
  each_expert(counts, rows.size(0), weight.size(0), [&](int64_t e, int64_t first, int64_t count) {
    const Tensor x = rows.narrow(0, first, count);
    y.narrow(0, first, count)
        .copy_(one.call(x, weight[e], scale[e], std::nullopt, bits, activation_bits));
  });
  return y;
}

Tensor quantized_grouped_linear_backward(const Tensor& dy, const Tensor& weight,
                                         const Tensor& scale, const Tensor& counts, int64_t bits) {
  static const auto one = op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>(
      "glm_core::quantized_linear_backward");
  const Tensor drows = at::empty({dy.size(0), weight.size(2) * 8 / bits}, dy.options());
  each_expert(counts, dy.size(0), weight.size(0), [&](int64_t e, int64_t first, int64_t count) {
    drows.narrow(0, first, count)
        .copy_(one.call(dy.narrow(0, first, count).contiguous(), weight[e], scale[e], bits));
  });
  return drows;
}

Tensor call_quantized_groups(const Tensor& rows, const Tensor& weight, const Tensor& scale,
                             const Tensor& counts, int64_t bits, int64_t activation_bits) {
  static const auto forward = op<QuantizedGroups>("glm_core::quantized_grouped_linear_forward");
  return forward.call(rows, weight, scale, counts, bits, activation_bits);
}

struct QuantizedGroupsGrad : torch::autograd::Function<QuantizedGroupsGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weight,
                        const Tensor& scale, const Tensor& counts, int64_t bits,
                        int64_t activation_bits) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({weight, scale, counts});
    ctx->saved_data["bits"] = bits;
    return call_quantized_groups(rows, weight, scale, counts, bits, activation_bits);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back =
        op<QuantizedGroupsBackward>("glm_core::quantized_grouped_linear_backward");
    const variable_list s = ctx->get_saved_variables();
    const Tensor drows = back.call(grads[0], s[0], s[1], s[2], ctx->saved_data["bits"].toInt());
    return {drows, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor quantized_grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& scale,
                                const Tensor& counts, int64_t bits, int64_t activation_bits) {
  if (wants_gradient(rows))
    return QuantizedGroupsGrad::apply(rows, weight, scale, counts, bits, activation_bits);
  return call_quantized_groups(rows, weight, scale, counts, bits, activation_bits);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def(
      "route(Tensor x, Tensor weight, Tensor bias, int top_k, int groups, int top_groups, "
      "float scale, bool normalize) -> (Tensor experts, Tensor weights)",
      route);
  m.def(
      "route_forward(Tensor x, Tensor weight, Tensor bias, int top_k, int groups, "
      "int top_groups, float scale, bool normalize) -> (Tensor experts, Tensor weights, "
      "Tensor scores)");
  m.def(
      "route_backward(Tensor dweights, Tensor experts, Tensor scores, Tensor x, Tensor weight, "
      "float scale, bool normalize) -> (Tensor dx, Tensor dweight)");
  m.def(
      "permute(Tensor x, Tensor experts, int num_experts) -> (Tensor rows, Tensor order, "
      "Tensor counts)",
      permute);
  m.def(
      "permute_forward(Tensor x, Tensor experts, SymInt num_experts) -> (Tensor rows, "
      "Tensor order, Tensor counts)");
  m.def("permute_backward(Tensor drows, Tensor order, SymInt tokens) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor order, Tensor weights) -> Tensor", unpermute);
  m.def("unpermute_forward(Tensor rows, Tensor order, Tensor weights) -> Tensor");
  m.def(
      "unpermute_backward(Tensor dy, Tensor rows, Tensor order, Tensor weights) -> "
      "(Tensor drows, Tensor dweights)");
  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor counts) -> Tensor", grouped_linear);
  m.def("grouped_linear_forward(Tensor rows, Tensor weight, Tensor counts) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor dy, Tensor rows, Tensor weight, Tensor counts, "
      "bool wants_rows, bool wants_weight) -> (Tensor drows, Tensor dweight)");
  m.def(
      "quantized_grouped_linear(Tensor rows, Tensor weight, Tensor scale, Tensor counts, int bits, "
      "int activation_bits) -> Tensor",
      quantized_grouped_linear);
  m.def(
      "quantized_grouped_linear_forward(Tensor rows, Tensor weight, Tensor scale, Tensor counts, "
      "int bits, int activation_bits) -> Tensor");
  m.def(
      "quantized_grouped_linear_backward(Tensor dy, Tensor weight, Tensor scale, Tensor counts, "
      "int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) {
  m.impl("route_forward", route_forward);
  m.impl("route_backward", route_backward);
  m.impl("permute_forward", permute_forward);
  m.impl("permute_backward", permute_backward);
  m.impl("unpermute_forward", unpermute_forward);
  m.impl("unpermute_backward", unpermute_backward);
  m.impl("grouped_linear_forward", grouped_linear_forward);
  m.impl("grouped_linear_backward", grouped_linear_backward);
  m.impl("quantized_grouped_linear_forward", quantized_grouped_linear_forward);
  m.impl("quantized_grouped_linear_backward", quantized_grouped_linear_backward);
}

}  // namespace glm
