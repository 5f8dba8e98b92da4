// The router's choice of experts, and the weighted sum of the experts' rows. Shapes: N tokens, X
// experts, T chosen for a token, D width.
#include "kernels.h"
#include "routing.h"
#include "vec.h"

namespace glm::GLM_ISA {

template <class T>
void route_choose(const Route<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    float *scores = a.logits + n * a.num_experts, *biased = a.biased + n * a.num_experts;
    sweep(a.num_experts, [&](int64_t i, int64_t count) GLM_INLINED {
      const vf s = sigmoid(take(scores + i, count));
      give(scores + i, s, count);
      give(biased + i, s + take(a.bias + i, count), count);
    });
    choose(a, n);
  }
}

template <class T>
void route_backward(const RouteBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) choice_gradient(a, n);
}

template <class T>
void weighted_rows(const WeightedRows<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t* back = a.back + n * a.top_k;
    const float* weights = a.weights + n * a.top_k;
    sweep(a.width, [&](int64_t i, int64_t count) GLM_INLINED {
      vf y = all(0.0f);
      for (int64_t j = 0; j < a.top_k; ++j)
        y = fma(take(a.rows + back[j] * a.width + i, count), weights[j], y);
      give(a.y + n * a.width + i, y, count);
    });
  }
}

template <class T>
void weighted_rows_backward(const WeightedRowsBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t j = n * a.top_k; j < (n + 1) * a.top_k; ++j) {
      const T *dy = a.dy + n * a.width, *row = a.rows + a.back[j] * a.width;
      T* out = a.drows + a.back[j] * a.width;
      float total[1];
      sums(a.width, total, [&](int64_t i, int64_t count, vf* s) GLM_INLINED {
        const vf g = take(dy + i, count);
        give(out + i, g * a.weights[j], count);
        s[0] = fma(g, take(row + i, count), s[0]);
      });
      a.dweights[j] = total[0];
    }
}

GLM_INSTANTIATE(route_choose, Route)
GLM_INSTANTIATE(route_backward, RouteBackward)
GLM_INSTANTIATE(weighted_rows, WeightedRows)
GLM_INSTANTIATE(weighted_rows_backward, WeightedRowsBackward)

}  // namespace glm::GLM_ISA
