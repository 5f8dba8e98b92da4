// Softmax cross-entropy of logits, which are overwritten by their gradient.
// Shapes: N rows (a chunk of the tokens), V vocabulary. One block per row; maximum and sum are
// found in one pass (Milakov & Gimelshein 2018, algorithm 3), since a row does not stay in the
// first-level cache.
#include "exact.h"

namespace glm::gpu {

namespace {

// Maximum of some logits, and their sum of e^(z - max).
struct Softmax {
  float max, sum;
};

using gpu::swapped;

__device__ inline Softmax swapped(Softmax x, int mask) {
  return {swapped(x.max, mask), swapped(x.sum, mask)};
}

// An empty sum adds nothing, whatever its maximum; -inf minus -inf would give NaN.
__device__ inline float rescaled(Softmax x, float max) {
  return x.sum == 0.0f ? 0.0f : x.sum * expf(x.max - max);
}

struct Joined {
  __device__ Softmax operator()(Softmax a, Softmax b) const {
    const float max = fmaxf(a.max, b.max);
    return {max, rescaled(a, max) + rescaled(b, max)};
  }
};

template <class T, int V>
__global__ void row_losses(CrossEntropy<T> a) {
  const int64_t row = blockIdx.x, label = a.labels[row];
  if (label < 0 || label >= a.vocab)
    return out_of_range("linear_cross_entropy: label", label, a.vocab);
  T* z = a.logits + row * a.vocab;
  const int64_t begin = int64_t(threadIdx.x) * V, step = int64_t(blockDim.x) * V;
  const float hit = to_float(z[label]), weight = a.token_weight[row];
  float x[V];
  Softmax mine{-INFINITY, 0.0f};
  for (int64_t i = begin; i < a.vocab; i += step) {
    take(z + i, x);
    float max = mine.max;
    for (int j = 0; j < V; ++j) max = fmaxf(max, x[j]);
    mine = {max, rescaled(mine, max)};
    for (int j = 0; j < V; ++j) mine.sum += expf(x[j] - max);
  }
  const Softmax all = across_block(mine, Softmax{-INFINITY, 0.0f}, Joined());
  const float lse = all.max + logf(all.sum);
  if (threadIdx.x == 0) a.loss[row] = (lse - hit) * weight;
  if (!a.gradient) return;
  for (int64_t i = begin; i < a.vocab; i += step) {
    take(z + i, x);
    for (int j = 0; j < V; ++j)
      x[j] = (i + j == label ? expf(x[j] - lse) - 1.0f : expf(x[j] - lse)) * weight;
    give(z + i, x);
  }
}

// In float32 a row's exponentials overwrite its logits, which loses nothing.
template <class T>
__global__ void exact_row_losses(CrossEntropy<T> a) {
  constexpr bool keeps = sizeof(T) == sizeof(float);
  const int64_t row = blockIdx.x, label = a.labels[row];
  if (label < 0 || label >= a.vocab)
    return out_of_range("linear_cross_entropy: label", label, a.vocab);
  T* z = a.logits + row * a.vocab;
  const float hit = to_float(z[label]), weight = a.token_weight[row];
  float top = -INFINITY, sum[1];
  for (int64_t i = threadIdx.x; i < a.vocab; i += blockDim.x)
    top = exact::Larger()(top, to_float(z[i]));
  top = across_block(top, -INFINITY, exact::Larger());
  exact::row_sums(a.vocab, sum, [&](int64_t i, float* s) {
    const float e = exact::exp(to_float(z[i]) - top);
    if (keeps) from_float(e, z[i]);
    s[0] += e;
  });
  const float lse = top + exact::exact_log(sum[0]);
  if (threadIdx.x == 0) a.loss[row] = (lse - hit) * weight;
  if (!a.gradient) return;
  const float share = weight / sum[0];
  for (int64_t i = threadIdx.x; i < a.vocab; i += blockDim.x) {
    const float x = to_float(z[i]), gradient = keeps ? x * share : exact::exp(x - lse) * weight;
    from_float(
        i == label ? weight * (exact::exp(hit - lse) - 1.0f) : exact::without_denormals(gradient),
        z[i]);
  }
}

__global__ void sum_in_order(const float* x, int64_t count, float* out) {
  if (threadIdx.x) return;
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += double(x[i]);
  *out = float(total);
}

}  // namespace

template <class T>
void exact_cross_entropy(const Losses<T>& a, Stream stream) {
  if (!a.rows) return;
  const dim3 grid{unsigned(a.rows)};
  launch(exact_row_losses<T>, grid, exact::threads_for_row(a.of.vocab), stream, a.of);
}

void exact_sum(const float* x, int64_t count, float* out, Stream stream) {
  launch(sum_in_order, dim3(1), 64, stream, x, count, out);
}

template <class T>
void cross_entropy(const Losses<T>& a, Stream stream) {
  if (!a.rows) return;
  const dim3 grid{unsigned(a.rows)};
  if (fits_wide<T>(a.of.vocab, a.of.logits))
    launch(row_losses<T, wide<T>>, grid, threads_for(a.of.vocab / wide<T>), stream, a.of);
  else
    launch(row_losses<T, 1>, grid, threads_for(a.of.vocab), stream, a.of);
}

GLM_GPU_INSTANTIATE(cross_entropy, Losses)
GLM_GPU_INSTANTIATE_EXACT(exact_cross_entropy, Losses)

int64_t device_memory() {
  size_t total = 0;
#if defined(__HIPCC__)
  size_t free = 0;
  if (hipMemGetInfo(&free, &total) != hipSuccess) return 0;
#elif !defined(GLM_FIBERS)
  size_t free = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return 0;
#endif
  return int64_t(total);
}

}  // namespace glm::gpu
