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
constexpr int64_t GROUP = exact_group;  // rows that are laid out together
// A register tile: ROWS x COLUMNS vectors of sums. ROWS divides GROUP.
constexpr int COLUMNS = 2, ROWS = NATIVE == 8 ? 6 : 12;
static_assert(GROUP % ROWS == 0);
constexpr int64_t STRIP = COLUMNS * NATIVE;  // columns of a tile; divides PANEL
constexpr int64_t cache_bytes = 1 << 20;     // what a panel may take of the second-level cache

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

// Floats that are aligned for vectors.
class Floats {
 public:
  explicit Floats(int64_t size)
      : values_(static_cast<float*>(aligned_alloc(64, size_t(size / 16 + 1) * 64))) {
    if (!values_) throw std::bad_alloc();
  }
  ~Floats() { free(values_); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  operator float*() const { return values_; }

 private:
  float* values_;
};

// A lane's place among those whose sums are kept until the lane that they are added to is there:
// the number of bits of `lane`. The last lane ends in place 0.
constexpr int64_t LEVELS = 4;

// Sums of rows and columns, by place: [LEVELS][rows][columns].
struct Kept {
  float* values;
  int64_t level, row;  // strides
};

// Computes a lane's sums of M rows with a strip of a panel, and adds those that wait for it.
template <int M>
void chains(const float* a, const float* b, int64_t steps, int64_t lane, const Kept& kept) {
  const float *x = a + lane * steps * GROUP, *y = b + lane * steps * PANEL;
  nf acc[M][COLUMNS];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < COLUMNS; ++c) acc[m][c] = native(0.0f);
  for (int64_t k = 0; k < steps; ++k) {
    nf column[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) column[c] = load<nf>(y + k * PANEL + c * NATIVE);
    GLM_UNROLLED
    for (int m = 0; m < M; ++m) {
      const nf value = native(x[k * GROUP + m]);
      for (int c = 0; c < COLUMNS; ++c) acc[m][c] = fma(value, column[c], acc[m][c]);
    }
  }
  float* place = kept.values + (lane % 2 + lane / 2 % 2 + lane / 4 % 2 + lane / 8) * kept.level;
  for (int64_t bits = lane; bits & 1; bits >>= 1) {
    place -= kept.level;
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < COLUMNS; ++c) acc[m][c] += load<nf>(place + m * kept.row + c * NATIVE);
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < COLUMNS; ++c) store(place + m * kept.row + c * NATIVE, acc[m][c]);
}

// Writes M rows of y from the last lane's sums.
template <int M, class T>
void finish(const ExactProduct<T>& a, int64_t n, int64_t first, const Kept& kept) {
  const int64_t columns = a.columns - first < STRIP ? a.columns - first : STRIP;
  for (int m = 0; m < M; ++m)
    sweep(columns, [&](int64_t c, int64_t count) GLM_INLINED {
      const vf bias = a.bias ? take(a.bias + first + c, count) : all(0.0f);
      give(a.y + (n + m) * a.columns + first + c,
           take(kept.values + m * kept.row + c, count) + bias, count);
    });
}

template <int M>
struct Number {
  static constexpr int value = M;
};

// Calls run(Number<count>()) for a count of at most M.
template <int M, class Run>
void with_number(int64_t count, const Run& run) {
  if (count == M) return run(Number<M>());
  if constexpr (M > 1) with_number<M - 1>(count, run);
}

template <class T>
void unit(const ExactProduct<T>& a, const Floats& panel, int64_t first, int64_t part) {
  const int64_t left = a.columns - first, columns = left < PANEL ? left : PANEL;
  const int64_t steps = exact_depth(a.depth) / LANES;
  lay_out<PANEL>(a.b + first * a.column, a.column, a.step, columns, a.depth, panel);
  const int64_t groups = exact_groups(a.rows), last = groups * (part + 1) / a.parts * GROUP;
  const int64_t begin = groups * part / a.parts * GROUP, end = last < a.rows ? last : a.rows;
  // run(Number<rows>, row, strip) for every tile
  const auto tiles = [&](const auto& run) {
    for (int64_t n = begin; n < end; n += ROWS)
      for (int64_t strip = 0; strip < columns; strip += STRIP)
        with_number<ROWS>(end - n < ROWS ? end - n : ROWS,
                          [&](auto number) { run(number, n, strip); });
  };
  const auto lane_of_tile = [&](auto number, int64_t n, int64_t strip, int64_t lane,
                                const Kept& kept) {
    const float* group = a.a + n / GROUP * GROUP * steps * LANES;
    chains<number.value>(group + n % GROUP, panel + strip, steps, lane, kept);
  };
  if (steps * LANES * PANEL * int64_t(sizeof(float)) <= cache_bytes || end - begin <= ROWS) {
    tiles([&](auto number, int64_t n, int64_t strip) {
      alignas(64) float values[LEVELS * number.value * STRIP];
      const Kept kept{values, number.value * STRIP, STRIP};
      for (int64_t lane = 0; lane < LANES; ++lane) lane_of_tile(number, n, strip, lane, kept);
      finish<number.value>(a, n, first + strip, kept);
    });
    return;
  }
  // a panel that outgrows the cache is read once for each lane, not once for each tile
  const Floats values(LEVELS * (end - begin) * PANEL);
  const auto kept_of = [&](int64_t n, int64_t strip) {
    return Kept{values + (n - begin) * PANEL + strip, (end - begin) * PANEL, PANEL};
  };
  for (int64_t lane = 0; lane < LANES; ++lane)
    tiles([&](auto number, int64_t n, int64_t strip) {
      lane_of_tile(number, n, strip, lane, kept_of(n, strip));
    });
  tiles([&](auto number, int64_t n, int64_t strip) {
    finish<number.value>(a, n, first + strip, kept_of(n, strip));
  });
}

}  // namespace

template <class T>
void exact_rows(const ExactRows<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin * GROUP; n < end * GROUP; n += GROUP)
    lay_out<GROUP>(a.x + n * a.row, a.row, a.step, a.rows - n < GROUP ? a.rows - n : GROUP, a.depth,
                   a.out + n * exact_depth(a.depth));
}

template <class T>
void exact_product(const ExactProduct<T>& a, int64_t begin, int64_t end) {
  const Floats panel(exact_depth(a.depth) * PANEL);
  for (int64_t i = begin; i < end; ++i) unit(a, panel, i / a.parts * PANEL, i % a.parts);
}

GLM_INSTANTIATE(exact_rows, ExactRows)
GLM_INSTANTIATE(exact_product, ExactProduct)

}  // namespace glm::GLM_ISA
