// Softmax cross-entropy of logits, which are overwritten by their gradient.
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

// Whether a row's exponentials overwrite its logits: for T = float that loses nothing.
template <class T>
constexpr bool keeps = sizeof(T) == sizeof(float);

// Returns the sum of exp(z - top), NaN where a logit is NaN.
template <class T>
float exponentials(T* z, int64_t size, float top) {
  float total[1];
  sums(size, total, [&](int64_t i, int64_t n, vf* s) GLM_INLINED {
    const vf e = exp(take(z + i, n) - top);
    if constexpr (keeps<T>) give(z + i, e, n);
    s[0] += first(e, n);
  });
  return total[0];
}

// The C library's functions differ from one release and machine to the next.
float log_of(float x) { return EXACT ? exact_log(x) : std::log(x); }
float exp_of(float x) { return EXACT ? exp(all(x))[0] : std::exp(x); }

}  // namespace

template <class T>
void cross_entropy(const CrossEntropy<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T *z = a.logits + row * a.vocab, *hit = z + a.labels[row];
    const float weight = a.token_weight[row], logit = get(hit), top = row_max(z, a.vocab);
    const float total = exponentials(z, a.vocab, top), lse = top + log_of(total);
    a.loss[row] = (lse - logit) * weight;
    if (!a.gradient) continue;
    sweep(a.vocab, [&](int64_t i, int64_t n) GLM_INLINED {
      const vf x = take(z + i, n);
      const vf gradient = keeps<T> ? x * (weight / total) : exp(x - lse) * weight;
      give(z + i, without_denormals(gradient), n);
    });
    put(hit, weight * (exp_of(logit - lse) - 1.0f));
  }
}

GLM_INSTANTIATE(cross_entropy, CrossEntropy)

}  // namespace glm::GLM_ISA
