// What the bindings of experts share, those of the CPU and of the GPU: checks of shapes, and the
// rows of each expert. Shapes: N tokens, X experts, T chosen for a token, M = N T rows, D in, F
// out.
#pragma once

#include "tensor.h"

namespace glm {

using Two = std::tuple<Tensor, Tensor>;

// Each raises ValueError unless shapes are as the op's.
inline void check_route(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                        bias.numel() == weight.size(0),
                    "route: x [N, D] needs weight [X, D] and bias [X]; received x ", x.sizes(),
                    ", weight ", weight.sizes(), ", bias ", bias.sizes());
}

inline void check_permute(const Tensor& x, const Tensor& experts) {
  TORCH_CHECK_VALUE(x.dim() == 2 && experts.dim() == 2 && x.size(0) == experts.size(0),
                    "permute: x [N, D] needs experts [N, T]; received x ", x.sizes(), ", experts ",
                    experts.sizes());
}

inline void check_unpermute(const Tensor& rows, const Tensor& order, const Tensor& weights) {
  TORCH_CHECK_VALUE(rows.size(0) == weights.numel() && order.numel() == weights.numel(),
                    "unpermute: weights [N, T] need N T rows and places; received rows ",
                    rows.sizes(), ", order ", order.sizes(), ", weights ", weights.sizes());
}

inline void check_grouped(const Tensor& rows, const Tensor& weight) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && weight.dim() == 3 && rows.size(1) == weight.size(2),
                    "grouped_linear: rows [M, D] need weight [X, F, D]; received rows ",
                    rows.sizes(), ", weight ", weight.sizes());
}

// Calls f(expert, first row, rows) for each expert with rows. Counts lie on the CPU. Raises
// ValueError where they do not fit.
template <class F>
void each_expert(const Tensor& counts_, int64_t rows, int64_t experts, F f) {
  const Tensor counts = counts_.contiguous();
  const int64_t* count = data<int64_t>(counts);
  int64_t total = 0;
  for (int64_t e = 0; e < counts.numel(); ++e) {
    TORCH_CHECK_VALUE(count[e] >= 0, "grouped_linear: counts must not be negative");
    total += count[e];
  }
  TORCH_CHECK_VALUE(counts.numel() == experts && total == rows, "grouped_linear: ", experts,
                    " experts and ", rows, " rows need as many counts with that sum; received ",
                    counts.numel(), " counts with sum ", total);
  for (int64_t e = 0, first = 0; e < experts; first += count[e++])
    if (count[e]) f(e, first, count[e]);
}

}  // namespace glm
