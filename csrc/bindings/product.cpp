// Bindings of linear; the matrix product that other operators use.
#include "product.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string_view>

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using PointwiseSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&,
                                  std::string_view, c10::List<std::optional<at::Scalar>>,
                                  std::optional<std::string_view>);
using Pointwise = c10::TypedOperatorHandle<PointwiseSignature>;
using LinearSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&);

// Returns oneDNN's product where torch was built with it.
std::optional<Pointwise> onednn() {
  const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!at::globalContext().hasMKLDNN() || !found) return std::nullopt;
  return found->typed<PointwiseSignature>();
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(x.size(-1) == weight.size(1), "linear: x has width ", x.size(-1),
                    ", the weight takes ", weight.size(1));
  return product(x, weight, bias);
}

Tensor call_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  static const auto forward = op<LinearSignature>("glm_core::linear_forward");
  return forward.call(x, weight, bias);
}

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }  // [N, D]

// a b; exact on whatever device they are.
Tensor gradient(const Tensor& a, const Tensor& b) {
  return exact() ? call_linear(a, b.t(), std::nullopt) : times(a, b);
}

// [N, F] -> [F]
Tensor column_sums(const Tensor& x) {
  return exact() ? gradient(at::ones({1, x.size(0)}, x.options()), x)[0] : at::sum(x, {0});
}

struct LinearGrad : torch::autograd::Function<LinearGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias.has_value();
    return call_linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const Tensor& dy = grads[0];
    Tensor dx, dweight, dbias;
    if (ctx->needs_input_grad(0)) dx = call_linear(dy, s[1].t(), std::nullopt);
    if (ctx->needs_input_grad(1)) dweight = gradient(rows_of(dy).t(), rows_of(s[0]));
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2))
      dbias = column_sums(rows_of(dy));
    return {dx, dweight, dbias};
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const bool training = bias ? wants_gradient(x, weight, *bias) : wants_gradient(x, weight);
  return training ? LinearGrad::apply(x, weight, bias) : call_linear(x, weight, bias);
}

}  // namespace

// Whether this CPU has units for bfloat16 products. Without them oneDNN takes 5 to 6 times as long
// as for float32 (AVX-512 and AVX2 alike).
bool has_bfloat16_units() {
  const auto ask =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
  return ask && ask->typed<bool()>().call();
}

Tensor multiplied(const Tensor& x) {
  static const bool bfloat16 = has_bfloat16_units();
  // a dry run counts memory for other machines than this one
  const bool taken = bfloat16 || exact();
  return x.scalar_type() == at::kBFloat16 && !taken && concrete(x) ? x.to(at::kFloat) : x;
}

Tensor exact_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias_) {
  const Tensor a = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});  // [N, D]
  const OptionalTensor bias = contiguous(bias_);
  const int64_t rows = a.size(0), depth = a.size(1), features = weight.size(0);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = features;
  Tensor y = at::empty(sizes, x.options());
  const Tensor laid_out = at::empty({exact_groups(rows) * exact_group, exact_depth(depth)},
                                    x.options().dtype(at::kFloat));
  const int64_t panels = (features + exact_panel - 1) / exact_panel;
  constexpr int64_t enough_units = 32, least_rows = 96;  // each unit lays out a panel for itself
  const int64_t parts =
      std::clamp<int64_t>(rows / least_rows, 1, (enough_units + panels) / (panels + 1));
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& k = kernels<T>();
    const ExactRows<T> in{data<T>(a), a.stride(0), a.stride(1), data<float>(laid_out), rows, depth};
    parallel(exact_groups(rows), exact_group * depth,
             [&](int64_t i, int64_t j) { k.exact_rows(in, i, j); });
    const ExactProduct<T> p{data<float>(laid_out),
                            data<T>(weight),
                            weight.stride(0),
                            weight.stride(1),
                            data<T>(bias),
                            data<T>(y),
                            rows,
                            features,
                            depth,
                            parts};
    parallel(panels * parts, depth * (exact_panel + rows),
             [&](int64_t i, int64_t j) { k.exact_product(p, i, j); });
  });
  return y;
}

Tensor exact_times(const Tensor& a, const Tensor& b) { return exact_product(a, b.t()); }

Tensor times(const Tensor& a, const Tensor& b) {
  if (exact()) return exact_times(a, b);
  return at::mm(multiplied(a), multiplied(b)).to(a.scalar_type());
}

// torch uses MKL for float32, which is 10 % slower than oneDNN on AMD's chips; for bfloat16 it uses
// oneDNN already. oneDNN adds up to 1024 terms in one chain: its error is 1.7 times MKL's at 512
// terms and 2.3 times from 1024 on.
Tensor product(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  if (exact()) return exact_product(x_, weight_, bias_);
  const Tensor x = multiplied(x_), weight = multiplied(weight_);
  const OptionalTensor bias = bias_ ? OptionalTensor(multiplied(*bias_)) : bias_;
  if (x.scalar_type() != x_.scalar_type()) return product(x, weight, bias).to(x_.scalar_type());
  constexpr int64_t short_sum = 768;
  static const std::optional<Pointwise> fast = onednn();
  const bool taken = fast && x.scalar_type() == at::kFloat && x.numel() &&
                     x.size(-1) <= short_sum && at::globalContext().userEnabledMkldnn();
  if (!taken) return at::linear(x, weight, bias);
  return fast->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear);
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) { m.impl("linear_forward", linear_forward); }

}  // namespace glm
