// Device kernels of quantized_linear: ours for few rows, a float32 product for many.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "device.h"

namespace glm::gpu::bindings {
namespace {

// For more rows than this, it is faster to convert the weight to float once.
constexpr int64_t few = 16;

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

Tensor as_float(const Tensor& weight, const Tensor& scale, int64_t bits, Stream stream) {
  const Codes codes = codes_of(weight, scale, bits);
  Tensor w = at::empty({codes.outputs, codes.width}, weight.options().dtype(at::kFloat));
  dequantize(codes, data<float>(w), stream);
  return w;
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
  if (rows > few) {
    const auto added = bias ? OptionalTensor(bias->to(at::kFloat)) : bias;
    const Tensor w = as_float(weight, scale, bits, on.stream);
    return at::linear(x.to(at::kFloat), w, added).to(x_.scalar_type());
  }
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x_.options());
  const Codes codes = codes_of(weight, scale, bits);
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
  const Tensor w = as_float(weight, scale, bits, on.stream);
  auto shape = dy.sizes().vec();
  shape.back() = w.size(1);
  const Tensor rows = dy.reshape({-1, dy.size(-1)}).to(at::kFloat);
  return rows.mm(w).to(dy.scalar_type()).view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(GLM_LIBRARY, GLM_KEY, m) {
  m.impl("quantized_linear_forward", quantized_linear_forward);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace glm::gpu::bindings
