// Optimizer arithmetic on a part of a flat tensor.
#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

// sums[c] = sum of squares of chunk c; in float within a block of 32 vectors, then in double.
template <class T>
void squares(const Squares<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t block = 32 * W;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t first = c * a.chunk;
    const int64_t size = a.size - first < a.chunk ? a.size - first : a.chunk;
    double total = 0;
    for (int64_t i = 0; i < size; i += block) {
      vf s = all(0.0f);
      sweep(size - i < block ? size - i : block, [&](int64_t j, int64_t n) GLM_INLINED {
        vf x = take(a.x + first + i + j, n);
        s = fma(x, x, s);
      });
      float lane[W];
      store(lane, s);
      for (float x : lane) total += double(x);
    }
    a.sums[c] = total;
  }
}

// T is the type of the gradients and of the copies, if any.
template <class T>
void adamw_update(const AdamW<T>& a, int64_t begin, int64_t end) {
  sweep(end - begin, [&](int64_t i, int64_t n) GLM_INLINED {
    const int64_t at = begin + i;
    vf g = take(a.grad + at, n) * a.grad_scale;
    vf m = fma(g, a.one_minus_beta1, take(a.exp_avg + at, n) * a.beta1);
    vf v = fma(g * g, a.one_minus_beta2, take(a.exp_avg_sq + at, n) * a.beta2);
    vf step = (m / a.correction1) / (root(v / a.correction2) + a.eps);
    vf p = fma(step, -a.lr, take(a.param + at, n) * a.decay);
    give(a.exp_avg + at, m, n);
    give(a.exp_avg_sq + at, v, n);
    give(a.param + at, p, n);
    if (a.copy) give(a.copy + at, p, n);
  });
}

GLM_INSTANTIATE(squares, Squares)
GLM_INSTANTIATE(adamw_update, AdamW)

}  // namespace glm::GLM_ISA
