// The router's choice of experts, and the weighted sum of the experts' rows. Shapes: N tokens, X
// experts, G groups of them, T chosen for a token, D width.
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

// Whether a comes before b, the larger first. A NaN counts as the largest, as in torch's sort.
bool before(float a, float b) { return a > b || (a != a && b == b); }

// Writes the places of the `count` largest of x [size], the largest first; equal ones in order.
// `held` is scratch of as many.
void largest_places(const float* x, int64_t size, int64_t count, float* held, int64_t* places) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (found == count && !before(x[i], held[count - 1])) continue;
    int64_t j = found < count ? found++ : count - 1;
    for (; j > 0 && before(x[i], held[j - 1]); --j) {
      held[j] = held[j - 1];
      places[j] = places[j - 1];
    }
    held[j] = x[i];
    places[j] = i;
  }
}

// The sum of the two largest of x [size].
float two_largest(const float* x, int64_t size) {
  float held[2] = {0.0f, 0.0f};
  int64_t places[2];
  largest_places(x, size, size < 2 ? size : 2, held, places);
  return held[0] + held[1];
}

// Sets the scores of all but the best groups to -inf.
template <class T>
void drop_groups(const Route<T>& a, int64_t n, float* biased) {
  const int64_t size = a.num_experts / a.groups;
  float *scores = a.group_scores + 2 * n * a.groups, *held = scores + a.groups;
  int64_t* kept = a.group_places + n * a.groups;
  for (int64_t g = 0; g < a.groups; ++g) scores[g] = two_largest(biased + g * size, size);
  largest_places(scores, a.groups, a.top_groups, held, kept);
  for (int64_t g = 0; g < a.groups; ++g) scores[g] = 0.0f;
  for (int64_t i = 0; i < a.top_groups; ++i) scores[kept[i]] = 1.0f;
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t i = g * size; scores[g] == 0.0f && i < (g + 1) * size; ++i) biased[i] = -INFINITY;
}

constexpr float tiny = 1e-20f;  // as in the reference

}  // namespace

template <class T>
void route_choose(const Route<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    float *all_scores = a.logits + n * a.num_experts, *biased = a.biased + n * a.num_experts;
    sweep(a.num_experts, [&](int64_t i, int64_t count) GLM_INLINED {
      const vf s = sigmoid(take(all_scores + i, count));
      give(all_scores + i, s, count);
      give(biased + i, s + take(a.bias + i, count), count);
    });
    if (a.top_groups < a.groups) drop_groups(a, n, biased);
    int64_t* experts = a.experts + n * a.top_k;
    float *weights = a.weights + n * a.top_k, *scores = a.scores + n * a.top_k, total = tiny;
    largest_places(biased, a.num_experts, a.top_k, weights, experts);
    for (int64_t j = 0; j < a.top_k; ++j) total += scores[j] = all_scores[experts[j]];
    for (int64_t j = 0; j < a.top_k; ++j)
      weights[j] = (a.normalize ? scores[j] / total : scores[j]) * a.scale;
  }
}

// With S the sum of the scores s: d s_j = (g_j - sum(g s) / S) / S; d logit = d s * s (1 - s).
template <class T>
void route_backward(const RouteBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float *g = a.dweights + n * a.top_k, *s = a.scores + n * a.top_k;
    float total = tiny, mean = 0.0f;
    for (int64_t j = 0; j < a.top_k; ++j) total += s[j];
    for (int64_t j = 0; a.normalize && j < a.top_k; ++j) mean += g[j] * a.scale * (s[j] / total);
    for (int64_t j = 0; j < a.top_k; ++j) {
      const float ds = (g[j] * a.scale - mean) / (a.normalize ? total : 1.0f);
      a.dlogits[n * a.num_experts + a.experts[n * a.top_k + j]] = ds * (1.0f - s[j]) * s[j];
    }
  }
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
