// Device kernels of linear for few rows and of quantized_linear: ours for few rows, torch's
// products for many.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "device.h"

namespace glm::gpu::bindings {
namespace {

// For more rows than this the weight is converted first, where tensor cores do not take the codes.
constexpr int64_t few = 16;
// Outputs whose weight is converted at a time: enough tiles of a product with many rows for every
// processor of a large chip, and for a width of 4096 they stay in the second cache of an H100.
#if defined(GLM_FIBERS)
constexpr int64_t outputs_at_a_time = 16;
#else
constexpr int64_t outputs_at_a_time = 4096;
#endif

// The weight as the kernels read it: pointers into tensors that the caller keeps alive.
Codes codes_of(const Tensor& weight, const Tensor& scale, int64_t bits) {
  const bool half = scale.scalar_type() == at::kHalf;
  const int64_t outputs = weight.size(0), groups = scale.dim() > 1 ? scale.size(1) : 1;
  return {data<int8_t>(weight),
          half ? data<f16>(scale) : nullptr,
          half ? nullptr : data<float>(scale),
          weight.size(1) * 8 / bits,
          outputs,
          groups,
          int(bits)};
}

// Rows [begin, begin + count) of the weight in the dtype of `like`.
Tensor converted(const Codes& all, int64_t begin, int64_t count, const Tensor& like,
                 Stream stream) {
  Codes part = all;
  part.codes += begin * all.width * all.bits / 8;
  if (part.scale16) part.scale16 += begin * all.groups;
  if (part.scale32) part.scale32 += begin * all.groups;
  part.outputs = count;
  Tensor w = at::empty({count, all.width}, like.options());
  by_dtype(w, [&](auto zero) { dequantize(part, data<decltype(zero)>(w), stream); });
  return w;
}

// Writes x w^T + bias, a part of the outputs at a time, so that little of the weight is converted
// at once. x [N, D], y [N, F] contiguous, in one dtype, to which w is rounded.
void converted_first(const Tensor& x, const Codes& codes, const OptionalTensor& bias, Tensor y,
                     Stream stream) {
  for (int64_t begin = 0; begin < codes.outputs; begin += outputs_at_a_time) {
    const int64_t count = std::min(outputs_at_a_time, codes.outputs - begin);
    const Tensor w = converted(codes, begin, count, x, stream).t();
    Tensor part = y.narrow(1, begin, count);
    if (bias)
      at::addmm_out(part, bias->narrow(0, begin, count), x, w);
    else
      at::mm_out(part, x, w);
  }
}

Tensor linear_few(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  const OnDevice on(x_);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor bias = contiguous(bias_);
  const int64_t rows = num_rows(x);
  const Codes values{data<int8_t>(weight), nullptr, nullptr, weight.size(1), weight.size(0), 1, 16};
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x.options());
  const auto done = [&](auto zero) {
    using T = decltype(zero);
    return half_rows<T>({data<T>(x), values, data<T>(bias), data<T>(y), rows}, on.stream);
  };
  if (x.scalar_type() == at::kBFloat16 && done(bf16{})) return y;
  if (x.scalar_type() == at::kHalf && done(f16{})) return y;
  return at::linear(x, weight, bias);
}

Tensor quantized_linear_forward(const Tensor& x_, const Tensor& weight_, const Tensor& scale_,
                                const OptionalTensor& bias_, int64_t bits,
                                int64_t activation_bits) {
  const OnDevice on(x_);
  const Tensor weight = weight_.contiguous(), scale = scale_.contiguous();
  const OptionalTensor bias = contiguous(bias_);
  const int64_t rows = num_rows(x_);
  Tensor x = x_.contiguous();
  if (activation_bits == 8) {
    const Tensor rounded = at::empty(x.sizes(), x.options().dtype(at::kFloat));
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      round_activations(data<T>(x), data<float>(rounded), rows, x.size(-1), on.stream);
    });
    x = rounded;
  }
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x_.options());
  const Codes codes = codes_of(weight, scale, bits);
  const auto in_tiles = [&](auto zero) {
    using T = decltype(zero);
    return quantized_tiles<T>({data<T>(x), codes, data<T>(bias), data<T>(y), rows}, on.stream);
  };
  if (x.scalar_type() == at::kBFloat16 && in_tiles(bf16{})) return y;
  if (x.scalar_type() == at::kHalf && in_tiles(f16{})) return y;
  if (rows > few) {
    const Tensor flat = x.to(x_.scalar_type()).view({rows, codes.width});
    converted_first(flat, codes, bias, y.view({rows, codes.outputs}), on.stream);
    return y;
  }
  by_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    if (x.scalar_type() == at::kFloat)
      quantized_rows<float, T>({data<float>(x), codes, data<T>(bias), data<T>(y), rows}, on.stream);
    else
      quantized_rows<T, T>({data<T>(x), codes, data<T>(bias), data<T>(y), rows}, on.stream);
  });
  return y;
}

Tensor quantized_linear_backward(const Tensor& dy, const Tensor& weight_, const Tensor& scale_,
                                 int64_t bits) {
  const OnDevice on(dy);
  const Tensor weight = weight_.contiguous(), scale = scale_.contiguous();
  const Codes codes = codes_of(weight, scale, bits);
  auto shape = dy.sizes().vec();
  shape.back() = codes.width;
  const Tensor w = converted(codes, 0, codes.outputs, dy, on.stream);
  return dy.reshape({-1, dy.size(-1)}).mm(w).view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(GLM_LIBRARY, GLM_KEY, m) {
  m.impl("linear_few", linear_few);
  m.impl("quantized_linear_forward", quantized_linear_forward);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace glm::gpu::bindings
