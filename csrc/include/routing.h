// The router's choice for one token, and its gradient, from scores on: of the CPU's kernels and of
// the GPU's exact ones, written once. vec.h or exact.h defines GLM_SPACE and GLM_INLINE.
// Shapes: X experts, G groups of them, T chosen for a token.
#pragma once

#include <cmath>

#include "kernels.h"
#if defined(GLM_ISA)
#include "vec.h"
#endif

namespace glm::GLM_SPACE {

// Whether a comes before b, the larger first. A NaN counts as the largest, as in torch's sort.
GLM_INLINE bool before(float a, float b) { return a > b || (a != a && b == b); }

// Writes the places of the `count` largest of x [size], the largest first; equal ones in order.
// `held` is scratch of as many.
GLM_INLINE void largest_places(const float* x, int64_t size, int64_t count, float* held,
                               int64_t* places) {
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
GLM_INLINE float two_largest(const float* x, int64_t size) {
  float most = x[0], next = 0.0f;
  for (int64_t i = 1; i < size; ++i)
    if (before(x[i], most)) {
      next = most;
      most = x[i];
    } else if (i == 1 || before(x[i], next)) {
      next = x[i];
    }
  return most + next;
}

// Sets the scores of all but the best groups to -inf.
template <class T>
GLM_INLINE void drop_groups(const Route<T>& a, int64_t n, float* biased) {
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

// Chooses token n's experts. Its logits are scores already, and `biased` those with the bias.
template <class T>
GLM_INLINE void choose(const Route<T>& a, int64_t n) {
  const float* all_scores = a.logits + n * a.num_experts;
  float* biased = a.biased + n * a.num_experts;
  if (a.top_groups < a.groups) drop_groups(a, n, biased);
  int64_t* experts = a.experts + n * a.top_k;
  float *weights = a.weights + n * a.top_k, *scores = a.scores + n * a.top_k, total = tiny;
  largest_places(biased, a.num_experts, a.top_k, weights, experts);
  for (int64_t j = 0; j < a.top_k; ++j) total += scores[j] = all_scores[experts[j]];
  for (int64_t j = 0; j < a.top_k; ++j)
    weights[j] = (a.normalize ? scores[j] / total : scores[j]) * a.scale;
}

// With S the sum of the scores s: d s_j = (g_j - sum(g s) / S) / S; d logit = d s * s (1 - s).
template <class T>
GLM_INLINE void choice_gradient(const RouteBackward<T>& a, int64_t n) {
  const float *g = a.dweights + n * a.top_k, *s = a.scores + n * a.top_k;
  float total = tiny, mean = 0.0f;
  for (int64_t j = 0; j < a.top_k; ++j) total += s[j];
  for (int64_t j = 0; a.normalize && j < a.top_k; ++j) mean += g[j] * a.scale * (s[j] / total);
  for (int64_t j = 0; j < a.top_k; ++j) {
    const float ds = (g[j] * a.scale - mean) / (a.normalize ? total : 1.0f);
    a.dlogits[n * a.num_experts + a.experts[n * a.top_k + j]] = ds * (1.0f - s[j]) * s[j];
  }
}

}  // namespace glm::GLM_SPACE
