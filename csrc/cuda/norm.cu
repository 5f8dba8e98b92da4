// RMS and layer norm, alone or of x + alpha * residual. Shapes: N rows, D width.
// Kept for backward: 1 / std (and the mean) per row; the normalised value is computed again. One
// block per row: its later passes find the row in the first-level cache (24 KB for D = 12288 in
// half precision). The weight's gradient takes a second kernel with one thread per column, so that
// it needs neither atomics nor shared memory and has the same bits every time.
#include "exact.h"

namespace glm::gpu {

namespace {

template <class T, int V>
__global__ void forward_rows(NormForward<T> a) {
  const int64_t row = blockIdx.x, at = row * a.width, step = int64_t(blockDim.x) * V;
  const int64_t begin = int64_t(threadIdx.x) * V;
  const T* t = (a.residual ? a.total : a.x) + at;
  float x[V], r[V], sum = 0.0f, center = 0.0f;
  if (a.residual || a.bias) {
    for (int64_t i = begin; i < a.width; i += step) {
      take(a.x + at + i, x);
      if (a.residual) {
        take(a.residual + at + i, r);
        for (int j = 0; j < V; ++j) x[j] = fmaf(a.alpha, r[j], x[j]);
        give(a.total + at + i, x);
        take(t + i, x);  // the rounded sum is normalised
      }
      for (int j = 0; j < V; ++j) sum += x[j];
    }
    if (a.bias) center = block_sum(sum) / float(a.width);
  }
  float square = 0.0f;
  for (int64_t i = begin; i < a.width; i += step) {
    take(t + i, x);
    for (int j = 0; j < V; ++j) square = fmaf(x[j] - center, x[j] - center, square);
  }
  const float scale = 1.0f / sqrtf(block_sum(square) / float(a.width) + a.eps);
  if (threadIdx.x == 0) {
    a.stats[row] = scale;
    if (a.bias) a.stats[a.rows + row] = center;
  }
  for (int64_t i = begin; i < a.width; i += step) {
    float w[V], b[V] = {};
    take(t + i, x);
    take(a.weight + i, w);
    if (a.bias) take(a.bias + i, b);
    for (int j = 0; j < V; ++j) x[j] = fmaf((x[j] - center) * scale, w[j], b[j]);
    give(a.y + at + i, x);
  }
}

// With g = dy * weight and h = the normalised row:
// dtotal += (g - mean(g) [layer norm only] - h mean(g h)) / std.
template <class T, int V>
__global__ void backward_rows(NormBackward<T> a) {
  const int64_t row = blockIdx.x, at = row * a.width, step = int64_t(blockDim.x) * V;
  const int64_t begin = int64_t(threadIdx.x) * V;
  const float scale = a.stats[row], center = a.dbias ? a.stats[a.rows + row] : 0.0f;
  float t[V], d[V], w[V], gh = 0.0f, g0 = 0.0f;
  for (int64_t i = begin; i < a.width; i += step) {
    take(a.total + at + i, t);
    take(a.dy + at + i, d);
    take(a.weight + i, w);
    for (int j = 0; j < V; ++j) {
      const float g = d[j] * w[j];
      gh = fmaf(g, (t[j] - center) * scale, gh);
      g0 += g;
    }
  }
  gh = block_sum(gh) / float(a.width);
  g0 = a.dbias ? block_sum(g0) / float(a.width) : 0.0f;
  for (int64_t i = begin; i < a.width; i += step) {
    float more[V] = {};
    take(a.total + at + i, t);
    take(a.dy + at + i, d);
    take(a.weight + i, w);
    if (a.dtotal) take(a.dtotal + at + i, more);
    for (int j = 0; j < V; ++j) {
      const float h = (t[j] - center) * scale;
      d[j] = fmaf(d[j] * w[j] - g0 - h * gh, scale, more[j]);
    }
    give(a.dx + at + i, d);
    if (!a.dresidual) continue;
    for (int j = 0; j < V; ++j) d[j] *= a.alpha;
    give(a.dresidual + at + i, d);
  }
}

template <class T>
__global__ void exact_forward_rows(NormForward<T> a) {
  const int64_t row = blockIdx.x, at = row * a.width;
  const T* t = (a.residual ? a.total : a.x) + at;
  if (a.residual) {
    for (int64_t i = threadIdx.x; i < a.width; i += blockDim.x)
      from_float(fmaf(to_float(a.residual[at + i]), a.alpha, to_float(a.x[at + i])),
                 a.total[at + i]);
    __syncthreads();
  }
  float sum[1], center = 0.0f;
  if (a.bias) {
    exact::row_sums(a.width, sum, [&](int64_t i, float* s) { s[0] += to_float(t[i]); });
    center = sum[0] / float(a.width);
  }
  exact::row_sums(a.width, sum, [&](int64_t i, float* s) {
    const float d = to_float(t[i]) - center;
    s[0] = fmaf(d, d, s[0]);
  });
  const float scale = 1.0f / sqrtf(sum[0] / float(a.width) + a.eps);
  if (threadIdx.x == 0) {
    a.stats[row] = scale;
    if (a.bias) a.stats[a.rows + row] = center;
  }
  for (int64_t i = threadIdx.x; i < a.width; i += blockDim.x) {
    const float normed = (to_float(t[i]) - center) * scale, w = to_float(a.weight[i]);
    from_float(a.bias ? fmaf(normed, w, to_float(a.bias[i])) : normed * w, a.y[at + i]);
  }
}

template <class T>
__global__ void exact_backward_rows(NormBackward<T> a) {
  const int64_t row = blockIdx.x, at = row * a.width;
  const T *dy = a.dy + at, *t = a.total + at;
  const float scale = a.stats[row], center = a.dbias ? a.stats[a.rows + row] : 0.0f;
  float sum[2];  // g h, g
  exact::row_sums(a.width, sum, [&](int64_t i, float* s) {
    const float g = to_float(dy[i]) * to_float(a.weight[i]);
    s[0] = fmaf(g, (to_float(t[i]) - center) * scale, s[0]);
    s[1] += g;
  });
  const float gh = sum[0] / float(a.width), g0 = a.dbias ? sum[1] / float(a.width) : 0.0f;
  for (int64_t i = threadIdx.x; i < a.width; i += blockDim.x) {
    const float h = (to_float(t[i]) - center) * scale;
    float dx = (to_float(dy[i]) * to_float(a.weight[i]) - g0 - h * gh) * scale;
    if (a.dtotal) dx += to_float(a.dtotal[at + i]);
    from_float(dx, a.dx[at + i]);
    if (a.dresidual) from_float(a.alpha * dx, a.dresidual[at + i]);
  }
}

// Sums a chunk's rows, V columns per thread: dweight = sum dy h, dbias = sum dy.
template <class T, int V>
__global__ void backward_columns(NormBackward<T> a) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V, chunk = blockIdx.y;
  if (column >= a.width) return;
  const int64_t first = chunk * a.chunk_rows, end = first + a.chunk_rows;
  float t[V], d[V], w[V] = {}, b[V] = {};
  for (int64_t row = first; row < end && row < a.rows; ++row) {
    const float scale = a.stats[row], center = a.dbias ? a.stats[a.rows + row] : 0.0f;
    take(a.total + row * a.width + column, t);
    take(a.dy + row * a.width + column, d);
    for (int j = 0; j < V; ++j) {
      w[j] = fmaf(d[j], (t[j] - center) * scale, w[j]);
      b[j] += d[j];
    }
  }
  give(a.dweight + chunk * a.width + column, w);
  if (a.dbias) give(a.dbias + chunk * a.width + column, b);
}

template <class T>
__global__ void sum_columns(SumChunks<T> a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.width) return;
  float s = 0.0f;
  for (int64_t c = 0; c < a.chunks; ++c) s += a.partial[c * a.width + i];
  from_float(s, a.out[i]);
}

template <class T, int V>
void run_columns(const NormBackward<T>& a, Stream stream) {
  const int64_t units = a.width / V;
  const dim3 grid(unsigned(divided_up(units, 64)), unsigned(divided_up(a.rows, a.chunk_rows)));
  launch(backward_columns<T, V>, grid, 64, stream, a);
}

template <class T, int V>
void run_backward(const NormBackward<T>& a, Stream stream) {
  launch(backward_rows<T, V>, dim3(unsigned(a.rows)), threads_for(a.width / V), stream, a);
  run_columns<T, V>(a, stream);
}

}  // namespace

template <class T>
void norm_forward(const NormForward<T>& a, Stream stream) {
  if (!a.rows || !a.width) return;
  const dim3 grid{unsigned(a.rows)};
  if (fits_wide<T>(a.width, a.x, a.residual, a.weight, a.bias, a.y, a.total))
    launch(forward_rows<T, wide<T>>, grid, threads_for(a.width / wide<T>), stream, a);
  else
    launch(forward_rows<T, 1>, grid, threads_for(a.width), stream, a);
}

template <class T>
void norm_backward(const NormBackward<T>& a, Stream stream) {
  if (!a.rows || !a.width) return;
  if (fits_wide<T>(a.width, a.dy, a.dtotal, a.total, a.weight, a.dx, a.dresidual, a.dweight,
                   a.dbias))
    run_backward<T, wide<T>>(a, stream);
  else
    run_backward<T, 1>(a, stream);
}

template <class T>
void sum_chunks(const SumChunks<T>& a, Stream stream) {
  if (!a.width) return;
  launch(sum_columns<T>, dim3(unsigned(divided_up(a.width, 64))), 64, stream, a);
}

template <class T>
void exact_norm_forward(const NormForward<T>& a, Stream stream) {
  if (!a.rows || !a.width) return;
  launch(exact_forward_rows<T>, dim3(unsigned(a.rows)), exact::threads_for_row(a.width), stream, a);
}

template <class T>
void exact_norm_backward(const NormBackward<T>& a, Stream stream) {
  if (!a.rows || !a.width) return;
  launch(exact_backward_rows<T>, dim3(unsigned(a.rows)), exact::threads_for_row(a.width), stream,
         a);
  run_columns<T, 1>(a, stream);
}

GLM_GPU_INSTANTIATE(norm_forward, NormForward)
GLM_GPU_INSTANTIATE(norm_backward, NormBackward)
GLM_GPU_INSTANTIATE(sum_chunks, SumChunks)
GLM_GPU_INSTANTIATE_EXACT(exact_norm_forward, NormForward)
GLM_GPU_INSTANTIATE_EXACT(exact_norm_backward, NormBackward)

}  // namespace glm::gpu
