// The router's choice of experts and the weighted sum of their rows, exact (docs/exact.md): fast
// runs have Triton kernels. Shapes: N tokens, X experts, T chosen for a token, D width.
#include "exact.h"

namespace glm::gpu {

namespace {

// A block scores a token's experts; one thread chooses, since equal scores are taken in order.
__global__ void choose_rows(Route<float> a) {
  const int64_t n = blockIdx.x;
  float *scores = a.logits + n * a.num_experts, *biased = a.biased + n * a.num_experts;
  for (int64_t i = threadIdx.x; i < a.num_experts; i += blockDim.x) {
    scores[i] = exact::sigmoid(scores[i]);
    biased[i] = scores[i] + a.bias[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) exact::choose(a, n);
}

__global__ void choice_gradients(RouteBackward<float> a, int64_t tokens) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n < tokens) exact::choice_gradient(a, n);
}

template <class T>
__global__ void weighted(WeightedRows<T> a) {
  const int64_t n = blockIdx.x, *back = a.back + n * a.top_k;
  const float* weights = a.weights + n * a.top_k;
  for (int64_t i = threadIdx.x; i < a.width; i += blockDim.x) {
    float y = 0.0f;
    for (int64_t j = 0; j < a.top_k; ++j)
      y = fmaf(to_float(a.rows[back[j] * a.width + i]), weights[j], y);
    from_float(y, a.y[n * a.width + i]);
  }
}

// A block has one choice of one token.
template <class T>
__global__ void weighted_backward(WeightedRowsBackward<T> a) {
  const int64_t choice = blockIdx.x, row = a.back[choice] * a.width;
  const T* dy = a.dy + choice / a.top_k * a.width;
  const float weight = a.weights[choice];
  float total[1];
  exact::row_sums(a.width, total, [&](int64_t i, float* s) {
    const float g = to_float(dy[i]);
    from_float(g * weight, a.drows[row + i]);
    s[0] = fmaf(g, to_float(a.rows[row + i]), s[0]);
  });
  if (threadIdx.x == 0) a.dweights[choice] = total[0];
}

}  // namespace

void exact_choose(const Route<float>& a, int64_t tokens, Stream stream) {
  if (tokens) launch(choose_rows, dim3(unsigned(tokens)), threads_for(a.num_experts), stream, a);
}

void exact_choose_backward(const RouteBackward<float>& a, int64_t tokens, Stream stream) {
  if (tokens)
    launch(choice_gradients, dim3(unsigned(divided_up(tokens, 64))), 64, stream, a, tokens);
}

template <class T>
void exact_weighted_rows(const WeightedRows<T>& a, int64_t tokens, Stream stream) {
  if (tokens) launch(weighted<T>, dim3(unsigned(tokens)), threads_for(a.width), stream, a);
}

template <class T>
void exact_weighted_rows_backward(const WeightedRowsBackward<T>& a, int64_t tokens, Stream stream) {
  const int64_t choices = tokens * a.top_k;
  if (choices)
    launch(weighted_backward<T>, dim3(unsigned(choices)), exact::threads_for_row(a.width), stream,
           a);
}

template void exact_weighted_rows(const WeightedRows<float>&, int64_t, Stream);
template void exact_weighted_rows(const WeightedRows<bf16>&, int64_t, Stream);
template void exact_weighted_rows_backward(const WeightedRowsBackward<float>&, int64_t, Stream);
template void exact_weighted_rows_backward(const WeightedRowsBackward<bf16>&, int64_t, Stream);

}  // namespace glm::gpu
