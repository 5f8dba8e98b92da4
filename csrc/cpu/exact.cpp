// Matrix products whose sums have an order that depends on the depth alone (docs/exact.md): element
// k belongs to lane k % 16, each lane is one chain of fused multiply-adds, and the lanes are added
// up by halves. That is what linear_few does along a row; here the lanes come one after another,
// and a vector holds columns. Shapes: N rows, F columns, D depth.
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "vec.h"
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace glm::GLM_ISA {

namespace {

constexpr int64_t LANES = exact_lanes, PANEL = exact_panel;
// A register tile: ROWS x COLUMNS vectors of sums.
constexpr int COLUMNS = NATIVE == 8 ? 1 : 2, ROWS = exact_group;
constexpr int64_t STRIP = COLUMNS * NATIVE;  // columns of a tile; divides PANEL

// The order in which lanes come: neighbours in it are the lanes that are added to each other first.
constexpr int64_t lane_at(int64_t i) {
  return (i & 1) * 8 + (i >> 1 & 1) * 4 + (i >> 2 & 1) * 2 + (i >> 3);
}

// out[j][c] = x[c][j] of 4 by 4.
GLM_INLINE void transpose(const float* x, int64_t stride, float* const (&out)[4]) {
#if defined(__SSE__)
  __m128 row[4];
  for (int c = 0; c < 4; ++c) row[c] = _mm_loadu_ps(x + c * stride);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int j = 0; j < 4; ++j) _mm_storeu_ps(out[j], row[j]);
#else
  for (int j = 0; j < 4; ++j)
    for (int c = 0; c < 4; ++c) out[j][c] = x[c * stride + j];
#endif
}

// Lays `count` rows or columns out for the tiles: out [lane][depth / 16][WIDTH], floats, zero where
// there is nothing. across and along: strides of the rows and of the depth.
template <int64_t WIDTH, class T>
void lay_out(const T* x, int64_t across, int64_t along, int64_t count, int64_t depth, float* out) {
  const int64_t steps = exact_depth(depth) / LANES;
  const auto at = [&](int64_t k) GLM_INLINED {
    return out + (lane_at(k % LANES) * steps + k / LANES) * WIDTH;
  };
  if (count < WIDTH || depth % LANES) memset(out, 0, size_t(steps * LANES * WIDTH) * sizeof(float));
  if (across == 1) {
    // lane by lane: what one pass writes lies together
    for (int64_t lane = 0; lane < LANES; ++lane)
      for (int64_t k = lane; k < depth; k += LANES) {
        float* to = at(k);
        const T* from = x + k * along;
        if (count == WIDTH)
          for (int64_t i = 0; i < WIDTH; ++i) to[i] = get(from + i);
        else
          for (int64_t i = 0; i < count; ++i) to[i] = get(from + i);
      }
    return;
  }
  // in blocks, so that each cache line is touched once
  constexpr int64_t wide = WIDTH % 16 ? WIDTH : 16;
  for (int64_t i = 0; i < count; i += wide)
    for (int64_t k = 0; k < depth; k += LANES) {
      const int64_t height = depth - k < LANES ? depth - k : LANES;
      alignas(64) float block[wide][LANES] = {};
      for (int64_t c = 0; c < wide && i + c < count; ++c) {
        const T* from = x + (i + c) * across + k * along;
        if (along == 1 && W == LANES)
          give(block[c], take(from, height), height);
        else
          for (int64_t j = 0; j < height; ++j) block[c][j] = get(from + j * along);
      }
      for (int64_t j = 0; j < LANES; j += 4)
        for (int64_t c = 0; c < wide; c += 4) {
          float* to[4];
          for (int64_t l = 0; l < 4; ++l) to[l] = at(k + j + l) + i + c;
          transpose(block[c] + j, LANES, to);
        }
    }
}

// One panel's columns of b, laid out.
class Panel {
 public:
  explicit Panel(int64_t depth)
      : steps_(exact_depth(depth) / LANES),
        values_(static_cast<float*>(aligned_alloc(64, size_t(steps_ * LANES * PANEL + 16) * 4))) {
    if (!values_) throw std::bad_alloc();
  }
  ~Panel() { free(values_); }
  Panel(const Panel&) = delete;
  Panel& operator=(const Panel&) = delete;
  float* values() const { return values_; }
  int64_t steps() const { return steps_; }

 private:
  int64_t steps_;
  float* values_;
};

// out [M, STRIP] = the products of M rows with a strip of a panel. A lane's sums are kept until
// those that they are added to are there.
template <int M>
void tile(const float* a, const float* b, int64_t steps, float* out) {
  alignas(64) float kept[4][M * STRIP];
  int64_t top = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    nf acc[M][COLUMNS];
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < COLUMNS; ++c) acc[m][c] = native(0.0f);
    const float *x = a + lane * steps * ROWS, *y = b + lane * steps * PANEL;
    for (int64_t k = 0; k < steps; ++k) {
      nf column[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) column[c] = load<nf>(y + k * PANEL + c * NATIVE);
      GLM_UNROLLED
      for (int m = 0; m < M; ++m) {
        const nf value = native(x[k * ROWS + m]);
        for (int c = 0; c < COLUMNS; ++c) acc[m][c] = fma(value, column[c], acc[m][c]);
      }
    }
    for (int64_t bits = lane; bits & 1; bits >>= 1) {
      const float* before = kept[--top];
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < COLUMNS; ++c) acc[m][c] += load<nf>(before + m * STRIP + c * NATIVE);
    }
    float* place = lane + 1 == LANES ? out : kept[top++];
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < COLUMNS; ++c) store(place + m * STRIP + c * NATIVE, acc[m][c]);
  }
}

template <int M, class T>
void rows(const ExactProduct<T>& a, int64_t n, const Panel& panel, int64_t first, int64_t strip) {
  alignas(64) float out[M * STRIP];
  const int64_t at = first + strip;
  tile<M>(a.a + n * panel.steps() * LANES, panel.values() + strip, panel.steps(), out);
  const int64_t columns = a.columns - at < STRIP ? a.columns - at : STRIP;
  for (int m = 0; m < M; ++m)
    sweep(columns, [&](int64_t c, int64_t count) GLM_INLINED {
      const vf bias = a.bias ? take(a.bias + at + c, count) : all(0.0f);
      give(a.y + (n + m) * a.columns + at + c, take(out + m * STRIP + c, count) + bias, count);
    });
}

template <int M, class T>
void rest_of_rows(int64_t left, const ExactProduct<T>& a, int64_t n, const Panel& panel,
                  int64_t first, int64_t strip) {
  if (left == M) return rows<M>(a, n, panel, first, strip);
  if constexpr (M > 1) rest_of_rows<M - 1>(left, a, n, panel, first, strip);
}

template <class T>
void unit(const ExactProduct<T>& a, Panel& panel, int64_t first, int64_t part) {
  const int64_t left = a.columns - first, columns = left < PANEL ? left : PANEL;
  lay_out<PANEL>(a.b + first * a.column, a.column, a.step, columns, a.depth, panel.values());
  const int64_t groups = exact_groups(a.rows), last = groups * (part + 1) / a.parts * ROWS;
  const int64_t begin = groups * part / a.parts * ROWS, end = last < a.rows ? last : a.rows;
  for (int64_t n = begin; n < end; n += ROWS)
    for (int64_t strip = 0; strip < columns; strip += STRIP)
      if (end - n >= ROWS)
        rows<ROWS>(a, n, panel, first, strip);
      else
        rest_of_rows<ROWS - 1>(end - n, a, n, panel, first, strip);
}

}  // namespace

template <class T>
void exact_rows(const ExactRows<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin * ROWS; n < end * ROWS; n += ROWS)
    lay_out<ROWS>(a.x + n * a.row, a.row, a.step, a.rows - n < ROWS ? a.rows - n : ROWS, a.depth,
                  a.out + n * exact_depth(a.depth));
}

template <class T>
void exact_product(const ExactProduct<T>& a, int64_t begin, int64_t end) {
  Panel panel(a.depth);
  for (int64_t i = begin; i < end; ++i) unit(a, panel, i / a.parts * PANEL, i % a.parts);
}

GLM_INSTANTIATE(exact_rows, ExactRows)
GLM_INSTANTIATE(exact_product, ExactProduct)

}  // namespace glm::GLM_ISA
