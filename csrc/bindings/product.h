// Matrix products by the fastest of the libraries that torch brings.
#pragma once

#include "tensor.h"

namespace glm {

// x weight^T + bias, [N, K] x [F, K] -> [N, F].
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt);

}  // namespace glm
