// Bindings of linear for few rows, and of quantized_linear.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "product.h"

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using QuantizedSignature = Tensor(const Tensor&, const Tensor&, const Tensor&,
                                  const OptionalTensor&, int64_t, int64_t);
using QuantizedBackwardSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t);

std::vector<int64_t> result_sizes(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = features;
  return sizes;
}

void check_sizes(const char* name, const Tensor& x, int64_t width, int64_t features,
                 const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(x.size(-1) == width, name, ": x has width ", x.size(-1), ", the weight takes ",
                    width);
  TORCH_CHECK_VALUE(!bias || bias->numel() == features, name, ": bias must have ", features,
                    " elements");
}

Tensor linear_few(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  const Tensor narrow = x_.contiguous(), x = narrow.to(at::kFloat), weight = weight_.contiguous();
  const OptionalTensor bias = contiguous(bias_);
  const int64_t rows = num_rows(x), width = weight.size(1), features = weight.size(0);
  check_sizes("linear", x, width, features, bias);
  Tensor y = at::empty(result_sizes(x, features), x_.options());
  by_dtype(x_, [&](auto zero) {
    using T = decltype(zero);
    const LinearFew<T> a{data<float>(x), data<T>(narrow), data<T>(weight),
                         data<T>(bias),  data<T>(y),      rows,
                         width,          features};
    parallel(features, width, [&](int64_t i, int64_t j) { kernels<T>().linear_few(a, i, j); });
  });
  return y;
}

// How many features are dequantised at a time: enough for an efficient product.
int64_t features_at_a_time(int64_t width) {
  constexpr int64_t budget = 4 << 20;
  return std::max<int64_t>(256, budget / width);
}

struct Quantized {
  Tensor weight, scale;
  Codes codes;
  Quantized(const Tensor& weight_, const Tensor& scale_, int64_t bits)
      : weight(weight_.contiguous()), scale(scale_.contiguous()) {
    const int64_t features = weight.size(0);
    TORCH_CHECK_VALUE(bits == 4 || bits == 8, "quantized_linear: bits must be 8 or 4");
    TORCH_CHECK_VALUE(scale.scalar_type() == at::kHalf,
                      "quantized_linear: scale must be float16, received ", scale.scalar_type());
    TORCH_CHECK_VALUE(scale.size(0) == features, "quantized_linear: scale must have ", features,
                      " rows, received ", scale.size(0));
    codes = {data<int8_t>(weight), data<uint16_t>(scale), weight.size(1) * 8 / bits,
             features ? scale.numel() / features : 1, int(bits)};
  }

  // Returns features [begin, end) as a matrix of `like`'s dtype: [end - begin, D].
  Tensor dequantized(const Tensor& like, int64_t begin, int64_t end) const {
    Tensor w = at::empty({end - begin, codes.width}, like.options());
    Codes part = codes;
    part.weight += begin * weight.size(1);
    part.scale += begin * codes.groups;
    by_dtype(like, [&](auto zero) {
      using T = decltype(zero);
      const Dequantize<T> a{part, data<T>(w)};
      parallel(end - begin, codes.width,
               [&](int64_t i, int64_t j) { kernels<T>().dequantize(a, i, j); });
    });
    return w;
  }
};

// Rows as the product from codes takes them; x must be contiguous.
struct Input {
  int64_t places, lanes;  // of a row
  bool rounded;
  Tensor values, codes, steps, excess;

  Input(const Tensor& x, int64_t bits, bool rounded_) : rounded(rounded_) {
    const int64_t rows = num_rows(x), width = x.size(-1);
    places = padded(width), lanes = places / (bits == 4 ? 8 : 4);
    const auto ints = x.options().dtype(at::kInt), floats = x.options().dtype(at::kFloat);
    values = at::empty({rounded ? 0 : rows, places}, floats);
    codes = at::empty({rounded ? rows : 0, places}, x.options().dtype(at::kChar));
    steps = at::empty({rounded ? rows : 0, lanes}, floats);
    excess = at::empty({rounded ? rows : 0, lanes}, ints);
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      const QuantizedInput<T> in{data<T>(x),
                                 data<float>(values),
                                 rounded ? data<int8_t>(codes) : nullptr,
                                 data<float>(steps),
                                 data<int32_t>(excess),
                                 width,
                                 places,
                                 int(bits)};
      parallel(rows, places, [&](int64_t i, int64_t j) { kernels<T>().quantized_input(in, i, j); });
    });
  }

  // The product of rows from `first` on with a weight.
  template <class T>
  QuantizedProduct<T> product(const Codes& w, const T* bias, T* y, int64_t first, int64_t rows,
                              int64_t features) const {
    const float* step = rounded ? data<float>(steps) + first * lanes : nullptr;
    return {w,
            bias,
            rounded ? nullptr : data<float>(values) + first * places,
            rounded ? data<int8_t>(codes) + first * places : nullptr,
            step,
            rounded ? data<int32_t>(excess) + first * lanes : nullptr,
            y,
            rows,
            features,
            places};
  }
};

// The product straight from the codes; x must be contiguous.
Tensor fused(const Tensor& x, const Quantized& q, const OptionalTensor& bias, bool rounded) {
  const int64_t rows = num_rows(x), features = q.weight.size(0);
  const Input in(x, q.codes.bits, rounded);
  Tensor y = at::empty(result_sizes(x, features), x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto a = in.product<T>(q.codes, data<T>(bias), data<T>(y), 0, rows, features);
    parallel(features, q.codes.width,
             [&](int64_t i, int64_t j) { kernels<T>().quantized_product(a, i, j); });
  });
  return y;
}

Tensor rounded_activations(const Tensor& x) {
  Tensor y = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const RoundActivations<T> a{data<T>(x), data<T>(y), x.size(-1)};
    parallel(num_rows(x), x.size(-1),
             [&](int64_t i, int64_t j) { kernels<T>().round_activations(a, i, j); });
  });
  return y;
}

// For many rows: dequantises the weights part by part and multiplies by a library.
Tensor dequantised_first(const Tensor& x_, const Quantized& q, const OptionalTensor& bias,
                         bool rounded) {
  const Tensor x = multiplied(rounded ? rounded_activations(x_) : x_);
  const int64_t features = q.weight.size(0), chunk = features_at_a_time(q.codes.width);
  if (chunk >= features)
    return product(x, q.dequantized(x, 0, features), bias).to(x_.scalar_type());
  Tensor y = at::empty(result_sizes(x, features), x_.options());
  for (int64_t begin = 0; begin < features; begin += chunk) {
    const int64_t end = std::min(features, begin + chunk);
    const OptionalTensor part = bias ? OptionalTensor(bias->slice(0, begin, end)) : bias;
    y.slice(-1, begin, end).copy_(product(x, q.dequantized(x, begin, end), part));
  }
  return y;
}

Tensor quantized_linear_forward(const Tensor& x_, const Tensor& weight, const Tensor& scale,
                                const OptionalTensor& bias_, int64_t bits,
                                int64_t activation_bits) {
  const Tensor x = x_.contiguous();
  const OptionalTensor bias = contiguous(bias_);
  const Quantized q(weight, scale, bits);
  const bool rounded = activation_bits == 8;
  check_sizes("quantized_linear", x, q.codes.width, weight.size(0), bias);
  if (exact() || num_rows(x) <= fused_rows(rounded)) return fused(x, q, bias, rounded);
  return dequantised_first(x, q, bias, rounded);
}

Tensor quantized_linear_backward(const Tensor& dy, const Tensor& weight, const Tensor& scale,
                                 int64_t bits) {
  const Quantized q(weight, scale, bits);
  const Tensor rows = multiplied(dy).reshape({-1, dy.size(-1)});  // [N, F]
  const Tensor dx = times(rows, q.dequantized(rows, 0, q.weight.size(0)));
  return dx.to(dy.scalar_type()).view(result_sizes(dy, q.codes.width));  // [..., D]
}

Tensor call_quantized(const Tensor& x, const Tensor& weight, const Tensor& scale,
                      const OptionalTensor& bias, int64_t bits, int64_t activation_bits) {
  static const auto forward = op<QuantizedSignature>("glm_core::quantized_linear_forward");
  return forward.call(x, weight, scale, bias, bits, activation_bits);
}

struct QuantizedGrad : torch::autograd::Function<QuantizedGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& scale, const OptionalTensor& bias, int64_t bits,
                        int64_t activation_bits) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({weight, scale});
    ctx->saved_data["bits"] = bits;
    return call_quantized(x, weight, scale, bias, bits, activation_bits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto backward =
        op<QuantizedBackwardSignature>("glm_core::quantized_linear_backward");
    const variable_list s = ctx->get_saved_variables();
    const Tensor dx = backward.call(grads[0], s[0], s[1], ctx->saved_data["bits"].toInt());
    return {dx, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
                        const OptionalTensor& bias, int64_t bits, int64_t activation_bits) {
  if (wants_gradient(x)) return QuantizedGrad::apply(x, weight, scale, bias, bits, activation_bits);
  return call_quantized(x, weight, scale, bias, bits, activation_bits);
}

}  // namespace

// One range of all experts' features is shared among the threads: an expert alone is too little.
Tensor fused_groups(const Tensor& rows_, const Tensor& weight, const Tensor& scale,
                    const int64_t* counts, int64_t bits, bool rounded) {
  const Tensor rows = rows_.contiguous();
  const Quantized q(weight.flatten(0, 1), scale.flatten(0, 1), bits);
  check_sizes("quantized_grouped_linear", rows, q.codes.width, weight.size(1), std::nullopt);
  const int64_t features = weight.size(1);
  const Input in(rows, bits, rounded);
  const Tensor y = at::empty({rows.size(0), features}, rows.options());
  by_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    std::vector<QuantizedProduct<T>> products;
    for (int64_t e = 0, first = 0; e < weight.size(0); first += counts[e++]) {
      Codes w = q.codes;
      w.weight += e * features * weight.size(2);
      w.scale += e * features * w.groups;
      T* out = data<T>(y) + first * features;
      if (counts[e]) products.push_back(in.product<T>(w, nullptr, out, first, counts[e], features));
    }
    parallel(int64_t(products.size()) * features, q.codes.width, [&](int64_t i, int64_t j) {
      for (int64_t end; i < j; i = end) {
        const int64_t before = i / features * features;
        end = std::min(j, before + features);
        kernels<T>().quantized_product(products[size_t(before / features)], i - before,
                                       end - before);
      }
    });
  });
  return y;
}

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def("linear_few(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, "
      "int activation_bits) -> Tensor",
      quantized_linear);
  m.def(
      "quantized_linear_forward(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, "
      "int activation_bits) -> Tensor");
  m.def("quantized_linear_backward(Tensor dy, Tensor weight, Tensor scale, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) {
  m.impl("linear_few", linear_few);
  m.impl("quantized_linear_forward", quantized_linear_forward);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace glm
