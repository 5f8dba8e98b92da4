// The product of few rows with a weight: bound by reading the weight, which is read once.
// Shapes: N rows, D in, F features out.
#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int FEATURES = 4;
#else
constexpr int FEATURES = 2;
#endif
constexpr int ROWS = 4;
constexpr int64_t BLOCK = 32 * W;  // summed by itself, so that rounding errors stay small

// Features f ... f + R, rows n ... n + M. The order in which a result is summed depends on neither.
template <int R, int M, class T>
void tile(const LinearFew<T>& a, int64_t f, int64_t n) {
  const T* w = a.weight + f * a.width;
  const float* x = a.x + n * a.width;
  vf total[R][M] = {};
  for (int64_t begin = 0; begin < a.width; begin += BLOCK) {
    const int64_t size = a.width - begin < BLOCK ? a.width - begin : BLOCK;
    vf part[R][M] = {};
    sweep(size, [&](int64_t i, int64_t count) GLM_INLINED {
      vf row[M];
      for (int m = 0; m < M; ++m) row[m] = take(x + m * a.width + begin + i, count);
      for (int r = 0; r < R; ++r) {
        const vf v = take(w + r * a.width + begin + i, count);
        for (int m = 0; m < M; ++m) part[r][m] = fma(v, row[m], part[r][m]);
      }
    });
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) total[r][m] += part[r][m];
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      put(a.y + (n + m) * a.features + f + r,
          sum(total[r][m]) + (a.bias ? get(a.bias + f + r) : 0.0f));
}

template <int R, class T>
void features(const LinearFew<T>& a, int64_t f) {
  int64_t n = 0;
  for (; n + ROWS <= a.rows; n += ROWS) tile<R, ROWS>(a, f, n);
  switch (a.rows - n) {
    case 3:
      return tile<R, 3>(a, f, n);
    case 2:
      return tile<R, 2>(a, f, n);
    case 1:
      return tile<R, 1>(a, f, n);
  }
}

}  // namespace

template <class T>
void linear_few(const LinearFew<T>& a, int64_t begin, int64_t end) {
  int64_t f = begin;
  for (; f + FEATURES <= end; f += FEATURES) features<FEATURES>(a, f);
  for (; f < end; ++f) features<1>(a, f);
}

GLM_INSTANTIATE(linear_few, LinearFew)

}  // namespace glm::GLM_ISA
