// Bindings of linear_cross_entropy, global_norm and adamw.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "product.h"

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using LossSignature = Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool);

// dweight [V, D] += dz^T x; bfloat16 products are summed in float32.
void accumulate(const Tensor& sum, const Tensor& dz_, const Tensor& x_, bool first) {
  if (exact()) {
    const Tensor part = exact_times(dz_.t(), x_);
    first ? sum.copy_(part) : sum.add_(part);
    return;
  }
  const Tensor dz = multiplied(dz_), x = multiplied(x_);
  if (sum.scalar_type() != x.scalar_type())
    first ? sum.copy_(dz.t().mm(x)) : sum.add_(dz.t().mm(x));
  else if (first)
    at::mm_out(const_cast<Tensor&>(sum), dz.t(), x);
  else
    sum.addmm_(dz.t(), x);
}

// Computes the gradients with the loss, while a chunk's logits exist; they are empty unless
// `gradients`.
Three linear_cross_entropy_forward(const Tensor& x, const Tensor& weight, const Tensor& labels_,
                                   const Tensor& token_weight_, bool gradients) {
  const Tensor labels = labels_.contiguous(), token_weight = token_weight_.contiguous();
  const int64_t rows = x.size(0), vocab = weight.size(0), none = 0;
  check_indices(labels, vocab, "linear_cross_entropy: label");
  const Tensor table = multiplied(weight);
  const int64_t chunk = loss_chunk(rows, vocab, table.element_size());
  const auto of_sums = chunk < rows ? token_weight.options() : table.options();
  Tensor each = at::empty({rows}, token_weight.options());
  Tensor dx = at::empty(gradients ? x.sizes() : at::IntArrayRef(none), x.options());
  Tensor dweight = at::empty(gradients ? weight.sizes() : at::IntArrayRef(none), of_sums);
  if (gradients && !rows) dweight.zero_();
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t size = std::min(chunk, rows - begin);
    const Tensor part = x.narrow(0, begin, size);
    const Tensor z = product(part, table);
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      const CrossEntropy<T> a{data<T>(z),
                              data<int64_t>(labels) + begin,
                              data<float>(token_weight) + begin,
                              data<float>(each) + begin,
                              vocab,
                              gradients};
      parallel(size, vocab, [&](int64_t i, int64_t j) { kernels<T>().cross_entropy(a, i, j); });
    });
    if (!gradients) continue;
    dx.narrow(0, begin, size).copy_(times(z, table));
    accumulate(dweight, z, part, begin == 0);
  }
  double total = 0;
  for (int64_t n = 0; n < rows; ++n) total += double(data<float>(each)[n]);
  return {at::scalar_tensor(total, token_weight.options()), dx, dweight.to(weight.scalar_type())};
}

Three call_loss(const Tensor& x, const Tensor& weight, const Tensor& labels,
                const Tensor& token_weight, bool gradients) {
  static const auto forward = op<LossSignature>("glm_core::linear_cross_entropy_forward");
  return forward.call(x, weight, labels, token_weight, gradients);
}

struct LossGrad : torch::autograd::Function<LossGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& labels, const Tensor& token_weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, dx, dweight] = call_loss(x, weight, labels, token_weight, true);
    ctx->save_for_backward({x, weight, labels, token_weight});
    ctx->saved_data["dx"] = dx;
    ctx->saved_data["dweight"] = dweight;
    return loss;
  }

  // The first backward hands the stored gradients over, so that they become `.grad` without a copy.
  // A second one over the same graph computes them again.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor dx, dweight;
    if (ctx->saved_data.count("dx")) {
      dx = ctx->saved_data["dx"].toTensor();
      dweight = ctx->saved_data["dweight"].toTensor();
      ctx->saved_data.clear();
    } else {
      const variable_list s = ctx->get_saved_variables();
      std::tie(std::ignore, dx, dweight) = call_loss(s[0], s[1], s[2], s[3], true);
    }
    if (!concrete(grads[0]))
      return {at::mul(dx, grads[0]), at::mul(dweight, grads[0]), Tensor(), Tensor()};
    // a GPU's value is not looked at, because that waits for it
    if (!grads[0].is_cpu() || grads[0].item<float>() != 1.0f) {
      dx.mul_(grads[0]);
      dweight.mul_(grads[0]);
    }
    return {dx, dweight, Tensor(), Tensor()};
  }
};

Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& labels,
                            const Tensor& token_weight) {
  if (wants_gradient(x, weight)) return LossGrad::apply(x, weight, labels, token_weight);
  return std::get<0>(call_loss(x, weight, labels, token_weight, false));
}

// A part of a tensor in a list: the unit of work of ops over lists.
struct Stretch {
  size_t tensor;
  int64_t begin, end;
};

constexpr int64_t stretch_size = 16384;

std::vector<Stretch> stretches(at::TensorList tensors) {
  std::vector<Stretch> all;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0, n = tensors[i].numel(); begin < n; begin += stretch_size)
      all.push_back({i, begin, std::min(begin + stretch_size, n)});
  return all;
}

std::vector<Tensor> contiguous_all(at::TensorList tensors) {
  std::vector<Tensor> all;
  for (const Tensor& t : tensors) all.push_back(t.contiguous());
  return all;
}

Tensor global_norm(at::TensorList tensors_) {
  const std::vector<Tensor> tensors = contiguous_all(tensors_);
  const std::vector<Stretch> work = stretches(tensors);
  std::vector<double> sums(work.size());
  parallel(int64_t(work.size()), stretch_size, [&](int64_t i, int64_t j) {
    for (; i < j; ++i)
      by_dtype(tensors[work[i].tensor], [&](auto zero) {
        using T = decltype(zero);
        const Stretch& s = work[i];
        const int64_t size = s.end - s.begin;
        kernels<T>().squares({data<T>(tensors[s.tensor]) + s.begin, &sums[i], size, size}, 0, 1);
      });
  });
  double total = 0;
  for (double s : sums) total += s;
  return at::scalar_tensor(std::sqrt(total), at::TensorOptions().dtype(at::kFloat));
}

void adamw_(at::TensorList params, at::TensorList grads_, at::TensorList exp_avgs,
            at::TensorList exp_avg_sqs, const Tensor& grad_scale, int64_t step, double lr,
            double beta1, double beta2, double eps, double weight_decay, at::TensorList copies) {
  const std::vector<at::TensorList> written = {params, exp_avgs, exp_avg_sqs, copies};
  const std::vector<Tensor> p = contiguous_all(params), g = contiguous_all(grads_),
                            m = contiguous_all(exp_avgs), v = contiguous_all(exp_avg_sqs),
                            c = contiguous_all(copies);
  const std::vector<Stretch> work = stretches(p);
  const float scale = grad_scale.item<float>();
  parallel(int64_t(work.size()), stretch_size, [&](int64_t i, int64_t j) {
    for (; i < j; ++i)
      by_dtype(g[work[i].tensor], [&](auto zero) {
        using T = decltype(zero);
        const size_t k = work[i].tensor;
        const AdamW<T> a{data<float>(p[k]),
                         data<float>(m[k]),
                         data<float>(v[k]),
                         data<T>(g[k]),
                         c.empty() ? nullptr : data<T>(c[k]),
                         scale,
                         float(beta1),
                         float(1 - beta1),
                         float(beta2),
                         float(1 - beta2),
                         float(eps),
                         float(lr),
                         float(1 - lr * weight_decay),
                         float(1 - std::pow(beta1, step)),
                         float(1 - std::pow(beta2, step))};
        kernels<T>().adamw_update(a, work[i].begin, work[i].end);
      });
  });
  const std::vector<const std::vector<Tensor>*> computed = {&p, &m, &v, &c};
  for (size_t list = 0; list < written.size(); ++list)
    for (size_t k = 0; k < written[list].size(); ++k) {
      const Tensor &target = written[list][k], &result = (*computed[list])[k];
      if (!result.is_same(target)) target.copy_(result);
      if (!target.is_inference()) target.unsafeGetTensorImpl()->bump_version();
    }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor token_weight) -> "
      "Tensor",
      linear_cross_entropy);
  m.def(
      "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor labels, Tensor token_weight, "
      "bool gradients) -> (Tensor loss, Tensor dx, Tensor dweight)");
  m.def("global_norm(Tensor[] tensors) -> Tensor");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor grad_scale, int step, float lr, float beta1, float beta2, "
      "float eps, float weight_decay, Tensor(d!)[] copies) -> ()");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) {
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward);
  m.impl("global_norm", global_norm);
  m.impl("adamw_", adamw_);
}

}  // namespace glm
