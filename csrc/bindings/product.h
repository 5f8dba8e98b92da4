// Matrix products, by the library torch brings that is fastest at them.
#pragma once

#include "tensor.h"

namespace glm {

// x weight^T + bias, [N, K] x [F, K] -> [N, F].
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt);

}  // namespace glm
