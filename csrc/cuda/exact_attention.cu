// Attention in the order of docs/exact.md. Shapes: L queries, S keys, H heads, K kv heads, E head
// dim, C head dim of the values. Scores [heads, L, S] lie in scratch in float32, of a few kv heads
// at a time: a maximum has to be known before the first exponential. Backward computes the
// probabilities again, and sums a key's gradient over the heads and queries that share it in one
// chain.
#include "exact.h"

namespace glm::gpu {

namespace {

// The keys that a query sees.
struct Seen {
  int64_t from, to;
};

template <class T>
__device__ inline Seen seen_by(const ExactAttention<T>& a, int64_t query) {
  const int64_t start = a.key_start[query], end = a.key_end[query];
  const int64_t from = start < 0 ? 0 : start > a.keys ? a.keys : start;
  return {from, end < from ? from : end > a.keys ? a.keys : end};
}

// Products q k of a query become e^(score - maximum), zero where it sees no key. With `gradients`
// they become probabilities, and dy v becomes the gradient of the scores; otherwise `shares` gets
// one over the sum.
template <bool gradients, class T>
__global__ void score_rows(ExactAttention<T> a) {
  const int64_t row = blockIdx.x;
  const Seen seen = seen_by(a, row % a.queries);
  float *p = a.scores + row * a.keys, *dp = gradients ? a.dscores + row * a.keys : nullptr;
  const int64_t count = seen.to - seen.from;
  float top = -INFINITY;
  for (int64_t i = threadIdx.x; i < a.keys; i += blockDim.x) {
    const bool sees = i >= seen.from && i < seen.to;
    const float score = p[i] * a.scale;
    p[i] = sees ? score : 0.0f;
    if (gradients && !sees) dp[i] = 0.0f;
    if (sees) top = exact::Larger()(top, score);
  }
  top = across_block(top, -INFINITY, exact::Larger());
  p += seen.from;
  float total[1];
  exact::row_sums(count, total, [&](int64_t i, float* sums) {
    const float e = exact::without_denormals(exact::exp(p[i] - top));
    p[i] = e;
    sums[0] += e;
  });
  const float factor = 1.0f / (count ? total[0] : 1.0f);
  if constexpr (!gradients) {
    if (threadIdx.x == 0) a.shares[row] = factor;
  } else {
    dp += seen.from;
    exact::row_sums(count, total, [&](int64_t i, float* sums) {
      const float x = exact::without_denormals(p[i] * factor);
      p[i] = x;
      sums[0] = fmaf(x, dp[i], sums[0]);
    });
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
      dp[i] = exact::without_denormals(p[i] * (dp[i] - total[0]));
  }
}

template <bool gradients, class T>
void rows(const ExactAttention<T>& a, Stream stream) {
  const dim3 grid(unsigned(a.units * a.members * a.queries));
  launch(score_rows<gradients, T>, grid, exact::threads_for_row(a.keys), stream, a);
}

// [units, members, L, S] in scratch.
template <class T>
Operand<float> in_scratch(const ExactAttention<T>& a, float* p) {
  const int64_t head = a.queries * a.keys;
  return {p, a.members * head, head, a.keys, 1};
}

template <class T>
Operand<T> turned(Operand<T> x) {
  return {x.p, x.unit, x.member, x.step, x.row};
}

// y = x b^T of every head.
template <class T, class X, class Y>
Products<X, T, Y> of_heads(const ExactAttention<T>& a, Operand<X> x, Operand<T> b, Operand<Y> y,
                           int64_t rows, int64_t columns, int64_t depth, float factor = 1.0f) {
  return {x, b, y, nullptr, nullptr, factor, rows, columns, depth, 1, a.members, a.units};
}

// y = x^T b of every kv head, summed over its heads and their queries.
template <class T>
Products<float, T, T> of_groups(const ExactAttention<T>& a, Operand<float> x, Operand<T> b,
                                Operand<T> y, int64_t columns, float factor) {
  return {turned(x), turned(b), y,         nullptr,   nullptr, factor,
          a.keys,    columns,   a.queries, a.members, 1,       a.units};
}

}  // namespace

template <class T>
void exact_attention_forward(const ExactAttention<T>& a, Stream stream) {
  if (!a.units || !a.queries || !a.values) return;
  const Operand<float> scores = in_scratch(a, a.scores);
  exact_chains(of_heads(a, a.q, a.k, scores, a.queries, a.keys, a.width), stream);
  rows<false>(a, stream);
  auto y = of_heads(a, scores, turned(a.v), a.y, a.queries, a.values, a.keys);
  y.factors = a.shares;
  exact_chains(y, stream);
}

template <class T>
void exact_attention_backward(const ExactAttention<T>& a, Stream stream) {
  if (!a.units) return;
  const Operand<float> p = in_scratch(a, a.scores), dp = in_scratch(a, a.dscores);
  if (a.queries && a.keys) {
    exact_chains(of_heads(a, a.q, a.k, p, a.queries, a.keys, a.width), stream);
    exact_chains(of_heads(a, a.dy, a.v, dp, a.queries, a.keys, a.values), stream);
    rows<true>(a, stream);
  }
  exact_chains(of_groups(a, p, a.dy, a.dv, a.values, 1.0f), stream);
  exact_chains(of_groups(a, dp, a.q, a.dk, a.width, a.scale), stream);
  exact_chains(of_heads(a, dp, turned(a.k), a.dq, a.queries, a.width, a.keys, a.scale), stream);
}

GLM_GPU_INSTANTIATE_EXACT(exact_attention_forward, ExactAttention)
GLM_GPU_INSTANTIATE_EXACT(exact_attention_backward, ExactAttention)

}  // namespace glm::gpu
