// Softmax cross-entropy of logits that are there anyway, turned into their gradient in place.
// Shapes: N rows (a chunk of the tokens), V vocabulary.
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

template <class T>
float row_max(const T* z, int64_t size) {
  vf m = all(-INFINITY);
  sweep(size, [&](int64_t i, int64_t n) GLM_INLINED {
    m = larger(m, n == W ? load(z + i) : load_n(z + i, n, -INFINITY));
  });
  return largest(m);
}

// log of the sum of exponentials; NaN where a logit is NaN.
template <class T>
float logsumexp(const T* z, int64_t size) {
  const float m = row_max(z, size);
  float total[1];
  sums(size, total,
       [&](int64_t i, int64_t n, vf* s) GLM_INLINED { s[0] += first(exp(take(z + i, n) - m), n); });
  return m + std::log(total[0]);
}

}  // namespace

template <class T>
void cross_entropy(const CrossEntropy<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = a.logits + row * a.vocab;
    const float lse = logsumexp(z, a.vocab), weight = a.token_weight[row];
    T* hit = z + a.labels[row];
    a.loss[row] = (lse - get(hit)) * weight;
    if (!a.gradient) continue;
    const float miss = weight * (std::exp(get(hit) - lse) - 1.0f);
    sweep(a.vocab, [&](int64_t i, int64_t n)
                       GLM_INLINED { give(z + i, exp(take(z + i, n) - lse) * weight, n); });
    put(hit, miss);
  }
}

GLM_INSTANTIATE(cross_entropy, CrossEntropy)

}  // namespace glm::GLM_ISA
