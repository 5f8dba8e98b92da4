// Optimizer arithmetic on lists of tensors: one launch works on batch_size tensors, which the
// grid's second dimension counts. Blocks beyond the end of a small tensor return at once.
#include "exact.h"

namespace glm::gpu {

namespace {

constexpr int threads = 256, per_thread = 16;

// In float over per_thread elements at a time, then in double.
template <class T>
__global__ void sum_squares(SquaresBatch<T> a) {
  const int t = int(blockIdx.y);
  const int64_t size = a.size[t], stride = int64_t(gridDim.x) * blockDim.x;
  double total = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size;) {
    float part = 0.0f;
    for (int k = 0; k < per_thread && i < size; ++k, i += stride) {
      const float x = to_float(a.x[t][i]);
      part = fmaf(x, x, part);
    }
    total += double(part);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) a.sums[int64_t(t) * a.blocks + blockIdx.x] = total;
}

// A block sums a stretch: threads the lanes of its blocks of 512, one thread all of them.
template <class T>
__global__ void exact_stretches(ExactSquares<T> a) {
  GLM_SHARED(float, parts, exact_stretch / 32);
  const int t = int(blockIdx.y);
  const int64_t size = a.size[t], begin = int64_t(blockIdx.x) * exact_stretch;
  if (begin >= size) return;
  const T* x = a.x[t] + begin;
  const int64_t count = size - begin < exact_stretch ? size - begin : exact_stretch;
  const int64_t first = int64_t(threadIdx.x) / exact::lanes * exact::block_elements;
  float part = 0.0f;
  for (int k = 0; k < exact::block_elements; k += exact::lanes) {
    const int64_t i = first + k + int(threadIdx.x) % exact::lanes;
    if (i >= count) break;
    const float v = to_float(x[i]);
    part = fmaf(v, v, part);
  }
  parts[threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.x) return;
  double total = 0;
  for (int i = 0; i < int(blockDim.x); ++i) total += double(parts[i]);
  a.sums[a.first[t] + blockIdx.x] = total;
}

__global__ void exact_root(const double* sums, int64_t count, float* out) {
  if (threadIdx.x) return;
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += sums[i];
  *out = float(sqrt(total));
}

__global__ void root(const double* sums, int64_t count, float* out) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) total += sums[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *out = float(sqrt(total));
}

template <class T>
__global__ void update(AdamWBatch<T> a) {
  const int t = int(blockIdx.y);
  const int64_t size = a.size[t], stride = int64_t(gridDim.x) * blockDim.x;
  const float scale = *a.grad_scale;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    const float g = to_float(a.grad[t][i]) * scale;
    const float m = fmaf(g, a.one_minus_beta1, a.exp_avg[t][i] * a.beta1);
    const float v = fmaf(g * g, a.one_minus_beta2, a.exp_avg_sq[t][i] * a.beta2);
    const float step = (m / a.correction1) / (sqrtf(v / a.correction2) + a.eps);
    const float p = fmaf(step, -a.lr, a.param[t][i] * a.decay);
    a.exp_avg[t][i] = m;
    a.exp_avg_sq[t][i] = v;
    a.param[t][i] = p;
    if (a.copy[t]) from_float(p, a.copy[t][i]);
  }
}

}  // namespace

// Enough blocks to fill any of today's devices, at per_thread elements a thread.
int blocks_for(int64_t largest) {
  const int64_t blocks = divided_up(largest, threads * per_thread);
  return int(blocks < 1 ? 1 : blocks > 512 ? 512 : blocks);
}

template <class T>
void squares(const SquaresBatch<T>& a, Stream stream) {
  const dim3 grid(unsigned(a.blocks), unsigned(a.tensors));
  launch(sum_squares<T>, grid, threads, stream, a);
}

template <class T>
void exact_squares(const ExactSquares<T>& a, Stream stream) {
  int64_t largest = 0;
  for (int t = 0; t < a.tensors; ++t) largest = a.size[t] > largest ? a.size[t] : largest;
  const dim3 grid(unsigned(divided_up(largest, exact_stretch)), unsigned(a.tensors));
  launch(exact_stretches<T>, grid, exact_stretch / 32, stream, a);
}

void exact_root_of_sum(const double* sums, int64_t count, float* out, Stream stream) {
  launch(exact_root, dim3(1), 64, stream, sums, count, out);
}

void root_of_sum(const double* sums, int64_t count, float* out, Stream stream) {
  launch(root, dim3(1), threads_for(count), stream, sums, count, out);
}

template <class T>
void adamw_update(const AdamWBatch<T>& a, Stream stream) {
  const dim3 grid(unsigned(a.blocks), unsigned(a.tensors));
  launch(update<T>, grid, threads, stream, a);
}

GLM_GPU_INSTANTIATE(squares, SquaresBatch)
GLM_GPU_INSTANTIATE_EXACT(exact_squares, ExactSquares)
GLM_GPU_INSTANTIATE(adamw_update, AdamWBatch)

}  // namespace glm::gpu
