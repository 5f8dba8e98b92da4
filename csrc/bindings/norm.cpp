// Bindings of rms_norm, layer_norm, add_rms_norm and add_layer_norm: one pair of operators serves
// all four. Shapes: N rows, D width, C chunks of rows.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "tensor.h"

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NormSignature = Three(const Tensor&, const OptionalTensor&, const Tensor&,
                            const OptionalTensor&, double, double);
using NormBackwardSignature = Four(const Tensor&, const OptionalTensor&, const Tensor&,
                                   const Tensor&, const Tensor&, bool, bool, double);

Three norm_forward(const Tensor& x_, const OptionalTensor& residual_, const Tensor& weight_,
                   const OptionalTensor& bias_, double eps, double alpha) {
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
    parallel(rows, width, [&](int64_t i, int64_t j) { kernels<T>().norm_forward(a, i, j); });
  });
  return {y, total, stats};
}

Four norm_backward(const Tensor& dy_, const OptionalTensor& dtotal_, const Tensor& total_,
                   const Tensor& weight_, const Tensor& stats, bool layer, bool residual,
                   double alpha) {
  const Tensor dy = dy_.contiguous(), total = total_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor dtotal = contiguous(dtotal_);
  const int64_t rows = num_rows(total), width = total.size(-1), per_chunk = chunk_rows(rows);
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  const bool scaled = residual && alpha != 1.0;  // otherwise the residual's gradient is dx
  Tensor dx = at::empty_like(total), dweight = at::empty_like(weight);
  Tensor dresidual = scaled ? at::empty_like(total) : at::empty({0}, total.options());
  Tensor dbias = layer ? at::empty_like(weight) : at::empty({0}, weight.options());
  Tensor partial = at::empty({layer ? 2 : 1, chunks, width}, stats.options());
  by_dtype(total, [&](auto zero) {
    using T = decltype(zero);
    float* sums = data<float>(partial);
    float* bias_sums = layer ? sums + chunks * width : nullptr;
    const NormBackward<T> a{data<T>(dy),
                            data<T>(dtotal),
                            data<T>(total),
                            data<T>(weight),
                            data<float>(stats),
                            data<T>(dx),
                            scaled ? data<T>(dresidual) : nullptr,
                            sums,
                            bias_sums,
                            rows,
                            width,
                            per_chunk,
                            float(alpha)};
    const Kernels<T>& k = kernels<T>();
    parallel(chunks, per_chunk * width, [&](int64_t i, int64_t j) { k.norm_backward(a, i, j); });
    const SumChunks<T> w{sums, data<T>(dweight), chunks, width};
    parallel(width, chunks, [&](int64_t i, int64_t j) { k.sum_chunks(w, i, j); });
    if (!layer) return;
    const SumChunks<T> b{bias_sums, data<T>(dbias), chunks, width};
    parallel(width, chunks, [&](int64_t i, int64_t j) { k.sum_chunks(b, i, j); });
  });
  return {dx, dresidual, dweight, dbias};
}

Three call_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                const OptionalTensor& bias, double eps, double alpha) {
  static const auto forward = op<NormSignature>("glm_core::norm_forward");
  return forward.call(x, residual, weight, bias, eps, alpha);
}

struct NormGrad : torch::autograd::Function<NormGrad> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const Tensor& weight,
                               const OptionalTensor& bias, double eps, double alpha) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, total, stats] = call_norm(x, residual, weight, bias, eps, alpha);
    ctx->save_for_backward({residual ? total : x, weight, stats});
    ctx->saved_data["layer"] = bias.has_value();
    ctx->saved_data["alpha"] = alpha;
    ctx->set_materialize_grads(false);
    return residual ? variable_list{y, total} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op_backward = op<NormBackwardSignature>("glm_core::norm_backward");
    const variable_list saved = ctx->get_saved_variables();
    const bool residual = grads.size() == 2, layer = ctx->saved_data["layer"].toBool();
    const Tensor dy = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
    const auto dtotal =
        residual && grads[1].defined() ? OptionalTensor(grads[1]) : OptionalTensor();
    const double alpha = ctx->saved_data["alpha"].toDouble();
    auto [dx, dresidual, dweight, dbias] =
        op_backward.call(dy, dtotal, saved[0], saved[1], saved[2], layer, residual, alpha);
    const Tensor dr = !residual ? Tensor() : alpha == 1.0 ? dx : dresidual;
    return {dx, dr, dweight, layer ? dbias : Tensor(), Tensor(), Tensor()};
  }
};

// Returns {y}, or {y, total} where there is a residual.
variable_list norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                   const OptionalTensor& bias, double eps, double alpha) {
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || weight.requires_grad() || (residual && residual->requires_grad()) ||
       (bias && bias->requires_grad())))
    return NormGrad::apply(x, residual, weight, bias, eps, alpha);
  auto [y, total, stats] = call_norm(x, residual, weight, bias, eps, alpha);
  return {y, total};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return norm(x, std::nullopt, weight, std::nullopt, eps, 1.0)[0];
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return norm(x, std::nullopt, weight, bias, eps, 1.0)[0];
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps, double alpha) {
  const variable_list out = norm(x, residual, weight, std::nullopt, eps, alpha);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                          const Tensor& weight, const Tensor& bias, double eps,
                                          double alpha) {
  const variable_list out = norm(x, residual, weight, bias, eps, alpha);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm);
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", layer_norm);
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float alpha) -> "
      "(Tensor y, Tensor total)",
      add_rms_norm);
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, "
      "float alpha) -> (Tensor y, Tensor total)",
      add_layer_norm);
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, "
      "float alpha) -> (Tensor y, Tensor total, Tensor stats)");
  m.def(
      "norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor stats, "
      "bool layer, bool residual, float alpha) -> (Tensor dx, Tensor dresidual, Tensor dweight, "
      "Tensor dbias)");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) {
  m.impl("norm_forward", norm_forward);
  m.impl("norm_backward", norm_backward);
}

}  // namespace glm
