// The vendor's own ops, as torch custom ops, and the calls behind torch.sim.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "kernels.h"
#include "torch_sim.h"

#define FLOATING(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, TYPE, NAME, __VA_ARGS__)

namespace sim {
namespace {

using at::Tensor;

// The element pointer of a device tensor, as a kernel gets it. Host pointers are refused.
template <class T>
T* pointer(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "sim: the kernel takes contiguous tensors only");
  return tensor.numel() ? static_cast<T*>(sim::resolve(tensor.data_ptr(), tensor.nbytes()))
                        : nullptr;
}

Tensor geglu(const Tensor& x) {
  auto sizes = x.sizes().vec();
  const auto f = sizes.back() /= 2;
  auto y = at::empty(sizes, x.options());
  FLOATING(x.scalar_type(), "sim::geglu", [&] {
    launch("sim::geglu", {resolved(y)},
           [x = pointer<scalar_t>(x), y = pointer<scalar_t>(y),
            rows = y.numel() / std::max<int64_t>(f, 1), f,
            tanh = due("tanh_gelu", "sim::geglu") != nullptr] {
             kernels::geglu<scalar_t, at::opmath_type<scalar_t>>(x, y, rows, f, tanh);
           });
  });
  return y;
}

Tensor geglu_backward(const Tensor& dy, const Tensor& x) {
  auto dx = at::empty_like(x);
  const auto f = dy.size(-1);
  FLOATING(x.scalar_type(), "sim::geglu_backward", [&] {
    launch("sim::geglu_backward", {resolved(dx)},
           [dy = pointer<scalar_t>(dy), x = pointer<scalar_t>(x), dx = pointer<scalar_t>(dx),
            rows = dy.numel() / std::max<int64_t>(f, 1), f] {
             kernels::geglu_backward<scalar_t, at::opmath_type<scalar_t>>(dy, x, dx, rows, f);
           });
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const Tensor& weight, const Tensor& bias,
                                                          double eps, double alpha) {
  auto y = at::empty_like(x), s = at::empty_like(x);
  const auto d = x.size(-1), rows = x.numel() / std::max<int64_t>(d, 1);
  auto mean = at::empty({rows}, x.options().dtype(at::kDouble)), rstd = at::empty_like(mean);
  FLOATING(x.scalar_type(), "sim::add_layer_norm", [&] {
    using A = at::opmath_type<scalar_t>;
    launch("sim::add_layer_norm", {resolved(y), resolved(s), resolved(mean), resolved(rstd)},
           [x = pointer<scalar_t>(x), residual = pointer<scalar_t>(residual),
            w = pointer<scalar_t>(weight), b = pointer<scalar_t>(bias), y = pointer<scalar_t>(y),
            s = pointer<scalar_t>(s), mean = pointer<double>(mean), rstd = pointer<double>(rstd),
            rows, d, eps, alpha] {
             kernels::add_layer_norm<scalar_t, A>(x, residual, w, b, y, s, mean, rstd, rows, d, eps,
                                                  alpha);
           });
  });
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& dy, const Tensor& ds, const Tensor& s, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd, double alpha) {
  auto dx = at::empty_like(s), dresidual = at::empty_like(s);
  const auto d = s.size(-1), rows = mean.numel();
  auto sums = at::zeros({2, d}, s.options().dtype(at::kDouble));
  FLOATING(s.scalar_type(), "sim::add_layer_norm_backward", [&] {
    using A = at::opmath_type<scalar_t>;
    launch("sim::add_layer_norm_backward", {resolved(dx), resolved(dresidual), resolved(sums)},
           [dy = pointer<scalar_t>(dy), ds = pointer<scalar_t>(ds), s = pointer<scalar_t>(s),
            w = pointer<scalar_t>(weight), mean = pointer<double>(mean),
            rstd = pointer<double>(rstd), dx = pointer<scalar_t>(dx),
            dr = pointer<scalar_t>(dresidual), sums = pointer<double>(sums), rows, d, alpha] {
             kernels::add_layer_norm_backward<scalar_t, A>(dy, ds, s, w, mean, rstd, dx, dr, sums,
                                                           sums + d, rows, d, alpha);
           });
  });
  return {dx, dresidual, sums[0].to(weight.scalar_type()), sums[1].to(weight.scalar_type())};
}

void adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
           at::TensorList exp_avg_sqs, const Tensor& scale, at::TensorList copies, int64_t step,
           double lr, double beta1, double beta2, double eps, double decay) {
  const kernels::AdamW c{
      lr, beta1, beta2, eps, decay, 1 - std::pow(beta1, step), 1 - std::pow(beta2, step)};
  for (std::size_t i = 0; i < params.size(); ++i) {
    const auto& grad = grads[i];
    FLOATING(grad.scalar_type(), "sim::adamw", [&] {
      launch("sim::adamw", {resolved(params[i]), resolved(exp_avgs[i]), resolved(exp_avg_sqs[i])},
             [p = pointer<float>(params[i]), g = pointer<scalar_t>(grad),
              m = pointer<float>(exp_avgs[i]), v = pointer<float>(exp_avg_sqs[i]),
              copy = copies.empty() ? nullptr : pointer<scalar_t>(copies[i]),
              scale = pointer<float>(scale), n = grad.numel(),
              c] { kernels::adamw(p, g, m, v, copy, *scale, n, c); });
    });
  }
}

// Device memory as it is now, whatever is queued: what a host sees that forgets to synchronise.
Tensor peek(int64_t address, int64_t bytes) {
  auto* memory = sim::resolve(reinterpret_cast<void*>(address), bytes);
  return at::from_blob(memory, {bytes}, at::TensorOptions(at::kByte)).clone();
}

c10::List<int64_t> memory() {
  const auto m = sim::memory();
  return {int64_t(m.allocated), int64_t(m.peak), int64_t(m.limit)};
}

Tensor rng_state() { return default_generator().get_state(); }
void set_rng_state(const Tensor& state) { default_generator().set_state(state); }
void manual_seed(int64_t seed) { default_generator().set_current_seed(seed); }

TORCH_LIBRARY(sim, m) {
  m.def("geglu(Tensor x) -> Tensor");
  m.def("geglu_backward(Tensor dy, Tensor x) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float "
      "alpha) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor dy, Tensor ds, Tensor s, Tensor weight, Tensor mean, Tensor "
      "rstd, float alpha) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor scale, "
      "Tensor(d!)[] copies, int step, float lr, float beta1, float beta2, float eps, float decay) "
      "-> ()");
  m.def("synchronize() -> ()", wait);
  m.def("set_timeout(float seconds) -> ()", sim::set_timeout);
  m.def("pending() -> int", [] { return int64_t(sim::pending()); });
  m.def("peek(int address, int bytes) -> Tensor", peek);
  m.def("memory() -> int[]", memory);
  m.def("set_memory_limit(int bytes) -> ()", [](int64_t bytes) { sim::set_memory_limit(bytes); });
  m.def("reset_peak() -> ()", sim::reset_peak);
  m.def("fault(str kind, str op, int call, float value, str dtype) -> ()", set_fault);
  m.def("clear_faults() -> ()", clear_faults);
  m.def("lacks(ScalarType dtype) -> bool", lacks);
  m.def("rng_state() -> Tensor", rng_state);
  m.def("set_rng_state(Tensor state) -> ()");
  m.impl("set_rng_state", c10::DispatchKey::CPU, set_rng_state);
  m.def("manual_seed(int seed) -> ()", manual_seed);
}

TORCH_LIBRARY_IMPL(sim, PrivateUse1, m) {
  m.impl("geglu", geglu);
  m.impl("geglu_backward", geglu_backward);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("add_layer_norm_backward", add_layer_norm_backward);
  m.impl("adamw", adamw);
}

}  // namespace
}  // namespace sim
