// Device kernels of linear_cross_entropy, global_norm and adamw; nothing here waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "device.h"

namespace glm::gpu::bindings {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// How many rows of logits exist at a time: those of 256 MiB, or of 1/64 of the first device's
// memory where that is more. With several chunks the weight's gradient is read and written once for
// each of them, in float32.
int64_t fast_loss_chunk(int64_t rows, int64_t vocab, int64_t element_size) {
#if defined(GLM_FIBERS)
  return std::min(rows, int64_t(32));  // several chunks in the tests' small cases
#else
  static const int64_t budget_bytes = std::max(int64_t(256) << 20, device_memory() / 64);
  constexpr int64_t fewest = 128;
  return std::min(rows, std::max(fewest, budget_bytes / (vocab * element_size)));
#endif
}

// dweight += dz^T x; half-precision products are summed in float32.
void accumulate(Tensor& sum, const Tensor& dz, const Tensor& x, bool first) {
  if (sum.scalar_type() != x.scalar_type())
    first ? sum.copy_(dz.t().mm(x)) : sum.add_(dz.t().mm(x));
  else if (first)
    at::mm_out(sum, dz.t(), x);
  else
    sum.addmm_(dz.t(), x);
}

// linear_cross_entropy_forward in the order of the CPU's, whose chunks it takes.
Three exact_loss(const Tensor& x, const Tensor& weight, const Tensor& labels,
                 const Tensor& token_weight, bool gradients, Stream stream) {
  const int64_t rows = x.size(0), vocab = weight.size(0), none = 0;
  const int64_t chunk = loss_chunk(rows, vocab, x.element_size());
  const auto floats = token_weight.options();
  const Tensor each = at::empty({rows}, floats), loss = at::empty({}, floats);
  Tensor dx = at::empty(gradients ? x.sizes() : at::IntArrayRef(none), x.options());
  Tensor dweight = at::zeros(gradients ? weight.sizes() : at::IntArrayRef(none),
                             chunk < rows ? floats : x.options());
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t size = std::min(chunk, rows - begin);
    const Tensor part = x.narrow(0, begin, size), z = exact_linear(part, weight);
    by_exact_dtype(z, [&](auto zero) {
      using T = decltype(zero);
      const CrossEntropy<T> a{data<T>(z),
                              data<int64_t>(labels) + begin,
                              data<float>(token_weight) + begin,
                              data<float>(each) + begin,
                              vocab,
                              gradients};
      exact_cross_entropy<T>({a, size}, stream);
    });
    if (!gradients) continue;
    exact_linear_into(dx.narrow(0, begin, size), z, weight.t());
    const Tensor dw = exact_linear(z.t(), part.t());
    begin ? dweight.add_(dw) : dweight.copy_(dw);
  }
  exact_sum(data<float>(each), rows, data<float>(loss), stream);
  return {loss, dx, dweight.to(weight.scalar_type())};
}

// Computes the gradients with the loss, while a chunk's logits exist; they are empty unless
// `gradients`.
Three linear_cross_entropy_forward(const Tensor& x, const Tensor& weight, const Tensor& labels_,
                                   const Tensor& token_weight_, bool gradients) {
  const OnDevice on(x);
  const Tensor labels = labels_.contiguous(), token_weight = token_weight_.contiguous();
  if (wants_exact() && has_exact(x))
    return exact_loss(x, weight, labels, token_weight, gradients, on.stream);
  const int64_t rows = x.size(0), vocab = weight.size(0), none = 0;
  const int64_t chunk = fast_loss_chunk(rows, vocab, x.element_size());
  const auto of_sums = chunk < rows ? token_weight.options() : weight.options();
  Tensor each = at::empty({rows}, token_weight.options());
  Tensor logits = at::empty({chunk, vocab}, x.options());
  Tensor dx = at::empty(gradients ? x.sizes() : at::IntArrayRef(none), x.options());
  Tensor dweight = at::empty(gradients ? weight.sizes() : at::IntArrayRef(none), of_sums);
  if (gradients && !rows) dweight.zero_();
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t size = std::min(chunk, rows - begin);
    const Tensor part = x.narrow(0, begin, size);
    Tensor z = logits.narrow(0, 0, size);
    at::mm_out(z, part, weight.t());
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      const CrossEntropy<T> a{data<T>(z),
                              data<int64_t>(labels) + begin,
                              data<float>(token_weight) + begin,
                              data<float>(each) + begin,
                              vocab,
                              gradients};
      cross_entropy<T>({a, size}, on.stream);
    });
    if (!gradients) continue;
    Tensor dpart = dx.narrow(0, begin, size);
    at::mm_out(dpart, z, weight);
    accumulate(dweight, z, part, begin == 0);
  }
  return {each.sum(at::kDouble).to(at::kFloat), dx, dweight.to(weight.scalar_type())};
}

std::vector<Tensor> contiguous_all(at::TensorList tensors) {
  std::vector<Tensor> all;
  for (const Tensor& t : tensors) all.push_back(t.contiguous());
  return all;
}

// Calls f(indices, largest) with batches of indices: of non-empty tensors of one dtype.
template <class F>
void batches(const std::vector<Tensor>& tensors, F f) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    std::vector<size_t> batch;
    int64_t largest = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].scalar_type() == dtype && tensors[i].numel()) {
        batch.push_back(i);
        largest = std::max(largest, tensors[i].numel());
      }
      if (batch.empty() || (int(batch.size()) < batch_size && i + 1 < tensors.size())) continue;
      f(batch, largest);
      batch.clear();
      largest = 0;
    }
  }
}

Tensor exact_norm(const std::vector<Tensor>& tensors, Stream stream) {
  int64_t count = 0;
  for (const Tensor& t : tensors) count += divided_up(t.numel(), exact_stretch);
  const auto options = tensors[0].options();
  const Tensor sums = at::empty({count}, options.dtype(at::kDouble));
  const Tensor norm = at::empty({}, options.dtype(at::kFloat));
  int64_t next = 0;
  batches(tensors, [&](const std::vector<size_t>& batch, int64_t) {
    by_exact_dtype(tensors[batch[0]], [&](auto zero) {
      using T = decltype(zero);
      ExactSquares<T> a{};
      a.sums = data<double>(sums), a.tensors = int(batch.size());
      for (size_t k = 0; k < batch.size(); ++k) {
        a.x[k] = data<T>(tensors[batch[k]]), a.size[k] = tensors[batch[k]].numel();
        a.first[k] = next, next += divided_up(a.size[k], exact_stretch);
      }
      exact_squares(a, stream);
    });
  });
  exact_root_of_sum(data<double>(sums), count, data<float>(norm), stream);
  return norm;
}

Tensor global_norm(at::TensorList tensors_) {
  const OnDevice on(tensors_.front());
  const std::vector<Tensor> tensors = contiguous_all(tensors_);
  if (wants_exact() && std::all_of(tensors.begin(), tensors.end(), has_exact))
    return exact_norm(tensors, on.stream);
  int64_t count = 0;
  batches(tensors, [&](const std::vector<size_t>& batch, int64_t largest) {
    count += int64_t(batch.size()) * blocks_for(largest);
  });
  const auto options = tensors[0].options();
  const Tensor sums = at::empty({count}, options.dtype(at::kDouble));
  Tensor norm = at::empty({}, options.dtype(at::kFloat));
  double* next = data<double>(sums);
  batches(tensors, [&](const std::vector<size_t>& batch, int64_t largest) {
    by_dtype(tensors[batch[0]], [&](auto zero) {
      using T = decltype(zero);
      SquaresBatch<T> a{};
      a.sums = next, a.tensors = int(batch.size()), a.blocks = blocks_for(largest);
      for (size_t k = 0; k < batch.size(); ++k)
        a.x[k] = data<T>(tensors[batch[k]]), a.size[k] = tensors[batch[k]].numel();
      squares(a, on.stream);
      next += int64_t(a.tensors) * a.blocks;
    });
  });
  root_of_sum(data<double>(sums), count, data<float>(norm), on.stream);
  return norm;
}

void adamw_(at::TensorList params, at::TensorList grads_, at::TensorList exp_avgs,
            at::TensorList exp_avg_sqs, const Tensor& grad_scale, int64_t step, double lr,
            double beta1, double beta2, double eps, double weight_decay, at::TensorList copies) {
  const OnDevice on(grad_scale);
  const std::vector<at::TensorList> written = {params, exp_avgs, exp_avg_sqs, copies};
  const std::vector<Tensor> p = contiguous_all(params), g = contiguous_all(grads_),
                            m = contiguous_all(exp_avgs), v = contiguous_all(exp_avg_sqs),
                            c = contiguous_all(copies);
  batches(g, [&](const std::vector<size_t>& batch, int64_t largest) {
    by_dtype(g[batch[0]], [&](auto zero) {
      using T = decltype(zero);
      AdamWBatch<T> a{};
      for (size_t k = 0; k < batch.size(); ++k) {
        const size_t i = batch[k];
        a.param[k] = data<float>(p[i]), a.exp_avg[k] = data<float>(m[i]);
        a.exp_avg_sq[k] = data<float>(v[i]), a.grad[k] = data<T>(g[i]);
        a.copy[k] = c.empty() ? nullptr : data<T>(c[i]), a.size[k] = g[i].numel();
      }
      a.grad_scale = data<float>(grad_scale), a.tensors = int(batch.size());
      a.blocks = blocks_for(largest), a.beta1 = float(beta1), a.beta2 = float(beta2);
      a.one_minus_beta1 = float(1 - beta1), a.one_minus_beta2 = float(1 - beta2);
      a.eps = float(eps), a.lr = float(lr), a.decay = float(1 - lr * weight_decay);
      a.correction1 = float(1 - std::pow(beta1, step));
      a.correction2 = float(1 - std::pow(beta2, step));
      adamw_update(a, on.stream);
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

TORCH_LIBRARY_IMPL(GLM_LIBRARY, GLM_KEY, m) {
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward);
  m.impl("global_norm", global_norm);
  m.impl("adamw_", adamw_);
}

}  // namespace glm::gpu::bindings
