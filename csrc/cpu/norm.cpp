// RMS and layer norm, alone or of x + alpha * residual. Shapes: N rows, D width.
// Kept for backward: 1 / std (and the mean) per row; the normalised value is formed again.
// A row stays in the first-level cache, so its passes (statistics, result) cost one trip to memory.
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

// Pass 1 of the forward: forms the rounded sum where there is a residual; returns what is normed.
template <class T>
const T* total_row(const NormForward<T>& a, int64_t row) {
  const T* x = a.x + row * a.width;
  if (!a.residual) return x;
  const T* r = a.residual + row * a.width;
  T* out = a.total + row * a.width;
  sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
    give(out + i, fma(take(r + i, n), a.alpha, take(x + i, n)), n);
  });
  return out;
}

template <class T>
float mean(const T* t, int64_t width) {
  float total[1];
  sums(width, total, [&](int64_t i, int64_t n, vf* s) GLM_INLINED { s[0] += take(t + i, n); });
  return total[0] / float(width);
}

template <class T>
float mean_square(const T* t, int64_t width, float center) {
  float total[1];
  sums(width, total, [&](int64_t i, int64_t n, vf* s) GLM_INLINED {
    vf d = first(take(t + i, n) - center, n);
    s[0] = fma(d, d, s[0]);
  });
  return total[0] / float(width);
}

template <class T>
void forward_row(const NormForward<T>& a, int64_t row) {
  const T* t = total_row(a, row);
  const float center = a.bias ? mean(t, a.width) : 0.0f;
  const float scale = 1.0f / std::sqrt(mean_square(t, a.width, center) + a.eps);
  T* y = a.y + row * a.width;
  a.stats[row] = scale;
  if (!a.bias) {
    sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
      give(y + i, take(t + i, n) * scale * take(a.weight + i, n), n);
    });
    return;
  }
  a.stats[a.rows + row] = center;
  sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
    vf normed = (take(t + i, n) - center) * scale;
    give(y + i, fma(normed, take(a.weight + i, n), take(a.bias + i, n)), n);
  });
}

// With g = dy * weight and h = the normalised row:
// dtotal += (g - mean(g) [layer norm only] - h mean(g h)) / std; dweight += dy h; dbias += dy.
template <class T>
void backward_row(const NormBackward<T>& a, int64_t row, float* dweight, float* dbias) {
  const int64_t at = row * a.width;
  const T *dy = a.dy + at, *t = a.total + at;
  const float scale = a.stats[row], center = dbias ? a.stats[a.rows + row] : 0.0f;
  float total[2];  // g h, g
  sums(a.width, total, [&](int64_t i, int64_t n, vf* s) GLM_INLINED {
    vf d = take(dy + i, n), h = (take(t + i, n) - center) * scale, g = d * take(a.weight + i, n);
    give(dweight + i, fma(d, h, take(dweight + i, n)), n);
    if (dbias) give(dbias + i, take(dbias + i, n) + d, n);
    s[0] = fma(g, h, s[0]);
    s[1] += g;
  });
  const float gh = total[0] / float(a.width), g0 = dbias ? total[1] / float(a.width) : 0.0f;
  sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
    vf h = (take(t + i, n) - center) * scale, g = take(dy + i, n) * take(a.weight + i, n);
    vf dx = (g - g0 - h * gh) * scale;
    if (a.dtotal) dx += take(a.dtotal + at + i, n);
    give(a.dx + at + i, dx, n);
    if (a.dresidual) give(a.dresidual + at + i, a.alpha * dx, n);
  });
}

}  // namespace

template <class T>
void norm_forward(const NormForward<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) forward_row(a, row);
}

template <class T>
void norm_backward(const NormBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    float* dweight = a.dweight + c * a.width;
    float* dbias = a.dbias ? a.dbias + c * a.width : nullptr;
    memset(dweight, 0, size_t(a.width) * sizeof(float));
    if (dbias) memset(dbias, 0, size_t(a.width) * sizeof(float));
    const int64_t first = c * a.chunk_rows, last = first + a.chunk_rows;
    for (int64_t row = first; row < last && row < a.rows; ++row)
      backward_row(a, row, dweight, dbias);
  }
}

template <class T>
void sum_chunks(const SumChunks<T>& a, int64_t begin, int64_t end) {
  sweep(end - begin, [&](int64_t i, int64_t n) GLM_INLINED {
    vf s = all(0.0f);
    for (int64_t c = 0; c < a.chunks; ++c) s += take(a.partial + c * a.width + begin + i, n);
    give(a.out + begin + i, s, n);
  });
}

GLM_INSTANTIATE(norm_forward, NormForward)
GLM_INSTANTIATE(norm_backward, NormBackward)
GLM_INSTANTIATE(sum_chunks, SumChunks)

}  // namespace glm::GLM_ISA
