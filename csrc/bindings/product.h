// Matrix products by the fastest of the libraries that torch brings.
#pragma once

#include "tensor.h"

namespace glm {

// x weight^T + bias, [N, K] x [F, K] -> [N, F].
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt);

// a b, [N, K] x [K, M] -> [N, M].
Tensor times(const Tensor& a, const Tensor& b);

// The same as `product` and `times` with the exact kernels (docs/exact.md), whatever the strides.
Tensor exact_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = {});
Tensor exact_times(const Tensor& a, const Tensor& b);

// Whether a tensor has values: it is neither fake nor being traced.
inline bool concrete(const Tensor& x) {
  constexpr c10::DispatchKeySet traced{c10::DispatchKey::Python, c10::DispatchKey::Functionalize};
  return !x.key_set().has_any(traced);
}

// Returns x as products take it: in float32 where this CPU has no units for x's dtype, else as it
// is.
Tensor multiplied(const Tensor& x);

// The most rows that a product is computed for straight from codes; for more, weights are
// dequantised first. On two cores with AVX-512 both took the same time for 36 to 90 rows with
// rounded activations, for 13 to 18 rows without (widths 1536 and 4096, int4 and int8).
constexpr int64_t fused_rows(bool rounded) { return rounded ? 32 : 16; }

// quantized_grouped_linear for at most fused_rows rows of each expert: counts [X].
Tensor fused_groups(const Tensor& rows, const Tensor& weight, const Tensor& scale,
                    const int64_t* counts, int64_t bits, bool rounded);

}  // namespace glm
